//! Plain attention in a merged model: one operator from the projections to what the heads give.
//!
//! A kernel of it reads queries, keys and values where the projections left them, and writes no scores. Its body is what
//! exporters write, so that without a kernel nothing is lost.

use vitrim_ir::{Attribute, Span, ValueId};
use vitrim_ops::{Attention, OpDef, ProportionalAttention};

use super::Rewriter;
use crate::recognise::{Form, PlainAttention, Window};

impl Rewriter<'_> {
    /// Finds the attention of blocks that is plain, with all its tokens in one stage.
    pub(super) fn find_plain_attention(&mut self) {
        if self.options.sliced || self.closes_connections() {
            return;
        }
        for (at, block) in self.vit.blocks.iter().enumerate() {
            let stage = self.stages.of_block(at);
            let counted = self.stages.count(stage).is_some_and(|count| count.as_known().is_some());
            let fits = |window: &Window| {
                // What has batch and tokens on one axis is told apart by the count.
                let counted = counted || !matches!(window.form, Form::Flat { .. });
                counted && self.stages.of(window.value) == Some(stage)
            };
            for attention in &block.attentions {
                let Some(plain) = self.vit.plain_attention(self.graph, attention) else { continue };
                let (dtype, of_operands) = (self.dtype(plain.y.value), self.dtype(plain.q.value));
                let windows = [plain.q, plain.k, plain.v, plain.y];
                if dtype.is_float() && dtype == of_operands && windows.iter().all(fits) {
                    self.plain.insert(attention.core.softmax, plain);
                }
            }
        }
    }

    /// Puts our operators in the place of a block's plain attention; proportional where tokens have sizes that count.
    pub(super) fn replace_plain_attention(&mut self, block: usize) {
        let stage = self.stages.of_block(block);
        for attention in &self.vit.blocks[block].attentions {
            let id = attention.core.softmax;
            let Some(PlainAttention { q, k, v, scale, y }) = self.plain.get(&id).copied() else { continue };
            let hint = format!("vitrim/{}", self.graph.value(y.value).name());
            let mut inputs: Vec<_> = [q, k, v].map(|window| self.channels_last(window, stage, &hint)).into();
            let size = self.size_over(stage, Span::ALL).filter(|_| self.weights.proportional);
            let op: &dyn OpDef = if size.is_some() { &ProportionalAttention } else { &Attention };
            inputs.extend(size);
            let ints = [("heads", q.heads), ("head_dim", q.head_dim), ("q_at", q.at), ("k_at", k.at), ("v_at", v.at)];
            let mut attributes: Vec<_> = ints.map(|(name, value)| (name, Attribute::Int(value))).into();
            attributes.push(("scale", Attribute::Float(scale as f32)));
            attributes.push(("dtype", Attribute::Int(self.dtype(y.value).code().into())));
            let joined = self.vitrim_with(op, &format!("{hint}/attention"), &inputs, &attributes, 1)[0];
            let result = match y.form {
                Form::Joined => joined,
                Form::Split => self.reshape(joined, &[0, 0, y.heads, y.head_dim], &format!("{hint}/heads")),
                Form::Flat { width } => self.reshape(joined, &[-1, width], &format!("{hint}/flat")),
            };
            self.replace(y.value, result);
        }
    }

    /// The tensor of a window as `[B, N, W]`. Once for each: readers of one tensor stay so.
    pub(super) fn channels_last(&mut self, window: Window, stage: usize, hint: &str) -> ValueId {
        let value = self.replacement(window.value);
        if let Some(&joined) = self.joined.get(&value) {
            return joined;
        }
        let target = match window.form {
            Form::Joined => return value,
            Form::Split => [0, 0, -1],
            Form::Flat { width } => {
                let count = self.stages.count(stage).and_then(|count| count.as_known());
                [-1, count.expect("such windows are plain where tokens are counted"), width]
            }
        };
        let joined = self.reshape(value, &target, &format!("{hint}/channels_last"));
        self.joined.insert(value, joined);
        joined
    }
}

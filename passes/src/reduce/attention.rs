//! Plain attention in a merged model: one operator from the projections to what the heads give.
//!
//! A kernel of it reads queries, keys and values where the projections left them, and writes no scores. Its body is what
//! exporters write, so that without a kernel nothing is lost.

use vitrim_ir::{Attribute, Span, ValueId};
use vitrim_ops::{Attention, OpDef, ProportionalAttention};

use super::Rewriter;
use super::extents::Extent;
use crate::Refusal;
use crate::recognise::{Form, PlainAttention, Window};

impl Rewriter<'_> {
    /// Finds the attention of blocks that is plain, with all its tokens in one stage.
    pub(super) fn find_plain_attention(&mut self) {
        // Where tokens expand, nothing reads sizes or keys but the model itself, and gradients are to pass: those of what
        // exporters write take fewer passes than those of the operator's body, which reads its windows one by one.
        if self.options.sliced || self.closes_connections() || self.expansion().is_some() {
            return;
        }
        for (at, block) in self.vit.blocks.iter().enumerate() {
            let stage = self.stages.of_block(at);
            let countable = self.is_countable(stage);
            let fits = |window: &Window| {
                // What has batch and tokens on one axis is told apart by the count.
                let apart = countable || !matches!(window.form, Form::Flat { .. });
                apart && self.stages.of(window.value) == Some(stage)
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
    pub(super) fn replace_plain_attention(&mut self, block: usize) -> Result<(), Refusal> {
        let stage = self.stages.of_block(block);
        for attention in &self.vit.blocks[block].attentions {
            let id = attention.core.softmax;
            let Some(PlainAttention { q, k, v, scale, y }) = self.plain.get(&id).copied() else { continue };
            let hint = format!("vitrim/{}", self.graph.value(y.value).name());
            let mut inputs = Vec::with_capacity(4);
            for window in [q, k, v] {
                inputs.push(self.channels_last(window, stage, &hint)?);
            }
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
        Ok(())
    }

    /// The tensor of a window as `[B, N, W]`. Once for each: readers of one tensor stay so.
    pub(super) fn channels_last(&mut self, window: Window, stage: usize, hint: &str) -> Result<ValueId, Refusal> {
        let value = self.replacement(window.value);
        if let Some(&joined) = self.joined.get(&value) {
            return Ok(joined);
        }
        let target = match window.form {
            Form::Joined => return Ok(value),
            Form::Split => [Extent::Known(0), Extent::Known(0), Extent::Open],
            Form::Flat { width } => [Extent::Open, self.tokens_of(Span::ALL, stage), Extent::Known(width)],
        };
        let joined = self.reshape_to(value, &target, stage, &format!("{hint}/channels_last"));
        let joined = joined.ok_or_else(|| Refusal::Internal("a flat window over tokens without a count".into()))?;
        self.joined.insert(value, joined);
        Ok(joined)
    }
}

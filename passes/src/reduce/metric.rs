//! The metric: what a block's attention knows of its tokens, averaged over heads.

use vitrim_ir::{Attribute, Expr, Span, Tensor, ValueId};

use super::extents::Extent;
use super::precision::Coding;
use super::{Metric, Rewriter};
use crate::Refusal;
use crate::recognise::{Attention, Window};

/// What an axis of a query, key or value tensor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Batch,
    Heads,
    BatchAndHeads,
    Tokens,
    Channels,
}
use Role::{Batch, BatchAndHeads, Channels, Heads, Tokens};

impl Rewriter<'_> {
    /// The metric of a block: of several attentions side by side the sum, which points where their mean does.
    pub(super) fn metric(&mut self, block: usize, metric: Metric, hint: &str) -> Result<Window, Refusal> {
        let mut sum: Option<Window> = None;
        let mut seen = Vec::new();
        for (at, attention) in self.vit.blocks[block].attentions.iter().enumerate() {
            let keys = attention.core.key(self.graph);
            if seen.contains(&keys) {
                continue;
            }
            seen.push(keys);
            let hint = if at == 0 { hint.to_owned() } else { format!("{hint}/attention{at}") };
            let own = self.metric_of(block, attention, metric, &hint)?;
            sum = Some(match sum {
                Some(sum) => {
                    let value = self.patch.op("Add", &format!("{hint}/sum"), &[sum.value, own.value], &[]);
                    Window { value, ..sum }
                }
                None => own,
            });
        }
        sum.ok_or_else(|| Refusal::Internal("a block without attention".into()))
    }

    fn metric_of(
        &mut self,
        block: usize,
        attention: &Attention,
        metric: Metric,
        hint: &str,
    ) -> Result<Window, Refusal> {
        let core = &attention.core;
        let graph = self.graph;
        if let Some(plain) = self.plain.get(&core.softmax) {
            let window = match metric {
                Metric::Query => plain.q,
                Metric::Value => plain.v,
                _ => plain.k,
            };
            return Ok(Window { value: self.channels_last(window, self.stages.of_block(block), hint)?, ..window });
        }
        let (reader, slot, name) = match metric {
            Metric::Query => (core.scores, core.slots.query, "query"),
            Metric::Value => (core.mix, core.slots.value, "value"),
            _ => (core.scores, core.slots.key, "key"),
        };
        let reader = graph.node(reader);
        let refusal = self.pinned(core.softmax, &format!("it is an attention whose {name} cannot be read"));
        let unknown = || refusal.clone();
        let operand = reader.input(slot).ok_or_else(unknown)?;
        if core.is_fused() && self.vit.axes.layout(operand).is_some_and(|layout| layout.rank() == 3) {
            return self.fused_metric(core, metric, hint).ok_or_else(unknown);
        }
        let roles = self.roles(operand).ok_or_else(unknown)?;
        let (value, roles) = self.walk_back(operand, roles);
        let coding = match self.dtype(value) {
            dtype if dtype.is_float() => Coding::Plain(dtype),
            _ => self.coding_of_operand(reader, slot).ok_or_else(unknown)?,
        };
        let layout = self.vit.axes.layout(value).ok_or_else(unknown)?.clone();
        let channels = roles.iter().position(|&role| role == Channels).and_then(|at| layout.0[at].plain_extent());
        let channels = channels.and_then(|extent| extent.as_known()).ok_or_else(unknown)?;
        let value = self.as_f32(value, coding, &format!("{hint}/{name}"));
        let heads = attention.heads as i64;

        // Split heads off the batch where they share an axis.
        let (value, roles) = match roles.as_slice() {
            [BatchAndHeads, a, b] => {
                let stage = self.stages.of_block(block);
                let batch = Extent::of(self.vit.axes.batch());
                let [first, second] = [1, 2].map(|at| self.extent(&layout.0[at], stage));
                let target = [batch, Extent::Known(heads), first, second];
                let split = self.reshape_to(value, &target, stage, &format!("{hint}/{name}_heads"));
                (split.ok_or_else(unknown)?, vec![Batch, Heads, *a, *b])
            }
            _ => (value, roles),
        };
        let place = |role: Role| roles.iter().position(|&other| other == role);
        let heads_at = place(Heads).ok_or_else(unknown)? as i64;
        let mean = self.reduce_mean(value, heads_at, &format!("{hint}/{name}_mean"));
        let left: Vec<Role> = roles.iter().copied().filter(|&role| role != Heads).collect();
        let wanted = [Batch, Tokens, Channels];
        let perm: Option<Vec<usize>> = wanted.iter().map(|role| left.iter().position(|other| other == role)).collect();
        let perm: Vec<usize> = perm.ok_or_else(unknown)?;
        let metric = self.transpose(mean, &perm, &format!("{hint}/{name}"));
        let all = self.with_all_tokens(metric, self.span_of(operand), &format!("{hint}/{name}"));
        Ok(Window::of_all(all, channels))
    }

    /// A metric of the entries in `span` as one of the tokens: without what is none, and with zeros for those left out,
    /// which are protected.
    fn with_all_tokens(&mut self, metric: ValueId, span: Span, hint: &str) -> ValueId {
        let added = Span { front: (-span.front).max(0), back: (-span.back).max(0) };
        let metric = self.within(metric, added, hint);
        let zeros = |count: i64| (count > 0).then(|| Tensor::f32s(&[1, count as usize, 1], &vec![0.0; count as usize]));
        match (zeros(span.front), zeros(span.back)) {
            (None, None) => metric,
            (front, back) => self.with_others(metric, front, back, hint),
        }
    }

    pub(super) fn reduce_mean(&mut self, value: ValueId, axis: i64, hint: &str) -> ValueId {
        let keep = ("keepdims", Attribute::Int(0));
        if self.model.opsets().standard() >= 18 {
            let axes = self.ints(&format!("{hint}_axes"), &[axis]);
            self.patch.op("ReduceMean", hint, &[value, axes], &[keep])
        } else {
            self.patch.op("ReduceMean", hint, &[value], &[("axes", Attribute::Ints(vec![axis])), keep])
        }
    }

    /// What the axes of an operand of an attention are: the axis with tokens is clear, batch and heads come in the
    /// batch's order, and the rest are channels.
    fn roles(&self, operand: ValueId) -> Option<Vec<Role>> {
        let layout = self.vit.axes.layout(operand)?;
        let (tokens, _) = layout.token_axis()?;
        let batch = self.vit.axes.batch().clone();
        let extent = |at: usize| layout.0[at].plain_extent();
        let mut roles = vec![Channels; layout.rank()];
        roles[tokens] = Tokens;
        let others: Vec<usize> = (0..layout.rank()).filter(|&at| at != tokens).collect();
        match others[..] {
            [batch_at, heads_at, _] if extent(batch_at)? == batch => {
                roles[batch_at] = Batch;
                roles[heads_at] = Heads;
            }
            [joined, _] if extent(joined)?.div_exact(&batch).is_some() => roles[joined] = BatchAndHeads,
            _ => return None,
        }
        // [B, N, H, d] has the tokens before the heads; [B, H, d, N] the channels before the tokens.
        Some(roles)
    }

    /// Follows an operand back to floats in a form with heads and tokens apart and channels last, through steps that
    /// change no direction: transposes, multiplication by one positive number, joining batch and heads, quantisation.
    fn walk_back(&self, operand: ValueId, roles: Vec<Role>) -> (ValueId, Vec<Role>) {
        let wanted = [Batch, Heads, Tokens, Channels];
        let mut best = (operand, roles.clone());
        let (mut value, mut roles) = (operand, roles);
        while roles != wanted || !self.dtype(value).is_float() {
            let Some((id, _)) = self.graph.producer(value) else { break };
            let node = self.graph.node(id);
            let Some(operand) = node.input(0) else { break };
            match node.standard_op() {
                Some("Identity" | "Cast") if self.vit.shapes.dtype(operand) == self.vit.shapes.dtype(value) => {
                    value = operand
                }
                Some("QuantizeLinear" | "DynamicQuantizeLinear") => {
                    value = operand;
                    best = (value, roles.clone());
                }
                Some("Mul" | "Div") => {
                    let (data, factor) = match node.input(1) {
                        Some(factor) if self.vit.axes.carries(operand) => (operand, factor),
                        Some(data) if node.is("Mul") => (data, operand),
                        _ => break,
                    };
                    let one = self.vit.shapes.dims(factor).is_some_and(|dims| dims.iter().all(|dim| dim.is(1)));
                    let positive =
                        self.vit.shapes.uniform(factor).map_or(!self.vit.shapes.is_data(factor), |x| x > 0.0);
                    if !(one && positive) || self.vit.axes.layout(data).map(|layout| layout.rank()) != Some(roles.len())
                    {
                        break;
                    }
                    value = data;
                }
                Some("Transpose") => {
                    let Some(perm) = node.ints("perm") else { break };
                    let mut before = roles.clone();
                    for (to, &from) in perm.iter().enumerate() {
                        before[from as usize] = roles[to];
                    }
                    (value, roles) = (operand, before);
                }
                Some("Reshape") => {
                    let dims = |value: ValueId| self.vit.shapes.dims(value);
                    let (Some(from), Some(to)) = (dims(operand), dims(value)) else { break };
                    let joins = |four: &[Expr], three: &[Expr]| {
                        four.len() == 4
                            && three.len() == 3
                            && four[0].times(&four[1]).as_ref() == Some(&three[0])
                            && four[2..] == three[1..]
                    };
                    match roles[..] {
                        [Batch, Heads, a, b] if joins(to, from) => {
                            (value, roles) = (operand, vec![BatchAndHeads, a, b])
                        }
                        [BatchAndHeads, a, b] if joins(from, to) => {
                            (value, roles) = (operand, vec![Batch, Heads, a, b])
                        }
                        _ => break,
                    }
                }
                _ => break,
            }
            if !roles.contains(&BatchAndHeads) && self.vit.axes.carries(value) {
                best = (value, roles.clone());
            }
        }
        best
    }
}

//! Parts of the tokens: operators that hold all but some at the ends, or others beside them.

use vitrim_ir::{NodeId, Span, Tensor, ValueId};

use super::Rewriter;
use crate::Refusal;

/// What some of the slots of a stage have. Each is made once: ONNX Runtime 1.20 fuses equal slices of one tensor, and
/// gives what it makes of them one name.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    /// Sizes, `[B, M, 1]` float32.
    size: Option<ValueId>,
    /// Their logarithms.
    pub log_size: Option<ValueId>,
    /// The slots of the original tokens, counted from the first slot of the part.
    pub owner: Option<ValueId>,
}

impl Rewriter<'_> {
    /// The tokens that a tensor holds along its only axis of them.
    pub(super) fn span_of(&self, value: ValueId) -> Span {
        self.vit.axes.layout(value).and_then(|layout| layout.token_axis()).map_or(Span::ALL, |(_, span)| span)
    }

    /// What is known by now of the slots in `span` at a stage.
    pub(super) fn part(&mut self, stage: usize, span: Span) -> &mut Part {
        self.parts.entry((stage, span)).or_default()
    }

    /// Sizes of the slots in `span` at a stage, `[B, M, 1]`; what is no token has the size one.
    pub(super) fn size_over(&mut self, stage: usize, span: Span) -> Option<ValueId> {
        let size = self.stages.entry(stage).size?;
        if span == Span::ALL {
            return Some(size);
        }
        if let Some(known) = self.part(stage, span).size {
            return Some(known);
        }
        let hint = format!("vitrim/size{stage}_{}_{}", span.front, span.back);
        let mut value = self.within(size, span, &hint);
        if !span.is_within() {
            let one =
                |count: i64| (count < 0).then(|| Tensor::f32s(&[1, -count as usize, 1], &vec![1.0; -count as usize]));
            value = self.with_others(value, one(span.front), one(span.back), &hint);
        }
        self.part(stage, span).size = Some(value);
        Some(value)
    }

    /// `positions`, `[B, K]`, of entries that are protected at both ends, for the entries of `span` alone and counted from
    /// the first of them. Without the span they count up to `total`.
    pub(super) fn positions_over(
        &mut self,
        node: NodeId,
        positions: ValueId,
        span: Span,
        total: Option<i64>,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        if span == Span::ALL {
            return Ok(positions);
        }
        let mut value = self.within(positions, span, hint);
        if span.front != 0 {
            let front = self.ints(&format!("{hint}_front"), &[span.front]);
            value = self.patch.op("Sub", &format!("{hint}_from_front"), &[value, front], &[]);
        }
        if span.is_within() {
            return Ok(value);
        }
        let count = |first: i64, count: i64| {
            let numbers: Vec<i64> = (first..first + count).collect();
            Tensor::integers(vitrim_ir::DataType::I64, &[1, numbers.len()], &numbers)
        };
        let front = (span.front < 0).then(|| count(0, -span.front));
        let back = match (span.back < 0, total) {
            (false, _) => None,
            (true, Some(total)) => Some(count(total - span.front, -span.back)),
            _ => {
                return Err(
                    self.pinned(node, "it has entries behind the tokens, whose number is known only at run time")
                );
            }
        };
        Ok(self.with_others(value, front, back, hint))
    }

    /// The entries along the second axis that are tokens of `span`.
    pub(super) fn within(&mut self, value: ValueId, span: Span, hint: &str) -> ValueId {
        if span.front <= 0 && span.back <= 0 {
            return value;
        }
        let end = if span.back > 0 { -span.back } else { i64::MAX };
        let bounds = [span.front.max(0), end, 1];
        let bounds = bounds.map(|bound| self.ints(&format!("{hint}_range"), &[bound]));
        self.patch.op("Slice", &format!("{hint}_part"), &[value, bounds[0], bounds[1], bounds[2]], &[])
    }

    /// `value` with the same entries before and behind it for every image, along the second axis.
    pub(super) fn with_others(
        &mut self,
        value: ValueId,
        front: Option<Tensor>,
        back: Option<Tensor>,
        hint: &str,
    ) -> ValueId {
        let bounds = [0, 1, 1].map(|bound| self.ints(&format!("{hint}_one"), &[bound]));
        let first = self.patch.op("Slice", &format!("{hint}_first"), &[value, bounds[0], bounds[1], bounds[2]], &[]);
        let zero = self.patch.op("Sub", &format!("{hint}_zero"), &[first, first], &[]);
        let entries = |rewriter: &mut Self, numbers: Option<Tensor>| {
            let numbers = rewriter.patch.constant(&format!("{hint}_others"), numbers?);
            Some(rewriter.patch.op("Add", &format!("{hint}_per_image"), &[zero, numbers], &[]))
        };
        let parts = [entries(self, front), Some(value), entries(self, back)];
        let parts: Vec<ValueId> = parts.into_iter().flatten().collect();
        self.patch.op("Concat", &format!("{hint}_with_others"), &parts, &[("axis", vitrim_ir::Attribute::Int(1))])
    }
}

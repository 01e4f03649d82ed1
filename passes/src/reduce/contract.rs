//! Sums over tokens other than by the weights of a softmax: linear and sigmoid attention, and attention whose heads are
//! mixed behind the softmax.
//!
//! In such a sum a slot counts as often as it stands for tokens, so one factor is multiplied by the sizes. Weights of
//! proportional attention have the sizes in them already. Where they go through something that makes them factors like
//! any other, they are divided by the sizes first: then they are what each token of the slot would have had.

use vitrim_ir::{NodeId, Span, ValueId};

use super::Rewriter;
use crate::Refusal;

impl Rewriter<'_> {
    /// Multiplies one factor of a sum over merged tokens by their sizes.
    pub(super) fn count_factors(
        &mut self,
        id: NodeId,
        slot: usize,
        axis: usize,
        span: Span,
        stage: usize,
    ) -> Result<(), Refusal> {
        let Some(factors) = self.graph.node(id).input(slot) else { return Ok(()) };
        let hint = format!("vitrim/{}/counted{slot}", self.graph.value(factors).name());
        let size = self.size_along(id, factors, axis, span, stage, &hint)?;
        let current = self.replacement(factors);
        let counted = self.patch.op("Mul", &hint, &[current, size], &[]);
        self.patch.rewire(id, slot, counted);
        Ok(())
    }

    /// Divides proportional weights by the sizes where a node makes other factors of them.
    pub(super) fn weights_per_token(&mut self, id: NodeId) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let axes = &self.vit.axes;
        for (slot, operand) in node.inputs.iter().enumerate() {
            let Some(operand) = *operand else { continue };
            let Some(stage) = self.stages.of(operand).filter(|&stage| self.stages.entry(stage).size.is_some()) else {
                continue;
            };
            let layout = axes.layout(operand).cloned().unwrap_or_default();
            let Some(axis) = (0..layout.rank()).find(|&at| layout.0[at].is_weights()) else { continue };
            let stay = |value: ValueId| {
                let result = axes.layout(value);
                result.is_some_and(|result| {
                    result.token_axes().len() == layout.token_axes().len()
                        && !result.0.iter().any(|axis| axis.is_weights())
                })
            };
            if !node.results().any(stay) {
                continue;
            }
            let span = layout.0[axis].only_tokens().unwrap_or(Span::ALL);
            let hint = format!("vitrim/{}/per_token", self.graph.value(operand).name());
            let size = self.size_along(id, operand, axis, span, stage, &hint)?;
            let current = self.replacement(operand);
            let shared = self.patch.op("Div", &hint, &[current, size], &[]);
            self.patch.rewire(id, slot, shared);
        }
        Ok(())
    }

    /// Sizes as they meet `value` along `axis`, in its type.
    pub(super) fn size_along(
        &mut self,
        id: NodeId,
        value: ValueId,
        axis: usize,
        span: Span,
        stage: usize,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        if !self.dtype(value).is_float() {
            return Err(self.pinned(id, "it weighs tokens with integers"));
        }
        let frame = self.frame_of(value, id)?;
        let size = self.size_over(stage, span).ok_or_else(|| self.pinned(id, "it has no sizes"))?;
        let size = self.spread_column(size, axis, &frame, &format!("{hint}/size"));
        let dtype = self.dtype(value);
        Ok(self.cast(size, vitrim_ir::DataType::F32, dtype, &format!("{hint}/size_as_factors")))
    }
}

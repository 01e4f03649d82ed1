//! Slots back to tokens: before nodes that need all tokens in their places, and at outputs.

use vitrim_ir::{Attribute, DataType, DimSpec, Span, Tensor, TensorType, ValueId};
use vitrim_ops::{TokenRestore, TokenSize};

use super::weigh::size_shape;
use super::{Reduction, Rewriter, SOURCE_OUTPUT};
use crate::Refusal;

impl Rewriter<'_> {
    pub(super) fn restore(&mut self) -> Result<(), Refusal> {
        let graph = self.graph;
        for id in self.stages.restore_at.clone() {
            for (slot, operand) in graph.node(id).inputs.iter().enumerate() {
                let Some(operand) = *operand else { continue };
                let Some(stage) = self.stage_read(operand).filter(|&stage| stage > 0) else { continue };
                let restored = self.restored(operand, stage)?;
                self.patch.rewire(id, slot, restored);
            }
        }
        for (slot, &output) in graph.outputs().iter().enumerate() {
            // An output keeps the tensor as it was before a merge, so its own stage counts.
            let Some(stage) = self.stages.of(output).filter(|&stage| stage > 0) else { continue };
            let restored = self.restored_as(output, self.current(output), stage)?;
            self.patch.replace_output(slot, restored);
        }
        if self.options.trace_source {
            self.trace_source()?;
        }
        Ok(())
    }

    /// `value`, as readers see it at `stage`, with all tokens in their places.
    fn restored(&mut self, value: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        let source = self.replacement(value);
        self.restored_as(value, source, stage)
    }

    /// `source` has the layout of `value`, whose tokens it restores.
    fn restored_as(&mut self, value: ValueId, source: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        if self.options.reduction == Reduction::Slice {
            return Err(Refusal::Request(
                "the slicing floor has no way back to all tokens, which this model needs".into(),
            ));
        }
        let name = self.graph.value(value).name().to_owned();
        let refuse = |what: &str| Refusal::Pinned { node: format!("the tensor '{name}'"), reason: what.into() };
        let layout = self.vit.axes.layout(value).cloned().unwrap_or_default();
        let token_axes = layout.token_axes();
        let batch = self.vit.batch();
        let batch_at = (0..layout.rank()).find(|&at| layout.0[at].plain_extent().as_ref() == Some(&batch));
        let (Some(batch_at), true) = (batch_at, token_axes.iter().all(|&at| layout.0[at].only_tokens().is_some()))
        else {
            return Err(refuse("it has to be restored, but its tokens share an axis with something else"));
        };
        let hint = format!("vitrim/{name}");
        match token_axes[..] {
            [axis] => {
                let span = layout.0[axis].only_tokens().unwrap_or_default();
                let owner = self.owner_of(stage, span, &hint)?;
                Ok(self.restore_rows(source, owner, layout.rank(), batch_at, axis, &hint))
            }
            // Attention maps: a token's row is its slot's; a column's weight is shared among the slot's tokens.
            [rows, columns]
                if layout.rank() == 4 && batch_at == 0 && layout.0[rows].only_tokens() == Some(Span::ALL) =>
            {
                let owner = self.owner_of(stage, Span::ALL, &hint)?;
                let size = self.stages.size(stage).ok_or_else(|| refuse("it has no sizes"))?;
                let target = self.patch.constant(&format!("{hint}/size_shape"), Tensor::shape(&size_shape(4, columns)));
                let share = self.patch.op("Reshape", &format!("{hint}/size"), &[size, target], &[]);
                let dtype = self.dtype(value);
                let share = self.cast(share, DataType::F32, dtype, &format!("{hint}/size_as_map"));
                let shared = self.patch.op("Div", &format!("{hint}/shared"), &[source, share], &[]);
                let by_rows = self.restore_rows(shared, owner, 4, 0, rows, &format!("{hint}/rows"));
                Ok(self.restore_rows(by_rows, owner, 4, 0, columns, &format!("{hint}/columns")))
            }
            _ => Err(refuse("it has to be restored, but has tokens on several axes")),
        }
    }

    /// Restores along one axis.
    fn restore_rows(
        &mut self,
        source: ValueId,
        owner: ValueId,
        rank: usize,
        batch: usize,
        axis: usize,
        hint: &str,
    ) -> ValueId {
        let rest = (0..rank).filter(|&at| at != batch && at != axis);
        let perm: Vec<i64> = [batch, axis].into_iter().chain(rest).map(|at| at as i64).collect();
        let straight = perm.iter().enumerate().all(|(at, &from)| at as i64 == from);
        let there = if straight {
            source
        } else {
            self.patch.op(
                "Transpose",
                &format!("{hint}/tokens_second"),
                &[source],
                &[("perm", Attribute::Ints(perm.clone()))],
            )
        };
        let restored = self.vitrim(&TokenRestore, &format!("{hint}/restored"), &[there, owner], &[], 1)[0];
        if straight {
            return restored;
        }
        let mut back = vec![0; rank];
        perm.iter().enumerate().for_each(|(at, &from)| back[from as usize] = at as i64);
        self.patch.op("Transpose", &format!("{hint}/as_before"), &[restored], &[("perm", Attribute::Ints(back))])
    }

    /// For the tokens of `span`: their slots, counted from the first slot of the span.
    fn owner_of(&mut self, stage: usize, span: Span, hint: &str) -> Result<ValueId, Refusal> {
        let owner = self.owner(stage).ok_or_else(|| Refusal::Request("no merge to undo".into()))?;
        if span == Span::ALL {
            return Ok(owner);
        }
        if span.front > self.protect || span.back > self.suffix {
            return Err(Refusal::Request(format!(
                "an output leaves out the first {} and last {} tokens, of which not all are protected",
                span.front, span.back
            )));
        }
        let end = if span.back == 0 { i64::MAX } else { -(span.back as i64) };
        let bounds = [span.front as i64, end, 1];
        let bounds = bounds.map(|bound| self.patch.constant(&format!("{hint}/owner_range"), Tensor::shape(&[bound])));
        let part =
            self.patch.op("Slice", &format!("{hint}/owner_part"), &[owner, bounds[0], bounds[1], bounds[2]], &[]);
        let front = self.patch.constant(&format!("{hint}/owner_front"), Tensor::shape(&[span.front as i64]));
        Ok(self.patch.op("Sub", &format!("{hint}/owner_of_part"), &[part, front], &[]))
    }

    /// Adds the output with the final slot of every original token.
    fn trace_source(&mut self) -> Result<(), Refusal> {
        let owner = match self.owner(self.stages.last()) {
            Some(owner) => owner,
            None => {
                // Nothing merges: every token is its own slot. A running count of ones gives 1, 2, ….
                let origin = self.vit.axes.origin();
                let x = self.swap_batch(origin, self.vit.stream.tokens, "vitrim/source_batch_first");
                let ones = self.vitrim(&TokenSize, "vitrim/initial_size", &[x], &[], 1)[0];
                let axis = self.patch.constant("vitrim/source_axis", Tensor::shape(&[2]));
                let ones = self.patch.op("Squeeze", "vitrim/source_ones", &[ones, axis], &[]);
                let along = self.patch.constant("vitrim/source_along", Tensor::i64(1));
                let exclusive = [("exclusive", Attribute::Int(1))];
                let own = self.patch.op("CumSum", "vitrim/source_counts", &[ones, along], &exclusive);
                self.cast(own, DataType::F32, DataType::I64, "vitrim/source_own")
            }
        };
        let dim = |extent: &vitrim_ir::Expr| match (extent.as_known(), extent.as_symbol()) {
            (Some(n), _) => DimSpec::Known(n),
            (_, Some(name)) => DimSpec::Named(name.into()),
            _ => DimSpec::Unknown,
        };
        let dims = vec![dim(&self.vit.batch()), dim(self.vit.tokens())];
        self.patch.append_output(SOURCE_OUTPUT, owner, TensorType { dtype: DataType::I64, dims: Some(dims) });
        Ok(())
    }
}

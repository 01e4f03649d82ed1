//! Tables with an entry for each token follow the tokens.
//!
//! What is added to tokens or multiplied with them (position tables, rotary ones among them) is averaged over each slot
//! like the tokens themselves: a sum or product with a mean of tokens is meant, and with rotary tables it keeps outputs
//! measurably closer to those of the unmerged model than either the anchor's row or the row at the mean position.
//! What concerns pairs of tokens (relative-position biases, masks), or is no floating-point number, or differs from
//! image to image is that of the slot's anchor, whose place the slot keeps.

use vitrim_ir::{Attribute, Effect, FusedAttention, NodeId, Span, Tensor, ValueId};
use vitrim_ops::{TokenMean, TokenRestore};

use super::arrange::Frame;
use super::{Reduction, Rewriter};
use crate::Refusal;

/// A table as readers at one stage see it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Followed {
    table: ValueId,
    stage: usize,
    axes: Vec<(usize, Span)>,
    frame: Frame,
    averaged: bool,
    result: ValueId,
}

impl Rewriter<'_> {
    pub(super) fn follow_tables(&mut self) -> Result<(), Refusal> {
        for (id, effect) in self.effects() {
            let Effect::Table { slot, axes } = effect else { continue };
            let node = self.graph.node(id);
            let (Some(table), Some(result)) = (node.input(slot), node.output(0)) else { continue };
            let Some(stage) = self.stages.of(result).filter(|&stage| stage > 0) else { continue };
            let fused = FusedAttention::of(self.graph, node).is_some();
            let frame = if fused { Frame::scores() } else { self.frame_of(result, id)? };
            let averaged = !fused && self.is_averaged(table, result);
            let followed = self.followed(id, table, &axes, stage, frame, averaged)?;
            self.patch.rewire(id, slot, followed);
            self.tables.insert((id, slot), followed);
        }
        Ok(())
    }

    fn followed(
        &mut self,
        id: NodeId,
        table: ValueId,
        axes: &[(usize, Span)],
        stage: usize,
        frame: Frame,
        averaged: bool,
    ) -> Result<ValueId, Refusal> {
        let same = |known: &&Followed| {
            (known.table, known.stage, known.averaged) == (table, stage, averaged)
                && known.axes == axes
                && known.frame == frame
        };
        if let Some(known) = self.followed.iter().find(same) {
            return Ok(known.result);
        }
        let hint = format!("vitrim/{}/stage{stage}", self.graph.value(table).name());
        let result = match self.options.reduction {
            Reduction::Slice => self.first_entries(id, table, axes, stage, &hint)?,
            Reduction::Merge if self.has_images(table, &frame) => {
                self.entries_per_image(id, table, axes, stage, &hint)?
            }
            Reduction::Merge => self.entries(id, table, axes, stage, &frame, averaged, &hint)?,
        };
        self.followed.push(Followed { table, stage, axes: axes.to_vec(), frame, averaged, result });
        Ok(result)
    }

    /// The axis of `table` that meets axis `at` of the frame, if it has that axis and an extent other than one there.
    fn axis_at(&self, table: ValueId, frame: &Frame, at: usize) -> Option<usize> {
        let dims = self.vit.shapes.dims(table)?;
        let own = (at + dims.len()).checked_sub(frame.rank())?;
        (!dims[own].is(1)).then_some(own)
    }

    /// Whether the table differs from image to image.
    fn has_images(&self, table: ValueId, frame: &Frame) -> bool {
        frame.batch_axis().is_some_and(|batch| self.axis_at(table, frame, batch).is_some())
    }

    /// Whether the entries of a table are averaged where it meets tokens: numbers that go with single tokens, not with
    /// pairs, and that are the same for all images.
    fn is_averaged(&self, table: ValueId, result: ValueId) -> bool {
        let single = self.vit.axes.layout(result).is_some_and(|layout| layout.token_axes().len() == 1);
        single && self.dtype(table).is_float() && !self.vit.shapes.is_data(table)
    }

    /// The slots' entries of a table that all images share.
    #[allow(clippy::too_many_arguments)]
    fn entries(
        &mut self,
        id: NodeId,
        table: ValueId,
        axes: &[(usize, Span)],
        stage: usize,
        frame: &Frame,
        averaged: bool,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let dims = self.vit.shapes.dims(table).unwrap_or_default().to_vec();
        let lead = frame.rank() - dims.len();
        if let Some((axis, heads)) = frame.shared()
            && let Some(own) = self.axis_at(table, frame, axis)
            && !dims[own].is(heads)
        {
            return Err(self.pinned(id, "it has a table for each image and head"));
        }
        // Axes along tokens to the front, those of extent one away: they come back where the table is spread out.
        let is_token = |axis: &usize| axes.iter().any(|(at, _)| at == axis);
        let others: Vec<usize> = (0..dims.len()).filter(|axis| !is_token(axis) && !dims[*axis].is(1)).collect();
        let units: Vec<i64> = (0..dims.len()).filter(|axis| dims[*axis].is(1)).map(|axis| axis as i64).collect();
        let kept: Vec<usize> = (0..dims.len()).filter(|axis| !dims[*axis].is(1)).collect();
        let place = |axis: &usize| kept.iter().position(|at| at == axis).unwrap_or(0);
        let order: Vec<usize> = axes.iter().map(|(axis, _)| axis).chain(&others).map(place).collect();
        let mut value = self.with_axes("Squeeze", table, &units, &format!("{hint}/squeezed"));
        value = self.transpose(value, &order, &format!("{hint}/tokens_first"));
        let meets: Vec<usize> = axes.iter().map(|(axis, _)| axis).chain(&others).map(|axis| lead + axis).collect();
        if let ([(_, span)], true) = (axes, averaged) {
            let extents: Vec<Option<i64>> = others.iter().map(|&axis| dims[axis].as_known()).collect();
            let mean = self.mean(id, value, stage, *span, self.dtype(table), &extents, hint)?;
            return Ok(self.spread(mean, &meets, frame, hint));
        }
        let indices = match axes {
            [(_, span)] => self.anchors(id, stage, *span, hint)?,
            [(rows, row_span), (columns, column_span)] => {
                // Rows and columns as one: a row of `heads` numbers for each pair of tokens.
                let count = dims[*columns].as_known().ok_or_else(|| {
                    self.pinned(id, "it has a table for pairs of tokens whose number is known only at run time")
                })?;
                let mut pairs = vec![-1];
                for &axis in &others {
                    let extent = dims[axis].as_known();
                    pairs.push(extent.ok_or_else(|| self.pinned(id, "it has a table of unknown extents"))?);
                }
                debug_assert!(rows != columns);
                value = self.reshape(value, &pairs, &format!("{hint}/pairs"));
                let rows = self.anchors(id, stage, *row_span, hint)?;
                let columns = self.anchors(id, stage, *column_span, hint)?;
                let rows = self.with_axes("Unsqueeze", rows, &[2], &format!("{hint}/rows"));
                let columns = self.with_axes("Unsqueeze", columns, &[1], &format!("{hint}/columns"));
                let count = self.patch.constant(&format!("{hint}/count"), Tensor::i64(count));
                let from = self.patch.op("Mul", &format!("{hint}/row_start"), &[rows, count], &[]);
                self.patch.op("Add", &format!("{hint}/pair"), &[from, columns], &[])
            }
            _ => return Err(self.pinned(id, "it has a table with tokens on more than two axes")),
        };
        let along = [("axis", Attribute::Int(0))];
        let gathered = self.patch.op("Gather", &format!("{hint}/anchored"), &[value, indices], &along);
        Ok(self.spread(gathered, &meets, frame, hint))
    }

    /// A table `[N, …]` with further extents as given, averaged over the slots of a stage: `[B, M, …]`.
    #[allow(clippy::too_many_arguments)]
    fn mean(
        &mut self,
        id: NodeId,
        table: ValueId,
        stage: usize,
        span: Span,
        dtype: vitrim_ir::DataType,
        extents: &[Option<i64>],
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let owner = self.owner_of(id, stage, span, hint)?;
        let size = self.size_over(stage, span).ok_or_else(|| self.pinned(id, "nothing is merged before it"))?;
        let rows = match extents {
            [_] => table,
            _ => self.reshape(table, &[0, -1], &format!("{hint}/rows")),
        };
        let mean = self.vitrim(
            &TokenMean,
            &format!("{hint}/mean"),
            &[rows, owner, size],
            &[("dtype", dtype.code().into())],
            1,
        )[0];
        if extents.len() == 1 {
            return Ok(mean);
        }
        let extents: Option<Vec<i64>> = extents.iter().copied().collect();
        let extents = extents.ok_or_else(|| self.pinned(id, "it has a table of unknown extents"))?;
        Ok(self.reshape(mean, &[vec![0, 0], extents].concat(), &format!("{hint}/split")))
    }

    /// The anchors' entries of a table that differs from image to image.
    fn entries_per_image(
        &mut self,
        id: NodeId,
        table: ValueId,
        axes: &[(usize, Span)],
        stage: usize,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let rank = self.vit.shapes.dims(table).map_or(0, <[vitrim_ir::Expr]>::len);
        let batch =
            self.vit.shapes.dims(table).and_then(|dims| dims.iter().position(|dim| dim == self.vit.axes.batch()));
        let batch =
            batch.ok_or_else(|| self.pinned(id, "it has a table whose batch axis cannot be told from others"))?;
        let mut value = table;
        for &(axis, span) in axes {
            let anchors = self.anchors(id, stage, span, hint)?;
            let rest = (0..rank).filter(|&at| at != batch && at != axis);
            let order: Vec<usize> = [batch, axis].into_iter().chain(rest).collect();
            let mut back = vec![0; rank];
            order.iter().enumerate().for_each(|(at, &from)| back[from] = at);
            let hint = format!("{hint}/axis{axis}");
            let there = self.transpose(value, &order, &format!("{hint}/tokens_second"));
            let rows = self.vitrim(&TokenRestore, &format!("{hint}/anchored"), &[there, anchors], &[], 1)[0];
            value = self.transpose(rows, &back, &format!("{hint}/as_before"));
        }
        Ok(value)
    }

    /// The first entries, as many as there are slots.
    fn first_entries(
        &mut self,
        id: NodeId,
        table: ValueId,
        axes: &[(usize, Span)],
        stage: usize,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let count = self.stages.count(stage).and_then(|count| count.as_known());
        let count =
            count.ok_or_else(|| self.pinned(id, "it has a table, and the token count is known only at run time"))?;
        let ends: Vec<i64> = axes.iter().map(|(_, span)| count - span.front - span.back).collect();
        let along: Vec<i64> = axes.iter().map(|(axis, _)| *axis as i64).collect();
        let bounds = [("starts", vec![0; ends.len()]), ("ends", ends), ("axes", along)];
        let bounds =
            bounds.map(|(name, values)| self.patch.constant(&format!("{hint}/{name}"), Tensor::shape(&values)));
        Ok(self.patch.op("Slice", &format!("{hint}/first"), &[table, bounds[0], bounds[1], bounds[2]], &[]))
    }

    /// For the slots of `span` at a stage: the original tokens whose places they keep, `[B, M]`, counted from the first
    /// token of the span.
    fn anchors(&mut self, id: NodeId, stage: usize, span: Span, hint: &str) -> Result<ValueId, Refusal> {
        let anchor = self.anchor(stage).ok_or_else(|| self.pinned(id, "nothing is merged before it"))?;
        let total = self.vit.tokens().as_known();
        self.positions_over(id, anchor, span, total, &format!("{hint}/anchors"))
    }

    /// The original token whose place each slot keeps, composed of the merges up to `stage`.
    fn anchor(&mut self, stage: usize) -> Option<ValueId> {
        let [anchor, ..] = self.stages.entry(stage).grouping?;
        if let Some(known) = self.stages.entry(stage).anchor {
            return Some(known);
        }
        let composed = match self.anchor(stage - 1) {
            Some(before) => {
                let axis = [("axis", Attribute::Int(1))];
                self.patch.op("GatherElements", &format!("vitrim/anchor{stage}"), &[before, anchor], &axis)
            }
            None => anchor,
        };
        self.stages.entry_mut(stage).anchor = Some(composed);
        Some(composed)
    }
}

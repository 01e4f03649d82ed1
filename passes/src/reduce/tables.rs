//! Tables with an entry for each token follow the tokens.
//!
//! What is added to tokens or multiplied with them (position tables, rotary ones among them) is averaged over each slot
//! like the tokens themselves: a sum or product with a mean of tokens is meant, and with rotary tables it keeps outputs
//! measurably closer to those of the unmerged model than either the anchor's row or the row at the mean position.
//! What concerns pairs of tokens (relative-position biases, masks), or is no floating-point number, or differs from
//! image to image is that of the slot's anchor, whose place the slot keeps. So is everything once tokens were dropped.
//! EViT's extra token has no anchor: it takes the place of the token that weighs most in it.

use vitrim_ir::{Attribute, Effect, FusedAttention, NodeId, Span, Tensor, ValueId};
use vitrim_ops::TokenMean;

use super::Rewriter;
use super::arrange::Frame;
use crate::Refusal;

/// A table with entries for the tokens, and how readers at one stage meet it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    value: ValueId,
    stage: usize,
    /// Its axes that run along tokens, and along which of them.
    axes: Vec<(usize, Span)>,
    /// What it is broadcast to.
    frame: Frame,
    /// Whether slots have the mean of their tokens' entries, not their anchor's.
    averaged: bool,
}

impl Rewriter<'_> {
    pub(super) fn follow_tables(&mut self) -> Result<(), Refusal> {
        for (id, effect) in self.effects() {
            if let Effect::Table { slot, axes } = effect {
                self.follow_table(id, slot, axes)?;
            }
        }
        Ok(())
    }

    /// Gives a node the table in `slot` as the slots of its stage need it.
    pub(super) fn follow_table(&mut self, id: NodeId, slot: usize, axes: Vec<(usize, Span)>) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let (Some(value), Some(result)) = (node.input(slot), node.output(0)) else { return Ok(()) };
        let Some(stage) = self.stages.of(result).filter(|&stage| stage > 0) else { return Ok(()) };
        if self.tables.contains_key(&(id, slot)) {
            return Ok(());
        }
        let fused = FusedAttention::of(self.graph, node).is_some();
        let frame = if fused { Frame::scores() } else { self.frame_of(result, id)? };
        // What was dropped is in no mean.
        let averaged = !fused && !self.stages.has_dropped(stage) && self.is_averaged(value, result);
        let followed = self.followed(id, Table { value, stage, axes, frame, averaged })?;
        self.patch.rewire(id, slot, followed);
        self.tables.insert((id, slot), followed);
        Ok(())
    }

    fn followed(&mut self, id: NodeId, table: Table) -> Result<ValueId, Refusal> {
        if let Some(&(_, result)) = self.followed.iter().find(|(known, _)| *known == table) {
            return Ok(result);
        }
        let hint = format!("vitrim/{}/stage{}", self.graph.value(table.value).name(), table.stage);
        let result = match table {
            _ if self.options.sliced => self.first_entries(id, &table, &hint)?,
            _ if self.has_images(&table) => self.entries_per_image(id, &table, &hint)?,
            _ => self.entries(id, &table, &hint)?,
        };
        self.followed.push((table, result));
        Ok(result)
    }

    /// The axis of a table that meets axis `at` of its frame, if it has that axis and an extent other than one there.
    fn axis_at(&self, table: &Table, at: usize) -> Option<usize> {
        let dims = self.vit.shapes.dims(table.value)?;
        let own = (at + dims.len()).checked_sub(table.frame.rank())?;
        (!dims[own].is(1)).then_some(own)
    }

    /// Whether the table differs from image to image.
    fn has_images(&self, table: &Table) -> bool {
        table.frame.batch_axis().is_some_and(|batch| self.axis_at(table, batch).is_some())
    }

    /// Whether the entries of a table are averaged where it meets tokens: numbers that go with single tokens, not with
    /// pairs, and that are the same for all images.
    fn is_averaged(&self, table: ValueId, result: ValueId) -> bool {
        let single = self.vit.axes.layout(result).is_some_and(|layout| layout.token_axes().len() == 1);
        single && self.dtype(table).is_float() && !self.vit.shapes.is_data(table)
    }

    /// The slots' entries of a table that all images share.
    fn entries(&mut self, id: NodeId, table: &Table, hint: &str) -> Result<ValueId, Refusal> {
        let (stage, axes, frame) = (table.stage, &table.axes, &table.frame);
        let dims = self.vit.shapes.dims(table.value).unwrap_or_default().to_vec();
        let lead = frame.rank() - dims.len();
        if let Some((axis, heads)) = frame.shared()
            && let Some(own) = self.axis_at(table, axis)
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
        let mut value = self.with_axes("Squeeze", table.value, &units, &format!("{hint}/squeezed"));
        value = self.transpose(value, &order, &format!("{hint}/tokens_first"));
        let meets: Vec<usize> = axes.iter().map(|(axis, _)| axis).chain(&others).map(|axis| lead + axis).collect();
        let extents: Option<Vec<i64>> = others.iter().map(|&axis| dims[axis].as_known()).collect();
        let extents = extents.ok_or_else(|| self.pinned(id, "it has a table of unknown extents"));
        let indices = match axes[..] {
            [(_, span)] if table.averaged => {
                let owner = self.owner_of(id, stage, span, hint)?;
                let size = self.size_over(stage, span).ok_or_else(|| self.pinned(id, "nothing is merged before it"))?;
                let joins = others.len() != 1;
                let rows = if joins { self.reshape(value, &[0, -1], &format!("{hint}/rows")) } else { value };
                let dtype = [("dtype", self.dtype(table.value).code().into())];
                let mean = self.vitrim(&TokenMean, &format!("{hint}/mean"), &[rows, owner, size], &dtype, 1)[0];
                let mean = if joins {
                    self.reshape(mean, &[vec![0, 0], extents?].concat(), &format!("{hint}/split"))
                } else {
                    mean
                };
                return Ok(self.spread(mean, &meets, frame, hint));
            }
            [(_, span)] => self.anchors(id, stage, span, hint)?,
            [(_, rows), (column, columns)] => {
                // Rows and columns as one: a row of `heads` numbers for each pair of tokens.
                let count = dims[column].as_known().ok_or_else(|| {
                    self.pinned(id, "it has a table for pairs of tokens whose number is known only at run time")
                })?;
                value = self.reshape(value, &[vec![-1], extents?].concat(), &format!("{hint}/pairs"));
                let rows = self.anchors(id, stage, rows, hint)?;
                let columns = self.anchors(id, stage, columns, hint)?;
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

    /// The anchors' entries of a table that differs from image to image.
    fn entries_per_image(&mut self, id: NodeId, table: &Table, hint: &str) -> Result<ValueId, Refusal> {
        let dims = self.vit.shapes.dims(table.value).unwrap_or_default();
        let batch = dims.iter().position(|dim| dim == self.vit.axes.batch());
        let batch =
            batch.ok_or_else(|| self.pinned(id, "it has a table whose batch axis cannot be told from others"))?;
        let mut value = table.value;
        for &(axis, span) in &table.axes {
            let anchors = self.anchors(id, table.stage, span, hint)?;
            let hint = format!("{hint}/axis{axis}");
            value = self.gather_along(value, anchors, [batch, axis], dims.len(), &hint, "anchored");
        }
        Ok(value)
    }

    /// The first entries, as many as there are slots.
    fn first_entries(&mut self, id: NodeId, table: &Table, hint: &str) -> Result<ValueId, Refusal> {
        let count = self.stages.count(table.stage).and_then(|count| count.as_known());
        let count =
            count.ok_or_else(|| self.pinned(id, "it has a table, and the token count is known only at run time"))?;
        let ends: Vec<i64> = table.axes.iter().map(|(_, span)| count - span.front - span.back).collect();
        let along: Vec<i64> = table.axes.iter().map(|(axis, _)| *axis as i64).collect();
        let bounds = [("starts", vec![0; ends.len()]), ("ends", ends), ("axes", along)];
        let bounds = bounds.map(|(name, values)| self.ints(&format!("{hint}/{name}"), &values));
        Ok(self.patch.op("Slice", &format!("{hint}/first"), &[table.value, bounds[0], bounds[1], bounds[2]], &[]))
    }

    /// For the slots of `span` at a stage: the original tokens whose places they have, `[B, M]`, counted from the first
    /// token of the span.
    fn anchors(&mut self, id: NodeId, stage: usize, span: Span, hint: &str) -> Result<ValueId, Refusal> {
        let anchor = self.anchor(stage).ok_or_else(|| self.pinned(id, "nothing is merged before it"))?;
        let total = self.vit.tokens().as_known();
        self.positions_over(id, anchor, span, total, &format!("{hint}/anchors"))
    }
}

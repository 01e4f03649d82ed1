//! Operators that state the token count get the right one.

use vitrim_ir::{Attribute, Effect, FusedAttention, NodeId, Tensor, ValueId};

use super::Rewriter;
use super::extents::{Extent, all_known, reshape_target};
use crate::Refusal;

impl Rewriter<'_> {
    pub(super) fn recount(&mut self) -> Result<(), Refusal> {
        for (id, effect) in self.effects() {
            let node = self.graph.node(id);
            let Some(stage) = node.results().find_map(|value| self.stages.of(value)) else { continue };
            match effect {
                // Before the first merge too: shape arithmetic that is left over there costs time and, on a GPU, copies.
                Effect::Shape { slot } => self.restate_shape(id, slot, stage)?,
                _ if stage == 0 => {}
                Effect::Parts => self.split_by_ranges(id, stage),
                Effect::SliceEnd { slot } => self.restate_end(id, slot)?,
                Effect::UniformTable { slot } => self.shrink_table(id, slot),
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives a `Reshape` or `Expand` a target that holds at `stage`.
    fn restate_shape(&mut self, id: NodeId, slot: usize, stage: usize) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let (Some(operand), Some(result)) = (node.input(0), node.output(0)) else { return Ok(()) };
        let from = self.vit.axes.layout(operand).cloned().unwrap_or_default();
        let to = self.vit.axes.layout(result).cloned().unwrap_or_default();
        let extents: Vec<Extent> = to.0.iter().map(|axis| self.extent(axis, stage)).collect();
        let target = if node.is("Expand") {
            // One leaves an axis as it is.
            let lead = to.rank() - from.rank();
            let keeps = |at: usize| at.checked_sub(lead).is_some_and(|at| !from.0[at].atoms().is_empty());
            let stated = |(at, extent)| if keeps(at) { Extent::Known(1) } else { extent };
            Some(extents.into_iter().enumerate().map(stated).collect())
        } else {
            reshape_target(&extents, |at| from.0.get(at) == to.0.get(at))
        };
        let refusal = self.pinned(id, "it has a shape whose extents cannot be found at run time");
        let unknown = || refusal.clone();
        let target: Vec<Extent> = target.ok_or_else(unknown)?;
        if target.contains(&Extent::Known(0)) && node.int("allowzero").unwrap_or(0) != 0 {
            self.patch.set_attribute(id, "allowzero", Attribute::Int(0));
        }
        let stated = self.graph.constant(node.input(slot).unwrap_or(operand)).and_then(|stated| stated.to_i64s());
        if stated.is_none() || stated != all_known(&target) {
            let hint = format!("vitrim/{}/shape", self.graph.value(result).name());
            let target = self.shape(&target, stage, &hint).ok_or_else(unknown)?;
            self.patch.rewire(id, slot, target);
        }
        Ok(())
    }

    /// A split of the tokens into special ones and the rest states the length of every part; ranges counted from the ends
    /// need not.
    fn split_by_ranges(&mut self, id: NodeId, stage: usize) {
        let node = self.graph.node(id);
        let parts: Vec<ValueId> = node.results().collect();
        let is_rest = |value: &ValueId| self.stages.of(*value) == Some(stage);
        let (Some(operand), Some(rest)) = (node.input(0), parts.iter().position(is_rest)) else { return };
        let operand = self.replacement(operand);
        let axis = self.vit.axes.layout(parts[rest]).and_then(|layout| layout.token_axis()).map_or(0, |(axis, _)| axis);
        let extent = |value: &ValueId| {
            let dims = self.vit.shapes.dims(*value);
            dims.and_then(|dims| dims[axis].as_known()).unwrap_or(0)
        };
        let mut bounds = Vec::new();
        let mut start = 0;
        for part in &parts[..rest] {
            bounds.push((start, start + extent(part)));
            start += extent(part);
        }
        let mut end = -parts[rest + 1..].iter().map(extent).sum::<i64>();
        let position = |end: i64| if end == 0 { i64::MAX } else { end };
        bounds.push((start, position(end)));
        for part in &parts[rest + 1..] {
            bounds.push((end, position(end + extent(part))));
            end += extent(part);
        }
        for (part, (start, end)) in parts.into_iter().zip(bounds) {
            let hint = format!("vitrim/{}", self.graph.value(part).name());
            let bounds = [start, end, axis as i64];
            let bounds = bounds.map(|bound| self.ints(&format!("{hint}/range"), &[bound]));
            let range = self.patch.op("Slice", &hint, &[operand, bounds[0], bounds[1], bounds[2]], &[]);
            self.replace(part, range);
        }
    }

    /// Lets a slice that ends at a position counted from the front end at the same token counted from the back.
    fn restate_end(&mut self, id: NodeId, slot: usize) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let (Some(operand), Some(result)) = (node.input(0), node.output(0)) else { return Ok(()) };
        let axes = node.input(3).and_then(|axes| self.graph.constant(axes)).and_then(|axes| axes.to_i64s());
        let single = axes.as_ref().map_or_else(
            || {
                self.vit
                    .shapes
                    .dims(node.input(slot).unwrap_or(operand))
                    .is_some_and(|dims| dims.first().is_some_and(|dim| dim.is(1)))
            },
            |axes| axes.len() == 1,
        );
        if !single || node.ints("ends").is_some() {
            return Err(self.pinned(id, "it slices several axes at once up to a fixed token"));
        }
        let span = |value: ValueId| {
            self.vit.axes.layout(value).and_then(|layout| layout.token_axis()).map(|(_, span)| span.back)
        };
        let cut = span(result).unwrap_or(0) - span(operand).unwrap_or(0);
        let end = if cut == 0 { i64::MAX } else { -cut };
        let hint = format!("vitrim/{}/end", self.graph.value(result).name());
        let end = self.ints(&hint, &[end]);
        self.patch.rewire(id, slot, end);
        Ok(())
    }

    /// A table whose entries are all the same is that number.
    fn shrink_table(&mut self, id: NodeId, slot: usize) {
        let node = self.graph.node(id);
        let Some(table) = node.input(slot) else { return };
        let Some(number) = self.vit.shapes.uniform(table) else { return };
        if let (Some(other), Some(result)) = (self.beside_neutral(id, slot), node.output(0)) {
            self.bypass(result, other);
            return;
        }
        // What is added to all scores alike changes no softmax.
        if FusedAttention::of(self.graph, node).is_some() {
            self.patch.clear_input(id, slot);
            return;
        }
        let dtype = self.dtype(table);
        let hint = format!("vitrim/{}/uniform", self.graph.value(table).name());
        let scalar = if dtype.is_float() {
            Tensor::floats(dtype, &[], &[number])
        } else {
            Tensor::integers(dtype, &[], &[number as i64])
        };
        let scalar = self.patch.constant(&hint, scalar);
        self.patch.rewire(id, slot, scalar);
    }

    /// The other operand of a node that adds a table of zeros or multiplies with one of ones, if that is all it does.
    fn beside_neutral(&self, id: NodeId, slot: usize) -> Option<ValueId> {
        let node = self.graph.node(id);
        let table = node.input(slot)?;
        let number = self.vit.shapes.uniform(table)?;
        let neutral =
            (node.is("Add") || (node.is("Sub") && slot == 1)) && number == 0.0 || (node.is("Mul") && number == 1.0);
        let other = node.operands().find(|&value| value != table)?;
        let rank = |value: ValueId| self.vit.axes.layout(value).map(|layout| layout.rank());
        (neutral && rank(other) == rank(node.output(0)?)).then_some(other)
    }

    /// What a value is when tables that change nothing are left out.
    pub(super) fn past_neutral_tables(&self, mut value: ValueId) -> ValueId {
        while let Some((id, 0)) = self.graph.producer(value) {
            let slot = self.vit.axes.effects_of(id).find_map(|effect| match *effect {
                Effect::UniformTable { slot } => Some(slot),
                _ => None,
            });
            match slot.and_then(|slot| self.beside_neutral(id, slot)) {
                Some(other) => value = other,
                None => break,
            }
        }
        value
    }

    /// Lets the readers of `result` read `source`.
    fn bypass(&mut self, result: ValueId, source: ValueId) {
        if self.graph.output_slots(result).next().is_none() {
            self.replace(result, self.replacement(source));
        }
    }
}

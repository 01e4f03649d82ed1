//! The edits: operands become parts, and what names positions or extents follows.

use std::collections::HashMap;

use vitrim_ir::{Attribute, Expr, Node, NodeId, Patch, Tensor, ValueId};

use super::demand::{Plan, Shrunk};
use super::part::{Factor, Part};
use super::rules::Rules;
use crate::target::reshape_target;

pub(super) struct Writer<'a> {
    pub rules: &'a Rules<'a>,
    pub plan: &'a Plan,
    pub patch: Patch,
    /// Parts that were cut out, for all readers of them.
    cuts: HashMap<(ValueId, Part), ValueId>,
}

impl<'a> Writer<'a> {
    pub fn new(rules: &'a Rules<'a>, plan: &'a Plan, patch: Patch) -> Self {
        Self { rules, plan, patch, cuts: HashMap::new() }
    }

    /// Makes all edits of the plan; `None` where one of them cannot be written, which the plan excludes.
    pub fn write(mut self) -> Option<Patch> {
        for shrunk in &self.plan.shrunk {
            self.shrink(shrunk)?;
        }
        for &(node, axis) in &self.plan.picks {
            self.pick(node, axis)?;
        }
        for &(node, value) in &self.plan.restated {
            self.patch.rewire(node, 0, value);
        }
        for &value in self.plan.held.keys() {
            self.patch.forget_type(value);
        }
        Some(self.patch)
    }

    fn node(&self, id: NodeId) -> &'a Node {
        self.rules.graph.node(id)
    }

    fn name(&self, value: ValueId) -> &'a str {
        self.rules.graph.value(value).name()
    }

    fn ints(&mut self, hint: &str, values: &[i64]) -> ValueId {
        self.patch.constant(hint, Tensor::shape(values))
    }

    fn shrink(&mut self, shrunk: &Shrunk) -> Option<()> {
        let node = self.node(shrunk.node);
        for (slot, part) in &shrunk.needs.parts {
            let value = node.input(*slot)?;
            let supplied = self.supply(value, part)?;
            if supplied != value {
                self.patch.rewire(shrunk.node, *slot, supplied);
            }
        }
        let Some(target) = &shrunk.needs.target else { return Some(()) };
        if target.contains(&0) && node.int("allowzero").unwrap_or(0) != 0 {
            self.patch.set_attribute(shrunk.node, "allowzero", Attribute::Int(0));
        }
        let stated = self.rules.graph.constant(node.input(1)?).and_then(|stated| stated.to_i64s());
        if stated.as_ref() != Some(target) {
            let target = self.ints(&format!("vitrim/{}/shape", self.name(node.output(0)?)), target);
            self.patch.rewire(shrunk.node, 1, target);
        }
        Some(())
    }

    /// Where a part of a value is to be had: in a value that stays.
    fn resolve(&self, value: ValueId, part: &Part) -> (ValueId, Part) {
        match self.plan.sources.get(&value) {
            Some(source) => self.resolve(source.value, &source.part(part)),
            None => (value, part.clone()),
        }
    }

    /// A value that holds just this part of `value`.
    fn supply(&mut self, value: ValueId, part: &Part) -> Option<ValueId> {
        let (value, part) = self.resolve(value, part);
        let held = self.plan.held.get(&value);
        if held.is_some_and(|held| (held.start, held.end) == (part.start, part.end)) {
            return Some(value);
        }
        let key = (value, part);
        if let Some(&cut) = self.cuts.get(&key) {
            return Some(cut);
        }
        let cut = self.cut(value, &key.1)?;
        self.cuts.insert(key, cut);
        Some(cut)
    }
    fn cut(&mut self, value: ValueId, part: &Part) -> Option<ValueId> {
        let (held, dims) = (self.plan.held.get(&value), self.rules.dims(value)?);
        let hint = format!("vitrim/{}/part", self.name(value));
        let first = held.map_or(0, |held| held.start);
        let (start, end) = (part.start - first, part.end - first);
        let Factor { axis, outer, extent, inner } = &part.factor;
        if part.factor.is_axis() {
            return Some(self.slice(value, *axis, start, end, &hint));
        }
        // The factor gets an axis of its own, and then joins the others again.
        let extent = held.map_or(extent.clone(), |held| Expr::known(held.count()));
        let mut apart = dims.to_vec();
        apart.splice(axis..=axis, [outer.clone(), extent, inner.clone()]);
        let apart = self.reshape(value, &apart, &format!("{hint}/apart"))?;
        let sliced = self.slice(apart, axis + 1, start, end, &hint);
        self.reshape(sliced, &part.cut(dims)?, &format!("{hint}/joined"))
    }

    fn reshape(&mut self, value: ValueId, dims: &[Expr], hint: &str) -> Option<ValueId> {
        let extents: Vec<Option<i64>> = dims.iter().map(Expr::as_known).collect();
        let target = reshape_target(&extents, |_| false)?;
        let target = self.ints(&format!("{hint}/shape"), &target);
        Some(self.patch.op("Reshape", hint, &[value, target], &[]))
    }

    fn slice(&mut self, value: ValueId, axis: usize, start: i64, end: i64, hint: &str) -> ValueId {
        let bounds = [("starts", start), ("ends", end), ("axes", axis as i64)];
        let bounds = bounds.map(|(name, number)| self.ints(&format!("{hint}/{name}"), &[number]));
        self.patch.op("Slice", hint, &[value, bounds[0], bounds[1], bounds[2]], &[])
    }

    /// Lets a node that takes tokens by position find them among those that are left.
    fn pick(&mut self, id: NodeId, axis: usize) -> Option<()> {
        let node = self.node(id);
        let value = node.input(0)?;
        let part = self.rules.picked(node, axis)?;
        let (source, from) = self.resolve(value, &part);
        let held = self.plan.held.get(&source);
        if source == value && held.is_none() {
            return Some(());
        }
        let offset = from.start - part.start - held.map_or(0, |held| held.start);
        match node.standard_op()? {
            "Gather" => {
                let positions = self.rules.positions(node, axis)?;
                self.move_positions(id, 1, positions.into_iter().map(|at| at + offset).collect())?;
            }
            "Slice" => {
                let slices = self.rules.slices(node)?;
                for (slot, moved) in [(1, part.start + offset), (2, part.end + offset)] {
                    let given = self.rules.ints(node.input(slot)?)?;
                    let bound =
                        |(&(own, ..), given): (&(usize, i64, i64), i64)| if own == axis { moved } else { given };
                    self.move_positions(id, slot, slices.iter().zip(given).map(bound).collect())?;
                }
            }
            // The lengths that it states need not be stated of its results apart.
            _ => {
                for (result, part) in self.rules.split(node, axis)? {
                    if self.rules.is_read(result) {
                        let supplied = self.supply(value, &part)?;
                        self.patch.rewire_uses(self.rules.graph, result, supplied, |_| true);
                        for slot in self.rules.graph.output_slots(result).collect::<Vec<_>>() {
                            self.patch.replace_output(slot, supplied);
                        }
                    }
                }
                return Some(());
            }
        }
        if source != value {
            self.patch.rewire(id, 0, source);
        }
        Some(())
    }

    /// Gives operand `slot`, a list of positions, other ones.
    fn move_positions(&mut self, id: NodeId, slot: usize, positions: Vec<i64>) -> Option<()> {
        let operand = self.node(id).input(slot)?;
        if self.rules.ints(operand)? != positions {
            let dims = self.rules.dims(operand)?.iter().map(|dim| usize::try_from(dim.as_known()?).ok());
            let dims: Vec<usize> = dims.collect::<Option<_>>()?;
            let moved = Tensor::integers(self.rules.shapes.dtype(operand)?, &dims, &positions);
            let moved = self.patch.constant(&format!("vitrim/{}", self.name(operand)), moved);
            self.patch.rewire(id, slot, moved);
        }
        Some(())
    }
}

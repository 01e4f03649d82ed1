//! Token counts that the model computes with keep their values.
//!
//! A merge changes what `Shape` and `Size` say of the tensors behind it. Shapes of tokens are stated anew
//! (`recount`); anything else that a count goes into (a factor, a mask, an output) was made for the old one.

use std::collections::HashSet;

use vitrim_ir::{Attribute, Axis, Effect, Span, Use, ValueId};

use super::Rewriter;
use crate::Refusal;

impl Rewriter<'_> {
    pub(super) fn keep_counts(&mut self) -> Result<(), Refusal> {
        let graph = self.graph;
        let restated = self.restated();
        for (id, node) in graph.nodes().filter(|(_, node)| node.is("Shape") || node.is("Size")) {
            let (Some(operand), Some(result)) = (node.input(0), node.output(0)) else { continue };
            if self.stage_read(operand).is_none_or(|stage| stage == 0) {
                continue;
            }
            let layout = self.vit.axes.layout(operand).cloned().unwrap_or_default();
            let axes: Vec<(usize, &Axis)> = layout.0.iter().enumerate().collect();
            let axes = if node.is("Shape") { &axes[node.stated_axes(axes.len())] } else { &axes[..] };
            let harmless = |reader: &Use| node.is("Shape") && self.takes_plain_extents(reader, result, axes);
            let skipped = |reader: &Use| restated.contains(reader) || harmless(reader);
            if !graph.reaches_output(result, skipped) {
                continue;
            }
            let origin = self.vit.axes.origin();
            if self.vit.shapes.dims(operand).is_some_and(|dims| self.vit.shapes.dims(origin) == Some(dims)) {
                self.patch.rewire(id, 0, origin);
                continue;
            }
            let readers: HashSet<Use> =
                graph.value(result).uses().iter().copied().filter(|reader| !skipped(reader)).collect();
            let hint = format!("vitrim/{}", graph.value(result).name());
            let Some(mut old) = self.old_shape(operand, axes, &hint) else {
                return Err(self.pinned(id, "it states a token count that is known only at run time"));
            };
            if node.is("Size") {
                old = self.patch.op("ReduceProd", &format!("{hint}/size"), &[old], &[("keepdims", Attribute::Int(0))]);
            }
            self.patch.rewire_uses(graph, result, old, |reader| readers.contains(reader));
            for slot in graph.output_slots(result).collect::<Vec<_>>() {
                self.patch.replace_output(slot, old);
            }
        }
        Ok(())
    }

    /// Operands that `recount` gives the right count.
    fn restated(&self) -> HashSet<Use> {
        let slot = |effect: &Effect| match *effect {
            Effect::Shape { slot } | Effect::SliceEnd { slot } | Effect::UniformTable { slot } => Some(slot),
            _ => None,
        };
        let of_stage = |reader: &Use| {
            self.graph.node(reader.node).results().any(|value| self.stages.of(value).is_some_and(|s| s > 0))
        };
        let effects = self.vit.axes.effects().iter();
        let uses = effects.filter_map(|(node, effect)| Some(Use { node: *node, slot: Some(slot(effect)?) }));
        uses.filter(of_stage).collect()
    }

    /// Whether `reader` takes single extents out of `shape`, none of them a token count.
    fn takes_plain_extents(&self, reader: &Use, shape: ValueId, axes: &[(usize, &Axis)]) -> bool {
        let node = self.graph.node(reader.node);
        let indices =
            node.input(1).and_then(|indices| self.graph.constant(indices)).and_then(|tensor| tensor.to_i64s());
        let is_plain = |&index: &i64| {
            let at = if index < 0 { index + axes.len() as i64 } else { index };
            usize::try_from(at).is_ok_and(|at| axes.get(at).is_some_and(|(_, axis)| !axis.has_tokens()))
        };
        let of_shape = node.is("Gather") && reader.slot == Some(0) && node.input(0) == Some(shape);
        of_shape && indices.is_some_and(|indices| indices.iter().all(is_plain))
    }

    fn old_extent(&self, axis: &Axis) -> Option<i64> {
        axis.extent(self.vit.tokens())?.as_known()
    }

    /// The axis of the origin that holds the tokens and nothing else.
    pub(super) fn origin_tokens(&self) -> Option<usize> {
        self.vit.axes.layout(self.vit.axes.origin())?.token_axis().map(|(axis, _)| axis)
    }

    /// Extents of `operand` as they were before any merge.
    fn old_shape(&mut self, operand: ValueId, axes: &[(usize, &Axis)], hint: &str) -> Option<ValueId> {
        let known: Option<Vec<i64>> = axes.iter().map(|(_, axis)| self.old_extent(axis)).collect();
        if let Some(shape) = known {
            return Some(self.ints(&format!("{hint}/old"), &shape));
        }
        let along = [("axis", Attribute::Int(0))];
        let mut parts = Vec::with_capacity(axes.len());
        for &(at, axis) in axes {
            let (source, from) = match self.old_extent(axis) {
                Some(extent) => {
                    parts.push(self.ints(&format!("{hint}/extent{at}"), &[extent]));
                    continue;
                }
                None if !axis.has_tokens() => (self.replacement(operand), at),
                None if axis.only_tokens() == Some(Span::ALL) => (self.vit.axes.origin(), self.origin_tokens()?),
                None => return None,
            };
            let shape = self.patch.op("Shape", &format!("{hint}/shape{at}"), &[source], &[]);
            let index = self.ints(&format!("{hint}/axis{at}"), &[from as i64]);
            parts.push(self.patch.op("Gather", &format!("{hint}/extent{at}"), &[shape, index], &along));
        }
        Some(self.patch.op("Concat", &format!("{hint}/old"), &parts, &along))
    }
}

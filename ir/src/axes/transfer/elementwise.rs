//! Operators that treat every entry alike, with broadcasting.

use super::{Context, Flow, Transfer};
use crate::axes::{Axis, Effect, Layout};
use crate::graph::Node;
use crate::{Expr, ValueId};

impl Context<'_> {
    pub(super) fn elementwise(&self, node: &Node, operands: &[(usize, ValueId)]) -> Transfer {
        if node.is("Where") && self.where_replaces_nan(node) {
            return Ok(Flow::of(self.operand(node, 2)?.clone()));
        }
        let flow = self.broadcast(operands)?;
        // Comparisons and products of weights with anything but one number are no weights any more.
        let keeps_weights = matches!(node.op.name.as_str(), "Identity" | "Cast" | "CastLike" | "Dropout");
        let layouts = flow.layouts.into_iter().map(|layout| {
            layout.map(|layout| {
                if keeps_weights {
                    layout
                } else {
                    Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect())
                }
            })
        });
        Ok(Flow { layouts: layouts.collect(), effects: flow.effects })
    }

    /// `Where(IsNaN(p), 0, p)` with a single zero: weights stay weights.
    pub(super) fn where_replaces_nan(&self, node: &Node) -> bool {
        let Some((condition, _)) = node.input(0).and_then(|value| self.graph.producer(value)) else { return false };
        let condition = self.graph.node(condition);
        let single = |value: ValueId| self.shapes.dims(value).is_some_and(|dims| dims.iter().all(|dim| dim.is(1)));
        condition.is("IsNaN") && condition.input(0) == node.input(2) && node.input(1).is_some_and(single)
    }

    /// Operands aligned at the last axis; axes of extent one stretch.
    pub(super) fn broadcast(&self, operands: &[(usize, ValueId)]) -> Transfer {
        let rank = |value: ValueId| match self.layout(Some(value)) {
            Some(layout) => Ok(layout.rank()),
            None => self.dims(value).map(<[Expr]>::len),
        };
        let ranks = operands.iter().map(|&(_, value)| rank(value)).collect::<Result<Vec<_>, _>>()?;
        let out_rank = ranks.iter().copied().max().unwrap_or(0);
        let mut axes: Vec<Axis> = vec![Axis::default(); out_rank];
        for (&(slot, value), &rank) in operands.iter().zip(&ranks) {
            let Some(layout) = self.layout(Some(value)) else { continue };
            for (at, axis) in layout.0.iter().enumerate() {
                let out = &mut axes[out_rank - rank + at];
                if axis.atoms().is_empty() {
                    continue;
                }
                if out.atoms().is_empty() {
                    *out = axis.clone();
                } else if axis.has_tokens() || out.has_tokens() {
                    if !out.same_as(axis) {
                        return Err(format!("operand {slot} has the tokens in another place than the others"));
                    }
                    *out = out.with_weights(false);
                }
            }
        }
        let mut effects = Vec::new();
        for (&(slot, value), &rank) in operands.iter().zip(&ranks) {
            if self.layout(Some(value)).is_some() {
                continue;
            }
            effects.extend(self.table(slot, value, &axes)?);
            for (at, dim) in self.dims(value)?.iter().enumerate() {
                let out = &mut axes[out_rank - rank + at];
                if out.atoms().is_empty() {
                    *out = Axis::plain(dim);
                }
            }
        }
        Ok(Flow { layouts: vec![Some(Layout(axes))], effects })
    }

    pub(super) fn quantize(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        for value in node.operands().skip(1) {
            if !self.is_single(value)? {
                let axis = self.axis(node.int("axis").unwrap_or(1), layout.rank())?;
                if layout.0[axis].has_tokens() || node.int("block_size").unwrap_or(0) != 0 {
                    return Err("it is quantised with a scale for each token".into());
                }
            }
        }
        Ok(Flow::of(layout.clone()))
    }

    /// Integers of tokens must stand for numbers by one scale and zero point: one for each row of a product, say, would
    /// be one for each token. `quantize` knows the axis of its scales and looks closer.
    pub(super) fn one_scale(&self, node: &Node) -> Result<(), String> {
        if matches!(node.op.name.as_str(), "QuantizeLinear" | "DequantizeLinear") {
            return Ok(());
        }
        let carries = |slot: &usize| self.layout(node.input(*slot)).is_some();
        let operands = node.quantised_operands().into_iter().filter(|(slot, _)| carries(slot));
        for quantisation in operands.map(|(_, quantisation)| quantisation).chain(node.quantised_result()) {
            for slot in quantisation.slots() {
                if let Some(value) = node.input(slot)
                    && !self.is_single(value)?
                {
                    return Err("its tokens are quantised with several scales".into());
                }
            }
        }
        Ok(())
    }

    /// A bias, and then one half of the channels times the activation of the other.
    pub(super) fn halve_channels(&self, node: &Node) -> Transfer {
        let mut layout = self.operand(node, 0)?.clone();
        let channels = self.result_dims(node, 0)?.last().ok_or("no result")?;
        match layout.0.last_mut() {
            Some(last) if !last.has_tokens() => *last = Axis::plain(channels),
            _ => return Err("it joins one half of the tokens with the other".into()),
        }
        Ok(Flow::of(layout))
    }

    pub(super) fn expand(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let lead = dims.len() - layout.rank();
        let axes = dims.iter().enumerate().map(|(at, dim)| match at.checked_sub(lead).map(|at| &layout.0[at]) {
            Some(axis) if !axis.atoms().is_empty() => axis.clone(),
            _ => Axis::plain(dim),
        });
        Ok(Flow::of(Layout(axes.collect())).with(Effect::Shape { slot: 1 }))
    }
}

//! Products of matrices: what they sum over, and what stays.

use std::collections::HashMap;

use super::{Context, Flow, Transfer};
use crate::ValueId;
use crate::axes::{Axis, Effect, Layout, Span};
use crate::graph::Node;

impl Context<'_> {
    /// Products of two matrices, with a bias or without, of floats or of integers.
    pub(super) fn matmul(&self, node: &Node) -> Transfer {
        let slots = node.factors().ok_or("it multiplies no matrices")?;
        let [Some(left), Some(right)] = slots.map(|slot| node.input(slot)) else { return Err("no operand".into()) };
        let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
        let mut a = self.matrices(left, flag("transA"), flag("transBatchA"))?;
        let mut b = self.matrices(right, flag("transB"), flag("transBatchB"))?;
        let summed = b.len().wrapping_sub(if flag("transB") { 1 } else { 2 });
        let (inner_a, rows) = (a.pop().unwrap_or_default(), a.pop().unwrap_or_default());
        let (columns, inner_b) = (b.pop().unwrap_or_default(), b.pop().unwrap_or_default());
        let carried = (self.layout(Some(left)).is_some(), self.layout(Some(right)).is_some());
        let span = self.contract(&inner_a, &inner_b, carried)?;
        let mut axes = batch_axes(&a, &b)?;
        axes.push(rows.with_weights(false));
        axes.push(columns.with_weights(false));
        if let Some(bias) = node.bias().and_then(|slot| node.input(slot)) {
            let tokens_at = |from_end: usize| axes.iter().rev().nth(from_end).is_some_and(Axis::has_tokens);
            for (at, dim) in self.axes(bias)?.iter().rev().enumerate() {
                if !dim.atoms().is_empty() && tokens_at(at) {
                    return Err("its bias has an entry for each token".into());
                }
            }
        }
        let flow = Flow::of(Layout(axes));
        Ok(match span {
            Some(_) if flag("transBatchB") => return Err("it sums over tokens beside transposed batch axes".into()),
            Some(span) => flow.with(Effect::Contract { slot: slots[1], axis: summed, span }),
            None => flow,
        })
    }

    /// The axes of an operand as batch, rows, columns.
    fn matrices(&self, value: ValueId, transposed: bool, batch_inside: bool) -> Result<Vec<Axis>, String> {
        let mut axes = self.axes(value)?;
        let rank = axes.len();
        if rank < 2 {
            return Err("it multiplies by a vector".into());
        }
        if batch_inside {
            axes[..rank - 1].rotate_left(1);
        }
        if transposed {
            axes.swap(rank - 1, rank - 2);
        }
        Ok(axes)
    }

    pub(super) fn axes(&self, value: ValueId) -> Result<Vec<Axis>, String> {
        match self.layout(Some(value)) {
            Some(layout) => Ok(layout.0.clone()),
            None => Ok(self.dims(value)?.iter().map(Axis::plain).collect()),
        }
    }

    /// Whether one may sum over two axes; the tokens that are summed over where none of the two is made of weights.
    pub(super) fn contract(&self, a: &Axis, b: &Axis, carried: (bool, bool)) -> Result<Option<Span>, String> {
        match (a.has_tokens(), b.has_tokens()) {
            (false, false) => Ok(None),
            (true, true) if !a.same_as(b) => {
                Err("it sums over tokens that are laid out differently on both sides".into())
            }
            (true, true) if a.is_weights() || b.is_weights() => Ok(None),
            (true, true) => a.only_tokens().map(Some).ok_or("it sums over tokens together with something else".into()),
            _ if carried.0 && carried.1 => {
                Err("it sums over tokens on one side and something else on the other".into())
            }
            _ => Err("it multiplies the token axis with a matrix of fixed size".into()),
        }
    }

    /// A product with weights of a few bits each, packed: their shape does not show in the operand.
    pub(super) fn packed_weights(&self, node: &Node) -> Transfer {
        let mut layout = self.operand(node, 0)?.clone();
        let columns = self.result_dims(node, 0)?.last().ok_or("no result")?;
        match layout.0.last_mut() {
            Some(last) if !last.has_tokens() => *last = Axis::plain(columns),
            _ => return Err("it multiplies the token axis with a matrix of fixed size".into()),
        }
        Ok(Flow::of(layout))
    }

    pub(super) fn einsum(&self, node: &Node) -> Transfer {
        let equation: String = node.string("equation").ok_or("no equation")?.split_whitespace().collect();
        let (terms, result) = equation.split_once("->").ok_or("an implicit result")?;
        let operands: Vec<ValueId> = node.operands().collect();
        let terms: Vec<&str> = terms.split(',').collect();
        if terms.len() != operands.len() {
            return Err("its equation does not fit its operands".into());
        }
        let mut labels: HashMap<char, Vec<Axis>> = HashMap::new();
        let mut ellipsis: Vec<Axis> = Vec::new();
        for (term, &value) in terms.iter().zip(&operands) {
            let axes = self.axes(value)?;
            let named = term.replace("...", "").chars().count();
            let hidden = axes.len().checked_sub(named).ok_or("its equation does not fit its operands")?;
            let mut axes = axes.into_iter();
            let mut rest = *term;
            while !rest.is_empty() {
                if let Some(after) = rest.strip_prefix("...") {
                    let own: Vec<Axis> = axes.by_ref().take(hidden).collect();
                    if own.iter().any(Axis::has_tokens) {
                        return Err("it hides the token axis in an ellipsis".into());
                    }
                    if own.len() >= ellipsis.len() {
                        ellipsis = own;
                    }
                    rest = after;
                    continue;
                }
                let label = rest.chars().next().unwrap_or(' ');
                labels.entry(label).or_default().push(axes.next().ok_or("its equation does not fit its operands")?);
                rest = &rest[label.len_utf8()..];
            }
        }
        let mut merged: HashMap<char, Axis> = HashMap::new();
        let mut effects = Vec::new();
        for (label, axes) in labels {
            let tokens = axes.iter().filter(|axis| axis.has_tokens()).count();
            let weights = axes.iter().any(Axis::is_weights);
            if tokens > 0 {
                if tokens < axes.len() {
                    return Err("it multiplies the token axis with a matrix of fixed size".into());
                }
                if axes.iter().any(|axis| !axis.same_as(&axes[0])) {
                    return Err("it combines tokens that are laid out differently".into());
                }
                if !result.contains(label) && !weights {
                    let span = axes[0].only_tokens().ok_or("it sums over tokens together with something else")?;
                    let slot = terms.iter().rposition(|term| term.contains(label)).unwrap_or(0);
                    let axis = terms[slot].chars().position(|other| other == label).unwrap_or(0);
                    if terms[slot].contains("...") {
                        return Err("it sums over tokens beside an ellipsis".into());
                    }
                    effects.push(Effect::Contract { slot, axis, span });
                }
            }
            let kept = axes.into_iter().max_by_key(|axis| axis.atoms().len()).unwrap_or_default();
            merged.insert(label, kept.with_weights(false));
        }
        let mut axes = Vec::new();
        let mut rest = result;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix("...") {
                axes.append(&mut ellipsis);
                rest = after;
                continue;
            }
            let label = rest.chars().next().unwrap_or(' ');
            axes.push(merged.get(&label).cloned().ok_or("its equation names an unknown axis")?);
            rest = &rest[label.len_utf8()..];
        }
        Ok(Flow { layouts: vec![Some(Layout(axes))], effects })
    }
}

/// Axes that only select matrices: those of extent one stretch.
fn batch_axes(a: &[Axis], b: &[Axis]) -> Result<Vec<Axis>, String> {
    let rank = a.len().max(b.len());
    let at =
        |axes: &[Axis], at: usize| (at + axes.len()).checked_sub(rank).map(|at| axes[at].clone()).unwrap_or_default();
    let mut axes = Vec::with_capacity(rank + 2);
    for index in 0..rank {
        let (x, y) = (at(a, index), at(b, index));
        axes.push(match (x.atoms().is_empty(), y.atoms().is_empty()) {
            (true, _) => y,
            (_, true) => x,
            _ if x.same_as(&y) || !(x.has_tokens() || y.has_tokens()) => x,
            _ => return Err("it multiplies matrices token by token with something of fixed size".into()),
        });
    }
    Ok(axes)
}

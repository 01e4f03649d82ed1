//! Operators that move, split, join and pick axes and entries.

use super::{Context, Flow, Transfer};
use crate::Expr;
use crate::axes::{Atom, Axis, Effect, Layout, Span};
use crate::graph::Node;

/// Tokens at the front or back that are counted as special ones when sliced off by a constant position.
const MAX_SPECIAL: i64 = 64;

impl Context<'_> {
    pub(super) fn transpose(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let rank = layout.rank();
        let reverse: Vec<i64> = (0..rank as i64).rev().collect();
        let perm = node.ints("perm").unwrap_or(&reverse);
        let axes =
            perm.iter().map(|&axis| Ok(layout.0[self.axis(axis, rank)?].clone())).collect::<Result<_, String>>()?;
        Ok(Flow::of(Layout(axes)))
    }

    pub(super) fn reshape(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let reshaped = layout.reshape(dims, self.tokens)?;
        for axis in &reshaped.0 {
            // Tokens may share an axis with the batch. Joined with channels they meet weights of a fixed size.
            let with_channels = |atom: &Atom| matches!(atom, Atom::Plain(extent) if extent != self.batch);
            let last_is_channels = axis.atoms().last().is_some_and(with_channels);
            if axis.has_tokens() && axis.atoms().len() > 1 && last_is_channels {
                return Err("it flattens tokens and channels into one axis".into());
            }
        }
        let flow = Flow::of(reshaped);
        Ok(if node.is("Reshape") { flow.with(Effect::Shape { slot: 1 }) } else { flow })
    }

    pub(super) fn squeeze(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axes = match self.ints(node, 1, "axes")? {
            Some(axes) => axes.iter().map(|&axis| self.axis(axis, layout.rank())).collect::<Result<Vec<_>, _>>()?,
            None => (0..layout.rank()).filter(|&axis| layout.0[axis].atoms().is_empty()).collect(),
        };
        if axes.iter().any(|&axis| !layout.0[axis].atoms().is_empty()) {
            return Err("it removes an axis whose extent is not one".into());
        }
        let kept = layout.0.iter().enumerate().filter(|(at, _)| !axes.contains(at)).map(|(_, axis)| axis.clone());
        Ok(Flow::of(Layout(kept.collect())))
    }

    pub(super) fn unsqueeze(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axes = self.ints(node, 1, "axes")?.ok_or("no axes")?;
        let rank = layout.rank() + axes.len();
        let mut new = axes.iter().map(|&axis| self.axis(axis, rank)).collect::<Result<Vec<_>, _>>()?;
        new.sort_unstable();
        let mut kept = layout.0.iter();
        let axes = (0..rank)
            .map(|at| if new.contains(&at) { Axis::default() } else { kept.next().cloned().unwrap_or_default() });
        Ok(Flow::of(Layout(axes.collect())))
    }

    pub(super) fn split(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), layout.rank())?;
        if layout.0[axis].has_tokens() {
            return Err("it splits the tokens into groups".into());
        }
        let mut layouts = Vec::new();
        for slot in 0..node.outputs.len() {
            let mut part = layout.clone();
            if node.output(slot).is_some() {
                part.0[axis] = Axis::plain(&self.result_dims(node, slot)?[axis]);
            }
            layouts.push(Some(part));
        }
        Ok(Flow { layouts, effects: Vec::new() })
    }

    pub(super) fn slice(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let exprs = |slot: usize, name: &str| -> Result<Vec<Expr>, String> {
            if let Some(ints) = node.ints(name) {
                return Ok(ints.iter().map(|&x| Expr::known(x)).collect());
            }
            let value = node.input(slot).ok_or_else(|| format!("no {name}"))?;
            Ok(self.shapes.ints(value).ok_or_else(|| format!("its {name} are not known"))?.to_vec())
        };
        let (starts, ends) = (exprs(1, "starts")?, exprs(2, "ends")?);
        let axes = self.ints(node, 3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.ints(node, 4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
        if axes.len() != starts.len() || ends.len() != starts.len() || steps.len() != starts.len() {
            return Err("its operands do not fit each other".into());
        }
        let dims = self.result_dims(node, 0)?;
        let mut out = layout.clone();
        let mut flow = Flow::default();
        for (at, &axis) in axes.iter().enumerate() {
            let axis = self.axis(axis, layout.rank())?;
            if !layout.0[axis].has_tokens() {
                out.0[axis] = Axis::plain(&dims[axis]);
                continue;
            }
            let span = layout.0[axis].only_tokens().ok_or("it slices an axis that holds tokens and more")?;
            if steps[at] != 1 {
                return Err("it takes tokens in steps".into());
            }
            let here = layout.0[axis].extent(self.tokens).ok_or("the token count cannot be followed")?;
            let count = here.as_known();
            let start = starts[at].as_known().ok_or("it starts at a position that is not constant")?;
            let start = match count {
                Some(count) => {
                    if start < 0 {
                        (start + count).max(0)
                    } else {
                        start.min(count)
                    }
                }
                None => start,
            };
            // The end: all of it, a position from the front, or one from the back.
            let (to_end, from_front) = match ends[at].as_known() {
                Some(end) if end > i64::from(i32::MAX) - 1 => (Some(0), None),
                Some(end) if end < 0 => (Some(-end), None),
                Some(end) => match count {
                    Some(count) if end >= count => (Some(0), Some(end)),
                    Some(count) if 2 * end > count && count - end <= MAX_SPECIAL => (Some(count - end), Some(end)),
                    _ => (None, Some(end)),
                },
                None => match here.minus(&ends[at]).and_then(|left| left.as_known()) {
                    Some(left @ 0..) => (Some(left), Some(-1)),
                    _ => return Err("it ends at a position that is not constant".into()),
                },
            };
            match (start, to_end) {
                (start @ 0.., Some(left))
                    if start <= MAX_SPECIAL && left <= MAX_SPECIAL && count.is_none_or(|n| start * 2 <= n) =>
                {
                    let span = Span { front: span.front + start as usize, back: span.back + left as usize };
                    out.0[axis] = Axis::tokens(span);
                    if from_front.is_some() {
                        flow.effects.push(Effect::SliceEnd { slot: 2 });
                    }
                }
                (start, Some(left)) if left <= MAX_SPECIAL && (start < 0 || count.is_some()) => {
                    let first = if start < 0 { start } else { start - count.unwrap_or(start) } - span.back as i64;
                    let taken = -first - left - span.back as i64;
                    flow.effects.push(Effect::Pick { first, count: taken.max(0) as usize });
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                (start @ 0.., None) => {
                    let end = from_front.unwrap_or(start);
                    let first = start + span.front as i64;
                    flow.effects.push(Effect::Pick { first, count: (end - start).max(0) as usize });
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                _ => return Err("it takes a range of tokens whose place is not constant".into()),
            }
        }
        flow.layouts = vec![Some(out)];
        Ok(flow)
    }

    pub(super) fn gather(&self, node: &Node) -> Transfer {
        if self.layout(node.input(0)).is_none() {
            return Err("tokens are used as positions".into());
        }
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), layout.rank())?;
        let indices = node.input(1).ok_or("no positions")?;
        if self.layout(Some(indices)).is_some() {
            return Err("it takes values at positions that depend on the tokens".into());
        }
        let inserted: Vec<Axis> = self.dims(indices)?.iter().map(Axis::plain).collect();
        let mut axes = layout.0.clone();
        axes.splice(axis..=axis, inserted);
        let flow = Flow::of(Layout(axes));
        if !layout.0[axis].has_tokens() {
            return Ok(flow);
        }
        let span = layout.0[axis].only_tokens().ok_or("it takes positions of an axis that holds tokens and more")?;
        let positions =
            self.shapes.ints(indices).and_then(|exprs| exprs.iter().map(Expr::as_known).collect::<Option<Vec<_>>>());
        let positions = positions.ok_or("it takes tokens at positions that are not constant")?;
        if positions.len() as i64 > MAX_SPECIAL {
            return Err("it takes tokens by a table of positions".into());
        }
        let mut flow = flow;
        for position in positions {
            let first = if position < 0 { position - span.back as i64 } else { position + span.front as i64 };
            flow.effects.push(Effect::Pick { first, count: 1 });
        }
        Ok(flow)
    }

    pub(super) fn concat(&self, node: &Node) -> Transfer {
        let dims = self.result_dims(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), dims.len())?;
        let mut out: Option<Layout> = None;
        for value in node.operands() {
            let Some(layout) = self.layout(Some(value)) else { continue };
            if layout.0[axis].has_tokens() {
                return Err("it joins other entries to the tokens".into());
            }
            let mut layout = Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect());
            layout.0[axis] = Axis::plain(&dims[axis]);
            match &out {
                Some(other) if (0..other.rank()).any(|at| !other.0[at].same_as(&layout.0[at])) => {
                    return Err("it joins tensors with different tokens".into());
                }
                _ => out = Some(layout),
            }
        }
        let out = out.ok_or("no operand carries tokens")?;
        for value in node.operands().filter(|&value| self.layout(Some(value)).is_none()) {
            if out.token_axes().iter().any(|&at| self.dims(value).is_ok_and(|dims| dims.get(at).is_some())) {
                return Err("it joins a table with an entry for each token".into());
            }
        }
        Ok(Flow::of(out))
    }
}

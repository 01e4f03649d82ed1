//! Operators that move, split, join and pick axes and entries.

use super::{Context, Flow, Transfer};
use crate::axes::{Atom, Axis, Effect, Layout, Span};
use crate::graph::Node;
use crate::{Expr, ValueId};

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
        let reshaped = layout.reshape(dims, &self.source.tokens)?;
        for axis in &reshaped.0 {
            // Tokens may share an axis with the batch. Joined with channels they meet weights of a fixed size.
            let with_channels = |atom: &Atom| matches!(atom, Atom::Plain(extent) if *extent != self.source.batch);
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
            return self.split_tokens(node, layout, axis);
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

    /// Special tokens split off at the front or the end.
    fn split_tokens(&self, node: &Node, layout: &Layout, axis: usize) -> Transfer {
        let span = layout.0[axis].only_tokens().ok_or("it splits an axis that holds tokens and more")?;
        let extents: Vec<Expr> = (0..node.outputs.len())
            .map(|slot| Ok(self.result_dims(node, slot)?[axis].clone()))
            .collect::<Result<_, String>>()?;
        let few = |extent: &Expr| extent.as_known().filter(|&count| count <= MAX_SPECIAL);
        // The longest part holds the patches; one of unknown length is.
        let rest =
            (0..extents.len()).max_by_key(|&at| extents[at].as_known().unwrap_or(i64::MAX)).ok_or("no result")?;
        let sum =
            |extents: &[Expr]| extents.iter().map(few).sum::<Option<i64>>().ok_or("it splits the tokens into groups");
        let (front, back) = (sum(&extents[..rest])?, sum(&extents[rest + 1..])?);
        if extents[rest].as_known().is_some_and(|count| count < front + back) {
            return Err("it splits the tokens into groups".into());
        }
        let mut flow = Flow::default().with(Effect::Parts);
        let mut start = 0;
        for (at, extent) in extents.iter().enumerate() {
            let mut part = layout.clone();
            if at == rest {
                part.0[axis] = Axis::tokens(Span { front: span.front + front, back: span.back + back });
                start = -back;
            } else {
                let count = few(extent).unwrap_or(0);
                flow.effects.extend(pick(span, start, count));
                part.0[axis] = Axis::plain(extent);
                start += count;
            }
            flow.layouts.push(Some(part));
        }
        Ok(flow)
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
            let here = layout.0[axis].extent(&self.source.tokens).ok_or("the token count cannot be followed")?;
            let count = here.as_known();
            let given = starts[at].as_known().ok_or("it starts at a position that is not constant")?;
            let start = match count {
                Some(count) if given < 0 => (given + count).max(0),
                Some(count) => given.min(count),
                None => given,
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
                    let span = Span { front: span.front + start, back: span.back + left };
                    out.0[axis] = Axis::tokens(span);
                    if from_front.is_some() {
                        flow.effects.push(Effect::SliceEnd { slot: 2 });
                    }
                }
                // A start that is counted from the front names other tokens once there are fewer.
                (start, Some(left)) if left <= MAX_SPECIAL && count.is_some_and(|_| given >= 0) => {
                    let count = count.unwrap_or(start);
                    flow.effects.extend(pick(span, start, count - left - start));
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                (_, Some(left)) if left <= MAX_SPECIAL && given < 0 && (left == 0 || from_front.is_none()) => {
                    flow.effects.extend(pick(span, given, -given - left));
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                (start @ 0.., None) => {
                    let end = from_front.unwrap_or(start);
                    flow.effects.extend(pick(span, start, end - start));
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
        let consecutive = positions.windows(2).all(|pair| pair[1] == pair[0] + 1);
        if !consecutive || positions.len() as i64 > MAX_SPECIAL {
            return Err("it takes tokens by a table of positions".into());
        }
        let mut flow = flow;
        if let Some(&first) = positions.first() {
            flow.effects.extend(pick(span, first, positions.len() as i64));
        }
        Ok(flow)
    }

    pub(super) fn tile(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let axes = layout.0.iter().zip(dims).map(|(axis, dim)| match axis.extent(&self.source.tokens) {
            Some(extent) if extent == *dim => Ok(axis.clone()),
            _ if axis.has_tokens() => Err("it repeats the tokens"),
            _ => Ok(Axis::plain(dim)),
        });
        Ok(Flow::of(Layout(axes.collect::<Result<_, _>>()?)))
    }

    /// Padding along the token axis: entries that are no tokens.
    pub(super) fn pad(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let pads = self.ints(node, 1, "pads")?.ok_or("no pads")?;
        if pads.len() != 2 * layout.rank() || node.input(3).is_some() {
            return Err("it pads chosen axes".into());
        }
        let mut out = layout.clone();
        for (at, axis) in out.0.iter_mut().enumerate() {
            let (front, back) = (pads[at], pads[at + layout.rank()]);
            match axis.only_tokens() {
                _ if front == 0 && back == 0 => {}
                Some(_) if node.string("mode").is_some_and(|mode| mode != "constant") => {
                    return Err("it pads the tokens with tokens".into());
                }
                Some(span) => *axis = Axis::tokens(Span { front: span.front - front, back: span.back - back }),
                None if axis.has_tokens() => return Err("it pads an axis that holds tokens and more".into()),
                None => *axis = Axis::plain(&dims[at]),
            }
        }
        Ok(Flow::of(out))
    }

    /// What sorts or adds up along one axis.
    pub(super) fn along_axis(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axis = if node.is("CumSum") {
            *self.ints(node, 1, "axis")?.and_then(|axes| axes.first().copied()).as_ref().ok_or("no axis")?
        } else {
            node.int("axis").unwrap_or(-1)
        };
        let axis = self.axis(axis, layout.rank())?;
        if layout.0[axis].has_tokens() {
            return Err(format!("{} over tokens depends on their order or number", node.op));
        }
        let mut out = layout.clone();
        out.0[axis] = Axis::plain(&self.result_dims(node, 0)?[axis]);
        Ok(Flow { layouts: vec![Some(out); node.outputs.len()], effects: Vec::new() })
    }

    /// Joins tensors. Along the token axis, what stands before and after the tokens moves their place: special tokens
    /// that were split off come back, or entries that are no tokens come in.
    pub(super) fn concat(&self, node: &Node) -> Transfer {
        let dims = self.result_dims(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), dims.len())?;
        let operands: Vec<ValueId> = node.data_operands().map(|(_, value)| value).collect();
        let along = |value: &ValueId| self.layout(Some(*value)).is_some_and(|layout| layout.0[axis].has_tokens());
        let joined = match operands.iter().position(along) {
            None => Axis::plain(&dims[axis]),
            Some(at) => {
                let own = self.layout(Some(operands[at])).and_then(|layout| layout.0[axis].only_tokens());
                let span = own.ok_or("it joins entries to an axis that holds tokens and more")?;
                if operands[at + 1..].iter().any(along) {
                    return Err("it joins tokens to tokens".into());
                }
                let count = |operands: &[ValueId]| {
                    let extent = |value: &ValueId| self.dims(*value).ok()?[axis].as_known();
                    operands
                        .iter()
                        .map(extent)
                        .sum::<Option<i64>>()
                        .ok_or("it joins unknown numbers of entries to the tokens")
                };
                Axis::tokens(Span {
                    front: span.front - count(&operands[..at])?,
                    back: span.back - count(&operands[at + 1..])?,
                })
            }
        };
        let mut out: Option<Layout> = None;
        for &value in &operands {
            let Some(layout) = self.layout(Some(value)) else { continue };
            let mut layout = Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect());
            layout.0[axis] = joined.clone();
            match &out {
                Some(other) if (0..other.rank()).any(|at| !other.0[at].same_as(&layout.0[at])) => {
                    return Err("it joins tensors with different tokens".into());
                }
                _ => out = Some(layout),
            }
        }
        let out = out.ok_or("no operand carries tokens")?;
        for value in operands.into_iter().filter(|&value| self.layout(Some(value)).is_none()) {
            let dims = self.dims(value)?;
            if out.token_axes().iter().any(|&at| at != axis && dims.get(at).is_none_or(|dim| !dim.is(1))) {
                return Err("it joins a table with an entry for each token".into());
            }
        }
        Ok(Flow::of(out))
    }
}

/// `count` entries of an axis with the tokens of `span`, from the position `start` on (negative: from the end), as
/// tokens; `None` where all of them are no tokens.
fn pick(span: Span, start: i64, count: i64) -> Option<Effect> {
    let (mut first, mut count) = (if start < 0 { start - span.back } else { start + span.front }, count.max(0));
    if start >= 0 && first < 0 {
        // Entries before the first token.
        (first, count) = (0, count + first);
    } else if start < 0 {
        // Entries behind the last token.
        count = count.min(-first);
    }
    (count > 0).then_some(Effect::Pick { first, count: count as usize })
}

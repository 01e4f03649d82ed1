//! Special tokens: what was joined to the patches before the first block.

use vitrim_ir::{Axes, Expr, Graph, Shapes, ValueId};

use super::{Head, SpecialTokens};

/// Tokens joined before and after the patches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Joined {
    pub front: usize,
    pub back: usize,
}

impl Joined {
    /// Names them by what the heads read: the first is the class token, a second one that is read by itself the
    /// distillation token, others are registers.
    pub fn named(self, heads: &[Head]) -> SpecialTokens {
        let alone = |head: &Head| match *head {
            Head::Pick { first, count } => (first, count) == (1, 1) || (first, count, self.front) == (0, 2, 2),
            _ => false,
        };
        let cls = self.front.min(1);
        let dist = usize::from(self.front >= 2 && heads.iter().any(alone));
        SpecialTokens { cls, dist, reg: self.front - cls - dist, suffix: self.back }
    }
}

/// Walks from the origin towards the image and counts what joins the token axis on the way.
pub(super) fn find(graph: &Graph, shapes: &Shapes, axes: &Axes) -> Joined {
    let mut joined = Joined::default();
    let mut value = axes.origin();
    let Some(mut axis) = axes.layout(value).and_then(|layout| layout.token_axes().first().copied()) else {
        return joined;
    };
    let mut tokens = axes.tokens().clone();
    // Entries of the tensor at hand that were cut off on the way from it to the origin.
    let mut cut = Joined::default();
    // Every step goes to a producer, so the walk ends; the bound is for graphs that are absurdly deep.
    for _ in 0..10_000 {
        let Some((id, _)) = graph.producer(value) else { break };
        let node = graph.node(id);
        let first = node.data_operands().map(|(_, operand)| operand).find(|&operand| shapes.is_data(operand));
        let next = match node.op.name.as_str() {
            "Concat" | "QLinearConcat" if place(shapes, value, node.int("axis").unwrap_or(0)) == Some(axis) => {
                let extent = |operand: ValueId| shapes.dims(operand).and_then(|dims| dims.get(axis).cloned());
                // The patches are the longest part that comes from the input; one of unknown length is.
                let operands: Vec<ValueId> = node.data_operands().map(|(_, value)| value).collect();
                let length =
                    |at: &usize| extent(operands[*at]).and_then(|extent| extent.as_known()).unwrap_or(i64::MAX);
                let from_input = (0..operands.len()).rev().filter(|&at| shapes.is_data(operands[at]));
                let Some(patches) = from_input.max_by_key(length) else { break };
                let count = |operands: &[ValueId]| {
                    operands.iter().map(|&operand| extent(operand)?.as_known()).sum::<Option<i64>>()
                };
                let (Some(front), Some(back)) = (count(&operands[..patches]), count(&operands[patches + 1..])) else {
                    break;
                };
                joined.front += (front as usize).saturating_sub(cut.front);
                joined.back += (back as usize).saturating_sub(cut.back);
                cut.front = cut.front.saturating_sub(front as usize);
                cut.back = cut.back.saturating_sub(back as usize);
                let Some(left) = extent(operands[patches]) else { break };
                tokens = left;
                Some(operands[patches])
            }
            "Slice" if extent_at(shapes, first, axis) != extent_at(shapes, Some(value), axis) => {
                let dims = |value: Option<ValueId>| extent_at(shapes, value, axis)?.as_known();
                let start =
                    node.input(1).and_then(|starts| shapes.ints(starts)).and_then(|starts| starts.first()?.as_known());
                let (Some(before), Some(after), Some(start @ 0..)) = (dims(first), dims(Some(value)), start) else {
                    break;
                };
                cut.front += start as usize;
                cut.back += (before - after - start).max(0) as usize;
                tokens = Expr::known(before);
                first
            }
            "Pad" => {
                let rank = shapes.dims(value).map_or(0, <[Expr]>::len);
                let pads = node.input(1).and_then(|pads| shapes.ints(pads)).filter(|pads| pads.len() == 2 * rank);
                let pad = |at: usize| pads.and_then(|pads| pads[at].as_known()).and_then(|n| usize::try_from(n).ok());
                let (Some(front), Some(back), Some(left)) =
                    (pad(axis), pad(axis + rank), extent_at(shapes, first, axis))
                else {
                    break;
                };
                joined.front += front;
                joined.back += back;
                tokens = left;
                first
            }
            "Transpose" => {
                let Some(rank) = shapes.dims(value).map(<[Expr]>::len) else { break };
                axis = match node.ints("perm").and_then(|perm| perm.get(axis)) {
                    Some(&from) => from as usize,
                    None => rank - 1 - axis,
                };
                first
            }
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Gather" => {
                // Past it if the tokens have an axis of their own there.
                let dims = first.and_then(|operand| shapes.dims(operand)).unwrap_or_default();
                let mut alike = (0..dims.len()).filter(|&at| dims[at] == tokens);
                let (Some(only), None) = (alike.next(), alike.next()) else { break };
                axis = only;
                first
            }
            "Conv" | "ConvInteger" | "QLinearConv" | "FusedConv" => break,
            _ if node.factors().is_some() => break,
            _ => first,
        };
        match next {
            Some(next) if next != value => value = next,
            _ => break,
        }
    }
    joined
}

fn extent_at(shapes: &Shapes, value: Option<ValueId>, axis: usize) -> Option<Expr> {
    shapes.dims(value?)?.get(axis).cloned()
}

fn place(shapes: &Shapes, value: ValueId, axis: i64) -> Option<usize> {
    let rank = shapes.dims(value)?.len() as i64;
    usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()
}

//! Special tokens: what was joined to the patches before the first block.

use vitrim_ir::{Expr, Graph, Shapes, ValueId};

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
        let picked = |position: i64| {
            heads.iter().any(|head| matches!(head, Head::Pick { first, count } if *first <= position && position < *first + *count as i64))
        };
        let cls = self.front.min(1);
        let dist = usize::from(self.front >= 2 && picked(1));
        SpecialTokens { cls, dist, reg: self.front - cls - dist, suffix: self.back }
    }
}

/// Walks from the origin towards the image and counts what joins the token axis on the way.
pub(super) fn find(graph: &Graph, shapes: &Shapes, origin: ValueId, axis: usize) -> Joined {
    let mut joined = Joined::default();
    let mut value = origin;
    let mut axis = axis;
    // Every step goes to a producer, so the walk ends; the bound is for graphs that are absurdly deep.
    for _ in 0..10_000 {
        let Some((id, _)) = graph.producer(value) else { break };
        let node = graph.node(id);
        let data: Vec<ValueId> = node.operands().filter(|&operand| shapes.is_data(operand)).collect();
        let next = match node.op.name.as_str() {
            "Concat" => {
                let Some(rank) = shapes.dims(value).map(<[Expr]>::len) else { break };
                let at = node.int("axis").unwrap_or(0);
                let at = if at < 0 { at + rank as i64 } else { at } as usize;
                if at != axis {
                    data.first().copied()
                } else {
                    // The patches are the longest part that depends on the image.
                    let extent = |operand: ValueId| shapes.dims(operand).and_then(|dims| dims.get(axis)?.as_known());
                    let operands: Vec<ValueId> = node.operands().collect();
                    let Some(patches) = operands.iter().position(|operand| shapes.is_data(*operand)) else { break };
                    let count =
                        |operands: &[ValueId]| operands.iter().map(|&operand| extent(operand)).sum::<Option<i64>>();
                    let (Some(front), Some(back)) = (count(&operands[..patches]), count(&operands[patches + 1..]))
                    else {
                        break;
                    };
                    joined.front += front as usize;
                    joined.back += back as usize;
                    Some(operands[patches])
                }
            }
            "Transpose" => {
                let perm = node.ints("perm");
                let Some(rank) = shapes.dims(value).map(<[Expr]>::len) else { break };
                axis = match perm.and_then(|perm| perm.get(axis)) {
                    Some(&from) => from as usize,
                    None => rank - 1 - axis,
                };
                data.first().copied()
            }
            "Conv" | "Reshape" | "Flatten" | "MatMul" | "Gemm" | "Einsum" => break,
            _ => data.first().copied(),
        };
        match next {
            Some(next) if next != value => value = next,
            _ => break,
        }
    }
    joined
}

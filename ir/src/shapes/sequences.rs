//! Sequences of tensors, and how `SplitToSequence` cuts a tensor into one.

use std::sync::Arc;

use super::Fact;
use super::call::{Why, axis_of};
use super::number::Number;
use crate::{Expr, Node};

/// Sequences longer than this are not followed.
pub(crate) const MAX_SEQUENCE: usize = 64;

/// Operators on sequences of tensors; `None` for all others.
pub(super) fn infer(node: &Node, inputs: &[Option<&Fact>]) -> Option<Vec<Fact>> {
    let operand = |slot: usize| inputs.get(slot).copied().flatten();
    let reason = |what: &str| Some(Why::from(format!("{}: {what}", node.op)));
    let made = |parts: Option<Vec<Fact>>| match parts {
        Some(parts) => Fact { sequence: Some(Arc::new(parts)), reason: reason("it is a sequence"), ..Fact::default() },
        None => Fact { reason: reason("the sequence is not known"), ..Fact::default() },
    };
    let fact = match node.standard_op()? {
        "SequenceConstruct" => made(inputs.iter().map(|fact| fact.cloned()).collect()),
        "SplitToSequence" => made(split(node, operand(0)?, operand(1))),
        "SequenceAt" => {
            let pick = || {
                let parts = operand(0)?.sequence.as_ref()?;
                let [Some(at)] = operand(1)?.items.as_deref()? else { return None };
                let at = axis_of(at.whole()?.as_known()?, parts.len()).ok()?;
                parts.get(at).cloned()
            };
            pick().unwrap_or_else(|| Fact { reason: reason("which part it is shows at run time"), ..Fact::default() })
        }
        "ConcatFromSequence" => {
            let joined = || {
                let parts = operand(0)?.sequence.as_ref()?;
                let mut dims = parts.first()?.dims.clone()?;
                let new_axis = node.int("new_axis").unwrap_or(0) != 0;
                let axis = axis_of(node.int("axis")?, dims.len() + usize::from(new_axis)).ok()?;
                if new_axis {
                    dims.insert(axis, Expr::known(i64::try_from(parts.len()).ok()?));
                } else {
                    let mut lengths = parts.iter().map(|part| part.dims.as_ref()?.get(axis));
                    dims[axis] = lengths.try_fold(Expr::known(0), |sum, length| sum.plus(length?))?;
                }
                Some(Fact { dims: Some(dims), dtype: parts.first()?.dtype, ..Fact::default() })
            };
            joined().unwrap_or_else(|| Fact { reason: reason("the sequence is not known"), ..Fact::default() })
        }
        _ => return None,
    };
    Some(vec![fact])
}

/// The tensors that a `SplitToSequence` gives.
fn split(node: &Node, tensor: &Fact, sizes: Option<&Fact>) -> Option<Vec<Fact>> {
    let dims = tensor.dims.as_ref()?;
    let sizes = match sizes {
        None => Sizes::Ones,
        Some(sizes) => {
            let known = |item: &Option<Number>| item.as_ref()?.whole()?.as_known();
            let list = sizes.items.as_ref()?.iter().map(known).collect::<Option<Vec<i64>>>()?;
            Sizes::of(sizes.dims.as_ref()?.len(), list)?
        }
    };
    let cuts = Cuts::of(node, dims, sizes)?;
    let part = |&size: &i64| {
        let mut dims = dims.clone();
        if cuts.squeezed {
            dims.remove(cuts.axis);
        } else {
            dims[cuts.axis] = Expr::known(size);
        }
        Fact { dims: Some(dims), dtype: tensor.dtype, data: tensor.data, ..Fact::default() }
    };
    Some(cuts.sizes.iter().map(part).collect())
}

/// What the operand `split` of a `SplitToSequence` says.
pub(crate) enum Sizes {
    /// It is left out.
    Ones,
    /// The extent of every part but the last, which has the rest.
    Each(i64),
    /// The extent of each part.
    Listed(Vec<i64>),
}

impl Sizes {
    /// From the operand's rank and elements.
    pub(crate) fn of(rank: usize, items: Vec<i64>) -> Option<Self> {
        match (rank, items.as_slice()) {
            (0, &[size]) => Some(Self::Each(size)),
            (1, _) => Some(Self::Listed(items)),
            _ => None,
        }
    }
}

/// How a `SplitToSequence` cuts its operand.
pub(crate) struct Cuts {
    pub(crate) axis: usize,
    /// The extent of each part along the axis.
    pub(crate) sizes: Vec<i64>,
    /// Whether the parts, all of extent one, lose the axis.
    pub(crate) squeezed: bool,
}

impl Cuts {
    /// The cuts of a tensor with extents `dims`, if they are known.
    pub(crate) fn of(node: &Node, dims: &[Expr], sizes: Sizes) -> Option<Self> {
        let axis = axis_of(node.int("axis").unwrap_or(0), dims.len()).ok()?;
        let extent = dims[axis].as_known()?;
        // The specification ignores `keepdims` where sizes are given; runtimes do so only where they are a list.
        let squeezed = !matches!(sizes, Sizes::Listed(_)) && node.int("keepdims").unwrap_or(1) == 0;
        let sizes = match sizes {
            Sizes::Ones => vec![1; count(extent)?],
            Sizes::Each(size) if size > 0 => {
                let mut sizes = vec![size; count(extent / size)?];
                sizes.extend((extent % size > 0).then_some(extent % size));
                sizes
            }
            Sizes::Listed(sizes) if sizes.len() <= MAX_SEQUENCE && sizes.iter().all(|&size| size >= 0) => sizes,
            _ => return None,
        };
        let possible = !squeezed || sizes.iter().all(|&size| size == 1);
        possible.then_some(Self { axis, sizes, squeezed })
    }
}

fn count(parts: i64) -> Option<usize> {
    usize::try_from(parts).ok().filter(|&parts| parts <= MAX_SEQUENCE)
}

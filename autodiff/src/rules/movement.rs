//! Operators that only move entries.

use vitrim_ir::{Attribute, Expr, OpType, ValueId};

use super::indexing;
use crate::{Int, Undefined, Vjp};

type Done = Result<(), Undefined>;

/// Another shape of the same entries.
pub(super) fn reshape(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let dx = vjp.reshape_like(dy, x)?;
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn transpose(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let rank = vjp.rank(x)? as i64;
    let perm = vjp.node.ints("perm").map_or_else(|| (0..rank).rev().collect(), <[i64]>::to_vec);
    let inverse: Option<Vec<i64>> =
        (0..rank).map(|axis| perm.iter().position(|&from| from == axis).map(|at| at as i64)).collect();
    let inverse = inverse.filter(|inverse| inverse.len() == perm.len()).ok_or("its permutation is none")?;
    let dx = vjp.transpose(dy, &inverse);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn expand(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    vjp.give_broadcast(0, dy)
}

/// The sum of all copies.
pub(super) fn tile(vjp: &mut Vjp) -> Done {
    let (x, repeats, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let known = vjp.int_operand(1).ok();
    let (mut dims, mut copies) = (Vec::new(), Vec::new());
    for axis in 0..vjp.rank(x)? {
        let repeat = match &known {
            Some(known) => Int::Known(*known.get(axis).ok_or("it repeats fewer axes than its operand has")?),
            None => {
                let at = vjp.ints(&[axis as i64]);
                Int::Given(vjp.op("Gather", &[repeats, at]))
            }
        };
        if repeat != Int::Known(1) {
            copies.push(dims.len() as i64);
            dims.push(repeat);
        }
        dims.push(vjp.extent(x, axis)?);
    }
    let apart = if copies.is_empty() { dy } else { vjp.reshape_to(dy, &dims) };
    let dx = vjp.reduce("ReduceSum", apart, &copies, false);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn concat(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", 0, vjp.rank(y)?)?;
    let count = vjp.node.inputs.len();
    let mut sizes = Vec::with_capacity(count);
    for slot in 0..count {
        let x = vjp.x(slot)?;
        sizes.push(vjp.extent(x, axis)?);
    }
    let sizes = vjp.list(&sizes);
    let attributes = [("axis", Attribute::Int(axis as i64))];
    let parts = vjp.call(OpType::standard("Split"), &[Some(dy), Some(sizes)], &attributes, count);
    parts.into_iter().enumerate().for_each(|(slot, part)| vjp.give(slot, part));
    Ok(())
}

/// What is split off without a reader has no gradient: zeros stand for it.
pub(super) fn split(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let axis = vjp.axis("axis", 0, vjp.rank(x)?)?;
    let mut parts = Vec::with_capacity(vjp.node.outputs.len());
    for slot in 0..vjp.node.outputs.len() {
        parts.push(match vjp.dy_of(slot) {
            Some(dy) => dy,
            None => {
                let y = vjp.y(slot)?;
                vjp.zeros_like(y)?
            }
        });
    }
    let dx = match parts[..] {
        [one] => one,
        _ => vjp.op_with("Concat", &parts, &[("axis", Attribute::Int(axis as i64))]),
    };
    vjp.give(0, dx);
    Ok(())
}

/// Zeros around and between what was cut out.
pub(super) fn slice(vjp: &mut Vjp) -> Done {
    let (x, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let rank = vjp.rank(x)?;
    let axes: Vec<i64> = match vjp.node.input(3) {
        Some(_) => vjp.int_operand(3)?,
        None => {
            let count = vjp.dim(vjp.x(1)?, 0)?.as_known().filter(|&count| count <= rank as i64);
            (0..count.ok_or("how many axes it cuts is unknown")?).collect()
        }
    };
    let mut cuts = vec![None; rank];
    for (at, axis) in axes.into_iter().enumerate() {
        let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).unwrap_or(rank);
        let cut = cuts.get_mut(axis).ok_or("it cuts an axis that its operand does not have")?;
        if cut.replace(at).is_some() {
            return Err("it cuts an axis twice".into());
        }
    }
    let mut dx = dy;
    let mut extents = vjp.extents(y)?;
    let (mut before, mut after, mut steps) = (vec![Int::Known(0); rank], vec![Int::Known(0); rank], vec![1; rank]);
    for (axis, cut) in cuts.into_iter().enumerate() {
        let Some(at) = cut else { continue };
        let whole = vjp.extent(x, axis)?;
        let Some((first, step)) = place(vjp, axis, at)? else {
            let positions = positions(vjp, axis, at)?;
            let picks = indexing::one_hot(vjp, positions, whole, vjp.float(x)?);
            dx = vjp.contract(dx, rank, axis, picks);
            extents[axis] = whole;
            continue;
        };
        if step < 0 {
            dx = vjp.reverse(dx, axis);
        }
        (before[axis], steps[axis]) = (first, step.abs());
        // Symbols may cancel out in the difference of two extents.
        let left = vjp.dim(x, axis)?.minus(vjp.dim(y, axis)?).and_then(|left| left.as_known());
        let left = match left.filter(|_| step == 1) {
            Some(left) => Int::Known(left),
            None => {
                let covered = vjp.times(extents[axis], Int::Known(step.abs()));
                vjp.minus(whole, covered)
            }
        };
        after[axis] = vjp.minus(left, first);
    }
    let dx = spread(vjp, dx, &extents, &steps);
    let dx = vjp.pad(dx, &before, &after);
    vjp.give(0, dx);
    Ok(())
}

/// The lowest position that cut `at` of a `Slice` takes along `axis`, and the step; none where that takes the run time
/// to tell.
fn place(vjp: &mut Vjp, axis: usize, at: usize) -> Result<Option<(Int, i64)>, Undefined> {
    let (x, y) = (vjp.x(0)?, vjp.y(0)?);
    let known = |slot: usize| vjp.shapes.ints(vjp.node.input(slot)?)?.get(at)?.as_known();
    let (start, step) = (known(1), if vjp.node.input(4).is_some() { known(4) } else { Some(1) });
    let (Some(start), Some(step)) = (start, step) else { return Ok(None) };
    let extent = |value| vjp.dim(value, axis).map(Expr::as_known);
    if let (Some(extent), Some(taken)) = (extent(x)?, extent(y)?) {
        let start = (if start < 0 { start.saturating_add(extent) } else { start }).clamp(0, (extent - 1).max(0));
        let last = || start.checked_add(step.checked_mul(taken - 1)?);
        return Ok(match taken {
            0 => Some((Int::Known(0), 1)),
            1 => Some((Int::Known(start), 1)),
            _ if step > 0 => Some((Int::Known(start), step)),
            _ => last().filter(|&last| last >= 0).map(|last| (Int::Known(last), step)),
        });
    }
    // Steps that are longer than what they step over would make long gaps.
    if !(1..=64).contains(&step) {
        return Ok(None);
    }
    let first = match start {
        0.. => Int::Known(start),
        _ => {
            let extent = vjp.extent(x, axis)?;
            let first = vjp.plus(extent, Int::Known(start));
            vjp.larger(first, Int::Known(0))
        }
    };
    Ok(Some((first, step)))
}

/// The positions that cut `at` of a `Slice` takes along `axis`, `[K]`.
fn positions(vjp: &mut Vjp, axis: usize, at: usize) -> Result<ValueId, Undefined> {
    let x = vjp.x(0)?;
    let whole = vjp.extent(x, axis)?;
    let all = vjp.range(whole);
    let (entry, zero) = (vjp.ints(&[at as i64]), vjp.ints(&[0]));
    let mut bounds = [1, 2, 4].map(|slot| vjp.node.input(slot));
    for bound in bounds.iter_mut().flatten() {
        let one = vjp.op("Gather", &[*bound, entry]);
        *bound = vjp.cast(one, vitrim_ir::DataType::I64);
    }
    let [start, end, step] = bounds;
    Ok(vjp.call(OpType::standard("Slice"), &[Some(all), start, end, Some(zero), step], &[], 1)[0])
}

/// `x`, of the extents `extents`, with zeros after each entry along every axis so that there are `steps` times as many.
fn spread(vjp: &mut Vjp, x: ValueId, extents: &[Int], steps: &[i64]) -> ValueId {
    let stepped: Vec<usize> = (0..steps.len()).filter(|&axis| steps[axis] > 1).collect();
    if stepped.is_empty() {
        return x;
    }
    // Each of these axes is followed by one of its own for the gaps.
    let gaps: Vec<i64> = stepped.iter().enumerate().map(|(before, &axis)| (axis + before + 1) as i64).collect();
    let apart = vjp.unsqueeze(x, &gaps);
    let none = vec![Int::Known(0); steps.len() + gaps.len()];
    let mut after = none.clone();
    for (&gap, &axis) in gaps.iter().zip(&stepped) {
        after[gap as usize] = Int::Known(steps[axis] - 1);
    }
    let apart = vjp.pad(apart, &none, &after);
    let dims: Vec<Int> =
        extents.iter().zip(steps).map(|(&extent, &step)| vjp.times(extent, Int::Known(step))).collect();
    vjp.reshape_to(apart, &dims)
}

/// Padding with a number is cut off; where entries are copied, the gradients of the copies are added up.
pub(super) fn pad(vjp: &mut Vjp) -> Done {
    let (x, pads, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    if vjp.wants(2) {
        return Err("the number that it pads with depends on a parameter: use Concat".into());
    }
    let axes = vjp.node.input(3);
    let dx = match vjp.node.string("mode") {
        None | Some("constant") => {
            let opposite = match vjp.int_operand(1) {
                Ok(pads) => {
                    let opposite: Option<Vec<i64>> = pads.iter().map(|pad| pad.checked_neg()).collect();
                    vjp.ints(&opposite.ok_or("it cuts off more than there can be")?)
                }
                Err(_) => vjp.op("Neg", &[pads]),
            };
            vjp.call(OpType::standard("Pad"), &[Some(dy), Some(opposite), None, axes], &[], 1)[0]
        }
        Some(mode) => {
            let mode = Attribute::String(mode.to_owned().into());
            let count = indexing::count(vjp, x)?;
            let all = vjp.range(count);
            let positions = vjp.reshape_like(all, x)?;
            let inputs = [Some(positions), Some(pads), None, axes];
            let positions = vjp.call(OpType::standard("Pad"), &inputs, &[("mode", mode)], 1)[0];
            indexing::add_at_positions(vjp, positions, dy, false)?
        }
    };
    vjp.give(0, dx);
    Ok(())
}

/// What is kept of a matrix has a gradient.
pub(super) fn trilu(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    let upper = ("upper", Attribute::Int(vjp.node.int("upper").unwrap_or(1)));
    let diagonal = vjp.node.input(1);
    let dx = vjp.call(OpType::standard("Trilu"), &[Some(dy), diagonal], &[upper], 1)[0];
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn space_to_depth(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    let block = ("blocksize", Attribute::Int(vjp.node.int("blocksize").ok_or("it has no block size")?));
    let dx = vjp.op_with("DepthToSpace", &[dy], &[block]);
    vjp.give(0, dx);
    Ok(())
}

/// More channels are not put in another order: the order is written down.
const MAX_CHANNELS: i64 = 1 << 20;

pub(super) fn depth_to_space(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let block = vjp.node.int("blocksize").ok_or("it has no block size")?;
    let dx = vjp.op_with("SpaceToDepth", &[dy], &[("blocksize", Attribute::Int(block))]);
    let dx = match vjp.node.string("mode") {
        Some("CRD") => {
            // `SpaceToDepth` puts positions in the block before channels, this mode channels before them.
            let channels = vjp.dim(x, 1)?.as_known().filter(|channels| (0..=MAX_CHANNELS).contains(channels));
            let channels = channels.ok_or("its number of channels is unknown, or out of reason: declare it")?;
            let area = block.checked_mul(block).filter(|&area| area > 0 && channels % area == 0);
            let area = area.ok_or("its blocks do not divide the channels")?;
            let count = channels / area;
            let order: Vec<i64> = (0..channels).map(|at| at % area * count + at / area).collect();
            let order = vjp.ints(&order);
            vjp.op_with("Gather", &[dx, order], &[("axis", Attribute::Int(1))])
        }
        _ => dx,
    };
    vjp.give(0, dx);
    Ok(())
}

//! Operators that only move entries.

use vitrim_ir::{Attribute, Expr};

use crate::{Undefined, Vjp};

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
    let inverse = inverse.ok_or("its permutation is none")?;
    let dx = vjp.transpose(dy, &inverse);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn expand(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    vjp.give_broadcast(0, dy)
}

pub(super) fn concat(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", 0, vjp.rank(y)?)?;
    let count = vjp.node.inputs.len();
    let mut extents = Vec::with_capacity(count);
    for slot in 0..count {
        let x = vjp.x(slot)?;
        extents.push(vjp.dims(x)?[axis].as_known());
    }
    let sizes = match extents.iter().copied().collect::<Option<Vec<i64>>>() {
        Some(extents) => vjp.ints(&extents),
        None => {
            let mut parts = Vec::with_capacity(count);
            for slot in 0..count {
                let x = vjp.x(slot)?;
                parts.push(vjp.extent(x, axis)?);
            }
            vjp.op_with("Concat", &parts, &[("axis", Attribute::Int(0))])
        }
    };
    let op = vitrim_ir::OpType::standard("Split");
    let parts = vjp.call(op, &[Some(dy), Some(sizes)], &[("axis", Attribute::Int(axis as i64))], count);
    parts.into_iter().enumerate().for_each(|(slot, part)| vjp.give(slot, part));
    Ok(())
}

/// What is split off without a reader has no gradient: zeros stand for it.
pub(super) fn split(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let axis = vjp.axis("axis", 0, vjp.rank(x)?)?;
    let dtype = vjp.dtype(x)?;
    let mut parts = Vec::with_capacity(vjp.node.outputs.len());
    for slot in 0..vjp.node.outputs.len() {
        parts.push(match vjp.dy_of(slot) {
            Some(dy) => dy,
            None => {
                let y = vjp.y(slot)?;
                let (shape, zero) = (vjp.shape(y)?, vjp.number(dtype, 0.0));
                vjp.op("Expand", &[zero, shape])
            }
        });
    }
    let dx = vjp.op_with("Concat", &parts, &[("axis", Attribute::Int(axis as i64))]);
    vjp.give(0, dx);
    Ok(())
}

/// Zeros around what was cut out. `from` and `to` are positions along `axis`.
fn pad(vjp: &mut Vjp, axis: usize, before: i64, after: i64) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let rank = vjp.rank(x)?;
    let dx = match (before, after) {
        (0, 0) => dy,
        _ => {
            let mut pads = vec![0; 2 * rank];
            (pads[axis], pads[rank + axis]) = (before, after);
            let pads = vjp.ints(&pads);
            vjp.op("Pad", &[dy, pads])
        }
    };
    vjp.give(0, dx);
    Ok(())
}

/// Along one axis, one entry after the other.
pub(super) fn slice(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let dims = vjp.dims(x)?;
    let (starts, ends) = (vjp.int_operand(1)?, vjp.int_operand(2)?);
    let axes = match vjp.node.input(3) {
        Some(_) => vjp.int_operand(3)?,
        None => (0..starts.len() as i64).collect(),
    };
    if vjp.node.input(4).is_some() && vjp.int_operand(4)?.iter().any(|&step| step != 1) {
        return Err("it takes entries in steps".into());
    }
    let ([start], [end], [axis]) = (&starts[..], &ends[..], &axes[..]) else {
        return Err("it cuts along several axes".into());
    };
    let axis = if *axis < 0 { axis + dims.len() as i64 } else { *axis } as usize;
    let extent = dims.get(axis).and_then(Expr::as_known).ok_or("the extent that it cuts is unknown")?;
    let clamp = |at: i64| (if at < 0 { at.saturating_add(extent) } else { at }).clamp(0, extent);
    let (start, end) = (clamp(*start), clamp(*end));
    pad(vjp, axis, start, extent - end.max(start))
}

/// One entry along an axis.
pub(super) fn gather(vjp: &mut Vjp) -> Done {
    let (x, index, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let dims = vjp.dims(x)?;
    let axis = vjp.axis("axis", 0, dims.len())?;
    let extent = dims[axis].as_known().ok_or("the extent that it picks from is unknown")?;
    let [at] = vjp.int_operand(1)?[..] else { return Err("it picks several entries".into()) };
    let at = if at < 0 { at + extent } else { at };
    let scalar = vjp.rank(index)? == 0;
    let entry = match scalar {
        true => {
            let axes = vjp.ints(&[axis as i64]);
            vjp.op("Unsqueeze", &[dy, axes])
        }
        false => dy,
    };
    let rank = dims.len();
    let mut pads = vec![0; 2 * rank];
    (pads[axis], pads[rank + axis]) = (at, extent - 1 - at);
    let pads = vjp.ints(&pads);
    let dx = vjp.op("Pad", &[entry, pads]);
    vjp.give(0, dx);
    Ok(())
}

//! Sums and means.

use vitrim_ir::{Expr, ValueId};

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// The gradient of the result, of the extents of the operand.
fn spread(vjp: &mut Vjp, dy: ValueId, axes: &[i64], kept: bool) -> Result<ValueId, Undefined> {
    let x = vjp.x(0)?;
    let dy = match kept || axes.is_empty() {
        true => dy,
        false => {
            let axes = vjp.ints(axes);
            vjp.op("Unsqueeze", &[dy, axes])
        }
    };
    let shape = vjp.shape(x)?;
    Ok(vjp.op("Expand", &[dy, shape]))
}

pub(super) fn sum(vjp: &mut Vjp) -> Done {
    let (dy, axes) = (vjp.dy()?, vjp.reduced_axes()?);
    let kept = vjp.node.int("keepdims").unwrap_or(1) != 0;
    let dx = spread(vjp, dy, &axes, kept)?;
    vjp.give(0, dx);
    Ok(())
}

/// The gradient of the mean over `axes`, of the mean's extents.
fn share(vjp: &mut Vjp, axes: &[i64]) -> Result<ValueId, Undefined> {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let dims = vjp.dims(x)?;
    let count = Expr::product(axes.iter().map(|&axis| &dims[axis as usize]));
    if let Some(count) = count.and_then(|count| count.as_known()) {
        return vjp.scale(dy, 1.0 / count as f64, x);
    }
    let dtype = vjp.dtype(x)?;
    let (shape, axes) = (vjp.shape(x)?, vjp.ints(axes));
    let extents = vjp.op("Gather", &[shape, axes]);
    let count = vjp.reduce("ReduceProd", extents, &[0], false);
    let count = vjp.op_with("Cast", &[count], &[("to", vitrim_ir::Attribute::Int(dtype.code().into()))]);
    Ok(vjp.op("Div", &[dy, count]))
}

pub(super) fn mean(vjp: &mut Vjp) -> Done {
    let axes = vjp.reduced_axes()?;
    let kept = vjp.node.int("keepdims").unwrap_or(1) != 0;
    let share = share(vjp, &axes)?;
    let dx = spread(vjp, share, &axes, kept)?;
    vjp.give(0, dx);
    Ok(())
}

/// The mean over all axes from the third on.
pub(super) fn global_average(vjp: &mut Vjp) -> Done {
    let axes: Vec<i64> = (2..vjp.rank(vjp.x(0)?)? as i64).collect();
    let share = share(vjp, &axes)?;
    let dx = spread(vjp, share, &axes, true)?;
    vjp.give(0, dx);
    Ok(())
}

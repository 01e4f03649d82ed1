//! Operators that normalise along axes.

use vitrim_ir::ValueId;

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// y · (dy − Σ dy · y).
pub(super) fn softmax(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", -1, vjp.rank(y)?)? as i64;
    let weighted = vjp.op("Mul", &[dy, y]);
    let sum = vjp.reduce("ReduceSum", weighted, &[axis], true);
    let centred = vjp.op("Sub", &[dy, sum]);
    let dx = vjp.op("Mul", &[y, centred]);
    vjp.give(0, dx);
    Ok(())
}

/// dy − softmax · Σ dy.
pub(super) fn log_softmax(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", -1, vjp.rank(y)?)? as i64;
    let sum = vjp.reduce("ReduceSum", dy, &[axis], true);
    let softmax = vjp.op("Exp", &[y]);
    let shared = vjp.op("Mul", &[softmax, sum]);
    let dx = vjp.op("Sub", &[dy, shared]);
    vjp.give(0, dx);
    Ok(())
}

/// With x̂ = (x − mean) · inverse deviation: (dx̂ − mean dx̂ − x̂ · mean(dx̂ · x̂)) · inverse deviation. Mean and deviation are
/// computed again: that takes one pass over `x`, to store x̂ would take its memory.
pub(super) fn layer_norm(vjp: &mut Vjp) -> Done {
    if vjp.dy_of(1).is_some() || vjp.dy_of(2).is_some() {
        return Err("only its first result can have a gradient".into());
    }
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let dims = vjp.dims(x)?;
    let first = vjp.axis("axis", -1, dims.len())? as i64;
    let axes: Vec<i64> = (first..dims.len() as i64).collect();
    let mean_of = |vjp: &mut Vjp, value: ValueId| vjp.reduce("ReduceMean", value, &axes, true);
    let mean = mean_of(vjp, x);
    let centred = vjp.op("Sub", &[x, mean]);
    let square = vjp.op("Mul", &[centred, centred]);
    let variance = mean_of(vjp, square);
    let dtype = vjp.dtype(x)?;
    let epsilon = vjp.node.float("epsilon").unwrap_or(1e-5);
    let epsilon = vjp.number(dtype, epsilon.into());
    let variance = vjp.op("Add", &[variance, epsilon]);
    let deviation = vjp.op("Sqrt", &[variance]);
    let normal = vjp.op("Div", &[centred, deviation]);
    if vjp.wants(0) {
        let scale = vjp.x(1)?;
        let dnormal = vjp.op("Mul", &[dy, scale]);
        let mean = mean_of(vjp, dnormal);
        let product = vjp.op("Mul", &[dnormal, normal]);
        let slope = mean_of(vjp, product);
        let along = vjp.op("Mul", &[normal, slope]);
        let rest = vjp.op("Sub", &[dnormal, mean]);
        let rest = vjp.op("Sub", &[rest, along]);
        let dx = vjp.op("Div", &[rest, deviation]);
        vjp.give(0, dx);
    }
    if vjp.wants(1) {
        let product = vjp.op("Mul", &[dy, normal]);
        vjp.give_broadcast(1, product)?;
    }
    if vjp.wants(2) {
        vjp.give_broadcast(2, dy)?;
    }
    Ok(())
}

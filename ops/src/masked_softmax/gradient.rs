//! With powers e = exp(l − peak) · mask and a total S = Σ e + eps, weights are w = (e + eps / M) / S. Unlike a plain
//! softmax they change with the peak, where eps is not small against S: where what is closed is far above what is open.

use vitrim_autodiff::Vjp;
use vitrim_ir::{Attribute, DataType};

use crate::gradient::{Done, as_f32, as_type_of};

/// dl = g − (Σ g at the peak), with g = e / S · (dy − Σ dy · w). Mask and sizes have no gradient.
pub(crate) fn softmax(vjp: &mut Vjp) -> Done {
    let (scores, mask, size) = (vjp.x(0)?, vjp.x(1)?, vjp.x(2)?);
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    if !vjp.wants(0) {
        return Ok(());
    }
    let eps = vjp.node.float("eps").ok_or("its attribute 'eps' is missing")?;
    let [weights, dy] = [as_f32(vjp, y, y)?, as_f32(vjp, dy, y)?];

    // The powers and their sum once more: rounded weights do not tell them.
    let row = vjp.transpose(size, &[0, 2, 1]);
    let row = vjp.unsqueeze(row, &[1]);
    let log = vjp.op("Log", &[row]);
    let l = as_f32(vjp, scores, scores)?;
    let l = vjp.op("Add", &[l, log]);
    let peak = vjp.reduce("ReduceMax", l, &[-1], true);
    let least = vjp.number(DataType::F32, f32::MIN.into());
    let peak = vjp.op("Max", &[peak, least]);
    let below = vjp.op("Sub", &[l, peak]);
    let powers = vjp.op("Exp", &[below]);
    let mask = vjp.unsqueeze(mask, &[1]);
    let open = vjp.op("Mul", &[powers, mask]);
    let sum = vjp.reduce("ReduceSum", open, &[-1], true);
    let eps = vjp.number(DataType::F32, eps.into());
    let total = vjp.op("Add", &[sum, eps]);
    let share = vjp.op("Div", &[open, total]);

    let product = vjp.op("Mul", &[dy, weights]);
    let mean = vjp.reduce("ReduceSum", product, &[-1], true);
    let centred = vjp.op("Sub", &[dy, mean]);
    let g = vjp.op("Mul", &[share, centred]);
    let of_peak = vjp.reduce("ReduceSum", g, &[-1], true);
    let at = vjp.op_with("ArgMax", &[l], &[("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(1))]);
    let keys = vjp.positions(scores, 3)?;
    let is_peak = vjp.op("Equal", &[keys, at]);
    let zero = vjp.number(DataType::F32, 0.0);
    let of_peak = vjp.op("Where", &[is_peak, of_peak, zero]);
    let dl = vjp.op("Sub", &[g, of_peak]);
    let dscores = as_type_of(vjp, dl, scores)?;
    vjp.give(0, dscores);
    Ok(())
}

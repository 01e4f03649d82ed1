//! One call of [`GeluGrad`] or [`TanhGeluGrad`], of the standard operator `Gelu` too.

use vitrim_autodiff::Vjp;

use crate::gradient::{Done, call, is_f32, written_out};
use crate::{DOMAIN, GeluGrad, OpDef, TanhGelu, TanhGeluGrad};

pub(crate) fn gelu(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    if !is_f32(vjp, x)? {
        return written_out(vjp);
    }
    let tanh = match vjp.node.op.domain == DOMAIN {
        true => vjp.node.op == TanhGelu.op_type(),
        false => vjp.node.string("approximate") == Some("tanh"),
    };
    let op: &dyn OpDef = if tanh { &TanhGeluGrad } else { &GeluGrad };
    let dx = call(vjp, op, &[x, dy]);
    vjp.give(0, dx);
    Ok(())
}

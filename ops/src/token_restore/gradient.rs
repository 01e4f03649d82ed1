//! A slot has the sum of its tokens' gradients.

use vitrim_autodiff::Vjp;
use vitrim_ir::ValueId;

use crate::gradient::{Done, as_f32, as_type_of};

/// dy = member · dx, of 0 and 1 where a token is a member of a slot.
pub(crate) fn restore(vjp: &mut Vjp) -> Done {
    let (y, assign, x, dx) = (vjp.x(0)?, vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    let slots = vjp.positions(y, 1)?;
    let slots = vjp.unsqueeze(slots, &[0, 2]);
    let assign = vjp.unsqueeze(assign, &[1]);
    let member = vjp.op("Equal", &[slots, assign]);
    let member = vjp.cast(member, vitrim_ir::DataType::F32);
    let dx = as_f32(vjp, dx, x)?;
    let rank = vjp.rank(y)?;
    let rows = match rank {
        3 => dx,
        // As matrices, whatever axes a token has.
        _ => rows_of(vjp, dx),
    };
    let sum = vjp.op("MatMul", &[member, rows]);
    let sum = if rank == 3 { sum } else { vjp.reshape_like(sum, y)? };
    let dy = as_type_of(vjp, sum, y)?;
    vjp.give(0, dy);
    Ok(())
}

/// `[B, N, ..]` as `[B, N, ·]`.
fn rows_of(vjp: &mut Vjp, x: ValueId) -> ValueId {
    vjp.reshape(x, &[0, 0, -1])
}

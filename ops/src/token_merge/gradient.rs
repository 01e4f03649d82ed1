//! A slot is an average: each token has its share of the slot's gradient.

use vitrim_autodiff::{Undefined, Vjp};
use vitrim_ir::ValueId;

use crate::gradient::{Done, as_f32, as_type_of, call};
use crate::{TokenAssign, TokenRestore};

/// dx = size · dy\[assign\] / size_out\[assign\].
pub(crate) fn merge(vjp: &mut Vjp) -> Done {
    let (x, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    if !vjp.wants(0) {
        return Ok(());
    }
    let (size, size_out) = (vjp.x(2)?, vjp.y(1)?);
    let listed: Vec<ValueId> = (2..5).map(|slot| vjp.y(slot)).collect::<Result<_, Undefined>>()?;
    let assign = call(vjp, &TokenAssign, &listed);
    let dy = as_f32(vjp, dy, y)?;
    let of_slots = vjp.op("Div", &[dy, size_out]);
    let of_tokens = call(vjp, &TokenRestore, &[of_slots, assign]);
    let dx = vjp.op("Mul", &[of_tokens, size]);
    let dx = as_type_of(vjp, dx, x)?;
    vjp.give(0, dx);
    Ok(())
}

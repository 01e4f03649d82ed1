//! A slot is a mean: each token has its share of the slot's gradient.

use vitrim_autodiff::Vjp;

use crate::TokenRestore;
use crate::gradient::{Done, as_f32, as_type_of, call};

/// dx = dy\[assign\] / size\[assign\].
pub(crate) fn absorb(vjp: &mut Vjp) -> Done {
    let (x, y, size, assign, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.y(1)?, vjp.y(3)?, vjp.dy()?);
    if !vjp.wants(0) {
        return Ok(());
    }
    let dy = as_f32(vjp, dy, y)?;
    let share = vjp.op("Div", &[dy, size]);
    let dx = call(vjp, &TokenRestore, &[share, assign]);
    let dx = as_type_of(vjp, dx, x)?;
    vjp.give(0, dx);
    Ok(())
}

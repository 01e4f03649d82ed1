//! Of the standard operator `Softmax` along the last axis: one call of [`SoftmaxGrad`].

use vitrim_autodiff::Vjp;

use crate::SoftmaxGrad;
use crate::gradient::{Done, call, is_f32, written_out};

pub(crate) fn softmax(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let rank = vjp.rank(y)?;
    if !is_f32(vjp, y)? || vjp.axis("axis", -1, rank)? + 1 != rank {
        return written_out(vjp);
    }
    let dx = call(vjp, &SoftmaxGrad, &[y, dy]);
    vjp.give(0, dx);
    Ok(())
}

//! Of the standard operator `LayerNormalization`: one call of [`LayerNormGrad`].

use vitrim_autodiff::Vjp;
use vitrim_ir::Attribute;

use crate::LayerNormGrad;
use crate::gradient::{Done, call_with, is_f32, written_out};

pub(crate) fn layer_norm(vjp: &mut Vjp) -> Done {
    let (x, scale, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy_of(0));
    let dims = vjp.dims(x)?;
    let axis = vjp.axis("axis", -1, dims.len())?;
    // Scale and bias may be broadcast to the normalised axes.
    let whole = |operand| vjp.shapes.dims(operand) == Some(&dims[axis..]);
    let whole = whole(scale) && vjp.node.input(2).is_none_or(whole);
    let only_first = vjp.dy_of(1).is_none() && vjp.dy_of(2).is_none();
    let fits = whole && only_first && is_f32(vjp, x)?;
    let Some(dy) = dy.filter(|_| fits) else { return written_out(vjp) };
    let epsilon = vjp.node.float("epsilon").unwrap_or(1e-5);
    let attributes = [("axis", Attribute::Int(axis as i64)), ("epsilon", Attribute::Float(epsilon))];
    let given = call_with(vjp, &LayerNormGrad, &[x, scale, dy], &attributes, 3);
    given.into_iter().enumerate().for_each(|(slot, gradient)| vjp.give(slot, gradient));
    Ok(())
}

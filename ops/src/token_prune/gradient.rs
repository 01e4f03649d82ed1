//! A token that is kept has its slot's gradient, one that is dropped none. Of those that are fused, each has the extra
//! slot's gradient by its score, and its score what the token has of that gradient.

use vitrim_autodiff::Vjp;
use vitrim_ir::{Attribute, DataType};

use crate::TokenRestore;
use crate::gradient::{Done, as_f32, as_type_of, attribute, call};

/// dx = dy\[assign\], times score where the slot is no token's place; 0 where there is no slot.
pub(crate) fn prune(vjp: &mut Vjp) -> Done {
    let (x, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let (anchor, assign) = (vjp.y(2)?, vjp.y(3)?);
    let dy = as_f32(vjp, dy, y)?;
    let zero = vjp.number(DataType::F32, 0.0);
    if attribute(vjp, "fuse")? == 0 {
        if !vjp.wants(0) {
            return Ok(());
        }
        let [nowhere, first] = [-1, 0].map(|slot| vjp.ints(&[slot]));
        let slot = vjp.op("Max", &[assign, first]);
        let of_tokens = call(vjp, &TokenRestore, &[dy, slot]);
        let kept = vjp.op("Greater", &[assign, nowhere]);
        let kept = vjp.unsqueeze(kept, &[2]);
        let dx = vjp.op("Where", &[kept, of_tokens, zero]);
        let dx = as_type_of(vjp, dx, x)?;
        vjp.give(0, dx);
        return Ok(());
    }
    // Everyone has a slot then. That of the fused has no anchor.
    let of_tokens = call(vjp, &TokenRestore, &[dy, assign]);
    let anchor = vjp.op_with("GatherElements", &[anchor, assign], &[("axis", Attribute::Int(1))]);
    let first = vjp.ints(&[0]);
    let fused = vjp.op("Less", &[anchor, first]);
    let score = vjp.x(1)?;
    if vjp.wants(0) {
        let one = vjp.number(DataType::F32, 1.0);
        let weight = vjp.op("Where", &[fused, score, one]);
        let weight = vjp.unsqueeze(weight, &[2]);
        let dx = vjp.op("Mul", &[of_tokens, weight]);
        let dx = as_type_of(vjp, dx, x)?;
        vjp.give(0, dx);
    }
    if vjp.wants(1) {
        let tokens = as_f32(vjp, x, x)?;
        let product = vjp.op("Mul", &[of_tokens, tokens]);
        let dot = vjp.reduce("ReduceSum", product, &[2], false);
        let dscore = vjp.op("Where", &[fused, dot, zero]);
        vjp.give(1, dscore);
    }
    Ok(())
}

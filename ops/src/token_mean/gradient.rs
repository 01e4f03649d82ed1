//! An entry has its share of the gradient of the mean that it is in; one of all images the sum over images.

use vitrim_autodiff::Vjp;
use vitrim_ir::DataType;

use crate::gradient::{Done, as_f32, as_type_of};

/// dtable = memberᵀ · (dy / size).
pub(crate) fn mean(vjp: &mut Vjp) -> Done {
    let (table, assign, size) = (vjp.x(0)?, vjp.x(1)?, vjp.x(2)?);
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let dy = as_f32(vjp, dy, y)?;
    let share = vjp.op("Div", &[dy, size]);
    // Not a gathering: a token may be in no slot.
    let slots = vjp.positions(size, 1)?;
    let assign_column = vjp.unsqueeze(assign, &[2]);
    let member = vjp.op("Equal", &[assign_column, slots]);
    let member = vjp.cast(member, DataType::F32);
    let entries = vjp.op("MatMul", &[member, share]);
    let (assign, y) = (vjp.dims(assign)?, vjp.dims(y)?);
    let from = [assign[0].clone(), assign[1].clone(), y[2].clone()];
    let entries = vjp.sum_to(entries, &from, table)?;
    let dtable = as_type_of(vjp, entries, table)?;
    vjp.give(0, dtable);
    Ok(())
}

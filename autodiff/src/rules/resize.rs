//! Resampling of images.

use vitrim_ir::{Attribute, DataType, Expr, OpType};

use crate::{Int, Undefined, Vjp};

/// Resampling is linear, and goes along one axis after the other: the gradient goes back by the transposed matrix of each,
/// which is what the operator makes of the unit matrix.
pub(super) fn resize(vjp: &mut Vjp) -> Result<(), Undefined> {
    let (x, y, mut dx) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let rank = vjp.rank(x)?;
    let text = |name: &str| vjp.node.string(name);
    if text("coordinate_transformation_mode") == Some("tf_crop_and_resize") {
        return Err("it crops as well: use Slice before it".into());
    }
    if text("keep_aspect_ratio_policy").is_some_and(|policy| policy != "stretch") {
        return Err("its size follows from the aspect ratio: state the size".into());
    }
    let axes: Vec<usize> = match vjp.node.ints("axes") {
        Some(axes) => axes.iter().map(|&axis| if axis < 0 { axis + rank as i64 } else { axis } as usize).collect(),
        None => (0..rank).collect(),
    };
    let given = |slot: usize| {
        vjp.node.input(slot).filter(|&operand| !vjp.dims(operand).is_ok_and(|dims| dims[..] == [Expr::known(0)]))
    };
    let scales = match given(2) {
        Some(scales) => {
            let scales = vjp.graph.constant(scales).and_then(|scales| Some(scales.to_f64s()?.into_owned()));
            Some(scales.ok_or("its scales are known only at run time: fix the size of the image")?)
        }
        None => None,
    };
    let attributes: Vec<(&str, Attribute)> = vjp
        .node
        .attributes
        .iter()
        .filter(|(name, _)| name != "axes")
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    for (at, &axis) in axes.iter().enumerate() {
        let scale = match &scales {
            Some(scales) => Some(*scales.get(at).ok_or("it has fewer scales than axes")?),
            None => None,
        };
        let (from, to) = (vjp.dim(x, axis)?, vjp.dim(y, axis)?);
        if from == to && scale.is_none_or(|scale| scale == 1.0) {
            continue;
        }
        let (Some(from), Some(to)) = (from.as_known(), to.as_known()) else {
            return Err("the size of the image is unknown: fix it".into());
        };
        // [from, 1, from, 1]: images of one column.
        let square = vjp.ints(&[from, from]);
        let blank = vjp.op("ConstantOfShape", &[square]);
        let dtype = ("dtype", Attribute::Int(vjp.float(x)?.code().into()));
        let unit = vjp.op_with("EyeLike", &[blank], &[dtype]);
        let images = vjp.reshape(unit, &[from, 1, from, 1]);
        let (scales, sizes) = match scale {
            Some(scale) => (Some(vjp.numbers(DataType::F32, &[1.0, 1.0, scale, 1.0])), None),
            None => (None, Some(vjp.ints(&[from, 1, to, 1]))),
        };
        let resized = vjp.call(OpType::standard("Resize"), &[Some(images), None, scales, sizes], &attributes, 1)[0];
        let matrix = vjp.reshape_to(resized, &[Int::Known(from), Int::Known(to)]);
        let matrix = vjp.matrix_transpose(matrix, 2);
        dx = vjp.contract(dx, rank, axis, matrix);
    }
    vjp.give(0, dx);
    Ok(())
}

//! Products of matrices, and convolutions.

use vitrim_ir::{Attribute, Expr, ValueId};

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// A general product of two matrices, transposed where asked for, times a number.
fn product(vjp: &mut Vjp, [a, b]: [ValueId; 2], [trans_a, trans_b]: [bool; 2], alpha: f32) -> ValueId {
    let flag = |set: bool| Attribute::Int(set.into());
    let attributes = [("alpha", Attribute::Float(alpha)), ("transA", flag(trans_a)), ("transB", flag(trans_b))];
    vjp.op_with("Gemm", &[a, b], &attributes)
}

/// The last extent of a value, if it is fixed.
fn channels(vjp: &Vjp, value: ValueId) -> Result<Option<i64>, Undefined> {
    Ok(vjp.dims(value)?.last().and_then(Expr::as_known))
}

pub(super) fn matmul(vjp: &mut Vjp) -> Done {
    let (a, b, y, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    let (rank_a, rank_b) = (vjp.rank(a)?, vjp.rank(b)?);
    if rank_a < 2 || rank_b < 2 {
        return Err("an operand is no matrix".into());
    }
    let dims = vjp.dims(y)?;
    if vjp.wants(0) {
        let transposed = vjp.matrix_transpose(b, rank_b);
        let da = vjp.op("MatMul", &[dy, transposed]);
        let mut from = dims.to_vec();
        *from.last_mut().expect("a matrix has axes") = vjp.dims(a)?[rank_a - 1].clone();
        let da = vjp.sum_to(da, &from, a)?;
        vjp.give(0, da);
    }
    if vjp.wants(1) {
        let db = match (rank_b, channels(vjp, a)?, channels(vjp, y)?) {
            // Of all rows at once: one product instead of one for each entry of the batch and a sum of them.
            (2, Some(inner), Some(outer)) => {
                let [a, dy] = [(a, inner, rank_a), (dy, outer, dims.len())].map(|(value, extent, rank)| match rank {
                    2 => value,
                    _ => vjp.reshape(value, &[-1, extent]),
                });
                product(vjp, [a, dy], [true, false], 1.0)
            }
            _ => {
                let transposed = vjp.matrix_transpose(a, rank_a);
                let db = vjp.op("MatMul", &[transposed, dy]);
                let mut from = dims.to_vec();
                let last = from.len() - 2;
                from[last] = vjp.dims(a)?[rank_a - 1].clone();
                vjp.sum_to(db, &from, b)?
            }
        };
        vjp.give(1, db);
    }
    Ok(())
}

pub(super) fn gemm(vjp: &mut Vjp) -> Done {
    let (a, b, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let flag = |name: &str| vjp.node.int(name).unwrap_or(0) != 0;
    let (trans_a, trans_b) = (flag("transA"), flag("transB"));
    let alpha = vjp.node.float("alpha").unwrap_or(1.0);
    if vjp.wants(0) {
        let da = match trans_a {
            false => product(vjp, [dy, b], [false, !trans_b], alpha),
            true => product(vjp, [b, dy], [trans_b, true], alpha),
        };
        vjp.give(0, da);
    }
    if vjp.wants(1) {
        let db = match trans_b {
            false => product(vjp, [a, dy], [!trans_a, false], alpha),
            true => product(vjp, [dy, a], [true, trans_a], alpha),
        };
        vjp.give(1, db);
    }
    if vjp.wants(2) {
        let (c, beta) = (vjp.x(2)?, vjp.node.float("beta").unwrap_or(1.0));
        let dc = vjp.scale(dy, beta.into(), c)?;
        vjp.give_broadcast(2, dc)?;
    }
    Ok(())
}

/// A convolution whose windows tile the image: the product of its patches with the kernel.
pub(super) fn conv(vjp: &mut Vjp) -> Done {
    let (x, w, y, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    if vjp.wants(2) {
        let axes: Vec<i64> = (0..vjp.rank(y)? as i64).filter(|&axis| axis != 1).collect();
        let bias = vjp.reduce("ReduceSum", dy, &axes, false);
        vjp.give(2, bias);
    }
    if !vjp.wants(0) && !vjp.wants(1) {
        return Ok(());
    }
    let kernel: Option<Vec<i64>> = vjp.dims(w)?.iter().map(Expr::as_known).collect();
    let kernel = kernel.ok_or("the extents of its kernel are unknown")?;
    let [outer, inner, height, width] = kernel[..] else { return Err("it is no convolution of images".into()) };
    let default = |name: &str, value: i64| vjp.node.ints(name).is_none_or(|ints| ints.iter().all(|&int| int == value));
    let tiles = vjp.node.ints("strides").is_some_and(|strides| strides == [height, width]) || (height, width) == (1, 1);
    let padded = vjp.node.string("auto_pad").is_some_and(|pad| pad != "NOTSET" && pad != "VALID");
    let whole = default("pads", 0) && default("dilations", 1) && vjp.node.int("group").unwrap_or(1) == 1 && !padded;
    if !tiles || !whole {
        return Err("its windows overlap, or leave pixels out".into());
    }
    let (rows, columns) = match vjp.dims(y)? {
        [_, _, rows, columns] => (rows.as_known(), columns.as_known()),
        _ => return Err("it is no convolution of images".into()),
    };
    let (Some(rows), Some(columns)) = (rows, columns) else { return Err("the size of the image is unknown".into()) };
    let area = inner * height * width;
    let by_patch = vjp.transpose(dy, &[0, 2, 3, 1]);
    let by_patch = vjp.reshape(by_patch, &[-1, outer]);
    if vjp.wants(1) {
        let image = [vjp.dims(x)?[2].as_known(), vjp.dims(x)?[3].as_known()];
        let x = match image == [Some(rows * height), Some(columns * width)] {
            true => x,
            false => {
                let x = vjp.slice(x, 2, 0, rows * height);
                vjp.slice(x, 3, 0, columns * width)
            }
        };
        let tiled = vjp.reshape(x, &[-1, inner, rows, height, columns, width]);
        let tiled = vjp.transpose(tiled, &[0, 2, 4, 1, 3, 5]);
        let patches = vjp.reshape(tiled, &[-1, area]);
        let dw = product(vjp, [by_patch, patches], [true, false], 1.0);
        let dw = vjp.reshape_like(dw, w)?;
        vjp.give(1, dw);
    }
    if vjp.wants(0) {
        let kernel = vjp.reshape(w, &[outer, area]);
        let patches = vjp.op("MatMul", &[by_patch, kernel]);
        let tiled = vjp.reshape(patches, &[-1, rows, columns, inner, height, width]);
        let image = vjp.transpose(tiled, &[0, 3, 1, 4, 2, 5]);
        let image = vjp.reshape_like(image, x)?;
        vjp.give(0, image);
    }
    Ok(())
}

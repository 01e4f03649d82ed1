//! Operators that slide a window over an image of any number of axes.

use vitrim_ir::{Attribute, Expr, ValueId};

use super::elementwise::number;
use crate::{Int, Undefined, Vjp};

type Done = Result<(), Undefined>;

/// How windows lie: one number for each axis of the image.
struct Windows {
    kernel: Vec<i64>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    /// Padding before and after.
    pads: [Vec<i64>; 2],
    group: i64,
}

impl Windows {
    fn of(vjp: &Vjp, kernel: Vec<i64>) -> Result<Self, Undefined> {
        if kernel.iter().any(|&extent| extent < 1) {
            return Err("its kernel is empty".into());
        }
        let axes = kernel.len();
        let (x, y) = (vjp.x(0)?, vjp.y(0)?);
        if axes == 0 || vjp.rank(x)? != axes + 2 || vjp.rank(y)? != axes + 2 {
            return Err("its operand is no image of as many axes as its kernel".into());
        }
        let ints = |name: &str, default: i64, count: usize| match vjp.node.ints(name) {
            Some(ints) if ints.len() == count && ints.iter().all(|&int| int >= default) => Ok(ints.to_vec()),
            Some(_) => Err(Undefined(format!("its {name} are none"))),
            None => Ok(vec![default; count]),
        };
        let (strides, dilations) = (ints("strides", 1, axes)?, ints("dilations", 1, axes)?);
        let pads = match vjp.node.string("auto_pad") {
            None | Some("NOTSET") => {
                let mut before = ints("pads", 0, 2 * axes)?;
                let after = before.split_off(axes);
                [before, after]
            }
            Some("VALID") => [vec![0; axes], vec![0; axes]],
            Some(same) => {
                let mut pads = [vec![0; axes], vec![0; axes]];
                for axis in 0..axes {
                    let extent = |value| vjp.dim(value, axis + 2).map(Expr::as_known);
                    let reach = dilations[axis].checked_mul(kernel[axis] - 1);
                    let total = match (extent(x)?, extent(y)?) {
                        _ if strides[axis] == 1 => reach,
                        (Some(whole), Some(count)) => strides[axis]
                            .checked_mul(count - 1)
                            .and_then(|last| last.checked_add(reach?)?.checked_add(1 - whole)),
                        _ => return Err("its padding depends on the size of the image: fix that".into()),
                    };
                    let total = total.ok_or("its windows are too large")?.max(0);
                    let more = total - total / 2;
                    (pads[0][axis], pads[1][axis]) =
                        if same == "SAME_LOWER" { (more, total - more) } else { (total - more, more) };
                }
                pads
            }
        };
        let group = vjp.node.int("group").unwrap_or(1);
        if group < 1 {
            return Err("its groups are empty".into());
        }
        Ok(Self { kernel, strides, dilations, pads, group })
    }

    fn axes(&self) -> usize {
        self.kernel.len()
    }

    fn is_unpadded(&self) -> bool {
        self.pads.iter().flatten().all(|&pad| pad == 0)
    }

    /// How many entries behind the last window are in none, along an axis of the image.
    fn rest(&self, vjp: &mut Vjp, axis: usize) -> Result<Int, Undefined> {
        if self.strides[axis] == 1 {
            return Ok(Int::Known(0));
        }
        let padded = self.pads[0][axis].checked_add(self.pads[1][axis]);
        let covered = self.dilations[axis].checked_mul(self.kernel[axis] - 1);
        let offset = padded
            .zip(covered)
            .and_then(|(padded, covered)| padded.checked_add(self.strides[axis])?.checked_sub(covered.checked_add(1)?));
        let offset = offset.ok_or("its windows are too large")?;
        let (whole, count) = (vjp.dim(vjp.x(0)?, axis + 2)?, vjp.dim(vjp.y(0)?, axis + 2)?);
        let known = count.times(&Expr::known(self.strides[axis])).and_then(|steps| whole.minus(&steps)?.as_known());
        if let Some(known) = known.and_then(|known| known.checked_add(offset)) {
            return Ok(Int::Known(known));
        }
        let (x, y) = (vjp.x(0)?, vjp.y(0)?);
        let (whole, count) = (vjp.extent(x, axis + 2)?, vjp.extent(y, axis + 2)?);
        let steps = vjp.times(count, Int::Known(self.strides[axis]));
        let left = vjp.minus(whole, steps);
        Ok(vjp.plus(left, Int::Known(offset)))
    }

    /// Where windows lie, as attributes, if one lies `strides` behind the other and their entries `dilations`.
    fn attributes(&self, strides: &[i64], dilations: &[i64]) -> Vec<(&'static str, Attribute)> {
        let ints = |ints: &[i64]| Attribute::Ints(ints.to_vec());
        vec![("strides", ints(strides)), ("dilations", ints(dilations)), ("pads", ints(&self.pads.concat()))]
    }

    /// The gradient of the image: what each window gets is `dy` times the kernel, and adds up.
    fn image(&self, vjp: &mut Vjp, dy: ValueId, kernel: ValueId, group: i64) -> Result<ValueId, Undefined> {
        let rests = (0..self.axes()).map(|axis| self.rest(vjp, axis)).collect::<Result<Vec<_>, _>>()?;
        let known: Option<Vec<i64>> =
            rests.iter().map(|rest| if let Int::Known(rest) = rest { Some(*rest) } else { None }).collect();
        let mut attributes = self.attributes(&self.strides, &self.dilations);
        attributes.push(("group", Attribute::Int(group)));
        if let Some(known) = known.as_ref().filter(|known| known.iter().any(|&rest| rest != 0)) {
            attributes.push(("output_padding", Attribute::Ints(known.clone())));
        }
        let covered = vjp.op_with("ConvTranspose", &[dy, kernel], &attributes);
        Ok(match known {
            Some(_) => covered,
            None => {
                let none = [Int::Known(0); 2];
                let after = [&none[..], &rests].concat();
                vjp.pad(covered, &vec![Int::Known(0); after.len()], &after)
            }
        })
    }

    /// The gradient of the kernel `[M, C / group, ..]`: that is a convolution of the image with `dy`, where images and
    /// channels change places and steps within windows become those between them.
    fn kernel(&self, vjp: &mut Vjp, dy: ValueId) -> Result<ValueId, Undefined> {
        let x = vjp.x(0)?;
        let rank = self.axes() + 2;
        let mut swap: Vec<i64> = (0..rank as i64).collect();
        swap.swap(0, 1);
        let image = if self.group == 1 {
            vjp.transpose(x, &swap)
        } else {
            // [C / group, group · N, ..]
            let channels = vjp.dim(x, 1)?.as_known().filter(|channels| channels % self.group == 0);
            let each = channels.ok_or("its number of channels is unknown, or no multiple of its groups")? / self.group;
            let mut dims = vjp.extents(x)?;
            dims.splice(1..2, [Int::Known(self.group), Int::Known(each)]);
            let apart = vjp.reshape_to(x, &dims);
            let perm: Vec<i64> = [2, 1, 0].into_iter().chain(3..=rank as i64).collect();
            let apart = vjp.transpose(apart, &perm);
            dims.splice(0..3, [Int::Known(each), Int::Known(-1)]);
            vjp.reshape_to(apart, &dims)
        };
        let windows = vjp.transpose(dy, &swap);
        let mut attributes = self.attributes(&self.dilations, &self.strides);
        attributes.push(("group", Attribute::Int(self.group)));
        let kernel = vjp.op_with("Conv", &[image, windows], &attributes);
        let mut kernel = vjp.transpose(kernel, &swap);
        for axis in 0..self.axes() {
            // What lies behind the last window would belong to a larger kernel.
            let exact = matches!(self.rest(vjp, axis)?, Int::Known(rest) if rest < self.dilations[axis]);
            if !exact {
                kernel = vjp.slice(kernel, axis + 2, 0, self.kernel[axis]);
            }
        }
        Ok(kernel)
    }
}

pub(super) fn conv(vjp: &mut Vjp) -> Done {
    let (w, y, dy) = (vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    if vjp.wants(2) {
        let axes: Vec<i64> = (0..vjp.rank(y)? as i64).filter(|&axis| axis != 1).collect();
        let bias = vjp.reduce("ReduceSum", dy, &axes, false);
        vjp.give(2, bias);
    }
    if !vjp.wants(0) && !vjp.wants(1) {
        return Ok(());
    }
    let kernel: Option<Vec<i64>> = vjp.dims(w)?.iter().skip(2).map(Expr::as_known).collect();
    let windows = Windows::of(vjp, kernel.ok_or("the extents of its kernel are unknown: declare them")?)?;
    if tiles(vjp, &windows)? {
        return Ok(());
    }
    if vjp.wants(0) {
        let dx = windows.image(vjp, dy, w, windows.group)?;
        vjp.give(0, dx);
    }
    if vjp.wants(1) {
        let dw = windows.kernel(vjp, dy)?;
        vjp.give(1, dw);
    }
    Ok(())
}

/// Gives the gradients of a convolution whose windows tile the image, as embeddings of patches do: that is the product of
/// patches with the kernel. Whether it is one.
fn tiles(vjp: &mut Vjp, windows: &Windows) -> Result<bool, Undefined> {
    let (x, w, y, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    let undilated = windows.dilations.iter().all(|&dilation| dilation == 1);
    if windows.kernel != windows.strides || windows.group != 1 || !undilated || !windows.is_unpadded() {
        return Ok(false);
    }
    let known = |vjp: &Vjp, value| vjp.dims(value).map(|dims| dims.iter().map(Expr::as_known).collect::<Vec<_>>());
    let (image, kernel, count) = (known(vjp, x)?, known(vjp, w)?, known(vjp, y)?);
    let [Some(outer), Some(inner), Some(height), Some(width)] = kernel[..] else { return Ok(false) };
    let [_, _, Some(rows), Some(columns)] = count[..] else { return Ok(false) };
    if image[2..] != [rows.checked_mul(height), columns.checked_mul(width)] {
        return Ok(false);
    }
    let area = inner.checked_mul(height).and_then(|area| area.checked_mul(width)).ok_or("its kernel is too large")?;
    let by_patch = vjp.transpose(dy, &[0, 2, 3, 1]);
    let by_patch = vjp.reshape(by_patch, &[-1, outer]);
    if vjp.wants(1) {
        let tiled = vjp.reshape(x, &[-1, inner, rows, height, columns, width]);
        let tiled = vjp.transpose(tiled, &[0, 2, 4, 1, 3, 5]);
        let patches = vjp.reshape(tiled, &[-1, area]);
        let dw = vjp.op_with("Gemm", &[by_patch, patches], &[("transA", Attribute::Int(1))]);
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
    Ok(true)
}

/// Every entry of a window gets its share.
pub(super) fn average_pool(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    if vjp.node.int("ceil_mode").unwrap_or(0) != 0 {
        return Err("its last windows may lie behind the image: pad it and set ceil_mode to 0".into());
    }
    let kernel = vjp.node.ints("kernel_shape").ok_or("it has no kernel_shape")?.to_vec();
    let windows = Windows::of(vjp, kernel)?;
    let channels = vjp.dim(x, 1)?.as_known().filter(|&channels| channels > 0);
    let channels = channels.ok_or("its number of channels is unknown: declare it")?;
    let area: f64 = windows.kernel.iter().map(|&extent| extent as f64).product();
    let mut share = vjp.scale(dy, 1.0 / area, x)?;
    if vjp.node.int("count_include_pad").unwrap_or(0) == 0 && !windows.is_unpadded() {
        // Padding does not count: of an image of ones, such a window's mean is less.
        let mut dims = vjp.extents(x)?;
        dims[..2].fill(Int::Known(1));
        let (dims, one) = (vjp.list(&dims), number(vjp, 1.0)?);
        let ones = vjp.op("Expand", &[one, dims]);
        let kernel = ("kernel_shape", Attribute::Ints(windows.kernel.clone()));
        let mut attributes = vec![kernel, ("count_include_pad", Attribute::Int(1))];
        let placed = windows.attributes(&windows.strides, &windows.dilations);
        // Earlier versions have no dilations.
        let undilated = windows.dilations.iter().all(|&dilation| dilation == 1);
        attributes.extend(placed.into_iter().filter(|&(name, _)| !(undilated && name == "dilations")));
        let counted = vjp.op_with("AveragePool", &[ones], &attributes);
        share = vjp.op("Div", &[share, counted]);
    }
    let dims: Vec<Int> = [channels, 1].iter().chain(&windows.kernel).map(|&extent| Int::Known(extent)).collect();
    let (dims, dtype) = (vjp.list(&dims), vjp.float(x)?);
    let ones = vjp.full(dtype, 1.0, dims);
    let dx = windows.image(vjp, share, ones, channels)?;
    vjp.give(0, dx);
    Ok(())
}

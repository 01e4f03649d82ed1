//! Reductions, running sums.

use vitrim_ir::{Attribute, Expr, ValueId};

use super::elementwise::number;
use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// A reduction: the axes that it goes over, and whether they stay with extent 1.
struct Reduction {
    axes: Vec<i64>,
    kept: bool,
}

impl Reduction {
    fn of(vjp: &Vjp) -> Result<Self, Undefined> {
        Ok(Self { axes: vjp.reduced_axes()?, kept: vjp.node.int("keepdims").unwrap_or(1) != 0 })
    }

    /// Over all axes from the third on.
    fn of_pooling(vjp: &Vjp) -> Result<Self, Undefined> {
        Ok(Self { axes: (2..vjp.rank(vjp.x(0)?)? as i64).collect(), kept: true })
    }

    /// What has the extents of the result, with all axes of the operand.
    fn keep(&self, vjp: &mut Vjp, value: ValueId) -> ValueId {
        if self.kept { value } else { vjp.unsqueeze(value, &self.axes) }
    }

    /// The gradient of the result, with all axes of the operand.
    fn dy(&self, vjp: &mut Vjp) -> Result<ValueId, Undefined> {
        let dy = vjp.dy()?;
        Ok(self.keep(vjp, dy))
    }

    /// The result, likewise.
    fn y(&self, vjp: &mut Vjp) -> Result<ValueId, Undefined> {
        let y = vjp.y(0)?;
        Ok(self.keep(vjp, y))
    }
}

/// Every entry gets what is given for its sum.
fn spread(vjp: &mut Vjp, gradient: ValueId) -> Done {
    let x = vjp.x(0)?;
    let shape = vjp.shape(x);
    let dx = vjp.op("Expand", &[gradient, shape]);
    vjp.give(0, dx);
    Ok(())
}

/// The gradient is that of the result times `derivative`, of the operand's extents.
fn times(vjp: &mut Vjp, reduction: &Reduction, derivative: ValueId) -> Done {
    let dy = reduction.dy(vjp)?;
    let dx = vjp.op("Mul", &[dy, derivative]);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn sum(vjp: &mut Vjp) -> Done {
    let dy = Reduction::of(vjp)?.dy(vjp)?;
    spread(vjp, dy)
}

fn mean_of(vjp: &mut Vjp, reduction: &Reduction) -> Done {
    let (x, dy) = (vjp.x(0)?, reduction.dy(vjp)?);
    let dims = vjp.dims(x)?;
    let count = Expr::product(reduction.axes.iter().map(|&axis| &dims[axis as usize]));
    let share = match count.and_then(|count| count.as_known()) {
        Some(count) => vjp.scale(dy, 1.0 / count as f64, x)?,
        None => {
            let (dtype, shape, axes) = (vjp.float(x)?, vjp.shape(x), vjp.ints(&reduction.axes));
            let extents = vjp.op("Gather", &[shape, axes]);
            let count = vjp.reduce("ReduceProd", extents, &[0], false);
            let count = vjp.cast(count, dtype);
            vjp.op("Div", &[dy, count])
        }
    };
    spread(vjp, share)
}

pub(super) fn mean(vjp: &mut Vjp) -> Done {
    mean_of(vjp, &Reduction::of(vjp)?)
}

pub(super) fn global_average(vjp: &mut Vjp) -> Done {
    mean_of(vjp, &Reduction::of_pooling(vjp)?)
}

/// Entries that equal the extremum share its gradient.
fn extremum_of(vjp: &mut Vjp, reduction: &Reduction) -> Done {
    let (x, y) = (vjp.x(0)?, reduction.y(vjp)?);
    let hits = vjp.op("Equal", &[x, y]);
    let dtype = vjp.float(x)?;
    let hits = vjp.cast(hits, dtype);
    let count = vjp.reduce("ReduceSum", hits, &reduction.axes, true);
    let share = vjp.op("Div", &[hits, count]);
    times(vjp, reduction, share)
}

pub(super) fn extremum(vjp: &mut Vjp) -> Done {
    extremum_of(vjp, &Reduction::of(vjp)?)
}

pub(super) fn global_max(vjp: &mut Vjp) -> Done {
    extremum_of(vjp, &Reduction::of_pooling(vjp)?)
}

/// The product of all other entries, zeros among them or not.
pub(super) fn product(vjp: &mut Vjp) -> Done {
    let reduction = Reduction::of(vjp)?;
    let (x, dtype) = (vjp.x(0)?, vjp.float(vjp.x(0)?)?);
    let (zero, one) = (number(vjp, 0.0)?, number(vjp, 1.0)?);
    let is_zero = vjp.op("Equal", &[x, zero]);
    let safe = vjp.op("Where", &[is_zero, one, x]);
    let whole = vjp.reduce("ReduceProd", safe, &reduction.axes, true);
    let zeros = vjp.cast(is_zero, dtype);
    // How many of the others are zero.
    let all = vjp.reduce("ReduceSum", zeros, &reduction.axes, true);
    let others = vjp.op("Sub", &[all, zeros]);
    let (none, rest) = (vjp.op("Equal", &[others, zero]), vjp.op("Div", &[whole, safe]));
    let derivative = vjp.op("Where", &[none, rest, zero]);
    times(vjp, &reduction, derivative)
}

/// The sum of absolute values.
pub(super) fn l1(vjp: &mut Vjp) -> Done {
    let (reduction, x) = (Reduction::of(vjp)?, vjp.x(0)?);
    let sign = vjp.op("Sign", &[x]);
    times(vjp, &reduction, sign)
}

/// x / y; 0 at the tip of the cone.
pub(super) fn l2(vjp: &mut Vjp) -> Done {
    let (reduction, x) = (Reduction::of(vjp)?, vjp.x(0)?);
    let (y, zero, one) = (reduction.y(vjp)?, number(vjp, 0.0)?, number(vjp, 1.0)?);
    let is_zero = vjp.op("Equal", &[y, zero]);
    let safe = vjp.op("Where", &[is_zero, one, y]);
    let direction = vjp.op("Div", &[x, safe]);
    times(vjp, &reduction, direction)
}

pub(super) fn sum_square(vjp: &mut Vjp) -> Done {
    let (reduction, x) = (Reduction::of(vjp)?, vjp.x(0)?);
    let twice = vjp.scale(x, 2.0, x)?;
    times(vjp, &reduction, twice)
}

/// 1 / Σx = e^(−y).
pub(super) fn log_sum(vjp: &mut Vjp) -> Done {
    let reduction = Reduction::of(vjp)?;
    let (y, dy) = (reduction.y(vjp)?, reduction.dy(vjp)?);
    let negative = vjp.op("Neg", &[y]);
    let derivative = vjp.op("Exp", &[negative]);
    let dx = vjp.op("Mul", &[dy, derivative]);
    spread(vjp, dx)
}

/// The softmax: e^(x − y).
pub(super) fn log_sum_exp(vjp: &mut Vjp) -> Done {
    let (reduction, x) = (Reduction::of(vjp)?, vjp.x(0)?);
    let y = reduction.y(vjp)?;
    let below = vjp.op("Sub", &[x, y]);
    let softmax = vjp.op("Exp", &[below]);
    times(vjp, &reduction, softmax)
}

/// The running sum from the other end.
pub(super) fn running_sum(vjp: &mut Vjp) -> Done {
    let (axis, dy) = (vjp.x(1)?, vjp.dy()?);
    let flag = |name: &str| vjp.node.int(name).unwrap_or(0) != 0;
    let attributes = [("exclusive", flag("exclusive")), ("reverse", !flag("reverse"))];
    let attributes = attributes.map(|(name, set)| (name, Attribute::Int(set.into())));
    let dx = vjp.op_with("CumSum", &[dy, axis], &attributes);
    vjp.give(0, dx);
    Ok(())
}

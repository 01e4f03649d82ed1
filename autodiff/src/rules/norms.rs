//! Operators that normalise along axes.

use vitrim_ir::ValueId;

use super::elementwise::number;
use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// y · (dy − Σ dy · y).
pub(super) fn softmax(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", -1, vjp.rank(y)?)? as i64;
    let weighted = vjp.op("Mul", &[dy, y]);
    let sum = vjp.reduce("ReduceSum", weighted, &[axis], true);
    let centred = vjp.op("Sub", &[dy, sum]);
    let dx = vjp.op("Mul", &[y, centred]);
    vjp.give(0, dx);
    Ok(())
}

/// dy − softmax · Σ dy.
pub(super) fn log_softmax(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", -1, vjp.rank(y)?)? as i64;
    let sum = vjp.reduce("ReduceSum", dy, &[axis], true);
    let softmax = vjp.op("Exp", &[y]);
    let shared = vjp.op("Mul", &[softmax, sum]);
    let dx = vjp.op("Sub", &[dy, shared]);
    vjp.give(0, dx);
    Ok(())
}

/// x̂ = (x − mean) / deviation along some axes, without the mean where it is not `centred`. Both are computed again: that
/// takes one pass over `x`, to store x̂ would take its memory.
struct Normal {
    axes: Vec<i64>,
    centred: bool,
    /// x̂.
    entries: ValueId,
    deviation: ValueId,
}

impl Normal {
    fn of(vjp: &mut Vjp, x: ValueId, axes: Vec<i64>, centred: bool) -> Result<Self, Undefined> {
        let distance = match centred {
            true => {
                let mean = vjp.reduce("ReduceMean", x, &axes, true);
                vjp.op("Sub", &[x, mean])
            }
            false => x,
        };
        let square = vjp.op("Mul", &[distance, distance]);
        let variance = vjp.reduce("ReduceMean", square, &axes, true);
        let deviation = deviation(vjp, variance)?;
        let entries = vjp.op("Div", &[distance, deviation]);
        Ok(Self { axes, centred, entries, deviation })
    }

    /// The gradient of `x`: (dx̂ − mean dx̂ − x̂ · mean(dx̂ · x̂)) / deviation.
    fn back(&self, vjp: &mut Vjp, gradient: ValueId) -> ValueId {
        let product = vjp.op("Mul", &[gradient, self.entries]);
        let slope = vjp.reduce("ReduceMean", product, &self.axes, true);
        let along = vjp.op("Mul", &[self.entries, slope]);
        let rest = match self.centred {
            true => {
                let mean = vjp.reduce("ReduceMean", gradient, &self.axes, true);
                vjp.op("Sub", &[gradient, mean])
            }
            false => gradient,
        };
        let rest = vjp.op("Sub", &[rest, along]);
        vjp.op("Div", &[rest, self.deviation])
    }
}

/// √(variance + epsilon).
fn deviation(vjp: &mut Vjp, variance: ValueId) -> Result<ValueId, Undefined> {
    let epsilon = vjp.node.float("epsilon").unwrap_or(1e-5);
    let epsilon = number(vjp, epsilon.into())?;
    let variance = vjp.op("Add", &[variance, epsilon]);
    Ok(vjp.op("Sqrt", &[variance]))
}

/// Along the last axes, with scales and biases that broadcast.
fn last_axes(vjp: &mut Vjp, centred: bool) -> Done {
    if (1..vjp.node.outputs.len()).any(|slot| vjp.dy_of(slot).is_some()) {
        return Err("its mean or deviation is read: compute them with ReduceMean".into());
    }
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let rank = vjp.rank(x)?;
    let first = vjp.axis("axis", -1, rank)?;
    let normal = Normal::of(vjp, x, (first as i64..rank as i64).collect(), centred)?;
    if vjp.wants(0) {
        let scale = vjp.x(1)?;
        let gradient = vjp.op("Mul", &[dy, scale]);
        let dx = normal.back(vjp, gradient);
        vjp.give(0, dx);
    }
    let product = vjp.op("Mul", &[dy, normal.entries]);
    vjp.give_broadcast(1, product)?;
    vjp.give_broadcast(2, dy)
}

pub(super) fn layer_norm(vjp: &mut Vjp) -> Done {
    last_axes(vjp, true)
}

pub(super) fn rms_norm(vjp: &mut Vjp) -> Done {
    last_axes(vjp, false)
}

/// A number for each channel, `[C]`, beside `x`, `[N, C, ..]`.
fn by_channel(vjp: &mut Vjp, numbers: ValueId, rank: usize) -> ValueId {
    let axes: Vec<i64> = (1..rank as i64 - 1).collect();
    vjp.unsqueeze(numbers, &axes)
}

/// Sums for each channel of what has the extents of the result.
fn give_by_channel(vjp: &mut Vjp, slot: usize, gradient: ValueId, rank: usize) {
    if vjp.wants(slot) {
        let axes: Vec<i64> = (0..rank as i64).filter(|&axis| axis != 1).collect();
        let sum = vjp.reduce("ReduceSum", gradient, &axes, false);
        vjp.give(slot, sum);
    }
}

/// The rank of `[N, C, ..]`.
fn image_rank(vjp: &Vjp) -> Result<usize, Undefined> {
    let rank = vjp.rank(vjp.x(0)?)?;
    if rank < 2 { Err("its operand has no channels".into()) } else { Ok(rank) }
}

/// Along all axes behind the channels.
pub(super) fn instance_norm(vjp: &mut Vjp) -> Done {
    let (x, scale, dy, rank) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?, image_rank(vjp)?);
    let normal = Normal::of(vjp, x, (2..rank as i64).collect(), true)?;
    let scale = by_channel(vjp, scale, rank);
    let gradient = vjp.op("Mul", &[dy, scale]);
    let dx = normal.back(vjp, gradient);
    vjp.give(0, dx);
    let product = vjp.op("Mul", &[dy, normal.entries]);
    give_by_channel(vjp, 1, product, rank);
    give_by_channel(vjp, 2, dy, rank);
    Ok(())
}

/// Along groups of channels and all axes behind them. Scale and bias are those of channels, before operator set 21 those
/// of groups.
pub(super) fn group_norm(vjp: &mut Vjp) -> Done {
    let (x, scale, dy, rank) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?, image_rank(vjp)?);
    let groups = vjp.node.int("num_groups").filter(|&groups| groups > 0).ok_or("it has no number of groups")?;
    // [N, G, all of the group]: 0 stands for the batch as it is.
    let grouped = |vjp: &mut Vjp, value: ValueId| vjp.reshape(value, &[0, groups, -1]);
    let by_group = grouped(vjp, x);
    let normal = Normal::of(vjp, by_group, vec![2], true)?;
    if vjp.opset() >= 21 {
        let scale = by_channel(vjp, scale, rank);
        let gradient = vjp.op("Mul", &[dy, scale]);
        let gradient = grouped(vjp, gradient);
        let dx = normal.back(vjp, gradient);
        let dx = vjp.reshape_like(dx, x)?;
        vjp.give(0, dx);
        let entries = vjp.reshape_like(normal.entries, x)?;
        let product = vjp.op("Mul", &[dy, entries]);
        give_by_channel(vjp, 1, product, rank);
        give_by_channel(vjp, 2, dy, rank);
    } else {
        let dy = grouped(vjp, dy);
        let scale = by_channel(vjp, scale, 3);
        let gradient = vjp.op("Mul", &[dy, scale]);
        let dx = normal.back(vjp, gradient);
        let dx = vjp.reshape_like(dx, x)?;
        vjp.give(0, dx);
        let product = vjp.op("Mul", &[dy, normal.entries]);
        give_by_channel(vjp, 1, product, 3);
        give_by_channel(vjp, 2, dy, 3);
    }
    Ok(())
}

/// By the mean and variance that were counted before.
pub(super) fn batch_norm(vjp: &mut Vjp) -> Done {
    if vjp.node.int("training_mode").unwrap_or(0) != 0 {
        return Err("it counts means and variances as it runs: export the model for inference".into());
    }
    let (x, scale, mean, variance, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.x(3)?, vjp.x(4)?, vjp.dy()?);
    let rank = image_rank(vjp)?;
    let deviation = deviation(vjp, variance)?;
    let slope = vjp.op("Div", &[scale, deviation]);
    let slope = by_channel(vjp, slope, rank);
    let dx = vjp.op("Mul", &[dy, slope]);
    vjp.give(0, dx);
    give_by_channel(vjp, 2, dy, rank);
    if vjp.wants(3) {
        let opposite = vjp.op("Neg", &[dx]);
        give_by_channel(vjp, 3, opposite, rank);
    }
    if vjp.wants(1) || vjp.wants(4) {
        let (mean, deviation) = (by_channel(vjp, mean, rank), by_channel(vjp, deviation, rank));
        let distance = vjp.op("Sub", &[x, mean]);
        let normal = vjp.op("Div", &[distance, deviation]);
        let product = vjp.op("Mul", &[dy, normal]);
        give_by_channel(vjp, 1, product, rank);
        // d x̂ / d variance = −x̂ / (2 deviation²).
        let product = vjp.op("Mul", &[dx, normal]);
        let per_variance = vjp.op("Div", &[product, deviation]);
        let per_variance = vjp.scale(per_variance, -0.5, x)?;
        give_by_channel(vjp, 4, per_variance, rank);
    }
    Ok(())
}

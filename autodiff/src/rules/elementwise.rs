//! Operators that combine their operands entry by entry.

use vitrim_ir::ValueId;

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// Of one operand: the gradient of the result times the derivative.
pub(super) fn times(vjp: &mut Vjp, derivative: ValueId) -> Done {
    let dy = vjp.dy()?;
    let dx = vjp.op("Mul", &[dy, derivative]);
    vjp.give(0, dx);
    Ok(())
}

/// A number of the type of the first operand.
pub(super) fn number(vjp: &mut Vjp, value: f64) -> Result<ValueId, Undefined> {
    let dtype = vjp.float(vjp.x(0)?)?;
    Ok(vjp.number(dtype, value))
}

/// The result is the first operand, perhaps of another type.
pub(super) fn identity(vjp: &mut Vjp) -> Done {
    let (x, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let (from, to) = (vjp.dtype(y)?, vjp.dtype(x)?);
    let dx = if from == to { dy } else { vjp.cast(dy, to) };
    vjp.give(0, dx);
    Ok(())
}

/// What was dropped has no gradient; what was kept was scaled.
pub(super) fn dropout(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    let known = |slot: usize, default: f64| match vjp.node.input(slot) {
        Some(operand) => vjp.shapes.uniform(operand).ok_or("whether it drops, and how much, must be constant"),
        None => Ok(default),
    };
    if known(2, 0.0)? == 0.0 {
        vjp.give(0, dy);
        return Ok(());
    }
    let ratio = known(1, 0.5)?;
    let mask = vjp.node.output(1).ok_or("only its mask tells what it dropped: make that a second result")?;
    let (scale, zero) = (number(vjp, 1.0 / (1.0 - ratio))?, number(vjp, 0.0)?);
    let scale = vjp.op("Where", &[mask, scale, zero]);
    times(vjp, scale)
}

pub(super) fn add(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    (0..vjp.node.inputs.len()).try_for_each(|slot| vjp.give_broadcast(slot, dy))
}

pub(super) fn mean(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let count = vjp.node.inputs.len();
    let share = vjp.scale(dy, 1.0 / count as f64, y)?;
    (0..count).try_for_each(|slot| vjp.give_broadcast(slot, share))
}

pub(super) fn sub(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    if vjp.x(0)? == vjp.x(1)? {
        // Zero, whatever it is of.
        return Ok(());
    }
    if vjp.wants(0) {
        vjp.give_broadcast(0, dy)?;
    }
    if vjp.wants(1) {
        let dx = vjp.op("Neg", &[dy]);
        vjp.give_broadcast(1, dx)?;
    }
    Ok(())
}

pub(super) fn mul(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    for slot in [0, 1] {
        if vjp.wants(slot) {
            let other = vjp.x(1 - slot)?;
            let dx = vjp.op("Mul", &[dy, other]);
            vjp.give_broadcast(slot, dx)?;
        }
    }
    Ok(())
}

pub(super) fn div(vjp: &mut Vjp) -> Done {
    let (dy, y, divisor) = (vjp.dy()?, vjp.y(0)?, vjp.x(1)?);
    let quotient = vjp.op("Div", &[dy, divisor]);
    if vjp.wants(0) {
        vjp.give_broadcast(0, quotient)?;
    }
    if vjp.wants(1) {
        let scaled = vjp.op("Mul", &[quotient, y]);
        let dx = vjp.op("Neg", &[scaled]);
        vjp.give_broadcast(1, dx)?;
    }
    Ok(())
}

pub(super) fn pow(vjp: &mut Vjp) -> Done {
    let (dy, x, exponent, y) = (vjp.dy()?, vjp.x(0)?, vjp.x(1)?, vjp.y(0)?);
    let dtype = vjp.float(x)?;
    let power = vjp.shapes.uniform(exponent);
    let exponent = vjp.cast(exponent, dtype);
    if vjp.wants(0) {
        let derivative = match power {
            Some(0.0) => vjp.number(dtype, 0.0),
            Some(2.0) => {
                let two = vjp.number(dtype, 2.0);
                vjp.op("Mul", &[x, two])
            }
            Some(power) => {
                let (factor, less) = (vjp.number(dtype, power), vjp.number(dtype, power - 1.0));
                let lower = vjp.op("Pow", &[x, less]);
                vjp.op("Mul", &[lower, factor])
            }
            None => {
                let (zero, one) = (vjp.number(dtype, 0.0), vjp.number(dtype, 1.0));
                let less = vjp.op("Sub", &[exponent, one]);
                let lower = vjp.op("Pow", &[x, less]);
                let slope = vjp.op("Mul", &[lower, exponent]);
                // 0 to the power of 0 is constant, though 0 to that of −1 is infinite.
                let constant = vjp.op("Equal", &[exponent, zero]);
                vjp.op("Where", &[constant, zero, slope])
            }
        };
        let dx = vjp.op("Mul", &[dy, derivative]);
        vjp.give_broadcast(0, dx)?;
    }
    if vjp.wants(1) {
        let (zero, log) = (vjp.number(dtype, 0.0), vjp.op("Log", &[x]));
        let is_zero = vjp.op("Equal", &[x, zero]);
        let log = vjp.op("Where", &[is_zero, zero, log]);
        let derivative = vjp.op("Mul", &[y, log]);
        let dx = vjp.op("Mul", &[dy, derivative]);
        vjp.give_broadcast(1, dx)?;
    }
    Ok(())
}

/// `Max` and `Min`: the first among equals takes the gradient.
pub(super) fn extremum(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let zero = number(vjp, 0.0)?;
    // What no operand before has taken.
    let mut left = dy;
    let last = vjp.node.inputs.len().saturating_sub(1);
    for slot in 0..last {
        let x = vjp.x(slot)?;
        let wins = vjp.op("Equal", &[x, y]);
        let dx = vjp.op("Where", &[wins, left, zero]);
        vjp.give_broadcast(slot, dx)?;
        left = vjp.op("Where", &[wins, zero, left]);
    }
    vjp.give_broadcast(last, left)
}

/// The gradient goes to one operand where the condition holds, else to the other.
pub(super) fn select(vjp: &mut Vjp) -> Done {
    let (condition, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let dtype = vjp.float(y)?;
    let zero = vjp.number(dtype, 0.0);
    let (yes, no) = (vjp.op("Where", &[condition, dy, zero]), vjp.op("Where", &[condition, zero, dy]));
    vjp.give_broadcast(1, yes)?;
    vjp.give_broadcast(2, no)
}

/// The gradient passes where `condition` holds.
pub(super) fn times_where(vjp: &mut Vjp, condition: ValueId) -> Done {
    let (dy, zero) = (vjp.dy()?, number(vjp, 0.0)?);
    let dx = vjp.op("Where", &[condition, dy, zero]);
    vjp.give(0, dx);
    Ok(())
}

/// What was clipped has no gradient; what lies on a bound has.
pub(super) fn clip(vjp: &mut Vjp) -> Done {
    let (x, y) = (vjp.x(0)?, vjp.y(0)?);
    if vjp.wants(1) || vjp.wants(2) {
        return Err("its bounds depend on parameters: write it as Max and Min".into());
    }
    let unchanged = vjp.op("Equal", &[x, y]);
    times_where(vjp, unchanged)
}

pub(super) fn neg(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    let dx = vjp.op("Neg", &[dy]);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn abs(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let sign = vjp.op("Sign", &[x]);
    times(vjp, sign)
}

pub(super) fn exp(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    times(vjp, y)
}

pub(super) fn log(vjp: &mut Vjp) -> Done {
    let (dy, x) = (vjp.dy()?, vjp.x(0)?);
    let dx = vjp.op("Div", &[dy, x]);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn sqrt(vjp: &mut Vjp) -> Done {
    let (dy, y) = (vjp.dy()?, vjp.y(0)?);
    let two = number(vjp, 2.0)?;
    let twice = vjp.op("Mul", &[y, two]);
    let dx = vjp.op("Div", &[dy, twice]);
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn reciprocal(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let square = vjp.op("Mul", &[y, y]);
    let derivative = vjp.op("Neg", &[square]);
    times(vjp, derivative)
}

pub(super) fn sin(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let derivative = vjp.op("Cos", &[x]);
    times(vjp, derivative)
}

pub(super) fn cos(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let sine = vjp.op("Sin", &[x]);
    let derivative = vjp.op("Neg", &[sine]);
    times(vjp, derivative)
}

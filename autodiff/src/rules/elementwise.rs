//! Operators that combine their operands entry by entry.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

use vitrim_ir::{Attribute, ValueId};

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// Of one operand: the gradient of the result times the derivative.
fn times(vjp: &mut Vjp, derivative: ValueId) -> Done {
    let dy = vjp.dy()?;
    let dx = vjp.op("Mul", &[dy, derivative]);
    vjp.give_broadcast(0, dx)
}

/// A number of the type of the first operand.
fn number(vjp: &mut Vjp, value: f64) -> Result<ValueId, Undefined> {
    let dtype = vjp.dtype(vjp.x(0)?)?;
    Ok(vjp.number(dtype, value))
}

/// The result is the first operand, perhaps of another type.
pub(super) fn identity(vjp: &mut Vjp) -> Done {
    let training = vjp.node.is("Dropout") && vjp.node.input(2).is_some();
    if training {
        return Err("dropout that draws at random has to be written out first".into());
    }
    let (x, y, dy) = (vjp.x(0)?, vjp.y(0)?, vjp.dy()?);
    let (from, to) = (vjp.dtype(y)?, vjp.dtype(x)?);
    let dx = match from == to {
        true => dy,
        false => vjp.op_with("Cast", &[dy], &[("to", Attribute::Int(to.code().into()))]),
    };
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn add(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
    (0..vjp.node.inputs.len())
        .filter(|&slot| vjp.wants(slot))
        .collect::<Vec<_>>()
        .into_iter()
        .try_for_each(|slot| vjp.give_broadcast(slot, dy))
}

pub(super) fn sub(vjp: &mut Vjp) -> Done {
    let dy = vjp.dy()?;
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
    if vjp.wants(0) {
        let power = vjp.shapes.uniform(exponent);
        let derivative = match power {
            Some(2.0) => {
                let two = number(vjp, 2.0)?;
                vjp.op("Mul", &[x, two])
            }
            _ => {
                let (one, factor) = (number(vjp, 1.0)?, exponent);
                let less = vjp.op("Sub", &[exponent, one]);
                let power = vjp.op("Pow", &[x, less]);
                vjp.op("Mul", &[power, factor])
            }
        };
        let dx = vjp.op("Mul", &[dy, derivative]);
        vjp.give_broadcast(0, dx)?;
    }
    if vjp.wants(1) {
        let log = vjp.op("Log", &[x]);
        let derivative = vjp.op("Mul", &[y, log]);
        let dx = vjp.op("Mul", &[dy, derivative]);
        vjp.give_broadcast(1, dx)?;
    }
    Ok(())
}

/// `Max` and `Min` of two: the first among equals takes the gradient.
pub(super) fn extremum(vjp: &mut Vjp) -> Done {
    let (dy, a) = (vjp.dy()?, vjp.x(0)?);
    match vjp.node.inputs.len() {
        1 => vjp.give(0, dy),
        2 => {
            let b = vjp.x(1)?;
            let wins = if vjp.node.is("Max") { "GreaterOrEqual" } else { "LessOrEqual" };
            let first = vjp.op(wins, &[a, b]);
            select_by(vjp, first, [0, 1])?;
        }
        _ => return Err("it has more than two operands".into()),
    }
    Ok(())
}

/// The gradient goes to one operand where `condition` holds, else to the other.
fn select_by(vjp: &mut Vjp, condition: ValueId, [yes, no]: [usize; 2]) -> Done {
    let (dy, y) = (vjp.dy()?, vjp.y(0)?);
    let dtype = vjp.dtype(y)?;
    let zero = vjp.number(dtype, 0.0);
    if vjp.wants(yes) {
        let dx = vjp.op("Where", &[condition, dy, zero]);
        vjp.give_broadcast(yes, dx)?;
    }
    if vjp.wants(no) {
        let dx = vjp.op("Where", &[condition, zero, dy]);
        vjp.give_broadcast(no, dx)?;
    }
    Ok(())
}

pub(super) fn select(vjp: &mut Vjp) -> Done {
    let condition = vjp.x(0)?;
    select_by(vjp, condition, [1, 2])
}

/// What was clipped has no gradient; what lies on a bound has.
pub(super) fn clip(vjp: &mut Vjp) -> Done {
    let (x, y) = (vjp.x(0)?, vjp.y(0)?);
    if vjp.wants(1) || vjp.wants(2) {
        return Err("its bounds depend on parameters".into());
    }
    let unchanged = vjp.op("Equal", &[x, y]);
    select_by(vjp, unchanged, [0, usize::MAX])
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

/// e^(−x²).
fn bell(vjp: &mut Vjp, x: ValueId) -> ValueId {
    let square = vjp.op("Mul", &[x, x]);
    let negative = vjp.op("Neg", &[square]);
    vjp.op("Exp", &[negative])
}

pub(super) fn erf(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let bell = bell(vjp, x);
    let factor = number(vjp, FRAC_2_SQRT_PI)?;
    let derivative = vjp.op("Mul", &[bell, factor]);
    times(vjp, derivative)
}

/// 1 − y².
fn one_minus_square(vjp: &mut Vjp, y: ValueId) -> Result<ValueId, Undefined> {
    let square = vjp.op("Mul", &[y, y]);
    let one = number(vjp, 1.0)?;
    Ok(vjp.op("Sub", &[one, square]))
}

pub(super) fn tanh(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let derivative = one_minus_square(vjp, y)?;
    times(vjp, derivative)
}

pub(super) fn sigmoid(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let one = number(vjp, 1.0)?;
    let rest = vjp.op("Sub", &[one, y]);
    let derivative = vjp.op("Mul", &[y, rest]);
    times(vjp, derivative)
}

pub(super) fn softplus(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let derivative = vjp.op("Sigmoid", &[x]);
    times(vjp, derivative)
}

pub(super) fn relu(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let zero = number(vjp, 0.0)?;
    let positive = vjp.op("Greater", &[y, zero]);
    select_by(vjp, positive, [0, usize::MAX])
}

/// Φ(x) + x·φ(x); of the approximation by tanh its own derivative.
pub(super) fn gelu(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let (half, one) = (number(vjp, 0.5)?, number(vjp, 1.0)?);
    let derivative = if vjp.node.string("approximate") == Some("tanh") {
        let (factor, cubic) = ((2.0 / PI).sqrt(), 0.044715);
        let square = vjp.op("Mul", &[x, x]);
        let [k, k_cubic, k_slope] = [factor, factor * cubic, 3.0 * factor * cubic]
            .map(|value| number(vjp, value))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
            .try_into()
            .map_err(|_| Undefined::from("three numbers"))?;
        let bent = vjp.op("Mul", &[square, k_cubic]);
        let per_x = vjp.op("Add", &[bent, k]);
        let inner = vjp.op("Mul", &[x, per_x]);
        let tanh = vjp.op("Tanh", &[inner]);
        let steep = vjp.op("Mul", &[square, k_slope]);
        let slope = vjp.op("Add", &[steep, k]);
        let rest = one_minus_square(vjp, tanh)?;
        let slope = vjp.op("Mul", &[rest, slope]);
        let bend = vjp.op("Mul", &[x, slope]);
        let raised = vjp.op("Add", &[tanh, one]);
        let sum = vjp.op("Add", &[raised, bend]);
        vjp.op("Mul", &[sum, half])
    } else {
        let root = number(vjp, FRAC_1_SQRT_2)?;
        let scaled = vjp.op("Mul", &[x, root]);
        let erf = vjp.op("Erf", &[scaled]);
        let raised = vjp.op("Add", &[erf, one]);
        let cumulative = vjp.op("Mul", &[raised, half]);
        let bell = bell(vjp, scaled);
        let factor = number(vjp, 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2)?;
        let density = vjp.op("Mul", &[bell, factor]);
        let bend = vjp.op("Mul", &[x, density]);
        vjp.op("Add", &[cumulative, bend])
    };
    times(vjp, derivative)
}

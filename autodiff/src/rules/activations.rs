//! Activation functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

use vitrim_ir::ValueId;

use super::elementwise::{number, times, times_where};
use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

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

pub(super) fn softsign(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let (size, one) = (vjp.op("Abs", &[y]), number(vjp, 1.0)?);
    let rest = vjp.op("Sub", &[one, size]);
    let derivative = vjp.op("Mul", &[rest, rest]);
    times(vjp, derivative)
}

/// An attribute of the node.
fn parameter(vjp: &Vjp, name: &str, default: f64) -> f64 {
    vjp.node.float(name).map_or(default, f64::from)
}

pub(super) fn relu(vjp: &mut Vjp) -> Done {
    above(vjp, 0.0)
}

pub(super) fn thresholded_relu(vjp: &mut Vjp) -> Done {
    above(vjp, parameter(vjp, "alpha", 1.0))
}

/// The gradient passes where the operand is above a bound.
fn above(vjp: &mut Vjp, bound: f64) -> Done {
    let (x, bound) = (vjp.x(0)?, number(vjp, bound)?);
    let passes = vjp.op("Greater", &[x, bound]);
    times_where(vjp, passes)
}

/// The derivative is one number above 0, another expression elsewhere.
fn bent(vjp: &mut Vjp, right: f64, left: ValueId) -> Done {
    let (x, zero, right) = (vjp.x(0)?, number(vjp, 0.0)?, number(vjp, right)?);
    let positive = vjp.op("Greater", &[x, zero]);
    let derivative = vjp.op("Where", &[positive, right, left]);
    times(vjp, derivative)
}

pub(super) fn leaky_relu(vjp: &mut Vjp) -> Done {
    let slope = number(vjp, parameter(vjp, "alpha", 0.01))?;
    bent(vjp, 1.0, slope)
}

/// Left of 0, `Elu`, `Celu` and `Selu` are exponentials, whose derivative is the result times `rate` plus `offset`.
fn exponential(vjp: &mut Vjp, right: f64, rate: f64, offset: f64) -> Done {
    let y = vjp.y(0)?;
    let y = vjp.scale(y, rate, y)?;
    let offset = number(vjp, offset)?;
    let left = vjp.op("Add", &[y, offset]);
    bent(vjp, right, left)
}

pub(super) fn elu(vjp: &mut Vjp) -> Done {
    exponential(vjp, 1.0, 1.0, parameter(vjp, "alpha", 1.0))
}

pub(super) fn celu(vjp: &mut Vjp) -> Done {
    exponential(vjp, 1.0, 1.0 / parameter(vjp, "alpha", 1.0), 1.0)
}

pub(super) fn selu(vjp: &mut Vjp) -> Done {
    // The numbers of the specification.
    let (alpha, gamma) =
        (parameter(vjp, "alpha", 1.673_263_192_176_818_8), parameter(vjp, "gamma", 1.050_701_022_148_132_3));
    exponential(vjp, gamma, 1.0, alpha * gamma)
}

/// max(0, x) + slope · min(0, x).
pub(super) fn prelu(vjp: &mut Vjp) -> Done {
    let (x, slope, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let zero = number(vjp, 0.0)?;
    let positive = vjp.op("Greater", &[x, zero]);
    let scaled = vjp.op("Mul", &[dy, slope]);
    let dx = vjp.op("Where", &[positive, dy, scaled]);
    vjp.give(0, dx);
    let product = vjp.op("Mul", &[dy, x]);
    let dslope = vjp.op("Where", &[positive, zero, product]);
    vjp.give_broadcast(1, dslope)
}

/// The slope of its line where the result is strictly between 0 and 1.
pub(super) fn hard_sigmoid(vjp: &mut Vjp) -> Done {
    let y = vjp.y(0)?;
    let (zero, one) = (number(vjp, 0.0)?, number(vjp, 1.0)?);
    let (above, below) = (vjp.op("Greater", &[y, zero]), vjp.op("Less", &[y, one]));
    let inside = vjp.op("And", &[above, below]);
    let slope = number(vjp, parameter(vjp, "alpha", 0.2))?;
    let derivative = vjp.op("Where", &[inside, slope, zero]);
    times(vjp, derivative)
}

/// x/3 + 1/2 from −3 to 3; 0 before, 1 after.
pub(super) fn hard_swish(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let [zero, half, one, three] = [number(vjp, 0.0)?, number(vjp, 0.5)?, number(vjp, 1.0)?, number(vjp, 3.0)?];
    let third = vjp.op("Div", &[x, three]);
    let line = vjp.op("Add", &[third, half]);
    let right = vjp.op("Greater", &[x, zero]);
    let flat = vjp.op("Where", &[right, one, zero]);
    let size = vjp.op("Abs", &[x]);
    let inside = vjp.op("Less", &[size, three]);
    let derivative = vjp.op("Where", &[inside, line, flat]);
    times(vjp, derivative)
}

/// x · tanh(s) with s = softplus(x): tanh(s) + x · (1 − tanh²(s)) · sigmoid(x).
pub(super) fn mish(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let (soft, sigmoid) = (vjp.op("Softplus", &[x]), vjp.op("Sigmoid", &[x]));
    let tanh = vjp.op("Tanh", &[soft]);
    let rest = one_minus_square(vjp, tanh)?;
    let slope = vjp.op("Mul", &[rest, sigmoid]);
    let bend = vjp.op("Mul", &[x, slope]);
    let derivative = vjp.op("Add", &[tanh, bend]);
    times(vjp, derivative)
}

/// x · s with s = sigmoid(alpha · x): s + alpha · y · (1 − s).
pub(super) fn swish(vjp: &mut Vjp) -> Done {
    let (x, y) = (vjp.x(0)?, vjp.y(0)?);
    let alpha = parameter(vjp, "alpha", 1.0);
    let scaled = vjp.scale(x, alpha, x)?;
    let sigmoid = vjp.op("Sigmoid", &[scaled]);
    let one = number(vjp, 1.0)?;
    let rest = vjp.op("Sub", &[one, sigmoid]);
    let bend = vjp.op("Mul", &[y, rest]);
    let bend = vjp.scale(bend, alpha, x)?;
    let derivative = vjp.op("Add", &[sigmoid, bend]);
    times(vjp, derivative)
}

/// Φ(x) + x·φ(x); of the approximation by tanh its own derivative.
pub(super) fn gelu(vjp: &mut Vjp) -> Done {
    let x = vjp.x(0)?;
    let (half, one) = (number(vjp, 0.5)?, number(vjp, 1.0)?);
    let derivative = if vjp.node.string("approximate") == Some("tanh") {
        let (factor, cubic) = ((2.0 / PI).sqrt(), 0.044715);
        let square = vjp.op("Mul", &[x, x]);
        let (k, k_cubic) = (number(vjp, factor)?, number(vjp, factor * cubic)?);
        let k_slope = number(vjp, 3.0 * factor * cubic)?;
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

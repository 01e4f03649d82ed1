use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, SQRT_2};

use vitrim_ir::{Function, ValueId};

use crate::OpDef;
use crate::body::Body;
use crate::gelu::{CUBIC, ROOT_2_OVER_PI, tanh};

/// [The operator](crate::gelu_grad) of the exact unit.
pub struct GeluGrad;

impl OpDef for GeluGrad {
    fn name(&self) -> &'static str {
        "GeluGrad"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [x, dy] = ["x", "dy"].map(|name| body.input(name));
        let root = body.float("sqrt_2", SQRT_2);
        let scaled = body.op("Div", "scaled", &[x, root]);
        let erf = body.op("Erf", "erf", &[scaled]);
        let cumulative = half_raised(&mut body, erf);
        // At the peak, 1 / √(2π).
        let peak = body.float("peak", FRAC_2_SQRT_PI * FRAC_1_SQRT_2 / 2.0);
        let square = body.op("Mul", "square", &[scaled, scaled]);
        let exponent = body.op("Neg", "exponent", &[square]);
        let bell = body.op("Exp", "bell", &[exponent]);
        let density = body.op("Mul", "density", &[bell, peak]);
        let dx = chain(&mut body, x, dy, cumulative, density);
        body.finish(self.name(), &[], &[("dx", dx)], "The gradient of the Gaussian error linear unit.")
    }
}

/// [The operator](crate::gelu_grad) of the unit approximated with the hyperbolic tangent.
pub struct TanhGeluGrad;

impl OpDef for TanhGeluGrad {
    fn name(&self) -> &'static str {
        "TanhGeluGrad"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [x, dy] = ["x", "dy"].map(|name| body.input(name));
        let tanh = tanh(&mut body, x);
        let cumulative = half_raised(&mut body, tanh);
        let [unit, half_root, steepness] =
            [("unit", 1.0), ("half_root", ROOT_2_OVER_PI / 2.0), ("steepness", 1.5 * ROOT_2_OVER_PI * CUBIC)]
                .map(|(name, value)| body.float(name, value));
        let tanh_square = body.op("Mul", "tanh_square", &[tanh, tanh]);
        let rest = body.op("Sub", "rest", &[unit, tanh_square]);
        let square = body.op("Mul", "square", &[x, x]);
        let steep = body.op("Mul", "steep", &[square, steepness]);
        let slope = body.op("Add", "slope", &[steep, half_root]);
        let density = body.op("Mul", "density", &[rest, slope]);
        let dx = chain(&mut body, x, dy, cumulative, density);
        let doc = "The gradient of the Gaussian error linear unit approximated with tanh.";
        body.finish(self.name(), &[], &[("dx", dx)], doc)
    }
}

/// (y + 1) / 2.
fn half_raised(body: &mut Body, y: ValueId) -> ValueId {
    let [one, half] = [("one", 1.0), ("half", 0.5)].map(|(name, value)| body.float(name, value));
    let raised = body.op("Add", "raised", &[y, one]);
    body.op("Mul", "cumulative", &[raised, half])
}

/// dy · (cumulative + x · density).
fn chain(body: &mut Body, x: ValueId, dy: ValueId, cumulative: ValueId, density: ValueId) -> ValueId {
    let bend = body.op("Mul", "bend", &[x, density]);
    let derivative = body.op("Add", "derivative", &[cumulative, bend]);
    body.op("Mul", "dx", &[dy, derivative])
}

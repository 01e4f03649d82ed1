use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};

use vitrim_ir::{Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// [The operator](crate::gelu).
pub struct Gelu;

impl OpDef for Gelu {
    fn name(&self) -> &'static str {
        "Gelu"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let x = body.input("x");
        let root = body.float("sqrt_2", SQRT_2);
        let scaled = body.op("Div", "scaled", &[x, root]);
        let erf = body.op("Erf", "erf", &[scaled]);
        let [one, half] = [("one", 1.0), ("half", 0.5)].map(|(name, value)| body.float(name, value));
        let raised = body.op("Add", "raised", &[erf, one]);
        let doubled = body.op("Mul", "doubled", &[x, raised]);
        let y = body.op("Mul", "y", &[doubled, half]);
        body.finish(self.name(), &[], &[("y", y)], "The Gaussian error linear unit.")
    }
}

/// [The operator](crate::gelu), approximated with the hyperbolic tangent.
pub struct TanhGelu;

impl OpDef for TanhGelu {
    fn name(&self) -> &'static str {
        "TanhGelu"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let x = body.input("x");
        let tanh = tanh(&mut body, x);
        let [one, half] = [("one", 1.0), ("half", 0.5)].map(|(name, value)| body.float(name, value));
        let raised = body.op("Add", "raised", &[tanh, one]);
        let x_half = body.op("Mul", "x_half", &[x, half]);
        let y = body.op("Mul", "y", &[x_half, raised]);
        body.finish(self.name(), &[], &[("y", y)], "The Gaussian error linear unit, approximated with tanh.")
    }
}

/// √(2/π), as the product of √2 and 1/√π.
pub(crate) const ROOT_2_OVER_PI: f32 = FRAC_2_SQRT_PI * (SQRT_2 / 2.0);
/// What the cube of x counts in the approximation.
pub(crate) const CUBIC: f32 = 0.044_715;

/// tanh(√(2/π) (x + 0.044715 x³)).
pub(crate) fn tanh(body: &mut Body, x: ValueId) -> ValueId {
    let [three, cubic, root] =
        [("three", 3.0), ("cubic", CUBIC), ("root", ROOT_2_OVER_PI)].map(|(name, value)| body.float(name, value));
    let cube = body.op("Pow", "cube", &[x, three]);
    let bent = body.op("Mul", "bent", &[cube, cubic]);
    let sum = body.op("Add", "sum", &[x, bent]);
    let inner = body.op("Mul", "inner", &[sum, root]);
    body.op("Tanh", "tanh", &[inner])
}

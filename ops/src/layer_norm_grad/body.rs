use vitrim_ir::{Attribute, Function, ValueId, attribute_type};

use crate::OpDef;
use crate::body::Body;

/// [The operator](crate::layer_norm_grad).
pub struct LayerNormGrad;

impl OpDef for LayerNormGrad {
    fn name(&self) -> &'static str {
        "LayerNormGrad"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [x, scale, dy] = ["x", "scale", "dy"].map(|name| body.input(name));
        let epsilon = body.float_attribute("epsilon");

        // Whatever the axes, a matrix of rows.
        let axis = Attribute::Ref("axis".into(), attribute_type::INT);
        let axis = [("axis", axis)];
        let x_rows = body.op_with("Flatten", "x_rows", &[x], &axis);
        let dy_rows = body.op_with("Flatten", "dy_rows", &[dy], &axis);
        let all = body.ints("all", &[-1]);
        let scale_row = body.op("Reshape", "scale_row", &[scale, all]);

        let mean = mean(&mut body, x_rows, "mean");
        let centred = body.op("Sub", "centred", &[x_rows, mean]);
        let square = body.op("Mul", "square", &[centred, centred]);
        let variance = self::mean(&mut body, square, "variance");
        let variance = body.op("Add", "variance_and_epsilon", &[variance, epsilon]);
        let deviation = body.op("Sqrt", "deviation", &[variance]);
        let normal = body.op("Div", "normal", &[centred, deviation]);

        let slope = body.op("Mul", "slope", &[dy_rows, scale_row]);
        let slope_mean = self::mean(&mut body, slope, "slope_mean");
        let product = body.op("Mul", "product", &[slope, normal]);
        let share = self::mean(&mut body, product, "share");
        let along = body.op("Mul", "along", &[normal, share]);
        let rest = body.op("Sub", "slope_centred", &[slope, slope_mean]);
        let rest = body.op("Sub", "rest", &[rest, along]);
        let dx_rows = body.op("Div", "dx_rows", &[rest, deviation]);
        let dx = like(&mut body, dx_rows, x, "dx");

        let product = body.op("Mul", "dy_normal", &[dy_rows, normal]);
        let rows = body.ints("rows", &[0]);
        let keep = [("keepdims", Attribute::Int(0))];
        let [dscale, dbias] = [(product, "dscale"), (dy_rows, "dbias")].map(|(rows_of, name)| {
            let sum = body.op_with("ReduceSum", &format!("{name}_row"), &[rows_of, rows], &keep);
            like(&mut body, sum, scale, name)
        });
        let outputs = [("dx", dx), ("dscale", dscale), ("dbias", dbias)];
        body.finish(self.name(), &["axis", "epsilon"], &outputs, "The gradient of a layer normalisation.")
    }
}

/// The mean of each row.
fn mean(body: &mut Body, rows: ValueId, hint: &str) -> ValueId {
    body.reduce("ReduceMean", rows, &[-1], 1, hint)
}

/// `value` with the extents of `of`.
fn like(body: &mut Body, value: ValueId, of: ValueId, hint: &str) -> ValueId {
    let shape = body.op("Shape", &format!("{hint}_shape"), &[of]);
    body.op("Reshape", hint, &[value, shape])
}

use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// [The operator](crate::adam_w).
pub struct AdamW;

impl OpDef for AdamW {
    fn name(&self) -> &'static str {
        "AdamW"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let names = ["parameter", "gradient", "mean", "variance", "kept", "rate", "deviation"];
        let [parameter, gradient, mean, variance, kept, rate, deviation] = names.map(|name| body.input(name));
        let [mean_rate, variance_rate, epsilon] =
            ["mean_rate", "variance_rate", "epsilon"].map(|name| body.float_attribute(name));

        let away = body.op("Sub", "mean_away", &[gradient, mean]);
        let step = body.op("Mul", "mean_step", &[away, mean_rate]);
        let mean = body.op("Add", "mean_out", &[mean, step]);

        let square = body.op("Mul", "square", &[gradient, gradient]);
        let away = body.op("Sub", "variance_away", &[square, variance]);
        let step = body.op("Mul", "variance_step", &[away, variance_rate]);
        let variance = body.op("Add", "variance_out", &[variance, step]);

        let root = body.op("Sqrt", "root", &[variance]);
        let unbiased = body.op("Div", "unbiased", &[root, deviation]);
        let divisor = body.op("Add", "divisor", &[unbiased, epsilon]);
        let direction = body.op("Div", "direction", &[mean, divisor]);
        let step = body.op("Mul", "step", &[direction, rate]);
        let decayed = body.op("Mul", "decayed", &[parameter, kept]);
        let parameter = body.op("Sub", "parameter_out", &[decayed, step]);

        let outputs = [("parameter_out", parameter), ("mean_out", mean), ("variance_out", variance)];
        let doc = "One step of Adam with decoupled weight decay.";
        body.finish(self.name(), &["mean_rate", "variance_rate", "epsilon"], &outputs, doc)
    }
}

use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// [The operator](crate::softmax_grad).
pub struct SoftmaxGrad;

impl OpDef for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "SoftmaxGrad"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [y, dy] = ["y", "dy"].map(|name| body.input(name));
        let weighted = body.op("Mul", "weighted", &[dy, y]);
        let mean = body.sum_last(weighted, "mean");
        let centred = body.op("Sub", "centred", &[dy, mean]);
        let dx = body.op("Mul", "dx", &[y, centred]);
        body.finish(self.name(), &[], &[("dx", dx)], "The gradient of a softmax along the last axis.")
    }
}

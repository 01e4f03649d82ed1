use vitrim_ir::{Attribute, Function, Tensor};

use crate::OpDef;
use crate::body::Body;

/// Sizes before any merge.
pub struct TokenSize;

impl OpDef for TokenSize {
    fn name(&self) -> &'static str {
        "TokenSize"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let x = body.input("x");
        let shape = body.op("Shape", "shape", &[x]);
        let (zero, two, one) = (body.ints("from", &[0]), body.ints("to", &[2]), body.ints("one", &[1]));
        let outer = body.slice(shape, zero, two, 0, 1, "outer");
        let target = body.concat(&[outer, one], 0, "target");
        let ones = ("value", Attribute::Tensor(Tensor::f32s(&[1], &[1.0])));
        let size = body.op_with("ConstantOfShape", "ones", &[target], &[ones]);
        body.finish(self.name(), &[], &[("size", size)], "One for every token.")
    }
}

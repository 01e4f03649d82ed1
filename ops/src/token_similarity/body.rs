use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Inner products of tokens of length one.
pub struct CosineSimilarity;

/// Sums of absolute differences of the channels of tokens of length one.
pub struct ManhattanDistance;

impl OpDef for CosineSimilarity {
    fn name(&self) -> &'static str {
        "CosineSimilarity"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let unit = candidates(&mut body);
        let transposed = body.op_with("Transpose", "columns", &[unit], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
        let cosine = body.op("MatMul", "cosine", &[unit, transposed]);
        finish(body, self.name(), cosine, "Cosine similarity of tokens.")
    }
}

impl OpDef for ManhattanDistance {
    fn name(&self) -> &'static str {
        "ManhattanDistance"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let unit = candidates(&mut body);
        let (rows, columns) = (body.unsqueeze(unit, &[2], "rows"), body.unsqueeze(unit, &[1], "columns"));
        let gap = body.op("Sub", "gap", &[rows, columns]);
        let gap = body.op("Abs", "absolute_gap", &[gap]);
        let axes = body.ints("channels", &[-1]);
        let distance = body.op_with("ReduceSum", "distance", &[gap, axes], &[("keepdims", Attribute::Int(0))]);
        finish(body, self.name(), distance, "Manhattan distance of tokens of length one.")
    }
}

/// The tokens that take part, of length one, `[B, P, C]` float32.
fn candidates(body: &mut Body) -> ValueId {
    let x = body.input("x");
    let [protect, suffix] = ["protect", "suffix"].map(|name| body.attribute(name));
    // Up to the suffix, counted from the end: that needs no extent.
    let (zero, whole) = (body.ints("c0", &[0]), body.ints("whole", &[i64::MAX]));
    let has_none = body.op("Equal", "no_suffix", &[suffix, zero]);
    let before_suffix = body.op("Neg", "before_suffix", &[suffix]);
    let end = body.op("Where", "end", &[has_none, whole, before_suffix]);
    let x = body.slice(x, protect, end, 1, 1, "candidates");
    let x = body.as_f32(x, "candidates_f32");
    body.unit_rows(x)
}

fn finish(mut body: Body, name: &str, closeness: ValueId, doc: &str) -> Function {
    let sign = body.attribute("sign");
    let sign = body.as_f32(sign, "sign_f32");
    let signed = body.op("Mul", "signed", &[closeness, sign]);
    // Runtimes do not agree how what is not a number is sorted.
    let undefined = body.op("IsNaN", "undefined", &[signed]);
    let largest = body.float("largest", f32::MAX);
    let closeness = body.op("Where", "defined", &[undefined, largest, signed]);
    body.finish(name, &["protect", "suffix", "sign"], &[("closeness", closeness)], doc)
}

use vitrim_ir::{Attribute, Function};

use crate::OpDef;
use crate::body::Body;

/// Attention weights where connections are closed.
pub struct MaskedSoftmax;

impl OpDef for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "MaskedSoftmax"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [scores, mask, size] = ["scores", "mask", "size"].map(|name| body.input(name));
        let eps = body.float_attribute("eps");

        // One row for all heads and queries, [B, 1, 1, M].
        let row = body.op_with("Transpose", "size_row", &[size], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
        let row = body.unsqueeze(row, &[1], "size_of_heads");
        let log = body.op("Log", "log_size", &[row]);
        // The share of each key in eps. Keys are counted by sums of ones, as their number may not be known before: the
        // extents of a tensor would be fetched from the CPU.
        let zeros = body.op("Sub", "zeros", &[row, row]);
        let ones = body.op("Exp", "ones", &[zeros]);
        let keys = body.sum_last(ones, "keys");
        let share = body.op("Div", "eps_of_key", &[eps, keys]);

        let scores = body.as_f32(scores, "scores_f32");
        let sized = body.op("Add", "sized_scores", &[scores, log]);
        let peak = body.reduce("ReduceMax", sized, &[-1], 1, "largest");
        // Finite, so that a row of nothing but −∞ has a difference; runtimes do not agree what its largest is.
        let least = body.float("least", f32::MIN);
        let peak = body.op("Max", "peak", &[peak, least]);
        let below = body.op("Sub", "below_peak", &[sized, peak]);
        let powers = body.op("Exp", "powers", &[below]);
        let mask = body.unsqueeze(mask, &[1], "mask_of_heads");
        let open = body.op("Mul", "open", &[powers, mask]);
        let total = body.sum_last(open, "total");
        let total = body.op("Add", "total_and_eps", &[total, eps]);
        let lifted = body.op("Add", "lifted", &[open, share]);
        let weights = body.op("Div", "weights_f32", &[lifted, total]);
        let weights = body.as_dtype(weights, "weights_as_scores");
        let doc = "A softmax over open connections (arXiv 2211.10801, attention level).";
        body.finish(self.name(), &["eps", "dtype"], &[("weights", weights)], doc)
    }
}

use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// The attention that each token receives.
pub struct TokenScore;

impl OpDef for TokenScore {
    fn name(&self) -> &'static str {
        "TokenScore"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [q, k, size] = ["q", "k", "size"].map(|name| body.input(name));
        let [heads, head_dim] = ["heads", "head_dim"].map(|name| body.attribute(name));
        let queries = body.attribute("queries");
        // Rows of other queries are never computed.
        let zero = body.ints("from", &[0]);
        let chosen = body.slice(q, zero, queries, 1, 1, "chosen");
        let mut of_heads = |operand: ValueId, perm: [i64; 4], name: &str| {
            let at = body.attribute(&format!("{name}_at"));
            let operand = body.heads_permuted(operand, at, heads, head_dim, perm, name);
            body.as_f32(operand, &format!("{name}_f32"))
        };
        let queries = of_heads(chosen, [0, 2, 1, 3], "q");
        let keys = of_heads(k, [0, 2, 3, 1], "k");

        let scale = body.float_attribute("scale");
        let scaled = body.op("Mul", "q_scaled", &[queries, scale]);
        let scores = body.op("MatMul", "scores", &[scaled, keys]);
        // [B, 1, 1, M]
        let log = body.op("Log", "log_size", &[size]);
        let log = body.unsqueeze(log, &[1], "log_size_of_heads");
        let perm = ("perm", Attribute::Ints(vec![0, 1, 3, 2]));
        let log = body.op_with("Transpose", "log_size_of_queries", &[log], &[perm]);
        let scores = body.op("Add", "scores_sized", &[scores, log]);
        let weights = body.op_with("Softmax", "weights", &[scores], &[("axis", Attribute::Int(-1))]);
        let score = body.reduce("ReduceMean", weights, &[1, 2], 0, "received");

        let attributes = ["heads", "head_dim", "q_at", "k_at", "scale", "queries"];
        let doc = "How much attention each token receives (arXiv 2202.07800).";
        body.finish(self.name(), &attributes, &[("score", score)], doc)
    }
}

use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Attention over tokens that all count once.
pub struct Attention;

/// Attention over tokens that count as often as their size says.
pub struct ProportionalAttention;

const ATTRIBUTES: [&str; 7] = ["heads", "head_dim", "q_at", "k_at", "v_at", "scale", "dtype"];

impl OpDef for Attention {
    fn name(&self) -> &'static str {
        "Attention"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let weights = operands.weights(&mut body);
        let values = operands.head_major(&mut body, "v", [0, 2, 1, 3]);
        let mixed = body.op("MatMul", "mixed", &[weights, values]);
        let y = operands.token_major(&mut body, mixed);
        body.finish(self.name(), &ATTRIBUTES, &[("y", y)], "Multi-head attention.")
    }
}

impl OpDef for ProportionalAttention {
    fn name(&self) -> &'static str {
        "ProportionalAttention"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let size = body.input("size");
        let weights = operands.weights(&mut body);
        let values = operands.head_major(&mut body, "v", [0, 2, 1, 3]);

        // The share of the largest in each image, as the values are typed: [B, 1, M, 1].
        let largest = body.reduce("ReduceMax", size, &[1], 1, "largest_size");
        let share = body.op("Div", "size_share", &[size, largest]);
        let share = body.as_dtype(share, "size_share_as_v");
        let share = body.unsqueeze(share, &[1], "size_share_of_heads");
        let scaled = body.op("Mul", "values_scaled", &[values, share]);
        // The same for every head: a product keeps the shape without asking for it.
        let (zero, one) = (body.ints("from", &[0]), body.ints("to", &[1]));
        let head = body.slice(values, zero, one, 3, 1, "first_channel");
        let nothing = body.op("Sub", "zero_channel", &[head, head]);
        let ride = body.op("Add", "size_channel", &[nothing, share]);
        let extended = body.concat(&[scaled, ride], 3, "values_and_size");

        let result = body.op("MatMul", "mixed_and_size", &[weights, extended]);
        let end = body.ints("end", &[i64::MAX]);
        let mixed = body.slice(result, zero, operands.head_dim, 3, 1, "mixed");
        let total = body.slice(result, operands.head_dim, end, 3, 1, "total_size");
        let mixed = body.op("Div", "proportional", &[mixed, total]);
        let y = operands.token_major(&mut body, mixed);
        body.finish(self.name(), &ATTRIBUTES, &[("y", y)], "Proportional attention (arXiv 2210.09461, equation 1).")
    }
}

struct Operands {
    q: ValueId,
    k: ValueId,
    v: ValueId,
    heads: ValueId,
    head_dim: ValueId,
}

impl Operands {
    fn declare(body: &mut Body) -> Self {
        let [q, k, v] = ["q", "k", "v"].map(|name| body.input(name));
        let [heads, head_dim] = ["heads", "head_dim"].map(|name| body.attribute(name));
        Self { q, k, v, heads, head_dim }
    }

    /// The heads of operand `name`, `[B, N, H, d]`, permuted.
    fn head_major(&self, body: &mut Body, name: &str, perm: [i64; 4]) -> ValueId {
        let operand = match name {
            "q" => self.q,
            "k" => self.k,
            _ => self.v,
        };
        let at = body.attribute(&format!("{name}_at"));
        body.heads_permuted(operand, at, self.heads, self.head_dim, perm, name)
    }

    /// softmax(scale · q kᵀ), `[B, H, N, M]`.
    fn weights(&self, body: &mut Body) -> ValueId {
        let queries = self.head_major(body, "q", [0, 2, 1, 3]);
        let keys = self.head_major(body, "k", [0, 2, 3, 1]);
        let scale = body.float_attribute("scale");
        let scale = body.as_dtype(scale, "scale_as_q");
        let scaled = body.op("Mul", "q_scaled", &[queries, scale]);
        let scores = body.op("MatMul", "scores", &[scaled, keys]);
        body.op_with("Softmax", "weights", &[scores], &[("axis", Attribute::Int(-1))])
    }

    /// `[B, H, N, d]` as `[B, N, H · d]`.
    fn token_major(&self, body: &mut Body, mixed: ValueId) -> ValueId {
        let perm = ("perm", Attribute::Ints(vec![0, 2, 1, 3]));
        let mixed = body.op_with("Transpose", "mixed_of_tokens", &[mixed], &[perm]);
        let (keep, rest) = (body.ints("keep_outer", &[0, 0]), body.ints("rest", &[-1]));
        let shape = body.concat(&[keep, rest], 0, "joined_shape");
        body.op("Reshape", "heads_joined", &[mixed, shape])
    }
}

//! Softmax weights once more, and the way back from their mean.

use vitrim_autodiff::{Int, Undefined, Vjp};
use vitrim_ir::{DataType, Expr, ValueId};

use crate::gradient::{Done, as_f32, as_type_of, attribute};

/// With weights p = softmax(scale · q kᵀ + log(size)) of the chosen queries: dl = p · (dp − Σ dp · p), dq = scale · dl k,
/// dk = scale · dlᵀ q. Sizes have no gradient.
pub(crate) fn score(vjp: &mut Vjp) -> Done {
    let (q, k, size, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.x(2)?, vjp.dy()?);
    let scale = vjp.node.float("scale").ok_or("its attribute 'scale' is missing")?;
    let (wanted, heads) = (attribute(vjp, "queries")?, attribute(vjp, "heads")?);
    let tokens = vjp.extent(q, 1)?;
    let others = vjp.minus(tokens, Int::Known(wanted));
    let others = vjp.larger(others, Int::Known(0));
    let chosen = if others == Int::Known(0) { q } else { vjp.slice(q, 1, 0, wanted) };
    let (q_heads, k_heads) = (Heads::of(vjp, "q_at", q)?, Heads::of(vjp, "k_at", k)?);
    let [chosen, keys] = [(q_heads.apart(vjp, chosen), q), (k_heads.apart(vjp, k), k)];
    let (chosen, keys) = (as_f32(vjp, chosen.0, chosen.1)?, as_f32(vjp, keys.0, keys.1)?);
    let scale = vjp.number(DataType::F32, scale.into());
    let chosen = vjp.op("Mul", &[chosen, scale]);
    let columns = vjp.transpose(keys, &[0, 1, 3, 2]);
    let scores = vjp.op("MatMul", &[chosen, columns]);
    let log = vjp.op("Log", &[size]);
    let log = vjp.transpose(log, &[0, 2, 1]);
    let log = vjp.unsqueeze(log, &[1]);
    let scores = vjp.op("Add", &[scores, log]);
    let weights = vjp.op_with("Softmax", &[scores], &[("axis", vitrim_ir::Attribute::Int(-1))]);

    let queries = vjp.minus(tokens, others);
    let share = match vjp.times(queries, Int::Known(heads)) {
        Int::Known(count) => vjp.number(DataType::F32, 1.0 / count as f64),
        Int::Given(count) => {
            let count = vjp.cast(count, DataType::F32);
            vjp.op("Reciprocal", &[count])
        }
    };
    let dweights = vjp.op("Mul", &[dy, share]);
    let dweights = vjp.unsqueeze(dweights, &[1, 2]);
    let product = vjp.op("Mul", &[weights, dweights]);
    let sum = vjp.reduce("ReduceSum", product, &[-1], true);
    let centred = vjp.op("Sub", &[dweights, sum]);
    let dscores = vjp.op("Mul", &[weights, centred]);
    if vjp.wants(0) {
        let dq = vjp.op("MatMul", &[dscores, keys]);
        let dq = vjp.op("Mul", &[dq, scale]);
        let dq = q_heads.joined(vjp, dq, others);
        let dq = as_type_of(vjp, dq, q)?;
        vjp.give(0, dq);
    }
    if vjp.wants(1) {
        // The queries are scaled already.
        let rows = vjp.transpose(dscores, &[0, 1, 3, 2]);
        let dk = vjp.op("MatMul", &[rows, chosen]);
        let dk = k_heads.joined(vjp, dk, Int::Known(0));
        let dk = as_type_of(vjp, dk, k)?;
        vjp.give(1, dk);
    }
    Ok(())
}

/// Which channels of an operand `[B, N, W]` are the heads.
#[derive(Clone, Copy)]
struct Heads {
    at: i64,
    heads: i64,
    head_dim: i64,
    width: i64,
}

impl Heads {
    fn of(vjp: &Vjp, at: &str, operand: ValueId) -> Result<Self, Undefined> {
        let width = vjp.dims(operand)?.last().and_then(Expr::as_known).ok_or("the width of its operands is unknown")?;
        let [at, heads, head_dim] = [at, "heads", "head_dim"].map(|name| attribute(vjp, name));
        Ok(Self { at: at?, heads: heads?, head_dim: head_dim?, width })
    }

    /// The heads of `x`, `[B, H, N, d]`.
    fn apart(&self, vjp: &mut Vjp, x: ValueId) -> ValueId {
        let end = self.at + self.heads * self.head_dim;
        let window = if (self.at, end) == (0, self.width) { x } else { vjp.slice(x, 2, self.at, end) };
        let apart = vjp.reshape(window, &[0, 0, self.heads, self.head_dim]);
        vjp.transpose(apart, &[0, 2, 1, 3])
    }

    /// `[B, H, N, d]` as `[B, N + rows, W]`: zeros in all other channels, and in so many rows behind.
    fn joined(&self, vjp: &mut Vjp, x: ValueId, rows: Int) -> ValueId {
        let channels = self.heads * self.head_dim;
        let by_token = vjp.transpose(x, &[0, 2, 1, 3]);
        let joined = vjp.reshape(by_token, &[0, 0, channels]);
        let behind = self.width - self.at - channels;
        let known = Int::Known;
        vjp.pad(joined, &[known(0), known(0), known(self.at)], &[known(0), rows, known(behind)])
    }
}

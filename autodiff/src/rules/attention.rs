//! Attention as one operator.

use vitrim_ir::{Attribute, DataType, Expr, ValueId};

use crate::{Undefined, Vjp};

type Done = Result<(), Undefined>;

/// What attention looks like where heads are an axis of their own, `[B, H, N, d]`.
struct Heads {
    value: ValueId,
    /// Whether the operand has its heads among the channels, `[B, N, H · d]`.
    joined: bool,
}

impl Heads {
    /// `value`, of the extents of operand or result `like`.
    fn of(vjp: &mut Vjp, value: ValueId, like: ValueId, heads: &str) -> Result<Self, Undefined> {
        match vjp.rank(like)? {
            4 => Ok(Self { value, joined: false }),
            3 => {
                let heads =
                    vjp.node.int(heads).filter(|&heads| heads > 0).ok_or("its number of heads is not stated")?;
                let channels = vjp.dim(like, 2)?.as_known().filter(|channels| channels % heads == 0);
                let width = channels.ok_or("its number of channels is unknown, or no multiple of its heads")? / heads;
                // 0 stands for an extent as it is.
                let apart = vjp.reshape(value, &[0, 0, heads, width]);
                Ok(Self { value: vjp.transpose(apart, &[0, 2, 1, 3]), joined: true })
            }
            _ => Err("its operands have neither three axes nor four".into()),
        }
    }

    fn token_axis(&self) -> usize {
        if self.joined { 1 } else { 2 }
    }

    /// The number of heads of the operand `x`.
    fn count(&self, vjp: &Vjp, x: ValueId, attribute: &str) -> Result<Expr, Undefined> {
        match self.joined {
            true => vjp.node.int(attribute).map(Expr::known).ok_or_else(|| "its number of heads is not stated".into()),
            false => vjp.dim(x, 1).cloned(),
        }
    }

    /// A gradient, `[B, H, N, d]`, of the extents of the operand `like`.
    fn back(&self, vjp: &mut Vjp, gradient: ValueId, like: ValueId) -> Result<ValueId, Undefined> {
        if !self.joined {
            return Ok(gradient);
        }
        let tokens = vjp.transpose(gradient, &[0, 2, 1, 3]);
        vjp.reshape_like(tokens, like)
    }
}

/// P = softmax(scale · Q·Kᵀ + mask), which is computed again; then the rules of its parts: dV = Pᵀ·dY, dP = dY·Vᵀ,
/// dS = P · (dP − Σ dP·P), dQ = scale · dS·K, dK = scale · dSᵀ·Q.
pub(super) fn attention(vjp: &mut Vjp) -> Done {
    if (1..vjp.node.outputs.len()).any(|slot| vjp.dy_of(slot).is_some()) {
        return Err("only its first result can have a gradient: write the others out".into());
    }
    if (4..vjp.node.inputs.len()).any(|slot| vjp.node.input(slot).is_some()) {
        return Err("it reads keys and values of before, or their number: export the model without a cache".into());
    }
    if vjp.node.float("softcap").unwrap_or(0.0) != 0.0 {
        return Err("it caps its scores: write it out".into());
    }
    let [xq, xk, xv] = [vjp.x(0)?, vjp.x(1)?, vjp.x(2)?];
    let (y, dy, dtype) = (vjp.y(0)?, vjp.dy()?, vjp.float(xq)?);
    let q = Heads::of(vjp, xq, xq, "q_num_heads")?;
    let (k, v) = (Heads::of(vjp, xk, xk, "kv_num_heads")?, Heads::of(vjp, xv, xv, "kv_num_heads")?);
    let dy = Heads::of(vjp, dy, y, "q_num_heads")?.value;
    let heads = q.count(vjp, xq, "q_num_heads")?;
    if heads != k.count(vjp, xk, "kv_num_heads")? {
        return Err(
            "several heads share keys and values, or may: repeat those for each, and state how many heads there are"
                .into(),
        );
    }
    let width = match q.joined {
        true => vjp.dim(xq, 2)?.as_known().zip(heads.as_known()).map(|(channels, heads)| channels / heads),
        false => vjp.dim(xq, 3)?.as_known(),
    };
    let scale = match (vjp.node.float("scale"), width) {
        (Some(scale), _) => f64::from(scale),
        (None, Some(width)) if width > 0 => 1.0 / (width as f64).sqrt(),
        _ => return Err("the width of its heads is unknown".into()),
    };
    let transposed = vjp.matrix_transpose(k.value, 4);
    let scores = vjp.op("MatMul", &[q.value, transposed]);
    let mut scores = vjp.scale(scores, scale, xq)?;
    if vjp.node.int("is_causal").unwrap_or(0) != 0 {
        let counts = [vjp.extent(xq, q.token_axis())?, vjp.extent(xk, k.token_axis())?];
        let counts = vjp.list(&counts);
        let ones = vjp.full(dtype, 1.0, counts);
        let open = vjp.op_with("Trilu", &[ones], &[("upper", Attribute::Int(0))]);
        let open = vjp.cast(open, DataType::Bool);
        scores = mask_out(vjp, scores, open, dtype);
    }
    let mask = vjp.node.input(3);
    if let Some(mask) = mask {
        scores = match vjp.dtype(mask)? {
            DataType::Bool => mask_out(vjp, scores, mask, dtype),
            _ => vjp.op("Add", &[scores, mask]),
        };
    }
    let weights = vjp.op_with("Softmax", &[scores], &[("axis", Attribute::Int(-1))]);
    if vjp.wants(2) {
        let transposed = vjp.matrix_transpose(weights, 4);
        let dv = vjp.op("MatMul", &[transposed, dy]);
        let dv = v.back(vjp, dv, xv)?;
        vjp.give(2, dv);
    }
    let transposed = vjp.matrix_transpose(v.value, 4);
    let dweights = vjp.op("MatMul", &[dy, transposed]);
    let weighted = vjp.op("Mul", &[dweights, weights]);
    let sum = vjp.reduce("ReduceSum", weighted, &[3], true);
    let centred = vjp.op("Sub", &[dweights, sum]);
    let dscores = vjp.op("Mul", &[weights, centred]);
    if let Some(mask) = mask.filter(|_| vjp.wants(3)) {
        // [B, H, N, keys] as symbols: the mask is broadcast to it.
        let batch = vjp.dim(xq, 0)?.clone();
        let counts = [vjp.dim(xq, q.token_axis())?.clone(), vjp.dim(xk, k.token_axis())?.clone()];
        let from = [&[batch, heads][..], &counts].concat();
        let dmask = vjp.sum_to(dscores, &from, mask)?;
        vjp.give(3, dmask);
    }
    let dscores = vjp.scale(dscores, scale, xq)?;
    if vjp.wants(0) {
        let dq = vjp.op("MatMul", &[dscores, k.value]);
        let dq = q.back(vjp, dq, xq)?;
        vjp.give(0, dq);
    }
    if vjp.wants(1) {
        let transposed = vjp.matrix_transpose(dscores, 4);
        let dk = vjp.op("MatMul", &[transposed, q.value]);
        let dk = k.back(vjp, dk, xk)?;
        vjp.give(1, dk);
    }
    Ok(())
}

/// Scores that weigh nothing where connections are not `open`.
fn mask_out(vjp: &mut Vjp, scores: ValueId, open: ValueId, dtype: DataType) -> ValueId {
    let closed = vjp.number(dtype, f64::NEG_INFINITY);
    vjp.op("Where", &[open, scores, closed])
}

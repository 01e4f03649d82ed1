//! Fused operators written out: those of ONNX Runtime, so that what they compute in one go is differentiated piece by piece,
//! and attention of the standard set for readers that do not know it.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use vitrim_autodiff::{Emitter, Undefined};
use vitrim_ir::{
    Attribute, DataType, Expr, FusedAttention, Model, Node, OpType, Operands, Patch, Shapes, SkipNorm, ValueId,
};
use vitrim_passes::Refusal;

use crate::internal;

/// Which operators are written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fused {
    /// Those of ONNX Runtime, which have no rules.
    OfOnnxRuntime,
    /// `Attention` of the standard set, which opset 23 brought.
    StandardAttention,
}

impl Fused {
    fn has(self, op: &OpType) -> bool {
        match self {
            Self::OfOnnxRuntime => op.domain == "com.microsoft",
            Self::StandardAttention => *op == OpType::standard("Attention"),
        }
    }
}

/// The model with such operators written out. One that cannot be is left as it is: where a gradient has to pass, that says
/// why it does not.
pub fn decompose(model: &Model, fused: Fused) -> Result<Model, Refusal> {
    let (graph, shapes) = (model.graph(), Shapes::infer(model));
    let mut patch = Patch::new(model, "decompose");
    let mut emit = Emitter::new(model, &shapes, &mut patch);
    let mut made = Vec::new();
    for (_, node) in graph.nodes().filter(|(_, node)| fused.has(&node.op)) {
        let Some(first) = node.results().next() else { continue };
        emit.name_after(&format!("decomposed/{}", graph.value(first).name()));
        if let Ok(Some(results)) = written_out(&mut emit, node) {
            for (slot, new) in results {
                let Some(old) = node.output(slot) else { continue };
                emit.replace(old, new);
                made.push((old, new));
            }
        }
    }
    for (old, new) in made {
        patch.rewire_uses(graph, old, new, |_| true);
        graph.output_slots(old).for_each(|slot| patch.replace_output(slot, new));
    }
    let (model, _) = patch.apply(model).map_err(internal)?;
    model.verify().map_err(internal)?;
    Ok(model)
}

/// What stands for the results of a node, by slot; none of an operator that is not fused.
fn written_out(emit: &mut Emitter, node: &Node) -> Result<Option<Vec<(usize, ValueId)>>, Undefined> {
    let operand = |slot: usize| node.input(slot).ok_or(Undefined::from("an operand is missing"));
    if let Some(fused) = FusedAttention::of(emit.graph, node) {
        return attention(emit, node, &fused).map(|result| Some(vec![(0, result)]));
    }
    if let Some(skip) = SkipNorm::of(node) {
        let mut sum = emit.op("Add", &[operand(0)?, operand(1)?]);
        if let Some(bias) = node.input(skip.bias) {
            sum = emit.op("Add", &[sum, bias]);
        }
        let inputs: Vec<_> =
            std::iter::once(Some(sum)).chain(skip.parameters.iter().map(|&at| node.input(at))).collect();
        let epsilon = node.float("epsilon").unwrap_or(SkipNorm::EPSILON);
        let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon))];
        let norm = emit.call(OpType::standard(skip.norm), &inputs, &attributes, 1)[0];
        return Ok(Some(vec![(SkipNorm::NORM, norm), (SkipNorm::SUM, sum)]));
    }
    let x = operand(0)?;
    let dtype = emit.dtype(x)?;
    let biased = |emit: &mut Emitter| node.input(1).map_or(x, |bias| emit.op("Add", &[x, bias]));
    Ok(Some(match node.op.name.as_str() {
        "Gelu" => vec![(0, gelu(emit, x, dtype))],
        "BiasGelu" => {
            let x = biased(emit);
            vec![(0, gelu(emit, x, dtype))]
        }
        "FastGelu" => {
            let x = biased(emit);
            vec![(0, fast_gelu(emit, x, dtype))]
        }
        "QuickGelu" => {
            let alpha = emit.number(dtype, node.float("alpha").unwrap_or(1.702).into());
            let scaled = emit.op("Mul", &[x, alpha]);
            let gate = emit.op("Sigmoid", &[scaled]);
            vec![(0, emit.op("Mul", &[x, gate]))]
        }
        "FusedMatMul" | "TransposeMatMul" => vec![(0, product(emit, node, [x, operand(1)?], dtype)?)],
        _ => return Ok(None),
    }))
}

/// x · Φ(x).
fn gelu(emit: &mut Emitter, x: ValueId, dtype: DataType) -> ValueId {
    let [root, one, half] = [FRAC_1_SQRT_2, 1.0, 0.5].map(|number| emit.number(dtype, number));
    let scaled = emit.op("Mul", &[x, root]);
    let erf = emit.op("Erf", &[scaled]);
    let raised = emit.op("Add", &[erf, one]);
    let product = emit.op("Mul", &[x, raised]);
    emit.op("Mul", &[product, half])
}

/// The approximation of [`gelu`] by tanh.
fn fast_gelu(emit: &mut Emitter, x: ValueId, dtype: DataType) -> ValueId {
    let factor = (2.0 / PI).sqrt();
    let [linear, cubic, one, half] = [factor, factor * 0.044715, 1.0, 0.5].map(|number| emit.number(dtype, number));
    let square = emit.op("Mul", &[x, x]);
    let bent = emit.op("Mul", &[square, cubic]);
    let slope = emit.op("Add", &[bent, linear]);
    let inner = emit.op("Mul", &[x, slope]);
    let tanh = emit.op("Tanh", &[inner]);
    let raised = emit.op("Add", &[tanh, one]);
    let product = emit.op("Mul", &[x, raised]);
    emit.op("Mul", &[product, half])
}

/// A product of matrices that are transposed first, times a number.
fn product(emit: &mut Emitter, node: &Node, operands: [ValueId; 2], dtype: DataType) -> Result<ValueId, Undefined> {
    let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
    if flag("transBatchA") || flag("transBatchB") {
        return Err("it transposes batches".into());
    }
    let mut factors = [operands[0]; 2];
    for (at, (operand, name)) in operands.into_iter().zip(["transA", "transB"]).enumerate() {
        let rank = emit.rank(operand)?;
        factors[at] = if flag(name) && rank > 1 { emit.matrix_transpose(operand, rank) } else { operand };
    }
    let product = emit.op("MatMul", &factors);
    match node.float("alpha") {
        Some(alpha) if alpha != 1.0 => {
            let alpha = emit.number(dtype, alpha.into());
            Ok(emit.op("Mul", &[product, alpha]))
        }
        _ => Ok(product),
    }
}

/// softmax(scale · q · kᵀ + bias) · v.
fn attention(emit: &mut Emitter, node: &Node, fused: &FusedAttention) -> Result<ValueId, Undefined> {
    if let Some(obstacle) = fused.obstacle {
        return Err(obstacle.into());
    }
    let masked = fused.mask.is_some_and(|slot| node.input(slot).is_some());
    let capped = node.float("softcap").is_some_and(|cap| cap > 0.0);
    if masked || capped || fused.operands == Operands::Quantized {
        return Err("it masks keys, caps scores or computes in 8 bits: export the model without fusion".into());
    }
    let result = node.output(0).ok_or("its result is not read")?;
    let dtype = emit.dtype(result)?;
    let parts = by_head(emit, node, fused)?;
    let [(q, heads, head_dim), (k, of_keys, _), (v, of_values, value_dim)] = parts;
    if heads != of_keys || heads != of_values {
        return Err("its queries share keys and values between heads: export the model without fusion".into());
    }
    let scale = node.float("scale").filter(|&scale| scale != 0.0).map_or((head_dim as f64).sqrt().recip(), f64::from);
    let scale = emit.number(dtype, scale);
    let q = emit.op("Mul", &[q, scale]);
    let k = emit.matrix_transpose(k, 4);
    let mut scores = emit.op("MatMul", &[q, k]);
    if let Some(bias) = fused.attention_bias.and_then(|slot| node.input(slot)) {
        scores = match emit.dtype(bias)? {
            DataType::Bool => {
                let closed = emit.number(dtype, f64::NEG_INFINITY);
                emit.op("Where", &[bias, scores, closed])
            }
            _ => emit.op("Add", &[scores, bias]),
        };
    }
    let weights = emit.op_with("Softmax", &[scores], &[("axis", Attribute::Int(-1))]);
    let mixed = emit.op("MatMul", &[weights, v]);
    if emit.rank(result)? == 4 {
        return Ok(mixed);
    }
    let by_token = emit.transpose(mixed, &[0, 2, 1, 3]);
    Ok(emit.reshape(by_token, &[0, 0, heads * value_dim]))
}

/// Queries, keys and values `[B, H, N, d]`, with H and d.
fn by_head(emit: &mut Emitter, node: &Node, fused: &FusedAttention) -> Result<[(ValueId, i64, i64); 3], Undefined> {
    let extent = |emit: &Emitter, value: ValueId, axis: usize| -> Result<i64, Undefined> {
        let extent = emit.dims(value)?.get(axis).and_then(Expr::as_known);
        extent.ok_or_else(|| "the number of its channels is unknown".into())
    };
    let mut parts = Vec::with_capacity(3);
    // Where each part begins in what the operator projects, or in the row that is added.
    let mut from = 0;
    for (part, slot) in fused.slots().into_iter().enumerate() {
        let operand = node.input(slot).ok_or("an operand is missing")?;
        let stated = if part == 0 { fused.heads } else { fused.kv_heads }.map(|heads| heads as i64);
        if fused.operands == Operands::Apart && emit.rank(operand)? == 4 {
            parts.push((operand, extent(emit, operand, 1)?, extent(emit, operand, 3)?));
            continue;
        }
        let heads = stated.ok_or("the number of its heads is unknown")?;
        let (mut value, width) = match fused.operands {
            Operands::Apart => (operand, extent(emit, operand, 2)?),
            _ => {
                let weight = node.input(1).ok_or("an operand is missing")?;
                let all = extent(emit, weight, 1)?;
                let stated = node.ints("qkv_hidden_sizes").map(|sizes| sizes.get(part).copied());
                let width = stated.unwrap_or(Some(all / 3)).filter(|width| (0..=all).contains(width));
                let width = width.ok_or("its qkv_hidden_sizes are not those of queries, keys and values")?;
                let columns = emit.slice(weight, 1, from, from + width);
                (emit.op("MatMul", &[operand, columns]), width)
            }
        };
        if let Some(bias) = fused.bias.and_then(|slot| node.input(slot)) {
            let own = emit.slice(bias, 0, from, from + width);
            value = emit.op("Add", &[value, own]);
        }
        from += width;
        let split = emit.reshape(value, &[0, 0, heads, width / heads]);
        parts.push((emit.transpose(split, &[0, 2, 1, 3]), heads, width / heads));
    }
    parts.try_into().map_err(|_| "it has no three operands".into())
}

#[cfg(test)]
mod tests {
    use vitrim_ir::{DimSpec, GraphBuilder, Tensor, TensorType};

    use super::*;

    #[test]
    fn sizes_that_a_file_states_are_not_believed() {
        for sizes in [vec![4], vec![4, 4], vec![4, i64::MAX, 4], vec![-4, 8, 8]] {
            let dims = Some(vec![DimSpec::Named("n".into()), DimSpec::Known(3), DimSpec::Known(4)]);
            let ty = TensorType { dtype: DataType::F32, dims };
            let mut graph = GraphBuilder::new();
            let x = graph.input("x", Some(&ty));
            let weight = graph.initializer("w", Tensor::f32s(&[4, 12], &[0.5; 48]));
            let attributes = [("num_heads", Attribute::Int(2)), ("qkv_hidden_sizes", Attribute::Ints(sizes))];
            let op = OpType::of("com.microsoft", "Attention");
            let y = graph.call(op.clone(), "y", vec![Some(x), Some(weight)], &attributes, 1)[0];
            graph.output("y", y, Some(&ty));
            let model = graph.into_model(8, &[("", 17), ("com.microsoft", 1)], Vec::new());
            let left = decompose(&model, Fused::OfOnnxRuntime).unwrap();
            assert!(left.graph().nodes().all(|(_, node)| node.op == op), "it is left as it is");
        }
    }
}

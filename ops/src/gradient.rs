//! How gradients pass our operators, and by one operator of ours those of the standard set that would take many.
//!
//! Which tokens go together is constant almost everywhere: similarities, scores and sizes have no gradient, but for the
//! scores that weigh what is fused. What is left is linear in the tokens, so each rule is the adjoint of a gathering or of
//! an average. None scatters: runtimes do not agree on scatters that add.

use vitrim_autodiff::{Rule, Undefined, Vjp, rules};
use vitrim_ir::{Attribute, DataType, OpType, ValueId};

use crate::{DOMAIN, OpDef, VERSION};
use crate::{
    gelu, layer_norm_grad, masked_softmax, softmax_grad, token_absorb, token_mean, token_merge, token_prune,
    token_restore, token_score,
};

pub(crate) type Done = Result<(), Undefined>;

/// How gradients pass an operator of ours, or of the standard set where an operator of ours is its gradient. None for
/// those that are differentiated by way of their bodies, to be inlined before, and for all others.
pub fn gradient_rule(op: &OpType) -> Option<Rule> {
    match (op.domain.as_str(), op.name.as_str()) {
        ("", "LayerNormalization") => return Some(Rule::Vjp(layer_norm_grad::gradient::layer_norm)),
        ("", "Softmax") => return Some(Rule::Vjp(softmax_grad::gradient::softmax)),
        ("", "Gelu") | (DOMAIN, "Gelu" | "TanhGelu") => return Some(Rule::Vjp(gelu::gradient::gelu)),
        (DOMAIN, _) => {}
        _ => return None,
    }
    Some(match op.name.as_str() {
        "TokenMerge" | "TokenMergeDynamic" => Rule::First(token_merge::gradient::merge),
        "TokenPrune" | "TokenPruneDynamic" => Rule::First(token_prune::gradient::prune),
        "TokenAbsorb" => Rule::First(token_absorb::gradient::absorb),
        "TokenRestore" => Rule::Vjp(token_restore::gradient::restore),
        "TokenMean" => Rule::Vjp(token_mean::gradient::mean),
        "TokenScore" => Rule::Vjp(token_score::gradient::score),
        "MaskedSoftmax" => Rule::Vjp(masked_softmax::gradient::softmax),
        "TokenSize"
        | "TokenAssign"
        | "ConnectionMask"
        | "ConnectionMaskDynamic"
        | "CosineSimilarity"
        | "ManhattanDistance"
        | "TokenExpand" => Rule::Zero,
        _ => return None,
    })
}

/// A call of one of our operators.
pub(crate) fn call(vjp: &mut Vjp, op: &dyn OpDef, inputs: &[ValueId]) -> ValueId {
    call_with(vjp, op, inputs, &[], 1)[0]
}

/// A call of one of our operators with attributes and several results.
pub(crate) fn call_with(
    vjp: &mut Vjp,
    op: &dyn OpDef,
    inputs: &[ValueId],
    attributes: &[(&str, Attribute)],
    results: usize,
) -> Vec<ValueId> {
    let function = op.function(vjp.opset());
    vjp.patch().function(function);
    vjp.patch().import(DOMAIN, VERSION);
    let inputs: Vec<Option<ValueId>> = inputs.iter().copied().map(Some).collect();
    vjp.call(op.op_type(), &inputs, attributes, results)
}

/// By the rule of the standard operator: in standard operators.
pub(crate) fn written_out(vjp: &mut Vjp) -> Done {
    match rules::standard(&vjp.node.op) {
        Rule::Vjp(rule) => rule(vjp),
        _ => Err("only operators in float32 have a gradient".into()),
    }
}

/// Whether a value is float32, the only type of the operators that are gradients.
pub(crate) fn is_f32(vjp: &Vjp, value: ValueId) -> Result<bool, Undefined> {
    Ok(vjp.dtype(value)? == DataType::F32)
}

/// `x` as float32, given a value of the graph of its type.
pub(crate) fn as_f32(vjp: &mut Vjp, x: ValueId, like: ValueId) -> Result<ValueId, Undefined> {
    Ok(match vjp.dtype(like)? {
        DataType::F32 => x,
        _ => vjp.cast(x, DataType::F32),
    })
}

/// `x`, of float32, as the type of a value of the graph.
pub(crate) fn as_type_of(vjp: &mut Vjp, x: ValueId, like: ValueId) -> Result<ValueId, Undefined> {
    Ok(match vjp.dtype(like)? {
        DataType::F32 => x,
        dtype => vjp.cast(x, dtype),
    })
}

/// The attribute `name` of the node.
pub(crate) fn attribute(vjp: &Vjp, name: &str) -> Result<i64, Undefined> {
    vjp.node.int(name).ok_or_else(|| Undefined(format!("its attribute '{name}' is missing")))
}

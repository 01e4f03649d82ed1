//! The work of a model, as far as token counts change it: multiplications of matrices and convolutions.

use serde::Serialize;
use vitrim_ir::{Expr, FusedAttention, Graph, Model, Node, Operands, ValueId};
use vitrim_ops::{Attention, OpDef, ProportionalAttention};

use crate::recognise::VitModel;
use crate::schedule::Step;

/// Work for one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Floating-point operations of matrix products and convolutions (a multiplication and an addition are two).
    pub flops: u64,
}

impl Cost {
    /// What is left when that much is saved.
    pub(crate) fn without(self, saved: Self) -> Self {
        Self { flops: self.flops.saturating_sub(saved.flops) }
    }
}

/// The work of the model when each block does to the token count what `steps` say; without steps, as it is.
///
/// `None` where an extent beside the batch is known only at run time.
pub fn cost(model: &Model, vit: &VitModel, steps: &[Step]) -> Option<Cost> {
    let graph = model.graph();
    let tokens = vit.tokens().as_known()?;
    // Tokens behind each cut, and as each block begins; a node is behind a cut if it comes after it and carries tokens.
    let cuts: Vec<_> = vit.blocks.iter().map(|block| block.cut).collect();
    let entries: Vec<_> = vit.blocks.iter().map(|block| block.entry).collect();
    let mut count_of: std::collections::HashMap<ValueId, i64> = std::collections::HashMap::new();
    count_of.insert(vit.axes.origin(), tokens);
    let mut flops = 0u64;
    for (id, node) in graph.nodes() {
        let count = node.operands().filter_map(|value| count_of.get(&value).copied()).min().unwrap_or(tokens);
        flops = flops.checked_add(self::flops(graph, node, &|value| extents(vit, value, count))?)?;
        let entered = entries.iter().position(|&entry| entry == Some(id)).and_then(|block| steps.get(block));
        let cut = cuts.iter().position(|&cut| cut == id).and_then(|block| steps.get(block));
        let after =
            entered.map(|step| step.before).or(cut.map(|step| step.after())).map_or(count, |after| after as i64);
        count_of.extend(node.results().filter(|&value| vit.axes.carries(value)).map(|value| (value, after)));
    }
    Some(Cost { flops })
}

/// Extents of a value for one image and `tokens` tokens.
fn extents(vit: &VitModel, value: ValueId, tokens: i64) -> Option<Vec<i64>> {
    let batch = vit.axes.batch();
    let one_image = |extent: &Expr| {
        let batch = batch.as_symbol();
        extent.eval(&|symbol| (Some(symbol) == batch).then_some(1))
    };
    let count = Expr::known(tokens);
    match vit.axes.layout(value) {
        Some(layout) => layout.0.iter().map(|axis| one_image(&axis.extent(&count)?)).collect(),
        None => vit.shapes.dims(value)?.iter().map(one_image).collect(),
    }
}

/// The extents of a value, for one image.
type Extents<'a> = &'a dyn Fn(ValueId) -> Option<Vec<i64>>;

fn product(extents: &[i64]) -> Option<u64> {
    extents.iter().try_fold(1u64, |all, &extent| all.checked_mul(u64::try_from(extent).ok()?))
}

/// The work of one node, where `extents` has the extents of its operands and results.
pub(crate) fn flops(graph: &Graph, node: &Node, extents: Extents<'_>) -> Option<u64> {
    if [&Attention as &dyn OpDef, &ProportionalAttention].iter().any(|op| op.op_type() == node.op) {
        let keys = u64::try_from(*extents(node.input(1)?)?.get(1)?).ok()?;
        return product(&extents(node.output(0)?)?)?.checked_mul(keys)?.checked_mul(4);
    }
    match FusedAttention::of(graph, node) {
        Some(fused) => attention_flops(node, &fused, extents),
        None => node_flops(node, extents),
    }
}

/// Scores and mixing, and the projection where the operator does it itself.
fn attention_flops(node: &Node, fused: &FusedAttention, extents: Extents<'_>) -> Option<u64> {
    let rows = |slot: usize| {
        let extents = extents(node.input(fused.slots()[slot])?)?;
        Some((extents[extents.len().checked_sub(2)?], extents))
    };
    let ((_, mut queries), (keys, _)) = (rows(0)?, rows(1)?);
    let mut projection = 0;
    if fused.operands != Operands::Apart {
        let columns = extents(node.input(1)?)?.pop()?;
        projection = product(&queries)?.checked_mul(u64::try_from(columns).ok()?)?.checked_mul(2)?;
        *queries.last_mut()? =
            node.ints("qkv_hidden_sizes").and_then(|sizes| sizes.first().copied()).unwrap_or(columns / 3);
    }
    product(&queries)?.checked_mul(u64::try_from(keys).ok()?)?.checked_mul(4)?.checked_add(projection)
}

fn node_flops(node: &Node, extents: Extents<'_>) -> Option<u64> {
    let name = node.op.name.as_str();
    let inner = match name {
        name if name != "Einsum" && node.factors().is_some() => {
            let [left, _] = node.factors()?;
            let a = extents(node.input(left)?)?;
            let last = a.len().checked_sub(1)?;
            let transposed = node.int("transA").unwrap_or(0) != 0;
            *a.get(if transposed { last.checked_sub(1)? } else { last })?
        }
        "MatMulNBits" | "MatMulBnb4" => node.int("K")?,
        "Conv" | "FusedConv" | "ConvInteger" | "QLinearConv" => {
            let kernel = extents(node.input(if name == "QLinearConv" { 3 } else { 1 })?)?;
            kernel.get(1..)?.iter().product()
        }
        "Einsum" => {
            let (a, b) = (extents(node.input(0)?)?, extents(node.input(1)?)?);
            let out = extents(node.output(0)?)?;
            // Every index of a product appears twice among operands and result, so their product is a square.
            let all = product(&a)? as f64 * product(&b)? as f64 * product(&out)? as f64;
            return Some((2.0 * all.sqrt()) as u64);
        }
        _ => return Some(0),
    };
    let out = extents(node.output(0)?)?;
    product(&out)?.checked_mul(u64::try_from(inner).ok()?)?.checked_mul(2)
}

//! Dead-token elimination: a token that nothing reads is not computed.
//!
//! Where a head reads only the class token, the last block needs queries, attention, projection and MLP for that token
//! alone; keys and values are needed of all. This is exact, and holds for a model that is not merged too. Which tokens
//! are dead is found from what the graph reads, without an idea of heads or blocks:
//!
//! 1. what picks few tokens by constant positions needs these of its operand (`demand`);
//! 2. an operator that need give only a part of its result takes parts of its operands, or all of them (`rules`), and so
//!    on, against the flow. What several readers need of a value is what lies from the first to the last of it;
//! 3. nodes that need give a part get parts: of producers that give just that, else by one `Slice` for all readers.
//!    Positions and shapes that were stated for all tokens follow (`shrink`).
//!
//! Parts of more than half of the tokens are left alone: what slicing costs would not be worth it. Only axes along which
//! the recognised towers have tokens are cut.

mod demand;
mod part;
mod rules;
mod shrink;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use vitrim_ir::{Expr, Model, OpType, Patch, Shapes, ValueId};
use vitrim_ops::{Attention, OpDef, ProportionalAttention, TokenRestore};

use crate::Refusal;
use crate::cost::{self, Cost};
use crate::recognise::VitModel;
use demand::{Plan, Shrunk};
use rules::Rules;

/// A patch with what it saves.
#[derive(Debug)]
pub struct Proposal {
    /// The edits; none where every token is read.
    pub patch: Patch,
    /// Work that is left out, for one image; `None` where an extent beside the batch is known only at run time.
    pub saved: Option<Cost>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Operators whose first result has its tokens on the second axis.
fn has_tokens_second(op: &OpType) -> bool {
    let others: [&dyn OpDef; 3] = [&TokenRestore, &Attention, &ProportionalAttention];
    rules::reduces(op) || others.iter().any(|known| known.op_type() == *op)
}

/// Proposes the edits that leave out dead tokens. `towers` are those of the model as it was before any pass; values
/// that are still there have their tokens where they had them.
pub fn propose(model: &Model, towers: &[&VitModel]) -> Result<Proposal, Refusal> {
    let graph = model.graph();
    // Where no pass has changed anything, they are known.
    let known = towers.iter().find(|vit| vit.revision == graph.revision()).map(|vit| vit.shapes.clone());
    let shapes = known.unwrap_or_else(|| Arc::new(Shapes::infer(model)));
    let rules = Rules { graph, shapes: &shapes };
    let token_axis = |value: ValueId| match graph.producer(value) {
        Some((node, 0)) if has_tokens_second(&graph.node(node).op) => Some(1),
        _ => towers.iter().find_map(|vit| Some(vit.axes.layout(value)?.token_axis()?.0)),
    };
    let plan = demand::plan(&rules, &token_axis);
    let (notes, saved) = (notes(&plan), saved(model, &rules, &plan, towers));
    let patch = shrink::Writer::new(&rules, &plan, Patch::new(model, "dead tokens")).write();
    let patch = patch.ok_or_else(|| Refusal::Internal("dead tokens: a part was planned that cannot be cut".into()))?;
    Ok(Proposal { patch, saved, notes })
}

fn notes(plan: &Plan) -> Vec<String> {
    let mut nodes: BTreeMap<i64, (usize, Vec<String>)> = BTreeMap::new();
    for Shrunk { part, .. } in plan.shrunk.iter().rev() {
        let (nodes, extents) = nodes.entry(part.count()).or_default();
        *nodes += 1;
        let extent = part.factor.extent.to_string();
        if !extents.contains(&extent) {
            extents.push(extent);
        }
    }
    let note = |(count, (nodes, extents)): (i64, (usize, Vec<String>))| {
        let all = extents.join(" or ");
        format!("dead tokens: {nodes} nodes compute {count} of {all} tokens, as nothing reads the others")
    };
    nodes.into_iter().map(note).collect()
}

/// What the nodes that compute a part need not do: their work is in proportion to their positions.
fn saved(model: &Model, rules: &Rules<'_>, plan: &Plan, towers: &[&VitModel]) -> Option<Cost> {
    let batches: Vec<&str> = towers.iter().filter_map(|vit| vit.axes.batch().as_symbol()).collect();
    let extents = |value: ValueId| {
        let one_image = |extent: &Expr| extent.eval(&|symbol| batches.contains(&symbol).then_some(1));
        rules.dims(value)?.iter().map(one_image).collect::<Option<Vec<i64>>>()
    };
    let mut flops = 0u64;
    for shrunk in &plan.shrunk {
        let own = cost::flops(model.graph(), model.graph().node(shrunk.node), &extents)?;
        let (count, extent) = (shrunk.part.count(), shrunk.part.factor.extent.as_known());
        let dead = match own {
            0 => 0,
            own => own / u64::try_from(extent?).ok()? * u64::try_from(extent? - count).ok()?,
        };
        flops = flops.checked_add(dead)?;
    }
    Some(Cost { flops })
}

//! An `If` whose condition is known is the branch that it takes. Exporters leave `If`s that ask for extents: `squeeze`
//! removes an axis only where its extent is one.

use std::collections::HashMap;

use super::Round;
use crate::ValueId;
use crate::graph::{Attribute, Def, Graph, Node};
use crate::inline::retarget;

pub(super) fn choose(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let condition = round.shapes.uniform(node.input(0)?)?;
    let name = if condition == 0.0 { "else_branch" } else { "then_branch" };
    let Some(Attribute::Graph(branch)) = node.attribute(name) else { return None };
    let results = unfold(round, branch)?;
    for (old, new) in node.outputs.iter().zip(results) {
        if let Some(old) = *old {
            round.replace(old, new)?;
        }
    }
    Some(())
}

/// Moves what a nested graph computes into the graph around it; gives its results. Names that are taken there change.
fn unfold(round: &mut Round<'_>, nested: &Graph) -> Option<Vec<ValueId>> {
    let mut here: HashMap<ValueId, Option<ValueId>> = HashMap::new();
    for (id, value) in nested.values() {
        let value = match value.def() {
            Def::Captured(outer) => round.now(*outer),
            Def::Initializer(_) | Def::Node(..) => {
                let def = if let Def::Node(..) = value.def() { Def::Undefined } else { value.def().clone() };
                round.patch.value(value.name(), def)
            }
            Def::Undefined => continue,
            Def::Input | Def::Default(_) | Def::SparseInitializer => return None,
        };
        here.insert(id, Some(value));
    }
    let find = |value: &Option<ValueId>| value.and_then(|value| here.get(&value).copied().flatten());
    for (_, inner) in nested.nodes() {
        let mut node = Node {
            inputs: inner.inputs.iter().map(find).collect(),
            outputs: inner.outputs.iter().map(find).collect(),
            ..inner.clone()
        };
        if !node.name.is_empty() {
            node.name = round.patch.fresh_name(&inner.name);
        }
        for (_, attribute) in &mut node.attributes {
            if let Attribute::Graph(deeper) = attribute {
                retarget(deeper, &here).ok()?;
            }
        }
        round.patch.node(node);
    }
    nested.outputs().iter().map(|output| find(&Some(*output))).collect()
}

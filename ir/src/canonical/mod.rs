//! Canonical forms: what exporters write in ways of their own becomes the equal form in standard operators that the
//! analyses have rules for. Every rewrite is exact (a softmax up to rounding), for it only says otherwise what the graph
//! computes; what cannot be said otherwise stays. One file per rewrite; [`RULES`] lists them.
//!
//! Nodes that reach no graph output go first: nothing that they do should keep a model from being rewritten.

mod branches;
mod casts;
mod identities;
mod optionals;
mod sequences;
mod softmax;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::graph::{Attribute, Graph, Node};
use crate::{Model, Patch, PatchError, Shapes, Tensor, ValueId};

/// Rewrites a node, or notes what it gives for those that read it.
type Rule = fn(&mut Round<'_>, &Node) -> Option<()>;

/// The rule for each operator that has one.
const RULES: &[(&str, Rule)] = &[
    ("CastLike", casts::cast_like),
    ("ConcatFromSequence", sequences::concat),
    ("Dropout", identities::dropout),
    ("Exp", softmax::exponential),
    ("Identity", identities::identity),
    ("If", branches::choose),
    ("OptionalGetElement", optionals::element),
    ("OptionalHasElement", optionals::presence),
    ("SequenceAt", sequences::at),
    ("SequenceConstruct", sequences::construct),
    ("SequenceEmpty", sequences::construct),
    ("SequenceErase", sequences::erase),
    ("SequenceInsert", sequences::insert),
    ("SequenceLength", sequences::length),
    ("SplitToSequence", sequences::split),
];

fn rule(node: &Node) -> Option<Rule> {
    let op = node.standard_op()?;
    RULES.iter().find(|(name, _)| *name == op).map(|(_, rule)| *rule)
}

/// Rewrites make others possible, such as in the branch that an `If` takes. Only a file that wants to keep us busy needs
/// more rounds than this; what is left then stays.
const MAX_ROUNDS: usize = 64;

/// Brings the main graph into canonical form; gives whether it was not in it before. Local functions are not looked
/// into: inline them first, and lift old operator sets. An error is a defect, and leaves the model as it was.
pub fn canonicalise(model: &mut Model) -> Result<bool, PatchError> {
    let mut edited = None;
    for _ in 0..MAX_ROUNDS {
        let Some(next) = round(edited.as_ref().unwrap_or(model))? else { break };
        edited = Some(next);
    }
    let changed = edited.is_some();
    edited.into_iter().for_each(|edited| *model = edited);
    Ok(changed)
}

/// The model after one round of rewrites; `None` if there is nothing to rewrite.
fn round(model: &Model) -> Result<Option<Model>, PatchError> {
    let graph = model.graph();
    let mut patch = Patch::new(model, "canonical");
    if crate::patch::live_nodes(graph).len() < graph.len() {
        patch.sweep();
    } else if graph.nodes().any(|(_, node)| rule(node).is_some()) {
        let shapes = Shapes::infer(model);
        let (replaced, sequences) = (HashMap::new(), HashMap::new());
        let mut round = Round { graph, shapes, patch, replaced, sequences };
        for (_, node) in graph.nodes() {
            // A rule that does not apply leaves the node as it is.
            let _ = rule(node).and_then(|rule| rule(&mut round, node));
        }
        patch = round.patch;
    }
    if patch.is_empty() { Ok(None) } else { patch.apply(model).map(|(edited, _)| Some(edited)) }
}

/// A round of rewrites: nodes are looked at in order, on the graph as it was before.
struct Round<'m> {
    graph: &'m Graph,
    shapes: Shapes,
    patch: Patch,
    /// Values that others have taken the place of.
    replaced: HashMap<ValueId, ValueId>,
    /// The tensors of each sequence that is known.
    sequences: HashMap<ValueId, Vec<ValueId>>,
}

impl Round<'_> {
    /// The value that stands for `value` by now.
    fn now(&self, value: ValueId) -> ValueId {
        self.replaced.get(&value).copied().unwrap_or(value)
    }

    /// What operand `slot` of a node is by now.
    fn operand(&self, node: &Node, slot: usize) -> Option<ValueId> {
        node.input(slot).map(|value| self.now(value))
    }

    /// The only element of operand `slot`, if it is a known integer.
    fn index(&self, node: &Node, slot: usize) -> Option<i64> {
        match self.shapes.ints(node.input(slot)?)? {
            [index] => index.as_known(),
            _ => None,
        }
    }

    /// What new values that take the place of `old` are named after.
    fn hint(&self, old: ValueId) -> String {
        format!("{}/canonical", self.graph.value(old).name())
    }

    fn constant(&mut self, old: ValueId, tensor: Tensor) -> ValueId {
        let hint = self.hint(old);
        self.patch.constant(&hint, tensor)
    }

    /// A node that computes what is to take the place of `old`.
    fn op(&mut self, name: &str, old: ValueId, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        let hint = self.hint(old);
        self.patch.op(name, &hint, inputs, attributes)
    }

    /// Lets everything that reads `old`, the result of a node, read `new` instead; a graph output becomes a copy of it.
    fn replace(&mut self, old: ValueId, new: ValueId) -> Option<()> {
        let dtype = |value| self.patch.ty(self.graph, value).map(|ty| ty.dtype);
        let declared_alike = dtype(old).zip(dtype(new)).is_none_or(|(old, new)| old == new);
        let slots: Vec<usize> = self.graph.output_slots(old).collect();
        if !declared_alike || slots.len() > 1 {
            return None;
        }
        self.patch.rewire_uses(self.graph, old, new, |_| true);
        self.replaced.insert(old, new);
        let is_copy = self.graph.producer(old).is_some_and(|(node, _)| self.graph.node(node).is("Identity"));
        for slot in slots.into_iter().filter(|_| !is_copy) {
            let copy = self.op("Identity", old, &[new], &[]);
            self.patch.replace_output(slot, copy);
        }
        Some(())
    }
}

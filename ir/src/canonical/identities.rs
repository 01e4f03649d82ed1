//! Nodes that give their operand back: `Identity`, and `Dropout` in inference.

use super::Round;
use crate::graph::Node;

pub(super) fn identity(round: &mut Round<'_>, node: &Node) -> Option<()> {
    round.replace(node.output(0)?, round.operand(node, 0)?)
}

/// The mask, where it is read, says that all was kept; that stays as it is.
pub(super) fn dropout(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let unread = |value| round.graph.value(value).uses().is_empty() && !round.graph.outputs().contains(&value);
    let trains = node.input(2).is_some_and(|flag| round.shapes.uniform(flag) != Some(0.0));
    if trains || !node.output(1).is_none_or(unread) {
        return None;
    }
    round.replace(node.output(0)?, round.operand(node, 0)?)
}

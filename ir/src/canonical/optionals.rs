//! Values that may be absent, where it is known whether they are.

use super::Round;
use crate::graph::Node;
use crate::{DataType, Tensor, ValueId};

/// What is known of an optional value.
enum Content {
    Absent,
    Present(ValueId),
}

/// What operand 0 holds; a plain tensor holds itself.
fn content(round: &Round<'_>, node: &Node) -> Option<Content> {
    let Some(value) = node.input(0) else { return Some(Content::Absent) };
    let maker = round.graph.producer(value).map(|(maker, _)| round.graph.node(maker));
    match maker.filter(|maker| maker.is("Optional")) {
        Some(maker) => Some(round.operand(maker, 0).map_or(Content::Absent, Content::Present)),
        // What has a shape and a type is a tensor.
        None => {
            let is_tensor = round.shapes.dims(value).is_some() && round.shapes.dtype(value).is_some();
            is_tensor.then(|| Content::Present(round.now(value)))
        }
    }
}

pub(super) fn element(round: &mut Round<'_>, node: &Node) -> Option<()> {
    match content(round, node)? {
        Content::Present(value) => round.replace(node.output(0)?, value),
        Content::Absent => None,
    }
}

pub(super) fn presence(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let present = matches!(content(round, node)?, Content::Present(_));
    let result = node.output(0)?;
    let answer = round.constant(result, Tensor::integers(DataType::Bool, &[], &[present.into()]));
    round.replace(result, answer)
}

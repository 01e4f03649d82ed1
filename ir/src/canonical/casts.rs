//! `CastLike` becomes `Cast` where the type is known: the operand that only lends its type may be made of tokens.

use super::Round;
use crate::graph::{Attribute, Node};

pub(super) fn cast_like(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let (result, input) = (node.output(0)?, round.operand(node, 0)?);
    let to = round.shapes.dtype(node.input(1)?)?;
    let kept = node.attributes.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let attributes: Vec<_> = kept.chain([("to", Attribute::Int(to.code().into()))]).collect();
    let cast = round.op("Cast", result, &[input], &attributes);
    round.replace(result, cast)
}

//! Sequences of known length: each tensor is computed by itself. Exporters unbind queries, keys and values that way.
//!
//! The rules for operators that make sequences note their tensors; those for operators that read sequences use them.
//! What is noted and not used goes away with the patch.

use super::Round;
use crate::graph::{Attribute, Node, OpType};
use crate::shapes::{Cuts, MAX_SEQUENCE, Sizes};
use crate::{Expr, Tensor, ValueId};

pub(super) fn construct(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let parts = (0..node.inputs.len()).map(|slot| round.operand(node, slot)).collect::<Option<_>>()?;
    note(round, node, parts)
}

/// Parts that lose the axis are gathered; others are the results of one `Split`.
pub(super) fn split(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let (result, tensor) = (node.output(0)?, node.input(0)?);
    let sizes = match node.input(1) {
        None => Sizes::Ones,
        Some(sizes) => {
            let items = round.shapes.ints(sizes)?.iter().map(Expr::as_known).collect::<Option<_>>()?;
            Sizes::of(round.shapes.dims(sizes)?.len(), items)?
        }
    };
    let cuts = Cuts::of(node, round.shapes.dims(tensor)?, sizes)?;
    let axis = [("axis", Attribute::Int(cuts.axis as i64))];
    let tensor = round.now(tensor);
    let parts = if cuts.squeezed {
        let gather = |at: usize| {
            let index = round.constant(result, Tensor::i64(at as i64));
            round.op("Gather", result, &[tensor, index], &axis)
        };
        (0..cuts.sizes.len()).map(gather).collect()
    } else {
        let sizes = round.constant(result, Tensor::shape(&cuts.sizes));
        let (hint, inputs) = (round.hint(result), vec![Some(tensor), Some(sizes)]);
        round.patch.call(OpType::standard("Split"), &hint, inputs, &axis, cuts.sizes.len())
    };
    note(round, node, parts)
}

/// Position in a list of `length`, counted from the end where it is negative.
fn position(at: i64, length: usize) -> Option<usize> {
    let at = if at < 0 { at.checked_add(i64::try_from(length).ok()?)? } else { at };
    usize::try_from(at).ok().filter(|&at| at <= length)
}

pub(super) fn insert(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let (mut parts, tensor) = (known(round, node)?.to_vec(), round.operand(node, 1)?);
    let at = match node.input(2) {
        Some(_) => position(round.index(node, 2)?, parts.len())?,
        None => parts.len(),
    };
    parts.insert(at, tensor);
    note(round, node, parts)
}

pub(super) fn erase(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let mut parts = known(round, node)?.to_vec();
    let at = match node.input(1) {
        Some(_) => position(round.index(node, 1)?, parts.len())?,
        None => parts.len().checked_sub(1)?,
    };
    parts.get(at)?;
    parts.remove(at);
    note(round, node, parts)
}

pub(super) fn at(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let parts = known(round, node)?;
    let part = *parts.get(position(round.index(node, 1)?, parts.len())?)?;
    round.replace(node.output(0)?, part)
}

pub(super) fn length(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let (result, length) = (node.output(0)?, known(round, node)?.len());
    let length = round.constant(result, Tensor::i64(length as i64));
    round.replace(result, length)
}

/// `ConcatFromSequence` with a new axis stacks: every part gets the axis first. A negative axis counts from the end of
/// the result in all three operators.
pub(super) fn concat(round: &mut Round<'_>, node: &Node) -> Option<()> {
    let (result, axis) = (node.output(0)?, node.int("axis")?);
    let mut parts = known(round, node)?.to_vec();
    if parts.is_empty() {
        return None;
    }
    if node.int("new_axis").unwrap_or(0) != 0 {
        let axes = round.constant(result, Tensor::shape(&[axis]));
        parts = parts.into_iter().map(|part| round.op("Unsqueeze", result, &[part, axes], &[])).collect();
    }
    let joined = round.op("Concat", result, &parts, &[("axis", Attribute::Int(axis))]);
    round.replace(result, joined)
}

/// The tensors of the sequence that is operand 0.
fn known<'r>(round: &'r Round<'_>, node: &Node) -> Option<&'r [ValueId]> {
    round.sequences.get(&round.operand(node, 0)?).map(Vec::as_slice)
}

/// Long sequences are not followed: every edit copies one.
fn note(round: &mut Round<'_>, node: &Node, parts: Vec<ValueId>) -> Option<()> {
    let result = node.output(0)?;
    (parts.len() <= MAX_SEQUENCE).then(|| drop(round.sequences.insert(result, parts)))
}

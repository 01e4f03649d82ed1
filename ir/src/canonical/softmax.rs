//! Softmax in parts: `exp(x − max x) / Σ exp(x − max x)`, as exporters without the operator and inlined bodies of it have
//! it, and the exponential of `LogSoftmax`.

use super::Round;
use crate::graph::{Attribute, Node};
use crate::{Expr, ValueId};

pub(super) fn exponential(round: &mut Round<'_>, exp: &Node) -> Option<()> {
    let (operand, exponentials) = (exp.input(0)?, exp.output(0)?);
    if let Some(log) = producer(round, operand, "LogSoftmax") {
        return softmax(round, exponentials, log.input(0)?, log.int("axis").unwrap_or(-1));
    }
    let uses = round.graph.value(exponentials).uses();
    let quotient = uses.iter().map(|used| round.graph.node(used.node)).find(|node| node.is("Div"))?;
    let sum = producer(round, quotient.input(1)?, "ReduceSum")?;
    if quotient.input(0)? != exponentials || sum.input(0)? != exponentials {
        return None;
    }
    let axis = reduced(round, sum)?;
    // The largest entry taken off changes nothing but the range of the exponential.
    let x = match producer(round, operand, "Sub") {
        Some(difference) => {
            let x = difference.input(0)?;
            let max = producer(round, difference.input(1)?, "ReduceMax")?;
            (max.input(0)? == x && reduced(round, max)? == axis).then_some(x)?
        }
        None => operand,
    };
    softmax(round, quotient.output(0)?, x, axis)
}

fn softmax(round: &mut Round<'_>, old: ValueId, x: ValueId, axis: i64) -> Option<()> {
    let x = round.now(x);
    let new = round.op("Softmax", old, &[x], &[("axis", Attribute::Int(axis))]);
    round.replace(old, new)
}

/// The node that gives a value, if it is one of `op`.
fn producer<'m>(round: &Round<'m>, value: ValueId, op: &str) -> Option<&'m Node> {
    let (node, _) = round.graph.producer(value)?;
    Some(round.graph.node(node)).filter(|node| node.is(op))
}

/// The only axis of a reduction that keeps it, counted from the front.
fn reduced(round: &Round<'_>, node: &Node) -> Option<i64> {
    if node.int("keepdims").unwrap_or(1) == 0 {
        return None;
    }
    let rank = round.shapes.dims(node.input(0)?)?.len() as i64;
    let from_operand = || round.shapes.ints(node.input(1)?)?.iter().map(Expr::as_known).collect::<Option<Vec<_>>>();
    match node.ints("axes").map(<[i64]>::to_vec).or_else(from_operand)?[..] {
        [axis] => Some(if axis < 0 { axis + rank } else { axis }),
        _ => None,
    }
}

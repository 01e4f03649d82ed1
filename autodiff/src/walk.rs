//! The reverse walk.

use std::collections::{HashMap, HashSet};

use vitrim_ir::{Graph, Node, NodeId, OpType, ValueId};

use crate::{Emitter, Rule, Undefined, Vjp};

/// Why a gradient does not exist.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no gradient passes {node}, which that of '{of}' needs: {reason}")]
pub struct NoGradient {
    /// The node, as messages name it.
    pub node: String,
    /// A value whose gradient was asked for.
    pub of: String,
    /// Why its operator has no rule, or why that does not hold here.
    pub reason: String,
}

/// Writes the gradients of `losses` (values with the gradients that come in at them) with respect to the values `wrt`.
/// Values that no loss depends on have none. `rules` says how gradients pass an operator.
pub fn gradients(
    emit: &mut Emitter<'_>,
    losses: &[(ValueId, ValueId)],
    wrt: &[ValueId],
    rules: &dyn Fn(&OpType) -> Rule,
) -> Result<HashMap<ValueId, ValueId>, NoGradient> {
    let graph = emit.graph;
    let active = active(emit, wrt, rules);
    let mut parts: HashMap<ValueId, Vec<ValueId>> = HashMap::new();
    for &(loss, gradient) in losses {
        parts.entry(loss).or_default().push(gradient);
    }
    for (id, node) in graph.nodes().rev() {
        let is_active = |value: Option<ValueId>| value.is_some_and(|value| active.contains(&value));
        if !node.dependencies().any(|value| active.contains(&value)) {
            continue;
        }
        let refuse = |reason: &str| NoGradient {
            node: graph.describe(id),
            of: origin(graph, id, wrt, &active),
            reason: reason.into(),
        };
        let rule = match rules(&node.op) {
            Rule::Zero => continue,
            Rule::Undefined(reason) => Err(reason),
            Rule::Vjp(rule) | Rule::First(rule) => Ok(rule),
        };
        let mut dys = Vec::with_capacity(node.outputs.len());
        for &result in &node.outputs {
            let gradients = result.filter(|_| is_active(result)).and_then(|result| parts.remove(&result));
            emit.name_after(&format!("grad/{}", result.map_or("", |result| graph.value(result).name())));
            let sum = gradients.and_then(|gradients| emit.sum(&gradients));
            if let (Some(result), Some(sum)) = (result, sum) {
                parts.insert(result, vec![sum]);
            }
            dys.push(sum);
        }
        if dys.iter().all(Option::is_none) {
            continue;
        }
        let rule = rule.map_err(refuse)?;
        if node.subgraphs().next().is_some() {
            return Err(refuse("it has nested graphs"));
        }
        let wanted = node.inputs.iter().map(|&operand| is_active(operand)).collect();
        let mut vjp = Vjp { node, emit, dys, wanted, given: Vec::new() };
        rule(&mut vjp).map_err(|Undefined(reason)| refuse(&reason))?;
        for (slot, gradient) in vjp.given {
            if let Some(operand) = node.input(slot) {
                parts.entry(operand).or_default().push(gradient);
            }
        }
    }
    let mut found = HashMap::new();
    for &value in wrt {
        emit.name_after(&format!("grad/{}", graph.value(value).name()));
        if let Some(gradient) = parts.remove(&value).and_then(|gradients| emit.sum(&gradients)) {
            found.insert(value, gradient);
        }
    }
    Ok(found)
}

/// The values that depend on `wrt` in a way that gradients can pass, or in one that is not known: floats, and all that an
/// operator without a rule gives. What it gives in integers may become floats again, and is not to be lost in silence.
fn active(emit: &Emitter<'_>, wrt: &[ValueId], rules: &dyn Fn(&OpType) -> Rule) -> HashSet<ValueId> {
    let is_float = |value: &ValueId| emit.shapes.dtype(*value).is_none_or(|dtype| dtype.is_float());
    let mut active: HashSet<ValueId> = wrt.iter().copied().filter(is_float).collect();
    for (_, node) in emit.graph.nodes() {
        let reached = |node: &Node| node.dependencies().any(|value| active.contains(&value));
        if !reached(node) {
            continue;
        }
        match rules(&node.op) {
            Rule::Zero => {}
            Rule::First(_) => active.extend(node.output(0).filter(is_float)),
            Rule::Vjp(_) => active.extend(node.results().filter(is_float)),
            Rule::Undefined(_) => active.extend(node.results()),
        }
    }
    active
}

/// The name of one of `wrt` that a node depends on.
fn origin(graph: &Graph, node: NodeId, wrt: &[ValueId], active: &HashSet<ValueId>) -> String {
    let mut seen = HashSet::new();
    let mut open: Vec<ValueId> = graph.node(node).dependencies().collect();
    while let Some(value) = open.pop() {
        if wrt.contains(&value) {
            return graph.value(value).name().into();
        }
        if let Some((producer, _)) = graph.producer(value).filter(|_| active.contains(&value)) {
            open.extend(graph.node(producer).dependencies().filter(|value| seen.insert(*value)));
        }
    }
    String::new()
}

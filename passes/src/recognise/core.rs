//! Attention cores: where queries meet keys, and the weights meet values.

use std::collections::{HashSet, VecDeque};

use vitrim_ir::{Expr, FusedAttention, Graph, Node, NodeId, Shapes, ValueId};

/// An attention, found by its softmax; not yet known to run over tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    /// The softmax, or the fused operator.
    pub softmax: NodeId,
    /// The product of queries and keys; the fused operator itself where there is one.
    pub scores: NodeId,
    /// The product of weights and values; the fused operator itself where there is one.
    pub mix: NodeId,
    /// Operand slots of queries and keys in `scores`, and of values in `mix`.
    pub slots: Slots,
    /// The fused operator that does all of it, where there is one.
    pub fused: Option<FusedAttention>,
}

/// Operand slots of a core. They are one where a fused operator projects the tokens itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Queries, in `scores`.
    pub query: usize,
    /// Keys, in `scores`.
    pub key: usize,
    /// Values, in `mix`.
    pub value: usize,
}

impl Core {
    /// Whether one fused operator does all of it.
    pub fn is_fused(&self) -> bool {
        self.fused.is_some()
    }

    /// How many keys each query meets.
    pub(super) fn keys(&self, graph: &Graph, shapes: &Shapes) -> Option<Expr> {
        if !self.is_fused() {
            return shapes.dims(graph.node(self.softmax).output(0)?)?.last().cloned();
        }
        let dims = shapes.dims(self.key(graph)?)?;
        dims.get(if dims.len() == 4 { 2 } else { 1 }).cloned()
    }

    /// The keys as the core reads them.
    pub fn key(&self, graph: &Graph) -> Option<ValueId> {
        graph.node(self.scores).input(self.slots.key)
    }

    /// The queries as the core reads them.
    pub fn query(&self, graph: &Graph) -> Option<ValueId> {
        graph.node(self.scores).input(self.slots.query)
    }

    /// The values as the core reads them.
    pub fn value(&self, graph: &Graph) -> Option<ValueId> {
        graph.node(self.mix).input(self.slots.value)
    }
}

/// Nodes that may stand between a product and its softmax, or between a softmax and its product.
const BETWEEN: &[&str] = &[
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Cast",
    "CastLike",
    "Where",
    "IsNaN",
    "Identity",
    "Dropout",
    "DynamicQuantizeLinear",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Clip",
    "QuantizeLinear",
    "DequantizeLinear",
    "Max",
    "Min",
    "Transpose",
    "Expand",
    "Gather",
    "Slice",
    "Split",
    "Tanh",
    "Conv",
];
/// How many of them are followed.
const MAX_BETWEEN: usize = 8;

/// Whether a node normalises scores: a softmax, by itself, of quantised scores, or with the bias that is added to them.
fn is_softmax(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    let contrib = node.op.domain == "com.microsoft";
    node.is("Softmax") || contrib && matches!(node.op.name.as_str(), "QLinearSoftmax" | "BiasSoftmax")
}

/// Attentions of the same block: none of them reaches another.
pub(super) type Group = Vec<Core>;

/// Groups cores, the nearest to the image first: those as many attentions away from it stand side by side.
pub(super) fn group(cores: &[Core], reached_from: impl Fn(NodeId) -> HashSet<NodeId>) -> Vec<Group> {
    let mut depths: Vec<usize> = vec![0; cores.len()];
    let mut groups: Vec<Group> = Vec::new();
    for (at, core) in cores.iter().enumerate() {
        let reached = reached_from(core.mix);
        for (behind, other) in cores.iter().enumerate().skip(at + 1) {
            if reached.contains(&other.softmax) {
                depths[behind] = depths[behind].max(depths[at] + 1);
            }
        }
        if groups.len() <= depths[at] {
            groups.resize_with(depths[at] + 1, Vec::new);
        }
        groups[depths[at]].push(core.clone());
    }
    groups
}

/// All attention cores of the graph, in graph order.
pub(super) fn find_cores(graph: &Graph, shapes: &Shapes) -> Vec<Core> {
    let mut cores = Vec::new();
    for (id, node) in graph.nodes() {
        if let Some(fused) = FusedAttention::of(graph, node) {
            let [query, key, value] = fused.slots();
            let slots = Slots { query, key, value };
            cores.push(Core { softmax: id, scores: id, mix: id, slots, fused: Some(fused) });
        } else if is_softmax(graph, id) {
            cores.extend(core_of(graph, shapes, id));
        }
    }
    cores
}

fn core_of(graph: &Graph, shapes: &Shapes, softmax: NodeId) -> Option<Core> {
    let scores = product_before(graph, shapes, graph.node(softmax).input(0)?)?;
    let [query, key] = graph.node(scores).factors()?;
    let (mix, weights) = product_after(graph, shapes, graph.node(softmax).output(0)?)?;
    let value = graph.node(mix).factors()?.into_iter().find(|&slot| slot != weights)?;
    Some(Core { softmax, scores, mix, slots: Slots { query, key, value }, fused: None })
}

/// The product that the softmax's operand comes from: the nearest of two tensors that depend on the image. A bias that is
/// computed beside the scores multiplies one with a table; so do learned queries, and what mixes heads behind the scores.
fn product_before(graph: &Graph, shapes: &Shapes, scores: ValueId) -> Option<NodeId> {
    let mut open = VecDeque::from([(scores, 0)]);
    let mut seen = HashSet::new();
    let mut other = None;
    while let Some((value, depth)) = open.pop_front() {
        let Some((id, _)) = graph.producer(value) else { continue };
        let node = graph.node(id);
        let is_data = |operand: &ValueId| shapes.is_data(*operand);
        if node.factors().is_some() {
            if data_factors(shapes, node) > 1 {
                return Some(id);
            }
            other = other.or(Some(id));
        }
        if is_between(graph, id) && depth < MAX_BETWEEN && seen.insert(id) {
            open.extend(
                node.data_operands().map(|(_, operand)| operand).filter(is_data).map(|value| (value, depth + 1)),
            );
        }
    }
    other
}

/// How many factors of a product depend on the image.
fn data_factors(shapes: &Shapes, node: &Node) -> usize {
    let factors = node.factors().into_iter().flatten().filter_map(|slot| node.input(slot));
    factors.filter(|&factor| shapes.is_data(factor)).count()
}

/// The nearest product that reads the softmax's result, and the operand slot in which it does. A product with a table mixes
/// heads.
fn product_after(graph: &Graph, shapes: &Shapes, weights: ValueId) -> Option<(NodeId, usize)> {
    let mut open = VecDeque::from([(weights, 0)]);
    let mut seen = HashSet::new();
    while let Some((value, depth)) = open.pop_front() {
        for used in graph.value(value).uses() {
            let Some(slot) = used.slot else { continue };
            let node = graph.node(used.node);
            let product = node.factors().is_some_and(|factors| factors.contains(&slot));
            if product && data_factors(shapes, node) > 1 {
                return Some((used.node, slot));
            }
            // The first result has the weights; others are the scale of a quantisation, say.
            if is_between(graph, used.node) && depth < MAX_BETWEEN && seen.insert(used.node) {
                open.extend(node.output(0).map(|result| (result, depth + 1)));
            }
        }
    }
    None
}

/// Products with a table count: they mix heads.
fn is_between(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    BETWEEN.contains(&node.op.name.as_str()) || node.factors().is_some()
}

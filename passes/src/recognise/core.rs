//! Attention cores: where queries meet keys, and the weights meet values.

use std::collections::HashSet;

use vitrim_ir::{Expr, FusedAttention, Graph, NodeId, Shapes, ValueId};

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

fn is_product(graph: &Graph, id: NodeId) -> bool {
    matches!(
        graph.node(id).op.name.as_str(),
        "MatMul" | "FusedMatMul" | "Einsum" | "Gemm" | "MatMulInteger" | "QLinearMatMul"
    )
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
        } else if node.is("Softmax") {
            cores.extend(core_of(graph, shapes, id));
        }
    }
    cores
}

fn core_of(graph: &Graph, shapes: &Shapes, softmax: NodeId) -> Option<Core> {
    let scores = product_before(graph, shapes, graph.node(softmax).input(0)?)?;
    let (mix, weights_slot) = product_after(graph, shapes, graph.node(softmax).output(0)?)?;
    let mix_node = graph.node(mix);
    let value_slot = if mix_node.op.name == "QLinearMatMul" { 3 - weights_slot } else { 1 - weights_slot.min(1) };
    let right = if graph.node(scores).op.name == "QLinearMatMul" { 3 } else { 1 };
    Some(Core { softmax, scores, mix, slots: Slots { query: 0, key: right, value: value_slot }, fused: None })
}

/// The product that the softmax's operand comes from.
fn product_before(graph: &Graph, shapes: &Shapes, mut value: ValueId) -> Option<NodeId> {
    let mut learned = None;
    for _ in 0..MAX_BETWEEN {
        let Some((id, _)) = graph.producer(value) else { return learned };
        let node = graph.node(id);
        let mut data = node.operands().filter(|&operand| shapes.is_data(operand));
        if is_product(graph, id) {
            if node.operands().filter(|&operand| shapes.is_data(operand)).count() > 1 {
                return Some(id);
            }
            // Learned queries, or a mixture of heads behind the scores.
            learned = learned.or(Some(id));
        } else if !BETWEEN.contains(&node.op.name.as_str()) {
            return learned;
        }
        let Some(next) = data.next() else { return learned };
        value = next;
        if let Some(other) = data.next() {
            // A computed bias beside the scores: take the operand that leads to a product directly.
            let direct = |value: ValueId| graph.producer(value).is_some_and(|(id, _)| is_product(graph, id));
            if direct(other) && !direct(value) {
                value = other;
            }
        }
    }
    learned
}

/// The product that reads the softmax's result, and the operand slot in which it does.
fn product_after(graph: &Graph, shapes: &Shapes, weights: ValueId) -> Option<(NodeId, usize)> {
    let mut open = vec![(weights, 0)];
    let mut seen = HashSet::new();
    while let Some((value, depth)) = open.pop() {
        for used in graph.value(value).uses() {
            let Some(slot) = used.slot else { continue };
            let product = is_product(graph, used.node);
            let mixes_heads = || {
                let data = graph.node(used.node).operands().filter(|&operand| shapes.is_data(operand)).count();
                data < 2 && graph.value(value).uses().len() == 1
            };
            if product && !mixes_heads() {
                return Some((used.node, slot));
            }
            let between = product || BETWEEN.contains(&graph.node(used.node).op.name.as_str());
            if between && depth < MAX_BETWEEN && seen.insert(used.node) {
                open.extend(graph.node(used.node).results().map(|result| (result, depth + 1)));
            }
        }
    }
    None
}

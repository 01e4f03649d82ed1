//! Which constants of a model are parameters, and what they are called.
//!
//! Exported files do not say. A constant is taken for a parameter where it holds floats, more than one, and combines with
//! values that depend on a parameter or, in a product or convolution, on the model's input. What is left out so is how
//! images are normalised, before any parameter acts; scalars; and what never meets the stream.

use std::collections::{HashMap, HashSet};

use vitrim_ir::{Graph, Model, Node, NodeId, Patch, Shapes, Tensor, ValueId};
use vitrim_passes::Refusal;

/// A parameter of a model.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The initializer that holds it.
    pub value: ValueId,
    /// The path of its module and its name there, where the export shows them; else the initializer's.
    pub name: String,
    /// Initial elements.
    pub tensor: Tensor,
    /// Whether the optimizer decays it: the matrices and kernels of products and convolutions, not biases, norms,
    /// position tables and class tokens.
    pub decay: bool,
    /// Whether it is trained.
    pub trainable: bool,
}

/// What a node does with a parameter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The matrix of a product, the kernel of a convolution.
    Matrix,
    /// What entries are multiplied by.
    Scale,
    /// What is added.
    Bias,
    /// Anything else: a table, a token.
    Other,
}

impl Role {
    fn of(node: &Node, slot: usize) -> Self {
        match (node.op.name.as_str(), slot) {
            ("MatMul" | "Einsum", _) | ("Gemm" | "Conv", 0 | 1) => Self::Matrix,
            ("LayerNormalization" | "RMSNormalization", 1) | ("Mul", _) => Self::Scale,
            ("LayerNormalization", 2) | ("Gemm" | "Conv", 2) | ("Add" | "Sub", _) => Self::Bias,
            _ => Self::Other,
        }
    }
}

/// A model whose parameters are initializers, each read by those nodes alone that are to share it.
///
/// Exporters let equal constants be one: zero biases, unit norms. To train that one would tie what was never tied, so
/// every reader gets its own where all elements are equal.
pub fn separate(model: &Model) -> Result<Model, Refusal> {
    let graph = model.graph();
    let shapes = Shapes::infer(model);
    let mut patch = Patch::new(model, "parameters");
    for (value, readers) in found(graph, &shapes) {
        let Some(tensor) = graph.constant(value).map(std::borrow::Cow::into_owned) else { continue };
        let (first, others) = readers.split_at(1);
        let shared = shapes.uniform(value).is_none();
        let is_node = graph.producer(value).is_some();
        let name = graph.value(value).name();
        let mut own = None;
        if is_node {
            let made = patch.constant(name, tensor.clone());
            patch.rewire(first[0].0, first[0].1, made);
            own = Some(made);
        }
        for &(node, slot) in others {
            match (shared, own) {
                (true, None) => {}
                (true, Some(own)) => patch.rewire(node, slot, own),
                (false, _) => {
                    let made = patch.constant(name, tensor.clone());
                    patch.rewire(node, slot, made);
                }
            }
        }
    }
    let (separate, _) = patch.apply(model).map_err(|error| Refusal::Internal(error.to_string()))?;
    Ok(separate)
}

/// The parameters of a model, in the order in which they are first read.
pub fn parameters(model: &Model) -> Vec<Parameter> {
    let graph = model.graph();
    let mut taken = HashSet::new();
    let mut list = Vec::new();
    for (value, readers) in found(graph, &Shapes::infer(model)) {
        let Some(tensor) = graph.constant(value) else { continue };
        let role = Role::of(graph.node(readers[0].0), readers[0].1);
        let base = name(graph, value, readers[0].0, role);
        let mut name = base.clone();
        for copy in 2.. {
            if taken.insert(name.clone()) {
                break;
            }
            name = format!("{base}_{copy}");
        }
        list.push(Parameter { value, name, tensor: tensor.into_owned(), decay: role == Role::Matrix, trainable: true });
    }
    list
}

/// Constants that are parameters, and who reads them, in the order in which they are first read.
fn found(graph: &Graph, shapes: &Shapes) -> Vec<(ValueId, Vec<(NodeId, usize)>)> {
    let mut at: HashMap<ValueId, usize> = HashMap::new();
    let mut list: Vec<(ValueId, Vec<(NodeId, usize)>)> = Vec::new();
    // Values that depend on a parameter.
    let mut learned: HashSet<ValueId> = HashSet::new();
    for (id, node) in graph.nodes() {
        if node.is("Constant") {
            continue;
        }
        let is_float = |value: ValueId| shapes.dtype(value).is_some_and(|dtype| dtype.is_float());
        let depends = node.dependencies().any(|value| learned.contains(&value));
        let mut has = false;
        for (slot, &operand) in node.inputs.iter().enumerate() {
            let Some(operand) = operand.filter(|&operand| is_float(operand)) else { continue };
            if graph.constant(operand).is_none_or(|tensor| tensor.len() < 2) {
                continue;
            }
            let others = node.operands().filter(|&other| other != operand);
            let with_data = others.into_iter().any(|other| shapes.is_data(other));
            let role = Role::of(node, slot);
            if !(depends || has || begins(node) || role == Role::Matrix && with_data) {
                continue;
            }
            has = true;
            let entry = *at.entry(operand).or_insert_with(|| {
                list.push((operand, Vec::new()));
                list.len() - 1
            });
            list[entry].1.push((id, slot));
        }
        if depends || has {
            learned.extend(node.results().filter(|&result| is_float(result)));
        }
    }
    list
}

/// Whether a node lays out a constant as tokens: a class token that is expanded to the batch, or joined.
fn begins(node: &Node) -> bool {
    node.is("Expand") || node.is("Tile") || node.is("Concat")
}

/// Whether an exporter made the name up.
fn is_generated(name: &str) -> bool {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_').to_ascii_lowercase();
    let made_up = ["", "val", "const", "constant", "initializer", "tensor"];
    name.contains("::") || name.starts_with('/') || made_up.contains(&stem.as_str())
}

/// A parameter's name: the initializer's unless that is made up, else the path of the module whose node reads it.
fn name(graph: &Graph, value: ValueId, reader: NodeId, role: Role) -> String {
    let own = graph.value(value).name();
    if !is_generated(own) {
        return own.into();
    }
    let node = graph.node(reader);
    let mut parts: Vec<&str> = node.name.split('/').filter(|part| !part.is_empty()).collect();
    parts.pop();
    if parts.is_empty() {
        return own.into();
    }
    let mut path: Vec<String> = Vec::new();
    for part in parts {
        // A list of modules is named before its members are: blocks, blocks.0.
        if path.last().is_some_and(|last| part.starts_with(&format!("{last}."))) {
            path.pop();
        }
        path.push(part.into());
    }
    let last = match role {
        Role::Matrix | Role::Scale => "weight",
        Role::Bias => "bias",
        Role::Other => "table",
    };
    format!("{}.{last}", path.join("."))
}

//! Which constants of a model are parameters, and what they are called.
//!
//! Exported files do not say. A constant is taken for a parameter where it holds floats, more than one, and combines with
//! values that depend on a parameter or, in a product or convolution, on the model's input. What is left out so is how
//! images are normalised, before any parameter acts; scalars; and what never meets the stream.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use vitrim_ir::{Def, Graph, Model, Node, NodeId, Patch, Shapes, Tensor, ValueId};
use vitrim_passes::Refusal;

use crate::internal;

/// A parameter of a model.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The initializer that holds it: the path of its module and its name there, where the export shows them.
    pub name: String,
    /// Initial elements.
    pub tensor: Tensor,
    /// Whether the optimizer decays it: the matrices and kernels of products and convolutions, not biases, norms,
    /// position tables and class tokens.
    pub decay: bool,
    /// Whether it is trained.
    pub trainable: bool,
}

/// Which parameters are trained, by patterns of their names (`*` stands for any characters, `?` for one).
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Those that are not.
    pub freeze: Vec<String>,
    /// Those that are, of the frozen ones.
    pub unfreeze: Vec<String>,
}

impl Selection {
    /// Decides for each parameter.
    ///
    /// # Errors
    ///
    /// [`Refusal::Request`] for a pattern that is malformed or fits no parameter: it is likely misspelt.
    pub fn apply(&self, parameters: &mut [Parameter]) -> Result<(), Refusal> {
        for (patterns, trainable) in [(&self.freeze, false), (&self.unfreeze, true)] {
            for text in patterns {
                let pattern = glob::Pattern::new(text)
                    .map_err(|error| Refusal::Request(format!("the pattern '{text}' is malformed: {error}")))?;
                let mut fits = false;
                for parameter in parameters.iter_mut().filter(|parameter| pattern.matches(&parameter.name)) {
                    (parameter.trainable, fits) = (trainable, true);
                }
                if !fits {
                    let first: Vec<&str> = parameters.iter().take(5).map(|one| one.name.as_str()).collect();
                    return Err(Refusal::Request(format!(
                        "no parameter fits '{text}'; they are called {}, …",
                        first.join(", ")
                    )));
                }
            }
        }
        Ok(())
    }
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

/// A model whose parameters are initializers of their own names, each read by those nodes alone that are to share it.
///
/// Exporters let equal constants be one: zero biases, unit norms. To train that one would tie what was never tied, so
/// every reader gets its own where all elements are equal.
pub fn separate(model: &Model) -> Result<(Model, Vec<Parameter>), Refusal> {
    let graph = model.graph();
    let shapes = Shapes::infer(model);
    let mut patch = Patch::new(model, "parameters");
    let mut list = Vec::new();
    for (value, readers) in found(graph, &shapes) {
        let Some(tensor) = held(graph, value).map(Cow::into_owned) else { continue };
        let tied: Vec<&[(NodeId, usize)]> = match shapes.uniform(value) {
            Some(_) => readers.chunks(1).collect(),
            None => vec![&readers],
        };
        for (copy, readers) in tied.into_iter().enumerate() {
            let (node, slot) = readers[0];
            let role = Role::of(graph.node(node), slot);
            let mut name = name(graph, value, node, role);
            let is_input = matches!(graph.value(value).def(), Def::Default(_));
            if copy == 0 && is_input {
                name = graph.value(value).name().to_owned();
            } else if copy > 0 || graph.producer(value).is_some() || name != graph.value(value).name() {
                let own = patch.constant(&name, tensor.clone());
                readers.iter().for_each(|&(node, slot)| patch.rewire(node, slot, own));
                name = patch.name(own).unwrap_or(&name).to_owned();
            }
            list.push(Parameter { name, tensor: tensor.clone(), decay: role == Role::Matrix, trainable: true });
        }
    }
    let (separate, _) = patch.apply(model).map_err(internal)?;
    Ok((separate, list))
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
            if held(graph, operand).is_none_or(|tensor| tensor.len() < 2) {
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

/// The tensor that a value holds unless a caller gives another.
fn held(graph: &Graph, value: ValueId) -> Option<Cow<'_, Tensor>> {
    match graph.value(value).def() {
        Def::Default(tensor) => Some(Cow::Borrowed(tensor)),
        _ => graph.constant(value),
    }
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

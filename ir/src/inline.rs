//! Inlining of model-local functions.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use crate::graph::{Attribute, Def, Graph, Names, Node, OpType, Value};
use crate::{Function, Model, NodeId, Opsets, ValueId, onnx};

/// Calls and nested graphs may be this deep inside each other: more could neither be written nor run.
const MAX_DEPTH: usize = 30;
/// Inlining stops where it would take more bytes than this: nested calls can multiply without bound.
const MAX_BYTES: u64 = 64 << 20;
/// What a node takes without its attributes and names, about.
const NODE_BYTES: u64 = 1 << 10;
/// Bytes of a call's name that names of inlined values begin with.
const MAX_PREFIX: usize = 256;

/// Why functions cannot be inlined.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum InlineError {
    #[error("function {function} calls itself, directly or through others")]
    Recursive { function: String },
    #[error("calls of local functions and nested graphs are more than {MAX_DEPTH} deep inside each other")]
    TooDeep,
    #[error("inlining the local functions takes more than {} MiB", MAX_BYTES >> 20)]
    TooLarge,
    #[error(
        "function {function} uses {op} of version {inner} of '{domain}', which may mean something else in version {outer}, \
         which its caller imports; convert the model to one version"
    )]
    Opset { function: String, op: String, domain: String, inner: i64, outer: i64 },
    #[error("a call of function {function} passes a graph as attribute '{attribute}', which cannot be inlined")]
    GraphAttribute { function: String, attribute: String },
    #[error("function {function} gives back its operand '{operand}', which a call leaves out")]
    Omitted { function: String, operand: String },
}

/// Replaces every call of a local function for which `which` holds by the function's body, and removes those functions.
/// The meaning is unchanged. Gives whether there were any. An error leaves the model as it was.
pub fn inline_functions(model: &mut Model, which: impl Fn(&OpType) -> bool) -> Result<bool, InlineError> {
    let (gone, mut kept): (Vec<Function>, Vec<Function>) =
        model.functions.iter().cloned().partition(|function| which(&function.key));
    if gone.is_empty() {
        return Ok(false);
    }
    let budget = Budget::of(&gone)?;
    budget.check([&model.graph].into_iter().chain(kept.iter().map(|function| &function.graph)))?;
    let local = model.functions.iter().map(|function| &function.key).collect();
    let functions = gone.iter().map(|function| (&function.key, function)).collect();

    let mut inliner =
        Inliner { functions: &functions, local: &local, names: Names::default(), opsets: Opsets::default() };
    let (mut graph, mut opsets) = (model.graph.clone(), model.opsets.clone());
    inliner.whole(&mut graph, &mut opsets)?;
    // Functions that stay may call functions that go.
    for function in &mut kept {
        inliner.whole(&mut function.graph, &mut function.opsets)?;
    }
    graph.revision += 1;
    (model.graph, model.opsets, model.functions) = (graph, opsets, kept);
    Ok(true)
}

/// Indices of functions, each after those that it calls; or else one that calls itself, directly or through others.
pub(crate) fn callees_first(functions: &[Function]) -> Result<Vec<usize>, &Function> {
    let index: HashMap<&OpType, usize> =
        functions.iter().enumerate().map(|(at, function)| (&function.key, at)).collect();
    let mut waiting = vec![0; functions.len()];
    let mut callers = vec![Vec::new(); functions.len()];
    for (at, function) in functions.iter().enumerate() {
        let mut callees = HashSet::new();
        each_node(&function.graph, 0, &mut |node, _| callees.extend(index.get(&node.op)));
        waiting[at] = callees.len();
        callees.into_iter().for_each(|callee: usize| callers[callee].push(at));
    }
    let mut order: Vec<usize> = (0..functions.len()).filter(|&at| waiting[at] == 0).collect();
    let mut next = 0;
    while let Some(&at) = order.get(next) {
        next += 1;
        for &caller in &callers[at] {
            waiting[caller] -= 1;
            if waiting[caller] == 0 {
                order.push(caller);
            }
        }
    }
    match (0..functions.len()).find(|&at| waiting[at] > 0) {
        None => Ok(order),
        Some(at) => Err(&functions[at]),
    }
}

/// Visits every node of a graph and of those nested in it, with the depth of nesting.
fn each_node<'g>(graph: &'g Graph, depth: usize, visit: &mut dyn FnMut(&'g Node, usize)) {
    for (_, node) in graph.nodes() {
        visit(node, depth);
        node.subgraphs().for_each(|nested| each_node(nested, depth + 1, visit));
    }
}

/// What calls of functions come to, known before anything is made.
struct Budget<'f>(HashMap<&'f OpType, Extent>);

/// What inlining one call gives.
#[derive(Clone, Copy, Default)]
struct Extent {
    bytes: u64,
    depth: usize,
}

impl<'f> Budget<'f> {
    fn of(functions: &'f [Function]) -> Result<Self, InlineError> {
        let order = callees_first(functions);
        let order = order.map_err(|function| InlineError::Recursive { function: function.key.to_string() })?;
        let mut budget = Self(HashMap::new());
        for function in order.into_iter().map(|at| &functions[at]) {
            let inner = budget.calls_in(&function.graph);
            let bytes = inner.bytes.saturating_add(bytes_of(&function.graph));
            budget.0.insert(&function.key, Extent { bytes, depth: inner.depth + 1 });
        }
        Ok(budget)
    }

    /// What the calls in a graph come to together.
    fn calls_in(&self, graph: &Graph) -> Extent {
        let mut sum = Extent::default();
        each_node(graph, 0, &mut |node, depth| {
            let callee = self.0.get(&node.op).copied().unwrap_or_default();
            sum.bytes = sum.bytes.saturating_add(callee.bytes);
            sum.depth = sum.depth.max(depth + callee.depth);
        });
        sum
    }

    fn check<'g>(&self, graphs: impl Iterator<Item = &'g Graph>) -> Result<(), InlineError> {
        let mut bytes = 0u64;
        for graph in graphs {
            let calls = self.calls_in(graph);
            if calls.depth > MAX_DEPTH {
                return Err(InlineError::TooDeep);
            }
            bytes = bytes.saturating_add(calls.bytes);
        }
        if bytes > MAX_BYTES { Err(InlineError::TooLarge) } else { Ok(()) }
    }
}

/// What a copy of a graph takes, about. Elements of tensors are shared and take nothing.
fn bytes_of(graph: &Graph) -> u64 {
    let attribute = |value: &Attribute| match value {
        Attribute::Ints(x) => 8 * x.len(),
        Attribute::Floats(x) => 4 * x.len(),
        Attribute::Strings(x) => 32 * x.len(),
        Attribute::Other(x) => onnx::opaque_bytes(&x.0),
        Attribute::Ref(name, _) => name.len(),
        _ => 0,
    };
    let mut sum = 0;
    each_node(graph, 0, &mut |node, _| {
        let slots = 32 * (node.inputs.len() + node.outputs.len() + node.attributes.len());
        let metadata: usize = node.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        let attributes: usize = node.attributes.iter().map(|(key, value)| key.len() + attribute(value)).sum();
        sum += NODE_BYTES + (node.name.len() + slots + metadata + attributes) as u64;
        sum += node.subgraphs().map(values_of).sum::<u64>();
    });
    sum + values_of(graph)
}

fn values_of(graph: &Graph) -> u64 {
    graph.values().map(|(_, value)| (MAX_PREFIX + value.name.len()) as u64).sum()
}

struct Inliner<'f> {
    functions: &'f HashMap<&'f OpType, &'f Function>,
    /// All local functions of the model: what they mean does not depend on the version of their domain.
    local: &'f HashSet<&'f OpType>,
    names: Names,
    /// What the graph imports that calls are inlined into.
    opsets: Opsets,
}

impl Inliner<'_> {
    /// Inlines into a main graph or the body of a function.
    fn whole(&mut self, graph: &mut Graph, opsets: &mut Opsets) -> Result<(), InlineError> {
        self.names = Names::of(graph);
        self.opsets = std::mem::take(opsets);
        self.graph(graph)?;
        *opsets = std::mem::take(&mut self.opsets);
        graph.reconnect();
        graph.rename_captured();
        Ok(())
    }

    /// Inlines into one graph and those nested in it. Users of values are out of step afterwards.
    fn graph(&mut self, graph: &mut Graph) -> Result<(), InlineError> {
        // Bodies take the places of their calls, so the order stays right. They may have calls of their own: the budget
        // knows that this ends.
        let mut open: Vec<NodeId> = graph.order.iter().rev().copied().collect();
        graph.order.clear();
        while let Some(id) = open.pop() {
            if self.functions.contains_key(&graph.node(id).op) {
                open.extend(self.call(graph, id)?.into_iter().rev());
                continue;
            }
            graph.order.push(id);
            let mut attributes = std::mem::take(&mut graph.node_mut(id).attributes);
            for (_, value) in &mut attributes {
                if let Attribute::Graph(nested) = value {
                    self.graph(nested)?;
                    nested.reconnect();
                }
            }
            graph.node_mut(id).attributes = attributes;
        }
        Ok(())
    }

    /// Replaces one call; gives the nodes of the body.
    fn call(&mut self, graph: &mut Graph, id: NodeId) -> Result<Vec<NodeId>, InlineError> {
        let call = graph.nodes[id.slot()].take().expect("listed in the order");
        let function = self.functions[&call.op];
        let body = &function.graph;
        self.check_opsets(function)?;
        let prefix = prefix(graph, &call);
        // Values of the body -> values of the graph. An operand that the call leaves out has none.
        let mut map: HashMap<ValueId, Option<ValueId>> = HashMap::new();
        for (slot, &input) in body.inputs.iter().enumerate() {
            map.insert(input, call.input(slot));
        }
        let mut aliases = Vec::new();
        for (slot, &output) in body.outputs.iter().enumerate() {
            let Some(result) = call.output(slot) else { continue };
            if *map.entry(output).or_insert(Some(result)) != Some(result) {
                aliases.push((output, result));
            }
        }
        for result in body.nodes().flat_map(|(_, node)| node.results()) {
            map.entry(result).or_insert_with(|| {
                let name = self.names.fresh(&format!("{prefix}/{}", body.value(result).name));
                Some(graph.add_value(Value::new(name, Def::Undefined)))
            });
        }
        let here = |value: &Option<ValueId>| value.and_then(|value| map.get(&value).copied().flatten());
        let mut nodes = Vec::with_capacity(body.len());
        for (_, inner) in body.nodes() {
            let mut node = Node {
                inputs: inner.inputs.iter().map(here).collect(),
                outputs: inner.outputs.iter().map(here).collect(),
                ..inner.clone()
            };
            node.attributes = self.attributes(&inner.attributes, &call, function, &prefix)?;
            for (_, value) in &mut node.attributes {
                if let Attribute::Graph(nested) = value {
                    retarget(nested, &map).map_err(|operand| omitted(function, operand))?;
                }
            }
            node.captures = node.read_by_nested();
            if !node.name.is_empty() {
                node.name = self.names.fresh(&format!("{prefix}/{}", inner.name));
            }
            for entry in &call.metadata {
                if node.metadata.iter().all(|(key, _)| *key != entry.0) {
                    node.metadata.push(entry.clone());
                }
            }
            nodes.push(node);
        }
        for (output, result) in aliases {
            if map[&output].is_none() {
                return Err(omitted(function, output));
            }
            let mut identity = Node::new(OpType::standard("Identity"), vec![map[&output]], Vec::new());
            identity.outputs = vec![Some(result)];
            nodes.push(identity);
        }
        Ok(nodes.into_iter().map(|node| add_unordered(graph, node)).collect())
    }

    /// Attributes of a body's node as the call sees them. One that refers to an attribute that the call leaves out, and
    /// that has no default, is left out.
    fn attributes(
        &mut self,
        attributes: &[(String, Attribute)],
        call: &Node,
        function: &Function,
        prefix: &str,
    ) -> Result<Vec<(String, Attribute)>, InlineError> {
        let mut bound = Vec::with_capacity(attributes.len());
        for (key, value) in attributes {
            let value = match value {
                Attribute::Ref(target, _) => {
                    let default = || function.defaults.iter().find(|(name, _)| name == target).map(|(_, value)| value);
                    match call.attribute(target).or_else(default) {
                        Some(Attribute::Graph(_)) => {
                            let (function, attribute) = (function.key.to_string(), target.clone());
                            return Err(InlineError::GraphAttribute { function, attribute });
                        }
                        Some(value) => value.clone(),
                        None => continue,
                    }
                }
                Attribute::Graph(nested) => {
                    let mut nested = nested.clone();
                    self.nested(&mut nested, call, function, prefix)?;
                    Attribute::Graph(nested)
                }
                other => other.clone(),
            };
            bound.push((key.clone(), value));
        }
        Ok(bound)
    }

    /// Gives the own values of a nested graph names that are free where it moves to, and binds its attributes.
    fn nested(&mut self, graph: &mut Graph, call: &Node, function: &Function, prefix: &str) -> Result<(), InlineError> {
        for value in graph.values.iter_mut().flatten() {
            if !matches!(value.def, Def::Captured(_)) {
                value.name = self.names.fresh(&format!("{prefix}/{}", value.name));
            }
        }
        for node in graph.nodes.iter_mut().flatten() {
            node.attributes = self.attributes(&node.attributes, call, function, prefix)?;
        }
        Ok(())
    }

    /// Lets the caller import what the body needs, or refuses where versions differ that matter.
    fn check_opsets(&mut self, function: &Function) -> Result<(), InlineError> {
        let mut found = Ok(());
        each_node(&function.graph, 0, &mut |node, _| {
            if found.is_err() || self.functions.contains_key(&node.op) {
                return;
            }
            let domain = node.op.domain.as_str();
            let inner = function.opsets.get(domain).unwrap_or(1);
            self.opsets.import(domain, inner);
            if self.local.contains(&node.op) {
                return;
            }
            let outer = self.opsets.get(domain).expect("just imported");
            if inner != outer && !(domain.is_empty() && same_meaning(node, inner, outer)) {
                found = Err(InlineError::Opset {
                    function: function.key.to_string(),
                    op: node.op.name.clone(),
                    domain: if domain.is_empty() { "ai.onnx".into() } else { domain.into() },
                    inner,
                    outer,
                });
            }
        });
        found
    }
}

/// What names of inlined values begin with: the call's name, or that of its first result.
fn prefix(graph: &Graph, call: &Node) -> String {
    let mut prefix = match (call.name.as_str(), call.results().next()) {
        ("", Some(result)) => graph.value(result).name.clone(),
        ("", None) => call.op.name.clone(),
        (name, _) => name.to_owned(),
    };
    prefix.truncate(prefix.floor_char_boundary(MAX_PREFIX));
    prefix
}

/// Adds a node whose place in the order comes later.
fn add_unordered(graph: &mut Graph, node: Node) -> NodeId {
    let id = graph.add_node(node);
    graph.order.pop();
    id
}

fn omitted(function: &Function, operand: ValueId) -> InlineError {
    let operand = function.graph.value(operand).name.clone();
    InlineError::Omitted { function: function.key.to_string(), operand }
}

/// Lets a nested graph capture the values that those it captured have become. Gives one that does not exist and that it
/// cannot do without, if there is one.
pub(crate) fn retarget(graph: &mut Graph, map: &HashMap<ValueId, Option<ValueId>>) -> Result<(), ValueId> {
    let captured: Vec<(ValueId, ValueId)> = graph.captured().collect();
    for (value, target) in captured {
        match map.get(&target).copied().flatten() {
            Some(target) => graph.value_mut(value).def = Def::Captured(target),
            None if leave_out(graph, value) => {}
            None => return Err(target),
        }
    }
    Ok(())
}

/// Removes a captured value that does not exist in a call; nodes read it as an operand left out. False if the graph
/// gives the value back.
fn leave_out(graph: &mut Graph, gone: ValueId) -> bool {
    for node in graph.nodes.iter_mut().flatten() {
        for input in &mut node.inputs {
            input.take_if(|input| *input == gone);
        }
        for (_, attribute) in &mut node.attributes {
            let Attribute::Graph(nested) = attribute else { continue };
            let captured: Vec<(ValueId, ValueId)> = nested.captured().collect();
            let mut lost = captured.into_iter().filter(|&(_, target)| target == gone);
            if !lost.all(|(value, _)| leave_out(nested, value)) {
                return false;
            }
        }
        node.captures = node.read_by_nested();
    }
    graph.values[gone.slot()] = None;
    graph.declared.retain(|&declared| declared != gone);
    !graph.outputs.contains(&gone)
}

/// Whether a node of the standard domain means the same in two versions of it. Where that is not known, it does not.
pub(crate) fn same_meaning(node: &Node, from: i64, to: i64) -> bool {
    let (low, high) = (from.min(to), from.max(to));
    let Ok(at) = MEANINGS.binary_search_by_key(&node.op.name.as_str(), |entry| entry.0) else { return false };
    let (_, introduced, changed) = MEANINGS[at];
    let between = |version: &i64| (low + 1..=high).contains(version);
    // An attribute that came later has a default that keeps the old meaning; only older versions do not know it.
    let added = |&(op, attribute, version): &(&str, &str, i64)| {
        op == node.op.name && to < version && version <= from && node.attribute(attribute).is_some()
    };
    (OLDEST..=NEWEST).contains(&low)
        && high <= NEWEST
        && introduced <= low
        && !changed.iter().any(between)
        && !ADDED.iter().any(added)
}

/// Versions of the standard domain that the tables below cover.
const OLDEST: i64 = 11;
const NEWEST: i64 = 28;

/// Operators that exporters put into functions: name, the version that introduced it (at the earliest [`OLDEST`]), and
/// later versions that changed inputs, outputs, or the meaning of attributes. New element types do not count.
#[rustfmt::skip]
const MEANINGS: &[(&str, i64, &[i64])] = &[
    ("Abs", 11, &[]), ("Add", 11, &[]), ("And", 11, &[]), ("ArgMax", 11, &[]), ("Attention", 23, &[24]),
    ("BatchNormalization", 11, &[14]), ("Cast", 11, &[]), ("CastLike", 15, &[]), ("Ceil", 11, &[]),
    ("Celu", 12, &[]), ("Clip", 11, &[]),
    ("Concat", 11, &[]), ("ConcatFromSequence", 11, &[]), ("Constant", 11, &[]), ("ConstantOfShape", 11, &[]),
    ("Conv", 11, &[]), ("Cos", 11, &[]), ("CumSum", 11, &[]), ("DequantizeLinear", 11, &[]), ("Div", 11, &[]),
    ("Dropout", 11, &[12]), ("Einsum", 12, &[]), ("Elu", 11, &[]), ("Equal", 11, &[]), ("Erf", 11, &[]),
    ("Exp", 11, &[]), ("Expand", 11, &[]), ("Flatten", 11, &[]), ("Floor", 11, &[]), ("Gather", 11, &[]),
    ("GatherElements", 11, &[]), ("GatherND", 11, &[]), ("Gelu", 20, &[]), ("Gemm", 11, &[]),
    ("GlobalAveragePool", 11, &[]), ("Greater", 11, &[]), ("GreaterOrEqual", 12, &[]),
    ("GroupNormalization", 18, &[21]), ("HardSigmoid", 11, &[]), ("HardSwish", 14, &[]), ("Identity", 11, &[]),
    ("If", 11, &[]), ("InstanceNormalization", 11, &[]), ("IsNaN", 11, &[]), ("LayerNormalization", 17, &[]),
    ("LeakyRelu", 11, &[]), ("Less", 11, &[]), ("LessOrEqual", 12, &[]), ("Log", 11, &[]),
    ("LogSoftmax", 11, &[13]), ("Loop", 11, &[]),
    ("MatMul", 11, &[]), ("Max", 11, &[]), ("Min", 11, &[]), ("Mish", 18, &[]), ("Mod", 11, &[]), ("Mul", 11, &[]),
    ("Neg", 11, &[]), ("NonZero", 11, &[]), ("Not", 11, &[]), ("OneHot", 11, &[]), ("Or", 11, &[]),
    ("PRelu", 11, &[]), ("Pad", 11, &[18]), ("Pow", 11, &[]), ("QuantizeLinear", 11, &[]),
    ("RMSNormalization", 23, &[]), ("Range", 11, &[27]), ("Reciprocal", 11, &[]), ("ReduceL2", 11, &[18]),
    ("ReduceMax", 11, &[18]), ("ReduceMean", 11, &[18]), ("ReduceMin", 11, &[18]), ("ReduceProd", 11, &[18]),
    ("ReduceSum", 11, &[13]), ("Relu", 11, &[]), ("Reshape", 11, &[]), ("Resize", 11, &[13, 18, 19]),
    ("RotaryEmbedding", 23, &[]), ("Round", 11, &[]), ("Scan", 11, &[]), ("SequenceAt", 11, &[]),
    ("SequenceConstruct", 11, &[]), ("SequenceEmpty", 11, &[]), ("SequenceInsert", 11, &[]),
    ("SequenceLength", 11, &[]), ("Shape", 11, &[]), ("Sigmoid", 11, &[]), ("Sign", 11, &[]), ("Sin", 11, &[]), ("Size", 11, &[]),
    ("Slice", 11, &[]), ("Softmax", 11, &[13]), ("Softplus", 11, &[]), ("Split", 11, &[13, 18]),
    ("SplitToSequence", 11, &[]), ("Sqrt", 11, &[]), ("Squeeze", 11, &[13]), ("Sub", 11, &[]), ("Sum", 11, &[]),
    ("SwiGLU", 28, &[]), ("Swish", 24, &[]), ("Tanh", 11, &[]), ("Tile", 11, &[]), ("TopK", 11, &[]),
    ("Transpose", 11, &[]),
    ("Trilu", 14, &[]), ("Unsqueeze", 11, &[13]), ("Where", 11, &[]), ("Xor", 11, &[]),
];

/// Attributes that operators of [`MEANINGS`] got later: operator, attribute, version.
#[rustfmt::skip]
const ADDED: &[(&str, &str, i64)] = &[
    ("ArgMax", "select_last_index", 12), ("Attention", "left_window_size", 25), ("Attention", "right_window_size", 25),
    ("Cast", "saturate", 19), ("Cast", "round_mode", 24), ("CastLike", "saturate", 19), ("CastLike", "round_mode", 24),
    ("Constant", "value_float", 12), ("Constant", "value_floats", 12),
    ("Constant", "value_int", 12), ("Constant", "value_ints", 12), ("Constant", "value_string", 12),
    ("Constant", "value_strings", 12), ("DequantizeLinear", "axis", 13), ("DequantizeLinear", "block_size", 21),
    ("DequantizeLinear", "output_dtype", 23), ("GatherND", "batch_dims", 12), ("QuantizeLinear", "axis", 13),
    ("QuantizeLinear", "saturate", 19), ("QuantizeLinear", "block_size", 21), ("QuantizeLinear", "output_dtype", 21),
    ("QuantizeLinear", "precision", 23), ("Reshape", "allowzero", 14), ("Shape", "start", 15), ("Shape", "end", 15),
];

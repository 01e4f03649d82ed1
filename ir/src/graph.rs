//! Graphs: nodes, values and what connects them.
//!
//! Invariants (checked by [`crate::validate`], upheld by [`crate::Patch`]):
//! a value has one definition; every node that reads a value is among its users, once per slot; `order` lists every
//! node once, producers before consumers. Outside this crate a graph is read-only: all edits go through a patch.

use std::collections::{BinaryHeap, HashMap, HashSet};

use bytes::Bytes;

use crate::onnx::{AttributeProto, GraphRest, ValueInfo};
use crate::{NodeId, Tensor, TensorType, ValueId};

/// The operator that a node calls: `(domain, name, overload)`. The default domain is written as the empty string.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct OpType {
    /// Operator set, `""` for the standard one (also when the file spells it `ai.onnx`).
    pub domain: String,
    /// Name within the domain.
    pub name: String,
    /// Overload of a model-local function, else empty.
    pub overload: String,
}

impl OpType {
    /// An operator of the standard set.
    pub fn standard(name: &str) -> Self {
        Self::of("", name)
    }

    /// An operator of a named domain.
    pub fn of(domain: &str, name: &str) -> Self {
        let domain = if domain == "ai.onnx" { "" } else { domain };
        Self { domain: domain.into(), name: name.into(), overload: String::new() }
    }
}

impl std::fmt::Display for OpType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.domain.is_empty() {
            write!(f, "{}.", self.domain)?;
        }
        f.write_str(&self.name)?;
        if !self.overload.is_empty() {
            write!(f, ":{}", self.overload)?;
        }
        Ok(())
    }
}

/// The value of a node's attribute.
#[derive(Clone, PartialEq, Debug)]
pub enum Attribute {
    /// A 64-bit integer.
    Int(i64),
    /// A 32-bit float.
    Float(f32),
    /// Bytes, by convention UTF-8.
    String(Bytes),
    /// A constant tensor.
    Tensor(Tensor),
    /// A nested graph (`If`, `Loop`, `Scan`).
    Graph(Box<Graph>),
    /// 64-bit integers.
    Ints(Vec<i64>),
    /// 32-bit floats.
    Floats(Vec<f32>),
    /// Strings.
    Strings(Vec<Bytes>),
    /// In a function body: the caller's attribute of that name; the code is the attribute type of the specification.
    Ref(String, i32),
    /// Any other kind, carried as it is.
    Other(OpaqueAttribute),
}

/// An attribute of a kind that vitrim carries without looking inside.
#[derive(Clone, PartialEq, Debug)]
pub struct OpaqueAttribute(pub(crate) Box<AttributeProto>);

/// A call of an operator.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// What it calls.
    pub op: OpType,
    /// Name in the file; may be empty.
    pub name: String,
    /// Operands; `None` where an optional one is left out.
    pub inputs: Vec<Option<ValueId>>,
    /// Results; `None` where an optional one is not wanted.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes in file order.
    pub attributes: Vec<(String, Attribute)>,
    /// Values of this graph that nested graphs of the attributes read.
    pub(crate) captures: Vec<ValueId>,
    /// `metadata_props` (written from IR version 10 on).
    pub metadata: Vec<(String, String)>,
    /// What the wire message has beside, kept for a lossless round trip.
    pub(crate) rest: crate::onnx::NodeRest,
}

impl Node {
    /// A node without name or metadata.
    pub fn new(op: OpType, inputs: Vec<Option<ValueId>>, attributes: Vec<(String, Attribute)>) -> Self {
        Self {
            op,
            name: String::new(),
            inputs,
            outputs: Vec::new(),
            attributes,
            captures: Vec::new(),
            metadata: Vec::new(),
            rest: Default::default(),
        }
    }

    /// Whether it calls the standard operator `name`.
    pub fn is(&self, name: &str) -> bool {
        self.op.domain.is_empty() && self.op.name == name
    }

    /// The operator's name if it is standard, else `None`.
    pub fn standard_op(&self) -> Option<&str> {
        self.op.domain.is_empty().then_some(self.op.name.as_str())
    }

    /// Operand `slot`, if given.
    pub fn input(&self, slot: usize) -> Option<ValueId> {
        self.inputs.get(slot).copied().flatten()
    }

    /// Result `slot`, if wanted.
    pub fn output(&self, slot: usize) -> Option<ValueId> {
        self.outputs.get(slot).copied().flatten()
    }

    /// The operands that are given.
    pub fn operands(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().flatten().copied()
    }

    /// The operands and the values that nested graphs read: everything it depends on.
    pub fn dependencies(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.operands().chain(self.captures.iter().copied())
    }

    /// The results that are wanted.
    pub fn results(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.outputs.iter().flatten().copied()
    }

    /// The attribute `name`.
    pub fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// The attribute `name` if it is an integer.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.attribute(name)? {
            Attribute::Int(x) => Some(*x),
            _ => None,
        }
    }

    /// The attribute `name` if it is a float.
    pub fn float(&self, name: &str) -> Option<f32> {
        match self.attribute(name)? {
            Attribute::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// The attribute `name` if it is a list of integers.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        match self.attribute(name)? {
            Attribute::Ints(x) => Some(x),
            _ => None,
        }
    }

    /// The attribute `name` if it is text.
    pub fn string(&self, name: &str) -> Option<&str> {
        match self.attribute(name)? {
            Attribute::String(x) => std::str::from_utf8(x).ok(),
            _ => None,
        }
    }

    /// Nested graphs.
    pub fn subgraphs(&self) -> impl Iterator<Item = &Graph> {
        self.attributes.iter().filter_map(|(_, value)| match value {
            Attribute::Graph(graph) => Some(graph.as_ref()),
            _ => None,
        })
    }

    /// The outer values that the nested graphs read, each once.
    pub(crate) fn read_by_nested(&self) -> Vec<ValueId> {
        let mut seen = HashSet::new();
        let captured = self.subgraphs().flat_map(Graph::captured);
        captured.map(|(_, target)| target).filter(|&target| seen.insert(target)).collect()
    }

    /// Whether an attribute refers to an attribute of the enclosing function, which makes its value unknown here.
    pub fn has_reference(&self) -> bool {
        self.attributes.iter().any(|(_, value)| matches!(value, Attribute::Ref(..)))
    }
}

/// The version of the format from which on constants are apart from the inputs of a graph (see [`Def::Default`]).
pub const CONSTANTS_APART: i64 = 4;

/// Where a value comes from.
#[derive(Clone, PartialEq, Debug)]
pub enum Def {
    /// Fed at run time (and nothing else gives it a value).
    Input,
    /// An input that may be left out: then it is this tensor. It is no constant, for callers may replace it.
    ///
    /// In a file that is an initializer with the name of an input. Up to version 3 of the format every initializer of the
    /// main graph had to have that, and runtimes take its value as fixed: there it is a [`Def::Initializer`].
    Default(Tensor),
    /// A constant of the file; up to version 3 of the format it is a graph input as well.
    Initializer(Tensor),
    /// A sparse constant, carried as it is.
    SparseInitializer,
    /// Result `slot` of a node.
    Node(NodeId, usize),
    /// In a nested graph: a value of the enclosing one.
    Captured(ValueId),
    /// Named by a type declaration only.
    Undefined,
}

/// One reading of a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Use {
    /// The reading node.
    pub node: NodeId,
    /// Its operand slot; `None` where a nested graph of the node reads it.
    pub slot: Option<usize>,
}

/// A tensor that flows along edges.
#[derive(Clone, PartialEq, Debug)]
pub struct Value {
    pub(crate) name: String,
    pub(crate) def: Def,
    pub(crate) uses: Vec<Use>,
    pub(crate) info: Option<ValueInfo>,
}

impl Value {
    pub(crate) fn new(name: String, def: Def) -> Self {
        Self { name, def, uses: Vec::new(), info: None }
    }

    /// Name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it comes from.
    pub fn def(&self) -> &Def {
        &self.def
    }

    /// Who reads it.
    pub fn uses(&self) -> &[Use] {
        &self.uses
    }

    /// Declared type, for tensors.
    pub fn ty(&self) -> Option<TensorType> {
        match &self.def {
            Def::Initializer(tensor) => Some(tensor.ty()),
            Def::Default(tensor) if self.info.is_none() => Some(tensor.ty()),
            _ => self.info.as_ref().and_then(ValueInfo::tensor_type),
        }
    }
}

/// A dataflow graph: the main graph of a model, a nested graph of a node, or the body of a function.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Graph {
    pub(crate) nodes: Vec<Option<Node>>,
    pub(crate) values: Vec<Option<Value>>,
    pub(crate) order: Vec<NodeId>,
    pub(crate) inputs: Vec<ValueId>,
    pub(crate) outputs: Vec<ValueId>,
    pub(crate) initializers: Vec<ValueId>,
    /// Values that have a `value_info` entry, in file order.
    pub(crate) declared: Vec<ValueId>,
    pub(crate) rest: GraphRest,
    pub(crate) revision: u64,
}

impl Graph {
    /// Number of edits so far: an analysis is valid for one revision.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The node `id`. Panics if it was removed: ids are kept only as long as the revision they were found in.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.slot()].as_ref().expect("a node id is used only with the revision it was found in")
    }

    /// The value `id`. Panics if it was removed, as [`Graph::node`] does.
    pub fn value(&self, id: ValueId) -> &Value {
        self.values[id.slot()].as_ref().expect("a value id is used only with the revision it was found in")
    }

    /// The node `id`, if it is still there.
    pub fn get_node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.slot())?.as_ref()
    }

    /// The value `id`, if it is still there.
    pub fn get_value(&self, id: ValueId) -> Option<&Value> {
        self.values.get(id.slot())?.as_ref()
    }

    /// Nodes, producers before consumers.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> + '_ {
        self.order.iter().map(|&id| (id, self.node(id)))
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value)> + '_ {
        let slots = self.values.iter().enumerate();
        slots.filter_map(|(slot, value)| Some((ValueId::from_slot(slot), value.as_ref()?)))
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether it has no nodes.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Inputs in file order, also those that may be left out (see [`Graph::feeds`]); up to version 3 of the format
    /// initializers are among them.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// Inputs that must be fed at run time.
    pub fn feeds(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.inputs.iter().copied().filter(|&id| matches!(self.value(id).def, Def::Input))
    }

    /// Outputs in file order.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// Initializers in file order: constants, and what inputs are that are left out.
    pub fn initializers(&self) -> &[ValueId] {
        &self.initializers
    }

    /// The node that produces `value`, and its result slot.
    pub fn producer(&self, value: ValueId) -> Option<(NodeId, usize)> {
        match self.value(value).def {
            Def::Node(node, slot) => Some((node, slot)),
            _ => None,
        }
    }

    /// The constant that `value` holds: an initializer that callers cannot replace, or the result of a `Constant` node.
    pub fn constant(&self, value: ValueId) -> Option<std::borrow::Cow<'_, Tensor>> {
        use std::borrow::Cow;
        match &self.value(value).def {
            Def::Initializer(tensor) => Some(Cow::Borrowed(tensor)),
            Def::Node(node, 0) if self.node(*node).is("Constant") => {
                let (key, attribute) = self.node(*node).attributes.first()?;
                match (key.as_str(), attribute) {
                    ("value", Attribute::Tensor(tensor)) => Some(Cow::Borrowed(tensor)),
                    ("value_int", Attribute::Int(x)) => Some(Cow::Owned(Tensor::i64(*x))),
                    ("value_ints", Attribute::Ints(x)) => Some(Cow::Owned(Tensor::shape(x))),
                    ("value_float", Attribute::Float(x)) => Some(Cow::Owned(Tensor::f32(*x))),
                    ("value_floats", Attribute::Floats(x)) => Some(Cow::Owned(Tensor::f32s(&[x.len()], x))),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Positions at which `value` is a graph output.
    pub fn output_slots(&self, value: ValueId) -> impl Iterator<Item = usize> + '_ {
        let outputs = self.outputs.iter().enumerate();
        outputs.filter(move |&(_, &output)| output == value).map(|(slot, _)| slot)
    }

    /// Whether a graph output depends on `value` through readers other than those to skip.
    pub fn reaches_output(&self, value: ValueId, skipped: impl Fn(&Use) -> bool) -> bool {
        let mut seen = HashSet::from([value]);
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            if self.output_slots(value).next().is_some() {
                return true;
            }
            let readers = self.value(value).uses().iter().filter(|reader| !skipped(reader));
            let results = readers.flat_map(|reader| self.node(reader.node).results());
            open.extend(results.filter(|&result| seen.insert(result)));
        }
        false
    }

    /// The value of that name.
    pub fn find_value(&self, name: &str) -> Option<ValueId> {
        self.values().find(|(_, value)| value.name == name).map(|(id, _)| id)
    }

    /// How a message names a node: its name, or its operator and first result where it has none.
    pub fn describe(&self, id: NodeId) -> String {
        let node = self.node(id);
        if !node.name.is_empty() {
            return format!("{} '{}'", node.op, node.name);
        }
        match node.results().next().and_then(|result| self.get_value(result)) {
            Some(value) => format!("{} -> '{}'", node.op, value.name),
            None => node.op.to_string(),
        }
    }

    pub(crate) fn add_value(&mut self, value: Value) -> ValueId {
        self.values.push(Some(value));
        ValueId::from_slot(self.values.len() - 1)
    }

    /// The values that stand for values of the enclosing graph, with those.
    pub(crate) fn captured(&self) -> impl Iterator<Item = (ValueId, ValueId)> + '_ {
        self.values().filter_map(|(id, value)| match value.def {
            Def::Captured(target) => Some((id, target)),
            _ => None,
        })
    }

    /// Adds a node at the end of the order and connects it; its result values must exist already.
    pub(crate) fn add_node(&mut self, node: Node) -> NodeId {
        let id = NodeId::from_slot(self.nodes.len());
        self.connect(id, &node);
        self.nodes.push(Some(node));
        self.order.push(id);
        id
    }

    pub(crate) fn connect(&mut self, id: NodeId, node: &Node) {
        for (slot, input) in node.inputs.iter().enumerate() {
            if let Some(input) = *input {
                self.value_mut(input).uses.push(Use { node: id, slot: Some(slot) });
            }
        }
        for &captured in &node.captures {
            self.value_mut(captured).uses.push(Use { node: id, slot: None });
        }
        for (slot, output) in node.outputs.iter().enumerate() {
            if let Some(output) = *output {
                self.value_mut(output).def = Def::Node(id, slot);
            }
        }
    }

    pub(crate) fn value_mut(&mut self, id: ValueId) -> &mut Value {
        self.values[id.slot()].as_mut().expect("checked by the caller")
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.slot()].as_mut().expect("checked by the caller")
    }

    /// Recomputes from the nodes what their nested graphs read and who reads each value.
    pub(crate) fn reconnect(&mut self) {
        for value in self.values.iter_mut().flatten() {
            value.uses.clear();
        }
        let order = std::mem::take(&mut self.order);
        for &id in &order {
            let mut node = self.nodes[id.slot()].take().expect("the order lists nodes that exist");
            node.captures = node.read_by_nested();
            self.connect(id, &node);
            self.nodes[id.slot()] = Some(node);
        }
        self.order = order;
    }

    /// Gives captured values of nested graphs, at every depth, the names of the values that they stand for.
    pub(crate) fn rename_captured(&mut self) {
        for slot in 0..self.nodes.len() {
            let Some(node) = &mut self.nodes[slot] else { continue };
            if node.subgraphs().next().is_none() {
                continue;
            }
            let mut attributes = std::mem::take(&mut node.attributes);
            for (_, attribute) in &mut attributes {
                let Attribute::Graph(nested) = attribute else { continue };
                for value in nested.values.iter_mut().flatten() {
                    if let Def::Captured(target) = value.def {
                        value.name.clone_from(&self.value(target).name);
                    }
                }
                nested.rename_captured();
            }
            self.node_mut(NodeId::from_slot(slot)).attributes = attributes;
        }
    }

    /// Restores the order (producers before consumers), keeping the present one as far as it is right.
    /// Returns nodes on a cycle if there is one.
    pub(crate) fn sort(&mut self) -> Result<(), Vec<NodeId>> {
        use std::cmp::Reverse;
        let place: HashMap<NodeId, usize> = self.order.iter().enumerate().map(|(at, &id)| (id, at)).collect();
        let mut waiting: HashMap<NodeId, usize> = HashMap::with_capacity(place.len());
        let mut readers: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
        let mut ready = BinaryHeap::new();
        for &id in &self.order {
            let node = self.node(id);
            let producers: HashSet<NodeId> =
                node.dependencies().filter_map(|value| self.producer(value)).map(|(producer, _)| producer).collect();
            for &producer in &producers {
                readers.entry(producer).or_default().push(id);
            }
            if producers.is_empty() {
                ready.push(Reverse(place[&id]));
            }
            waiting.insert(id, producers.len());
        }
        let mut sorted = Vec::with_capacity(self.order.len());
        while let Some(Reverse(at)) = ready.pop() {
            let id = self.order[at];
            sorted.push(id);
            for reader in readers.get(&id).into_iter().flatten() {
                let count = waiting.get_mut(reader).expect("every node waits");
                *count -= 1;
                if *count == 0 {
                    ready.push(Reverse(place[reader]));
                }
            }
        }
        if sorted.len() < self.order.len() {
            let done: HashSet<NodeId> = sorted.into_iter().collect();
            return Err(self.order.iter().copied().filter(|id| !done.contains(id)).collect());
        }
        self.order = sorted;
        Ok(())
    }
}

/// Names that are taken, and a source of free ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    taken: HashSet<String>,
    /// The number last tried for a hint, so that many wishes for one name stay cheap.
    tried: HashMap<String, usize>,
}

impl Names {
    /// The names of values and nodes in a graph and in those nested in it.
    pub(crate) fn of(graph: &Graph) -> Self {
        let mut names = Self::default();
        names.add(graph);
        names
    }

    fn add(&mut self, graph: &Graph) {
        self.taken.extend(graph.values().map(|(_, value)| value.name.clone()));
        for (_, node) in graph.nodes() {
            self.taken.insert(node.name.clone());
            node.subgraphs().for_each(|nested| self.add(nested));
        }
    }

    /// Takes `name`; false if it is taken already.
    pub(crate) fn take(&mut self, name: &str) -> bool {
        self.taken.insert(name.to_owned())
    }

    /// Takes `hint`, or else the first of `hint_2`, `hint_3` and so on that is free.
    pub(crate) fn fresh(&mut self, hint: &str) -> String {
        if self.take(hint) {
            return hint.to_owned();
        }
        let tried = self.tried.entry(hint.to_owned()).or_insert(1);
        loop {
            *tried += 1;
            let name = format!("{hint}_{tried}");
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }
}

/// Text from a file for a message of one line: control characters are escaped, and what is too long is cut.
pub(crate) fn legible(text: &str, limit: usize) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    let mut shown: String = text.chars().take(limit).map(escaped).collect();
    if text.chars().nth(limit).is_some() {
        shown.push('…');
    }
    shown
}

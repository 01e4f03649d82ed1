//! From protobuf messages to the graph representation.
//!
//! Nothing in a file is trusted: sizes are checked before use, names must be unique, every read name must exist, and
//! external data must lie inside its file. Memory grows with the file, never with a number that the file states; time
//! grows with the file's size, not with its square.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::*;
use crate::graph::{Attribute, CONSTANTS_APART, Def, Graph, Node, OpType, OpaqueAttribute, Value, legible};
use crate::model::{Function, IR_UNSTATED, Model, Opsets};
use crate::{Tensor, ValueId};

/// Why a file is not a usable ONNX model.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DecodeError {
    #[error("the file is empty")]
    Empty,
    #[error("not an ONNX model, or a truncated one: {0}")]
    Malformed(String),
    #[error("graphs, types or attributes are nested too deep: protobuf allows 100 messages inside each other")]
    TooDeep,
    #[error("the model has no graph")]
    NoGraph,
    #[error("the model's graph has no nodes")]
    NoNodes,
    #[error("the model imports no operator set: not an ONNX model, or a truncated one")]
    NoOpset,
    #[error("{}: the operator set '{}' is imported in versions {first} and {second}", brief(graph), brief(domain))]
    OpsetTwice { graph: String, domain: String, first: i64, second: i64 },
    #[error("{}: the name '{}' is defined twice", brief(graph), brief(.name))]
    DefinedTwice { graph: String, name: String },
    #[error("the function '{}' is defined twice", brief(.name))]
    FunctionTwice { name: String },
    #[error("a function of the domain '{}' has no name", brief(domain))]
    NoFunctionName { domain: String },
    #[error("{}: node '{}' ({}) reads '{}', which nothing defines", brief(graph), brief(node), brief(op), brief(.name))]
    Undefined { graph: String, node: String, op: String, name: String },
    #[error("{}: the output '{}' is not defined", brief(graph), brief(.name))]
    UndefinedOutput { graph: String, name: String },
    #[error("{}: the nodes {} form a cycle", brief(graph), legible(nodes, 3 * NAME))]
    Cycle { graph: String, nodes: String },
    #[error("{}: a node without an operator type ('{}')", brief(graph), brief(node))]
    NoOpType { graph: String, node: String },
    #[error("{}: an attribute of node '{}' appears twice: '{}'", brief(graph), brief(node), brief(attribute))]
    AttributeTwice { graph: String, node: String, attribute: String },
    #[error("{}: the attribute '{}' holds graphs in a way that no known operator uses", brief(graph), brief(attribute))]
    Graphs { graph: String, attribute: String },
    #[error("tensor '{}': {}", brief(.name), legible(reason, 3 * NAME))]
    Tensor { name: String, reason: String },
}

/// Characters of a name that messages show.
const NAME: usize = 100;

fn brief(text: &str) -> String {
    legible(text, NAME)
}

type Result<T> = std::result::Result<T, DecodeError>;

/// Gives the content of an external data file by its location, or says why not.
pub(crate) type ExternalFiles<'f> = &'f mut dyn FnMut(&str) -> std::result::Result<Bytes, String>;

/// Decodes a model; weights stay slices of `bytes`.
pub(crate) fn decode_model(bytes: Bytes, files: ExternalFiles<'_>) -> Result<Model> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    let mut proto = ModelProto::decode(bytes).map_err(malformed)?;
    let graph = proto.graph.take().ok_or(DecodeError::NoGraph)?;
    // Versions 1 and 2 of the format had one operator set.
    if proto.opset_import.is_empty() && proto.ir_version.is_none_or(|version| version >= 3) {
        return Err(DecodeError::NoOpset);
    }
    if graph.node.is_empty() {
        return Err(DecodeError::NoNodes);
    }
    let opsets = opsets(std::mem::take(&mut proto.opset_import), "graph")?;
    let metadata = pairs(std::mem::take(&mut proto.metadata_props));
    let mut decoder = Decoder { files, ir_version: proto.ir_version.unwrap_or(IR_UNSTATED) };
    let graph = decoder.graph(graph, "graph", None)?;
    let mut keys = HashSet::new();
    let mut functions = Vec::with_capacity(proto.functions.len());
    for function in std::mem::take(&mut proto.functions) {
        let function = decoder.function(function)?;
        if !keys.insert(function.key.clone()) {
            return Err(DecodeError::FunctionTwice { name: function.key.to_string() });
        }
        functions.push(function);
    }
    Ok(Model { graph, functions, opsets, metadata, rest: proto, source: Default::default() })
}

/// The reason without the path of messages that leads to it, which can be very long.
fn malformed(error: prost::DecodeError) -> DecodeError {
    let text = error.to_string();
    let messages = |part: &&str| part.starts_with(char::is_uppercase);
    let reason = text.split(": ").skip(1).skip_while(messages).collect::<Vec<_>>().join(": ");
    if reason == "recursion limit reached" { DecodeError::TooDeep } else { DecodeError::Malformed(reason) }
}

fn opsets(imports: Vec<OperatorSetIdProto>, place: &str) -> Result<Opsets> {
    let mut versions = HashMap::new();
    let opsets = Opsets(imports);
    for (domain, second) in opsets.iter() {
        let first = *versions.entry(domain).or_insert(second);
        if first != second {
            let (graph, domain) = (place.into(), domain.into());
            return Err(DecodeError::OpsetTwice { graph, domain, first, second });
        }
    }
    Ok(opsets)
}

fn pairs(entries: Vec<StringStringEntryProto>) -> Vec<(String, String)> {
    entries.into_iter().map(|entry| (entry.key.unwrap_or_default(), entry.value.unwrap_or_default())).collect()
}

/// A graph being decoded, in the graphs that it is nested in.
struct Scope<'s> {
    /// What messages call it.
    place: &'s str,
    graph: Graph,
    names: HashMap<String, ValueId>,
    outer: Option<&'s Scope<'s>>,
}

impl Scope<'_> {
    fn knows(&self, name: &str) -> bool {
        self.names.contains_key(name) || self.outer.is_some_and(|outer| outer.knows(name))
    }

    fn define(&mut self, name: &str, def: Def) -> Result<ValueId> {
        let id = self.graph.add_value(Value::new(name.into(), def));
        match self.names.insert(name.into(), id) {
            None => Ok(id),
            Some(_) => Err(DecodeError::DefinedTwice { graph: self.place.into(), name: name.into() }),
        }
    }

    /// The value that `name` means here. One of an enclosing graph gets a value of this graph that stands for it; that
    /// graph, which knows the target's id, fills it in later.
    fn resolve(&mut self, name: &str) -> Option<ValueId> {
        if let Some(&id) = self.names.get(name) {
            return Some(id);
        }
        if !self.outer?.knows(name) {
            return None;
        }
        let itself = ValueId::from_slot(self.graph.values.len());
        let id = self.graph.add_value(Value::new(name.into(), Def::Captured(itself)));
        self.names.insert(name.into(), id);
        Some(id)
    }
}

struct Decoder<'f> {
    files: ExternalFiles<'f>,
    ir_version: i64,
}

impl Decoder<'_> {
    fn function(&mut self, mut proto: FunctionProto) -> Result<Function> {
        let key = op_type(&proto.domain, &proto.name, &proto.overload);
        if key.name.is_empty() {
            return Err(DecodeError::NoFunctionName { domain: key.domain });
        }
        let place = format!("function {key}");
        let info = |name: String| ValueInfoProto { name: Some(name), ..Default::default() };
        let body = GraphProto {
            node: std::mem::take(&mut proto.node),
            input: std::mem::take(&mut proto.input).into_iter().map(info).collect(),
            output: std::mem::take(&mut proto.output).into_iter().map(info).collect(),
            ..Default::default()
        };
        let mut graph = self.graph(body, &place, None)?;
        // The inputs and outputs of a function are names; types, if any, are those of `value_info`.
        let mut names = HashMap::new();
        for (slot, value) in graph.values.iter_mut().flatten().enumerate() {
            value.info = None;
            names.insert(value.name.clone(), ValueId::from_slot(slot));
        }
        graph.rest.0.output.clear();
        let infos = std::mem::take(&mut proto.value_info);
        graph.rest.0.value_info = declare(&mut graph, &mut names, &mut HashSet::new(), infos);
        let mut defaults = Vec::with_capacity(proto.attribute_proto.len());
        for attribute in std::mem::take(&mut proto.attribute_proto) {
            proto.attribute_proto.extend(doc(&attribute));
            defaults.push(self.attribute(attribute, None, &place)?);
        }
        let opsets = opsets(std::mem::take(&mut proto.opset_import), &place)?;
        let attributes = std::mem::take(&mut proto.attribute);
        Ok(Function { key, attributes, defaults, graph, opsets, rest: proto })
    }

    /// Decodes a graph. Its captured values point nowhere yet: the caller knows where.
    fn graph(&mut self, mut proto: GraphProto, place: &str, outer: Option<&Scope<'_>>) -> Result<Graph> {
        let mut scope = Scope { place, graph: Graph::default(), names: HashMap::new(), outer };
        // Exactly: a file can have any number of small graphs.
        let results = proto.node.iter().map(|node| node.output.len()).sum::<usize>();
        scope.graph.nodes.reserve_exact(proto.node.len());
        scope.graph.values.reserve_exact(proto.input.len() + proto.initializer.len() + results);
        let mut told = HashSet::new();
        for info in std::mem::take(&mut proto.input) {
            let id = scope.define(info.name.as_deref().unwrap_or(""), Def::Input)?;
            scope.graph.inputs.push(id);
            scope.graph.value_mut(id).info = Some(ValueInfo(info));
            told.insert(id);
        }
        for tensor in std::mem::take(&mut proto.initializer) {
            let tensor = self.tensor(tensor)?;
            let name = tensor.proto.name.clone().unwrap_or_default();
            let id = match scope.names.get(&name) {
                Some(&id) if matches!(scope.graph.value(id).def, Def::Input) => {
                    let replaceable = self.ir_version >= CONSTANTS_APART || outer.is_some();
                    let def = if replaceable { Def::Default } else { Def::Initializer };
                    scope.graph.value_mut(id).def = def(tensor);
                    id
                }
                _ => scope.define(&name, Def::Initializer(tensor))?,
            };
            scope.graph.initializers.push(id);
        }
        for sparse in &proto.sparse_initializer {
            self.sparse(sparse)?;
            let name = sparse.values.as_ref().and_then(|values| values.name.as_deref()).unwrap_or("");
            scope.define(name, Def::SparseInitializer)?;
        }
        let nodes = std::mem::take(&mut proto.node);
        for name in nodes.iter().flat_map(|node| &node.output).filter(|name| !name.is_empty()) {
            scope.define(name, Def::Undefined)?;
        }
        for node in nodes {
            self.node(node, &mut scope)?;
        }
        for info in std::mem::take(&mut proto.output) {
            let name = info.name.clone().unwrap_or_default();
            let id = scope.resolve(&name);
            let id = id.ok_or_else(|| DecodeError::UndefinedOutput { graph: place.into(), name })?;
            scope.graph.outputs.push(id);
            match told.insert(id) {
                true => scope.graph.value_mut(id).info = Some(ValueInfo(info)),
                false => proto.output.push(info),
            }
        }
        let infos = std::mem::take(&mut proto.value_info);
        proto.value_info = declare(&mut scope.graph, &mut scope.names, &mut told, infos);
        let mut graph = scope.graph;
        graph.rest = GraphRest(proto);
        graph.sort().map_err(|nodes| DecodeError::Cycle {
            graph: place.into(),
            nodes: nodes.iter().take(3).map(|&id| graph.describe(id)).collect::<Vec<_>>().join(", "),
        })?;
        Ok(graph)
    }

    fn node(&mut self, mut proto: NodeProto, scope: &mut Scope<'_>) -> Result<()> {
        let place = scope.place;
        let name = proto.name.clone().unwrap_or_default();
        let op = op_type(&proto.domain, &proto.op_type, &proto.overload);
        if op.name.is_empty() {
            return Err(DecodeError::NoOpType { graph: place.into(), node: name });
        }
        let undefined = |value: String| DecodeError::Undefined {
            graph: place.into(),
            node: name.clone(),
            op: op.to_string(),
            name: value,
        };
        let mut inputs = Vec::with_capacity(proto.input.len());
        for input in std::mem::take(&mut proto.input) {
            inputs.push(match input.as_str() {
                "" => None,
                name => Some(scope.resolve(name).ok_or_else(|| undefined(input))?),
            });
        }
        let outputs = std::mem::take(&mut proto.output);
        let outputs = outputs.iter().map(|name| scope.names.get(name).copied().filter(|_| !name.is_empty())).collect();
        let mut attributes = Vec::with_capacity(proto.attribute.len());
        let mut keys = HashSet::new();
        for attribute in std::mem::take(&mut proto.attribute) {
            proto.attribute.extend(doc(&attribute));
            let (key, mut value) = self.attribute(attribute, Some(&*scope), place)?;
            if !keys.insert(key.clone()) {
                return Err(DecodeError::AttributeTwice { graph: place.into(), node: name, attribute: key });
            }
            if let Attribute::Graph(nested) = &mut value {
                for value in nested.values.iter_mut().flatten() {
                    let Def::Captured(target) = &mut value.def else { continue };
                    *target = scope.resolve(&value.name).ok_or_else(|| undefined(value.name.clone()))?;
                }
            }
            attributes.push((key, value));
        }
        let metadata = pairs(std::mem::take(&mut proto.metadata_props));
        let rest = NodeRest(proto);
        let mut node = Node { op, name, inputs, outputs, attributes, captures: Vec::new(), metadata, rest };
        node.captures = node.read_by_nested();
        scope.graph.add_node(node);
        Ok(())
    }

    /// `scope` is that of the node which has the attribute: nested graphs may read its names.
    fn attribute(
        &mut self,
        proto: AttributeProto,
        scope: Option<&Scope<'_>>,
        place: &str,
    ) -> Result<(String, Attribute)> {
        let name = proto.name.clone().unwrap_or_default();
        let kind = proto.r#type.filter(|&kind| kind != 0).unwrap_or_else(|| implied_type(&proto));
        let value = match kind {
            kind if proto.ref_attr_name.as_ref().is_some_and(|name| !name.is_empty()) => {
                Attribute::Ref(proto.ref_attr_name.unwrap_or_default(), kind)
            }
            attribute_type::FLOAT => Attribute::Float(proto.f.unwrap_or(0.0)),
            attribute_type::INT => Attribute::Int(proto.i.unwrap_or(0)),
            attribute_type::STRING => Attribute::String(proto.s.unwrap_or_default()),
            attribute_type::TENSOR if proto.t.is_some() => {
                Attribute::Tensor(self.tensor(*proto.t.expect("just seen"))?)
            }
            attribute_type::GRAPH if proto.g.is_some() => {
                let nested = *proto.g.expect("just seen");
                Attribute::Graph(Box::new(self.graph(nested, &format!("{place}/{name}"), scope)?))
            }
            attribute_type::FLOATS => Attribute::Floats(proto.floats),
            attribute_type::INTS => Attribute::Ints(proto.ints),
            attribute_type::STRINGS => Attribute::Strings(proto.strings),
            // What a graph reads must be known, so one cannot be carried unseen.
            _ if proto.g.is_some() || !proto.graphs.is_empty() => {
                return Err(DecodeError::Graphs { graph: place.into(), attribute: name });
            }
            _ => {
                proto
                    .t
                    .iter()
                    .map(|tensor| tensor.as_ref())
                    .chain(&proto.tensors)
                    .try_for_each(|tensor| self.tensor(tensor.clone()).map(drop))?;
                let sparse = proto.sparse_tensor.iter().map(|sparse| sparse.as_ref()).chain(&proto.sparse_tensors);
                sparse.into_iter().try_for_each(|sparse| self.sparse(sparse))?;
                Attribute::Other(OpaqueAttribute(Box::new(proto)))
            }
        };
        Ok((name, value))
    }

    /// Checks a sparse tensor, which is carried as it is.
    fn sparse(&mut self, proto: &SparseTensorProto) -> Result<()> {
        let parts = [&proto.values, &proto.indices];
        parts.into_iter().flatten().try_for_each(|part| self.tensor(part.clone()).map(drop))
    }

    fn tensor(&mut self, proto: TensorProto) -> Result<Tensor> {
        let external = self.external(&proto).map_err(|reason| {
            let name = proto.name.clone().unwrap_or_default();
            DecodeError::Tensor { name, reason }
        })?;
        Ok(Tensor { proto: Arc::new(proto), external })
    }

    /// Checks a tensor; gives its elements if they lie in an external file.
    fn external(&mut self, proto: &TensorProto) -> std::result::Result<Option<Bytes>, String> {
        let need = check_tensor(proto)?;
        if proto.data_location != Some(EXTERNAL) {
            return Ok(None);
        }
        let location = external_location(proto).ok_or("its external file is not named")?;
        let need = need.ok_or_else(|| format!("strings cannot lie in an external file such as '{location}'"))?;
        let number = |key: &str| {
            let parse = |text: &str| text.parse().map_err(|_| format!("its external {key} '{text}' is no size"));
            external_entry(proto, key).map(parse).transpose()
        };
        let offset: u64 = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(need);
        let file = (self.files)(location)?;
        let end = offset
            .checked_add(length)
            .filter(|&end| end <= file.len() as u64)
            .ok_or_else(|| format!("'{location}' has {} bytes, too few for {length} from {offset} on", file.len()))?;
        if length != need {
            return Err(format!("its shape needs {need} bytes, '{location}' holds {length} for it"));
        }
        Ok(Some(file.slice(offset as usize..end as usize)))
    }
}

fn op_type(domain: &Option<String>, name: &Option<String>, overload: &Option<String>) -> OpType {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    OpType { overload: text(overload), ..OpType::of(&text(domain), &text(name)) }
}

/// Adds the entries of `value_info`. What is declared a second time, as some tools do, stays as it is: it is given back,
/// to be kept with the rest of the message.
fn declare(
    graph: &mut Graph,
    names: &mut HashMap<String, ValueId>,
    told: &mut HashSet<ValueId>,
    infos: Vec<ValueInfoProto>,
) -> Vec<ValueInfoProto> {
    let mut beside = Vec::new();
    for info in infos {
        let name = info.name.clone().unwrap_or_default();
        let unknown = || graph.add_value(Value::new(name.clone(), Def::Undefined));
        let id = names.get(&name).copied().unwrap_or_else(unknown);
        names.insert(name, id);
        graph.declared.push(id);
        match told.insert(id) {
            true => graph.value_mut(id).info = Some(ValueInfo(info)),
            false => beside.push(info),
        }
    }
    beside
}

/// The documentation of an attribute, if it has any.
fn doc(attribute: &AttributeProto) -> Option<AttributeProto> {
    let (name, doc_string) = (attribute.name.clone(), attribute.doc_string.clone());
    doc_string.is_some().then(|| AttributeProto { name, doc_string, ..Default::default() })
}

/// The type of an attribute that does not state it, as those of the first format version.
fn implied_type(proto: &AttributeProto) -> i32 {
    let present = [
        (proto.f.is_some(), attribute_type::FLOAT),
        (proto.i.is_some(), attribute_type::INT),
        (proto.s.is_some(), attribute_type::STRING),
        (proto.t.is_some(), attribute_type::TENSOR),
        (proto.g.is_some(), attribute_type::GRAPH),
        (!proto.floats.is_empty(), attribute_type::FLOATS),
        (!proto.ints.is_empty(), attribute_type::INTS),
        (!proto.strings.is_empty(), attribute_type::STRINGS),
    ];
    present.into_iter().find(|(here, _)| *here).map_or(0, |(_, kind)| kind)
}

/// Checks extents and the amount of data in the message; gives the bytes that the elements take, except of strings.
fn check_tensor(proto: &TensorProto) -> std::result::Result<Option<u64>, String> {
    let dtype = DataType::from_code(proto.data_type.unwrap_or(0));
    if let DataType::Unknown(code) = dtype {
        return Err(format!("unknown element type {code}"));
    }
    if let Some(dim) = proto.dims.iter().find(|&&dim| dim < 0) {
        return Err(format!("the extent {dim} is negative"));
    }
    // Every partial product must fit, whatever the order in which others multiply: `Tensor::len` relies on it.
    let product = proto.dims.iter().filter(|&&dim| dim > 0).try_fold(1i64, |product, &dim| product.checked_mul(dim));
    let elements = product.map(|product| if proto.dims.contains(&0) { 0 } else { product });
    let sized = elements.and_then(|elements| elements.checked_mul(dtype.bits().unwrap_or(1) as i64));
    let (Some(elements), Some(bits)) = (elements, sized) else {
        return Err(format!("the extents {:?} overflow", proto.dims));
    };
    let (elements, bytes) = (elements as u64, dtype.bits().map(|_| (bits as u64).div_ceil(8)));
    if proto.data_location == Some(EXTERNAL) {
        return Ok(bytes);
    }
    let (have, need) = match (&proto.raw_data, bytes) {
        (Some(_), None) => return Err("strings cannot lie in raw_data".into()),
        (Some(raw), Some(bytes)) => (raw.len(), bytes),
        (None, _) => match dtype {
            DataType::F32 => (proto.float_data.len(), elements),
            DataType::C64 => (proto.float_data.len(), elements.saturating_mul(2)),
            DataType::F64 => (proto.double_data.len(), elements),
            DataType::C128 => (proto.double_data.len(), elements.saturating_mul(2)),
            DataType::I64 => (proto.int64_data.len(), elements),
            DataType::U32 | DataType::U64 => (proto.uint64_data.len(), elements),
            DataType::String => (proto.string_data.len(), elements),
            // Several elements of fewer than 8 bits share a number.
            _ => (proto.int32_data.len(), elements.div_ceil(dtype.bits().map_or(1, |bits| (8 / bits).max(1)))),
        },
    };
    if have as u64 != need {
        return Err(format!(
            "the shape {:?} of {dtype} needs {need} bytes or entries, the file holds {have}",
            proto.dims
        ));
    }
    Ok(bytes)
}

//! From the graph representation to protobuf messages.

use std::collections::{HashMap, HashSet, VecDeque};

use prost::Message;

use super::*;
use crate::graph::{Attribute, Def, Graph, Node, Value};
use crate::model::{Function, Model};
use crate::{Tensor, ValueId};

/// The model as one message. Cheap: elements of tensors are shared, not copied.
///
/// With `embed`, tensors of external files are moved into the message.
pub(crate) fn encode_model(model: &Model, embed: bool) -> ModelProto {
    let encoder = Encoder { embed };
    ModelProto {
        graph: Some(encoder.graph(&model.graph)),
        functions: model.functions.iter().map(|function| encoder.function(function)).collect(),
        opset_import: model.opsets.0.clone(),
        metadata_props: entries(&model.metadata),
        ..model.rest.clone()
    }
}

/// Whether two functions are the same message.
pub(crate) fn same_function(a: &Function, b: &Function) -> bool {
    let bytes = |function| Encoder { embed: false }.function(function).encode_to_vec();
    bytes(a) == bytes(b)
}

fn entries(pairs: &[(String, String)]) -> Vec<StringStringEntryProto> {
    let entry =
        |(key, value): &(String, String)| StringStringEntryProto { key: Some(key.clone()), value: Some(value.clone()) };
    pairs.iter().map(entry).collect()
}

/// `text` in the way the file wrote it (absent or empty), where it still says the same.
fn kept(text: &str, original: &Option<String>) -> Option<String> {
    (!text.is_empty() || original.as_deref() == Some("")).then(|| text.into())
}

/// Declarations of one graph's values: each value's own, once, and those that the file has beside.
struct Declarations {
    told: HashSet<ValueId>,
    beside: HashMap<String, VecDeque<ValueInfoProto>>,
}

impl Declarations {
    fn new(beside: impl Iterator<Item = ValueInfoProto>) -> Self {
        let mut by_name: HashMap<String, VecDeque<ValueInfoProto>> = HashMap::new();
        for info in beside {
            by_name.entry(info.name.clone().unwrap_or_default()).or_default().push_back(info);
        }
        Self { told: HashSet::new(), beside: by_name }
    }

    fn of(&mut self, graph: &Graph, ids: &[ValueId]) -> Vec<ValueInfoProto> {
        let mut next = |&id: &ValueId| {
            let value = graph.value(id);
            let beside = match self.told.insert(id) {
                true => None,
                false => self.beside.get_mut(&value.name).and_then(VecDeque::pop_front),
            };
            beside.unwrap_or_else(|| {
                let own = value.info.as_ref().map(|info| info.0.clone()).unwrap_or_default();
                ValueInfoProto { name: Some(value.name.clone()), ..own }
            })
        };
        ids.iter().map(&mut next).collect()
    }
}

struct Encoder {
    embed: bool,
}

impl Encoder {
    fn function(&self, function: &Function) -> FunctionProto {
        let graph = &function.graph;
        let names = |ids: &[ValueId]| ids.iter().map(|&id| graph.value(id).name.clone()).collect();
        let rest = function.rest.clone();
        let mut infos = Declarations::new(graph.rest.0.value_info.iter().cloned());
        FunctionProto {
            node: graph.nodes().map(|(_, node)| self.node(node, graph)).collect(),
            input: names(&graph.inputs),
            output: names(&graph.outputs),
            value_info: infos.of(graph, &graph.declared),
            attribute: function.attributes.clone(),
            attribute_proto: self.attributes(&function.defaults, &rest.attribute_proto),
            opset_import: function.opsets.0.clone(),
            ..rest
        }
    }

    fn graph(&self, graph: &Graph) -> GraphProto {
        let mut rest = graph.rest.0.clone();
        let beside = std::mem::take(&mut rest.output).into_iter().chain(std::mem::take(&mut rest.value_info));
        let mut infos = Declarations::new(beside);
        GraphProto {
            node: graph.nodes().map(|(_, node)| self.node(node, graph)).collect(),
            input: infos.of(graph, &graph.inputs),
            initializer: graph.initializers.iter().filter_map(|&id| self.initializer(graph.value(id))).collect(),
            output: infos.of(graph, &graph.outputs),
            value_info: infos.of(graph, &graph.declared),
            ..rest
        }
    }

    fn initializer(&self, value: &Value) -> Option<TensorProto> {
        let (Def::Default(tensor) | Def::Initializer(tensor)) = &value.def else { return None };
        let proto = self.tensor(tensor);
        Some(TensorProto { name: Some(value.name.clone()), ..proto })
    }

    fn tensor(&self, tensor: &Tensor) -> TensorProto {
        match &tensor.external {
            Some(bytes) if self.embed => TensorProto {
                raw_data: Some(bytes.clone()),
                external_data: Vec::new(),
                data_location: None,
                ..(*tensor.proto).clone()
            },
            _ => (*tensor.proto).clone(),
        }
    }

    fn node(&self, node: &Node, graph: &Graph) -> NodeProto {
        let name = |id: &Option<ValueId>| id.map(|id| graph.value(id).name.clone()).unwrap_or_default();
        let rest = &node.rest.0;
        // The standard domain has two spellings; the file's own stays.
        let alias = node.op.domain.is_empty() && rest.domain.as_deref() == Some("ai.onnx");
        NodeProto {
            input: node.inputs.iter().map(name).collect(),
            output: node.outputs.iter().map(name).collect(),
            name: kept(&node.name, &rest.name),
            op_type: Some(node.op.name.clone()),
            domain: if alias { rest.domain.clone() } else { kept(&node.op.domain, &rest.domain) },
            overload: kept(&node.op.overload, &rest.overload),
            attribute: self.attributes(&node.attributes, &rest.attribute),
            metadata_props: entries(&node.metadata),
            ..rest.clone()
        }
    }

    /// `docs` holds the documentation of attributes, by name.
    fn attributes(&self, attributes: &[(String, Attribute)], docs: &[AttributeProto]) -> Vec<AttributeProto> {
        let doc = |key: &str| docs.iter().find(|doc| doc.name.as_deref() == Some(key))?.doc_string.clone();
        let message = |(key, value): &(String, Attribute)| match value {
            Attribute::Other(opaque) => (*opaque.0).clone(),
            value => AttributeProto { name: Some(key.clone()), doc_string: doc(key), ..self.attribute(value) },
        };
        attributes.iter().map(message).collect()
    }

    /// Type and value of an attribute.
    fn attribute(&self, value: &Attribute) -> AttributeProto {
        let mut proto = AttributeProto::default();
        let kind = match value {
            Attribute::Other(_) => unreachable!("carried as a whole"),
            Attribute::Ref(target, kind) => {
                proto.ref_attr_name = Some(target.clone());
                *kind
            }
            Attribute::Float(x) => {
                proto.f = Some(*x);
                attribute_type::FLOAT
            }
            Attribute::Int(x) => {
                proto.i = Some(*x);
                attribute_type::INT
            }
            Attribute::String(x) => {
                proto.s = Some(x.clone());
                attribute_type::STRING
            }
            Attribute::Tensor(x) => {
                proto.t = Some(Box::new(self.tensor(x)));
                attribute_type::TENSOR
            }
            Attribute::Graph(x) => {
                proto.g = Some(Box::new(self.graph(x)));
                attribute_type::GRAPH
            }
            Attribute::Floats(x) => {
                proto.floats = x.clone();
                attribute_type::FLOATS
            }
            Attribute::Ints(x) => {
                proto.ints = x.clone();
                attribute_type::INTS
            }
            Attribute::Strings(x) => {
                proto.strings = x.clone();
                attribute_type::STRINGS
            }
        };
        // A reference may leave its type out.
        proto.r#type = Some(kind).filter(|&kind| kind != 0);
        proto
    }
}

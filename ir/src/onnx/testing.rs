//! Messages for tests, in few words.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use super::*;
use crate::{DataType, Model};

/// Models of `fixtures/zoo` and of the folder that `VITRIM_ZOO` names.
pub(crate) fn zoo() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/zoo");
    let folders = [own].into_iter().chain(std::env::var_os("VITRIM_ZOO").map(PathBuf::from));
    let entries = folders.filter_map(|folder| folder.read_dir().ok()).flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    paths.sort();
    assert!(!paths.is_empty(), "there are models beside the tests");
    paths
}

/// A node; an empty name is an operand or result left out. `op` may be `domain::Op`.
pub(crate) fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let (domain, op) = op.split_once("::").map_or((None, op), |(domain, op)| (Some(domain.to_owned()), op));
    NodeProto {
        op_type: Some(op.into()),
        domain,
        input: inputs.iter().map(|&name| name.into()).collect(),
        output: outputs.iter().map(|&name| name.into()).collect(),
        ..Default::default()
    }
}

impl NodeProto {
    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    pub(crate) fn with(mut self, name: &str, attribute: AttributeProto) -> Self {
        self.attribute.push(AttributeProto { name: Some(name.into()), ..attribute });
        self
    }

    pub(crate) fn with_graph(self, name: &str, graph: GraphProto) -> Self {
        let r#type = Some(attribute_type::GRAPH);
        self.with(name, AttributeProto { r#type, g: Some(Box::new(graph)), ..Default::default() })
    }

    pub(crate) fn with_int(self, name: &str, value: i64) -> Self {
        let r#type = Some(attribute_type::INT);
        self.with(name, AttributeProto { r#type, i: Some(value), ..Default::default() })
    }

    /// An attribute with the value of the function's attribute `target`.
    pub(crate) fn with_ref(self, name: &str, target: &str, kind: i32) -> Self {
        self.with(name, AttributeProto { r#type: Some(kind), ref_attr_name: Some(target.into()), ..Default::default() })
    }
}

/// A value of type `f32[2]`.
pub(crate) fn info(name: &str) -> ValueInfoProto {
    let ty = crate::TensorType { dtype: DataType::F32, dims: Some(vec![DimSpec::Known(2)]) };
    ValueInfoProto { name: Some(name.into()), ..ValueInfo::of(&ty).0 }
}

/// An initializer of type `f32[2]`.
pub(crate) fn weight(name: &str) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        dims: vec![2],
        data_type: Some(DataType::F32.code()),
        raw_data: Some(Bytes::from_static(&[0, 0, 128, 63, 0, 0, 0, 64])),
        ..Default::default()
    }
}

/// A graph whose inputs and outputs are all `f32[2]`.
pub(crate) fn graph(inputs: &[&str], nodes: Vec<NodeProto>, outputs: &[&str]) -> GraphProto {
    GraphProto {
        name: Some("g".into()),
        node: nodes,
        input: inputs.iter().map(|name| info(name)).collect(),
        output: outputs.iter().map(|name| info(name)).collect(),
        ..Default::default()
    }
}

/// A model of IR version 10 and opset 18.
pub(crate) fn model(graph: GraphProto) -> ModelProto {
    ModelProto { ir_version: Some(10), graph: Some(graph), opset_import: vec![opset("", 18)], ..Default::default() }
}

pub(crate) fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) }
}

/// A function of domain `f` on opset 18.
pub(crate) fn function(name: &str, inputs: &[&str], nodes: Vec<NodeProto>, outputs: &[&str]) -> FunctionProto {
    FunctionProto {
        name: Some(name.into()),
        domain: Some("f".into()),
        input: inputs.iter().map(|&name| name.into()).collect(),
        output: outputs.iter().map(|&name| name.into()).collect(),
        node: nodes,
        opset_import: vec![opset("", 18), opset("f", 1)],
        ..Default::default()
    }
}

/// A model with functions, whose domain it imports.
pub(crate) fn with_functions(graph: GraphProto, functions: Vec<FunctionProto>) -> ModelProto {
    let mut proto = ModelProto { functions, ..model(graph) };
    proto.opset_import.push(opset("f", 1));
    proto
}

impl ModelProto {
    pub(crate) fn bytes(&self) -> Bytes {
        self.encode_to_vec().into()
    }

    /// The model, which must be valid.
    pub(crate) fn read(&self) -> Model {
        let model = Model::from_bytes(self.bytes()).unwrap();
        model.verify().unwrap();
        model
    }
}

impl Model {
    /// The message, which must be that of a valid model that reads back as the same.
    pub(crate) fn message(&self) -> ModelProto {
        self.verify().unwrap();
        encode_model(self, false)
    }

    /// One line per node of the main graph and of those nested in it, such as `y = Add(x, w)`.
    pub(crate) fn lines(&self) -> Vec<String> {
        fn of(graph: &GraphProto, indent: usize, lines: &mut Vec<String>) {
            for node in &graph.node {
                let names = |names: &[String]| names.join(", ");
                let pad = "  ".repeat(indent);
                lines.push(format!("{pad}{} = {}({})", names(&node.output), node.op_type(), names(&node.input)));
                let nested = node.attribute.iter().flat_map(|attribute| &attribute.g);
                nested.for_each(|nested| of(nested, indent + 1, lines));
            }
        }
        let mut lines = Vec::new();
        of(self.message().graph.as_ref().unwrap(), 0, &mut lines);
        lines
    }
}

//! Building a small graph from scratch: function bodies and test models.

use crate::graph::{Attribute, Def, Graph, Names, Node, OpType, Value};
use crate::onnx::{ModelProto, OperatorSetIdProto, ValueInfo};
use crate::{Function, Model, Opsets, Tensor, TensorType, ValueId};

/// Builds a graph node by node. Values are named after the hints given, made unique.
#[derive(Default, Debug)]
pub struct GraphBuilder {
    graph: Graph,
    names: Names,
}

impl GraphBuilder {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    fn value(&mut self, hint: &str, def: Def) -> ValueId {
        let name = self.names.fresh(hint);
        self.graph.add_value(Value::new(name, def))
    }

    /// A graph input; `ty` is left out for the inputs of functions.
    pub fn input(&mut self, name: &str, ty: Option<&TensorType>) -> ValueId {
        let id = self.value(name, Def::Input);
        self.graph.value_mut(id).info = ty.map(ValueInfo::of);
        self.graph.inputs.push(id);
        id
    }

    /// A graph input that is a sequence of tensors of type `ty`.
    pub fn sequence_input(&mut self, name: &str, ty: &TensorType) -> ValueId {
        let id = self.value(name, Def::Input);
        self.graph.value_mut(id).info = Some(ValueInfo::of_sequence(ty));
        self.graph.inputs.push(id);
        id
    }

    /// An initializer. Functions cannot have any: see [`GraphBuilder::tensor`].
    pub fn initializer(&mut self, hint: &str, tensor: Tensor) -> ValueId {
        let id = self.value(hint, Def::Initializer(tensor));
        self.graph.initializers.push(id);
        id
    }

    /// A constant as a `Constant` node, allowed everywhere.
    pub fn tensor(&mut self, hint: &str, tensor: Tensor) -> ValueId {
        self.op("Constant", hint, &[], &[("value", Attribute::Tensor(tensor))])
    }

    /// A standard operator with one result.
    pub fn op(&mut self, op: &str, hint: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        let inputs = inputs.iter().copied().map(Some).collect();
        self.call(OpType::standard(op), hint, inputs, attributes, 1)[0]
    }

    /// Any operator with `results` results.
    pub fn call(
        &mut self,
        op: OpType,
        hint: &str,
        inputs: Vec<Option<ValueId>>,
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let attributes = attributes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let mut node = Node::new(op, inputs, attributes);
        let outputs: Vec<ValueId> = (0..results).map(|_| self.value(hint, Def::Undefined)).collect();
        node.outputs = outputs.iter().copied().map(Some).collect();
        self.graph.add_node(node);
        outputs
    }

    /// Makes `value` a graph output named `name`.
    pub fn output(&mut self, name: &str, value: ValueId, ty: Option<&TensorType>) {
        self.names.take(name);
        let entry = self.graph.value_mut(value);
        entry.name = name.into();
        if let Some(ty) = ty {
            entry.info = Some(ValueInfo::of(ty));
        }
        self.graph.outputs.push(value);
    }

    /// The same with every node named after its first result. ONNX Runtime 1.20 names what it fuses after one of the
    /// nodes, and mixes fusions up whose nodes have no name.
    pub fn with_node_names(mut self) -> Self {
        let first = |node: &Node| Some(self.graph.value(node.output(0)?).name().to_owned());
        let names: Vec<_> = self.graph.nodes().map(|(id, node)| (id, first(node))).collect();
        for (id, name) in names {
            self.graph.node_mut(id).name = name.unwrap_or_default();
        }
        self
    }

    /// The graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    /// A model around the graph.
    pub fn into_model(self, ir_version: i64, opsets: &[(&str, i64)], functions: Vec<Function>) -> Model {
        let entry = |&(domain, version): &(&str, i64)| OperatorSetIdProto {
            domain: Some(domain.into()),
            version: Some(version),
        };
        let mut graph = self.graph;
        graph.rest.0.name = Some("graph".into());
        Model {
            graph,
            functions,
            opsets: Opsets(opsets.iter().map(entry).collect()),
            metadata: Vec::new(),
            source: Default::default(),
            rest: ModelProto {
                ir_version: Some(ir_version),
                producer_name: Some("vitrim".into()),
                ..Default::default()
            },
        }
    }
}

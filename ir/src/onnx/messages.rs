//! The ONNX file format as protobuf messages, written by hand from `onnx.proto`.
//!
//! Protobuf fields that a decoder does not know are dropped when the message is encoded again, so every message and
//! every field of the specification is here, up to IR version 13 (and 14, which adds element types but no fields).
//! The rules of translation:
//!
//! - an optional field is an [`Option`], so that "absent" and "present with the default value" stay different;
//! - repeated numbers are packed exactly where the specification says so (both forms are read);
//! - enumerations are plain `i32`: values that a later version adds pass through;
//! - `bytes` fields are [`Bytes`], which share the buffer they were decoded from: decoding a memory-mapped file copies
//!   no weights;
//! - messages inside an attribute are boxed, since a model has tens of thousands of attributes and few of them hold one.
//!
//! Fields are encoded in the order of their numbers, which is the order that Google's implementations write: a file
//! that one of those wrote is reproduced byte for byte. (One exception: prost writes every member of a `oneof` where the
//! lowest of them belongs, so the denotation of an opaque, optional or sparse tensor type comes after the type.)

use bytes::Bytes;
use prost::{Message, Oneof};

/// A model: a graph, the operator sets that it is written in, and what its producer says about it.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the file format.
    #[prost(int64, optional, tag = "1")]
    pub ir_version: Option<i64>,
    /// Name of the tool that wrote the model.
    #[prost(string, optional, tag = "2")]
    pub producer_name: Option<String>,
    /// Version of the tool that wrote the model.
    #[prost(string, optional, tag = "3")]
    pub producer_version: Option<String>,
    /// Reverse-DNS namespace of the model.
    #[prost(string, optional, tag = "4")]
    pub domain: Option<String>,
    /// Version of the model itself.
    #[prost(int64, optional, tag = "5")]
    pub model_version: Option<i64>,
    /// Markdown for people.
    #[prost(string, optional, tag = "6")]
    pub doc_string: Option<String>,
    /// The graph that inference runs.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets that the graph's nodes are resolved in.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Free key-value pairs.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
    /// Training steps (IR 7).
    #[prost(message, repeated, tag = "20")]
    pub training_info: Vec<TrainingInfoProto>,
    /// Model-local functions (IR 8).
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
    /// Device configurations that nodes refer to by name (IR 11).
    #[prost(message, repeated, tag = "26")]
    pub configuration: Vec<DeviceConfigurationProto>,
}

/// An operator set: a domain at a version.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    /// The domain; absent and empty both mean `ai.onnx`.
    #[prost(string, optional, tag = "1")]
    pub domain: Option<String>,
    /// The version.
    #[prost(int64, optional, tag = "2")]
    pub version: Option<i64>,
}

/// A key-value pair.
#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    /// The key.
    #[prost(string, optional, tag = "1")]
    pub key: Option<String>,
    /// The value.
    #[prost(string, optional, tag = "2")]
    pub value: Option<String>,
}

/// A training step: graphs that initialise and update state, and what their outputs are bound to.
#[derive(Clone, PartialEq, Message)]
pub struct TrainingInfoProto {
    /// Computes initial values.
    #[prost(message, optional, tag = "1")]
    pub initialization: Option<GraphProto>,
    /// Computes one step.
    #[prost(message, optional, tag = "2")]
    pub algorithm: Option<GraphProto>,
    /// Initializer name to the output of `initialization` that sets it.
    #[prost(message, repeated, tag = "3")]
    pub initialization_binding: Vec<StringStringEntryProto>,
    /// Initializer name to the output of `algorithm` that updates it.
    #[prost(message, repeated, tag = "4")]
    pub update_binding: Vec<StringStringEntryProto>,
}

/// A model-local function: an operator whose meaning is a body of nodes.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    /// Name, as the `op_type` of nodes that call it.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Names of the formal inputs.
    #[prost(string, repeated, tag = "4")]
    pub input: Vec<String>,
    /// Names of the formal outputs.
    #[prost(string, repeated, tag = "5")]
    pub output: Vec<String>,
    /// Names of the attributes that have no default.
    #[prost(string, repeated, tag = "6")]
    pub attribute: Vec<String>,
    /// The body, in topological order.
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<NodeProto>,
    /// Markdown for people.
    #[prost(string, optional, tag = "8")]
    pub doc_string: Option<String>,
    /// Operator sets that the body is resolved in.
    #[prost(message, repeated, tag = "9")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Domain of the operator.
    #[prost(string, optional, tag = "10")]
    pub domain: Option<String>,
    /// Attributes with their defaults (IR 9).
    #[prost(message, repeated, tag = "11")]
    pub attribute_proto: Vec<AttributeProto>,
    /// Types of values inside the body (IR 10).
    #[prost(message, repeated, tag = "12")]
    pub value_info: Vec<ValueInfoProto>,
    /// Tells functions of one domain and name apart (IR 10).
    #[prost(string, optional, tag = "13")]
    pub overload: Option<String>,
    /// Free key-value pairs (IR 10).
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// A graph: nodes in topological order, constants, and the values that go in and out.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// Nodes in topological order.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the graph.
    #[prost(string, optional, tag = "2")]
    pub name: Option<String>,
    /// Named constants; one that is also an input is that input's default.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// Markdown for people.
    #[prost(string, optional, tag = "10")]
    pub doc_string: Option<String>,
    /// Inputs.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// Outputs.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
    /// Types of values inside the graph.
    #[prost(message, repeated, tag = "13")]
    pub value_info: Vec<ValueInfoProto>,
    /// Names of the tensors that hold scales and zero points of values.
    #[prost(message, repeated, tag = "14")]
    pub quantization_annotation: Vec<TensorAnnotation>,
    /// Named constants in sparse form; the name is that of `values`.
    #[prost(message, repeated, tag = "15")]
    pub sparse_initializer: Vec<SparseTensorProto>,
    /// Free key-value pairs (IR 10).
    #[prost(message, repeated, tag = "16")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// Quantisation parameters of one value.
#[derive(Clone, PartialEq, Message)]
pub struct TensorAnnotation {
    /// Name of the value.
    #[prost(string, optional, tag = "1")]
    pub tensor_name: Option<String>,
    /// Kind of parameter, such as `SCALE_TENSOR`, to the name of the tensor that holds it.
    #[prost(message, repeated, tag = "2")]
    pub quant_parameter_tensor_names: Vec<StringStringEntryProto>,
}

/// A node: one application of an operator.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of the operands; an empty name is an omitted one.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the results; an empty name is an omitted one.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, optional, tag = "3")]
    pub name: Option<String>,
    /// Name of the operator.
    #[prost(string, optional, tag = "4")]
    pub op_type: Option<String>,
    /// Attributes.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Markdown for people.
    #[prost(string, optional, tag = "6")]
    pub doc_string: Option<String>,
    /// Domain of the operator; absent and empty both mean `ai.onnx`.
    #[prost(string, optional, tag = "7")]
    pub domain: Option<String>,
    /// Which of several functions of one domain and name (IR 10).
    #[prost(string, optional, tag = "8")]
    pub overload: Option<String>,
    /// Free key-value pairs (IR 10).
    #[prost(message, repeated, tag = "9")]
    pub metadata_props: Vec<StringStringEntryProto>,
    /// How the node runs on several devices (IR 11).
    #[prost(message, repeated, tag = "10")]
    pub device_configurations: Vec<NodeDeviceConfigurationProto>,
}

/// An attribute: a name and a value of the kind that `type` names, or a reference to an attribute of the enclosing
/// function.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name of the attribute.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// A float (`type` 1).
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// An integer (`type` 2).
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// A string (`type` 3), not always UTF-8.
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub s: Option<Bytes>,
    /// A tensor (`type` 4).
    #[prost(message, optional, boxed, tag = "5")]
    pub t: Option<Box<TensorProto>>,
    /// A graph (`type` 5).
    #[prost(message, optional, boxed, tag = "6")]
    pub g: Option<Box<GraphProto>>,
    /// Floats (`type` 6).
    #[prost(float, repeated, packed = "false", tag = "7")]
    pub floats: Vec<f32>,
    /// Integers (`type` 7).
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    /// Strings (`type` 8).
    #[prost(bytes = "bytes", repeated, tag = "9")]
    pub strings: Vec<Bytes>,
    /// Tensors (`type` 9).
    #[prost(message, repeated, tag = "10")]
    pub tensors: Vec<TensorProto>,
    /// Graphs (`type` 10).
    #[prost(message, repeated, tag = "11")]
    pub graphs: Vec<GraphProto>,
    /// Markdown for people.
    #[prost(string, optional, tag = "13")]
    pub doc_string: Option<String>,
    /// A type (`type` 13).
    #[prost(message, optional, boxed, tag = "14")]
    pub tp: Option<Box<TypeProto>>,
    /// Types (`type` 14).
    #[prost(message, repeated, tag = "15")]
    pub type_protos: Vec<TypeProto>,
    /// Which of the values is in use; absent in files of IR 1.
    #[prost(int32, optional, tag = "20")]
    pub r#type: Option<i32>,
    /// Name of the attribute of the enclosing function that holds the value.
    #[prost(string, optional, tag = "21")]
    pub ref_attr_name: Option<String>,
    /// A sparse tensor (`type` 11).
    #[prost(message, optional, boxed, tag = "22")]
    pub sparse_tensor: Option<Box<SparseTensorProto>>,
    /// Sparse tensors (`type` 12).
    #[prost(message, repeated, tag = "23")]
    pub sparse_tensors: Vec<SparseTensorProto>,
}

/// A tensor: shape, element type and elements, which lie in `raw_data`, in one of the typed fields or in another file.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Extents.
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    /// Element type.
    #[prost(int32, optional, tag = "2")]
    pub data_type: Option<i32>,
    /// Which part of a larger tensor this is; no known runtime reads it.
    #[prost(message, optional, tag = "3")]
    pub segment: Option<tensor_proto::Segment>,
    /// Elements of FLOAT and COMPLEX64.
    #[prost(float, repeated, packed = "true", tag = "4")]
    pub float_data: Vec<f32>,
    /// Elements of INT32 and of all types of 16 bits and fewer, one or two to a number.
    #[prost(int32, repeated, packed = "true", tag = "5")]
    pub int32_data: Vec<i32>,
    /// Elements of STRING.
    #[prost(bytes = "bytes", repeated, tag = "6")]
    pub string_data: Vec<Bytes>,
    /// Elements of INT64.
    #[prost(int64, repeated, packed = "true", tag = "7")]
    pub int64_data: Vec<i64>,
    /// Name of the value.
    #[prost(string, optional, tag = "8")]
    pub name: Option<String>,
    /// Elements as little-endian bytes.
    #[prost(bytes = "bytes", optional, tag = "9")]
    pub raw_data: Option<Bytes>,
    /// Elements of DOUBLE and COMPLEX128.
    #[prost(double, repeated, packed = "true", tag = "10")]
    pub double_data: Vec<f64>,
    /// Elements of UINT32 and UINT64.
    #[prost(uint64, repeated, packed = "true", tag = "11")]
    pub uint64_data: Vec<u64>,
    /// Markdown for people.
    #[prost(string, optional, tag = "12")]
    pub doc_string: Option<String>,
    /// Where the elements are when `data_location` is EXTERNAL: `location`, `offset`, `length`, `checksum`.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// DEFAULT (0, in this message) or EXTERNAL (1).
    #[prost(int32, optional, tag = "14")]
    pub data_location: Option<i32>,
    /// Free key-value pairs (IR 10).
    #[prost(message, repeated, tag = "16")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// Messages inside [`TensorProto`].
pub mod tensor_proto {
    use super::Message;

    /// A range of elements of a tensor stored in parts.
    #[derive(Clone, PartialEq, Message)]
    pub struct Segment {
        /// First element.
        #[prost(int64, optional, tag = "1")]
        pub begin: Option<i64>,
        /// One past the last element.
        #[prost(int64, optional, tag = "2")]
        pub end: Option<i64>,
    }
}

/// A tensor that lists its non-zero elements.
#[derive(Clone, PartialEq, Message)]
pub struct SparseTensorProto {
    /// The non-zero elements, `[NNZ]`; holds the name.
    #[prost(message, optional, tag = "1")]
    pub values: Option<TensorProto>,
    /// Their places: `[NNZ]` linear or `[NNZ, rank]`, in rising order.
    #[prost(message, optional, tag = "2")]
    pub indices: Option<TensorProto>,
    /// Extents of the dense tensor.
    #[prost(int64, repeated, packed = "false", tag = "3")]
    pub dims: Vec<i64>,
}

/// Name and type of a value.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name of the value.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Type of the value.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
    /// Markdown for people.
    #[prost(string, optional, tag = "3")]
    pub doc_string: Option<String>,
    /// Free key-value pairs (IR 10).
    #[prost(message, repeated, tag = "4")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// The type of a value.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// What the type means, such as `IMAGE`.
    #[prost(string, optional, tag = "6")]
    pub denotation: Option<String>,
    /// The type.
    #[prost(oneof = "type_proto::Value", tags = "1, 4, 5, 7, 8, 9")]
    pub value: Option<type_proto::Value>,
}

/// Messages inside [`TypeProto`].
pub mod type_proto {
    use super::{Message, Oneof, TensorShapeProto, TypeProto};

    /// The kinds of type.
    #[derive(Clone, PartialEq, Oneof)]
    #[allow(clippy::enum_variant_names, reason = "the names of the specification")]
    pub enum Value {
        /// A dense tensor.
        #[prost(message, tag = "1")]
        TensorType(Tensor),
        /// A sequence.
        #[prost(message, tag = "4")]
        SequenceType(Sequence),
        /// A map.
        #[prost(message, tag = "5")]
        MapType(Map),
        /// A type that the standard does not look into.
        #[prost(message, tag = "7")]
        OpaqueType(Opaque),
        /// A sparse tensor.
        #[prost(message, tag = "8")]
        SparseTensorType(SparseTensor),
        /// A value that may be missing.
        #[prost(message, tag = "9")]
        OptionalType(Optional),
    }

    /// A dense tensor.
    #[derive(Clone, PartialEq, Message)]
    pub struct Tensor {
        /// Element type.
        #[prost(int32, optional, tag = "1")]
        pub elem_type: Option<i32>,
        /// Shape; absent means that not even the rank is known.
        #[prost(message, optional, tag = "2")]
        pub shape: Option<TensorShapeProto>,
    }

    /// A sequence.
    #[derive(Clone, PartialEq, Message)]
    pub struct Sequence {
        /// Type of the elements.
        #[prost(message, optional, boxed, tag = "1")]
        pub elem_type: Option<Box<TypeProto>>,
    }

    /// A map.
    #[derive(Clone, PartialEq, Message)]
    pub struct Map {
        /// Element type of the keys: an integer type or STRING.
        #[prost(int32, optional, tag = "1")]
        pub key_type: Option<i32>,
        /// Type of the values.
        #[prost(message, optional, boxed, tag = "2")]
        pub value_type: Option<Box<TypeProto>>,
    }

    /// A value that may be missing.
    #[derive(Clone, PartialEq, Message)]
    pub struct Optional {
        /// Type of the value where there is one.
        #[prost(message, optional, boxed, tag = "1")]
        pub elem_type: Option<Box<TypeProto>>,
    }

    /// A sparse tensor.
    #[derive(Clone, PartialEq, Message)]
    pub struct SparseTensor {
        /// Element type.
        #[prost(int32, optional, tag = "1")]
        pub elem_type: Option<i32>,
        /// Shape of the dense tensor.
        #[prost(message, optional, tag = "2")]
        pub shape: Option<TensorShapeProto>,
    }

    /// A type that the standard does not look into.
    #[derive(Clone, PartialEq, Message)]
    pub struct Opaque {
        /// Domain of the type.
        #[prost(string, optional, tag = "1")]
        pub domain: Option<String>,
        /// Name of the type.
        #[prost(string, optional, tag = "2")]
        pub name: Option<String>,
    }
}

/// The shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// One entry per axis.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<tensor_shape_proto::Dimension>,
}

/// Messages inside [`TensorShapeProto`].
pub mod tensor_shape_proto {
    use super::{Message, Oneof};

    /// One axis.
    #[derive(Clone, PartialEq, Message)]
    pub struct Dimension {
        /// What the axis means, such as `DATA_BATCH`.
        #[prost(string, optional, tag = "3")]
        pub denotation: Option<String>,
        /// Its extent; absent means unknown.
        #[prost(oneof = "dimension::Value", tags = "1, 2")]
        pub value: Option<dimension::Value>,
    }

    /// Messages inside [`Dimension`].
    pub mod dimension {
        use super::Oneof;

        /// An extent.
        #[derive(Clone, PartialEq, Oneof)]
        pub enum Value {
            /// A number.
            #[prost(int64, tag = "1")]
            DimValue(i64),
            /// A symbol; the same symbol stands for the same number throughout a graph.
            #[prost(string, tag = "2")]
            DimParam(String),
        }
    }
}

/// A set of devices that nodes can be spread over (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct DeviceConfigurationProto {
    /// Name of the configuration.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Number of devices.
    #[prost(int32, optional, tag = "2")]
    pub num_devices: Option<i32>,
    /// Names of the devices.
    #[prost(string, repeated, tag = "3")]
    pub device: Vec<String>,
}

/// How a node runs under one device configuration (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct NodeDeviceConfigurationProto {
    /// Name of the configuration.
    #[prost(string, optional, tag = "1")]
    pub configuration_id: Option<String>,
    /// How operands and results are spread.
    #[prost(message, repeated, tag = "2")]
    pub sharding_spec: Vec<ShardingSpecProto>,
    /// Stage of the pipeline.
    #[prost(int32, optional, tag = "3")]
    pub pipeline_stage: Option<i32>,
}

/// How one value is spread over devices (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct ShardingSpecProto {
    /// Name of the value.
    #[prost(string, optional, tag = "1")]
    pub tensor_name: Option<String>,
    /// Devices, or keys of `index_to_device_group_map`.
    #[prost(int64, repeated, packed = "false", tag = "2")]
    pub device: Vec<i64>,
    /// Groups of devices that hold the same part.
    #[prost(message, repeated, tag = "3")]
    pub index_to_device_group_map: Vec<IntIntListEntryProto>,
    /// The axes that are split.
    #[prost(message, repeated, tag = "4")]
    pub sharded_dim: Vec<ShardedDimProto>,
}

/// How one axis is split (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct ShardedDimProto {
    /// The axis; negative ones count from the end.
    #[prost(int64, optional, tag = "1")]
    pub axis: Option<i64>,
    /// The parts, in order.
    #[prost(message, repeated, tag = "2")]
    pub simple_sharding: Vec<SimpleShardedDimProto>,
}

/// A length split evenly (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct SimpleShardedDimProto {
    /// Number of shards.
    #[prost(int64, optional, tag = "3")]
    pub num_shards: Option<i64>,
    /// The length.
    #[prost(oneof = "simple_sharded_dim_proto::Dim", tags = "1, 2")]
    pub dim: Option<simple_sharded_dim_proto::Dim>,
}

/// Messages inside [`SimpleShardedDimProto`].
pub mod simple_sharded_dim_proto {
    use super::Oneof;

    /// A length.
    #[derive(Clone, PartialEq, Oneof)]
    pub enum Dim {
        /// A number.
        #[prost(int64, tag = "1")]
        DimValue(i64),
        /// A symbol.
        #[prost(string, tag = "2")]
        DimParam(String),
    }
}

/// A key and its list (IR 11).
#[derive(Clone, PartialEq, Message)]
pub struct IntIntListEntryProto {
    /// The key.
    #[prost(int64, optional, tag = "1")]
    pub key: Option<i64>,
    /// The list.
    #[prost(int64, repeated, packed = "false", tag = "2")]
    pub value: Vec<i64>,
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    /// A field of wire type 0.
    fn int(number: u64, value: i64) -> Vec<u8> {
        [varint(number << 3), varint(value as u64)].concat()
    }

    /// A field of wire type 2.
    fn bytes(number: u64, value: impl AsRef<[u8]>) -> Vec<u8> {
        let value = value.as_ref();
        [&varint((number << 3) | 2), &varint(value.len() as u64), value].concat()
    }

    /// A field of wire type 5.
    fn float(number: u64, value: f32) -> Vec<u8> {
        [&varint((number << 3) | 5)[..], &value.to_le_bytes()].concat()
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while value >= 0x80 {
            out.push((value as u8) | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
        out
    }

    /// Asserts that `message` is `wire`, in both directions.
    #[track_caller]
    fn same<M: Message + Default + PartialEq + Debug>(message: M, wire: &[Vec<u8>]) {
        let wire = wire.concat();
        assert_eq!(message.encode_to_vec(), wire);
        assert_eq!(M::decode(&wire[..]).unwrap(), message);
    }

    fn text(value: &str) -> Option<String> {
        Some(value.to_owned())
    }

    fn entry(key: &str, value: &str) -> StringStringEntryProto {
        StringStringEntryProto { key: text(key), value: text(value) }
    }

    // The tests below write every field of the specification down as `kind(number, value)`. An empty nested message
    // stands for any: `bytes(7, [])` is a present but empty one.

    #[test]
    fn model_fields() {
        same(
            ModelProto {
                ir_version: Some(13),
                producer_name: text("p"),
                producer_version: text("v"),
                domain: text("d"),
                model_version: Some(-1),
                doc_string: text("m"),
                graph: Some(GraphProto::default()),
                opset_import: vec![OperatorSetIdProto { domain: text("ai.vitrim"), version: Some(1) }],
                metadata_props: vec![entry("k", "")],
                training_info: vec![TrainingInfoProto::default()],
                functions: vec![FunctionProto::default(); 2],
                configuration: vec![DeviceConfigurationProto::default()],
            },
            &[
                int(1, 13),
                bytes(2, "p"),
                bytes(3, "v"),
                bytes(4, "d"),
                int(5, -1),
                bytes(6, "m"),
                bytes(7, []),
                bytes(8, [bytes(1, "ai.vitrim"), int(2, 1)].concat()),
                bytes(14, [bytes(1, "k"), bytes(2, "")].concat()),
                bytes(20, []),
                bytes(25, []),
                bytes(25, []),
                bytes(26, []),
            ],
        );
    }

    #[test]
    fn training_fields() {
        same(
            TrainingInfoProto {
                initialization: Some(GraphProto::default()),
                algorithm: Some(GraphProto::default()),
                initialization_binding: vec![entry("w", "w0")],
                update_binding: vec![entry("w", "w1")],
            },
            &[
                bytes(1, []),
                bytes(2, []),
                bytes(3, [bytes(1, "w"), bytes(2, "w0")].concat()),
                bytes(4, [bytes(1, "w"), bytes(2, "w1")].concat()),
            ],
        );
    }

    #[test]
    fn function_fields() {
        same(
            FunctionProto {
                name: text("Merge"),
                input: vec!["x".into()],
                output: vec!["y".into()],
                attribute: vec!["r".into()],
                node: vec![NodeProto::default()],
                doc_string: text("m"),
                opset_import: vec![OperatorSetIdProto::default()],
                domain: text("ai.vitrim"),
                attribute_proto: vec![AttributeProto::default()],
                value_info: vec![ValueInfoProto::default()],
                overload: text("static"),
                metadata_props: vec![StringStringEntryProto::default()],
            },
            &[
                bytes(1, "Merge"),
                bytes(4, "x"),
                bytes(5, "y"),
                bytes(6, "r"),
                bytes(7, []),
                bytes(8, "m"),
                bytes(9, []),
                bytes(10, "ai.vitrim"),
                bytes(11, []),
                bytes(12, []),
                bytes(13, "static"),
                bytes(14, []),
            ],
        );
    }

    #[test]
    fn graph_fields() {
        same(
            GraphProto {
                node: vec![NodeProto::default()],
                name: text("g"),
                initializer: vec![TensorProto::default()],
                doc_string: text("m"),
                input: vec![ValueInfoProto::default()],
                output: vec![ValueInfoProto::default()],
                value_info: vec![ValueInfoProto::default()],
                quantization_annotation: vec![TensorAnnotation {
                    tensor_name: text("x"),
                    quant_parameter_tensor_names: vec![entry("SCALE_TENSOR", "s")],
                }],
                sparse_initializer: vec![SparseTensorProto {
                    values: Some(TensorProto::default()),
                    indices: Some(TensorProto::default()),
                    dims: vec![2, 300],
                }],
                metadata_props: vec![StringStringEntryProto::default()],
            },
            &[
                bytes(1, []),
                bytes(2, "g"),
                bytes(5, []),
                bytes(10, "m"),
                bytes(11, []),
                bytes(12, []),
                bytes(13, []),
                bytes(14, [bytes(1, "x"), bytes(2, [bytes(1, "SCALE_TENSOR"), bytes(2, "s")].concat())].concat()),
                bytes(15, [bytes(1, []), bytes(2, []), int(3, 2), int(3, 300)].concat()),
                bytes(16, []),
            ],
        );
    }

    #[test]
    fn node_fields() {
        same(
            NodeProto {
                input: vec!["x".into(), String::new()],
                output: vec!["y".into()],
                name: text("n"),
                op_type: text("Merge"),
                attribute: vec![AttributeProto::default()],
                doc_string: text("m"),
                domain: text(""),
                overload: text("static"),
                metadata_props: vec![StringStringEntryProto::default()],
                device_configurations: vec![NodeDeviceConfigurationProto::default()],
            },
            &[
                bytes(1, "x"),
                bytes(1, ""),
                bytes(2, "y"),
                bytes(3, "n"),
                bytes(4, "Merge"),
                bytes(5, []),
                bytes(6, "m"),
                bytes(7, ""),
                bytes(8, "static"),
                bytes(9, []),
                bytes(10, []),
            ],
        );
    }

    #[test]
    fn attribute_fields() {
        same(
            AttributeProto {
                name: text("a"),
                f: Some(0.0),
                i: Some(0),
                s: Some(Bytes::from_static(b"\xff\0")),
                t: Some(Box::default()),
                g: Some(Box::default()),
                floats: vec![1.5, -0.0],
                ints: vec![-1, 0],
                strings: vec![Bytes::new(), Bytes::from_static(b"\xfe")],
                tensors: vec![TensorProto::default()],
                graphs: vec![GraphProto::default()],
                doc_string: text("m"),
                tp: Some(Box::default()),
                type_protos: vec![TypeProto::default()],
                r#type: Some(0),
                ref_attr_name: text("r"),
                sparse_tensor: Some(Box::default()),
                sparse_tensors: vec![SparseTensorProto::default()],
            },
            &[
                bytes(1, "a"),
                float(2, 0.0),
                int(3, 0),
                bytes(4, b"\xff\0"),
                bytes(5, []),
                bytes(6, []),
                float(7, 1.5),
                float(7, -0.0),
                int(8, -1),
                int(8, 0),
                bytes(9, ""),
                bytes(9, b"\xfe"),
                bytes(10, []),
                bytes(11, []),
                bytes(13, "m"),
                bytes(14, []),
                bytes(15, []),
                int(20, 0),
                bytes(21, "r"),
                bytes(22, []),
                bytes(23, []),
            ],
        );
    }

    #[test]
    fn tensor_fields() {
        same(
            TensorProto {
                dims: vec![2, 300],
                data_type: Some(1),
                segment: Some(tensor_proto::Segment { begin: Some(1), end: Some(2) }),
                float_data: vec![1.0, 2.0],
                int32_data: vec![1, 300],
                string_data: vec![Bytes::from_static(b"\xff"), Bytes::new()],
                int64_data: vec![1, 300],
                name: text("w"),
                raw_data: Some(Bytes::new()),
                double_data: vec![1.0],
                uint64_data: vec![u64::MAX],
                doc_string: text("m"),
                external_data: vec![entry("location", "w.bin")],
                data_location: Some(1),
                metadata_props: vec![StringStringEntryProto::default()],
            },
            &[
                int(1, 2),
                int(1, 300),
                int(2, 1),
                bytes(3, [int(1, 1), int(2, 2)].concat()),
                bytes(4, [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat()),
                bytes(5, [1, 0xac, 2]),
                bytes(6, b"\xff"),
                bytes(6, ""),
                bytes(7, [1, 0xac, 2]),
                bytes(8, "w"),
                bytes(9, ""),
                bytes(10, 1f64.to_le_bytes()),
                bytes(11, varint(u64::MAX)),
                bytes(12, "m"),
                bytes(13, [bytes(1, "location"), bytes(2, "w.bin")].concat()),
                int(14, 1),
                bytes(16, []),
            ],
        );
    }

    #[test]
    fn value_info_fields() {
        same(
            ValueInfoProto {
                name: text("x"),
                r#type: Some(TypeProto::default()),
                doc_string: text("m"),
                metadata_props: vec![StringStringEntryProto::default()],
            },
            &[bytes(1, "x"), bytes(2, []), bytes(3, "m"), bytes(4, [])],
        );
    }

    #[test]
    fn type_fields() {
        use type_proto::{Map, Opaque, Optional, Sequence, SparseTensor, Tensor, Value};

        let of = |value| TypeProto { denotation: None, value: Some(value) };
        let float_tensor = || Some(Box::new(of(Value::TensorType(Tensor { elem_type: Some(1), shape: None }))));
        let float_wire = || bytes(1, int(1, 1));

        let shape = TensorShapeProto {
            dim: vec![
                tensor_shape_proto::Dimension {
                    denotation: text("DATA_BATCH"),
                    value: Some(tensor_shape_proto::dimension::Value::DimParam("N".into())),
                },
                tensor_shape_proto::Dimension {
                    denotation: None,
                    value: Some(tensor_shape_proto::dimension::Value::DimValue(0)),
                },
                tensor_shape_proto::Dimension::default(),
            ],
        };
        let shape_wire = || {
            let dims = [bytes(1, [bytes(2, "N"), bytes(3, "DATA_BATCH")].concat()), bytes(1, int(1, 0)), bytes(1, [])];
            bytes(2, dims.concat())
        };

        same(
            TypeProto {
                denotation: text("IMAGE"),
                value: Some(Value::TensorType(Tensor { elem_type: Some(1), shape: Some(shape.clone()) })),
            },
            &[bytes(1, [int(1, 1), shape_wire()].concat()), bytes(6, "IMAGE")],
        );
        same(of(Value::SequenceType(Sequence { elem_type: float_tensor() })), &[bytes(4, bytes(1, float_wire()))]);
        same(
            of(Value::MapType(Map { key_type: Some(7), value_type: float_tensor() })),
            &[bytes(5, [int(1, 7), bytes(2, float_wire())].concat())],
        );
        same(
            of(Value::OpaqueType(Opaque { domain: text("d"), name: text("n") })),
            &[bytes(7, [bytes(1, "d"), bytes(2, "n")].concat())],
        );
        same(
            of(Value::SparseTensorType(SparseTensor { elem_type: Some(1), shape: Some(shape) })),
            &[bytes(8, [int(1, 1), shape_wire()].concat())],
        );
        same(of(Value::OptionalType(Optional { elem_type: float_tensor() })), &[bytes(9, bytes(1, float_wire()))]);
    }

    #[test]
    fn device_fields() {
        same(
            DeviceConfigurationProto { name: text("two"), num_devices: Some(2), device: vec!["a".into(), "b".into()] },
            &[bytes(1, "two"), int(2, 2), bytes(3, "a"), bytes(3, "b")],
        );

        let length = |dim, num_shards| SimpleShardedDimProto { num_shards: Some(num_shards), dim: Some(dim) };
        same(
            NodeDeviceConfigurationProto {
                configuration_id: text("two"),
                sharding_spec: vec![ShardingSpecProto {
                    tensor_name: text("x"),
                    device: vec![-1, 1],
                    index_to_device_group_map: vec![IntIntListEntryProto { key: Some(-1), value: vec![0, 1] }],
                    sharded_dim: vec![ShardedDimProto {
                        axis: Some(-1),
                        simple_sharding: vec![
                            length(simple_sharded_dim_proto::Dim::DimValue(6), 2),
                            length(simple_sharded_dim_proto::Dim::DimParam("N".into()), 3),
                        ],
                    }],
                }],
                pipeline_stage: Some(1),
            },
            &[
                bytes(1, "two"),
                bytes(
                    2,
                    [
                        bytes(1, "x"),
                        int(2, -1),
                        int(2, 1),
                        bytes(3, [int(1, -1), int(2, 0), int(2, 1)].concat()),
                        bytes(
                            4,
                            [
                                int(1, -1),
                                bytes(2, [int(1, 6), int(3, 2)].concat()),
                                bytes(2, [bytes(2, "N"), int(3, 3)].concat()),
                            ]
                            .concat(),
                        ),
                    ]
                    .concat(),
                ),
                int(3, 1),
            ],
        );
    }

    #[test]
    fn raw_data_shares_the_buffer_it_was_decoded_from() {
        let tensor = TensorProto { raw_data: Some(Bytes::from(vec![7; 100])), ..Default::default() };
        let model = ModelProto {
            graph: Some(GraphProto { initializer: vec![tensor], ..Default::default() }),
            ..Default::default()
        };
        let file = Bytes::from(model.encode_to_vec());

        let decoded = ModelProto::decode(file.clone()).unwrap();

        let raw = decoded.graph.as_ref().unwrap().initializer[0].raw_data.as_ref().unwrap();
        assert!(file.as_ptr_range().contains(&raw.as_ptr()));
        assert_eq!(decoded, model);
    }

    #[test]
    fn packed_numbers_are_read_where_the_specification_has_them_unpacked() {
        let attribute = AttributeProto::decode(&bytes(8, [1, 2])[..]).unwrap();
        assert_eq!(attribute.ints, [1, 2]);
        let tensor = TensorProto::decode(&[int(7, 1), int(7, 2)].concat()[..]).unwrap();
        assert_eq!(tensor.int64_data, [1, 2]);
    }
}

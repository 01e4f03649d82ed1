//! The ONNX wire format. This module alone knows the protobuf messages; everything else sees [`crate::Model`].

mod decode;
mod encode;
mod messages;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod untrusted;

pub use decode::DecodeError;
pub(crate) use decode::decode_model;
pub(crate) use encode::{encode_model, same_function};
pub(crate) use messages::*;

use prost::Message;

use crate::{DataType, DimSpec, TensorType};

/// What a node's message has beside the fields that [`crate::Node`] models.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct NodeRest(pub(crate) NodeProto);

/// What a graph's message has beside the fields that [`crate::Graph`] models.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct GraphRest(pub(crate) GraphProto);

/// Declared type of a value with everything else its message says.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct ValueInfo(pub(crate) ValueInfoProto);

impl ValueInfo {
    pub(crate) fn of(ty: &TensorType) -> Self {
        let dim = |dim: &DimSpec| tensor_shape_proto::Dimension {
            denotation: None,
            value: match dim {
                DimSpec::Known(n) => Some(tensor_shape_proto::dimension::Value::DimValue(*n)),
                DimSpec::Named(name) => Some(tensor_shape_proto::dimension::Value::DimParam(name.clone())),
                DimSpec::Unknown => None,
            },
        };
        let shape = ty.dims.as_ref().map(|dims| TensorShapeProto { dim: dims.iter().map(dim).collect() });
        let tensor = type_proto::Tensor { elem_type: Some(ty.dtype.code()), shape };
        let ty = TypeProto { denotation: None, value: Some(type_proto::Value::TensorType(tensor)) };
        Self(ValueInfoProto { r#type: Some(ty), ..Default::default() })
    }

    /// A sequence of tensors of that type.
    pub(crate) fn of_sequence(ty: &TensorType) -> Self {
        let element = Self::of(ty).0.r#type.map(Box::new);
        let sequence = type_proto::Value::SequenceType(type_proto::Sequence { elem_type: element });
        let ty = TypeProto { denotation: None, value: Some(sequence) };
        Self(ValueInfoProto { r#type: Some(ty), ..Default::default() })
    }

    pub(crate) fn tensor_type(&self) -> Option<TensorType> {
        let type_proto::Value::TensorType(tensor) = self.0.r#type.as_ref()?.value.as_ref()? else { return None };
        let dims = tensor.shape.as_ref().map(|shape| {
            let dims = shape.dim.iter().map(|dim| match &dim.value {
                Some(tensor_shape_proto::dimension::Value::DimValue(n)) if *n >= 0 => DimSpec::Known(*n),
                Some(tensor_shape_proto::dimension::Value::DimParam(name)) if !name.is_empty() => {
                    DimSpec::Named(name.clone())
                }
                _ => DimSpec::Unknown,
            });
            dims.collect()
        });
        Some(TensorType { dtype: DataType::from_code(tensor.elem_type.unwrap_or(0)), dims })
    }
}

/// `TensorProto.DataLocation` of elements in another file.
pub(crate) const EXTERNAL: i32 = 1;

/// The external file that a tensor's elements lie in, if they do.
pub(crate) fn external_location(proto: &TensorProto) -> Option<&str> {
    let external = proto.data_location == Some(EXTERNAL);
    external.then(|| external_entry(proto, "location")).flatten()
}

pub(crate) fn external_entry<'t>(proto: &'t TensorProto, key: &str) -> Option<&'t str> {
    proto.external_data.iter().find(|entry| entry.key.as_deref() == Some(key))?.value.as_deref()
}

/// What a copy of an attribute takes, at most about.
pub(crate) fn opaque_bytes(proto: &AttributeProto) -> usize {
    8 * proto.encoded_len()
}

/// Attribute types of the specification (`AttributeProto.AttributeType`).
pub(crate) mod attribute_type {
    /// A float.
    pub const FLOAT: i32 = 1;
    /// An integer.
    pub const INT: i32 = 2;
    /// A string.
    pub const STRING: i32 = 3;
    /// A tensor.
    pub const TENSOR: i32 = 4;
    /// A graph.
    pub const GRAPH: i32 = 5;
    /// Floats.
    pub const FLOATS: i32 = 6;
    /// Integers.
    pub const INTS: i32 = 7;
    /// Strings.
    pub const STRINGS: i32 = 8;
}

//! Graphs of ONNX models: representation, edits, shapes and analysis.
//!
//! [`Model::read`] gives a model whose weights stay in the file's memory map; [`Patch`] describes edits;
//! [`validate`] lists and checks the invariants; [`Model::write`] demands their proof.
#![forbid(unsafe_code)]

mod axes;
mod builder;
mod canonical;
mod dim;
mod fused;
mod graph;
mod id;
mod inline;
mod lift;
mod lower;
mod model;
mod onnx;
mod operands;
mod patch;
mod shapes;
mod tensor;
mod text;
pub mod validate;

pub use axes::{Atom, Axes, Axis, Effect, Layout, Source, Span};
pub use builder::GraphBuilder;
pub use canonical::canonicalise;
pub use dim::Expr;
pub use fused::{FusedAttention, Operands, SkipNorm};
pub use graph::{Attribute, CONSTANTS_APART, Def, Graph, Node, OpType, OpaqueAttribute, Use, Value};
pub use id::{NodeId, ValueId};
pub use inline::{InlineError, inline_functions};
pub use lift::{LIFTED, LiftError, RAISED, lift_opset, raise_opset};
pub use lower::LowerError;
pub use model::{FileError, Function, Model, Opsets};
pub use onnx::DecodeError;
pub use operands::Quantisation;
pub use patch::{Diff, Patch, PatchError};
pub use shapes::Shapes;
pub use tensor::{DataType, DimSpec, Tensor, TensorType};
pub use text::print_graph;
pub use validate::{Verified, Violation, Violations};

/// Attribute type codes of the specification, for references to a function's attributes.
pub mod attribute_type {
    pub use crate::onnx::attribute_type::{FLOAT, FLOATS, INT, INTS, STRING, STRINGS, TENSOR};
}

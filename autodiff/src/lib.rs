//! Reverse-mode differentiation of ONNX graphs.
//!
//! [`gradients`] walks a graph once, from its losses back to the values asked for, and writes the gradients into a
//! [`Patch`](vitrim_ir::Patch) beside the forward nodes. How they pass an operator is said by its [`Rule`]: those of the
//! standard operators are in [`rules`], others come with their operators. A rule writes its vector-Jacobian product with
//! [`Vjp`]; what was stretched by broadcasting is summed in one place, [`Vjp::give`].
//!
//! Only what the values asked for need is computed, and equal nodes are written once. Extents that are unknown when the
//! gradients are written are read at run time.
//!
//! A new rule is one arm of the table in [`rules`], and a case in `tests/gradients.rs` of the root package.
#![forbid(unsafe_code)]

mod emit;
pub mod rules;
mod vjp;
mod walk;

pub use emit::{Emitter, Int};
pub use vjp::Vjp;
pub use walk::{NoGradient, gradients};

/// How gradients pass an operator.
#[derive(Clone, Copy)]
pub enum Rule {
    /// By its vector-Jacobian product.
    Vjp(fn(&mut Vjp<'_, '_>) -> Result<(), Undefined>),
    /// By the vector-Jacobian product of its first result; the others are constant almost everywhere.
    First(fn(&mut Vjp<'_, '_>) -> Result<(), Undefined>),
    /// Not at all: its results are constant almost everywhere, or no numbers.
    Zero,
    /// In no way that is known, and why.
    Undefined(&'static str),
}

/// Why a rule does not hold for a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undefined(pub String);

impl From<&str> for Undefined {
    fn from(reason: &str) -> Self {
        Self(reason.into())
    }
}

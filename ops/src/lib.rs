//! The operators of domain `ai.vitrim`.
//!
//! Each is an ONNX model-local function: its body in standard operators is its meaning and runs in any runtime. A
//! runtime that has a native kernel of the same name uses that instead. One folder per operator; [`DEFS`] lists them.
//!
//! Everything follows from one concept, the *grouping* of N tokens to M slots: `anchor` `[B, M]` names the token that
//! each slot keeps the place of, `assign` `[B, N]` the slot of each token.
#![forbid(unsafe_code)]

mod body;
mod token_assign;
mod token_mean;
mod token_merge;
mod token_restore;
mod token_size;

use vitrim_ir::{Function, OpType};

pub use token_assign::TokenAssign;
pub use token_mean::TokenMean;
pub use token_merge::{TokenMerge, TokenMergeDynamic};
pub use token_restore::TokenRestore;
pub use token_size::TokenSize;

/// The operators' domain.
pub const DOMAIN: &str = "ai.vitrim";
/// The version of the domain that models import.
pub const VERSION: i64 = 1;
/// The lowest version of the standard operator set that bodies can be written in.
pub const MIN_OPSET: i64 = 13;

/// An operator: its name and its meaning.
pub trait OpDef: Sync {
    /// Name within [`DOMAIN`].
    fn name(&self) -> &'static str;

    /// The operator as a function of a model that imports version `opset` (at least [`MIN_OPSET`]) of the standard set.
    fn function(&self, opset: i64) -> Function;

    /// How nodes call it.
    fn op_type(&self) -> OpType {
        OpType::of(DOMAIN, self.name())
    }
}

/// All operators.
pub static DEFS: &[&dyn OpDef] =
    &[&TokenMerge, &TokenMergeDynamic, &TokenSize, &TokenAssign, &TokenRestore, &TokenMean];

//! The operators of domain `ai.vitrim`.
//!
//! Each is an ONNX model-local function: its body in standard operators is its meaning and runs in any runtime. A
//! runtime that has a native kernel of the same name uses that instead. One folder per operator; [`DEFS`] lists them.
//!
//! Everything follows from one concept, the *grouping* of N tokens to M slots: `anchor` `[B, M]` names the token that
//! each slot keeps the place of (−1 for a slot made from scratch), `assign` `[B, N]` the slot of each token (−1 for one
//! that is dropped).
//!
//! Training has operators of its own, which know nothing of tokens: gradients of the standard operators that would take
//! many, and the steps of optimizers.
//!
//! In each folder: `mod.rs` says what the operator is, `body.rs` means it (feature `bodies`), `gradient.rs` says how
//! gradients pass it, or the operator whose gradient it is (feature `gradients`; `gradient.rs` beside the folders lists
//! them), `cpu.rs` and `cuda.rs` are kernels (features `cpu`, `cuda`).
#![deny(unsafe_code)]

pub mod adam_w;
pub mod attention;
#[cfg(feature = "bodies")]
mod body;
pub mod connection_mask;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gelu;
pub mod gelu_grad;
#[cfg(feature = "gradients")]
mod gradient;
mod heads;
pub mod layer_norm_grad;
pub mod masked_softmax;
pub mod softmax_grad;
pub mod token_absorb;
pub mod token_assign;
pub mod token_expand;
pub mod token_mean;
pub mod token_merge;
pub mod token_prune;
pub mod token_restore;
pub mod token_score;
pub mod token_similarity;
pub mod token_size;

#[cfg(feature = "bodies")]
use vitrim_ir::{Function, OpType};

#[cfg(feature = "bodies")]
pub use self::{
    adam_w::AdamW,
    attention::{Attention, ProportionalAttention},
    connection_mask::{ConnectionMask, ConnectionMaskDynamic},
    gelu::{Gelu, TanhGelu},
    gelu_grad::{GeluGrad, TanhGeluGrad},
    layer_norm_grad::LayerNormGrad,
    masked_softmax::MaskedSoftmax,
    softmax_grad::SoftmaxGrad,
    token_absorb::TokenAbsorb,
    token_assign::TokenAssign,
    token_expand::TokenExpand,
    token_mean::TokenMean,
    token_merge::{TokenMerge, TokenMergeDynamic},
    token_prune::{TokenPrune, TokenPruneDynamic},
    token_restore::TokenRestore,
    token_score::TokenScore,
    token_similarity::{CosineSimilarity, ManhattanDistance},
    token_size::TokenSize,
};

#[cfg(feature = "gradients")]
pub use self::gradient::gradient_rule;
pub use self::heads::Heads;

/// The operators' domain.
pub const DOMAIN: &str = "ai.vitrim";
/// The version of the domain that models import.
pub const VERSION: i64 = 1;
/// The lowest version of the standard operator set that bodies can be written in.
pub const MIN_OPSET: i64 = 13;

/// An operator: its name and its meaning.
#[cfg(feature = "bodies")]
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
#[cfg(feature = "bodies")]
pub static DEFS: &[&dyn OpDef] = &[
    &TokenMerge,
    &TokenMergeDynamic,
    &TokenSize,
    &TokenAssign,
    &TokenRestore,
    &TokenMean,
    &Attention,
    &ProportionalAttention,
    &ConnectionMask,
    &ConnectionMaskDynamic,
    &MaskedSoftmax,
    &TokenScore,
    &TokenPrune,
    &TokenPruneDynamic,
    &AdamW,
    &CosineSimilarity,
    &ManhattanDistance,
    &TokenExpand,
    &TokenAbsorb,
    &Gelu,
    &TanhGelu,
    &GeluGrad,
    &TanhGeluGrad,
    &LayerNormGrad,
    &SoftmaxGrad,
];

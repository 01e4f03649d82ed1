//! Recognition of Vision Transformers, and the passes that reduce their tokens.
//!
//! [`recognise`] proves where the tokens run and where they may be regrouped; a pass proposes a [`vitrim_ir::Patch`];
//! [`driver`] applies it, validates the result and records what was done.
#![forbid(unsafe_code)]

pub mod cost;
pub mod dead;
pub mod driver;
pub mod probe;
pub mod recipe;
pub mod recognise;
pub mod reduce;
pub mod schedule;
mod target;

/// Why a model is left alone: what, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no Vision Transformer in the model.
    #[error("no vision transformer found: {0}")]
    NotAVit(String),
    /// A node depends on the number or order of the tokens in a way that no rewrite covers.
    #[error("the tokens cannot be regrouped: {node}: {reason}")]
    Pinned {
        /// The node, as messages name it.
        node: String,
        /// What it does to the tokens.
        reason: String,
    },
    /// A defect of vitrim itself: a pass made a graph that the validator rejects.
    #[error("internal error: {0}")]
    Internal(String),
    /// A request that does not fit the model.
    #[error("{0}")]
    Request(String),
}

//! `TokenAssign`: the slot of every token, from what a merge returns.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `anchor` | `[B, M]` | int64 | the token that each slot keeps the place of |
//! | in `leaving` | `[B, r]` | int64 | tokens that left |
//! | in `into` | `[B, r]` | int64 | the slot that each of them joined |
//! | out `assign` | `[B, M + r]` | int64 | the slot of every token |

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

#[cfg(feature = "bodies")]
pub use body::TokenAssign;

/// The extents of a call, for kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Slots of each, M.
    pub slots: usize,
    /// Tokens of each that left, r.
    pub r: usize,
}

//! `TokenRestore`: slots back to tokens; every token gets a copy of its slot.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `y` | `[B, M, ..]` | any | slots |
//! | in `assign` | `[B, N]` | int64 | the slot of every token |
//! | out `x` | `[B, N, ..]` | as `y` | tokens |

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::TokenRestore;

/// The extents of a call, for kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Slots of each, M.
    pub slots: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Bytes of one slot: its channels, of whatever type.
    pub row_bytes: usize,
}

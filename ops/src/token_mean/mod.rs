//! `TokenMean`: what has an entry for each token, averaged over the tokens of each slot.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `table` | `[N, C]` or `[B, N, C]` | float | an entry for each token |
//! | in `assign` | `[B, N]` | int64 | the slot of every token |
//! | in `size` | `[B, M, 1]` | float32 | tokens in each slot |
//! | out `y` | `[B, M, C]` | as `table` | the mean over each slot |
//!
//! Position tables follow merged tokens so: what a table adds to tokens or multiplies them with, it then adds to their
//! mean, or multiplies it with. Computed in float32; attribute `dtype` is the type of `y`.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::TokenMean;

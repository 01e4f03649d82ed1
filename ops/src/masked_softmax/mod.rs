//! `MaskedSoftmax`: the softmax of attention some of whose connections are closed.
//!
//! Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer
//! Training", AAAI 2023 (arXiv 2211.10801), attention level.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `scores` | `[B, H, N, M]` | float | scaled scores l of queries and keys |
//! | in `mask` | `[B, N, M]` | float32 | 1 where a connection is open, 0 where it is closed, for all heads |
//! | in `size` | `[B, M, 1]` | float32 | original tokens in each key; positive |
//! | out `weights` | `[B, H, N, M]` | as `scores` | (e + `eps` / M) / (Σ e + `eps`), the sum over keys |
//!
//! with e = exp(l + log(size) − peak) · mask, where the peak is the largest l + log(size) of the row, of closed
//! connections too. Rows sum to one. Every connection has the floor `eps` / M / (Σ e + `eps`) at least, and closed ones
//! have no more: the same in all the row (in float16 it rounds to zero). Computed in float32.
//!
//! A row with a score that is NaN or +∞, closed or not, is NaN. One whose scores are all −∞ is as if all were closed.
//!
//! Attributes: `eps` (float; [`EPSILON`] in the paper's models), and `dtype`, the type of `scores`.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::MaskedSoftmax;

/// The `eps` of Tri-Level E-ViT.
pub const EPSILON: f32 = 1e-6;

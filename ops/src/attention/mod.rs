//! `Attention` and `ProportionalAttention`: softmax(scale · q kᵀ) v for every head, without the scores ever being a
//! tensor.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `q` | `[B, N, ·]` | float | queries |
//! | in `k` | `[B, M, ·]` | as `q` | keys |
//! | in `v` | `[B, M, ·]` | as `q` | values |
//! | in `size` | `[B, M, 1]` | float32 | original tokens in each key; positive; `ProportionalAttention` alone |
//! | out `y` | `[B, N, heads · head_dim]` | as `q` | |
//!
//! Each operand may be a wider tensor: its heads are the `heads · head_dim` channels from `q_at`, `k_at` and `v_at` on,
//! head after head. So the three may be one tensor, as a joint projection gives it, and nothing need be split or
//! transposed.
//!
//! Proportional attention (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, equation 1) adds
//! log(size) of the keys to the scores, so that each counts as often as it stands for others. The body does not touch the
//! scores: softmax(l + log s) v = (P [s⊙v]) / (P s) with P = softmax(l), so that sizes scale the values and ride along as
//! one more channel. They are divided by the largest of them first, which changes nothing but keeps float16 in range.
//! Attributes: `heads`, `head_dim`, `q_at`, `k_at`, `v_at`, `scale` (float), and `dtype`, the type of `q`.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

#[cfg(feature = "bodies")]
pub use body::{Attention, ProportionalAttention};

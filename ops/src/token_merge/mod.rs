//! `TokenMerge`: bipartite soft matching and size-weighted merging.
//!
//! Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), sections *Bipartite Soft Matching*
//! and *Tracking Token Size*.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[B, N, C]` | float | tokens |
//! | in `metric` | `[B, N, ·]` | float | cosine similarity of its rows, averaged over heads, decides |
//! | in `size` | `[B, N, 1]` | float32 | original tokens in each token |
//! | out `y` | `[B, M, C]` | as `x` | M = N − r; size-weighted mean of each slot |
//! | out `size_out` | `[B, M, 1]` | float32 | sum of sizes of each slot |
//! | out `anchor` | `[B, M]` | int64 | the token that each slot keeps the place of |
//! | out `leaving` | `[B, r]` | int64 | the tokens that left, the most similar first |
//! | out `into` | `[B, r]` | int64 | the slot that each of them joined |
//!
//! The first `protect` and last `suffix` tokens take no part. Of the others, those at even positions (A) may leave,
//! those at odd positions (B) receive. Each A token draws an edge to its most similar B token; the r strongest merge.
//! Slots: protected tokens at the front, staying A tokens, B tokens, protected tokens at the end. Staying A tokens
//! are in order of position if `protect` is positive, else in order of falling similarity. Among equals the lowest
//! position wins. A row of zeros is similar to nothing (0). Similarity and merging are computed in float32.
//!
//! The heads of the metric are the `heads · head_dim` channels of its operand from `metric_at` on, head after head: the
//! keys as a joint projection of queries, keys and values has them.
//!
//! `TokenMerge` has r and N as attributes (`r`, `tokens`); r must not exceed (N − protect − suffix) / 2.
//! `TokenMergeDynamic` takes r as an input, int64 `[1]`, cut to that limit, and finds N itself.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::{TokenMerge, TokenMergeDynamic};

//! `CosineSimilarity` and `ManhattanDistance`: how close tokens are to each other.
//!
//! Huang et al., "A General and Efficient Training for Transformer via Token Expansion", CVPR 2024 (arXiv 2404.00672),
//! whose expansion and merging ([`token_expand`](crate::token_expand), [`token_absorb`](crate::token_absorb)) go by it.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[B, N, C]` | float | tokens |
//! | out `closeness` | `[B, P, P]` | float32 | of each of P = N − `protect` − `suffix` tokens (row) to each (column) |
//!
//! The first `protect` and last `suffix` tokens take no part. Of the others, scaled to length one: their inner products,
//! and the sums of absolute differences of their channels, times `sign` (1 or −1). The Euclidean distance of rows of length
//! one is √(2 − 2 · cosine), which falls as the cosine rises: it puts tokens in the same order, so there is no operator of
//! its own for it. A row of zeros stays one. What is not a number is the largest there is. Computed in float32.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;

#[cfg(feature = "bodies")]
pub use body::{CosineSimilarity, ManhattanDistance};

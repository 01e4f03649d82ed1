//! `TokenExpand`: a round of widest feature-distribution token expansion.
//!
//! Huang et al., "A General and Efficient Training for Transformer via Token Expansion", CVPR 2024 (arXiv 2404.00672),
//! *widest feature-distribution token expansion* of Figure 1: those tokens are chosen next that are least like those
//! chosen so far.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `closeness` | `[B, P, P]` | float32 | of tokens to each other; no NaN, below infinity |
//! | in `order` | `[B, P]` | int64 | all tokens, those chosen so far first |
//! | out `order_out` | `[B, P]` | int64 | the same, and those next to be chosen behind them |
//!
//! The first `chosen` tokens stay where they are. Another is as close to them as to the closest of them. The least close
//! come first; among equals the one that came first in `order`. So however many a round adds, they are the next.
//!
//! Attributes: `candidates`, which is P, and `chosen`, at least 1 and below P.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;

#[cfg(feature = "bodies")]
pub use body::TokenExpand;

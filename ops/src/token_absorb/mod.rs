//! `TokenAbsorb`: feature-distribution token merging; every token joins the closest of the chosen ones.
//!
//! Huang et al., "A General and Efficient Training for Transformer via Token Expansion", CVPR 2024 (arXiv 2404.00672),
//! *feature-distribution token merging* of Figure 1.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[B, N, C]` | float | tokens |
//! | in `closeness` | `[B, P, P]` | float32 | of P = N − `protect` − `suffix` tokens to each other; no NaN, below infinity |
//! | in `order` | `[B, P]` | int64 | those of the P tokens first that keep their places |
//! | out `y` | `[B, M, C]` | as `x` | M = `protect` + k + `suffix`; the plain mean of each slot |
//! | out `size` | `[B, M, 1]` | float32 | tokens in each slot |
//! | out `anchor` | `[B, M]` | int64 | the token that each slot keeps the place of |
//! | out `assign` | `[B, N]` | int64 | the slot of every token |
//!
//! The first `protect` and last `suffix` tokens stay by themselves. Of the others, the first k of `order` are chosen.
//! Slots: protected tokens at the front, chosen tokens in order, protected tokens at the end. Every other token joins the
//! chosen one that it is closest to; among equals the first slot wins. Means are computed in float32.
//!
//! Attributes: `tokens`, which is N, `keep`, which is k and at least 1, `protect`, `suffix`, and `dtype`, the type of `x`.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::TokenAbsorb;

//! `TokenScore`: how much attention each token receives.
//!
//! Class attention of EViT (Liang et al., "Not All Patches are What You Need", ICLR 2022, arXiv 2202.07800, section
//! *Attentive token identification*) and of Tri-Level E-ViT (Kong et al., "Peeling the Onion", AAAI 2023, arXiv
//! 2211.10801, token level): the attention of the class token, averaged over heads.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `q` | `[B, N, ·]` | float | queries |
//! | in `k` | `[B, M, ·]` | as `q` | keys |
//! | in `size` | `[B, M, 1]` | float32 | how often each key counts; positive |
//! | out `score` | `[B, M]` | float32 | the mean of softmax(scale · q kᵀ + log(size)) over heads and chosen queries |
//!
//! The softmax is over all keys. Chosen are the first `queries` queries, or all where there are no more than that: 1 is
//! the class token; the largest integer is the attention that a token receives from all, for models without a class
//! token. Whatever the type of `q`, all is computed in float32: scores decide which tokens are kept.
//!
//! `q` and `k` may be wider tensors, as for `Attention`. Attributes: `heads`, `head_dim`, `q_at`, `k_at`, `scale`
//! (float), `queries`.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::TokenScore;

use crate::Heads;

/// The extents and attributes of a call, for kernels.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Queries of each, N.
    pub queries: usize,
    /// Keys of each, M.
    pub keys: usize,
    /// Where the heads of `q` are.
    pub q: Heads,
    /// Where the heads of `k` are: as many, and as wide, as those of `q`.
    pub k: Heads,
    /// The factor of the scores.
    pub scale: f32,
    /// How many of the queries are averaged, the first; all where there are fewer.
    pub first: usize,
}

impl Problem {
    /// How many queries are averaged.
    #[cfg(any(feature = "cpu", feature = "cuda"))]
    pub(crate) fn chosen(&self) -> usize {
        self.first.min(self.queries)
    }
}

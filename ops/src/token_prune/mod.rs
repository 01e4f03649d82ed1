//! `TokenPrune`: keeps the tokens of the highest scores.
//!
//! Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR
//! 2022 (arXiv 2202.07800), sections *Attentive token identification* and *Inattentive token fusion*; without the fusion
//! the token level of Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision
//! Transformer Training", AAAI 2023 (arXiv 2211.10801).
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[B, N, C]` | float | tokens |
//! | in `score` | `[B, N]` | float32 | decides, and weighs what is fused |
//! | in `size` | `[B, N, 1]` | float32 | original tokens in each token |
//! | out `y` | `[B, M, C]` | as `x` | the tokens of the slots, as they are |
//! | out `size_out` | `[B, M, 1]` | float32 | their sizes |
//! | out `anchor` | `[B, M]` | int64 | the token that each slot keeps the place of |
//! | out `assign` | `[B, N]` | int64 | the slot of each token; −1 for those that are dropped |
//!
//! The first `protect` and last `suffix` tokens are kept. Of the others, the candidates, the k of the highest scores
//! are. Slots: protected tokens at the front, kept candidates in falling order of score, protected tokens at the end.
//! Among equals the lowest position wins; NaN counts as infinity, the highest score.
//!
//! With `fuse` 1, where any candidate is dropped, there is one more slot behind the kept candidates: Σ score · x of
//! those dropped, whose weights are not normalised. They are assigned to it; its size is 1, its anchor −1, as it takes
//! no token's place. The sum is computed in float32, by kernels in order of position; attribute `dtype` is the type of
//! `x`.
//!
//! `TokenPrune` has k and N as attributes (`keep`, `tokens`); k must not exceed N − protect − suffix.
//! `TokenPruneDynamic` takes k as an input, int64 `[1]`, cut to 0 and that limit, and finds N itself.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::{TokenPrune, TokenPruneDynamic};

/// The extents and attributes of a call, for kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Channels of each token, C.
    pub channels: usize,
    /// Candidates that are kept, k.
    pub keep: usize,
    /// Tokens at the front that are kept.
    pub protect: usize,
    /// Tokens at the end that are kept.
    pub suffix: usize,
    /// Whether those that are dropped become one more slot.
    pub fuse: bool,
}

impl Problem {
    /// Candidates of each image that are dropped; none where fewer are there than are to be kept or protected.
    pub fn dropped(&self) -> Option<usize> {
        let kept = self.protect.checked_add(self.suffix)?.checked_add(self.keep)?;
        self.tokens.checked_sub(kept)
    }

    /// Whether there is a slot of what is dropped.
    pub fn fuses(&self) -> bool {
        self.fuse && self.dropped().is_some_and(|dropped| dropped > 0)
    }

    /// Slots of each image, M; none where [`Self::dropped`] is none.
    pub fn slots(&self) -> Option<usize> {
        Some(self.tokens - self.dropped()? + usize::from(self.fuses()))
    }
}

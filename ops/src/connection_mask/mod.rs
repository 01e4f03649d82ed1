//! `ConnectionMask`: which connections of attention stay in the blocks after one that prunes.
//!
//! Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer
//! Training", AAAI 2023 (arXiv 2211.10801), attention level.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `weights` | `[B, H, N, N]` | float | attention weights of the block that prunes, heads apart |
//! | in `anchor` | `[B, M]` | int64 | the token that each slot keeps the place of |
//! | out `mask` | `[B, M, M]` | float32 | 1 where the connection of row and column stays, else 0 |
//!
//! The first `protect` and last `suffix` slots keep all their connections, rows and columns alike, and their anchors
//! are not read: a slot that was made from scratch (anchor −1) belongs to the last. A connection between two of the
//! others is as strong as the attention weight from the anchor of its row to that of its column, the mean over heads in
//! float32. In every row the `connections` strongest stay, and so do all that equal the weakest of them. At least one
//! stays, at most all do. A mean that is not a number counts as infinite.
//!
//! `ConnectionMask` has the number of connections and M as attributes (`connections`, `slots`).
//! `ConnectionMaskDynamic` takes the former as an input, int64 `[1]`, and finds M itself.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

#[cfg(feature = "bodies")]
pub use body::{ConnectionMask, ConnectionMaskDynamic};

/// The extents and attributes of a call, for kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Heads of the attention, H.
    pub heads: usize,
    /// Tokens of each image, N.
    pub tokens: usize,
    /// Slots of each image, M.
    pub slots: usize,
    /// How many connections stay in a row, beside those that equal the weakest of them.
    pub connections: usize,
    /// Slots at the front that keep all connections.
    pub protect: usize,
    /// Slots at the end that do.
    pub suffix: usize,
}

impl Problem {
    /// The slots whose connections are compared; none where more are protected than there are.
    #[cfg(any(feature = "cpu", feature = "cuda"))]
    fn free(&self) -> Option<std::ops::Range<usize>> {
        let end = self.slots.checked_sub(self.suffix)?;
        (self.protect <= end).then_some(self.protect..end)
    }
}

/// The heads of a tensor `[B, N, W]`: the `heads · head_dim` channels from `at` on, head after head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// The channels of one token, W.
    pub width: usize,
    /// The first channel of the first head.
    pub at: usize,
    /// How many heads there are.
    pub heads: usize,
    /// Channels of each.
    pub head_dim: usize,
}

impl Heads {
    /// Whether there are heads, and the tensor has their channels.
    #[cfg(any(feature = "cpu", feature = "cuda"))]
    pub(crate) fn fit(&self) -> bool {
        let end = self.heads.checked_mul(self.head_dim).and_then(|channels| channels.checked_add(self.at));
        self.heads > 0 && self.head_dim > 0 && end.is_some_and(|end| end <= self.width)
    }
}

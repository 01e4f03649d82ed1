//! Orders of scores.

/// A score and the position that has it, in one number: the smaller the higher the score, then the lower the position.
/// NaN counts as infinity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank(u64);

impl Rank {
    /// Of a position of at most 32 bits.
    pub(crate) fn new(score: f32, position: usize) -> Self {
        // Adding zero makes the two zeros one. Negative numbers have bits that fall as they rise.
        let bits = if score.is_nan() { f32::INFINITY } else { score + 0.0 }.to_bits();
        let falling = if bits >> 31 == 0 { !bits ^ (1 << 31) } else { bits };
        Self(u64::from(falling) << 32 | position as u64)
    }

    /// The position.
    pub(crate) fn position(self) -> usize {
        self.0 as u32 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_fall_and_positions_rise() {
        let inf = f32::INFINITY;
        let scores = [inf, f32::NAN, -f32::NAN, f32::MAX, 1.0, 1e-45, 0.0, -0.0, -1e-45, -2.0, f32::MIN, -inf];
        let mut ranks: Vec<Rank> =
            scores.into_iter().enumerate().map(|(position, score)| Rank::new(score, position)).collect();
        ranks.reverse();
        ranks.sort_unstable();
        assert!(ranks.into_iter().map(Rank::position).eq(0..scores.len()));
    }
}

//! Parts of tensors: a range of positions along one factor of one axis.

use vitrim_ir::Expr;

/// A factor of an axis: the axis has `outer · extent · inner` entries, the last factor varying fastest. Most have an
/// axis of their own; batch and tokens may share one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Factor {
    pub axis: usize,
    pub outer: Expr,
    pub extent: Expr,
    pub inner: Expr,
}

impl Factor {
    /// All of an axis.
    pub fn whole(axis: usize, extent: &Expr) -> Self {
        Self { axis, outer: Expr::known(1), extent: extent.clone(), inner: Expr::known(1) }
    }

    /// Whether it has an axis of its own.
    pub fn is_axis(&self) -> bool {
        self.outer.is(1) && self.inner.is(1)
    }

    /// Entries of its axis where the factor has `extent` positions.
    pub fn entries(&self, extent: &Expr) -> Option<Expr> {
        self.outer.times(extent)?.times(&self.inner)
    }

    /// The same factor where the elements, in row-major order, have the extents `to` and not `from`.
    pub fn reshaped(&self, from: &[Expr], to: &[Expr]) -> Option<Self> {
        let before = Expr::product(&from[..self.axis])?.times(&self.outer)?;
        let mut passed = Expr::known(1);
        for (axis, entries) in to.iter().enumerate() {
            let inner = |outer: &Expr| entries.div_exact(outer)?.div_exact(&self.extent).filter(|inner| !inner.is(0));
            if let Some(outer) = before.div_exact(&passed)
                && let Some(inner) = inner(&outer)
            {
                return Some(Self { axis, outer, extent: self.extent.clone(), inner });
            }
            passed = passed.times(entries)?;
        }
        None
    }
}

/// The positions `start..end` along a factor.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Part {
    pub factor: Factor,
    pub start: i64,
    pub end: i64,
}

/// So many first ones of an unknown number of tokens count as few: class, distillation and register tokens.
const FEW: i64 = 8;

impl Part {
    /// Number of positions.
    pub fn count(&self) -> i64 {
        self.end - self.start
    }

    /// The same positions of a tensor that has the factor on another axis.
    pub fn on_axis(&self, axis: usize) -> Self {
        Self { factor: Factor { axis, ..self.factor.clone() }, ..self.clone() }
    }

    /// The positions from the first to the last of both; `None` where they are of different factors.
    pub fn join(&self, other: &Self) -> Option<Self> {
        let (start, end) = (self.start.min(other.start), self.end.max(other.end));
        (self.factor == other.factor).then(|| Self { start, end, ..self.clone() })
    }

    /// Whether it is worth while to compute it alone: at most half of all positions.
    pub fn is_few(&self) -> bool {
        match self.factor.extent.as_known() {
            Some(extent) => 2 * self.count() <= extent,
            None => self.end <= FEW,
        }
    }

    /// The extents of a tensor that holds this part of the extents `dims`.
    pub fn cut(&self, dims: &[Expr]) -> Option<Vec<Expr>> {
        let mut dims = dims.to_vec();
        *dims.get_mut(self.factor.axis)? = self.factor.entries(&Expr::known(self.count()))?;
        Some(dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e(n: i64) -> Expr {
        Expr::known(n)
    }

    #[test]
    fn a_factor_is_found_again_under_another_shape() {
        let batch = Expr::symbol("batch");
        let own = Factor::whole(1, &e(65));
        let apart = [batch.clone(), e(65), e(48)];
        let flat = [batch.times(&e(65)).unwrap(), e(48)];
        let joined = own.reshaped(&apart, &flat).unwrap();
        assert_eq!(joined, Factor { axis: 0, outer: batch.clone(), extent: e(65), inner: e(1) });
        assert_eq!(joined.reshaped(&flat, &apart).unwrap(), own);
        // Axes of one entry are passed by, channels split off and join again.
        let heads = [batch.clone(), e(1), e(65), e(3), e(16)];
        assert_eq!(own.reshaped(&apart, &heads).unwrap(), Factor::whole(2, &e(65)));
        let with_channels = own.reshaped(&apart, &[batch.clone(), e(65 * 48)]).unwrap();
        assert_eq!(with_channels, Factor { axis: 1, outer: e(1), extent: e(65), inner: e(48) });
    }

    #[test]
    fn a_factor_that_is_split_is_not_found() {
        let own = Factor::whole(0, &e(64));
        assert_eq!(own.reshaped(&[e(64), e(48)], &[e(8), e(8), e(48)]), None);
        // Nor where other entries come to stand before it.
        assert_eq!(own.reshaped(&[e(64), e(64)], &[e(32), e(128)]), None);
    }

    #[test]
    fn few_are_at_most_half() {
        let part = |extent: &Expr, start, end| Part { factor: Factor::whole(1, extent), start, end };
        assert!(part(&e(4), 1, 3).is_few() && !part(&e(5), 1, 4).is_few());
        let unknown = Expr::symbol("tokens");
        assert!(part(&unknown, 0, FEW).is_few() && !part(&unknown, FEW, FEW + 1).is_few());
    }
}

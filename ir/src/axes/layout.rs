//! What an axis of a tensor consists of.

use std::fmt;

use crate::Expr;

/// Which of the tokens an axis holds: all but `front` first and `back` last ones. Negative numbers count entries that
/// stand beside the tokens but are none: a class token that joins late, learned prompts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Span {
    /// Tokens left out at the beginning.
    pub front: i64,
    /// Tokens left out at the end.
    pub back: i64,
}

impl Span {
    /// All tokens.
    pub const ALL: Self = Self { front: 0, back: 0 };

    /// Whether the axis holds nothing but tokens.
    pub fn is_within(self) -> bool {
        self.front >= 0 && self.back >= 0
    }
}

/// A factor of an axis.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Atom {
    /// Anything that is not the token axis: batch, heads, channels. Its extent.
    Plain(Expr),
    /// Tokens in order.
    Tokens {
        /// Which of them.
        span: Span,
        /// Whether entries along the axis are weights that sum to one (the result of a softmax over it).
        weights: bool,
    },
}

/// One axis: a product of atoms, the last one varying fastest. Plain atoms are fused, so that no two stand together;
/// an axis of extent one has none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Axis(pub(super) Vec<Atom>);

impl Axis {
    /// An axis without tokens.
    pub fn plain(extent: &Expr) -> Self {
        if extent.is(1) { Self(Vec::new()) } else { Self(vec![Atom::Plain(extent.clone())]) }
    }

    /// An axis that holds all tokens and nothing else.
    pub fn tokens(span: Span) -> Self {
        Self(vec![Atom::Tokens { span, weights: false }])
    }

    /// An axis of the factors of two, those of the second varying faster.
    pub fn join(slow: &Self, fast: &Self) -> Self {
        Self(slow.0.iter().chain(&fast.0).cloned().collect())
    }

    /// The factors.
    pub fn atoms(&self) -> &[Atom] {
        &self.0
    }

    /// Whether tokens are among its factors.
    pub fn has_tokens(&self) -> bool {
        self.0.iter().any(|atom| matches!(atom, Atom::Tokens { .. }))
    }

    /// The span, if the axis is the token axis alone.
    pub fn only_tokens(&self) -> Option<Span> {
        match self.0.as_slice() {
            [Atom::Tokens { span, .. }] => Some(*span),
            _ => None,
        }
    }

    /// Which tokens it holds, alone or with something else.
    pub fn span(&self) -> Option<Span> {
        self.0.iter().find_map(|atom| if let Atom::Tokens { span, .. } = atom { Some(*span) } else { None })
    }

    /// Whether it is the token axis alone and holds weights that sum to one.
    pub fn is_weights(&self) -> bool {
        matches!(self.0.as_slice(), [Atom::Tokens { weights: true, .. }])
    }

    /// Its extent where there are no tokens in it, else `None`.
    pub fn plain_extent(&self) -> Option<Expr> {
        match self.0.as_slice() {
            [] => Some(Expr::known(1)),
            [Atom::Plain(extent)] => Some(extent.clone()),
            _ => None,
        }
    }

    /// Its extent when there are `tokens` tokens.
    pub fn extent(&self, tokens: &Expr) -> Option<Expr> {
        let mut product = Expr::known(1);
        for atom in &self.0 {
            product = product.times(&atom_extent(atom, tokens)?)?;
        }
        Some(product)
    }

    /// The same axis with its token factors marked as weights, or not.
    pub fn with_weights(&self, weights: bool) -> Self {
        let mark = |atom: &Atom| match atom {
            Atom::Tokens { span, .. } => Atom::Tokens { span: *span, weights },
            plain => plain.clone(),
        };
        Self(self.0.iter().map(mark).collect())
    }

    /// Whether two axes are made of the same factors, whatever is known of weights.
    pub fn same_as(&self, other: &Self) -> bool {
        self.with_weights(false) == other.with_weights(false)
    }
}

fn atom_extent(atom: &Atom, tokens: &Expr) -> Option<Expr> {
    match atom {
        Atom::Plain(extent) => Some(extent.clone()),
        Atom::Tokens { span, .. } => tokens.minus(&Expr::known(span.front + span.back)),
    }
}

/// The axes of a tensor.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layout(pub Vec<Axis>);

impl Layout {
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Whether tokens run along any axis.
    pub fn has_tokens(&self) -> bool {
        self.0.iter().any(Axis::has_tokens)
    }

    /// The axes along which tokens run.
    pub fn token_axes(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&axis| self.0[axis].has_tokens()).collect()
    }

    /// The axis that is the token axis alone, if it is the only one with tokens.
    pub fn token_axis(&self) -> Option<(usize, Span)> {
        match self.token_axes().as_slice() {
            [axis] => Some((*axis, self.0[*axis].only_tokens()?)),
            _ => None,
        }
    }

    /// The layout of the same elements in row-major order under another shape, or why there is none.
    ///
    /// `tokens` is the present token count. Plain factors split where the shape asks for it and divides them; the
    /// token axis never does.
    pub fn reshape(&self, shape: &[Expr], tokens: &Expr) -> Result<Self, String> {
        let mut atoms: std::collections::VecDeque<Atom> =
            self.0.iter().flat_map(|axis| axis.0.iter().cloned()).collect();
        let mut axes = Vec::with_capacity(shape.len());
        for extent in shape {
            let mut left = extent.clone();
            let mut axis: Vec<Atom> = Vec::new();
            while !left.is(1) {
                let atom = atoms.pop_front().ok_or("its shape has more elements than its operand")?;
                let own = atom_extent(&atom, tokens).ok_or("an extent cannot be followed")?;
                let (taken, rest) = if let Some(rest) = left.div_exact(&own) {
                    (atom, rest)
                } else if let (Atom::Plain(_), Some(remainder)) = (&atom, own.div_exact(&left)) {
                    atoms.push_front(Atom::Plain(remainder));
                    (Atom::Plain(left.clone()), Expr::known(1))
                } else if matches!(atom, Atom::Tokens { .. }) {
                    return Err(format!(
                        "it splits the token axis of {own} into windows or a grid, or joins it with something else: {extent}"
                    ));
                } else {
                    return Err(format!("the extent {own} does not divide into {extent}"));
                };
                match (axis.last_mut(), &taken) {
                    (Some(Atom::Plain(last)), Atom::Plain(new)) => {
                        *last = last.times(new).ok_or("an extent overflows")?;
                    }
                    _ => axis.push(taken),
                }
                left = rest;
            }
            axes.push(Axis(axis));
        }
        if atoms.is_empty() { Ok(Self(axes)) } else { Err("its shape has fewer elements than its operand".into()) }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axis = |axis: &Axis| {
            let atoms: Vec<String> = axis
                .0
                .iter()
                .map(|atom| match atom {
                    Atom::Plain(extent) => extent.to_string(),
                    Atom::Tokens { span: Span::ALL, weights: false } => "T".into(),
                    Atom::Tokens { span: Span::ALL, weights: true } => "T̂".into(),
                    Atom::Tokens { span, .. } => format!("T[{}..{}]", span.front, -span.back),
                })
                .collect();
            if atoms.is_empty() { "1".into() } else { atoms.join("·") }
        };
        write!(f, "[{}]", self.0.iter().map(axis).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e(n: i64) -> Expr {
        Expr::known(n)
    }

    #[test]
    fn heads_split_off_and_join_again() {
        let batch = Expr::symbol("batch");
        let start = Layout(vec![Axis::plain(&batch), Axis::tokens(Span::ALL), Axis::plain(&e(144))]);
        let split = start.reshape(&[batch.clone(), e(65), e(3), e(3), e(16)], &e(65)).unwrap();
        assert_eq!(split.to_string(), "[batch, T, 3, 3, 16]");
        let joined = split.reshape(&[batch.times(&e(65)).unwrap(), e(144)], &e(65)).unwrap();
        assert_eq!(joined.to_string(), "[batch·T, 144]");
        assert_eq!(joined.reshape(&[batch, e(65), e(144)], &e(65)).unwrap(), start);
    }

    #[test]
    fn a_grid_of_tokens_is_refused() {
        let start = Layout(vec![Axis::tokens(Span::ALL), Axis::plain(&e(48))]);
        let error = start.reshape(&[e(8), e(8), e(48)], &e(64)).unwrap_err();
        assert!(error.contains("splits the token axis of 64 into windows or a grid"), "{error}");
    }

    #[test]
    fn flattening_tokens_with_channels_keeps_both_factors() {
        let start = Layout(vec![Axis::plain(&Expr::symbol("b")), Axis::tokens(Span::ALL), Axis::plain(&e(48))]);
        let flat = start.reshape(&[Expr::symbol("b"), e(64 * 48)], &e(64)).unwrap();
        assert_eq!(flat.to_string(), "[b, T·48]");
        assert_eq!(flat.0[1].only_tokens(), None);
    }
}

//! Extents that shapes state: numbers where the count of tokens is fixed, and that count itself where it shows only when
//! the model runs.

use vitrim_ir::{Atom, Attribute, Axis, Expr, Span, ValueId};

use super::Rewriter;
use crate::target;

/// One extent of a shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Extent {
    /// A number.
    Known(i64),
    /// As many times the tokens of a span, whose count is known only at run time.
    Tokens(Span, i64),
    /// Known only at run time, and not by the tokens alone: the batch, or what it shares an axis with.
    Open,
}

impl Extent {
    /// An extent without tokens.
    pub fn of(extent: &Expr) -> Self {
        extent.as_known().map_or(Self::Open, Self::Known)
    }

    /// The product of an axis' factors, of which at most one is the tokens.
    pub fn product(factors: impl Iterator<Item = Self>) -> Self {
        factors.fold(Self::Known(1), |product, factor| match (product, factor) {
            (Self::Known(a), Self::Known(b)) => a.checked_mul(b).map_or(Self::Open, Self::Known),
            (Self::Tokens(span, a), Self::Known(b)) | (Self::Known(a), Self::Tokens(span, b)) => {
                a.checked_mul(b).map_or(Self::Open, |times| Self::Tokens(span, times))
            }
            _ => Self::Open,
        })
    }

    pub fn as_known(self) -> Option<i64> {
        if let Self::Known(extent) = self { Some(extent) } else { None }
    }
}

/// What a `Reshape` to these extents has to state: of those that are not known, zero `copies` the operand's in the same
/// place, -1 is what is left, once, and tokens are counted. `None` where that does not suffice.
pub(super) fn reshape_target(extents: &[Extent], copies: impl Fn(usize) -> bool) -> Option<Vec<Extent>> {
    let known: Vec<Option<i64>> = extents.iter().map(|extent| extent.as_known()).collect();
    if let Some(target) = target::reshape_target(&known, &copies) {
        return Some(target.into_iter().map(Extent::Known).collect());
    }
    let mut rest = Some(-1);
    let stated = |(at, extent): (usize, &Extent)| match extent {
        Extent::Known(_) => Some(*extent),
        _ if copies(at) => Some(Extent::Known(0)),
        Extent::Tokens(..) => Some(*extent),
        Extent::Open => rest.take().map(Extent::Known),
    };
    extents.iter().enumerate().map(stated).collect()
}

/// The numbers, if nothing else is among these extents.
pub(super) fn all_known(extents: &[Extent]) -> Option<Vec<i64>> {
    extents.iter().map(|extent| extent.as_known()).collect()
}

impl Rewriter<'_> {
    /// The extent of an axis at a stage.
    pub(super) fn extent(&self, axis: &Axis, stage: usize) -> Extent {
        Extent::product(axis.atoms().iter().map(|atom| match atom {
            Atom::Plain(extent) => Extent::of(extent),
            Atom::Tokens { span, .. } => self.tokens_of(*span, stage),
        }))
    }

    /// How many tokens of a span there are at a stage.
    pub(super) fn tokens_of(&self, span: Span, stage: usize) -> Extent {
        let count = self.stages.count(stage).and_then(|count| count.as_known());
        count.map_or(Extent::Tokens(span, 1), |count| Extent::Known(count - span.front - span.back))
    }

    /// A list of these extents, none of them open: a constant where all are known. `None` where tokens of the stage cannot
    /// be counted.
    pub(super) fn shape(&mut self, extents: &[Extent], stage: usize, hint: &str) -> Option<ValueId> {
        if let Some(known) = all_known(extents) {
            return Some(self.ints(hint, &known));
        }
        let mut parts = Vec::with_capacity(extents.len());
        for (at, extent) in extents.iter().enumerate() {
            let hint = format!("{hint}/extent{at}");
            parts.push(match *extent {
                Extent::Known(extent) => self.ints(&hint, &[extent]),
                Extent::Tokens(span, times) => {
                    let mut count = self.token_count(stage)?;
                    if span.front + span.back != 0 {
                        let others = self.ints(&format!("{hint}/others"), &[span.front + span.back]);
                        count = self.patch.op("Sub", &format!("{hint}/within"), &[count, others], &[]);
                    }
                    if times != 1 {
                        let times = self.ints(&format!("{hint}/times"), &[times]);
                        count = self.patch.op("Mul", &hint, &[count, times], &[]);
                    }
                    count
                }
                Extent::Open => return None,
            });
        }
        Some(self.patch.op("Concat", hint, &parts, &[("axis", Attribute::Int(0))]))
    }

    /// Whether it is known how many tokens there are at a stage, or can be found when the model runs.
    pub(super) fn is_countable(&self, stage: usize) -> bool {
        let known = self.stages.count(stage).is_some_and(|count| count.as_known().is_some());
        known || stage > 0 || self.origin_tokens().is_some()
    }

    /// How many tokens there are at a stage when the model runs, `[1]`.
    fn token_count(&mut self, stage: usize) -> Option<ValueId> {
        let entry = self.stages.entry(stage);
        if entry.count.is_some() {
            return entry.count;
        }
        // Behind an act there is one anchor for each, `[B, M]`.
        let (tokens, axis) = match entry.grouping {
            Some(grouping) => (grouping.anchor, 1),
            None if stage == 0 => (self.vit.axes.origin(), self.origin_tokens()?),
            None => return None,
        };
        let hint = format!("vitrim/stage{stage}/tokens");
        let shape = self.patch.op("Shape", &format!("{hint}/shape"), &[tokens], &[]);
        let axis = self.ints(&format!("{hint}/axis"), &[axis as i64]);
        let count = self.patch.op("Gather", &hint, &[shape, axis], &[("axis", Attribute::Int(0))]);
        self.stages.entry_mut(stage).count = Some(count);
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Extent::{Known, Open, Tokens};

    const ALL: Extent = Tokens(Span::ALL, 1);

    #[test]
    fn products_count_tokens_with_what_is_known_and_nothing_else() {
        let product = |factors: &[Extent]| Extent::product(factors.iter().copied());
        assert_eq!(product(&[]), Known(1));
        assert_eq!(product(&[Known(3), Known(16)]), Known(48));
        assert_eq!(product(&[Known(3), ALL, Known(16)]), Tokens(Span::ALL, 48));
        assert_eq!(product(&[Open, ALL]), Open);
        assert_eq!(product(&[ALL, ALL]), Open);
        assert_eq!(product(&[Known(i64::MAX), Known(2)]), Open);
        assert_eq!(product(&[Tokens(Span::ALL, i64::MAX), Known(2)]), Open);
    }

    #[test]
    fn a_target_counts_tokens_only_where_copies_and_the_rest_do_not_suffice() {
        let target = |extents: &[Extent], copied: &[usize]| reshape_target(extents, |at| copied.contains(&at));
        let known = |extents: &[i64]| Some(extents.iter().copied().map(Known).collect());
        assert_eq!(target(&[Open, Known(65), Known(48)], &[]), known(&[-1, 65, 48]));
        assert_eq!(target(&[Open, ALL, Known(48)], &[0]), known(&[0, -1, 48]));
        assert_eq!(target(&[Open, ALL, Known(3), Known(16)], &[0, 1]), known(&[0, 0, 3, 16]));
        // `[batch · tokens, 48]` to `[batch, tokens, 48]`.
        assert_eq!(target(&[Open, ALL, Known(48)], &[]), Some(vec![Known(-1), ALL, Known(48)]));
        assert_eq!(target(&[ALL, Tokens(Span::ALL, 3)], &[]), Some(vec![ALL, Tokens(Span::ALL, 3)]));
        assert_eq!(target(&[Open, Open, Known(48)], &[]), None);
        assert_eq!(target(&[Open, Open, ALL], &[2]), None);
    }
}

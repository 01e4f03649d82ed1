//! Whole numbers that depend on extents known only at run time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// Expressions with more parts than this are given up: files could make them grow without bound.
const MAX_WEIGHT: u32 = 256;

/// A whole number that may depend on extents known only at run time: a polynomial over symbols with integer
/// coefficients, in normal form, so that equality is structural. Not negative where it is an extent.
///
/// Beside symbols, a polynomial may contain quotients rounded down, and maxima and minima of other expressions.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Expr(
    /// Monomials with their coefficients, sorted; no coefficient is 0.
    Vec<(Monomial, i64)>,
);

/// A product of atoms, sorted, repeated ones written out; the empty product is 1.
type Monomial = Vec<Atom>;

/// What a polynomial is built from. What stands first is what [`Equations`] eliminate first.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Atom {
    /// The largest of at least two expressions, sorted, none of which is a maximum itself.
    Max(Arc<Vec<Expr>>),
    /// The smallest, likewise.
    Min(Arc<Vec<Expr>>),
    /// `floor(a / b)`.
    Quotient(Arc<(Expr, Expr)>),
    /// An extent of which nothing is known but where it occurs.
    Opaque(Arc<str>),
    /// An extent that the file names.
    Symbol(Arc<str>),
}

/// Assumptions under which a lower bound holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Assume {
    /// Every symbol is at least 1.
    Symbols,
    /// Every symbol is at least 1, and so is every quotient that is not negative: no tensor is empty.
    Extents,
}

impl Atom {
    fn weight(&self) -> u32 {
        match self {
            Self::Symbol(_) | Self::Opaque(_) => 1,
            Self::Quotient(parts) => parts.0.weight().saturating_add(parts.1.weight()).saturating_add(1),
            Self::Max(parts) | Self::Min(parts) => parts.iter().fold(1, |sum, part| part.weight().saturating_add(sum)),
        }
    }

    fn at_least(&self, assume: Assume) -> Option<i64> {
        match self {
            Self::Symbol(_) | Self::Opaque(_) => Some(1),
            Self::Quotient(parts) => {
                let least = parts.0.bound(assume)?;
                let quotient = match parts.1.as_known() {
                    Some(divisor) if divisor > 0 => least.div_euclid(divisor),
                    None if least >= 0 && parts.1.bound(assume)? > 0 => 0,
                    _ => return None,
                };
                Some(if assume == Assume::Extents && quotient >= 0 { quotient.max(1) } else { quotient })
            }
            Self::Max(parts) => parts.iter().filter_map(|part| part.bound(assume)).max(),
            Self::Min(parts) => parts.iter().map(|part| part.bound(assume)).min().flatten(),
        }
    }

    fn collect(&self, symbols: &mut BTreeSet<String>) {
        match self {
            Self::Symbol(name) | Self::Opaque(name) => {
                symbols.insert(name.to_string());
            }
            Self::Quotient(parts) => [&parts.0, &parts.1].into_iter().for_each(|part| part.collect(symbols)),
            Self::Max(parts) | Self::Min(parts) => parts.iter().for_each(|part| part.collect(symbols)),
        }
    }

    fn eval(&self, bind: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
        match self {
            Self::Symbol(name) | Self::Opaque(name) => bind(name),
            Self::Quotient(parts) => floor_quotient(parts.0.eval(bind)?, parts.1.eval(bind)?),
            Self::Max(parts) => {
                parts.iter().map(|part| part.eval(bind)).collect::<Option<Vec<i64>>>()?.into_iter().max()
            }
            Self::Min(parts) => {
                parts.iter().map(|part| part.eval(bind)).collect::<Option<Vec<i64>>>()?.into_iter().min()
            }
        }
    }

    /// The atom with `rule` applied to the expressions inside it.
    fn rewrite(&self, rule: &Rule) -> Option<Expr> {
        let each = |parts: &[Expr]| parts.iter().map(|part| part.rewrite(rule)).collect::<Option<Vec<Expr>>>();
        match self {
            Self::Symbol(_) | Self::Opaque(_) => Some(Expr::of(self.clone())),
            Self::Quotient(parts) => parts.0.rewrite(rule)?.quotient(&parts.1.rewrite(rule)?),
            Self::Max(parts) => each(parts)?.into_iter().map(Some).reduce(|a, b| a?.larger(&b?))?,
            Self::Min(parts) => each(parts)?.into_iter().map(Some).reduce(|a, b| a?.smaller(&b?))?,
        }
    }
}

/// "This product of atoms equals that expression."
type Rule = (Monomial, Expr);

/// `a / b` rounded towards negative infinity.
fn floor_quotient(a: i64, b: i64) -> Option<i64> {
    let quotient = a.checked_div(b)?;
    let inexact = a.checked_rem(b)? != 0 && ((a < 0) != (b < 0));
    Some(quotient - i64::from(inexact))
}

/// The product without the factors of another one, if it has them all.
fn without(monomial: &[Atom], factors: &[Atom]) -> Option<Monomial> {
    let mut left = monomial.to_vec();
    for atom in factors {
        left.remove(left.iter().position(|own| own == atom)?);
    }
    Some(left)
}

impl Expr {
    /// The number `n`.
    pub fn known(n: i64) -> Self {
        if n == 0 { Self::default() } else { Self(vec![(Monomial::new(), n)]) }
    }

    /// The extent that is called `name`.
    pub fn symbol(name: &str) -> Self {
        Self::of(Atom::Symbol(name.into()))
    }

    /// An extent of which nothing is known but where it occurs.
    pub(crate) fn opaque(name: &str) -> Self {
        Self::of(Atom::Opaque(name.into()))
    }

    fn of(atom: Atom) -> Self {
        Self(vec![(vec![atom], 1)])
    }

    /// In normal form and within the limits, else `None`.
    fn checked(terms: BTreeMap<Monomial, i64>) -> Option<Self> {
        let expr = Self(terms.into_iter().filter(|(_, factor)| *factor != 0).collect());
        (expr.weight() <= MAX_WEIGHT).then_some(expr)
    }

    fn weight(&self) -> u32 {
        let atoms = self.0.iter().flat_map(|(monomial, _)| monomial);
        atoms.fold(self.0.len().try_into().unwrap_or(u32::MAX), |sum, atom| atom.weight().saturating_add(sum))
    }

    /// The number, if it depends on no symbol.
    pub fn as_known(&self) -> Option<i64> {
        match self.0.as_slice() {
            [] => Some(0),
            [(monomial, n)] if monomial.is_empty() => Some(*n),
            _ => None,
        }
    }

    /// The symbol's name, if it is one symbol and nothing else.
    pub fn as_symbol(&self) -> Option<&str> {
        match self.0.as_slice() {
            [(monomial, 1)] => match monomial.as_slice() {
                [Atom::Symbol(name) | Atom::Opaque(name)] => Some(name),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether it is the number `n`.
    pub fn is(&self, n: i64) -> bool {
        self.as_known() == Some(n)
    }

    /// `self + other`; `None` if coefficients overflow or the expression grows too large, as for all arithmetic here.
    pub fn plus(&self, other: &Self) -> Option<Self> {
        let mut terms: BTreeMap<Monomial, i64> = self.0.iter().cloned().collect();
        for (monomial, factor) in &other.0 {
            let sum = terms.entry(monomial.clone()).or_insert(0);
            *sum = sum.checked_add(*factor)?;
        }
        Self::checked(terms)
    }

    /// `self - other`.
    pub fn minus(&self, other: &Self) -> Option<Self> {
        self.plus(&other.times(&Self::known(-1))?)
    }

    /// `self * other`.
    pub fn times(&self, other: &Self) -> Option<Self> {
        if self.0.len().saturating_mul(other.0.len()) > MAX_WEIGHT as usize * 8 {
            return None;
        }
        let mut terms: BTreeMap<Monomial, i64> = BTreeMap::new();
        for (left, a) in &self.0 {
            for (right, b) in &other.0 {
                let mut monomial = [left.as_slice(), right].concat();
                monomial.sort();
                let sum = terms.entry(monomial).or_insert(0);
                *sum = sum.checked_add(a.checked_mul(*b)?)?;
            }
        }
        Self::checked(terms)
    }

    /// The product of all; 1 if there are none.
    pub fn product<'e>(factors: impl IntoIterator<Item = &'e Self>) -> Option<Self> {
        factors.into_iter().try_fold(Self::known(1), |product, factor| product.times(factor))
    }

    /// The first term in an order of monomials that respects products: by degree, then by atoms.
    fn leading(&self) -> Option<&(Monomial, i64)> {
        self.0.iter().max_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| b.cmp(a)))
    }

    /// `self / by`, if `by` is provably a factor.
    pub fn div_exact(&self, by: &Self) -> Option<Self> {
        let (divisor, coefficient) = by.leading()?;
        let mut rest = self.clone();
        let mut quotient = Self::default();
        while let Some((monomial, factor)) = rest.leading() {
            let left = without(monomial, divisor)?;
            let factor = *factor;
            if factor.checked_rem(*coefficient)? != 0 || quotient.0.len() > MAX_WEIGHT as usize {
                return None;
            }
            let term = Self(vec![(left, factor.checked_div(*coefficient)?)]);
            rest = rest.minus(&term.times(by)?)?;
            quotient = quotient.plus(&term)?;
        }
        Some(quotient)
    }

    /// `floor(self / by)`. Where that cannot be written down (`by` is 0), a symbol of that text.
    pub fn floor_div(&self, by: i64) -> Self {
        self.quotient(&Self::known(by)).unwrap_or_else(|| Self::opaque(&format!("floor(({self})/{by})")))
    }

    /// `floor(self / by)`: what divides exactly is divided, the rest stays a quotient. `None` if `by` is 0.
    pub fn quotient(&self, by: &Self) -> Option<Self> {
        if let (Some(a), Some(b)) = (self.as_known(), by.as_known()) {
            return floor_quotient(a, b).map(Self::known);
        }
        if by.is(0) {
            return None;
        }
        if let Some(exact) = self.div_exact(by) {
            return Some(exact);
        }
        let Some(divisor) = by.as_known().filter(|&divisor| divisor > 0) else {
            return Some(Self::of(Atom::Quotient(Arc::new((self.clone(), by.clone())))));
        };
        // Whole multiples of the divisor move out: floor((4h + 6) / 4) = h + 1 + floor(2 / 4).
        let mut outside = BTreeMap::new();
        let mut inside = BTreeMap::new();
        for (monomial, factor) in &self.0 {
            let (whole, rest) = match monomial.is_empty() {
                true => (factor.checked_div_euclid(divisor)?, factor.checked_rem_euclid(divisor)?),
                false if factor % divisor == 0 => (factor / divisor, 0),
                false => (0, *factor),
            };
            outside.insert(monomial.clone(), whole);
            inside.insert(monomial.clone(), rest);
        }
        let (outside, inside) = (Self::checked(outside)?, Self::checked(inside)?);
        let rest = match inside.as_known() {
            Some(n) => Self::known(n.div_euclid(divisor)),
            None => Self::of(Atom::Quotient(Arc::new((inside, by.clone())))),
        };
        outside.plus(&rest)
    }

    /// The larger one.
    pub fn larger(&self, other: &Self) -> Option<Self> {
        self.extremum(other, true, Assume::Symbols)
    }

    /// The smaller one.
    pub fn smaller(&self, other: &Self) -> Option<Self> {
        self.extremum(other, false, Assume::Symbols)
    }

    /// The larger of two extents, of which none is empty.
    pub(crate) fn larger_extent(&self, other: &Self) -> Option<Self> {
        self.extremum(other, true, Assume::Extents)
    }

    /// The smaller of two extents, of which none is empty.
    pub(crate) fn smaller_extent(&self, other: &Self) -> Option<Self> {
        self.extremum(other, false, Assume::Extents)
    }

    fn extremum(&self, other: &Self, largest: bool, assume: Assume) -> Option<Self> {
        let not_less = |a: &Self, b: &Self| a.minus(b).and_then(|gap| gap.bound(assume)).is_some_and(|gap| gap >= 0);
        if not_less(self, other) {
            return Some(if largest { self.clone() } else { other.clone() });
        }
        if not_less(other, self) {
            return Some(if largest { other.clone() } else { self.clone() });
        }
        let parts_of = |expr: &Self| match expr.0.as_slice() {
            [(monomial, 1)] => match (monomial.as_slice(), largest) {
                ([Atom::Max(parts)], true) | ([Atom::Min(parts)], false) => parts.to_vec(),
                _ => vec![expr.clone()],
            },
            _ => vec![expr.clone()],
        };
        let parts: BTreeSet<Self> = parts_of(self).into_iter().chain(parts_of(other)).collect();
        let mut parts: Vec<Self> = parts.into_iter().collect();
        if parts.len() == 1 {
            return parts.pop();
        }
        let atom = if largest { Atom::Max(Arc::new(parts)) } else { Atom::Min(Arc::new(parts)) };
        (atom.weight() <= MAX_WEIGHT).then(|| Self::of(atom))
    }

    /// A number that it does not fall below, where every symbol is at least 1; `None` if none is known.
    pub fn at_least(&self) -> Option<i64> {
        self.bound(Assume::Symbols)
    }

    /// As [`Expr::at_least`], for an extent of a tensor that is not empty.
    pub(crate) fn extent_at_least(&self) -> Option<i64> {
        self.bound(Assume::Extents)
    }

    fn bound(&self, assume: Assume) -> Option<i64> {
        let mut sum = 0i64;
        for (monomial, factor) in &self.0 {
            if *factor < 0 && !monomial.is_empty() {
                return None;
            }
            let mut least = *factor;
            for atom in monomial {
                least = least.checked_mul(atom.at_least(assume).filter(|&least| least >= 0)?)?;
            }
            sum = sum.checked_add(least)?;
        }
        Some(sum)
    }

    /// The number whose square it is, where that is evident.
    pub fn sqrt_exact(&self) -> Option<Self> {
        let (monomial, factor) = match self.0.as_slice() {
            [] => return Some(Self::default()),
            [term] => term,
            _ => return None,
        };
        let root = factor.checked_isqrt()?;
        let (pairs, odd) = monomial.as_chunks::<2>();
        let even = odd.is_empty() && root * root == *factor && pairs.iter().all(|[a, b]| a == b);
        even.then(|| Self(vec![(pairs.iter().map(|[a, _]| a.clone()).collect(), root)]))
    }

    /// The symbols that it depends on.
    pub fn symbols(&self) -> BTreeSet<String> {
        let mut symbols = BTreeSet::new();
        self.collect(&mut symbols);
        symbols
    }

    fn collect(&self, symbols: &mut BTreeSet<String>) {
        self.0.iter().flat_map(|(monomial, _)| monomial).for_each(|atom| atom.collect(symbols));
    }

    /// Its value where `bind` gives the symbols'.
    pub fn eval(&self, bind: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
        self.0.iter().try_fold(0i64, |sum, (monomial, factor)| {
            let product = monomial.iter().try_fold(*factor, |product, atom| product.checked_mul(atom.eval(bind)?))?;
            sum.checked_add(product)
        })
    }

    /// The expression with one product of atoms replaced wherever it occurs.
    fn rewrite(&self, rule: &Rule) -> Option<Self> {
        let (product, by) = rule;
        self.0.iter().try_fold(Self::default(), |sum, (monomial, factor)| {
            let (mut rest, mut made) = (monomial.clone(), Self::known(*factor));
            while let Some(left) = without(&rest, product) {
                rest = left;
                made = made.times(by)?;
            }
            for atom in &rest {
                made = made.times(&atom.rewrite(rule)?)?;
            }
            sum.plus(&made)
        })
    }
}

/// Equations between expressions that a graph's operators demand, as rules that bring expressions to one form.
#[derive(Clone, Debug, Default)]
pub(crate) struct Equations(Vec<Rule>);

impl Equations {
    /// Rules are applied this often at most, in case they undo each other.
    const MAX_PASSES: usize = 8;
    /// Equations beyond this number are not kept.
    const MAX_RULES: usize = 1 << 8;

    /// Number of equations found.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The expression with what the equations say about its parts put in.
    pub(crate) fn resolve(&self, expr: &Expr) -> Expr {
        let mut resolved = expr.clone();
        for _ in 0..Self::MAX_PASSES {
            if resolved.as_known().is_some() {
                break;
            }
            let next = self.0.iter().try_fold(resolved.clone(), |expr, rule| expr.rewrite(rule));
            match next {
                Some(next) if next != resolved => resolved = next,
                _ => break,
            }
        }
        resolved
    }

    /// Notes that both are equal wherever the model runs at all. A contradiction is ignored: it is the runtime's to report.
    pub(crate) fn equate(&mut self, a: &Expr, b: &Expr) {
        if a == b || self.0.len() >= Self::MAX_RULES {
            return;
        }
        let Some(rule) = self.rule(a, b) else { return };
        self.0.push(rule);
    }

    /// The difference of two equal expressions, solved for one of its products.
    fn rule(&self, a: &Expr, b: &Expr) -> Option<Rule> {
        let mut zero = self.resolve(a).minus(&self.resolve(b))?;
        // Extents are not zero: common factors cancel.
        while let Some(common) = zero.0.first().and_then(|(first, _)| {
            first.iter().find(|atom| zero.0.iter().all(|(monomial, _)| monomial.contains(atom))).cloned()
        }) {
            zero = zero.div_exact(&Expr::of(common))?;
        }
        let divisor = zero.0.iter().fold(0u64, |divisor, (_, factor)| gcd(divisor, factor.unsigned_abs()));
        zero = zero.div_exact(&Expr::known(i64::try_from(divisor).ok()?))?;
        let alone = |monomial: &[Atom]| {
            let [atom] = monomial else { return false };
            let deep = |(other, _): &&(Monomial, i64)| {
                let mut names = BTreeSet::new();
                other.iter().for_each(|part| part.collect(&mut names));
                matches!(atom, Atom::Opaque(name) | Atom::Symbol(name) if names.contains(name.as_ref()))
            };
            zero.0.iter().filter(deep).count() == 1
        };
        let unit = |(monomial, factor): &&(Monomial, i64)| factor.unsigned_abs() == 1 && !monomial.is_empty();
        let opaque = |term: &&(Monomial, i64)| matches!(term.0.as_slice(), [Atom::Opaque(_)]) && alone(&term.0);
        let symbol = |term: &&(Monomial, i64)| matches!(term.0.as_slice(), [Atom::Symbol(_)]) && alone(&term.0);
        let leading = || zero.leading().filter(unit).filter(|(monomial, _)| !is_symbol(monomial) || alone(monomial));
        let found = zero.0.iter().filter(unit).find(opaque).or_else(leading);
        let (product, factor) = found.or_else(|| zero.0.iter().filter(unit).find(symbol))?.clone();
        let rest = zero.minus(&Expr(vec![(product.clone(), factor)]))?.times(&Expr::known(-factor))?;
        Some((product, rest))
    }
}

fn is_symbol(monomial: &[Atom]) -> bool {
    matches!(monomial, [Atom::Symbol(_) | Atom::Opaque(_)])
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl From<i64> for Expr {
    fn from(n: i64) -> Self {
        Self::known(n)
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, name: &str, parts: &[Expr]| {
            write!(f, "{name}(")?;
            for (at, part) in parts.iter().enumerate() {
                write!(f, "{}{part}", if at == 0 { "" } else { "," })?;
            }
            f.write_str(")")
        };
        let bracket = |expr: &Expr| match expr.as_known().is_some() || expr.as_symbol().is_some() {
            true => expr.to_string(),
            false => format!("({expr})"),
        };
        match self {
            Self::Symbol(name) | Self::Opaque(name) => f.write_str(name),
            Self::Quotient(parts) => write!(f, "floor({}/{})", bracket(&parts.0), bracket(&parts.1)),
            Self::Max(parts) => list(f, "max", parts),
            Self::Min(parts) => list(f, "min", parts),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("0");
        }
        // The constant comes last: `h*w+1`.
        let constant = self.0.iter().filter(|(monomial, _)| monomial.is_empty());
        let terms = self.0.iter().filter(|(monomial, _)| !monomial.is_empty()).chain(constant);
        for (at, (monomial, factor)) in terms.enumerate() {
            if *factor < 0 {
                f.write_str("-")?;
            } else if at > 0 {
                f.write_str("+")?;
            }
            for (place, atom) in monomial.iter().enumerate() {
                write!(f, "{}{atom}", if place == 0 { "" } else { "*" })?;
            }
            match (monomial.is_empty(), factor.unsigned_abs()) {
                (true, n) => write!(f, "{n}")?,
                (false, 1) => {}
                (false, n) => write!(f, "*{n}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(name: &str) -> Expr {
        Expr::symbol(name)
    }

    fn n(n: i64) -> Expr {
        Expr::known(n)
    }

    fn show(expr: Option<Expr>) -> String {
        expr.map_or("none".into(), |expr| expr.to_string())
    }

    #[test]
    fn normal_form() {
        let (h, w) = (s("h"), s("w"));
        let tokens = h.times(&w).unwrap().plus(&n(1)).unwrap();
        assert_eq!(tokens.to_string(), "h*w+1");
        assert_eq!(w.times(&h).unwrap().plus(&n(1)).unwrap(), tokens);
        assert_eq!(show(tokens.minus(&h.times(&w).unwrap())), "1");
        assert_eq!(show(s("batch").times(&n(65))), "batch*65");
        assert_eq!(show(n(2).minus(&h)), "-h+2");
        assert_eq!(Expr::known(0), h.minus(&h).unwrap());
        assert_eq!(tokens.symbols().into_iter().collect::<Vec<_>>(), ["h", "w"]);
        assert_eq!(tokens.eval(&|name| Some(if name == "h" { 8 } else { 4 })), Some(33));
        assert_eq!(tokens.eval(&|name| (name == "h").then_some(8)), None);
    }

    #[test]
    fn division() {
        let (b, h) = (s("b"), s("h"));
        let tokens = h.times(&h).unwrap().plus(&n(1)).unwrap();
        let all = Expr::product([&b, &tokens, &n(48)]).unwrap();
        assert_eq!(all.div_exact(&Expr::product([&tokens, &n(16)]).unwrap()), b.times(&n(3)));
        assert_eq!(all.div_exact(&h), None);
        assert_eq!(n(7).div_exact(&n(2)), None);
        assert_eq!(n(7).div_exact(&n(0)), None);
        assert_eq!(h.minus(&n(4)).unwrap().floor_div(4).to_string(), "floor(h/4)-1");
        assert_eq!(n(-7).floor_div(2), n(-4));
        assert_eq!(h.times(&n(8)).unwrap().plus(&n(6)).unwrap().floor_div(4).to_string(), "h*2+1");
        let quotient = h.plus(&n(1)).unwrap().floor_div(2);
        assert_eq!(quotient, h.plus(&n(1)).unwrap().floor_div(2));
        assert_eq!(quotient.eval(&|_| Some(9)), Some(5));
        assert_eq!(quotient.symbols().len(), 1);
        // Nothing panics where there is no answer.
        assert_eq!(h.floor_div(0).eval(&|name| (name == "h").then_some(1)), None);
        assert_eq!(show(n(i64::MIN).quotient(&n(-1))), "none");
        assert_eq!(show(h.quotient(&n(i64::MIN))), format!("floor(h/{})", i64::MIN));
    }

    #[test]
    fn extrema() {
        let (h, w) = (s("h"), s("w"));
        assert_eq!(h.larger(&n(1)), Some(h.clone()));
        assert_eq!(h.smaller(&n(1)), Some(n(1)));
        let either = h.larger(&w).unwrap();
        assert_eq!(either, w.larger(&h).unwrap());
        assert_eq!(either.larger(&h).unwrap(), either);
        assert_eq!(either.to_string(), "max(h,w)");
        // A quotient may be 0; an extent is taken not to be.
        let quotient = h.floor_div(64);
        assert_eq!(show(quotient.larger(&n(1))), "max(1,floor(h/64))");
        assert_eq!(quotient.larger_extent(&n(1)), Some(quotient));
    }

    #[test]
    fn limits() {
        assert_eq!(n(i64::MAX).plus(&n(1)), None);
        assert_eq!(n(i64::MAX).times(&n(2)), None);
        assert_eq!(s("h").times(&n(i64::MAX)).unwrap().eval(&|_| Some(2)), None);
        let sum = (0..400).try_fold(n(0), |sum, at| sum.plus(&s(&format!("s{at}"))));
        assert_eq!(sum, None);
        let nested = (0..400).try_fold(s("h"), |expr, _| expr.plus(&s("h"))?.quotient(&n(3)));
        assert!(nested.is_none_or(|nested| nested.weight() <= MAX_WEIGHT));
        assert_eq!(n(49).sqrt_exact(), Some(n(7)));
        assert_eq!(n(-4).sqrt_exact(), None);
        assert_eq!(Expr::product([&s("h"), &s("h"), &n(4)]).unwrap().sqrt_exact(), s("h").times(&n(2)));
    }

    #[test]
    fn equations() {
        let (b, h, w) = (s("b"), s("h").floor_div(4), s("w").floor_div(4));
        let tokens = h.times(&w).unwrap().plus(&n(1)).unwrap();
        let mut equations = Equations::default();
        equations.equate(&s("c"), &n(3));
        equations.equate(&b.times(&tokens).unwrap(), &b.times(&n(65)).unwrap());
        assert_eq!(equations.resolve(&s("c")), n(3));
        assert_eq!(equations.resolve(&tokens), n(65));
        assert_eq!(equations.resolve(&tokens.times(&b).unwrap()).to_string(), "b*65");
        assert_eq!(equations.resolve(&b), b);
        // Opaque extents give way to named ones, inside quotients too.
        equations.equate(&s("n"), &Expr::opaque("x.0"));
        assert_eq!(equations.resolve(&Expr::opaque("x.0").floor_div(2)).to_string(), "floor(n/2)");
        // Contradictions and circles are ignored.
        let before = equations.len();
        equations.equate(&n(3), &n(4));
        equations.equate(&s("c"), &n(4));
        equations.equate(&s("z"), &s("z").floor_div(2));
        assert!(equations.len() <= before + 1);
        equations.resolve(&s("z"));
    }
}

//! Elements of small tensors.

use std::cmp::Ordering;

use crate::{DataType, Expr};

/// An element of a small tensor: a fraction of expressions, exactly, or a float that is none.
///
/// Exporters compute extents in floating point as well (`floor(height / 16)`), hence the fractions.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Number {
    /// `numerator / denominator`, the denominator positive; in lowest terms where the numerator is known.
    Ratio(Expr, i64),
    /// Any other float.
    Float(f64),
}

/// Largest denominator that a float is taken for a fraction of.
const MAX_DENOMINATOR: i64 = 1 << 12;

impl From<Expr> for Number {
    fn from(expr: Expr) -> Self {
        Self::Ratio(expr, 1)
    }
}

impl Number {
    pub(super) fn known(n: i64) -> Self {
        Self::Ratio(Expr::known(n), 1)
    }

    pub(super) fn boolean(truth: bool) -> Self {
        Self::known(i64::from(truth))
    }

    /// A float as a fraction with a power of two below, if it is one.
    pub(super) fn float(x: f64) -> Self {
        let scaled = x * MAX_DENOMINATOR as f64;
        if scaled.fract() == 0.0 && scaled.abs() < 9e15 {
            Self::ratio(Expr::known(scaled as i64), MAX_DENOMINATOR).unwrap_or(Self::Float(x))
        } else {
            Self::Float(x)
        }
    }

    fn ratio(numerator: Expr, denominator: i64) -> Option<Self> {
        let (mut numerator, mut denominator) = match denominator.signum() {
            0 => return None,
            1 => (numerator, denominator),
            _ => (numerator.times(&Expr::known(-1))?, denominator.checked_neg()?),
        };
        if let Some(whole) = numerator.div_exact(&Expr::known(denominator)) {
            return Some(Self::Ratio(whole, 1));
        }
        if let Some(n) = numerator.as_known() {
            let (mut a, mut b) = (n.unsigned_abs(), denominator.unsigned_abs());
            while b != 0 {
                (a, b) = (b, a % b);
            }
            let common = i64::try_from(a).ok()?;
            (numerator, denominator) = (Expr::known(n / common), denominator / common);
        }
        Some(Self::Ratio(numerator, denominator))
    }

    /// The whole number that it is.
    pub(super) fn whole(&self) -> Option<&Expr> {
        match self {
            Self::Ratio(expr, 1) => Some(expr),
            _ => None,
        }
    }

    /// The number, where it depends on no symbol.
    pub(super) fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Ratio(expr, denominator) => Some(expr.as_known()? as f64 / *denominator as f64),
            Self::Float(x) => Some(*x),
        }
    }

    pub(super) fn is_zero(&self) -> Option<bool> {
        match self {
            Self::Float(x) => Some(*x == 0.0),
            Self::Ratio(expr, _) => match expr.as_known() {
                Some(n) => Some(n == 0),
                None if expr.at_least()? >= 1 => Some(false),
                None => None,
            },
        }
    }

    fn parts(&self) -> Option<(&Expr, i64)> {
        match self {
            Self::Ratio(expr, denominator) => Some((expr, *denominator)),
            Self::Float(_) => None,
        }
    }

    pub(super) fn add(&self, other: &Self) -> Option<Self> {
        let ((a, p), (b, q)) = (self.parts()?, other.parts()?);
        let sum = a.times(&Expr::known(q))?.plus(&b.times(&Expr::known(p))?)?;
        Self::ratio(sum, p.checked_mul(q)?)
    }

    pub(super) fn neg(&self) -> Option<Self> {
        match self {
            Self::Ratio(expr, denominator) => Some(Self::Ratio(expr.times(&Expr::known(-1))?, *denominator)),
            Self::Float(x) => Some(Self::Float(-x)),
        }
    }

    pub(super) fn sub(&self, other: &Self) -> Option<Self> {
        self.add(&other.neg()?)
    }

    pub(super) fn mul(&self, other: &Self) -> Option<Self> {
        let ((a, p), (b, q)) = (self.parts()?, other.parts()?);
        Self::ratio(a.times(b)?, p.checked_mul(q)?)
    }

    /// Exact division.
    pub(super) fn div(&self, other: &Self) -> Option<Self> {
        let ((a, p), (b, q)) = (self.parts()?, other.parts()?);
        let numerator = a.times(&Expr::known(q))?;
        match b.as_known() {
            Some(n) => Self::ratio(numerator, p.checked_mul(n)?),
            None => Self::ratio(numerator.div_exact(b)?, p),
        }
    }

    /// Division of integers as ONNX has it: towards zero.
    pub(super) fn div_integers(&self, other: &Self) -> Option<Self> {
        let (a, b) = (self.whole()?, other.whole()?);
        if let (Some(a), Some(b)) = (a.as_known(), b.as_known()) {
            return Some(Self::known(a.checked_div(b)?));
        }
        if let Some(exact) = a.div_exact(b) {
            return Some(exact.into());
        }
        (a.at_least()? >= 0 && b.at_least()? > 0).then(|| a.quotient(b))?.map(Self::from)
    }

    pub(super) fn floor(&self) -> Option<Self> {
        match self {
            Self::Ratio(expr, 1) => Some(expr.clone().into()),
            Self::Ratio(expr, denominator) => Some(expr.quotient(&Expr::known(*denominator))?.into()),
            Self::Float(x) => Some(Self::float(x.floor())),
        }
    }

    pub(super) fn ceil(&self) -> Option<Self> {
        self.neg()?.floor()?.neg()
    }

    /// Rounded towards zero.
    pub(super) fn truncate(&self) -> Option<Self> {
        match self {
            Self::Ratio(_, 1) => Some(self.clone()),
            Self::Ratio(expr, _) => match (expr.at_least(), expr.as_known()) {
                (Some(least), _) if least >= 0 => self.floor(),
                (_, Some(_)) => self.ceil(),
                _ => None,
            },
            Self::Float(x) => Some(Self::float(x.trunc())),
        }
    }

    pub(super) fn sqrt(&self) -> Option<Self> {
        let (expr, denominator) = self.parts()?;
        let below = Expr::known(denominator).sqrt_exact()?.as_known()?;
        Self::ratio(expr.sqrt_exact()?, below)
    }

    pub(super) fn abs(&self) -> Option<Self> {
        match self {
            Self::Float(x) => Some(Self::Float(x.abs())),
            Self::Ratio(expr, denominator) => match expr.as_known() {
                Some(n) => Some(Self::Ratio(Expr::known(n.checked_abs()?), *denominator)),
                None => (expr.at_least()? >= 0).then(|| self.clone()),
            },
        }
    }

    /// `self` modulo `other`, whole numbers; the result has the sign of `other`.
    pub(super) fn modulo(&self, other: &Self) -> Option<Self> {
        let (a, b) = (self.whole()?, other.whole()?);
        if b.at_least()? <= 0 {
            return None;
        }
        Some(a.minus(&b.times(&a.quotient(b)?)?)?.into())
    }

    /// The larger or the smaller of both.
    pub(super) fn extremum(&self, other: &Self, largest: bool) -> Option<Self> {
        match self.compare(other) {
            Some(order) => Some(if (order == Ordering::Less) == largest { other.clone() } else { self.clone() }),
            None => {
                let (a, b) = (self.whole()?, other.whole()?);
                Some(if largest { a.larger(b)? } else { a.smaller(b)? }.into())
            }
        }
    }

    /// How both compare, where that is the same for all extents.
    pub(super) fn compare(&self, other: &Self) -> Option<Ordering> {
        if let (Some(a), Some(b)) = (self.as_f64(), other.as_f64()) {
            return a.partial_cmp(&b);
        }
        let (gap, _) = match self.sub(other)? {
            Self::Ratio(gap, denominator) => (gap, denominator),
            Self::Float(_) => return None,
        };
        match gap.as_known() {
            Some(n) => Some(n.cmp(&0)),
            None if gap.at_least().is_some_and(|least| least > 0) => Some(Ordering::Greater),
            None => gap.times(&Expr::known(-1))?.at_least().filter(|&least| least > 0).map(|_| Ordering::Less),
        }
    }

    /// The element that a tensor of type `dtype` holds for it, if it can hold it exactly.
    pub(super) fn cast(&self, dtype: DataType) -> Option<Self> {
        let within = |low: i64, high: i64| {
            let cut = self.truncate()?;
            cut.whole()?.as_known().is_none_or(|n| (low..=high).contains(&n)).then_some(cut)
        };
        match dtype {
            DataType::Bool => Some(Self::boolean(!self.is_zero()?)),
            DataType::I64 | DataType::U64 => within(i64::MIN, i64::MAX),
            DataType::I32 => within(i32::MIN.into(), i32::MAX.into()),
            DataType::U32 => within(0, u32::MAX.into()),
            DataType::I16 => within(i16::MIN.into(), i16::MAX.into()),
            DataType::U16 => within(0, u16::MAX.into()),
            DataType::I8 => within(i8::MIN.into(), i8::MAX.into()),
            DataType::U8 => within(0, u8::MAX.into()),
            DataType::F64 => Some(self.clone()),
            DataType::F32 | DataType::F16 | DataType::BF16 => match self.as_f64() {
                Some(x) => Some(Self::float(round(x, dtype))),
                // Extents stay far below the 2^24 up to which the type holds whole numbers exactly.
                None => (dtype == DataType::F32).then(|| self.clone()),
            },
            _ => None,
        }
    }

    /// The number with `change` applied to what is symbolic in it.
    pub(super) fn map(&self, change: impl Fn(&Expr) -> Expr) -> Self {
        match self {
            Self::Ratio(expr, denominator) => {
                let changed = change(expr);
                Self::ratio(changed, *denominator).unwrap_or_else(|| self.clone())
            }
            Self::Float(x) => Self::Float(*x),
        }
    }
}

/// The nearest number that a float type holds; other types are left alone.
pub(super) fn round(x: f64, dtype: DataType) -> f64 {
    match dtype {
        DataType::F32 => f64::from(x as f32),
        DataType::F16 => half::f16::from_f64(x).to_f64(),
        DataType::BF16 => half::bf16::from_f64(x).to_f64(),
        _ => x,
    }
}

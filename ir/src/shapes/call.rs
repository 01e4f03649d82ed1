//! A call of an operator as the rules see it.

use std::borrow::Cow;
use std::sync::Arc;

use super::Fact;
use super::number::Number;
use crate::dim::Equations;
use crate::{DataType, Expr, Node};

/// Extents of a tensor.
pub(super) type Dims = Vec<Expr>;

/// Why something is not known.
pub(super) type Why = Arc<str>;

/// The shape of one result, or why it is not known.
pub(super) type Known<T> = Result<T, Why>;

/// Tensors of higher rank are given up; nothing makes them.
const MAX_RANK: usize = 64;

/// A call of an operator: its attributes and what is known of its operands.
pub(super) struct Call<'c> {
    pub node: &'c Node,
    pub inputs: Vec<Option<&'c Fact>>,
    /// Version of the standard operator set.
    pub opset: i64,
    /// Where equations that the operator demands are noted.
    pub equations: &'c mut Equations,
    /// Whether there is a rule for the operator.
    pub ruled: bool,
    /// What names of extents that are new here start with.
    pub names: &'c dyn Fn(usize, usize) -> Expr,
}

/// The reason that a rule gives for a number that it cannot write down.
pub(super) fn too_large() -> Why {
    "an extent is too large or too complicated".into()
}

/// Positive axis number of `axis` in a tensor of rank `rank`.
pub(super) fn axis_of(axis: i64, rank: usize) -> Known<usize> {
    let signed = i64::try_from(rank).map_err(|_| too_large())?;
    let positive = if axis < 0 { axis.checked_add(signed) } else { Some(axis) };
    match positive {
        Some(positive) if (0..signed).contains(&positive) => Ok(positive as usize),
        _ => Err(format!("axis {axis} does not exist in a tensor of rank {rank}").into()),
    }
}

pub(super) fn plus(a: &Expr, b: &Expr) -> Known<Expr> {
    a.plus(b).ok_or_else(too_large)
}

pub(super) fn times(a: &Expr, b: &Expr) -> Known<Expr> {
    a.times(b).ok_or_else(too_large)
}

pub(super) fn product<'e>(factors: impl IntoIterator<Item = &'e Expr>) -> Known<Expr> {
    Expr::product(factors).ok_or_else(too_large)
}

impl<'c> Call<'c> {
    /// How messages name the operator.
    pub fn op(&self) -> String {
        self.node.op.to_string()
    }

    /// A reason that names the operator.
    pub fn why<T>(&self, what: &str) -> Known<T> {
        Err(format!("{}: {what}", self.op()).into())
    }

    /// What is known of operand `slot`, if it is given.
    pub fn fact(&self, slot: usize) -> Option<&'c Fact> {
        self.inputs.get(slot).copied().flatten()
    }

    pub fn has(&self, slot: usize) -> bool {
        self.fact(slot).is_some()
    }

    /// The extents of operand `slot`.
    pub fn dims(&self, slot: usize) -> Known<&'c [Expr]> {
        match self.fact(slot) {
            Some(Fact { dims: Some(dims), .. }) => Ok(dims),
            Some(Fact { reason: Some(reason), .. }) => Err(reason.clone()),
            Some(_) => self.why(&format!("the shape of operand {slot} is not known")),
            None => self.why(&format!("operand {slot} is missing")),
        }
    }

    /// The extents of operand `slot`, which must have rank `N`.
    pub fn dims_of_rank<const N: usize>(&self, slot: usize) -> Known<&'c [Expr; N]> {
        match self.dims(slot)?.try_into() {
            Ok(dims) => Ok(dims),
            Err(_) => self.why(&format!("operand {slot} does not have rank {N}")),
        }
    }

    pub fn rank(&self, slot: usize) -> Known<usize> {
        self.dims(slot).map(<[Expr]>::len)
    }

    pub fn dtype(&self, slot: usize) -> Option<DataType> {
        self.fact(slot)?.dtype
    }

    /// The elements of operand `slot`, each if known.
    pub fn items(&self, slot: usize) -> Option<&'c [Option<Number>]> {
        self.fact(slot)?.items.as_deref()
    }

    /// The elements of operand `slot`, if all are whole numbers that depend on nothing.
    pub fn known_ints(&self, slot: usize) -> Option<Vec<i64>> {
        self.items(slot)?.iter().map(|item| item.as_ref()?.whole()?.as_known()).collect()
    }

    /// The only element of operand `slot`.
    pub fn scalar(&self, slot: usize) -> Option<&'c Number> {
        match self.items(slot)? {
            [item] => item.as_ref(),
            _ => None,
        }
    }

    /// A list of integers that old operator sets have as attribute `name` and new ones as operand `slot`.
    /// `Ok(None)` if it is left out.
    pub fn list(&self, name: &str, slot: usize) -> Known<Option<Cow<'c, [i64]>>> {
        if let Some(list) = self.node.ints(name) {
            return Ok(Some(Cow::Borrowed(list)));
        }
        match (self.fact(slot), self.known_ints(slot)) {
            (None, _) => Ok(None),
            (Some(_), Some(list)) => Ok(Some(Cow::Owned(list))),
            (Some(_), None) => self.why(&format!("operand {slot} ({name}) is computed at run time")),
        }
    }

    /// The axis that attribute `name` gives.
    pub fn axis(&self, name: &str, default: i64, rank: usize) -> Known<usize> {
        axis_of(self.node.int(name).unwrap_or(default), rank).map_err(|why| format!("{}: {why}", self.op()).into())
    }

    /// Each of `axes` as a positive number; doubles are refused.
    pub fn axes(&self, axes: &[i64], rank: usize) -> Known<Vec<usize>> {
        let mut found = Vec::with_capacity(axes.len().min(MAX_RANK));
        for &axis in axes {
            let axis = axis_of(axis, rank).map_err(|why| Why::from(format!("{}: {why}", self.op())))?;
            if found.contains(&axis) {
                return self.why("an axis is listed twice");
            }
            found.push(axis);
        }
        Ok(found)
    }

    /// An extent of result `slot` of which nothing is known.
    pub fn fresh(&self, slot: usize, axis: usize) -> Expr {
        (self.names)(slot, axis)
    }

    /// Extents of result `slot` of which only the rank is known.
    pub fn fresh_dims(&self, slot: usize, rank: usize) -> Known<Dims> {
        if rank > MAX_RANK {
            return self.why("the rank is too large");
        }
        Ok((0..rank).map(|axis| self.fresh(slot, axis)).collect())
    }

    /// Two extents that must be equal, as one.
    pub fn same(&mut self, a: &Expr, b: &Expr) -> Expr {
        self.equations.equate(a, b);
        if b.as_known().is_some() { b.clone() } else { a.clone() }
    }

    /// Two extents of which each may be 1 where the other is not.
    pub fn broadcast_one(&mut self, a: &Expr, b: &Expr) -> Known<Expr> {
        if a == b || b.is(1) {
            return Ok(a.clone());
        }
        if a.is(1) {
            return Ok(b.clone());
        }
        let is_one = |expr: &Expr| expr.extent_at_least().is_none_or(|least| least < 2);
        match (a.as_known(), b.as_known()) {
            (Some(a), Some(b)) => self.why(&format!("extents {a} and {b} do not fit together")),
            (None, None) if is_one(a) && is_one(b) => a.larger_extent(b).ok_or_else(too_large),
            (Some(0), None) | (None, Some(0)) => Ok(Expr::known(0)),
            _ => {
                if !is_one(a) && !is_one(b) {
                    return Ok(self.same(a, b));
                }
                Ok(if is_one(a) { b.clone() } else { a.clone() })
            }
        }
    }

    /// The shape that both broadcast to.
    pub fn broadcast(&mut self, a: &[Expr], b: &[Expr]) -> Known<Dims> {
        let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
        let offset = long.len() - short.len();
        let mut dims = long[..offset].to_vec();
        for (left, right) in long[offset..].iter().zip(short) {
            dims.push(self.broadcast_one(left, right)?);
        }
        Ok(dims)
    }

    /// The shape that all operands in `slots` broadcast to.
    pub fn broadcast_all(&mut self, slots: impl IntoIterator<Item = usize>) -> Known<Dims> {
        let mut result = Dims::new();
        for slot in slots {
            if self.has(slot) {
                let dims = self.dims(slot)?;
                result = self.broadcast(&result, dims)?;
            }
        }
        Ok(result)
    }

    /// The extents that the elements of operand `slot` spell out, as far as they are known.
    pub fn extents(&self, slot: usize) -> Known<Vec<Option<Expr>>> {
        if let Some(items) = self.items(slot) {
            return Ok(items.iter().map(|item| item.as_ref()?.whole().cloned()).collect());
        }
        let [len] = self.dims_of_rank::<1>(slot)?;
        match len.as_known().and_then(|len| usize::try_from(len).ok()).filter(|&len| len <= MAX_RANK) {
            Some(len) => Ok(vec![None; len]),
            None => self.why(&format!("the length of operand {slot} is not known")),
        }
    }
}

//! Shapes, element types and small integer contents of a graph's values, inferred from its operators.
//!
//! Extents are expressions over the symbols of the graph's inputs. What files declare of intermediate values counts only
//! where the operators leave something open, for such declarations go stale. Operators also demand equations between
//! extents (a convolution fixes the channels of its operand): these are put into all extents.

mod call;
mod contents;
mod dims;
mod dtypes;
mod engine;
mod linear;
mod number;
mod sequences;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::{DataType, Expr, Model, ValueId};
use number::Number;
pub(crate) use sequences::{Cuts, MAX_SEQUENCE, Sizes};

/// Elements are tracked of tensors that have at most this many.
const MAX_ITEMS: usize = 64;

/// What is known of one value.
#[derive(Clone, Debug, Default, PartialEq)]
struct Fact {
    dims: Option<Vec<Expr>>,
    dtype: Option<DataType>,
    /// Elements in row-major order, each if known.
    items: Option<Vec<Option<Number>>>,
    uniform: Option<f64>,
    data: bool,
    reason: Option<Arc<str>>,
    /// The tensors of a sequence.
    sequence: Option<Arc<Vec<Fact>>>,
}

/// What is known of the values of a model's main graph, for one revision of it.
#[derive(Clone, Debug)]
pub struct Shapes {
    facts: Vec<Entry>,
}

/// What is known of a value, as it is asked for.
#[derive(Clone, Debug, Default)]
struct Entry {
    dims: Option<Vec<Expr>>,
    dtype: Option<DataType>,
    ints: Option<Vec<Expr>>,
    uniform: Option<f64>,
    data: bool,
    reason: Option<Arc<str>>,
}

impl From<Fact> for Entry {
    fn from(fact: Fact) -> Self {
        let whole = fact.dtype.is_some_and(|dtype| dtype.is_integer() || dtype == DataType::Bool);
        let flat = fact.dims.as_ref().is_some_and(|dims| dims.len() <= 1);
        let items = fact.items.filter(|_| whole && flat);
        let ints = items.and_then(|items| items.into_iter().map(|item| item?.whole().cloned()).collect());
        let Fact { dims, dtype, uniform, data, reason, .. } = fact;
        Self { reason: if dims.is_some() { None } else { reason }, dims, dtype, ints, uniform, data }
    }
}

impl Shapes {
    /// Infers what the operators of the model's main graph make of its inputs.
    pub fn infer(model: &Model) -> Self {
        Self { facts: engine::infer(model).into_iter().map(Entry::from).collect() }
    }

    fn entry(&self, value: ValueId) -> Option<&Entry> {
        self.facts.get(value.slot())
    }

    /// Extents, where the rank is known. An extent of which nothing is known is a symbol of its own, named after the
    /// value and the axis.
    pub fn dims(&self, value: ValueId) -> Option<&[Expr]> {
        self.entry(value)?.dims.as_deref()
    }

    /// Element type.
    pub fn dtype(&self, value: ValueId) -> Option<DataType> {
        self.entry(value)?.dtype
    }

    /// Elements of an integer or boolean tensor of rank 0 or 1 with at most 64 elements, where all are known.
    pub fn ints(&self, value: ValueId) -> Option<&[Expr]> {
        self.entry(value)?.ints.as_deref()
    }

    /// The number that every element of the tensor equals, whatever its extents.
    pub fn uniform(&self, value: ValueId) -> Option<f64> {
        self.entry(value)?.uniform
    }

    /// Whether the value depends on graph inputs through their content, not just through their extents.
    pub fn is_data(&self, value: ValueId) -> bool {
        self.entry(value).is_some_and(|entry| entry.data)
    }

    /// Why its shape is not known.
    pub fn reason(&self, value: ValueId) -> Option<&str> {
        self.entry(value)?.reason.as_deref()
    }
}

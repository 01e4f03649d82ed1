//! What a rule works with: one node, the gradients of its results, and those to be given of its operands.

use std::ops::{Deref, DerefMut};

use vitrim_ir::{Node, ValueId};

use crate::{Emitter, Undefined};

/// The vector-Jacobian product of one node under construction. Writes nodes as [`Emitter`] does.
pub struct Vjp<'a, 'p> {
    /// The node.
    pub node: &'a Node,
    pub(crate) emit: &'a mut Emitter<'p>,
    pub(crate) dys: Vec<Option<ValueId>>,
    pub(crate) wanted: Vec<bool>,
    pub(crate) given: Vec<(usize, ValueId)>,
}

impl<'p> Deref for Vjp<'_, 'p> {
    type Target = Emitter<'p>;

    fn deref(&self) -> &Self::Target {
        self.emit
    }
}

impl DerefMut for Vjp<'_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.emit
    }
}

impl Vjp<'_, '_> {
    /// Operand `slot`.
    pub fn x(&self, slot: usize) -> Result<ValueId, Undefined> {
        self.node.input(slot).ok_or_else(|| Undefined(format!("operand {slot} is missing")))
    }

    /// Result `slot`.
    pub fn y(&self, slot: usize) -> Result<ValueId, Undefined> {
        self.node.output(slot).ok_or_else(|| Undefined(format!("result {slot} is missing")))
    }

    /// The gradient of the first result.
    pub fn dy(&self) -> Result<ValueId, Undefined> {
        self.dy_of(0).ok_or_else(|| "only its first result can have a gradient".into())
    }

    /// The gradient of result `slot`; none where no loss depends on it.
    pub fn dy_of(&self, slot: usize) -> Option<ValueId> {
        self.dys.get(slot).copied().flatten()
    }

    /// Whether the gradient of operand `slot` is asked for.
    pub fn wants(&self, slot: usize) -> bool {
        self.wanted.get(slot).copied().unwrap_or(false)
    }

    /// Gives the gradient of operand `slot`, of the operand's extents.
    pub fn give(&mut self, slot: usize, gradient: ValueId) {
        if self.wants(slot) {
            self.given.push((slot, gradient));
        }
    }

    /// Gives the gradient of an operand that broadcasting stretched to the first result: `gradient` has the extents of
    /// the result.
    pub fn give_broadcast(&mut self, slot: usize, gradient: ValueId) -> Result<(), Undefined> {
        if !self.wants(slot) {
            return Ok(());
        }
        let (x, y) = (self.x(slot)?, self.y(0)?);
        let from = self.dims(y)?;
        let gradient = self.sum_to(gradient, from, x)?;
        self.give(slot, gradient);
        Ok(())
    }

    /// An axis of `rank` as the node's attribute `name` says, counted from the front.
    pub fn axis(&self, name: &str, default: i64, rank: usize) -> Result<usize, Undefined> {
        let axis = self.node.int(name).unwrap_or(default);
        let axis = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(axis)
            .ok()
            .filter(|&axis| axis < rank)
            .ok_or_else(|| Undefined(format!("it has no axis {axis}")))
    }

    /// The node's operator on the same operands with the same attributes, with all of its first `results` results.
    pub fn again(&mut self, results: usize) -> Vec<ValueId> {
        let attributes: Vec<_> =
            self.node.attributes.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        self.emit.call(self.node.op.clone(), &self.node.inputs, &attributes, results)
    }

    /// The integers of operand `slot`, which must be constant.
    pub fn int_operand(&self, slot: usize) -> Result<Vec<i64>, Undefined> {
        let ints = self.shapes.ints(self.x(slot)?);
        let known = ints.and_then(|ints| ints.iter().map(vitrim_ir::Expr::as_known).collect());
        known.ok_or_else(|| Undefined(format!("operand {slot} is known only at run time: make it constant")))
    }

    /// The axes of a reduction, counted from the front: operand 1 or attribute `axes`; all where it names none.
    pub fn reduced_axes(&self) -> Result<Vec<i64>, Undefined> {
        let rank = self.rank(self.x(0)?)? as i64;
        let axes = match (self.node.input(1), self.node.ints("axes")) {
            (Some(_), _) => self.int_operand(1)?,
            (None, Some(axes)) => axes.to_vec(),
            (None, None) => Vec::new(),
        };
        if axes.is_empty() {
            let none = self.node.int("noop_with_empty_axes") == Some(1);
            return Ok(if none { Vec::new() } else { (0..rank).collect() });
        }
        let axes = axes.into_iter().map(|axis| if axis < 0 { axis + rank } else { axis });
        let mut axes: Vec<i64> = axes.collect();
        axes.sort_unstable();
        axes.dedup();
        if axes.iter().any(|&axis| axis < 0 || axis >= rank) {
            return Err("it reduces an axis that its operand does not have".into());
        }
        Ok(axes)
    }
}

//! Tensors in one arrangement, `[batch, tokens, …]`, whatever their own is, and back; and what has an entry for each slot
//! where it meets them.

use vitrim_ir::{Atom, Attribute, Expr, Layout, Span, ValueId};
use vitrim_ops::TokenRestore;

use super::Rewriter;
use super::extents::{Extent, reshape_target};
use crate::Refusal;

/// What a factor of an axis stands for.
#[derive(Clone, Debug, PartialEq)]
enum Role {
    Batch,
    Tokens(Span),
    Other(Expr),
}

/// The factors of a tensor's axes.
#[derive(Clone, Debug)]
pub(super) struct Arrangement {
    axes: Vec<Vec<Role>>,
}

/// Where the batch is in a tensor.
#[derive(Clone, Debug, PartialEq)]
enum BatchAxis {
    Own(usize),
    /// Together with something else that varies faster: heads.
    Shared(usize, i64),
    /// There is one image, and no axis for it.
    Absent,
}

/// A tensor that others are broadcast to: how many axes it has, and which of them holds the images.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Frame {
    rank: usize,
    batch: BatchAxis,
}

impl Frame {
    /// The scores `[B, H, N, N]` of a fused attention.
    pub fn scores() -> Self {
        Self { rank: 4, batch: BatchAxis::Own(0) }
    }

    /// Of `[B, M, 1]` and the like: the batch first, and `rank` axes.
    pub fn is_batch_first(&self, rank: usize) -> bool {
        self.batch == BatchAxis::Own(0) && self.rank == rank
    }

    /// How many axes.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The axis that holds images and nothing else.
    pub fn batch_axis(&self) -> Option<usize> {
        match self.batch {
            BatchAxis::Own(axis) => Some(axis),
            _ => None,
        }
    }

    /// Heads that share their axis with the images, and that axis.
    pub fn shared(&self) -> Option<(usize, i64)> {
        match self.batch {
            BatchAxis::Shared(axis, heads) => Some((axis, heads)),
            _ => None,
        }
    }
}

impl Rewriter<'_> {
    /// The factors of a layout, the images among them found by their number: the first factor that equals it, else the
    /// first that has it as a factor. A single image may have an axis of its own.
    pub(super) fn arrangement(&self, layout: &Layout) -> Arrangement {
        let batch = self.vit.axes.batch();
        let roles = |atom: &Atom| match atom {
            Atom::Plain(extent) => Role::Other(extent.clone()),
            Atom::Tokens { span, .. } => Role::Tokens(*span),
        };
        let mut axes: Vec<Vec<Role>> = layout.0.iter().map(|axis| axis.atoms().iter().map(roles).collect()).collect();
        if batch.is(1) {
            if let Some(free) = axes.iter_mut().find(|axis| axis.is_empty()) {
                free.push(Role::Batch);
            }
        } else if let Some(own) = axes.iter_mut().flatten().find(|role| **role == Role::Other(batch.clone())) {
            *own = Role::Batch;
        } else {
            let quotient = |role: &Role| if let Role::Other(extent) = role { extent.div_exact(batch) } else { None };
            'split: for axis in &mut axes {
                for at in 0..axis.len() {
                    if let Some(rest) = quotient(&axis[at]) {
                        axis.splice(at..=at, [Role::Batch, Role::Other(rest)]);
                        break 'split;
                    }
                }
            }
        }
        Arrangement { axes }
    }

    /// Where what is broadcast to a tensor of this layout finds the images; `None` where it cannot be told.
    pub(super) fn frame(&self, layout: &Layout) -> Option<Frame> {
        let axes = self.arrangement(layout).axes;
        let at = axes.iter().position(|axis| axis.contains(&Role::Batch));
        let batch = match at.map(|at| (at, axes[at].as_slice())) {
            None if self.vit.axes.batch().is(1) => BatchAxis::Absent,
            Some((at, [Role::Batch])) => BatchAxis::Own(at),
            Some((at, [Role::Batch, Role::Other(heads)])) => BatchAxis::Shared(at, heads.as_known()?),
            _ => return None,
        };
        Some(Frame { rank: axes.len(), batch })
    }

    /// `source`, which holds the tokens of `stage` as arranged, as `[batch, tokens, …]`.
    pub(super) fn tokens_second(
        &mut self,
        source: ValueId,
        arrangement: &Arrangement,
        stage: usize,
        hint: &str,
    ) -> Option<ValueId> {
        let order = arrangement.order()?;
        let mut value = source;
        if arrangement.shares() {
            let target = self.extents(arrangement.factors().map(std::slice::from_ref), stage);
            value = self.reshape_to(value, &target, stage, &format!("{hint}/factors"))?;
        } else {
            let units = arrangement.units();
            value = self.with_axes("Squeeze", value, &units, &format!("{hint}/squeezed"));
        }
        value = self.transpose(value, &order, &format!("{hint}/tokens_second"));
        if !arrangement.factors().any(|role| *role == Role::Batch) {
            value = self.with_axes("Unsqueeze", value, &[0], &format!("{hint}/one_image"));
        }
        Some(value)
    }

    /// The reverse of [`Rewriter::tokens_second`], with the token count of `stage`.
    pub(super) fn as_before(
        &mut self,
        source: ValueId,
        arrangement: &Arrangement,
        stage: usize,
        hint: &str,
    ) -> Option<ValueId> {
        let order = arrangement.order()?;
        let mut value = source;
        if !arrangement.factors().any(|role| *role == Role::Batch) {
            value = self.with_axes("Squeeze", value, &[0], &format!("{hint}/image"));
        }
        value = self.transpose(value, &inverse(&order), &format!("{hint}/as_before"));
        if arrangement.shares() {
            let target = self.extents(arrangement.axes.iter().map(Vec::as_slice), stage);
            return self.reshape_to(value, &target, stage, &format!("{hint}/joined"));
        }
        let units = arrangement.units();
        Some(self.with_axes("Unsqueeze", value, &units, &format!("{hint}/unsqueezed")))
    }

    /// Extents of axes made of the given factors.
    fn extents<'a>(&self, axes: impl Iterator<Item = &'a [Role]>, stage: usize) -> Vec<Extent> {
        let extent = |role: &Role| match role {
            Role::Batch => Extent::of(self.vit.axes.batch()),
            Role::Tokens(span) => self.tokens_of(*span, stage),
            Role::Other(extent) => Extent::of(extent),
        };
        axes.map(|roles| Extent::product(roles.iter().map(extent))).collect()
    }

    /// For each image the entries of `value` along `axis` at `positions`, `[B, K]`, where the images have the axis `batch`.
    /// Both are counted among `rank` axes; `name` is what the result is called.
    pub(super) fn gather_along(
        &mut self,
        value: ValueId,
        positions: ValueId,
        [batch, axis]: [usize; 2],
        rank: usize,
        hint: &str,
        name: &str,
    ) -> ValueId {
        let rest = (0..rank).filter(|&at| at != batch && at != axis);
        let order: Vec<usize> = [batch, axis].into_iter().chain(rest).collect();
        let there = self.transpose(value, &order, &format!("{hint}/tokens_second"));
        let rows = self.vitrim(&TokenRestore, &format!("{hint}/{name}"), &[there, positions], &[], 1)[0];
        self.transpose(rows, &inverse(&order), &format!("{hint}/as_before"))
    }

    /// One number for each slot, `[B, M, 1]`, where it is broadcast along `axis` to a tensor of the given frame.
    pub(super) fn spread_column(&mut self, column: ValueId, axis: usize, frame: &Frame, hint: &str) -> ValueId {
        let row = self.with_axes("Squeeze", column, &[2], &format!("{hint}_row"));
        self.spread(row, &[axis], frame, hint)
    }

    /// Puts `value`, `[B, …]`, where it is broadcast to a tensor of the given frame: its axes after the batch belong to the
    /// axes `along` of that tensor, in this order.
    pub(super) fn spread(&mut self, value: ValueId, along: &[usize], frame: &Frame, hint: &str) -> ValueId {
        // Shared by heads: an axis for them comes after that of the images.
        let shift = |axis: usize| match frame.batch {
            BatchAxis::Shared(batch, _) if axis > batch => axis + 1,
            BatchAxis::Absent => axis + 1,
            _ => axis,
        };
        let (batch, rank) = match frame.batch {
            BatchAxis::Own(axis) => (axis, frame.rank),
            BatchAxis::Shared(axis, _) => (axis, frame.rank + 1),
            BatchAxis::Absent => (0, frame.rank + 1),
        };
        let places: Vec<usize> = std::iter::once(batch).chain(along.iter().map(|&axis| shift(axis))).collect();
        let mut order: Vec<usize> = (0..places.len()).collect();
        order.sort_by_key(|&at| places[at]);
        let value = self.transpose(value, &order, &format!("{hint}/in_order"));
        let missing: Vec<i64> = (0..rank).filter(|at| !places.contains(at)).map(|at| at as i64).collect();
        let value = self.with_axes("Unsqueeze", value, &missing, &format!("{hint}/spread"));
        match frame.batch {
            BatchAxis::Own(_) => value,
            BatchAxis::Absent => self.with_axes("Squeeze", value, &[0], &format!("{hint}/image")),
            BatchAxis::Shared(axis, heads) => self.share(value, axis, heads, rank, hint),
        }
    }

    /// Joins the images along `axis` with the heads on the next one, repeated where there is one entry for all.
    fn share(&mut self, value: ValueId, axis: usize, heads: i64, rank: usize, hint: &str) -> ValueId {
        let mut repeats = vec![1; rank];
        repeats[axis + 1] = heads;
        let repeats = self.ints(&format!("{hint}/heads"), &repeats);
        let value = self.patch.op("Expand", &format!("{hint}/per_head"), &[value, repeats], &[]);
        // Zero copies the extent in the same place.
        let mut target = vec![0; rank];
        (target[axis], target[axis + 1]) = (-1, 1);
        let value = self.reshape(value, &target, &format!("{hint}/joined"));
        self.with_axes("Squeeze", value, &[axis as i64 + 1], &format!("{hint}/images_and_heads"))
    }

    pub(super) fn reshape(&mut self, value: ValueId, target: &[i64], hint: &str) -> ValueId {
        let target = self.ints(&format!("{hint}_shape"), target);
        self.patch.op("Reshape", hint, &[value, target], &[])
    }

    /// A `Reshape` to the given extents at a stage, one of which may be open; `None` where that does not suffice.
    pub(super) fn reshape_to(
        &mut self,
        value: ValueId,
        extents: &[Extent],
        stage: usize,
        hint: &str,
    ) -> Option<ValueId> {
        let target = self.shape(&reshape_target(extents, |_| false)?, stage, &format!("{hint}_shape"))?;
        Some(self.patch.op("Reshape", hint, &[value, target], &[]))
    }

    /// A `Squeeze` or `Unsqueeze`, if there are axes.
    pub(super) fn with_axes(&mut self, op: &str, value: ValueId, axes: &[i64], hint: &str) -> ValueId {
        if axes.is_empty() {
            return value;
        }
        let axes = self.ints(&format!("{hint}_axes"), axes);
        self.patch.op(op, hint, &[value, axes], &[])
    }

    pub(super) fn transpose(&mut self, value: ValueId, order: &[usize], hint: &str) -> ValueId {
        if order.iter().enumerate().all(|(at, &from)| at == from) {
            return value;
        }
        let perm = order.iter().map(|&axis| axis as i64).collect();
        self.patch.op("Transpose", hint, &[value], &[("perm", Attribute::Ints(perm))])
    }

    pub(super) fn frame_of(&self, value: ValueId, node: vitrim_ir::NodeId) -> Result<Frame, Refusal> {
        let frame = self.vit.axes.layout(value).and_then(|layout| self.frame(layout));
        frame.ok_or_else(|| self.pinned(node, "its batch axis cannot be told from others"))
    }
}

impl Arrangement {
    fn factors(&self) -> impl Iterator<Item = &Role> {
        self.axes.iter().flatten()
    }

    /// How many axes follow the tokens in `[batch, tokens, …]`.
    pub fn others(&self) -> usize {
        self.factors().filter(|role| matches!(role, Role::Other(_))).count()
    }

    /// Extents of the axes that follow the tokens, where known.
    pub fn other_extents(&self) -> Vec<Option<i64>> {
        let extent = |role: &Role| if let Role::Other(extent) = role { Some(extent.as_known()) } else { None };
        self.factors().filter_map(extent).collect()
    }

    /// Whether an axis has several factors.
    fn shares(&self) -> bool {
        self.axes.iter().any(|axis| axis.len() > 1)
    }

    /// Axes of extent one that stand for nothing.
    fn units(&self) -> Vec<i64> {
        (0..self.axes.len()).filter(|&axis| self.axes[axis].is_empty()).map(|axis| axis as i64).collect()
    }

    /// The factors in the order batch, tokens, others; `None` where tokens run along several axes.
    fn order(&self) -> Option<Vec<usize>> {
        let at = |wanted: fn(&Role) -> bool| {
            let factors = self.factors().enumerate().filter(|(_, role)| wanted(role));
            factors.map(|(at, _)| at).collect::<Vec<usize>>()
        };
        let tokens = at(|role| matches!(role, Role::Tokens(_)));
        if tokens.len() != 1 {
            return None;
        }
        let others = at(|role| matches!(role, Role::Other(_)));
        Some([at(|role| *role == Role::Batch), tokens, others].concat())
    }
}

/// The order of axes that undoes another.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(at, &from)| back[from] = at);
    back
}

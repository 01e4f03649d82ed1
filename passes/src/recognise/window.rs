//! Attention as plain as the formula: softmax(scale · q kᵀ) v, with queries, keys and values found among the channels of
//! the projections that give them.
//!
//! Exporters split a joint projection, bring heads before tokens, and scale queries, keys or scores. None of that
//! computes anything: an operator that takes the projections as they are needs none of it.

use vitrim_ir::{Axes, Expr, Graph, NodeId, Shapes, ValueId};

use super::Attention;

/// Heads of a tensor: `heads * head_dim` of its channels from `at` on, head after head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// The tensor.
    pub value: ValueId,
    /// Its axes.
    pub form: Form,
    /// The first channel of the first head.
    pub at: i64,
    /// How many heads there are.
    pub heads: i64,
    /// Channels of each.
    pub head_dim: i64,
}

impl Window {
    /// A tensor `[B, N, channels]` as one head.
    pub fn of_all(value: ValueId, channels: i64) -> Self {
        Window { value, form: Form::Joined, at: 0, heads: 1, head_dim: channels }
    }
}

/// Axes that hold batch, tokens and channels in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// `[B, N, W]`
    Joined,
    /// `[B, N, ..]`, with several axes for the channels.
    Split,
    /// `[B * N, width]`
    Flat {
        /// All channels.
        width: i64,
    },
}

/// An attention without bias or mask over tokens that are all there.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PlainAttention {
    /// Queries.
    pub q: Window,
    /// Keys.
    pub k: Window,
    /// Values.
    pub v: Window,
    /// What queries times keys are multiplied with.
    pub scale: f64,
    /// The result, with heads before channels.
    pub y: Window,
}

/// A factor of an axis.
#[derive(Clone, PartialEq, Debug)]
enum Factor {
    Batch(Expr),
    Tokens(Expr),
    Heads(i64),
    Channels(i64),
    /// One entry, `at`, of `of`: what a joint projection was split by.
    Entry {
        at: i64,
        of: Expr,
    },
}
use Factor::{Batch, Channels, Entry, Heads, Tokens};

impl Factor {
    fn extent(&self) -> Expr {
        match self {
            Batch(extent) | Tokens(extent) | Entry { of: extent, .. } => extent.clone(),
            Heads(extent) | Channels(extent) => Expr::known(*extent),
        }
    }
}

/// The factors of every axis.
type Axis = Vec<Factor>;

/// How many nodes a walk takes at most: exporters need about ten.
const MAX_STEPS: usize = 32;

/// What walks need to know of a graph.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub graph: &'a Graph,
    pub shapes: &'a Shapes,
    pub axes: &'a Axes,
}

impl<'a> View<'a> {
    /// The attention as plain attention, if that is what it is.
    pub fn plain(self, attention: &Attention) -> Option<PlainAttention> {
        let core = &attention.core;
        let (scores, mix) = (self.graph.node(core.scores), self.graph.node(core.mix));
        let products = scores.is("MatMul") && mix.is("MatMul") && self.graph.node(core.softmax).is("Softmax");
        if core.is_fused() || !products || core.slots.query != 0 || core.slots.key != 1 || core.slots.value != 1 {
            return None;
        }
        let over_scores = self.factor_between(core.scores, core.softmax)?;
        if self.factor_between(core.softmax, core.mix)? != 1.0 || !self.softmax_is_over_keys(core.softmax) {
            return None;
        }
        let (query, key, value) = (core.query(self.graph)?, core.key(self.graph)?, core.value(self.graph)?);
        let heads = attention.heads as i64;
        let (q, over_q) = self.window(query, self.operand(query, heads, false)?)?;
        let (k, over_k) = self.window(key, self.operand(key, heads, true)?)?;
        let (v, over_v) = self.window(value, self.operand(value, heads, false)?)?;
        let one_form = [k, v].iter().all(|other| (other.heads, other.head_dim) == (q.heads, q.head_dim))
            && [query, key, value].iter().all(|&operand| self.shapes.dtype(operand) == self.shapes.dtype(q.value));
        if over_v != 1.0 || !one_form {
            return None;
        }
        let result = mix.output(0)?;
        let y = self.joined(result, self.operand(result, heads, false)?)?;
        let scale = over_scores * over_q * over_k;
        scale.is_finite().then_some(PlainAttention { q, k, v, scale, y })
    }

    /// The axes of an operand of an attention: `[B, H, N, d]` or `[B * H, N, d]`, with the last two the other way round for
    /// keys.
    fn operand(self, value: ValueId, heads: i64, transposed: bool) -> Option<Vec<Axis>> {
        let (outer, inner) = self.shapes.dims(value)?.split_last_chunk::<2>()?;
        let batch = self.axes.batch().clone();
        let (batch_axis, heads_axis) = (Batch(batch.clone()), Heads(heads));
        let mut axes = match outer {
            [first, second] if *first == batch && second.is(heads) => vec![vec![batch_axis], vec![heads_axis]],
            [both] if Some(both) == batch.times(&Expr::known(heads)).as_ref() => vec![vec![batch_axis, heads_axis]],
            _ => return None,
        };
        let [tokens, channels] = if transposed { [&inner[1], &inner[0]] } else { [&inner[0], &inner[1]] };
        let (tokens, channels) = (vec![Tokens(tokens.clone())], vec![Channels(channels.as_known()?)]);
        axes.extend(if transposed { [channels, tokens] } else { [tokens, channels] });
        Some(axes)
    }

    /// Follows a value back to the projection whose channels it is, with the factor between the two.
    fn window(self, value: ValueId, axes: Vec<Axis>) -> Option<(Window, f64)> {
        let mut at = (value, axes, 1.0);
        let mut found = None;
        for _ in 0..MAX_STEPS {
            if let Some(window) = self.as_window(at.0, &at.1) {
                found = Some((window, at.2));
                if window.form == Form::Joined {
                    break;
                }
            }
            let Some(before) = self.step_back(at) else { break };
            at = before;
        }
        let (window, factor) = found?;
        Some((self.widened(window), factor))
    }

    /// From a node's result to its operand.
    fn step_back(self, (value, mut axes, mut factor): (ValueId, Vec<Axis>, f64)) -> Option<(ValueId, Vec<Axis>, f64)> {
        let (id, result) = self.graph.producer(value)?;
        let node = self.graph.node(id);
        let mut operand = node.input(0)?;
        match node.standard_op()? {
            "Identity" => {}
            "Cast" if self.shapes.dtype(operand) == self.shapes.dtype(value) => {}
            "Mul" | "Div" => {
                let (of, data) = self.scaling(id)?;
                (factor, operand) = (factor * of, data);
            }
            "Transpose" => {
                let perm = node.ints("perm")?;
                let mut before = vec![Vec::new(); axes.len()];
                for (axis, &from) in axes.into_iter().zip(perm) {
                    *before.get_mut(from as usize)? = axis;
                }
                axes = before;
            }
            "Reshape" | "Squeeze" | "Unsqueeze" => axes = regroup(axes, self.shapes.dims(operand)?)?,
            "Gather" => {
                let at = self.axis_of(id, operand)?;
                let index = self.shapes.ints(node.input(1)?).filter(|index| index.len() == 1)?[0].as_known()?;
                let of = self.shapes.dims(operand)?[at].clone();
                let entry = Entry { at: if index < 0 { index + of.as_known()? } else { index }, of };
                match self.shapes.dims(node.input(1)?)?.len() {
                    0 => axes.insert(at, vec![entry]),
                    _ => *axes.get_mut(at).filter(|axis| axis.is_empty())? = vec![entry],
                }
            }
            "Split" | "Slice" => {
                let (at, start) = self.start_of_part(id, result)?;
                let of = self.shapes.dims(operand)?[at].clone();
                *axes.get_mut(at).filter(|axis| axis.is_empty())? = vec![Entry { at: start, of }];
            }
            _ => return None,
        }
        Some((operand, axes, factor))
    }

    /// A value as heads of itself, if its factors come in that order.
    fn as_window(self, value: ValueId, axes: &[Axis]) -> Option<Window> {
        let factors: Vec<&Factor> = axes.iter().flatten().collect();
        let [Batch(_), Tokens(tokens), entries @ .., Heads(heads), Channels(head_dim)] = &factors[..] else {
            return None;
        };
        if tokens != self.axes.tokens() {
            return None;
        }
        let (mut at, mut width) = (0, heads * head_dim);
        for entry in entries {
            let Entry { at: own, of } = entry else { return None };
            let of = of.as_known()?;
            (at, width) = (at * of + own, width * of);
        }
        at *= heads * head_dim;
        let form = match axes {
            [batch, tokens, _] if batch.len() == 1 && tokens.len() == 1 => Form::Joined,
            [batch, tokens, _, ..] if batch.len() == 1 && tokens.len() == 1 => Form::Split,
            [both, _] if both.len() == 2 => Form::Flat { width },
            _ => return None,
        };
        Some(Window { value, form, at, heads: *heads, head_dim: *head_dim })
    }

    /// The same heads in the tensor that a window's is part of.
    fn widened(self, mut window: Window) -> Window {
        while let (Form::Joined, Some((id, result))) = (window.form, self.graph.producer(window.value)) {
            let Some((2, start)) = self.start_of_part(id, result) else { break };
            let Some(value) = self.graph.node(id).input(0) else { break };
            window = Window { value, at: window.at + start, ..window };
        }
        window
    }

    /// Follows what an attention gives to where its heads are side by side.
    fn joined(self, mut value: ValueId, mut axes: Vec<Axis>) -> Option<Window> {
        let mut found = None;
        for _ in 0..MAX_STEPS {
            if let Some(window) = self.as_window(value, &axes) {
                found = Some(window);
                if window.form == Form::Joined {
                    break;
                }
            }
            let Some(id) = self.sole_reader(value) else { break };
            let node = self.graph.node(id);
            let Some(result) = node.output(0) else { break };
            let after = match node.standard_op() {
                Some("Identity") => Some(axes.clone()),
                Some("Transpose") => node
                    .ints("perm")
                    .and_then(|perm| perm.iter().map(|&from| axes.get(from as usize).cloned()).collect()),
                Some("Reshape" | "Squeeze" | "Unsqueeze") if node.input(0) == Some(value) => {
                    self.shapes.dims(result).and_then(|dims| regroup(axes, dims))
                }
                _ => None,
            };
            let Some(after) = after else { break };
            (value, axes) = (result, after);
        }
        found
    }

    /// The one node that reads a value. Those that ask for its shape alone do not count: they will be told.
    fn sole_reader(self, value: ValueId) -> Option<NodeId> {
        let mut readers = self.graph.value(value).uses().iter().filter(|used| !self.graph.node(used.node).is("Shape"));
        let reader = readers.next()?.node;
        (readers.next().is_none() && self.graph.output_slots(value).next().is_none()).then_some(reader)
    }

    /// The result of `Where(IsNaN(value), .., value)`, which guards weights against rows that a mask hides altogether.
    fn guarded(self, value: ValueId) -> Option<ValueId> {
        let [first, second] = self.graph.value(value).uses() else { return None };
        let nodes = [first.node, second.node];
        let test = nodes.into_iter().find(|&id| self.graph.node(id).is("IsNaN"))?;
        let guard = nodes.into_iter().find(|&id| self.graph.node(id).is("Where"))?;
        let tested = self.graph.node(test).output(0)?;
        let form = self.graph.node(guard).input(0) == Some(tested) && self.graph.node(guard).input(2) == Some(value);
        (form && self.sole_reader(tested) == Some(guard)).then(|| self.graph.node(guard).output(0)).flatten()
    }

    /// What values are multiplied with on the way from one node to another, if nothing else happens to them that matters
    /// to a softmax, and nothing else reads them.
    fn factor_between(self, from: NodeId, to: NodeId) -> Option<f64> {
        let mut factor = 1.0;
        let mut value = self.graph.node(from).output(0)?;
        for _ in 0..MAX_STEPS {
            value = self.guarded(value).unwrap_or(value);
            let reader = self.sole_reader(value)?;
            if reader == to {
                return Some(factor);
            }
            let node = self.graph.node(reader);
            match node.standard_op()? {
                "Identity" => {}
                "Reshape" | "Squeeze" | "Unsqueeze" if self.scores_of(node.output(0)?) == self.scores_of(value) => {}
                "Cast" if self.shapes.dtype(node.output(0)?) == self.shapes.dtype(value) => {}
                "Mul" | "Div" => factor *= self.scaling(reader).filter(|&(_, data)| data == value)?.0,
                // What is the same for all keys changes no softmax; it does change weights.
                "Add" if self.graph.node(to).is("Softmax") => {
                    let other = node.operands().find(|&operand| operand != value)?;
                    self.shapes.uniform(other).filter(|number| number.is_finite())?;
                }
                _ => return None,
            }
            value = node.output(0)?;
        }
        None
    }

    /// Queries and keys of scores or weights: their last two axes.
    fn scores_of(self, value: ValueId) -> Option<&'a [Expr]> {
        self.shapes.dims(value)?.last_chunk::<2>().map(|last| &last[..])
    }

    fn softmax_is_over_keys(self, softmax: NodeId) -> bool {
        let node = self.graph.node(softmax);
        let rank = node.input(0).and_then(|scores| self.shapes.dims(scores)).map(|dims| dims.len() as i64);
        let axis = node.int("axis").unwrap_or(-1);
        axis == -1 || Some(axis + 1) == rank
    }

    /// The number that a node multiplies its data with, and the data.
    fn scaling(self, id: NodeId) -> Option<(f64, ValueId)> {
        let node = self.graph.node(id);
        let (first, second) = (node.input(0)?, node.input(1)?);
        let number = |value: ValueId| self.shapes.uniform(value).filter(|_| !self.axes.carries(value));
        match (number(first), number(second)) {
            (None, Some(by)) if node.is("Mul") => Some((by, first)),
            (None, Some(by)) => Some((by.recip(), first)),
            (Some(by), None) if node.is("Mul") => Some((by, second)),
            _ => None,
        }
    }

    /// The axis of which result `result` of a `Split` or `Slice` is a part, and where the part begins.
    fn start_of_part(self, id: NodeId, result: usize) -> Option<(usize, i64)> {
        let node = self.graph.node(id);
        let operand = node.input(0)?;
        match node.standard_op()? {
            "Split" => {
                let at = self.axis_of(id, operand)?;
                let before = node.results().take(result);
                let extents: Option<Vec<i64>> =
                    before.map(|part| self.shapes.dims(part)?.get(at)?.as_known()).collect();
                Some((at, extents?.iter().sum()))
            }
            "Slice" => {
                let numbers = |slot: usize| {
                    let numbers = self.shapes.ints(node.input(slot)?)?;
                    numbers.iter().map(|number| number.as_known()).collect::<Option<Vec<i64>>>()
                };
                let (starts, axes) = (numbers(1)?, numbers(3)?);
                let steps = if node.input(4).is_some() { numbers(4)? } else { vec![1] };
                let (&[start], &[axis], &[1]) = (&starts[..], &axes[..], &steps[..]) else { return None };
                let dims = self.shapes.dims(operand)?;
                let axis = if axis < 0 { axis + dims.len() as i64 } else { axis } as usize;
                let extent = dims.get(axis)?.as_known()?;
                Some((axis, if start < 0 { start + extent } else { start }))
            }
            _ => None,
        }
    }

    fn axis_of(self, id: NodeId, operand: ValueId) -> Option<usize> {
        let rank = self.shapes.dims(operand)?.len();
        let axis = self.graph.node(id).int("axis").unwrap_or(0);
        let axis = if axis < 0 { axis + rank as i64 } else { axis } as usize;
        (axis < rank).then_some(axis)
    }
}

/// The same factors in the same order, over axes of other extents.
fn regroup(axes: Vec<Axis>, dims: &[Expr]) -> Option<Vec<Axis>> {
    let mut factors = axes.into_iter().flatten().peekable();
    let one = Expr::known(1);
    let mut grouped = Vec::new();
    for dim in dims {
        let mut axis = Vec::new();
        let mut extent = one.clone();
        while extent != *dim || axis.is_empty() && factors.peek().is_some_and(|factor| factor.extent() == one) {
            let factor = factors.next()?;
            extent = extent.times(&factor.extent())?;
            axis.push(factor);
        }
        grouped.push(axis);
    }
    factors.next().is_none().then_some(grouped)
}

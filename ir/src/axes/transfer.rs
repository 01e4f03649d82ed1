//! Transfer rules: what an operator makes of the token axis. One function per family of operators.

use std::collections::HashMap;

use super::{Atom, Axis, Effect, Layout, Span};
use crate::graph::{Graph, Node};
use crate::{Expr, Shapes, ValueId};

/// Tokens at the front or back that are counted as special ones when sliced off by a constant position.
const MAX_SPECIAL: i64 = 64;

/// What an operator does.
#[derive(Default)]
pub(super) struct Flow {
    /// Layout of each result; `None` where no tokens run along it.
    pub layouts: Vec<Option<Layout>>,
    pub effects: Vec<Effect>,
}

impl Flow {
    fn of(layout: Layout) -> Self {
        Self { layouts: vec![Some(layout)], effects: Vec::new() }
    }

    fn with(mut self, effect: Effect) -> Self {
        self.effects.push(effect);
        self
    }

    fn ends(effect: Effect) -> Self {
        Self { layouts: Vec::new(), effects: vec![effect] }
    }
}

type Transfer = Result<Flow, String>;

pub(super) struct Context<'a> {
    pub graph: &'a Graph,
    pub shapes: &'a Shapes,
    pub opset: i64,
    pub tokens: &'a Expr,
    /// Extent of the origin's first axis that is not the token axis.
    pub batch: &'a Expr,
    pub layouts: &'a HashMap<ValueId, Layout>,
}

impl Context<'_> {
    pub fn transfer(&self, node: &Node) -> Transfer {
        let contrib = node.op.domain == "com.microsoft";
        if !(node.op.domain.is_empty() || contrib) {
            return Err(format!("there is no rule for the operator {}", node.op));
        }
        match node.op.name.as_str() {
            "Identity" | "Cast" | "Dropout" | "Erf" | "Gelu" | "FastGelu" | "QuickGelu" | "BiasGelu" | "Relu"
            | "LeakyRelu" | "Elu" | "Celu" | "Selu" | "PRelu" | "HardSigmoid" | "HardSwish" | "Mish" | "Swish"
            | "Sigmoid" | "Tanh" | "Softplus" | "Softsign" | "Exp" | "Log" | "Sqrt" | "Reciprocal" | "Neg" | "Abs"
            | "Sign" | "Floor" | "Ceil" | "Round" | "Not" | "IsNaN" | "IsInf" | "Clip" | "Sin" | "Cos" | "CastLike"
            | "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Sum" | "Mean" | "Mod" | "And" | "Or" | "Xor"
            | "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Where" => self.elementwise(node),
            "QuantizeLinear" | "DequantizeLinear" => self.quantize(node),
            "DynamicQuantizeLinear" => Ok(Flow::of(self.operand(node, 0)?.clone())),
            "MatMul" | "MatMulInteger" => self.matmul(node, 0, 1, false, false),
            "QLinearMatMul" => self.matmul(node, 0, 3, false, false),
            "FusedMatMul" => {
                let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
                if flag("transBatchA") || flag("transBatchB") {
                    return Err("it transposes batch axes".into());
                }
                self.matmul(node, 0, 1, flag("transA"), flag("transB"))
            }
            "Gemm" => {
                let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
                self.matmul(node, 0, 1, flag("transA"), flag("transB"))
            }
            "MatMulNBits" => self.nbits(node),
            "Einsum" => self.einsum(node),
            "Transpose" => self.transpose(node),
            "Reshape" | "Flatten" => self.reshape(node),
            "Squeeze" => self.squeeze(node),
            "Unsqueeze" => self.unsqueeze(node),
            "Split" => self.split(node),
            "Slice" => self.slice(node),
            "Gather" => self.gather(node),
            "Concat" => self.concat(node),
            "Expand" => self.expand(node),
            "Softmax" | "LogSoftmax" => self.softmax(node),
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" | "LpNormalization" => {
                self.layer_norm(node)
            }
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => self.skip_layer_norm(node),
            "BatchNormalization" => self.per_channel(node),
            "Conv" => self.pointwise_conv(node),
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare"
            | "ReduceProd" | "ReduceLogSumExp" | "ReduceLogSum" | "ArgMax" | "ArgMin" => self.reduce(node),
            "GlobalAveragePool" | "GlobalMaxPool" => self.global_pool(node),
            "Shape" | "Size" => Ok(Flow::default()),
            "Attention" if !contrib => self.attention(node),
            _ => Err(format!("there is no rule for the operator {}", node.op)),
        }
    }

    fn layout(&self, value: Option<ValueId>) -> Option<&Layout> {
        self.layouts.get(&value?)
    }

    fn operand(&self, node: &Node, slot: usize) -> Result<&Layout, String> {
        self.layout(node.input(slot)).ok_or_else(|| format!("the tokens come in through operand {slot}"))
    }

    fn dims(&self, value: ValueId) -> Result<&[Expr], String> {
        self.shapes.dims(value).ok_or_else(|| {
            let why = self.shapes.reason(value).unwrap_or("no rule");
            format!("the shape of '{}' is not known ({why})", self.graph.value(value).name())
        })
    }

    fn result_dims(&self, node: &Node, slot: usize) -> Result<&[Expr], String> {
        self.dims(node.output(slot).ok_or("it has no result")?)
    }

    /// Known integers of an operand, or of an attribute in older operator sets.
    fn ints(&self, node: &Node, slot: usize, attribute: &str) -> Result<Option<Vec<i64>>, String> {
        if let Some(ints) = node.ints(attribute) {
            return Ok(Some(ints.to_vec()));
        }
        let Some(value) = node.input(slot) else { return Ok(None) };
        let known =
            self.shapes.ints(value).and_then(|exprs| exprs.iter().map(Expr::as_known).collect::<Option<Vec<_>>>());
        known.map(Some).ok_or_else(|| format!("its {attribute} are not constant"))
    }

    fn axis(&self, axis: i64, rank: usize) -> Result<usize, String> {
        let positive = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(positive).ok().filter(|&axis| axis < rank).ok_or_else(|| format!("axis {axis} is out of range"))
    }

    // --- elementwise ---------------------------------------------------------------------------------------------

    fn elementwise(&self, node: &Node) -> Transfer {
        let operands: Vec<(usize, ValueId)> =
            node.inputs.iter().enumerate().filter_map(|(slot, value)| Some((slot, (*value)?))).collect();
        let operands = match node.op.name.as_str() {
            // Ratio, training flag, bounds and target types are no tensors along the tokens.
            "Dropout" | "Clip" | "CastLike" => operands[..1].to_vec(),
            _ => operands,
        };
        if node.is("Where") && self.where_replaces_nan(node) {
            return Ok(Flow::of(self.operand(node, 2)?.clone()));
        }
        let flow = self.broadcast(&operands)?;
        // Comparisons and products of weights with anything but one number are no weights any more.
        let keeps_weights = matches!(node.op.name.as_str(), "Identity" | "Cast" | "CastLike" | "Dropout");
        let layouts = flow.layouts.into_iter().map(|layout| {
            layout.map(|layout| {
                if keeps_weights {
                    layout
                } else {
                    Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect())
                }
            })
        });
        Ok(Flow { layouts: layouts.collect(), effects: flow.effects })
    }

    /// `Where(IsNaN(p), 0, p)` with a single zero: weights stay weights.
    fn where_replaces_nan(&self, node: &Node) -> bool {
        let Some((condition, _)) = node.input(0).and_then(|value| self.graph.producer(value)) else { return false };
        let condition = self.graph.node(condition);
        let single = |value: ValueId| self.shapes.dims(value).is_some_and(|dims| dims.iter().all(|dim| dim.is(1)));
        condition.is("IsNaN") && condition.input(0) == node.input(2) && node.input(1).is_some_and(single)
    }

    /// Operands aligned at the last axis; axes of extent one stretch.
    fn broadcast(&self, operands: &[(usize, ValueId)]) -> Transfer {
        let rank = |value: ValueId| match self.layout(Some(value)) {
            Some(layout) => Ok(layout.rank()),
            None => self.dims(value).map(<[Expr]>::len),
        };
        let ranks = operands.iter().map(|&(_, value)| rank(value)).collect::<Result<Vec<_>, _>>()?;
        let out_rank = ranks.iter().copied().max().unwrap_or(0);
        let mut axes: Vec<Axis> = vec![Axis::default(); out_rank];
        for (&(slot, value), &rank) in operands.iter().zip(&ranks) {
            let Some(layout) = self.layout(Some(value)) else { continue };
            for (at, axis) in layout.0.iter().enumerate() {
                let out = &mut axes[out_rank - rank + at];
                if axis.atoms().is_empty() {
                    continue;
                }
                if out.atoms().is_empty() {
                    *out = axis.clone();
                } else if axis.has_tokens() || out.has_tokens() {
                    if !out.same_as(axis) {
                        return Err(format!("operand {slot} has the tokens in another place than the others"));
                    }
                    *out = out.with_weights(false);
                }
            }
        }
        let mut effects = Vec::new();
        for (&(slot, value), &rank) in operands.iter().zip(&ranks) {
            if self.layout(Some(value)).is_some() {
                continue;
            }
            let dims = self.dims(value)?;
            for (at, dim) in dims.iter().enumerate() {
                let out = &mut axes[out_rank - rank + at];
                if dim.is(1) {
                    continue;
                }
                if out.atoms().is_empty() {
                    *out = Axis::plain(dim);
                } else if out.has_tokens() {
                    let effect = if self.shapes.uniform(value).is_some() {
                        Effect::UniformTable { slot }
                    } else {
                        return Err(format!(
                            "operand {slot} ('{}') has an entry of its own for each token",
                            self.graph.value(value).name()
                        ));
                    };
                    if !effects.contains(&effect) {
                        effects.push(effect);
                    }
                }
            }
        }
        Ok(Flow { layouts: vec![Some(Layout(axes))], effects })
    }

    fn quantize(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        for value in node.operands().skip(1) {
            let per_axis = self.dims(value)?.iter().any(|dim| !dim.is(1));
            if per_axis {
                let axis = self.axis(node.int("axis").unwrap_or(1), layout.rank())?;
                if layout.0[axis].has_tokens() || node.int("block_size").unwrap_or(0) != 0 {
                    return Err("it is quantised with a scale for each token".into());
                }
            }
        }
        Ok(Flow::of(layout.clone()))
    }

    fn expand(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let lead = dims.len() - layout.rank();
        let axes = dims.iter().enumerate().map(|(at, dim)| match at.checked_sub(lead).map(|at| &layout.0[at]) {
            Some(axis) if !axis.atoms().is_empty() => axis.clone(),
            _ => Axis::plain(dim),
        });
        Ok(Flow::of(Layout(axes.collect())).with(Effect::Shape { slot: 1 }))
    }

    // --- products ------------------------------------------------------------------------------------------------

    fn matmul(&self, node: &Node, left: usize, right: usize, trans_left: bool, trans_right: bool) -> Transfer {
        let (left, right) = (node.input(left).ok_or("no operand")?, node.input(right).ok_or("no operand")?);
        let (mut a, mut b) = (self.axes(left)?, self.axes(right)?);
        if a.len() < 2 || b.len() < 2 {
            return Err("it multiplies by a vector".into());
        }
        let swap = |axes: &mut Vec<Axis>| {
            let rank = axes.len();
            axes.swap(rank - 1, rank - 2);
        };
        if trans_left {
            swap(&mut a);
        }
        if trans_right {
            swap(&mut b);
        }
        let (inner_a, rows) = (a.pop().unwrap_or_default(), a.pop().unwrap_or_default());
        let (columns, inner_b) = (b.pop().unwrap_or_default(), b.pop().unwrap_or_default());
        let carried = (self.layout(Some(left)).is_some(), self.layout(Some(right)).is_some());
        self.contract(&inner_a, &inner_b, carried)?;
        let mut axes = self.batch_axes(&a, &b, carried)?;
        axes.push(rows.with_weights(false));
        axes.push(columns.with_weights(false));
        if let Some(bias) = node.input(2).filter(|_| node.op.name == "Gemm") {
            let tokens_at = |from_end: usize| axes[axes.len() - from_end].has_tokens();
            for (at, dim) in self.axes(bias)?.iter().rev().enumerate() {
                if !dim.atoms().is_empty() && tokens_at(at + 1) {
                    return Err("its bias has an entry for each token".into());
                }
            }
        }
        Ok(Flow::of(Layout(axes)))
    }

    fn axes(&self, value: ValueId) -> Result<Vec<Axis>, String> {
        match self.layout(Some(value)) {
            Some(layout) => Ok(layout.0.clone()),
            None => Ok(self.dims(value)?.iter().map(Axis::plain).collect()),
        }
    }

    fn contract(&self, a: &Axis, b: &Axis, carried: (bool, bool)) -> Result<(), String> {
        match (a.has_tokens(), b.has_tokens()) {
            (false, false) => Ok(()),
            (true, true) if !a.same_as(b) => {
                Err("it sums over tokens that are laid out differently on both sides".into())
            }
            (true, true) if a.is_weights() || b.is_weights() => Ok(()),
            (true, true) => Err("it sums over tokens that are not weighted by a softmax".into()),
            _ if carried.0 && carried.1 => {
                Err("it sums over tokens on one side and something else on the other".into())
            }
            _ => Err("it multiplies the token axis with a matrix of fixed size".into()),
        }
    }

    fn batch_axes(&self, a: &[Axis], b: &[Axis], _carried: (bool, bool)) -> Result<Vec<Axis>, String> {
        let rank = a.len().max(b.len());
        let at = |axes: &[Axis], at: usize| {
            (at + axes.len()).checked_sub(rank).map(|at| axes[at].clone()).unwrap_or_default()
        };
        let mut axes = Vec::with_capacity(rank + 2);
        for index in 0..rank {
            let (x, y) = (at(a, index), at(b, index));
            axes.push(match (x.atoms().is_empty(), y.atoms().is_empty()) {
                (true, _) => y,
                (_, true) => x,
                _ if x.same_as(&y) || !(x.has_tokens() || y.has_tokens()) => x,
                _ => return Err("it multiplies matrices token by token with something of fixed size".into()),
            });
        }
        Ok(axes)
    }

    fn nbits(&self, node: &Node) -> Transfer {
        let mut layout = self.operand(node, 0)?.clone();
        let columns = self.result_dims(node, 0)?.last().ok_or("no result")?;
        match layout.0.last_mut() {
            Some(last) if !last.has_tokens() => *last = Axis::plain(columns),
            _ => return Err("it multiplies the token axis with a matrix of fixed size".into()),
        }
        Ok(Flow::of(layout))
    }

    fn einsum(&self, node: &Node) -> Transfer {
        let equation: String = node.string("equation").ok_or("no equation")?.split_whitespace().collect();
        let (terms, result) = equation.split_once("->").ok_or("an implicit result")?;
        let operands: Vec<ValueId> = node.operands().collect();
        let terms: Vec<&str> = terms.split(',').collect();
        if terms.len() != operands.len() {
            return Err("its equation does not fit its operands".into());
        }
        let mut labels: HashMap<char, Vec<Axis>> = HashMap::new();
        let mut ellipsis: Vec<Axis> = Vec::new();
        for (term, &value) in terms.iter().zip(&operands) {
            let axes = self.axes(value)?;
            let named = term.replace("...", "").chars().count();
            let hidden = axes.len().checked_sub(named).ok_or("its equation does not fit its operands")?;
            let mut axes = axes.into_iter();
            let mut rest = *term;
            while !rest.is_empty() {
                if let Some(after) = rest.strip_prefix("...") {
                    let own: Vec<Axis> = axes.by_ref().take(hidden).collect();
                    if own.iter().any(Axis::has_tokens) {
                        return Err("it hides the token axis in an ellipsis".into());
                    }
                    if own.len() >= ellipsis.len() {
                        ellipsis = own;
                    }
                    rest = after;
                    continue;
                }
                let label = rest.chars().next().unwrap_or(' ');
                labels.entry(label).or_default().push(axes.next().ok_or("its equation does not fit its operands")?);
                rest = &rest[label.len_utf8()..];
            }
        }
        let mut merged: HashMap<char, Axis> = HashMap::new();
        for (label, axes) in labels {
            let tokens = axes.iter().filter(|axis| axis.has_tokens()).count();
            let weights = axes.iter().any(Axis::is_weights);
            if tokens > 0 {
                if tokens < axes.len() {
                    return Err("it multiplies the token axis with a matrix of fixed size".into());
                }
                if axes.iter().any(|axis| !axis.same_as(&axes[0])) {
                    return Err("it combines tokens that are laid out differently".into());
                }
                if !result.contains(label) && !weights {
                    return Err("it sums over tokens that are not weighted by a softmax".into());
                }
            }
            let kept = axes.into_iter().max_by_key(|axis| axis.atoms().len()).unwrap_or_default();
            merged.insert(label, kept.with_weights(false));
        }
        let mut axes = Vec::new();
        let mut rest = result;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix("...") {
                axes.append(&mut ellipsis);
                rest = after;
                continue;
            }
            let label = rest.chars().next().unwrap_or(' ');
            axes.push(merged.get(&label).cloned().ok_or("its equation names an unknown axis")?);
            rest = &rest[label.len_utf8()..];
        }
        Ok(Flow::of(Layout(axes)))
    }

    // --- moving axes ---------------------------------------------------------------------------------------------

    fn transpose(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let rank = layout.rank();
        let reverse: Vec<i64> = (0..rank as i64).rev().collect();
        let perm = node.ints("perm").unwrap_or(&reverse);
        let axes =
            perm.iter().map(|&axis| Ok(layout.0[self.axis(axis, rank)?].clone())).collect::<Result<_, String>>()?;
        Ok(Flow::of(Layout(axes)))
    }

    fn reshape(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let dims = self.result_dims(node, 0)?;
        let reshaped = layout.reshape(dims, self.tokens)?;
        for axis in &reshaped.0 {
            // Tokens may share an axis with the batch. Joined with channels they meet weights of a fixed size.
            let with_channels = |atom: &Atom| matches!(atom, Atom::Plain(extent) if extent != self.batch);
            let last_is_channels = axis.atoms().last().is_some_and(with_channels);
            if axis.has_tokens() && axis.atoms().len() > 1 && last_is_channels {
                return Err("it flattens tokens and channels into one axis".into());
            }
        }
        let flow = Flow::of(reshaped);
        Ok(if node.is("Reshape") { flow.with(Effect::Shape { slot: 1 }) } else { flow })
    }

    fn squeeze(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axes = match self.ints(node, 1, "axes")? {
            Some(axes) => axes.iter().map(|&axis| self.axis(axis, layout.rank())).collect::<Result<Vec<_>, _>>()?,
            None => (0..layout.rank()).filter(|&axis| layout.0[axis].atoms().is_empty()).collect(),
        };
        if axes.iter().any(|&axis| !layout.0[axis].atoms().is_empty()) {
            return Err("it removes an axis whose extent is not one".into());
        }
        let kept = layout.0.iter().enumerate().filter(|(at, _)| !axes.contains(at)).map(|(_, axis)| axis.clone());
        Ok(Flow::of(Layout(kept.collect())))
    }

    fn unsqueeze(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axes = self.ints(node, 1, "axes")?.ok_or("no axes")?;
        let rank = layout.rank() + axes.len();
        let mut new = axes.iter().map(|&axis| self.axis(axis, rank)).collect::<Result<Vec<_>, _>>()?;
        new.sort_unstable();
        let mut kept = layout.0.iter();
        let axes = (0..rank)
            .map(|at| if new.contains(&at) { Axis::default() } else { kept.next().cloned().unwrap_or_default() });
        Ok(Flow::of(Layout(axes.collect())))
    }

    fn split(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), layout.rank())?;
        if layout.0[axis].has_tokens() {
            return Err("it splits the tokens into groups".into());
        }
        let mut layouts = Vec::new();
        for slot in 0..node.outputs.len() {
            let mut part = layout.clone();
            if node.output(slot).is_some() {
                part.0[axis] = Axis::plain(&self.result_dims(node, slot)?[axis]);
            }
            layouts.push(Some(part));
        }
        Ok(Flow { layouts, effects: Vec::new() })
    }

    fn slice(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let exprs = |slot: usize, name: &str| -> Result<Vec<Expr>, String> {
            if let Some(ints) = node.ints(name) {
                return Ok(ints.iter().map(|&x| Expr::known(x)).collect());
            }
            let value = node.input(slot).ok_or_else(|| format!("no {name}"))?;
            Ok(self.shapes.ints(value).ok_or_else(|| format!("its {name} are not known"))?.to_vec())
        };
        let (starts, ends) = (exprs(1, "starts")?, exprs(2, "ends")?);
        let axes = self.ints(node, 3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.ints(node, 4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
        if axes.len() != starts.len() || ends.len() != starts.len() || steps.len() != starts.len() {
            return Err("its operands do not fit each other".into());
        }
        let dims = self.result_dims(node, 0)?;
        let mut out = layout.clone();
        let mut flow = Flow::default();
        for (at, &axis) in axes.iter().enumerate() {
            let axis = self.axis(axis, layout.rank())?;
            if !layout.0[axis].has_tokens() {
                out.0[axis] = Axis::plain(&dims[axis]);
                continue;
            }
            let span = layout.0[axis].only_tokens().ok_or("it slices an axis that holds tokens and more")?;
            if steps[at] != 1 {
                return Err("it takes tokens in steps".into());
            }
            let here = layout.0[axis].extent(self.tokens).ok_or("the token count cannot be followed")?;
            let count = here.as_known();
            let start = starts[at].as_known().ok_or("it starts at a position that is not constant")?;
            let start = match count {
                Some(count) => {
                    if start < 0 {
                        (start + count).max(0)
                    } else {
                        start.min(count)
                    }
                }
                None => start,
            };
            // The end: all of it, a position from the front, or one from the back.
            let (to_end, from_front) = match ends[at].as_known() {
                Some(end) if end > i64::from(i32::MAX) - 1 => (Some(0), None),
                Some(end) if end < 0 => (Some(-end), None),
                Some(end) => match count {
                    Some(count) if end >= count => (Some(0), Some(end)),
                    Some(count) if 2 * end > count && count - end <= MAX_SPECIAL => (Some(count - end), Some(end)),
                    _ => (None, Some(end)),
                },
                None => match here.minus(&ends[at]).and_then(|left| left.as_known()) {
                    Some(left @ 0..) => (Some(left), Some(-1)),
                    _ => return Err("it ends at a position that is not constant".into()),
                },
            };
            match (start, to_end) {
                (start @ 0.., Some(left))
                    if start <= MAX_SPECIAL && left <= MAX_SPECIAL && count.is_none_or(|n| start * 2 <= n) =>
                {
                    let span = Span { front: span.front + start as usize, back: span.back + left as usize };
                    out.0[axis] = Axis::tokens(span);
                    if from_front.is_some() {
                        flow.effects.push(Effect::SliceEnd { slot: 2 });
                    }
                }
                (start, Some(left)) if left <= MAX_SPECIAL && (start < 0 || count.is_some()) => {
                    let first = if start < 0 { start } else { start - count.unwrap_or(start) } - span.back as i64;
                    let taken = -first - left - span.back as i64;
                    flow.effects.push(Effect::Pick { first, count: taken.max(0) as usize });
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                (start @ 0.., None) => {
                    let end = from_front.unwrap_or(start);
                    let first = start + span.front as i64;
                    flow.effects.push(Effect::Pick { first, count: (end - start).max(0) as usize });
                    out.0[axis] = Axis::plain(&dims[axis]);
                }
                _ => return Err("it takes a range of tokens whose place is not constant".into()),
            }
        }
        flow.layouts = vec![Some(out)];
        Ok(flow)
    }

    fn gather(&self, node: &Node) -> Transfer {
        if self.layout(node.input(0)).is_none() {
            return Err("tokens are used as positions".into());
        }
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), layout.rank())?;
        let indices = node.input(1).ok_or("no positions")?;
        if self.layout(Some(indices)).is_some() {
            return Err("it takes values at positions that depend on the tokens".into());
        }
        let inserted: Vec<Axis> = self.dims(indices)?.iter().map(Axis::plain).collect();
        let mut axes = layout.0.clone();
        axes.splice(axis..=axis, inserted);
        let flow = Flow::of(Layout(axes));
        if !layout.0[axis].has_tokens() {
            return Ok(flow);
        }
        let span = layout.0[axis].only_tokens().ok_or("it takes positions of an axis that holds tokens and more")?;
        let positions =
            self.shapes.ints(indices).and_then(|exprs| exprs.iter().map(Expr::as_known).collect::<Option<Vec<_>>>());
        let positions = positions.ok_or("it takes tokens at positions that are not constant")?;
        if positions.len() as i64 > MAX_SPECIAL {
            return Err("it takes tokens by a table of positions".into());
        }
        let mut flow = flow;
        for position in positions {
            let first = if position < 0 { position - span.back as i64 } else { position + span.front as i64 };
            flow.effects.push(Effect::Pick { first, count: 1 });
        }
        Ok(flow)
    }

    fn concat(&self, node: &Node) -> Transfer {
        let dims = self.result_dims(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(0), dims.len())?;
        let mut out: Option<Layout> = None;
        for value in node.operands() {
            let Some(layout) = self.layout(Some(value)) else { continue };
            if layout.0[axis].has_tokens() {
                return Err("it joins other entries to the tokens".into());
            }
            let mut layout = Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect());
            layout.0[axis] = Axis::plain(&dims[axis]);
            match &out {
                Some(other) if (0..other.rank()).any(|at| !other.0[at].same_as(&layout.0[at])) => {
                    return Err("it joins tensors with different tokens".into());
                }
                _ => out = Some(layout),
            }
        }
        let out = out.ok_or("no operand carries tokens")?;
        for value in node.operands().filter(|&value| self.layout(Some(value)).is_none()) {
            if out.token_axes().iter().any(|&at| self.dims(value).is_ok_and(|dims| dims.get(at).is_some())) {
                return Err("it joins a table with an entry for each token".into());
            }
        }
        Ok(Flow::of(out))
    }

    // --- normalisation and reduction ---------------------------------------------------------------------------

    fn softmax(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let default = if self.opset < 13 { 1 } else { -1 };
        let axis = self.axis(node.int("axis").unwrap_or(default), layout.rank())?;
        // Before version 13 everything from the axis on was normalised together.
        let covered = if self.opset < 13 { axis..layout.rank() } else { axis..axis + 1 };
        let tokens: Vec<usize> = covered.clone().filter(|&at| layout.0[at].has_tokens()).collect();
        match tokens.as_slice() {
            [] => Ok(Flow::of(layout.clone())),
            [only]
                if layout.0[*only].only_tokens() == Some(Span::ALL)
                    && covered.clone().all(|at| at == *only || layout.0[at].atoms().is_empty())
                    && node.is("Softmax") =>
            {
                let mut out = Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect());
                out.0[*only] = out.0[*only].with_weights(true);
                Ok(Flow::of(out).with(Effect::Attend))
            }
            _ => Err("it normalises over tokens and more, or over part of them".into()),
        }
    }

    fn layer_norm(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(-1), layout.rank())?;
        let covered = if node.is("LpNormalization") { axis..axis + 1 } else { axis..layout.rank() };
        if layout.0[covered].iter().any(Axis::has_tokens) {
            return Err("it normalises over the tokens".into());
        }
        let mut statistics = layout.clone();
        statistics.0[axis..].fill(Axis::default());
        Ok(Flow {
            layouts: vec![Some(layout.clone()), Some(statistics.clone()), Some(statistics)],
            effects: Vec::new(),
        })
    }

    fn skip_layer_norm(&self, node: &Node) -> Transfer {
        let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Err("no operand".into()) };
        let flow = self.broadcast(&[(0, a), (1, b)])?;
        let layout = flow.layouts[0].clone().unwrap_or_default();
        if layout.0.last().is_none_or(Axis::has_tokens) {
            return Err("it normalises over the tokens".into());
        }
        Ok(Flow { layouts: vec![Some(layout.clone()), None, None, Some(layout)], effects: flow.effects })
    }

    fn per_channel(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        match layout.0.get(1) {
            Some(channels) if !channels.has_tokens() => Ok(Flow::of(layout.clone())),
            _ => Err("it has parameters for each token".into()),
        }
    }

    fn pointwise_conv(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let ones = |name: &str| node.ints(name).is_none_or(|values| values.iter().all(|&x| x == 1));
        let zeros = |name: &str| node.ints(name).is_none_or(|values| values.iter().all(|&x| x == 0));
        let weight = self.dims(node.input(1).ok_or("no kernel")?)?;
        if !(weight[2..].iter().all(|dim| dim.is(1)) && ones("strides") && zeros("pads")) {
            return Err("it convolves neighbouring tokens".into());
        }
        if layout.0.get(1).is_none_or(Axis::has_tokens) {
            return Err("it multiplies the token axis with a matrix of fixed size".into());
        }
        let mut out = layout.clone();
        out.0[1] = Axis::plain(&weight[0]);
        Ok(Flow::of(out))
    }

    fn reduce(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let rank = layout.rank();
        let arg = node.op.name.starts_with("Arg");
        let axes = if arg { Some(vec![node.int("axis").unwrap_or(0)]) } else { self.ints(node, 1, "axes")? };
        let axes = match axes {
            Some(axes) if !axes.is_empty() => {
                axes.iter().map(|&axis| self.axis(axis, rank)).collect::<Result<Vec<_>, _>>()?
            }
            _ if node.int("noop_with_empty_axes").unwrap_or(0) != 0 => return Ok(Flow::of(layout.clone())),
            _ => (0..rank).collect(),
        };
        let keep = node.int("keepdims").unwrap_or(1) != 0;
        let mut out = Vec::new();
        for (at, axis) in layout.0.iter().enumerate() {
            match (axes.contains(&at), keep) {
                (false, _) => out.push(axis.clone()),
                (true, true) => out.push(Axis::default()),
                (true, false) => {}
            }
        }
        let flow = Flow::of(Layout(out));
        let over: Vec<usize> = axes.iter().copied().filter(|&axis| layout.0[axis].has_tokens()).collect();
        match over.as_slice() {
            [] => Ok(flow),
            [axis] if axes.len() == 1 => {
                let span = layout.0[*axis].only_tokens().ok_or("it reduces tokens together with something else")?;
                match node.op.name.as_str() {
                    "ReduceMean" => Ok(flow.with(Effect::Pool { span, axis: *axis, mean: true })),
                    "ReduceSum" => Ok(flow.with(Effect::Pool { span, axis: *axis, mean: false })),
                    "ReduceMax" | "ReduceMin" => Ok(flow.with(Effect::Extreme)),
                    _ => Err(format!("{} over tokens depends on their number", node.op)),
                }
            }
            _ => Err("it reduces tokens together with something else".into()),
        }
    }

    fn global_pool(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let over: Vec<usize> = (2..layout.rank()).filter(|&axis| layout.0[axis].has_tokens()).collect();
        let mut out = layout.clone();
        out.0[2..].fill(Axis::default());
        match over.as_slice() {
            [] => Ok(Flow::of(out)),
            [axis] if layout.rank() == 3 => {
                let span = layout.0[*axis].only_tokens().ok_or("it pools tokens together with something else")?;
                let mean = node.is("GlobalAveragePool");
                Ok(Flow::ends(if mean { Effect::Pool { span, axis: *axis, mean } } else { Effect::Extreme }))
            }
            _ => Err("it pools tokens together with something else".into()),
        }
    }

    // --- attention -----------------------------------------------------------------------------------------------

    /// The standard operator of version 23: Q, K and V as `[B, H, N, d]` or `[B, N, H·d]`.
    fn attention(&self, node: &Node) -> Transfer {
        let axes = |slot: usize| self.axes(node.input(slot).ok_or("no operand")?);
        let (q, k, v) = (axes(0)?, axes(1)?, axes(2)?);
        if node.int("is_causal").unwrap_or(0) != 0
            || node.input(4).is_some()
            || node.input(5).is_some()
            || node.input(6).is_some()
        {
            return Err("its attention is causal or has a cache".into());
        }
        let token_axis = if k.len() == 4 { 2 } else { 1 };
        if k[token_axis].only_tokens() != Some(Span::ALL) || !v[token_axis].same_as(&k[token_axis]) {
            return Err("its keys and values are not the tokens".into());
        }
        let elsewhere = |axes: &[Axis]| axes.iter().enumerate().any(|(at, axis)| at != token_axis && axis.has_tokens());
        if elsewhere(&q) || elsewhere(&k) || elsewhere(&v) {
            return Err("it has tokens on another axis than the one it attends over".into());
        }
        let mut flow = Flow::default().with(Effect::Attend);
        if let Some(mask) = node.input(3) {
            let dims = self.axes(mask)?;
            let sized = dims.iter().rev().take(2).any(|axis| !axis.atoms().is_empty());
            if sized && self.shapes.uniform(mask).is_none() {
                return Err("its mask has an entry for each token".into());
            }
            if sized {
                flow.effects.push(Effect::UniformTable { slot: 3 });
            }
        }
        if node.output(3).is_some() {
            return Err("its scores are read elsewhere".into());
        }
        let mut out = q.clone();
        let last = out.len() - 1;
        out[last] = Axis::plain(&self.result_dims(node, 0)?[last]);
        flow.layouts = vec![Some(Layout(out))];
        Ok(flow)
    }
}

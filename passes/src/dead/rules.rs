//! What an operator takes of its operands to compute a part of its results.
//!
//! An operator without a rule takes all of them; so does one whose result depends on positions beyond the part, be it
//! only through a scale that is found at run time.

use std::collections::HashSet;

use vitrim_ir::{Expr, FusedAttention, Graph, Node, OpType, Operands, Shapes, SkipNorm, ValueId};
use vitrim_ops::{
    Attention, OpDef, ProportionalAttention, TokenMerge, TokenMergeDynamic, TokenPrune, TokenPruneDynamic,
};

use super::part::{Factor, Part};
use crate::target::reshape_target;

/// Operands by their slots, with the parts that are taken of them.
type Parts = Vec<(usize, Part)>;

/// What a node takes to compute a part of its results.
#[derive(Clone, Debug)]
pub(super) struct Needs {
    /// Operands of which it takes a part. All others it takes as they are.
    pub parts: Parts,
    /// The shape that its second operand must state.
    pub target: Option<Vec<i64>>,
}

/// Whether it is an operator of ours that reduces tokens: the second axis of its first operand and result.
pub(super) fn reduces(op: &OpType) -> bool {
    let ops: [&dyn OpDef; 4] = [&TokenMerge, &TokenMergeDynamic, &TokenPrune, &TokenPruneDynamic];
    ops.iter().any(|known| known.op_type() == *op)
}

/// A value that holds, as a part of it, all that is wanted of another.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub value: ValueId,
    factor: Factor,
    /// How much farther from the front positions are in it.
    offset: i64,
}

impl Source {
    /// What it has for a part of the other value.
    pub fn part(&self, part: &Part) -> Part {
        Part { factor: self.factor.clone(), start: part.start + self.offset, end: part.end + self.offset }
    }
}

pub(super) struct Rules<'a> {
    pub graph: &'a Graph,
    pub shapes: &'a Shapes,
}

impl Rules<'_> {
    /// What a node takes to compute parts of its results, which are given by their slots; and the part of each that it
    /// then computes. `None` where it must compute all.
    pub fn needs(&self, node: &Node, results: &[(usize, Part)]) -> Option<(Needs, Part)> {
        let ((first, part), others) = results.split_first()?;
        let part = others.iter().try_fold(part.clone(), |all, (_, part)| all.join(part))?;
        let alike = |slot: usize| match SkipNorm::of(node) {
            Some(_) => [SkipNorm::NORM, SkipNorm::SUM].contains(&slot),
            None => slot == 0 || node.is("Split"),
        };
        if !part.is_few() || !results.iter().all(|&(slot, _)| alike(slot)) {
            return None;
        }
        let parts = self.parts(node, *first, &part)?;
        let sound = parts.iter().all(|(slot, part)| self.can_be_cut(node.input(*slot), part));
        if parts.is_empty() || !sound || !self.has_one_scale(node, &parts) {
            return None;
        }
        let target = match node.op.name.as_str() {
            "Reshape" => Some(self.reshape_target(node, &part, &parts)?),
            "Expand" => Some(self.expand_target(node, &part)?),
            _ => None,
        };
        Some((Needs { parts, target }, part))
    }

    fn parts(&self, node: &Node, slot: usize, part: &Part) -> Option<Parts> {
        let at = part.factor.axis;
        if [&Attention as &dyn OpDef, &ProportionalAttention].iter().any(|op| op.op_type() == node.op) {
            return (at == 1 && part.factor.is_axis()).then(|| vec![(0, part.clone())]);
        }
        if !matches!(node.op.domain.as_str(), "" | "com.microsoft") {
            return None;
        }
        if let Some(fused) = FusedAttention::of(self.graph, node) {
            return self.attention(node, &fused, part);
        }
        let dims = self.dims(node.output(slot)?)?;
        let rank = dims.len();
        if let Some(operands) = node.elementwise_operands() {
            return self.broadcast(operands, part, rank);
        }
        let alone = || Some(vec![(0, part.clone())]);
        let axis = |name: &str, default: i64| position(node.int(name).unwrap_or(default), rank);
        match node.op.name.as_str() {
            "QuantizeLinear" | "DequantizeLinear" => {
                let parameters = node.operands().skip(1);
                let of_others = node.int("block_size").unwrap_or(0) == 0 && axis("axis", 1) != Some(at);
                (of_others || parameters.into_iter().all(|value| self.is_single(value))).then(alone)?
            }
            // Its scale is found among all rows.
            "DynamicQuantizeMatMul" => None,
            "MatMulNBits" | "MatMulBnb4" | "MatMulFpQ4" => (at + 1 < rank).then(alone)?,
            "Einsum" => self.einsum(node, part),
            _ if node.factors().is_some() => self.matmul(node, part, rank),
            "Transpose" => {
                let perm = node.ints("perm");
                let from = perm.map_or(Some(rank - 1 - at), |perm| usize::try_from(*perm.get(at)?).ok())?;
                Some(vec![(0, part.on_axis(from))])
            }
            // Without axes it would remove a token axis of one.
            "Squeeze" if node.input(1).is_none() => None,
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
                let factor = part.factor.reshaped(dims, self.dims(node.input(0)?)?)?;
                Some(vec![(0, Part { factor, ..part.clone() })])
            }
            "Split" => (axis("axis", 0)? != at).then(alone)?,
            "Slice" => (!self.slices(node)?.iter().any(|&(axis, ..)| axis == at)).then(alone)?,
            "Gather" => self.gather(node, part),
            "Pad" => {
                let pads = node.input(1).filter(|_| node.input(3).is_none()).and_then(|pads| self.ints(pads))?;
                (pads.len() == 2 * rank && pads[at] == 0 && pads[at + rank] == 0).then(alone)?
            }
            "Concat" | "QLinearConcat" => {
                let along = axis("axis", 0)?;
                (along != at).then(|| node.data_operands().map(|(slot, _)| (slot, part.clone())).collect())
            }
            "Expand" => self.broadcast(vec![(0, node.input(0)?)], part, rank),
            "Softmax" | "LogSoftmax" | "QLinearSoftmax" => {
                // The quantised form may be of a version that normalises everything from the axis on.
                let along = axis("axis", -1)?;
                let joint = node.int("opset").is_some_and(|version| version < 13);
                (if joint { at < along } else { at != along }).then(alone)?
            }
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" => {
                let plain = node.operands().skip(1).all(|value| self.reach(value, part, rank) == Some(None));
                (at < axis("axis", -1)? && plain).then(alone)?
            }
            "LpNormalization" => (at != axis("axis", -1)?).then(alone)?,
            _ if SkipNorm::of(node).is_some() => {
                let sum = [0, 1].into_iter().filter_map(|slot| Some((slot, node.input(slot)?)));
                (at + 1 < rank).then(|| self.broadcast(sum, part, rank))?
            }
            "BatchNormalization" => (at != 1 && node.int("training_mode").unwrap_or(0) == 0).then(alone)?,
            // A mean over channels, where these stand behind the tokens.
            "GlobalAveragePool" | "GlobalMaxPool" | "QLinearGlobalAveragePool" => {
                (at < 2 && node.int("channels_last").unwrap_or(0) == 0).then(alone)?
            }
            "Conv" | "FusedConv" | "ConvInteger" => self.pointwise_conv(node, 1, part),
            "QLinearConv" => self.pointwise_conv(node, 3, part),
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare"
            | "ReduceProd" | "ReduceLogSumExp" | "ReduceLogSum" | "ArgMax" | "ArgMin" | "QLinearReduceMean" => {
                self.reduce(node, part)
            }
            _ => None,
        }
    }

    /// Operands aligned at the last axis; what has one entry there meets every position.
    fn broadcast(
        &self,
        operands: impl IntoIterator<Item = (usize, ValueId)>,
        part: &Part,
        rank: usize,
    ) -> Option<Parts> {
        let reach = |(slot, value): (usize, ValueId)| {
            let met = self.reach(value, part, rank)?;
            Some(met.map(|part| (slot, part)))
        };
        let reached = operands.into_iter().map(reach).collect::<Option<Vec<_>>>()?;
        Some(reached.into_iter().flatten().collect())
    }

    /// The part of an operand that meets a part of a result of `rank` axes, to which it is broadcast: `Some(None)` where
    /// all of it does.
    fn reach(&self, value: ValueId, part: &Part, rank: usize) -> Option<Option<Part>> {
        let dims = self.dims(value)?;
        let Some(axis) = (part.factor.axis + dims.len()).checked_sub(rank) else { return Some(None) };
        let dim = dims.get(axis)?;
        if dim.is(1) {
            return Some(None);
        }
        (*dim == part.factor.entries(&part.factor.extent)?).then(|| Some(part.on_axis(axis)))
    }

    /// Attention of fewer queries over all keys.
    fn attention(&self, node: &Node, fused: &FusedAttention, part: &Part) -> Option<Parts> {
        let (queries, result) = (self.dims(node.input(0)?)?, self.dims(node.output(0)?)?);
        let of_queries = part.factor.axis + 2 == result.len() && part.factor.is_axis();
        if fused.obstacle.is_some() || fused.operands != Operands::Apart || queries.len() != result.len() || !of_queries
        {
            return None;
        }
        // Masks of one axis count tokens; those of three have rows for queries.
        let of_keys = |value: ValueId| self.dims(value).is_some_and(|dims| dims.len() == 2);
        if fused.mask.and_then(|slot| node.input(slot)).is_some_and(|mask| !of_keys(mask)) {
            return None;
        }
        let mut parts = vec![(0, part.clone())];
        if let Some((slot, bias)) = fused.attention_bias.and_then(|slot| Some((slot, node.input(slot)?))) {
            parts.extend(self.reach(bias, &part.on_axis(2), 4)?.map(|part| (slot, part)));
        }
        Some(parts)
    }

    fn matmul(&self, node: &Node, part: &Part, rank: usize) -> Option<Parts> {
        let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
        if flag("transBatchA") || flag("transBatchB") {
            return None;
        }
        let mut parts = Vec::new();
        let from_end = rank - part.factor.axis;
        for (slot, transposed, own) in [(0, flag("transA"), 2), (1, flag("transB"), 1)] {
            let slot = node.factors()?[slot];
            let value = node.input(slot)?;
            let operand = self.dims(value)?.len();
            if operand < 2 {
                return None;
            }
            match from_end {
                1 | 2 if from_end != own => {}
                1 | 2 => parts.push((slot, part.on_axis(operand - if transposed { 3 - own } else { own }))),
                _ => parts.extend(self.reach(value, part, rank)?.map(|part| (slot, part))),
            }
        }
        if let Some((slot, bias)) = node.bias().and_then(|slot| Some((slot, node.input(slot)?))) {
            parts.extend(self.reach(bias, part, rank)?.map(|part| (slot, part)));
        }
        Some(parts)
    }

    fn einsum(&self, node: &Node, part: &Part) -> Option<Parts> {
        let equation: String = node.string("equation")?.split_whitespace().collect();
        let (terms, result) = equation.split_once("->").filter(|_| !equation.contains("..."))?;
        let label = result.chars().nth(part.factor.axis)?;
        let mut parts = Vec::new();
        for (slot, term) in terms.split(',').enumerate() {
            let axes: Vec<usize> = (0..).zip(term.chars()).filter(|(_, own)| *own == label).map(|(at, _)| at).collect();
            let value = node.input(slot)?;
            match axes[..] {
                [] => {}
                // One entry may stand for all.
                [axis] if self.dims(value)?.get(axis)?.is(1) => {}
                [axis] => parts.push((slot, part.on_axis(axis))),
                _ => return None,
            }
        }
        Some(parts)
    }

    fn gather(&self, node: &Node, part: &Part) -> Option<Parts> {
        let (dims, indices) = (self.dims(node.input(0)?)?, self.dims(node.input(1)?)?);
        let along = position(node.int("axis").unwrap_or(0), dims.len())?;
        let at = part.factor.axis;
        Some(vec![match at {
            _ if at < along => (0, part.clone()),
            _ if at < along + indices.len() => (1, part.on_axis(at - along)),
            _ => (0, part.on_axis(at + 1 - indices.len())),
        }])
    }

    /// A convolution whose kernel covers one position.
    fn pointwise_conv(&self, node: &Node, kernel: usize, part: &Part) -> Option<Parts> {
        let all = |name: &str, n: i64| node.ints(name).is_none_or(|values| values.iter().all(|&x| x == n));
        let space = self.dims(node.input(kernel)?)?.get(2..)?;
        let pointwise = space.iter().all(|dim| dim.is(1)) && all("strides", 1) && all("pads", 0);
        let adds = node.op.name == "FusedConv" && node.input(3).is_some();
        (pointwise && !adds && part.factor.axis != 1).then(|| vec![(0, part.clone())])
    }

    fn reduce(&self, node: &Node, part: &Part) -> Option<Parts> {
        let rank = self.dims(node.input(0)?)?.len();
        let axes = match node.int("axis").filter(|_| node.op.name.starts_with("Arg")) {
            Some(axis) => vec![axis],
            None if node.op.name.starts_with("Arg") => vec![0],
            None => node.ints("axes").map(<[i64]>::to_vec).or_else(|| self.ints(node.input(1)?))?,
        };
        let axes = axes.into_iter().map(|axis| position(axis, rank)).collect::<Option<HashSet<_>>>()?;
        let kept: Vec<usize> = match node.int("keepdims").unwrap_or(1) {
            0 => (0..rank).filter(|axis| !axes.contains(axis)).collect(),
            _ => (0..rank).collect(),
        };
        let from = *kept.get(part.factor.axis)?;
        // Without axes it reduces over all, or does nothing.
        (!axes.is_empty() && !axes.contains(&from)).then(|| vec![(0, part.on_axis(from))])
    }

    /// The target of a `Reshape` when of its operand and result there are these parts.
    fn reshape_target(&self, node: &Node, part: &Part, parts: &Parts) -> Option<Vec<i64>> {
        let [(_, operand)] = parts.as_slice() else { return None };
        let from = operand.cut(self.dims(node.input(0)?)?)?;
        let to = part.cut(self.dims(node.output(0)?)?)?;
        let extents: Vec<Option<i64>> = to.iter().map(Expr::as_known).collect();
        reshape_target(&extents, |at| from.get(at) == to.get(at))
    }

    /// The target of an `Expand` of which there is this part: one leaves an axis as it is.
    fn expand_target(&self, node: &Node, part: &Part) -> Option<Vec<i64>> {
        let (from, to) = (self.dims(node.input(0)?)?, part.cut(self.dims(node.output(0)?)?)?);
        let lead = to.len().checked_sub(from.len())?;
        let keeps = |at: usize| at.checked_sub(lead).is_some_and(|at| !from[at].is(1));
        to.iter().enumerate().map(|(at, extent)| if keeps(at) { Some(1) } else { extent.as_known() }).collect()
    }

    /// Integers of tokens must stand for numbers by one scale and zero point: one for each row would be one for each
    /// token. (`QuantizeLinear` and `DequantizeLinear` know the axis of theirs.)
    fn has_one_scale(&self, node: &Node, parts: &Parts) -> bool {
        if matches!(node.op.name.as_str(), "QuantizeLinear" | "DequantizeLinear") {
            return true;
        }
        let operands = node.quantised_operands().into_iter().filter(|(slot, _)| parts.iter().any(|(at, _)| at == slot));
        let mut parameters = operands.map(|(_, scale)| scale).chain(node.quantised_result());
        parameters.all(|scale| scale.slots().filter_map(|slot| node.input(slot)).all(|value| self.is_single(value)))
    }

    /// Whether a part can be cut out of an operand: shares of an axis take a reshape, whose target must be known.
    fn can_be_cut(&self, value: Option<ValueId>, part: &Part) -> bool {
        let Factor { axis, outer, extent, inner } = &part.factor;
        let Some(dims) = value.and_then(|value| self.dims(value)) else { return false };
        let others = dims.iter().enumerate().filter(|(at, _)| at != axis).map(|(_, dim)| dim);
        let open = others.chain([outer, inner]).filter(|dim| dim.as_known().is_none()).count();
        part.factor.is_axis() || (open <= 1 && extent.as_known().is_some())
    }

    /// Where result `slot` of a node has this part from, if it only passes it on.
    pub fn source(&self, node: &Node, slot: usize, part: &Part) -> Option<Source> {
        if !part.factor.is_axis() {
            return None;
        }
        let from = |value: ValueId, offset: i64| {
            let extent = self.dims(value)?.get(part.factor.axis)?;
            Some(Source { value, factor: Factor::whole(part.factor.axis, extent), offset })
        };
        if reduces(&node.op) {
            // Protected tokens stay what they are: the first ones, and the last.
            let x = node.input(0).filter(|_| slot == 0 && part.factor.axis == 1)?;
            let left = || part.factor.extent.as_known();
            if part.end <= node.int("protect")? {
                return from(x, 0);
            }
            let before = self.dims(x)?.get(1)?.as_known()?;
            return (part.start >= left()? - node.int("suffix")?).then(|| from(x, before - left()?))?;
        }
        if node.is("Concat") && position(node.int("axis")?, self.dims(node.output(0)?)?.len()) == Some(part.factor.axis)
        {
            let mut start = 0;
            for value in node.operands() {
                let extent = self.dims(value)?.get(part.factor.axis)?.as_known();
                if part.start >= start && extent.is_some_and(|extent| part.end <= start + extent) {
                    return from(value, -start);
                }
                start += extent?;
            }
        }
        None
    }

    /// The part of its first operand that a node takes by constant positions along `axis`, where it takes no other.
    pub fn picked(&self, node: &Node, axis: usize) -> Option<Part> {
        let dims = self.dims(node.input(0)?)?;
        let extent = dims.get(axis)?;
        let part = |start, end| Part { factor: Factor::whole(axis, extent), start, end };
        match node.standard_op()? {
            "Gather" => {
                let positions = self.positions(node, axis)?;
                Some(part(*positions.iter().min()?, positions.iter().max()? + 1))
            }
            "Slice" => {
                let (_, start, end) = self.slices(node)?.into_iter().find(|&(own, ..)| own == axis)?;
                // Of an unknown number of tokens there may be fewer than it would take.
                let taken = self.dims(node.output(0)?)?.get(axis)?.as_known()?;
                (start < end && taken == end - start).then(|| part(start, end))
            }
            "Split" => {
                let wanted = self.split(node, axis)?.into_iter().filter(|(value, _)| self.is_read(*value));
                wanted.map(|(_, part)| part).reduce(|all, part| all.join(&part).unwrap_or(all))
            }
            _ => None,
        }
    }

    /// The positions along `axis` that a `Gather` takes, counted from the front.
    pub fn positions(&self, node: &Node, axis: usize) -> Option<Vec<i64>> {
        let dims = self.dims(node.input(0)?)?;
        if position(node.int("axis").unwrap_or(0), dims.len()) != Some(axis) {
            return None;
        }
        let extent = dims[axis].as_known();
        self.ints(node.input(1)?)?.into_iter().map(|at| if at < 0 { Some(at + extent?) } else { Some(at) }).collect()
    }

    /// The axes that a `Slice` cuts, with first and last positions counted from the front. Steps are none.
    pub fn slices(&self, node: &Node) -> Option<Vec<(usize, i64, i64)>> {
        let dims = self.dims(node.input(0)?)?;
        let (starts, ends) = (self.ints(node.input(1)?)?, self.ints(node.input(2)?)?);
        let axes = node.input(3).map_or_else(|| Some((0..starts.len() as i64).collect()), |axes| self.ints(axes))?;
        let steps = node.input(4).map_or_else(|| Some(vec![1; starts.len()]), |steps| self.ints(steps))?;
        if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] || steps.iter().any(|&step| step != 1) {
            return None;
        }
        let cut = |((axis, start), end): ((i64, i64), i64)| {
            let axis = position(axis, dims.len())?;
            let from_front = |at: i64| match dims[axis].as_known() {
                Some(extent) => Some(if at < 0 { at + extent } else { at }.clamp(0, extent)),
                None => (at >= 0).then_some(at),
            };
            Some((axis, from_front(start)?, from_front(end)?))
        };
        axes.into_iter().zip(starts).zip(ends).map(cut).collect()
    }

    /// The results of a `Split` along `axis`, and which part of its operand each is.
    pub fn split(&self, node: &Node, axis: usize) -> Option<Vec<(ValueId, Part)>> {
        let dims = self.dims(node.input(0)?)?;
        if position(node.int("axis").unwrap_or(0), dims.len()) != Some(axis) {
            return None;
        }
        let factor = Factor::whole(axis, &dims[axis]);
        let mut start = 0;
        let range = |value: &Option<ValueId>| {
            let end = start + self.dims((*value)?)?.get(axis)?.as_known()?;
            let part = Part { factor: factor.clone(), start, end };
            start = end;
            Some(((*value)?, part))
        };
        node.outputs.iter().map(range).collect()
    }

    /// Whether anything reads a value.
    pub fn is_read(&self, value: ValueId) -> bool {
        !self.graph.value(value).uses().is_empty() || self.graph.output_slots(value).next().is_some()
    }

    /// The extents of a value.
    pub fn dims(&self, value: ValueId) -> Option<&[Expr]> {
        self.shapes.dims(value)
    }

    /// The numbers that a list of integers holds.
    pub fn ints(&self, value: ValueId) -> Option<Vec<i64>> {
        self.shapes.ints(value)?.iter().map(Expr::as_known).collect()
    }

    fn is_single(&self, value: ValueId) -> bool {
        self.dims(value).is_some_and(|dims| dims.iter().all(|dim| dim.is(1)))
    }
}

/// An axis counted from the front.
fn position(axis: i64, rank: usize) -> Option<usize> {
    let positive = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(positive).ok().filter(|&axis| axis < rank)
}

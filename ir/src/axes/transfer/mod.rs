//! Transfer rules: what an operator makes of the token axis. One file per family of operators.

mod attention;
mod elementwise;
mod moving;
mod products;
mod reductions;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use super::{Axis, Effect, Layout, Source};
use crate::graph::{Graph, Node};
use crate::{Expr, FusedAttention, Shapes, SkipNorm, ValueId};

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
    pub source: &'a Source,
    pub layouts: &'a HashMap<ValueId, Layout>,
    /// Values that depend on the tokens' content.
    pub reached: &'a HashSet<ValueId>,
}

impl Context<'_> {
    pub fn transfer(&self, node: &Node) -> Transfer {
        let contrib = node.op.domain == "com.microsoft";
        if !(node.op.domain.is_empty() || contrib) {
            return Err(format!("there is no rule for the operator {}", node.op));
        }
        if let Some(fused) = FusedAttention::of(self.graph, node) {
            return self.attention(node, &fused);
        }
        self.one_scale(node)?;
        if let Some(operands) = node.elementwise_operands() {
            return self.elementwise(node, &operands);
        }
        match node.op.name.as_str() {
            "BiasSplitGelu" => self.halve_channels(node),
            "QuantizeLinear" | "DequantizeLinear" => self.quantize(node),
            "DynamicQuantizeLinear" => Ok(Flow::of(self.operand(node, 0)?.clone())),
            "MatMulNBits" | "MatMulBnb4" | "MatMulFpQ4" => self.packed_weights(node),
            "Einsum" => self.einsum(node),
            // Every other product of matrices.
            _ if node.factors().is_some() => self.matmul(node),
            "Transpose" => self.transpose(node),
            "Reshape" | "Flatten" => self.reshape(node),
            "Squeeze" => self.squeeze(node),
            "Unsqueeze" => self.unsqueeze(node),
            "Split" => self.split(node),
            "Slice" => self.slice(node),
            "Gather" => self.gather(node),
            "Concat" | "QLinearConcat" => self.concat(node),
            "Expand" => self.expand(node),
            "Tile" => self.tile(node),
            "Pad" => self.pad(node),
            "TopK" | "CumSum" => self.along_axis(node),
            "Softmax" | "LogSoftmax" | "BiasSoftmax" | "QLinearSoftmax" => self.softmax(node),
            "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" | "LpNormalization" => {
                self.layer_norm(node)
            }
            _ if SkipNorm::of(node).is_some() => self.skip_norm(node),
            "BatchNormalization" => self.per_channel(node),
            "GroupNormalization" | "InstanceNormalization" | "GroupNorm" => self.norm_per_image(node),
            "Conv" | "FusedConv" | "ConvInteger" => self.pointwise_conv(node, 1),
            "QLinearConv" => self.pointwise_conv(node, 3),
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare"
            | "ReduceProd" | "ReduceLogSumExp" | "ReduceLogSum" | "ArgMax" | "ArgMin" | "QLinearReduceMean" => {
                self.reduce(node)
            }
            "GlobalAveragePool" | "GlobalMaxPool" | "QLinearGlobalAveragePool" => self.global_pool(node),
            "Shape" | "Size" => Ok(Flow::default()),
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

    /// What an operand is that has no tokens and is broadcast to `axes`: nothing of note, or a table with entries for
    /// tokens.
    fn table(&self, slot: usize, value: ValueId, axes: &[Axis]) -> Result<Option<Effect>, String> {
        let dims = self.dims(value)?;
        let lead = axes.len().checked_sub(dims.len()).ok_or("it has more axes than what it is broadcast to")?;
        let along = || (0..dims.len()).filter(|&at| axes[lead + at].has_tokens() && !dims[at].is(1));
        if along().next().is_none() {
            return Ok(None);
        }
        if self.shapes.uniform(value).is_some() {
            return Ok(Some(Effect::UniformTable { slot }));
        }
        let name = self.graph.value(value).name();
        if self.reached.contains(&value) {
            return Err(format!("operand {slot} ('{name}') has an entry of its own for each token"));
        }
        let entry = |at: usize| {
            let axis = &axes[lead + at];
            let all = axis.extent(&self.source.tokens).as_ref() == Some(&dims[at]);
            let span = axis.only_tokens().filter(|_| all).ok_or_else(|| {
                format!("operand {slot} ('{name}') has {} entries along an axis that holds tokens and more", dims[at])
            })?;
            Ok::<_, String>((at, span))
        };
        Ok(Some(Effect::Table { slot, axes: along().map(entry).collect::<Result<_, _>>()? }))
    }

    /// Whether `value` holds one number.
    fn is_single(&self, value: ValueId) -> Result<bool, String> {
        Ok(self.dims(value)?.iter().all(|dim| dim.is(1)))
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
}

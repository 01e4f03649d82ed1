//! What a cut gives: the residual stream, and in some fused operators its norm beside it.

use vitrim_ir::{Attribute, NodeId, SkipNorm, ValueId};

use super::Rewriter;
use crate::Refusal;

impl Rewriter<'_> {
    /// The residual stream that a cut gives: of a norm and its sum the sum, unless only the norm is read (post-norm).
    pub(super) fn stream(&self, cut: NodeId) -> Result<ValueId, Refusal> {
        let node = self.graph.node(cut);
        let carried = |&value: &ValueId| self.vit.axes.carries(value);
        if SkipNorm::of(node).is_some() {
            let sum = node.output(SkipNorm::SUM).filter(|&sum| !self.graph.value(sum).uses().is_empty());
            if let Some(stream) = sum.or(node.output(SkipNorm::NORM)).filter(carried) {
                return Ok(stream);
            }
        }
        match node.results().filter(carried).collect::<Vec<_>>()[..] {
            [stream] => Ok(stream),
            _ => Err(self.pinned(cut, "it gives several streams of tokens at once")),
        }
    }

    /// The stream of a cut as it is before the merge. Where the norm beside it is not wanted as it is, additions give the
    /// sum: in ONNX Runtime they cost a fifth to two thirds of the operator that norms as well.
    pub(super) fn before_merge(&mut self, cut: NodeId, stream: ValueId) -> ValueId {
        let node = self.graph.node(cut);
        let Some(skip) = SkipNorm::of(node).filter(|_| node.output(SkipNorm::SUM) == Some(stream)) else {
            return stream;
        };
        let (Some(branch), Some(residual)) = (node.input(0), node.input(1)) else { return stream };
        let (mut sum, residual) = (self.replacement(branch), self.replacement(residual));
        let hint = format!("vitrim/{}", self.graph.value(stream).name());
        if let Some(bias) = node.input(skip.bias) {
            sum = self.patch.op("Add", &format!("{hint}/biased"), &[sum, bias], &[]);
        }
        self.patch.op("Add", &hint, &[sum, residual], &[])
    }

    /// Lets the readers of what a cut gives read the merged stream; its norm is computed anew from that.
    pub(super) fn replace_stream(&mut self, cut: NodeId, stream: ValueId, merged: ValueId) {
        let node = self.graph.node(cut);
        self.replace(stream, merged);
        let norm =
            node.output(SkipNorm::NORM).filter(|&norm| norm != stream && !self.graph.value(norm).uses().is_empty());
        if let (Some(skip), Some(norm)) = (SkipNorm::of(node), norm) {
            let parameters = skip.parameters.iter().filter_map(|&slot| node.input(slot));
            let operands: Vec<ValueId> = std::iter::once(merged).chain(parameters).collect();
            let epsilon = node.float("epsilon").unwrap_or(SkipNorm::EPSILON);
            let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(epsilon))];
            let hint = format!("vitrim/{}", self.graph.value(norm).name());
            let anew = self.patch.op(skip.norm, &hint, &operands, &attributes);
            self.replace(norm, anew);
        }
    }
}

//! Tri-Level E-ViT's attention level: a pruning also closes weak connections, for the blocks behind it.
//!
//! Every attention of such a model takes the masked softmax, those with all connections open too: that is how the
//! authors' models are trained.

use vitrim_ir::{Attribute, DataType, Tensor, ValueId};
use vitrim_ops::masked_softmax::EPSILON;
use vitrim_ops::{ConnectionMask, ConnectionMaskDynamic, MaskedSoftmax};

use super::plan::Act;
use super::precision::Coding;
use super::{Rewriter, Stream};
use crate::Refusal;
use crate::schedule::keep_count;

impl Rewriter<'_> {
    /// Whether connections are closed anywhere.
    pub(super) fn closes_connections(&self) -> bool {
        self.acts.iter().flatten().any(|act| matches!(act, Act::Prune { attention_keep: Some(_), .. }))
    }

    /// Puts the masked softmax in the place of those of a block.
    pub(super) fn mask_attention(&mut self, block: usize) -> Result<(), Refusal> {
        if !self.closes_connections() {
            return Ok(());
        }
        let stage = self.stages.of_block(block);
        for attention in &self.vit.blocks[block].attentions {
            let id = attention.core.softmax;
            let node = self.graph.node(id);
            let refusal = self.pinned(
                id,
                "it is no softmax of [batch, heads, queries, keys] in floating point, which connections could be closed \
                 in: prune without the attention level, or a model that was exported without fusion",
            );
            let unknown = || refusal.clone();
            let (Some(scores), Some(weights)) = (node.input(0), node.output(0)) else { return Err(unknown()) };
            let plain = matches!(self.coding_of_operand(node, 0), Some(Coding::Plain(dtype)) if dtype.is_float());
            if attention.core.is_fused() || !node.is("Softmax") || !plain {
                return Err(unknown());
            }
            let hint = format!("vitrim/{}", self.graph.value(weights).name());
            let heads = attention.heads as i64;
            let dims = self.vit.axes.layout(weights).map(|layout| layout.rank());
            let by_head = self.scores_by_head(weights, scores, heads, &format!("{hint}/scores"));
            let by_head = by_head.ok_or_else(unknown)?;
            let mask = self.mask_at(stage, block)?;
            let size = match self.stages.entry(stage).size.filter(|_| self.weights.proportional) {
                Some(size) => size,
                None => self.ones(stage, block)?,
            };
            let attributes =
                [("eps", Attribute::Float(EPSILON)), ("dtype", Attribute::Int(self.dtype(weights).code().into()))];
            let masked = self.vitrim_with(&MaskedSoftmax, &hint, &[by_head, mask, size], &attributes, 1)[0];
            self.masked.insert(id, masked);
            let result = match dims {
                Some(4) => masked,
                _ => {
                    let joined = self.reshape(masked, &[-1, 1, 0, 0], &format!("{hint}/joined"));
                    self.with_axes("Squeeze", joined, &[1], &format!("{hint}/as_before"))
                }
            };
            self.replace(weights, result);
        }
        Ok(())
    }

    /// The share of connections that the pruning at the end of `stream` leaves open.
    pub(super) fn connect(&mut self, stream: &Stream, share: f64) -> Result<(), Refusal> {
        let block = &self.vit.blocks[stream.block];
        let of_attention = self.stages.of_block(stream.block);
        let weights = match &block.attentions[..] {
            [attention] if of_attention + 1 == stream.stage => self.masked.get(&attention.core.softmax).copied(),
            _ => None,
        };
        let (Some(weights), Some(grouping)) = (weights, self.stages.entry(stream.stage).grouping) else {
            return Err(Refusal::Request(format!(
                "block {} has several attentions or acts: connections are closed where pruning comes first",
                stream.block
            )));
        };
        let (protect, suffix) = (self.vit.special.prefix(), self.stages.suffix(stream.stage));
        let ends = [("protect", protect as i64), ("suffix", suffix as i64)];
        let hint = format!("{}/mask", stream.hint);
        let mask = match self.stages.count(stream.stage).and_then(|count| count.as_known()) {
            Some(slots) => {
                let free = (slots as usize).saturating_sub(protect + suffix);
                let connections = keep_count(free, share).max(1) as i64;
                let attributes = [&[("connections", connections), ("slots", slots)], &ends[..]].concat();
                self.vitrim(&ConnectionMask, &hint, &[weights, grouping.anchor], &attributes, 1)[0]
            }
            None => {
                let share = self.patch.constant(&format!("{hint}/share"), Tensor::floats(DataType::F64, &[], &[share]));
                let connections = self.share_of_patches(stream.value, share, &format!("{hint}/connections"));
                self.vitrim(&ConnectionMaskDynamic, &hint, &[weights, grouping.anchor, connections], &ends, 1)[0]
            }
        };
        self.stages.entry_mut(stream.stage).mask = Some(mask);
        Ok(())
    }

    /// Open connections between the tokens of a stage, `[B, N, N]`: of those whose places they keep.
    fn mask_at(&mut self, stage: usize, block: usize) -> Result<ValueId, Refusal> {
        if let Some(mask) = self.stages.entry(stage).mask {
            return Ok(mask);
        }
        let mask = if stage == 0 {
            let ones = self.ones(stage, block)?;
            let row = self.transpose(ones, &[0, 2, 1], "vitrim/open_row");
            self.patch.op("Mul", "vitrim/open", &[ones, row], &[])
        } else {
            let before = self.mask_at(stage - 1, block)?;
            if self.stages.suffix(stage) > self.stages.suffix(stage - 1) {
                return Err(Refusal::Request(
                    "a pruning that fuses tokens comes behind one that closes connections: give attention_keep in both"
                        .into(),
                ));
            }
            let hint = format!("vitrim/mask{stage}");
            let rows = self.rows_at(before, stage - 1, stage, &format!("{hint}_rows"));
            let columns = self.transpose(rows, &[0, 2, 1], &format!("{hint}_columns"));
            let columns = self.rows_at(columns, stage - 1, stage, &format!("{hint}_both"));
            self.transpose(columns, &[0, 2, 1], &hint)
        };
        self.stages.entry_mut(stage).mask = Some(mask);
        Ok(mask)
    }

    /// One for each token of a stage, `[B, N, 1]`.
    fn ones(&mut self, stage: usize, block: usize) -> Result<ValueId, Refusal> {
        if let Some(ones) = self.stages.entry(stage).ones {
            return Ok(ones);
        }
        let origin = self.vit.axes.origin();
        let id = self.vit.blocks[block].cut;
        let unknown = |rewriter: &Self| rewriter.pinned(id, "its tokens share an axis with something else");
        let ones = if stage == 0 {
            let arrangement = self.arrangement(&self.vit.axes.layout(origin).cloned().unwrap_or_default());
            let tokens = self.tokens_second(origin, &arrangement, 0, "vitrim/ones").ok_or_else(|| unknown(self))?;
            self.sizes(0, tokens)
        } else {
            // As many as there are slots, whatever they are.
            let before = self.ones(stage - 1, block)?;
            self.rows_at(before, stage - 1, stage, &format!("vitrim/ones{stage}"))
        };
        self.stages.entry_mut(stage).ones = Some(ones);
        Ok(ones)
    }
}

//! Tri-Level E-ViT's attention level: a pruning also closes weak connections, for the blocks behind it.
//!
//! Every attention of such a model takes the masked softmax, those with all connections open too: that is how the
//! authors' models are trained.

use vitrim_ir::{Attribute, DataType, FusedAttention, NodeId, Span, Tensor, ValueId};
use vitrim_ops::masked_softmax::EPSILON;
use vitrim_ops::{ConnectionMask, ConnectionMaskDynamic, MaskedSoftmax};

use super::open::ALL_QUERIES;
use super::plan::Act;
use super::precision::Coding;
use super::{ATTENTION_KEEP_INPUT, Rewriter, Stream};
use crate::Refusal;
use crate::recognise::Attention;
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
        for attention in &self.vit.blocks[block].attentions {
            match &attention.core.fused {
                Some(fused) => self.mask_fused(block, attention.core.softmax, fused)?,
                None => self.mask_softmax(block, attention)?,
            }
        }
        Ok(())
    }

    fn mask_softmax(&mut self, block: usize, attention: &Attention) -> Result<(), Refusal> {
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
        if !node.is("Softmax") || !plain {
            return Err(unknown());
        }
        let hint = format!("vitrim/{}", self.graph.value(weights).name());
        let dims = self.vit.axes.layout(weights).map(|layout| layout.rank());
        let by_head = self.scores_by_head(weights, scores, attention.heads as i64, &format!("{hint}/scores"));
        let by_head = by_head.ok_or_else(unknown)?;
        let masked = self.masked_softmax(block, id, by_head, self.dtype(weights), &hint)?;
        let result = match dims {
            Some(4) => masked,
            _ => {
                let joined = self.reshape(masked, &[-1, 1, 0, 0], &format!("{hint}/joined"));
                self.with_axes("Squeeze", joined, &[1], &format!("{hint}/as_before"))
            }
        };
        self.replace(weights, result);
        Ok(())
    }

    /// A fused operator gives way to what it computes, with the masked softmax in it.
    fn mask_fused(&mut self, block: usize, id: NodeId, fused: &FusedAttention) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let over_all = |value: Option<ValueId>| {
            let layout = value.and_then(|value| self.vit.axes.layout(value));
            layout.is_some_and(|layout| {
                let batch_first = self.frame(layout).is_some_and(|frame| frame.batch_axis() == Some(0));
                batch_first && layout.token_axis().is_some_and(|(_, span)| span == Span::ALL)
            })
        };
        let result = node.output(0).filter(|&result| self.dtype(result).is_float());
        let (Some(result), true) = (result, fused.slots().iter().all(|&slot| over_all(node.input(slot)))) else {
            return Err(self.pinned(
                id,
                "it is a fused attention over something else than [batch, tokens] in floating point, whose connections \
                 cannot be closed: prune without the attention level",
            ));
        };
        let hint = format!("vitrim/{}", self.graph.value(result).name());
        let scores = self.fused_scores(id, fused, ALL_QUERIES, &hint)?;
        let weights = self.masked_softmax(block, id, scores, self.dtype(result), &format!("{hint}/weights"))?;
        let mixed = self.fused_result(id, fused, weights, &hint)?;
        self.replace(result, mixed);
        Ok(())
    }

    /// The masked softmax of scores `[B, H, N, N]` of the attention `id`.
    fn masked_softmax(
        &mut self,
        block: usize,
        id: NodeId,
        scores: ValueId,
        dtype: DataType,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let stage = self.stages.of_block(block);
        let mask = self.mask_at(stage, block)?;
        let size = match self.stages.entry(stage).size.filter(|_| self.weights.proportional) {
            Some(size) => size,
            None => self.ones(stage, block)?,
        };
        let attributes = [("eps", Attribute::Float(EPSILON)), ("dtype", Attribute::Int(dtype.code().into()))];
        let masked = self.vitrim_with(&MaskedSoftmax, hint, &[scores, mask, size], &attributes, 1)[0];
        self.masked.insert(id, masked);
        Ok(masked)
    }

    /// The share of connections that the pruning at the end of `stream` leaves open; a default where it `is_input`.
    pub(super) fn connect(&mut self, stream: &Stream, share: f64, is_input: bool) -> Result<(), Refusal> {
        let hint = format!("{}/mask", stream.hint);
        let weights = self.weights_of_all_heads(stream.block, &hint)?;
        let anchor = self.anchor_since_attention(stream, &hint)?;
        let (protect, suffix) = (self.vit.special.prefix(), self.stages.suffix(stream.stage));
        let ends = [("protect", protect as i64), ("suffix", suffix as i64)];
        let mask = match self.stages.count(stream.stage).and_then(|count| count.as_known()) {
            Some(slots) => {
                let free = (slots as usize).saturating_sub(protect + suffix);
                let connections = keep_count(free, share).max(1) as i64;
                let attributes = [&[("connections", connections), ("slots", slots)], &ends[..]].concat();
                self.vitrim(&ConnectionMask, &hint, &[weights, anchor], &attributes, 1)[0]
            }
            None => {
                let share = Tensor::floats(DataType::F64, &[], &[share]);
                let share = match is_input {
                    true => self.input(ATTENTION_KEEP_INPUT, share)?,
                    false => self.patch.constant(&format!("{hint}/share"), share),
                };
                let connections = self.share_of_patches(stream.value, share, &format!("{hint}/connections"));
                self.vitrim(&ConnectionMaskDynamic, &hint, &[weights, anchor, connections], &ends, 1)[0]
            }
        };
        self.stages.entry_mut(stream.stage).mask = Some(mask);
        Ok(())
    }

    /// The weights of a block's attention, `[B, H, N, N]`; of several side by side the heads of all, which count alike.
    fn weights_of_all_heads(&mut self, block: usize, hint: &str) -> Result<ValueId, Refusal> {
        let attentions = &self.vit.blocks[block].attentions;
        let masked = attentions.iter().map(|attention| self.masked.get(&attention.core.softmax).copied());
        match masked.collect::<Option<Vec<_>>>().as_deref() {
            Some([weights]) => Ok(*weights),
            Some(all @ [_, ..]) => {
                Ok(self.patch.op("Concat", &format!("{hint}/weights"), all, &[("axis", Attribute::Int(1))]))
            }
            _ => Err(Refusal::Internal("a block whose attention has no weights".into())),
        }
    }

    /// The token of the block's attention that each slot at the end of `stream` keeps the place of, `[B, M]`.
    fn anchor_since_attention(&mut self, stream: &Stream, hint: &str) -> Result<ValueId, Refusal> {
        let first = self.stages.of_block(stream.block) + 1;
        if first == stream.stage
            && let Some(grouping) = self.stages.entry(first).grouping
        {
            return Ok(grouping.anchor);
        }
        let places = self.places(first).ok_or_else(|| Refusal::Internal("a pruning without a grouping".into()))?;
        Ok(self.rows_at(places, first, stream.stage, &format!("{hint}/anchor")))
    }

    /// Open connections between the tokens of a stage, `[B, N, N]`: of those whose places they keep. What is made of those
    /// that leave has all of its own open, as special tokens have.
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
            let hint = format!("vitrim/mask{stage}");
            let rows = self.rows_at(before, stage - 1, stage, &format!("{hint}_rows"));
            let columns = self.transpose(rows, &[0, 2, 1], &format!("{hint}_columns"));
            let columns = self.rows_at(columns, stage - 1, stage, &format!("{hint}_both"));
            let kept = self.transpose(columns, &[0, 2, 1], &hint);
            self.with_extra_open(kept, stage, &hint)
        };
        self.stages.entry_mut(stage).mask = Some(mask);
        Ok(mask)
    }

    /// Opens row and column of the slot that a pruning made from scratch, if it did.
    fn with_extra_open(&mut self, mask: ValueId, stage: usize, hint: &str) -> ValueId {
        let Some(grouping) = self.stages.entry(stage).grouping.filter(|_| self.stages.fuses(stage)) else {
            return mask;
        };
        let is_extra = self.is_negative(grouping.anchor, &format!("{hint}_is_extra"));
        let to = [("to", Attribute::Int(DataType::F32.code().into()))];
        let open = self.patch.op("Cast", &format!("{hint}_extra"), &[is_extra], &to);
        [("row", 2), ("column", 1)].into_iter().fold(mask, |mask, (name, axis)| {
            let open = self.with_axes("Unsqueeze", open, &[axis], &format!("{hint}_extra_{name}"));
            self.patch.op("Max", &format!("{hint}_with_{name}"), &[mask, open], &[])
        })
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

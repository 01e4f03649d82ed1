//! Pruning at a cut: `TokenPrune`, by the attention that tokens receive.

use vitrim_ir::{Attribute, DataType, FusedAttention, NodeId, Tensor, ValueId};
use vitrim_ops::{TokenPrune, TokenPruneDynamic, TokenScore};

use super::grouping::{Grouping, Others};
use super::open::{ALL_QUERIES, Part};
use super::plan::Keep;
use super::precision::Coding;
use super::{KEEP_INPUT, Method, Prune, Rewriter, Stream};
use crate::Refusal;
use crate::recognise::{Attention, Window};
use crate::schedule::KeepSchedule;

impl Rewriter<'_> {
    /// Keeps the best patches.
    pub(super) fn prune(
        &mut self,
        stream: &mut Stream,
        keep: Keep,
        fuse: bool,
        attention_keep: Option<f64>,
    ) -> Result<(), Refusal> {
        let (x, stage, hint) = (stream.value, stream.stage, stream.hint.clone());
        let of_attention = self.stages.of_block(stream.block);
        let score = self.score(stream.block, &hint)?;
        let score = self.rows_at(score, of_attention, stage, &format!("{hint}/score"));
        let size = self.sizes(stage, x);
        let (protect, suffix) = (self.vit.special.prefix() as i64, self.vit.special.suffix as i64);
        let common =
            [("protect", protect), ("suffix", suffix), ("fuse", fuse.into()), ("dtype", stream.dtype.code().into())];
        let name = format!("{hint}/prune");
        let results = match (keep, self.stages.count(stage).and_then(|tokens| tokens.as_known())) {
            (Keep::Count(keep), Some(tokens)) => {
                let keep = keep as i64;
                let attributes = [&[("keep", keep), ("tokens", tokens)], &common[..]].concat();
                self.vitrim(&TokenPrune, &name, &[x, score, size], &attributes, 4)
            }
            (Keep::Count(_), None) => return Err(Refusal::Internal("tokens are counted without a count".into())),
            (Keep::Share(_) | Keep::Input, _) => {
                let share = match keep {
                    Keep::Share(share) => {
                        self.patch.constant(&format!("{hint}/share"), Tensor::floats(DataType::F64, &[], &[share]))
                    }
                    _ => self.input(KEEP_INPUT, Tensor::floats(DataType::F64, &[], &[self.default_share()]))?,
                };
                let k = self.share_of_patches(x, share, &format!("{hint}/keep"));
                let results = self.vitrim(&TokenPruneDynamic, &name, &[x, score, size, k], &common, 4);
                self.declare_reduced([results[0], results[1]], stream);
                results
            }
        };
        let others = Others::Dropped { assign: results[3], score, tokens: x };
        stream.value = results[0];
        stream.stage += 1;
        // As long as nothing was merged all sizes are one, which costs nothing.
        let sized = self.stages.entry(stage).size.is_some();
        let after = self.stages.entry_mut(stream.stage);
        after.size = sized.then_some(results[1]);
        after.grouping = Some(Grouping { anchor: results[2], others });
        match attention_keep {
            Some(share) => self.connect(stream, share, keep == Keep::Input),
            None => Ok(()),
        }
    }

    /// What is kept where the model is not told.
    fn default_share(&self) -> f64 {
        let share = |method: &Method| match method {
            Method::Prune(Prune { schedule: KeepSchedule::At(share, _), runtime: true, .. }) => Some(*share),
            _ => None,
        };
        self.options.methods.iter().find_map(share).unwrap_or(1.0)
    }

    /// ⌈share · patches⌉ of the tokens `x`, `[B, N, ·]`, as `[1]`: in float64, as static counts are found.
    pub(super) fn share_of_patches(&mut self, x: ValueId, share: ValueId, hint: &str) -> ValueId {
        let to = |dtype: DataType| [("to", Attribute::Int(dtype.code().into()))];
        let shape = self.patch.op("Shape", &format!("{hint}/shape"), &[x], &[]);
        let at = self.ints(&format!("{hint}/tokens_axis"), &[1]);
        let tokens = self.patch.op("Gather", &format!("{hint}/tokens"), &[shape, at], &[("axis", Attribute::Int(0))]);
        let special =
            self.ints(&format!("{hint}/special"), &[(self.vit.special.prefix() + self.vit.special.suffix) as i64]);
        let patches = self.patch.op("Sub", &format!("{hint}/patches"), &[tokens, special], &[]);
        let patches = self.patch.op("Cast", &format!("{hint}/patches_f64"), &[patches], &to(DataType::F64));
        let exact = self.patch.op("Mul", &format!("{hint}/exact"), &[patches, share], &[]);
        // Not `Ceil`, which some runtimes have in float32 alone: whole numbers below, and one more where something is left.
        let below = self.patch.op("Cast", &format!("{hint}/below"), &[exact], &to(DataType::I64));
        let whole = self.patch.op("Cast", &format!("{hint}/whole"), &[below], &to(DataType::F64));
        let more = self.patch.op("Greater", &format!("{hint}/more"), &[exact, whole], &[]);
        let more = self.patch.op("Cast", &format!("{hint}/one_more"), &[more], &to(DataType::I64));
        self.patch.op("Add", hint, &[below, more], &[])
    }

    /// How much attention each token of a block receives, `[B, N]` float32: from the class token, averaged over heads; from
    /// all tokens where there is no class token. Of several attentions side by side all heads count alike.
    fn score(&mut self, block: usize, hint: &str) -> Result<ValueId, Refusal> {
        let attentions = &self.vit.blocks[block].attentions;
        let heads: usize = attentions.iter().map(|attention| attention.heads).sum();
        let mut sum: Option<ValueId> = None;
        for (at, attention) in attentions.iter().enumerate() {
            let hint = if at == 0 { format!("{hint}/score") } else { format!("{hint}/score{at}") };
            let mut own = self.score_of(block, attention, &hint)?;
            if attentions.len() > 1 {
                let share = Tensor::f32(attention.heads as f32 / heads as f32);
                let share = self.patch.constant(&format!("{hint}/share_of_heads"), share);
                own = self.patch.op("Mul", &format!("{hint}/weighted"), &[own, share], &[]);
            }
            sum = Some(match sum {
                Some(sum) => self.patch.op("Add", &format!("{hint}/sum"), &[sum, own], &[]),
                None => own,
            });
        }
        sum.ok_or_else(|| Refusal::Internal("a block without attention".into()))
    }

    fn score_of(&mut self, block: usize, attention: &Attention, hint: &str) -> Result<ValueId, Refusal> {
        let core = &attention.core;
        let stage = self.stages.of_block(block);
        if let Some(&weights) = self.masked.get(&core.softmax) {
            return Ok(self.score_of_weights(weights, hint));
        }
        if let Some(plain) = self.plain.get(&core.softmax).copied() {
            let q = Window { value: self.channels_last(plain.q, stage, hint)?, ..plain.q };
            let k = Window { value: self.channels_last(plain.k, stage, hint)?, ..plain.k };
            return Ok(self.score_of_windows(q, k, plain.scale, stage, hint));
        }
        match &core.fused {
            Some(fused) => self.score_of_fused(core.softmax, fused, stage, hint),
            None => self.score_of_scores(attention, stage, hint),
        }
    }

    fn score_of_windows(&mut self, q: Window, k: Window, scale: f64, stage: usize, hint: &str) -> ValueId {
        let size = self.sizes(stage, k.value);
        let ints =
            [("heads", q.heads), ("head_dim", q.head_dim), ("q_at", q.at), ("k_at", k.at), ("queries", self.queries())];
        let mut attributes: Vec<_> = ints.map(|(name, value)| (name, Attribute::Int(value))).into();
        attributes.push(("scale", Attribute::Float(scale as f32)));
        self.vitrim_with(&TokenScore, hint, &[q.value, k.value, size], &attributes, 1)[0]
    }

    /// How many first queries decide.
    fn queries(&self) -> i64 {
        if self.vit.special.cls > 0 { 1 } else { ALL_QUERIES }
    }

    /// A fused operator stays what it is: the scores of the queries that decide are computed beside it.
    fn score_of_fused(
        &mut self,
        id: NodeId,
        fused: &FusedAttention,
        stage: usize,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let node = self.graph.node(id);
        let unread = self.unread(id);
        let unknown = || unread.clone();
        if self.fused_bias(node, fused).is_some() || Self::fused_cap(node).is_some() {
            let rows = self.fused_scores(id, fused, self.queries(), hint)?;
            let dtype = self.dtype(node.output(0).ok_or_else(unknown)?);
            return self.score_of_rows(rows, Coding::Plain(dtype), stage, hint).ok_or_else(unknown);
        }
        let part = |rewriter: &mut Self, part: Part| rewriter.fused_part(node, fused, part, rewriter.queries(), hint);
        let q = part(self, Part::Queries).ok_or_else(unknown)?;
        let k = part(self, Part::Keys).ok_or_else(unknown)?;
        if (q.heads, q.head_dim) != (k.heads, k.head_dim) {
            return Err(unknown());
        }
        let scale = Self::fused_scale(node, q.head_dim);
        Ok(self.score_of_windows(q, k, scale, stage, hint))
    }

    /// From the scores that the model computes: their softmax once more, for the queries that decide.
    fn score_of_scores(&mut self, attention: &Attention, stage: usize, hint: &str) -> Result<ValueId, Refusal> {
        let id = attention.core.softmax;
        let node = self.graph.node(id);
        let refusal = self.pinned(id, "it is an attention whose scores are not [batch, heads, queries, keys]");
        let unknown = || refusal.clone();
        let (scores, weights) = (node.input(0).ok_or_else(unknown)?, node.output(0).ok_or_else(unknown)?);
        let rows = self.scores_by_head(weights, scores, attention.heads as i64, hint).ok_or_else(unknown)?;
        let coding = self.coding_of_operand(node, 0).ok_or_else(unknown)?;
        let rows = self.rows_that_decide(rows, hint);
        self.score_of_rows(rows, coding, stage, hint).ok_or_else(unknown)
    }

    /// From scores of the queries that decide, without the sizes of the keys.
    fn score_of_rows(&mut self, rows: ValueId, coding: Coding, stage: usize, hint: &str) -> Option<ValueId> {
        let mut rows = self.as_f32(rows, coding, &format!("{hint}/scores"));
        if self.stages.entry(stage).size.is_some() {
            let log_size = self.log_size(stage, vitrim_ir::Span::ALL)?;
            let log_size = self.reshape(log_size, &[0, 1, 1, -1], &format!("{hint}/log_size"));
            rows = self.patch.op("Add", &format!("{hint}/with_size"), &[rows, log_size], &[]);
        }
        let last = [("axis", Attribute::Int(-1))];
        let weights = self.patch.op("Softmax", &format!("{hint}/weights"), &[rows], &last);
        Some(self.mean_over_queries_and_heads(weights, hint))
    }

    /// From the weights that the model computes, `[B, H, N, M]`.
    fn score_of_weights(&mut self, weights: ValueId, hint: &str) -> ValueId {
        let rows = self.rows_that_decide(weights, hint);
        let rows = self.patch.op(
            "Cast",
            &format!("{hint}/weights"),
            &[rows],
            &[("to", Attribute::Int(DataType::F32.code().into()))],
        );
        self.mean_over_queries_and_heads(rows, hint)
    }

    /// The first rows of `[B, H, N, M]`, or all.
    fn rows_that_decide(&mut self, all: ValueId, hint: &str) -> ValueId {
        match self.queries() {
            ALL_QUERIES => all,
            queries => self.range(all, 2, [0, queries], &format!("{hint}/rows")),
        }
    }

    fn mean_over_queries_and_heads(&mut self, weights: ValueId, hint: &str) -> ValueId {
        let of_queries = self.reduce_mean(weights, 2, &format!("{hint}/of_heads"));
        self.reduce_mean(of_queries, 1, hint)
    }

    /// Scores, or what becomes of them, as `[B, H, N, M]`; `like` has their axes.
    pub(super) fn scores_by_head(&mut self, like: ValueId, scores: ValueId, heads: i64, hint: &str) -> Option<ValueId> {
        let layout = self.vit.axes.layout(like)?.clone();
        let frame = self.frame(&layout)?;
        let keys = (0..layout.rank()).rev().find(|&at| layout.0[at].is_weights())?;
        let all = layout.token_axes().len() == 2 && keys + 1 == layout.rank();
        if !all || layout.0[keys].only_tokens() != Some(vitrim_ir::Span::ALL) {
            return None;
        }
        // Tables of zeros are as long as the tokens were: they go later than this is read.
        let scores = self.replacement(self.past_neutral_tables(scores));
        match (layout.rank(), frame.batch_axis(), frame.shared()) {
            (4, Some(0), _) => Some(scores),
            (3, _, Some((0, heads))) => {
                // Zero copies an extent, in the same place.
                let apart = self.with_axes("Unsqueeze", scores, &[1], &format!("{hint}/apart"));
                Some(self.reshape(apart, &[-1, heads, 0, 0], &format!("{hint}/by_head")))
            }
            // One head may have no axis.
            (3, Some(0), _) if heads == 1 => {
                Some(self.with_axes("Unsqueeze", scores, &[1], &format!("{hint}/one_head")))
            }
            _ => None,
        }
    }
}

//! The merge pass: `TokenMerge` between attention and MLP, and everything that follows from it.
//!
//! Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461). One patch does it all:
//!
//! 1. at every cut whose block removes tokens, the residual stream goes through `TokenMerge` (`stages`, `cut`);
//! 2. operators that state the token count get the right one (`recount`), and what is computed from it keeps the old
//!    one (`counts`);
//! 3. tables with an entry for each token follow the tokens (`tables`);
//! 4. attention over merged tokens becomes proportional, means and sums become size-weighted (`weigh`, `fused`,
//!    `contract`);
//! 5. what leaves the model with an entry for each token is restored (`restore`).

mod arrange;
mod attention;
mod contract;
mod counts;
mod cut;
mod fused;
mod metric;
mod precision;
mod recount;
mod restore;
mod spans;
mod stages;
mod tables;
mod weigh;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use vitrim_ir::{Attribute, DataType, Effect, Expr, Graph, Model, NodeId, Patch, Span, Tensor, ValueId};
use vitrim_ops::{DOMAIN, OpDef, TokenAssign, TokenMerge, TokenMergeDynamic, TokenSize, VERSION};

use crate::Refusal;
use crate::recognise::{PlainAttention, VitModel, Window};
use crate::schedule::{Schedule, Step};
use precision::Coding;
use spans::Part;
use stages::{Stage, Stages};
use tables::Table;

/// What decides which tokens are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Keys of the block's attention, averaged over heads (the paper's choice).
    #[default]
    Key,
    /// Queries, averaged over heads.
    Query,
    /// Values, averaged over heads.
    Value,
    /// The tokens themselves.
    Hidden,
}

/// How tokens are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Reduction {
    /// By merging.
    #[default]
    Merge,
    /// By cutting the last ones off. No sensible model: it shows what the reduced token count alone is worth.
    Slice,
}

/// What to merge, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Merge {
    /// Tokens to remove per block.
    pub schedule: Schedule,
    /// Multiple that token counts are brought to where possible.
    pub align: usize,
    /// First tokens kept out of matching; all special tokens at the front where not given.
    pub protect: Option<usize>,
    /// Whether attention takes the sizes of tokens into account.
    pub proportional: bool,
    /// Whether means over tokens stay unweighted.
    pub plain_pooling: bool,
    /// What decides which tokens are alike.
    pub metric: Metric,
    /// Name of an output to add, if any: `[batch, tokens]` int64, the final slot of every original token.
    pub trace_source: Option<String>,
    /// How tokens are removed.
    pub reduction: Reduction,
}

impl Merge {
    /// Merging with the paper's defaults.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            align: 1,
            protect: None,
            proportional: true,
            plain_pooling: false,
            metric: Metric::Key,
            trace_source: None,
            reduction: Reduction::Merge,
        }
    }
}

/// The usual name of the output that tells where tokens went.
pub const SOURCE_OUTPUT: &str = "token_source";

/// A patch with what it does to each block.
#[derive(Debug)]
pub struct Proposal {
    /// The edits.
    pub patch: Patch,
    /// What each block does to the token count; empty where the count is known only at run time.
    pub steps: Vec<Step>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Merge {
    /// Proposes the edits that merge tokens in a recognised model.
    pub fn propose(&self, model: &Model, vit: &VitModel) -> Result<Proposal, Refusal> {
        let depth = vit.blocks.len();
        self.schedule.check(depth)?;
        let protect = self.protect.unwrap_or(vit.special.prefix());
        let suffix = vit.special.suffix;
        let mut notes = Vec::new();
        let (removed, steps) = match vit.tokens().as_known() {
            Some(tokens) => {
                let protected = protect.saturating_add(suffix);
                if protected >= tokens as usize {
                    return Err(Refusal::Request(format!(
                        "all {tokens} tokens are protected: nothing is left to merge"
                    )));
                }
                let steps = self.schedule.steps(depth, tokens as usize, protected, self.align)?;
                let unaligned = steps.iter().filter(|step| step.unaligned).count();
                if unaligned > 0 {
                    notes.push(format!(
                        "{unaligned} block(s) cannot reach a multiple of {} tokens and keep their r",
                        self.align
                    ));
                }
                (steps.iter().map(|step| step.removed).collect(), steps)
            }
            None => {
                if self.align > 1 {
                    return Err(Refusal::Request(
                        "alignment needs a token count that is fixed; this model's is not".into(),
                    ));
                }
                let requested = self.schedule.requested(depth).ok_or_else(|| {
                    Refusal::Request(
                        "this model's token count is known only at run time: give r, not a ratio or kept counts".into(),
                    )
                })?;
                (requested, Vec::new())
            }
        };
        let opset = model.opsets().standard();
        if opset < vitrim_ops::MIN_OPSET && (self.trace_source.is_some() || removed.iter().any(|&r| r > 0)) {
            return Err(Refusal::Request(format!(
                "the model imports opset {opset} of ai.onnx; the operators need {} or newer: convert it first",
                vitrim_ops::MIN_OPSET
            )));
        }
        let mut rewriter = Rewriter {
            options: self,
            model,
            graph: model.graph(),
            vit,
            patch: Patch::new(model, "merge"),
            protect,
            suffix,
            removed,
            stages: Stages::default(),
            plain: HashMap::new(),
            joined: HashMap::new(),
            replaced: HashMap::new(),
            followed: Vec::new(),
            tables: HashMap::new(),
            parts: HashMap::new(),
            notes,
        };
        rewriter.stages = stages::assign(&rewriter)?;
        if rewriter.removed.iter().all(|&r| r == 0) && self.trace_source.is_none() {
            return Ok(Proposal { patch: rewriter.patch, steps, notes: rewriter.notes });
        }
        rewriter.find_plain_attention();
        rewriter.merge_blocks()?;
        rewriter.recount()?;
        rewriter.keep_counts()?;
        rewriter.follow_tables()?;
        rewriter.weigh()?;
        rewriter.restore()?;
        rewriter.forget_types();
        rewriter.patch.import(DOMAIN, VERSION);
        Ok(Proposal { patch: rewriter.patch, steps, notes: rewriter.notes })
    }
}

/// The state of a rewrite.
struct Rewriter<'a> {
    options: &'a Merge,
    model: &'a Model,
    graph: &'a Graph,
    vit: &'a VitModel,
    patch: Patch,
    protect: usize,
    suffix: usize,
    /// Tokens that each block removes.
    removed: Vec<usize>,
    stages: Stages,
    /// Attention that an operator of ours takes the place of, by its softmax.
    plain: HashMap<NodeId, PlainAttention>,
    /// What its operators read, as `[B, N, W]`.
    joined: HashMap<ValueId, ValueId>,
    /// Values whose readers were given another value: merged streams, and results of operators left out or followed by
    /// others that put them right.
    replaced: HashMap<ValueId, ValueId>,
    /// Tables that follow the tokens, and what they became.
    followed: Vec<(Table, ValueId)>,
    /// What took the place of a table in an operand of a node.
    tables: HashMap<(NodeId, usize), ValueId>,
    /// What the slots of a span have, by stage.
    parts: HashMap<(usize, Span), Part>,
    notes: Vec<String>,
}

impl Rewriter<'_> {
    /// A call of one of our operators.
    fn vitrim(
        &mut self,
        op: &dyn OpDef,
        hint: &str,
        inputs: &[ValueId],
        attributes: &[(&str, i64)],
        results: usize,
    ) -> Vec<ValueId> {
        let attributes: Vec<_> = attributes.iter().map(|&(name, value)| (name, Attribute::Int(value))).collect();
        self.vitrim_with(op, hint, inputs, &attributes, results)
    }

    fn vitrim_with(
        &mut self,
        op: &dyn OpDef,
        hint: &str,
        inputs: &[ValueId],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        self.patch.function(op.function(self.model.opsets().standard()));
        let inputs = inputs.iter().copied().map(Some).collect();
        self.patch.call(op.op_type(), hint, inputs, attributes, results)
    }

    /// A constant list of integers.
    fn ints(&mut self, hint: &str, values: &[i64]) -> ValueId {
        self.patch.constant(hint, Tensor::shape(values))
    }

    fn merge_blocks(&mut self) -> Result<(), Refusal> {
        for block in 0..self.vit.blocks.len() {
            self.replace_plain_attention(block)?;
            if self.removed[block] > 0 {
                self.merge_block(block)?;
            }
        }
        Ok(())
    }

    /// Puts the merge after the attention of one block.
    fn merge_block(&mut self, block: usize) -> Result<(), Refusal> {
        let cut = self.vit.blocks[block].cut;
        let x = self.stream(cut)?;
        let hint = format!("vitrim/block{block}");
        let stage = self.stages.of_block(block);
        let layout = self.vit.axes.layout(x).cloned().unwrap_or_default();
        let arrangement = self.arrangement(&layout);
        let refusal = self.pinned(
            cut,
            &format!("it gives a residual stream that cannot be arranged as [batch, tokens, channels]: {layout}"),
        );
        let unknown = || refusal.clone();
        let before = self.before_merge(cut, x);
        let sliced = self.options.reduction == Reduction::Slice;
        let unscaled = self.pinned(cut, "it gives integers, and what they stand for is not known");
        let coding = self.coding_of_result(self.graph.node(cut)).ok_or(unscaled)?;
        // Half precision goes into the merge as it is: the operator casts.
        let quantised = matches!(coding, Coding::Scaled { .. }) && !sliced;
        let numbers = if quantised { self.as_f32(before, coding, &hint) } else { before };
        let batch_first = self.tokens_second(numbers, &arrangement, stage, &hint).ok_or_else(unknown)?;
        let batch_first = match arrangement.others() {
            0 => return Err(refusal),
            1 => batch_first,
            _ => self.reshape(batch_first, &[0, 0, -1], &format!("{hint}/channels_joined")),
        };
        let (tokens, removed) = (self.stages.count(stage), self.removed[block] as i64);

        let (y, merged) = if sliced {
            let ends = tokens.and_then(|tokens| tokens.minus(&Expr::known(removed))).and_then(|left| left.as_known());
            let ends = ends.ok_or_else(|| Refusal::Request("the slicing floor needs a fixed token count".into()))?;
            let bounds = [("starts", 0), ("ends", ends), ("axes", 1)];
            let bounds = bounds.map(|(name, value)| self.ints(&format!("{hint}/{name}"), &[value]));
            let y =
                self.patch.op("Slice", &format!("{hint}/kept"), &[batch_first, bounds[0], bounds[1], bounds[2]], &[]);
            (y, Stage::default())
        } else {
            let metric = match self.options.metric {
                Metric::Hidden => {
                    let channels = arrangement.other_extents().into_iter().product::<Option<i64>>();
                    Window::of_all(batch_first, channels.ok_or_else(unknown)?)
                }
                chosen => self.metric(block, chosen, &hint)?,
            };
            let size = match self.stages.entry(stage).size {
                Some(size) => size,
                None => self.vitrim(&TokenSize, "vitrim/initial_size", &[batch_first], &[], 1)[0],
            };
            let dtype = if quantised { DataType::F32 } else { self.dtype(x) }.code().into();
            let common = [
                ("protect", self.protect as i64),
                ("suffix", self.suffix as i64),
                ("heads", metric.heads),
                ("head_dim", metric.head_dim),
                ("metric_at", metric.at),
                ("dtype", dtype),
            ];
            let name = format!("{hint}/merge");
            let results = match tokens.and_then(|tokens| tokens.as_known()) {
                Some(tokens) => {
                    let attributes = [&[("r", removed), ("tokens", tokens)], &common[..]].concat();
                    self.vitrim(&TokenMerge, &name, &[batch_first, metric.value, size], &attributes, 5)
                }
                None => {
                    let r = self.ints(&format!("{hint}/r"), &[removed]);
                    self.vitrim(&TokenMergeDynamic, &name, &[batch_first, metric.value, size, r], &common, 5)
                }
            };
            let grouping = Some([results[2], results[3], results[4]]);
            (results[0], Stage { size: Some(results[1]), grouping, ..Stage::default() })
        };
        *self.stages.entry_mut(stage + 1) = merged;
        let y = match arrangement.other_extents().as_slice() {
            [_] => y,
            extents => {
                let extents: Option<Vec<i64>> = extents.iter().copied().collect();
                let target = [vec![0, 0], extents.ok_or_else(unknown)?].concat();
                self.reshape(y, &target, &format!("{hint}/channels_split"))
            }
        };
        let back = self.as_before(y, &arrangement, stage + 1, &hint).ok_or_else(unknown)?;
        let back = if quantised { self.as_coded(back, coding, &format!("{hint}/merged_as_stream")) } else { back };
        self.replace_stream(cut, x, back);
        Ok(())
    }

    /// Lets the readers of `old` read `new`; graph outputs are left to `restore`.
    fn replace(&mut self, old: ValueId, new: ValueId) {
        self.patch.rewire_uses(self.graph, old, new, |_| true);
        self.replaced.insert(old, new);
    }

    /// What readers of `value` read now.
    fn replacement(&self, value: ValueId) -> ValueId {
        self.replaced.get(&value).copied().unwrap_or(value)
    }

    /// As [`Rewriter::replacement`], but the residual stream as it is before its merge.
    fn current(&self, value: ValueId) -> ValueId {
        let merged =
            self.graph.producer(value).is_some_and(|(node, _)| self.vit.blocks.iter().any(|block| block.cut == node));
        if merged { value } else { self.replacement(value) }
    }

    fn dtype(&self, value: ValueId) -> DataType {
        self.vit.shapes.dtype(value).unwrap_or(DataType::F32)
    }

    fn pinned(&self, node: NodeId, reason: &str) -> Refusal {
        Refusal::Pinned { node: self.graph.describe(node), reason: reason.into() }
    }

    /// The slot of every original token at `stage`, composed of the merges up to there.
    fn owner(&mut self, stage: usize) -> Option<ValueId> {
        if stage == 0 {
            return None;
        }
        if let Some(owner) = self.stages.entry(stage).owner {
            return Some(owner);
        }
        let before = self.owner(stage - 1);
        let grouping = self.stages.entry(stage).grouping?;
        let assign = self.vitrim(&TokenAssign, &format!("vitrim/assign{stage}"), &grouping, &[], 1)[0];
        let owner = match before {
            Some(before) => {
                let axis = [("axis", vitrim_ir::Attribute::Int(1))];
                self.patch.op("GatherElements", &format!("vitrim/owner{stage}"), &[assign, before], &axis)
            }
            None => assign,
        };
        self.stages.entry_mut(stage).owner = Some(owner);
        Some(owner)
    }

    /// Declared types of values whose token count changed are wrong now.
    fn forget_types(&mut self) {
        for (value, _) in self.stages.values() {
            self.patch.forget_type(value);
        }
    }

    fn effects(&self) -> Vec<(NodeId, Effect)> {
        self.vit.axes.effects().to_vec()
    }
}

//! Stages: between one act and the next the token count is the same. Which stage is each tensor in?

use std::collections::{HashMap, HashSet};

use vitrim_ir::{Expr, NodeId, ValueId};

use super::grouping::Grouping;
use super::plan::{Act, Keep};
use super::{Method, Rewriter};
use crate::Refusal;
use crate::recognise::softmaxes;

/// What the act that begins a stage gives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stage {
    /// Sizes, `[B, M, 1]` float32; none where all are one.
    pub size: Option<ValueId>,
    /// Connections that are open, `[B, M, M]`.
    pub mask: Option<ValueId>,
    /// How many tokens there are, `[1]`, where that shows only at run time.
    pub count: Option<ValueId>,
    /// One for each token, `[B, M, 1]`.
    pub ones: Option<ValueId>,
    /// Where the tokens of the stage before are.
    pub grouping: Option<Grouping>,
    /// The slot of every token of the stage before.
    pub assign: Option<ValueId>,
    /// Slot of every original token.
    pub owner: Option<ValueId>,
    /// The same, without those in an extra token that they do not make up.
    pub own_slot: Option<ValueId>,
    /// Whether each token of the stage before is in an extra token.
    pub is_fused: Option<ValueId>,
    /// The token of the stage before whose place each slot has.
    pub places: Option<ValueId>,
    /// Original token whose place each slot has.
    pub anchor: Option<ValueId>,
    /// All original tokens as they were before the act.
    pub all_before: Option<ValueId>,
}

/// Stages of the rewritten graph. Stage 0 is before the first act.
#[derive(Clone, Debug, Default)]
pub(super) struct Stages {
    /// Stage of every tensor that carries tokens; those that are restored have none.
    of_value: HashMap<ValueId, usize>,
    /// Nodes whose operands must be restored, because they need all tokens or meet tensors that are restored.
    pub restore_at: Vec<NodeId>,
    /// Token count of each stage; `None` where known only at run time.
    counts: Vec<Option<Expr>>,
    /// The stage that each block's attention is in, and the one behind its acts.
    blocks: Vec<[usize; 2]>,
    /// Whether each stage begins with a pruning, and whether that makes one more token of those that it drops.
    prunings: Vec<Option<bool>>,
    /// Special tokens at the end.
    suffix: usize,
    entries: Vec<Stage>,
}

impl Stages {
    /// The stage of a tensor that carries tokens and is not restored.
    pub fn of(&self, value: ValueId) -> Option<usize> {
        self.of_value.get(&value).copied()
    }

    /// The stage that a block's attention is in.
    pub fn of_block(&self, block: usize) -> usize {
        self.blocks[block][0]
    }

    /// The stage behind the acts of a block.
    pub fn behind_block(&self, block: usize) -> usize {
        self.blocks[block][1]
    }

    /// Whether tokens are dropped where a stage begins.
    pub fn drops(&self, stage: usize) -> bool {
        self.prunings[stage].is_some()
    }

    /// Whether tokens were dropped up to a stage.
    pub fn has_dropped(&self, stage: usize) -> bool {
        self.prunings[..=stage].iter().any(Option::is_some)
    }

    /// Whether those that are dropped where a stage begins are made one more.
    pub fn fuses(&self, stage: usize) -> bool {
        self.prunings[stage] == Some(true)
    }

    /// Whether dropped tokens were made one more up to a stage.
    pub fn has_fused(&self, stage: usize) -> bool {
        self.prunings[..=stage].contains(&Some(true))
    }

    /// Tokens at the end that take no part in merging: special ones, and what the last pruning left of those it dropped.
    /// Where only the run tells whether it dropped any, `plan` refuses what would rely on the latter.
    pub fn suffix(&self, stage: usize) -> usize {
        let last = self.prunings[..=stage].iter().rev().find_map(|pruning| *pruning);
        self.suffix + usize::from(last == Some(true))
    }

    /// Token count at a stage.
    pub fn count(&self, stage: usize) -> Option<Expr> {
        self.counts[stage].clone()
    }

    pub fn entry(&self, stage: usize) -> Stage {
        self.entries[stage]
    }

    pub fn entry_mut(&mut self, stage: usize) -> &mut Stage {
        &mut self.entries[stage]
    }

    pub fn last(&self) -> usize {
        self.counts.len() - 1
    }

    /// Tensors whose token count differs from the original one.
    pub fn values(&self) -> Vec<(ValueId, usize)> {
        let mut changed: Vec<(ValueId, usize)> =
            self.of_value.iter().filter(|&(_, &stage)| stage > 0).map(|(&value, &stage)| (value, stage)).collect();
        changed.sort();
        changed
    }
}

/// Assigns stages, and finds where tensors of different stages meet.
pub(super) fn assign(rewriter: &Rewriter<'_>) -> Result<Stages, Refusal> {
    let (graph, vit) = (rewriter.graph, rewriter.vit);
    let suffix = vit.special.suffix;
    let asked = rewriter.options.methods.iter().filter_map(|method| match method {
        Method::Merge(merge) => merge.protect,
        Method::Prune(_) | Method::Expand(_) => None,
    });
    let asked = asked.min();
    let protect = asked.unwrap_or(vit.special.prefix());
    let mut stages =
        Stages { counts: vec![Some(vit.tokens().clone())], prunings: vec![None], suffix, ..Stages::default() };
    // The stage that readers of a cut's results are in.
    let mut after_cut: HashMap<ValueId, usize> = HashMap::new();
    for (block, acts) in rewriter.acts.iter().enumerate() {
        let of_attention = stages.last();
        for act in acts {
            let before = stages.counts[stages.last()].as_ref().and_then(|count| count.as_known());
            let after = before.filter(|_| rewriter.counted).and_then(|before| match *act {
                Act::Merge { r, .. } => Some(before - r as i64),
                Act::Prune { keep: Keep::Count(keep), fuse, .. } => {
                    Some((vit.special.prefix() + keep + usize::from(fuse) + suffix) as i64)
                }
                Act::Expand { keep } => Some((vit.special.prefix() + keep + suffix) as i64),
                Act::Prune { .. } => None,
            });
            stages.counts.push(after.map(Expr::known));
            stages.prunings.push(match *act {
                Act::Merge { .. } | Act::Expand { .. } => None,
                Act::Prune { fuse, .. } => Some(fuse),
            });
        }
        let behind = stages.last();
        stages.blocks.push([of_attention, behind]);
        if behind > of_attention {
            after_cut.extend(graph.node(rewriter.place(block)).results().map(|value| (value, behind)));
        }
    }
    stages.entries = vec![Stage::default(); stages.counts.len()];

    let pinned: HashSet<NodeId> = vit.restore_before.iter().map(|pin| pin.node).collect();
    let softmaxes: HashSet<NodeId> = softmaxes(&vit.blocks).collect();
    let mut restored: HashSet<ValueId> = HashSet::new();
    stages.of_value.insert(vit.axes.origin(), 0);
    for (id, node) in graph.nodes() {
        let read: HashSet<usize> =
            (node.operands()).filter_map(|value| after_cut.get(&value).copied().or_else(|| stages.of(value))).collect();
        let meets_restored = node.operands().any(|value| restored.contains(&value));
        if read.is_empty() && !meets_restored {
            continue;
        }
        // A reader of tokens that may move gets them in their places, unless the user has said which ones may not.
        let moving = vit.reads_moving_tokens(graph, id, protect, suffix);
        let restores = pinned.contains(&id) || read.len() > 1 || meets_restored;
        if restores || (moving.is_some() && asked.is_none()) {
            if softmaxes.contains(&id) {
                return Err(
                    rewriter.pinned(id, "it is an attention over tokens of which some were reduced and some not")
                );
            }
            if read.iter().any(|&stage| stage > 0) {
                stages.restore_at.push(id);
            }
            restored.extend(node.results().filter(|&value| vit.axes.carries(value)));
            continue;
        }
        let stage = read.into_iter().next().unwrap_or(0);
        if let Some(what) = moving.filter(|_| stage > 0) {
            return Err(Refusal::Request(format!(
                "{} reads tokens by position ({what}) that are not protected: {protect} at the front and {suffix} at \
                 the end are; protect more with --protect",
                graph.describe(id)
            )));
        }
        for value in node.results().filter(|&value| vit.axes.carries(value)) {
            stages.of_value.insert(value, stage);
        }
    }
    Ok(stages)
}

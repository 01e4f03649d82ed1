//! Stages: between one merge and the next the token count is the same. Which stage is each tensor in?

use std::collections::{HashMap, HashSet};

use vitrim_ir::{Expr, NodeId, ValueId};

use super::Rewriter;
use crate::Refusal;
use crate::recognise::softmaxes;

/// What the merge that begins a stage gives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stage {
    /// Sizes, `[B, M, 1]` float32.
    pub size: Option<ValueId>,
    /// `anchor`, `leaving` and `into` of the merge.
    pub grouping: Option<[ValueId; 3]>,
    /// Slot of every original token.
    pub owner: Option<ValueId>,
    /// Original token whose place each slot keeps.
    pub anchor: Option<ValueId>,
}

/// Stages of the rewritten graph. Stage 0 is before the first merge.
#[derive(Clone, Debug, Default)]
pub(super) struct Stages {
    /// Stage of every tensor that carries tokens; those that are restored have none.
    of_value: HashMap<ValueId, usize>,
    /// Nodes whose operands must be restored, because they need all tokens or meet tensors that are restored.
    pub restore_at: Vec<NodeId>,
    /// Token count of each stage; `None` where known only at run time.
    counts: Vec<Option<Expr>>,
    /// The stage that each block's attention is in.
    blocks: Vec<usize>,
    entries: Vec<Stage>,
}

impl Stages {
    /// The stage of a tensor that carries tokens and is not restored.
    pub fn of(&self, value: ValueId) -> Option<usize> {
        self.of_value.get(&value).copied()
    }

    /// The stage that a block's attention is in.
    pub fn of_block(&self, block: usize) -> usize {
        self.blocks[block]
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
    let (protect, suffix) = (rewriter.protect, rewriter.suffix);
    let mut stages = Stages { counts: vec![Some(vit.tokens().clone())], ..Stages::default() };
    // The stage that readers of a cut's results are in.
    let mut after_cut: HashMap<ValueId, usize> = HashMap::new();
    for (block, &removed) in vit.blocks.iter().zip(&rewriter.removed) {
        stages.blocks.push(stages.last());
        if removed > 0 {
            let before = stages.counts[stages.last()].clone();
            let known = before.filter(|count| count.as_known().is_some());
            stages.counts.push(known.and_then(|count| count.minus(&Expr::known(removed as i64))));
            let stage = stages.last();
            after_cut.extend(graph.node(block.cut).results().map(|value| (value, stage)));
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
        if restores || (moving.is_some() && rewriter.options.protect.is_none()) {
            if softmaxes.contains(&id) {
                return Err(
                    rewriter.pinned(id, "it is an attention over tokens of which some were merged and some not")
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

//! Token reduction: `TokenMerge` and `TokenPrune` between attention and MLP, `TokenExpand` and `TokenAbsorb` behind the
//! first block, and everything that follows from them.
//!
//! Merging is that of Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461); pruning that of
//! Liang et al., "Not All Patches are What You Need", ICLR 2022 (EViT, arXiv 2202.07800), and of Kong et al., "Peeling the
//! Onion", AAAI 2023 (Tri-Level E-ViT, arXiv 2211.10801); one patch does it all, for any mix of them. Expansion is that of
//! Huang et al., "A General and Efficient Training for Transformer via Token Expansion", CVPR 2024 (arXiv 2404.00672).
//!
//! 1. at every cut whose block removes tokens, the residual stream goes through the operators (`plan`, `stages`, `merge`,
//!    `prune`, `cut`);
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
mod expand;
mod extents;
mod fused;
mod grouping;
mod mask;
mod merge;
mod metric;
mod open;
mod plan;
mod precision;
mod prune;
mod recount;
mod restore;
mod spans;
mod stages;
mod tables;
mod weigh;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use vitrim_ir::{
    Attribute, CONSTANTS_APART, DataType, DimSpec, Effect, Graph, Model, NodeId, Patch, Span, Tensor, TensorType,
    ValueId,
};
use vitrim_ops::{DOMAIN, OpDef, TokenSize, VERSION};

use crate::Refusal;
use crate::recognise::{PlainAttention, VitModel};
use crate::schedule::{Expansion, KeepSchedule, Schedule, Step};
use plan::{Act, Plan};
use precision::Coding;
use spans::Part;
use stages::Stages;
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

/// One way to have fewer tokens behind the attention of some blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// Token merging.
    Merge(Merge),
    /// Token pruning.
    Prune(Prune),
    /// Token expansion, on the output of the first block. It acts alone.
    Expand(Expand),
}

/// Token merging (arXiv 2210.09461): what to merge, and how.
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
    /// Whether r is an input of the model, [`R_INPUT`].
    pub runtime: bool,
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
            runtime: false,
        }
    }
}

/// Token pruning (EViT, arXiv 2202.07800; Tri-Level E-ViT, arXiv 2211.10801).
#[derive(Clone, Debug, PartialEq)]
pub struct Prune {
    /// Patches to keep per block.
    pub schedule: KeepSchedule,
    /// Whether what leaves becomes one more token: EViT's fusion of inattentive tokens.
    pub fuse: bool,
    /// Share of the connections between patches that later blocks keep: Tri-Level's attention level; all where not given.
    pub attention_keep: Option<f64>,
    /// Whether the shares are inputs of the model, [`KEEP_INPUT`] and [`ATTENTION_KEEP_INPUT`].
    pub runtime: bool,
}

/// Token expansion (ToE, arXiv 2404.00672): what to keep, and which patches are near each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Expand {
    /// Patches to keep in the course of the training.
    pub schedule: Expansion,
    /// The stage of it, from 1 on.
    pub stage: usize,
    /// How far patches are from each other.
    pub distance: Distance,
    /// What of the distance is near.
    pub convention: Convention,
}

/// How far tokens, scaled to length one, are from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Distance {
    /// By the cosine of their angle.
    #[default]
    Cosine,
    /// By the sum of absolute differences.
    Manhattan,
    /// By the root of the sum of squared differences.
    Euclidean,
}

/// Which of two distances is that to the nearer token. The two conventions agree on the cosine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convention {
    /// The smaller, as the paper has it.
    #[default]
    Paper,
    /// The larger: what the authors' program takes of all it computes, cosines and distances alike.
    Code,
}

/// What happens to the tokens after the attention of each block.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Reduction {
    /// The methods, in the order in which they act at a block.
    pub methods: Vec<Method>,
    /// Name of an output to add, if any: `[batch, tokens]` int64, the final slot of every original token, -1 for those
    /// that were dropped.
    pub trace_source: Option<String>,
    /// Whether the last tokens are cut off instead, as many as would leave: the slicing floor. No sensible model: it shows
    /// what the reduced token count alone is worth.
    pub sliced: bool,
}

/// The usual name of the output that tells where tokens went.
pub const SOURCE_OUTPUT: &str = "token_source";

/// The input that says how many tokens to merge in each block: an int64 scalar.
pub const R_INPUT: &str = "r";
/// The input that says which share of the patches to keep: a float64 scalar, as a share like 0.7 in float32 is another.
pub const KEEP_INPUT: &str = "keep";
/// The input that says which share of the connections between patches to keep: a float64 scalar too.
pub const ATTENTION_KEEP_INPUT: &str = "attention_keep";

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

impl Reduction {
    /// Proposes the edits that reduce the tokens of a recognised model.
    pub fn propose(&self, model: &Model, vit: &VitModel) -> Result<Proposal, Refusal> {
        let tokens = vit.tokens().as_known().map(|tokens| tokens as usize);
        let plan = Plan::of(self, vit.blocks.len(), tokens, vit.special)?;
        plan.check_places(model.graph(), vit)?;
        let counted = plan.is_counted();
        let Plan { acts, steps, notes } = plan;
        let idle = acts.iter().all(Vec::is_empty) && self.trace_source.is_none();
        let opset = model.opsets().standard();
        if opset < vitrim_ops::MIN_OPSET && !idle {
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
            patch: Patch::new(model, "reduction"),
            weights: Weights::of(self)?,
            acts,
            counted,
            inputs: HashMap::new(),
            stages: Stages::default(),
            plain: HashMap::new(),
            masked: HashMap::new(),
            joined: HashMap::new(),
            replaced: HashMap::new(),
            revived: HashMap::new(),
            followed: Vec::new(),
            tables: HashMap::new(),
            parts: HashMap::new(),
            notes,
        };
        rewriter.stages = stages::assign(&rewriter)?;
        if idle {
            return Ok(Proposal { patch: rewriter.patch, steps, notes: rewriter.notes });
        }
        rewriter.find_plain_attention();
        rewriter.reduce_blocks()?;
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

/// Where the sizes of tokens count. It concerns the graph as a whole, so methods have to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weights {
    /// In attention.
    proportional: bool,
    /// In means over tokens.
    pooling: bool,
}

impl Weights {
    fn of(reduction: &Reduction) -> Result<Self, Refusal> {
        let merges = reduction.methods.iter().filter_map(|method| match method {
            Method::Merge(merge) => Some(Self { proportional: merge.proportional, pooling: !merge.plain_pooling }),
            Method::Prune(_) => None,
            Method::Expand(_) => Some(Self { proportional: false, pooling: false }),
        });
        let mut merges = merges.peekable();
        let first = merges.peek().copied().unwrap_or(Self { proportional: true, pooling: true });
        match merges.all(|weights| weights == first) {
            true => Ok(first),
            false => Err(Refusal::Request("merges of one model must agree on proportional and plain_pooling".into())),
        }
    }
}

/// The state of a rewrite.
struct Rewriter<'a> {
    options: &'a Reduction,
    model: &'a Model,
    graph: &'a Graph,
    vit: &'a VitModel,
    patch: Patch,
    weights: Weights,
    /// What happens at each block.
    acts: Vec<Vec<Act>>,
    /// Whether all token counts are known.
    counted: bool,
    /// Inputs of the model that say at run time how much, by name.
    inputs: HashMap<&'static str, ValueId>,
    stages: Stages,
    /// Attention that an operator of ours takes the place of, by its softmax.
    plain: HashMap<NodeId, PlainAttention>,
    /// Weights of attention whose connections may be closed, `[B, H, N, M]`, by their softmax.
    masked: HashMap<NodeId, ValueId>,
    /// What its operators read, as `[B, N, W]`.
    joined: HashMap<ValueId, ValueId>,
    /// Values whose readers were given another value: merged streams, and results of operators left out or followed by
    /// others that put them right.
    replaced: HashMap<ValueId, ValueId>,
    /// Values that all tokens are in again, those that were dropped too.
    revived: HashMap<ValueId, ValueId>,
    /// Tables that follow the tokens, and what they became.
    followed: Vec<(Table, ValueId)>,
    /// What took the place of a table in an operand of a node.
    tables: HashMap<(NodeId, usize), ValueId>,
    /// What the slots of a span have, by stage.
    parts: HashMap<(usize, Span), Part>,
    notes: Vec<String>,
}

/// The tokens on their way through the acts of a block.
struct Stream {
    block: usize,
    /// `[B, N, C]`
    value: ValueId,
    channels: Option<i64>,
    dtype: DataType,
    stage: usize,
    /// Names of what is added begin so.
    hint: String,
}

impl Stream {
    fn channels(&self, rewriter: &Rewriter<'_>) -> Result<i64, Refusal> {
        let cut = rewriter.vit.blocks[self.block].cut;
        self.channels.ok_or_else(|| rewriter.pinned(cut, "it gives tokens of unknown width"))
    }
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

    fn reduce_blocks(&mut self) -> Result<(), Refusal> {
        for block in 0..self.vit.blocks.len() {
            self.replace_plain_attention(block)?;
            self.mask_attention(block)?;
            if !self.acts[block].is_empty() {
                self.reduce_block(block)?;
            }
        }
        Ok(())
    }

    /// The node behind which the acts of a block are: the one behind its attention, or that which ends it.
    fn place(&self, block: usize) -> NodeId {
        let cut = self.vit.blocks[block].cut;
        match self.acts[block].first() {
            Some(Act::Expand { .. }) => self.vit.blocks.get(block + 1).and_then(|next| next.entry).unwrap_or(cut),
            _ => cut,
        }
    }

    /// Puts the acts of one block in their place.
    fn reduce_block(&mut self, block: usize) -> Result<(), Refusal> {
        let cut = self.place(block);
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
        let unscaled = self.pinned(cut, "it gives integers, and what they stand for is not known");
        let coding = self.coding_of_result(self.graph.node(cut)).ok_or(unscaled)?;
        // Half precision goes into the operators as it is: they cast.
        let quantised = matches!(coding, Coding::Scaled { .. }) && !self.options.sliced;
        let numbers = if quantised { self.as_f32(before, coding, &hint) } else { before };
        let tokens = self.tokens_second(numbers, &arrangement, stage, &hint).ok_or_else(unknown)?;
        let channels = arrangement.other_extents().into_iter().product::<Option<i64>>();
        let mut stream = Stream {
            block,
            value: match arrangement.others() {
                0 => return Err(refusal),
                1 => tokens,
                _ => self.reshape(tokens, &[0, 0, -1], &format!("{hint}/channels_joined")),
            },
            channels,
            dtype: if quantised { DataType::F32 } else { self.dtype(x) },
            stage,
            hint,
        };
        if self.options.sliced {
            self.slice(&mut stream)?;
        } else {
            for act in self.acts[block].clone() {
                match act {
                    Act::Merge { method, r } => self.merge(&mut stream, method, r)?,
                    Act::Prune { keep, fuse, attention_keep } => {
                        self.prune(&mut stream, keep, fuse, attention_keep)?;
                    }
                    Act::Expand { keep } => self.expand(&mut stream, keep)?,
                }
            }
        }
        let Stream { value: y, stage, hint, .. } = stream;
        let y = match arrangement.other_extents().as_slice() {
            [_] => y,
            extents => {
                let extents: Option<Vec<i64>> = extents.iter().copied().collect();
                let target = [vec![0, 0], extents.ok_or_else(unknown)?].concat();
                self.reshape(y, &target, &format!("{hint}/channels_split"))
            }
        };
        let back = self.as_before(y, &arrangement, stage, &hint).ok_or_else(unknown)?;
        let back = if quantised { self.as_coded(back, coding, &format!("{hint}/merged_as_stream")) } else { back };
        self.replace_stream(cut, x, back);
        Ok(())
    }

    /// Cuts the last tokens off, as many as would leave.
    fn slice(&mut self, stream: &mut Stream) -> Result<(), Refusal> {
        let last = self.stages.behind_block(stream.block);
        let left = self.stages.count(last).and_then(|left| left.as_known());
        let left = left.ok_or_else(|| Refusal::Request("the slicing floor needs a fixed token count".into()))?;
        let bounds = [("starts", 0), ("ends", left), ("axes", 1)];
        let bounds = bounds.map(|(name, value)| self.ints(&format!("{}/{name}", stream.hint), &[value]));
        let operands = [stream.value, bounds[0], bounds[1], bounds[2]];
        stream.value = self.patch.op("Slice", &format!("{}/kept", stream.hint), &operands, &[]);
        stream.stage = last;
        Ok(())
    }

    /// The input of the model that says how much, a scalar, and what it is where it is left out.
    fn input(&mut self, name: &'static str, default: Tensor) -> Result<ValueId, Refusal> {
        if let Some(&known) = self.inputs.get(name) {
            return Ok(known);
        }
        if self.graph.find_value(name).is_some() {
            return Err(Refusal::Request(format!("the model has a value named '{name}' already")));
        }
        if self.model.ir_version() < CONSTANTS_APART {
            return Err(Refusal::Request(format!(
                "the model's format (IR version {}) has no inputs that can be left out: convert it to version \
                 {CONSTANTS_APART} or newer",
                self.model.ir_version()
            )));
        }
        let input = self.patch.input(name, default);
        self.inputs.insert(name, input);
        Ok(input)
    }

    /// Sizes of the tokens of `x`, `[B, N, ·]`, at a stage.
    fn sizes(&mut self, stage: usize, x: ValueId) -> ValueId {
        let known = self.stages.entry(stage);
        known.size.or(known.ones).unwrap_or_else(|| {
            let ones = self.vitrim(&TokenSize, "vitrim/initial_size", &[x], &[], 1)[0];
            self.stages.entry_mut(stage).ones = Some(ones);
            ones
        })
    }

    /// Declares the types of reduced tokens and their sizes where their number is found at run time. What follows from the
    /// operators grows with every act, until it is too long to be followed.
    fn declare_reduced(&mut self, [y, size]: [ValueId; 2], stream: &Stream) {
        let batch = self.vit.axes.batch();
        let named = || {
            let declared = self.graph.value(self.vit.image).ty()?.dims?;
            let is_batch = |dim: &DimSpec| matches!(dim, DimSpec::Named(name) if Some(&**name) == batch.as_symbol());
            declared.into_iter().find(is_batch)
        };
        let batch = batch.as_known().map(DimSpec::Known).or_else(named).unwrap_or(DimSpec::Unknown);
        let tokens = DimSpec::Named(format!("{}/tokens{}", stream.hint, stream.stage + 1));
        let channels = stream.channels.map_or(DimSpec::Unknown, DimSpec::Known);
        for (value, dtype, last) in [(y, stream.dtype, channels), (size, DataType::F32, DimSpec::Known(1))] {
            let dims = Some(vec![batch.clone(), tokens.clone(), last]);
            self.patch.declare(value, &TensorType { dtype, dims });
        }
    }

    /// Lets the readers of `old` read `new`; graph outputs are left to `restore`.
    fn replace(&mut self, old: ValueId, new: ValueId) {
        self.patch.rewire_uses(self.graph, old, new, |_| true);
        self.replaced.insert(old, new);
    }

    /// The block whose acts are behind a node.
    fn acts_behind(&self, node: NodeId) -> Option<usize> {
        (0..self.acts.len()).find(|&block| self.place(block) == node)
    }

    /// What readers of `value` read now.
    fn replacement(&self, value: ValueId) -> ValueId {
        self.replaced.get(&value).copied().unwrap_or(value)
    }

    /// As [`Rewriter::replacement`], but the residual stream as it is before its merge.
    fn current(&self, value: ValueId) -> ValueId {
        let merged = self.graph.producer(value).is_some_and(|(node, _)| self.acts_behind(node).is_some());
        if merged { value } else { self.replacement(value) }
    }

    fn dtype(&self, value: ValueId) -> DataType {
        self.vit.shapes.dtype(value).unwrap_or(DataType::F32)
    }

    fn pinned(&self, node: NodeId, reason: &str) -> Refusal {
        Refusal::Pinned { node: self.graph.describe(node), reason: reason.into() }
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

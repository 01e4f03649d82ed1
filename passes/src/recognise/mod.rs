//! From a graph to a [`VitModel`]: a typed view of ids, valid for one revision of the graph.
//!
//! 1. Attention cores are found by their softmax (or fused operator).
//! 2. Between one core and the next, the residual stream passes a single node: a dominator. The earliest one after a
//!    core is where its block can be cut. The dominator of the first cut is where the blocks begin: the origin.
//! 3. From the origin, [`Axes`] follows the tokens. A core is a block's if its softmax runs over tokens for every token.
//! 4. What the heads read (picked tokens, means, per-token outputs) and what pins the tokens is collected.

mod core;
mod flow;
mod special;

use std::collections::HashSet;
use std::fmt;

use serde::Serialize;
use vitrim_ir::{Axes, Effect, Expr, Graph, Model, NodeId, Shapes, Span, ValueId};

pub use self::core::{Core, Slots};
use crate::Refusal;
use flow::Flow;

/// A Vision Transformer in a graph.
#[derive(Clone, Debug)]
pub struct VitModel {
    /// The revision of the graph that all ids belong to.
    pub revision: u64,
    /// Inferred shapes.
    pub shapes: Shapes,
    /// Where the tokens run.
    pub axes: Axes,
    /// The graph input that holds the images.
    pub image: ValueId,
    /// Axes of the residual stream.
    pub stream: StreamAxes,
    /// Blocks in order.
    pub blocks: Vec<Block>,
    /// Tokens that are no patches.
    pub special: SpecialTokens,
    /// What the model makes of the tokens after the last block.
    pub heads: Vec<Head>,
    /// Nodes after the last block that need all tokens in their places: tokens are restored before them.
    pub restore_before: Vec<Pin>,
}

/// Which axis of the residual stream is which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamAxes {
    /// Images.
    pub batch: usize,
    /// Tokens.
    pub tokens: usize,
    /// Channels.
    pub channels: usize,
}

/// A transformer block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its attention.
    pub core: Core,
    /// Heads of the attention.
    pub heads: usize,
    /// The node after which tokens can be regrouped: the attention's residual sum (or a fused form of it).
    pub cut: NodeId,
}

/// Tokens that do not stand for patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct SpecialTokens {
    /// Class tokens (0 or 1), at the front.
    pub cls: usize,
    /// Distillation tokens (0 or 1), after the class token.
    pub dist: usize,
    /// Register tokens, after those.
    pub reg: usize,
    /// Tokens after the patches (detection tokens).
    pub suffix: usize,
}

impl SpecialTokens {
    /// Number of special tokens at the front.
    pub fn prefix(&self) -> usize {
        self.cls + self.dist + self.reg
    }
}

/// A way in which the model reads the tokens after the last block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Head {
    /// Single tokens, by position from the front (or, negative, from the end).
    Pick {
        /// First position.
        first: i64,
        /// How many.
        count: usize,
    },
    /// The mean over tokens, special ones left out as given.
    Mean {
        /// Tokens left out at the front.
        front: usize,
        /// Tokens left out at the end.
        back: usize,
    },
    /// The largest entry over tokens.
    Extreme,
    /// Attention of a learned query over the tokens.
    AttentionPool,
    /// An output with an entry for each token.
    PerToken {
        /// Its name.
        output: String,
    },
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pick { first, count: 1 } => write!(f, "token {first}"),
            Self::Pick { first, count } => write!(f, "{count} tokens from {first} on"),
            Self::Mean { front, back } => write!(f, "the mean without the first {front} and last {back}"),
            Self::Extreme => f.write_str("the largest or smallest entry"),
            Self::AttentionPool => f.write_str("attention of a learned query"),
            Self::PerToken { output } => write!(f, "the output '{output}'"),
        }
    }
}

/// A node through which tokens cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pin {
    /// The node.
    #[serde(skip)]
    pub node: NodeId,
    /// How messages name it.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// What it does to the tokens.
    pub reason: String,
}

impl VitModel {
    /// Number of tokens that enter the first block.
    pub fn tokens(&self) -> &Expr {
        self.axes.tokens()
    }

    /// Width of the residual stream.
    pub fn width(&self) -> Option<i64> {
        self.shapes.dims(self.axes.origin())?.get(self.stream.channels)?.as_known()
    }

    /// Images per batch.
    pub fn batch(&self) -> Expr {
        self.shapes.dims(self.axes.origin()).map_or(Expr::known(1), |dims| dims[self.stream.batch].clone())
    }

    /// How the heads read the tokens, in one word where there is one: `cls`, `avg`, `map`, `tokens`, `cls+avg`, …
    pub fn pooling(&self) -> String {
        let mut words: Vec<&str> = Vec::new();
        for head in &self.heads {
            let word = match head {
                Head::Pick { first: 0, .. } => "cls",
                Head::Pick { first: 1, .. } if self.special.dist > 0 => "dist",
                Head::Pick { .. } => "picked",
                Head::Mean { .. } => "avg",
                Head::Extreme => "max",
                Head::AttentionPool => "map",
                Head::PerToken { .. } => "tokens",
            };
            if !words.contains(&word) {
                words.push(word);
            }
        }
        if !self.restore_before.is_empty() && !words.contains(&"tokens") {
            words.push("tokens");
        }
        words.join("+")
    }
}

/// Finds the Vision Transformer of a model, or says why there is none that can be rewritten.
pub fn recognise(model: &Model) -> Result<VitModel, Refusal> {
    let graph = model.graph();
    let shapes = Shapes::infer(model);
    let cores = find_image_cores(graph, &shapes)?;
    Recogniser { graph, shapes: &shapes, opset: model.opsets().standard() }.run(&cores, shapes.clone())
}

/// Attention cores that images reach.
fn find_image_cores(graph: &Graph, shapes: &Shapes) -> Result<Vec<Core>, Refusal> {
    let cores = core::find_cores(graph, shapes);
    if cores.is_empty() {
        return Err(Refusal::NotAVit("the graph has no attention (no softmax between two matrix products)".into()));
    }
    let ends: Vec<NodeId> = cores.iter().map(|core| core.softmax).collect();
    let flow = Flow::towards(graph, shapes, &ends);
    let images: Vec<Core> = (cores.into_iter())
        .filter(|core| flow.inputs_of(core.softmax).iter().any(|&input| is_image(graph, shapes, input)))
        .collect();
    if images.is_empty() {
        let message =
            "no attention reads an image (a 4-dimensional input of numbers): is it a model for text or audio?";
        return Err(Refusal::NotAVit(message.into()));
    }
    Ok(images)
}

fn is_image(graph: &Graph, shapes: &Shapes, input: ValueId) -> bool {
    let rank = shapes.dims(input).map(<[Expr]>::len);
    let dtype = graph.value(input).ty().map(|ty| ty.dtype);
    rank == Some(4) && dtype.is_some_and(|dtype| dtype.is_float() || dtype == vitrim_ir::DataType::U8)
}

struct Recogniser<'a> {
    graph: &'a Graph,
    shapes: &'a Shapes,
    opset: i64,
}

impl Recogniser<'_> {
    fn run(&self, cores: &[Core], shapes: Shapes) -> Result<VitModel, Refusal> {
        let graph = self.graph;
        let first_cut = self.first_cut(cores)?;
        let flow = Flow::towards(graph, self.shapes, &[first_cut]);
        let origin_node = flow.gate_before(first_cut).ok_or_else(|| {
            Refusal::NotAVit(format!("nothing that all of the image passes comes before {}", graph.describe(first_cut)))
        })?;
        let origin = (graph.node(origin_node).results())
            .find(|&value| self.shapes.is_data(value) && !graph.value(value).uses().is_empty())
            .ok_or_else(|| Refusal::NotAVit(format!("{} has no result", graph.describe(origin_node))))?;
        let image = (flow.inputs_of(origin_node).into_iter())
            .find(|&input| is_image(graph, self.shapes, input))
            .ok_or_else(|| Refusal::NotAVit("the first attention reads no image".into()))?;
        let (axes, stream) = self.token_axis(origin, cores)?;
        let blocks = self.blocks(cores, &axes, stream)?;
        let special = special::find(graph, self.shapes, origin, stream.tokens);
        let last = blocks.last().map(|block| block.cut).unwrap_or(first_cut);
        let mut restore_before = Vec::new();
        let after_core: HashSet<NodeId> = flow_after(graph, self.shapes, &blocks);
        for (node, reason) in axes.pins() {
            let pin =
                Pin { node, name: graph.describe(node), op: graph.node(node).op.to_string(), reason: reason.into() };
            let reached = Flow::towards(graph, self.shapes, &[node]).reached_from(node);
            let inside = cores.iter().any(|core| reached.contains(&core.softmax) && !is_pool(core, &axes, graph));
            if inside || !after_core.contains(&node) {
                return Err(Refusal::Pinned { node: pin.name, reason: pin.reason });
            }
            restore_before.push(pin);
        }
        let heads = self.heads(&axes, &blocks, last);
        let special = special.named(&heads);
        Ok(VitModel { revision: graph.revision(), shapes, axes, image, stream, blocks, special, heads, restore_before })
    }

    /// The first cut, found before anything is known of tokens.
    fn first_cut(&self, cores: &[Core]) -> Result<NodeId, Refusal> {
        self.cut_after(&cores[0], cores.get(1).map(|core| core.softmax))
    }

    /// The earliest node after `core` that all content passes on its way to `next` (or, after the last core, to the
    /// graph's outputs).
    fn cut_after(&self, core: &Core, next: Option<NodeId>) -> Result<NodeId, Refusal> {
        let graph = self.graph;
        let ends = match next {
            Some(next) => vec![next],
            None => {
                let reached = Flow::towards(graph, self.shapes, &[core.mix]).reached_from(core.mix);
                let ends = graph.outputs().iter().filter_map(|&output| graph.producer(output)).map(|(node, _)| node);
                ends.filter(|end| reached.contains(end)).collect()
            }
        };
        let flow = Flow::towards(graph, self.shapes, &ends);
        let reached = flow.reached_from(core.mix);
        let cut = flow.gates().into_iter().find(|gate| reached.contains(gate) && *gate != core.mix);
        cut.filter(|cut| next != Some(*cut)).ok_or_else(|| Refusal::Pinned {
            node: graph.describe(core.softmax),
            reason: "it is an attention after which the model has no single stream of tokens to regroup".into(),
        })
    }

    /// The axis of the origin along which the first attention runs.
    fn token_axis(&self, origin: ValueId, cores: &[Core]) -> Result<(Axes, StreamAxes), Refusal> {
        let graph = self.graph;
        let not = |reason: String| Refusal::NotAVit(reason);
        let dims = self.shapes.dims(origin).ok_or_else(|| {
            not(format!(
                "the shape of '{}' is not known: {}",
                graph.value(origin).name(),
                self.shapes.reason(origin).unwrap_or("no rule")
            ))
        })?;
        let rank = dims.len();
        let mut failure = None;
        let mut candidates: Vec<usize> = (0..rank).collect();
        candidates.sort_by_key(|&axis| (axis != 1, axis));
        for axis in candidates.into_iter().filter(|&axis| !dims[axis].is(1)) {
            let axes = Axes::follow(graph, self.shapes, origin, axis, self.opset).map_err(not)?;
            if is_block(&cores[0], &axes, graph) {
                if rank != 3 || axis == 2 {
                    let node = graph.producer(origin).map_or(String::new(), |(node, _)| graph.describe(node));
                    let reason =
                        format!("it gives a residual stream of {rank} dimensions, not [batch, tokens, channels]");
                    return Err(Refusal::Pinned { node, reason });
                }
                return Ok((axes, StreamAxes { batch: 1 - axis, tokens: axis, channels: 2 }));
            }
            let pin = axes.pins().next().map(|(node, reason)| (graph.describe(node), reason.to_owned()));
            failure = failure.or(pin);
        }
        Err(match failure {
            Some((node, reason)) => Refusal::Pinned { node, reason },
            None => not(format!(
                "{} does not attend over an axis of '{}'",
                graph.describe(cores[0].softmax),
                graph.value(origin).name()
            )),
        })
    }

    fn blocks(&self, cores: &[Core], axes: &Axes, stream: StreamAxes) -> Result<Vec<Block>, Refusal> {
        let encoder: Vec<&Core> = cores.iter().filter(|core| is_block(core, axes, self.graph)).collect();
        let mut blocks = Vec::with_capacity(encoder.len());
        for (at, core) in encoder.iter().enumerate() {
            let cut = self.cut_after(core, encoder.get(at + 1).map(|next| next.softmax))?;
            let heads = self.heads_of(core, axes, stream).ok_or_else(|| Refusal::Pinned {
                node: self.graph.describe(core.softmax),
                reason: "it is an attention whose number of heads is not known".into(),
            })?;
            blocks.push(Block { core: (*core).clone(), heads, cut });
        }
        Ok(blocks)
    }

    /// Heads of a block's attention: what its outer axes hold beside the batch.
    fn heads_of(&self, core: &Core, axes: &Axes, stream: StreamAxes) -> Option<usize> {
        let node = self.graph.node(core.softmax);
        if let Some(heads) = node.int("q_num_heads").filter(|_| core.is_fused()) {
            return usize::try_from(heads).ok();
        }
        let value = if core.is_fused() { core.query(self.graph)? } else { node.output(0)? };
        let layout = axes.layout(value)?;
        let outer = &layout.0[..layout.rank().checked_sub(2)?];
        let extents = outer.iter().map(|axis| axis.plain_extent()).collect::<Option<Vec<_>>>()?;
        let batch = &self.shapes.dims(axes.origin())?[stream.batch];
        usize::try_from(Expr::product(&extents)?.div_exact(batch)?.as_known()?).ok()
    }

    fn heads(&self, axes: &Axes, blocks: &[Block], last: NodeId) -> Vec<Head> {
        let after = Flow::towards(self.graph, self.shapes, &[last]).reached_from(last);
        let mut heads = Vec::new();
        let softmaxes: HashSet<NodeId> = blocks.iter().map(|block| block.core.softmax).collect();
        for (node, effect) in axes.effects() {
            let head = match effect {
                Effect::Pick { first, count } if after.contains(node) => Head::Pick { first: *first, count: *count },
                Effect::Pool { span: Span { front, back }, .. } if after.contains(node) => {
                    Head::Mean { front: *front, back: *back }
                }
                Effect::Extreme if after.contains(node) => Head::Extreme,
                Effect::Attend if !softmaxes.contains(node) => Head::AttentionPool,
                _ => continue,
            };
            if !heads.contains(&head) {
                heads.push(head);
            }
        }
        for &output in self.graph.outputs() {
            if axes.carries(output) {
                heads.push(Head::PerToken { output: self.graph.value(output).name().into() });
            }
        }
        heads
    }
}

/// Nodes that content of any block's attention reaches.
fn flow_after(graph: &Graph, shapes: &Shapes, blocks: &[Block]) -> HashSet<NodeId> {
    let Some(first) = blocks.first() else { return HashSet::new() };
    Flow::towards(graph, shapes, &[first.core.softmax]).reached_from(first.core.softmax)
}

/// Whether a core attends over the tokens, for every token.
fn is_block(core: &Core, axes: &Axes, graph: &Graph) -> bool {
    if !axes.effects_of(core.softmax).any(|effect| *effect == Effect::Attend) {
        return false;
    }
    let node = graph.node(core.softmax);
    let queries = if core.is_fused() { core.query(graph) } else { node.output(0) };
    let axes_with_tokens = queries.and_then(|value| axes.layout(value)).map_or(0, |layout| layout.token_axes().len());
    axes_with_tokens == if core.is_fused() { 1 } else { 2 }
}

/// Whether a core attends over the tokens for something else than every token.
fn is_pool(core: &Core, axes: &Axes, graph: &Graph) -> bool {
    axes.effects_of(core.softmax).any(|effect| *effect == Effect::Attend) && !is_block(core, axes, graph)
}

//! From a graph to a [`VitModel`]: a typed view of ids, valid for one revision of the graph.
//!
//! 1. Attention cores are found by their softmax (or fused operator). Those of one tower are looked at together.
//! 2. Between one core and the next, the residual stream passes a single node: a dominator. The earliest one after a
//!    core is where its block can be cut. The dominator of the first cut is where the blocks begin: the origin.
//! 3. From the origin, [`Axes`] follows the tokens. A core is a block's if its softmax runs over tokens for every token.
//! 4. What the heads read (picked tokens, means, per-token outputs) and what pins the tokens is collected.

mod core;
mod flow;
mod special;
mod stream;
mod tower;
mod window;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use vitrim_ir::{Axes, Effect, Expr, Graph, Model, NodeId, Shapes, Span, ValueId};

use self::core::Group;
pub use self::core::{Core, Slots};
use crate::Refusal;
use flow::{Content, Flow};
pub use window::{Form, PlainAttention, Window};

/// A Vision Transformer in a graph.
#[derive(Clone, Debug)]
pub struct VitModel {
    /// The revision of the graph that all ids belong to.
    pub revision: u64,
    /// Inferred shapes.
    pub shapes: Arc<Shapes>,
    /// Where the tokens run.
    pub axes: Axes,
    /// The graph input that holds the images.
    pub image: ValueId,
    /// Blocks in order.
    pub blocks: Vec<Block>,
    /// Tokens that are no patches.
    pub special: SpecialTokens,
    /// What the model makes of the tokens after the last block.
    pub heads: Vec<Head>,
    /// Nodes after the last block that need all tokens in their places: tokens are restored before them.
    pub restore_before: Vec<Pin>,
}

/// A transformer block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its attention: one for all heads in most models.
    pub attentions: Vec<Attention>,
    /// The node after which tokens can be regrouped: the attention's residual sum (or a fused form of it).
    pub cut: NodeId,
    /// The node that gives the stream that the block begins with, where there is one such.
    pub entry: Option<NodeId>,
}

impl Block {
    /// Heads of all its attentions together. Parts of one, with the same keys, count once.
    pub fn heads(&self, graph: &Graph) -> usize {
        let mut seen: Vec<(Option<ValueId>, NodeId)> = Vec::new();
        let own = |attention: &&Attention| {
            let key = (attention.core.key(graph), attention.core.mix);
            let new = !seen.iter().any(|&(keys, mix)| keys == key.0 || mix == key.1);
            seen.push(key);
            new
        };
        self.attentions.iter().filter(own).map(|attention| attention.heads).sum()
    }
}

/// An attention of a block.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Where it is.
    pub core: Core,
    /// Its heads.
    pub heads: usize,
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
        front: i64,
        /// Tokens left out at the end.
        back: i64,
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
    /// An attention of a block as plain attention over windows of channels, if it is that.
    pub fn plain_attention(&self, graph: &Graph, attention: &Attention) -> Option<PlainAttention> {
        window::View { graph, shapes: &self.shapes, axes: &self.axes }.plain(attention)
    }

    /// Number of tokens that enter the first block.
    pub fn tokens(&self) -> &Expr {
        self.axes.tokens()
    }

    /// Width of the residual stream.
    pub fn width(&self) -> Option<i64> {
        let dims = self.shapes.dims(self.axes.origin())?;
        Expr::product(dims)?.div_exact(&self.axes.batch().times(self.axes.tokens())?)?.as_known()
    }

    /// What a node takes of the tokens by position, or leaves out, beyond the first `protect` and the last `suffix`:
    /// others may move.
    pub fn reads_moving_tokens(&self, graph: &Graph, node: NodeId, protect: usize, suffix: usize) -> Option<String> {
        let (protect, suffix) = (protect as i64, suffix as i64);
        let picked = self.axes.effects_of(node).find_map(|effect| {
            let Effect::Pick { first, count } = *effect else { return None };
            let moves = if first >= 0 { first + count as i64 > protect } else { -first > suffix };
            moves.then(|| format!("{count} from {first} on"))
        });
        let mut axes =
            graph.node(node).results().filter_map(|value| self.axes.layout(value)).flat_map(|layout| &layout.0);
        let left_out = |span: Span| {
            let moves = span.front > protect || span.back > suffix;
            moves.then(|| format!("all but the first {} and last {}", span.front, span.back))
        };
        picked.or_else(|| axes.find_map(|axis| left_out(axis.span()?)))
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

/// One of the Vision Transformers of a model.
#[derive(Clone, Debug)]
pub struct Tower {
    /// The name of the (first) image that it reads; with `#1`, `#2`, … behind it where several towers read the same.
    pub name: String,
    /// Its first attention. Rewriting leaves alone what comes before a tower's first cut, so this node stands for the
    /// tower in all revisions of the graph.
    pub attention: NodeId,
    /// What was found, or why its tokens cannot be regrouped.
    pub found: Result<VitModel, Refusal>,
}

impl Tower {
    /// The tower of that name.
    pub fn named<'t>(towers: &'t [Self], name: &str) -> Result<&'t Self, Refusal> {
        towers.iter().find(|tower| tower.name == name).ok_or_else(|| {
            let names: Vec<String> = towers.iter().map(|tower| format!("'{}'", tower.name)).collect();
            Refusal::Request(format!("there is no tower '{name}': the model has {}", names.join(", ")))
        })
    }
}

/// Finds the Vision Transformer of a model, or says why there is none that can be rewritten. Of several towers it is
/// the first that can be.
pub fn recognise(model: &Model) -> Result<VitModel, Refusal> {
    let mut towers = towers(model)?;
    let first = towers.iter().position(|tower| tower.found.is_ok()).unwrap_or(0);
    towers.swap_remove(first).found
}

/// Towers that are looked at, each on its own. A model of more is none of Vision Transformers, and would take long.
const MAX_TOWERS: usize = 64;

/// Finds all Vision Transformers of a model, at least one, in the order of their first attentions.
pub fn towers(model: &Model) -> Result<Vec<Tower>, Refusal> {
    let graph = model.graph();
    let shapes = Arc::new(Shapes::infer(model));
    let images: Vec<ValueId> =
        graph.inputs().iter().copied().filter(|&input| is_image(graph, &shapes, input)).collect();
    let content = Content::of(graph, &shapes, &images, HashSet::new());
    let cores = find_image_cores(graph, &shapes, &content)?;
    let any = tower::related(graph, &content, &cores);
    let parts = tower::partition(graph, &content, cores);
    if parts.len() > MAX_TOWERS {
        let count = parts.len();
        return Err(Refusal::NotAVit(format!("{count} attentions read images and have nothing to do with each other")));
    }
    let first_images = parts.iter().map(|cores| content.image_of(cores[0].softmax)).collect::<Option<Vec<_>>>();
    let first_images = first_images.ok_or_else(|| Refusal::Internal("an attention reads no image".into()))?;
    let opset = model.opsets().standard();
    let recognised = |(cores, name): (Vec<Core>, String)| {
        // What other towers make of their images is not this one's content, wherever it goes from there.
        let own = tower::related(graph, &content, &cores);
        let content = Content::of(graph, &shapes, &images, any.difference(&own).copied().collect());
        let found = Recogniser { graph, shapes: &shapes, content: &content, opset }.run(&cores);
        Tower { name, attention: cores[0].softmax, found }
    };
    let names = tower::names(graph, &first_images);
    Ok(parts.into_iter().zip(names).map(recognised).collect())
}

/// Attention cores that images reach.
fn find_image_cores(graph: &Graph, shapes: &Shapes, content: &Content<'_>) -> Result<Vec<Core>, Refusal> {
    let mut cores = core::find_cores(graph, shapes);
    if cores.is_empty() {
        let nested = graph.nodes().find(|(_, node)| node.subgraphs().any(normalises));
        return Err(match nested {
            Some((node, _)) => Refusal::Pinned {
                node: graph.describe(node),
                reason: "it has the attention in a graph of its own, where tokens are not followed; export the model \
                         without loops and branches"
                    .into(),
            },
            None => Refusal::NotAVit("the graph has no attention (no softmax between two matrix products)".into()),
        });
    }
    cores.retain(|core| graph.node(core.softmax).results().any(|value| content.contains(value)));
    if cores.is_empty() {
        let message = "no attention reads an image (an input of numbers with four dimensions, or five for video): is it \
                       a model for text or audio?";
        return Err(Refusal::NotAVit(message.into()));
    }
    Ok(cores)
}

/// Whether a nested graph has a softmax, at any depth.
fn normalises(graph: &Graph) -> bool {
    graph.nodes().any(|(_, node)| node.is("Softmax") || node.subgraphs().any(normalises))
}

fn is_image(graph: &Graph, shapes: &Shapes, input: ValueId) -> bool {
    let rank = shapes.dims(input).map(<[Expr]>::len);
    let dtype = graph.value(input).ty().map(|ty| ty.dtype);
    matches!(rank, Some(4 | 5)) && dtype.is_some_and(|dtype| dtype.is_float() || dtype == vitrim_ir::DataType::U8)
}

struct Recogniser<'a> {
    graph: &'a Graph,
    shapes: &'a Arc<Shapes>,
    content: &'a Content<'a>,
    opset: i64,
}

impl Recogniser<'_> {
    fn run(&self, cores: &[Core]) -> Result<VitModel, Refusal> {
        let graph = self.graph;
        let groups = core::group(cores, |node| Flow::towards(self.content, &[node]).reached_from(node));
        let first_cut = self.cut_after(&groups[0], groups.get(1), None)?;
        let flow = Flow::towards(self.content, &[first_cut]);
        let origin_node = flow.gate_before(first_cut).ok_or_else(|| {
            Refusal::NotAVit(format!("nothing that all of the image passes comes before {}", graph.describe(first_cut)))
        })?;
        let origin = (graph.node(origin_node).results())
            .find(|&value| self.content.contains(value) && !graph.value(value).uses().is_empty())
            .ok_or_else(|| Refusal::NotAVit(format!("{} has no result", graph.describe(origin_node))))?;
        let image = (self.content.image_of(origin_node))
            .ok_or_else(|| Refusal::NotAVit("the first attention reads no image".into()))?;
        let axes = self.tokens(origin, cores)?;
        // A pin between two attentions also leaves the first of them without a stream to cut: it is the better reason.
        let pinned = || axes.pins().find(|(node, _)| self.leads_to_attention(*node, cores, &axes));
        let blocks = self.blocks(&groups, &axes).map_err(|refusal| match pinned() {
            Some((node, reason)) => Refusal::Pinned { node: graph.describe(node), reason: reason.into() },
            None => refusal,
        })?;
        self.check_cores(cores, &axes)?;
        let special = special::find(graph, self.shapes, &axes);
        let last = blocks.last().map(|block| block.cut).unwrap_or(first_cut);
        let mut restore_before = Vec::new();
        let after_core: HashSet<NodeId> = flow_after(self.content, &blocks);
        // Another tower, behind the same first tokens, sees all of them: none of its attentions is behind a cut of ours.
        for (node, reason) in axes.pins().filter(|(node, _)| !self.content.leaves_out(*node)) {
            let pin =
                Pin { node, name: graph.describe(node), op: graph.node(node).op.to_string(), reason: reason.into() };
            if self.leads_to_attention(node, cores, &axes) || !after_core.contains(&node) {
                return Err(Refusal::Pinned { node: pin.name, reason: pin.reason });
            }
            restore_before.push(pin);
        }
        let heads = self.heads(&axes, &blocks, last);
        let special = special.named(&heads);
        let shapes = self.shapes.clone();
        Ok(VitModel { revision: graph.revision(), shapes, axes, image, blocks, special, heads, restore_before })
    }

    /// Every attention that treats tokens as separate inputs attends within them: then they are frames or groups of
    /// patches, not the patches that a ViT mixes.
    fn check_cores(&self, cores: &[Core], axes: &Axes) -> Result<(), Refusal> {
        let within = |core: &&Core| {
            let attends = axes.effects_of(core.softmax).any(|effect| *effect == Effect::Attend);
            !attends && self.graph.node(core.softmax).results().any(|value| axes.carries(value))
        };
        match cores.iter().find(within) {
            None => Ok(()),
            Some(core) => Err(Refusal::Pinned {
                node: self.graph.describe(core.softmax),
                reason: "it attends to what is inside each of the tokens of the first attention, or to channels".into(),
            }),
        }
    }

    /// Whether content of `node` reaches an attention that is no pooling.
    fn leads_to_attention(&self, node: NodeId, cores: &[Core], axes: &Axes) -> bool {
        let reached = Flow::towards(self.content, &[node]).reached_from(node);
        cores.iter().any(|core| reached.contains(&core.softmax) && !is_pool(core, axes, self.graph))
    }

    /// The earliest node after a group of cores that all content passes on its way to the next group (or, after the last
    /// one, to the graph's outputs).
    fn cut_after(&self, group: &[Core], next: Option<&Group>, axes: Option<&Axes>) -> Result<NodeId, Refusal> {
        let graph = self.graph;
        let reached_from = |core: &Core| Flow::towards(self.content, &[core.mix]).reached_from(core.mix);
        let ends: Vec<NodeId> = match next {
            Some(next) => next.iter().map(|core| core.softmax).collect(),
            None => {
                let reached: HashSet<NodeId> = group.iter().flat_map(reached_from).collect();
                let ends = graph.outputs().iter().filter_map(|&output| graph.producer(output)).map(|(node, _)| node);
                ends.filter(|end| reached.contains(end)).collect()
            }
        };
        let flow = Flow::towards(self.content, &ends);
        let reached: Vec<HashSet<NodeId>> = group.iter().map(|core| flow.reached_from(core.mix)).collect();
        let behind = |gate: &NodeId| {
            reached.iter().all(|reached| reached.contains(gate)) && !group.iter().any(|core| core.mix == *gate)
        };
        let cut = flow.gates().into_iter().find(behind).filter(|cut| next.is_none() || !ends.contains(cut));
        // Behind the last attention, features of several depths may be gathered: no single node has them all.
        let cut = match axes.filter(|_| next.is_none()) {
            Some(axes) => cut.filter(|cut| is_stream(graph, axes, *cut)).or_else(|| self.join_after(&group[0], axes)),
            None => cut,
        };
        cut.ok_or_else(|| Refusal::Pinned {
            node: graph.describe(group[0].softmax),
            reason: "it is an attention after which the model has no single stream of tokens to regroup".into(),
        })
    }

    /// Where what an attention gives joins the residual stream: the last such node before its way forks.
    fn join_after(&self, core: &Core, axes: &Axes) -> Option<NodeId> {
        let graph = self.graph;
        let stream = axes.layout(axes.origin());
        let mut joined = None;
        let mut node = core.mix;
        // Every step goes to a reader, so the walk ends.
        loop {
            let mut readers: Vec<NodeId> = Vec::new();
            for result in graph.node(node).results() {
                let reads_content =
                    |node: &NodeId| graph.node(*node).results().any(|value| self.content.contains(value));
                readers.extend(graph.value(result).uses().iter().map(|used| used.node).filter(reads_content));
                if graph.output_slots(result).next().is_some() {
                    return joined;
                }
            }
            readers.dedup();
            let &[next] = readers.as_slice() else { return joined };
            let from_stream = |value: ValueId| {
                axes.layout(value) == stream && graph.producer(value).is_none_or(|(producer, _)| producer != node)
            };
            if is_stream(graph, axes, next) && graph.node(next).operands().any(from_stream) {
                joined = Some(next);
            }
            node = next;
        }
    }

    /// The tokens of the origin: those over which the first attention runs.
    fn tokens(&self, origin: ValueId, cores: &[Core]) -> Result<Axes, Refusal> {
        let graph = self.graph;
        let mut failure = None;
        for source in stream::sources(graph, self.shapes, origin, &cores[0])? {
            let axes = Axes::follow(graph, self.shapes, source, self.opset);
            if is_block(&cores[0], &axes, graph) {
                return Ok(axes);
            }
            let pin = axes.pins().next().map(|(node, reason)| (graph.describe(node), reason.to_owned()));
            failure = failure.or(pin);
        }
        let grid = stream::is_grid(graph, self.shapes, origin, &cores[0]);
        Err(match failure {
            _ if grid => Refusal::Pinned {
                node: graph.producer(origin).map_or(String::new(), |(node, _)| graph.describe(node)),
                reason: "it gives a residual stream with rows and columns of tokens on axes of their own".into(),
            },
            Some((node, reason)) => Refusal::Pinned { node, reason },
            None => Refusal::NotAVit(format!(
                "{} does not attend over an axis of '{}'",
                graph.describe(cores[0].softmax),
                graph.value(origin).name()
            )),
        })
    }

    fn blocks(&self, groups: &[Group], axes: &Axes) -> Result<Vec<Block>, Refusal> {
        let of_tokens = |group: &Group| -> Group {
            group.iter().filter(|core| is_block(core, axes, self.graph)).cloned().collect()
        };
        let encoder: Vec<Group> = groups.iter().map(of_tokens).filter(|group| !group.is_empty()).collect();
        let flow = Flow::towards(self.content, &[]);
        let mut blocks: Vec<Block> = Vec::with_capacity(encoder.len());
        for (at, group) in encoder.iter().enumerate() {
            let cut = match self.cut_after(group, encoder.get(at + 1), Some(axes)) {
                // What follows runs on another stream: a decoder, or tokens among which others have come to stand. Tokens
                // are not merged there, but merged ones are welcome.
                Ok(cut) if !blocks.is_empty() && !is_stream(self.graph, axes, cut) => break,
                Err(_) if !blocks.is_empty() && at + 1 == encoder.len() => break,
                cut => cut?,
            };
            let attention = |core: &Core| {
                let heads = self.heads_of(core, axes).ok_or_else(|| Refusal::Pinned {
                    node: self.graph.describe(core.softmax),
                    reason: "it is an attention whose number of heads is not known".into(),
                })?;
                Ok(Attention { core: core.clone(), heads })
            };
            let attentions = group.iter().map(attention).collect::<Result<_, Refusal>>()?;
            let behind_last =
                |node: &NodeId| blocks.last().is_none_or(|last| flow.reached_from(last.cut).contains(node));
            let entry = flow.gate_before(cut).filter(|&node| is_stream(self.graph, axes, node)).filter(behind_last);
            blocks.push(Block { attentions, cut, entry });
        }
        Ok(blocks)
    }

    /// Heads of a block's attention: what its outer axes hold beside the batch.
    fn heads_of(&self, core: &Core, axes: &Axes) -> Option<usize> {
        let node = self.graph.node(core.softmax);
        if let Some(heads) = core.fused.as_ref().and_then(|fused| fused.heads) {
            return Some(heads);
        }
        let value = if core.is_fused() { core.query(self.graph)? } else { node.output(0)? };
        let layout = axes.layout(value)?;
        // Scores have tokens along two axes; queries have channels beside the tokens.
        let outer = if core.is_fused() { &layout.0[..layout.rank().checked_sub(2)?] } else { &layout.0[..] };
        let outer = outer.iter().filter(|axis| !axis.has_tokens());
        let extents = outer.map(|axis| axis.plain_extent()).collect::<Option<Vec<_>>>()?;
        usize::try_from(Expr::product(&extents)?.div_exact(axes.batch())?.as_known()?).ok()
    }

    fn heads(&self, axes: &Axes, blocks: &[Block], last: NodeId) -> Vec<Head> {
        let after = Flow::towards(self.content, &[last]).reached_from(last);
        let mut heads = Vec::new();
        let softmaxes: HashSet<NodeId> = softmaxes(blocks).collect();
        for (node, effect) in axes.effects().iter().filter(|(node, _)| !self.content.leaves_out(*node)) {
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
            let foreign = self.graph.producer(output).is_some_and(|(node, _)| self.content.leaves_out(node));
            if axes.carries(output) && !foreign {
                heads.push(Head::PerToken { output: self.graph.value(output).name().into() });
            }
        }
        heads
    }
}

/// Whether a node gives a tensor with the axes of the residual stream.
fn is_stream(graph: &Graph, axes: &Axes, node: NodeId) -> bool {
    graph.node(node).results().any(|value| axes.layout(value) == axes.layout(axes.origin()))
}

/// Nodes that content of any block's attention reaches.
fn flow_after(content: &Content<'_>, blocks: &[Block]) -> HashSet<NodeId> {
    let first = blocks.first().map_or(&[][..], |block| &block.attentions);
    let reached =
        |attention: &Attention| Flow::towards(content, &[attention.core.softmax]).reached_from(attention.core.softmax);
    first.iter().flat_map(reached).collect()
}

/// The softmaxes of all blocks.
pub(crate) fn softmaxes(blocks: &[Block]) -> impl Iterator<Item = NodeId> {
    blocks.iter().flat_map(|block| &block.attentions).map(|attention| attention.core.softmax)
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

//! Axis analysis: along which axis of which tensor do the tokens run?
//!
//! From a tensor that is known to carry the tokens, [`Axes::follow`] propagates that knowledge through the graph. Every
//! operator has a transfer rule ([`transfer`]) that says what its results look like and what its own dependence on
//! the token count is ([`Effect`]). An operator without a rule, or one that mixes tokens in a way that depends on their
//! number or order, *pins* them: the analysis records where and why, and goes no further there.
//!
//! What the analysis claims: between the origin and a pin, replacing the tokens by any regrouping of them (with the
//! effects attended to) gives a well-formed graph whose every operator treats tokens alike.

mod layout;
mod transfer;

use std::collections::{HashMap, HashSet};

use crate::graph::Graph;
use crate::{Expr, NodeId, Shapes, SkipNorm, ValueId};

pub use layout::{Atom, Axis, Layout, Span};

/// How a node depends on the number of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The operand in `slot` states the shape of the result, which holds tokens.
    Shape {
        /// Operand with the shape.
        slot: usize,
    },
    /// Takes tokens up to an end that is given as a position; `slot` is the operand with the ends.
    SliceEnd {
        /// Operand with the ends.
        slot: usize,
    },
    /// The operand in `slot` does not come from the tokens but has an entry for each; all entries are equal.
    UniformTable {
        /// The operand.
        slot: usize,
    },
    /// The operand in `slot` does not come from the tokens but has an entry of its own for each: a position table, a
    /// bias, a mask.
    Table {
        /// The operand.
        slot: usize,
        /// Its axes that run along tokens, and along which of them.
        axes: Vec<(usize, Span)>,
    },
    /// The tokens are split into consecutive ranges.
    Parts,
    /// A softmax over tokens: attention.
    Attend,
    /// A product that sums over tokens, with operand `slot` holding one of its factors for each along `axis`. Weights that
    /// sum to one are no such factors.
    Contract {
        /// The operand.
        slot: usize,
        /// Its axis.
        axis: usize,
        /// Which tokens.
        span: Span,
    },
    /// The mean or the sum over tokens.
    Pool {
        /// Which tokens.
        span: Span,
        /// Axis of the operand.
        axis: usize,
        /// The mean; else the sum.
        mean: bool,
    },
    /// The largest or smallest entry over tokens.
    Extreme,
    /// Single tokens are taken by position: `first..first+count` from the front, or counted from the end.
    Pick {
        /// First position, negative from the end.
        first: i64,
        /// How many.
        count: usize,
    },
    /// The tokens cannot be followed through this node.
    Pinned {
        /// Why.
        reason: String,
    },
}

/// Where the tokens come in.
#[derive(Clone, Debug)]
pub struct Source {
    /// The tensor.
    pub value: ValueId,
    /// How the tokens run in it.
    pub layout: Layout,
    /// Number of tokens before any regrouping.
    pub tokens: Expr,
    /// Number of images.
    pub batch: Expr,
}

/// Which tensors carry the tokens, and how.
#[derive(Clone, Debug)]
pub struct Axes {
    source: Source,
    layouts: HashMap<ValueId, Layout>,
    effects: Vec<(NodeId, Effect)>,
}

impl Axes {
    /// Follows the tokens from where they come in.
    pub fn follow(graph: &Graph, shapes: &Shapes, source: Source, opset: i64) -> Self {
        let origin = source.value;
        let beginnings = beginnings(graph, origin);
        let mut layouts: HashMap<ValueId, Layout> =
            beginnings.iter().map(|&value| (value, source.layout.clone())).collect();
        let mut effects = Vec::new();
        // What depends on the tokens' content, whether or not they can be told apart in it.
        let mut reached: HashSet<ValueId> = beginnings.into_iter().collect();
        for (id, node) in graph.nodes() {
            let carries = |value: &ValueId| layouts.contains_key(value);
            let carried = node.operands().any(|value| carries(&value));
            let captured = node.captures.iter().any(carries);
            if node.results().any(|value| value == origin) {
                continue;
            }
            if node.dependencies().any(|value| reached.contains(&value)) && !(node.is("Shape") || node.is("Size")) {
                reached.extend(node.results());
            }
            if !(carried || captured) {
                continue;
            }
            if captured {
                let reason = "a nested graph reads the tokens".to_owned();
                effects.push((id, Effect::Pinned { reason }));
                continue;
            }
            let context =
                transfer::Context { graph, shapes, opset, source: &source, layouts: &layouts, reached: &reached };
            match context.transfer(node) {
                Ok(flow) => {
                    effects.extend(flow.effects.into_iter().map(|effect| (id, effect)));
                    for (slot, layout) in flow.layouts.into_iter().enumerate() {
                        if let (Some(value), Some(layout)) = (node.output(slot), layout.filter(Layout::has_tokens)) {
                            layouts.insert(value, layout);
                        }
                    }
                }
                Err(reason) => effects.push((id, Effect::Pinned { reason })),
            }
        }
        Self { source, layouts, effects }
    }

    /// The tensor that the analysis started from.
    pub fn origin(&self) -> ValueId {
        self.source.value
    }

    /// Number of tokens before any regrouping.
    pub fn tokens(&self) -> &Expr {
        &self.source.tokens
    }

    /// Number of images.
    pub fn batch(&self) -> &Expr {
        &self.source.batch
    }

    /// The layout of a value that carries tokens.
    pub fn layout(&self, value: ValueId) -> Option<&Layout> {
        self.layouts.get(&value)
    }

    /// Whether tokens run along an axis of the value.
    pub fn carries(&self, value: ValueId) -> bool {
        self.layouts.contains_key(&value)
    }

    /// Every dependence on the token count, in graph order.
    pub fn effects(&self) -> &[(NodeId, Effect)] {
        &self.effects
    }

    /// The effects of one node.
    pub fn effects_of(&self, node: NodeId) -> impl Iterator<Item = &Effect> {
        self.effects.iter().filter(move |(id, _)| *id == node).map(|(_, effect)| effect)
    }

    /// Where the tokens are pinned, and why.
    pub fn pins(&self) -> impl Iterator<Item = (NodeId, &str)> {
        self.effects.iter().filter_map(|(id, effect)| match effect {
            Effect::Pinned { reason } => Some((*id, reason.as_str())),
            _ => None,
        })
    }
}

/// The origin; both results of an operator that gives a sum and its norm.
fn beginnings(graph: &Graph, origin: ValueId) -> Vec<ValueId> {
    match graph.producer(origin).map(|(id, _)| graph.node(id)) {
        Some(node) if SkipNorm::of(node).is_some() => {
            [SkipNorm::NORM, SkipNorm::SUM].into_iter().filter_map(|slot| node.output(slot)).collect()
        }
        _ => vec![origin],
    }
}

//! The permutation probe: an experiment beside the proof that tokens may be regrouped.
//!
//! A cut is a legal place to regroup only if what comes behind it treats all tokens alike. Then it does not matter in
//! which order they stand: with the unprotected tokens of a cut permuted, and the permutation undone wherever the model
//! gives (or needs) an entry for each token, every output is what it was. An architecture that depends on order behind
//! the cut (position tables, windows, masks) gives something else.
//!
//! The probe trusts the analysis only in where tokens run, not in that every operator on the way is indifferent to
//! their order: that is what running the permuted model beside the original one shows.

use std::collections::HashSet;

use vitrim_ir::{Atom, Attribute, Axis, Effect, Graph, Layout, Model, NodeId, Patch, Span, Tensor, ValueId};

use crate::Refusal;
use crate::recognise::VitModel;

/// The model with the unprotected tokens permuted behind the cut of `block`, and outputs as they were, if the cut is a
/// legal one.
pub fn permuted(model: &Model, vit: &VitModel, block: usize) -> Result<Model, Refusal> {
    let graph = model.graph();
    if vit.revision != graph.revision() {
        return Err(Refusal::Internal("the probe was given the analysis of another revision".into()));
    }
    let tokens = vit.tokens().as_known().and_then(|tokens| usize::try_from(tokens).ok());
    let tokens = tokens.ok_or_else(|| Refusal::Request("the probe needs a token count that is fixed".into()))?;
    let cut = vit.blocks.get(block).ok_or_else(|| Refusal::Request(format!("there is no block {block}")))?.cut;
    let order = scatter(tokens, vit.special.prefix(), vit.special.suffix);
    let probe = Probe { graph, vit, cut, order, patch: Patch::new(model, "probe"), permuted: HashSet::new() };
    let (edited, _) = probe.run()?.apply(model).map_err(|error| Refusal::Internal(error.to_string()))?;
    edited.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    Ok(edited)
}

/// A permutation of `tokens` positions that leaves the first `front` and last `back` in place and tears neighbours
/// apart: a walk in steps of about two fifths of the way round. It is not its own inverse.
fn scatter(tokens: usize, front: usize, back: usize) -> Vec<usize> {
    let free = tokens.saturating_sub(front + back);
    let coprime = |step: &usize| gcd(*step, free) == 1;
    let step = (2 * free / 5..free).filter(|&step| step > 1).find(coprime).unwrap_or(1);
    let place =
        |at: usize| if (front..front + free).contains(&at) { front + ((at - front) * step + 1) % free } else { at };
    (0..tokens).map(place).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

struct Probe<'a> {
    graph: &'a Graph,
    vit: &'a VitModel,
    cut: NodeId,
    /// The token that comes to stand at each position.
    order: Vec<usize>,
    patch: Patch,
    /// Values behind the cut whose tokens are permuted.
    permuted: HashSet<ValueId>,
}

impl Probe<'_> {
    fn run(mut self) -> Result<Patch, Refusal> {
        let (graph, vit) = (self.graph, self.vit);
        let streams: Vec<ValueId> = graph.node(self.cut).results().filter(|&value| vit.axes.carries(value)).collect();
        self.permuted.extend(&streams);
        let restored_at = self.spread()?;
        for &stream in &streams {
            let order = self.order.clone();
            let shuffled = self.gather(stream, stream, &order, "permuted")?;
            // Where all tokens must be in place, the stream itself has them so.
            self.patch.rewire_uses(graph, stream, shuffled, |used| !restored_at.contains(&used.node));
        }
        for (slot, &output) in graph.outputs().iter().enumerate() {
            if self.permuted.contains(&output) && !streams.contains(&output) {
                let restored = self.in_place(output)?;
                self.patch.replace_output(slot, restored);
            }
        }
        Ok(self.patch)
    }

    /// Follows the permuted tokens, and puts them in place where a node needs that: where the analysis ends, and where
    /// they meet tensors from before the cut. Returns those nodes.
    fn spread(&mut self) -> Result<HashSet<NodeId>, Refusal> {
        let (graph, vit) = (self.graph, self.vit);
        let pinned: HashSet<NodeId> = vit.restore_before.iter().map(|pin| pin.node).collect();
        let (prefix, suffix) = (vit.special.prefix(), vit.special.suffix);
        let streams = self.permuted.clone();
        let mut restored_at = HashSet::new();
        for (id, node) in graph.nodes() {
            if !node.operands().any(|value| self.permuted.contains(&value)) {
                continue;
            }
            let meets_others = node.operands().any(|value| vit.axes.carries(value) && !self.permuted.contains(&value));
            let moving = vit.reads_moving_tokens(graph, id, prefix, suffix).is_some();
            if !(pinned.contains(&id) || meets_others || moving) {
                self.permuted.extend(node.results().filter(|&value| vit.axes.carries(value)));
                self.permute_tables(id)?;
                continue;
            }
            restored_at.insert(id);
            for (slot, operand) in node.inputs.iter().enumerate() {
                let Some(operand) = operand.filter(|value| self.permuted.contains(value) && !streams.contains(value))
                else {
                    continue;
                };
                let restored = self.in_place(operand)?;
                self.patch.rewire(id, slot, restored);
            }
        }
        Ok(restored_at)
    }

    /// Tables with an entry for each token follow the tokens.
    fn permute_tables(&mut self, id: NodeId) -> Result<(), Refusal> {
        for effect in self.vit.axes.effects_of(id) {
            let Effect::Table { slot, axes } = effect else { continue };
            let Some(mut table) = self.graph.node(id).input(*slot) else { continue };
            let hint = format!("probe/{}", self.graph.value(table).name());
            for &(axis, span) in axes {
                let part = part_of(&self.order, span).ok_or_else(|| Refusal::Pinned {
                    node: self.graph.describe(id),
                    reason: "it has a table for only some of the permuted tokens".into(),
                })?;
                let indices = self.patch.constant(&format!("{hint}/order{axis}"), Tensor::shape(&part));
                let along = [("axis", Attribute::Int(axis as i64))];
                table = self.patch.op("Gather", &format!("{hint}/permuted{axis}"), &[table, indices], &along);
            }
            self.patch.rewire(id, *slot, table);
        }
        Ok(())
    }

    /// A permuted value with every token back in its place.
    fn in_place(&mut self, value: ValueId) -> Result<ValueId, Refusal> {
        let mut inverse = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(at, &token)| inverse[token] = at);
        self.gather(value, value, &inverse, "in_place")
    }

    /// `source` with its tokens in the order given, along every axis on which tokens run in `value`.
    fn gather(&mut self, value: ValueId, mut source: ValueId, order: &[usize], what: &str) -> Result<ValueId, Refusal> {
        let name = self.graph.value(value).name().to_owned();
        let refuse = |reason: &str| Refusal::Pinned { node: format!("the tensor '{name}'"), reason: reason.into() };
        let layout = self.vit.axes.layout(value).ok_or_else(|| refuse("carries no tokens"))?.clone();
        // Tokens that share an axis with something else get one of their own meanwhile.
        let apart = tokens_apart(&layout);
        let shared = apart.rank() > layout.rank();
        let hint = format!("probe/{name}/{what}");
        let open = || refuse("joins tokens with another axis, and has several extents that are not fixed");
        if shared {
            source = self.reshape(source, &apart, &format!("{hint}/apart")).ok_or_else(open)?;
        }
        for axis in apart.token_axes() {
            let span = apart.0[axis].only_tokens().expect("tokens are alone");
            let part = part_of(order, span).ok_or_else(|| refuse("holds only some of the permuted tokens"))?;
            let hint = format!("{hint}{axis}");
            let indices = self.patch.constant(&format!("{hint}/order"), Tensor::shape(&part));
            let along = [("axis", Attribute::Int(axis as i64))];
            source = self.patch.op("Gather", &hint, &[source, indices], &along);
        }
        if shared {
            source = self.reshape(source, &layout, &format!("{hint}/joined")).ok_or_else(open)?;
        }
        Ok(source)
    }

    /// `value` with its elements on the axes of `layout`; `None` if more than one extent is not fixed.
    fn reshape(&mut self, value: ValueId, layout: &Layout, hint: &str) -> Option<ValueId> {
        let extent = |axis: &Axis| axis.extent(self.vit.tokens()).and_then(|extent| extent.as_known()).unwrap_or(-1);
        let shape: Vec<i64> = layout.0.iter().map(extent).collect();
        if shape.iter().filter(|&&extent| extent < 0).count() > 1 {
            return None;
        }
        let shape = self.patch.constant(&format!("{hint}/shape"), Tensor::shape(&shape));
        Some(self.patch.op("Reshape", hint, &[value, shape], &[]))
    }
}

/// A layout with an axis for every factor of those along which tokens run.
fn tokens_apart(layout: &Layout) -> Layout {
    let alone = |atom: &Atom| match atom {
        Atom::Plain(extent) => Axis::plain(extent),
        Atom::Tokens { span, .. } => Axis::tokens(*span),
    };
    let split = |axis: &Axis| -> Vec<Axis> {
        if axis.has_tokens() { axis.atoms().iter().map(alone).collect() } else { vec![axis.clone()] }
    };
    Layout(layout.0.iter().flat_map(split).collect())
}

/// The part of a permutation that concerns a span of the tokens, counted from its first; `None` where the permutation
/// leads into the span or out of it.
fn part_of(order: &[usize], span: Span) -> Option<Vec<i64>> {
    let held = span.front.max(0)..order.len() as i64 - span.back.max(0);
    let part = order.get(usize::try_from(held.start).ok()?..usize::try_from(held.end).ok()?)?.iter();
    let part = part.map(|&token| held.contains(&(token as i64)).then(|| token as i64 - span.front));
    let before = (0..-span.front).map(Some);
    let behind = (order.len() as i64 - span.front..order.len() as i64 - span.front - span.back).map(Some);
    before.chain(part).chain(behind).collect()
}

#[cfg(test)]
mod tests {
    use vitrim_ir::Expr;

    use super::*;

    #[test]
    fn protected_tokens_stay_and_the_others_scatter() {
        for (tokens, front, back) in [(65, 1, 0), (27, 2, 0), (59, 1, 10), (64, 0, 0), (17, 1, 0), (3, 1, 0), (1, 1, 0)]
        {
            let order = scatter(tokens, front, back);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..tokens), "{tokens} tokens: {order:?}");
            let fixed = |range: std::ops::Range<usize>| range.clone().all(|at| order[at] == at);
            assert!(fixed(0..front.min(tokens)) && fixed(tokens - back..tokens));
            if tokens - front - back > 10 {
                let moved = (front..tokens - back).filter(|&at| order[at] != at).count();
                assert!(moved + 1 >= tokens - front - back, "{order:?}");
                assert!((0..tokens).any(|at| order[order[at]] != at), "its own inverse: {order:?}");
            }
        }
    }

    #[test]
    fn tokens_that_share_an_axis_are_put_apart() {
        let (batch, width) = (Axis::plain(&Expr::symbol("batch")), Axis::plain(&Expr::known(48)));
        let tokens = Axis::tokens(Span::ALL);
        let flat = Layout(vec![Axis::join(&batch, &tokens), width.clone()]);
        assert_eq!(tokens_apart(&flat), Layout(vec![batch, tokens, width]));
        assert_eq!(tokens_apart(&tokens_apart(&flat)), tokens_apart(&flat));
    }

    #[test]
    fn a_span_takes_its_part_of_a_permutation() {
        let order = [0, 3, 1, 2, 4];
        assert_eq!(part_of(&order, Span { front: 1, back: 1 }), Some(vec![2, 0, 1]));
        assert_eq!(part_of(&order, Span { front: 2, back: 0 }), None);
        assert_eq!(part_of(&order, Span { front: 4, back: 4 }), None);
    }
}

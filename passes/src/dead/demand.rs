//! Which positions of each value its readers need, found backwards from what the graph gives.

use std::collections::{HashMap, HashSet};

use vitrim_ir::{Graph, Node, NodeId, Use, ValueId};

use super::part::Part;
use super::rules::{Needs, Rules, Source};

/// What the readers of a value want of it.
#[derive(Clone, PartialEq, Debug)]
enum Wanted {
    Part(Part),
    All,
}

/// A node that computes a part of its results.
#[derive(Clone, Debug)]
pub(super) struct Shrunk {
    pub node: NodeId,
    /// The part.
    pub part: Part,
    pub needs: Needs,
}

/// What is left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// Nodes that compute a part of their results, consumers before producers.
    pub shrunk: Vec<Shrunk>,
    /// What is left of the results of these nodes.
    pub held: HashMap<ValueId, Part>,
    /// Values of which only a part is wanted that another value holds.
    pub sources: HashMap<ValueId, Source>,
    /// Nodes that take tokens by position, with the axis of the tokens.
    pub picks: Vec<(NodeId, usize)>,
    /// Nodes that state extents of values that lose some, with values that have those extents still.
    pub restated: Vec<(NodeId, ValueId)>,
}

/// Finds what can be left out. `token_axis` says along which axis of a value there are tokens and nothing else: nothing
/// else is left out.
pub(super) fn plan(rules: &Rules<'_>, token_axis: &dyn Fn(ValueId) -> Option<usize>) -> Plan {
    // Values that are computed as a whole because something needs an extent of theirs.
    let mut whole = HashSet::new();
    loop {
        let mut demand = Demand { rules, wanted: HashMap::new(), stated: HashSet::new(), plan: Plan::default() };
        demand.run(token_axis, &whole);
        match demand.restate() {
            Ok(()) => return demand.plan,
            Err(value) => whole.insert(value),
        };
    }
}

struct Demand<'a> {
    rules: &'a Rules<'a>,
    wanted: HashMap<ValueId, Wanted>,
    /// Values whose extents are read.
    stated: HashSet<ValueId>,
    plan: Plan,
}

impl<'a> Demand<'a> {
    fn graph(&self) -> &'a Graph {
        self.rules.graph
    }

    fn run(&mut self, token_axis: &dyn Fn(ValueId) -> Option<usize>, whole: &HashSet<ValueId>) {
        let graph = self.graph();
        for &value in graph.outputs().iter().chain(whole) {
            self.want(value, Wanted::All);
        }
        for (id, node) in graph.nodes().rev() {
            let read = (0..node.outputs.len()).filter_map(|slot| Some((slot, node.output(slot)?)));
            let read: Vec<(usize, ValueId)> = read.filter(|&(_, value)| self.rules.is_read(value)).collect();
            let mut wanted = Vec::new();
            for &(slot, value) in &read {
                match self.wanted(value) {
                    Some(Wanted::Part(part)) if self.pass_on(node, slot, &part) => {}
                    own => wanted.extend(own.map(|own| (slot, own))),
                }
            }
            // What was read, and is read no more, goes.
            if wanted.is_empty() && !read.is_empty() {
                continue;
            }
            let part = |(slot, wanted)| match wanted {
                Wanted::Part(part) => Some((slot, part)),
                Wanted::All => None,
            };
            let parts: Option<Vec<(usize, Part)>> = wanted.into_iter().map(part).collect();
            match parts.and_then(|parts| self.rules.needs(node, &parts)) {
                Some((needs, part)) => self.shrink(id, node, needs, part),
                None => self.take_all(id, node, token_axis),
            }
        }
    }

    /// What is wanted of a value by all its readers; `None` where these are left out.
    fn wanted(&self, value: ValueId) -> Option<Wanted> {
        match self.wanted.get(&value) {
            Some(Wanted::Part(part)) if !part.is_few() => Some(Wanted::All),
            None if self.stated.contains(&value) => Some(Wanted::All),
            wanted => wanted.cloned(),
        }
    }

    /// Whether a node has this part of its result `slot` from another value, of which it is wanted then.
    fn pass_on(&mut self, node: &Node, slot: usize, part: &Part) -> bool {
        let (Some(value), Some(source)) = (node.output(slot), self.rules.source(node, slot, part)) else {
            return false;
        };
        self.want(source.value, Wanted::Part(source.part(part)));
        self.plan.sources.insert(value, source);
        true
    }

    fn shrink(&mut self, id: NodeId, node: &Node, needs: Needs, part: Part) {
        for (slot, value) in node.inputs.iter().enumerate() {
            let Some(value) = *value else { continue };
            let own = needs.parts.iter().find(|(at, _)| *at == slot);
            match own {
                Some((_, part)) => self.want(value, Wanted::Part(part.clone())),
                // A new shape takes its place.
                None if slot == 1 && needs.target.is_some() => {}
                None => self.want(value, Wanted::All),
            }
        }
        self.plan.held.extend(node.results().map(|value| (value, part.clone())));
        self.plan.shrunk.push(Shrunk { node: id, part, needs });
    }

    /// A node that computes all of its results.
    fn take_all(&mut self, id: NodeId, node: &Node, token_axis: &dyn Fn(ValueId) -> Option<usize>) {
        if node.is("Shape") || node.is("Size") {
            self.stated.extend(node.operands());
            return;
        }
        let picked = node.input(0).and_then(|value| {
            let axis = token_axis(value)?;
            Some((axis, self.rules.picked(node, axis)?))
        });
        let mut operands = node.dependencies();
        if let Some((axis, part)) = picked {
            self.plan.picks.push((id, axis));
            operands.next().into_iter().for_each(|value| self.want(value, Wanted::Part(part.clone())));
        }
        operands.for_each(|value| self.want(value, Wanted::All));
    }

    fn want(&mut self, value: ValueId, wanted: Wanted) {
        let joined = match (self.wanted.get(&value), wanted) {
            (None, wanted) => wanted,
            (Some(Wanted::Part(one)), Wanted::Part(other)) => one.join(&other).map_or(Wanted::All, Wanted::Part),
            _ => Wanted::All,
        };
        self.wanted.insert(value, joined);
    }

    /// Finds for nodes that state extents of values that lose some, or go, where else these extents can be read. An error
    /// is a value that must keep them.
    fn restate(&mut self) -> Result<(), ValueId> {
        let graph = self.graph();
        let targets: HashSet<NodeId> =
            self.plan.shrunk.iter().filter(|shrunk| shrunk.needs.target.is_some()).map(|shrunk| shrunk.node).collect();
        let is_replaced = |reader: &Use| reader.slot == Some(1) && targets.contains(&reader.node);
        for (id, node) in graph.nodes().filter(|(_, node)| node.is("Shape") || node.is("Size")) {
            let (Some(operand), Some(result)) = (node.input(0), node.output(0)) else { continue };
            let is_kept = match self.plan.held.get(&operand) {
                Some(part) => !self.states(node, result, part.factor.axis),
                // What computes it may not be there any more.
                None => !self.plan.sources.contains_key(&operand),
            };
            if is_kept || !graph.reaches_output(result, is_replaced) {
                continue;
            }
            let other = self.with_extents_of(operand).ok_or(operand)?;
            self.plan.restated.push((id, other));
        }
        Ok(())
    }

    /// Whether a `Shape` or `Size` tells the extent of `axis` to anything.
    fn states(&self, node: &Node, result: ValueId, axis: usize) -> bool {
        let rank = node.input(0).and_then(|value| self.rules.dims(value)).map_or(0, <[_]>::len);
        let stated = if node.is("Size") { 0..rank } else { node.stated_axes(rank) };
        let Some(entry) = axis.checked_sub(stated.start).filter(|_| stated.contains(&axis)) else { return false };
        let graph = self.graph();
        let takes_others = |reader: &Use| {
            let node = graph.node(reader.node);
            let positions = (reader.slot == Some(0)).then(|| self.rules.positions(node, 0)).flatten();
            node.is("Gather") && positions.is_some_and(|positions| !positions.contains(&(entry as i64)))
        };
        node.is("Size")
            || graph.output_slots(result).next().is_some()
            || !graph.value(result).uses().iter().all(takes_others)
    }

    /// The first value with the extents of `value` that is computed before it, and as a whole.
    fn with_extents_of(&self, value: ValueId) -> Option<ValueId> {
        let (graph, dims) = (self.graph(), self.rules.dims(value)?);
        let producer = graph.producer(value)?.0;
        let before = graph.nodes().take_while(|(id, _)| *id != producer).flat_map(|(_, node)| node.results());
        let mut candidates = graph.feeds().chain(before);
        candidates.find(|other| {
            let is_whole = self.wanted.get(other) == Some(&Wanted::All);
            is_whole && self.rules.dims(*other) == Some(dims)
        })
    }
}

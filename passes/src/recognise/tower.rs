//! Towers: which attentions belong to one Vision Transformer.
//!
//! A model may hold several: one for each of two images, an ensemble on one image, a mirrored copy. Attentions belong
//! together where content of one reaches the other, or both reach a third: so the blocks of a tower, and the attentions
//! beside each other within a block, stay together. Where towers meet behind their last attentions, they stay apart.

use std::collections::{HashMap, HashSet};

use petgraph::unionfind::UnionFind;
use vitrim_ir::{Graph, NodeId, ValueId};

use super::core::Core;
use super::flow::Content;

/// The attentions of each tower; towers by their first attention, attentions in the order given.
pub(super) fn partition(graph: &Graph, content: &Content<'_>, cores: Vec<Core>) -> Vec<Vec<Core>> {
    let number: HashMap<NodeId, usize> = cores.iter().enumerate().map(|(at, core)| (core.softmax, at)).collect();
    let ahead = ahead_of(graph, content, &cores);
    let mut sets = UnionFind::new(cores.len());
    // The set whose content a value holds. Content of several sets that goes on to an attention makes them one.
    let mut held: HashMap<ValueId, usize> = HashMap::new();
    for (id, node) in graph.nodes().filter(|(id, _)| ahead.contains(id)) {
        let met = node.dependencies().filter_map(|value| held.get(&value).copied()).chain(number.get(&id).copied());
        let one = met.reduce(|one, other| {
            sets.union(one, other);
            one
        });
        if let Some(one) = one {
            held.extend(node.results().filter(|&value| content.contains(value)).map(|value| (value, one)));
        }
    }
    let mut towers: Vec<Vec<Core>> = Vec::new();
    let mut place: HashMap<usize, usize> = HashMap::new();
    for (at, core) in cores.into_iter().enumerate() {
        let place = *place.entry(sets.find(at)).or_insert(towers.len());
        if place == towers.len() {
            towers.push(Vec::new());
        }
        towers[place].push(core);
    }
    towers
}

/// The attentions themselves, what their content comes from, and what it goes into.
pub(super) fn related(graph: &Graph, content: &Content<'_>, cores: &[Core]) -> HashSet<NodeId> {
    let mut behind: HashSet<NodeId> = cores.iter().map(|core| core.softmax).collect();
    let mut holds: HashSet<ValueId> = HashSet::new();
    for (id, node) in graph.nodes() {
        if behind.contains(&id) || node.dependencies().any(|value| holds.contains(&value)) {
            behind.insert(id);
            holds.extend(node.results().filter(|&value| content.contains(value)));
        }
    }
    behind.extend(ahead_of(graph, content, cores));
    behind
}

/// The attentions themselves and what their content comes from.
fn ahead_of(graph: &Graph, content: &Content<'_>, cores: &[Core]) -> HashSet<NodeId> {
    let mut ahead: HashSet<NodeId> = cores.iter().flat_map(|core| [core.softmax, core.mix]).collect();
    let mut open: Vec<NodeId> = ahead.iter().copied().collect();
    while let Some(id) = open.pop() {
        let read = graph.node(id).dependencies().filter(|&value| content.contains(value));
        let producers = read.filter_map(|value| graph.producer(value)).map(|(producer, _)| producer);
        open.extend(producers.filter(|&producer| ahead.insert(producer)));
    }
    ahead
}

/// Names for towers by the images that they read: that of the image, and a number where several read the same.
pub(super) fn names(graph: &Graph, images: &[ValueId]) -> Vec<String> {
    let name = |image: ValueId| graph.value(image).name();
    let mut taken: HashSet<String> = HashSet::new();
    let mut named = |&image: &ValueId| {
        if images.iter().filter(|&&other| other == image).count() == 1 {
            return name(image).to_owned();
        }
        // A number that makes the name of something else is left out.
        let numbered = (1..).map(|number| format!("{}#{number}", name(image)));
        let free = numbered.filter(|name| graph.find_value(name).is_none()).find(|name| taken.insert(name.clone()));
        free.unwrap_or_default()
    };
    images.iter().map(&mut named).collect()
}

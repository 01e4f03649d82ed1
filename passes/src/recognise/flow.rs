//! Which data must pass where: dominators of the part of the graph that image content flows through.

use std::collections::HashSet;

use petgraph::algo::dominators::{Dominators, simple_fast};
use petgraph::graphmap::DiGraphMap;
use vitrim_ir::{Graph, NodeId, Shapes, ValueId};

/// A vertex of the flow: a node, or one of the two ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Vertex {
    Source,
    Node(NodeId),
    Sink,
}

/// What depends on the content of images, and not just on their extents.
pub(super) struct Content<'g> {
    graph: &'g Graph,
    values: HashSet<ValueId>,
    /// Nodes that content is not followed through.
    left_out: HashSet<NodeId>,
}

impl<'g> Content<'g> {
    /// What depends on the content of `images` otherwise than through the nodes to leave out.
    pub fn of(graph: &'g Graph, shapes: &Shapes, images: &[ValueId], left_out: HashSet<NodeId>) -> Self {
        let mut values: HashSet<ValueId> = images.iter().copied().collect();
        for (id, node) in graph.nodes() {
            if !left_out.contains(&id) && node.dependencies().any(|value| values.contains(&value)) {
                values.extend(node.results().filter(|&value| shapes.is_data(value)));
            }
        }
        Self { graph, values, left_out }
    }

    /// Whether content is not followed through `node`.
    pub fn leaves_out(&self, node: NodeId) -> bool {
        self.left_out.contains(&node)
    }

    pub fn contains(&self, value: ValueId) -> bool {
        self.values.contains(&value)
    }

    /// The first image whose content reaches `node`.
    pub fn image_of(&self, node: NodeId) -> Option<ValueId> {
        let mut seen = HashSet::new();
        let mut open = vec![node];
        let mut inputs = HashSet::new();
        while let Some(id) = open.pop() {
            if !seen.insert(id) {
                continue;
            }
            for value in self.graph.node(id).dependencies().filter(|&value| self.contains(value)) {
                match self.graph.producer(value) {
                    Some((producer, _)) => open.push(producer),
                    None => drop(inputs.insert(value)),
                }
            }
        }
        self.graph.inputs().iter().copied().find(|input| inputs.contains(input))
    }
}

/// The flow of image content to chosen ends.
pub(super) struct Flow {
    edges: DiGraphMap<Vertex, ()>,
    dominators: Dominators<Vertex>,
}

impl Flow {
    /// The flow into all of `ends`.
    pub fn towards(content: &Content<'_>, ends: &[NodeId]) -> Self {
        let graph = content.graph;
        let mut edges = DiGraphMap::new();
        edges.add_node(Vertex::Source);
        for (id, node) in graph.nodes() {
            for value in node.dependencies().filter(|&value| content.contains(value)) {
                let from = graph.producer(value).map_or(Vertex::Source, |(producer, _)| Vertex::Node(producer));
                // Reading only the extents of a tensor passes no content on.
                if node.results().any(|result| content.contains(result)) {
                    edges.add_edge(from, Vertex::Node(id), ());
                }
            }
        }
        for &end in ends {
            edges.add_edge(Vertex::Node(end), Vertex::Sink, ());
        }
        let dominators = simple_fast(&edges, Vertex::Source);
        Self { edges, dominators }
    }

    /// The nodes that all content on its way to the ends passes, nearest to the input first.
    pub fn gates(&self) -> Vec<NodeId> {
        let mut gates: Vec<NodeId> = (self.dominators.dominators(Vertex::Sink).into_iter().flatten())
            .filter_map(|vertex| if let Vertex::Node(id) = vertex { Some(id) } else { None })
            .collect();
        gates.reverse();
        gates
    }

    /// The last node that all content passes on its way to `node`, before `node` itself.
    pub fn gate_before(&self, node: NodeId) -> Option<NodeId> {
        match self.dominators.immediate_dominator(Vertex::Node(node))? {
            Vertex::Node(id) => Some(id),
            _ => None,
        }
    }

    /// Everything that content of `node` reaches, itself included.
    pub fn reached_from(&self, node: NodeId) -> HashSet<NodeId> {
        let mut reached = HashSet::new();
        let mut open = vec![Vertex::Node(node)];
        while let Some(vertex) = open.pop() {
            let Vertex::Node(id) = vertex else { continue };
            if reached.insert(id) {
                open.extend(self.edges.neighbors(vertex));
            }
        }
        reached
    }
}

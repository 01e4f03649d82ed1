//! The validator. It runs on what was read, and after every pass; writing demands its proof.
//!
//! Invariants, each checked for the main graph, nested graphs and function bodies:
//!
//! 1. every value that is read, computed or listed exists;
//! 2. a value's users are exactly the operands that read it;
//! 3. a value has one definition, and what it names as such lists it: the producer in the slot that it claims, the
//!    graph among its inputs or initializers;
//! 4. the order lists every node once, producers before consumers (so there is no cycle);
//! 5. names of values are unique and not empty, also against enclosing graphs (those that only a type declaration
//!    mentions may repeat an outer one); node names are unique within a graph where given;
//! 6. a node's domain is imported, or it calls a local function of the model;
//! 7. calls of local functions have no more operands and results than the function;
//! 8. attribute names are unique per node; references to a function's attributes occur in function bodies only;
//! 9. a captured value stands for a value of the enclosing graph, bears its name, and the node that holds the nested
//!    graph lists it; main graphs and functions capture nothing;
//! 10. graph inputs are inputs or initializers; functions have no initializers;
//! 11. local functions are unique, and do not call each other in a circle.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::graph::{Attribute, Def, Graph, OpType, Use, legible};
use crate::model::{Function, Model, Opsets};
use crate::{NodeId, ValueId, inline};

/// Violations listed at most: a hostile file can have any number.
const LISTED: usize = 100;
/// Characters that a message has at most.
const MESSAGE: usize = 400;

/// Proof that a model kept every invariant.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'m>(&'m Model);

impl<'m> Verified<'m> {
    /// The model that was checked.
    pub fn model(self) -> &'m Model {
        self.0
    }
}

/// One broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the invariant in the module's list.
    pub invariant: u8,
    /// Where and what.
    pub message: String,
}

/// Every broken invariant of a model; not empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0[0].message)?;
        match self.0.len() - 1 {
            0 => Ok(()),
            more => write!(f, " (and {more} more)"),
        }
    }
}

/// Checks every invariant of the list above.
pub fn validate(model: &Model) -> Result<Verified<'_>, Violations> {
    let functions = model.functions.iter().map(|function| (&function.key, function)).collect();
    let mut checker = Checker { ir_version: model.ir_version(), functions, found: Vec::new() };
    checker.functions(&model.functions);
    let domains = |opsets: &'_ Opsets| opsets.iter().map(|(domain, _)| domain.to_owned()).collect();
    checker.graph(&model.graph, &Place { name: "graph", domains: &domains(&model.opsets), function: false }, None);
    for function in &model.functions {
        let (name, domains) = (format!("function {}", function.key), domains(&function.opsets));
        checker.graph(&function.graph, &Place { name: &name, domains: &domains, function: true }, None);
    }
    if checker.found.is_empty() { Ok(Verified(model)) } else { Err(Violations(checker.found)) }
}

/// Where a graph is.
struct Place<'p> {
    name: &'p str,
    /// Domains imported there.
    domains: &'p HashSet<String>,
    /// Whether in a function, at any depth.
    function: bool,
}

/// The names of a graph, and of those around it.
struct Scope<'s> {
    names: HashSet<&'s str>,
    outer: Option<&'s Scope<'s>>,
}

impl Scope<'_> {
    fn knows(&self, name: &str) -> bool {
        self.names.contains(name) || self.outer.is_some_and(|outer| outer.knows(name))
    }
}

struct Checker<'m> {
    ir_version: i64,
    functions: HashMap<&'m OpType, &'m Function>,
    found: Vec<Violation>,
}

impl Checker<'_> {
    fn report(&mut self, invariant: u8, message: String) {
        if self.found.len() < LISTED {
            self.found.push(Violation { invariant, message: legible(&message, MESSAGE) });
        }
    }

    fn functions(&mut self, functions: &[Function]) {
        if self.functions.len() < functions.len() {
            self.report(11, "two local functions are alike".into());
        }
        if let Err(function) = inline::callees_first(functions) {
            self.report(11, format!("function {} calls itself, directly or through others", function.key));
        }
    }

    fn graph(&mut self, graph: &Graph, at: &Place<'_>, outer: Option<&Scope<'_>>) {
        // What follows looks at the nodes in their order.
        if !self.order(graph, at.name) {
            return;
        }
        let scope = self.values(graph, at.name, outer);
        self.ports(graph, at, outer.is_some());
        let mut node_names = HashSet::new();
        for (id, node) in graph.nodes() {
            if !node.name.is_empty() && !node_names.insert(node.name.as_str()) {
                self.report(5, format!("{}: two nodes are named '{}'", at.name, node.name));
            }
            self.node(graph, id, at);
            if node.subgraphs().next().is_none() && node.captures.is_empty() {
                continue;
            }
            let listed: HashSet<ValueId> = node.captures.iter().copied().collect();
            let mut captured = HashSet::new();
            let name = format!("{}/{}", at.name, graph.describe(id));
            for nested in node.subgraphs() {
                for (value, target) in nested.captured() {
                    let value = nested.value(value).name();
                    let same_name = graph.get_value(target).is_some_and(|target| target.name() == value);
                    if !same_name || !listed.contains(&target) {
                        self.report(9, format!("{name}: '{value}' is captured from nowhere"));
                    }
                    captured.insert(target);
                }
                self.graph(nested, &Place { name: &name, ..*at }, Some(&scope));
            }
            if captured != listed || listed.len() != node.captures.len() {
                self.report(9, format!("{name}: the list of captured values is out of step"));
            }
        }
    }

    fn values<'g>(&mut self, graph: &'g Graph, place: &str, outer: Option<&'g Scope<'g>>) -> Scope<'g> {
        let mut expected: HashMap<ValueId, Vec<Use>> = HashMap::new();
        for (id, node) in graph.nodes() {
            for (slot, input) in node.inputs.iter().enumerate() {
                if let Some(value) = *input {
                    expected.entry(value).or_default().push(Use { node: id, slot: Some(slot) });
                }
            }
            for &value in &node.captures {
                expected.entry(value).or_default().push(Use { node: id, slot: None });
            }
        }
        let listed = [&graph.inputs, &graph.outputs, &graph.initializers, &graph.declared];
        let results = graph.nodes().flat_map(|(_, node)| node.results());
        let mentioned = expected.keys().chain(listed.into_iter().flatten()).copied().chain(results);
        let mut missing: Vec<ValueId> = mentioned.filter(|&id| graph.get_value(id).is_none()).collect();
        missing.sort();
        for id in missing {
            self.report(1, format!("{place}: value {id} is used but does not exist"));
        }
        let inputs: HashSet<ValueId> = graph.inputs.iter().copied().collect();
        let outputs: HashSet<ValueId> = graph.outputs.iter().copied().collect();
        let initializers: HashSet<ValueId> = graph.initializers.iter().copied().collect();
        let mut scope = Scope { names: HashSet::new(), outer };
        for (id, value) in graph.values() {
            let name = value.name();
            let mut want = expected.remove(&id).unwrap_or_default();
            let mut have = value.uses().to_vec();
            want.sort();
            have.sort();
            if want != have {
                self.report(2, format!("{place}: the users of '{name}' are out of step"));
            }
            let read = !want.is_empty() || outputs.contains(&id);
            let defined = match value.def() {
                Def::Node(node, slot) => graph.get_node(*node).and_then(|node| node.output(*slot)) == Some(id),
                Def::Input => inputs.contains(&id),
                Def::Initializer(_) => initializers.contains(&id),
                Def::Undefined => !read,
                Def::SparseInitializer | Def::Captured(_) => true,
            };
            if !defined {
                self.report(3, format!("{place}: nothing defines '{name}'"));
            }
            let captured = matches!(value.def(), Def::Captured(_));
            let repeats = match value.def() {
                // Several values may stand for one outer value.
                Def::Captured(_) => false,
                Def::Undefined => scope.names.contains(name),
                _ => scope.knows(name),
            };
            if name.is_empty() {
                self.report(5, format!("{place}: value {id} has no name"));
            } else if repeats {
                self.report(5, format!("{place}: the name '{name}' is used twice"));
            }
            // The outer graph has the names of captured values already.
            if !captured {
                scope.names.insert(name);
            }
        }
        scope
    }

    fn ports(&mut self, graph: &Graph, at: &Place<'_>, nested: bool) {
        let place = at.name;
        for value in graph.inputs.iter().filter_map(|&id| graph.get_value(id)) {
            if !matches!(value.def(), Def::Input | Def::Initializer(_)) {
                self.report(10, format!("{place}: the input '{}' is computed", value.name()));
            }
        }
        if at.function && !nested && !graph.initializers.is_empty() {
            self.report(10, format!("{place}: a function has no initializers"));
        }
        if !nested && graph.captured().next().is_some() {
            self.report(9, format!("{place}: there is nothing around it to capture from"));
        }
    }

    /// Whether the order can be relied upon.
    fn order(&mut self, graph: &Graph, place: &str) -> bool {
        let mut seen: HashSet<NodeId> = HashSet::new();
        let mut sound = true;
        let mut fault = |message: String| {
            self.report(4, format!("{place}: {message}"));
            sound = false;
        };
        for &id in &graph.order {
            let Some(node) = graph.get_node(id) else {
                fault(format!("the order lists {id}, which does not exist"));
                continue;
            };
            for value in node.dependencies() {
                let producer = graph.get_value(value).and_then(|_| graph.producer(value));
                if producer.is_some_and(|(producer, _)| !seen.contains(&producer)) {
                    fault(format!("{} comes before what it reads", graph.describe(id)));
                }
            }
            if !seen.insert(id) {
                fault(format!("{} is listed twice", graph.describe(id)));
            }
        }
        let all = graph.nodes.iter().flatten().count();
        if seen.len() != all {
            fault(format!("{} of {all} nodes are in the order", seen.len()));
        }
        sound
    }

    fn node(&mut self, graph: &Graph, id: NodeId, at: &Place<'_>) {
        let node = graph.node(id);
        let place = at.name;
        if let Some(function) = self.functions.get(&node.op) {
            let (inputs, outputs) = (function.graph.inputs.len(), function.graph.outputs.len());
            if node.inputs.len() > inputs || node.outputs.len() > outputs {
                let described = graph.describe(id);
                self.report(7, format!("{place}: {described} passes more operands or results than its function has"));
            }
        } else if !at.domains.contains(&node.op.domain) && (!node.op.domain.is_empty() || self.ir_version >= 3) {
            let domain = if node.op.domain.is_empty() { "ai.onnx" } else { &node.op.domain };
            let described = graph.describe(id);
            self.report(6, format!("{place}: {described} uses the domain '{domain}', which is not imported"));
        }
        let mut keys = HashSet::new();
        for (key, value) in &node.attributes {
            if !keys.insert(key.as_str()) {
                self.report(8, format!("{place}: {} has the attribute '{key}' twice", graph.describe(id)));
            }
            if matches!(value, Attribute::Ref(..)) && !at.function {
                let described = graph.describe(id);
                self.report(8, format!("{place}: {described} refers to a function's attribute outside a function"));
            }
        }
    }
}

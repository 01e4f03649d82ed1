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
                Def::Default(_) => inputs.contains(&id) && initializers.contains(&id),
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
            if !matches!(value.def(), Def::Input | Def::Default(_) | Def::Initializer(_)) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tensor;
    use crate::graph::{Node, Value};
    use crate::onnx::testing::*;
    use crate::onnx::{GraphProto, ModelProto};

    /// `x -> a = Neg(x) -> y = If(c)`, whose branches read `a` and `w`.
    fn sound() -> Model {
        let branch = |name: &str| graph(&[], vec![node("Add", &["a", "w"], &[name])], &[name]);
        let choice =
            node("If", &["c"], &["y"]).with_graph("then_branch", branch("t")).with_graph("else_branch", branch("e"));
        let nodes = vec![node("Neg", &["x"], &["a"]).named("neg"), choice.named("if")];
        model(GraphProto { initializer: vec![weight("w")], ..graph(&["c", "x"], nodes, &["y"]) }).read()
    }

    fn id(model: &Model, name: &str) -> ValueId {
        model.graph.find_value(name).unwrap()
    }

    fn branch(model: &mut Model) -> &mut Graph {
        let choice = model.graph.order[1];
        let Attribute::Graph(graph) = &mut model.graph.node_mut(choice).attributes[0].1 else { unreachable!() };
        graph
    }

    #[test]
    fn every_invariant_is_checked() {
        type Edit<'e> = &'e dyn Fn(&mut Model);
        let edits: [(u8, &str, Edit); 22] = [
            (1, "value v1 is used but does not exist", &|m| m.graph.values[0] = None),
            (1, "value v5 is used but does not exist", &|m| m.graph.values[4] = None),
            (2, "the users of 'x' are out of step", &|m| m.graph.value_mut(id(m, "x")).uses.clear()),
            (3, "nothing defines 'a'", &|m| m.graph.value_mut(id(m, "a")).def = Def::Undefined),
            (3, "nothing defines 'y'", &|m| m.graph.value_mut(id(m, "y")).def = Def::Node(m.graph.order[0], 0)),
            (3, "nothing defines 'x'", &|m| m.graph.inputs.truncate(1)),
            (3, "nothing defines 'w'", &|m| m.graph.initializers.clear()),
            (4, "If 'if' comes before what it reads", &|m| m.graph.order.reverse()),
            (4, "the order lists n1, which does not exist", &|m| m.graph.nodes[0] = None),
            (4, "Neg 'neg' is listed twice", &|m| m.graph.order.push(m.graph.order[0])),
            (4, "1 of 2 nodes are in the order", &|m| m.graph.order.truncate(1)),
            (5, "the name 'x' is used twice", &|m| m.graph.value_mut(id(m, "c")).name = "x".into()),
            (5, "the name 'x' is used twice", &|m| branch(m).values[0].as_mut().unwrap().name = "x".into()),
            (5, "has no name", &|m| m.graph.value_mut(id(m, "c")).name.clear()),
            (5, "two nodes are named 'neg'", &|m| m.graph.node_mut(m.graph.order[1]).name = "neg".into()),
            (6, "Neg 'neg' uses the domain 'ai.onnx', which is not imported", &|m| m.opsets = Opsets::default()),
            (8, "If 'if' has the attribute 'k' twice", &|m| {
                m.graph
                    .node_mut(m.graph.order[1])
                    .attributes
                    .extend([("k".into(), Attribute::Int(1)), ("k".into(), Attribute::Int(1))]);
            }),
            (8, "refers to a function's attribute outside a function", &|m| {
                m.graph.node_mut(m.graph.order[0]).attributes.push(("k".into(), Attribute::Ref("r".into(), 2)));
            }),
            (9, "'a' is captured from nowhere", &|m| {
                branch(m).values.iter_mut().flatten().for_each(|value| {
                    if value.name == "a" {
                        value.def = Def::Captured(ValueId::from_slot(99));
                    }
                })
            }),
            (9, "'b' is captured from nowhere", &|m| {
                branch(m).values.iter_mut().flatten().for_each(|value| {
                    if value.name == "a" {
                        value.name = "b".into();
                    }
                })
            }),
            (9, "there is nothing around it to capture from", &|m| {
                m.graph.add_value(Value::new("z".into(), Def::Captured(id(m, "x"))));
            }),
            (10, "the input 'a' is computed", &|m| m.graph.inputs.push(id(m, "a"))),
        ];
        for (invariant, message, edit) in edits {
            let mut model = sound();
            edit(&mut model);
            let Violations(found) = model.verify().unwrap_err();
            let hit =
                found.iter().any(|violation| violation.invariant == invariant && violation.message.contains(message));
            assert!(hit, "{message}: {found:#?}");
        }
    }

    #[test]
    fn functions_are_checked() {
        let neg = || function("f", &["a"], vec![node("Neg", &["a"], &["b"])], &["b"]);
        let call = |inputs: &[&str]| graph(&["x", "z"], vec![node("f::f", inputs, &["y"])], &["y"]);
        let told = |proto: &ModelProto, edit: &dyn Fn(&mut Model)| {
            let mut model = Model::from_bytes(proto.bytes()).unwrap();
            edit(&mut model);
            let Violations(found) = model.verify().unwrap_err();
            (found[0].invariant, found[0].message.clone())
        };
        let many = told(&with_functions(call(&["x", "z"]), vec![neg()]), &|_| ());
        assert_eq!(many, (7, "graph: f.f -> 'y' passes more operands or results than its function has".into()));
        let twice = told(&with_functions(call(&["x"]), vec![neg()]), &|m| m.functions.push(m.functions[0].clone()));
        assert_eq!(twice, (11, "two local functions are alike".into()));
        let unimported = told(
            &with_functions(call(&["x"]), vec![function("f", &["a"], vec![node("g::G", &["a"], &["b"])], &["b"])]),
            &|_| (),
        );
        assert_eq!(unimported, (6, "function f.f: g.G -> 'b' uses the domain 'g', which is not imported".into()));
        let initializer = told(&with_functions(call(&["x"]), vec![neg()]), &|m| {
            let graph = &mut m.functions[0].graph;
            let id = graph.add_value(Value::new("w".into(), Def::Initializer(Tensor::i64(0))));
            graph.initializers.push(id);
        });
        assert_eq!(initializer, (10, "function f.f: a function has no initializers".into()));
    }

    #[test]
    fn a_declaration_alone_defines_nothing() {
        // Exporters leave declarations of values that are gone, and declare outer values in nested graphs.
        let mut proto = sound().message();
        let main = proto.graph.as_mut().unwrap();
        main.value_info = vec![info("gone"), info("gone")];
        main.node[1].attribute[0].g.as_mut().unwrap().value_info = vec![info("x"), info("a"), info("t")];
        assert_eq!(proto.read().message(), proto);
    }

    #[test]
    fn what_is_reported_has_bounds() {
        let mut model = sound();
        for number in 0..1000 {
            let node = Node::new(OpType::of(&"d".repeat(1000), "Op"), Vec::new(), Vec::new());
            model.graph.add_node(Node { name: format!("{number}\n"), ..node });
        }
        let Violations(found) = model.verify().unwrap_err();
        assert_eq!(found.len(), LISTED);
        assert!(found.iter().all(|violation| violation.message.chars().count() <= MESSAGE + 1));
        assert!(Violations(found).to_string().ends_with("(and 99 more)"));
    }
}

//! Walks graphs and applies the rules.

use std::collections::{HashMap, HashSet};

use super::call::{Call, Why};
use super::number::Number;
use super::{Fact, MAX_ITEMS, contents, dims, dtypes, sequences};
use crate::dim::Equations;
use crate::{
    Attribute, DataType, Def, DimSpec, Expr, Function, Graph, Model, Node, OpType, Tensor, TensorType, ValueId,
};

/// Rounds of inference: each puts in the equations that the one before has found.
const MAX_ROUNDS: usize = 4;
/// Functions and nested graphs deeper than this are not looked into.
const MAX_DEPTH: usize = 16;
/// Nodes looked at in one round, those of functions once per call.
const MAX_NODES: usize = 1 << 18;

/// What holds for a whole round.
struct Round<'m> {
    functions: &'m HashMap<&'m OpType, &'m Function>,
    equations: Equations,
    /// Symbols that the file uses.
    taken: &'m HashSet<String>,
    budget: usize,
}

/// The surroundings of a graph: where its operators come from, and what its symbols' names start with.
#[derive(Clone, Copy)]
struct Place<'p> {
    opset: i64,
    prefix: &'p str,
    depth: usize,
    /// What is known of the enclosing graph's values.
    outer: &'p [Fact],
}

/// What is known of each value slot of the model's main graph.
pub(super) fn infer(model: &Model) -> Vec<Fact> {
    let graph = model.graph();
    let functions = model.functions().iter().map(|function| (&function.key, function)).collect();
    let mut taken = HashSet::new();
    declared_symbols(graph, &mut taken);
    let mut round = Round { functions: &functions, equations: Equations::default(), taken: &taken, budget: MAX_NODES };
    let place = Place { opset: model.opsets().standard(), prefix: "", depth: 0, outer: &[] };
    let mut facts = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let before = round.equations.len();
        round.budget = MAX_NODES;
        facts = round.graph(graph, place, &|_| None);
        if round.equations.len() == before {
            break;
        }
    }
    let equations = &round.equations;
    facts.iter_mut().for_each(|fact| resolve(fact, equations));
    facts
}

fn declared_symbols(graph: &Graph, taken: &mut HashSet<String>) {
    for dim in graph.values().filter_map(|(_, value)| value.ty()?.dims).flatten() {
        if let DimSpec::Named(name) = dim {
            taken.insert(name);
        }
    }
}

fn resolve(fact: &mut Fact, equations: &Equations) {
    if equations.len() == 0 {
        return;
    }
    for extent in fact.dims.iter_mut().flatten() {
        // Contradictory files can make it negative.
        let resolved = equations.resolve(extent);
        if resolved.as_known().is_none_or(|n| n >= 0) {
            *extent = resolved;
        }
    }
    for item in fact.items.iter_mut().flatten().flatten() {
        *item = item.map(|expr| equations.resolve(expr));
    }
}

/// What is known of a constant.
fn constant(tensor: &Tensor) -> Fact {
    let dims: Vec<Expr> = tensor.dims().iter().map(|&n| Expr::known(n)).collect();
    let items = (tensor.len() <= MAX_ITEMS).then(|| {
        let integers = tensor.to_i64s().map(|items| items.into_iter().map(|n| Some(Number::known(n))).collect());
        let floats = || Some(tensor.to_f64s()?.iter().map(|&x| Some(Number::float(x))).collect());
        integers.or_else(floats)
    });
    let mut fact = Fact {
        dims: Some(dims),
        dtype: Some(tensor.dtype()),
        items: items.flatten(),
        uniform: uniform(tensor),
        ..Fact::default()
    };
    contents::settle(&mut fact);
    fact
}

/// As [`Tensor::uniform`], but quick to see that weights are not.
fn uniform(tensor: &Tensor) -> Option<f64> {
    let size = tensor.dtype().bits().filter(|bits| bits % 8 == 0).map(|bits| (bits / 8) as usize);
    if let (Some(raw), Some(size)) = (tensor.raw(), size) {
        let mut items = raw.chunks_exact(size);
        let first = items.next()?;
        if items.any(|item| item != first) {
            return None;
        }
    }
    tensor.uniform()
}

/// The symbol of an extent that nothing names.
fn fresh(taken: &HashSet<String>, name: &str, axis: usize, prefix: &str) -> Expr {
    let mut symbol = format!("{prefix}{name}.{axis}");
    while taken.contains(&symbol) {
        symbol.push('\'');
    }
    Expr::opaque(&symbol)
}

fn result_name<'g>(graph: &'g Graph, node: &Node, slot: usize) -> &'g str {
    node.output(slot).map_or("", |value| graph.value(value).name())
}

impl Round<'_> {
    fn graph(&mut self, graph: &Graph, place: Place<'_>, given: &dyn Fn(ValueId) -> Option<Fact>) -> Vec<Fact> {
        let mut facts = vec![Fact::default(); graph.values.len()];
        for (id, value) in graph.values() {
            let fact = given(id).or_else(|| match value.def() {
                Def::Initializer(tensor) => Some(constant(tensor)),
                Def::Input => Some(self.declared(value.name(), value.ty(), place.prefix)),
                // A parameter, whatever callers may give: what is made of it alone is no data, and no constant.
                Def::Default(_) => Some(Fact { data: false, ..self.declared(value.name(), value.ty(), place.prefix) }),
                Def::Captured(outer) => place.outer.get(outer.slot()).cloned(),
                Def::SparseInitializer => {
                    Some(Fact { reason: Some("it is a sparse constant".into()), ..Fact::default() })
                }
                Def::Undefined | Def::Node(..) => None,
            });
            facts[id.slot()] = fact.unwrap_or_default();
            resolve(&mut facts[id.slot()], &self.equations);
        }
        for (_, node) in graph.nodes() {
            if self.budget == 0 {
                break;
            }
            self.budget -= 1;
            let results = self.node(graph, node, &facts, place);
            for (result, mut fact) in node.outputs.iter().zip(results) {
                let Some(result) = *result else { continue };
                let value = graph.value(result);
                self.fall_back(&mut fact, value.name(), value.ty(), place.prefix);
                resolve(&mut fact, &self.equations);
                contents::settle(&mut fact);
                if let Some(slot) = facts.get_mut(result.slot()) {
                    *slot = fact;
                }
            }
        }
        facts
    }

    /// What a declaration says.
    fn declared(&self, name: &str, ty: Option<TensorType>, prefix: &str) -> Fact {
        let mut fact = Fact { data: true, ..Fact::default() };
        let Some(ty) = ty else {
            fact.reason = Some(format!("input '{name}' has no declared type").into());
            return fact;
        };
        fact.dtype = Some(ty.dtype).filter(|dtype| dtype.code() != 0);
        match ty.dims {
            Some(dims) => {
                let extent = |(axis, dim): (usize, &DimSpec)| match dim {
                    DimSpec::Known(n) => Expr::known(*n),
                    DimSpec::Named(name) => Expr::symbol(name),
                    DimSpec::Unknown => fresh(self.taken, name, axis, prefix),
                };
                fact.dims = Some(dims.iter().enumerate().map(extent).collect());
            }
            None => fact.reason = Some(format!("input '{name}' has no declared shape").into()),
        }
        fact
    }

    /// Lets a declaration fill in what the operator's rule leaves open.
    fn fall_back(&self, fact: &mut Fact, name: &str, ty: Option<TensorType>, prefix: &str) {
        let Some(ty) = ty else { return };
        fact.dtype = fact.dtype.or(Some(ty.dtype).filter(|dtype| dtype.code() != 0));
        let declared = self.declared(name, Some(ty), prefix).dims;
        let Some(declared) = declared else { return };
        match &mut fact.dims {
            None => {
                fact.dims = Some(declared);
            }
            Some(dims) if dims.len() == declared.len() => {
                for (axis, (extent, declared)) in dims.iter_mut().zip(declared).enumerate() {
                    if *extent == fresh(self.taken, name, axis, prefix) {
                        *extent = declared;
                    }
                }
            }
            Some(_) => {}
        }
    }

    fn node(&mut self, graph: &Graph, node: &Node, facts: &[Fact], place: Place<'_>) -> Vec<Fact> {
        let inputs: Vec<Option<&Fact>> =
            node.inputs.iter().map(|input| input.and_then(|value| facts.get(value.slot()))).collect();
        let data = node.dependencies().any(|value| facts.get(value.slot()).is_some_and(|fact| fact.data));
        let mut results = if let Some(&function) = self.functions.get(&node.op) {
            self.function(node, function, &inputs, place)
        } else if node.is("Constant") {
            vec![constant_node(node)]
        } else if node.is("If") {
            self.branches(graph, node, &inputs, facts, place)
        } else if let Some(results) = sequences::infer(node, &inputs) {
            results
        } else {
            self.operator(graph, node, inputs, place)
        };
        // The extents of a tensor, and what is made of nothing else, are no data.
        let shape_only = matches!(
            node.standard_op(),
            Some("Shape" | "Size" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike" | "Constant")
        );
        let called = self.functions.contains_key(&node.op);
        for fact in &mut results {
            fact.data = if called { fact.data } else { data && !shape_only };
        }
        let nothing =
            || Fact { data, reason: Some(format!("{}: no rule for this result", node.op).into()), ..Fact::default() };
        results.resize_with(node.outputs.len().max(results.len()), nothing);
        results
    }

    /// Applies the rules of an operator.
    fn operator(&mut self, graph: &Graph, node: &Node, inputs: Vec<Option<&Fact>>, place: Place<'_>) -> Vec<Fact> {
        let taken = self.taken;
        let names = |slot: usize, axis: usize| fresh(taken, result_name(graph, node, slot), axis, place.prefix);
        let mut call =
            Call { node, inputs, opset: place.opset, equations: &mut self.equations, ruled: true, names: &names };
        let shapes = dims::infer(&mut call);
        let count = node.outputs.len();
        (0..count)
            .map(|slot| {
                let (dims, reason) = match &shapes {
                    Ok(shapes) => (shapes.get(slot).cloned().flatten(), None),
                    Err(why) => (None, Some(why.clone())),
                };
                let reason = reason.or_else(|| {
                    let why = || Why::from(format!("{}: no rule for result {slot}", node.op));
                    dims.is_none().then(why)
                });
                let dtype = dtypes::infer(&call, slot);
                let items = contents::items(&call, slot, dims.as_ref(), dtype);
                let uniform = contents::uniform(&call, slot, dtype);
                Fact { dims, dtype, items, uniform, reason, ..Fact::default() }
            })
            .collect()
    }

    /// Infers the body of a function for one call of it.
    fn function(&mut self, node: &Node, function: &Function, inputs: &[Option<&Fact>], place: Place<'_>) -> Vec<Fact> {
        let unknown = |what: &str| {
            let reason: Why = format!("function {}: {what}", node.op).into();
            let data = inputs.iter().flatten().any(|fact| fact.data);
            let fact = Fact { reason: Some(reason), data, ..Fact::default() };
            vec![fact; node.outputs.len()]
        };
        if place.depth >= MAX_DEPTH {
            return unknown("calls are nested too deep");
        }
        let bound = bind_attributes(&function.graph, node, function);
        let body = bound.as_ref().unwrap_or(&function.graph);
        let parameters: HashMap<ValueId, usize> =
            body.inputs().iter().enumerate().map(|(slot, &value)| (value, slot)).collect();
        let given = |value: ValueId| {
            let slot = parameters.get(&value)?;
            let fact = inputs.get(*slot).copied().flatten().cloned();
            Some(fact.unwrap_or_else(|| Fact { reason: Some("the operand is left out".into()), ..Fact::default() }))
        };
        let own = node.results().next().map_or(0, ValueId::slot);
        let prefix = format!("{}{}:{own}/", place.prefix, node.op.name);
        let opset = function.opsets.get("").unwrap_or(place.opset);
        let inner = Place { opset, prefix: &prefix, depth: place.depth + 1, outer: &[] };
        let facts = self.graph(body, inner, &given);
        let result = |value: &ValueId| facts.get(value.slot()).cloned().unwrap_or_default();
        body.outputs().iter().map(result).collect()
    }

    /// Infers the branches of an `If` and keeps what they agree on.
    fn branches(
        &mut self,
        graph: &Graph,
        node: &Node,
        inputs: &[Option<&Fact>],
        facts: &[Fact],
        place: Place<'_>,
    ) -> Vec<Fact> {
        let (Some(Attribute::Graph(yes)), Some(Attribute::Graph(no))) =
            (node.attribute("then_branch"), node.attribute("else_branch"))
        else {
            return Vec::new();
        };
        if place.depth >= MAX_DEPTH {
            return Vec::new();
        }
        let condition = inputs.first().copied().flatten().and_then(|fact| fact.uniform);
        // What one branch demands of extents holds only where it is taken.
        let before = self.equations.clone();
        let mut results = [yes, no].map(|branch| {
            let prefix = format!("{}if:{}/", place.prefix, node.results().next().map_or(0, ValueId::slot));
            let inner = Place { prefix: &prefix, depth: place.depth + 1, outer: facts, ..place };
            let facts = self.graph(branch, inner, &|_| None);
            if condition.is_none() {
                self.equations = before.clone();
            }
            let result = |value: &ValueId| facts.get(value.slot()).cloned().unwrap_or_default();
            branch.outputs().iter().map(result).collect::<Vec<Fact>>()
        });
        let [yes, no] = &mut results;
        match condition {
            Some(0.0) => std::mem::take(no),
            Some(_) => std::mem::take(yes),
            None => {
                let taken = self.taken;
                let agree = |(slot, (yes, no))| {
                    agreed(yes, no, |axis| fresh(taken, result_name(graph, node, slot), axis, place.prefix))
                };
                yes.iter().zip(no.iter()).enumerate().map(agree).collect()
            }
        }
    }
}

/// What holds of a value that is one or the other; extents that differ get a symbol of their own.
fn agreed(a: &Fact, b: &Fact, fresh: impl Fn(usize) -> Expr) -> Fact {
    let dims = match (&a.dims, &b.dims) {
        (Some(left), Some(right)) if left.len() == right.len() => {
            let extent = |(axis, (left, right)): (usize, (&Expr, &Expr))| match left == right {
                true => left.clone(),
                false => fresh(axis),
            };
            Some(left.iter().zip(right).enumerate().map(extent).collect())
        }
        _ => None,
    };
    let why = || Why::from("the branches of an If differ in rank");
    Fact {
        reason: dims.is_none().then(|| a.reason.clone().or_else(|| b.reason.clone()).unwrap_or_else(why)),
        dims,
        dtype: a.dtype.filter(|_| a.dtype == b.dtype),
        items: a.items.clone().filter(|_| a.items == b.items),
        uniform: a.uniform.filter(|_| a.uniform == b.uniform),
        data: a.data || b.data,
        sequence: None,
    }
}

/// A function's body with the caller's attributes in place of references to them; `None` if it has no references.
fn bind_attributes(body: &Graph, call: &Node, function: &Function) -> Option<Graph> {
    if !body.nodes().any(|(_, node)| node.has_reference()) {
        return None;
    }
    let mut body = body.clone();
    for node in body.nodes.iter_mut().flatten().filter(|node| node.has_reference()) {
        let attributes = std::mem::take(&mut node.attributes);
        node.attributes = attributes
            .into_iter()
            .filter_map(|(name, value)| {
                let Attribute::Ref(target, _) = &value else { return Some((name, value)) };
                let default = || function.defaults.iter().find(|(name, _)| name == target).map(|(_, value)| value);
                let bound = call.attribute(target).or_else(default)?.clone();
                Some((name, bound))
            })
            .collect();
    }
    Some(body)
}

/// What a `Constant` node holds.
fn constant_node(node: &Node) -> Fact {
    let list = |length: usize, dtype, items: Vec<Option<Number>>, scalar: bool| {
        let dims = if scalar { Vec::new() } else { vec![Expr::known(length as i64)] };
        let mut fact = Fact { dims: Some(dims), dtype: Some(dtype), items: Some(items), ..Fact::default() };
        contents::settle(&mut fact);
        fact
    };
    let ints = |list: &[i64]| list.iter().map(|&n| Some(Number::known(n))).collect();
    let floats = |list: &[f32]| list.iter().map(|&x| Some(Number::float(x.into()))).collect();
    let unknown =
        || Fact { reason: Some("Constant: the constant is of a kind that is not read".into()), ..Fact::default() };
    match node.attributes.first().map(|(name, value)| (name.as_str(), value)) {
        Some(("value", Attribute::Tensor(tensor))) => constant(tensor),
        Some(("value_int", Attribute::Int(n))) => list(1, DataType::I64, ints(&[*n]), true),
        Some(("value_ints", Attribute::Ints(items))) => list(items.len(), DataType::I64, ints(items), false),
        Some(("value_float", Attribute::Float(x))) => list(1, DataType::F32, floats(&[*x]), true),
        Some(("value_floats", Attribute::Floats(items))) => list(items.len(), DataType::F32, floats(items), false),
        Some(("value_string", _)) => list(1, DataType::String, vec![None], true),
        Some(("value_strings", Attribute::Strings(items))) => {
            list(items.len(), DataType::String, vec![None; items.len()], false)
        }
        _ => unknown(),
    }
}

//! Which constants of a model are parameters, and what they are called.
//!
//! Exported files do not say. A constant is taken for a parameter for what is done with it: it is followed through nodes
//! that have nothing but constants to work on (transposed weights, split tables, a probe with projections of its own) to
//! the node where it meets what depends on images. There it has to be
//!
//! - the matrix or kernel of a product with data, or
//! - on values that depend on a parameter already: a factor, an addend, or tokens that are joined.
//!
//! What is left out so is how images are normalised, before any parameter acts; scalars of arithmetic, and with them
//! parameters of one element that are mere factors or addends (a temperature), which nothing tells from them; quantised
//! weights; and floats of other types than float32. What looks like a parameter and is none:
//!
//! - a factor that varies along two axes is a table of rotary embedding: gains and scales vary along one;
//! - an addend whose elements are all 0 or at most -100 is a mask;
//! - what goes into sines and cosines is a frequency or a position;
//! - a table of several rows that is multiplied by matrices before it meets any data holds coordinates;
//! - several tokens, one for each image of a fixed batch, are one token that the exporter has copied.
//!
//! A position table of sines looks like a learned one, and is taken for it. A table that goes through an operator without
//! a gradient (one that is resized at run time) is left out, and so said.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use vitrim_autodiff::{Rule, rules};
use vitrim_ir::{DataType, Def, Graph, Model, Node, NodeId, Patch, Shapes, Tensor, Use, ValueId};
use vitrim_passes::Refusal;

use crate::internal;

/// What masks add to hide an entry, or less.
const MASKED: f64 = -100.0;

/// A parameter of a model.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The initializer that holds it: the path of its module and its name there, where the export shows them.
    pub name: String,
    /// Initial elements.
    pub tensor: Tensor,
    /// Whether the optimizer decays it: the matrices and kernels of products and convolutions, not biases, norms,
    /// position tables and class tokens.
    pub decay: bool,
    /// Whether it is trained.
    pub trainable: bool,
}

/// Which parameters are trained, by patterns of their names (`*` stands for any characters, `?` for one).
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Those that are not.
    pub freeze: Vec<String>,
    /// Those that are, of the frozen ones.
    pub unfreeze: Vec<String>,
}

impl Selection {
    /// Decides for each parameter: all that fit `freeze` are frozen, then all that fit `unfreeze` are not.
    ///
    /// # Errors
    ///
    /// [`Refusal::Request`] for a pattern that is malformed or fits no parameter (it is likely misspelt), and where
    /// nothing is left to train.
    pub fn apply(&self, parameters: &mut [Parameter]) -> Result<(), Refusal> {
        for (patterns, trainable) in [(&self.freeze, false), (&self.unfreeze, true)] {
            for text in patterns {
                let pattern = glob::Pattern::new(text)
                    .map_err(|error| Refusal::Request(format!("the pattern '{text}' is malformed: {error}")))?;
                let mut fits = false;
                for parameter in parameters.iter_mut().filter(|parameter| pattern.matches(&parameter.name)) {
                    (parameter.trainable, fits) = (trainable, true);
                }
                if !fits {
                    let first: Vec<&str> = parameters.iter().take(5).map(|one| one.name.as_str()).collect();
                    return Err(Refusal::Request(format!(
                        "no parameter fits '{text}'; they are called {}, …",
                        first.join(", ")
                    )));
                }
            }
        }
        match parameters.iter().any(|parameter| parameter.trainable) {
            false if !parameters.is_empty() => Err(Refusal::Request("all parameters are frozen".into())),
            _ => Ok(()),
        }
    }
}

/// A model whose parameters are told apart.
#[derive(Clone, Debug)]
pub struct Separated {
    /// The model: every parameter is an initializer of its own name, or an input of that name that may be left out.
    pub model: Model,
    /// The parameters, in the order in which they are first read.
    pub parameters: Vec<Parameter>,
    /// Where each of them was found, in the same order.
    pub places: Vec<Place>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Where a parameter was found in the model that was separated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The constant.
    pub constant: String,
    /// The operands that this parameter alone is, of several that are one constant there: each with the first result of
    /// its node. Empty where the constant is this parameter and nothing else.
    pub operands: Vec<(String, usize)>,
}

/// Tells the parameters of a model apart.
///
/// Exporters let equal constants be one: zero biases, unit norms. To train that one would tie what was never tied, so
/// every reader gets its own where all elements are equal. A constant with different elements and several readers is
/// shared on purpose.
pub fn separate(model: &Model) -> Result<Separated, Refusal> {
    let graph = model.graph();
    let shapes = Shapes::infer(model);
    let Found { parameters: found, notes } = Search::of(graph, &shapes);
    let readers: HashMap<ValueId, usize> = found.iter().map(|(value, usages)| (*value, usages.len())).collect();
    let names = Namer { graph, readers };
    let mut patch = Patch::new(model, "parameters");
    let order: HashMap<NodeId, usize> = graph.nodes().enumerate().map(|(at, (id, _))| (id, at)).collect();
    let mut list = Vec::new();
    let mut notes = notes;
    let (mut untied, mut tied) = (Vec::new(), Vec::new());
    for (value, usages) in &found {
        let (value, own) = (*value, graph.value(*value).name());
        let Some(tensor) = held(graph, value).map(Cow::into_owned) else { continue };
        let is_input = matches!(graph.value(value).def(), Def::Default(_));
        let picks = |usage: &Usage| {
            let node = graph.node(usage.reader.0);
            node.is("Slice") || node.is("Split") || node.is("Gather")
        };
        // Parts of one tensor are no equal parameters.
        let is_one = tensor.uniform().is_none() || usages.len() == 1 || usages.iter().all(picks);
        let groups: Vec<&[Usage]> = if is_one { vec![usages] } else { usages.chunks(1).collect() };
        match is_one {
            true if usages.len() > 1 && !usages.iter().all(picks) => tied.push(own),
            false => untied.push(own),
            true => {}
        }
        let wanted: Vec<String> = groups.iter().map(|group| names.of(value, &group[0], is_one)).collect();
        // One of them can keep the initializer: the one that is called so, and of an input, whose name others know, the
        // first.
        let keeps = wanted.iter().position(|name| name == own);
        let keeps = keeps.or(is_input.then_some(0)).filter(|_| graph.producer(value).is_none());
        for (copy, (group, name)) in groups.iter().zip(wanted).enumerate() {
            let name = match keeps {
                Some(kept) if kept == copy => own.to_owned(),
                _ => {
                    let new = patch.constant(&name, tensor.clone());
                    match is_one {
                        true => patch.rewire_uses(graph, value, new, |_| true),
                        false => group.iter().for_each(|usage| patch.rewire(usage.reader.0, usage.reader.1, new)),
                    }
                    patch.name(new).unwrap_or(&name).to_owned()
                }
            };
            let operand = |usage: &Usage| {
                let result = graph.node(usage.reader.0).results().next()?;
                Some((graph.value(result).name().to_owned(), usage.reader.1))
            };
            let operands = if is_one { Vec::new() } else { group.iter().filter_map(operand).collect() };
            let decay = group.iter().any(|usage| usage.role == Role::Matrix);
            let parameter = Parameter { name, tensor: tensor.clone(), decay, trainable: true };
            let first = group.iter().map(|usage| (order[&usage.reader.0], usage.reader.1)).min();
            list.push((first, parameter, Place { constant: own.into(), operands }));
        }
    }
    list.sort_by_key(|(first, ..)| *first);
    let (parameters, places) = list.into_iter().map(|(_, parameter, place)| (parameter, place)).unzip();
    notes.extend(note("what was one constant for several equal parameters is trained apart", &untied));
    notes.extend(note("parameters that are read in several places stay tied", &tied));
    let (model, _) = patch.apply(model).map_err(internal)?;
    Ok(Separated { model, parameters, places, notes })
}

/// A note on constants, if there are any: the first few by name.
fn note(what: &str, names: &[&str]) -> Option<String> {
    let first: Vec<String> = names.iter().take(3).map(|name| format!("'{name}'")).collect();
    let more = match names.len().saturating_sub(first.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!first.is_empty()).then(|| format!("{what}: {}{more}", first.join(", ")))
}

/// What a node does with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The matrix of a product, the kernel of a convolution.
    Matrix,
    /// What entries are multiplied by.
    Scale,
    /// What is added.
    Bias,
    /// What is joined.
    Token,
}

impl Role {
    /// What a node does with its operand `slot`, if it is anything that is done with parameters.
    fn of(node: &Node, slot: usize) -> Option<Self> {
        let name = node.op.name.as_str();
        let role = match (node.op.domain.as_str(), name, slot) {
            ("", "MatMul" | "Einsum", _) | ("", "Gemm", 0 | 1) | ("", "Conv" | "ConvTranspose", 1) => Self::Matrix,
            ("", "PRelu", 1) | ("", "Mul", _) => Self::Scale,
            ("", "Gemm" | "Conv" | "ConvTranspose", 2) | ("", "Attention", 3) => Self::Bias,
            ("", "Add" | "Sub" | "Sum", _) => Self::Bias,
            ("", "Concat", _) => Self::Token,
            ("", norm, 1) if norm.ends_with("Normalization") => Self::Scale,
            ("", norm, 2) if norm.ends_with("Normalization") => Self::Bias,
            ("com.microsoft", "FusedMatMul" | "FusedMatMulActivation", _) => Self::Matrix,
            ("com.microsoft", "FusedGemm" | "GemmFastGelu", 0 | 1) | ("com.microsoft", "FusedConv", 1) => Self::Matrix,
            ("com.microsoft", "FusedGemm" | "GemmFastGelu" | "FusedConv", 2) => Self::Bias,
            ("com.microsoft", "Attention", 1) => Self::Matrix,
            ("com.microsoft", "Attention", 2 | 5) | ("com.microsoft", "MultiHeadAttention", 3 | 5) => Self::Bias,
            ("com.microsoft", "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization", 2) => Self::Scale,
            ("com.microsoft", "SkipLayerNormalization", 3 | 4) => Self::Bias,
            ("com.microsoft", "SkipSimplifiedLayerNormalization", 3) => Self::Bias,
            ("com.microsoft", "BiasGelu" | "FastGelu", 1) => Self::Bias,
            _ => return None,
        };
        Some(role)
    }
}

/// Whether a node combines entries one by one, so that either operand may be anything.
fn is_arithmetic(node: &Node) -> bool {
    matches!(node.standard_op(), Some("Add" | "Sub" | "Sum" | "Mul" | "Div"))
}

/// One reading of a parameter.
#[derive(Clone, Copy, Debug)]
struct Usage {
    /// The node and operand that read the constant.
    reader: (NodeId, usize),
    /// The node and operand where it acts: that one, or one behind it.
    acts: (NodeId, usize),
    role: Role,
}

/// A constant on its way to where it acts.
#[derive(Clone, Copy)]
struct Pending {
    constant: ValueId,
    reader: (NodeId, usize),
    /// Where it acts, if it met other constants there.
    acts: Option<(NodeId, usize, Role)>,
}

/// Constants that are parameters with their readings, and what is to be said of the others.
struct Found {
    parameters: Vec<(ValueId, Vec<Usage>)>,
    notes: Vec<String>,
}

/// The search for parameters, node by node.
struct Search<'g> {
    graph: &'g Graph,
    shapes: &'g Shapes,
    /// Values that are made of constants alone, and what of them may be parameters.
    pending: HashMap<ValueId, Vec<Pending>>,
    /// Values that depend on a parameter and on data.
    learned: HashSet<ValueId>,
    at: HashMap<ValueId, usize>,
    found: Vec<(ValueId, Vec<Usage>)>,
    /// What was left out, by reason.
    left: Vec<(ValueId, &'static str)>,
}

const ROTARY: &str = "factors that vary along two axes are taken for tables of rotary embedding and stay as they are";
const MASK: &str = "addends that hide entries are taken for masks and stay as they are";
const COORDINATES: &str = "tables that are multiplied by matrices first are taken for coordinates and stay as they are";
const COPIES: &str =
    "tokens that were copied for a fixed batch stay as they are (export with a dynamic batch to train them)";
const NOT_SINGLE: &str = "constants that are no float32 stay as they are (export in float32 to train them)";
const QUANTISED: &str = "quantised constants stay as they are";
const NO_GRADIENT: &str = "constants that go through an operator without a gradient stay as they are";

impl<'g> Search<'g> {
    fn of(graph: &'g Graph, shapes: &'g Shapes) -> Found {
        let mut search = Self {
            graph,
            shapes,
            pending: HashMap::new(),
            learned: HashSet::new(),
            at: HashMap::new(),
            found: Vec::new(),
            left: Vec::new(),
        };
        for (id, node) in graph.nodes() {
            if !node.is("Constant") {
                search.visit(id, node);
            }
        }
        let Self { found: parameters, left, .. } = search;
        let mut notes = Vec::new();
        for reason in [ROTARY, MASK, COORDINATES, COPIES, NOT_SINGLE, QUANTISED, NO_GRADIENT] {
            let mut names: Vec<&str> = Vec::new();
            for &(value, _) in left.iter().filter(|(_, why)| *why == reason) {
                let name = graph.value(value).name();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            notes.extend(note(reason, &names));
        }
        Found { parameters, notes }
    }

    fn is_float(&self, value: ValueId) -> bool {
        self.shapes.dtype(value).is_some_and(DataType::is_float)
    }

    /// What of operand `slot` of a node may be parameters.
    fn candidates(&self, id: NodeId, slot: usize, value: ValueId) -> Vec<Pending> {
        match self.pending.get(&value) {
            Some(pending) => pending.clone(),
            None if held(self.graph, value).is_some_and(|tensor| tensor.dtype().is_float()) => {
                vec![Pending { constant: value, reader: (id, slot), acts: None }]
            }
            None => Vec::new(),
        }
    }

    fn visit(&mut self, id: NodeId, node: &Node) {
        self.note_quantised(node);
        let floats: Vec<(usize, ValueId)> = (node.inputs.iter().enumerate())
            .filter_map(|(slot, &operand)| Some((slot, operand.filter(|&operand| self.is_float(operand))?)))
            .collect();
        let candidates: Vec<(usize, Vec<Pending>)> =
            floats.iter().map(|&(slot, value)| (slot, self.candidates(id, slot, value))).collect();
        let depends = node.dependencies().any(|value| self.learned.contains(&value));
        let is_plain = |&(slot, value): &(usize, ValueId)| {
            let made_of_constants = candidates.iter().any(|(at, list)| *at == slot && !list.is_empty());
            made_of_constants || !self.shapes.is_data(value) && !self.learned.contains(&value)
        };
        if !depends && floats.iter().all(is_plain) {
            return self.carry(id, node, candidates);
        }
        let mut has = false;
        for (slot, list) in candidates {
            let with_data = (floats.iter()).any(|&(other, value)| other != slot && self.shapes.is_data(value));
            for pending in list {
                let Some(role) = Role::of(node, slot) else { continue };
                if depends || has || role == Role::Matrix && with_data {
                    has |= self.find(pending, (id, slot, role));
                }
            }
        }
        if depends || has {
            let results: Vec<ValueId> = node.results().filter(|&result| self.is_float(result)).collect();
            self.learned.extend(results);
        }
    }

    /// A node that has nothing but constants to work on.
    fn carry(&mut self, id: NodeId, node: &Node, candidates: Vec<(usize, Vec<Pending>)>) {
        // What goes into a sine is a frequency.
        if matches!(node.standard_op(), Some("Sin" | "Cos")) {
            return;
        }
        if !matches!(rules::standard(&node.op), Rule::Vjp(_)) {
            let moves = ["Resize", "Upsample", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "Einsum"];
            let lost = node.standard_op().is_some_and(|op| moves.contains(&op));
            let lost = candidates.iter().flat_map(|(_, list)| list).filter(|_| lost);
            let single = lost.filter(|one| held(self.graph, one.constant).is_some_and(|held| held.len() > 1));
            self.left.extend(single.map(|pending| (pending.constant, NO_GRADIENT)));
            return;
        }
        // A sum of constants is one too, but what is added to a product is its bias.
        let computes = candidates.iter().flat_map(|(_, list)| list).any(|pending| pending.acts.is_some());
        let acts = !node.is("Concat") && (computes || !is_arithmetic(node));
        let mut carried = Vec::new();
        for (slot, list) in candidates {
            for mut pending in list {
                if pending.acts.is_none() && acts {
                    let is_left = slot == 0 && node.factors().is_some();
                    if is_left && varying(self.graph, pending.constant) > 1 {
                        self.left.push((pending.constant, COORDINATES));
                        continue;
                    }
                    let role = if is_left { Some(Role::Token) } else { Role::of(node, slot) };
                    pending.acts = role.map(|role| (id, slot, role));
                }
                carried.push(pending);
            }
        }
        if !carried.is_empty() {
            for result in node.results() {
                self.pending.insert(result, carried.clone());
            }
        }
    }

    /// A constant meets data: whether it is a parameter.
    fn find(&mut self, pending: Pending, met: (NodeId, usize, Role)) -> bool {
        let Pending { constant, reader, acts } = pending;
        let (node, slot, role) = acts.unwrap_or(met);
        let Some(tensor) = held(self.graph, constant) else { return false };
        let reads = self.graph.node(node);
        // Operators whose operand can be nothing else.
        let is_certain = role == Role::Matrix || !is_arithmetic(reads) && role != Role::Token;
        if tensor.is_empty() || tensor.len() == 1 && !is_certain {
            return false;
        }
        let axes = varying(self.graph, constant);
        let reason = match role {
            _ if tensor.dtype() != DataType::F32 => Some(NOT_SINGLE),
            Role::Scale if axes > 1 && reads.is("Mul") => Some(ROTARY),
            Role::Bias if axes > 1 && is_mask(&tensor, || self.feeds_softmax(met.0)) => Some(MASK),
            Role::Token if self.is_copied(&tensor, met.0) => Some(COPIES),
            _ => None,
        };
        if let Some(reason) = reason {
            self.left.push((constant, reason));
            return false;
        }
        let entry = *self.at.entry(constant).or_insert_with(|| {
            self.found.push((constant, Vec::new()));
            self.found.len() - 1
        });
        let usages = &mut self.found[entry].1;
        if usages.iter().all(|usage| usage.reader != reader) {
            usages.push(Usage { reader, acts: (node, slot), role });
        }
        true
    }

    /// Whether what a node gives is, but for arithmetic and other shapes, what a softmax normalises.
    fn feeds_softmax(&self, node: NodeId) -> bool {
        let mut node = self.graph.node(node);
        for _ in 0..16 {
            if node.is("Softmax") || node.op.name == "Attention" || node.op.name == "MultiHeadAttention" {
                return true;
            }
            let passes = ["Add", "Sub", "Mul", "Div", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Where", "Transpose"];
            let next = node.results().flat_map(|result| self.graph.value(result).uses()).next();
            match next {
                Some(&Use { node: next, .. }) if node.standard_op().is_some_and(|op| passes.contains(&op)) => {
                    node = self.graph.node(next);
                }
                _ => return false,
            }
        }
        false
    }

    /// Whether a tensor that is joined to tokens has a copy for each image.
    fn is_copied(&self, tensor: &Tensor, joined: NodeId) -> bool {
        let &[batch, _, _] = tensor.dims() else { return false };
        let node = self.graph.node(joined);
        let along_batch = node.int("axis").is_some_and(|axis| axis == 0 || axis == -3);
        let (Some(elements), false) = (tensor.to_f64s(), along_batch || batch < 2) else { return false };
        let mut rows = elements.chunks(elements.len() / batch as usize);
        let first = rows.next();
        rows.all(|row| Some(row) == first)
    }

    fn note_quantised(&mut self, node: &Node) {
        for (slot, _) in node.quantised_operands() {
            let weight =
                node.input(slot).filter(|&value| held(self.graph, value).is_some_and(|tensor| tensor.len() > 1));
            self.left.extend(weight.map(|value| (value, QUANTISED)));
        }
    }
}

/// The number of axes that a constant varies along.
fn varying(graph: &Graph, constant: ValueId) -> usize {
    held(graph, constant).map_or(0, |tensor| tensor.dims().iter().filter(|&&extent| extent > 1).count())
}

/// Whether an addend hides entries and does nothing else: to add zeros everywhere hides nothing, which is a mask only if
/// it is scores that they are added to.
fn is_mask(tensor: &Tensor, of_scores: impl FnOnce() -> bool) -> bool {
    let Some(elements) = tensor.to_f64s() else { return false };
    let fits = elements.iter().all(|&x| x == 0.0 || x <= MASKED);
    fits && (elements.iter().any(|&x| x != 0.0) || of_scores())
}

/// The tensor that a value holds unless a caller gives another.
pub(crate) fn held(graph: &Graph, value: ValueId) -> Option<Cow<'_, Tensor>> {
    match graph.value(value).def() {
        Def::Default(tensor) => Some(Cow::Borrowed(tensor)),
        _ => graph.constant(value),
    }
}

/// What parameters are called.
struct Namer<'g> {
    graph: &'g Graph,
    /// In how many places each constant is read as a parameter.
    readers: HashMap<ValueId, usize>,
}

impl Namer<'_> {
    /// The name of a parameter: the initializer's, unless that is made up or also stands for others (`is_one` is false);
    /// else that of the weight or bias beside it, or the path of the module whose node it acts in, and what it is there.
    fn of(&self, value: ValueId, usage: &Usage, is_one: bool) -> String {
        let own = self.graph.value(value).name();
        if is_one && !is_generated(own) {
            return own.into();
        }
        let node = self.graph.node(usage.acts.0);
        let last = self.last(usage);
        let module = module_of_scopes(node, last).or_else(|| module_path(&node.name).map(|path| within(&path, last)));
        self.beside(usage).or(module).or_else(|| tensorflow(own, last)).unwrap_or_else(|| own.into())
    }

    /// What a parameter is in its module.
    fn last(&self, usage: &Usage) -> &'static str {
        let (id, slot) = usage.acts;
        let node = self.graph.node(id);
        // One that is joined to others before it is added is a part of a table.
        let axes = |value| self.source(value).map_or(2, |constant| varying(self.graph, constant));
        match usage.role {
            Role::Matrix | Role::Scale => "weight",
            Role::Token => "token",
            // A position table is added to what is no product, and varies from token to token.
            Role::Bias => match node.input(slot).map(axes) {
                Some(2..) if is_arithmetic(node) && !self.follows_product(node, slot) => "table",
                _ => "bias",
            },
        }
    }

    /// Whether what operand `slot` is added to is a product, in whatever shape.
    fn follows_product(&self, node: &Node, slot: usize) -> bool {
        let mut value = node.inputs.iter().enumerate().find(|(other, _)| *other != slot).and_then(|(_, value)| *value);
        while let Some((id, _)) = value.and_then(|value| self.graph.producer(value)) {
            let node = self.graph.node(id);
            if !(node.is("Reshape") || node.is("Transpose") || node.is("Squeeze") || node.is("Unsqueeze")) {
                return node.factors().is_some();
            }
            value = node.input(0);
        }
        false
    }

    /// The name that belongs to the one of the constant that acts beside: of a bias the weight, and the other way round.
    fn beside(&self, usage: &Usage) -> Option<String> {
        let (id, slot) = usage.acts;
        let node = self.graph.node(id);
        let is_arithmetic = is_arithmetic(node);
        let (this, that) = match usage.role {
            Role::Matrix | Role::Scale => ("weight", "bias"),
            Role::Bias => ("bias", "weight"),
            Role::Token => return None,
        };
        let constant = |node: &Node, slots: &[usize]| {
            let operands = slots.iter().filter_map(|&slot| node.input(slot));
            operands.filter_map(|operand| self.source(operand)).next()
        };
        let behind = |result: Option<ValueId>| {
            let uses = self.graph.value(result?).uses();
            let next = self.graph.node(uses.first().filter(|_| uses.len() == 1)?.node);
            match next.op.name.as_str() {
                "Add" => constant(next, &[0, 1]),
                "SkipLayerNormalization" => constant(next, &[4]),
                "BiasGelu" | "FastGelu" => constant(next, &[1]),
                _ => None,
            }
        };
        let before = || {
            let value = node.inputs.get(1 - slot.min(1)).copied().flatten()?;
            let producer = self.graph.node(self.graph.producer(value)?.0);
            let with = if producer.is("Mul") { &[0, 1][..] } else { &[1] };
            (producer.is("MatMul") || producer.is("Mul")).then(|| constant(producer, with))?
        };
        let other = match usage.role {
            Role::Matrix if node.is("MatMul") => behind(node.output(0)),
            Role::Scale if is_arithmetic => behind(node.output(0)),
            Role::Bias if is_arithmetic => before(),
            Role::Matrix => constant(node, &[2]),
            Role::Scale if node.op.domain.is_empty() => constant(node, &[2]),
            Role::Bias if slot == 2 && node.op.domain.is_empty() => constant(node, &[1]),
            _ => None,
        }?;
        let name = self.graph.value(other).name();
        let stem = name.strip_suffix(that).filter(|_| !is_generated(name) && self.readers.get(&other) == Some(&1))?;
        Some(format!("{stem}{this}"))
    }

    /// The constant that a value is, in whatever shape.
    fn source(&self, value: ValueId) -> Option<ValueId> {
        if held(self.graph, value).is_some() {
            return Some(value);
        }
        let node = self.graph.node(self.graph.producer(value)?.0);
        let moves = node.is("Transpose") || node.is("Reshape");
        moves.then(|| node.input(0).filter(|&from| held(self.graph, from).is_some()))?
    }
}

/// Whether an exporter made the name up.
fn is_generated(name: &str) -> bool {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_').to_ascii_lowercase();
    // Of torch.export: the operation that was folded.
    let folded = ["view", "unsqueeze", "squeeze", "slice", "cat", "select", "permute", "transpose", "t", "embedding"];
    let made_up = ["", "val", "const", "constant", "initializer", "tensor"];
    let is_tensorflow = name.rsplit_once(':').is_some_and(|(_, last)| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.contains("::")
        || name.starts_with('/')
        || is_tensorflow
        || made_up.contains(&stem.as_str())
        || folded.contains(&stem.as_str())
}

/// The path of the module that a node of a TorchScript export belongs to: `/blocks/blocks.0/attn/qkv/MatMul` to
/// `blocks.0.attn.qkv`.
fn module_path(node: &str) -> Option<String> {
    let mut parts: Vec<&str> = node.strip_prefix('/')?.split('/').collect();
    parts.pop();
    let mut path: Vec<&str> = Vec::new();
    for part in parts {
        // A list of modules is named before its members are: blocks, blocks.0.
        if path.last().is_some_and(|last| part.strip_prefix(last).is_some_and(|rest| rest.starts_with('.'))) {
            path.pop();
        }
        path.push(part);
    }
    Some(path.join("."))
}

/// A name in a module, which may be the whole model.
fn within(module: &str, name: &str) -> String {
    if module.is_empty() { name.into() } else { format!("{module}.{name}") }
}

/// The name by what `torch.export` says of a node: the modules around it, and the parameters that it was called with.
fn module_of_scopes(node: &Node, last: &str) -> Option<String> {
    let entry = |key: &str| node.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
    let scopes = entry("pkg.torch.onnx.name_scopes")?.trim_matches(['[', ']']);
    let mut scopes: Vec<&str> = scopes.split(',').map(|scope| scope.trim().trim_matches(['\'', '"'])).collect();
    // The innermost is the operation.
    scopes.pop();
    let module = scopes.pop()?;
    let mangled = format!("%p_{}", within(module, "").replace('.', "_"));
    let called = entry("pkg.torch.onnx.fx_node").unwrap_or_default();
    let arguments = called.split(|c: char| !(c.is_ascii_alphanumeric() || "_%".contains(c)));
    let mut stated =
        arguments.filter_map(|argument| argument.strip_prefix(&mangled)).filter(|name| name.ends_with(last));
    match (stated.next(), stated.next()) {
        (Some(one), None) => Some(within(module, one)),
        _ => Some(within(module, last)),
    }
}

/// The name by the path of a TensorFlow tensor, without the operations at its end: `encoder/mha/value/Add/ReadVariableOp:0`
/// to `encoder.mha.value.bias`.
fn tensorflow(name: &str, last: &str) -> Option<String> {
    let (path, number) = name.rsplit_once(':')?;
    if path.ends_with(':') || number.bytes().any(|byte| !byte.is_ascii_digit()) {
        return None;
    }
    let mut parts: Vec<&str> = path.split('/').collect();
    let is_operation = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_uppercase())
            || ["add", "mul", "sub", "convolution", "einsum"].contains(&part)
    };
    while parts.len() > 1 && parts.last().is_some_and(|part| is_operation(part)) {
        parts.pop();
    }
    (!parts.is_empty()).then(|| format!("{}.{last}", parts.join(".")))
}

//! Edits as values: a pass describes what to change, [`Patch::apply`] makes it so, or changes nothing.
//!
//! A patch is made for one revision of a graph and refers to its values by id. New values get ids at once, so later
//! parts of the patch can read earlier ones. Applying works on a copy: a patch that fails leaves no trace.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::graph::{Attribute, CONSTANTS_APART, Def, Graph, Names, Node, OpType, Use, Value};
use crate::model::{Function, Model};
use crate::onnx::{self, ValueInfo};
use crate::{NodeId, Tensor, TensorType, ValueId};

/// Edits of one model, to be applied together.
#[derive(Clone, Debug)]
pub struct Patch {
    pass: String,
    revision: u64,
    first_value: usize,
    first_node: usize,
    values: Vec<Value>,
    nodes: Vec<Node>,
    rewires: Vec<Rewire>,
    outputs: Vec<(usize, ValueId)>,
    new_outputs: Vec<(String, ValueId, TensorType)>,
    /// Whether new values are inputs.
    adds_inputs: bool,
    gone_outputs: Vec<usize>,
    externalised: Vec<(ValueId, String)>,
    refilled: Vec<(ValueId, Tensor)>,
    renamed: Vec<(ValueId, String)>,
    attributes: Vec<(NodeId, String, Attribute)>,
    types: Vec<(ValueId, ValueInfo)>,
    forgotten: Vec<ValueId>,
    functions: Vec<Function>,
    imports: Vec<(String, i64)>,
    metadata: Vec<(String, String)>,
    /// Whether nodes go that were unused before.
    sweeps: bool,
    /// That of the model.
    ir_version: i64,
    names: Names,
}

/// A reading that gets another value.
#[derive(Clone, Copy, Debug)]
enum Rewire {
    /// By an operand of a node.
    Operand(NodeId, usize, ValueId),
    /// By an optional operand of a node, which may have been left out.
    Given(NodeId, usize, ValueId),
    /// By an operand of a node, which is left out from now on.
    Cleared(NodeId, usize),
    /// By the graphs nested in a node, of the first value; they get the second.
    Captured(NodeId, ValueId, ValueId),
}

/// Why a patch does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum PatchError {
    #[error("the patch of pass '{pass}' was made for revision {made_for} of the graph, which is at {now}")]
    Stale { pass: String, made_for: u64, now: u64 },
    #[error("pass '{pass}': {what} does not exist")]
    Missing { pass: String, what: String },
    #[error("pass '{pass}': the edits make a cycle through {nodes}")]
    Cycle { pass: String, nodes: String },
    #[error("pass '{pass}': {what} would change from {from} to {to}")]
    Type { pass: String, what: String, from: String, to: String },
    #[error("pass '{pass}': the graph output '{name}' would be, or is, an input, a constant or another output")]
    Output { pass: String, name: String },
    #[error("pass '{pass}': the name '{name}' is taken")]
    Name { pass: String, name: String },
    #[error("pass '{pass}': a different function {function} exists in the model")]
    Function { pass: String, function: String },
    #[error("pass '{pass}': the operator set '{domain}' is imported in version {has}, not {wants}")]
    Import { pass: String, domain: String, has: i64, wants: i64 },
}

/// What a patch changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// Nodes added (and used).
    pub added: usize,
    /// Nodes removed because nothing reads them any more.
    pub removed: usize,
    /// Operands that read another value now.
    pub rewired: usize,
}

impl Patch {
    /// An empty patch by `pass` for the present revision of the model's main graph.
    pub fn new(model: &Model, pass: &str) -> Self {
        let graph = model.graph();
        Self {
            pass: pass.into(),
            revision: graph.revision(),
            first_value: graph.values.len(),
            first_node: graph.nodes.len(),
            values: Vec::new(),
            nodes: Vec::new(),
            rewires: Vec::new(),
            outputs: Vec::new(),
            new_outputs: Vec::new(),
            adds_inputs: false,
            gone_outputs: Vec::new(),
            externalised: Vec::new(),
            refilled: Vec::new(),
            renamed: Vec::new(),
            attributes: Vec::new(),
            types: Vec::new(),
            forgotten: Vec::new(),
            functions: Vec::new(),
            imports: Vec::new(),
            metadata: Vec::new(),
            sweeps: false,
            ir_version: model.ir_version(),
            names: Names::of(graph),
        }
    }

    /// Whether it changes nothing. New nodes and constants alone are no change: nothing reads them.
    pub fn is_empty(&self) -> bool {
        let edits = [
            self.rewires.len(),
            self.outputs.len(),
            self.new_outputs.len(),
            self.adds_inputs.into(),
            self.gone_outputs.len(),
            self.externalised.len(),
            self.refilled.len(),
            self.renamed.len(),
            self.attributes.len(),
        ];
        let notes =
            [self.types.len(), self.forgotten.len(), self.functions.len(), self.imports.len(), self.metadata.len()];
        !self.sweeps && edits.into_iter().chain(notes).all(|count| count == 0)
    }

    /// A name that nothing in the graph has yet, as close to `hint` as can be.
    pub fn fresh_name(&mut self, hint: &str) -> String {
        self.names.fresh(hint)
    }

    /// The name of a value that the patch adds.
    pub fn name(&self, value: ValueId) -> Option<&str> {
        Some(&self.values.get(value.slot().checked_sub(self.first_value)?)?.name)
    }

    /// A new initializer.
    pub fn constant(&mut self, hint: &str, tensor: Tensor) -> ValueId {
        self.value(hint, Def::Initializer(tensor))
    }

    /// A new graph input of that name which may be left out: then it is `default`.
    pub fn input(&mut self, name: &str, default: Tensor) -> ValueId {
        self.adds_inputs = true;
        self.value(name, Def::Default(default))
    }

    /// A new value; where `def` is [`Def::Undefined`], a node added later must give it.
    pub(crate) fn value(&mut self, hint: &str, def: Def) -> ValueId {
        let name = self.fresh_name(hint);
        self.values.push(Value::new(name, def));
        ValueId::from_slot(self.first_value + self.values.len() - 1)
    }

    /// The type that is declared of a value of `graph` or of this patch.
    pub(crate) fn ty(&self, graph: &Graph, value: ValueId) -> Option<TensorType> {
        match value.slot().checked_sub(self.first_value) {
            Some(slot) => self.values.get(slot)?.ty(),
            None => graph.get_value(value)?.ty(),
        }
    }

    /// A node whose results are new values.
    pub(crate) fn node(&mut self, node: Node) {
        self.nodes.push(Node { captures: node.read_by_nested(), ..node });
    }

    /// A new node with one result: a standard operator on given operands.
    pub fn op(&mut self, name: &str, hint: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        let inputs = inputs.iter().copied().map(Some).collect();
        self.call(OpType::standard(name), hint, inputs, attributes, 1)[0]
    }

    /// A new node with `results` results.
    pub fn call(
        &mut self,
        op: OpType,
        hint: &str,
        inputs: Vec<Option<ValueId>>,
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let attributes = attributes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let mut node = Node::new(op, inputs, attributes);
        node.name = self.fresh_name(&format!("{hint}/node"));
        // Nodes have metadata from version 10 of the format on.
        if self.ir_version >= 10 {
            node.metadata.push(("vitrim.pass".into(), self.pass.clone()));
        }
        let name = |slot| if results == 1 { hint.to_owned() } else { format!("{hint}:{slot}") };
        let made: Vec<ValueId> = (0..results).map(|slot| self.value(&name(slot), Def::Undefined)).collect();
        node.outputs = made.iter().copied().map(Some).collect();
        self.node(node);
        made
    }

    /// Declares the type of a value of this patch, or replaces that of an existing one.
    pub fn declare(&mut self, value: ValueId, ty: &TensorType) {
        let info = ValueInfo::of(ty);
        let own = value.slot().checked_sub(self.first_value).and_then(|slot| self.values.get_mut(slot));
        match own {
            Some(own) => own.info = Some(info),
            None => self.types.push((value, info)),
        }
    }

    /// Lets operand `slot` of an existing node read `value`.
    pub fn rewire(&mut self, node: NodeId, slot: usize, value: ValueId) {
        self.rewires.push(Rewire::Operand(node, slot, value));
    }

    /// Gives an existing node its optional operand `slot`, whether that was left out or not.
    pub fn give_input(&mut self, node: NodeId, slot: usize, value: ValueId) {
        self.rewires.push(Rewire::Given(node, slot, value));
    }

    /// Leaves out the optional operand `slot` of an existing node.
    pub fn clear_input(&mut self, node: NodeId, slot: usize) {
        self.rewires.push(Rewire::Cleared(node, slot));
    }

    /// Lets the graphs nested in an existing node read `new` where they read `old` of the main graph.
    pub fn rewire_captured(&mut self, node: NodeId, old: ValueId, new: ValueId) {
        self.rewires.push(Rewire::Captured(node, old, new));
    }

    /// Lets every existing reader of `old` for which `which` holds read `new`, nested graphs included; graph outputs are
    /// left alone.
    pub fn rewire_uses(&mut self, graph: &Graph, old: ValueId, new: ValueId, which: impl Fn(&Use) -> bool) {
        for used in graph.value(old).uses().iter().filter(|used| which(used)) {
            match used.slot {
                Some(slot) => self.rewire(used.node, slot, new),
                None => self.rewire_captured(used.node, old, new),
            }
        }
    }

    /// Lets the graph output at `slot` be `value`; the output keeps its name and declared type.
    pub fn replace_output(&mut self, slot: usize, value: ValueId) {
        self.outputs.push((slot, value));
    }

    /// Adds a graph output: a value that a node computes and that is no output yet. It gets the name and the type.
    pub fn append_output(&mut self, name: &str, value: ValueId, ty: TensorType) {
        self.new_outputs.push((name.into(), value, ty));
    }

    /// Removes the graph output at `slot`, as outputs are before the patch. Its value stays where something reads it.
    pub fn remove_output(&mut self, slot: usize) {
        self.gone_outputs.push(slot);
    }

    /// Sets an attribute of an existing node.
    pub fn set_attribute(&mut self, node: NodeId, name: &str, value: Attribute) {
        self.attributes.push((node, name.into(), value));
    }

    /// Drops the declared type of an existing value, which the patch makes wrong. Graph outputs keep theirs.
    pub fn forget_type(&mut self, value: ValueId) {
        self.forgotten.push(value);
    }

    /// Adds a graph input that has to be fed.
    pub fn feed(&mut self, name: &str, ty: &TensorType) -> ValueId {
        let value = self.value(name, Def::Input);
        self.declare(value, ty);
        self.adds_inputs = true;
        value
    }

    /// Lets an initializer, an input that may be left out, or a `Constant` hold another tensor of the same element type.
    pub fn refill(&mut self, value: ValueId, tensor: Tensor) {
        self.refilled.push((value, tensor));
    }

    /// Makes an initializer, or an input that may be left out, a graph input of that name which has to be fed. Such inputs
    /// come last, in the order of the calls.
    pub fn externalise(&mut self, value: ValueId, name: &str) {
        self.externalised.push((value, name.into()));
    }

    /// Gives a graph input that has to be fed another name.
    pub fn rename_input(&mut self, value: ValueId, name: &str) {
        self.renamed.push((value, name.into()));
    }

    /// Adds a local function unless the model has the same one.
    pub fn function(&mut self, function: Function) {
        self.functions.push(function);
    }

    /// Imports an operator set, unless it is imported in that version already.
    pub fn import(&mut self, domain: &str, version: i64) {
        self.imports.push((domain.into(), version));
    }

    /// Sets an entry of the model's `metadata_props`.
    pub fn metadata(&mut self, key: &str, value: String) {
        self.metadata.push((key.into(), value));
    }

    /// Removes what no graph output depends on, also where that was so before.
    pub fn sweep(&mut self) {
        self.sweeps = true;
    }

    /// The model with the edits made.
    ///
    /// Nodes that nothing depends on any more go, with the constants that only they read; so do constants that lost
    /// their last reader. What callers may replace stays, and so does what was unused before, unless it reads something
    /// that goes (or [`Patch::sweep`] was asked for).
    pub fn apply(self, model: &Model) -> Result<(Model, Diff), PatchError> {
        let now = model.graph.revision;
        if now != self.revision {
            return Err(PatchError::Stale { pass: self.pass, made_for: self.revision, now });
        }
        let (pass, rewired, first_node, sweeps) = (self.pass.clone(), self.rewires.len(), self.first_node, self.sweeps);
        let mut edited = model.clone();
        self.edit_model(&mut edited)?;
        let removed = remove_dead(&mut edited.graph, &model.graph, sweeps);
        let graph = &mut edited.graph;
        graph.sort().map_err(|nodes| PatchError::Cycle {
            pass,
            nodes: nodes.iter().take(3).map(|&id| graph.describe(id)).collect::<Vec<_>>().join(", "),
        })?;
        graph.rename_captured();
        graph.revision += 1;
        let added = graph.order.iter().filter(|id| id.slot() >= first_node).count();
        Ok((edited, Diff { added, removed, rewired }))
    }

    /// Makes the edits; users of values are out of step afterwards.
    fn edit_model(mut self, model: &mut Model) -> Result<(), PatchError> {
        let pass = self.pass.clone();
        for function in std::mem::take(&mut self.functions) {
            match model.functions.iter().find(|known| known.key == function.key) {
                Some(known) if onnx::same_function(known, &function) => {}
                Some(_) => return Err(PatchError::Function { pass, function: function.key.to_string() }),
                None => model.functions.push(function),
            }
        }
        for (domain, wants) in std::mem::take(&mut self.imports) {
            model.opsets.import(&domain, wants);
            let has = model.opsets.get(&domain).expect("just imported");
            if has != wants {
                return Err(PatchError::Import { pass, domain, has, wants });
            }
        }
        for (key, value) in std::mem::take(&mut self.metadata) {
            match model.metadata.iter_mut().find(|(known, _)| *known == key) {
                Some(entry) => entry.1 = value,
                None => model.metadata.push((key, value)),
            }
        }
        self.edit_graph(&mut model.graph)
    }

    fn edit_graph(mut self, graph: &mut Graph) -> Result<(), PatchError> {
        for value in std::mem::take(&mut self.values) {
            let fixed = matches!(value.def, Def::Initializer(_));
            let replaceable = matches!(value.def, Def::Default(_));
            let fed = value.def == Def::Input;
            let declared = value.info.is_some();
            let ty = value.ty();
            let id = graph.add_value(value);
            if fixed || replaceable {
                graph.initializers.push(id);
                if replaceable || self.ir_version < CONSTANTS_APART {
                    graph.inputs.push(id);
                    graph.value_mut(id).info = ty.as_ref().map(ValueInfo::of);
                }
            } else if fed {
                graph.inputs.push(id);
            } else if declared {
                graph.declared.push(id);
            }
        }
        for node in std::mem::take(&mut self.nodes) {
            node.dependencies().try_for_each(|value| self.existing(graph, value).map(drop))?;
            graph.add_node(node);
        }
        for rewire in std::mem::take(&mut self.rewires) {
            match rewire {
                Rewire::Operand(node, slot, value) => self.rewire_operand(graph, node, slot, value)?,
                Rewire::Given(node, slot, value) => self.give_operand(graph, node, slot, value)?,
                Rewire::Cleared(node, slot) => self.clear_operand(graph, node, slot)?,
                Rewire::Captured(node, old, new) => self.rewire_nested(graph, node, old, new)?,
            }
        }
        for (id, name, value) in std::mem::take(&mut self.attributes) {
            let node = graph.nodes.get_mut(id.slot()).and_then(Option::as_mut);
            let node = node.ok_or_else(|| self.missing(format!("node {id}")))?;
            match node.attributes.iter_mut().find(|(key, _)| *key == name) {
                Some(entry) => entry.1 = value,
                None => node.attributes.push((name, value)),
            }
            node.captures = node.read_by_nested();
            graph.node(id).dependencies().try_for_each(|value| self.existing(graph, value).map(drop))?;
        }
        let forgotten: HashSet<ValueId> =
            self.forgotten.iter().copied().filter(|id| !graph.outputs.contains(id)).collect();
        for &id in &forgotten {
            self.existing(graph, id)?;
            graph.value_mut(id).info = None;
        }
        graph.declared.retain(|id| !forgotten.contains(id));
        for (id, info) in std::mem::take(&mut self.types) {
            if self.existing(graph, id)?.info.is_none() {
                graph.declared.push(id);
            }
            graph.value_mut(id).info = Some(info);
        }
        for (slot, value) in std::mem::take(&mut self.outputs) {
            self.set_output(graph, slot, value)?;
        }
        for (id, tensor) in std::mem::take(&mut self.refilled) {
            self.fill(graph, id, tensor)?;
        }
        for (id, name) in std::mem::take(&mut self.externalised) {
            self.make_input(graph, id, name)?;
        }
        for (id, name) in std::mem::take(&mut self.renamed) {
            if self.existing(graph, id)?.def != Def::Input {
                return Err(self.missing(format!("an input {id}")));
            }
            self.check_name(graph, id, &name)?;
            graph.value_mut(id).name = name;
        }
        let gone: BTreeSet<usize> = std::mem::take(&mut self.gone_outputs).into_iter().collect();
        for slot in gone.into_iter().rev() {
            self.remove_output_at(graph, slot)?;
        }
        for (name, value, ty) in std::mem::take(&mut self.new_outputs) {
            self.check_output(graph, value, &name)?;
            self.check_name(graph, value, &name)?;
            graph.outputs.push(value);
            graph.declared.retain(|&declared| declared != value);
            let value = graph.value_mut(value);
            value.name = name;
            value.info = Some(ValueInfo::of(&ty));
        }
        Ok(())
    }

    fn fill(&mut self, graph: &mut Graph, id: ValueId, tensor: Tensor) -> Result<(), PatchError> {
        let old = match (&self.existing(graph, id)?.def, graph.constant(id)) {
            (Def::Default(default), _) => default.ty(),
            (_, Some(constant)) => constant.ty(),
            _ => return Err(self.missing(format!("a constant {id}"))),
        };
        let new = tensor.ty();
        self.check_type(Some(old), Some(new.clone()), || format!("the constant '{}'", graph.value(id).name))?;
        if let Some((node, _)) = graph.producer(id) {
            graph.node_mut(node).attributes = vec![("value".into(), Attribute::Tensor(tensor.clone()))];
        }
        let value = graph.value_mut(id);
        if let Def::Initializer(held) | Def::Default(held) = &mut value.def {
            *held = tensor;
        }
        if value.info.is_some() {
            value.info = Some(ValueInfo::of(&new));
        }
        Ok(())
    }

    fn make_input(&mut self, graph: &mut Graph, id: ValueId, name: String) -> Result<(), PatchError> {
        let value = self.existing(graph, id)?;
        let (Def::Initializer(tensor) | Def::Default(tensor)) = &value.def else {
            return Err(self.missing(format!("an initializer {id}")));
        };
        let info = ValueInfo::of(&tensor.ty());
        self.check_name(graph, id, &name)?;
        graph.initializers.retain(|&initializer| initializer != id);
        graph.inputs.retain(|&input| input != id);
        graph.inputs.push(id);
        let value = graph.value_mut(id);
        (value.name, value.def, value.info) = (name, Def::Input, Some(info));
        Ok(())
    }

    fn missing(&self, what: String) -> PatchError {
        PatchError::Missing { pass: self.pass.clone(), what }
    }

    fn existing<'g>(&self, graph: &'g Graph, id: ValueId) -> Result<&'g Value, PatchError> {
        graph.get_value(id).ok_or_else(|| self.missing(format!("value {id}")))
    }

    /// Refuses to let one value stand for another of a different element type.
    fn check_type(
        &self,
        old: Option<TensorType>,
        new: Option<TensorType>,
        what: impl FnOnce() -> String,
    ) -> Result<(), PatchError> {
        match (old, new) {
            (Some(from), Some(to)) if from.dtype != to.dtype => {
                let (from, to) = (from.to_string(), to.to_string());
                Err(PatchError::Type { pass: self.pass.clone(), what: what(), from, to })
            }
            _ => Ok(()),
        }
    }

    fn rewire_operand(&self, graph: &mut Graph, id: NodeId, slot: usize, value: ValueId) -> Result<(), PatchError> {
        let old = graph.get_node(id).and_then(|node| node.input(slot));
        let old = old.ok_or_else(|| self.missing(format!("operand {slot} of {id}")))?;
        let new = self.existing(graph, value)?.ty();
        self.check_type(graph.value(old).ty(), new, || format!("operand {slot} of {}", graph.describe(id)))?;
        graph.node_mut(id).inputs[slot] = Some(value);
        Ok(())
    }

    fn give_operand(&self, graph: &mut Graph, id: NodeId, slot: usize, value: ValueId) -> Result<(), PatchError> {
        let node = graph.get_node(id).ok_or_else(|| self.missing(format!("node {id}")))?;
        if node.input(slot).is_some() {
            return self.rewire_operand(graph, id, slot, value);
        }
        self.existing(graph, value)?;
        let inputs = &mut graph.node_mut(id).inputs;
        inputs.resize(inputs.len().max(slot + 1), None);
        inputs[slot] = Some(value);
        Ok(())
    }

    fn clear_operand(&self, graph: &mut Graph, node: NodeId, slot: usize) -> Result<(), PatchError> {
        let old = graph.get_node(node).and_then(|node| node.input(slot));
        let old = old.ok_or_else(|| self.missing(format!("operand {slot} of {node}")))?;
        graph.value_mut(old).uses.retain(|used| *used != Use { node, slot: Some(slot) });
        graph.node_mut(node).inputs[slot] = None;
        Ok(())
    }

    fn rewire_nested(&self, graph: &mut Graph, id: NodeId, old: ValueId, new: ValueId) -> Result<(), PatchError> {
        if !graph.get_node(id).is_some_and(|node| node.captures.contains(&old)) {
            return Err(self.missing(format!("a reading of {old} by graphs nested in {id}")));
        }
        let what = || format!("'{}' in the graphs nested in {}", graph.value(old).name, graph.describe(id));
        self.check_type(graph.value(old).ty(), self.existing(graph, new)?.ty(), what)?;
        let node = graph.node_mut(id);
        for (_, attribute) in &mut node.attributes {
            let Attribute::Graph(nested) = attribute else { continue };
            for value in nested.values.iter_mut().flatten() {
                if value.def == Def::Captured(old) {
                    value.def = Def::Captured(new);
                }
            }
        }
        node.captures = node.read_by_nested();
        Ok(())
    }

    /// Refuses to give a value the name of another.
    fn check_name(&self, graph: &Graph, id: ValueId, name: &str) -> Result<(), PatchError> {
        if graph.value(id).name != name && has_value_named(graph, name) {
            return Err(PatchError::Name { pass: self.pass.clone(), name: name.into() });
        }
        Ok(())
    }

    /// Only what a node computes can take the name of an output, and only one at a time.
    fn check_output(&self, graph: &Graph, value: ValueId, name: &str) -> Result<(), PatchError> {
        let computed = matches!(self.existing(graph, value)?.def, Def::Node(..));
        if computed && !graph.outputs.contains(&value) {
            return Ok(());
        }
        Err(PatchError::Output { pass: self.pass.clone(), name: name.into() })
    }

    fn remove_output_at(&self, graph: &mut Graph, slot: usize) -> Result<(), PatchError> {
        let id = *graph.outputs.get(slot).ok_or_else(|| self.missing(format!("output {slot}")))?;
        graph.outputs.remove(slot);
        let value = graph.value(id);
        let computed = matches!(value.def, Def::Node(..));
        // The type that it had as an output stays known.
        if computed && value.info.is_some() && !graph.outputs.contains(&id) && !graph.declared.contains(&id) {
            graph.declared.push(id);
        }
        Ok(())
    }

    fn set_output(&mut self, graph: &mut Graph, slot: usize, value: ValueId) -> Result<(), PatchError> {
        let old = *graph.outputs.get(slot).ok_or_else(|| self.missing(format!("output {slot}")))?;
        if old == value {
            return Ok(());
        }
        let name = graph.value(old).name.clone();
        self.check_output(graph, value, &name)?;
        if !matches!(graph.value(old).def, Def::Node(..)) || graph.output_slots(old).count() > 1 {
            return Err(PatchError::Output { pass: self.pass.clone(), name });
        }
        let what = || format!("the graph output '{name}'");
        self.check_type(graph.value(old).ty(), graph.value(value).ty(), what)?;
        graph.outputs[slot] = value;
        graph.declared.retain(|&declared| declared != old && declared != value);
        let renamed = self.fresh_name(&format!("{name}/before_{}", self.pass));
        let old = graph.value_mut(old);
        old.name = renamed;
        let info = old.info.take();
        let new = graph.value_mut(value);
        new.name = name;
        new.info = info;
        Ok(())
    }
}

/// Whether a value of the graph, or of one nested in it, has that name.
fn has_value_named(graph: &Graph, name: &str) -> bool {
    let nested = || graph.nodes().flat_map(|(_, node)| node.subgraphs());
    graph.find_value(name).is_some() || nested().any(|nested| has_value_named(nested, name))
}

/// Nodes that some graph output depends on.
pub(crate) fn live_nodes(graph: &Graph) -> HashSet<NodeId> {
    let producer = |value: ValueId| graph.producer(value).map(|(node, _)| node);
    let mut live = HashSet::new();
    let mut open: Vec<NodeId> = graph.outputs.iter().copied().filter_map(producer).collect();
    while let Some(id) = open.pop() {
        if live.insert(id) {
            open.extend(graph.node(id).dependencies().filter_map(producer));
        }
    }
    live
}

/// Removes what the edits between `before` and `graph` left unused, and nodes that were unused before if it `sweeps`;
/// gives the number of nodes. Brings users in step.
fn remove_dead(graph: &mut Graph, before: &Graph, sweeps: bool) -> usize {
    let (live, live_before) = (live_nodes(graph), live_nodes(before));
    let is_new = |id: NodeId| id.slot() >= before.nodes.len();
    let mut dead: HashSet<NodeId> = HashSet::new();
    let mut open: Vec<NodeId> = graph.order.clone();
    open.retain(|id| !live.contains(id) && (sweeps || live_before.contains(id) || is_new(*id)));
    // A node that was unused before can stay only as long as all that it reads does.
    let mut readers: HashMap<NodeId, Vec<NodeId>> = HashMap::new();
    for (id, node) in graph.nodes().filter(|(id, _)| !live.contains(id)) {
        for (producer, _) in node.dependencies().filter_map(|value| graph.producer(value)) {
            readers.entry(producer).or_default().push(id);
        }
    }
    while let Some(id) = open.pop() {
        if dead.insert(id) {
            open.extend(readers.get(&id).into_iter().flatten());
        }
    }
    for id in &dead {
        let node = graph.nodes[id.slot()].take().expect("the order lists nodes that exist");
        for value in node.results() {
            graph.values[value.slot()] = None;
        }
    }
    graph.order.retain(|id| !dead.contains(id));
    graph.reconnect();

    let annotations = &graph.rest.0.quantization_annotation;
    let parameters = annotations.iter().flat_map(|annotation| &annotation.quant_parameter_tensor_names);
    let parameters: HashSet<&str> = parameters.filter_map(|entry| entry.value.as_deref()).collect();
    let outputs: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    // What callers may replace belongs to the interface.
    let unused = |&&id: &&ValueId| {
        let value = graph.value(id);
        if matches!(value.def, Def::Default(_)) {
            return false;
        }
        let was_unused = before.get_value(id).is_some_and(|value| value.uses.is_empty());
        value.uses.is_empty() && !was_unused && !outputs.contains(&id) && !parameters.contains(value.name.as_str())
    };
    let orphans: Vec<ValueId> = graph.initializers.iter().filter(unused).copied().collect();
    for orphan in orphans {
        graph.values[orphan.slot()] = None;
    }
    let (values, annotations) = (&graph.values, &mut graph.rest.0.quantization_annotation);
    let exists = |id: &ValueId| values[id.slot()].is_some();
    graph.initializers.retain(exists);
    graph.declared.retain(exists);
    // Up to version 3 of the format constants are inputs as well.
    graph.inputs.retain(exists);
    if !annotations.is_empty() {
        let names: HashSet<&str> = values.iter().flatten().map(|value| value.name.as_str()).collect();
        annotations.retain(|annotation| annotation.tensor_name.as_deref().is_none_or(|name| names.contains(name)));
    }
    dead.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::testing::*;
    use crate::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorAnnotation, TensorProto};
    use crate::{DataType, Expr, Shapes};

    fn value(model: &Model, name: &str) -> ValueId {
        model.graph().find_value(name).unwrap_or_else(|| panic!("there is a value '{name}'"))
    }

    fn producer(model: &Model, name: &str) -> NodeId {
        model.graph().producer(value(model, name)).unwrap().0
    }

    fn f32_2() -> TensorType {
        ValueInfo(info("")).tensor_type().unwrap()
    }

    /// `x -> a = Neg(x) -> b = Add(a, w) -> y = Exp(b)`, and a node that nothing reads: `dead = Abs(a)`.
    fn chain() -> Model {
        let nodes = vec![
            node("Neg", &["x"], &["a"]),
            node("Add", &["a", "w"], &["b"]),
            node("Abs", &["a"], &["dead"]),
            node("Exp", &["b"], &["y"]),
        ];
        let graph =
            GraphProto { initializer: vec![weight("w")], value_info: vec![info("b")], ..graph(&["x"], nodes, &["y"]) };
        model(graph).read()
    }

    /// Two levels of graphs that read `a`, and `z` that reads it as an operand.
    fn nested() -> Model {
        let deep = graph(&[], vec![node("Add", &["a", "s"], &["d"])], &["d"]);
        let inner = node("If", &["c"], &["e"]).with_graph("then_branch", deep);
        let inner = inner.with_graph("else_branch", graph(&[], vec![node("Neg", &["s"], &["f"])], &["f"]));
        let branch = graph(&[], vec![node("Exp", &["a"], &["s"]), inner], &["e"]);
        let outer = node("If", &["c"], &["y"]).with_graph("then_branch", branch);
        let outer = outer.with_graph("else_branch", graph(&[], vec![node("Abs", &["k"], &["g"])], &["g"]));
        let nodes =
            vec![node("Neg", &["x"], &["a"]), node("Neg", &["a"], &["k"]), outer, node("Add", &["y", "a"], &["z"])];
        model(graph(&["c", "x"], nodes, &["z"])).read()
    }

    /// Applies a patch to a model that must stay as it is; the result must be valid and read back as the same text.
    fn apply(patch: Patch, model: &Model) -> (Model, Diff) {
        let before = model.clone();
        let (edited, diff) = patch.apply(model).unwrap();
        assert!(*model == before);
        let again = edited.message().read();
        assert_eq!(crate::print_graph(again.graph()), crate::print_graph(edited.graph()));
        (edited, diff)
    }

    /// The message of the error; the model must stay as it is.
    fn refused(patch: Patch, model: &Model) -> String {
        let before = model.clone();
        let error = patch.apply(model).unwrap_err();
        assert!(*model == before);
        error.to_string()
    }

    #[test]
    fn constants_hold_other_tensors() {
        let (ten, single) = (Tensor::f32s(&[2], &[10.0, 10.0]), Tensor::f32(1.0));
        let held = onnx::AttributeProto { r#type: Some(4), t: Some(Box::new(weight(""))), ..Default::default() };
        let of_node = node("Constant", &[], &["c"]).with("value", held);
        let model_with_node = model(graph(&["x"], vec![of_node, node("Add", &["x", "c"], &["y"])], &["y"])).read();
        for (model, name) in [(chain(), "w"), (model_with_node, "c")] {
            let mut patch = Patch::new(&model, "test");
            patch.refill(value(&model, name), ten.clone());
            let edited = apply(patch, &model).0;
            assert_eq!(edited.graph().constant(value(&edited, name)).unwrap().to_f64s(), ten.to_f64s());
            assert_eq!(edited.graph().len(), model.graph().len());
        }
        let refill = |name: &str, tensor: &Tensor| {
            let model = chain();
            let mut patch = Patch::new(&model, "test");
            patch.refill(value(&model, name), tensor.clone());
            patch.apply(&model).map(drop)
        };
        assert_eq!(refill("w", &single), Ok(()), "another shape");
        assert!(matches!(refill("w", &Tensor::i64(1)), Err(PatchError::Type { .. })), "another type");
        assert!(matches!(refill("a", &single), Err(PatchError::Missing { .. })), "what a node computes");
    }

    #[test]
    fn a_node_is_put_in_between() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        let scale = patch.constant("w", Tensor::f32s(&[2], &[2.0, 2.0]));
        let scaled = patch.op("Mul", "a", &[value(&model, "a"), scale], &[]);
        patch.rewire_uses(model.graph(), value(&model, "a"), scaled, |used| used.slot == Some(0));
        assert!(!patch.is_empty());
        let (edited, diff) = apply(patch, &model);
        assert_eq!(
            edited.lines(),
            ["a = Neg(x)", "a_2 = Mul(a, w_2)", "b = Add(a_2, w)", "dead = Abs(a_2)", "y = Exp(b)"]
        );
        assert_eq!(diff, Diff { added: 1, removed: 0, rewired: 2 });
        let (_, node) = edited.graph().nodes().nth(1).unwrap();
        assert_eq!((node.name.as_str(), node.metadata[0].1.as_str()), ("a/node", "test"));
        assert_eq!(edited.graph().revision(), model.graph().revision() + 1);
    }

    #[test]
    fn what_is_no_longer_read_goes_and_what_was_unread_stays() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "y"), 0, value(&model, "x"));
        patch.constant("unread", Tensor::i64(0));
        patch.op("Abs", "unread", &[value(&model, "x")], &[]);
        let (edited, diff) = apply(patch, &model);
        // `dead` was unread before but reads `a`, which has gone.
        assert_eq!(edited.lines(), ["y = Exp(x)"]);
        assert_eq!(diff, Diff { added: 0, removed: 4, rewired: 1 });
        assert!(edited.graph().initializers().is_empty());
        assert!(edited.message().graph.unwrap().value_info.is_empty());

        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "y"), 0, value(&model, "a"));
        assert_eq!(apply(patch, &model).0.lines(), ["a = Neg(x)", "dead = Abs(a)", "y = Exp(a)"]);
    }

    #[test]
    fn constants_stay_as_long_as_they_are_read() {
        let nodes = vec![
            node("Add", &["x", "shared"], &["a"]),
            node("Mul", &["a", "shared"], &["b"]),
            node("Mul", &["b", "replaced"], &["y"]),
        ];
        let names = ["shared", "replaced", "never_read", "scale"];
        let parameter =
            |value: &str| StringStringEntryProto { key: Some("SCALE_TENSOR".into()), value: Some(value.into()) };
        let annotation = |tensor: &str, scale| TensorAnnotation {
            tensor_name: Some(tensor.into()),
            quant_parameter_tensor_names: vec![parameter(scale)],
        };
        let graph = GraphProto {
            initializer: names.map(weight).to_vec(),
            quantization_annotation: vec![annotation("a", "scale"), annotation("b", "scale")],
            ..graph(&["x"], nodes, &["y"])
        };
        let model = model(graph).read();
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "y"), 0, value(&model, "a"));
        patch.rewire(producer(&model, "y"), 1, value(&model, "shared"));
        let (edited, _) = apply(patch, &model);
        let left: Vec<_> = edited.graph().initializers().iter().map(|&id| edited.graph().value(id).name()).collect();
        assert_eq!(left, ["shared", "never_read", "scale"]);
        let annotations = edited.message().graph.unwrap().quantization_annotation;
        assert_eq!(annotations.iter().map(TensorAnnotation::tensor_name).collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn a_constant_that_is_an_input_as_well_goes_from_both() {
        let graph = GraphProto {
            initializer: vec![weight("w")],
            ..graph(&["x", "w"], vec![node("Add", &["x", "w"], &["a"]), node("Neg", &["a"], &["y"])], &["y"])
        };
        let model = ModelProto { ir_version: Some(3), ..model(graph) }.read();
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "y"), 0, value(&model, "x"));
        let (edited, _) = apply(patch, &model);
        assert_eq!((edited.graph().inputs().len(), edited.graph().initializers().len()), (1, 0));

        // One that a patch adds is both.
        let mut patch = Patch::new(&model, "test");
        let new = patch.constant("new", Tensor::f32s(&[2], &[0.0; 2]));
        patch.rewire(producer(&model, "y"), 0, new);
        patch.replace_output(0, value(&model, "a"));
        patch.append_output("kept", value(&model, "y"), f32_2());
        let (edited, _) = apply(patch, &model);
        assert_eq!((edited.graph().inputs().len(), edited.graph().initializers().len()), (3, 2));
    }

    #[test]
    fn an_input_with_a_default_stays_and_is_no_constant() {
        let inputs = vec![node("Add", &["x", "w"], &["a"]), node("Neg", &["a"], &["y"])];
        let both = GraphProto { initializer: vec![weight("w")], ..graph(&["x", "w"], inputs, &["y"]) };
        let proto = model(both);
        let model = proto.clone().read();
        let w = value(&model, "w");
        assert!(matches!(model.graph().value(w).def(), Def::Default(_)));
        assert_eq!(model.graph().constant(w), None);
        assert_eq!(model.graph().feeds().collect::<Vec<_>>(), [value(&model, "x")]);
        assert_eq!(model.message(), proto);

        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "y"), 0, value(&model, "x"));
        let (edited, _) = apply(patch, &model);
        assert_eq!((edited.graph().inputs().len(), edited.graph().initializers().len()), (2, 1));

        // One that a patch adds is no constant for the analysis either.
        let mut patch = Patch::new(&model, "test");
        let shape = patch.input("shape", Tensor::shape(&[1, 2]));
        assert!(!patch.is_empty());
        let reshaped = patch.op("Reshape", "reshaped", &[value(&model, "a"), shape], &[]);
        patch.rewire(producer(&model, "y"), 0, reshaped);
        let (edited, _) = apply(patch, &model);
        let shapes = Shapes::infer(&edited);
        assert_eq!(shapes.ints(value(&edited, "shape")), None);
        assert_eq!(shapes.dims(value(&edited, "shape")), Some(&[Expr::known(2)][..]));
        let dims = shapes.dims(value(&edited, "reshaped")).unwrap();
        assert!(dims.len() == 2 && dims.iter().all(|dim| dim.as_known().is_none()), "{dims:?}");
        assert!(!shapes.is_data(value(&edited, "w")));
    }

    #[test]
    fn inputs_are_renamed_in_place() {
        let model = nested();
        let mut patch = Patch::new(&model, "test");
        patch.rename_input(value(&model, "c"), "condition");
        assert!(!patch.is_empty());
        let (edited, _) = apply(patch, &model);
        let names: Vec<&str> = edited.graph().inputs().iter().map(|&id| edited.graph().value(id).name()).collect();
        assert_eq!(names, ["condition", "x"]);
        // Nested graphs read it by its new name.
        assert!(edited.lines().contains(&"  e = If(condition)".into()));

        let refused_name = |to: &str| {
            let mut patch = Patch::new(&model, "test");
            patch.rename_input(value(&model, "c"), to);
            refused(patch, &model)
        };
        assert_eq!(refused_name("y"), "pass 'test': the name 'y' is taken");
        assert_eq!(refused_name("d"), "pass 'test': the name 'd' is taken");
        let mut patch = Patch::new(&model, "test");
        patch.rename_input(value(&model, "a"), "b");
        assert!(refused(patch, &model).contains("an input"));
    }

    #[test]
    fn nested_graphs_follow_a_rewiring() {
        let model = nested();
        let mut patch = Patch::new(&model, "test");
        let new = patch.op("Abs", "new", &[value(&model, "a")], &[]);
        patch.rewire_uses(model.graph(), value(&model, "a"), new, |used| used.node != producer(&model, "k"));
        let (edited, diff) = apply(patch, &model);
        let lines = [
            "a = Neg(x)",
            "k = Neg(a)",
            "new = Abs(a)",
            "y = If(c)",
            "  s = Exp(new)",
            "  e = If(c)",
            "    d = Add(new, s)",
            "    f = Neg(s)",
            "  g = Abs(k)",
            "z = Add(y, new)",
        ];
        assert_eq!((edited.lines().as_slice(), diff.rewired), (lines.map(String::from).as_slice(), 2));
        // Both captured values stand for one now.
        let mut patch = Patch::new(&edited, "test");
        patch.rewire_captured(producer(&edited, "y"), value(&edited, "k"), value(&edited, "new"));
        let (edited, diff) = apply(patch, &edited);
        assert!(edited.lines().contains(&"  g = Abs(new)".into()));
        assert_eq!(diff.removed, 1);
    }

    #[test]
    fn what_nested_graphs_read_is_kept() {
        let model = nested();
        // `k` is read by a nested graph only.
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "z"), 1, value(&model, "x"));
        let (edited, diff) = apply(patch, &model);
        assert_eq!((diff.removed, edited.graph().len()), (0, 4));
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "z"), 0, value(&model, "x"));
        assert_eq!(apply(patch, &model).0.lines(), ["a = Neg(x)", "z = Add(x, a)"]);
    }

    #[test]
    fn renaming_a_captured_output_renames_it_at_every_depth() {
        let mut proto = nested().message();
        proto.graph.as_mut().unwrap().output.push(info("a"));
        let model = proto.read();
        let mut patch = Patch::new(&model, "test");
        let new = patch.op("Abs", "new", &[value(&model, "a")], &[]);
        patch.replace_output(1, new);
        let (edited, _) = apply(patch, &model);
        let old = "a/before_test";
        for line in [
            format!("{old} = Neg(x)"),
            format!("  s = Exp({old})"),
            format!("    d = Add({old}, s)"),
            format!("a = Abs({old})"),
        ] {
            assert!(edited.lines().contains(&line), "{line}: {:#?}", edited.lines());
        }
    }

    #[test]
    fn fresh_names_are_free_in_nested_graphs_and_of_nodes() {
        let mut proto = nested().message();
        proto.graph.as_mut().unwrap().node[0].name = Some("n".into());
        let model = proto.read();
        let mut patch = Patch::new(&model, "test");
        let made = ["s", "d", "n", "x", "new", "new", "s"].map(|hint| patch.fresh_name(hint));
        assert_eq!(made, ["s_2", "d_2", "n_2", "x_2", "new", "new_2", "s_3"]);
        assert_eq!(patch.fresh_name("s_2"), "s_2_2");
    }

    #[test]
    fn outputs_are_replaced_and_added() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        let new = patch.op("Neg", "new", &[value(&model, "y")], &[]);
        patch.replace_output(0, new);
        patch.append_output("extra", value(&model, "b"), f32_2());
        let (edited, _) = apply(patch, &model);
        assert_eq!(
            edited.lines(),
            [
                "a = Neg(x)",
                "extra = Add(a, w)",
                "dead = Abs(a)",
                "y/before_test = Exp(extra)",
                "y = Neg(y/before_test)"
            ]
        );
        let graph = edited.message().graph.unwrap();
        assert_eq!(graph.output, [info("y"), info("extra")]);
        assert!(graph.value_info.is_empty());
    }

    #[test]
    fn outputs_are_removed() {
        let mut proto = chain().message();
        proto.graph.as_mut().unwrap().output.extend([info("b"), info("x")]);
        // The type of an output may be declared once more.
        let twice = proto.read();
        proto.graph.as_mut().unwrap().value_info.clear();
        let model = proto.read();
        for model in [&twice, &model] {
            let mut patch = Patch::new(model, "test");
            [1, 2, 1].into_iter().for_each(|slot| patch.remove_output(slot));
            let (edited, _) = apply(patch, model);
            assert_eq!(edited.lines(), chain().lines());
            let graph = edited.message().graph.unwrap();
            assert_eq!((graph.output, graph.value_info), (vec![info("y")], vec![info("b")]));
        }

        // What only the output depended on goes.
        let mut patch = Patch::new(&model, "test");
        [0, 2].into_iter().for_each(|slot| patch.remove_output(slot));
        patch.append_output("negative", value(&model, "a"), f32_2());
        let (edited, _) = apply(patch, &model);
        assert_eq!(edited.lines(), ["negative = Neg(x)", "b = Add(negative, w)", "dead = Abs(negative)"]);
        assert_eq!(edited.message().graph.unwrap().output, [info("b"), info("negative")]);
    }

    #[test]
    fn outputs_that_cannot_be_named_so_are_refused() {
        let mut proto = chain().message();
        proto.graph.as_mut().unwrap().output.extend([info("x"), info("w"), info("b")]);
        let model = proto.read();
        let refused_with = |edit: &dyn Fn(&mut Patch)| {
            let mut patch = Patch::new(&model, "test");
            edit(&mut patch);
            refused(patch, &model)
        };
        let replaced = |slot, name: &str| refused_with(&|patch| patch.replace_output(slot, value(&model, name)));
        let message = |name: &str| {
            format!("pass 'test': the graph output '{name}' would be, or is, an input, a constant or another output")
        };
        for (slot, new, name) in [(1, "a", "x"), (2, "a", "w"), (0, "x", "y"), (0, "w", "y"), (0, "b", "y")] {
            assert_eq!(replaced(slot, new), message(name));
        }
        let added =
            |name: &str, new: &str| refused_with(&|patch| patch.append_output(name, value(&model, new), f32_2()));
        assert_eq!(added("new", "x"), message("new"));
        assert_eq!(added("new", "y"), message("new"));
        assert_eq!(added("b", "a"), "pass 'test': the name 'b' is taken");
        assert_eq!(
            refused_with(&|patch| patch.replace_output(9, value(&model, "a"))),
            "pass 'test': output 9 does not exist"
        );
        let twice = refused_with(&|patch| {
            patch.append_output("one", value(&model, "a"), f32_2());
            patch.append_output("two", value(&model, "a"), f32_2());
        });
        assert_eq!(twice, message("two"));
        // What is the output already stays.
        let mut patch = Patch::new(&model, "test");
        patch.replace_output(0, value(&model, "y"));
        patch.replace_output(1, value(&model, "x"));
        assert_eq!(apply(patch, &model).0.lines(), model.lines());
    }

    #[test]
    fn a_patch_fits_one_revision() {
        let model = chain();
        let (edited, _) = apply(Patch::new(&model, "first"), &model);
        let message = refused(Patch::new(&model, "late"), &edited);
        assert_eq!(message, "the patch of pass 'late' was made for revision 0 of the graph, which is at 1");
    }

    #[test]
    fn cycles_are_refused() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        patch.rewire(producer(&model, "a"), 0, value(&model, "b"));
        let message = refused(patch, &model);
        assert!(message.starts_with("pass 'test': the edits make a cycle through Neg -> 'a', Add -> 'b'"), "{message}");

        // Through a nested graph: the node would read its own result.
        let model = nested();
        let mut patch = Patch::new(&model, "test");
        patch.rewire_captured(producer(&model, "y"), value(&model, "a"), value(&model, "z"));
        assert!(refused(patch, &model).starts_with("pass 'test': the edits make a cycle through If -> 'y'"));
    }

    #[test]
    fn element_types_must_agree() {
        let model = nested();
        let message = |edit: &dyn Fn(&mut Patch, ValueId)| {
            let mut patch = Patch::new(&model, "test");
            let mask = patch.op("IsNaN", "mask", &[value(&model, "x")], &[]);
            patch.declare(mask, &TensorType { dtype: DataType::Bool, dims: None });
            patch.declare(value(&model, "a"), &f32_2());
            edit(&mut patch, mask);
            refused(patch, &model)
        };
        let operand = message(&|patch, mask| patch.rewire(producer(&model, "a"), 0, mask));
        assert_eq!(operand, "pass 'test': operand 0 of Neg -> 'a' would change from f32[2] to bool[..]");
        let output = message(&|patch, mask| patch.replace_output(0, mask));
        assert_eq!(output, "pass 'test': the graph output 'z' would change from f32[2] to bool[..]");

        let mut proto = model.message();
        proto.graph.as_mut().unwrap().value_info.push(info("a"));
        let model = proto.read();
        let mut patch = Patch::new(&model, "test");
        let mask = patch.constant("mask", Tensor::i64(1));
        patch.rewire_captured(producer(&model, "y"), value(&model, "a"), mask);
        let captured = refused(patch, &model);
        assert_eq!(captured, "pass 'test': 'a' in the graphs nested in If -> 'y' would change from f32[2] to i64[]");
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let model = chain();
        let (nobody, nothing) = (NodeId::from_slot(99), ValueId::from_slot(99));
        let x = value(&model, "x");
        let neg = producer(&model, "a");
        type Edit<'e> = &'e dyn Fn(&mut Patch);
        let edits: [(Edit, &str); 12] = [
            (&|patch| patch.rewire(nobody, 0, x), "operand 0 of n100"),
            (&|patch| patch.rewire(neg, 7, x), "operand 7 of n1"),
            (&|patch| patch.rewire(neg, 0, nothing), "value v100"),
            (&|patch| patch.give_input(nobody, 0, x), "node n100"),
            (&|patch| patch.give_input(neg, 7, nothing), "value v100"),
            (&|patch| patch.rewire_captured(neg, x, x), "a reading of v1 by graphs nested in n1"),
            (&|patch| patch.set_attribute(nobody, "axis", Attribute::Int(0)), "node n100"),
            (&|patch| patch.replace_output(0, nothing), "value v100"),
            (&|patch| patch.append_output("new", nothing, f32_2()), "value v100"),
            (&|patch| patch.remove_output(9), "output 9"),
            (&|patch| patch.forget_type(nothing), "value v100"),
            (&|patch| _ = patch.op("Neg", "new", &[nothing], &[]), "value v100"),
        ];
        for (edit, what) in edits {
            let mut patch = Patch::new(&model, "test");
            edit(&mut patch);
            assert_eq!(refused(patch, &model), format!("pass 'test': {what} does not exist"));
        }
    }

    #[test]
    fn types_are_declared_and_forgotten() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        let three = TensorType { dtype: DataType::F32, dims: Some(vec![crate::DimSpec::Known(3)]) };
        patch.forget_type(value(&model, "b"));
        patch.forget_type(value(&model, "y"));
        patch.declare(value(&model, "a"), &three);
        let new = patch.op("Neg", "new", &[value(&model, "b")], &[]);
        patch.declare(new, &three);
        patch.rewire(producer(&model, "y"), 0, new);
        let (edited, _) = apply(patch, &model);
        let told = |name| edited.graph().value(value(&edited, name)).ty();
        assert_eq!(
            [told("b"), told("y"), told("a"), told("new")],
            [None, Some(f32_2()), Some(three.clone()), Some(three)]
        );
        let infos = edited.message().graph.unwrap().value_info;
        assert_eq!(infos.iter().map(|info| info.name()).collect::<Vec<_>>(), ["new", "a"]);
    }

    #[test]
    fn a_type_declared_twice_is_forgotten_twice() {
        let mut proto = chain().message();
        proto.graph.as_mut().unwrap().value_info = vec![info("b"), info("a"), info("b")];
        let model = proto.read();
        assert_eq!(model.message(), proto);
        let mut patch = Patch::new(&model, "test");
        patch.forget_type(value(&model, "b"));
        assert_eq!(apply(patch, &model).0.message().graph.unwrap().value_info, [info("a")]);
    }

    #[test]
    fn functions_imports_and_metadata_are_added_once() {
        let body = |op: &str| {
            let model = with_functions(
                graph(&["x"], vec![node("Neg", &["x"], &["y"])], &["y"]),
                vec![function("f", &["a"], vec![node(op, &["a"], &["b"])], &["b"])],
            );
            model.read().functions()[0].clone()
        };
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        assert!(patch.is_empty());
        patch.function(body("Neg"));
        patch.function(body("Neg"));
        patch.import("f", 1);
        patch.metadata("key", "old".into());
        patch.metadata("key", "new".into());
        assert!(!patch.is_empty());
        let (edited, _) = apply(patch, &model);
        assert_eq!(
            (edited.functions().len(), edited.opsets().get("f"), edited.metadata("key")),
            (1, Some(1), Some("new"))
        );

        let again = |edit: &dyn Fn(&mut Patch)| {
            let mut patch = Patch::new(&edited, "test");
            edit(&mut patch);
            patch
        };
        let same = again(&|patch| patch.function(edited.message().read().functions()[0].clone()));
        assert_eq!(apply(same, &edited).0.functions().len(), 1);
        let other = refused(again(&|patch| patch.function(body("Exp"))), &edited);
        assert_eq!(other, "pass 'test': a different function f.f exists in the model");
        let version = refused(again(&|patch| patch.import("f", 2)), &edited);
        assert_eq!(version, "pass 'test': the operator set 'f' is imported in version 1, not 2");
    }

    #[test]
    fn an_operand_that_was_left_out_is_given() {
        let model = chain();
        let node = producer(&model, "y");
        let given = model.graph().node(node).inputs.clone();
        let mut patch = Patch::new(&model, "test");
        patch.give_input(node, 3, value(&model, "x"));
        let (edited, _) = apply(patch, &model);
        let inputs = &edited.graph().node(producer(&edited, "y")).inputs;
        assert_eq!((inputs.len(), inputs[given.len()]), (4, None));
        assert_eq!(inputs[3], Some(value(&edited, "x")));
    }

    #[test]
    fn an_attribute_is_set() {
        let model = chain();
        let mut patch = Patch::new(&model, "test");
        patch.set_attribute(producer(&model, "y"), "axis", Attribute::Int(1));
        patch.set_attribute(producer(&model, "y"), "axis", Attribute::Int(2));
        let (edited, diff) = apply(patch, &model);
        assert_eq!(edited.graph().node(producer(&edited, "y")).int("axis"), Some(2));
        assert_eq!(diff, Diff::default());
    }

    #[test]
    fn a_new_node_may_hold_graphs_that_read_old_values() {
        let model = nested();
        let old = model.graph().node(producer(&model, "y")).clone();
        let attributes: Vec<(&str, Attribute)> =
            old.attributes.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let mut patch = Patch::new(&model, "test");
        let new = patch.call(old.op, "new", old.inputs, &attributes, 1)[0];
        patch.rewire_uses(model.graph(), value(&model, "y"), new, |_| true);
        // Names within the copy are those of the original, which goes.
        let (edited, diff) = apply(patch, &model);
        assert_eq!((diff.added, diff.removed), (1, 1));
        assert!(edited.lines().contains(&"    d = Add(a, s)".into()));
    }

    #[test]
    fn provenance_is_for_formats_that_have_a_place_for_it() {
        for (ir_version, signed) in [(9, false), (10, true)] {
            let model = ModelProto { ir_version: Some(ir_version), ..chain().message() }.read();
            let mut patch = Patch::new(&model, "test");
            let new = patch.op("Neg", "new", &[value(&model, "b")], &[]);
            patch.rewire(producer(&model, "y"), 0, new);
            let (edited, _) = apply(patch, &model);
            let metadata = &edited.graph().node(producer(&edited, "new")).metadata;
            assert_eq!(!metadata.is_empty(), signed);
        }
    }

    #[test]
    fn constants_have_their_own_names() {
        // A tensor keeps no name: the value that holds it does.
        let model = model(GraphProto {
            initializer: vec![TensorProto { doc_string: Some("doc".into()), ..weight("w") }],
            ..graph(&["x"], vec![node("Add", &["x", "w"], &["y"])], &["y"])
        });
        let model = model.read();
        let tensor = model.graph().constant(value(&model, "w")).unwrap().into_owned();
        let mut patch = Patch::new(&model, "test");
        let copy = patch.constant("copy", tensor);
        patch.rewire(producer(&model, "y"), 1, copy);
        let (edited, _) = apply(patch, &model);
        assert_eq!(edited.lines(), ["y = Add(x, copy)"]);
    }
}

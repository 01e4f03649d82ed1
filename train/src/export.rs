//! Trained weights back in the model that they were taken from.

use std::collections::{BTreeMap, HashMap};

use vitrim_ir::{Graph, Model, NodeId, Patch, Tensor, ValueId};
use vitrim_passes::{Refusal, driver};

use crate::head::{self, Classes};
use crate::parameters::{Parameter, Place, Separated, held, separate};
use crate::{internal, is_read};

/// Which weights are taken, and for which head.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Running means of the parameters, where there are any, instead of the parameters.
    pub ema: bool,
    /// The classes that the head was given in training, where they are others than the model's.
    pub classes: Option<i64>,
    /// The output that was judged; the first where none is named.
    pub output: Option<String>,
}

/// A model with other weights.
#[derive(Debug)]
pub struct Exported {
    /// The model.
    pub model: Model,
    /// How many parameters it has.
    pub parameters: usize,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// The model with the weights of a checkpoint, which holds them by the names that [`separate`] gives; what else it holds
/// is ignored.
///
/// It is the model as it was with other constants, where each parameter is to be found there again; otherwise the model
/// that the training graphs were made of, with its local functions inlined and its operators lifted.
///
/// # Errors
///
/// [`Refusal::Request`] where a parameter is missing in the checkpoint, or of another shape or type there: the message
/// names it.
pub fn export(model: &Model, checkpoint: &BTreeMap<String, Tensor>, choice: &Choice) -> Result<Exported, Refusal> {
    let (prepared, _) = driver::prepare(model)?;
    // What the head begins with does not matter, as long as it is the same twice.
    let classes = choice.classes.map(|count| Classes { count, seed: 0 });
    let with_head = |model: &Model| match classes {
        Some(classes) => head::replace(model, choice.output.as_deref(), classes),
        None => Ok(model.clone()),
    };
    let separated = separate(&with_head(&prepared)?)?;
    let (weights, kept) = select(&separated, checkpoint, choice)?;
    let in_place = || with_head(model).ok().and_then(|original| refill_in_place(&original, &separated, &weights));
    let parameters = weights.len();
    if let Some(model) = in_place() {
        return Ok(Exported { model, parameters, notes: Vec::from_iter(kept) });
    }
    let model = refill(&separated, &weights)?;
    let note = "the model's constants are not where its parameters are: it is written as the training graphs have it, with \
                local functions inlined and operators lifted";
    Ok(Exported { model, parameters, notes: kept.into_iter().chain([note.into()]).collect() })
}

/// What each parameter becomes. Those that the judged output does not depend on are in no checkpoint and stay as they are,
/// which a note says.
fn select(
    Separated { model, parameters, .. }: &Separated,
    checkpoint: &BTreeMap<String, Tensor>,
    choice: &Choice,
) -> Result<(Vec<Tensor>, Option<String>), Refusal> {
    let refuse = |reason: String| Err(Refusal::Request(reason));
    let mean_of = |name: &str| checkpoint.get(&format!("{name}.ema"));
    if choice.ema && !parameters.iter().any(|parameter| mean_of(&parameter.name).is_some()) {
        return refuse("the checkpoint holds no running means (NAME.ema)".into());
    }
    let find = |name: &str| mean_of(name).filter(|_| choice.ema).or_else(|| checkpoint.get(name));
    let mut missing: Vec<&str> =
        parameters.iter().map(|one| one.name.as_str()).filter(|name| find(name).is_none()).collect();
    let mut kept = Vec::new();
    if !missing.is_empty() {
        let judged = judged(model, choice.output.as_deref())?;
        (missing, kept) = missing.into_iter().partition(|name| is_read(name, judged.graph()));
    }
    if let Some(first) = missing.first() {
        let more = if missing.len() > 1 { format!(", nor {} others", missing.len() - 1) } else { String::new() };
        let has: Vec<&str> = checkpoint.keys().take(5).map(String::as_str).collect();
        return refuse(format!("the checkpoint has no parameter '{first}'{more}; it has {}, …", has.join(", ")));
    }
    let mut weights = Vec::with_capacity(parameters.len());
    for Parameter { name, tensor, .. } in parameters {
        let weight = find(name).unwrap_or(tensor);
        if weight.dtype() != tensor.dtype() {
            return refuse(format!(
                "'{name}' is {} in the checkpoint and {} in the model",
                weight.dtype(),
                tensor.dtype()
            ));
        }
        if weight.dims() != tensor.dims() {
            let hint = if choice.classes.is_none() { " (was it trained with --classes?)" } else { "" };
            let (theirs, ours) = (weight.dims(), tensor.dims());
            return refuse(format!("'{name}' is {theirs:?} in the checkpoint and {ours:?} in the model{hint}"));
        }
        weights.push(weight.clone());
    }
    let kept = (!kept.is_empty()).then(|| format!("as before, since they are not trained: {}", kept.join(", ")));
    Ok((weights, kept))
}

/// The part of a model that gives one of its outputs.
fn judged(model: &Model, output: Option<&str>) -> Result<Model, Refusal> {
    let graph = model.graph();
    let mut patch = Patch::new(model, "judged");
    for (slot, &value) in graph.outputs().iter().enumerate() {
        if output.map_or(slot > 0, |output| graph.value(value).name() != output) {
            patch.remove_output(slot);
        }
    }
    Ok(patch.apply(model).map_err(internal)?.0)
}

/// The separated model with other parameters.
fn refill(separated: &Separated, weights: &[Tensor]) -> Result<Model, Refusal> {
    let constants = constants(separated.model.graph());
    let mut patch = Patch::new(&separated.model, "weights");
    for (parameter, weight) in separated.parameters.iter().zip(weights) {
        let constant = constants.get(parameter.name.as_str()).ok_or_else(|| internal("a parameter is gone"))?;
        patch.refill(*constant, weight.clone());
    }
    Ok(patch.apply(&separated.model).map_err(internal)?.0)
}

/// The original with other parameters, if they are found in it again: to separate it must give them back.
fn refill_in_place(original: &Model, separated: &Separated, weights: &[Tensor]) -> Option<Model> {
    let graph = original.graph();
    let constants = constants(graph);
    let nodes: HashMap<&str, NodeId> =
        graph.nodes().filter_map(|(id, node)| Some((graph.value(node.results().next()?).name(), id))).collect();
    let mut patch = Patch::new(original, "weights");
    for ((parameter, Place { constant, operands }), weight) in
        separated.parameters.iter().zip(&separated.places).zip(weights)
    {
        let place = *constants.get(constant.as_str())?;
        if !same(held(graph, place)?.as_ref(), &parameter.tensor) {
            return None;
        }
        if operands.is_empty() || parameter.name == *constant {
            // What did not change stays in the file that it lies in.
            if !same(weight, &parameter.tensor) {
                patch.refill(place, weight.clone());
            }
            continue;
        }
        let own = patch.constant(&parameter.name, weight.clone());
        for (result, slot) in operands {
            let node = *nodes.get(result.as_str())?;
            if through_identities(graph, graph.node(node).input(*slot)?) != place {
                return None;
            }
            patch.rewire(node, *slot, own);
        }
    }
    let (model, _) = patch.apply(original).ok()?;
    model.verify().ok()?;
    let (prepared, _) = driver::prepare(&model).ok()?;
    let again = separate(&prepared).ok()?.parameters;
    let expected = separated.parameters.iter().zip(weights);
    let is_same = again.len() == weights.len()
        && again.iter().zip(expected).all(|(one, (other, weight))| one.name == other.name && same(&one.tensor, weight));
    is_same.then_some(model)
}

/// Whether tensors have the same elements, bit for bit or as numbers.
fn same(a: &Tensor, b: &Tensor) -> bool {
    let raw = || a.raw().is_some() && a.raw() == b.raw();
    a.dtype() == b.dtype() && a.dims() == b.dims() && (raw() || a.to_f64s() == b.to_f64s())
}

/// Constants by name.
fn constants(graph: &Graph) -> HashMap<&str, ValueId> {
    let held = graph.values().filter(|&(id, _)| held(graph, id).is_some());
    held.map(|(id, value)| (value.name(), id)).collect()
}

fn through_identities(graph: &Graph, mut value: ValueId) -> ValueId {
    while let Some((id, _)) = graph.producer(value) {
        match graph.node(id).input(0).filter(|_| graph.node(id).is("Identity")) {
            Some(from) => value = from,
            None => break,
        }
    }
    value
}

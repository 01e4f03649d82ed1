//! Training graphs: a model's parameters, a loss, its gradients and an optimizer.
//!
//! [`Training::of`] takes a model apart: [`parameters`] become inputs, a [`loss`] is put on its output, the gradients are
//! written beside it. [`stock`] makes files of that which any ONNX Runtime trains.
#![forbid(unsafe_code)]

mod decompose;
pub mod drop_path;
pub mod loss;
pub mod manifest;
pub mod optimizer;
pub mod parameters;
pub mod stock;
pub mod weights;

use std::collections::{HashMap, HashSet};

use vitrim_autodiff::{Emitter, Rule, gradients, rules};
use vitrim_ir::{DataType, Model, OpType, Patch, Shapes, ValueId, inline_functions};
use vitrim_ops::gradient_rule;
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, FUNCTIONS_SINCE, Options, Report};
use vitrim_passes::recipe::Recipe;

use crate::decompose::decompose;
use crate::drop_path::DropPath;
use crate::loss::{Heads, Loss, declared};
use crate::parameters::{Parameter, Selection, separate};

/// What is trained, and how it is judged.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is made small.
    pub loss: Loss,
    /// The output that the loss is of; the first where none is named.
    pub output: Option<String>,
    /// Which parameters are trained.
    pub selection: Selection,
    /// What is done to the tokens in training. The model that is evaluated is the original.
    pub recipe: Recipe,
    /// Whether to compute tokens in training that nothing reads.
    pub keep_dead: bool,
    /// Stochastic depth in training, where wanted.
    pub drop_path: Option<DropPath>,
}

/// The graphs that every format is made of. Parameters are inputs of both, under the same names and in the same order.
#[derive(Debug)]
pub struct Training {
    /// Loss and outputs of the model as it was.
    pub eval: Model,
    /// Loss, outputs and gradients.
    pub gradients: Model,
    /// The values of the loss.
    pub heads: Heads,
    /// The parameters.
    pub parameters: Vec<Parameter>,
    /// What was done to the tokens in training.
    pub report: Report,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// The output with the gradient of a parameter.
pub fn gradient_name(parameter: &str) -> String {
    format!("{parameter}.grad")
}

fn internal(error: impl std::fmt::Display) -> Refusal {
    Refusal::Internal(error.to_string())
}

impl Training {
    /// The graphs that train a model.
    ///
    /// # Errors
    ///
    /// [`Refusal::Request`] where there is nothing to train, no such output, or no gradient: the message names the
    /// operator that has none, and the parameter that needs it.
    pub fn of(model: &Model, request: &Request) -> Result<Self, Refusal> {
        let (model, mut notes) = driver::prepare(model)?;
        let (model, mut parameters) = separate(&model)?;
        if let Some(other) = parameters.iter().find(|parameter| parameter.tensor.dtype() != DataType::F32) {
            let (name, dtype) = (&other.name, other.tensor.dtype());
            return Err(Refusal::Request(format!(
                "the parameter '{name}' is {dtype}: training is in float32. Export the model in that"
            )));
        }
        request.selection.apply(&mut parameters)?;
        let options = Options { training: true, force: true, keep_dead: request.keep_dead, ..Options::default() };
        let (mut reduced, report) = match driver::rewrite(&model, &request.recipe, options) {
            // It trains all the same, whatever it is.
            Err(Refusal::NotAVit(_)) if request.recipe.passes.is_empty() => (model.clone(), Report::default()),
            reduced => reduced?,
        };
        notes.extend(report.notes.iter().cloned());
        // What has no rule of its own is differentiated by way of its body.
        inline_functions(&mut reduced, |op| gradient_rule(op).is_none())
            .map_err(|error| Refusal::Request(error.to_string()))?;
        let mut reduced = decompose(&reduced)?;
        if let Some(drop_path) = request.drop_path {
            let matrices =
                parameters.iter().filter(|parameter| parameter.decay).map(|parameter| parameter.name.as_str());
            reduced = drop_path.insert(&reduced, &matrices.collect())?;
        }
        let (mut gradients, heads) = loss::attach(&reduced, &request.loss, request.output.as_deref())?;
        let reached = differentiate(&mut gradients, &parameters)?;
        for parameter in parameters.iter_mut().filter(|parameter| parameter.trainable) {
            parameter.trainable = reached.contains(&parameter.name);
        }
        if reached.is_empty() {
            return Err(Refusal::Request("the loss depends on no parameter that is to be trained".into()));
        }
        let (eval, _) = loss::attach(&model, &request.loss, request.output.as_deref())?;
        let [eval, gradients] = [eval, gradients].map(|graph| expose(&graph, &parameters));
        Ok(Self { eval: eval?, gradients: gradients?, heads, parameters, report, notes })
    }
}

/// How gradients pass an operator: one of ours, or of the standard set.
fn rule(op: &OpType) -> Rule {
    gradient_rule(op).unwrap_or_else(|| rules::standard(op))
}

/// Adds the gradients of the first output as further outputs. Gives the parameters that have one.
fn differentiate(model: &mut Model, parameters: &[Parameter]) -> Result<HashSet<String>, Refusal> {
    let shapes = Shapes::infer(model);
    let graph = model.graph();
    let initializers: HashMap<&str, ValueId> =
        graph.initializers().iter().map(|&value| (graph.value(value).name(), value)).collect();
    let wrt: Vec<(&Parameter, ValueId)> = parameters
        .iter()
        .filter(|parameter| parameter.trainable)
        .filter_map(|parameter| Some((parameter, *initializers.get(parameter.name.as_str())?)))
        .collect();
    let mut patch = Patch::new(model, "gradients");
    let mut emit = Emitter::new(model, &shapes, &mut patch);
    let one = emit.number(DataType::F32, 1.0);
    let values: Vec<ValueId> = wrt.iter().map(|&(_, value)| value).collect();
    let found = gradients(&mut emit, &[(graph.outputs()[0], one)], &values, &rule)
        .map_err(|error| Refusal::Request(error.to_string()))?;
    let mut reached = HashSet::new();
    for (parameter, value) in wrt {
        let Some(&gradient) = found.get(&value) else { continue };
        let name = gradient_name(&parameter.name);
        // Parameters that act alike have one gradient; outputs are values of their own.
        let gradient = patch.op("Identity", &name, &[gradient], &[]);
        patch.append_output(&name, gradient, declared(&shapes, value, DataType::F32));
        reached.insert(parameter.name.clone());
    }
    (*model, _) = patch.apply(model).map_err(internal)?;
    Ok(reached)
}

/// The model with its parameters as inputs; those that it does not read are none.
fn expose(model: &Model, parameters: &[Parameter]) -> Result<Model, Refusal> {
    let mut patch = Patch::new(model, "parameters");
    for parameter in parameters {
        if let Some(value) = model.graph().find_value(&parameter.name) {
            patch.externalise(value, &parameter.name);
        }
    }
    let (mut exposed, _) = patch.apply(model).map_err(internal)?;
    exposed.require_ir_version(FUNCTIONS_SINCE);
    exposed.verify().map_err(internal)?;
    Ok(exposed)
}

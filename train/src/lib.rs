//! Training graphs: a model's parameters, a loss, its gradients and an optimizer.
//!
//! [`Training::of`] takes a model apart: [`parameters`] become inputs, a [`loss`] is put on its output, the gradients are
//! written beside it. [`stock`] makes files of that which any ONNX Runtime trains, [`artifacts`] those that ONNX Runtime
//! Training knows.
#![forbid(unsafe_code)]

pub mod artifacts;
mod decompose;
pub mod drop_path;
pub mod export;
pub mod head;
pub mod loss;
pub mod manifest;
pub mod optimizer;
pub mod parameters;
pub mod raise;
pub mod stock;
pub mod weights;

use std::collections::{HashMap, HashSet};

use vitrim_autodiff::{Emitter, Rule, gradients, rules};
use vitrim_ir::{DataType, Def, Graph, Model, OpType, Patch, Shapes, Tensor, Value, ValueId, inline_functions};
use vitrim_ops::gradient_rule;
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, FUNCTIONS_SINCE, Options, Report};
use vitrim_passes::recipe::{PassSpec, Recipe};

use crate::decompose::{Fused, decompose};
use crate::drop_path::DropPath;
use crate::head::Classes;
use crate::loss::{Heads, Loss, declared};
use crate::parameters::{Parameter, Selection, Separated, separate};

/// What is trained, and how it is judged.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is made small.
    pub loss: Loss,
    /// The output that the loss is of; the first where none is named.
    pub output: Option<String>,
    /// The classes to tell, where they are others than the model's: its head begins anew.
    pub classes: Option<Classes>,
    /// Which parameters are trained.
    pub selection: Selection,
    /// What is done to the tokens in training. The model that is evaluated is the original.
    pub recipe: Recipe,
    /// Whether to compute tokens in training that nothing reads.
    pub keep_dead: bool,
    /// Stochastic depth in training, where wanted.
    pub drop_path: Option<DropPath>,
}

impl Request {
    /// To make this small, with nothing beside it.
    pub fn new(loss: Loss) -> Self {
        let (selection, recipe) = (Selection::default(), Recipe::default());
        Self { loss, output: None, classes: None, selection, recipe, keep_dead: false, drop_path: None }
    }

    /// The stages of the training: from which epoch on what is done to the tokens. Expansion has several; else there is one.
    fn stages(&self) -> Result<Vec<(StageOf, Recipe)>, Refusal> {
        let mut recipe = self.recipe.clone();
        for pass in &mut recipe.passes {
            if let PassSpec::Merge(spec) = pass {
                // A model that is trained with merging learns what tokens weigh (arXiv 2210.09461, section 3).
                spec.proportional.get_or_insert(false);
            }
        }
        let is_staged = |pass: &PassSpec| matches!(pass, PassSpec::Expand(spec) if spec.stage.is_none());
        let Some(at) = recipe.passes.iter().position(is_staged) else {
            return Ok(vec![(StageOf { epoch: 0, keep: 1.0 }, recipe)]);
        };
        if recipe.passes[at + 1..].iter().any(is_staged) {
            return Err(Refusal::Request("a training has the stages of one expansion: leave the others out".into()));
        }
        let PassSpec::Expand(spec) = &recipe.passes[at] else { return Err(internal("a pass is another")) };
        let schedule = spec.schedule()?;
        let stage = |(stage, (&epoch, &keep)): (usize, (&usize, &f64))| {
            let mut recipe = recipe.clone();
            if let PassSpec::Expand(spec) = &mut recipe.passes[at] {
                spec.stage = Some(stage + 1);
            }
            (StageOf { epoch, keep }, recipe)
        };
        Ok(schedule.epochs.iter().zip(&schedule.keep).enumerate().map(stage).collect())
    }
}

/// What a stage of a training is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageOf {
    /// Its first epoch.
    pub epoch: usize,
    /// The share of the tokens that are kept in it.
    pub keep: f64,
}

/// A stage of a training before the last one.
#[derive(Debug)]
pub struct Stage {
    /// What it is.
    pub of: StageOf,
    /// Loss, outputs and gradients.
    pub gradients: Model,
}

/// How much is done to the tokens, where a graph that trains can be told when it runs: an input that may be left out.
#[derive(Clone, Debug)]
pub struct Dial {
    /// The input, a scalar.
    pub name: String,
    /// What it is where it is left out.
    pub default: Tensor,
}

impl Dial {
    /// The inputs that `gradients` can do without and `eval` has not.
    fn all(gradients: &Graph, eval: &Graph) -> Vec<Self> {
        let inputs = gradients.inputs().iter().map(|&input| gradients.value(input));
        let of = |input: &Value| match input.def() {
            Def::Default(default) if eval.find_value(input.name()).is_none() => {
                Some(Self { name: input.name().into(), default: default.clone() })
            }
            _ => None,
        };
        inputs.filter_map(of).collect()
    }
}

/// The graphs that every format is made of. All parameters are inputs of both, the last ones, under the same names and in
/// the same order.
#[derive(Debug)]
pub struct Training {
    /// Loss and outputs of the model as it was, without dropout.
    pub eval: Model,
    /// Loss, outputs and gradients; in the last stage where there are several.
    pub gradients: Model,
    /// What that stage is.
    pub last: StageOf,
    /// The stages before it.
    pub earlier: Vec<Stage>,
    /// The values of the loss.
    pub heads: Heads,
    /// The parameters.
    pub parameters: Vec<Parameter>,
    /// What the graphs of all stages can be told of the tokens when they run.
    pub dials: Vec<Dial>,
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
        let (mut model, mut notes) = driver::prepare(model)?;
        if let Some(classes) = request.classes {
            model = head::replace(&model, request.output.as_deref(), classes)?;
        }
        let Separated { model, mut parameters, notes: of_parameters, .. } = separate(&model)?;
        if parameters.is_empty() {
            let why = of_parameters.iter().map(|note| format!("; {note}")).collect::<String>();
            return Err(Refusal::Request(format!("the model has no parameters that can be trained{why}")));
        }
        notes.extend(of_parameters);
        request.selection.apply(&mut parameters)?;
        let mut stages = Vec::new();
        for (of, recipe) in request.stages()? {
            let (forward, heads, report) = of_stage(&model, &parameters, &recipe, request)?;
            stages.push((Stage { of, gradients: forward }, heads, report));
        }
        let (eval, _) = loss::attach(&without_dropout(&model)?, &request.loss, request.output.as_deref())?;
        let forwards = stages.iter().map(|(stage, ..)| &stage.gradients);
        notes.extend(retain_common(&mut parameters, forwards.chain([&eval])));
        for (stage, ..) in &mut stages {
            differentiate(&mut stage.gradients, &parameters)?;
        }
        let Some((Stage { of: last, gradients }, heads, report)) = stages.pop() else {
            return Err(internal("a training without a stage"));
        };
        let outputs: HashSet<&str> =
            gradients.graph().outputs().iter().map(|&output| gradients.graph().value(output).name()).collect();
        for parameter in &mut parameters {
            parameter.trainable &= outputs.contains(gradient_name(&parameter.name).as_str());
        }
        if parameters.iter().all(|parameter| !parameter.trainable) {
            return Err(Refusal::Request("the loss depends on no parameter that is to be trained".into()));
        }
        notes.extend(report.notes.iter().cloned());
        let [eval, gradients] = [eval, gradients].map(|graph| expose(&graph, &parameters));
        let expose = |(stage, ..): (Stage, Heads, Report)| {
            Ok(Stage { gradients: expose(&stage.gradients, &parameters)?, of: stage.of })
        };
        let earlier = stages.into_iter().map(expose).collect::<Result<_, Refusal>>()?;
        let (eval, gradients) = (eval?, gradients?);
        let dials = Dial::all(gradients.graph(), eval.graph());
        Ok(Self { eval, gradients, last, earlier, heads, parameters, dials, report, notes })
    }
}

/// Loss of a model with these passes, its parameters still constants.
fn of_stage(
    model: &Model,
    parameters: &[Parameter],
    recipe: &Recipe,
    request: &Request,
) -> Result<(Model, Heads, Report), Refusal> {
    let options = Options { training: true, force: true, keep_dead: request.keep_dead, ..Options::default() };
    // What exporters wrote out is put together before tokens are reduced (bodies of our operators are of the version of the
    // operator set that norms need), or after (analyses know no operator of ours that is not theirs).
    let (raised, _) = raise::norms(model)?;
    let (mut reduced, report) = match driver::rewrite(&raised, recipe, options) {
        // It trains all the same, whatever it is.
        Err(Refusal::NotAVit(_) | Refusal::Pinned { .. }) if recipe.passes.is_empty() => (raised, Report::default()),
        reduced => reduced?,
    };
    // What has no rule of its own is differentiated by way of its body.
    inline_functions(&mut reduced, |op| gradient_rule(op).is_none())
        .map_err(|error| Refusal::Request(error.to_string()))?;
    let (raised, _) = raise::gelus(&decompose(&reduced, Fused::OfOnnxRuntime)?)?;
    let mut reduced = raise::scales(&raised)?;
    if let Some(drop_path) = request.drop_path {
        let matrices = parameters.iter().filter(|parameter| parameter.decay).map(|parameter| parameter.name.as_str());
        reduced = drop_path.insert(&reduced, &matrices.collect())?;
    }
    let (forward, heads) = loss::attach(&reduced, &request.loss, request.output.as_deref())?;
    Ok((forward, heads, report))
}

/// The model as it infers: an export for training has dropout that acts.
fn without_dropout(model: &Model) -> Result<Model, Refusal> {
    let mut patch = Patch::new(model, "evaluation");
    for (id, node) in model.graph().nodes() {
        if node.is("Dropout") && node.input(TRAINING_MODE).is_some() {
            patch.clear_input(id, TRAINING_MODE);
        }
    }
    Ok(patch.apply(model).map_err(internal)?.0)
}

/// The operand of `Dropout` that says whether it acts.
const TRAINING_MODE: usize = 2;

/// Leaves those parameters that all graphs read, so that these have the same inputs; the others stay constants, which a
/// note says.
fn retain_common<'a>(
    parameters: &mut Vec<Parameter>,
    graphs: impl IntoIterator<Item = &'a Model> + Clone,
) -> Option<String> {
    let is_common =
        |parameter: &mut Parameter| graphs.clone().into_iter().all(|model| is_read(&parameter.name, model.graph()));
    let rest: Vec<String> = parameters.extract_if(.., |one| !is_common(one)).map(|one| one.name).collect();
    (!rest.is_empty()).then(|| {
        format!(
            "no parameters, since the loss does not read them both in training and in evaluation: {}",
            rest.join(", ")
        )
    })
}

/// Whether a graph reads the value of that name.
fn is_read(name: &str, graph: &Graph) -> bool {
    graph.find_value(name).is_some_and(|value| !graph.value(value).uses().is_empty())
}

/// How gradients pass an operator: one of ours, or of the standard set.
fn rule(op: &OpType) -> Rule {
    gradient_rule(op).unwrap_or_else(|| rules::standard(op))
}

/// Adds the gradients of the first output as further outputs.
fn differentiate(model: &mut Model, parameters: &[Parameter]) -> Result<(), Refusal> {
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
    let found = gradients(&mut emit, &[(graph.outputs()[0], one)], &values, &rule).map_err(|error| {
        Refusal::Request(format!("{error}; or leave that parameter as it is: --freeze '{}'", error.of))
    })?;
    for (parameter, value) in wrt {
        let Some(&gradient) = found.get(&value) else { continue };
        let name = gradient_name(&parameter.name);
        // Parameters that act alike have one gradient; outputs are values of their own.
        let gradient = patch.op("Identity", &name, &[gradient], &[]);
        patch.append_output(&name, gradient, declared(&shapes, value, DataType::F32));
    }
    (*model, _) = patch.apply(model).map_err(internal)?;
    Ok(())
}

/// The model with its parameters as inputs.
fn expose(model: &Model, parameters: &[Parameter]) -> Result<Model, Refusal> {
    let mut patch = Patch::new(model, "parameters");
    for parameter in parameters {
        let value = model.graph().find_value(&parameter.name);
        let value = value.ok_or_else(|| internal(format!("the parameter '{}' is gone", parameter.name)))?;
        patch.externalise(value, &parameter.name);
    }
    let (mut exposed, _) = patch.apply(model).map_err(internal)?;
    exposed.require_ir_version(FUNCTIONS_SINCE);
    exposed.verify().map_err(internal)?;
    Ok(exposed)
}

#[cfg(test)]
mod tests {
    use vitrim_ir::{DimSpec, GraphBuilder, TensorType};

    use super::*;

    /// `y = x a`, `z = x b`, of which only `y` is judged where both are there.
    fn products(names: &[&str]) -> Model {
        let two =
            TensorType { dtype: DataType::F32, dims: Some(vec![DimSpec::Named("batch".into()), DimSpec::Known(2)]) };
        let mut graph = GraphBuilder::new();
        let x = graph.input("x", Some(&two));
        for name in names {
            let matrix = graph.initializer(name, Tensor::f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
            let product = graph.op("MatMul", name, &[x, matrix], &[]);
            graph.output(&format!("of_{name}"), product, Some(&two));
        }
        graph.into_model(8, &[("", 17)], Vec::new())
    }

    #[test]
    fn what_the_loss_does_not_read_is_no_parameter() {
        let training = Training::of(&products(&["a", "b"]), &Request::new(Loss::MeanSquaredError)).unwrap();
        let names: Vec<&str> = training.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        assert_eq!(names, ["a"]);
        let note = "no parameters, since the loss does not read them both in training and in evaluation: b";
        assert_eq!(training.notes, [note]);
        for model in [&training.eval, &training.gradients] {
            let inputs: Vec<&str> = model.graph().inputs().iter().map(|&id| model.graph().value(id).name()).collect();
            assert_eq!(inputs, ["x", "labels", "a"]);
        }
    }

    #[test]
    fn a_parameter_of_one_graph_alone_stays_a_constant() {
        let Separated { mut parameters, .. } = separate(&products(&["a", "b", "c"])).unwrap();
        let note = retain_common(&mut parameters, [&products(&["a", "b"]), &products(&["c", "b"])]);
        assert!(parameters.len() == 1 && parameters[0].name == "b");
        assert!(note.is_some_and(|note| note.ends_with(": a, c")));
        assert_eq!(retain_common(&mut parameters, [&products(&["b"]), &products(&["b", "a"])]), None);
    }
}

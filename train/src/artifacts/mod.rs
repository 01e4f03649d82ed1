//! What ONNX Runtime Training trains with: a model that gives losses and gathers gradients, one that evaluates, one that
//! takes the optimizer's step, and a checkpoint with the parameters.
//!
//! Version 1.19.2, the last one, reads them in Python, C++ and the browser. It tells the inputs of the first two apart by
//! their names: what the checkpoint knows is a parameter, what ends in `_grad` and the like is a gradient, the rest is
//! fed by the user. Parameters are fed by position, so they come in one order everywhere.

mod checkpoint;
mod flat;
mod optimizer;

use std::fs;
use std::path::{Path, PathBuf};

use vitrim_ir::{DataType, DimSpec, FileError, Model, OpType, Patch, TensorType, ValueId};
use vitrim_passes::Refusal;

pub use checkpoint::{Checkpoint, CheckpointError};

use crate::decompose::{Fused, decompose};
use crate::optimizer::{Optimizer, Update};
use crate::parameters::Parameter;
use crate::{StageOf, Training, gradient_name, internal};

/// The newest version of the standard operator set that ONNX Runtime Training 1.19.2 knows.
const NEWEST_OPSET: i64 = 21;
/// The newest version of the format that it reads.
const NEWEST_IR: i64 = 10;
/// The domain of its own operators.
const MICROSOFT: &str = "com.microsoft";
/// The input that lets gradients begin at zero.
const RESET: &str = "lazy_reset_grad";
/// What names end in that it takes for those of gradients ([`RESET`] is one).
const GRADIENTS: [&str; 3] = ["_grad", "_grad.accumulation.buffer", "_grad.accumulation.out"];

/// What ONNX Runtime Training trains with.
#[derive(Debug)]
pub struct Artifacts {
    /// (inputs, labels, parameters, gradients so far, whether these count, dials) → (loss and other outputs, gradients); in
    /// the last stage where there are several.
    pub training: Model,
    /// The same in the stages before it.
    pub earlier: Vec<(StageOf, Model)>,
    /// (inputs, labels, parameters) → (loss and other outputs), of the model as it was.
    pub eval: Model,
    /// (learning rate, step, parameters, gradients, moments) → whether it was done.
    pub optimizer: Model,
    /// The parameters.
    pub checkpoint: Checkpoint,
    /// What the user should know: what is called otherwise there, and what the runtime does in its own way.
    pub notes: Vec<String>,
}

impl Artifacts {
    /// The artifacts for a training whose steps are such updates. Gradients of several batches add up in any case.
    ///
    /// # Errors
    ///
    /// [`Refusal::Request`] where the model needs a newer ONNX than that runtime knows, or has values that are called as
    /// the runtime's inputs are, and where the runtime has no such update.
    pub fn new(training: &Training, update: &Update) -> Result<Self, Refusal> {
        let lowered = |model: &Model| {
            let model = decompose(model, Fused::StandardAttention)?;
            model.lowered(NEWEST_OPSET, NEWEST_IR).map_err(|error| refuse(error.to_string()))
        };
        let (gradients, eval) = (lowered(&training.gradients)?, lowered(&training.eval)?);
        let stages = training.earlier.iter().map(|stage| Ok((stage.of, lowered(&stage.gradients)?)));
        let stages = stages.collect::<Result<Vec<(StageOf, Model)>, Refusal>>()?;
        let trained: Vec<&Parameter> = training.parameters.iter().filter(|parameter| parameter.trainable).collect();
        let models: Vec<&Model> = stages.iter().map(|(_, model)| model).chain([&gradients, &eval]).collect();
        let interface = Interface::of(&models, training);
        let earlier = stages.iter().map(|(of, model)| Ok((*of, interface.training(model, &trained)?)));
        let earlier = earlier.collect::<Result<Vec<_>, Refusal>>()?;
        let order = earlier.iter().map(|(of, _)| (of, stage_file(of))).chain([(&training.last, LAST.into())]);
        let order: Vec<String> = order.map(|(of, file)| format!("{file} from epoch {} on", of.epoch)).collect();
        let schedule = (!earlier.is_empty())
            .then(|| format!("train in stages, each from the checkpoint of the one before: {}", order.join(", ")));
        Ok(Self {
            training: interface.training(&gradients, &trained)?,
            eval: applied(interface.forward(&eval)?, &eval)?,
            optimizer: optimizer::model(update)?,
            checkpoint: Checkpoint::of(&training.parameters),
            notes: schedule.into_iter().chain(interface.notes()).chain(peculiarities(&trained, update)).collect(),
            earlier,
        })
    }

    /// Writes `training_model.onnx`, `eval_model.onnx`, `optimizer_model.onnx` and `checkpoint` into a folder, which is
    /// made if it is not there; besides `training_model_KEEP.onnx` for each stage before the last one. `source` is the
    /// file that the model was read from.
    pub fn write(&self, folder: &Path, source: &Path) -> Result<(), FileError> {
        let write = |path: PathBuf| move |error| FileError::Write { path, error };
        fs::create_dir_all(folder).map_err(write(folder.into()))?;
        let own = [(LAST, &self.training), ("eval_model.onnx", &self.eval), ("optimizer_model.onnx", &self.optimizer)];
        let own = own.map(|(name, model)| (name.to_owned(), model));
        for (name, model) in self.earlier.iter().map(|(of, model)| (stage_file(of), model)).chain(own) {
            let path = folder.join(name);
            let invalid = |error| FileError::Write { path: path.clone(), error: std::io::Error::other(error) };
            Model::write(model.verify().map_err(invalid)?, &path, source)?;
        }
        let path = folder.join("checkpoint");
        self.checkpoint.write(&path).map_err(write(path))
    }
}

/// The training model of the last stage.
const LAST: &str = "training_model.onnx";

/// That of a stage before it.
fn stage_file(of: &StageOf) -> String {
    format!("training_model_{}.onnx", of.keep)
}

fn refuse(reason: impl std::fmt::Display) -> Refusal {
    Refusal::Request(format!("ONNX Runtime Training 1.19.2 cannot train it: {reason}"))
}

/// What the runtime does otherwise than a training in the stock one.
fn peculiarities(trained: &[&Parameter], update: &Update) -> impl Iterator<Item = String> {
    let decays = matches!(update.optimizer, Optimizer::AdamW { weight_decay, .. } if weight_decay > 0.0);
    let others = decays && trained.iter().any(|parameter| !parameter.decay);
    let decay = others.then_some("ONNX Runtime Training decays all parameters alike, biases and norms too");
    let sum = update.accumulate.then_some(
        "ONNX Runtime Training adds gradients up from batch to batch until lazy_reset_grad: to their sum, not their mean",
    );
    [decay, sum].into_iter().flatten().map(Into::into)
}

/// What the user feeds and gets.
struct Interface {
    /// Inputs and outputs of all models: what they were called, and what they are. The loss is the first output.
    inputs: Vec<(String, String)>,
    outputs: Vec<(String, String)>,
    /// Inputs that models which train have besides, the last ones: none can be left out there.
    dials: Vec<String>,
}

impl Interface {
    fn of(models: &[&Model], training: &Training) -> Self {
        let graph = training.gradients.graph();
        let is_taken = |name: &str| models.iter().any(|model| model.graph().find_value(name).is_some());
        let named = |before: &str| {
            let mut name = before.to_owned();
            while GRADIENTS.iter().any(|end| name.ends_with(end)) || name != before && is_taken(&name) {
                name.push('_');
            }
            (before.to_owned(), name)
        };
        let is_parameter = |name: &str| training.parameters.iter().any(|parameter| parameter.name == name);
        let is_gradient = |name: &str| {
            training.parameters.iter().any(|parameter| parameter.trainable && gradient_name(&parameter.name) == name)
        };
        let inputs = graph.feeds().map(|input| graph.value(input).name());
        let outputs = graph.outputs().iter().map(|&output| graph.value(output).name());
        let mut outputs: Vec<_> = outputs.filter(|name| !is_gradient(name)).map(named).collect();
        outputs.sort_by_key(|(before, _)| *before != training.heads.loss);
        let dials = training.dials.iter().map(|dial| dial.name.clone()).collect();
        Self { inputs: inputs.filter(|name| !is_parameter(name)).map(named).collect(), outputs, dials }
    }

    fn notes(&self) -> impl Iterator<Item = String> {
        let all = self.inputs.iter().chain(&self.outputs).filter(|(before, name)| before != name);
        let renamed = all.map(|(before, name)| {
            format!("'{before}' is called '{name}': ONNX Runtime Training takes what ends in '_grad' for a gradient")
        });
        let fed = (!self.dials.is_empty()).then(|| {
            format!("ONNX Runtime Training leaves no input out: feed {} too, last, to train", self.dials.join(", "))
        });
        renamed.chain(fed)
    }

    /// A patch for the part of a model that gives the user's outputs.
    fn forward(&self, model: &Model) -> Result<Patch, Refusal> {
        let graph = model.graph();
        let find = |name: &str| graph.find_value(name).ok_or_else(|| internal(format!("'{name}' is gone")));
        let mut patch = Patch::new(model, "ort-training");
        for (before, name) in self.inputs.iter().filter(|(before, name)| before != name) {
            patch.rename_input(find(before)?, name);
        }
        (0..graph.outputs().len()).for_each(|slot| patch.remove_output(slot));
        for (before, name) in &self.outputs {
            let value = find(before)?;
            let ty = graph.value(value).ty().ok_or_else(|| internal(format!("'{before}' has no type")))?;
            patch.append_output(name, value, ty);
        }
        Ok(patch)
    }

    fn training(&self, model: &Model, trained: &[&Parameter]) -> Result<Model, Refusal> {
        let graph = model.graph();
        let flag = TensorType { dtype: DataType::Bool, dims: Some(vec![DimSpec::Known(1)]) };
        let name = |parameter: &Parameter, kind: &str| format!("{}_grad.accumulation.{kind}", parameter.name);
        // These names mean something: a value that has one already would change them.
        let own = trained.iter().flat_map(|parameter| ["buffer", "out"].map(|kind| name(parameter, kind)));
        for name in own.chain([RESET.into()]) {
            if graph.find_value(&name).is_some() {
                return Err(refuse(format!(
                    "it has a value '{name}', which is what an input or output is to be called"
                )));
            }
        }
        let mut patch = self.forward(model)?;
        for dial in &self.dials {
            let value = graph.find_value(dial).ok_or_else(|| internal(format!("'{dial}' is gone")))?;
            patch.externalise(value, dial);
        }
        patch.import(MICROSOFT, 1);
        let buffers: Vec<ValueId> =
            trained.iter().map(|parameter| patch.feed(&name(parameter, "buffer"), &parameter.tensor.ty())).collect();
        let reset = patch.feed(RESET, &flag);
        for (&parameter, buffer) in trained.iter().zip(buffers) {
            let gradient = gradient_name(&parameter.name);
            let gradient = graph.find_value(&gradient).ok_or_else(|| internal(format!("'{gradient}' is gone")))?;
            let inputs = [buffer, gradient, reset].map(Some).to_vec();
            let accumulate = OpType::of(MICROSOFT, "InPlaceAccumulatorV2");
            let done = patch.call(accumulate, &name(parameter, "flag"), inputs, &[], 1)[0];
            patch.append_output(&name(parameter, "out"), done, flag.clone());
        }
        applied(patch, model)
    }
}

fn applied(patch: Patch, model: &Model) -> Result<Model, Refusal> {
    let (model, _) = patch.apply(model).map_err(internal)?;
    model.verify().map_err(internal)?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use vitrim_ir::{GraphBuilder, Tensor};

    use super::*;
    use crate::Request;
    use crate::loss::Loss;
    use crate::parameters::Selection;

    const UPDATE: Update = Update { optimizer: Optimizer::ADAMW, clip: None, ema: None, accumulate: true };

    /// `y = Neg(Dropout(x * w)) + b` with an inner value called `inner`, as an export for training has it; `b` is frozen.
    fn training(input: &str, inner: &str, output: &str) -> Training {
        let two =
            TensorType { dtype: DataType::F32, dims: Some(vec![DimSpec::Named("batch".into()), DimSpec::Known(2)]) };
        let mut graph = GraphBuilder::new();
        let x = graph.input(input, Some(&two));
        let w = graph.initializer("w", Tensor::f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
        let b = graph.initializer("b", Tensor::f32s(&[2], &[1.0, 2.0]));
        let [ratio, acts] = [
            graph.initializer("ratio", Tensor::f32(0.5)),
            graph.initializer("acts", Tensor::integers(DataType::Bool, &[], &[1])),
        ];
        let product = graph.op("MatMul", "product", &[x, w], &[]);
        let operands = [product, ratio, acts].map(Some).to_vec();
        let dropped = graph.call(OpType::standard("Dropout"), "dropped", operands, &[], 2)[0];
        let inner = graph.op("Neg", inner, &[dropped], &[]);
        let y = graph.op("Add", "sum", &[inner, b], &[]);
        graph.output(output, y, Some(&two));
        let model = graph.into_model(8, &[("", 13)], Vec::new());
        let selection = Selection { freeze: vec!["b".into()], unfreeze: Vec::new() };
        Training::of(&model, &Request { selection, ..Request::new(Loss::MeanSquaredError) }).unwrap()
    }

    fn inputs(model: &Model) -> Vec<&str> {
        model.graph().inputs().iter().map(|&value| model.graph().value(value).name()).collect()
    }

    fn outputs(model: &Model) -> Vec<&str> {
        model.graph().outputs().iter().map(|&value| model.graph().value(value).name()).collect()
    }

    #[test]
    fn training_and_evaluation_differ_in_gradients_and_chance() {
        let artifacts = Artifacts::new(&training("x", "inner", "y"), &UPDATE).unwrap();
        let outs = ["loss", "per_example_loss", "y", "w_grad.accumulation.out"];
        assert_eq!(inputs(&artifacts.training), ["x", "labels", "w", "b", "w_grad.accumulation.buffer", RESET]);
        assert_eq!(outputs(&artifacts.training), outs);
        assert_eq!(inputs(&artifacts.eval), ["x", "labels", "w", "b"]);
        assert_eq!(outputs(&artifacts.eval), outs[..3]);
        let acts = |model: &Model| model.graph().nodes().any(|(_, node)| node.is("Dropout") && node.input(2).is_some());
        assert!(acts(&artifacts.training) && !acts(&artifacts.eval));
        let held = |list: &[(String, Tensor)]| list.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(
            (held(&artifacts.checkpoint.trained), held(&artifacts.checkpoint.frozen)),
            (vec!["w".into()], vec!["b".into()])
        );
        let sum = "ONNX Runtime Training adds gradients up from batch to batch until lazy_reset_grad: to their sum, not their \
                   mean";
        assert_eq!(artifacts.notes, [sum]);
    }

    #[test]
    fn names_that_the_runtime_would_misread_are_changed_or_refused() {
        let update = Update { accumulate: false, ..UPDATE };
        let artifacts = Artifacts::new(&training("x_grad", "x_grad_", "y_grad"), &update).unwrap();
        assert_eq!(inputs(&artifacts.eval)[0], "x_grad__");
        assert_eq!(outputs(&artifacts.eval)[2], "y_grad_");
        let note = |before, name| {
            format!("'{before}' is called '{name}': ONNX Runtime Training takes what ends in '_grad' for a gradient")
        };
        assert_eq!(artifacts.notes, [note("x_grad", "x_grad__"), note("y_grad", "y_grad_")]);
        for taken in [RESET, "w_grad.accumulation.buffer", "w_grad.accumulation.out"] {
            assert_eq!(
                Artifacts::new(&training("x", taken, "y"), &update).unwrap_err().to_string(),
                format!(
                    "ONNX Runtime Training 1.19.2 cannot train it: it has a value '{taken}', which is what an input or \
                     output is to be called"
                )
            );
        }
    }

    #[test]
    fn decay_of_some_parameters_alone_is_not_to_be_had() {
        let mut training = training("x", "inner", "y");
        let told = |training: &Training, optimizer: Optimizer| {
            let update = Update { optimizer, accumulate: false, ..UPDATE };
            Artifacts::new(training, &update).unwrap().notes
        };
        training.parameters[0].decay = false;
        let note = "ONNX Runtime Training decays all parameters alike, biases and norms too";
        assert_eq!(told(&training, Optimizer::ADAMW), [note]);
        assert!(told(&training, Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0 }).is_empty());
    }
}

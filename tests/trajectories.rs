//! Trainings of many steps, against the same in float64: a ViT-Ti of 12 blocks in stock ONNX Runtime, with native kernels
//! and without, in ONNX Runtime Training 1.19.2, and in Node with onnxruntime-web.

mod common;

use std::ffi::OsStr;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;

use common::ort_training::{Client, batch, expected, named, needed, output, python, script};
use common::{Folder, conclude, fed, fixtures, kernels, load, ort, relative, run, vector};
use ndarray::{ArrayD, arr0};
use serde_json::{Value as Json, json};
use vitrim::runtime::{Backend, Feeds};
use vitrim::tensor::npz::read_npz;
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::Model;
use vitrim_train::artifacts::{Artifacts, Checkpoint};
use vitrim_train::loss::Loss;
use vitrim_train::manifest::{Initial, Manifest, StateEntry};
use vitrim_train::optimizer::{Optimizer, Update};
use vitrim_train::stock::stock;
use vitrim_train::{Request, Training};

/// What a loss may differ from a training in float64, relative to it: float32 roundings that add up over the steps.
const LOSS_TOLERANCE: f64 = 1e-5;
/// How far from there a parameter may end, relative to the way that it went (norms), besides the rounding of itself in each
/// step. AdamW divides gradients by their own size: where they are no larger than roundings, entries go at random.
const PARAMETER_TOLERANCE: f64 = 1e-3;
/// What one version of the runtime may evaluate to otherwise than another.
const EVALUATION_TOLERANCE: f64 = 1e-5;

const STEPS: usize = 50;
const RATE: f64 = 1e-4;
/// The one learning rate that onnxruntime-web has, too high for a deep model: roundings would grow on the way.
const RATE_OF_THE_WEB: f64 = 1e-3;
const DECAY: f64 = 0.05;
/// Gradients have norms about 19 in the beginning.
const CLIP: f64 = 1.0;

const fn adam(clip: Option<f64>) -> Update {
    let optimizer = Optimizer::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: DECAY };
    Update { optimizer, clip, ema: None, accumulate: false }
}

/// Numpy, and the model's definition.
fn reference(arguments: &[&OsStr]) {
    let python = std::env::var_os("VITRIM_PYTHON").expect("`cargo xtask test` says which Python has numpy");
    // Threads of its matrix products wait actively, in the way of other tests.
    output(Command::new(python).env("OPENBLAS_NUM_THREADS", "1").arg(script("python/vit_training.py")).args(arguments));
}

/// A model, and its training in float64.
struct Trajectory {
    folder: Folder,
    model: PathBuf,
    arrays: NamedTensors,
}

impl Trajectory {
    /// Of the ViT-Ti. `decaying` are the parameters that do: `all` of them or `matrices` alone.
    fn new(clip: Option<f64>, decaying: &str) -> Self {
        let folder = Folder::new();
        let model = folder.at("model.onnx");
        reference(&["model".as_ref(), model.as_ref()]);
        Self::of(folder, model, 3, RATE, clip, decaying)
    }

    fn of(folder: Folder, model: PathBuf, heads: usize, rate: f64, clip: Option<f64>, decaying: &str) -> Self {
        let arrays = folder.at("reference.npz");
        let numbers =
            [heads as f64, STEPS as f64, rate, DECAY, clip.unwrap_or(0.0), 4.0].map(|number| number.to_string());
        let mut arguments: Vec<&OsStr> = vec!["train".as_ref(), model.as_ref(), arrays.as_ref()];
        arguments.extend(numbers.iter().map(OsStr::new));
        arguments.push(decaying.as_ref());
        reference(&arguments);
        let arrays = read_npz(&arrays).unwrap_or_else(|error| panic!("{error:#}"));
        Self { folder, model, arrays }
    }

    fn training(&self) -> Training {
        let model = Model::read(&self.model).unwrap_or_else(|error| panic!("{error}"));
        let loss = Loss::CrossEntropy { label_smoothing: 0.0, soft_targets: false };
        Training::of(&model, &Request::new(loss)).unwrap_or_else(|refusal| panic!("{refusal}"))
    }

    /// Writes what ONNX Runtime Training trains with.
    fn write_artifacts(&self, clip: Option<f64>) {
        let artifacts = Artifacts::new(&self.training(), &adam(clip)).unwrap_or_else(|refusal| panic!("{refusal}"));
        artifacts.write(self.folder.path(), &self.model).unwrap_or_else(|error| panic!("{error}"));
    }

    /// The batch of a step.
    fn batch(&self, step: usize) -> [(&'static str, Tensor); 2] {
        ["images", "labels"].map(|name| (name, batch(named(&self.arrays, name), step)))
    }

    fn check_losses(&self, what: &str, losses: &[f64]) {
        let reference = named(&self.arrays, "losses").to_f64().into_raw_vec_and_offset().0;
        assert_eq!(losses.len(), reference.len());
        let [first, last] = [reference[0], reference[STEPS - 1]];
        assert!(last < 0.9 * first, "it learns: {reference:?}");
        let apart = losses.iter().zip(&reference).map(|(loss, own)| (loss - own).abs() / own.abs()).fold(0.0, f64::max);
        println!("{what}: {STEPS} steps, loss {first} to {last}, {apart:e} off");
        assert!(apart < LOSS_TOLERANCE, "{what}: {apart:e}: {losses:?}\n{reference:?}");
    }

    /// Where all parameters are after the last step.
    fn check_parameters(&self, what: &str, get: impl Fn(&str) -> Tensor) {
        let norm = |array: &ArrayD<f64>| array.iter().map(|x| x * x).sum::<f64>().sqrt();
        let (mut count, mut failures, mut worst) = (0, Vec::new(), 0.0);
        for parameter in self.training().parameters {
            let name = &parameter.name;
            let end = expected(named(&self.arrays, &format!("param.{name}"))).to_f64();
            let mut apart = get(name).to_f64() - &end;
            if name.ends_with("qkv.bias") {
                // A softmax does not see the bias of keys: its gradient is 0, which AdamW divides by itself.
                let width = apart.len() / 3;
                apart.slice_each_axis_mut(|_| ndarray::Slice::from(width..2 * width)).fill(0.0);
            }
            let rounding = STEPS as f64 * f64::from(f32::EPSILON) / 2.0 * norm(&end);
            let apart = (norm(&apart) - rounding).max(0.0) / norm(&(end - fed(&parameter.tensor).to_f64()));
            (count, worst) = (count + 1, f64::max(worst, apart));
            if apart > PARAMETER_TOLERANCE {
                failures.push(format!("{what}, {name}: {apart:e} off"));
            }
        }
        println!("{what}: parameters {worst:e} off");
        conclude("parameters", count, &failures);
    }
}

/// What everything here is measured by is itself measured by the oracle, whose vectors are float32.
#[test]
fn the_reference_has_the_gradients_of_the_oracle() {
    let folder = Folder::new();
    let vectors = fixtures().join("vectors");
    let files = ["weights_a.npz", "model_a_00_none.npz", "grad_a_00_none.npz"].map(|name| vectors.join(name));
    let out = folder.at("gradients.npz");
    let [weights, images, labels] = [0, 1, 2].map(|at| files[at].as_os_str());
    reference(&["gradients".as_ref(), weights, images, labels, out.as_ref(), "2".as_ref()]);
    let (own, oracle) = (read_npz(&out).unwrap_or_else(|error| panic!("{error:#}")), vector("grad_a_00_none.npz"));
    let mut count = 0;
    for (name, gradient) in oracle.iter().filter_map(|(name, one)| Some((name.strip_prefix("grad.")?, one))) {
        let apart = relative(gradient, named(&own, name));
        assert!(apart < f64::from(f32::EPSILON), "{name}: {apart:e}");
        count += 1;
    }
    assert_eq!(count, own.names().count());
}

/// A client of the stock runtime: it feeds back what a step gives.
struct Stock<'t> {
    trajectory: &'t Trajectory,
    manifest: Manifest,
    graph: PathBuf,
}

/// Parameters and moments by the names of the inputs.
type State = Vec<(String, Tensor)>;

impl<'t> Stock<'t> {
    fn new(trajectory: &'t Trajectory) -> (Self, State) {
        let training = trajectory.training();
        let first = |entry: &StateEntry| {
            let parameter = training.parameters.iter().find(|parameter| parameter.name == entry.parameter);
            let start = fed(&parameter.expect("a parameter").tensor);
            let zeros = Tensor::from_f64(DType::F32, &ArrayD::zeros(start.shape()));
            if entry.initial == Initial::Parameter { start } else { zeros }
        };
        let made = stock(trajectory.training(), Some(&adam(None))).unwrap_or_else(|refusal| panic!("{refusal}"));
        let state = made.manifest.state.iter().map(|entry| (entry.input.clone(), first(entry))).collect();
        let (_, train) = made.graphs.iter().find(|(file, _)| file == "train.onnx").expect("the graph");
        let graph = trajectory.folder.at("train.onnx");
        Model::write(train.verify().unwrap(), &graph, &trajectory.model).unwrap_or_else(|error| panic!("{error}"));
        (Self { trajectory, manifest: made.manifest, graph }, state)
    }

    /// Takes steps in a session of its own, and gives their losses.
    fn run(&self, backend: &dyn Backend, steps: Range<usize>, state: &mut State) -> Vec<f64> {
        let mut session = load(backend, &self.graph);
        let mut losses = Vec::new();
        for step in steps {
            let mut feeds = Feeds::default();
            let scalar = |dtype, value: f64| Tensor::from_f64(dtype, &arr0(value).into_dyn());
            feeds.push("learning_rate", scalar(DType::F32, RATE));
            feeds.push("step", scalar(DType::I64, (step + 1) as f64));
            self.trajectory.batch(step).into_iter().for_each(|(name, tensor)| feeds.push(name, tensor));
            state.iter().for_each(|(name, tensor)| feeds.push(name.clone(), tensor.clone()));
            let outputs = session.run(&feeds).unwrap_or_else(|error| panic!("{error:#}"));
            let get = |name: &str| outputs.get(name).expect("an output").clone();
            losses.push(get(&self.manifest.loss).to_f64().sum());
            *state = self.manifest.state.iter().map(|entry| (entry.input.clone(), get(&entry.output))).collect();
        }
        losses
    }
}

#[test]
fn stock_onnx_runtime_trains_as_float64_does_and_resumes() {
    let trajectory = Trajectory::new(None, "matrices");
    let (client, initial) = Stock::new(&trajectory);
    for backend in [ort(), kernels()] {
        let what = backend.name().to_string();
        let mut state = initial.clone();
        let losses = client.run(backend.as_ref(), 0..STEPS, &mut state);
        trajectory.check_losses(&what, &losses);
        let get = |name: &str| state.iter().find(|(input, _)| input == name).expect("a parameter").1.clone();
        trajectory.check_parameters(&what, get);

        // Stopped half way and resumed.
        let mut resumed = initial.clone();
        client.run(backend.as_ref(), 0..STEPS / 2, &mut resumed);
        let rest = client.run(backend.as_ref(), STEPS / 2..STEPS, &mut resumed);
        assert_eq!(rest, losses[STEPS / 2..]);
        for ((name, tensor), (_, again)) in state.iter().zip(&resumed) {
            assert_eq!(tensor.to_f64(), again.to_f64(), "{what}, {name}");
        }
    }
}

#[test]
fn onnx_runtime_training_trains_as_float64_does_and_resumes() {
    let Some(python) = python() else { return };
    for clip in [None, Some(CLIP)] {
        let trajectory = Trajectory::new(clip, "all");
        trajectory.write_artifacts(clip);
        let folder = &trajectory.folder;
        let training = Client { python: &python, artifacts: folder.path(), data: &folder.at("reference.npz") };
        let (half, end, exported) = (folder.at("half"), folder.at("end"), folder.at("exported.onnx"));
        let whole: [&OsStr; 5] =
            ["--save".as_ref(), end.as_ref(), "--export".as_ref(), exported.as_ref(), "logits".as_ref()];
        let whole = training.run(0..STEPS, RATE, &whole);
        let losses = named(&whole, "out.loss").to_f64().into_raw_vec_and_offset().0;
        let what = format!("ONNX Runtime Training, clip {clip:?}");
        trajectory.check_losses(&what, &losses);
        trajectory.check_parameters(&what, |name| named(&whole, &format!("param.{name}")).clone());

        // Stopped half way and resumed.
        training.run(0..STEPS / 2, RATE, &["--save".as_ref(), half.as_ref()]);
        let rest = training.run(STEPS / 2..STEPS, RATE, &["--checkpoint".as_ref(), half.as_ref()]);
        let (resumed, straight) = (named(&rest, "out.loss").to_f64(), &losses[STEPS / 2..]);
        if clip.is_none() {
            assert_eq!(resumed.into_raw_vec_and_offset().0, straight);
            for (name, tensor) in rest.iter().filter(|(name, _)| !name.starts_with("out.")) {
                assert_eq!(tensor.to_f64(), named(&whole, name).to_f64(), "{name}");
            }
        } else {
            // With clipping, the runtime does not give the same to the bit twice even without a stop between.
            let apart = resumed.iter().zip(straight).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
            println!("resumed {apart:e} off");
            assert!(apart < LOSS_TOLERANCE, "{apart:e}");
        }

        // Checkpoints of the runtime's own are read.
        let saved = Checkpoint::read(&end).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(saved.trained.len(), whole.names().filter(|name| name.starts_with("param.")).count());
        for (name, tensor) in saved.parameters() {
            let own = named(&whole, &format!("param.{name}")).to_f64().into_raw_vec_and_offset().0;
            assert_eq!(tensor.to_f64s().expect("floats").as_ref(), own, "{name}");
        }

        // The model that it exports gives in the stock runtime what it evaluates to: another version, so other roundings.
        let mut feeds = Feeds::default();
        let [(name, images), _] = trajectory.batch(STEPS - 1);
        feeds.push(name, images);
        let outputs = run(ort().as_ref(), &exported, &feeds);
        let apart = relative(named(&whole, "eval.logits"), outputs.get("logits").expect("an output"));
        println!("exported {apart:e} off");
        assert!(apart < EVALUATION_TOLERANCE, "{apart:e}");
    }
}

/// The browser's runtime, in Node.
#[test]
fn the_web_trains_as_float64_does() {
    let Some(package) = needed("VITRIM_ORT_WEB", "onnxruntime-web") else { return };
    let model = fixtures().join("vectors/weights_a.onnx");
    let trajectory = Trajectory::of(Folder::new(), model, 2, RATE_OF_THE_WEB, None, "all");
    trajectory.write_artifacts(None);
    let entry = |(name, tensor): (&str, Tensor)| {
        let kind = if tensor.dtype() == DType::I64 { "int64" } else { "float32" };
        let data = tensor.to_f64().into_raw_vec_and_offset().0;
        (name.to_owned(), json!({ "type": kind, "dims": tensor.shape(), "data": data }))
    };
    let batches = (0..STEPS).map(|step| trajectory.batch(step).map(entry).into_iter().collect::<Json>());
    let data = trajectory.folder.write("data.json", Json::from_iter(batches).to_string());
    let said = output(Command::new("node").arg(script("node/ort_web_training.js")).args([
        &package,
        trajectory.folder.path(),
        &data,
    ]));
    let result: Json = serde_json::from_str(said.trim()).unwrap_or_else(|error| panic!("{error}: {said}"));
    let number = |value: &Json| value.as_f64().expect("a number");
    let losses: Vec<f64> = result["losses"].as_array().expect("losses").iter().map(number).collect();
    trajectory.check_losses("onnxruntime-web", &losses);
    assert!(number(&result["before"]) != number(&result["after"]));
}

//! ONNX Runtime Training 1.19.2, the real one, with the artifacts that vitrim writes for it. `cargo xtask test` installs it;
//! where it cannot, this says so and tests nothing. tests/trajectories.rs has whole trainings.

mod common;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;

use common::ort_training::{Client, batch, expected, named, python, save};
use common::vectors::Case;
use common::{Folder, conclude, fed, fixtures, ort, relative, run, vector, vector_index, zoo};
use ndarray::{ArrayD, Axis, concatenate};
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::{DataType, DimSpec, Function, GraphBuilder, Model, OpType, Tensor as IrTensor, TensorType};
use vitrim_passes::recipe::{ExpandSpec, KeepSpec, PassSpec, PruneSpec, Recipe};
use vitrim_train::artifacts::{Artifacts, Checkpoint};
use vitrim_train::loss::Loss;
use vitrim_train::optimizer::{Optimizer, Update};
use vitrim_train::parameters::Selection;
use vitrim_train::{Request, Training, gradient_name};

/// What a gradient may differ from the oracle's, in float64, relative to its largest entry.
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// What is evaluated after a step may differ from the same in the stock runtime, another version: roundings.
const EVALUATION_TOLERANCE: f64 = 1e-5;
/// A learning rate where none matters.
const RATE: f64 = 1e-3;

/// Takes what it is told off gradients.
const SGD: Update = of(Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0 });

const fn of(optimizer: Optimizer) -> Update {
    Update { optimizer, clip: None, ema: None, accumulate: false }
}

/// A model that is to tell classes.
fn training(path: &Path, passes: Vec<PassSpec>) -> Result<Training, String> {
    let model = Model::read(path).unwrap_or_else(|error| panic!("{error}"));
    let loss = Loss::CrossEntropy { label_smoothing: 0.0, soft_targets: false };
    let request = Request { recipe: Recipe { passes }, ..Request::new(loss) };
    Training::of(&model, &request).map_err(|refusal| refusal.to_string())
}

fn write(artifacts: &Artifacts, folder: &Path, source: &Path) {
    artifacts.write(folder, source).unwrap_or_else(|error| panic!("{error}"));
}

/// One batch as the first of a training.
fn first(tensor: &Tensor, dtype: DType) -> Tensor {
    Tensor::from_f64(dtype, &tensor.to_f64().insert_axis(Axis(0)))
}

/// Of the model as it is, merged, pruned and expanded: the graphs that evaluate are of the model as it is.
#[test]
fn gradients_are_what_the_oracle_says() {
    let Some(python) = python() else { return };
    let index = vector_index();
    let (mut count, mut failures, mut evaluated) = (0, Vec::new(), 0.0);
    for json in index["grads"].as_array().expect("the index has gradients") {
        let text = |key: &str| json[key].as_str().expect("a file");
        let case = Case::named(text("model"), &index, false);
        let (arrays, inputs) = (vector(text("file")), vector(&case.name));
        for source in case.files() {
            let folder = Folder::new();
            let training = training(&source, case.recipe.passes.clone()).unwrap_or_else(|refusal| panic!("{refusal}"));
            write(&Artifacts::new(&training, &SGD).unwrap(), folder.path(), &source);
            let mut data = NamedTensors::default();
            data.push("images", first(named(&inputs, "in_images"), DType::F32));
            data.push("labels", first(named(&arrays, "labels"), DType::I64));
            let path = folder.at("data.npz");
            save(&path, &data);
            let result = Client { python: &python, artifacts: folder.path(), data: &path }.run(0..1, 1.0, &[]);
            let before = Checkpoint::read(&folder.at("checkpoint")).unwrap_or_else(|error| panic!("{error}"));
            let mut feeds = Feeds::default();
            for (name, tensor) in before.parameters() {
                let gradient = named(&result, &format!("grad.{name}"));
                let apart = relative(&expected(named(&arrays, &format!("grad.{name}"))), gradient);
                // A step of rate 1 takes the gradient off.
                let stepped = Tensor::from_f64(DType::F32, &(fed(tensor).to_f64() - gradient.to_f64()));
                let after = named(&result, &format!("param.{name}"));
                let step = relative(&stepped, after);
                feeds.push(name, after.clone());
                count += 1;
                if apart > GRADIENT_TOLERANCE || step > f64::from(f32::EPSILON) {
                    failures.push(format!("{} {name}: gradient {apart:e}, step {step:e} off", source.display()));
                }
            }
            let all = arrays.names().filter(|name| name.starts_with("grad.")).count();
            assert_eq!(before.parameters().count(), all);

            for name in ["images", "labels"] {
                feeds.push(name, batch(named(&data, name), 0));
            }
            let path = folder.at("eval.onnx");
            Model::write(training.eval.verify().unwrap(), &path, &source).unwrap_or_else(|error| panic!("{error}"));
            let outputs = run(ort().as_ref(), &path, &feeds);
            let apart = relative(outputs.get("logits").expect("an output"), named(&result, "eval.logits"));
            evaluated = f64::max(evaluated, apart);
            if apart > EVALUATION_TOLERANCE {
                failures.push(format!("{} {}: evaluation {apart:e} off", case.name, source.display()));
            }
        }
    }
    println!("evaluation {evaluated:e} off");
    conclude("gradients", count, &failures);
}

/// For any model: what gathers in the runtime is what the graph of gradients gives in the stock one.
#[test]
fn models_of_the_zoo_train() {
    let Some(python) = python() else { return };
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let prepared = training(&entry.model, Vec::new()).and_then(|training| {
            let artifacts = Artifacts::new(&training, &of(Optimizer::ADAMW)).map_err(|refusal| refusal.to_string())?;
            Ok((training, artifacts))
        });
        let (training, artifacts) = match prepared {
            Ok(prepared) => prepared,
            Err(reason) => {
                println!("{}: {reason}", entry.name);
                continue;
            }
        };
        let folder = Folder::new();
        write(&artifacts, folder.path(), &entry.model);
        let recorded = entry.feeds(common::load(ort().as_ref(), &entry.model).as_ref()).remove(0);
        let (mut feeds, mut data) = (Feeds::default(), NamedTensors::default());
        for (name, tensor) in recorded.iter() {
            feeds.push(name, tensor.clone());
            data.push(name, first(tensor, tensor.dtype()));
        }
        let size = feeds.iter().next().expect("an input").1.shape()[0];
        let labels: Vec<i64> = (0..size as i64).collect();
        let labels = Tensor::from_vec(&[size], labels).expect("one for each image");
        data.push("labels", first(&labels, DType::I64));
        feeds.push("labels", labels);
        artifacts.checkpoint.parameters().for_each(|(name, tensor)| feeds.push(name, fed(tensor)));
        let (path, plain) = (folder.at("data.npz"), folder.at("gradients.onnx"));
        save(&path, &data);
        Model::write(training.gradients.verify().unwrap(), &plain, &entry.model)
            .unwrap_or_else(|error| panic!("{error}"));
        let stock = run(ort().as_ref(), &plain, &feeds);
        let result = Client { python: &python, artifacts: folder.path(), data: &path }.run(0..1, RATE, &[]);
        let mut worst = 0.0;
        for parameter in training.parameters.iter().filter(|parameter| parameter.trainable) {
            let stock = stock.get(&gradient_name(&parameter.name)).expect("an output");
            let apart = relative(stock, named(&result, &format!("grad.{}", parameter.name)));
            // The gradient of a bias of keys is 0 but for roundings.
            let tiny = stock.to_f64().iter().all(|x| x.abs() < 1e-6);
            if apart > GRADIENT_TOLERANCE && !tiny {
                failures.push(format!("{}: {} {apart:e} off", entry.name, parameter.name));
            }
            worst = f64::max(worst, if tiny { 0.0 } else { apart });
        }
        println!("{}: {} parameters, {worst:e} off", entry.name, training.parameters.len());
        count += 1;
    }
    conclude("models", count, &failures);
    assert!(count >= 10, "of fixtures/zoo alone ten can be trained");
}

/// What the runtime tells apart by names: inputs and outputs called like gradients, parameters that are frozen. Besides,
/// elements in a file of their own, local functions, and versions that it does not know.
#[test]
fn names_frozen_parameters_functions_and_split_checkpoints_are_understood() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let ty = |dims: &[DimSpec]| TensorType { dtype: DataType::F32, dims: Some(dims.to_vec()) };
    let (any, known) = (DimSpec::Named("batch".into()), DimSpec::Known);
    let mut body = GraphBuilder::new();
    let x = body.input("x", None);
    let twice = body.op("Add", "twice", &[x, x], &[]);
    body.output("y", twice, None);
    let op = OpType::of("test", "Twice");
    let function = Function::new(op.clone(), Vec::new(), body.finish(), 23, "2x");
    let mut graph = GraphBuilder::new();
    let x = graph.input("x_grad", Some(&ty(&[any.clone(), known(3)])));
    let x = graph.call(op, "twice", vec![Some(x)], &[], 1)[0];
    let first =
        graph.initializer("first", IrTensor::f32s(&[3, 4], &std::array::from_fn::<f32, 12, _>(|at| at as f32 - 5.0)));
    let second = graph.initializer("second", IrTensor::f32s(&[4, 2], &[0.5, -1.0, 0.25, 2.0, -0.75, 1.0, 1.5, -0.5]));
    let hidden = graph.op("MatMul", "hidden", &[x, first], &[]);
    let hidden = graph.op("Tanh", "bent", &[hidden], &[]);
    let y = graph.op("MatMul", "y", &[hidden, second], &[]);
    graph.output("y_grad", y, Some(&ty(&[any, known(2)])));
    // Newer versions than the runtime knows, which nothing in it needs.
    let model = graph.into_model(11, &[("", 23), ("test", 1)], vec![function]);
    let selection = Selection { freeze: vec!["first".into()], unfreeze: Vec::new() };
    let request = Request { selection, ..Request::new(Loss::MeanSquaredError) };
    let graphs = Training::of(&model, &request).unwrap_or_else(|refusal| panic!("{refusal}"));
    let artifacts = Artifacts::new(&graphs, &SGD).unwrap_or_else(|refusal| panic!("{refusal}"));
    write(&artifacts, folder.path(), &folder.at("no source.onnx"));

    let mut data = NamedTensors::default();
    data.push("x_grad_", Tensor::from_vec(&[1, 1, 3], vec![0.1f32, 0.2, -0.05]).unwrap());
    data.push("labels", Tensor::from_vec(&[1, 1, 2], vec![1.0f32, -1.0]).unwrap());
    let path = folder.at("data.npz");
    save(&path, &data);
    let client = Client { python: &python, artifacts: folder.path(), data: &path };
    let exported = folder.at("exported.onnx");
    let whole = client.run(0..1, 0.5, &["--export".as_ref(), exported.as_ref(), "y_grad_".as_ref()]);
    assert_eq!(named(&whole, "param.first").to_f64().into_raw_vec_and_offset().0[0], -5.0);
    assert_ne!(named(&whole, "param.second").to_f64().into_raw_vec_and_offset().0[0], 0.5);
    assert!(whole.get("grad.first").is_none() && whole.get("grad.second").is_some());

    let mut feeds = Feeds::default();
    feeds.push("x_grad_", batch(named(&data, "x_grad_"), 0));
    let outputs = run(ort().as_ref(), &exported, &feeds);
    assert!(relative(named(&whole, "eval.y_grad_"), outputs.get("y_grad_").expect("an output")) < 1e-6);

    let split = folder.at("split");
    artifacts.checkpoint.write_split(&split).unwrap();
    let again = client.run(0..1, 0.5, &["--checkpoint".as_ref(), split.as_ref()]);
    for (name, tensor) in whole.iter() {
        assert_eq!(tensor.to_f64(), named(&again, name).to_f64(), "{name}");
    }
}

/// A few images and labels of the oracle's, for each of so many steps.
fn batches(steps: usize) -> NamedTensors {
    let (inputs, arrays) = (vector("model_a_00_none.npz"), vector("grad_a_00_none.npz"));
    let mut data = NamedTensors::default();
    for (name, tensor, dtype) in
        [("images", named(&inputs, "in_images"), DType::F32), ("labels", named(&arrays, "labels"), DType::I64)]
    {
        let one = tensor.to_f64().insert_axis(Axis(0));
        data.push(
            name,
            Tensor::from_f64(dtype, &concatenate(Axis(0), &vec![one.view(); steps]).expect("of one shape")),
        );
    }
    data
}

/// How much is kept is an input of the model that trains, and not of the one that evaluates: what it is told there, a graph
/// that was made for it does in the stock runtime.
#[test]
fn dials_are_inputs_of_the_training_model() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let source = fixtures().join("vectors/weights_a.onnx");
    let prune = |keep: f64, share: f64, runtime_keep: bool| {
        let (keep, attention_keep) = (KeepSpec::Constant(keep), Some(share));
        let spec = PruneSpec { keep, at: Some(vec![1]), attention_keep, runtime_keep, ..PruneSpec::default() };
        training(&source, vec![PassSpec::Prune(spec)]).unwrap_or_else(|refusal| panic!("{refusal}"))
    };
    let artifacts = Artifacts::new(&prune(0.7, 0.3, true), &SGD).unwrap_or_else(|refusal| panic!("{refusal}"));
    let note = "ONNX Runtime Training leaves no input out: feed keep, attention_keep too, last, to train";
    assert_eq!(artifacts.notes, [note]);
    write(&artifacts, folder.path(), &source);
    let (mut count, mut failures, mut before) = (0, Vec::new(), None);
    for (keep, share) in [(0.5, 0.5), (0.7, 0.3), (1.0, 1.0)] {
        let mut data = batches(1);
        for (name, value) in [("keep", keep), ("attention_keep", share)] {
            data.push(name, Tensor::from_vec(&[1], vec![value]).expect("one for each step"));
        }
        let path = folder.at("data.npz");
        save(&path, &data);
        let result = Client { python: &python, artifacts: folder.path(), data: &path }.run(0..1, RATE, &[]);
        let loss = named(&result, "out.loss").to_f64().sum();
        assert!(before.replace(loss).is_none_or(|before: f64| (before - loss).abs() > 1e-4), "what is told acts");

        let made = prune(keep, share, false);
        let mut feeds = Feeds::default();
        for name in ["images", "labels"] {
            feeds.push(name, batch(named(&data, name), 0));
        }
        for parameter in &made.parameters {
            feeds.push(parameter.name.clone(), fed(&parameter.tensor));
        }
        let plain = folder.at("gradients.onnx");
        Model::write(made.gradients.verify().unwrap(), &plain, &source).unwrap_or_else(|error| panic!("{error}"));
        let stock = run(ort().as_ref(), &plain, &feeds);
        for parameter in &made.parameters {
            let stock = stock.get(&gradient_name(&parameter.name)).expect("an output");
            let apart = relative(stock, named(&result, &format!("grad.{}", parameter.name)));
            count += 1;
            if apart > GRADIENT_TOLERANCE {
                failures.push(format!("{keep}, {share}: {} {apart:e} off", parameter.name));
            }
        }
    }
    conclude("settings", count, &failures);
}

/// What a parameter may be from AdamW in float64 on the runtime's own gradients, as a share of the learning rate, which is
/// about what a step moves it by: float32 roundings of a step, besides those of the parameter itself.
const STEP_TOLERANCE: f64 = 1e-4;

/// Two steps with half of the tokens, and two with all, from the checkpoint of the former: moments and the number of the
/// step go on.
#[test]
fn stages_go_on_from_the_checkpoint_of_the_stage_before() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let source = fixtures().join("vectors/weights_a.onnx");
    let expand = ExpandSpec { epochs: vec![0, 1], keep: vec![0.5, 1.0], ..ExpandSpec::default() };
    let training = training(&source, vec![PassSpec::Expand(expand)]).unwrap_or_else(|refusal| panic!("{refusal}"));
    let artifacts = Artifacts::new(&training, &of(Optimizer::ADAMW)).unwrap_or_else(|refusal| panic!("{refusal}"));
    write(&artifacts, folder.path(), &source);
    let data = folder.at("data.npz");
    save(&data, &batches(4));
    let Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } = Optimizer::ADAMW else { panic!("it is AdamW") };
    let client = Client { python: &python, artifacts: folder.path(), data: &data };
    let mut state: HashMap<&str, [ArrayD<f64>; 3]> = HashMap::new();
    for parameter in &training.parameters {
        let first = fed(&parameter.tensor).to_f64();
        let zeros = ArrayD::zeros(first.shape());
        state.insert(&parameter.name, [first, zeros.clone(), zeros]);
    }
    let (mut count, mut worst, mut failures, mut losses) = (0, 0.0, Vec::new(), Vec::new());
    let mut checkpoint = folder.at("checkpoint");
    for step in 0..4 {
        let graph = if step < 2 { "training_model_0.5.onnx" } else { "training_model.onnx" };
        let saved = folder.at(&format!("after_{step}"));
        let options: [&OsStr; 6] = [
            "--training".as_ref(),
            graph.as_ref(),
            "--checkpoint".as_ref(),
            checkpoint.as_ref(),
            "--save".as_ref(),
            saved.as_ref(),
        ];
        let result = client.run(step..step + 1, RATE, &options);
        losses.push(named(&result, "out.loss").to_f64().sum());
        let correction = |beta: f64| 1.0 - beta.powi(step as i32 + 1);
        for (&name, [value, mean, variance]) in &mut state {
            let gradient = named(&result, &format!("grad.{name}")).to_f64();
            assert!(gradient.iter().all(|x| x.is_finite()), "{name}: a gradient of step {step}");
            let given = named(&result, &format!("param.{name}")).to_f64();
            *mean = &*mean * beta1 + &gradient * (1.0 - beta1);
            *variance = &*variance * beta2 + &gradient * &gradient * (1.0 - beta2);
            let scale = (&*variance / correction(beta2)).mapv(f64::sqrt) + epsilon;
            let after = &*value * (1.0 - RATE * weight_decay) - &*mean / correction(beta1) / scale * RATE;
            let apart = ndarray::Zip::from(&given).and(&after).fold(0.0, |most: f64, given, after| {
                let rounding = 2.0 * f64::from(f32::EPSILON) * after.abs();
                most.max(((given - after).abs() - rounding) / RATE)
            });
            (count, worst) = (count + 1, f64::max(worst, apart));
            if apart > STEP_TOLERANCE {
                failures.push(format!("step {step}: {name} {apart:e} off"));
            }
            *value = given;
        }
        checkpoint = saved;
    }
    println!("losses {losses:?}; parameters {worst:e} of a step off");
    // The batch is the same all the time: only its tokens become more.
    assert!(losses[1] < losses[0] && losses[3] < losses[2], "it learns: {losses:?}");
    conclude("steps", count, &failures);
}

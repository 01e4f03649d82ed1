//! Trained weights back in a model: it computes what the graph that evaluates them does.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use common::{Folder, Scratch, conclude, constant, fed, fixtures, load, merge, ort, relative, run, zoo};
use ndarray::ArrayD;
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::Model;
use vitrim_train::export::{Choice, export};
use vitrim_train::head::Classes;
use vitrim_train::loss::Loss;
use vitrim_train::parameters::Parameter;
use vitrim_train::{Request, Training, weights};

/// The graph that evaluates has parameters for inputs, which ONNX Runtime neither folds nor packs nor fuses as it does
/// constants: other roundings, relative to the largest of as few as three logits.
const TOLERANCE: f64 = 5e-6;

/// Other classes than any model of the zoo has.
const CLASSES: i64 = 3;

fn request(classes: Option<i64>) -> Request {
    let classes = classes.map(|count| Classes { count, seed: 7 });
    Request { classes, ..Request::new(Loss::MeanSquaredError) }
}

/// Parameters that differ from what they begin with, each in its own way.
fn trained(training: &Training) -> Vec<Parameter> {
    let change = |(at, parameter): (usize, &Parameter)| {
        let elements = parameter.tensor.to_f64s().expect("floats");
        let elements = elements.iter().enumerate().map(|(i, x)| (x + 0.02 * ((i + 7 * at) as f64).sin()) as f32);
        let dims: Vec<usize> = parameter.tensor.dims().iter().map(|&extent| extent as usize).collect();
        let tensor = vitrim_ir::Tensor::f32s(&dims, &elements.collect::<Vec<_>>());
        Parameter { tensor, ..parameter.clone() }
    };
    training.parameters.iter().enumerate().map(change).collect()
}

fn output<'o>(outputs: &'o Outputs, name: &str) -> &'o Tensor {
    outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"))
}

#[test]
fn exported_models_compute_what_was_evaluated() {
    let scratch = Scratch::new("export");
    let backend = ort();
    let (mut count, mut merged, mut failures) = (0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        for classes in [None, Some(CLASSES)] {
            let Ok(training) = Training::of(&model, &request(classes)) else { continue };
            let parameters = trained(&training);
            let by_name: BTreeMap<_, _> = parameters.iter().map(|one| (one.name.clone(), one.tensor.clone())).collect();
            let choice = Choice { classes, ..Choice::default() };
            let exported =
                export(&model, &by_name, &choice).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
            let path = scratch.save_as("exported", &exported.model, &entry.model);
            let original = load(backend.as_ref(), &entry.model);
            let feeds = entry.feeds(original.as_ref()).swap_remove(0);
            let outputs = run(backend.as_ref(), &path, &feeds);

            let name = training.heads.logits.as_deref().expect("an output is judged");
            let mut all: Feeds = feeds.iter().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
            all.push("labels", Tensor::from_f64(DType::F32, &ArrayD::zeros(output(&outputs, name).shape())));
            parameters.iter().for_each(|one| all.push(one.name.clone(), fed(&one.tensor)));
            let eval = scratch.save_as("eval", &training.eval, &entry.model);
            let expected = run(backend.as_ref(), &eval, &all);
            let apart = relative(output(&expected, name), output(&outputs, name));
            count += 1;
            if apart > TOLERANCE {
                failures.push(format!("{}, {classes:?}: {apart:e} off", entry.name));
            }
            let before = run(backend.as_ref(), &entry.model, &feeds);
            if classes.is_none() && relative(output(&before, name), output(&outputs, name)) < 1e-4 {
                failures.push(format!("{}: other weights change nothing", entry.name));
            }
            if merge(&model, constant(1)).is_ok() {
                merged += 1;
                if let Err(refusal) = merge(&exported.model, constant(1)) {
                    failures.push(format!("{}, {classes:?}: {refusal}", entry.name));
                }
            }
        }
    }
    println!("{merged} can be merged");
    assert!(merged > 0, "merging takes what is exported");
    conclude("exports", count, &failures);
}

fn vitrim(arguments: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
    command.args(arguments).output().expect("vitrim runs")
}

fn model() -> std::path::PathBuf {
    fixtures().join("zoo/timm_vit_ts17_fused.onnx")
}

/// From `vitrim train` to `vitrim export-weights` and back to the model that was given.
#[test]
fn weights_that_were_not_trained_give_the_model_back() {
    for (format, file) in [("stock", "parameters.safetensors"), ("ort-training", "checkpoint")] {
        let folder = Folder::new();
        let (trained, exported) = (folder.at("trained"), folder.at("exported.onnx"));
        let output = vitrim(&[Path::new("train"), &model(), &trained, Path::new("--format"), Path::new(format)]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = vitrim(&[Path::new("export-weights"), &trained.join(file), &model(), &exported]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(Model::read(&exported).expect("a model"), Model::read(&model()).expect("a model"));
    }
}

/// What is no checkpoint, or not of this model: exit code 2, the reason in one line, nothing written.
#[test]
fn broken_checkpoints_are_refused() {
    let folder = Folder::new();
    let training = Training::of(&Model::read(&model()).expect("a model"), &request(None)).expect("it can be trained");
    let parameters = trained(&training);
    weights::write(&parameters, &folder.at("good")).expect("the folder can be written");
    let good = std::fs::read(folder.at("good")).expect("it was written");
    weights::write(&parameters[1..], &folder.at("missing")).expect("the folder can be written");
    let mut wrong = parameters.clone();
    wrong[0].tensor = vitrim_ir::Tensor::f32s(&[2, 2], &[0.0; 4]);
    weights::write(&wrong, &folder.at("shape")).expect("the folder can be written");
    folder.write("empty", "");
    folder.write("onnx", std::fs::read(model()).expect("a model"));
    folder.write("artifact", b"\xff\0\0\0ODTC");
    folder.write("cut", &good[..good.len() / 2]);
    folder.write("longer", [&good[..], &[0; 8]].concat());
    folder.write("huge", [&u64::MAX.to_le_bytes()[..], b"{}"].concat());
    folder.write("header", [&9u64.to_le_bytes()[..], b"{\"a\":[[[["].concat());
    let overflow = br#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
    folder.write("overflow", [&(overflow.len() as u64).to_le_bytes()[..], overflow].concat());
    let first = &parameters[0].name;
    for (name, reason) in [
        ("absent", "cannot read"),
        ("empty", "neither a safetensors file nor a checkpoint"),
        ("onnx", "neither a safetensors file nor a checkpoint"),
        ("artifact", "no checkpoint of ONNX Runtime Training"),
        ("cut", "malformed"),
        ("longer", "malformed"),
        ("huge", "malformed"),
        ("header", "malformed"),
        ("overflow", "malformed"),
        ("missing", &format!("the checkpoint has no parameter '{first}'")),
        ("shape", &format!("'{first}' is [2, 2] in the checkpoint and [48, 3, 4, 4] in the model")),
    ] {
        let out = folder.at("out.onnx");
        let output = vitrim(&[Path::new("export-weights"), &folder.at(name), &model(), &out]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name}: {stderr}");
        assert!(stderr.contains(reason) && stderr.lines().count() == 1, "{name}: {stderr}");
        assert!(!out.exists(), "{name}: nothing is written");
    }
}

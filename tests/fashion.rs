//! The training run of the README, small: examples/fashion.py on the pictures of fixtures/.

mod common;

use std::path::Path;
use std::process::Command;

use common::ort_training::output;
use common::{Folder, fixtures, load, ort};
use serde_json::Value as Json;
use vitrim::feeds::{self, FeedArgs};
use vitrim::tensor::compare::top1;

/// The first pictures of the file train, the others test.
const TRAINED_ON: usize = 600;

fn vitrim() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vitrim"))
}

/// Share of the pictures that were not trained on of which a model tells the class.
fn accuracy(model: &Path) -> f64 {
    let mut session = load(ort().as_ref(), model);
    let args = FeedArgs { input: Some(fixtures().join("fashion/fashion_test.npz")), ..FeedArgs::default() };
    let source = feeds::open(&args, None, session.inputs(), session.outputs()).expect("pictures");
    let mut hits = Vec::new();
    for batch in source.batches {
        let batch = batch.expect("pictures");
        let outputs = session.run(&batch.feeds).expect("it runs");
        let classes = top1(outputs.get("logits").expect("scores"));
        let labels = batch.labels.expect("labels");
        hits.extend(classes.iter().zip(labels).map(|(class, label)| class.is_some_and(|class| class as i64 == label)));
    }
    let tested = &hits[TRAINED_ON..];
    tested.iter().filter(|&&hit| hit).count() as f64 / tested.len() as f64
}

/// From random weights to models that tell ten kinds of clothes: with all tokens, and with token expansion.
#[test]
fn a_model_trains_from_random_weights() {
    let python = std::env::var_os("VITRIM_PYTHON").expect("Python is needed: `cargo xtask test` installs it");
    let library = vitrim::ops::library().expect("the kernels are needed: `cargo xtask test` builds them");
    let folder = Folder::new();
    let (graphs, kept) = (folder.at("graphs"), folder.at("kept"));
    let model = fixtures().join("fashion/fashion_vit.onnx");
    let stages = ["--expand", "0.5,0.75,1", "--expand-at", "0,2,4"];
    output(vitrim().arg("train").args([&model, &graphs]).args(stages));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fashion.py");
    let mut run = Command::new(python);
    run.args([&script, &graphs]).arg("--quick").arg("--kernels").arg(library).arg("--save").arg(&kept);
    print!("{}", output(run.env("PYTHONDONTWRITEBYTECODE", "1")));

    let runs: Json = serde_json::from_slice(&std::fs::read(kept.join("runs.json")).expect("figures")).expect("JSON");
    let runs = runs.as_array().expect("a list");
    for (run, name) in runs.iter().zip(["all_0", "toe_0"]) {
        let losses: Vec<f64> = run["losses"].as_array().expect("a list").iter().filter_map(Json::as_f64).collect();
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.7 * first, "{name}: the loss stays high, {losses:?}");
        let reached = run["accuracy"].as_f64().expect("a share");
        // One of ten classes: guessing gives 0.1.
        assert!(reached > 0.4, "{name}: {reached} of the pictures are told");

        let (checkpoint, trained) = (kept.join(format!("{name}.safetensors")), kept.join(format!("{name}.onnx")));
        output(vitrim().arg("export-weights").args([&checkpoint, &model, &trained]));
        // Roundings differ, which no picture here is close enough to feel.
        assert_eq!(accuracy(&trained), reached, "{name}: the exported model is another one");
    }
    assert_eq!(runs.len(), 2);
    assert_ne!(runs[0]["losses"], runs[1]["losses"], "expansion changes nothing");
}

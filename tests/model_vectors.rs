//! Whole models, merged, against the oracle's vectors: logits, where every token went, and token counts.

mod common;

use std::path::PathBuf;

use common::{Scratch, conclude, distance, fixtures, integers, ort, recipe, run, runtimes, vector, vector_index};
use serde_json::Value as Json;
use vitrim::runtime::Feeds;
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::merge::SOURCE_OUTPUT;
use vitrim_passes::recipe::{MergeSpec, RSpec};
use vitrim_passes::schedule::Schedule;

/// What logits (of size 2) may differ from the oracle's, in float64: float32 roundings over up to 6 blocks, which cost
/// the oracle's own float32 run up to 1e-6, and fused kernels that approximate erf and softmax to 1e-6 in each block.
const LOGIT_TOLERANCE: f64 = 1e-4;

/// The least that merging must change logits by for a case to show anything: well above the tolerance.
const LEAST_CHANGE: f64 = 1e-2;

/// Decisions closer than this depend on the order in which a runtime adds up.
const MARGIN: f64 = 1e-5;

/// A schedule as the index spells it.
fn schedule(spec: &Json) -> RSpec {
    let number = |json: &Json| json.as_u64().expect("a number of tokens") as usize;
    match spec {
        Json::Array(list) => RSpec::PerBlock(list.iter().map(number).collect()),
        Json::Object(line) => RSpec::Text(format!("{}:{}", number(&line["r"]), line["bend"])),
        r => RSpec::Constant(number(r)),
    }
}

/// A model vector.
struct Case {
    name: String,
    /// The weights' letter.
    weights: String,
    spec: MergeSpec,
    json: Json,
}

/// The vectors of merging.
fn cases() -> Vec<Case> {
    let index = vector_index();
    let models = index["models"].as_array().expect("the index has models");
    let merged = models.iter().filter(|model| model["method"]["name"] == "tome");
    let case = |json: &Json| {
        let name = json["file"].as_str().expect("a file").to_owned();
        assert!(json["margin"].as_f64().is_some_and(|margin| margin > MARGIN), "{name} is too close to call");
        assert!(json["change_by_method"].as_f64().is_some_and(|change| change > LEAST_CHANGE), "{name} shows nothing");
        let file = json["weights"].as_str().expect("a weights file");
        let weights = file.trim_start_matches("weights_").trim_end_matches(".npz").to_owned();
        let (method, arch) = (&json["method"], &index["weights"][&weights]["arch"]);
        // Without `protected` the oracle protects what the paper protects: class and distillation token.
        let paper = 1 + arch["dist"].as_u64().unwrap_or(0);
        let registers = arch["reg"].as_u64().unwrap_or(0) > 0;
        let protect = method["protected"].as_u64().or(registers.then_some(paper));
        let spec = MergeSpec {
            r: Some(schedule(&method["schedule"])),
            proportional: method["prop_attn"].as_bool(),
            plain_pooling: json["config"]["pool"] == "avg",
            protect: protect.map(|count| count as usize),
            trace_source: true,
            ..MergeSpec::default()
        };
        Case { name, weights, spec, json: json.clone() }
    };
    merged.map(case).collect()
}

/// The files of these weights: opset 17, and others where there are any.
fn files(weights: &str) -> Vec<PathBuf> {
    let folder = fixtures().join("vectors");
    let names = ["", "_op13", "_op18"].map(|variant| folder.join(format!("weights_{weights}{variant}.onnx")));
    names.into_iter().filter(|path| path.exists()).collect()
}

fn counts(json: &Json) -> Vec<usize> {
    json.as_array().expect("a count per block").iter().map(|count| count.as_u64().expect("a count") as usize).collect()
}

#[test]
fn merged_models_are_what_the_oracle_says() {
    let scratch = Scratch::new("model_vectors");
    let (mut count, mut failures) = (0, Vec::new());
    let mut opsets = Vec::new();
    for case in cases() {
        let arrays = vector(&case.name);
        let get = |name: &str| arrays.get(name).unwrap_or_else(|| panic!("{name} is in {}", case.name));
        let feeds = Feeds::from_iter([("images".to_owned(), get("in_images").clone())]);
        for file in files(&case.weights) {
            let model = Model::read(&file).unwrap_or_else(|error| panic!("{error}"));
            let opset = model.opsets().standard();
            opsets.push(opset);
            let what = format!("{} at opset {opset}", case.name);
            for inline in [false, true] {
                let options = Options { inline, ..Options::default() };
                let (merged, report) = driver::rewrite(&model, &recipe(case.spec.clone()), options)
                    .unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
                assert_eq!(merged.functions().is_empty(), inline, "{what}: functions");
                let before: Vec<usize> = report.steps.iter().map(|step| step.before).collect();
                let after: Vec<usize> = report.steps.iter().map(|step| step.after()).collect();
                assert_eq!(before, counts(&case.json["tokens_in"]), "{what}: tokens that enter blocks");
                assert_eq!(after, counts(&case.json["tokens_out"]), "{what}: tokens that leave blocks");
                let path = scratch.save_as("merged", &merged, &file);
                // tract inlines by itself, so the flat file is news to ONNX Runtime only.
                let backends = if inline { vec![ort()] } else { Vec::from(runtimes()) };
                for backend in backends {
                    let outputs = run(backend.as_ref(), &path, &feeds);
                    let apart = distance(get("out_logits"), outputs.get("logits").expect("an output"));
                    let source = integers(outputs.get(SOURCE_OUTPUT).expect("the source is traced"));
                    count += 1;
                    if apart > LOGIT_TOLERANCE {
                        failures.push(format!("{what} in {}, inline {inline}: logits {apart:e} off", backend.name()));
                    }
                    if source != integers(get("out_owner")) {
                        failures.push(format!("{what} in {}, inline {inline}: tokens went elsewhere", backend.name()));
                    }
                }
            }
        }
    }
    assert!(opsets.contains(&13) && opsets.contains(&17) && opsets.contains(&18), "an opset is missing: {opsets:?}");
    conclude("model vectors", count, &failures);
}

/// The reference itself: without it, agreement on merged models could be two wrongs.
#[test]
fn models_that_are_not_merged_are_what_the_oracle_says() {
    let index = vector_index();
    let (mut count, mut failures) = (0, Vec::new());
    for json in index["models"].as_array().expect("the index has models") {
        if json["method"]["name"] != "none" {
            continue;
        }
        let name = json["file"].as_str().expect("a file");
        let arrays = vector(name);
        let feeds = Feeds::from_iter([("images".to_owned(), arrays.get("in_images").expect("images").clone())]);
        let weights = json["weights"].as_str().expect("a weights file").replace("weights_", "").replace(".npz", "");
        for file in files(&weights) {
            for backend in runtimes() {
                let outputs = run(backend.as_ref(), &file, &feeds);
                let apart =
                    distance(arrays.get("out_logits").expect("logits"), outputs.get("logits").expect("an output"));
                count += 1;
                if apart > LOGIT_TOLERANCE {
                    failures.push(format!("{} in {}: {apart:e}", file.display(), backend.name()));
                }
            }
        }
    }
    conclude("models as they are", count, &failures);
}

#[test]
fn schedules_are_what_the_oracle_says() {
    let index = vector_index();
    let inline = index["inline"].as_array().expect("the index has inline cases");
    let (mut count, mut failures) = (0, Vec::new());
    for case in inline.iter().filter(|case| case["op"] == "tome.reduction_schedule") {
        let schedule = match schedule(&case["args"]["spec"]) {
            RSpec::Constant(r) => Schedule::Constant(r),
            RSpec::PerBlock(rs) => Schedule::PerBlock(rs),
            RSpec::Text(text) => text.parse().unwrap_or_else(|error| panic!("{error}")),
        };
        let depth = case["args"]["depth"].as_u64().expect("a depth") as usize;
        let mut expected = counts(&case["expected"]);
        // The oracle leaves in what a list says beyond the last block.
        expected.truncate(depth);
        count += 1;
        let requested = schedule.requested(depth).expect("no schedule of the index depends on the token count");
        if requested != expected {
            failures.push(format!("{schedule} over {depth} blocks: {requested:?}, not {expected:?}"));
        }
    }
    conclude("schedules", count, &failures);
}

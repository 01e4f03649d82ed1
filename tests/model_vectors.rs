//! Whole models, merged, pruned and expanded, against the oracle's vectors: logits, where every token went, and token counts.

mod common;

use common::vectors::{Case, Expanding, cases, counts, files, schedule};
use common::{Scratch, conclude, distance, integers, ort, run, runtimes, vector, vector_index};
use ndarray::{Array2, ArrayD};
use serde_json::{Value as Json, json};
use vitrim::runtime::Feeds;
use vitrim::tensor::NamedTensors;
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::RSpec;
use vitrim_passes::reduce::SOURCE_OUTPUT;
use vitrim_passes::schedule::{CosineDecay, Expansion, Schedule, keep_count};

/// What logits (of size 2) may differ from the oracle's, in float64: float32 roundings over up to 6 blocks, which cost
/// the oracle's own float32 run up to 1e-6, and fused kernels that approximate erf and softmax to 1e-6 in each block.
const LOGIT_TOLERANCE: f64 = 1e-4;

/// The slot of every original token: what the steps of a vector do, one after the other.
fn owner(json: &Json, arrays: &NamedTensors) -> ArrayD<i64> {
    if let Some(owner) = arrays.get("out_owner") {
        return integers(owner);
    }
    let steps = json["steps"].as_array().expect("steps").len();
    let assign = |step: usize| {
        let assign = integers(arrays.get(&format!("out_step{step}_assign")).expect("an assignment"));
        assign.into_dimensionality().expect("a slot for each token of each image")
    };
    let follow = |owner: Array2<i64>, step: usize| {
        let assign: Array2<i64> = assign(step);
        Array2::from_shape_fn(owner.dim(), |(image, token)| match owner[[image, token]] {
            slot @ 0.. => assign[[image, slot as usize]],
            nowhere => nowhere,
        })
    };
    (1..steps).fold(assign(0), follow).into_dyn()
}

#[test]
fn merged_models_are_what_the_oracle_says() {
    agree("merged", cases(&["tome"]), &[13, 17, 18]);
}

#[test]
fn pruned_models_are_what_the_oracle_says() {
    agree("pruned", cases(&["prune", "evit", "trilevel"]), &[13, 17]);
}

#[test]
fn models_with_a_dial_are_what_the_oracle_says() {
    let cases: Vec<Case> = cases(&["prune", "evit", "trilevel"]).into_iter().map(Case::dialled).collect();
    assert!(cases.iter().any(|case| case.json["method"]["fuse"] == true), "none fuses");
    agree("dialled", cases, &[13, 17]);
}

#[test]
fn models_that_are_merged_and_pruned_are_what_the_oracle_says() {
    agree("mixed", cases(&["mixed"]), &[13, 17, 18]);
}

#[test]
fn expanded_models_are_what_the_oracle_says() {
    agree("expanded", cases(&["toe"]), &[13, 17, 18]);
}

/// Rewrites all cases, for which there are models of these opsets, and runs them everywhere.
fn agree(what: &str, cases: Vec<Case>, opsets_wanted: &[i64]) {
    let scratch = Scratch::new(&format!("{what}_vectors"));
    let (mut count, mut failures) = (0, Vec::new());
    let mut opsets = Vec::new();
    for case in cases {
        let arrays = vector(&case.name);
        let get = |name: &str| arrays.get(name).unwrap_or_else(|| panic!("{name} is in {}", case.name));
        let feeds = Feeds::from_iter([("images".to_owned(), get("in_images").clone())]);
        for file in case.files() {
            let model = Model::read(&file).unwrap_or_else(|error| panic!("{error}"));
            let opset = model.opsets().standard();
            opsets.push(opset);
            let what = format!("{} at opset {opset}", case.name);
            for inline in [false, true] {
                let options = Options { inline, training: true, ..Options::default() };
                let (merged, report) = driver::rewrite(&model, &case.recipe, options)
                    .unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
                assert_eq!(merged.functions().is_empty(), inline, "{what}: functions");
                assert_eq!(report.steps.is_empty(), case.dialled, "{what}: counts that are known");
                let before: Vec<usize> = report.steps.iter().map(|step| step.before).collect();
                let after: Vec<usize> = report.steps.iter().map(|step| step.after()).collect();
                if !case.dialled {
                    assert_eq!(before, counts(&case.json["tokens_in"]), "{what}: tokens that enter blocks");
                    assert_eq!(after, counts(&case.json["tokens_out"]), "{what}: tokens that leave blocks");
                }
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
                    if source != owner(&case.json, &arrays) {
                        failures.push(format!("{what} in {}, inline {inline}: tokens went elsewhere", backend.name()));
                    }
                }
            }
        }
    }
    assert!(opsets_wanted.iter().all(|opset| opsets.contains(opset)), "an opset is missing: {opsets:?}");
    conclude(&format!("{what} model vectors"), count, &failures);
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
fn kept_counts_are_what_the_oracle_says() {
    let index = vector_index();
    let inline = index["inline"].as_array().expect("the index has inline cases");
    let (mut count, mut failures) = (0, Vec::new());
    for case in inline.iter().filter(|case| case["op"] == "trilevel.keep_count") {
        let (args, expected) = (&case["args"], case["expected"].as_u64().expect("a count"));
        let (tokens, ratio) = (args["n"].as_u64().expect("a count"), args["ratio"].as_f64().expect("a share"));
        count += 1;
        let kept = keep_count(tokens as usize, ratio);
        if kept as u64 != expected {
            failures.push(format!("{ratio} of {tokens}: {kept}, not {expected}"));
        }
    }
    conclude("kept counts", count, &failures);
}

#[test]
fn shares_decay_as_the_oracle_says() {
    let index = vector_index();
    let inline = index["inline"].as_array().expect("the index has inline cases");
    let (mut count, mut failures) = (0, Vec::new());
    for case in inline.iter().filter(|case| case["op"] == "trilevel.keep_ratio") {
        let args = &case["args"];
        let number = |name: &str, default: u64| args[name].as_u64().unwrap_or(default) as usize;
        let share = |name: &str, default: f64| args[name].as_f64().unwrap_or(default);
        let usual = CosineDecay::to(share("base", f64::NAN));
        let (warmup, decay) = (number("warmup", usual.warmup as u64), number("decay", usual.decay as u64));
        let schedule = CosineDecay { warmup, decay, top: share("top", usual.top), ..usual };
        let at = |name: &str| args[name].as_u64().unwrap_or_else(|| panic!("{name} is in {args}")) as usize;
        let found = schedule.share(at("iteration"), at("epoch"), at("iters_per_epoch"));
        let expected = case["expected"].as_f64().expect("a share");
        count += 1;
        // A few roundings of float64.
        if (found - expected).abs() > 1e-12 {
            failures.push(format!("{args}: {found}, not {expected}"));
        }
    }
    conclude("decaying shares", count, &failures);
}

#[test]
fn stages_of_an_expansion_are_what_the_oracle_says() {
    let index = vector_index();
    let inline = index["inline"].as_array().expect("the index has inline cases");
    let (mut count, mut failures) = (0, Vec::new());
    for case in inline.iter().filter(|case| case["op"] == "toe.counts") {
        let (args, expected) = (&case["args"], &case["expected"]);
        let (patches, schedule) =
            (args["n"].as_u64().expect("a count") as usize, Expanding::of(&args["config"]).schedule);
        let stages = schedule.keep.len();
        let found = json!({
            "seeds": schedule.seeds(patches),
            "additions": (1..=stages).map(|stage| schedule.additions(patches, stage)).collect::<Vec<_>>(),
            "tokens": (0..=stages).map(|stage| schedule.kept(patches, stage)).collect::<Vec<_>>(),
            "active": (0..=stages).map(|stage| schedule.is_active(stage)).collect::<Vec<_>>(),
        });
        count += 1;
        if found != *expected {
            failures.push(format!("{args}: {found}, not {expected}"));
        }
    }
    for case in inline.iter().filter(|case| case["op"] == "toe.stage_of_epoch") {
        let schedule = Expansion { epochs: counts(&case["args"]["epochs"]), ..Expansion::default() };
        let stages: Vec<usize> = counts(&case["args"]["at"]).into_iter().map(|epoch| schedule.stage(epoch)).collect();
        count += 1;
        if stages != counts(&case["expected"]) {
            failures.push(format!("{}: {stages:?}, not {}", case["args"], case["expected"]));
        }
    }
    conclude("stages of expansions", count, &failures);
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

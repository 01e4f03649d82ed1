//! Whole models, merged and pruned, against the oracle's vectors: logits, where every token went, and token counts.

mod common;

use std::path::PathBuf;

use common::{Scratch, conclude, distance, fixtures, integers, ort, run, runtimes, vector, vector_index};
use ndarray::{Array2, ArrayD};
use serde_json::Value as Json;
use vitrim::runtime::Feeds;
use vitrim::tensor::NamedTensors;
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};
use vitrim_passes::reduce::SOURCE_OUTPUT;
use vitrim_passes::schedule::{CosineDecay, Schedule, keep_count};

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
    recipe: Recipe,
    /// Whether token counts are known only at run time.
    dialled: bool,
    json: Json,
}

impl Case {
    /// The same pruning in a file for every share, of which this one is the default.
    fn dialled(self) -> Self {
        let [PassSpec::Prune(spec)] = &self.recipe.passes[..] else { panic!("{} is no pruning", self.name) };
        let (share, at) = match (&spec.keep, &spec.at) {
            (KeepSpec::Constant(share), Some(at)) => (*share, at.clone()),
            (KeepSpec::PerBlock(shares), _) => {
                let at: Vec<usize> = (0..shares.len()).filter(|&block| shares[block] < 1.0).collect();
                let share = shares[*at.first().expect("a block that prunes")];
                assert!(at.iter().all(|&block| shares[block] == share), "{} keeps several shares", self.name);
                (share, at)
            }
            _ => panic!("{} does not say where to prune", self.name),
        };
        let keep = KeepSpec::Constant(share);
        let spec = PruneSpec { keep, at: Some(at), runtime_keep: true, ..spec.clone() };
        Self { recipe: Recipe { passes: vec![PassSpec::Prune(spec)] }, dialled: true, ..self }
    }
}

/// The vectors of these methods.
fn cases(methods: &[&str]) -> Vec<Case> {
    let index = vector_index();
    let models = index["models"].as_array().expect("the index has models");
    let chosen =
        models.iter().filter(|model| model["method"]["name"].as_str().is_some_and(|name| methods.contains(&name)));
    let case = |json: &Json| {
        let name = json["file"].as_str().expect("a file").to_owned();
        assert!(json["margin"].as_f64().is_some_and(|margin| margin > MARGIN), "{name} is too close to call");
        assert!(json["change_by_method"].as_f64().is_some_and(|change| change > LEAST_CHANGE), "{name} shows nothing");
        let file = json["weights"].as_str().expect("a weights file");
        let weights = file.trim_start_matches("weights_").trim_end_matches(".npz").to_owned();
        let passes = match json["method"]["name"].as_str() {
            Some("tome") => vec![PassSpec::Merge(merging(json, &index["weights"][&weights]["arch"]))],
            Some("mixed") => mixture(json),
            _ => vec![PassSpec::Prune(pruning(&json["method"]))],
        };
        Case { name, weights, recipe: Recipe { passes }, dialled: false, json: json.clone() }
    };
    chosen.map(case).collect()
}

fn merging(json: &Json, arch: &Json) -> MergeSpec {
    let method = &json["method"];
    // Without `protected` the oracle protects what the paper protects: class and distillation token.
    let paper = 1 + arch["dist"].as_u64().unwrap_or(0);
    let registers = arch["reg"].as_u64().unwrap_or(0) > 0;
    let protect = method["protected"].as_u64().or(registers.then_some(paper));
    MergeSpec {
        r: Some(schedule(&method["schedule"])),
        proportional: method["prop_attn"].as_bool(),
        plain_pooling: json["config"]["pool"] == "avg",
        protect: protect.map(|count| count as usize),
        trace_source: true,
        ..MergeSpec::default()
    }
}

fn pruning(method: &Json) -> PruneSpec {
    let share = |json: &Json| json.as_f64().expect("a share");
    let (keep, at) = match method["keep_rates"].as_array() {
        Some(rates) => (KeepSpec::PerBlock(rates.iter().map(share).collect()), None),
        None => (KeepSpec::Constant(share(&method["ratio"])), Some(counts(&method["blocks"]))),
    };
    let (fuse, attention_keep) = (method["fuse"].as_bool().unwrap_or(false), method["attn_ratio"].as_f64());
    PruneSpec { keep, at, fuse, attention_keep, trace_source: true, ..PruneSpec::default() }
}

/// A pass for each act of a mixture.
fn mixture(json: &Json) -> Vec<PassSpec> {
    let acts = json["method"]["acts"].as_array().expect("an act, or none, for each block");
    let pass = |(block, act): (usize, &Json)| {
        let trace_source = true;
        Some(match (act[0].as_str()?, &act[1]) {
            ("merge", r) => {
                let r = r.as_u64().expect("a number of tokens") as usize;
                let r = Some(RSpec::PerBlock([vec![0; block], vec![r]].concat()));
                let plain_pooling = json["config"]["pool"] == "avg";
                PassSpec::Merge(MergeSpec { r, plain_pooling, trace_source, ..MergeSpec::default() })
            }
            (_, share) => {
                let keep = KeepSpec::Constant(share.as_f64().expect("a share"));
                let (at, fuse) = (Some(vec![block]), act[2].as_bool().expect("whether to fuse"));
                PassSpec::Prune(PruneSpec { keep, at, fuse, trace_source, ..PruneSpec::default() })
            }
        })
    };
    acts.iter().enumerate().filter_map(pass).collect()
}

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

/// Rewrites all cases, for which there are models of these opsets, and runs them everywhere.
fn agree(what: &str, cases: Vec<Case>, opsets_wanted: &[i64]) {
    let scratch = Scratch::new(&format!("{what}_vectors"));
    let (mut count, mut failures) = (0, Vec::new());
    let mut opsets = Vec::new();
    for case in cases {
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

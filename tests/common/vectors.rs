//! The oracle's vectors of whole models, as recipes for the models of their weights.

use std::path::PathBuf;

use serde_json::Value as Json;
use vitrim_passes::recipe::{ExpandSpec, KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};
use vitrim_passes::reduce::{Convention, Distance};
use vitrim_passes::schedule::Expansion;

use super::{fixtures, vector_index};

/// The least that a method must change logits by for a case to show anything: well above every tolerance.
const LEAST_CHANGE: f64 = 1e-2;

/// Decisions closer than this depend on the order in which a runtime adds up.
const MARGIN: f64 = 1e-5;

/// A model vector.
pub struct Case {
    pub name: String,
    /// The weights' letter.
    pub weights: String,
    /// Traces where tokens went.
    pub recipe: Recipe,
    /// Whether token counts are known only at run time.
    pub dialled: bool,
    pub json: Json,
}

/// The vectors of these methods.
pub fn cases(methods: &[&str]) -> Vec<Case> {
    let index = vector_index();
    let models = index["models"].as_array().expect("the index has models");
    let chosen =
        models.iter().filter(|model| model["method"]["name"].as_str().is_some_and(|name| methods.contains(&name)));
    chosen.map(|json| Case::of(json, &index, true)).collect()
}

impl Case {
    /// The vector of one file.
    pub fn named(file: &str, index: &Json, trace_source: bool) -> Self {
        let models = index["models"].as_array().expect("the index has models");
        let json = models.iter().find(|model| model["file"] == file);
        Self::of(json.unwrap_or_else(|| panic!("{file} is in the index")), index, trace_source)
    }

    fn of(json: &Json, index: &Json, trace_source: bool) -> Self {
        let name = json["file"].as_str().expect("a file").to_owned();
        let file = json["weights"].as_str().expect("a weights file");
        let weights = file.trim_start_matches("weights_").trim_end_matches(".npz").to_owned();
        let method = json["method"]["name"].as_str().expect("a method");
        let passes = match method {
            "none" => Vec::new(),
            "tome" => vec![PassSpec::Merge(merging(json, &index["weights"][&weights]["arch"], trace_source))],
            "toe" => vec![PassSpec::Expand(expanding(&json["method"], trace_source))],
            "mixed" => mixture(json, trace_source),
            _ => vec![PassSpec::Prune(pruning(&json["method"], trace_source))],
        };
        // Where nothing happens there is nothing to show.
        if json["steps"].as_array().is_some_and(|steps| !steps.is_empty()) {
            let change = json["change_by_method"].as_f64();
            assert!(change.is_some_and(|change| change > LEAST_CHANGE), "{name} shows nothing");
            assert!(json["margin"].as_f64().is_some_and(|margin| margin > MARGIN), "{name} is too close to call");
        }
        Case { name, weights, recipe: Recipe { passes }, dialled: false, json: json.clone() }
    }

    /// The same pruning in a file for every share, of which this one is the default.
    pub fn dialled(self) -> Self {
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

    /// The files of its weights: opset 17, and others where there are any.
    pub fn files(&self) -> Vec<PathBuf> {
        files(&self.weights)
    }
}

/// The files of the weights of a letter.
pub fn files(weights: &str) -> Vec<PathBuf> {
    let folder = fixtures().join("vectors");
    let names = ["", "_op13", "_op18"].map(|variant| folder.join(format!("weights_{weights}{variant}.onnx")));
    names.into_iter().filter(|path| path.exists()).collect()
}

/// A list of numbers of tokens, or of blocks.
pub fn counts(json: &Json) -> Vec<usize> {
    json.as_array().expect("a count per block").iter().map(|count| count.as_u64().expect("a count") as usize).collect()
}

/// A schedule as the index spells it.
pub fn schedule(spec: &Json) -> RSpec {
    let number = |json: &Json| json.as_u64().expect("a number of tokens") as usize;
    match spec {
        Json::Array(list) => RSpec::PerBlock(list.iter().map(number).collect()),
        Json::Object(line) => RSpec::Text(format!("{}:{}", number(&line["r"]), line["bend"])),
        r => RSpec::Constant(number(r)),
    }
}

fn merging(json: &Json, arch: &Json, trace_source: bool) -> MergeSpec {
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
        trace_source,
        ..MergeSpec::default()
    }
}

fn pruning(method: &Json, trace_source: bool) -> PruneSpec {
    let share = |json: &Json| json.as_f64().expect("a share");
    let (keep, at) = match method["keep_rates"].as_array() {
        Some(rates) => (KeepSpec::PerBlock(rates.iter().map(share).collect()), None),
        None => (KeepSpec::Constant(share(&method["ratio"])), Some(counts(&method["blocks"]))),
    };
    let (fuse, attention_keep) = (method["fuse"].as_bool().unwrap_or(false), method["attn_ratio"].as_f64());
    PruneSpec { keep, at, fuse, attention_keep, trace_source, ..PruneSpec::default() }
}

fn expanding(method: &Json, trace_source: bool) -> ExpandSpec {
    let Expanding { schedule, distance, convention } = Expanding::of(&method["config"]);
    let Expansion { epochs, keep, seed_rate, repeats } = schedule;
    let stage = method["stage"].as_u64().map(|stage| stage as usize);
    let convention = Some(convention);
    ExpandSpec { epochs, keep, seed_rate, repeats, distance, convention, stage, trace_source, ..ExpandSpec::default() }
}

/// An expansion as the index spells it.
pub struct Expanding {
    pub schedule: Expansion,
    pub distance: Distance,
    pub convention: Convention,
}

impl Expanding {
    pub fn of(config: &Json) -> Self {
        let shares = config["keep"].as_array().expect("shares").iter();
        let schedule = Expansion {
            epochs: counts(&config["epochs"]),
            keep: shares.map(|share| share.as_f64().expect("a share")).collect(),
            seed_rate: config["seed_rate"].as_f64().expect("a share"),
            repeats: config["repeats"].as_u64().expect("a number of rounds") as usize,
        };
        let (distance, convention) = (config["distance"].clone(), config["convention"].clone());
        Self {
            schedule,
            distance: serde_json::from_value(distance).expect("a distance"),
            convention: serde_json::from_value(convention).expect("a convention"),
        }
    }
}

/// A pass for each act of a mixture.
fn mixture(json: &Json, trace_source: bool) -> Vec<PassSpec> {
    let acts = json["method"]["acts"].as_array().expect("an act, or none, for each block");
    let pass = |(block, act): (usize, &Json)| {
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

//! The command line as a user meets it: what the commands print and write, and what they exit with.

mod common;
#[path = "common/tiny.rs"]
mod tiny;
mod wire;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::Folder;
use serde_json::{Value as Json, json};
use vitrim::feeds::{self, FeedArgs};
use vitrim::runtime::{self, RuntimeArgs};
use vitrim::tensor::npz::write_npz;
use vitrim::tensor::{self, NamedTensors};
use vitrim_ir::{Attribute, DataType, Graph, GraphBuilder, Model, Patch, Tensor, TensorType, print_graph};

impl Folder {
    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn model(&self, name: &str) -> Model {
        let model = Model::read(&self.at(name)).unwrap_or_else(|error| panic!("{error}"));
        model.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
        model
    }

    /// Writes a model that was built from scratch.
    fn save(&self, name: &str, model: &Model) {
        let verified = model.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
        Model::write(verified, &self.at(name), &self.at("no source.onnx")).expect("the folder can be written");
    }

    fn names(&self) -> BTreeSet<String> {
        names(self.path())
    }

    fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
        command.args(arguments).current_dir(self.path()).output().expect("the program starts")
    }

    /// Runs the program, which must succeed; gives what it prints.
    #[track_caller]
    fn prints(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "`vitrim {}`: {}\n{out}{err}", arguments.join(" "), output.status);
        out
    }

    /// Runs the program with `--json`, which must succeed.
    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Json {
        let out = self.prints(&[arguments, &["--json"]].concat());
        let json: Json = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}\n{out}"));
        assert_eq!(json["schema_version"], 1, "{json}");
        json
    }

    /// Runs the program, which must refuse in one line; gives the line.
    #[track_caller]
    fn refuses(&self, arguments: &[&str]) -> String {
        let before = self.names();
        let output = self.run(arguments);
        let told = text(&output.stderr);
        let line = format!("`vitrim {}` says\n{told}", arguments.join(" "));
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && told.starts_with("vitrim: ") && told.lines().count() == 1, "{line}");
        assert_eq!(self.names(), before, "{line}");
        told
    }
}

/// What is in a folder.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = folder.read_dir().expect("the folder can be listed");
    entries.map(|entry| entry.expect("the folder can be listed").file_name().to_string_lossy().into_owned()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the program speaks UTF-8")
}

fn zoo(name: &str) -> String {
    format!("{}/fixtures/zoo/{name}.onnx", env!("CARGO_MANIFEST_DIR"))
}

fn fashion(name: &str) -> String {
    format!("{}/fixtures/fashion/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// 65 tokens, the class token among them; 4 blocks.
fn vit() -> String {
    zoo("timm_vit_ts17_unfused")
}

/// The tokens that leave each block, from a report.
fn tokens(report: &Json) -> Vec<u64> {
    let steps = report["report"]["steps"].as_array().expect("the report lists the blocks");
    let number = |step: &Json, key: &str| step[key].as_u64().expect("steps count tokens");
    steps.iter().map(|step| number(step, "before") - number(step, "removed")).collect()
}

/// Operators that a graph calls, with their domains, nested graphs not looked into.
fn operators(graph: &Graph) -> BTreeSet<String> {
    graph.nodes().map(|(_, node)| node.op.to_string()).collect()
}

#[test]
fn every_schedule_can_be_spelt() {
    let folder = Folder::new();
    let vit = vit();
    for (request, expected) in [
        (&["-r", "4"][..], [61, 57, 53, 49]),
        (&["-r", "0"], [65, 65, 65, 65]),
        (&["-r", "6:-1"], [53, 45, 41, 41]),
        (&["-r", "6:1"], [65, 61, 53, 41]),
        (&["-r", "4:0"], [61, 57, 53, 49]),
        (&["-r", "4,2,0"], [61, 59, 59, 59]),
        (&["-r", "0, 0, 5, 1"], [65, 65, 60, 59]),
        (&["-r", "1000"], [33, 17, 9, 5]),
        (&["--ratio", "0.1"], [59, 54, 49, 45]),
        (&["--ratio", "0"], [65, 65, 65, 65]),
        (&["--keep-tokens", "60,50"], [60, 50, 50, 50]),
        (&["--keep-tokens", "33,17,9,5"], [33, 17, 9, 5]),
        (&["-r", "4", "--align", "8"], [56, 48, 40, 32]),
        (&["-r", "4,0,4", "--align", "8"], [56, 56, 48, 48]),
        (&["-r", "4", "--align", "auto"], [61, 57, 53, 49]),
        (&["-r", "1000", "--protect", "3"], [34, 19, 11, 7]),
    ] {
        let json = folder.json(&[&["merge", &vit, "out.onnx", "--keep-dead"][..], request].concat());
        assert_eq!(tokens(&json), expected, "{request:?}");
        let model = folder.model("out.onnx");
        let recorded = expected.map(|count| count.to_string()).join(",");
        let merges = expected[3] < 65;
        assert_eq!(model.metadata("vitrim.tokens"), merges.then_some(recorded.as_str()), "{request:?}");
        let calls = model.graph().nodes().filter(|(_, node)| node.op.to_string() == "ai.vitrim.TokenMerge").count();
        let removing =
            [65, expected[0], expected[1], expected[2]].iter().zip(expected).filter(|(a, b)| **a > *b).count();
        assert_eq!(calls, removing, "{request:?}");
    }
    // Half precision wants eights.
    let half = zoo("timm_vit_fp16_ts17");
    let json = folder.json(&["merge", &half, "out.onnx", "-r", "4", "--align", "auto"]);
    assert!(tokens(&json).iter().all(|count| count % 8 == 0), "{json}");
    // What cannot be aligned is said, apart from the report.
    let output = folder.run(&["merge", &vit, "out.onnx", "-r", "4", "--align", "64", "--keep-dead"]);
    assert!(output.status.success() && !text(&output.stdout).contains("note"));
    assert_eq!(text(&output.stderr), "note: 4 block(s) cannot reach a multiple of 64 tokens and keep their r\n");
}

#[test]
fn what_is_written_still_runs_and_is_close() {
    let folder = Folder::new();
    let merge = |model: &str, output: &str, rest: &[&str]| {
        folder.prints(&[&["merge", model, output, "-r", "4"][..], rest].concat());
    };
    // Each option makes a model of its own, all of them close to the original.
    let (cls, avg) = (vit(), zoo("timm_vit_avg_nocls_ts17"));
    for (model, options) in [
        (&cls, &[&[][..], &["--metric", "query"], &["--metric", "value"], &["--metric", "hidden"]][..]),
        (&cls, &[&[], &["--no-proportional"], &["--protect", "5"]]),
        (&avg, &[&[], &["--plain-pooling"], &["--no-proportional"], &["--no-proportional", "--plain-pooling"]]),
    ] {
        for (number, option) in options.iter().enumerate() {
            merge(model, &format!("{number}.onnx"), option);
            folder.prints(&["verify", model, &format!("{number}.onnx"), "--min-cosine", "0.9"]);
            if number > 0 {
                let report = folder.json(&["verify", "0.onnx", &format!("{number}.onnx")]);
                let distance = report["outputs"][0]["figures"]["max_abs"].as_f64().expect("it is a number");
                assert!(distance > 1e-5, "{option:?} makes no difference");
            }
        }
    }
    merge(&cls, "key.onnx", &["--metric", "key"]);
    merge(&cls, "default.onnx", &[]);
    assert!(folder.bytes("key.onnx") == folder.bytes("default.onnx"));
}

#[test]
fn the_trained_model_stays_accurate() {
    let folder = Folder::new();
    let (model, pictures) = (fashion("fashion_vit.onnx"), fashion("fashion_test.npz"));
    folder.prints(&["merge", &model, "out.onnx", "-r", "4"]);
    let arguments = ["verify", &model, "out.onnx", "--input", &pictures, "--limit", "64", "--max-top1-drop", "5"];
    let report = folder.json(&arguments);
    assert_eq!((&report["passed"], &report["images"]), (&Json::Bool(true), &Json::from(64)));
    assert!(report["accuracy"]["candidate"]["percent"].as_f64().is_some_and(|percent| percent > 75.0), "{report}");
}

#[test]
fn source_tokens_are_traced() {
    let folder = Folder::new();
    for (rest, most) in [(&["-r", "4"][..], 48), (&["-r", "4", "--inline"], 48), (&["-r", "0"], 64)] {
        folder.prints(&[&["merge", &vit(), "out.onnx", "--trace-source"][..], rest].concat());
        let model = folder.model("out.onnx");
        let graph = model.graph();
        let last = graph.value(*graph.outputs().last().expect("there are outputs"));
        let ty = last.ty().expect("outputs have types");
        assert_eq!((last.name(), ty.dtype), ("token_source", DataType::I64));
        assert_eq!(ty.to_string(), "i64[batch,65]");
        assert_eq!(graph.outputs().len(), 2);

        let backend = RuntimeArgs::default().backend().expect("tract is compiled in");
        let mut session = runtime::load(backend.as_ref(), &folder.at("out.onnx")).expect("it can be loaded");
        let feeds = feeds::open(&FeedArgs::default(), Some(2), session.inputs(), session.outputs());
        let batch =
            feeds.expect("noise can be made").batches.next().expect("there is a batch").expect("it can be made");
        let outputs = session.run(&batch.feeds).expect("it runs");
        let source = outputs.get("token_source").expect("it is there");
        assert_eq!(source.shape(), [2, 65]);
        for image in source.to_f64().outer_iter() {
            let slots: BTreeSet<u64> = image.iter().map(|&slot| slot as u64).collect();
            // Every slot has a token, and the class token keeps its place.
            assert_eq!((slots.len() as u64, slots.first(), slots.last()), (most + 1, Some(&0), Some(&most)));
            assert_eq!(image.iter().filter(|&&slot| slot == 0.0).count(), 1);
        }
    }
    // The model's own output is untouched by it, but for what is computed for the trace alone.
    folder.prints(&["merge", &vit(), "plain.onnx", "-r", "4", "--keep-dead"]);
    folder.prints(&["merge", &vit(), "traced.onnx", "-r", "4", "--keep-dead", "--trace-source"]);
    let report = folder.json(&["verify", "plain.onnx", "traced.onnx", "--atol", "0"]);
    assert_eq!((&report["passed"], &report["extra_outputs"][0]), (&true.into(), &"token_source".into()));
}

#[test]
fn towers_are_shown_by_name() {
    let folder = Folder::new();
    folder.save("two.onnx", &tiny::siamese());
    let json = folder.json(&["inspect", "two.onnx"]);
    assert_eq!((&json["vit"], &json["num_blocks"], &json["num_tokens"]), (&true.into(), &2.into(), &16.into()));
    let towers = json["towers"].as_array().expect("there are several");
    assert_eq!(towers.iter().map(|tower| &tower["name"]).collect::<Vec<_>>(), ["left", "right"]);
    assert!(towers.iter().all(|tower| tower["vit"] == true && tower["num_tokens"] == 16), "{json}");
    let json = folder.json(&["inspect", "two.onnx", "--tower", "right"]);
    assert!(json["cuts"][0].as_str().is_some_and(|cut| cut.contains("right/0")) && json["towers"].is_null(), "{json}");
    let out = folder.prints(&["inspect", "two.onnx"]);
    assert!(out.starts_with("tower left\n") && out.contains("\ntower right\n"), "{out}");
    let told = folder.refuses(&["inspect", "two.onnx", "--tower", "middle"]);
    assert_eq!(told, "vitrim: two.onnx: there is no tower 'middle': the model has 'left', 'right'\n");
    // The only one has a name too, but need not be told from others.
    let json = folder.json(&["inspect", &vit(), "--tower", "pixel_values"]);
    assert!(json["vit"] == true && folder.json(&["inspect", &vit()])["towers"].is_null());
}

#[test]
fn every_tower_is_merged_or_the_one_that_is_asked_for() {
    let folder = Folder::new();
    folder.save("two.onnx", &tiny::siamese());
    let merge = |rest: &[&str]| folder.json(&[&["merge", "two.onnx", "out.onnx"][..], rest].concat());
    let merged = |json: &Json| {
        let towers = json["report"]["towers"].as_array().expect("there are several").clone();
        towers.iter().map(|tower| tower["name"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(merged(&merge(&["-r", "0"])), ["left", "right"]);
    folder.prints(&["verify", "two.onnx", "out.onnx", "--atol", "0"]);
    let both = merge(&["-r", "3", "--trace-source"]);
    assert_eq!(merged(&both), ["left", "right"]);
    let out = folder.model("out.onnx");
    let outputs: Vec<&str> = out.graph().outputs().iter().map(|&output| out.graph().value(output).name()).collect();
    assert_eq!(outputs, ["y", "token_source/left", "token_source/right"]);
    folder.prints(&["verify", "two.onnx", "out.onnx", "--min-cosine", "0.9"]);
    let one = merge(&["-r", "3", "--tower", "right"]);
    assert_eq!((merged(&one), tokens(&one)), (vec!["right".to_owned()], vec![13, 10]));
    let flops = |json: &Json| json["report"]["cost_after"]["flops"].as_u64().expect("extents are known");
    assert!(flops(&both) < flops(&one));
    folder.prints(&["verify", "two.onnx", "out.onnx", "--min-cosine", "0.9"]);
    assert_eq!(folder.model("out.onnx").metadata("vitrim.tokens"), Some("right=13,10"));
    folder.write("r.toml", folder.model("out.onnx").metadata("vitrim.recipe").expect("the recipe is recorded"));
    folder.prints(&["rewrite", "two.onnx", "again.onnx", "--recipe", "r.toml"]);
    assert!(folder.bytes("again.onnx") == folder.bytes("out.onnx"));
    let quick = ["--rounds", "1", "--warm-up", "0", "--min-time", "0", "--floor"];
    folder.prints(&[&["bench", "two.onnx", "out.onnx"][..], &quick].concat());
    let out = folder.prints(&["merge", "two.onnx", "out.onnx", "-r", "3"]);
    assert!(out.starts_with("tower left\nblock ") && out.contains("\ntower right\nblock "), "{out}");
    let told = folder.refuses(&["merge", "two.onnx", "new.onnx", "-r", "3", "--tower", "middle"]);
    assert_eq!(told, "vitrim: two.onnx: there is no tower 'middle': the model has 'left', 'right'\n");
}

/// Two images whose patches are alike in pairs, each pair unlike the others: merging such pairs changes nothing.
fn pictures_of_pairs(inputs: &[&str]) -> Vec<u8> {
    let mut tensors = NamedTensors::default();
    for (number, name) in inputs.iter().enumerate() {
        let shape = [2, 3, 16, 16];
        let pixel = |at: usize| {
            let (column, row, plane) = (at % 16 / 8, at / 16 % 16 / 4, at / 256);
            ((column + 2 * row + 8 * plane + 48 * number) * 29 % 53) as f32 / 53.0 - 0.5
        };
        let pixels = (0..shape.iter().product()).map(pixel).collect();
        tensors.push(*name, tensor::Tensor::from_vec::<f32>(&shape, pixels).expect("so many pixels"));
    }
    let mut bytes = std::io::Cursor::new(Vec::new());
    write_npz(&mut bytes, &tensors).expect("it can be written");
    bytes.into_inner()
}

/// What two towers give for each of their tokens may meet in any way.
#[test]
fn towers_may_meet_token_by_token() {
    let folder = Folder::new();
    let turned = [("perm", Attribute::Ints(vec![0, 2, 1]))];
    let ways: [fn(&mut GraphBuilder, [_; 2]) -> _; 4] = [
        |graph, [a, b]| graph.op("Concat", "met", &[a, b], &[("axis", Attribute::Int(1))]),
        |graph, [a, b]| graph.op("Concat", "met", &[a, b], &[("axis", Attribute::Int(2))]),
        |graph, [a, b]| graph.op("Mul", "met", &[a, b], &[]),
        |graph, [a, b]| graph.op("MatMul", "met", &[a, b], &[]),
    ];
    for (way, meet) in ways.into_iter().enumerate() {
        for same_image in [false, true] {
            let mut graph = GraphBuilder::new();
            let left = tiny::image(&mut graph, "left");
            let right = if same_image { left } else { tiny::image(&mut graph, "right") };
            let a = tiny::tower(&mut graph, "a", left, 2);
            let mut b = tiny::tower(&mut graph, "b", right, 2);
            if way == 3 {
                b = graph.op("Transpose", "turned", &[b], &turned);
            }
            let y = meet(&mut graph, [a, b]);
            folder.save("two.onnx", &tiny::model(graph, y));
            folder.write("pairs.npz", pictures_of_pairs(if same_image { &["left"] } else { &["left", "right"] }));
            for r in ["4,0", "0,4"] {
                let json = folder.json(&["merge", "two.onnx", "out.onnx", "-r", r]);
                assert_eq!(json["report"]["towers"].as_array().map(Vec::len), Some(2), "way {way}: {json}");
                folder.prints(&["verify", "two.onnx", "out.onnx", "--input", "pairs.npz", "--rtol", "1e-5"]);
            }
        }
    }
}

#[test]
fn refusals_name_the_file() {
    let folder = Folder::new();
    let swin = zoo("timm_swin_ts17");
    for command in [&["inspect", &swin][..], &["merge", &swin, "out.onnx", "-r", "4"]] {
        let told = folder.refuses(command);
        assert!(told.starts_with(&format!("vitrim: {swin}: the tokens cannot be regrouped: ")), "{told}");
    }
    let told = folder.refuses(&["merge", &vit(), "out.onnx", "-r", "4,4,4,4,4"]);
    assert_eq!(told, format!("vitrim: {}: r names 5 blocks, the model has 4\n", vit()));
    let told = folder.refuses(&["merge", &vit(), "out.onnx", "--keep-tokens", "60,60,60,60,60"]);
    assert_eq!(told, format!("vitrim: {}: keep_tokens names 5 blocks, the model has 4\n", vit()));
}

#[test]
fn bodies_can_be_written_out() {
    let folder = Folder::new();
    for name in ["timm_vit_ts17_unfused", "hf_vit_sdpa_ts14", "flax_nnx_vit_functions_op18", "timm_deit_dist_ts17"] {
        let model = zoo(name);
        folder.prints(&["merge", &model, "calls.onnx", "-r", "4"]);
        folder.prints(&["merge", &model, "inlined.onnx", "-r", "4", "--inline"]);
        let (calls, inlined) = (folder.model("calls.onnx"), folder.model("inlined.onnx"));
        assert!(operators(calls.graph()).iter().any(|op| op == "ai.vitrim.TokenMerge"), "{name}");
        assert!(calls.functions().iter().all(|function| function.key.domain == "ai.vitrim"), "{name}");
        assert!(inlined.functions().is_empty(), "{name}");
        assert!(operators(inlined.graph()).iter().all(|op| !op.starts_with("ai.vitrim")), "{name}");
        assert_eq!(calls.opsets().get("ai.vitrim"), Some(1));
        assert_eq!(calls.metadata("vitrim.recipe"), inlined.metadata("vitrim.recipe"));
        folder.prints(&["verify", "calls.onnx", "inlined.onnx", "--rtol", "1e-6"]);
    }
}

#[test]
fn what_vitrim_wrote_is_not_rewritten_by_accident() {
    let folder = Folder::new();
    folder.prints(&["merge", &vit(), "once.onnx", "-r", "4"]);
    folder.prints(&["merge", &vit(), "inlined.onnx", "-r", "4", "--inline"]);
    for once in ["once.onnx", "inlined.onnx"] {
        let told = folder.refuses(&["merge", once, "twice.onnx", "-r", "4"]);
        assert!(told.contains("was rewritten before (by vitrim ") && told.contains("--force"), "{told}");
        // With --force it depends on what can be proved, and over merged tokens nothing can.
        let told = folder.refuses(&["merge", once, "twice.onnx", "-r", "4", "--force"]);
        assert!(told.contains("the tokens cannot be regrouped: "), "{told}");
    }
    // Only the last block merges: the others are as they were. What is made of them must compute the right thing.
    folder.prints(&["merge", &vit(), "late.onnx", "-r", "0,0,0,4", "--inline", "--keep-dead"]);
    folder.refuses(&["merge", "late.onnx", "twice.onnx", "-r", "4"]);
    let output = folder.run(&["merge", "late.onnx", "twice.onnx", "-r", "2,0,0,0", "--force"]);
    match output.status.code() {
        Some(0) => drop(folder.prints(&["verify", "late.onnx", "twice.onnx", "--min-cosine", "0.99"])),
        code => assert_eq!(code, Some(2), "{}", text(&output.stderr)),
    }
    // A model in which nothing was changed is no rewritten model.
    folder.prints(&["merge", &vit(), "same.onnx", "-r", "0", "--keep-dead"]);
    assert_eq!(folder.model("same.onnx").metadata("vitrim.version"), None);
    folder.prints(&["verify", &vit(), "same.onnx", "--atol", "0"]);
    folder.prints(&["merge", "same.onnx", "again.onnx", "-r", "4"]);
    folder.prints(&["merge", &vit(), "direct.onnx", "-r", "4"]);
    assert!(folder.bytes("again.onnx") == folder.bytes("direct.onnx"));
}

/// Where only the class token is read, the last block has no other, and what it would merge is not merged.
#[test]
fn tokens_that_nothing_reads_are_left_out() {
    let folder = Folder::new();
    folder.write("none.toml", "");
    folder.prints(&["rewrite", &vit(), "alone.onnx", "--recipe", "none.toml"]);
    folder.prints(&["verify", &vit(), "alone.onnx", "--atol", "1e-5"]);
    let alone = folder.model("alone.onnx");
    assert_eq!((alone.metadata("vitrim.recipe"), alone.metadata("vitrim.tokens")), (Some("pass = []\n"), None));
    assert!(folder.refuses(&["merge", "alone.onnx", "twice.onnx", "-r", "4"]).contains("was rewritten before"));
    // The same graph as that of a merge that merges nothing.
    folder.prints(&["merge", &vit(), "nothing.onnx", "-r", "0"]);
    assert_eq!(print_graph(folder.model("nothing.onnx").graph()), print_graph(alone.graph()));

    let merges = |rest: &[&str]| {
        folder.prints(&[&["merge", &vit(), "out.onnx", "-r", "4"][..], rest].concat());
        let model = folder.model("out.onnx");
        model.graph().nodes().filter(|(_, node)| node.op.name == "TokenMerge").count()
    };
    // Whoever asks where tokens went asks for the last merge too.
    assert_eq!((merges(&[]), merges(&["--keep-dead"]), merges(&["--trace-source"])), (3, 4, 4));
    let json = |rest: &[&str]| folder.json(&[&["merge", &vit(), "out.onnx", "-r", "4"][..], rest].concat());
    let (all, read) = (json(&["--keep-dead"]), json(&[]));
    assert_eq!(all["report"]["notes"], serde_json::json!([]));
    let note = read["report"]["notes"][0].as_str().expect("a note");
    assert!(note.starts_with("dead tokens: ") && note.contains(" compute 1 of "), "{note}");
    let flops = |report: &Json| report["report"]["cost_after"]["flops"].as_u64().expect("it is known");
    assert!(flops(&read) < flops(&all), "{read}");

    // What reads all tokens is left alone; so is a model that is none.
    let features = zoo("timm_vit_features_ts17");
    folder.prints(&["rewrite", &features, "same.onnx", "--recipe", "none.toml"]);
    folder.prints(&["merge", &features, "direct.onnx", "-r", "0", "--keep-dead"]);
    assert!(folder.bytes("same.onnx") == folder.bytes("direct.onnx"));
    assert_eq!(folder.model("same.onnx").metadata("vitrim.version"), None);
    let windows = folder.refuses(&["rewrite", &zoo("timm_swin_ts17"), "out.onnx", "--recipe", "none.toml"]);
    assert!(windows.contains("the tokens cannot be regrouped: "), "{windows}");
}

/// A merge changes what `Shape` says; what the model computes from the token count must not notice.
#[test]
fn token_counts_that_a_model_computes_with_stay() {
    let folder = Folder::new();
    let model = Model::read(Path::new(&vit())).expect("the fixture is a model");
    let graph = model.graph();
    let find = |name: &str| graph.find_value(name).expect("the fixture has this value");
    let logits = graph.outputs()[0];
    let mut patch = Patch::new(&model, "counts");
    let integers = TensorType { dtype: DataType::I64, dims: None };
    let one = patch.constant("one", Tensor::i64(1));
    let two = patch.constant("two", Tensor::shape(&[2]));
    for (name, op, value) in [
        ("shape", "Shape", "/blocks/blocks.3/Add_1_output_0"),
        ("size", "Size", "/blocks/blocks.2/Add_1_output_0"),
        ("keys_shape", "Shape", "/blocks/blocks.3/attn/Squeeze_1_output_0"),
        ("keys_size", "Size", "/blocks/blocks.3/attn/Squeeze_1_output_0"),
    ] {
        let stated = patch.op(op, name, &[find(value)], &[]);
        patch.append_output(name, stated, integers.clone());
    }
    // As a factor, by the first axis of the tokens and by that of the keys.
    let shape = patch.op("Shape", "shape", &[find("/blocks/blocks.3/Add_1_output_0")], &[]);
    let keys = patch.op("Shape", "shape", &[find("/blocks/blocks.3/attn/Squeeze_1_output_0")], &[]);
    let counts = [patch.op("Gather", "n", &[shape, one], &[]), patch.op("Gather", "n", &[keys, two], &[])];
    let zero = patch.op("Sub", "zero", &[logits, logits], &[]);
    for (name, count) in ["factor", "keys_factor"].into_iter().zip(counts) {
        let float = patch.op("Cast", "n", &[count], &[("to", Attribute::Int(1))]);
        let sum = patch.op("Add", "sum", &[zero, float], &[]);
        patch.append_output(name, sum, TensorType { dtype: DataType::F32, dims: None });
    }
    let (counting, _) = patch.apply(&model).expect("the patch is sound");
    let path = folder.at("counting.onnx");
    Model::write(counting.verify().expect("it is valid"), &path, Path::new(&vit())).expect("it can be written");
    folder.prints(&["merge", "counting.onnx", "out.onnx", "-r", "4"]);
    folder.prints(&["merge", &vit(), "plain.onnx", "-r", "4"]);
    let report = folder.json(&["verify", "counting.onnx", "out.onnx"]);
    for output in report["outputs"].as_array().expect("outputs are listed").iter().skip(1) {
        assert_eq!(output["figures"]["max_abs"], 0.0, "{output}");
    }
    folder.prints(&["verify", "plain.onnx", "out.onnx", "--rtol", "1e-6"]);
}

#[test]
fn every_share_can_be_spelt() {
    let folder = Folder::new();
    let vit = vit();
    // Of 64 patches ⌈44.8⌉ stay, of those ⌈31.5⌉, and the class token.
    for (request, expected) in [
        (&["--keep", "0.7", "--at", "1"][..], [65, 46, 46, 46]),
        (&["--keep", "0.7", "--at", "1,2"], [65, 46, 33, 33]),
        (&["--keep", "1,0.7,0.7,1"], [65, 46, 33, 33]),
        (&["--keep", "1,0.7"], [65, 46, 46, 46]),
        (&["--keep", "1", "--at", "0,1,2,3"], [65, 65, 65, 65]),
        (&["--keep", "0.999", "--at", "2"], [65, 65, 65, 65]),
        // What leaves is one token more, and a patch like any other for the next pruning: of 46, ⌈32.2⌉.
        (&["--keep", "0.7", "--at", "1,2", "--fuse"], [65, 47, 35, 35]),
        (&["--keep", "0.01", "--at", "3"], [65, 65, 65, 2]),
        (&["--keep", "0.7", "--at", "1", "--attention-keep", "0.5"], [65, 46, 46, 46]),
    ] {
        let json = folder.json(&[&["prune", &vit, "out.onnx"][..], request].concat());
        assert_eq!(tokens(&json), expected, "{request:?}");
        let model = folder.model("out.onnx");
        let recorded = expected.map(|count| count.to_string()).join(",");
        assert_eq!(model.metadata("vitrim.tokens"), Some(recorded.as_str()), "{request:?}");
        let recipe = model.metadata("vitrim.recipe").expect("the recipe is recorded").to_owned();
        folder.write("r.toml", &recipe);
        folder.prints(&["rewrite", &vit, "rewritten.onnx", "--recipe", "r.toml"]);
        assert!(folder.bytes("out.onnx") == folder.bytes("rewritten.onnx"), "{request:?}: {recipe}");
        folder.prints(&["verify", &vit, "out.onnx", "--min-cosine", "0.5"]);
    }
}

#[test]
fn shares_that_make_no_sense_are_refused() {
    let folder = Folder::new();
    let vit = vit();
    let old = zoo("timm_vit_features_ts17");
    for (model, command, request, message) in [
        (&vit, "prune", &["--keep", "0"][..], "lies outside 0 to 1"),
        (&vit, "prune", &["--keep", "-0.5", "--at", "1"], "lies outside 0 to 1"),
        (&vit, "prune", &["--keep", "1.5", "--at", "1"], "lies outside 0 to 1"),
        (&vit, "prune", &["--keep", "NaN", "--at", "1"], "lies outside 0 to 1"),
        (&vit, "prune", &["--keep", "0.7"], "in block 9, and the model has the blocks 0 to 3"),
        (&vit, "prune", &["--keep", "1,1,1,1,0.7"], "in block 4"),
        (&vit, "prune", &["--keep", "1,0.7", "--at", "1"], "leave at out"),
        (&vit, "prune", &["--keep", "0.7", "--at", "1", "--attention-keep", "0"], "share of connections to keep"),
        (
            &vit,
            "prune",
            &["--keep", "0.7", "--at", "1", "--fuse", "--runtime-keep", "--attention-keep", "0.5"],
            "prune without fusing, or without the attention level",
        ),
        (&vit, "prune", &["--keep", "1,0.7", "--runtime-keep"], "say in which blocks with at"),
        (&old, "merge", &["-r", "4,2", "--runtime-r"], "one r for all blocks"),
    ] {
        let told = folder.refuses(&[&[command, model, "out.onnx"][..], request].concat());
        assert!(told.contains(message), "{request:?}\n{told}");
    }
    folder.write(
        "r.toml",
        "[[pass]]\nkind = \"merge\"\nr = 4\n[[pass]]\nkind = \"merge\"\nr = 4\nproportional = false\n",
    );
    let told = folder.refuses(&["rewrite", &vit, "out.onnx", "--recipe", "r.toml"]);
    assert!(told.contains("must agree on proportional"), "{told}");
    let fused = |keep: &str| format!("[[pass]]\nkind = \"prune\"\nat = [1]\nfuse = true\n{keep}\n");
    let merged = |r: &str| format!("[[pass]]\nkind = \"merge\"\nr = {r}\n");
    let dial = "keep = 0.7\nruntime_keep = true";
    folder.write("r.toml", fused(dial) + &merged("[0, 0, 4]"));
    let told = folder.refuses(&["rewrite", &vit, "out.onnx", "--recipe", "r.toml"]);
    assert!(told.contains("prune without fusing, or merge before"), "{told}");
    // A merge before it does not meet that token, and neither is the number of tokens in doubt where nothing is a dial.
    for recipe in [merged("[4, 4]") + &fused(dial), fused("keep = 0.7") + &merged("[0, 0, 4]")] {
        folder.write("r.toml", recipe);
        folder.prints(&["rewrite", &vit, "out.onnx", "--recipe", "r.toml"]);
        folder.prints(&["verify", &vit, "out.onnx", "--min-cosine", "0.5"]);
    }
}

#[test]
fn recipes_are_recorded_and_repeat_the_merge() {
    let folder = Folder::new();
    let (cls, avg) = (vit(), zoo("timm_vit_avg_nocls_ts17"));
    for (model, request) in [
        (&cls, &["-r", "4"][..]),
        (&cls, &["-r", "6:-1"]),
        (&cls, &["-r", "6:0.3333333333333333"]),
        (&cls, &["-r", "4,2,0"]),
        (&cls, &["-r", "4294967295"]),
        (&cls, &["--ratio", "0.1"]),
        (&cls, &["--keep-tokens", "60,50"]),
        (&cls, &["-r", "4", "--align", "8"]),
        (&cls, &["-r", "4", "--align", "auto", "--metric", "query", "--trace-source", "--no-proportional"]),
        (&cls, &["-r", "4", "--protect", "3", "--metric", "hidden", "--inline"]),
        (&avg, &["-r", "4", "--plain-pooling"]),
    ] {
        folder.prints(&[&["merge", model, "merged.onnx"][..], request].concat());
        let merged = folder.model("merged.onnx");
        assert_eq!(merged.metadata("vitrim.version"), Some(env!("CARGO_PKG_VERSION")));
        let recipe = merged.metadata("vitrim.recipe").expect("the recipe is recorded").to_owned();
        assert!(recipe.contains("kind = \"merge\""), "{request:?}: {recipe}");
        folder.write("r.toml", &recipe);
        let inline: &[&str] = if request.contains(&"--inline") { &["--inline"] } else { &[] };
        folder.prints(&[&["rewrite", model, "rewritten.onnx", "--recipe", "r.toml"][..], inline].concat());
        assert!(folder.bytes("merged.onnx") == folder.bytes("rewritten.onnx"), "{request:?}: {recipe}");
    }
    // By hand, with the keys in another order and in every spelling of r.
    folder.prints(&["merge", &cls, "merged.onnx", "-r", "4,4,4,4"]);
    for r in ["[4, 4, 4, 4]", "\"4,4,4,4\""] {
        folder.write("r.toml", format!("# by hand\n[[pass]]\nr = {r}\nkind = \"merge\"\n"));
        folder.prints(&["rewrite", &cls, "rewritten.onnx", "--recipe", "r.toml"]);
        assert_eq!(
            folder.model("merged.onnx").metadata("vitrim.tokens"),
            folder.model("rewritten.onnx").metadata("vitrim.tokens")
        );
        folder.prints(&["verify", "merged.onnx", "rewritten.onnx", "--atol", "0"]);
    }
}

#[test]
fn recipes_with_errors_are_refused() {
    let folder = Folder::new();
    let refused = |recipe: &str, message: &str| {
        folder.write("r.toml", recipe);
        let told = folder.refuses(&["rewrite", &vit(), "out.onnx", "--recipe", "r.toml"]);
        assert!(told.contains(message), "{recipe}\n{told}");
    };
    refused("[[pass]]\nkind = \"merge\"\nr = 4\nratioo = 0.1\n", "ratioo");
    refused("[[pass]]\nkind = \"merge\"\nr = 4\n[other]\nx = 1\n", "other");
    refused("[[pass]]\nkind = \"blend\"\nr = 4\n", "blend");
    refused("[[pass]]\nr = 4\n", "kind");
    refused("[[pass]\nkind = \"merge\"\n", "line 1");
    refused("[[pass]]\nkind = \"merge\"\nr = 4\nr = 5\n", "line 4");
    refused("[[pass]]\nkind = \"merge\"\nr = \"many\"\n", "'many' is no number of tokens");
    refused("[[pass]]\nkind = \"merge\"\nr = -4\n", "recipe");
    refused("[[pass]]\nkind = \"merge\"\nr = 4\nalign = 0\n", "neither 'auto' nor a number from 1 to 4096");
    refused("[[pass]]\nkind = \"merge\"\nr = 4\nmetric = \"colour\"\n", "colour");
    refused("[[pass]]\nkind = \"merge\"\n", "how much to merge is not given");
    refused("[[pass]]\nkind = \"merge\"\nr = 4\nratio = 0.1\n", "exclude each other");
    refused("[[pass]]\nkind = \"merge\"\nkeep_tokens = [3]\n", "block 0 cannot keep 3 of 65 tokens");
    refused("\u{0}\u{1}", "the recipe");
    let told = folder.refuses(&["rewrite", &vit(), "out.onnx", "--recipe", "none.toml"]);
    assert!(told.contains("cannot read none.toml"), "{told}");
    folder.write("binary.toml", [0xff, 0xfe, 0x00]);
    let told = folder.refuses(&["rewrite", &vit(), "out.onnx", "--recipe", "binary.toml"]);
    assert!(told.contains("cannot read binary.toml"), "{told}");
}

#[test]
fn reports_go_to_standard_output() {
    let folder = Folder::new();
    let merge = ["merge", &vit(), "out.onnx", "-r", "4"];
    let output = folder.run(&merge);
    let out = text(&output.stdout);
    let noted = text(&output.stderr);
    assert!(output.status.success() && noted.starts_with("note: dead tokens: ") && noted.lines().count() == 1);
    for part in ["tokens out", "nodes   ", "GFLOPs  ", "written to out.onnx\n"] {
        assert!(out.contains(part), "{out}");
    }
    let json = folder.json(&merge);
    assert_eq!(json["output"], "out.onnx");
    let report = &json["report"];
    assert!(report["nodes_after"].as_u64() < report["nodes_before"].as_u64(), "{json}");
    assert!(report["cost_after"]["flops"].as_u64() < report["cost_before"]["flops"].as_u64(), "{json}");
    assert!(report["notes"].is_array());

    let json = folder.json(&["inspect", &vit()]);
    assert_eq!((&json["vit"], &json["num_blocks"], &json["heads"]), (&true.into(), &4.into(), &3.into()));
    assert_eq!((&json["num_tokens"], &json["prefix_tokens"]["cls"]), (&65.into(), &1.into()));
    let out = folder.prints(&["inspect", &vit()]);
    assert!(out.contains("blocks          4\n") && out.contains("tokens          65\n"), "{out}");

    // A refusal has one line, on the other side; as JSON it is an answer.
    let swin = zoo("timm_swin_ts17");
    folder.refuses(&["inspect", &swin]);
    let output = folder.run(&["inspect", &swin, "--json"]);
    let json: Json = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!((output.status.code(), &json["vit"], &json["schema_version"]), (Some(2), &false.into(), &1.into()));
    assert!(json["reason"].as_str().is_some_and(|reason| !reason.is_empty()) && output.stderr.is_empty());

    for arguments in [&["--help"][..], &["--version"], &["merge", "--help"]] {
        let output = folder.run(arguments);
        assert!(output.status.success() && output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn any_path_will_do() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new();
    let input = folder.at("Modèle – ä b.onnx");
    fs::copy(vit(), &input).expect("the folder can be written");
    let names: [&OsStr; 3] =
        [OsStr::new("out put.onnx"), OsStr::new("ヴィ.onnx"), OsStr::from_bytes(b"latin-\xe9.onnx")];
    for name in names {
        for json in [&[][..], &[OsStr::new("--json")]] {
            let merge = [OsStr::new("merge"), input.as_os_str(), name, OsStr::new("-r"), OsStr::new("4")];
            let output = folder.run(&[&merge[..], json].concat());
            assert!(output.status.success(), "{name:?}: {}", text(&output.stderr));
            assert!(Model::read(&folder.path().join(name)).is_ok());
        }
        let output = folder.run(&[OsStr::new("verify"), input.as_os_str(), name, OsStr::new("--json")]);
        assert!(output.status.success(), "{name:?}: {}", text(&output.stderr));
    }
    // Names that look like options.
    fs::copy(vit(), folder.at("-r.onnx")).expect("the folder can be written");
    folder.prints(&["merge", "-r", "4", "--", "-r.onnx", "-o.onnx"]);
    assert!(folder.at("-o.onnx").exists());
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let folder = Folder::new();
    fs::create_dir(folder.at("sub")).expect("the folder can be written");
    for name in
        ["timm_vit_ts17_fused", "hf_vit_sdpa_dynamo18", "timm_dinov2_reg4_swiglu_ts17", "timm_vit_features_ts17"]
    {
        for rest in [&[][..], &["--inline", "--trace-source"]] {
            let outputs = ["one.onnx", "two.onnx", "sub/three.onnx"];
            for output in outputs {
                folder.prints(&[&["merge", &zoo(name), output, "-r", "6:-1"][..], rest].concat());
            }
            assert!(outputs.windows(2).all(|pair| folder.bytes(pair[0]) == folder.bytes(pair[1])), "{name} {rest:?}");
        }
    }
    // An older file in the place of the output makes no difference.
    folder.write("sub/three.onnx", vec![b'x'; 5_000_000]);
    folder.prints(&["merge", &vit(), "sub/three.onnx", "-r", "4"]);
    folder.prints(&["merge", &vit(), "one.onnx", "-r", "4"]);
    assert!(folder.bytes("sub/three.onnx") == folder.bytes("one.onnx"));
}

/// The model with its weights in a file beside it: the model, and the file's bytes.
fn externalised(model: &[u8], location: &str) -> (Vec<u8>, Vec<u8>) {
    let mut weights = vec![0; 64];
    let mut result = Vec::new();
    for (field, bytes) in wire::fields(model) {
        if field != wire::MODEL_GRAPH {
            result.extend(bytes);
            continue;
        }
        let mut graph = Vec::new();
        for (field, bytes) in wire::fields(wire::content(bytes)) {
            let parts = if field == wire::GRAPH_INITIALIZER { wire::fields(wire::content(bytes)) } else { Vec::new() };
            let raw = parts.iter().find(|(part, _)| *part == wire::TENSOR_RAW).map(|(_, raw)| wire::content(raw));
            let Some(raw) = raw.filter(|raw| raw.len() >= 256) else {
                graph.extend(bytes);
                continue;
            };
            let others = parts.iter().filter(|(part, _)| *part != wire::TENSOR_RAW).flat_map(|(_, part)| part.to_vec());
            let (offset, length) = (weights.len().to_string(), raw.len().to_string());
            let place = wire::external_data(&[("location", location), ("offset", &offset), ("length", &length)]);
            graph.extend(wire::bytes(field, others.chain(place).collect::<Vec<u8>>()));
            weights.extend(raw);
        }
        result.extend(wire::bytes(field, graph));
    }
    (result, weights)
}

#[test]
fn external_weights_stay_or_come_along() {
    let folder = Folder::new();
    let whole = fs::read(vit()).expect("the fixture can be read");
    fs::create_dir_all(folder.at("model/data")).expect("the folder can be written");
    for location in ["weights.bin", "data/weights.bin"] {
        let (model, weights) = externalised(&whole, location);
        assert!(weights.len() > model.len());
        folder.write("model/in.onnx", model);
        folder.write(&format!("model/{location}"), &weights);
        folder.prints(&["merge", &vit(), "direct.onnx", "-r", "4"]);

        // In the same folder the new model shares them.
        folder.prints(&["merge", "model/in.onnx", "model/out.onnx", "-r", "4"]);
        assert_eq!(folder.model("model/out.onnx").external_locations(), [location]);
        folder.prints(&["verify", "direct.onnx", "model/out.onnx", "--atol", "0"]);
        assert!(folder.bytes(&format!("model/{location}")) == weights);

        // Into another one they come along, and the model works without the first one.
        let other = Folder::new();
        let target = other.at("out.onnx");
        let target = target.to_str().expect("temporary folders have names of text");
        folder.prints(&["merge", "model/in.onnx", target, "-r", "4"]);
        assert_eq!(other.names(), BTreeSet::from(["out.onnx", "out.onnx.data"].map(str::to_owned)));
        assert!(other.bytes("out.onnx.data") == weights);
        fs::rename(folder.at("model"), folder.at("gone")).expect("the folder can be renamed");
        folder.prints(&["verify", "direct.onnx", target, "--atol", "0"]);
        fs::rename(folder.at("gone"), folder.at("model")).expect("the folder can be renamed");
        // A refused run places nothing.
        let empty = Folder::new();
        let target = empty.at("out.onnx");
        let target = target.to_str().expect("temporary folders have names of text");
        folder.refuses(&["merge", "model/in.onnx", target, "--keep-tokens", "3"]);
        assert!(empty.names().is_empty());
    }
}

/// Checks that a text is XML as far as tags go, and counts the elements by name.
fn elements(xml: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut found = Vec::new();
    let mut rest = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").expect("it has a declaration");
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>') && (!open.is_empty() || rest[..start].trim().is_empty()), "{xml}");
        let end = rest.find('>').expect("tags end");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "<{tag}>");
        let name = tag.trim_matches('/').split_whitespace().next().unwrap_or_default().to_owned();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_ref(), Some(&name), "{xml}");
            continue;
        }
        found.push(name.clone());
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{xml}");
    for (at, _) in xml.match_indices('&') {
        assert!(
            ["&amp;", "&lt;", "&gt;", "&quot;", "&apos;"].iter().any(|entity| xml[at..].starts_with(entity)),
            "{xml}"
        );
    }
    found
}

#[test]
fn verify_says_whether_models_agree() {
    let folder = Folder::new();
    let vit = vit();
    folder.prints(&["merge", &vit, "out.onnx", "-r", "4"]);
    // 0: nothing asked but that it runs, or limits that hold.
    let all = ["--atol", "1e9", "--rtol", "1e9", "--min-cosine", "0", "--max-top1-drop", "100"];
    let run = |rest: &[&str]| folder.run(&[&["verify", &vit, "out.onnx"][..], rest].concat());
    assert_eq!(run(&[]).status.code(), Some(0));
    let output = run(&[&all[..], &["--junit", "good.xml"]].concat());
    assert_eq!((output.status.code(), output.stderr.is_empty()), (Some(0), true));
    assert!(text(&output.stdout).contains("passed: "));
    let good = text(&folder.bytes("good.xml"));
    let found = elements(&good);
    assert_eq!(found.iter().filter(|name| *name == "testcase").count(), 6, "{good}");
    assert!(good.contains("tests=\"6\" failures=\"0\"") && !found.contains(&"failure".to_owned()), "{good}");

    // 1: a limit that does not.
    let output = run(&["--atol", "1e-9", "--min-cosine", "0", "--junit", "bad.xml", "--json"]);
    assert_eq!((output.status.code(), output.stderr.is_empty()), (Some(1), true));
    let json: Json = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!((&json["passed"], &json["schema_version"]), (&false.into(), &1.into()));
    let bad = text(&folder.bytes("bad.xml"));
    assert_eq!(elements(&bad).iter().filter(|name| *name == "failure").count(), 1, "{bad}");
    assert!(bad.contains("failures=\"1\""), "{bad}");
    let output = run(&["--atol", "1e-9"]);
    assert!(output.status.code() == Some(1) && text(&output.stdout).contains("FAILED atol of logits"));
    // The traced model has an output more; the other way round it lacks one.
    folder.prints(&["merge", &vit, "traced.onnx", "-r", "4", "--trace-source"]);
    let output = folder.run(&["verify", "traced.onnx", "out.onnx", "--junit", "missing.xml"]);
    assert_eq!(output.status.code(), Some(1));
    elements(&text(&folder.bytes("missing.xml")));

    // 2: there is nothing to judge.
    folder.refuses(&["verify", &vit, "nowhere.onnx"]);
    folder.refuses(&["verify", "nowhere.npz", &vit]);
    folder.refuses(&["verify", &vit, "out.onnx", "--input", "nowhere.npz"]);
    folder.refuses(&["verify", &vit, "out.onnx", "--batch", "0"]);
    folder.refuses(&["verify", &vit, "out.onnx", "--scores", "nothing", "--input", &vit]);
    folder.refuses(&["verify", &vit, "out.onnx", "--junit", "nowhere/x.xml"]);
    folder.refuses(&["verify", &vit, "out.onnx", "--runtime", "ort", "--ort-lib", "nowhere.so"]);
    folder.refuses(&["verify", &vit, &zoo("timm_swin_ts17")]);
}

#[test]
fn bench_compares_speeds() {
    let folder = Folder::new();
    folder.prints(&["merge", &vit(), "out.onnx", "-r", "8"]);
    let quick = ["--rounds", "3", "--warm-up", "1", "--min-time", "0"];
    let before = folder.names();
    let json = folder.json(&[&["bench", &vit(), "out.onnx", "--batch", "1,2", "--floor"][..], &quick].concat());
    let batches = json["batches"].as_array().expect("there is a table for each batch");
    assert_eq!(batches.len(), 2);
    for (batch, size) in batches.iter().zip([1, 2]) {
        assert_eq!((&batch["batch"], &batch["rounds"]), (&size.into(), &3.into()));
        let models = batch["models"].as_array().expect("there are models");
        assert_eq!(models.len(), 3);
        assert!(models[0]["speed_up"].is_null() && models[1..].iter().all(|m| m["speed_up"]["median"].is_number()));
        assert!(models.iter().all(|model| model["milliseconds"]["median"].as_f64().is_some_and(|ms| ms > 0.0)));
        assert!(models[2]["label"].as_str().is_some_and(|label| label.contains("floor")), "{json}");
    }
    let out = folder.prints(&[&["bench", &vit(), "out.onnx"][..], &quick].concat());
    assert!(out.contains("speed-up") && out.contains("images/s"), "{out}");
    assert_eq!(folder.names(), before);
    folder.refuses(&["bench", &vit(), "nowhere.onnx"]);
    folder.refuses(&["bench", &vit(), &vit(), "--floor"]);
    folder.refuses(&["bench", &vit(), "out.onnx", "--rounds", "0"]);
    folder.refuses(&["bench", &vit(), "out.onnx", "--min-time", "nan"]);
    assert_eq!(folder.run(&["bench", &vit()]).status.code(), Some(2));
}

#[test]
fn nothing_else_is_left_in_the_folder() {
    let folder = Folder::new();
    fs::copy(vit(), folder.at("in.onnx")).expect("the folder can be written");
    folder.prints(&["inspect", "in.onnx"]);
    folder.prints(&["merge", "in.onnx", "out.onnx", "-r", "4"]);
    folder.prints(&["verify", "in.onnx", "out.onnx"]);
    assert_eq!(folder.names(), BTreeSet::from(["in.onnx", "out.onnx"].map(str::to_owned)));
    assert!(Path::new(&vit()).exists() && folder.bytes("in.onnx") == fs::read(vit()).expect("the fixture can be read"));
}

#[test]
fn train_writes_what_each_runtime_trains_with() {
    let folder = Folder::new();
    let files = |name: &str| names(&folder.at(name));
    let out = folder.prints(&["train", &vit(), "stock"]);
    assert!(out.starts_with("trains ") && out.ends_with("written to stock\n"), "{out}");
    let expected = ["eval.onnx", "manifest.json", "parameters.safetensors", "train.onnx"].map(str::to_owned);
    assert_eq!(files("stock"), BTreeSet::from(expected));

    let ort = ["train", &vit(), "ort", "--format", "ort-training"];
    let with = |more: &[&'static str]| [&ort[..], more].concat();
    for (more, reason) in [
        (&["--optimizer", "sgd"][..], "its gradient descent has neither momentum nor weight decay"),
        (&["--ema", "0.9"], "it keeps no running means of parameters"),
        (&["--gradients-only"], "--gradients-only is of --format stock"),
        (&["--json"], "--json is of --format stock"),
    ] {
        let told = folder.refuses(&with(more));
        assert!(told.contains(reason), "{told}");
    }
    let output = folder.run(&with(&["--accumulate"]));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), out.replace("to stock", "to ort"));
    let notes = text(&output.stderr);
    assert_eq!(notes.matches("note: ONNX Runtime Training ").count(), 2, "{notes}");
    let expected = ["checkpoint", "eval_model.onnx", "optimizer_model.onnx", "training_model.onnx"].map(str::to_owned);
    assert_eq!(files("ort"), BTreeSet::from(expected));
}

#[test]
fn expansion_trains_in_stages_in_every_format() {
    let folder = Folder::new();
    let expand = ["--expand", "0.5,0.75,1", "--expand-at", "0,100,200"];
    folder.prints(&[&["train", &vit(), "stock"][..], &expand].concat());
    let stages = ["train_0.5.onnx", "train_0.75.onnx", "train.onnx"];
    let files = |all: &[&str]| all.iter().copied().map(str::to_owned).collect::<BTreeSet<_>>();
    let expected = [&stages[..], &["eval.onnx", "manifest.json", "parameters.safetensors"]].concat();
    assert_eq!(names(&folder.at("stock")), files(&expected));
    let manifest: Json = serde_json::from_slice(&folder.bytes("stock/manifest.json")).expect("it is JSON");
    let schedule =
        |(at, epoch, keep): (usize, usize, f64)| json!({ "epoch": epoch, "keep": keep, "graph": stages[at] });
    assert_eq!(manifest["schedules"], Json::from_iter([(0, 0, 0.5), (1, 100, 0.75), (2, 200, 1.0)].map(schedule)));

    let output = folder.run(&[&["train", &vit(), "ort", "--format", "ort-training"][..], &expand].concat());
    let notes = text(&output.stderr);
    assert!(output.status.success(), "{notes}");
    let stages = ["training_model_0.5.onnx", "training_model_0.75.onnx", "training_model.onnx"];
    let expected = [&stages[..], &["checkpoint", "eval_model.onnx", "optimizer_model.onnx"]].concat();
    assert_eq!(names(&folder.at("ort")), files(&expected));
    let note = "note: train in stages, each from the checkpoint of the one before: training_model_0.5.onnx from epoch 0 on, \
                training_model_0.75.onnx from epoch 100 on, training_model.onnx from epoch 200 on\n";
    assert!(notes.contains(note), "{notes}");
}

/// The short forms of `merge` and `prune`, in training: each is the recipe that it stands for.
#[test]
fn training_has_the_short_forms_of_merging_and_pruning() {
    let folder = Folder::new();
    let vit = vit();
    let merge = "[[pass]]\nkind = \"merge\"\n";
    let prune = "[[pass]]\nkind = \"prune\"\n";
    for (request, recipe, dials) in [
        (&["-r", "4"][..], format!("{merge}r = 4\n"), json!([])),
        (&["-r", "4", "--proportional"], format!("{merge}r = 4\nproportional = true\n"), json!([])),
        (&["--ratio", "0.1", "--metric", "query"], format!("{merge}ratio = 0.1\nmetric = \"query\"\n"), json!([])),
        (
            &["-r", "4", "--runtime-r"],
            format!("{merge}r = 4\nruntime_r = true\n"),
            json!([{ "input": "r", "dtype": "int64", "default": 4.0 }]),
        ),
        (
            &["--keep", "0.7", "--at", "1,2", "--fuse"],
            format!("{prune}keep = 0.7\nat = [1, 2]\nfuse = true\n"),
            json!([]),
        ),
        (
            &["--keep", "0.7", "--at", "1", "--attention-keep", "0.5", "--runtime-keep"],
            format!("{prune}keep = 0.7\nat = [1]\nattention_keep = 0.5\nruntime_keep = true\n"),
            json!([
                { "input": "keep", "dtype": "float64", "default": 0.7 },
                { "input": "attention_keep", "dtype": "float64", "default": 0.5 },
            ]),
        ),
        // A merge comes first, wherever it is written.
        (
            &["--keep", "1,0.7", "-r", "4", "--tower", "pixel_values"],
            format!("{merge}r = 4\ntower = \"pixel_values\"\n{prune}keep = [1.0, 0.7]\ntower = \"pixel_values\"\n"),
            json!([]),
        ),
    ] {
        folder.write("r.toml", recipe);
        let manifest = folder.json(&[&["train", &vit, "short", "--gradients-only"][..], request].concat());
        assert_eq!(manifest["dials"], dials, "{request:?}");
        folder.prints(&["train", &vit, "long", "--gradients-only", "--recipe", "r.toml"]);
        for name in names(&folder.at("long")) {
            let [long, short] = ["long", "short"].map(|side| folder.bytes(&format!("{side}/{name}")));
            assert!(long == short, "{request:?}: {name} is another");
        }
        // It is no graph of the whole model.
        assert!(folder.bytes("short/gradients.onnx") != folder.bytes("short/eval.onnx"));
        for side in ["long", "short"] {
            fs::remove_dir_all(folder.at(side)).expect("the folder can be removed");
        }
    }

    // Passes of options come after those of a file.
    folder.write("r.toml", format!("{merge}r = 4\n"));
    folder.prints(&["train", &vit, "both", "--recipe", "r.toml", "--keep", "1,0.7"]);
    let recipe = folder.model("both/train.onnx").metadata("vitrim.recipe").map(str::to_owned);
    let recipe = recipe.expect("the recipe is recorded");
    let kinds: Vec<&str> = recipe.lines().filter(|line| line.starts_with("kind")).collect();
    assert_eq!(kinds, ["kind = \"merge\"", "kind = \"prune\""], "{recipe}");

    folder.write("expand.toml", "[[pass]]\nkind = \"expand\"\n");
    for (request, message) in [
        (&["-r", "4", "--expand", "0.5,1", "--expand-at", "0,9"][..], "expansion acts alone"),
        (&["--keep", "1,0.7", "--recipe", "expand.toml"], "expansion acts alone"),
        (&["--expand", "0.5,1", "--expand-at", "0,9", "--recipe", "expand.toml"], "the stages of one expansion"),
        (&["--align", "8"], "how much to merge is not given"),
        (&["--keep", "0.7"], "in block 9"),
        (&["--tower", "no such"], "--tower is of merging, pruning and expansion"),
        (&["-r", "4", "--tower", "no such"], "no such"),
    ] {
        let told = folder.refuses(&[&["train", &vit, "out"][..], request].concat());
        assert!(told.contains(message), "{request:?}\n{told}");
    }
    for request in [&["--at", "1"][..], &["--proportional"], &["-r", "4", "--ratio", "0.1"]] {
        assert_eq!(folder.run(&[&["train", &vit, "out"][..], request].concat()).status.code(), Some(2), "{request:?}");
    }
    for command in
        [&["merge", &vit, "out.onnx"][..], &["prune", &vit, "out.onnx"], &["prune", &vit, "out.onnx", "--at", "1"]]
    {
        assert_eq!(folder.run(command).status.code(), Some(2), "{command:?}");
    }
}

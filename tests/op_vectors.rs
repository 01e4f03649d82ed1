//! The bodies of the operators against the oracle's vectors, in every runtime and at every kind of opset.
//!
//! ONNX Runtime gets models that call the functions; tract gets them inlined, as `vitrim::runtime` does it.

mod common;

use common::expansion::{Expanded, Expanding};
use common::ops::{Calls, Case, Expected, Reference, VALUE_TOLERANCE};
use common::pruning::{Pruned, Pruning};
use common::vectors;
use common::{Scratch, conclude, distance, integers, ort, run, runtimes, try_run, vector, vector_index};
use ndarray::{ArrayD, Axis, IxDyn};
use serde_json::Value as Json;
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::{Attribute, DataType, GraphBuilder, Model};
use vitrim_passes::reduce::{Convention, Distance};

/// One opset of each kind that bodies and exporters tell apart: the oldest supported, the last before axes became
/// inputs, the first after, what newer exporters write, and the newest that ONNX Runtime loads.
const OPSETS: [i64; 6] = [13, 17, 18, 20, 23, 26];

/// What tokens in float16 may differ from those in float32, relative to the largest: operands and result are rounded to
/// 11 bits (5e-4 each), and everything between is computed in float32.
const HALF_TOLERANCE: f64 = 2e-3;

/// What means of tables may differ from those in float64. Entries are multiples of 1/1024 below 1, so that float32 has
/// their sums exactly: what is left is one division, off by 6e-8 at most even by way of a reciprocal.
const MEAN_TOLERANCE: f64 = 1e-7;

/// The same for a table in float16, whose means are rounded once more: by up to 2.5e-4, half of its step below 1.
const MEAN_TOLERANCE_HALF: f64 = 2.6e-4;

/// Decisions closer than this depend on the order in which a runtime adds up.
const MARGIN: f64 = 1e-5;

/// The merges of the index, with what the oracle makes of them.
fn vectors() -> Vec<(Case, Expected)> {
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units");
    let matches = units.iter().filter(|unit| unit["op"] == "tome.match_bipartite");
    matches.map(|unit| read(unit, vector(unit["file"].as_str().expect("a file")))).collect()
}

fn read(unit: &Json, arrays: NamedTensors) -> (Case, Expected) {
    let name = unit["file"].as_str().expect("a file").to_owned();
    // Every case must be decidable: by a margin, or by ties that are exact.
    assert!(unit["margin"].as_f64().is_none_or(|margin| margin > MARGIN), "{name} is too close to call");
    let params = &unit["params"];
    let flag = |key: &str| usize::from(params[key].as_bool().unwrap_or(false));
    let protect = params["protected"].as_u64().map_or(flag("class_token") + flag("distill_token"), |n| n as usize);
    let get = |name: &str| arrays.get(name).unwrap_or_else(|| panic!("{name} is in the file")).clone();
    let mut feeds = Feeds::default();
    for (feed, array) in [("x", "in_x"), ("metric", "in_metric"), ("size", "in_size"), ("y_in", "in_y")] {
        if let Some(tensor) = arrays.get(array) {
            feeds.push(feed, tensor.clone());
        }
    }
    let tokens = get("in_x").shape()[1];
    let heads = [1, get("in_metric").shape()[2], 0];
    let case = Case { name, r: params["r"].as_u64().expect("r") as usize, tokens, protect, suffix: 0, heads, feeds };
    assert_eq!(case.r_effective() as u64, params["r_effective"].as_u64().expect("r_effective"), "{}", case.name);
    let expected = Expected {
        assign: integers(&get("out_assign")),
        anchor: integers(&get("out_anchor")),
        y: get("out_weighted"),
        size: get("out_size"),
        restored: Some(get("out_unmerged")),
    };
    (case, expected)
}

/// Runs every case in every runtime, form and opset that it has.
fn check_all(what: &str, cases: &[(Case, Expected)]) {
    let scratch = Scratch::new(what);
    let (mut count, mut failures) = (0, Vec::new());
    for backend in runtimes() {
        for (case, expected) in cases {
            for (opset, dynamic) in OPSETS.into_iter().flat_map(|opset| [(opset, false), (opset, true)]) {
                // The static form promises nothing beyond the cap, and a pass never calls it with r = 0.
                if !dynamic && (case.r == 0 || case.r > case.r_effective()) {
                    continue;
                }
                let path = scratch.save("merge", &case.model(opset, dynamic));
                count += 1;
                let outputs = try_run(backend.as_ref(), &path, &case.feeds);
                if let Err(reason) = outputs.and_then(|outputs| expected.check(case, &outputs, VALUE_TOLERANCE)) {
                    let form = if dynamic { "dynamic" } else { "static" };
                    failures.push(format!("{} in {}, {form}, opset {opset}: {reason}", case.name, backend.name()));
                }
            }
        }
    }
    conclude(what, count, &failures);
}

#[test]
fn merging_is_what_the_oracle_says() {
    let vectors = vectors();
    let of = |part: &str| vectors.iter().filter(|(case, _)| case.name.contains(part)).count();
    assert!(of("ties") > 0 && of("c1d1") > 0 && of("c0d0") > 0 && of("_p5") > 0, "a kind of vectors is missing");
    check_all("merging", &vectors);
}

/// Deterministic numbers in −1..1, multiples of 1/1024.
fn numbers(shape: [usize; 3], seed: u64) -> ArrayD<f64> {
    let mut state = seed;
    ArrayD::from_shape_simple_fn(IxDyn(&shape), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 53) as f64 - 1024.0) / 1024.0
    })
}

fn made(tokens: usize, r: usize, protect: usize, suffix: usize) -> Case {
    let mut feeds = Feeds::default();
    let seed = (tokens * 1000 + r * 100 + protect * 10 + suffix) as u64;
    let tensor = |shape, seed| Tensor::from_f64(DType::F32, &numbers(shape, seed));
    feeds.push("x", tensor([2, tokens, 6], seed + 1));
    feeds.push("metric", tensor([2, tokens, 8], seed + 2));
    let sizes = numbers([2, tokens, 1], seed + 3).mapv(|x| (x * 4.0).trunc().abs() + 1.0);
    feeds.push("size", Tensor::from_f64(DType::F32, &sizes));
    Case {
        name: format!("n{tokens} r{r} protect {protect} suffix {suffix}"),
        r,
        tokens,
        protect,
        suffix,
        heads: [1, 8, 0],
        feeds,
    }
}

#[test]
fn tokens_at_the_end_are_protected() {
    let cases = [(27, 6, 1, 3), (27, 5, 2, 4), (28, 11, 0, 5), (28, 4, 3, 1), (12, 1, 0, 10)];
    let cases = cases.map(|(tokens, r, protect, suffix)| made(tokens, r, protect, suffix));
    check_all("suffix", &cases.map(|case| (case.clone(), Reference::new(&case).expected())));
}

#[test]
fn a_row_of_zeros_is_similar_to_nothing() {
    let cases = [made(17, 5, 1, 0), made(17, 8, 1, 0), made(16, 4, 0, 0)].map(|mut case| {
        let mut metric = case.feeds.get("metric").expect("it is fed").to_f64();
        for token in [3, 4, 10] {
            metric.index_axis_mut(Axis(1), token).fill(0.0);
        }
        case.feeds = with(&case.feeds, "metric", Tensor::from_f64(DType::F32, &metric));
        let expected = Reference::new(&case).expected();
        (case, expected)
    });
    check_all("zeros", &cases);
}

fn with(feeds: &Feeds, name: &str, tensor: Tensor) -> Feeds {
    let replace =
        |(key, old): (&str, &Tensor)| (key.to_owned(), if key == name { tensor.clone() } else { old.clone() });
    feeds.iter().map(replace).collect()
}

/// Which tokens merge is open where a metric is not a number, but every token must end up in exactly one slot.
#[test]
fn a_metric_that_is_not_a_number_loses_no_token() {
    let scratch = Scratch::new("nan");
    let (mut count, mut failures) = (0, Vec::new());
    for backend in runtimes() {
        for (dynamic, all) in [(false, false), (false, true), (true, false), (true, true)] {
            let case = made(21, 6, 1, 0);
            let mut metric = case.feeds.get("metric").expect("it is fed").to_f64();
            metric.index_axis_mut(Axis(1), 6).fill(f64::NAN);
            if all {
                metric.fill(f64::NAN);
            }
            let feeds = with(&case.feeds, "metric", Tensor::from_f64(DType::F32, &metric));
            let path = scratch.save("nan", &case.model(17, dynamic));
            let outputs = run(backend.as_ref(), &path, &feeds);
            let get = |name: &str| outputs.get(name).expect("an output");
            let listed = [integers(get("anchor")), integers(get("leaving"))];
            let mut whole = true;
            for image in 0..2 {
                let rows =
                    listed.iter().flat_map(|part| part.index_axis(Axis(0), image).iter().copied().collect::<Vec<_>>());
                let mut tokens: Vec<i64> = rows.collect();
                tokens.sort_unstable();
                whole &= tokens.iter().copied().eq(0..case.tokens as i64);
            }
            let before: f64 = feeds.get("size").expect("it is fed").to_f64().sum();
            let kept = (get("size_out").to_f64().sum() - before).abs() <= VALUE_TOLERANCE;
            let finite = get("y").to_f64().iter().all(|x| x.is_finite());
            count += 1;
            if !(whole && kept && finite) {
                let what = format!("every token once: {whole}; sizes add up: {kept}; tokens are finite: {finite}");
                failures.push(format!("{}, dynamic {dynamic}, all {all}: {what}", backend.name()));
            }
        }
    }
    conclude("NaN", count, &failures);
}

#[test]
fn half_precision_tokens_merge_in_single_precision() {
    let scratch = Scratch::new("half");
    let backend = ort();
    let (mut count, mut failures) = (0, Vec::new());
    for (case, expected) in vectors().iter().filter(|(case, _)| case.r_effective() > 0) {
        let half = Tensor::from_f64(DType::F16, &case.feeds.get("x").expect("it is fed").to_f64());
        let case = Case { feeds: with(&case.feeds, "x", half), ..case.clone() };
        for opset in OPSETS {
            let path = scratch.save("half", &case.model(opset, true));
            let outputs = run(backend.as_ref(), &path, &case.feeds);
            let y = outputs.get("y").expect("an output");
            assert_eq!(y.dtype(), DType::F16);
            count += 1;
            let apart = common::relative(&expected.y, y);
            let sizes = distance(&expected.size, outputs.get("size_out").expect("an output"));
            if apart > HALF_TOLERANCE || sizes > VALUE_TOLERANCE {
                failures.push(format!("{} at opset {opset}: {apart:e} relative, sizes {sizes:e}", case.name));
            }
        }
    }
    conclude("float16", count, &failures);
}

/// What has an entry for each token is averaged over each slot, whether images share the table or not. Slots are uneven:
/// one has six of eleven tokens, the others one or two.
#[test]
fn tables_follow_as_means() {
    use DataType::{F16, F32, I64};
    const SLOT_OF: [[usize; 11]; 2] = [[0, 1, 1, 2, 1, 3, 1, 1, 4, 1, 3], [4, 0, 3, 3, 1, 2, 3, 2, 3, 3, 3]];
    const SLOTS: usize = 5;
    const WIDTH: usize = 6;
    let tokens = SLOT_OF[0].len();
    let assign = ArrayD::from_shape_vec(IxDyn(&[2, tokens]), SLOT_OF.concat()).expect("a slot for every token");
    let mut sizes: ArrayD<f64> = ArrayD::zeros(IxDyn(&[2, SLOTS, 1]));
    assign.indexed_iter().for_each(|(at, &slot)| sizes[[at[0], slot, 0]] += 1.0);

    let scratch = Scratch::new("mean");
    let (mut count, mut failures) = (0, Vec::new());
    for (rank, dtype) in [(2, F32), (3, F32), (2, F16), (3, F16)] {
        let (held, tolerance) =
            if dtype == F16 { (DType::F16, MEAN_TOLERANCE_HALF) } else { (DType::F32, MEAN_TOLERANCE) };
        let each = numbers([2, tokens, WIDTH], 5);
        let table = if rank == 2 { each.index_axis_move(Axis(0), 0) } else { each };
        // Numbers are multiples of 1/1024 up to 1: both types hold them as they are.
        let table = Tensor::from_f64(held, &table);
        let rows = table.to_f64();
        let expected = ArrayD::from_shape_fn(IxDyn(&[2, SLOTS, WIDTH]), |at| {
            let own = |&token: &usize| assign[[at[0], token]] == at[1];
            let entry = |token| if rank == 2 { rows[[token, at[2]]] } else { rows[[at[0], token, at[2]]] };
            (0..tokens).filter(own).map(entry).sum::<f64>() / sizes[[at[0], at[1], 0]]
        });
        let feeds: Feeds = [
            ("table", table),
            ("assign", Tensor::from(assign.mapv(|slot| slot as i64))),
            ("size", Tensor::from_f64(DType::F32, &sizes)),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into_iter()
        .collect();
        for opset in OPSETS {
            let mut calls = Calls::new(opset);
            let inputs = [("table", dtype, rank), ("assign", I64, 2), ("size", F32, 3)];
            let inputs = inputs.map(|(name, dtype, rank)| calls.input(name, dtype, rank));
            let y = calls.op("TokenMean", "mean", &inputs, &[("dtype", dtype.code().into())], 1)[0];
            calls.output("y", y, dtype, 3);
            let path = scratch.save("mean", &calls.model());
            for backend in runtimes() {
                count += 1;
                let case = format!("{dtype:?} table of rank {rank} in {}, opset {opset}", backend.name());
                match try_run(backend.as_ref(), &path, &feeds) {
                    Ok(outputs) => {
                        let y = outputs.get("y").expect("an output");
                        let apart = distance(&Tensor::from(expected.clone()), y);
                        if y.dtype() != held || apart > tolerance {
                            failures.push(format!("{case}: {apart:e} off, in {:?}", y.dtype()));
                        }
                    }
                    Err(reason) => failures.push(format!("{case}: {reason}")),
                }
            }
        }
    }
    conclude("means", count, &failures);
}

/// The final slot of every token after several merges: assigns composed as the merge pass composes them.
#[test]
fn merges_compose_to_the_source_of_every_token() {
    use DataType::{F32, I64};
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units");
    let scratch = Scratch::new("source");
    let (mut count, mut failures) = (0, Vec::new());
    for unit in units.iter().filter(|unit| unit["op"] == "tome.merge_source") {
        let arrays = vector(unit["file"].as_str().expect("a file"));
        let rs: Vec<i64> = unit["params"]["r"].as_array().expect("r").iter().filter_map(Json::as_i64).collect();
        for opset in OPSETS {
            let mut calls = Calls::new(opset);
            let mut feeds = Feeds::default();
            let (mut size, mut owner) = (None, None);
            for (step, &r) in rs.iter().enumerate().filter(|&(_, &r)| r > 0) {
                let name = format!("metric{step}");
                let tensor = arrays.get(&format!("in_{name}")).expect("a metric per merge");
                let metric = calls.input(&name, F32, 3);
                feeds.push(name, tensor.clone());
                let before = size.unwrap_or_else(|| calls.op("TokenSize", "ones", &[metric], &[], 1)[0]);
                let tokens = tensor.shape()[1] as i64;
                let channels = tensor.shape()[2] as i64;
                let of_metric = [("heads", 1), ("head_dim", channels), ("metric_at", 0)];
                let of_tokens = [("r", r), ("tokens", tokens), ("protect", 1), ("suffix", 0), ("dtype", 1)];
                let attributes = [&of_tokens[..], &of_metric].concat();
                let merged = calls.op("TokenMerge", "merged", &[metric, metric, before], &attributes, 5);
                let assign = calls.op("TokenAssign", "assign", &merged[2..], &[], 1)[0];
                let axis = [("axis", Attribute::Int(1))];
                let compose = |earlier| calls.graph.op("GatherElements", "composed", &[assign, earlier], &axis);
                owner = Some(owner.map_or(assign, compose));
                size = Some(merged[1]);
            }
            calls.output("owner", owner.expect("something merges"), I64, 2);
            calls.output("size", size.expect("something merges"), F32, 3);
            let path = scratch.save("source", &calls.model());
            for backend in runtimes() {
                let outputs = run(backend.as_ref(), &path, &feeds);
                let owner = integers(outputs.get("owner").expect("an output"));
                let sizes = distance(arrays.get("out_size").expect("sizes"), outputs.get("size").expect("an output"));
                count += 1;
                if owner != integers(arrays.get("out_owner").expect("owners")) || sizes > VALUE_TOLERANCE {
                    failures.push(format!("{} in {}, opset {opset}: {owner}", unit["file"], backend.name()));
                }
            }
        }
    }
    conclude("source", count, &failures);
}

/// Attention in the forms that the merge pass writes: the logarithm of the sizes added to the scores; values that are
/// scaled by size, with the sizes as one more channel; keys with that logarithm as one more channel; and our operator.
#[test]
fn all_forms_of_proportional_attention_are_the_oracles() {
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units");
    let scratch = Scratch::new("attention");
    let (mut count, mut failures) = (0, Vec::new());
    for unit in units.iter().filter(|unit| unit["op"] == "tome.proportional_softmax") {
        let arrays = vector(unit["file"].as_str().expect("a file"));
        let scale = unit["params"]["scale"].as_f64().expect("a scale") as f32;
        let feeds: Feeds = ["q", "k", "v", "size"]
            .map(|name| (name.to_owned(), arrays.get(&format!("in_{name}")).expect("an input").clone()))
            .into_iter()
            .collect();
        for opset in OPSETS {
            let path = scratch.save("attention", &attention(opset, scale, arrays.get("in_v").expect("values").shape()));
            for backend in runtimes() {
                let outputs = run(backend.as_ref(), &path, &feeds);
                for (name, expected) in [
                    ("probs", "out_probs"),
                    ("biased", "out_out"),
                    ("scaled", "out_out"),
                    ("keyed", "out_out"),
                    ("ours", "out_out"),
                ] {
                    let apart =
                        distance(arrays.get(expected).expect("expected"), outputs.get(name).expect("an output"));
                    count += 1;
                    if apart > VALUE_TOLERANCE {
                        failures.push(format!(
                            "{} {name} in {}, opset {opset}: {apart:e}",
                            unit["file"],
                            backend.name()
                        ));
                    }
                }
            }
        }
    }
    conclude("attention", count, &failures);
}

fn attention(opset: i64, scale: f32, values: &[usize]) -> Model {
    let mut calls = Calls::new(opset);
    let [q, k, v] = ["q", "k", "v"].map(|name| calls.input(name, DataType::F32, 4));
    let size = calls.input("size", DataType::F32, 3);
    let graph = &mut calls.graph;
    let (tokens, channels) = (values[2] as i64, values[3] as i64);
    let perm = |perm: &[i64]| [("perm", Attribute::Ints(perm.to_vec()))];
    let ints = |graph: &mut GraphBuilder, values: &[i64]| graph.tensor("ints", vitrim_ir::Tensor::shape(values));
    let last = [("axis", Attribute::Int(-1))];

    let keys = graph.op("Transpose", "keys", &[k], &perm(&[0, 1, 3, 2]));
    let products = graph.op("MatMul", "scores", &[q, keys], &[]);
    let factor = scale;
    let scale = graph.tensor("scale", vitrim_ir::Tensor::f32(scale));
    let scores = graph.op("Mul", "scaled_scores", &[products, scale], &[]);
    let log = graph.op("Log", "log_size", &[size], &[]);
    let row = ints(graph, &[0, 1, 1, tokens]);
    let row = graph.op("Reshape", "log_row", &[log, row], &[]);
    let biased = graph.op("Add", "biased_scores", &[scores, row], &[]);
    let probs = graph.op("Softmax", "probs_softmax", &[biased], &last);
    let out = graph.op("MatMul", "mixed", &[probs, v], &[]);

    let column = ints(graph, &[0, 1, tokens, 1]);
    let column = graph.op("Reshape", "size_column", &[size, column], &[]);
    let weighted = graph.op("Mul", "scaled_values", &[v, column], &[]);
    let (zero, one, axis) = (ints(graph, &[0]), ints(graph, &[1]), ints(graph, &[3]));
    let channel = graph.op("Slice", "size_channel", &[weighted, zero, one, axis], &[]);
    let nothing = graph.op("Sub", "no_channel", &[channel, channel], &[]);
    let ride = graph.op("Add", "riding_size", &[nothing, column], &[]);
    let extended = graph.op("Concat", "values_and_size", &[weighted, ride], &last);
    let plain = graph.op("Softmax", "plain_softmax", &[scores], &last);
    let mixed = graph.op("MatMul", "mixed_both", &[plain, extended], &[]);
    let (split, end) = (ints(graph, &[channels]), ints(graph, &[i64::MAX]));
    let total = graph.op("Slice", "total", &[mixed, split, end, axis], &[]);
    let mixed = graph.op("Slice", "mixed_values", &[mixed, zero, split, axis], &[]);
    let scaled = graph.op("Div", "proportional", &[mixed, total], &[]);

    let pads = ints(graph, &[0, 0, 0, 0, 0, 0, 0, 1]);
    let one = graph.tensor("one", vitrim_ir::Tensor::f32(1.0));
    let queries = graph.op("Pad", "queries_and_one", &[q, pads, one], &[]);
    let inverse = graph.tensor("inverse_scale", vitrim_ir::Tensor::f32(factor.recip()));
    let share = graph.op("Mul", "size_as_keys", &[log, inverse], &[]);
    let column = ints(graph, &[0, 1, tokens, 1]);
    let share = graph.op("Reshape", "size_of_heads", &[share, column], &[]);
    let every = ints(graph, &[1, values[1] as i64, 1, 1]);
    let channel = graph.op("Expand", "size_of_every_head", &[share, every], &[]);
    let wider = graph.op("Concat", "keys_and_size", &[k, channel], &last);
    let wider = graph.op("Transpose", "keys_and_size_turned", &[wider], &perm(&[0, 1, 3, 2]));
    let scores = graph.op("MatMul", "scores_with_size", &[queries, wider], &[]);
    let scores = graph.op("Mul", "scaled_scores_with_size", &[scores, scale], &[]);
    let weights = graph.op("Softmax", "keyed_softmax", &[scores], &last);
    let keyed = graph.op("MatMul", "mixed_keyed", &[weights, v], &[]);

    let joined = [q, k, v].map(|operand| {
        let operand = calls.graph.op("Transpose", "tokens_first", &[operand], &perm(&[0, 2, 1, 3]));
        let shape = ints(&mut calls.graph, &[0, 0, -1]);
        calls.graph.op("Reshape", "channels_joined", &[operand, shape], &[])
    });
    let int = |name: &'static str, value: i64| (name, Attribute::Int(value));
    let form = [
        [int("heads", values[1] as i64), int("head_dim", channels), int("dtype", 1)],
        [int("q_at", 0), int("k_at", 0), int("v_at", 0)],
    ];
    let attributes = [&form.concat()[..], &[("scale", Attribute::Float(factor))]].concat();
    let ours = calls.op_with("ProportionalAttention", "of_heads", &[&joined[..], &[size]].concat(), &attributes, 1)[0];
    let shape = ints(&mut calls.graph, &[0, 0, values[1] as i64, channels]);
    let ours = calls.graph.op("Reshape", "heads_apart", &[ours, shape], &[]);
    let ours = calls.graph.op("Transpose", "heads_first", &[ours], &perm(&[0, 2, 1, 3]));

    let all = [("probs", probs), ("biased", out), ("scaled", scaled), ("keyed", keyed), ("ours", ours)];
    for (name, value) in all {
        calls.output(name, value, DataType::F32, 4);
    }
    calls.model()
}

/// Ones, as sizes before any merge.
fn ones(shape: [usize; 3]) -> Tensor {
    Tensor::from_f64(DType::F32, &ArrayD::ones(IxDyn(&shape)))
}

/// Units of the attention level of Tri-Level E-ViT that have array `array`: their parameters and arrays.
fn attention_level(array: &str) -> Vec<(String, Json, NamedTensors)> {
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units").iter();
    let units = units.filter(|unit| unit["op"].as_str().is_some_and(|op| op.starts_with("trilevel.")));
    let units = units.map(|unit| {
        let file = unit["file"].as_str().expect("a file");
        (file.to_owned(), unit["params"].clone(), vector(file))
    });
    units.filter(|(_, _, arrays)| arrays.get(array).is_some()).collect()
}

fn mask_of(arrays: &NamedTensors, name: &str) -> Tensor {
    Tensor::from_f64(DType::F32, &arrays.get(name).expect("a mask").to_f64())
}

/// Every weight counts, that of closed connections too, which is 1e-9 or so: errors are relative to each.
#[test]
fn masked_softmax_is_the_oracles() {
    let scratch = Scratch::new("masked_softmax");
    let (mut count, mut failures) = (0, Vec::new());
    for (file, params, arrays) in attention_level("in_logits") {
        let scores = arrays.get("in_logits").expect("scores").clone();
        let &[batch, _, _, keys] = scores.shape() else { panic!("{file}: scores of heads") };
        let expected = arrays.get("out_probs").expect("weights").to_f64();
        let eps = params["eps"].as_f64().expect("eps") as f32;
        let mut feeds = Feeds::default();
        feeds.push("scores", scores);
        feeds.push("mask", mask_of(&arrays, "in_mask"));
        feeds.push("size", ones([batch, keys, 1]));
        for opset in OPSETS {
            let mut calls = Calls::new(opset);
            let inputs = [("scores", 4), ("mask", 3), ("size", 3)];
            let inputs = inputs.map(|(name, rank)| calls.input(name, DataType::F32, rank));
            let attributes = [("eps", Attribute::Float(eps)), ("dtype", Attribute::Int(1))];
            let weights = calls.op_with("MaskedSoftmax", "softmax", &inputs, &attributes, 1)[0];
            calls.output("weights", weights, DataType::F32, 4);
            let path = scratch.save("masked_softmax", &calls.model());
            for backend in runtimes() {
                count += 1;
                let outputs = run(backend.as_ref(), &path, &feeds);
                let weights = outputs.get("weights").expect("an output").to_f64();
                assert_eq!(weights.shape(), expected.shape());
                let off = expected.iter().zip(&weights).map(|(a, b)| (a - b).abs() / a);
                let off = off.fold(0.0, |worst: f64, off| if off <= worst { worst } else { off });
                if off.is_nan() || off > VALUE_TOLERANCE {
                    failures.push(format!("{file} in {}, opset {opset}: {off:e} off", backend.name()));
                }
            }
        }
    }
    conclude("masked softmax", count, &failures);
}

/// The mask for the blocks behind one that prunes, in both forms; and with one more slot at the end that was made from
/// scratch, which stays connected to all. Weights are those of the oracle, or made by `MaskedSoftmax` as in a model.
#[test]
fn connections_that_stay_are_the_oracles() {
    use DataType::{F32, I64};
    let scratch = Scratch::new("connections");
    let (mut count, mut failures) = (0, Vec::new());
    let units = attention_level("out_mask");
    let of = |part: &str| units.iter().filter(|(file, ..)| file.contains(part)).count();
    assert!(of("ties") > 0 && of("floor") > 0 && units.len() > 2, "a kind of vectors is missing");
    for (file, params, arrays) in &units {
        let kept = integers(arrays.get("out_kept").expect("kept patches"));
        let mask = arrays.get("out_mask").expect("a mask").to_f64();
        let (batch, patches) = (kept.shape()[0], kept.shape()[1]);
        let ratio = params["attn_ratio"].as_f64().expect("a ratio");
        let connections = (patches as f64 * ratio).ceil() as i64;
        let scores = arrays.get("in_logits");
        let weights = scores.or(arrays.get("in_probs")).expect("scores or weights").clone();
        let tokens = weights.shape()[3];
        for (opset, fresh) in OPSETS.into_iter().flat_map(|opset| [(opset, 0), (opset, 1)]) {
            // The class token comes first.
            let slots = 1 + patches + fresh;
            let anchor = ArrayD::from_shape_fn(IxDyn(&[batch, slots]), |at| match at[1] {
                0 => 0,
                slot if slot <= patches => kept[[at[0], slot - 1]] + 1,
                _ => -1,
            });
            let of_pair = |at: IxDyn| mask.get([at[0], at[1], at[2]]).copied().unwrap_or(1.0);
            let expected = ArrayD::from_shape_fn(IxDyn(&[batch, slots, slots]), of_pair);
            let mut feeds = Feeds::default();
            let mut calls = Calls::new(opset);
            feeds.push("weights", weights.clone());
            feeds.push("anchor", Tensor::from(anchor));
            let mut of_tokens = calls.input("weights", F32, 4);
            let anchor = calls.input("anchor", I64, 2);
            if scores.is_some() {
                feeds.push("mask", mask_of(arrays, "in_mask"));
                feeds.push("size", ones([batch, tokens, 1]));
                let inputs = [of_tokens, calls.input("mask", F32, 3), calls.input("size", F32, 3)];
                let attributes = [("eps", Attribute::Float(1e-6)), ("dtype", Attribute::Int(1))];
                of_tokens = calls.op_with("MaskedSoftmax", "softmax", &inputs, &attributes, 1)[0];
            }
            let inputs = [of_tokens, anchor, calls.graph.tensor("count", vitrim_ir::Tensor::shape(&[connections]))];
            let places = [("protect", 1), ("suffix", fresh as i64)];
            let said = [("connections", connections), ("slots", slots as i64)];
            let said = [&places[..], &said].concat();
            let forms = [
                ("static", calls.op("ConnectionMask", "said", &inputs[..2], &said, 1)[0]),
                ("dynamic", calls.op("ConnectionMaskDynamic", "found", &inputs, &places, 1)[0]),
            ];
            for (form, mask) in forms {
                calls.output(form, mask, F32, 3);
            }
            let path = scratch.save("connections", &calls.model());
            for (backend, (form, _)) in runtimes().iter().flat_map(|backend| forms.map(|form| (backend, form))) {
                count += 1;
                let outputs = run(backend.as_ref(), &path, &feeds);
                let mask = outputs.get(form).expect("an output");
                if mask.dtype() != DType::F32 || mask.to_f64() != expected {
                    failures.push(format!("{file} in {}, {form}, {fresh} fresh, opset {opset}", backend.name()));
                }
            }
        }
    }
    conclude("connections", count, &failures);
}

/// What a score that is not finite does to its row, and a weight that is no number to its connection, is the same
/// everywhere.
#[test]
fn what_is_not_finite_is_the_same_in_masks() {
    use DataType::{F32, I64};
    let scratch = Scratch::new("not_finite_masks");
    let (mut count, mut failures) = (0, Vec::new());
    let mut calls = Calls::new(17);
    let inputs = [("scores", 4), ("mask", 3), ("size", 3)].map(|(name, rank)| calls.input(name, F32, rank));
    let attributes = [("eps", Attribute::Float(1e-6)), ("dtype", Attribute::Int(1))];
    let weights = calls.op_with("MaskedSoftmax", "softmax", &inputs, &attributes, 1)[0];
    calls.output("weights", weights, F32, 4);
    let inputs = [calls.input("attention", F32, 4), calls.input("anchor", I64, 2)];
    let said = [("connections", 2), ("slots", 20), ("protect", 0), ("suffix", 0)];
    let mask = calls.op("ConnectionMask", "connections", &inputs, &said, 1)[0];
    calls.output("stays", mask, F32, 3);
    let path = scratch.save("not_finite", &calls.model());

    let attention = numbers([2 * 20, 20, 1], 3).into_shape_with_order(IxDyn(&[1, 2, 20, 20])).expect("as many");
    for (value, whole_row, ruined) in [
        (f64::NAN, false, true),
        (f64::INFINITY, false, true),
        (f64::NEG_INFINITY, false, false),
        (f64::NEG_INFINITY, true, false),
    ] {
        for (column, open) in [(0, 1.0), (0, 0.0), (19, 1.0), (19, 0.0)] {
            let mut scores = attention.clone();
            let mut mask = ArrayD::ones(IxDyn(&[1, 20, 20]));
            mask[[0, 3, column]] = open;
            let mut weights = attention.mapv(f64::abs);
            for at in if whole_row { 0..20 } else { column..column + 1 } {
                scores[[0, 0, 3, at]] = value;
                weights[[0, 1, 3, at]] = f64::NAN;
            }
            let feeds: Feeds = [("scores", scores), ("mask", mask), ("attention", weights)]
                .map(|(name, array)| (name.to_owned(), Tensor::from_f64(DType::F32, &array)))
                .into_iter()
                .chain([("size".to_owned(), ones([1, 20, 1]))])
                .chain([("anchor".to_owned(), Tensor::from_vec(&[1, 20], (0..20i64).collect()).expect("a row"))])
                .collect();
            for backend in runtimes() {
                count += 1;
                let outputs = run(backend.as_ref(), &path, &feeds);
                let get = |name: &str| outputs.get(name).expect("an output").to_f64();
                let (weights, stays) = (get("weights"), get("stays"));
                let in_row = |head: usize, query: usize| ruined && (head, query) == (0, 3);
                let rows = weights.indexed_iter().all(|(at, weight)| weight.is_nan() == in_row(at[1], at[2]));
                let uniform = weights.slice(ndarray::s![0, 0, 3, ..]).iter().all(|weight| (weight - 0.05).abs() < 1e-6);
                let rows = rows && (uniform || !whole_row);
                // Beside one that is no number, one of the others stays.
                let row = stays.index_axis(Axis(0), 0).index_axis_move(Axis(0), 3);
                let connections = row[[column]] == 1.0 && row.sum() == if whole_row { 20.0 } else { 2.0 };
                if !(rows && connections) {
                    let what = format!("rows are as they must be: {rows}; connections are: {connections}");
                    failures.push(format!("{}, {value}, column {column}, open {open}: {what}", backend.name()));
                }
            }
        }
    }
    conclude("not finite", count, &failures);
}

/// The prunings of the index, with what the oracle makes of them: EViT's with scores, Tri-Level's with the attention that
/// they come of. Where nothing is dropped the oracle's EViT leaves the tokens as they are, and there is none of it.
fn prunings() -> Vec<(Pruning, Option<Pruned>)> {
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units");
    let of = |unit: &&Json| {
        ["evit.reorganize", "trilevel.prune", "trilevel.prune_from_probs"].iter().any(|op| unit["op"] == *op)
    };
    units.iter().filter(of).map(|unit| read_pruning(unit, vector(unit["file"].as_str().expect("a file")))).collect()
}

fn read_pruning(unit: &Json, arrays: NamedTensors) -> (Pruning, Option<Pruned>) {
    let name = unit["file"].as_str().expect("a file").to_owned();
    // Every case must be decidable: by a margin, which is relative, or by ties that are exact.
    assert!(unit["margin"].as_f64().is_none_or(|margin| margin > MARGIN), "{name} is too close to call");
    let get = |name: &str| arrays.get(name).map(Tensor::to_f64);
    // Attention of the class token to all patches, averaged over heads.
    let class_attention = |probs: ArrayD<f64>| {
        let mean = probs.mean_axis(Axis(1)).expect("heads").index_axis_move(Axis(1), 0);
        mean.slice_axis(Axis(1), (1..).into()).to_owned()
    };
    let patches = get("in_score").or_else(|| get("out_class_attention"));
    let patches = patches.or_else(|| get("in_probs").map(class_attention)).expect("scores of patches");
    let (batch, n) = (patches.shape()[0], patches.shape()[1]);
    // The class token is no candidate, whatever its score.
    let score = ArrayD::from_shape_fn(IxDyn(&[batch, n + 1]), |at| match at[1] {
        0 => f64::INFINITY,
        patch => patches[[at[0], patch - 1]],
    });
    // Where the vectors have no tokens, any will do.
    let x = get("in_x").unwrap_or_else(|| numbers([batch, n + 1, 3], 7));
    let sizes = numbers([batch, n + 1, 1], 8).mapv(|x| (x * 4.0).trunc().abs() + 1.0);
    let feeds = [("x", &x), ("score", &score), ("size", &sizes)]
        .map(|(name, array)| (name.to_owned(), Tensor::from_f64(DType::F32, array)))
        .into_iter()
        .collect();

    let indices = |name: &str| arrays.get(name).map(integers);
    let params = &unit["params"];
    let anchor = indices("out_anchor").or_else(|| {
        let kept = indices("out_kept")?;
        let class = ArrayD::zeros(IxDyn(&[batch, 1]));
        Some(ndarray::concatenate(Axis(1), &[class.view(), (kept + 1).view()]).expect("rows of one length"))
    });
    let fuse = params["fuse"].as_bool().unwrap_or(false);
    let keep = match &anchor {
        Some(anchor) => anchor.shape()[1] - 1 - usize::from(fuse),
        None => n,
    };
    let ratio = params["keep_rate"].as_f64().or(params["ratio"].as_f64()).expect("a ratio");
    assert_eq!(keep, (n as f64 * ratio).ceil() as usize, "{name}");
    let expected = anchor.map(|anchor| {
        let slots = || anchor.indexed_iter().map(|(at, &token)| (at[0], at[1], token as usize));
        let gathered = |of: &ArrayD<f64>, none: f64| {
            ArrayD::from_shape_fn(IxDyn(&[batch, anchor.shape()[1], of.shape()[2]]), |at| {
                let token = anchor[[at[0], at[1]]];
                if token < 0 { none } else { of[[at[0], token as usize, at[2]]] }
            })
        };
        let assign = indices("out_assign").unwrap_or_else(|| {
            let mut assign = ArrayD::from_elem(IxDyn(&[batch, n + 1]), -1);
            slots().for_each(|(image, slot, token)| assign[[image, token]] = slot as i64);
            assign
        });
        // Where the vectors have tokens, what becomes of them is the oracle's.
        let y = get("out_x").unwrap_or_else(|| gathered(&x, f64::NAN));
        Pruned { y, size: gathered(&sizes, 1.0), anchor: anchor.clone(), assign }
    });
    let keep = keep as i64;
    (Pruning { name, keep, tokens: n + 1, protect: 1, suffix: 0, fuse, feeds }, expected)
}

/// Runs every pruning in every runtime, form and opset.
fn check_prunings(what: &str, cases: &[(Pruning, Option<Pruned>)]) {
    let scratch = Scratch::new(what);
    let (mut count, mut failures) = (0, Vec::new());
    for backend in runtimes() {
        for (case, expected) in cases {
            for (opset, dynamic) in OPSETS.into_iter().flat_map(|opset| [(opset, false), (opset, true)]) {
                let path = scratch.save("prune", &case.model(opset, dynamic));
                count += 1;
                let checked = try_run(backend.as_ref(), &path, &case.feeds).and_then(|outputs| match expected {
                    Some(expected) => expected.check(&outputs, VALUE_TOLERANCE),
                    None => Pruned::check_permuted(&outputs, &case.feeds.get("x").expect("it is fed").to_f64()),
                });
                if let Err(reason) = checked {
                    let form = if dynamic { "dynamic" } else { "static" };
                    failures.push(format!("{} in {}, {form}, opset {opset}: {reason}", case.name, backend.name()));
                }
            }
        }
    }
    conclude(what, count, &failures);
}

#[test]
fn pruning_is_what_the_oracle_says() {
    let cases = prunings();
    let of = |part: &str| cases.iter().filter(|(case, _)| case.name.contains(part)).count();
    assert!(of("evit") >= 6 && of("trilevel") >= 8 && of("ties") >= 2, "a kind of vectors is missing");
    assert!(cases.iter().any(|(_, expected)| expected.is_none()), "a kind of vectors is missing");
    check_prunings("pruning", &cases);
}

#[test]
fn pruning_at_its_limits_is_what_it_says() {
    // k, tokens, protect, suffix: none kept, all kept, none protected, tokens at the end; and no candidates at all.
    let shapes = [(0, 9, 1, 0), (8, 9, 1, 0), (3, 9, 0, 0), (4, 12, 2, 3), (0, 12, 0, 12), (0, 7, 3, 3), (0, 6, 2, 4)];
    let cases = shapes.into_iter().flat_map(|(keep, tokens, protect, suffix)| {
        [false, true].map(|fuse| {
            let mut score = numbers([2, tokens, 1], 3).index_axis_move(Axis(2), 0);
            // Ties, and scores that are no numbers.
            score[[0, tokens - 1]] = score[[0, 0]];
            score[[1, tokens / 2]] = f64::NAN;
            let feeds = [("x", numbers([2, tokens, 6], 4)), ("score", score)];
            let feeds = feeds.map(|(name, array)| (name.to_owned(), Tensor::from_f64(DType::F32, &array)));
            let name = format!("{keep} of {tokens}, protect {protect}, suffix {suffix}, fuse {fuse}");
            let feeds = feeds.into_iter().collect();
            let case = Pruning { name, keep, tokens, protect, suffix, fuse, feeds };
            let expected = case.expected();
            (case, Some(expected))
        })
    });
    check_prunings("pruning limits", &cases.collect::<Vec<_>>());
}

/// The expansions of the index that do anything, with what the oracle makes of them.
fn expansions() -> Vec<(Expanding, Expanded)> {
    let index = vector_index();
    let units = index["units"].as_array().expect("the index has units");
    let active = |unit: &&Json| unit["op"] == "toe.apply" && unit["params"]["active"] == true;
    let read = |unit: &Json| {
        let name = unit["file"].as_str().expect("a file").to_owned();
        assert!(unit["margin"].as_f64().is_none_or(|margin| margin > MARGIN), "{name} is too close to call");
        let (params, arrays) = (&unit["params"], vector(&name));
        let get = |name: &str| arrays.get(name).unwrap_or_else(|| panic!("{name} is in the file")).clone();
        let number = |key: &str| params[key].as_u64().expect("a number") as usize;
        let (x, protect, suffix, stage) = (get("in_x"), number("prefix"), number("suffix"), number("stage"));
        let vectors::Expanding { schedule, distance, convention } = vectors::Expanding::of(&params["config"]);
        let tokens = x.shape()[1];
        let patches = tokens - protect - suffix;
        assert_eq!(schedule.kept(patches, stage) + protect + suffix, number("tokens"), "{name}");
        let (closeness, sign) = match (distance, convention) {
            (Distance::Cosine, _) | (Distance::Euclidean, Convention::Paper) => ("CosineSimilarity", 1),
            (Distance::Euclidean, Convention::Code) => ("CosineSimilarity", -1),
            (Distance::Manhattan, Convention::Paper) => ("ManhattanDistance", -1),
            (Distance::Manhattan, Convention::Code) => ("ManhattanDistance", 1),
        };
        let (seeds, rounds) = (schedule.seeds(patches), schedule.additions(patches, stage).concat());
        let feeds = Feeds::from_iter([("x".to_owned(), x)]);
        let case = Expanding { name, tokens, protect, suffix, seeds, rounds, closeness, sign, feeds };
        let (anchor, assign) = (integers(&get("out_anchor")), integers(&get("out_assign")));
        (case, Expanded { y: get("out_x").to_f64(), anchor, assign })
    };
    units.iter().filter(active).map(read).collect()
}

/// Runs every expansion in every runtime and opset.
fn check_expansions(what: &str, cases: &[(Expanding, Expanded)]) {
    let scratch = Scratch::new(what);
    let (mut count, mut failures) = (0, Vec::new());
    for backend in runtimes() {
        for (case, expected) in cases {
            for opset in OPSETS {
                let path = scratch.save("expanded", &case.model(opset));
                count += 1;
                let outputs = try_run(backend.as_ref(), &path, &case.feeds);
                if let Err(reason) = outputs.and_then(|outputs| expected.check(&outputs, VALUE_TOLERANCE)) {
                    failures.push(format!("{} in {}, opset {opset}: {reason}", case.name, backend.name()));
                }
            }
        }
    }
    conclude(what, count, &failures);
}

#[test]
fn expansion_is_what_the_oracle_says() {
    let cases = expansions();
    let of = |part: &str| cases.iter().filter(|(case, _)| case.name.contains(part)).count();
    assert!(of("ties") >= 2 && of("man") >= 2 && of("euc") >= 1 && of("x7") >= 1, "a kind of vectors is missing");
    for (case, expected) in &cases {
        let plain = case.expected();
        assert_eq!((&plain.anchor, &plain.assign), (&expected.anchor, &expected.assign), "{} in plain", case.name);
    }
    check_expansions("expansion", &cases);
}

#[test]
fn expansion_at_its_limits_is_what_it_says() {
    // Tokens, protected ones, seeds, rounds: one seed, all chosen, none added, nobody protected.
    type Shape = (usize, [usize; 2], &'static [usize], &'static [usize]);
    let shapes: [Shape; 5] = [
        (9, [1, 0], &[0], &[]),
        (9, [1, 0], &[0, 4], &[3, 3]),
        (8, [0, 0], &[0, 3, 6], &[0, 2]),
        (14, [2, 3], &[8, 1], &[1, 1, 1]),
        (5, [2, 2], &[0], &[]),
    ];
    let cases = shapes.into_iter().flat_map(|(tokens, [protect, suffix], seeds, rounds)| {
        let ops = [("CosineSimilarity", 1), ("CosineSimilarity", -1), ("ManhattanDistance", -1)];
        ops.map(|(closeness, sign)| {
            let mut x = numbers([2, tokens, 6], 5);
            // A row of zeros is as close to all.
            x.index_axis_mut(Axis(1), protect).fill(0.0);
            let feeds = Feeds::from_iter([("x".to_owned(), Tensor::from_f64(DType::F32, &x))]);
            let name =
                format!("{tokens} tokens, {protect} and {suffix} protected, {seeds:?} + {rounds:?}, {closeness}");
            let (seeds, rounds) = (seeds.to_vec(), rounds.to_vec());
            let case = Expanding { name, tokens, protect, suffix, seeds, rounds, closeness, sign, feeds };
            let expected = case.expected();
            (case, expected)
        })
    });
    check_expansions("expansion limits", &cases.collect::<Vec<_>>());
}

#[test]
fn expansion_of_what_is_no_number_loses_no_token() {
    let mut x = numbers([2, 12, 6], 7);
    x.index_axis_mut(Axis(1), 5).fill(f64::NAN);
    let feeds = Feeds::from_iter([("x".to_owned(), Tensor::from_f64(DType::F32, &x))]);
    let (scratch, mut failures) = (Scratch::new("expansion_nan"), Vec::new());
    let (seeds, rounds) = (vec![0, 4, 8], vec![2, 2]);
    let name = "NaN".to_owned();
    let case = Expanding {
        name,
        tokens: 12,
        protect: 1,
        suffix: 0,
        seeds,
        rounds,
        closeness: "CosineSimilarity",
        sign: 1,
        feeds,
    };
    let expected = case.expected();
    for backend in runtimes() {
        let outputs = run(backend.as_ref(), &scratch.save("nan", &case.model(17)), &case.feeds);
        let [anchor, assign] = ["anchor", "assign"].map(|name| integers(outputs.get(name).expect("an output")));
        if (&anchor, &assign) != (&expected.anchor, &expected.assign) {
            failures.push(format!("{}: anchor {anchor}, assign {assign}", backend.name()));
        }
    }
    conclude("expansion of NaN", 3, &failures);
}

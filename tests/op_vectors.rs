//! The bodies of the operators against the oracle's vectors, in every runtime and at every kind of opset.
//!
//! ONNX Runtime gets models that call the functions; tract gets them inlined, as `vitrim::runtime` does it.

mod common;

use common::{Scratch, conclude, distance, integers, ort, run, runtimes, try_run, vector, vector_index};
use ndarray::{ArrayD, ArrayView2, Axis, IxDyn};
use serde_json::Value as Json;
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, TensorType, ValueId};
use vitrim_ops::{DEFS, DOMAIN, VERSION};

/// One opset of each kind that bodies and exporters tell apart: the oldest supported, the last before axes became
/// inputs, the first after, what newer exporters write, and the newest that ONNX Runtime loads.
const OPSETS: [i64; 6] = [13, 17, 18, 20, 23, 26];

/// What an operator's values may differ from the oracle's: a few roundings of float32 on entries of size 1 to 4.
const VALUE_TOLERANCE: f64 = 1e-5;

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

/// A model of calls to our operators.
struct Calls {
    graph: GraphBuilder,
    opset: i64,
}

impl Calls {
    fn new(opset: i64) -> Self {
        Calls { graph: GraphBuilder::new(), opset }
    }

    fn input(&mut self, name: &str, dtype: DataType, rank: usize) -> ValueId {
        self.graph.input(name, Some(&ty(dtype, rank)))
    }

    fn op(
        &mut self,
        name: &str,
        hint: &str,
        inputs: &[ValueId],
        attributes: &[(&str, i64)],
        results: usize,
    ) -> Vec<ValueId> {
        let known = DEFS.iter().any(|def| def.name() == name);
        assert!(known, "{name} is one of ours");
        let attributes: Vec<_> = attributes.iter().map(|&(key, value)| (key, Attribute::Int(value))).collect();
        let inputs = inputs.iter().copied().map(Some).collect();
        self.graph.call(OpType::of(DOMAIN, name), hint, inputs, &attributes, results)
    }

    fn output(&mut self, name: &str, value: ValueId, dtype: DataType, rank: usize) {
        self.graph.output(name, value, Some(&ty(dtype, rank)));
    }

    fn model(self) -> Model {
        let functions = DEFS.iter().map(|def| def.function(self.opset)).collect();
        self.graph.into_model(10, &[("", self.opset), (DOMAIN, VERSION)], functions)
    }
}

/// A type with every extent left open.
fn ty(dtype: DataType, rank: usize) -> TensorType {
    TensorType { dtype, dims: Some(vec![DimSpec::Unknown; rank]) }
}

/// One merge: how it is called, and what is fed.
#[derive(Clone, Debug)]
struct Case {
    name: String,
    r: usize,
    tokens: usize,
    protect: usize,
    suffix: usize,
    feeds: Feeds,
}

impl Case {
    /// How many tokens can merge.
    fn r_effective(&self) -> usize {
        self.r.min((self.tokens - self.protect - self.suffix) / 2)
    }

    /// A model that merges, tells where each token went, and (if there is an input `y_in`) restores.
    fn model(&self, opset: i64, dynamic: bool, x: DataType) -> Model {
        use DataType::{F32, I64};
        let mut calls = Calls::new(opset);
        let tokens = calls.input("x", x, 3);
        let metric = calls.input("metric", F32, 3);
        let size = match self.feeds.get("size") {
            Some(_) => calls.input("size", F32, 3),
            None => calls.op("TokenSize", "size", &[tokens], &[], 1)[0],
        };
        let (r, n) = (self.r as i64, self.tokens as i64);
        let common = [("protect", self.protect as i64), ("suffix", self.suffix as i64), ("dtype", x.code().into())];
        let merged = if dynamic {
            let r = calls.graph.tensor("r", vitrim_ir::Tensor::shape(&[r]));
            calls.op("TokenMergeDynamic", "merged", &[tokens, metric, size, r], &common, 5)
        } else {
            let attributes = [&[("r", r), ("tokens", n)][..], &common].concat();
            calls.op("TokenMerge", "merged", &[tokens, metric, size], &attributes, 5)
        };
        let assign = calls.op("TokenAssign", "assigned", &merged[2..], &[], 1)[0];
        if self.feeds.get("y_in").is_some() {
            let slots = calls.input("y_in", F32, 3);
            let restored = calls.op("TokenRestore", "spread", &[slots, assign], &[], 1)[0];
            calls.output("restored", restored, F32, 3);
        }
        calls.output("y", merged[0], x, 3);
        calls.output("size_out", merged[1], F32, 3);
        calls.output("anchor", merged[2], I64, 2);
        calls.output("leaving", merged[3], I64, 2);
        calls.output("assign", assign, I64, 2);
        calls.model()
    }
}

/// What a merge must give.
struct Expected {
    assign: ArrayD<i64>,
    anchor: ArrayD<i64>,
    y: Tensor,
    size: Tensor,
    restored: Option<Tensor>,
}

impl Expected {
    /// What is wrong with `outputs`.
    fn check(&self, case: &Case, outputs: &Outputs) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        let (assign, anchor) = (integers(get("assign")), integers(get("anchor")));
        if case.r_effective() == 0 {
            return self.check_reordered(&assign, &anchor, outputs);
        }
        if assign != self.assign || anchor != self.anchor {
            return Err(format!("assign {assign}\nfor {}\nanchor {anchor}\nfor {}", self.assign, self.anchor));
        }
        for (name, expected) in [("y", &self.y), ("size_out", &self.size)] {
            let apart = distance(expected, get(name));
            if apart > VALUE_TOLERANCE {
                return Err(format!("{name} is {apart:e} off"));
            }
        }
        match &self.restored {
            // Copies are exact.
            Some(expected) if distance(expected, get("restored")) > 0.0 => Err("restored tokens are no copies".into()),
            _ => Ok(()),
        }
    }

    /// Nothing merges: the oracle leaves the tokens where they are, the body lists them in the order of its slots. Every
    /// token is a slot of its own, unchanged.
    fn check_reordered(&self, assign: &ArrayD<i64>, anchor: &ArrayD<i64>, outputs: &Outputs) -> Result<(), String> {
        let undo = |name: &str| {
            let values = outputs.get(name).expect("an output").to_f64();
            let mut undone = values.clone();
            for ((image, mut rows), slots) in undone.outer_iter_mut().enumerate().zip(assign.outer_iter()) {
                for (mut row, &slot) in rows.outer_iter_mut().zip(slots) {
                    row.assign(&values.index_axis(Axis(0), image).index_axis(Axis(0), slot as usize));
                }
            }
            Tensor::from(undone)
        };
        let own = anchor.shape() == assign.shape()
            && anchor.outer_iter().zip(assign.outer_iter()).all(|(anchor, assign)| {
                anchor.iter().enumerate().all(|(slot, &token)| assign[token as usize] == slot as i64)
            });
        let apart = distance(&self.y, &undo("y")).max(distance(&self.size, &undo("size_out")));
        if own && apart <= VALUE_TOLERANCE { Ok(()) } else { Err(format!("r = 0 changes tokens by {apart:e}")) }
    }
}

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
    let case = Case { name, r: params["r"].as_u64().expect("r") as usize, tokens, protect, suffix: 0, feeds };
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
                let path = scratch.save("merge", &case.model(opset, dynamic, DataType::F32));
                count += 1;
                let outputs = try_run(backend.as_ref(), &path, &case.feeds);
                if let Err(reason) = outputs.and_then(|outputs| expected.check(case, &outputs)) {
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

/// Bipartite soft matching once more, as plain as can be, for what the vectors leave out: protected tokens at the end,
/// and tokens that are zero.
fn reference(case: &Case) -> Expected {
    let array = |name: &str| case.feeds.get(name).expect("it is fed").to_f64();
    let (x, metric, size) = (array("x"), array("metric"), array("size"));
    let (batch, n, width) = (x.shape()[0], x.shape()[1], x.shape()[2]);
    let slots = n - case.r;
    let mut expected_y: ArrayD<f64> = ArrayD::zeros(IxDyn(&[batch, slots, width]));
    let mut expected_size: ArrayD<f64> = ArrayD::zeros(IxDyn(&[batch, slots, 1]));
    let (mut assign, mut anchor) = (Vec::new(), Vec::new());
    for image in 0..batch {
        let metric = metric.index_axis(Axis(0), image).into_dimensionality().expect("rows of channels");
        let (anchors, partners) = match_tokens(case, metric);
        let mut slot_of = vec![0; n];
        anchors.iter().enumerate().for_each(|(slot, &token)| slot_of[token] = slot);
        partners.iter().for_each(|&(token, into)| slot_of[token] = slot_of[into]);
        for (token, &slot) in slot_of.iter().enumerate() {
            let weight = size[[image, token, 0]];
            expected_size[[image, slot, 0]] += weight;
            (0..width).for_each(|at| expected_y[[image, slot, at]] += weight * x[[image, token, at]]);
        }
        assign.extend(slot_of.iter().map(|&slot| slot as i64));
        anchor.extend(anchors.iter().map(|&token| token as i64));
    }
    expected_y /= &expected_size;
    let indices = |count, values| ArrayD::from_shape_vec(IxDyn(&[batch, count]), values).expect("one row per image");
    Expected {
        assign: indices(n, assign),
        anchor: indices(slots, anchor),
        y: Tensor::from(expected_y),
        size: Tensor::from(expected_size),
        restored: None,
    }
}

/// The token of every slot, and for each leaving token the one that it joins.
fn match_tokens(case: &Case, metric: ArrayView2<f64>) -> (Vec<usize>, Vec<(usize, usize)>) {
    let end = case.tokens - case.suffix;
    let cosine = |a: usize, b: usize| {
        let (a, b) = (metric.row(a), metric.row(b));
        let norms = a.dot(&a).sqrt() * b.dot(&b).sqrt();
        if norms > 0.0 { a.dot(&b) / norms } else { 0.0 }
    };
    let (even, odd): (Vec<usize>, Vec<usize>) = (case.protect..end).partition(|token| token % 2 == 0);
    let mut edges: Vec<(f64, usize, usize)> = Vec::new();
    for &a in &even {
        let mut best = (f64::NEG_INFINITY, a, 0);
        for &b in &odd {
            if cosine(a, b) > best.0 {
                best = (cosine(a, b), a, b);
            }
        }
        edges.push(best);
    }
    // A stable sort: the lowest position first among equals.
    edges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let leaving = edges.iter().take(case.r).map(|&(_, a, b)| (a, b)).collect();
    let mut staying: Vec<usize> = edges.iter().skip(case.r).map(|&(_, a, _)| a).collect();
    if case.protect > 0 {
        staying.sort_unstable();
    }
    let anchors = (0..case.protect).chain(staying).chain(odd).chain(end..case.tokens).collect();
    (anchors, leaving)
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
    Case { name: format!("n{tokens} r{r} protect {protect} suffix {suffix}"), r, tokens, protect, suffix, feeds }
}

#[test]
fn tokens_at_the_end_are_protected() {
    let cases = [(27, 6, 1, 3), (27, 5, 2, 4), (28, 11, 0, 5), (28, 4, 3, 1), (12, 1, 0, 10)];
    let cases = cases.map(|(tokens, r, protect, suffix)| made(tokens, r, protect, suffix));
    check_all("suffix", &cases.map(|case| (case.clone(), reference(&case))));
}

#[test]
fn a_row_of_zeros_is_similar_to_nothing() {
    let cases = [made(17, 5, 1, 0), made(17, 8, 1, 0), made(16, 4, 0, 0)].map(|mut case| {
        let mut metric = case.feeds.get("metric").expect("it is fed").to_f64();
        for token in [3, 4, 10] {
            metric.index_axis_mut(Axis(1), token).fill(0.0);
        }
        case.feeds = with(&case.feeds, "metric", Tensor::from_f64(DType::F32, &metric));
        let expected = reference(&case);
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
            let path = scratch.save("nan", &case.model(17, dynamic, DataType::F32));
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
        let feeds = with(&case.feeds, "x", half);
        for opset in OPSETS {
            let path = scratch.save("half", &case.model(opset, true, DataType::F16));
            let outputs = run(backend.as_ref(), &path, &feeds);
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
                let attributes = [("r", r), ("tokens", tokens), ("protect", 1), ("suffix", 0), ("dtype", 1)];
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
/// scaled by size, with the sizes as one more channel; and keys with that logarithm as one more channel.
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
                for (name, expected) in
                    [("probs", "out_probs"), ("biased", "out_out"), ("scaled", "out_out"), ("keyed", "out_out")]
                {
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

    for (name, value) in [("probs", probs), ("biased", out), ("scaled", scaled), ("keyed", keyed)] {
        calls.output(name, value, DataType::F32, 4);
    }
    calls.model()
}

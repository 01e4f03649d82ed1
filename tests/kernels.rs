//! Every operator on random cases: body and native kernel against a reference in float64.

mod common;

use std::cell::{Cell, RefCell};

use common::expansion::Expanding;
use common::ops::{Calls, Case, Reference, data_type};
use common::pruning::Pruning;
use common::{Scratch, distance, kernels, ort, relative, tract, try_run};
use ndarray::{Array3, Array4, ArrayD, Axis, IxDyn};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use vitrim::runtime::{Backend, Feeds, Outputs};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{Attribute, DataType, Model};

/// How many cases of each kind are tried. They are the same in every run.
const CASES: u32 = 1000;

/// What values may differ from those in float64, relative to the largest. In float32: some roundings. In float16 and
/// bfloat16 operands and results are exact to 11 and 8 bits, so that a result is half a unit of those off.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::Bf16 => 1.6e-2,
        _ => 1e-5,
    }
}

/// Decisions closer than this depend on the order in which a runtime adds up.
const MARGIN: f64 = 1e-5;

/// What the native kernels are called here.
const KERNEL: &str = "kernel";

/// Runs `check` on random cases.
fn for_all<C: std::fmt::Debug>(cases: impl Strategy<Value = C>, check: impl Fn(C) -> Result<(), TestCaseError>) {
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    match runner.run(&cases, check) {
        Ok(()) => {}
        Err(TestError::Fail(reason, case)) => panic!("{reason}\n{case:?}"),
        Err(error) => panic!("{error}"),
    }
}

/// Deterministic numbers in -1..1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    }

    fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        Tensor::from_f64(dtype, &ArrayD::from_shape_simple_fn(IxDyn(shape), || self.next()))
    }
}

/// How a merge is to be made, without its numbers.
#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    batch: usize,
    tokens: usize,
    width: usize,
    heads: [usize; 3],
    behind: usize,
    protect: usize,
    suffix: usize,
    r: usize,
    dtypes: [DType; 2],
    /// Tokens that are copies of another, and tokens that are zero, of every hundred.
    copies: usize,
    zeros: usize,
    sized: bool,
    dynamic: bool,
}

fn plans(dtypes: &'static [DType]) -> impl Strategy<Value = Plan> {
    let tokens = prop_oneof![4 => 3..40usize, 1 => 40..210usize];
    let shape = (1..4usize, tokens, 1..40usize, (1..5usize, 1..20usize, 0..6usize), 0..5usize);
    let special = (0..6usize, 0..4usize, 0.0..=1.0f64);
    let kinds = (prop::sample::select(dtypes), prop::sample::select(dtypes));
    let flavour = (0..40usize, 0..10usize, any::<bool>(), any::<bool>());
    (any::<u64>(), shape, special, kinds, flavour).prop_map(|(seed, shape, special, kinds, flavour)| {
        let (batch, tokens, width, (heads, head_dim, at), behind) = shape;
        let protect = special.0.min(tokens - 2);
        let suffix = special.1.min(tokens - protect - 2);
        let most = (tokens - protect - suffix) / 2;
        let (copies, zeros, sized, dynamic) = flavour;
        Plan {
            seed,
            batch,
            tokens,
            width,
            heads: [heads, head_dim, at],
            behind,
            protect,
            suffix,
            // The static form is never called with nothing to merge.
            r: ((special.2 * most as f64).round() as usize).max(1),
            dtypes: [kinds.0, kinds.1],
            copies,
            zeros,
            sized,
            dynamic,
        }
    })
}

impl Plan {
    fn case(&self) -> Case {
        let mut noise = Noise(self.seed);
        let Plan { batch, tokens, width, heads: [heads, head_dim, at], .. } = *self;
        let mut metric = noise.tensor(DType::F32, &[batch, tokens, at + heads * head_dim + self.behind]).to_f64();
        for mut image in metric.outer_iter_mut() {
            for token in 0..tokens {
                let chance = ((noise.next() + 1.0) * 50.0) as usize;
                let other = ((noise.next() + 1.0) / 2.0 * tokens as f64) as usize;
                if chance < self.copies {
                    let row = image.index_axis(Axis(0), other).to_owned();
                    image.index_axis_mut(Axis(0), token).assign(&row);
                } else if chance < self.copies + self.zeros {
                    image.index_axis_mut(Axis(0), token).fill(0.0);
                }
            }
        }
        let mut feeds = Feeds::default();
        feeds.push("x", noise.tensor(self.dtypes[0], &[batch, tokens, width]));
        feeds.push("metric", Tensor::from_f64(self.dtypes[1], &metric));
        if self.sized {
            let sizes = ArrayD::from_shape_simple_fn(IxDyn(&[batch, tokens, 1]), || (noise.next() * 4.0).abs().ceil());
            feeds.push("size", Tensor::from_f64(DType::F32, &sizes));
        }
        feeds.push("y_in", noise.tensor(self.dtypes[0], &[batch, tokens - self.r, 3]));
        let Plan { r, protect, suffix, .. } = *self;
        Case { name: format!("{self:?}"), r, tokens, protect, suffix, heads: self.heads, feeds }
    }
}

/// Runs a model on each backend.
fn outputs_of(
    backends: &[(&str, &dyn Backend)],
    scratch: &Scratch,
    model: &Model,
    feeds: &Feeds,
) -> Result<Vec<(String, Outputs)>, TestCaseError> {
    let path = scratch.save("case", model);
    let run = |&(name, backend): &(&str, &dyn Backend)| {
        let outputs = try_run(backend, &path, feeds).map_err(TestCaseError::fail)?;
        Ok((name.to_owned(), outputs))
    };
    backends.iter().map(run).collect()
}

/// TokenSize, TokenMerge and TokenMergeDynamic, TokenAssign, TokenRestore.
fn check_merges(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = RefCell::new(Scratch::new(what));
    let (cases, close) = (Cell::new(0), Cell::new(0));
    for_all(plans(dtypes), |plan| {
        let case = plan.case();
        let reference = Reference::new(&case);
        let expected = reference.expected();
        let model = case.model(17, plan.dynamic);
        for (name, outputs) in outputs_of(backends, &scratch.borrow(), &model, &case.feeds)? {
            let tolerance = tolerance(plan.dtypes[0]);
            // Products of matrices in runtimes add up the rows at an edge in another order than others. Our kernels do not.
            let decided = reference.is_decided(MARGIN, name == KERNEL);
            cases.set(cases.get() + 1);
            close.set(close.get() + usize::from(!decided));
            let checked = match decided {
                true => expected.check(&case, &outputs, tolerance),
                false => reference.check_as_decided(&outputs, MARGIN, tolerance),
            };
            checked.map_err(|reason| TestCaseError::fail(format!("{name}: {reason}")))?;
        }
        Ok(())
    });
    println!("{what}: {} merges, {} of them too close for float32 to decide", cases.get(), close.get());
}

#[test]
fn merges_agree() {
    let (body, kernels) = (ort(), kernels());
    check_merges("merges", &[DType::F32, DType::F16], &[("body", body.as_ref()), (KERNEL, kernels.as_ref())]);
}

/// ONNX Runtime has no arithmetic in bfloat16 on the CPU, so that bodies do not run.
#[test]
fn merges_of_bfloat16_agree() {
    let kernels = kernels();
    check_merges("bfloat16", &[DType::Bf16], &[(KERNEL, kernels.as_ref())]);
}

/// Attention without its numbers.
#[derive(Clone, Debug)]
struct AttentionPlan {
    seed: u64,
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    head_dim: usize,
    at: [usize; 3],
    dtype: DType,
    /// One tensor for queries, keys and values.
    joint: bool,
    /// How far scores range.
    sharpness: f64,
    /// How many queries TokenScore averages.
    first: i64,
}

fn attention_plans(dtypes: &'static [DType]) -> impl Strategy<Value = AttentionPlan> {
    let count = || prop_oneof![4 => 1..40usize, 1 => 40..210usize];
    let shape = (1..4usize, count(), count(), 1..5usize, prop_oneof![2 => 1..20usize, 1 => 60..70usize]);
    let first = prop_oneof![2 => Just(1), 1 => 2..60i64, 1 => Just(i64::MAX)];
    let kind = (prop::sample::select(dtypes), any::<bool>(), 0.1..8.0f64, first);
    (any::<u64>(), shape, [0..5usize, 0..5usize, 0..5usize], kind).prop_map(|(seed, shape, at, kind)| {
        let (batch, queries, keys, heads, head_dim) = shape;
        let (dtype, joint, sharpness, first) = kind;
        let keys = if joint { queries } else { keys };
        AttentionPlan { seed, batch, queries, keys, heads, head_dim, at, dtype, joint, sharpness, first }
    })
}

impl AttentionPlan {
    /// Where the heads of queries, keys and values begin.
    fn starts(&self) -> [usize; 3] {
        let width = self.heads * self.head_dim;
        let [q, k, v] = self.at;
        if self.joint { [q, q + width + k, q + 2 * width + k + v] } else { self.at }
    }

    fn scale(&self) -> f32 {
        (self.sharpness / (self.head_dim as f64).sqrt()) as f32
    }

    fn feeds(&self) -> Feeds {
        let mut noise = Noise(self.seed);
        let width = self.heads * self.head_dim;
        let mut feeds = Feeds::default();
        if self.joint {
            let all = noise.tensor(self.dtype, &[self.batch, self.queries, self.starts()[2] + width + 1]);
            ["q", "k", "v"].into_iter().for_each(|name| feeds.push(name, all.clone()));
        } else {
            for ((name, count), at) in
                [("q", self.queries), ("k", self.keys), ("v", self.keys)].into_iter().zip(self.at)
            {
                feeds.push(name, noise.tensor(self.dtype, &[self.batch, count, at + width]));
            }
        }
        let sizes =
            ArrayD::from_shape_simple_fn(IxDyn(&[self.batch, self.keys, 1]), || (noise.next() * 9.0).abs().ceil());
        feeds.push("size", Tensor::from_f64(DType::F32, &sizes));
        feeds
    }

    fn model(&self, feeds: &Feeds) -> Model {
        let mut calls = Calls::new(17);
        let dtype = data_type(feeds.get("q").expect("it is fed"));
        let inputs = ["q", "k", "v"].map(|name| calls.input(name, dtype, 3));
        let size = calls.input("size", DataType::F32, 3);
        let [q_at, k_at, v_at] = self.starts().map(|at| Attribute::Int(at as i64));
        let scores = [
            ("heads", Attribute::Int(self.heads as i64)),
            ("head_dim", Attribute::Int(self.head_dim as i64)),
            ("q_at", q_at),
            ("k_at", k_at),
            ("scale", Attribute::Float(self.scale())),
        ];
        let attributes = [&scores[..], &[("v_at", v_at), ("dtype", Attribute::Int(dtype.code().into()))]].concat();
        let [q, k, v] = inputs;
        let chosen = [&scores[..], &[("queries", Attribute::Int(self.first))]].concat();
        let score = calls.op_with("TokenScore", "score", &[q, k, size], &chosen, 1)[0];
        calls.output("score", score, DataType::F32, 2);
        for (name, inputs) in [("Attention", vec![q, k, v]), ("ProportionalAttention", vec![q, k, v, size])] {
            let y = calls.op_with(name, name, &inputs, &attributes, 1)[0];
            calls.output(name, y, dtype, 3);
        }
        calls.model()
    }

    /// The rows of softmax(scale · q kᵀ + log(size)), of each query of each head of each image.
    fn weights(&self, feeds: &Feeds, proportional: bool) -> Array4<f64> {
        let [q, k, size] = ["q", "k", "size"].map(|name| of_three_axes(feeds, name));
        let (d, [q_at, k_at, _]) = (self.head_dim, self.starts());
        let shape = (self.batch, self.heads, self.queries, self.keys);
        let mut rows = Array4::from_shape_fn(shape, |(image, head, query, key)| {
            let product = |at: usize| q[[image, query, q_at + head * d + at]] * k[[image, key, k_at + head * d + at]];
            let count: f64 = if proportional { size[[image, key, 0]] } else { 1.0 };
            (0..d).map(product).sum::<f64>() * f64::from(self.scale()) + count.ln()
        });
        for mut row in rows.lanes_mut(Axis(3)) {
            let largest = row.fold(f64::NEG_INFINITY, |largest, &score| largest.max(score));
            row.mapv_inplace(|score| (score - largest).exp());
            let total = row.sum();
            row /= total;
        }
        rows
    }

    /// The weights times v.
    fn attended(&self, feeds: &Feeds, weights: &Array4<f64>) -> Tensor {
        let (v, d) = (of_three_axes(feeds, "v"), self.head_dim);
        let v_at = self.starts()[2];
        let shape = (self.batch, self.queries, self.heads * d);
        let y = Array3::from_shape_fn(shape, |(image, query, channel)| {
            let weight = |key: usize| weights[[image, channel / d, query, key]];
            (0..self.keys).map(|key| weight(key) * v[[image, key, v_at + channel]]).sum::<f64>()
        });
        Tensor::from(y.into_dyn())
    }

    /// The mean of the weights over heads and the first queries.
    fn received(&self, weights: &Array4<f64>) -> Tensor {
        let chosen = self.queries.min(self.first as usize);
        let rows = weights.slice_axis(Axis(2), (..chosen).into());
        let mean = rows.mean_axis(Axis(2)).and_then(|rows| rows.mean_axis(Axis(1))).expect("heads and queries");
        Tensor::from(mean.into_dyn())
    }
}

fn of_three_axes(feeds: &Feeds, name: &str) -> Array3<f64> {
    feeds.get(name).expect("it is fed").to_f64().into_dimensionality().expect("three axes")
}

/// Attention, ProportionalAttention, TokenScore.
fn check_attention(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = Scratch::new(what);
    for_all(attention_plans(dtypes), |plan| {
        let feeds = plan.feeds();
        let [plain, sized] = [false, true].map(|proportional| plan.weights(&feeds, proportional));
        let expected = [
            // Whatever the type, scores are float32 of operands that are exact.
            ("score", plan.received(&sized), DType::F32),
            ("Attention", plan.attended(&feeds, &plain), plan.dtype),
            ("ProportionalAttention", plan.attended(&feeds, &sized), plan.dtype),
        ];
        for (name, outputs) in outputs_of(backends, &scratch, &plan.model(&feeds), &feeds)? {
            for (output, expected, dtype) in &expected {
                let apart = relative(expected, outputs.get(output).expect("an output"));
                prop_assert!(apart <= tolerance(*dtype), "{name}, {output}: {apart:e} off");
            }
        }
        Ok(())
    });
}

#[test]
fn attention_agrees() {
    let (body, kernels) = (ort(), kernels());
    check_attention("attention", &[DType::F32, DType::F16], &[("body", body.as_ref()), (KERNEL, kernels.as_ref())]);
}

#[test]
fn attention_of_bfloat16_agrees() {
    let kernels = kernels();
    check_attention("attention_bfloat16", &[DType::Bf16], &[(KERNEL, kernels.as_ref())]);
}

/// The attention level of Tri-Level E-ViT without its numbers.
#[derive(Clone, Debug)]
struct SoftmaxPlan {
    seed: u64,
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    dtype: DType,
    /// How far scores range.
    sharpness: f64,
    /// Connections that are closed, of every hundred.
    closed: usize,
    sized: bool,
}

fn softmax_plans(dtypes: &'static [DType]) -> impl Strategy<Value = SoftmaxPlan> {
    let count = || prop_oneof![4 => 1..40usize, 1 => 40..210usize];
    let kind = (prop::sample::select(dtypes), 0.1..8.0f64, 0..=100usize, any::<bool>());
    (any::<u64>(), (1..4usize, 1..5usize, count(), count()), kind).prop_map(|(seed, shape, kind)| {
        let ((batch, heads, queries, keys), (dtype, sharpness, closed, sized)) = (shape, kind);
        SoftmaxPlan { seed, batch, heads, queries, keys, dtype, sharpness, closed, sized }
    })
}

impl SoftmaxPlan {
    const EPS: f32 = 1e-6;

    fn feeds(&self) -> Feeds {
        let mut noise = Noise(self.seed);
        let Self { batch, heads, queries, keys, .. } = *self;
        let scores =
            ArrayD::from_shape_simple_fn(IxDyn(&[batch, heads, queries, keys]), || self.sharpness * noise.next());
        let open = |noise: &mut Noise| f64::from((noise.next() + 1.0) * 50.0 >= self.closed as f64);
        let mask = ArrayD::from_shape_simple_fn(IxDyn(&[batch, queries, keys]), || open(&mut noise));
        let size = |noise: &mut Noise| if self.sized { (noise.next() * 4.0).abs().ceil() } else { 1.0 };
        let size = ArrayD::from_shape_simple_fn(IxDyn(&[batch, keys, 1]), || size(&mut noise));
        let mut feeds = Feeds::default();
        feeds.push("scores", Tensor::from_f64(self.dtype, &scores));
        feeds.push("mask", Tensor::from_f64(DType::F32, &mask));
        feeds.push("size", Tensor::from_f64(DType::F32, &size));
        feeds
    }

    fn model(&self, feeds: &Feeds) -> Model {
        let mut calls = Calls::new(17);
        let dtype = data_type(feeds.get("scores").expect("it is fed"));
        let operands = [("scores", dtype, 4), ("mask", DataType::F32, 3), ("size", DataType::F32, 3)];
        let operands = operands.map(|(name, dtype, rank)| calls.input(name, dtype, rank));
        let attributes = [("eps", Attribute::Float(Self::EPS)), ("dtype", Attribute::Int(dtype.code().into()))];
        let weights = calls.op_with("MaskedSoftmax", "softmax", &operands, &attributes, 1)[0];
        calls.output("weights", weights, dtype, 4);
        calls.model()
    }

    /// (e + eps / M) / (Σ e + eps) with e = exp(l + log(size) − peak) · mask.
    fn expected(&self, feeds: &Feeds) -> ArrayD<f64> {
        let [scores, mask, size] = ["scores", "mask", "size"].map(|name| feeds.get(name).expect("it is fed").to_f64());
        let mut weights = scores.clone();
        for ((image, mut weights), scores) in weights.outer_iter_mut().enumerate().zip(scores.outer_iter()) {
            for (mut weights, scores) in weights.outer_iter_mut().zip(scores.outer_iter()) {
                for ((query, mut weights), scores) in weights.outer_iter_mut().enumerate().zip(scores.outer_iter()) {
                    let sized = |key: usize| scores[[key]] + size[[image, key, 0]].ln();
                    let peak = (0..self.keys).map(sized).fold(f64::NEG_INFINITY, f64::max);
                    let open = |key: usize| (sized(key) - peak).exp() * mask[[image, query, key]];
                    let (total, eps) = ((0..self.keys).map(open).sum::<f64>(), f64::from(Self::EPS));
                    for key in 0..self.keys {
                        weights[[key]] = (open(key) + eps / self.keys as f64) / (total + eps);
                    }
                }
            }
        }
        weights
    }
}

/// Every weight counts, so errors are relative to each, but for what float16 rounds to zero: the floor of closed
/// connections, for one.
fn check_softmaxes(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    const LEAST_HALF: f64 = 1.0 / (1u32 << 24) as f64;
    let scratch = Scratch::new(what);
    for_all(softmax_plans(dtypes), |plan| {
        let feeds = plan.feeds();
        let expected = plan.expected(&feeds);
        for (name, outputs) in outputs_of(backends, &scratch, &plan.model(&feeds), &feeds)? {
            let weights = outputs.get("weights").expect("an output");
            prop_assert!(weights.dtype() == plan.dtype && weights.shape() == expected.shape(), "{name}: {weights:?}");
            let lost = if plan.dtype == DType::F16 { LEAST_HALF / 2.0 } else { 0.0 };
            for (at, &weight) in weights.to_f64().indexed_iter() {
                let expected = expected[&at];
                let allowed = tolerance(plan.dtype) * expected + lost;
                prop_assert!((weight - expected).abs() <= allowed, "{name}: {weight} for {expected} at {at:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn masked_softmax_agrees() {
    let (body, flat, kernels) = (ort(), tract(), kernels());
    let backends: [(&str, &dyn Backend); 3] =
        [("body", body.as_ref()), ("body in tract", flat.as_ref()), (KERNEL, kernels.as_ref())];
    check_softmaxes("softmax", &[DType::F32, DType::F16], &backends);
}

#[test]
fn masked_softmax_of_bfloat16_agrees() {
    let kernels = kernels();
    check_softmaxes("softmax_bfloat16", &[DType::Bf16], &[(KERNEL, kernels.as_ref())]);
}

/// A mask of connections without its numbers.
#[derive(Clone, Debug)]
struct MaskPlan {
    seed: u64,
    batch: usize,
    heads: usize,
    tokens: usize,
    slots: usize,
    connections: usize,
    protect: usize,
    suffix: usize,
    dtype: DType,
    /// Columns that are copies of another, and weights that are at the floor of a masked softmax, of every hundred.
    copies: usize,
    floor: usize,
    dynamic: bool,
}

fn mask_plans(dtypes: &'static [DType]) -> impl Strategy<Value = MaskPlan> {
    let tokens = prop_oneof![4 => 1..40usize, 1 => 40..210usize];
    let kind = (prop::sample::select(dtypes), 0..40usize, 0..=100usize, any::<bool>());
    let places = (0.0..=1.0f64, 0.0..1.1f64, 0..4usize, 0..4usize);
    (any::<u64>(), (1..4usize, 1..13usize, tokens), places, kind).prop_map(|(seed, shape, places, kind)| {
        let ((batch, heads, tokens), (dtype, copies, floor, dynamic)) = (shape, kind);
        let (kept, ratio, protect, suffix) = places;
        let free = ((kept * tokens as f64).round() as usize).max(1);
        // None counts as one, more than there are as all.
        let connections = (ratio * free as f64).floor() as usize;
        let slots = protect + free + suffix;
        MaskPlan { seed, batch, heads, tokens, slots, connections, protect, suffix, dtype, copies, floor, dynamic }
    })
}

impl MaskPlan {
    fn feeds(&self) -> Feeds {
        let mut noise = Noise(self.seed);
        let Self { batch, heads, tokens, slots, protect, suffix, .. } = *self;
        let below = |noise: &mut Noise, end: usize| ((noise.next() + 1.0) / 2.0 * end as f64) as usize;
        let mut weights = ArrayD::from_shape_simple_fn(IxDyn(&[batch, heads, tokens, tokens]), || noise.next().abs());
        for mut image in weights.outer_iter_mut() {
            for row in 0..tokens {
                for column in 0..tokens {
                    // In all heads alike, as masks are.
                    if below(&mut noise, 100) < self.floor {
                        image.slice_mut(ndarray::s![.., row, column]).fill(1e-3);
                    }
                }
            }
            for column in 0..tokens {
                if below(&mut noise, 100) < self.copies {
                    let other = image.index_axis(Axis(2), below(&mut noise, tokens)).to_owned();
                    image.index_axis_mut(Axis(2), column).assign(&other);
                }
            }
        }
        let free = protect..slots - suffix;
        let mut anchor = ArrayD::from_elem(IxDyn(&[batch, slots]), -1);
        for mut anchor in anchor.outer_iter_mut() {
            let mut order: Vec<(usize, i64)> =
                (0..tokens as i64).map(|token| (below(&mut noise, 1 << 20), token)).collect();
            order.sort_unstable();
            free.clone().zip(order).for_each(|(slot, (_, token))| anchor[slot] = token);
        }
        let mut feeds = Feeds::default();
        feeds.push("weights", Tensor::from_f64(self.dtype, &weights));
        feeds.push("anchor", Tensor::from(anchor));
        feeds
    }

    fn model(&self, feeds: &Feeds) -> Model {
        let mut calls = Calls::new(17);
        let weights = calls.input("weights", data_type(feeds.get("weights").expect("it is fed")), 4);
        let anchor = calls.input("anchor", DataType::I64, 2);
        let (connections, slots) = (self.connections as i64, self.slots as i64);
        let places = [("protect", self.protect as i64), ("suffix", self.suffix as i64)];
        let mask = if self.dynamic {
            let connections = calls.graph.tensor("connections", vitrim_ir::Tensor::shape(&[connections]));
            calls.op("ConnectionMaskDynamic", "mask", &[weights, anchor, connections], &places, 1)[0]
        } else {
            let attributes = [&[("connections", connections), ("slots", slots)][..], &places].concat();
            calls.op("ConnectionMask", "mask", &[weights, anchor], &attributes, 1)[0]
        };
        calls.output("mask", mask, DataType::F32, 3);
        calls.model()
    }

    /// What the mask must be; none where float32 may decide as it likes: the connection is nearly as strong as the
    /// weakest that stays, and not because all their weights are the same.
    fn expected(&self, feeds: &Feeds) -> ArrayD<Option<f64>> {
        let Self { batch, heads, slots, connections, protect, suffix, .. } = *self;
        let weights = feeds.get("weights").expect("it is fed").to_f64();
        let anchor = common::integers(feeds.get("anchor").expect("it is fed"));
        let free = protect..slots - suffix;
        let mut mask = ArrayD::from_elem(IxDyn(&[batch, slots, slots]), Some(1.0));
        for (image, row) in (0..batch).flat_map(|image| free.clone().map(move |row| (image, row))) {
            let token = |slot: usize| anchor[[image, slot]] as usize;
            let of_heads = |column: usize| {
                (0..heads).map(|head| weights[[image, head, token(row), token(column)]]).collect::<Vec<f64>>()
            };
            let mut columns: Vec<_> = free.clone().map(|column| (of_heads(column), column)).collect();
            let strength = |weights: &[f64]| weights.iter().sum::<f64>() / heads as f64;
            columns.sort_by(|(a, _), (b, _)| strength(b).total_cmp(&strength(a)));
            let weakest = &columns[connections.clamp(1, columns.len()) - 1].0;
            for (weights, column) in &columns {
                let (own, least) = (strength(weights), strength(weakest));
                let decided = weights == weakest || (own - least).abs() > MARGIN * least;
                mask[[image, row, *column]] = decided.then(|| f64::from(own >= least));
            }
        }
        mask
    }
}

/// ConnectionMask and ConnectionMaskDynamic. The margin is relative to the weakest that stays.
fn check_masks(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = Scratch::new(what);
    let (decided, close) = (Cell::new(0), Cell::new(0));
    for_all(mask_plans(dtypes), |plan| {
        let feeds = plan.feeds();
        let expected = plan.expected(&feeds);
        let open = expected.iter().filter(|stays| stays.is_none()).count();
        decided.set(decided.get() + expected.len() - open);
        close.set(close.get() + open);
        for (name, outputs) in outputs_of(backends, &scratch, &plan.model(&feeds), &feeds)? {
            let mask = outputs.get("mask").expect("an output");
            prop_assert!(mask.dtype() == DType::F32 && mask.shape() == expected.shape(), "{name}: {mask:?}");
            for (at, &stays) in mask.to_f64().indexed_iter() {
                prop_assert!(stays == 0.0 || stays == 1.0, "{name}: {stays} at {at:?}");
                let expected = expected[&at].unwrap_or(stays);
                prop_assert!(stays == expected, "{name}: {stays} for {expected} at {at:?}");
            }
        }
        Ok(())
    });
    println!("{what}: {} connections, {} more too close for float32 to decide", decided.get(), close.get());
}

#[test]
fn masks_agree() {
    let (body, flat, kernels) = (ort(), tract(), kernels());
    let backends: [(&str, &dyn Backend); 3] =
        [("body", body.as_ref()), ("body in tract", flat.as_ref()), (KERNEL, kernels.as_ref())];
    check_masks("masks", &[DType::F32, DType::F16], &backends);
}

#[test]
fn masks_of_bfloat16_agree() {
    let kernels = kernels();
    check_masks("masks_bfloat16", &[DType::Bf16], &[(KERNEL, kernels.as_ref())]);
}

/// Pruning without its numbers.
#[derive(Clone, Debug)]
struct PruningPlan {
    seed: u64,
    batch: usize,
    tokens: usize,
    width: usize,
    protect: usize,
    suffix: usize,
    keep: i64,
    fuse: bool,
    dtype: DType,
    /// Scores that are copies of another, and scores that are no numbers, of every hundred.
    copies: usize,
    nan: usize,
    sized: bool,
    dynamic: bool,
}

fn pruning_plans(dtypes: &'static [DType]) -> impl Strategy<Value = PruningPlan> {
    let tokens = prop_oneof![4 => 1..40usize, 1 => 40..210usize];
    // None, all but one, all, and what is between, or, of the dynamic form, beyond.
    let keep = prop_oneof![1 => Just(0.0), 1 => Just(0.999), 1 => Just(1.0), 5 => 0.0..=1.0f64];
    let kind =
        (prop::sample::select(dtypes), prop_oneof![Just(0), 0..60usize], prop_oneof![3 => Just(0), 1 => 0..20usize]);
    let flavour = [any::<bool>(), any::<bool>(), any::<bool>()];
    let shape = (1..4usize, tokens, 1..40usize, 0..6usize, 0..4usize);
    (any::<u64>(), shape, keep, kind, flavour, -2..3i64).prop_map(|(seed, shape, keep, kind, flavour, beyond)| {
        let (batch, tokens, width, protect, suffix) = shape;
        let protect = protect.min(tokens - 1);
        let suffix = suffix.min(tokens - 1 - protect);
        let ([fuse, sized, dynamic], (dtype, copies, nan)) = (flavour, kind);
        let candidates = tokens - protect - suffix;
        let keep = (keep * candidates as f64) as i64;
        let keep = match dynamic {
            true if keep == 0 => keep + beyond.min(0),
            true if keep == candidates as i64 => keep + beyond.max(0),
            _ => keep,
        };
        PruningPlan { seed, batch, tokens, width, protect, suffix, keep, fuse, dtype, copies, nan, sized, dynamic }
    })
}

impl PruningPlan {
    fn case(&self) -> Pruning {
        let mut noise = Noise(self.seed);
        let PruningPlan { batch, tokens, width, protect, suffix, keep, fuse, .. } = *self;
        let mut score = noise.tensor(DType::F32, &[batch, tokens]).to_f64();
        for mut image in score.outer_iter_mut() {
            for token in 0..tokens {
                let chance = ((noise.next() + 1.0) * 50.0) as usize;
                let other = ((noise.next() + 1.0) / 2.0 * tokens as f64) as usize;
                if chance < self.copies {
                    image[token] = image[other];
                } else if chance < self.copies + self.nan {
                    image[token] = f64::NAN;
                }
            }
        }
        let mut feeds = Feeds::default();
        feeds.push("x", noise.tensor(self.dtype, &[batch, tokens, width]));
        feeds.push("score", Tensor::from_f64(DType::F32, &score));
        if self.sized {
            let sizes = ArrayD::from_shape_simple_fn(IxDyn(&[batch, tokens, 1]), || (noise.next() * 4.0).abs().ceil());
            feeds.push("size", Tensor::from_f64(DType::F32, &sizes));
        }
        Pruning { name: format!("{self:?}"), keep, tokens, protect, suffix, fuse, feeds }
    }
}

/// TokenPrune and TokenPruneDynamic.
fn check_prunings(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = Scratch::new(what);
    for_all(pruning_plans(dtypes), |plan| {
        let case = plan.case();
        let expected = case.expected();
        for (name, outputs) in outputs_of(backends, &scratch, &case.model(17, plan.dynamic), &case.feeds)? {
            let checked = expected.check(&outputs, tolerance(plan.dtype));
            checked.map_err(|reason| TestCaseError::fail(format!("{name}: {reason}")))?;
        }
        Ok(())
    });
}

/// All but the sum of what is fused, which is float32, copies: so bodies run in bfloat16 too.
#[test]
fn prunings_agree() {
    let (body, kernels) = (ort(), kernels());
    let dtypes = &[DType::F32, DType::F16, DType::Bf16];
    check_prunings("prunings", dtypes, &[("body", body.as_ref()), (KERNEL, kernels.as_ref())]);
}

/// Expansion without its numbers.
#[derive(Clone, Debug)]
struct ExpansionPlan {
    seed: u64,
    batch: usize,
    tokens: usize,
    width: usize,
    protect: usize,
    suffix: usize,
    seeds: usize,
    rounds: Vec<usize>,
    closeness: &'static str,
    sign: i64,
    dtype: DType,
    /// Tokens of which few are different, and all closeness is exact: ties are many, and nothing else is close.
    exact: bool,
}

fn expansion_plans(dtypes: &'static [DType]) -> impl Strategy<Value = ExpansionPlan> {
    let tokens = prop_oneof![4 => 1..30usize, 1 => 30..200usize];
    let counts = (0.0..=1.0f64, prop::collection::vec(0.0..0.7f64, 0..4usize));
    let how =
        (prop::sample::select(&["CosineSimilarity", "ManhattanDistance"][..]), prop::sample::select(&[1, -1][..]));
    let shape = (1..4usize, tokens, 4..40usize, 0..4usize, 0..4usize);
    let kind = (prop::sample::select(dtypes), any::<bool>());
    (any::<u64>(), shape, counts, how, kind).prop_map(|(seed, shape, counts, how, (dtype, exact))| {
        let ((batch, candidates, width, protect, suffix), (closeness, sign)) = (shape, how);
        let seeds = ((counts.0 * counts.0 * candidates as f64) as usize).max(1);
        let mut left = candidates - seeds;
        let rounds = counts.1.into_iter().map(|share| {
            let add = (share * left as f64) as usize;
            left -= add;
            add
        });
        // A round that adds none is left out; what is left may be none, but no round is then to come.
        let rounds = rounds.filter(|&add| add > 0).collect();
        let tokens = protect + candidates + suffix;
        ExpansionPlan { seed, batch, tokens, width, protect, suffix, seeds, rounds, closeness, sign, dtype, exact }
    })
}

impl ExpansionPlan {
    fn case(&self) -> Expanding {
        let mut noise = Noise(self.seed);
        let &Self { batch, tokens, width, protect, suffix, closeness, sign, .. } = self;
        let mut below = |end: usize| ((noise.next() + 1.0) / 2.0 * end as f64) as usize;
        // Anywhere, in any order.
        let mut seeds: Vec<(usize, usize)> =
            (0..tokens - protect - suffix).map(|token| (below(1 << 20), token)).collect();
        seeds.sort_unstable();
        let seeds = seeds[..self.seeds].iter().map(|&(_, token)| token).collect();
        let mut x = ArrayD::zeros(IxDyn(&[batch, tokens, width]));
        if self.exact {
            for mut row in x.lanes_mut(Axis(2)) {
                // Of length 1, 2 or 0.
                let (first, count) = (below(3).min(width - 4), [1, 4][below(2)]);
                let value = [1.0, -1.0, 0.0][below(3)];
                row.slice_mut(ndarray::s![first..first + count]).fill(value);
            }
        } else {
            x.mapv_inplace(|_| noise.next());
        }
        let feeds = Feeds::from_iter([("x".to_owned(), Tensor::from_f64(self.dtype, &x))]);
        let (name, rounds) = (format!("{self:?}"), self.rounds.clone());
        Expanding { name, tokens, protect, suffix, seeds, rounds, closeness, sign, feeds }
    }
}

/// CosineSimilarity, ManhattanDistance, TokenExpand, TokenAbsorb.
fn check_expansions(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = Scratch::new(what);
    let (cases, close) = (Cell::new(0), Cell::new(0));
    for_all(expansion_plans(dtypes), |plan| {
        let case = plan.case();
        let (expected, margin) = case.expected_within();
        cases.set(cases.get() + 1);
        if !plan.exact && margin < MARGIN {
            close.set(close.get() + 1);
            return Ok(());
        }
        for (name, outputs) in outputs_of(backends, &scratch, &case.model(17), &case.feeds)? {
            let checked = expected.check(&outputs, tolerance(plan.dtype));
            checked.map_err(|reason| TestCaseError::fail(format!("{name}: {reason}")))?;
        }
        Ok(())
    });
    println!("{what}: {} expansions, {} of them too close for float32 to decide", cases.get(), close.get());
    assert!(3 * close.get() < cases.get(), "too many are not decided");
}

#[test]
fn expansions_agree() {
    let (body, kernels) = (ort(), kernels());
    check_expansions("expansions", &[DType::F32, DType::F16], &[("body", body.as_ref()), (KERNEL, kernels.as_ref())]);
}

#[test]
fn expansions_of_bfloat16_agree() {
    let kernels = kernels();
    check_expansions("expansions_bfloat16", &[DType::Bf16], &[(KERNEL, kernels.as_ref())]);
}

/// What the operators of training take, without its numbers.
#[derive(Clone, Debug)]
struct TrainingPlan {
    seed: u64,
    /// Axes, the last of them normalised.
    shape: Vec<usize>,
    normalised: usize,
    /// How far `x` ranges, and what it ranges around.
    range: f64,
    centre: f64,
    step: i32,
}

fn training_plans() -> impl Strategy<Value = TrainingPlan> {
    let extent = || prop_oneof![4 => 1..9usize, 1 => 9..70usize];
    let shape = prop::collection::vec(extent(), 1..4usize);
    (any::<u64>(), shape, 1..3usize, 0.1..6.0f64, -2.0..2.0f64, 1..1000i32).prop_map(
        |(seed, shape, normalised, range, centre, step)| {
            let normalised = normalised.min(shape.len());
            TrainingPlan { seed, shape, normalised, range, centre, step }
        },
    )
}

impl TrainingPlan {
    const EPSILON: f32 = 1e-6;
    const ADAM: [f32; 3] = [0.1, 1e-3, 1e-8];

    fn feeds(&self) -> Feeds {
        let mut noise = Noise(self.seed);
        let mut array = |range: f64, centre: f64, shape: &[usize]| {
            ArrayD::from_shape_simple_fn(IxDyn(shape), || centre + range * noise.next())
        };
        let own = &self.shape[self.shape.len() - self.normalised..];
        let x = array(self.range, self.centre, &self.shape);
        let mut weights = array(self.range, 0.0, &self.shape);
        let last = Axis(self.shape.len() - 1);
        for mut row in weights.lanes_mut(last) {
            row.mapv_inplace(f64::exp);
            let total = row.sum();
            row /= total;
        }
        let (decay, rate) = (0.05 * 1e-3, 1e-3 / (1.0 - 0.9f64.powi(self.step)));
        let scalar = |value: f64| ArrayD::from_elem(IxDyn(&[]), value);
        let feeds = [
            ("x", x),
            ("weights", weights),
            ("dy", array(1.0, 0.0, &self.shape)),
            ("scale", array(1.0, 1.0, own)),
            ("mean", array(0.1, 0.0, &self.shape)),
            ("variance", array(0.1, 0.2, &self.shape)),
            ("kept", scalar(1.0 - decay)),
            ("rate", scalar(rate)),
            ("deviation", scalar((1.0 - 0.999f64.powi(self.step)).sqrt())),
        ];
        feeds.into_iter().map(|(name, array)| (name.to_owned(), Tensor::from_f64(DType::F32, &array))).collect()
    }

    fn model(&self) -> Model {
        let mut calls = Calls::new(17);
        let (rank, own) = (self.shape.len(), self.normalised);
        let mut input = |name: &str, rank: usize| calls.input(name, DataType::F32, rank);
        let [x, weights, dy] = ["x", "weights", "dy"].map(|name| input(name, rank));
        let scale = input("scale", own);
        let moments = ["mean", "variance"].map(|name| input(name, rank));
        let scalars = ["kept", "rate", "deviation"].map(|name| input(name, 0));
        let mut outputs = Vec::new();
        for name in ["GeluGrad", "TanhGeluGrad"] {
            outputs.push((name, calls.op_with(name, name, &[x, dy], &[], 1)[0], rank));
        }
        outputs.push(("SoftmaxGrad", calls.op_with("SoftmaxGrad", "softmax", &[weights, dy], &[], 1)[0], rank));
        let attributes = [("axis", Attribute::Int(-(own as i64))), ("epsilon", Attribute::Float(Self::EPSILON))];
        let norm = calls.op_with("LayerNormGrad", "norm", &[x, scale, dy], &attributes, 3);
        outputs.extend([("dx", norm[0], rank), ("dscale", norm[1], own), ("dbias", norm[2], own)]);
        let [mean_rate, variance_rate, epsilon] = Self::ADAM.map(Attribute::Float);
        let attributes = [("mean_rate", mean_rate), ("variance_rate", variance_rate), ("epsilon", epsilon)];
        let inputs = [&[x, dy][..], &moments, &scalars].concat();
        let step = calls.op_with("AdamW", "step", &inputs, &attributes, 3);
        outputs.extend(["parameter_out", "mean_out", "variance_out"].into_iter().zip(step).map(|(n, v)| (n, v, rank)));
        outputs.into_iter().for_each(|(name, value, rank)| calls.output(name, value, DataType::F32, rank));
        calls.model()
    }

    /// The same in float64, of the numbers that are fed. The derivatives of the units are difference quotients.
    fn expected(&self, feeds: &Feeds) -> Vec<(&'static str, ArrayD<f64>)> {
        let get = |name: &str| feeds.get(name).expect("it is fed").to_f64();
        let [x, weights, dy, scale] = ["x", "weights", "dy", "scale"].map(get);
        let mut all = Vec::new();
        let exact = |x: f64| 0.5 * x * (1.0 + erf(x / 2.0f64.sqrt()));
        let bent = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        let tanh = |x: f64| 0.5 * x * (1.0 + bent(x).tanh());
        // Of the fourth order: what it leaves out is below 1e-10, as is what float64 rounds.
        let derivative = |unit: &dyn Fn(f64) -> f64, x: f64| {
            let (near, far) = (unit(x + 1e-3) - unit(x - 1e-3), unit(x + 2e-3) - unit(x - 2e-3));
            (8.0 * near - far) / 12e-3
        };
        all.push(("GeluGrad", x.mapv(|x| derivative(&exact, x)) * &dy));
        all.push(("TanhGeluGrad", x.mapv(|x| derivative(&tanh, x)) * &dy));
        let last = Axis(self.shape.len() - 1);
        let share = (&weights * &dy).sum_axis(last).insert_axis(last);
        all.push(("SoftmaxGrad", &weights * &(&dy - &share)));

        let columns: usize = self.shape[self.shape.len() - self.normalised..].iter().product();
        let rows = |array: &ArrayD<f64>| array.to_shape((array.len() / columns, columns)).expect("rows").into_owned();
        let (x_rows, dy_rows, scale_row) = (rows(&x), rows(&dy), rows(&scale));
        let mean = |rows: &ndarray::Array2<f64>| rows.mean_axis(Axis(1)).expect("columns").insert_axis(Axis(1));
        let centred = &x_rows - &mean(&x_rows);
        let deviation = (mean(&(&centred * &centred)) + f64::from(Self::EPSILON)).mapv(f64::sqrt);
        let normal = &centred / &deviation;
        let slope = &dy_rows * &scale_row;
        let dx = (&slope - &mean(&slope) - &normal * &mean(&(&slope * &normal))) / &deviation;
        all.push(("dx", dx.into_shape_with_order(x.raw_dim()).expect("as many")));
        let sum = |rows: ndarray::Array2<f64>| rows.sum_axis(Axis(0)).into_shape_with_order(scale.raw_dim());
        all.push(("dscale", sum(&dy_rows * &normal).expect("as many")));
        all.push(("dbias", sum(dy_rows).expect("as many")));

        let [mean_rate, variance_rate, epsilon] = Self::ADAM.map(f64::from);
        let scalar = |name: &str| *get(name).first().expect("a scalar");
        let (mean, variance) = (get("mean"), get("variance"));
        let mean = &mean + &((&dy - &mean) * mean_rate);
        let variance = &variance + &((&dy * &dy - &variance) * variance_rate);
        let divisor = variance.mapv(f64::sqrt) / scalar("deviation") + epsilon;
        all.push(("parameter_out", x * scalar("kept") - &mean / &divisor * scalar("rate")));
        all.push(("mean_out", mean));
        all.push(("variance_out", variance));
        all
    }
}

/// The error function, by its series, or where that loses digits by its continued fraction.
fn erf(x: f64) -> f64 {
    let size = x.abs();
    let value = if size < 3.0 {
        let (mut term, mut sum) = (size, size);
        for n in 1..100 {
            term *= -size * size / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..=60).rev().fold(size, |fraction, n| size + f64::from(n) / 2.0 / fraction);
        1.0 - (-size * size).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

/// GeluGrad, TanhGeluGrad, SoftmaxGrad, LayerNormGrad, AdamW. Errors are relative to the largest entry of the result, or
/// of what it is a difference of: of derivatives near zero (far below it 1 + tanh has no digits left), and of sums that cancel.
#[test]
fn operators_of_training_agree() {
    let (body, kernels) = (ort(), kernels());
    let backends: [(&str, &dyn Backend); 2] = [("body", body.as_ref()), (KERNEL, kernels.as_ref())];
    let scratch = Scratch::new("training");
    for_all(training_plans(), |plan| {
        let feeds = plan.feeds();
        let expected = plan.expected(&feeds);
        let own: usize = plan.shape[plan.shape.len() - plan.normalised..].iter().product();
        // Gradients that come in are up to one, and so are weights.
        let operand = |output: &str| if output == "dx" { 0.0 } else { 1.0 };
        for (name, outputs) in outputs_of(&backends, &scratch, &plan.model(), &feeds)? {
            for (output, expected) in &expected {
                // Of few entries, deviations may be as small as they like.
                if own < 4 && matches!(*output, "dx" | "dscale") {
                    continue;
                }
                let given = outputs.get(output).expect("an output");
                prop_assert!(given.shape() == expected.shape(), "{name}, {output}: {:?}", given.shape());
                let largest = expected.iter().fold(operand(output), |largest: f64, x| largest.max(x.abs()));
                let apart = distance(&Tensor::from(expected.clone()), given) / largest;
                prop_assert!(apart <= tolerance(DType::F32), "{name}, {output}: {apart:e} off");
            }
        }
        Ok(())
    });
}

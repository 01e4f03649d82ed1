//! Every operator on random cases: body and native kernel against a reference in float64.

mod common;

use std::cell::{Cell, RefCell};

use common::ops::{Calls, Case, Reference, data_type};
use common::{Scratch, kernels, ort, relative, try_run};
use ndarray::{ArrayD, Axis, IxDyn};
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
}

fn attention_plans(dtypes: &'static [DType]) -> impl Strategy<Value = AttentionPlan> {
    let count = || prop_oneof![4 => 1..40usize, 1 => 40..210usize];
    let shape = (1..4usize, count(), count(), 1..5usize, prop_oneof![2 => 1..20usize, 1 => 60..70usize]);
    let kind = (prop::sample::select(dtypes), any::<bool>(), 0.1..8.0f64);
    (any::<u64>(), shape, [0..5usize, 0..5usize, 0..5usize], kind).prop_map(|(seed, shape, at, kind)| {
        let (batch, queries, keys, heads, head_dim) = shape;
        let (dtype, joint, sharpness) = kind;
        let keys = if joint { queries } else { keys };
        AttentionPlan { seed, batch, queries, keys, heads, head_dim, at, dtype, joint, sharpness }
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
        let attributes = [
            ("heads", Attribute::Int(self.heads as i64)),
            ("head_dim", Attribute::Int(self.head_dim as i64)),
            ("q_at", q_at),
            ("k_at", k_at),
            ("v_at", v_at),
            ("scale", Attribute::Float(self.scale())),
            ("dtype", Attribute::Int(dtype.code().into())),
        ];
        let [q, k, v] = inputs;
        for (name, inputs) in [("Attention", vec![q, k, v]), ("ProportionalAttention", vec![q, k, v, size])] {
            let y = calls.op_with(name, name, &inputs, &attributes, 1)[0];
            calls.output(name, y, dtype, 3);
        }
        calls.model()
    }

    /// softmax(scale · q kᵀ + log(size)) v.
    fn expected(&self, feeds: &Feeds, proportional: bool) -> Tensor {
        let [q, k, v, size] = ["q", "k", "v", "size"].map(|name| feeds.get(name).expect("it is fed").to_f64());
        let (d, starts) = (self.head_dim, self.starts());
        let mut y = ArrayD::zeros(IxDyn(&[self.batch, self.queries, self.heads * d]));
        for image in 0..self.batch {
            for head in 0..self.heads {
                let [q_at, k_at, v_at] = starts.map(|at| at + head * d);
                for query in 0..self.queries {
                    let score = |key: usize| {
                        let product: f64 =
                            (0..d).map(|at| q[[image, query, q_at + at]] * k[[image, key, k_at + at]]).sum();
                        let count = if proportional { size[[image, key, 0]] } else { 1.0 };
                        product * f64::from(self.scale()) + count.ln()
                    };
                    let scores: Vec<f64> = (0..self.keys).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for at in 0..d {
                        let sum: f64 =
                            weights.iter().enumerate().map(|(key, weight)| weight * v[[image, key, v_at + at]]).sum();
                        y[[image, query, head * d + at]] = sum / total;
                    }
                }
            }
        }
        Tensor::from(y)
    }
}

fn check_attention(what: &str, dtypes: &'static [DType], backends: &[(&str, &dyn Backend)]) {
    let scratch = Scratch::new(what);
    for_all(attention_plans(dtypes), |plan| {
        let feeds = plan.feeds();
        for (name, outputs) in outputs_of(backends, &scratch, &plan.model(&feeds), &feeds)? {
            for (op, proportional) in [("Attention", false), ("ProportionalAttention", true)] {
                let apart = relative(&plan.expected(&feeds, proportional), outputs.get(op).expect("an output"));
                prop_assert!(apart <= tolerance(plan.dtype), "{name}, {op}: {apart:e} off");
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

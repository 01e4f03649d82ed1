//! Gradients of our operators, entry by entry, against differences of what they give.

mod common;

use common::ops::Calls;
use common::{Scratch, conclude, kernels, load, ort};
use ndarray::{ArrayD, IxDyn};
use vitrim::runtime::{Backend, Feeds};
use vitrim::tensor::{DType, Tensor};
use vitrim_autodiff::{Emitter, gradients, rules};
use vitrim_ir::{Attribute, DataType, DimSpec, Model, Patch, Shapes, TensorType, ValueId};
use vitrim_ops::gradient_rule;

/// How far operands move to each side. Their entries are of size one; decisions of the cases have wider margins.
const STEP: f64 = 1.0 / 128.0;

/// What a gradient may differ from a difference, relative to the largest: the square of the step (6e-5) by how bent an
/// operator is, and roundings of float32 divided by it (1e-5).
const TOLERANCE: f64 = 1e-3;

/// One operator with what it is fed.
struct Case {
    name: String,
    calls: Calls,
    feeds: Feeds,
    operands: Vec<ValueId>,
    /// Those with a gradient.
    wrt: Vec<usize>,
}

/// Deterministic numbers in −1..1, no two alike.
fn numbers(dims: &[usize], seed: u64) -> ArrayD<f64> {
    let mut state = seed;
    ArrayD::from_shape_simple_fn(IxDyn(dims), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f64 / f64::from(1 << 23)) - 1.0
    })
}

fn known(dtype: DataType, dims: &[usize]) -> TensorType {
    TensorType { dtype, dims: Some(dims.iter().map(|&extent| DimSpec::Known(extent as i64)).collect()) }
}

impl Case {
    fn new(name: &str) -> Self {
        let (calls, feeds) = (Calls::new(17), Feeds::default());
        Case { name: name.into(), calls, feeds, operands: Vec::new(), wrt: Vec::new() }
    }

    /// An operand in floating point, and whether it has a gradient.
    fn float(mut self, array: ArrayD<f64>, has_gradient: bool) -> Self {
        if has_gradient {
            self.wrt.push(self.operands.len());
        }
        self.push(DType::F32, DataType::F32, &array)
    }

    fn ints(self, dims: &[usize], elements: &[i64]) -> Self {
        let elements = elements.iter().map(|&element| element as f64).collect();
        let array = ArrayD::from_shape_vec(IxDyn(dims), elements).expect("as many as the extents say");
        self.push(DType::I64, DataType::I64, &array)
    }

    fn push(mut self, dtype: DType, as_dtype: DataType, array: &ArrayD<f64>) -> Self {
        let name = format!("operand{}", self.operands.len());
        self.operands.push(self.calls.graph.input(&name, Some(&known(as_dtype, array.shape()))));
        self.feeds.push(name, Tensor::from_f64(dtype, array));
        self
    }

    /// The model that calls an operator, whose first result has these extents.
    fn call(self, op: &str, attributes: &[(&str, Attribute)], results: usize, dims: &[usize]) -> Checked {
        let Case { name, mut calls, feeds, operands, wrt } = self;
        let y = calls.op_with(op, "y", &operands, attributes, results)[0];
        calls.graph.output("y", y, Some(&known(DataType::F32, dims)));
        let names = wrt.iter().map(|at| format!("operand{at}")).collect();
        Checked { name, model: calls.model(), feeds, wrt: names, dims: dims.to_vec() }
    }
}

struct Checked {
    name: String,
    model: Model,
    feeds: Feeds,
    wrt: Vec<String>,
    /// The extents of the result.
    dims: Vec<usize>,
}

impl Checked {
    /// The model that gives the gradients, of the result's gradient `dy`.
    fn gradients(&self) -> Model {
        let shapes = Shapes::infer(&self.model);
        let graph = self.model.graph();
        let wrt: Vec<ValueId> = self.wrt.iter().map(|name| graph.find_value(name).expect("an operand")).collect();
        let mut patch = Patch::new(&self.model, "test");
        let dy = patch.feed("dy", &known(DataType::F32, &self.dims));
        let found =
            gradients(&mut Emitter::new(&self.model, &shapes, &mut patch), &[(graph.outputs()[0], dy)], &wrt, &|op| {
                gradient_rule(op).unwrap_or_else(|| rules::standard(op))
            });
        let found = found.unwrap_or_else(|reason| panic!("{}: {reason}", self.name));
        for (name, value) in self.wrt.iter().zip(&wrt) {
            let ty = graph.value(*value).ty().expect("operands have types");
            let gradient = found.get(value).unwrap_or_else(|| panic!("{}: {name} has a gradient", self.name));
            patch.append_output(&format!("{name}_gradient"), *gradient, ty);
        }
        patch.apply(&self.model).unwrap_or_else(|error| panic!("{}: {error}", self.name)).0
    }

    fn check(&self, scratch: &Scratch, backend: &dyn Backend) -> Result<usize, String> {
        let path = scratch.save("forward", &self.model);
        let mut forward = load(backend, &path);
        let dy = numbers(&self.dims, 99);
        let mut loss = |feeds: &Feeds| -> f64 {
            let outputs = forward.run(feeds).unwrap_or_else(|error| panic!("{}: {error:#}", self.name));
            (outputs.get("y").expect("an output").to_f64() * &dy).sum()
        };
        let mut feeds: Feeds = self.feeds.iter().map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
        feeds.push("dy", Tensor::from_f64(DType::F32, &dy));
        let path = scratch.save("gradients", &self.gradients());
        let outputs = load(backend, &path).run(&feeds).unwrap_or_else(|error| panic!("{}: {error:#}", self.name));
        let mut entries = 0;
        for name in &self.wrt {
            let found = outputs.get(&format!("{name}_gradient")).expect("an output").to_f64();
            let operand = self.feeds.get(name).expect("it is fed").to_f64();
            if found.shape() != operand.shape() {
                return Err(format!("{name}: {:?} for {:?}", found.shape(), operand.shape()));
            }
            let moved = |at: usize, by: f64| -> Feeds {
                let mut moved = operand.clone();
                *moved.iter_mut().nth(at).expect("an entry") += by;
                let of = |(other, tensor): (&str, &Tensor)| match other == name {
                    true => (other.to_owned(), Tensor::from_f64(DType::F32, &moved)),
                    false => (other.to_owned(), tensor.clone()),
                };
                self.feeds.iter().map(of).collect()
            };
            let mut slope = |at: usize| (loss(&moved(at, STEP)) - loss(&moved(at, -STEP))) / (2.0 * STEP);
            let expected: Vec<f64> = (0..operand.len()).map(&mut slope).collect();
            let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
            if largest == 0.0 {
                return Err(format!("{name}: nothing depends on it"));
            }
            entries += expected.len();
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                // What is no number fails as well.
                let close = (found - expected).abs() <= TOLERANCE * largest;
                if !close {
                    return Err(format!("{name} at {at}: {found}, not {expected}"));
                }
            }
        }
        Ok(entries)
    }
}

fn ints<const N: usize>(attributes: [(&'static str, i64); N]) -> Vec<(&'static str, Attribute)> {
    attributes.map(|(name, value)| (name, Attribute::Int(value))).into()
}

const F32: i64 = 1;

#[test]
fn gradients_are_what_results_change_by() {
    let sizes = |seed: u64, dims: &[usize]| numbers(dims, seed).mapv(|x| (x * 3.0).abs().floor() + 1.0);
    let mut cases = Vec::new();

    for (r, protect, suffix) in [(3, 1, 0), (2, 0, 2)] {
        let attributes = ints([
            ("r", r),
            ("tokens", 9),
            ("protect", protect),
            ("suffix", suffix),
            ("heads", 1),
            ("head_dim", 4),
            ("metric_at", 0),
            ("dtype", F32),
        ]);
        let case = Case::new(&format!("TokenMerge, {r}"))
            .float(numbers(&[2, 9, 3], 1), true)
            .float(numbers(&[2, 9, 4], 2), false)
            .float(sizes(3, &[2, 9, 1]), false);
        cases.push(case.call("TokenMerge", &attributes, 5, &[2, 9 - r as usize, 3]));
    }
    // Far apart, so that no step changes their order.
    let scores = ArrayD::from_shape_fn(IxDyn(&[2, 8]), |at| ((at[1] * 5 + at[0] * 3) % 8) as f64 / 8.0 + 0.1);
    for (fuse, slots) in [(false, 5), (true, 6)] {
        let attributes =
            ints([("keep", 3), ("tokens", 8), ("protect", 1), ("suffix", 1), ("fuse", fuse.into()), ("dtype", F32)]);
        let case = Case::new(&format!("TokenPrune, fuse {fuse}"))
            .float(numbers(&[2, 8, 3], 4), true)
            .float(scores.clone(), fuse)
            .float(ArrayD::ones(IxDyn(&[2, 8, 1])), false);
        cases.push(case.call("TokenPrune", &attributes, 4, &[2, slots, 3]));
    }
    let assign = [0, 2, 1, 1, 0, 1, 2, 2, 2, 0];
    for tail in [&[4][..], &[], &[2, 3]] {
        let dims = |tokens: usize| [&[2, tokens], tail].concat();
        let case = Case::new(&format!("TokenRestore, {tail:?}")).float(numbers(&dims(3), 5), true);
        cases.push(case.ints(&[2, 5], &assign).call("TokenRestore", &[], 1, &dims(5)));
    }
    let counts = ArrayD::from_shape_vec(IxDyn(&[2, 3, 1]), vec![2.0, 2.0, 1.0, 1.0, 1.0, 3.0]).expect("six");
    for dims in [&[5, 4][..], &[2, 5, 4]] {
        let case = Case::new(&format!("TokenMean of {dims:?}")).float(numbers(dims, 6), true).ints(&[2, 5], &assign);
        let case = case.float(counts.clone(), false);
        cases.push(case.call("TokenMean", &ints([("dtype", F32)]), 1, &[2, 3, 4]));
    }
    for queries in [1, 2, i64::MAX] {
        let mut attributes = ints([("heads", 2), ("head_dim", 2), ("q_at", 1), ("k_at", 0), ("queries", queries)]);
        attributes.push(("scale", Attribute::Float(0.7)));
        let case = Case::new(&format!("TokenScore of {queries}"))
            .float(numbers(&[2, 3, 6], 7), true)
            .float(numbers(&[2, 5, 4], 8), true)
            .float(sizes(9, &[2, 5, 1]), false);
        cases.push(case.call("TokenScore", &attributes, 1, &[2, 5]));
    }
    // The largest score of every row is closed in one case: then eps has weight, and the peak a gradient.
    for closed in [0, 3] {
        let mut scores = numbers(&[2, 2, 3, 4], 10);
        scores.indexed_iter_mut().filter(|(at, _)| at[3] == 3).for_each(|(_, score)| *score += 3.0);
        let mask = ArrayD::from_shape_fn(IxDyn(&[2, 3, 4]), |at| f64::from(u8::from(at[2] != closed)));
        let mut attributes = ints([("dtype", F32)]);
        attributes.push(("eps", Attribute::Float(0.05)));
        let case = Case::new(&format!("MaskedSoftmax, {closed} closed")).float(scores, true).float(mask, false);
        let case = case.float(sizes(11, &[2, 4, 1]), false);
        cases.push(case.call("MaskedSoftmax", &attributes, 1, &[2, 2, 3, 4]));
    }
    let closeness = numbers(&[2, 7, 7], 12);
    let attributes = ints([("tokens", 9), ("keep", 3), ("protect", 1), ("suffix", 1), ("dtype", F32)]);
    let case = Case::new("TokenAbsorb").float(numbers(&[2, 9, 3], 13), true).float(closeness, false);
    let order = [0, 4, 2, 1, 3, 5, 6, 6, 1, 3, 0, 2, 4, 5];
    cases.push(case.ints(&[2, 7], &order).call("TokenAbsorb", &attributes, 4, &[2, 5, 3]));

    let scratch = Scratch::new("op_gradients");
    let (mut count, mut failures) = (0, Vec::new());
    for backend in [ort(), kernels()] {
        for case in &cases {
            match case.check(&scratch, backend.as_ref()) {
                Ok(entries) => count += entries,
                Err(reason) => failures.push(format!("{} in {}: {reason}", case.name, backend.name())),
            }
        }
    }
    conclude("gradients of operators", count, &failures);
}

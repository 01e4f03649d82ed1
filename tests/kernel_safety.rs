//! The library of native kernels in the hands of a host: whatever a model asks of it, the answer is a result or an error.

mod common;

use common::ops::Calls;
use common::{Scratch, kernels, try_run};
use ndarray::{ArrayD, IxDyn};
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{Attribute, Model};

/// A call of one operator, its operands and attributes as they come.
struct Call<'a> {
    op: &'a str,
    inputs: Vec<(&'a str, Tensor)>,
    ints: Vec<(&'a str, i64)>,
    results: usize,
}

impl Call<'_> {
    fn model(&self) -> Model {
        let mut calls = Calls::new(17);
        let inputs: Vec<_> = self
            .inputs
            .iter()
            .map(|(name, tensor)| calls.input(name, common::ops::data_type(tensor), tensor.shape().len()))
            .collect();
        let mut attributes: Vec<_> = self.ints.iter().map(|&(name, value)| (name, Attribute::Int(value))).collect();
        if self.op.ends_with("Attention") || self.op == "TokenScore" {
            attributes.push(("scale", Attribute::Float(1.0)));
        }
        if self.op == "MaskedSoftmax" {
            attributes.push(("eps", Attribute::Float(1e-6)));
        }
        if self.op == "LayerNormGrad" {
            attributes.push(("epsilon", Attribute::Float(1e-6)));
        }
        if self.op == "AdamW" {
            let names = ["mean_rate", "variance_rate", "epsilon"];
            attributes.extend(names.map(|name| (name, Attribute::Float(0.1))));
        }
        let results = calls.op_with(self.op, "result", &inputs, &attributes, self.results);
        for (at, result) in results.into_iter().enumerate() {
            // Types are left to the operator.
            calls.graph.output(&format!("y{at}"), result, None);
        }
        calls.model()
    }

    fn run(&self, scratch: &Scratch) -> Result<Outputs, String> {
        let feeds: Feeds = self.inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        try_run(kernels().as_ref(), &scratch.save("call", &self.model()), &feeds)
    }

    /// The same with another operand.
    fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.inputs.iter_mut().filter(|(own, _)| *own == name).for_each(|(_, held)| *held = tensor.clone());
        self
    }

    /// The same with another attribute.
    fn set(mut self, name: &str, value: i64) -> Self {
        self.ints.iter_mut().filter(|(own, _)| *own == name).for_each(|(_, held)| *held = value);
        self
    }
}

/// 0.0, 0.7, 1.4, … modulo 2, in a shape.
fn floats(shape: &[usize]) -> Tensor {
    let mut next = 0.0;
    let array = ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        next = (next + 0.7) % 2.0;
        next
    });
    Tensor::from_f64(DType::F32, &array)
}

fn filled(shape: &[usize], value: f64) -> Tensor {
    Tensor::from_f64(DType::F32, &ArrayD::from_elem(IxDyn(shape), value))
}

fn indices(shape: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).expect("as many values as the shape has")
}

fn merge<'a>() -> Call<'a> {
    Call {
        op: "TokenMerge",
        inputs: vec![("x", floats(&[2, 9, 4])), ("metric", floats(&[2, 9, 6])), ("size", filled(&[2, 9, 1], 1.0))],
        ints: vec![
            ("r", 2),
            ("tokens", 9),
            ("protect", 1),
            ("suffix", 0),
            ("heads", 2),
            ("head_dim", 3),
            ("metric_at", 0),
            ("dtype", 1),
        ],
        results: 5,
    }
}

fn attention<'a>() -> Call<'a> {
    let [q, k, v] = ["q", "k", "v"].map(|name| (name, floats(&[2, 5, 8])));
    Call {
        op: "ProportionalAttention",
        inputs: vec![q, k, v, ("size", filled(&[2, 5, 1], 1.0))],
        ints: vec![("heads", 2), ("head_dim", 4), ("q_at", 0), ("k_at", 0), ("v_at", 0), ("dtype", 1)],
        results: 1,
    }
}

fn score<'a>() -> Call<'a> {
    let [q, k] = ["q", "k"].map(|name| (name, floats(&[2, 5, 8])));
    Call {
        op: "TokenScore",
        inputs: vec![q, k, ("size", filled(&[2, 5, 1], 1.0))],
        ints: vec![("heads", 2), ("head_dim", 4), ("q_at", 0), ("k_at", 0), ("queries", 1)],
        results: 1,
    }
}

fn prune<'a>() -> Call<'a> {
    Call {
        op: "TokenPrune",
        inputs: vec![("x", floats(&[2, 9, 4])), ("score", floats(&[2, 9])), ("size", filled(&[2, 9, 1], 1.0))],
        ints: vec![("keep", 5), ("tokens", 9), ("protect", 1), ("suffix", 1), ("fuse", 1), ("dtype", 1)],
        results: 4,
    }
}

fn prune_dynamic<'a>(keep: Tensor) -> Call<'a> {
    let Call { mut inputs, mut ints, results, .. } = prune();
    inputs.push(("keep", keep));
    ints.retain(|(name, _)| !["keep", "tokens"].contains(name));
    Call { op: "TokenPruneDynamic", inputs, ints, results }
}

fn assign<'a>() -> Call<'a> {
    let anchor = ("anchor", indices(&[1, 3], &[0, 1, 3]));
    let inputs = vec![anchor, ("leaving", indices(&[1, 1], &[2])), ("into", indices(&[1, 1], &[2]))];
    Call { op: "TokenAssign", inputs, ints: vec![], results: 1 }
}

fn restore<'a>() -> Call<'a> {
    let inputs = vec![("y", floats(&[1, 3, 2])), ("assign", indices(&[1, 4], &[0, 1, 2, 2]))];
    Call { op: "TokenRestore", inputs, ints: vec![], results: 1 }
}

fn mean<'a>() -> Call<'a> {
    let assign = indices(&[1, 4], &[0, 1, 2, 2]);
    let inputs = vec![("table", floats(&[4, 2])), ("assign", assign), ("size", filled(&[1, 3, 1], 1.0))];
    Call { op: "TokenMean", inputs, ints: vec![("dtype", 1)], results: 1 }
}

/// Of eight tokens, two of which take no part.
fn similarity<'a>() -> Call<'a> {
    let ints = vec![("protect", 1), ("suffix", 1), ("sign", 1)];
    Call { op: "CosineSimilarity", inputs: vec![("x", floats(&[2, 8, 3]))], ints, results: 1 }
}

fn distance<'a>() -> Call<'a> {
    Call { op: "ManhattanDistance", ..similarity().set("sign", -1) }
}

/// Six tokens in order.
fn in_order() -> Tensor {
    indices(&[2, 6], &[0, 1, 2, 3, 4, 5].repeat(2))
}

fn expand<'a>() -> Call<'a> {
    let inputs = vec![("closeness", floats(&[2, 6, 6])), ("order", in_order())];
    Call { op: "TokenExpand", inputs, ints: vec![("candidates", 6), ("chosen", 2)], results: 1 }
}

fn absorb<'a>() -> Call<'a> {
    let inputs = vec![("x", floats(&[2, 8, 3])), ("closeness", floats(&[2, 6, 6])), ("order", in_order())];
    let ints = vec![("tokens", 8), ("keep", 3), ("protect", 1), ("suffix", 1), ("dtype", 1)];
    Call { op: "TokenAbsorb", inputs, ints, results: 4 }
}

fn softmax<'a>() -> Call<'a> {
    let inputs =
        vec![("scores", floats(&[2, 3, 5, 4])), ("mask", filled(&[2, 5, 4], 1.0)), ("size", filled(&[2, 4, 1], 1.0))];
    Call { op: "MaskedSoftmax", inputs, ints: vec![("dtype", 1)], results: 1 }
}

/// Five tokens, of which three stay, and a slot made from scratch.
fn mask<'a>() -> Call<'a> {
    let anchor = indices(&[1, 4], &[0, 4, 2, -1]);
    let inputs = vec![("weights", floats(&[1, 2, 5, 5])), ("anchor", anchor)];
    let ints = vec![("connections", 1), ("slots", 4), ("protect", 1), ("suffix", 1)];
    Call { op: "ConnectionMask", inputs, ints, results: 1 }
}

fn mask_dynamic<'a>() -> Call<'a> {
    let Call { mut inputs, .. } = mask();
    inputs.push(("connections", indices(&[1], &[1])));
    Call { op: "ConnectionMaskDynamic", inputs, ints: vec![("protect", 1), ("suffix", 1)], results: 1 }
}

fn unit_gradient<'a>() -> Call<'a> {
    let inputs = vec![("x", floats(&[2, 3, 4])), ("dy", floats(&[2, 3, 4]))];
    Call { op: "GeluGrad", inputs, ints: vec![], results: 1 }
}

fn softmax_gradient<'a>() -> Call<'a> {
    let inputs = vec![("y", floats(&[2, 3, 4])), ("dy", floats(&[2, 3, 4]))];
    Call { op: "SoftmaxGrad", inputs, ints: vec![], results: 1 }
}

fn norm_gradient<'a>() -> Call<'a> {
    let inputs = vec![("x", floats(&[2, 3, 4])), ("scale", floats(&[4])), ("dy", floats(&[2, 3, 4]))];
    Call { op: "LayerNormGrad", inputs, ints: vec![("axis", -1)], results: 3 }
}

fn step<'a>() -> Call<'a> {
    let tensors = ["parameter", "gradient", "mean", "variance"].map(|name| (name, floats(&[3, 4])));
    let scalars = ["kept", "rate", "deviation"].map(|name| (name, filled(&[], 1.0)));
    let inputs = tensors.into_iter().chain(scalars).collect();
    Call { op: "AdamW", inputs, ints: vec![], results: 3 }
}

#[test]
fn well_formed_calls_run() {
    let scratch = Scratch::new("calls");
    let dynamic = prune_dynamic(indices(&[1], &[5]));
    let of_tokens = [merge(), attention(), score(), prune(), dynamic, assign(), restore(), mean()];
    let of_training = [unit_gradient(), softmax_gradient(), norm_gradient(), step()];
    let of_expansion = [similarity(), distance(), expand(), absorb()];
    let others = of_expansion.into_iter().chain([softmax(), mask(), mask_dynamic()]).chain(of_training);
    for call in of_tokens.into_iter().chain(others) {
        call.run(&scratch).unwrap_or_else(|reason| panic!("{}: {reason}", call.op));
    }
}

#[test]
fn malformed_calls_are_errors() {
    let scratch = Scratch::new("malformed");
    let half = |shape: &[usize]| Tensor::from_f64(DType::F16, &ArrayD::zeros(IxDyn(shape)));
    let cases: Vec<(&str, Call)> = vec![
        ("a gradient of another shape", unit_gradient().with("dy", floats(&[2, 4, 3]))),
        ("a gradient in float16", unit_gradient().with("dy", half(&[2, 3, 4]))),
        ("weights of another shape", softmax_gradient().with("y", floats(&[3, 2, 4]))),
        ("weights without an axis", softmax_gradient().with("y", filled(&[], 1.0)).with("dy", filled(&[], 1.0))),
        ("a scale of another length", norm_gradient().with("scale", floats(&[3]))),
        ("a scale of two axes", norm_gradient().with("scale", floats(&[1, 4]))),
        ("an axis beyond all bounds", norm_gradient().set("axis", i64::MIN)),
        ("an axis beyond the last", norm_gradient().set("axis", 4)),
        ("moments of another shape", step().with("variance", floats(&[4, 3]))),
        ("a learning rate that is no scalar", step().with("rate", floats(&[1]))),
        ("x of rank 2", merge().with("x", floats(&[9, 4]))),
        ("x of rank 4", merge().with("x", floats(&[2, 9, 2, 2]))),
        ("a metric of other tokens", merge().with("metric", floats(&[2, 8, 6]))),
        ("a metric of another batch", merge().with("metric", floats(&[1, 9, 6]))),
        ("sizes of other tokens", merge().with("size", filled(&[2, 8, 1], 1.0))),
        ("sizes of rank 2", merge().with("size", filled(&[2, 9], 1.0))),
        ("sizes in float16", merge().with("size", half(&[2, 9, 1]))),
        ("integers for tokens", merge().with("x", indices(&[2, 9, 1], &[0; 18]))),
        ("r below zero", merge().set("r", -1)),
        ("r beyond the cap", merge().set("r", 5)),
        ("r beyond all bounds", merge().set("r", i64::MAX)),
        ("other tokens than there are", merge().set("tokens", 11)),
        ("more protected than there are", merge().set("protect", 12)),
        ("protected below zero", merge().set("protect", -3)),
        ("a suffix beyond all bounds", merge().set("suffix", i64::MAX)),
        ("no heads", merge().set("heads", 0)),
        ("heads beyond the metric", merge().set("heads", 3)),
        ("heads beyond all bounds", merge().set("heads", i64::MAX)),
        ("heads of a width that no memory has", merge().set("head_dim", i64::MAX / 1000)),
        ("heads of a width that nothing counts", merge().set("head_dim", i64::MAX)),
        ("outputs left out", Call { results: 1, ..merge() }),
        ("heads behind the metric", merge().set("metric_at", 1)),
        ("heads before the metric", merge().set("metric_at", -1)),
        ("queries of rank 2", attention().with("q", floats(&[5, 8]))),
        ("keys of another batch", attention().with("k", floats(&[1, 5, 8]))),
        ("keys that are more than values", attention().with("k", floats(&[2, 6, 8]))),
        ("keys of float16", attention().with("k", half(&[2, 5, 8]))),
        ("sizes of other keys", attention().with("size", filled(&[2, 4, 1], 1.0))),
        ("heads beyond the channels", attention().set("head_dim", 5)),
        ("channels that no memory has", attention().set("head_dim", i64::MAX / 1000)),
        ("no channels", attention().set("head_dim", 0)),
        ("values behind the channels", attention().set("v_at", 1)),
        ("scored queries of rank 2", score().with("q", floats(&[5, 8]))),
        ("scored keys of another batch", score().with("k", floats(&[1, 5, 8]))),
        ("scored keys of float16", score().with("k", half(&[2, 5, 8]))),
        ("sizes of other scored keys", score().with("size", filled(&[2, 4, 1], 1.0))),
        ("sizes of scored keys of rank 2", score().with("size", filled(&[2, 5], 1.0))),
        ("scores of no query", score().set("queries", 0)),
        ("scores of fewer than no query", score().set("queries", -1)),
        ("scores where there is no query", score().with("q", floats(&[2, 0, 8]))),
        ("scores of no heads", score().set("heads", 0)),
        ("scores of heads beyond the channels", score().set("head_dim", 5)),
        ("scores of heads of a width that nothing counts", score().set("head_dim", i64::MAX)),
        ("scored keys behind the channels", score().set("k_at", 1)),
        ("pruned tokens of rank 2", prune().with("x", floats(&[9, 4]))),
        ("pruned integers", prune().with("x", indices(&[2, 9, 1], &[0; 18]))),
        ("scores of other tokens", prune().with("score", floats(&[2, 8]))),
        ("scores of another batch", prune().with("score", floats(&[1, 9]))),
        ("scores of rank 3", prune().with("score", floats(&[2, 9, 1]))),
        ("scores in float16", prune().with("score", half(&[2, 9]))),
        ("sizes of other pruned tokens", prune().with("size", filled(&[2, 8, 1], 1.0))),
        ("more kept than candidates", prune().set("keep", 8)),
        ("fewer kept than none", prune().set("keep", -1)),
        ("kept beyond all bounds", prune().set("keep", i64::MAX)),
        ("other tokens than are pruned", prune().set("tokens", 10)),
        ("more protected than are pruned", prune().set("protect", 9)),
        ("a suffix below zero", prune().set("suffix", -1)),
        ("a suffix of pruned tokens beyond all bounds", prune().set("suffix", i64::MAX)),
        ("fused twice", prune().set("fuse", 2)),
        ("outputs of pruning left out", Call { results: 2, ..prune() }),
        ("two numbers to keep", prune_dynamic(indices(&[2], &[1, 2]))),
        ("no number to keep", prune_dynamic(indices(&[0], &[]))),
        ("a scalar to keep", prune_dynamic(indices(&[], &[1]))),
        ("all protected twice", prune_dynamic(indices(&[1], &[1])).set("protect", 9)),
        ("an anchor beyond the tokens", assign().with("anchor", indices(&[1, 3], &[0, 1, 9]))),
        ("an anchor before the tokens", assign().with("anchor", indices(&[1, 3], &[0, -1, 3]))),
        ("a leaving token beyond the tokens", assign().with("leaving", indices(&[1, 1], &[i64::MAX]))),
        ("another batch of leaving tokens", assign().with("leaving", indices(&[2, 1], &[2, 2]))),
        ("fewer slots joined than tokens left", assign().with("into", indices(&[1, 0], &[]))),
        ("a slot beyond the slots", restore().with("assign", indices(&[1, 4], &[0, 1, 2, 3]))),
        ("a slot before the slots", restore().with("assign", indices(&[1, 4], &[0, 1, 2, i64::MIN]))),
        ("another batch of slots", restore().with("assign", indices(&[2, 2], &[0; 4]))),
        ("tables of other tokens", mean().with("table", floats(&[5, 2]))),
        ("a table of rank 4", mean().with("table", floats(&[1, 1, 4, 2]))),
        ("a token's slot beyond the slots", mean().with("assign", indices(&[1, 4], &[0, 1, 2, 7]))),
        ("compared tokens of rank 2", similarity().with("x", floats(&[8, 3]))),
        ("compared integers", similarity().with("x", indices(&[2, 8, 1], &[0; 16]))),
        ("more protected than are compared", similarity().set("protect", 8)),
        ("compared tokens protected below zero", similarity().set("protect", -1)),
        ("a suffix of compared tokens beyond all bounds", distance().set("suffix", i64::MAX)),
        ("closeness that is no square", expand().with("closeness", floats(&[2, 6, 5]))),
        ("closeness of rank 2", expand().with("closeness", floats(&[6, 6]))),
        ("closeness in float16", expand().with("closeness", half(&[2, 6, 6]))),
        ("closeness of another batch", expand().with("closeness", floats(&[1, 6, 6]))),
        ("an order of other tokens", expand().with("order", indices(&[2, 5], &[0; 10]))),
        ("an order of a token that is not there", expand().with("order", indices(&[2, 6], &[6; 12]))),
        ("an order of a token before the first", expand().with("order", indices(&[2, 6], &[-1; 12]))),
        ("other candidates than there are", expand().set("candidates", 7)),
        ("candidates below zero", expand().set("candidates", -6)),
        ("none chosen", expand().set("chosen", 0)),
        ("all chosen", expand().set("chosen", 6)),
        ("chosen beyond all bounds", expand().set("chosen", i64::MAX)),
        ("absorbed tokens of rank 2", absorb().with("x", floats(&[8, 3]))),
        ("other tokens than are absorbed", absorb().set("tokens", 9)),
        ("tokens beyond all bounds", absorb().set("tokens", i64::MAX)),
        ("none to absorb others", absorb().set("keep", 0)),
        ("more to absorb others than there are", absorb().set("keep", 7)),
        ("absorbing beyond all bounds", absorb().set("keep", i64::MAX)),
        ("absorbing below zero", absorb().set("keep", -1)),
        ("more protected than are absorbed", absorb().set("protect", 9)),
        ("a suffix of absorbed tokens beyond all bounds", absorb().set("suffix", i64::MAX)),
        ("closeness of other tokens than are absorbed", absorb().with("closeness", floats(&[2, 8, 8]))),
        ("closeness of another batch than is absorbed", absorb().with("closeness", floats(&[1, 6, 6]))),
        ("an order of another batch than is absorbed", absorb().with("order", indices(&[1, 6], &[0; 6]))),
        ("absorbed by a token that is not there", absorb().with("order", indices(&[2, 6], &[i64::MAX; 12]))),
        ("outputs of absorbing left out", Call { results: 3, ..absorb() }),
        ("scores of rank 3", softmax().with("scores", floats(&[2, 5, 4]))),
        ("a mask of other queries", softmax().with("mask", filled(&[2, 6, 4], 1.0))),
        ("a mask of other keys", softmax().with("mask", filled(&[2, 5, 3], 1.0))),
        ("a mask of one image for two", softmax().with("mask", filled(&[1, 5, 4], 1.0))),
        ("a mask of heads", softmax().with("mask", filled(&[2, 3, 5, 4], 1.0))),
        ("a mask of integers", softmax().with("mask", indices(&[2, 5, 4], &[1; 40]))),
        ("sizes of queries", softmax().with("size", filled(&[2, 5, 1], 1.0))),
        ("integers for scores", softmax().with("scores", indices(&[2, 3, 5, 4], &[1; 120]))),
        ("weights of other keys than queries", mask().with("weights", floats(&[1, 2, 5, 4]))),
        ("weights of rank 3", mask().with("weights", floats(&[1, 5, 5]))),
        ("weights of no heads", mask().with("weights", floats(&[1, 0, 5, 5]))),
        ("weights of another batch", mask().with("weights", floats(&[2, 2, 5, 5]))),
        ("other slots than there are", mask().set("slots", 5)),
        ("slots below zero", mask().set("slots", -4)),
        ("connections below zero", mask().set("connections", -1)),
        ("more slots that keep all than there are", mask().set("protect", 4)),
        ("slots that keep all beyond all bounds", mask().set("suffix", i64::MAX)),
        ("slots that keep all below zero", mask().set("protect", -1)),
        ("a free slot made from scratch", mask().set("suffix", 0)),
        ("a free anchor beyond the tokens", mask().with("anchor", indices(&[1, 4], &[0, 4, 5, -1]))),
        ("a free anchor beyond all bounds", mask().with("anchor", indices(&[1, 4], &[0, i64::MIN, 2, -1]))),
        ("a free anchor before the tokens", mask_dynamic().with("anchor", indices(&[1, 4], &[0, -2, 2, -1]))),
        ("two counts of connections", mask_dynamic().with("connections", indices(&[2], &[1, 1]))),
        ("a scalar for connections", mask_dynamic().with("connections", indices(&[], &[1]))),
    ];
    let passed: Vec<&str> =
        cases.iter().filter(|(_, call)| call.run(&scratch).is_ok()).map(|&(what, _)| what).collect();
    assert!(passed.is_empty(), "these are no errors: {passed:?}");
}

#[test]
fn extremes_have_the_defined_result() {
    let scratch = Scratch::new("extremes");
    let shapes = |call: Call| -> Vec<Vec<usize>> {
        let outputs = call.run(&scratch).unwrap_or_else(|reason| panic!("{}: {reason}", call.op));
        outputs.iter().map(|(_, tensor)| tensor.shape().to_vec()).collect()
    };
    let sized = |batch, tokens| {
        merge()
            .with("x", floats(&[batch, tokens, 4]))
            .with("metric", floats(&[batch, tokens, 6]))
            .with("size", filled(&[batch, tokens, 1], 1.0))
            .set("tokens", tokens as i64)
    };
    // One token, and none to merge.
    let one = sized(2, 1).set("r", 0).set("protect", 0);
    assert_eq!(shapes(one), [vec![2, 1, 4], vec![2, 1, 1], vec![2, 1], vec![2, 0], vec![2, 0]]);
    // No images.
    assert_eq!(shapes(sized(0, 9)), [vec![0, 7, 4], vec![0, 7, 1], vec![0, 7], vec![0, 2], vec![0, 2]]);
    // Channels of none.
    assert_eq!(shapes(merge().with("x", floats(&[2, 9, 0])))[0], [2, 7, 0]);
    let none = ["q", "k", "v"].into_iter().fold(attention(), |call, name| call.with(name, floats(&[0, 5, 8])));
    assert_eq!(shapes(none.with("size", filled(&[0, 5, 1], 1.0))), [[0, 5, 8]]);
    assert_eq!(shapes(attention().with("q", floats(&[2, 0, 8]))), [[2, 0, 8]]);
    // Scores of no images, heads, queries, keys.
    for [batch, heads, queries, keys] in [[0, 3, 5, 4], [2, 0, 5, 4], [2, 3, 0, 4], [2, 3, 5, 0]] {
        let call = softmax()
            .with("scores", floats(&[batch, heads, queries, keys]))
            .with("mask", filled(&[batch, queries, keys], 1.0))
            .with("size", filled(&[batch, keys, 1], 1.0));
        assert_eq!(shapes(call), [[batch, heads, queries, keys]]);
    }
    // Masks of no images and of no slots.
    let none = mask().with("weights", floats(&[0, 2, 5, 5])).with("anchor", indices(&[0, 4], &[]));
    assert_eq!(shapes(none), [[0, 4, 4]]);
    let none = mask_dynamic().with("anchor", indices(&[1, 0], &[])).set("protect", 0).set("suffix", 0);
    assert_eq!(shapes(none), [[1, 0, 0]]);
    // All connections stay where none is compared, or more are asked for than there are; of none, the strongest does.
    let open = |call: Call| -> f64 {
        let outputs = call.run(&scratch).unwrap_or_else(|reason| panic!("{}: {reason}", call.op));
        outputs.get("y0").expect("a mask").to_f64().sum()
    };
    assert_eq!(open(mask().set("protect", 3)), 16.0);
    assert_eq!(open(mask().set("connections", i64::MAX)), 16.0);
    assert_eq!(open(mask().set("connections", 0)), 14.0);
    for (connections, count) in [(i64::MIN, 14.0), (0, 14.0), (1, 14.0), (2, 16.0), (i64::MAX, 16.0)] {
        assert_eq!(open(mask_dynamic().with("connections", indices(&[1], &[connections]))), count, "{connections}");
    }
}

#[test]
fn extreme_prunings_have_the_defined_result() {
    let scratch = Scratch::new("extreme_prunings");
    let shapes = |call: Call| -> Vec<Vec<usize>> {
        let outputs = call.run(&scratch).unwrap_or_else(|reason| panic!("{}: {reason}", call.op));
        outputs.iter().map(|(_, tensor)| tensor.shape().to_vec()).collect()
    };
    let of = |batch, slots, channels, tokens| {
        [vec![batch, slots, channels], vec![batch, slots, 1], vec![batch, slots], vec![batch, tokens]]
    };
    assert_eq!(shapes(prune()), of(2, 8, 4, 9));
    assert_eq!(shapes(prune().set("keep", 7)), of(2, 9, 4, 9));
    assert_eq!(shapes(prune().set("keep", 0)), of(2, 3, 4, 9));
    // Nothing is kept of all tokens.
    let none = || prune().set("keep", 0).set("protect", 0).set("suffix", 0);
    assert_eq!(shapes(none()), of(2, 1, 4, 9));
    assert_eq!(shapes(none().set("fuse", 0)), of(2, 0, 4, 9));
    for (keep, slots) in [(i64::MIN, 3), (-1, 3), (0, 3), (6, 9), (7, 9), (i64::MAX, 9)] {
        assert_eq!(shapes(prune_dynamic(indices(&[1], &[keep]))), of(2, slots, 4, 9), "{keep}");
    }
    // No images; channels of none; no tokens.
    let sized = |batch, tokens, channels| {
        prune()
            .with("x", floats(&[batch, tokens, channels]))
            .with("score", floats(&[batch, tokens]))
            .with("size", filled(&[batch, tokens, 1], 1.0))
            .set("tokens", tokens as i64)
    };
    assert_eq!(shapes(sized(0, 9, 4)), of(0, 8, 4, 9));
    assert_eq!(shapes(sized(2, 9, 0)), of(2, 8, 0, 9));
    let empty = ["keep", "protect", "suffix"].into_iter().fold(sized(2, 0, 4), |call, name| call.set(name, 0));
    assert_eq!(shapes(empty), of(2, 0, 4, 0));
    // No images to score; keys of none; more queries than there are.
    let none = score().with("q", floats(&[0, 5, 8])).with("k", floats(&[0, 5, 8]));
    assert_eq!(shapes(none.with("size", filled(&[0, 5, 1], 1.0))), [[0, 5]]);
    assert_eq!(shapes(score().with("k", floats(&[2, 0, 8])).with("size", filled(&[2, 0, 1], 1.0))), [[2, 0]]);
    assert_eq!(shapes(score().set("queries", i64::MAX)), [[2, 5]]);
}

#[test]
fn extreme_expansions_have_the_defined_result() {
    let scratch = Scratch::new("extreme_expansions");
    let shapes = |call: Call| -> Vec<Vec<usize>> {
        let outputs = call.run(&scratch).unwrap_or_else(|reason| panic!("{}: {reason}", call.op));
        outputs.iter().map(|(_, tensor)| tensor.shape().to_vec()).collect()
    };
    // No images; channels of none; nobody to compare.
    for call in [similarity, distance] {
        assert_eq!(shapes(call().with("x", floats(&[0, 8, 3]))), [[0, 6, 6]]);
        assert_eq!(shapes(call().with("x", floats(&[2, 8, 0]))), [[2, 6, 6]]);
        assert_eq!(shapes(call().set("protect", 7)), [[2, 0, 0]]);
    }
    let none = expand().with("closeness", floats(&[0, 6, 6])).with("order", indices(&[0, 6], &[]));
    assert_eq!(shapes(none), [[0, 6]]);
    assert_eq!(shapes(expand().set("chosen", 5)), [[2, 6]]);
    let of = |batch, slots, channels| {
        [vec![batch, slots, channels], vec![batch, slots, 1], vec![batch, slots], vec![batch, 8]]
    };
    assert_eq!(shapes(absorb()), of(2, 5, 3));
    assert_eq!(shapes(absorb().set("keep", 1)), of(2, 3, 3));
    assert_eq!(shapes(absorb().set("keep", 6)), of(2, 8, 3));
    assert_eq!(shapes(absorb().with("x", floats(&[2, 8, 0]))), of(2, 5, 0));
    let none = absorb().with("x", floats(&[0, 8, 3])).with("closeness", floats(&[0, 6, 6]));
    assert_eq!(shapes(none.with("order", indices(&[0, 6], &[]))), of(0, 5, 3));
    // Whatever is close to what, every token has a slot, and an order that names a token twice leaves one empty.
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        expand().with("closeness", filled(&[2, 6, 6], value)).run(&scratch).expect("it runs");
        similarity().with("x", filled(&[2, 8, 3], value)).run(&scratch).expect("it runs");
        let outputs = absorb().with("closeness", filled(&[2, 6, 6], value)).run(&scratch).expect("it runs");
        let assign = common::integers(outputs.get("y3").expect("an output"));
        assert!(assign.iter().all(|slot| (0..5).contains(slot)), "{value}: {assign}");
    }
    let outputs = absorb().with("order", indices(&[2, 6], &[4; 12])).run(&scratch).expect("it runs");
    let size = outputs.get("y1").expect("an output").to_f64();
    assert_eq!(size.iter().copied().collect::<Vec<f64>>(), [1.0, 6.0, 0.0, 0.0, 1.0].repeat(2));
}

/// What is not finite spreads as arithmetic has it, and no token is lost over it.
#[test]
fn what_is_not_finite_loses_no_token() {
    let scratch = Scratch::new("not_finite");
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e38] {
        let outputs = merge().with("metric", filled(&[2, 9, 6], value)).run(&scratch).expect("it runs");
        let get = |name: &str| common::integers(outputs.get(name).expect("an output"));
        for image in 0..2 {
            let mut tokens: Vec<i64> = (0..7).map(|slot| get("y2")[[image, slot]]).collect();
            tokens.extend((0..2).map(|at| get("y3")[[image, at]]));
            tokens.sort_unstable();
            assert_eq!(tokens, (0..9).collect::<Vec<i64>>(), "{value}");
        }
        assert!(outputs.get("y0").expect("tokens").to_f64().iter().all(|x| x.is_finite()), "{value}");
        let outputs = prune().with("score", filled(&[2, 9], value)).run(&scratch).expect("it runs");
        // All are equal: the first are kept.
        let anchor = common::integers(outputs.get("y2").expect("an output"));
        assert!(anchor.outer_iter().all(|anchor| anchor.iter().eq(&[0, 1, 2, 3, 4, 5, -1, 8])), "{value}");
        score().with("k", filled(&[2, 5, 8], value)).run(&scratch).expect("it runs");
        attention().with("q", filled(&[2, 5, 8], value)).run(&scratch).expect("it runs");
        attention().with("v", filled(&[2, 5, 8], value)).run(&scratch).expect("it runs");
        attention().with("size", filled(&[2, 5, 1], value)).run(&scratch).expect("it runs");
    }
}

//! Tests of the rules: what one operator makes of tokens that come in through one of its operands.

use crate::axes::{Axes, Axis, Effect, Layout, Source, Span};
use crate::{Attribute, DataType, DimSpec, Expr, GraphBuilder, OpType, Shapes, TensorType};

use DataType::{F32, I8, U8};

/// An operand by its type and extents.
type Operand<'a> = (DataType, &'a [i64]);

/// A scale and a zero point for all of a tensor.
const ONE: [Operand<'_>; 2] = [(F32, &[]), (U8, &[])];

/// The operator's first result, and its effects; or why the tokens are pinned there. They come in through operand
/// `tokens`, along its axis `axis`; the first axis is the batch.
fn outcome(
    op: OpType,
    operands: &[Operand<'_>],
    tokens: usize,
    axis: usize,
    attributes: &[(&str, Attribute)],
) -> String {
    let mut graph = GraphBuilder::new();
    let declared = |&(dtype, dims): &Operand<'_>| TensorType {
        dtype,
        dims: Some(dims.iter().map(|&n| DimSpec::Known(n)).collect()),
    };
    let inputs: Vec<_> = operands.iter().map(|operand| graph.input("x", Some(&declared(operand)))).collect();
    let operand = inputs[tokens];
    let result = graph.call(op, "y", inputs.into_iter().map(Some).collect(), attributes, 1)[0];
    graph.output("y", result, None);
    let model = graph.into_model(8, &[("", 17), ("com.microsoft", 1)], Vec::new());
    let extents: Vec<Expr> = operands[tokens].1.iter().map(|&n| Expr::known(n)).collect();
    let mut layout: Vec<Axis> = extents.iter().map(Axis::plain).collect();
    layout[axis] = Axis::tokens(Span::ALL);
    let source =
        Source { value: operand, layout: Layout(layout), tokens: extents[axis].clone(), batch: extents[0].clone() };
    let axes = Axes::follow(model.graph(), &Shapes::infer(&model), source, 17);
    if let Some((_, reason)) = axes.pins().next() {
        return reason.into();
    }
    let layout = axes.layout(result).map(Layout::to_string).unwrap_or_default();
    axes.effects().iter().fold(layout, |text, (_, effect)| match effect {
        Effect::Attend => text + " attends",
        Effect::Pool { mean: true, .. } => text + "mean",
        other => format!("{text} {other:?}"),
    })
}

fn contrib(op: &str, operands: &[Operand<'_>], attributes: &[(&str, Attribute)]) -> String {
    outcome(OpType::of("com.microsoft", op), operands, 0, 1, attributes)
}

fn standard(op: &str, operands: &[Operand<'_>], attributes: &[(&str, Attribute)]) -> String {
    outcome(OpType::standard(op), operands, 0, 1, attributes)
}

const TOKENS: Operand<'_> = (U8, &[2, 65, 48]);
const FLOATS: Operand<'_> = (F32, &[2, 65, 48]);
const WEIGHTS: Operand<'_> = (I8, &[48, 96]);

#[test]
fn products_of_integers() {
    let per_column = [WEIGHTS, (F32, &[96]), (I8, &[96])];
    let operands = [&[TOKENS], &ONE[..], &per_column, &ONE].concat();
    assert_eq!(standard("QLinearMatMul", &operands, &[]), "[2, T, 96]");
    let per_row = [&[TOKENS, (F32, &[65]), (U8, &[65])], &per_column[..], &ONE].concat();
    assert_eq!(standard("QLinearMatMul", &per_row, &[]), "its tokens are quantised with several scales");
    assert_eq!(standard("MatMulInteger", &[TOKENS, WEIGHTS, ONE[1], (I8, &[96])], &[]), "[2, T, 96]");
    let scales = [TOKENS, WEIGHTS, ONE[0], (F32, &[96]), ONE[1], (I8, &[96]), (F32, &[96])];
    assert_eq!(contrib("MatMulIntegerToFloat", &scales, &[]), "[2, T, 96]");
    let dynamic = [FLOATS, WEIGHTS, (F32, &[96]), (I8, &[96]), (F32, &[96])];
    assert_eq!(contrib("DynamicQuantizeMatMul", &dynamic, &[]), "[2, T, 96]");
    let biased = [FLOATS, WEIGHTS, ONE[0], (I8, &[]), (F32, &[65, 96])];
    assert_eq!(contrib("DynamicQuantizeMatMul", &biased, &[]), "its bias has an entry for each token");
    let bits = [("K", Attribute::Int(48)), ("N", Attribute::Int(96))];
    assert_eq!(contrib("MatMulNBits", &[FLOATS, (U8, &[96, 2, 16]), (F32, &[192])], &bits), "[2, T, 96]");
}

#[test]
fn matrices_that_lie_otherwise_in_memory() {
    let weights: Operand<'_> = (F32, &[48, 96]);
    let first = |attributes: &[(&str, Attribute)]| {
        outcome(OpType::of("com.microsoft", "FusedMatMul"), &[(F32, &[65, 2, 48]), weights], 0, 0, attributes)
    };
    assert_eq!(first(&[("transBatchA", Attribute::Int(1))]), "[2, T, 96]");
    let turned = [("transA", Attribute::Int(1))];
    assert_eq!(
        contrib("FusedMatMul", &[FLOATS, (F32, &[65, 96])], &turned),
        "it multiplies the token axis with a matrix of fixed size"
    );
}

#[test]
fn quantised_elements() {
    let sum = [&[TOKENS], &ONE[..], &[(U8, &[48])], &ONE, &ONE].concat();
    assert_eq!(contrib("QLinearAdd", &sum, &[]), "[2, T, 48]");
    let table = [&[TOKENS], &ONE[..], &[(U8, &[1, 65, 48])], &ONE, &ONE].concat();
    assert!(contrib("QLinearMul", &table, &[]).starts_with("[2, T, 48] Table { slot: 3"));
    assert_eq!(contrib("QLinearSigmoid", &[&[TOKENS], &ONE[..], &ONE].concat(), &[]), "[2, T, 48]");
    let axis = [("axis", Attribute::Int(1))];
    let class = [&ONE[..], &[(U8, &[2, 1, 48])], &ONE, &[TOKENS], &ONE].concat();
    let joined = outcome(OpType::of("com.microsoft", "QLinearConcat"), &class, 5, 1, &axis);
    assert_eq!(joined, "[2, T[-1..0], 48]");
    let per_token = [TOKENS, (F32, &[65]), (U8, &[65])];
    assert_eq!(standard("DequantizeLinear", &per_token, &axis), "it is quantised with a scale for each token");
    assert_eq!(
        standard("DequantizeLinear", &per_token[..1].iter().chain(&ONE).copied().collect::<Vec<_>>(), &axis),
        "[2, T, 48]"
    );
    assert_eq!(contrib("BiasSplitGelu", &[FLOATS, (F32, &[48])], &[]), "[2, T, 24]");
}

#[test]
fn quantised_softmaxes_and_means() {
    let operands = [&[TOKENS], &ONE[..], &ONE].concat();
    let softmax = |opset: i64| {
        contrib("QLinearSoftmax", &operands, &[("axis", Attribute::Int(1)), ("opset", Attribute::Int(opset))])
    };
    assert_eq!(softmax(13), "[2, T̂, 48] attends");
    // Up to version 12 everything from the axis on was one.
    assert_eq!(softmax(12), "it normalises over tokens and more, or over part of them");
    let over = [("axes", Attribute::Ints(vec![1])), ("keepdims", Attribute::Int(0))];
    assert_eq!(contrib("QLinearReduceMean", &operands, &over), "mean");
    let last = [("channels_last", Attribute::Int(1))];
    assert_eq!(contrib("QLinearGlobalAveragePool", &operands, &last), "mean");
    let scores: Operand<'_> = (F32, &[2, 1, 65]);
    let biased = |bias: Operand<'_>| {
        outcome(OpType::of("com.microsoft", "BiasSoftmax"), &[scores, bias], 0, 2, &[("axis", Attribute::Int(2))])
    };
    assert_eq!(biased((F32, &[2, 1, 1])), "[2, 1, T̂] attends");
    assert!(biased((F32, &[2, 1, 65])).contains("Table { slot: 1"));
}

#[test]
fn convolutions_and_norms() {
    let channels_first: Operand<'_> = (U8, &[2, 48, 65]);
    let one = [("kernel_shape", Attribute::Ints(vec![1]))];
    let conv = |op: &str, operands: &[Operand<'_>]| outcome(OpType::standard(op), operands, 0, 2, &one);
    let kernel: Operand<'_> = (I8, &[96, 48, 1]);
    assert_eq!(conv("ConvInteger", &[channels_first, kernel, ONE[1], (I8, &[])]), "[2, 96, T]");
    let quantised = [&[channels_first], &ONE[..], &[kernel, (F32, &[96]), (I8, &[96])], &ONE].concat();
    assert_eq!(conv("QLinearConv", &quantised), "[2, 96, T]");
    let wide: Operand<'_> = (I8, &[96, 48, 3]);
    assert_eq!(conv("ConvInteger", &[channels_first, wide]), "it convolves neighbouring tokens");
    assert_eq!(contrib("GroupNorm", &[FLOATS, (F32, &[48]), (F32, &[48])], &[]), "it normalises over the tokens");
}

//! Tests of the rules: what one operator takes of its operands to give 3 of the 65 positions along an axis of its result.

use vitrim_ir::{Attribute, DataType, DimSpec, Expr, GraphBuilder, Model, OpType, Shapes, Tensor, TensorType};
use vitrim_ops::{Attention, DEFS, DOMAIN, OpDef, ProportionalAttention, TokenMerge, TokenRestore};

use super::part::{Factor, Part};
use super::rules::Rules;

use DataType::{F32, I8, U8};

/// What a node reads.
enum Operand<'a> {
    /// A tensor of these extents; the extent 0 is that of the batch, which is known at run time.
    Of(DataType, &'a [i64]),
    /// A list of integers, which is known.
    Ints(&'a [i64]),
    /// Left out.
    Nothing,
}

use Operand::{Ints, Nothing, Of};

const BATCH: i64 = 0;
const X: Operand<'static> = Of(F32, &[BATCH, 65, 48]);
const ROW: Operand<'static> = Of(F32, &[48]);
const ONE: Operand<'static> = Of(F32, &[]);
const ZERO: Operand<'static> = Of(U8, &[]);

fn model(op: OpType, operands: &[Operand<'_>], attributes: &[(&str, Attribute)], results: usize) -> Model {
    let mut graph = GraphBuilder::new();
    let dim = |&n: &i64| if n == BATCH { DimSpec::Named("batch".into()) } else { DimSpec::Known(n) };
    let inputs = operands.iter().map(|operand| match operand {
        Of(dtype, dims) => {
            Some(graph.input("x", Some(&TensorType { dtype: *dtype, dims: Some(dims.iter().map(dim).collect()) })))
        }
        Ints(values) => Some(graph.initializer("ints", Tensor::shape(values))),
        Nothing => None,
    });
    let inputs = inputs.collect();
    for (slot, value) in graph.call(op, "y", inputs, attributes, results).into_iter().enumerate() {
        graph.output(&format!("y{slot}"), value, None);
    }
    let functions = DEFS.iter().map(|def| def.function(17)).collect();
    graph.into_model(8, &[("", 17), ("com.microsoft", 1), (DOMAIN, 1)], functions)
}

/// Slots and axes of the parts, and the shape to state; `all` where it needs its operands as they are. The results have
/// the positions on `axis`.
fn needs_of(
    op: OpType,
    operands: &[Operand<'_>],
    axis: usize,
    attributes: &[(&str, Attribute)],
    results: usize,
) -> String {
    let model = model(op, operands, attributes, results);
    let (graph, shapes) = (model.graph(), Shapes::infer(&model));
    let rules = Rules { graph, shapes: &shapes };
    let (_, node) = graph.nodes().next().unwrap();
    let extent = |slot: usize| &rules.dims(node.output(slot).unwrap()).expect("a rule for the shape")[axis];
    let factor = match (extent(0).as_known(), extent(0).div_exact(&Expr::known(65))) {
        (None, Some(outer)) => Factor { axis, outer, extent: Expr::known(65), inner: Expr::known(1) },
        _ => Factor::whole(axis, extent(0)),
    };
    let part = Part { factor, start: 1, end: 4 };
    let results: Vec<(usize, Part)> = (0..results).map(|slot| (slot, part.clone())).collect();
    let Some((needs, computed)) = rules.needs(node, &results) else { return "all".into() };
    assert_eq!(computed, part);
    let one = |(slot, part): &(usize, Part)| {
        assert_eq!((part.start, part.end), (1, 4));
        format!("{slot}:{}{}", part.factor.axis, if part.factor.is_axis() { "" } else { "*" })
    };
    let parts: Vec<String> = needs.parts.iter().map(one).collect();
    needs.target.iter().fold(parts.join(" "), |text, target| format!("{text} {target:?}"))
}

fn needs(op: &str, operands: &[Operand<'_>], axis: usize, attributes: &[(&str, Attribute)]) -> String {
    needs_of(OpType::standard(op), operands, axis, attributes, 1)
}

fn contrib(op: &str, operands: &[Operand<'_>], axis: usize, attributes: &[(&str, Attribute)]) -> String {
    needs_of(OpType::of("com.microsoft", op), operands, axis, attributes, 1)
}

fn int(name: &'static str, value: i64) -> (&'static str, Attribute) {
    (name, Attribute::Int(value))
}

fn ints(name: &'static str, values: &[i64]) -> (&'static str, Attribute) {
    (name, Attribute::Ints(values.to_vec()))
}

#[test]
fn what_is_combined_entry_by_entry_is_cut_where_it_has_entries() {
    for op in ["Erf", "Tanh", "Sigmoid", "Cast", "Identity", "Relu", "Sqrt", "Not"] {
        assert_eq!(needs(op, &[X], 1, &[]), "0:1", "{op}");
    }
    assert_eq!(needs("Add", &[X, X], 1, &[]), "0:1 1:1");
    assert_eq!(needs("Add", &[X, ROW], 1, &[]), "0:1");
    assert_eq!(needs("Add", &[ROW, X], 1, &[]), "1:1");
    // A table with a row for each token, and one with a row for all.
    assert_eq!(needs("Mul", &[X, Of(F32, &[65, 48])], 1, &[]), "0:1 1:0");
    assert_eq!(needs("Mul", &[X, Of(F32, &[1, 1, 48])], 1, &[]), "0:1");
    assert_eq!(needs("Where", &[Of(DataType::Bool, &[65, 1]), X, ONE], 1, &[]), "0:0 1:1");
    assert_eq!(needs("Clip", &[X, ONE, ONE], 1, &[]), "0:1");
    assert_eq!(contrib("BiasGelu", &[X, ROW], 1, &[]), "0:1");
    let (tokens, row) = (Of(U8, &[BATCH, 65, 48]), Of(U8, &[48]));
    assert_eq!(contrib("QLinearAdd", &[tokens, ONE, ZERO, row, ONE, ZERO, ONE, ZERO], 1, &[]), "0:1");
}

#[test]
fn products_take_rows_of_the_left_and_columns_of_the_right() {
    let matrix = || Of(F32, &[48, 96]);
    assert_eq!(needs("MatMul", &[X, matrix()], 1, &[]), "0:1");
    assert_eq!(needs("MatMul", &[Of(F32, &[BATCH, 3, 65, 16]), Of(F32, &[BATCH, 3, 16, 65])], 2, &[]), "0:2");
    assert_eq!(needs("MatMul", &[Of(F32, &[BATCH, 3, 65, 16]), Of(F32, &[BATCH, 3, 16, 65])], 3, &[]), "1:3");
    // Matrices of tokens.
    assert_eq!(needs("MatMul", &[Of(F32, &[65, 4, 16]), Of(F32, &[65, 16, 4])], 0, &[]), "0:0 1:0");
    assert_eq!(needs("MatMul", &[Of(F32, &[65, 4, 16]), Of(F32, &[16, 4])], 0, &[]), "0:0");
    assert_eq!(needs("MatMul", &[Of(F32, &[16]), Of(F32, &[65, 16, 4])], 0, &[]), "all");
    let rows = || Of(F32, &[65, 48]);
    assert_eq!(needs("Gemm", &[rows(), matrix(), Of(F32, &[96])], 0, &[]), "0:0");
    assert_eq!(needs("Gemm", &[rows(), matrix(), Of(F32, &[65, 1])], 0, &[]), "0:0 2:0");
    assert_eq!(needs("Gemm", &[Of(F32, &[48, 65]), matrix()], 0, &[int("transA", 1)]), "0:1");
    assert_eq!(needs("Gemm", &[Of(F32, &[96, 48]), rows()], 1, &[int("transB", 1)]), "1:0");
    assert_eq!(contrib("FusedMatMul", &[X, X], 1, &[int("transB", 1)]), "0:1");
    assert_eq!(contrib("FusedMatMul", &[X, X], 1, &[int("transBatchA", 1)]), "all");
    let equation = |text: &str| [("equation", Attribute::String(text.to_owned().into()))];
    assert_eq!(needs("Einsum", &[X, matrix()], 1, &equation("bnc,cd->bnd")), "0:1");
    assert_eq!(needs("Einsum", &[X, X], 2, &equation("bnc, bmc -> bnm")), "1:1");
    assert_eq!(needs("Einsum", &[X, matrix()], 1, &equation("...c,cd->...d")), "all");
}

#[test]
fn integers_of_a_part_stand_for_the_same_numbers() {
    let x = || Of(U8, &[BATCH, 65, 48]);
    let weights = || Of(I8, &[48, 96]);
    let many = || Of(F32, &[96]);
    let rows = || Of(F32, &[65]);
    assert_eq!(needs("QuantizeLinear", &[X, ONE, ZERO], 1, &[]), "0:1");
    assert_eq!(needs("DequantizeLinear", &[x(), ROW, Of(U8, &[48])], 1, &[int("axis", 2)]), "0:1");
    assert_eq!(needs("DequantizeLinear", &[x(), rows(), Of(U8, &[65])], 1, &[int("axis", 1)]), "all");
    assert_eq!(needs("MatMulInteger", &[x(), weights(), ZERO, Of(I8, &[96])], 1, &[]), "0:1");
    let by = |scale: Operand<'static>| [x(), scale, ZERO, weights(), many(), Of(I8, &[96]), ONE, ZERO];
    assert_eq!(needs("QLinearMatMul", &by(ONE), 1, &[]), "0:1");
    assert_eq!(needs("QLinearMatMul", &by(rows()), 1, &[]), "all");
    // Their scale is found among all tokens.
    assert_eq!(needs_of(OpType::standard("DynamicQuantizeLinear"), &[X], 1, &[], 1), "all");
    assert_eq!(contrib("DynamicQuantizeMatMul", &[X, weights(), many()], 1, &[]), "all");
}

#[test]
fn axes_that_move_are_followed() {
    assert_eq!(needs("Transpose", &[X], 2, &[ints("perm", &[0, 2, 1])]), "0:1");
    assert_eq!(needs("Transpose", &[X], 1, &[]), "0:1");
    assert_eq!(needs("Unsqueeze", &[X, Ints(&[1])], 2, &[]), "0:1");
    assert_eq!(needs("Squeeze", &[Of(F32, &[BATCH, 1, 65, 48]), Ints(&[1])], 1, &[]), "0:2");
    assert_eq!(needs("Squeeze", &[Of(F32, &[2, 1, 65, 48])], 1, &[]), "all");
    assert_eq!(needs("Reshape", &[X, Ints(&[0, 0, 3, 16])], 1, &[]), "0:1 [-1, 3, 3, 16]");
    assert_eq!(needs("Reshape", &[X, Ints(&[-1, 48])], 0, &[]), "0:1 [-1, 48]");
    assert_eq!(needs("Flatten", &[Of(F32, &[BATCH, 65, 48])], 0, &[int("axis", 2)]), "0:1");
    assert_eq!(needs("Gather", &[Of(F32, &[3, BATCH, 65, 48]), Ints(&[1, 2])], 2, &[]), "0:2");
    assert_eq!(needs("Gather", &[Of(F32, &[BATCH, 65, 3, 16]), Ints(&[1])], 1, &[int("axis", 2)]), "0:1");
    // A table of entries for pairs of tokens.
    let pairs = Of(DataType::I64, &[65, 65]);
    assert_eq!(needs("Gather", &[Of(F32, &[127, 3]), pairs], 0, &[]), "1:0");
    assert_eq!(needs("Slice", &[X, Ints(&[0]), Ints(&[24]), Ints(&[2])], 1, &[]), "0:1");
    assert_eq!(needs("Slice", &[X, Ints(&[0]), Ints(&[24]), Ints(&[1])], 1, &[]), "all");
    assert_eq!(needs("Concat", &[X, X], 1, &[int("axis", 2)]), "0:1 1:1");
    assert_eq!(needs("Concat", &[X, X], 1, &[int("axis", 1)]), "all");
    assert_eq!(needs_of(OpType::standard("Split"), &[X], 1, &[int("axis", 2)], 2), "0:1");
    assert_eq!(needs_of(OpType::standard("Split"), &[X, Ints(&[32, 33])], 1, &[int("axis", 1)], 2), "all");
    assert_eq!(needs("Pad", &[X, Ints(&[0, 0, 0, 0, 0, 1])], 1, &[]), "0:1");
    assert_eq!(needs("Pad", &[X, Ints(&[0, 0, 0, 0, 1, 0])], 1, &[]), "all");
    assert_eq!(needs("Expand", &[Of(F32, &[65, 1]), Ints(&[2, 65, 48])], 1, &[]), "0:0 [2, 1, 48]");
    assert_eq!(needs("Expand", &[Of(F32, &[1, 48]), Ints(&[2, 65, 48])], 1, &[]), "all");
}

#[test]
fn norms_and_reductions_over_other_axes_are_no_obstacle() {
    for op in ["Softmax", "LogSoftmax"] {
        assert_eq!(needs(op, &[X], 1, &[int("axis", -1)]), "0:1", "{op}");
        assert_eq!(needs(op, &[X], 1, &[int("axis", 1)]), "all", "{op}");
    }
    let quantised = || [Of(U8, &[BATCH, 65, 48]), ONE, ZERO, ONE, ZERO];
    assert_eq!(contrib("QLinearSoftmax", &quantised(), 1, &[int("axis", 2), int("opset", 12)]), "0:1");
    assert_eq!(contrib("QLinearSoftmax", &quantised(), 1, &[int("axis", 0), int("opset", 12)]), "all");
    assert_eq!(contrib("QLinearSoftmax", &quantised(), 1, &[int("axis", 0), int("opset", 13)]), "0:1");
    assert_eq!(needs("LayerNormalization", &[X, ROW, ROW], 1, &[]), "0:1");
    assert_eq!(needs("LayerNormalization", &[X, Of(F32, &[65, 48])], 1, &[int("axis", 1)]), "all");
    assert_eq!(needs("LpNormalization", &[X], 1, &[]), "0:1");
    assert_eq!(needs("BatchNormalization", &[Of(F32, &[BATCH, 48, 65]), ROW, ROW, ROW, ROW], 2, &[]), "0:2");
    assert_eq!(needs("BatchNormalization", &[X, ROW, ROW, ROW, ROW], 1, &[]), "all");
    assert_eq!(needs("InstanceNormalization", &[Of(F32, &[BATCH, 48, 65]), ROW, ROW], 2, &[]), "all");
    assert_eq!(needs("GlobalAveragePool", &[X], 1, &[]), "0:1");
    assert_eq!(needs("ReduceMean", &[X], 1, &[ints("axes", &[-1])]), "0:1");
    assert_eq!(needs("ReduceSum", &[Of(F32, &[BATCH, 3, 65, 48]), Ints(&[1])], 1, &[int("keepdims", 0)]), "0:2");
    assert_eq!(needs("ReduceMean", &[X], 1, &[]), "all");
    assert_eq!(needs("ArgMax", &[X], 1, &[int("axis", 2), int("keepdims", 0)]), "0:1");
    let kernel =
        |width| [Of(F32, &[BATCH, 48, 65]), if width == 1 { Of(F32, &[96, 48, 1]) } else { Of(F32, &[96, 48, 3]) }];
    assert_eq!(needs("Conv", &kernel(1), 2, &[]), "0:2");
    assert_eq!(needs("Conv", &kernel(3), 2, &[ints("pads", &[1, 1])]), "all");
}

/// Sum and norm of `SkipLayerNormalization`, in slots 0 and 3.
#[test]
fn a_sum_and_its_norm_are_cut_together() {
    let op = || OpType::of("com.microsoft", "SkipLayerNormalization");
    assert_eq!(needs_of(op(), &[X, X, ROW, ROW, ROW], 1, &[], 1), "0:1 1:1");
    assert_eq!(needs_of(op(), &[X, Of(F32, &[1, 65, 48]), ROW], 1, &[], 1), "0:1 1:1");
    // Statistics are no tensors of tokens.
    assert_eq!(needs_of(op(), &[X, X, ROW, ROW], 1, &[], 2), "all");
}

#[test]
fn attention_takes_fewer_queries() {
    let heads =
        |op: &str| [int(if op == "Attention" { "q_num_heads" } else { "num_heads" }, 3), int("kv_num_heads", 3)];
    let apart = || Of(F32, &[BATCH, 3, 65, 16]);
    let fused =
        |operands: &[Operand<'_>]| contrib("MultiHeadAttention", operands, 1, &heads("MultiHeadAttention")[..1]);
    assert_eq!(fused(&[X, X, X]), "0:1");
    assert_eq!(fused(&[X, X, X, Of(F32, &[144])]), "0:1");
    assert_eq!(fused(&[X, apart(), apart()]), "0:1");
    assert_eq!(fused(&[X, X, X, Nothing, Nothing, Of(F32, &[1, 3, 65, 65])]), "0:1 5:2");
    assert_eq!(fused(&[X, X, X, Nothing, Nothing, Of(F32, &[1, 1, 1, 65])]), "0:1");
    assert_eq!(fused(&[X, X, X, Nothing, Of(DataType::I32, &[BATCH, 65])]), "0:1");
    assert_eq!(fused(&[X, X, X, Nothing, Of(DataType::I32, &[BATCH, 65, 65])]), "all");
    let standard = |operands: &[Operand<'_>], more: &[(&'static str, Attribute)]| {
        needs("Attention", operands, 1, &[&heads("Attention")[..], more].concat())
    };
    assert_eq!(standard(&[X, X, X], &[]), "0:1");
    assert_eq!(standard(&[X, X, X, Of(F32, &[65, 65])], &[]), "0:1 3:0");
    assert_eq!(standard(&[X, X, X], &[int("is_causal", 1)]), "all");
    assert_eq!(needs("Attention", &[apart(), apart(), apart()], 2, &[]), "0:2");
    // One that projects the tokens has as many queries as keys.
    let packed = [X, Of(F32, &[48, 144]), Of(F32, &[144])];
    assert_eq!(contrib("Attention", &packed, 1, &[int("num_heads", 3)]), "all");
}

#[test]
fn our_operators_take_fewer_queries_and_all_slots() {
    let values = [("heads", 3), ("head_dim", 16), ("q_at", 0), ("k_at", 48), ("v_at", 96), ("dtype", 1)];
    let attributes: Vec<_> = values.map(|(name, value)| int(name, value)).into();
    let attributes = [attributes, vec![("scale", Attribute::Float(0.25))]].concat();
    let joint = || Of(F32, &[BATCH, 65, 144]);
    assert_eq!(needs_of(Attention.op_type(), &[joint(), joint(), joint()], 1, &attributes, 1), "0:1");
    let size = Of(F32, &[BATCH, 65, 1]);
    let proportional = [joint(), joint(), joint(), size];
    assert_eq!(needs_of(ProportionalAttention.op_type(), &proportional, 1, &attributes, 1), "0:1");
    let restored = [Of(F32, &[BATCH, 61, 48]), Of(DataType::I64, &[BATCH, 65])];
    assert_eq!(needs_of(TokenRestore.op_type(), &restored, 1, &[], 1), "all");
}

/// Where a part of the result is in an operand; positions in the second one are counted from 1000 on.
fn source(
    op: OpType,
    operands: &[Operand<'_>],
    axis: usize,
    attributes: &[(&str, Attribute)],
    range: (i64, i64),
) -> Option<(i64, i64)> {
    let model = model(op, operands, attributes, 1);
    let (graph, shapes) = (model.graph(), Shapes::infer(&model));
    let rules = Rules { graph, shapes: &shapes };
    let (_, node) = graph.nodes().next().unwrap();
    let extent = &rules.dims(node.output(0).unwrap()).unwrap()[axis];
    let part = Part { factor: Factor::whole(axis, extent), start: range.0, end: range.1 };
    let source = rules.source(node, 0, &part)?;
    let from = source.part(&part);
    let slot = node.inputs.iter().position(|input| *input == Some(source.value)).unwrap();
    Some((1000 * slot as i64 + from.start, 1000 * slot as i64 + from.end))
}

#[test]
fn what_is_joined_is_found_in_its_parts() {
    let joined =
        |range| source(OpType::standard("Concat"), &[Of(F32, &[BATCH, 5, 48]), X], 1, &[int("axis", 1)], range);
    assert_eq!(joined((0, 5)), Some((0, 5)));
    assert_eq!(joined((6, 8)), Some((1001, 1003)));
    assert_eq!(joined((4, 6)), None);
}

#[test]
fn protected_tokens_are_found_before_the_merge() {
    let values = [("r", 4), ("tokens", 65), ("protect", 3), ("suffix", 10)];
    let metric = [("heads", 3), ("head_dim", 16), ("metric_at", 0), ("dtype", 1)];
    let attributes: Vec<_> = values.into_iter().chain(metric).map(|(name, value)| int(name, value)).collect();
    let size = || Of(F32, &[BATCH, 65, 1]);
    let merged = |range| source(TokenMerge.op_type(), &[X, X, size()], 1, &attributes, range);
    assert_eq!((merged((0, 1)), merged((1, 3)), merged((2, 4))), (Some((0, 1)), Some((1, 3)), None));
    // The last of 61 are the last of 65.
    assert_eq!((merged((51, 61)), merged((60, 61)), merged((50, 51))), (Some((55, 65)), Some((64, 65)), None));
}

/// The tokens that the node takes of its first operand, along its second axis.
fn picked(op: &str, operands: &[Operand<'_>], attributes: &[(&str, Attribute)], results: usize) -> Option<(i64, i64)> {
    let model = model(OpType::standard(op), operands, attributes, results);
    let (graph, shapes) = (model.graph(), Shapes::infer(&model));
    let (_, node) = graph.nodes().next().unwrap();
    let part = Rules { graph, shapes: &shapes }.picked(node, 1)?;
    Some((part.start, part.end))
}

#[test]
fn positions_are_counted_from_the_front() {
    // As many tokens as the batch has images: a number that is known at run time.
    let unknown = || Of(F32, &[BATCH, BATCH, 48]);
    let gather = |x, places: &[i64]| picked("Gather", &[x, Ints(places)], &[int("axis", 1)], 1);
    assert_eq!((gather(X, &[0]), gather(X, &[3, 1]), gather(X, &[-1])), (Some((0, 1)), Some((1, 4)), Some((64, 65))));
    assert_eq!((gather(unknown(), &[2]), gather(unknown(), &[-1])), (Some((2, 3)), None));
    assert_eq!(picked("Gather", &[X, Ints(&[0])], &[int("axis", 2)], 1), None);
    let slice =
        |x, start, end, step| picked("Slice", &[x, Ints(&[start]), Ints(&[end]), Ints(&[1]), Ints(&[step])], &[], 1);
    assert_eq!((slice(X, 0, 2, 1), slice(X, -3, -1, 1)), (Some((0, 2)), Some((62, 64))));
    assert_eq!((slice(X, 5, 9999, 1), slice(X, 0, 4, 2), slice(X, 3, 3, 1)), (Some((5, 65)), None, None));
    // Of an unknown number there is one, but there may be no two.
    assert_eq!((slice(unknown(), 0, 1, 1), slice(unknown(), 0, 2, 1)), (Some((0, 1)), None));
    assert_eq!(picked("Split", &[X, Ints(&[1, 2, 62])], &[int("axis", 1)], 3), Some((0, 65)));
    assert_eq!(picked("ReduceMax", &[X], &[ints("axes", &[1])], 1), None);
}

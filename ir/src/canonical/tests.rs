//! What rewrites leave of small graphs; `tests/canonical.rs` runs graphs before and after.

use super::canonicalise;
use crate::onnx::testing::*;
use crate::onnx::{GraphProto, NodeProto, TensorProto};

/// A constant of the graph.
fn integers(name: &str, dims: &[i64], items: &[i64]) -> TensorProto {
    let (name, data_type) = (Some(name.into()), Some(crate::DataType::I64.code()));
    TensorProto { name, dims: dims.to_vec(), data_type, int64_data: items.to_vec(), ..Default::default() }
}

/// The canonical form of a graph from `x` (and a condition `c`, of which nothing is known) to `y`; `None` if it is in
/// canonical form already.
fn canonical(initializer: Vec<TensorProto>, nodes: Vec<NodeProto>) -> Option<Vec<String>> {
    let mut model = model(GraphProto { initializer, ..graph(&["x", "c"], nodes, &["y"]) }).read();
    let before = model.clone();
    let changed = canonicalise(&mut model).unwrap();
    assert_eq!(changed, model != before);
    model.verify().unwrap();
    assert!(!canonicalise(&mut model.clone()).unwrap(), "once is enough");
    changed.then(|| model.lines())
}

#[track_caller]
fn becomes(initializer: Vec<TensorProto>, nodes: Vec<NodeProto>, lines: &[&str]) {
    assert_eq!(canonical(initializer, nodes).expect("it is rewritten"), lines);
}

#[track_caller]
fn stays(initializer: Vec<TensorProto>, nodes: Vec<NodeProto>) {
    assert_eq!(canonical(initializer, nodes), None);
}

fn choice(condition: &str, yes: GraphProto, no: GraphProto) -> NodeProto {
    node("If", &[condition], &["y"]).with_graph("then_branch", yes).with_graph("else_branch", no)
}

/// Asks whether axis 0 of `x`, which has extent 2, has extent `extent`.
fn asks(extent: i64) -> (Vec<TensorProto>, Vec<NodeProto>) {
    let constants = vec![integers("axis", &[], &[0]), integers("extent", &[], &[extent])];
    let nodes = vec![
        node("Shape", &["x"], &["shape"]),
        node("Gather", &["shape", "axis"], &["own"]),
        node("Equal", &["own", "extent"], &["same"]),
    ];
    (constants, nodes)
}

#[test]
fn what_is_dead_goes() {
    let nodes = vec![node("Neg", &["x"], &["y"]), node("Exp", &["y"], &["t"]), node("Add", &["t", "w"], &["u"])];
    becomes(vec![weight("w")], nodes, &["y = Neg(x)"]);
    stays(vec![], vec![node("Neg", &["x"], &["y"])]);
}

#[test]
fn copies_are_read_through() {
    let nodes = vec![
        node("Identity", &["x"], &["a"]),
        node("Identity", &["a"], &["b"]),
        node("Neg", &["b"], &["n"]),
        node("Identity", &["n"], &["y"]),
    ];
    becomes(vec![], nodes, &["n = Neg(x)", "y = Identity(n)"]);
    // What a nested graph reads.
    let branch = |op| graph(&[], vec![node(op, &["a"], &[op])], &[op]);
    let nodes = vec![node("Identity", &["x"], &["a"]), choice("c", branch("Exp"), branch("Log"))];
    becomes(vec![], nodes, &["y = If(c)", "  Exp = Exp(x)", "  Log = Log(x)"]);
}

#[test]
fn dropout_in_inference_is_a_copy() {
    let flag = |value: i64| {
        let kind = Some(crate::DataType::Bool.code());
        TensorProto { data_type: kind, int64_data: vec![], int32_data: vec![value as i32], ..integers("t", &[], &[]) }
    };
    let dropout = |inputs: &[&str], outputs: &[&str]| {
        let first = node("Dropout", inputs, outputs);
        vec![first, node("Neg", &["d"], &["y"])]
    };
    becomes(vec![], dropout(&["x"], &["d", "mask"]), &["y = Neg(x)"]);
    becomes(vec![flag(0)], dropout(&["x", "", "t"], &["d"]), &["y = Neg(x)"]);
    stays(vec![flag(1)], dropout(&["x", "", "t"], &["d"]));
    stays(vec![], dropout(&["x", "", "c"], &["d"]));
    let read = vec![node("Dropout", &["x"], &["d", "mask"]), node("Where", &["mask", "d", "x"], &["y"])];
    stays(vec![], read);
}

#[test]
fn cast_like_is_a_cast() {
    let cast = node("CastLike", &["c", "x"], &["t"]).with_int("saturate", 0);
    let mut model = model(graph(&["x", "c"], vec![cast, node("Neg", &["t"], &["y"])], &["y"])).read();
    assert!(canonicalise(&mut model).unwrap());
    let (_, cast) = model.graph().nodes().next().unwrap();
    assert!(cast.is("Cast") && cast.int("to") == Some(1) && cast.int("saturate") == Some(0));
    assert_eq!(cast.inputs.len(), 1);
    let unknown = node("Unheard", &["x"], &["u"]);
    stays(vec![], vec![unknown, node("CastLike", &["c", "u"], &["y"])]);
}

#[test]
fn unbinding_gathers() {
    let split = || node("SplitToSequence", &["x", "one"], &["s"]).with_int("keepdims", 0);
    let constants = || vec![integers("one", &[], &[1]), integers("last", &[], &[-1]), integers("out", &[], &[2])];
    let nodes = vec![split(), node("SequenceAt", &["s", "last"], &["p"]), node("Neg", &["p"], &["y"])];
    let found = canonical(constants(), nodes).unwrap();
    assert!(found.len() == 2 && found[0].contains(" = Gather(x, s/canonical"), "{found:?}");
    // Out of bounds, or known at run time only.
    stays(constants()[..1].to_vec(), vec![split(), node("SequenceAt", &["s", "c"], &["y"])]);
    let constants = vec![constants().remove(0), constants().remove(2)];
    stays(constants, vec![split(), node("SequenceAt", &["s", "out"], &["y"])]);
}

#[test]
fn other_cuts_are_one_split() {
    let split = |sizes| node("SplitToSequence", &["x", sizes], &["s"]);
    let at = |index, result| node("SequenceAt", &["s", index], &[result]);
    let constants = || vec![integers("sizes", &[2], &[1, 1]), integers("0", &[], &[0]), integers("1", &[], &[1])];
    let nodes = vec![split("sizes"), at("0", "a"), at("1", "b"), node("Sub", &["b", "a"], &["y"])];
    let found = canonical(constants(), nodes).unwrap();
    let (split, rest) = found.split_first().unwrap();
    assert_eq!(split, "s/canonical:0, s/canonical:1 = Split(x, s/canonical)");
    assert_eq!(rest, ["y = Sub(s/canonical:1, s/canonical:0)"]);
    // A sequence that something else reads too stays for that.
    let loops = node("SequenceMap", &["s"], &["m"]).with_graph("body", graph(&["i"], vec![], &["i"]));
    let nodes = vec![
        node("SplitToSequence", &["x", "sizes"], &["s"]),
        node("SequenceAt", &["s", "0"], &["a"]),
        loops,
        node("Unheard", &["a", "m"], &["y"]),
    ];
    let found = canonical(constants(), nodes).unwrap();
    assert!(found.contains(&"s = SplitToSequence(x, sizes)".into()), "{found:?}");
}

#[test]
fn sequences_are_followed_through_edits() {
    let constants = vec![integers("0", &[], &[0]), integers("-1", &[], &[-1])];
    let nodes = vec![
        node("Neg", &["x"], &["n"]),
        node("Exp", &["x"], &["e"]),
        node("SequenceEmpty", &[], &["s0"]),
        node("SequenceInsert", &["s0", "x"], &["s1"]),
        node("SequenceInsert", &["s1", "n", "0"], &["s2"]),
        // Before the last.
        node("SequenceInsert", &["s2", "e", "-1"], &["s3"]),
        node("Identity", &["s3"], &["s4"]),
        node("SequenceErase", &["s4", "0"], &["s5"]),
        node("ConcatFromSequence", &["s5"], &["y"]).with_int("axis", 0),
    ];
    becomes(constants, nodes, &["e = Exp(x)", "y/canonical = Concat(e, x)", "y = Identity(y/canonical)"]);

    let stacked = vec![
        node("SequenceConstruct", &["x", "x"], &["s"]),
        node("ConcatFromSequence", &["s"], &["j"]).with_int("axis", -1).with_int("new_axis", 1),
        node("Neg", &["j"], &["y"]),
    ];
    let found = canonical(vec![], stacked).unwrap();
    let ops: Vec<&str> =
        found.iter().map(|line| line.split(" = ").nth(1).unwrap().split('(').next().unwrap()).collect();
    assert_eq!(ops, ["Unsqueeze", "Unsqueeze", "Concat", "Neg"]);
}

#[test]
fn sequences_without_end_are_not_followed() {
    let name = |at: usize| format!("s{at}");
    let chain = (0..20_000).map(|at| node("SequenceInsert", &[&name(at), "x"], &[&name(at + 1)]));
    let nodes: Vec<NodeProto> = [node("SequenceEmpty", &[], &["s0"])]
        .into_iter()
        .chain(chain)
        .chain([node("ConcatFromSequence", &["s20000"], &["y"]).with_int("axis", 0)])
        .collect();
    stays(vec![], nodes);
}

#[test]
fn a_branch_that_is_taken_is_unfolded() {
    for (extent, op) in [(2, "Exp"), (1, "Log")] {
        let (constants, mut nodes) = asks(extent);
        let branch =
            |op: &str| graph(&[], vec![node(op, &["x"], &["t"]).named("n"), node("Neg", &["t"], &[op])], &[op]);
        nodes.push(choice("same", branch("Exp"), branch("Log")));
        let lines = [format!("t_2 = {op}(x)"), format!("{op}_2 = Neg(t_2)"), format!("y = Identity({op}_2)")];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        becomes(constants, nodes, &lines);
    }
}

#[test]
fn a_branch_may_give_back_what_it_captures() {
    let (constants, mut nodes) = asks(1);
    let kept = graph(&[], vec![], &["a"]);
    let squeezed = graph(&[], vec![node("Squeeze", &["a"], &["q"])], &["q"]);
    nodes.extend([node("Neg", &["x"], &["a"]), choice("same", squeezed, kept)]);
    nodes[4].output = vec!["r".into()];
    nodes.push(node("Exp", &["r"], &["y"]));
    becomes(constants, nodes, &["a = Neg(x)", "y = Exp(a)"]);
}

#[test]
fn graphs_nested_deeper_keep_reading_what_they_read() {
    // An `If` that nobody can decide in one that is decided, in one that is decided.
    let deepest = |op: &str| graph(&[], vec![node(op, &["t", "a", "w"], &[op])], &[op]);
    let undecided = node("If", &["c"], &["u"]).with_graph("then_branch", deepest("Sum"));
    let undecided = undecided.with_graph("else_branch", deepest("Max"));
    let inner = GraphProto {
        initializer: vec![weight("w")],
        ..graph(&[], vec![node("Exp", &["a"], &["t"]), undecided], &["u"])
    };
    let other = || graph(&[], vec![node("Neg", &["x"], &["o"])], &["o"]);
    let outer = node("If", &["same"], &["i"]).with_graph("then_branch", inner).with_graph("else_branch", other());
    let outer = graph(&[], vec![outer], &["i"]);
    let (constants, mut nodes) = asks(2);
    nodes.extend([node("Abs", &["x"], &["a"]), choice("same", outer, other())]);
    let found = canonical(constants, nodes).unwrap();
    assert_eq!(found[..2], ["a = Abs(x)", "t_2 = Exp(a)"]);
    assert!(found[2].ends_with(" = If(c)") && found[3].contains("Sum(t_2, a, w_2)"), "{found:?}");
}

#[test]
fn what_shows_at_run_time_stays() {
    let branch = |op: &str| graph(&[], vec![node(op, &["x"], &[op])], &[op]);
    stays(vec![], vec![choice("c", branch("Exp"), branch("Log"))]);
    // A body may run any number of times.
    let body = graph(&["i", "k"], vec![node("Neg", &["x"], &["b"])], &["k", "b"]);
    stays(vec![integers("n", &[], &[3])], vec![node("Loop", &["n", ""], &["y"]).with_graph("body", body)]);
}

#[test]
fn what_is_present_is_taken_out_of_its_optional() {
    let present =
        vec![node("Optional", &["x"], &["o"]), node("OptionalGetElement", &["o"], &["e"]), node("Neg", &["e"], &["y"])];
    becomes(vec![], present, &["y = Neg(x)"]);
    let asked = |input: &[&str]| {
        let branch = |op: &str| graph(&[], vec![node(op, &["x"], &[op])], &[op]);
        vec![node("OptionalHasElement", input, &["h"]), choice("h", branch("Exp"), branch("Log"))]
    };
    becomes(vec![], asked(&["x"]), &["Exp_2 = Exp(x)", "y = Identity(Exp_2)"]);
    becomes(vec![], asked(&[]), &["Log_2 = Log(x)", "y = Identity(Log_2)"]);
    let absent = node("Optional", &[], &["o"]);
    let nodes = [vec![absent], asked(&["o"])].concat();
    becomes(vec![], nodes, &["Log_2 = Log(x)", "y = Identity(Log_2)"]);
    stays(vec![], vec![node("Unheard", &["x"], &["o"]), node("OptionalGetElement", &["o"], &["y"])]);
}

#[test]
fn a_file_that_declares_two_types_for_one_value_is_left_alone() {
    let mut proto = model(graph(&["x"], vec![node("Identity", &["x"], &["a"]), node("Neg", &["a"], &["y"])], &["y"]));
    let wrong = crate::TensorType { dtype: crate::DataType::F16, dims: None };
    let declared = crate::onnx::ValueInfoProto { name: Some("a".into()), ..crate::onnx::ValueInfo::of(&wrong).0 };
    proto.graph.as_mut().unwrap().value_info = vec![declared];
    let mut model = proto.read();
    assert!(!canonicalise(&mut model).unwrap());
}

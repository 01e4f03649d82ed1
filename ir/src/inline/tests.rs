//! Tests of inlining.

use super::*;
use crate::onnx::testing::*;
use crate::onnx::{FunctionProto, GraphProto, attribute_type};

fn inlined(graph: GraphProto, functions: Vec<FunctionProto>) -> Model {
    let mut model = with_functions(graph, functions).read();
    assert!(inline_functions(&mut model, |_| true).unwrap());
    model
}

/// The error, after which the model must be as it was.
fn refused(graph: GraphProto, functions: Vec<FunctionProto>) -> InlineError {
    let before = Model::from_bytes(with_functions(graph, functions).bytes()).unwrap();
    let mut model = before.clone();
    let error = inline_functions(&mut model, |_| true).unwrap_err();
    assert!(model == before);
    error
}

#[test]
fn nested_calls_get_names_of_their_own() {
    let inner = function("inner", &["a"], vec![node("Neg", &["a"], &["t"]), node("Exp", &["t"], &["b"])], &["b"]);
    let outer = function(
        "outer",
        &["a"],
        vec![node("f::inner", &["a"], &["t"]).named("one"), node("f::inner", &["t"], &["b"])],
        &["b"],
    );
    let nodes = vec![
        node("Abs", &["x"], &["call/t"]),
        node("f::outer", &["call/t"], &["y"]).named("call"),
        node("f::outer", &["y"], &["z"]).named("call"),
        node("f::inner", &["z"], &["out"]),
    ];
    let mut proto = with_functions(graph(&["x"], nodes, &["out"]), vec![inner, outer]);
    proto.graph.as_mut().unwrap().node[2].name = Some("again".into());
    let mut model = proto.read();
    inline_functions(&mut model, |_| true).unwrap();
    let lines = [
        "call/t = Abs(x)",
        "call/one/t = Neg(call/t)",
        "call/t_2 = Exp(call/one/t)",
        "y/t = Neg(call/t_2)",
        "y = Exp(y/t)",
        "again/one/t = Neg(y)",
        "again/t = Exp(again/one/t)",
        "z/t = Neg(again/t)",
        "z = Exp(z/t)",
        "out/t = Neg(z)",
        "out = Exp(out/t)",
    ];
    assert_eq!(model.lines(), lines);
    assert!(model.functions().is_empty());
}

/// The axes that the `Softmax` nodes of a model have.
fn axes(model: &Model) -> Vec<Option<i64>> {
    model.graph().nodes().map(|(_, node)| node.int("axis")).collect()
}

#[test]
fn attributes_are_those_of_the_call_or_else_the_defaults() {
    let softmax = || node("Softmax", &["a"], &["b"]).with_ref("axis", "dim", attribute_type::INT);
    let plain = FunctionProto { attribute: vec!["dim".into()], ..function("plain", &["a"], vec![softmax()], &["b"]) };
    let seven = softmax().with_int("dim", 7).attribute.pop().unwrap();
    let default =
        FunctionProto { attribute_proto: vec![seven], ..function("default", &["a"], vec![softmax()], &["b"]) };
    // Passes on what it gets: where it gets nothing, the callee's default holds.
    let passing = node("f::default", &["a"], &["b"]).with_ref("dim", "d", attribute_type::INT);
    let passing = FunctionProto { attribute: vec!["d".into()], ..function("passing", &["a"], vec![passing], &["b"]) };
    let nodes = vec![
        node("f::plain", &["x"], &["1"]).with_int("dim", 1),
        node("f::plain", &["1"], &["2"]),
        node("f::default", &["2"], &["3"]).with_int("dim", 3),
        node("f::default", &["3"], &["4"]),
        node("f::passing", &["4"], &["5"]).with_int("d", 5),
        node("f::passing", &["5"], &["6"]),
    ];
    let model = inlined(graph(&["x"], nodes, &["6"]), vec![plain, default, passing]);
    assert_eq!(axes(&model), [Some(1), None, Some(3), Some(7), Some(5), Some(7)]);
    assert!(model.graph().nodes().all(|(_, node)| !node.has_reference()));
}

#[test]
fn attributes_are_bound_in_nested_graphs_too() {
    let branch = || {
        let softmax = node("Softmax", &["a"], &["s"]).with_ref("axis", "dim", attribute_type::INT);
        graph(&[], vec![softmax], &["s"])
    };
    let choice = node("If", &["c"], &["b"]).with_graph("then_branch", branch()).with_graph("else_branch", branch());
    let function = FunctionProto { attribute: vec!["dim".into()], ..function("f", &["c", "a"], vec![choice], &["b"]) };
    let model =
        inlined(graph(&["c", "x"], vec![node("f::f", &["c", "x"], &["y"]).with_int("dim", 4)], &["y"]), vec![function]);
    let (_, node) = model.graph().nodes().next().unwrap();
    let axes: Vec<_> = node.subgraphs().map(axes_of).collect();
    fn axes_of(graph: &Graph) -> Option<i64> {
        graph.nodes().next().unwrap().1.int("axis")
    }
    assert_eq!(axes, [Some(4), Some(4)]);
}

#[test]
fn operands_and_results_may_be_left_out() {
    let clip = function(
        "clip",
        &["a", "low", "high"],
        vec![node("Clip", &["a", "low", "high"], &["b"]), node("Neg", &["b"], &["n"])],
        &["b", "n"],
    );
    let nodes = vec![node("f::clip", &["x", "", "h"], &["1", ""]), node("f::clip", &["1", "h"], &["", "y"]).named("c")];
    let model = inlined(graph(&["x", "h"], nodes, &["y"]), vec![clip]);
    assert_eq!(model.lines(), ["1 = Clip(x, , h)", "1/n = Neg(1)", "c/b = Clip(1, h, )", "y = Neg(c/b)"]);
}

#[test]
fn nested_graphs_of_a_body_read_what_the_call_passes() {
    // Two levels: the inner branch reads an operand, a value of the body and a value of the outer branch.
    let deep = graph(&[], vec![node("Sum", &["a", "t", "u", "opt"], &["d"])], &["d"]);
    let branch = || {
        let inner = node("If", &["c"], &["e"]).with_graph("then_branch", deep.clone());
        graph(&[], vec![node("Neg", &["a"], &["u"]), inner.with_graph("else_branch", deep.clone())], &["e"])
    };
    let choice = node("If", &["c"], &["b"]).with_graph("then_branch", branch()).with_graph("else_branch", branch());
    let body = vec![node("Exp", &["a"], &["t"]), choice];
    let functions = vec![function("f", &["c", "a", "opt"], body, &["b"])];
    let main = graph(&["c", "x"], vec![node("f::f", &["c", "x"], &["y"]).named("n")], &["y"]);
    let model = inlined(main, functions);
    let lines = [
        "n/t = Exp(x)",
        "y = If(c)",
        "  n/u = Neg(x)",
        "  n/e = If(c)",
        "    n/d = Sum(x, n/t, n/u, )",
        "    n/d_2 = Sum(x, n/t, n/u, )",
        "  n/u_2 = Neg(x)",
        "  n/e_2 = If(c)",
        "    n/d_3 = Sum(x, n/t, n/u_2, )",
        "    n/d_4 = Sum(x, n/t, n/u_2, )",
    ];
    assert_eq!(model.lines(), lines);
}

#[test]
fn nested_graphs_that_read_nothing_outside_may_hold_some_that_read_them() {
    let deep =
        node("If", &["c"], &["e"]).with_graph("then_branch", graph(&[], vec![node("Neg", &["s"], &["d"])], &["d"]));
    let branch = graph(&[], vec![node("Constant", &[], &["s"]).with_int("value_int", 1), deep], &["e"]);
    let branch = GraphProto { input: vec![info("c")], ..branch };
    let body = vec![node("Loop", &["a"], &["b"]).with_graph("body", branch)];
    let model =
        inlined(graph(&["x"], vec![node("f::f", &["x"], &["y"])], &["y"]), vec![function("f", &["a"], body, &["b"])]);
    assert_eq!(model.lines(), ["y = Loop(x)", "  y/s = Constant()", "  y/e = If(y/c)", "    y/d = Neg(y/s)"]);
}

#[test]
fn calls_inside_nested_graphs_are_inlined_there() {
    let neg = function("neg", &["a"], vec![node("Neg", &["a"], &["t"]), node("Neg", &["t"], &["b"])], &["b"]);
    let branch = || graph(&[], vec![node("f::neg", &["x"], &["s"])], &["s"]);
    let choice = node("If", &["c"], &["y"]).with_graph("then_branch", branch());
    let other = graph(&[], vec![node("f::neg", &["x"], &["r"])], &["r"]);
    let model = inlined(graph(&["c", "x"], vec![choice.with_graph("else_branch", other)], &["y"]), vec![neg]);
    let lines = ["y = If(c)", "  s/t = Neg(x)", "  s = Neg(s/t)", "  r/t = Neg(x)", "  r = Neg(r/t)"];
    assert_eq!(model.lines(), lines);
}

#[test]
fn an_operand_given_back_is_an_identity() {
    let pair = || function("pair", &["a"], vec![node("Neg", &["a"], &["b"])], &["a", "b", "b"]);
    let main = graph(&["x"], vec![node("f::pair", &["x"], &["p", "q", "r"])], &["p", "q", "r"]);
    let model = inlined(main, vec![pair()]);
    assert_eq!(model.lines(), ["q = Neg(x)", "p = Identity(x)", "r = Identity(q)"]);
    let error = refused(graph(&["x"], vec![node("f::pair", &[""], &["p"])], &["p"]), vec![pair()]);
    assert_eq!(error, InlineError::Omitted { function: "f.pair".into(), operand: "a".into() });
    // The same through a nested graph.
    let choice = node("If", &["c"], &["b"]).with_graph("then_branch", graph(&[], vec![], &["a"]));
    let error = refused(
        graph(&["x"], vec![node("f::f", &["x"], &["y"])], &["y"]),
        vec![function("f", &["c", "a"], vec![choice], &["b"])],
    );
    assert_eq!(error, InlineError::Omitted { function: "f.f".into(), operand: "a".into() });
}

#[test]
fn only_the_chosen_functions_go() {
    let leaf = function("leaf", &["a"], vec![node("Neg", &["a"], &["b"])], &["b"]);
    let kept = function("kept", &["a"], vec![node("f::leaf", &["a"], &["b"])], &["b"]);
    let root = function("root", &["a"], vec![node("f::kept", &["a"], &["b"])], &["b"]);
    let main = graph(&["x"], vec![node("f::root", &["x"], &["y"])], &["y"]);
    let mut model = with_functions(main, vec![leaf, kept, root]).read();
    assert!(inline_functions(&mut model, |key| key.name != "kept").unwrap());
    assert_eq!(model.lines(), ["y = kept(x)"]);
    let function = &model.functions()[0];
    assert_eq!((function.key.name.as_str(), model.functions().len()), ("kept", 1));
    assert_eq!(function.graph.nodes().next().unwrap().1.op, OpType::standard("Neg"));
    assert!(!inline_functions(&mut model, |key| key.name != "kept").unwrap());
}

#[test]
fn what_has_no_end_is_refused() {
    let call = |name: &str, callees: &[&str]| {
        let nodes = callees
            .iter()
            .enumerate()
            .map(|(at, callee)| node(&format!("f::{callee}"), &["a"], &[if at == 0 { "b" } else { "c" }]));
        function(name, &["a"], nodes.collect(), &["b"])
    };
    let main = |callee: &str| graph(&["x"], vec![node(&format!("f::{callee}"), &["x"], &["y"])], &["y"]);
    let itself = refused(main("f"), vec![call("f", &["f"])]);
    assert_eq!(itself.to_string(), "function f.f calls itself, directly or through others");
    let circle = vec![call("f", &["g"]), call("g", &["h"]), call("h", &["f"])];
    assert!(matches!(refused(main("f"), circle), InlineError::Recursive { .. }));

    let names: Vec<String> = (0..=MAX_DEPTH + 1).map(|at| at.to_string()).collect();
    let chain = |times: usize| -> Vec<FunctionProto> {
        let step = |pair: &[String]| call(&pair[0], &vec![pair[1].as_str(); times]);
        let last = function(&names[MAX_DEPTH + 1], &["a"], vec![node("Neg", &["a"], &["b"])], &["b"]);
        names.windows(2).map(step).chain([last]).collect()
    };
    assert_eq!(refused(main("0"), chain(1)), InlineError::TooDeep);
    // Each of the last 20 calls the next twice.
    assert_eq!(refused(main(&names[MAX_DEPTH - 18]), chain(2)), InlineError::TooLarge);
    let mut model = with_functions(main("8"), chain(1)).read();
    assert!(inline_functions(&mut model, |_| true).unwrap());
}

#[test]
fn versions_may_differ_where_the_operators_do_not() {
    let body = |op: &str, version: i64| {
        let nodes = vec![node(op, &["a"], &["b"])];
        FunctionProto {
            opset_import: vec![opset("", version), opset("my", version)],
            ..function("f", &["a"], nodes, &["b"])
        }
    };
    let main = || graph(&["x"], vec![node("f::f", &["x"], &["y"])], &["y"]);
    // The model is of version 18.
    for (op, version) in
        [("Neg", 11), ("Neg", 25), ("Softmax", 13), ("ReduceMean", 20), ("LayerNormalization", 17), ("my::Op", 3)]
    {
        let model = inlined(main(), vec![body(op, version)]);
        assert_eq!(model.graph().len(), 1);
        assert_eq!(model.opsets().get("my"), op.starts_with("my").then_some(version));
    }
    for (op, version) in
        [("Softmax", 12), ("ReduceMean", 17), ("Gelu", 20), ("Neg", 29), ("Neg", 10), ("Range", 27), ("Unheard", 17)]
    {
        let error = refused(main(), vec![body(op, version)]);
        let told = format!("function f.f uses {op} of version {version} of 'ai.onnx'");
        assert!(error.to_string().starts_with(&told), "{error}");
    }
    let newer = |version| {
        let cast = node("Cast", &["a"], &["b"]).with_int("saturate", 0);
        FunctionProto { opset_import: vec![opset("", version)], ..function("f", &["a"], vec![cast], &["b"]) }
    };
    assert!(matches!(refused(main(), vec![newer(19)]), InlineError::Opset { .. }));
    inlined(main(), vec![newer(18)]);
    // A second function wants another version of a domain that the first brought in.
    let mut second = body("my::Op", 4);
    second.name = Some("g".into());
    let calls = vec![node("f::f", &["x"], &["t"]), node("f::g", &["t"], &["y"])];
    let error = refused(graph(&["x"], calls, &["y"]), vec![body("my::Op", 3), second]);
    assert!(error.to_string().contains("uses Op of version 4 of 'my'"), "{error}");
}

#[test]
fn the_table_of_versions_is_sorted() {
    assert!(MEANINGS.is_sorted_by_key(|entry| entry.0));
    assert!(MEANINGS.iter().all(|(_, first, changed)| {
        *first >= OLDEST && changed.iter().all(|at| at > first && *at <= NEWEST) && changed.is_sorted()
    }));
    let known = |op| MEANINGS.binary_search_by_key(&op, |entry: &(&str, i64, &[i64])| entry.0).is_ok();
    assert!(ADDED.iter().all(|&(op, _, _)| known(op)));
}

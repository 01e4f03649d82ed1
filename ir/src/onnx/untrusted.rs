//! Tests of what is not a model, or a broken or hostile one: each is refused in one sentence that names the thing.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::testing::*;
use super::*;
use crate::{Model, inline_functions, print_graph};

/// Does everything that is done with a file from outside; gives the first refusal.
fn open(bytes: &[u8]) -> Result<Model, String> {
    let model = Model::from_bytes(Bytes::copy_from_slice(bytes)).map_err(|error| error.to_string())?;
    model.verify().map_err(|error| error.to_string())?;
    print_graph(model.graph());
    let mut inlined = model.clone();
    inline_functions(&mut inlined, |_| true).map_err(|error| error.to_string())?;
    inlined.verify().map_err(|error| format!("inlining breaks it: {error}"))?;
    Ok(model)
}

#[track_caller]
fn refused(bytes: &[u8], message: &str) {
    let told = open(bytes).map(|_| ()).expect_err("it is refused");
    assert!(told.contains(message), "'{told}' does not contain '{message}'");
    assert!(told.len() < 1000 && !told.contains('\n'), "{told}");
}

/// `x -> y = Neg(x)`.
fn neg() -> ModelProto {
    model(graph(&["x"], vec![node("Neg", &["x"], &["y"])], &["y"]))
}

fn with_tensor(tensor: TensorProto) -> ModelProto {
    let nodes = vec![node("Add", &["x", "w"], &["y"])];
    let name = Some("w".into());
    model(GraphProto { initializer: vec![TensorProto { name, ..tensor }], ..graph(&["x"], nodes, &["y"]) })
}

/// Pseudo-random numbers (an xorshift generator), the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[test]
fn what_is_no_model_is_refused() {
    refused(b"", "the file is empty");
    refused(b"A text file is not a model.\n", "not an ONNX model, or a truncated one");
    refused(b"{\"format\": \"json\"}", "not an ONNX model, or a truncated one");
    refused(
        &ModelProto::default().encode_to_vec().iter().copied().chain([0; 100]).collect::<Vec<_>>(),
        "not an ONNX model",
    );
    refused(&ModelProto { ir_version: Some(8), ..Default::default() }.bytes(), "the model has no graph");
    let mut random = Random(1);
    for length in [1, 2, 10, 100, 10_000, 100_000] {
        for _ in 0..50 {
            let bytes: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
            assert!(open(&bytes).is_err());
        }
    }
}

#[test]
fn truncated_files_are_refused() {
    // The operator sets come last here: without them no prefix is a model.
    let whole = with_functions(
        GraphProto {
            initializer: (0..20).map(|number| weight(&format!("w{number}"))).collect(),
            ..graph(&["x"], vec![node("Add", &["x", "w3"], &["t"]), node("f::f", &["t"], &["y"])], &["y"])
        },
        vec![function("f", &["a"], vec![node("Neg", &["a"], &["b"])], &["b"])],
    );
    let bytes = whole.bytes();
    open(&bytes).unwrap();
    let mut accepted = Vec::new();
    for length in 0..bytes.len() {
        match open(&bytes[..length]) {
            Ok(_) => accepted.push(length),
            Err(message) => assert!(message.len() < 300, "{message}"),
        }
    }
    // The one cut that leaves a model is that before its functions: with the domain imported, `f.f` is an operator that
    // only the runtime can know.
    let without = ModelProto { functions: Vec::new(), ..whole };
    assert_eq!(accepted, [without.bytes().len()]);
    for path in zoo().iter().take(5) {
        let bytes = fs::read(path).unwrap();
        for part in 1..40 {
            let cut = bytes.len() * part / 41;
            let told = Model::from_bytes(Bytes::copy_from_slice(&bytes[..cut])).unwrap_err().to_string();
            assert!(told.contains("truncated") || told.contains("no graph"), "{told}");
        }
    }
}

#[test]
fn graphs_that_do_not_hold_together_are_refused() {
    let of = |inputs: &[&str], nodes: Vec<NodeProto>, outputs: &[&str]| model(graph(inputs, nodes, outputs));
    let neg_of = |from, to| node("Neg", &[from], &[to]);
    let branch =
        |from| node("If", &["x"], &["y"]).with_graph("then_branch", graph(&[], vec![neg_of(from, "t")], &["t"]));
    let cases = [
        (of(&["x"], vec![], &["x"]), "the model's graph has no nodes"),
        (of(&["x"], vec![], &["y"]), "the model's graph has no nodes"),
        (
            of(&["x"], vec![neg_of("b", "a"), neg_of("a", "b")], &["b"]),
            "graph: the nodes Neg -> 'a', Neg -> 'b' form a cycle",
        ),
        (of(&["x"], vec![neg_of("a", "a")], &["a"]), "graph: the nodes Neg -> 'a' form a cycle"),
        (of(&["x"], vec![branch("y")], &["y"]), "graph: the nodes If -> 'y' form a cycle"),
        (of(&["x"], vec![neg_of("x", "y")], &["z"]), "graph: the output 'z' is not defined"),
        (of(&["x"], vec![neg_of("nobody", "y")], &["y"]), "graph: node '' (Neg) reads 'nobody', which nothing defines"),
        (
            of(&["x"], vec![branch("nobody")], &["y"]),
            "graph/then_branch: node '' (Neg) reads 'nobody', which nothing defines",
        ),
        // An inner name does not exist outside.
        (of(&["x"], vec![branch("x"), neg_of("t", "z")], &["z"]), "node '' (Neg) reads 't', which nothing defines"),
        (of(&["x", "x"], vec![neg_of("x", "y")], &["y"]), "graph: the name 'x' is defined twice"),
        (of(&["x"], vec![neg_of("x", "x")], &["x"]), "graph: the name 'x' is defined twice"),
        (of(&["x"], vec![neg_of("x", "y"), neg_of("x", "y")], &["y"]), "graph: the name 'y' is defined twice"),
        (of(&["x"], vec![node("Split", &["x"], &["y", "y"])], &["y"]), "graph: the name 'y' is defined twice"),
        (of(&["x"], vec![branch("x"), neg_of("x", "t")], &["y"]), "the name 't' is used twice"),
        (
            of(&["x"], vec![neg_of("x", "t").named("n"), neg_of("t", "y").named("n")], &["y"]),
            "graph: two nodes are named 'n'",
        ),
        (of(&["x"], vec![node("", &["x"], &["y"]).named("n")], &["y"]), "graph: a node without an operator type ('n')"),
        (
            of(&["x"], vec![node("Neg", &["x"], &["y"]).with_int("a", 1).with_int("a", 2)], &["y"]),
            "graph: an attribute of node '' appears twice: 'a'",
        ),
        (
            of(&["x"], vec![node("unheard::Of", &["x"], &["y"])], &["y"]),
            "uses the domain 'unheard', which is not imported",
        ),
        (of(&["x"], vec![node("Softmax", &["x"], &["y"]).with_ref("axis", "a", 2)], &["y"]), "outside a function"),
        (ModelProto { opset_import: vec![], ..neg() }, "the model imports no operator set"),
        (
            ModelProto { opset_import: vec![opset("com.microsoft", 1)], ..neg() },
            "uses the domain 'ai.onnx', which is not imported",
        ),
        (
            ModelProto { opset_import: vec![opset("", 13), opset("ai.onnx", 14)], ..neg() },
            "graph: the operator set '' is imported in versions 13 and 14",
        ),
    ];
    for (proto, message) in cases {
        refused(&proto.bytes(), message);
    }
    let weights = |names: &[&str]| GraphProto {
        initializer: names.iter().map(|name| weight(name)).collect(),
        ..neg().graph.unwrap()
    };
    refused(&model(weights(&["w", "w"])).bytes(), "graph: the name 'w' is defined twice");
    refused(&model(weights(&["y"])).bytes(), "graph: the name 'y' is defined twice");
    refused(&model(weights(&[""])).bytes(), "has no name");
    let graphs = AttributeProto { graphs: vec![neg().graph.unwrap()], r#type: Some(10), ..Default::default() };
    refused(
        &of(&["x"], vec![node("Neg", &["x"], &["y"]).with("a", graphs)], &["y"]).bytes(),
        "graph: the attribute 'a' holds graphs in a way that no known operator uses",
    );
}

#[test]
fn functions_that_do_not_hold_together_are_refused() {
    let calls = |name: &str, callee: &str| function(name, &["a"], vec![node(callee, &["a"], &["b"])], &["b"]);
    let main = || graph(&["x"], vec![node("f::f", &["x"], &["y"])], &["y"]);
    let cases = [
        (vec![calls("f", "Neg"), calls("f", "Neg")], "the function 'f.f' is defined twice"),
        (vec![calls("f", "f::f")], "function f.f calls itself, directly or through others"),
        (vec![calls("f", "f::g"), calls("g", "f::f")], "function f.f calls itself, directly or through others"),
        (vec![calls("f", "g::g")], "function f.f: g.g -> 'b' uses the domain 'g', which is not imported"),
        (vec![calls("", "Neg")], "a function of the domain 'f' has no name"),
        (vec![function("f", &["a", "a"], vec![], &["a"])], "function f.f: the name 'a' is defined twice"),
        (vec![function("f", &[], vec![], &[])], "f.f -> 'y' passes more operands or results than its function has"),
        (vec![function("f", &["a"], vec![], &["b"])], "function f.f: the output 'b' is not defined"),
        // A body does not see the graph that calls it.
        (
            vec![function("f", &["a"], vec![node("Neg", &["x"], &["b"])], &["b"])],
            "function f.f: node '' (Neg) reads 'x'",
        ),
    ];
    for (functions, message) in cases {
        refused(&with_functions(main(), functions).bytes(), message);
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    let floats = |dims: &[i64], bytes: usize| TensorProto {
        dims: dims.to_vec(),
        data_type: Some(1),
        raw_data: Some(vec![0; bytes].into()),
        ..Default::default()
    };
    let typed = |code: i32| TensorProto { dims: vec![3], data_type: Some(code), ..Default::default() };
    let cases = [
        (floats(&[2, -3], 24), "tensor 'w': the extent -3 is negative"),
        (floats(&[i64::MAX, 2], 8), "overflow"),
        (floats(&[1 << 32, 1 << 32], 8), "overflow"),
        (floats(&[i64::MAX, 2, 0], 0), "overflow"),
        (floats(&[0, i64::MAX, i64::MAX], 0), "overflow"),
        (floats(&[i64::MAX], 8), "overflow"),
        (floats(&[1 << 60], 8), "overflow"),
        (
            floats(&[1 << 40], 8),
            "the shape [1099511627776] of f32 needs 4398046511104 bytes or entries, the file holds 8",
        ),
        (floats(&[3], 8), "tensor 'w': the shape [3] of f32 needs 12 bytes or entries, the file holds 8"),
        (floats(&[3], 16), "tensor 'w': the shape [3] of f32 needs 12 bytes or entries, the file holds 16"),
        (floats(&[0], 4), "tensor 'w': the shape [0] of f32 needs 0 bytes or entries, the file holds 4"),
        (
            TensorProto { float_data: vec![0.0; 2], ..typed(1) },
            "the shape [3] of f32 needs 3 bytes or entries, the file holds 2",
        ),
        (TensorProto { int32_data: vec![0; 3], ..typed(1) }, "needs 3 bytes or entries, the file holds 0"),
        (TensorProto { int64_data: vec![0; 4], ..typed(7) }, "needs 3 bytes or entries, the file holds 4"),
        (
            TensorProto { int32_data: vec![0; 3], ..typed(22) },
            "the shape [3] of i4 needs 2 bytes or entries, the file holds 3",
        ),
        (
            TensorProto { string_data: vec![Bytes::new(); 2], ..typed(8) },
            "the shape [3] of string needs 3 bytes or entries, the file holds 2",
        ),
        (TensorProto { raw_data: Some(Bytes::new()), dims: vec![0], ..typed(8) }, "strings cannot lie in raw_data"),
        (typed(0), "tensor 'w': unknown element type 0"),
        (typed(77), "tensor 'w': unknown element type 77"),
    ];
    for (tensor, message) in cases {
        refused(&with_tensor(tensor.clone()).bytes(), message);
        // The same as an attribute, and in a sparse tensor.
        let constant = AttributeProto { t: Some(Box::new(tensor.clone())), r#type: Some(4), ..Default::default() };
        let values = Some(TensorProto { name: Some("w".into()), ..tensor.clone() });
        let sparse = SparseTensorProto { values, ..Default::default() };
        let carried =
            AttributeProto { sparse_tensor: Some(Box::new(sparse.clone())), r#type: Some(11), ..Default::default() };
        let many = AttributeProto { tensors: vec![tensor], r#type: Some(9), ..Default::default() };
        for attribute in [constant, carried, many] {
            let nodes = vec![node("Constant", &[], &["y"]).with("value", attribute)];
            refused(&model(graph(&[], nodes, &["y"])).bytes(), message.strip_prefix("tensor 'w': ").unwrap_or(message));
        }
        let initializer = GraphProto { sparse_initializer: vec![sparse], ..neg().graph.unwrap() };
        refused(&model(initializer).bytes(), message);
    }
    for tensor in [floats(&[0, 1 << 40], 0), floats(&[], 4), TensorProto { int32_data: vec![0; 2], ..typed(22) }] {
        open(&with_tensor(tensor).bytes()).unwrap();
    }
}

/// A tensor of 8 bytes in an external file.
fn external(entries: &[(&str, &str)]) -> TensorProto {
    let entry =
        |&(key, value): &(&str, &str)| StringStringEntryProto { key: Some(key.into()), value: Some(value.into()) };
    TensorProto {
        dims: vec![2],
        data_type: Some(1),
        data_location: Some(EXTERNAL),
        external_data: entries.iter().map(entry).collect(),
        ..Default::default()
    }
}

#[test]
fn external_data_stays_inside_its_file_and_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(folder.path().join("w.bin"), [0; 16]).unwrap();
    fs::create_dir(folder.path().join("folder")).unwrap();
    let told = |tensor: TensorProto| {
        fs::write(&path, with_tensor(tensor).bytes()).unwrap();
        Model::read(&path).map(|model| model.verify().map(drop).unwrap()).map_err(|error| error.to_string())
    };
    let at = |location: &str, offset: &str, length: &str| {
        external(&[("location", location), ("offset", offset), ("length", length)])
    };
    let cases = [
        (at("../secret", "0", "8"), "external file \"../secret\" is refused: its location contains `..`"),
        (at("/etc/passwd", "0", "8"), "external file \"/etc/passwd\" is refused: its location is not relative"),
        (at("missing.bin", "0", "8"), "external file \"missing.bin\" cannot be found"),
        (at("folder", "0", "8"), "external file \"folder\" is refused: it is not a regular file"),
        (at("", "0", "8"), "empty location"),
        (external(&[]), "tensor 'w': its external file is not named"),
        (at("w.bin", "12", "8"), "tensor 'w': 'w.bin' has 16 bytes, too few for 8 from 12 on"),
        (at("w.bin", "18446744073709551615", "8"), "too few"),
        (at("w.bin", "0", "18446744073709551615"), "too few"),
        (at("w.bin", "-1", "8"), "tensor 'w': its external offset '-1' is no size"),
        (at("w.bin", "0", "many"), "tensor 'w': its external length 'many' is no size"),
        (at("w.bin", "0", "4"), "tensor 'w': its shape needs 8 bytes, 'w.bin' holds 4 for it"),
        (TensorProto { dims: vec![1 << 40], ..at("w.bin", "0", "16") }, "its shape needs 4398046511104 bytes"),
        (TensorProto { data_type: Some(8), ..at("w.bin", "0", "8") }, "strings cannot lie in an external file"),
    ];
    for (tensor, message) in cases {
        let told = told(tensor).unwrap_err();
        assert!(told.contains(message) && told.starts_with(&format!("'{}': ", path.display())), "{told}");
    }
    for good in [at("w.bin", "0", "8"), at("w.bin", "8", "8"), external(&[("location", "w.bin"), ("offset", "4")])] {
        told(good).unwrap();
    }
    refused(&with_tensor(at("w.bin", "0", "8")).bytes(), "external file 'w.bin' of a model in memory");
    let told = Model::read(&folder.path().join("none.onnx")).unwrap_err().to_string();
    assert!(told.starts_with("cannot read '") && told.matches("none.onnx").count() == 1, "{told}");
    assert!(Model::read(Path::new("/")).unwrap_err().to_string().contains("is a folder"));
}

/// What comes before `length` bytes of a field.
fn head(number: u32, length: usize) -> Vec<u8> {
    let mut head = Vec::new();
    encode_key(number, WireType::LengthDelimited, &mut head);
    encode_varint(length as u64, &mut head);
    head
}

fn field(number: u32, bytes: &[u8]) -> Vec<u8> {
    [&head(number, bytes.len()), bytes].concat()
}

#[test]
fn nesting_has_an_end() {
    // A message of a field of each of these numbers around the other, a hundred thousand times.
    // They are written from the inside outwards, last byte first, so that it takes time in proportion.
    let nested = |numbers: &[u32]| {
        let mut reversed = Vec::new();
        for _ in 0..100_000 {
            numbers.iter().for_each(|&number| reversed.extend(head(number, reversed.len()).into_iter().rev()));
        }
        reversed.reverse();
        reversed
    };
    // A graph in an attribute of a node of a graph, and so on; then sequences of sequences; functions' defaults.
    let graphs = field(7, &nested(&[6, 5, 1]));
    let types = field(7, &field(11, &field(2, &nested(&[1, 4]))));
    let defaults = field(25, &field(11, &field(6, &nested(&[6, 5, 1]))));
    for bytes in [graphs, types, defaults] {
        refused(&bytes, "nested too deep: protobuf allows 100 messages inside each other");
    }

    // Side by side they are no problem.
    let branch = || graph(&[], vec![node("Neg", &["x"], &[])], &[]);
    let choices = (0..10_000).map(|_| node("If", &["x"], &[]).with_graph("then_branch", branch()));
    let wide = super::testing::model(graph(&["x"], choices.chain([node("Neg", &["x"], &["y"])]).collect(), &["y"]));
    open(&wide.bytes()).unwrap();
    let many = (0..100_000).map(|number| format!("a{number}"));
    let attributes = many.fold(node("Neg", &["x"], &["y"]), |node, name| node.with_int(&name, 1));
    open(&super::testing::model(graph(&["x"], vec![attributes], &["y"])).bytes()).unwrap();
}

#[test]
fn sizes_that_a_file_states_are_not_believed() {
    // A length of 2^62 bytes with none behind it, at several places.
    let stated = |number| head(number, 1 << 62);
    for number in [7, 8, 14, 25] {
        refused(&stated(number), "not an ONNX model, or a truncated one");
    }
    for number in [4, 5, 7, 9, 10] {
        let tensor = [field(8, b"w"), stated(number)].concat();
        let bytes = [field(8, b"\x10\x12"), field(7, &field(5, &tensor))].concat();
        refused(&bytes, "not an ONNX model, or a truncated one");
    }
}

/// Work must not grow with the square of the file.
#[test]
fn large_files_take_time_in_proportion() {
    const MANY: usize = 50_000;
    let name = |number: usize| format!("v{number}");
    let chain = (0..MANY).map(|at| node("Neg", &[&if at == 0 { "x".into() } else { name(at - 1) }], &[&name(at)]));
    let chain: Vec<NodeProto> = chain.collect();
    let last = name(MANY - 1);
    // One nested graph that reads every value, and one value that every node reads.
    let all: Vec<String> = (0..MANY).map(name).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let reads_all =
        node("If", &["x"], &["y"]).with_graph("then_branch", graph(&[], vec![node("Sum", &all, &["s"])], &["s"]));
    let fan = (0..MANY).map(|at| node("Add", &["x", &last], &[&format!("u{at}")]));
    let nodes: Vec<NodeProto> = chain.into_iter().chain(fan).chain([reads_all]).collect();
    let mut proto = model(graph(&["x"], nodes, &["y"]));
    proto.opset_import.extend((0..MANY).map(|number| opset(&name(number), 1)));
    let main = proto.graph.as_mut().unwrap();
    main.value_info = all.iter().map(|name| info(name)).collect();
    main.value_info.extend(all.iter().map(|name| info(name)));
    main.output.extend(all.iter().map(|name| info(name)));
    let model = open(&proto.bytes()).unwrap();
    assert!(model.message() == proto);

    // Calls of one function without names, in reverse order.
    let calls =
        (0..5_000).rev().map(|at| node("f::f", &[&if at == 0 { "x".into() } else { name(at - 1) }, "x"], &[&name(at)]));
    let body = function("f", &["a", "b"], vec![node("Neg", &["a"], &["t"]), node("Neg", &["t"], &["c"])], &["c"]);
    open(&with_functions(graph(&["x"], calls.collect(), &[&name(4_999)]), vec![body]).bytes()).unwrap();
}

#[test]
fn versions_of_the_future_are_carried() {
    let proto = ModelProto { ir_version: Some(99), opset_import: vec![opset("", 999)], ..neg() };
    let model = open(&proto.bytes()).unwrap();
    assert_eq!((model.ir_version(), model.opsets().standard()), (99, 999));
    assert_eq!(model.message(), proto);
}

#[test]
fn odd_but_valid_spellings_are_carried() {
    let mut proto = neg();
    proto.opset_import = vec![opset("ai.onnx", 18)];
    let main = proto.graph.as_mut().unwrap();
    main.node[0].domain = Some("ai.onnx".into());
    main.node[0].name = Some(String::new());
    main.node[0].overload = Some(String::new());
    main.node[0] = main.node[0].clone().with_int("documented", 3);
    main.node[0].attribute[0].doc_string = Some("as the first versions had it".into());
    main.output.push(info("x"));
    main.output.push(info("y"));
    let proto = proto;
    let model = open(&proto.bytes()).unwrap();
    let (_, neg_node) = model.graph().nodes().next().unwrap();
    assert!(neg_node.is("Neg") && neg_node.int("documented") == Some(3) && model.opsets().get("") == Some(18));
    assert_eq!(model.message(), proto);

    // Versions 1 and 2 of the format had one operator set, and the first had no types of attributes.
    let mut old = ModelProto { ir_version: Some(1), opset_import: vec![], ..neg() };
    old.graph.as_mut().unwrap().node[0].attribute =
        vec![AttributeProto { name: Some("a".into()), i: Some(5), ..Default::default() }];
    let model = open(&old.bytes()).unwrap();
    assert_eq!(model.graph().nodes().next().unwrap().1.int("a"), Some(5));
    let text = "a function's input and output, declared inside";
    let declared = FunctionProto {
        value_info: vec![info("t"), info("a"), info("b"), info("a")],
        doc_string: Some(text.into()),
        ..function("f", &["a"], vec![node("Neg", &["a"], &["t"]), node("Neg", &["t"], &["b"])], &["b"])
    };
    let proto = with_functions(graph(&["x"], vec![node("f::f", &["x"], &["y"])], &["y"]), vec![declared]);
    let model = open(&proto.bytes()).unwrap();
    assert!(model.functions()[0].graph.values().all(|(_, value)| value.ty().is_some()));
    assert_eq!(model.message(), proto);
}

#[test]
fn control_characters_of_names_do_not_reach_the_terminal() {
    let name = "\u{1b}[2J\n".repeat(1000);
    let told = open(&model(graph(&[&name, &name], vec![node("Neg", &[&name], &["y"])], &["y"])).bytes()).unwrap_err();
    assert!(told.len() < 2000 && !told.contains(['\u{1b}', '\n']), "{told}");
}

#[test]
fn nodes_in_any_order_are_sorted() {
    let nodes = vec![node("Neg", &["b"], &["y"]), node("Exp", &["a"], &["b"]), node("Abs", &["x"], &["a"])];
    let model = open(&model(graph(&["x"], nodes, &["y"])).bytes()).unwrap();
    assert_eq!(model.lines(), ["a = Abs(x)", "b = Exp(a)", "y = Neg(b)"]);
}

#[test]
fn nested_graphs_read_outer_names_at_every_depth() {
    for op in ["If", "Loop", "Scan"] {
        let deep = graph(&["i"], vec![node("Sum", &["x", "late", "s", "i", "w"], &["d"])], &["d", "late"]);
        let inner = node(op, &["s"], &["e"]).with_graph("body", deep);
        let branch = graph(&["j"], vec![node("Exp", &["j"], &["s"]), inner], &["e"]);
        let outer = node(op, &["x"], &["y"]).with_graph("body", branch);
        // The file has what the nested graphs read behind the node that holds them.
        let nodes = vec![outer, node("Neg", &["x"], &["late"])];
        let mut proto = model(GraphProto { initializer: vec![weight("w")], ..graph(&["x"], nodes, &["y"]) });
        let read = open(&proto.bytes()).unwrap();
        proto.graph.as_mut().unwrap().node.reverse();
        assert_eq!(read.message(), proto);
        let (_, node) = read.graph().nodes().nth(1).unwrap();
        let captures: Vec<&str> = node.captures.iter().map(|&id| read.graph().value(id).name()).collect();
        assert_eq!(captures, ["x", "late", "w"]);
        assert_eq!(print_graph(read.graph()).lines().count(), 11, "{}", print_graph(read.graph()));
    }
}

//! What is no model, a broken or hostile one, or a request that cannot be met: exit code 2, one line that says why,
//! nothing written, no panic, little time and memory.

mod common;
mod wire;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::Folder;
use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, Patch, Tensor, TensorType};

/// Far more than any refusal takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Address space that the process may have, in KiB: the program itself, its stacks and the mapped model are in it.
const ADDRESS_SPACE: u64 = 2 << 20;

impl Folder {
    /// Every file and folder, with what is in it.
    fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn add(folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in folder.read_dir().expect("the folder can be listed") {
                let path = entry.expect("the folder can be listed").path();
                if path.is_dir() && !path.is_symlink() {
                    add(&path, found);
                    found.insert(path, Vec::new());
                } else {
                    // An unreadable file is there all the same.
                    let bytes = fs::read(&path).unwrap_or_default();
                    found.insert(path, bytes);
                }
            }
        }
        let mut found = BTreeMap::new();
        add(self.path(), &mut found);
        found
    }

    /// Runs the program in this folder, with bounded memory and time.
    fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        let mut command = if cfg!(target_os = "linux") {
            let mut shell = Command::new("sh");
            shell.arg("-c").arg(format!("ulimit -v {ADDRESS_SPACE} && exec \"$0\" \"$@\""));
            shell.arg(env!("CARGO_BIN_EXE_vitrim"));
            shell
        } else {
            Command::new(env!("CARGO_BIN_EXE_vitrim"))
        };
        command.args(arguments).current_dir(self.path()).env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let start = Instant::now();
        while child.try_wait().expect("the program can be waited for").is_none() {
            if start.elapsed() > PATIENCE {
                child.kill().expect("the program can be stopped");
                panic!("{} takes more than {PATIENCE:?}", line(arguments));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.wait_with_output().expect("the program's output can be read")
    }

    /// Runs the program and expects a refusal that contains `message`.
    #[track_caller]
    fn refused<S: AsRef<OsStr>>(&self, arguments: &[S], message: &str) {
        let before = self.contents();
        let output = self.run(arguments);
        let (told, what) = (String::from_utf8_lossy(&output.stderr), line(arguments));
        assert_eq!(output.status.code(), Some(2), "{what}: {} and says\n{told}", output.status);
        assert!(told.starts_with("vitrim: ") && told.ends_with('\n'), "{what} says\n{told}");
        assert_eq!(told.lines().count(), 1, "{what} says\n{told}");
        assert!(told.contains(message), "{what} does not say '{message}' but\n{told}");
        assert!(told.len() < 1000 && !told.contains("panicked"), "{what} says\n{told}");
        // A reason that is given as the cause of itself.
        let parts: Vec<&str> = told.trim_end().split(": ").collect();
        let repeated = parts.iter().enumerate().any(|(at, part)| part.len() > 12 && parts[..at].contains(part));
        assert!(!repeated, "{what} says things twice\n{told}");
        assert!(output.stdout.is_empty(), "{what} prints\n{}", String::from_utf8_lossy(&output.stdout));
        assert!(self.contents() == before, "{what} changes files");
    }

    /// Every command refuses the model `input`.
    #[track_caller]
    fn refused_by_all(&self, input: &str, message: &str) {
        self.refused(&["merge", input, "out.onnx", "-r", "4"], message);
        self.refused(&["inspect", input], message);
        self.refused(&["verify", input, input], message);
    }
}

fn line<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    let words: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect();
    format!("`vitrim {}`", words.join(" "))
}

/// A small Vision Transformer of 65 tokens and 4 blocks.
fn vit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/timm_vit_ts17_unfused.onnx")
}

fn vit_bytes() -> Vec<u8> {
    fs::read(vit()).expect("the fixture can be read")
}

#[test]
fn what_is_no_model_is_refused() {
    let folder = Folder::new();
    folder.write("empty.onnx", b"");
    folder.refused_by_all("empty.onnx", "'empty.onnx': the file is empty");
    folder.write("text.onnx", b"This is a text file, and no model at all.\n");
    folder.refused_by_all("text.onnx", "'text.onnx': not an ONNX model");
    folder.write("error.onnx", b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n");
    folder.refused_by_all("error.onnx", "'error.onnx': not an ONNX model");
    folder.write("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n");
    folder.refused_by_all("pointer.onnx", "'pointer.onnx': not an ONNX model");
    fs::create_dir(folder.at("folder.onnx")).expect("the folder can be written");
    folder.refused_by_all("folder.onnx", "'folder.onnx': is a folder");
    folder.refused_by_all("missing.onnx", "cannot read 'missing.onnx': No such file");
    let mut state = 1u64;
    for (number, length) in [1, 7, 100, 5_000, 200_000].into_iter().enumerate() {
        let random = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let bytes: Vec<u8> = (0..length).map(random).collect();
        let name = format!("random{number}.onnx");
        folder.write(&name, &bytes);
        folder.refused_by_all(&name, "not an ONNX model");
    }
}

#[test]
fn truncated_files_are_refused() {
    let folder = Folder::new();
    let whole = vit_bytes();
    // Within the first fields, within names and weights, and just before the end.
    let cuts = [1, 2, 3, 10, 40, 100, 1000, whole.len() / 3, whole.len() / 2, whole.len() - 100, whole.len() - 1];
    for (number, cut) in cuts.into_iter().enumerate() {
        let name = format!("cut{number}.onnx");
        folder.write(&name, &whole[..cut]);
        let message = if cut == 2 { "the model has no graph" } else { "not an ONNX model, or a truncated one" };
        folder.refused(&["merge", &name, "out.onnx", "-r", "4"], message);
        folder.refused(&["inspect", &name], message);
    }
    // Between two fields, the rest is a message all the same.
    let mut end = 0;
    for (number, (_, field)) in wire::fields(&whole).into_iter().enumerate() {
        let name = format!("between{number}.onnx");
        if end > 0 {
            folder.write(&name, &whole[..end]);
            folder.refused(&["merge", &name, "out.onnx", "-r", "4"], &name);
        }
        end += field.len();
    }
    folder.write("short.npz", &fs::read(vit().with_extension("npz")).expect("the fixture can be read")[..1000]);
    let model = vit();
    let model = model.to_str().expect("the path is text");
    folder.refused(&["verify", model, model, "--input", "short.npz"], "short.npz");
    folder.refused(&["verify", "short.npz", model], "short.npz");
}

#[test]
fn graphs_that_do_not_hold_together_are_refused() {
    use wire::{GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_NODE, node, tensor, with};
    let folder = Folder::new();
    let whole = vit_bytes();
    let cycle = with(&with(&whole, GRAPH_NODE, &node("Neg", &["q"], &["p"])), GRAPH_NODE, &node("Neg", &["p"], &["q"]));
    let floats = |dims: &[i64], bytes: usize| tensor("w", dims, &wire::bytes(9, vec![0; bytes]));
    let weight = |dims: &[i64], bytes: usize| with(&whole, GRAPH_INITIALIZER, &floats(dims, bytes));
    let relu = |input: &str, output: &str| with(&whole, GRAPH_NODE, &node("Relu", &[input], &[output]));
    let model = Model::read(&vit()).expect("the fixture is a model");
    let taken = model.graph().value(model.graph().outputs()[0]).name().to_owned();
    let cases = [
        ("cycle", cycle, "form a cycle"),
        ("self", relu("a", "a"), "form a cycle"),
        ("undefined", relu("nobody", "a"), "reads 'nobody', which nothing defines"),
        ("twice", relu(&taken, &taken), "is defined twice"),
        ("weights", with(&weight(&[2], 8), GRAPH_INITIALIZER, &floats(&[2], 8)), "the name 'w' is defined twice"),
        ("inputs", with(&relu("a", "b"), GRAPH_INPUT, &wire::input("b", &[1])), "the name 'b' is defined twice"),
        ("negative", weight(&[-1, 4], 16), "tensor 'w': the extent -1 is negative"),
        ("lowest", weight(&[i64::MIN], 16), "is negative"),
        ("overflow", weight(&[1 << 40, 1 << 40], 16), "overflow"),
        ("bytes", weight(&[i64::MAX], 8), "overflow"),
        ("zero", weight(&[0, i64::MAX, i64::MAX], 0), "overflow"),
        ("too_large", weight(&[1 << 40], 16), "needs 4398046511104 bytes or entries, the file holds 16"),
        ("too_small", weight(&[3], 16), "needs 12 bytes or entries, the file holds 16"),
        ("domain", with(&whole, GRAPH_NODE, &[node("Relu", &["a"], &["b"]), wire::bytes(7, "acme")].concat()), "acme"),
        ("opsets", [&whole[..], &wire::opset("", 12)].concat(), "imported in versions 17 and 12"),
        ("no_op", with(&whole, GRAPH_NODE, &node("", &[&taken], &["b"])), "a node without an operator type"),
    ];
    for (name, bytes, message) in cases {
        let name = format!("{name}.onnx");
        folder.write(&name, &bytes);
        folder.refused_by_all(&name, message);
    }
}

#[test]
fn messages_inside_each_other_without_end_are_refused() {
    use wire::{ATTRIBUTE_GRAPH, GRAPH_NODE, MODEL_GRAPH, NODE_ATTRIBUTE};
    const DEEP: usize = 100_000;
    let folder = Folder::new();
    let whole = vit_bytes();
    let path = [MODEL_GRAPH, GRAPH_NODE, NODE_ATTRIBUTE, ATTRIBUTE_GRAPH, GRAPH_NODE, NODE_ATTRIBUTE, ATTRIBUTE_GRAPH];
    let attributes = [&path[..1], &path[1..4].repeat(DEEP)].concat();
    // Sequences of sequences, in the type of an input: fields 2 (type), 4 (sequence), 1 (its elements' type).
    let types = [&[MODEL_GRAPH, 11, 2][..], &[4, 1].repeat(DEEP)].concat();
    for (name, path) in [("attributes", attributes), ("types", types)] {
        let name = format!("{name}.onnx");
        folder.write(&name, [&whole[..], &wire::nested(path.len(), &path)].concat());
        folder.refused_by_all(&name, "nested too deep");
    }
    // Groups, a form of message that protobuf has given up, in a field that ONNX does not have.
    folder.write("groups.onnx", [&whole[..], &wire::varint(100 << 3 | 3).repeat(DEEP)].concat());
    folder.refused_by_all("groups.onnx", "groups.onnx");
}

#[test]
fn external_files_outside_the_folder_are_refused() {
    let outer = Folder::new();
    let folder = Folder::new();
    let secret = outer.write("secret.bin", [0; 64]);
    folder.write("near.bin", [0; 64]);
    fs::create_dir(folder.at("sub")).expect("the folder can be written");
    let whole = vit_bytes();
    let secret = secret.to_str().expect("temporary folders have names of text");
    let name_of_outer = outer.path().file_name().and_then(OsStr::to_str).expect("temporary folders have names of text");
    let up = format!("../{name_of_outer}/secret.bin");
    let mut cases = vec![
        ("up", up, "its location contains `..`"),
        ("around", "sub/../near.bin".to_owned(), "its location contains `..`"),
        ("absolute", secret.to_owned(), "its location is not relative"),
        ("missing", "nowhere.bin".to_owned(), "\"nowhere.bin\" cannot be found"),
        ("folder", "sub".to_owned(), "it is not a regular file"),
        ("unnamed", String::new(), "empty location"),
    ];
    if cfg!(unix) {
        #[cfg(unix)]
        std::os::unix::fs::symlink(secret, folder.at("link.bin")).expect("links can be made");
        cases.push(("link", "link.bin".to_owned(), "\"link.bin\" is refused"));
    }
    for (name, location, message) in cases {
        let tensor = wire::external(&[("location", &location), ("offset", "0"), ("length", "8")]);
        let name = format!("{name}.onnx");
        folder.write(&name, wire::with(&whole, wire::GRAPH_INITIALIZER, &tensor));
        folder.refused_by_all(&name, message);
    }
    for (name, offset, length) in [("end", "60", "8"), ("far", "18446744073709551612", "8"), ("minus", "-4", "8")] {
        let tensor = wire::external(&[("location", "near.bin"), ("offset", offset), ("length", length)]);
        let name = format!("{name}.onnx");
        folder.write(&name, wire::with(&whole, wire::GRAPH_INITIALIZER, &tensor));
        folder.refused_by_all(&name, "tensor 'elsewhere'");
    }
    // The same file within the bounds is fine.
    let tensor = wire::external(&[("location", "near.bin"), ("offset", "56"), ("length", "8")]);
    folder.write("good.onnx", wire::with(&whole, wire::GRAPH_INITIALIZER, &tensor));
    assert!(folder.run(&["merge", "good.onnx", "out.onnx", "-r", "4"]).status.success());
}

#[test]
fn operators_and_versions_that_are_not_known_are_refused() {
    let folder = Folder::new();
    let whole = vit_bytes();
    // An operator that no version of the standard has, in the middle of every block.
    let unheard: Vec<u8> = {
        let (old, new) = (b"\x22\x03Erf", b"\x22\x03Wat");
        let mut bytes = whole.clone();
        let places: Vec<usize> = (0..bytes.len() - old.len()).filter(|&at| bytes[at..].starts_with(old)).collect();
        assert_eq!(places.len(), 4, "every block has its Erf");
        places.into_iter().for_each(|at| bytes[at..at + new.len()].copy_from_slice(new));
        bytes
    };
    folder.write("unheard.onnx", &unheard);
    folder.refused(&["merge", "unheard.onnx", "out.onnx", "-r", "4"], "there is no rule for the operator Wat");
    folder.refused(&["inspect", "unheard.onnx"], "there is no rule for the operator Wat");

    // One of a domain that is imported, but foreign, on the way of the tokens.
    let model = Model::read(&vit()).expect("the fixture is a model");
    let graph = model.graph();
    let stream = graph.find_value("/blocks/blocks.1/Add_output_0").expect("the fixture has this value");
    let mut patch = Patch::new(&model, "foreign");
    let foreign = patch.call(OpType::of("com.acme", "Mystery"), "mystery", vec![Some(stream)], &[], 1)[0];
    patch.rewire_uses(graph, stream, foreign, |_| true);
    patch.import("com.acme", 1);
    let (model, _) = patch.apply(&model).expect("the patch is sound");
    Model::write(model.verify().expect("it is valid"), &folder.at("foreign.onnx"), &vit()).expect("it can be written");
    folder.refused(&["merge", "foreign.onnx", "out.onnx", "-r", "4"], "no rule for the operator com.acme.Mystery");
    folder.refused(&["inspect", "foreign.onnx"], "no rule for the operator com.acme.Mystery");
    folder.refused(&["verify", "foreign.onnx", "foreign.onnx"], "Mystery");

    // Operator sets before and after those that are known.
    let of_version = |version: i64| -> Vec<u8> {
        let fields = wire::fields(&whole);
        let other = fields.iter().filter(|(field, _)| *field != wire::MODEL_OPSET);
        other.flat_map(|(_, bytes)| bytes.iter().copied()).chain(wire::opset("", version)).collect()
    };
    for (version, message) in [
        (1, "version 1 of the standard operator set"),
        (8, "version 8 of the standard operator set"),
        (0, "version 0"),
        (-3, "version -3"),
        (99, "version 99 of the standard operator set"),
        (i64::MAX, "version 9223372036854775807 of the standard operator set"),
    ] {
        let name = format!("version{version}.onnx");
        folder.write(&name, of_version(version));
        folder.refused(&["merge", &name, "out.onnx", "-r", "4"], message);
        folder.refused(&["inspect", &name], message);
    }
    folder.write("version17.onnx", of_version(17));
    assert!(folder.run(&["merge", "version17.onnx", "out.onnx", "-r", "4"]).status.success());
}

fn floats(dims: &[i64]) -> TensorType {
    TensorType { dtype: DataType::F32, dims: Some(dims.iter().map(|&dim| DimSpec::Known(dim)).collect()) }
}

/// Zeros as a weight.
fn zeros(builder: &mut GraphBuilder, dims: &[usize]) -> vitrim_ir::ValueId {
    builder.initializer("w", Tensor::f32s(dims, &vec![0.0; dims.iter().product()]))
}

#[test]
fn models_that_are_no_vision_transformers_are_refused() {
    let folder = Folder::new();
    let write = |name: &str, builder: GraphBuilder| {
        let model = builder.into_model(8, &[("", 17)], Vec::new());
        let path = folder.at(name);
        Model::write(model.verify().expect("it is valid"), &path, &path).expect("it can be written");
    };
    // A convolutional network.
    let mut cnn = GraphBuilder::new();
    let image = cnn.input("image", Some(&floats(&[1, 3, 32, 32])));
    let (filter, dense) = (zeros(&mut cnn, &[8, 3, 3, 3]), zeros(&mut cnn, &[8, 10]));
    let features = cnn.op("Conv", "conv", &[image, filter], &[]);
    let features = cnn.op("Relu", "relu", &[features], &[]);
    let pooled = cnn.op("GlobalAveragePool", "pool", &[features], &[]);
    let flat = cnn.op("Flatten", "flat", &[pooled], &[]);
    let logits = cnn.op("MatMul", "dense", &[flat, dense], &[]);
    let scores = cnn.op("Softmax", "scores", &[logits], &[("axis", Attribute::Int(-1))]);
    cnn.output("y", scores, Some(&floats(&[1, 10])));
    write("cnn.onnx", cnn);

    // Attention over words.
    let mut text = GraphBuilder::new();
    let words = TensorType { dtype: DataType::I64, dims: Some(vec![DimSpec::Known(1), DimSpec::Known(12)]) };
    let words = text.input("input_ids", Some(&words));
    let (table, dense) = (zeros(&mut text, &[100, 16]), zeros(&mut text, &[16, 16]));
    let x = text.op("Gather", "embed", &[table, words], &[]);
    let [q, k, v] = ["q", "k", "v"].map(|name| text.op("MatMul", name, &[x, dense], &[]));
    let turned = text.op("Transpose", "k_t", &[k], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let scores = text.op("MatMul", "scores", &[q, turned], &[]);
    let weights = text.op("Softmax", "weights", &[scores], &[("axis", Attribute::Int(-1))]);
    let mixed = text.op("MatMul", "mixed", &[weights, v], &[]);
    let sum = text.op("Add", "sum", &[x, mixed], &[]);
    text.output("y", sum, Some(&floats(&[1, 12, 16])));
    write("text.onnx", text);

    for (name, message) in [("cnn.onnx", "the graph has no attention"), ("text.onnx", "is it a model for text")] {
        folder.refused(&["merge", name, "out.onnx", "-r", "4"], message);
        folder.refused(&["inspect", name], message);
    }
    // With --json it is the answer.
    let output = folder.run(&["inspect", "cnn.onnx", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stderr.is_empty() && json["vit"] == false && json["reason"].is_string(), "{json}");
}

/// Numbers in a file that ask for more memory than there is, in graphs that are valid otherwise: nothing has to come of
/// them, but vitrim must get by.
#[test]
fn large_numbers_take_no_memory() {
    let folder = Folder::new();
    let model = Model::read(&vit()).expect("the fixture is a model");
    let huge = 1i64 << 46;
    let shape = |patch: &mut Patch, dims: &[i64]| patch.constant("huge", Tensor::shape(dims));
    type Build = dyn Fn(&mut Patch) -> vitrim_ir::ValueId;
    let cases: [(&str, Box<Build>); 6] = [
        (
            "constant_of_shape",
            Box::new(move |patch| {
                let dims = shape(patch, &[huge]);
                patch.op("ConstantOfShape", "c", &[dims], &[])
            }),
        ),
        (
            "range",
            Box::new(move |patch| {
                let [from, to, step] = [0, huge, 1].map(|n| patch.constant("n", Tensor::i64(n)));
                patch.op("Range", "c", &[from, to, step], &[])
            }),
        ),
        (
            "expand",
            Box::new(move |patch| {
                let (one, dims) = (patch.constant("one", Tensor::i64(1)), shape(patch, &[huge]));
                patch.op("Expand", "c", &[one, dims], &[])
            }),
        ),
        (
            "tile",
            Box::new(move |patch| {
                let (one, times) = (patch.constant("one", Tensor::shape(&[1])), shape(patch, &[huge]));
                patch.op("Tile", "c", &[one, times], &[])
            }),
        ),
        (
            "pad",
            Box::new(move |patch| {
                let (one, pads) = (patch.constant("one", Tensor::shape(&[1])), shape(patch, &[0, huge]));
                patch.op("Pad", "c", &[one, pads], &[])
            }),
        ),
        (
            "product",
            Box::new(move |patch| {
                let dims = shape(patch, &[i64::MAX, i64::MAX, i64::MAX]);
                patch.op("ConstantOfShape", "c", &[dims], &[])
            }),
        ),
    ];
    for (name, build) in cases {
        let mut patch = Patch::new(&model, "huge");
        let value = build(&mut patch);
        let ty = TensorType { dtype: DataType::I64, dims: None };
        patch.append_output("huge_output", value, ty);
        let (hostile, _) = patch.apply(&model).expect("the patch is sound");
        let name = format!("{name}.onnx");
        let path = folder.at(&name);
        Model::write(hostile.verify().expect("it is valid"), &path, &vit()).expect("it can be written");
        for arguments in [&["merge", &name, "out.onnx", "-r", "4"][..], &["inspect", &name]] {
            let output = folder.run(arguments);
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(matches!(output.status.code(), Some(0 | 2)), "{}: {} {told}", line(arguments), output.status);
            assert!(!told.contains("panicked"), "{told}");
        }
    }
}

/// Functions that call each other twice, level by level: inlined, they would fill any memory.
#[test]
fn functions_that_multiply_are_refused() {
    let folder = Folder::new();
    let model_function = |level: usize| {
        let name = |level: usize| format!("f{level}");
        let call = |from: &str, to: &str| {
            let callee = if level == 0 { "Neg".to_owned() } else { name(level - 1) };
            let domain = if level == 0 { Vec::new() } else { wire::bytes(7, "bomb") };
            wire::bytes(7, [wire::node(&callee, &[from], &[to]), domain].concat())
        };
        // name 1, input 4, output 5, node 7, opset_import 9, domain 10
        let opset = |domain: &str, version| wire::bytes(9, [wire::bytes(1, domain), wire::int(2, version)].concat());
        let parts = [
            wire::bytes(1, name(level)),
            wire::bytes(4, "a"),
            wire::bytes(5, "c"),
            call("a", "b"),
            call("b", "c"),
            opset("", 17),
            opset("bomb", 1),
            wire::bytes(10, "bomb"),
        ];
        wire::bytes(25, parts.concat())
    };
    for (levels, message) in [(25, "more than"), (50, "deep inside each other"), (20_000, "deep inside each other")] {
        let calls = [wire::node(&format!("f{levels}"), &["boom"], &["bang"]), wire::bytes(7, "bomb")].concat();
        let input = wire::input("boom", &[1]);
        let mut bytes = wire::with(&wire::with(&vit_bytes(), wire::GRAPH_INPUT, &input), wire::GRAPH_NODE, &calls);
        bytes.extend(wire::opset("bomb", 1));
        (0..=levels).for_each(|level| bytes.extend(model_function(level)));
        let name = format!("bomb{levels}.onnx");
        folder.write(&name, &bytes);
        folder.refused_by_all(&name, message);
    }
}

#[test]
fn places_that_cannot_be_written_are_refused() {
    let folder = Folder::new();
    folder.write("in.onnx", vit_bytes());
    folder.write("file", b"");
    fs::create_dir(folder.at("taken")).expect("the folder can be written");
    let merge = |output: &str, message: &str| folder.refused(&["merge", "in.onnx", output, "-r", "4"], message);
    merge("nowhere/out.onnx", "cannot write 'nowhere/out.onnx'");
    merge("file/out.onnx", "cannot write 'file/out.onnx'");
    merge("taken", "is a folder");
    merge("taken/", "taken");
    merge(".", "cannot write '.'");
    // The input itself, by whatever name.
    let message = "the output would replace the input";
    merge("in.onnx", message);
    merge("./in.onnx", message);
    merge("taken/../in.onnx", message);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("in.onnx", folder.at("link.onnx")).expect("links can be made");
        fs::hard_link(folder.at("in.onnx"), folder.at("hard.onnx")).expect("links can be made");
        std::os::unix::fs::symlink(".", folder.at("here")).expect("links can be made");
        merge("link.onnx", message);
        merge("hard.onnx", message);
        merge("here/in.onnx", message);
        folder.refused(&["merge", "link.onnx", "in.onnx", "-r", "4"], message);
        merge("/dev/null", "is not a regular file");
    }
    // Nor the file that holds its weights.
    let tensor = wire::external(&[("location", "weights.bin"), ("offset", "0"), ("length", "8")]);
    folder.write("weights.bin", [0; 8]);
    folder.write("ext.onnx", wire::with(&vit_bytes(), wire::GRAPH_INITIALIZER, &tensor));
    folder.refused(&["merge", "ext.onnx", "weights.bin", "-r", "4"], "it holds weights");
}

#[cfg(unix)]
#[test]
fn files_without_permission_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let path = folder.write("in.onnx", vit_bytes());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("permissions can be set");
    if fs::read(&path).is_ok() {
        // The superuser reads everything.
        return;
    }
    folder.refused_by_all("in.onnx", "cannot read 'in.onnx': Permission denied");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("permissions can be set");
    fs::create_dir(folder.at("locked")).expect("the folder can be written");
    fs::set_permissions(folder.at("locked"), fs::Permissions::from_mode(0o500)).expect("permissions can be set");
    folder.refused(&["merge", "in.onnx", "locked/out.onnx", "-r", "4"], "Permission denied");
}

#[test]
fn requests_that_cannot_be_met_are_refused() {
    let folder = Folder::new();
    folder.write("in.onnx", vit_bytes());
    for (request, message) in [
        (&["-r", "many"][..], "'many' is no number of tokens"),
        (&["-r", "-4"], "'-4' is no number of tokens"),
        (&["-r", "99999999999999999999"], "is no number of tokens"),
        (&["-r", "4:2"], "lies outside -1 to 1"),
        (&["-r", "4:nan"], "lies outside -1 to 1"),
        (&["-r", "4:"], "is no inflection"),
        (&["-r", "4,,2"], "'' is no number of tokens"),
        (&["--ratio", "1.5"], "the ratio 1.5 lies outside 0 to 1"),
        (&["--ratio", "-0.5"], "the ratio -0.5 lies outside 0 to 1"),
        (&["--ratio", "nan"], "lies outside 0 to 1"),
        (&["--keep-tokens", "20"], "block 0 cannot keep 20 of 65 tokens"),
        (&["--keep-tokens", "60,61"], "block 1 cannot keep 61 of 60 tokens"),
        (&["--keep-tokens", "0"], "block 0 cannot keep 0 of 65 tokens"),
        (&["-r", "4", "--protect", "0"], "protect more with --protect"),
    ] {
        let arguments = [&["merge", "in.onnx", "out.onnx"][..], request].concat();
        folder.refused(&arguments, message);
    }
    // What the parser of the command line refuses takes more than a line, and shows the usage.
    for request in [
        &["-r", "4", "--ratio", "0.1"][..],
        &[],
        &["-r", "4", "--metric", "colour"],
        &["-r", "4", "--align", "0"],
        &["-r", "4", "--align", "many"],
        &["-r", "4", "--protect", "-1"],
        &["-r", "4", "--frobnicate"],
        &["--keep-tokens", "60,many"],
    ] {
        let output = folder.run(&[&["merge", "in.onnx", "out.onnx"][..], request].concat());
        assert_eq!(output.status.code(), Some(2), "{request:?}");
        assert!(output.stdout.is_empty() && output.stderr.starts_with(b"error: "), "{request:?}");
    }
    assert_eq!(folder.contents().len(), 1);
}

/// Whoever kills the program at whatever moment finds the output whole, or as it was before, and nothing else.
#[cfg(unix)]
#[test]
fn a_killed_run_leaves_nothing_half_done() {
    use std::io::{Seek, Write};
    /// Bytes of a weight that takes a while to be copied. The file has a hole in its place.
    const WEIGHT: usize = 200 << 20;
    let folder = Folder::new();
    let mut content = wire::tensor("large", &[WEIGHT as i64 / 4], &[]);
    content.extend(wire::head(9, WEIGHT));
    let (initializer, tensor) = (wire::head(wire::GRAPH_INITIALIZER, content.len() + WEIGHT), content);
    let graph = wire::head(wire::MODEL_GRAPH, initializer.len() + tensor.len() + WEIGHT);
    let mut file = fs::File::create(folder.at("large.onnx")).expect("the folder can be written");
    for part in [&vit_bytes(), &graph, &initializer, &tensor] {
        file.write_all(part).expect("the folder can be written");
    }
    let length = file.stream_position().expect("it is a file") + WEIGHT as u64;
    file.set_len(length).expect("the folder can be written");
    drop(file);

    let names = || {
        let entries = folder.path().read_dir().expect("the folder can be listed");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("the folder can be listed").file_name()).collect();
        names.sort();
        names
    };
    let start = |output: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
        command.args(["merge", "large.onnx", output, "-r", "4"]).current_dir(folder.path());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts")
    };
    // Once to the end, to know how long it takes and how long the file is.
    let begin = Instant::now();
    assert!(start("out.onnx").wait().expect("the program ends").success());
    let whole = begin.elapsed();
    let complete = fs::metadata(folder.at("out.onnx")).expect("it is there").len();
    assert!(complete > WEIGHT as u64);
    fs::remove_file(folder.at("out.onnx")).expect("it can be removed");

    let mut unfinished = 0;
    for moment in 0..12u32 {
        let old = moment % 2 == 1;
        if old {
            folder.write("out.onnx", b"an older file");
        }
        let mut child = start("out.onnx");
        std::thread::sleep(whole * moment / 10);
        let _ = child.kill();
        let _ = child.wait();
        match fs::metadata(folder.at("out.onnx")) {
            Ok(found) if found.len() == complete => {
                let model = Model::read(&folder.at("out.onnx")).expect("it can be read");
                assert!(model.verify().is_ok() && model.metadata("vitrim.version").is_some());
            }
            Ok(_) => {
                unfinished += 1;
                assert!(old && fs::read(folder.at("out.onnx")).is_ok_and(|bytes| bytes == b"an older file"));
            }
            Err(_) => {
                unfinished += 1;
                assert!(!old, "the older file is gone");
            }
        }
        let _ = fs::remove_file(folder.at("out.onnx"));
        assert_eq!(names(), ["large.onnx"], "killed after {:?}", whole * moment / 10);
    }
    assert!(unfinished > 0, "the program was never killed in time");
}

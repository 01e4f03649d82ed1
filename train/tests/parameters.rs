//! What is a parameter, what it is called, which are trained, and new heads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, Shapes, Tensor, TensorType, ValueId};
use vitrim_passes::{Refusal, driver};
use vitrim_train::export::{Choice, export};
use vitrim_train::head::{self, Classes};
use vitrim_train::loss::Loss;
use vitrim_train::parameters::{Parameter, Selection, Separated, separate};
use vitrim_train::{Request, Training, gradient_name};

const WIDTH: usize = 8;
const TOKENS: usize = 4;

/// A model of one block, as small as can be, with what a test puts into it.
struct Tiny {
    graph: GraphBuilder,
    x: ValueId,
}

impl Tiny {
    /// Normalised images, and patches of them.
    fn new() -> Self {
        let mut graph = GraphBuilder::new();
        let dims = vec![DimSpec::Named("batch".into()), DimSpec::Known(TOKENS as i64), DimSpec::Known(WIDTH as i64)];
        let x = graph.input("x", Some(&TensorType { dtype: DataType::F32, dims: Some(dims) }));
        let mean = graph.initializer("mean", noise(&[WIDTH], 1));
        let x = graph.op("Sub", "normalised", &[x, mean], &[]);
        let mut tiny = Self { graph, x };
        tiny.linear("embed");
        tiny
    }

    fn constant(&mut self, name: &str, dims: &[usize]) -> ValueId {
        self.graph.initializer(name, noise(dims, name.len() as u64))
    }

    fn then(&mut self, op: &str, name: &str, operand: ValueId) -> &mut Self {
        self.x = self.graph.op(op, name, &[self.x, operand], &[]);
        self
    }

    /// A product with a square matrix `name.weight`.
    fn linear(&mut self, name: &str) -> &mut Self {
        let weight = self.constant(&format!("{name}.weight"), &[WIDTH, WIDTH]);
        self.then("MatMul", &format!("/{name}/MatMul"), weight)
    }

    fn model(mut self) -> Model {
        let dims = vec![DimSpec::Named("batch".into()), DimSpec::Unknown, DimSpec::Unknown];
        self.graph.output("y", self.x, Some(&TensorType { dtype: DataType::F32, dims: Some(dims) }));
        self.graph.with_node_names().into_model(8, &[("", 17)], Vec::new())
    }

    fn separate(self) -> Separated {
        separate(&self.model()).unwrap_or_else(|refusal| panic!("{refusal}"))
    }
}

/// Numbers from -1 to 1, all different.
fn noise(dims: &[usize], seed: u64) -> Tensor {
    let elements = (0..dims.iter().product::<usize>()).map(|at| ((at as f64 + 1.0) * (seed as f64 + 0.7)).sin());
    Tensor::floats(DataType::F32, dims, &elements.collect::<Vec<_>>())
}

fn names(separated: &Separated) -> Vec<&str> {
    separated.parameters.iter().map(|parameter| parameter.name.as_str()).collect()
}

fn noted(separated: &Separated, what: &str) -> bool {
    separated.notes.iter().any(|note| note.contains(what))
}

#[test]
fn normalisation_and_scalars_are_no_parameters() {
    let mut tiny = Tiny::new();
    let half = tiny.graph.initializer("half", Tensor::f32(0.5));
    tiny.then("Mul", "halved", half);
    let separated = tiny.separate();
    assert_eq!(names(&separated), ["embed.weight"]);
    assert!(separated.notes.is_empty(), "{:?}", separated.notes);
}

#[test]
fn weights_are_found_behind_other_shapes() {
    let mut tiny = Tiny::new();
    let weight = tiny.constant("fc.weight", &[WIDTH, WIDTH]);
    let perm = [("perm", Attribute::Ints(vec![1, 0]))];
    let transposed = tiny.graph.op("Transpose", "/fc/Transpose", &[weight], &perm);
    tiny.then("MatMul", "/fc/MatMul", transposed);
    let separated = tiny.separate();
    assert_eq!(names(&separated), ["embed.weight", "fc.weight"]);
    assert!(separated.parameters.iter().all(|parameter| parameter.decay), "matrices are decayed");
}

#[test]
fn tables_of_rotary_embedding_are_no_parameters() {
    let mut tiny = Tiny::new();
    let table = tiny.constant("rope", &[TOKENS, WIDTH]);
    tiny.then("Mul", "rotated", table);
    let gain = tiny.constant("ls.gamma", &[WIDTH]);
    tiny.then("Mul", "scaled", gain);
    let separated = tiny.separate();
    assert_eq!(names(&separated), ["embed.weight", "ls.gamma"]);
    assert!(noted(&separated, "rotary"), "{:?}", separated.notes);
}

#[test]
fn masks_are_no_parameters_and_biases_of_positions_are() {
    for (elements, is_parameter) in [
        (vec![0.0, -1e9, 0.0, 0.0], false),
        (vec![0.0, f64::NEG_INFINITY, 0.0, 0.0], false),
        // An all-true mask, for it is added to scores.
        (vec![0.0; 4], false),
        (vec![0.5, -1e9, 0.0, 0.0], true),
        (vec![0.1, 0.2, 0.3, 0.4], true),
    ] {
        let mut tiny = Tiny::new();
        let keys = tiny.graph.op("Transpose", "keys", &[tiny.x], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
        tiny.then("MatMul", "scores", keys);
        let rows: Vec<f64> = (0..TOKENS).flat_map(|_| elements.clone()).collect();
        let table = Tensor::floats(DataType::F32, &[1, TOKENS, TOKENS], &rows);
        let table = tiny.graph.initializer("attn.table", table);
        tiny.then("Add", "biased", table);
        tiny.x = tiny.graph.op("Softmax", "softmax", &[tiny.x], &[("axis", Attribute::Int(-1))]);
        let separated = tiny.separate();
        assert_eq!(names(&separated).contains(&"attn.table"), is_parameter, "{elements:?}");
        assert_eq!(noted(&separated, "masks"), !is_parameter, "{elements:?}");
    }
}

/// Zeros are a mask only among scores: a position table may begin so.
#[test]
fn a_position_table_of_zeros_is_a_parameter() {
    let mut tiny = Tiny::new();
    let table = Tensor::f32s(&[1, TOKENS, WIDTH], &[0.0; TOKENS * WIDTH]);
    let table = tiny.graph.initializer("pos_embed", table);
    tiny.then("Add", "placed", table);
    tiny.x = tiny.graph.op("Tanh", "bent", &[tiny.x], &[]);
    assert_eq!(names(&tiny.separate()), ["embed.weight", "pos_embed"]);
}

#[test]
fn coordinates_and_frequencies_are_no_parameters() {
    let mut tiny = Tiny::new();
    // A bias that a small network computes from coordinates.
    let coordinates = tiny.constant("coordinates", &[TOKENS, 2]);
    let weight = tiny.constant("cpb.weight", &[2, WIDTH]);
    let table = tiny.graph.op("MatMul", "table", &[coordinates, weight], &[]);
    tiny.then("Add", "placed", table);
    let frequencies = tiny.constant("frequencies", &[WIDTH]);
    let waves = tiny.graph.op("Sin", "waves", &[frequencies], &[]);
    tiny.then("Mul", "waved", waves);
    let separated = tiny.separate();
    assert_eq!(names(&separated), ["embed.weight", "cpb.weight"]);
    assert!(noted(&separated, "coordinates"), "{:?}", separated.notes);
}

/// A token that has projections of its own before it meets any image: an attention pool's probe.
#[test]
fn a_probe_and_its_projection_are_parameters() {
    let mut tiny = Tiny::new();
    let probe = tiny.constant("probe", &[1, 1, WIDTH]);
    let weight = tiny.constant("q.weight", &[WIDTH, WIDTH]);
    let bias = tiny.constant("q.bias", &[WIDTH]);
    let query = tiny.graph.op("MatMul", "query", &[probe, weight], &[]);
    let query = tiny.graph.op("Add", "query/biased", &[query, bias], &[]);
    let keys = tiny.graph.op("Transpose", "keys", &[tiny.x], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    tiny.x = tiny.graph.op("MatMul", "scores", &[query, keys], &[]);
    let separated = tiny.separate();
    let decayed: Vec<(&str, bool)> = separated.parameters.iter().map(|one| (one.name.as_str(), one.decay)).collect();
    assert_eq!(decayed, [("embed.weight", true), ("probe", false), ("q.weight", true), ("q.bias", false)]);
}

#[test]
fn a_token_for_each_image_of_a_batch_is_no_parameter() {
    for (copies, is_parameter) in [(1, true), (2, false)] {
        let mut tiny = Tiny::new();
        let token = noise(&[WIDTH], 3).to_f64s().expect("floats").into_owned();
        let rows: Vec<f64> = (0..copies).flat_map(|_| token.clone()).collect();
        let token = tiny.graph.initializer("cls", Tensor::floats(DataType::F32, &[copies, 1, WIDTH], &rows));
        tiny.x = tiny.graph.op("Concat", "joined", &[token, tiny.x], &[("axis", Attribute::Int(1))]);
        let separated = tiny.separate();
        assert_eq!(names(&separated).contains(&"cls"), is_parameter, "{copies}");
        assert_eq!(noted(&separated, "fixed batch"), !is_parameter, "{copies}");
    }
}

#[test]
fn other_types_than_float32_are_noted() {
    let mut tiny = Tiny::new();
    let half = Tensor::floats(DataType::F16, &[WIDTH], &[0.5; WIDTH]);
    let bias = tiny.graph.initializer("half.bias", half);
    let bias = tiny.graph.op("Cast", "single", &[bias], &[("to", Attribute::Int(1))]);
    tiny.then("Add", "added", bias);
    let separated = tiny.separate();
    assert_eq!(names(&separated), ["embed.weight"]);
    assert!(noted(&separated, "'half.bias'"), "{:?}", separated.notes);
}

/// One constant for all zero biases becomes one for each, called after what it is beside; a matrix of two products stays
/// one.
#[test]
fn equal_parameters_are_untied_and_shared_ones_are_not() {
    let mut tiny = Tiny::new();
    let zeros = tiny.graph.initializer("embed.bias", Tensor::f32s(&[WIDTH], &[0.0; WIDTH]));
    tiny.then("Add", "/embed/Add", zeros).linear("a").then("Add", "/a/Add", zeros).linear("b");
    let shared = tiny.constant("shared.weight", &[WIDTH, WIDTH]);
    tiny.then("Add", "/b/Add", zeros).then("MatMul", "/c/MatMul", shared).then("MatMul", "/d/MatMul", shared);
    let separated = tiny.separate();
    let expected = ["embed.weight", "embed.bias", "a.weight", "a.bias", "b.weight", "b.bias", "shared.weight"];
    assert_eq!(names(&separated), expected);
    assert!(noted(&separated, "trained apart: 'embed.bias'"), "{:?}", separated.notes);
    assert!(noted(&separated, "stay tied: 'shared.weight'"), "{:?}", separated.notes);
    let operands = |name: &str| {
        let at = names(&separated).iter().position(|other| *other == name).expect("a parameter");
        separated.places[at].clone()
    };
    assert_eq!(operands("b.bias").operands, [("/b/Add".to_owned(), 1)]);
    assert_eq!(operands("b.bias").constant, "embed.bias");
    assert!(operands("shared.weight").operands.is_empty());
}

#[test]
fn generated_names_are_replaced_by_what_the_export_shows() {
    let mut tiny = Tiny::new();
    // By its bias.
    let weight = tiny.constant("onnx::MatMul_7", &[WIDTH, WIDTH]);
    let bias = tiny.constant("blocks.0.attn.in_proj_bias", &[WIDTH]);
    tiny.then("MatMul", "/blocks/blocks.0/attn/MatMul", weight).then("Add", "/blocks/blocks.0/attn/Add", bias);
    // By the path of its node.
    let weight = tiny.constant("onnx::MatMul_8", &[WIDTH, WIDTH]);
    tiny.then("MatMul", "/blocks/blocks.0/mlp/fc1/MatMul", weight);
    let table = tiny.constant("onnx::Add_9", &[1, TOKENS, WIDTH]);
    tiny.x = tiny.graph.op("Tanh", "bent", &[tiny.x], &[]);
    tiny.then("Add", "/embeddings/Add", table);
    // By the path of its tensor.
    let weight = tiny.constant("encoder/mha_1/value/Reshape:0", &[WIDTH, WIDTH]);
    tiny.then("MatMul", "encoder/mha_1/value/MatMul", weight);
    // Not at all.
    let weight = tiny.constant("const_3", &[WIDTH, WIDTH]);
    tiny.then("MatMul", "node_MatMul_5", weight);
    let expected = [
        "embed.weight",
        "blocks.0.attn.in_proj_weight",
        "blocks.0.attn.in_proj_bias",
        "blocks.0.mlp.fc1.weight",
        "embeddings.table",
        "encoder.mha_1.value.weight",
        "const_3",
    ];
    assert_eq!(names(&tiny.separate()), expected);
}

fn parameters(names: &[&str]) -> Vec<Parameter> {
    let one = |name: &&str| Parameter { name: (*name).into(), tensor: noise(&[2], 1), decay: false, trainable: true };
    names.iter().map(one).collect()
}

fn selected(freeze: &[&str], unfreeze: &[&str]) -> Result<Vec<String>, String> {
    let owned = |patterns: &[&str]| patterns.iter().map(|&pattern| pattern.to_owned()).collect();
    let mut list = parameters(&["patch.weight", "blocks.0.weight", "blocks.10.weight", "head.weight", "head.bias"]);
    let selection = Selection { freeze: owned(freeze), unfreeze: owned(unfreeze) };
    selection.apply(&mut list).map_err(|refusal| refusal.to_string())?;
    Ok(list.into_iter().filter(|one| one.trainable).map(|one| one.name).collect())
}

#[test]
fn frozen_first_then_unfrozen() {
    assert_eq!(selected(&["*"], &["head.*"]).expect("a selection"), ["head.weight", "head.bias"]);
    assert_eq!(selected(&["blocks.?.*", "patch.*"], &[]).expect("a selection")[0], "blocks.10.weight");
    // What is unfrozen was asked for last, wherever it stands on the command line.
    assert_eq!(selected(&["head.*", "*.weight"], &["*.weight"]).expect("a selection").len(), 4);
    assert!(selected(&["*"], &[]).expect_err("nothing to train").contains("all parameters are frozen"));
    assert!(selected(&["haed.*"], &[]).expect_err("misspelt").contains("no parameter fits 'haed.*'"));
    assert!(selected(&["[", "*"], &[]).expect_err("malformed").contains("malformed"));
}

/// A model of the zoo: of `fixtures/zoo` and of the folder that VITRIM_ZOO names.
fn zoo() -> BTreeMap<String, PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/zoo");
    let folders = [Some(fixtures), std::env::var_os("VITRIM_ZOO").map(PathBuf::from)];
    let mut models = BTreeMap::new();
    for folder in folders.into_iter().flatten() {
        for file in folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = file.expect("the folder can be listed").path();
            if path.extension().is_some_and(|extension| extension == "onnx") {
                let name = path.file_stem().and_then(|stem| stem.to_str()).expect("names are text");
                models.entry(name.to_owned()).or_insert(path);
            }
        }
    }
    models
}

fn prepared(path: &Path) -> Model {
    let model = Model::read(path).unwrap_or_else(|error| panic!("{error}"));
    driver::prepare(&model).unwrap_or_else(|refusal| panic!("{}: {refusal}", path.display())).0
}

/// What each model of the zoo has: parameters and elements, and how many of them stay as they are for the reason that a note
/// names. They are added up from the definitions of the architectures (blocks, widths, patches, tokens, classes), not from
/// the files.
const ZOO: &str = include_str!("zoo_parameters.txt");

#[test]
fn parameters_of_the_zoo_are_those_of_its_architectures() {
    let lines = ZOO.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let expected: BTreeMap<&str, Vec<&str>> = lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.collect()))
        })
        .collect();
    let mut failures = Vec::new();
    let models = zoo();
    assert!(models.len() >= 10, "the fixtures have models");
    for (name, path) in &models {
        let separated = separate(&prepared(path)).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        separated.model.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
        let elements: usize = separated.parameters.iter().map(|parameter| parameter.tensor.len()).sum();
        let found = [separated.parameters.len(), elements];
        let numbers = |words: &[&str]| words.iter().map(|word| word.parse().expect("a number")).collect::<Vec<usize>>();
        let (all, left, why) = match expected.get(name.as_str()).map(Vec::as_slice) {
            Some(&[count, elements]) => (numbers(&[count, elements]), vec![0, 0], ""),
            Some(&[count, elements, fewer, less, why]) => (numbers(&[count, elements]), numbers(&[fewer, less]), why),
            other => panic!("{name} is not in the list, or {other:?} is not what it says"),
        };
        let is_noted = noted(&separated, why);
        let found_all = found[..] == all[..] && (why.is_empty() || !is_noted);
        let found_rest =
            is_noted && found.iter().zip(all.iter().zip(&left)).all(|(found, (all, left))| found + left == *all);
        if !found_all && !found_rest {
            failures.push(format!("{name}: {found:?}, not {all:?} less {left:?}; {:?}", separated.notes));
        }
        let mut sorted = names(&separated);
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), separated.parameters.len(), "{name}: names are unique");
        for parameter in &separated.parameters {
            let value = separated.model.graph().find_value(&parameter.name);
            let value = value.unwrap_or_else(|| panic!("{name}: '{}' is in the model", parameter.name));
            assert!(!separated.model.graph().value(value).uses().is_empty(), "{name}: '{}' is read", parameter.name);
        }
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), models.len(), failures.join("\n"));
}

/// Exports of the same model by different exporters have parameters of the same names.
#[test]
fn names_do_not_depend_on_the_exporter() {
    let models = zoo();
    let of = |name: &str| {
        let separated = separate(&prepared(&models[name])).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        let mut names: Vec<String> = names(&separated).into_iter().map(Into::into).collect();
        names.sort_unstable();
        names
    };
    let mut pairs = vec![
        ("timm_vit_dynamo18_fused", "timm_vit_dynamo23_fused"),
        ("timm_vit_dynamo18_fused", "timm_vit_ts17_unfused"),
        ("timm_vit_dynamo18_fused", "timm_vit_ts17_fused"),
        ("hf_vit_sdpa_dynamo18", "hf_vit_sdpa_ts14"),
    ];
    if models.contains_key("old_timm0412_vit_op11") {
        pairs.extend([
            ("timm_vit_dynamo18_fused", "timm_vit_dynamo20_fused"),
            ("openclip_quickgelu_ts17", "onnxsim_openclip_quickgelu_ts17"),
            ("timm_vit_dynamo18_fused", "onnxsim_timm_vit_ts17_fused"),
            ("timm_vit_dynamo18_fused", "ortopt_vit_timm_ts17"),
            ("old_timm0412_vit_op11", "old_timm0412_vit_functions_op15"),
            ("hf_vit_sdpa_dynamo18", "hf_vit_sdpa_dynamo23"),
        ]);
    }
    for (one, other) in pairs {
        assert_eq!(of(one), of(other), "{one} and {other}");
    }
    let timm = of("timm_vit_dynamo18_fused");
    for name in ["cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "head.weight"] {
        assert!(timm.iter().any(|other| other == name), "{name} is one of {timm:?}");
    }
}

/// Two heads whose mean is judged: the gradients of their biases are one value, which is an output for each.
#[test]
fn biases_that_are_added_up_are_both_trained() {
    let model = Model::read(&zoo()["timm_deit_dist_ts17"]).unwrap_or_else(|error| panic!("{error}"));
    let training =
        Training::of(&model, &Request::new(Loss::MeanSquaredError)).unwrap_or_else(|refusal| panic!("{refusal}"));
    let graph = training.gradients.graph();
    for name in ["head.bias", "head_dist.bias"] {
        let gradient = gradient_name(name);
        assert!(graph.outputs().iter().any(|&output| graph.value(output).name() == gradient), "{gradient}");
    }
}

fn last_extent(model: &Model) -> Option<i64> {
    let shapes = Shapes::infer(model);
    shapes.dims(model.graph().outputs()[0])?.last()?.as_known()
}

/// Every classifier gets other classes, and nothing but its head changes; what else is refused names a reason.
#[test]
fn heads_of_the_zoo_get_other_classes() {
    let (mut replaced, mut refused) = (0, Vec::new());
    for (name, path) in zoo() {
        let model = prepared(&path);
        let before = separate(&model).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        match head::replace(&model, None, Classes { count: 3, seed: 1 }) {
            Ok(other) => {
                replaced += 1;
                other.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
                assert_eq!(last_extent(&other), Some(3), "{name}");
                let after = separate(&other).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
                assert_eq!(names(&before), names(&after), "{name}: names stay");
                let changed: Vec<&Parameter> = (before.parameters.iter().zip(&after.parameters))
                    .filter(|(a, b)| a.tensor.dims() != b.tensor.dims() || a.tensor.to_f64s() != b.tensor.to_f64s())
                    .map(|(_, b)| b)
                    .collect();
                assert!((1..=4).contains(&changed.len()), "{name}: {changed:?}");
                for parameter in changed {
                    let elements = parameter.tensor.to_f64s().expect("floats");
                    assert!(parameter.tensor.dims().contains(&3), "{name}: {parameter:?}");
                    assert!(elements.iter().all(|x| x.abs() <= 0.04 + 1e-9), "{name}: {parameter:?}");
                    assert_eq!(elements.iter().all(|&x| x == 0.0), !parameter.decay, "{name}: {parameter:?}");
                }
            }
            Err(Refusal::Request(reason)) => refused.push(format!("{name}: {reason}")),
            Err(refusal) => panic!("{name}: {refusal}"),
        }
    }
    println!("{replaced} heads; refused:\n{}", refused.join("\n"));
    assert!(replaced > refused.len(), "most are classifiers");
}

/// The distribution that a head begins with: mean 0, and the deviation of a normal one of 0.02 that is cut at two of them
/// (0.8796 of it).
#[test]
fn heads_begin_with_a_truncated_normal_distribution() {
    let mut tiny = Tiny::new();
    tiny.linear("head");
    let model = tiny.model();
    let elements = |seed: u64| {
        let other =
            head::replace(&model, None, Classes { count: 4000, seed }).unwrap_or_else(|refusal| panic!("{refusal}"));
        let separated = separate(&other).unwrap_or_else(|refusal| panic!("{refusal}"));
        let head = separated.parameters.into_iter().find(|one| one.name == "head.weight").expect("the head");
        assert_eq!(head.tensor.dims(), [WIDTH as i64, 4000]);
        head.tensor.to_f64s().expect("floats").into_owned()
    };
    let first = elements(0);
    let count = first.len() as f64;
    let mean = first.iter().sum::<f64>() / count;
    let deviation = (first.iter().map(|x| x * x).sum::<f64>() / count).sqrt();
    // Five standard errors of 32000 draws.
    assert!(mean.abs() < 5e-4, "{mean}");
    assert!((deviation - 0.02 * 0.8796).abs() < 4e-4, "{deviation}");
    assert_eq!(first, elements(0), "the same seed gives the same");
    assert_ne!(first, elements(1), "another gives others");
}

#[test]
fn heads_that_are_something_else_are_refused() {
    let reason = |tiny: Tiny| match head::replace(&tiny.model(), None, Classes { count: 3, seed: 0 }) {
        Err(Refusal::Request(reason)) => reason,
        other => panic!("{:?} is no refusal", other.map(|_| "a model")),
    };
    let mut tiny = Tiny::new();
    tiny.x = tiny.graph.op("Relu", "clipped", &[tiny.x], &[]);
    assert!(reason(tiny).contains("Relu 'y' is no product with a matrix"));
    let mut tiny = Tiny::new();
    let shared = tiny.constant("shared.weight", &[WIDTH, WIDTH]);
    tiny.then("MatMul", "a", shared).then("MatMul", "b", shared);
    assert!(reason(tiny).contains("'shared.weight' of MatMul 'y' is read elsewhere too"));
    let mut tiny = Tiny::new();
    tiny.linear("head");
    let squared = tiny.graph.op("Mul", "squared", &[tiny.x, tiny.x], &[]);
    tiny.x = squared;
    assert!(reason(tiny).contains("neither a bias nor a sum of heads"));
}

/// Other weights for every parameter, by name.
fn perturbed(separated: &Separated) -> BTreeMap<String, Tensor> {
    let change = |(at, parameter): (usize, &Parameter)| {
        let elements = parameter.tensor.to_f64s().expect("floats");
        let elements: Vec<f64> =
            elements.iter().enumerate().map(|(i, x)| x + 0.01 * ((i + 7 * at) as f64).sin()).collect();
        let dims: Vec<usize> = parameter.tensor.dims().iter().map(|&extent| extent as usize).collect();
        (parameter.name.clone(), Tensor::floats(DataType::F32, &dims, &elements))
    };
    separated.parameters.iter().enumerate().map(change).collect()
}

/// What is exported has the weights of the checkpoint, and is the original but for those wherever no local function hides
/// them.
#[test]
fn weights_go_back_into_the_zoo() {
    let (mut in_place, mut count) = (0, 0);
    for (name, path) in zoo() {
        let original = Model::read(&path).unwrap_or_else(|error| panic!("{error}"));
        let separated = separate(&prepared(&path)).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        if separated.parameters.is_empty() {
            continue;
        }
        let weights = perturbed(&separated);
        let exported = export(&original, &weights, &Choice::default());
        let exported = exported.unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        exported.model.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
        count += 1;
        in_place += usize::from(exported.notes.is_empty());
        if exported.notes.is_empty() {
            let ops = |model: &Model| -> Vec<String> {
                model.graph().nodes().map(|(_, node)| format!("{} {}", node.op, node.name)).collect()
            };
            assert_eq!(ops(&original), ops(&exported.model), "{name}: the nodes stay");
        } else {
            assert!(!original.functions().is_empty(), "{name}: {:?}", exported.notes);
        }
        let interface = |model: &Model| -> Vec<String> {
            let graph = model.graph();
            graph.feeds().chain(graph.outputs().iter().copied()).map(|value| graph.value(value).name().into()).collect()
        };
        assert_eq!(interface(&original), interface(&exported.model), "{name}: inputs and outputs stay");
        let (again, _) = driver::prepare(&exported.model).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        let again = separate(&again).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        assert_eq!(names(&again), names(&separated), "{name}");
        for parameter in &again.parameters {
            assert_eq!(parameter.tensor.to_f64s(), weights[&parameter.name].to_f64s(), "{name}: {}", parameter.name);
        }
    }
    println!("{in_place} of {count} in place");
    assert!(in_place > 0);
}

/// What was one constant in the file becomes one for each reader, whether it reads the constant or a copy of it; the rest
/// of the file stays.
#[test]
fn untied_weights_go_back_to_where_they_are_read() {
    let mut tiny = Tiny::new();
    let zeros = tiny.graph.initializer("embed.bias", Tensor::f32s(&[WIDTH], &[0.0; WIDTH]));
    tiny.then("Add", "/embed/Add", zeros).linear("a");
    let copy = tiny.graph.op("Identity", "onnx::Add_3", &[zeros], &[]);
    tiny.then("Add", "/a/Add", copy).linear("b").then("Add", "/b/Add", zeros);
    let original = tiny.model();
    let (prepared, _) = driver::prepare(&original).unwrap_or_else(|refusal| panic!("{refusal}"));
    let separated = separate(&prepared).unwrap_or_else(|refusal| panic!("{refusal}"));
    assert_eq!(names(&separated), ["embed.weight", "embed.bias", "a.weight", "a.bias", "b.weight", "b.bias"]);
    let weights = perturbed(&separated);
    let exported = export(&original, &weights, &Choice::default()).unwrap_or_else(|refusal| panic!("{refusal}"));
    assert!(exported.notes.is_empty(), "{:?}", exported.notes);
    let graph = exported.model.graph();
    for name in ["embed", "a", "b"] {
        let result = if name == "b" { "y".to_owned() } else { format!("/{name}/Add") };
        let value = graph.find_value(&result).expect("the sum");
        let bias = graph.producer(value).and_then(|(node, _)| graph.node(node).input(1)).expect("its bias");
        let held = graph.constant(bias).unwrap_or_else(|| panic!("{name} reads a constant"));
        assert_eq!(held.to_f64s(), weights[&format!("{name}.bias")].to_f64s(), "{name}");
    }
}

/// A bias of one element is one where the operator says so; a factor of one element may be anything.
#[test]
fn the_bias_of_one_class_is_a_parameter() {
    let mut tiny = Tiny::new();
    let (weight, bias) = (tiny.constant("head.weight", &[1, WIDTH]), tiny.constant("head.bias", &[1]));
    let temperature = tiny.constant("temperature", &[1]);
    tiny.x = tiny.graph.op("Squeeze", "picked", &[tiny.x], &[]);
    tiny.x = tiny.graph.op("Gemm", "logit", &[tiny.x, weight, bias], &[("transB", Attribute::Int(1))]);
    tiny.then("Mul", "scaled", temperature);
    assert_eq!(names(&tiny.separate()), ["embed.weight", "head.weight", "head.bias"]);
}

#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let mut tiny = Tiny::new();
    let zeros = tiny.graph.initializer("embed.bias", Tensor::f32s(&[WIDTH], &[0.0; WIDTH]));
    tiny.then("Add", "/embed/Add", zeros);
    let model = tiny.model();
    let good = perturbed(&separate(&model).unwrap_or_else(|refusal| panic!("{refusal}")));
    let reason = |weights: &BTreeMap<String, Tensor>, choice: &Choice| match export(&model, weights, choice) {
        Err(Refusal::Request(reason)) => reason,
        other => panic!("{:?} is no refusal", other.map(|_| "a model")),
    };
    let with = |name: &str, tensor: Option<Tensor>| {
        let mut weights = good.clone();
        match tensor {
            Some(tensor) => weights.insert(name.into(), tensor),
            None => weights.remove(name),
        };
        weights
    };
    let none = Choice::default();
    assert!(export(&model, &with("embed.weight.exp_avg", Some(noise(&[1], 1))), &none).is_ok(), "the rest is ignored");
    assert!(reason(&with("embed.bias", None), &none).contains("no parameter 'embed.bias'; it has embed.weight"));
    assert!(reason(&with("embed.bias", Some(noise(&[3], 1))), &none).contains("'embed.bias' is [3] in the checkpoint"));
    let half = Tensor::floats(DataType::F16, &[WIDTH], &[0.0; WIDTH]);
    assert!(reason(&with("embed.bias", Some(half)), &none).contains("'embed.bias' is f16 in the checkpoint and f32"));
    let ema = Choice { ema: true, ..Choice::default() };
    assert!(reason(&good, &ema).contains("no running means"));
    let mean = noise(&[WIDTH], 9);
    let exported = export(&model, &with("embed.bias.ema", Some(mean.clone())), &ema).expect("it has one");
    let again = separate(&exported.model).unwrap_or_else(|refusal| panic!("{refusal}"));
    assert_eq!(again.parameters[1].tensor.to_f64s(), mean.to_f64s(), "the mean of the one");
    assert_eq!(again.parameters[0].tensor.to_f64s(), good["embed.weight"].to_f64s(), "the other has none");
}

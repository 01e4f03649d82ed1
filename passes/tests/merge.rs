//! The merge pass: what it writes, and what it refuses.

#[path = "../../tests/common/tiny.rs"]
mod tiny;

use std::fs;
use std::path::Path;

use tiny::{TOKENS, WIDTH, mean};
use vitrim_ir::{
    Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, Patch, Tensor, TensorType, ValueId, print_graph,
};
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::Recipe;

fn fixture(name: &str) -> Model {
    Model::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/zoo").join(format!("{name}.onnx"))).unwrap()
}

fn merge(model: &Model, keys: &str) -> Result<Model, Refusal> {
    let recipe = Recipe::parse(&format!("[[pass]]\nkind = \"merge\"\n{keys}")).unwrap();
    driver::rewrite(model, &recipe, Options::default()).map(|(model, _)| model)
}

fn refusal(model: &Model, keys: &str) -> String {
    // A model is too long to print where there should be none.
    merge(model, keys).map(|_| ()).unwrap_err().to_string()
}

/// Compares with `tests/golden/NAME.txt`; `VITRIM_BLESS=1` writes it anew.
fn check(name: &str, model: &Model) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    let text = print_graph(model.graph());
    if std::env::var_os("VITRIM_BLESS").is_some() {
        fs::write(&path, text).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "{} differs; run with VITRIM_BLESS=1 if that is right, and read the change",
        path.display()
    );
}

#[test]
fn decomposed_attention() {
    check("timm_vit_ts17_unfused.merged", &merge(&fixture("timm_vit_ts17_unfused"), "r = 4").unwrap());
}

#[test]
fn fused_attention_stays_fused() {
    let merged = merge(&fixture("timm_vit_dynamo23_fused"), "r = 4").unwrap();
    assert_eq!(merged.graph().nodes().filter(|(_, node)| node.is("Attention")).count(), 4);
    check("timm_vit_dynamo23_fused.merged", &merged);
}

#[test]
fn outputs_with_an_entry_for_each_token_are_restored() {
    check("timm_vit_features_ts17.merged", &merge(&fixture("timm_vit_features_ts17"), "r = [8, 0, 8]").unwrap());
}

#[test]
fn nothing_to_merge_changes_nothing() {
    let model = fixture("timm_vit_ts17_unfused");
    let bytes = |model: &Model| Model::to_bytes(model.verify().unwrap());
    let recipe = Recipe::parse("[[pass]]\nkind = \"merge\"\nr = 0").unwrap();
    let options = Options { keep_dead: true, ..Options::default() };
    let (same, _) = driver::rewrite(&model, &recipe, options).unwrap();
    assert!(bytes(&same) == bytes(&model), "the file changed");
}

#[test]
fn tokens_that_nothing_reads_are_not_computed() {
    check("timm_vit_ts17_unfused.dead", &merge(&fixture("timm_vit_ts17_unfused"), "r = 0").unwrap());
}

#[test]
fn windows_are_refused() {
    let reason = refusal(&fixture("timm_swin_ts17"), "r = 4");
    assert!(reason.starts_with("the tokens cannot be regrouped: Reshape '") && reason.contains("window"), "{reason}");
}

#[test]
fn a_class_token_that_is_not_protected_is_refused() {
    let reason = refusal(&fixture("timm_vit_ts17_unfused"), "r = 4\nprotect = 0");
    assert!(reason.contains("reads tokens by position"), "{reason}");
}

#[test]
fn a_rewritten_model_is_refused() {
    let merged = merge(&fixture("timm_vit_ts17_unfused"), "r = 4").unwrap();
    let reason = refusal(&merged, "r = 4");
    assert!(reason.contains("was rewritten before"), "{reason}");
}

/// A model of one block, with what `after` makes of its stream as output.
fn tiny(after: impl Fn(&mut GraphBuilder, ValueId) -> ValueId) -> Model {
    let mut graph = GraphBuilder::new();
    let image = tiny::image(&mut graph, "image");
    let stream = tiny::tower(&mut graph, "vit", image, 1);
    let y = after(&mut graph, stream);
    tiny::model(graph, y)
}

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 100.0).collect()
}

/// The same with any attention over `[batch, tokens, channels]`.
fn with_attention(
    after: impl Fn(&mut GraphBuilder, ValueId) -> ValueId,
    attention: impl Fn(&mut GraphBuilder, ValueId) -> ValueId,
) -> Model {
    let mut graph = GraphBuilder::new();
    let image = tiny::image(&mut graph, "image");
    let x = tiny::tokens(&mut graph, "vit", image);
    let mixed = attention(&mut graph, x);
    let stream = graph.op("Add", "stream", &[x, mixed], &[]);
    let out = after(&mut graph, stream);
    graph.output("y", out, None);
    graph.into_model(8, &[("", 17), ("com.microsoft", 1)], Vec::new())
}

#[test]
fn the_smallest_vit_merges() {
    let merged = merge(&tiny(mean), "r = 4").unwrap();
    assert_eq!(merged.graph().nodes().filter(|(_, node)| node.op.domain == "ai.vitrim").count(), 2);
}

fn count(model: &Model, op: &str) -> usize {
    model.graph().nodes().filter(|(_, node)| node.op.name == op).count()
}

#[test]
fn a_table_behind_the_merge_is_averaged_as_the_tokens_are() {
    let with_table = tiny(|graph, x| {
        let rows: Vec<f32> = (0..TOKENS * WIDTH).map(|i| i as f32).collect();
        let table = graph.initializer("table", Tensor::f32s(&[1, TOKENS, WIDTH], &rows));
        let sum = graph.op("Add", "with_table", &[x, table], &[]);
        mean(graph, sum)
    });
    let merged = merge(&with_table, "r = 4").unwrap();
    assert_eq!((count(&merged, "TokenMean"), count(&merged, "TokenRestore")), (1, 0));
}

#[test]
fn what_reaches_no_output_is_no_obstacle() {
    // Sums along the tokens depend on their order, but nothing reads them.
    let with_dead_end = |read: bool| {
        tiny(|graph, x| {
            let axis = graph.initializer("sum_axis", Tensor::i64(1));
            let sums = graph.op("CumSum", "sums", &[x, axis], &[]);
            mean(graph, if read { sums } else { x })
        })
    };
    let merged = merge(&with_dead_end(false), "r = 4").unwrap();
    assert_eq!((count(&merged, "CumSum"), count(&merged, "TokenRestore")), (0, 0));
    let merged = merge(&with_dead_end(true), "r = 4").unwrap();
    assert_eq!((count(&merged, "CumSum"), count(&merged, "TokenRestore")), (1, 1));
}

#[test]
fn attention_in_windows_is_refused() {
    let windowed = |size: i64| {
        let model = fixture("timm_vit_dynamo23_fused");
        let mut patch = Patch::new(&model, "windows");
        let fused = model.graph().nodes().find(|(_, node)| node.is("Attention")).unwrap();
        patch.set_attribute(fused.0, "left_window_size", Attribute::Int(size));
        patch.apply(&model).unwrap().0
    };
    assert!(merge(&windowed(-1), "r = 4").is_ok());
    let reason = refusal(&windowed(2), "r = 4");
    assert!(reason.contains("sees neighbouring tokens only"), "{reason}");
}

#[test]
fn a_token_picked_from_the_middle_is_restored_first() {
    let picks = tiny(|graph, x| {
        let place = graph.initializer("place", Tensor::i64(5));
        graph.op("Gather", "picked", &[x, place], &[("axis", Attribute::Int(1))])
    });
    assert_eq!(count(&merge(&picks, "r = 4").unwrap(), "TokenRestore"), 1);
    // Whoever says what to protect is told what that leaves out.
    let reason = refusal(&picks, "r = 4\nprotect = 2");
    assert!(reason.contains("reads tokens by position (1 from 5 on)"), "{reason}");
}

/// A ViT with an operator of ONNX Runtime for its attention.
fn fused(
    op: &str,
    attributes: &[(&str, i64)],
    operands: &dyn Fn(&mut GraphBuilder, ValueId) -> Vec<Option<ValueId>>,
) -> Model {
    with_attention(mean, |graph, x| {
        let attributes = attributes.iter().map(|&(name, value)| (name, Attribute::Int(value)));
        let attributes: Vec<_> = [("num_heads", Attribute::Int(2))].into_iter().chain(attributes).collect();
        let operands = operands(graph, x);
        graph.call(OpType::of("com.microsoft", op), "mixed", operands, &attributes, 1)[0]
    })
}

/// Tokens, a matrix that projects them, and nothing to add.
fn packed(graph: &mut GraphBuilder, x: ValueId) -> Vec<Option<ValueId>> {
    let matrix = graph.tensor("matrix", Tensor::f32s(&[WIDTH, 3 * WIDTH], &noise(3 * WIDTH * WIDTH)));
    vec![Some(x), Some(matrix), None]
}

#[test]
fn fused_attention_that_knows_tokens_apart_is_refused() {
    let table = |graph: &mut GraphBuilder, dims: &[usize]| {
        Some(graph.tensor("table", Tensor::f32s(dims, &noise(dims.iter().product()))))
    };
    let counts = |graph: &mut GraphBuilder| Some(graph.tensor("counts", Tensor::integers(DataType::I32, &[1], &[7])));
    let twice = |x: ValueId| vec![Some(x); 3];
    let cases: [(&str, Model); 8] = [
        ("its attention is causal", fused("Attention", &[("unidirectional", 1)], &packed)),
        ("its attention is causal", fused("GroupQueryAttention", &[("kv_num_heads", 2)], &|_, x| twice(x))),
        (
            "its attention has a cache",
            fused("MultiHeadAttention", &[], &|graph, x| {
                let past = table(graph, &[1, 2, 5, 4]);
                [twice(x), vec![None, None, None, past, past]].concat()
            }),
        ),
        ("it rotates queries and keys by", fused("Attention", &[("do_rotary", 1)], &packed)),
        (
            "interleaved in one operand",
            fused("MultiHeadAttention", &[], &|graph, x| {
                let heads = graph.tensor("heads", Tensor::shape(&[0, 0, 2, 1, WIDTH as i64 / 2]));
                let one = graph.op("Reshape", "one", &[x, heads], &[]);
                vec![Some(graph.op("Concat", "qkv", &[one, one, one], &[("axis", Attribute::Int(3))]))]
            }),
        ),
        ("the tokens of all images on one axis", fused("PackedAttention", &[], &packed)),
        (
            "its mask has an entry for each token",
            fused("MultiHeadAttention", &[], &|graph, x| {
                let ones = (0..TOKENS as i64).map(|token| token % 2).collect::<Vec<_>>();
                [twice(x), vec![None, Some(graph.tensor("mask", Tensor::integers(DataType::I32, &[1, TOKENS], &ones)))]]
                    .concat()
            }),
        ),
        (
            "counts the tokens that are attended to",
            fused("MultiHeadAttention", &[], &|graph, x| [twice(x), vec![None, counts(graph)]].concat()),
        ),
    ];
    for (reason, model) in cases {
        let refusal = refusal(&model, "r = 4");
        assert!(refusal.contains(reason), "{refusal}, not {reason}");
    }
}

#[test]
fn a_bias_of_fused_attention_follows_the_anchors() {
    let biased = fused("Attention", &[], &|graph, x| {
        let dims = [1, 2, TOKENS, TOKENS];
        let table = graph.tensor("table", Tensor::f32s(&dims, &noise(dims.iter().product())));
        [packed(graph, x), vec![None, None, Some(table)]].concat()
    });
    merge(&biased, "r = 4").unwrap();
}

#[test]
fn a_mask_with_equal_entries_is_no_obstacle() {
    let masked = fused("Attention", &[], &|graph, x| {
        let ones = graph.tensor("mask", Tensor::integers(DataType::I32, &[1, TOKENS], &[1; TOKENS]));
        [packed(graph, x), vec![Some(ones)]].concat()
    });
    merge(&masked, "r = 4").unwrap();
}

/// Two blocks of attention in integers; `wide` gives the stream a scale for each channel.
fn quantised(wide: bool) -> Model {
    let dims = [DimSpec::Named("batch".into()), DimSpec::Known(3), DimSpec::Known(16), DimSpec::Known(16)];
    let mut graph = GraphBuilder::new();
    let image = graph.input("image", Some(&TensorType { dtype: DataType::F32, dims: Some(dims.to_vec()) }));
    let ones = |dims: &[usize]| Tensor::f32s(dims, &vec![0.5; dims.iter().product()]);
    let kernel = graph.initializer("kernel", ones(&[WIDTH, 3, 4, 4]));
    let patches = graph.op("Conv", "patches", &[image, kernel], &[("strides", Attribute::Ints(vec![4, 4]))]);
    let shape = graph.initializer("shape", Tensor::shape(&[0, WIDTH as i64, -1]));
    let flat = graph.op("Reshape", "flat", &[patches, shape], &[]);
    let x = graph.op("Transpose", "tokens", &[flat], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let scale = graph.initializer("scale", Tensor::f32(0.1));
    let zero = graph.initializer("zero", Tensor::integers(DataType::U8, &[], &[128]));
    let many = |dtype: DataType, n: i64| Tensor::integers(dtype, &[WIDTH], &[n; WIDTH]);
    let each = [graph.initializer("scales", ones(&[WIDTH])), graph.initializer("zeros", many(DataType::U8, 128))];
    let mut stream = graph.op("QuantizeLinear", "quantised", &[x, scale, zero], &[]);
    let weights = graph.initializer("weights", Tensor::integers(DataType::U8, &[WIDTH, WIDTH], &[7; WIDTH * WIDTH]));
    let axis = graph.initializer("head_axis", Tensor::shape(&[1]));
    for block in 0..2 {
        let product = |graph: &mut GraphBuilder, a: ValueId, b: ValueId| {
            graph.op("QLinearMatMul", "product", &[a, scale, zero, b, scale, zero, scale, zero], &[])
        };
        let [q, k, v] = [0, 1, 2].map(|_| {
            let flat = product(&mut graph, stream, weights);
            graph.op("Unsqueeze", "heads", &[flat, axis], &[])
        });
        let k = graph.op("Transpose", "k", &[k], &[("perm", Attribute::Ints(vec![0, 1, 3, 2]))]);
        let scores = product(&mut graph, q, k);
        let contrib = |graph: &mut GraphBuilder, op: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]| {
            let inputs = inputs.iter().copied().map(Some).collect();
            graph.call(OpType::of("com.microsoft", op), "v", inputs, attributes, 1)[0]
        };
        let version = [("axis", Attribute::Int(-1)), ("opset", Attribute::Int(13))];
        let softmax = contrib(&mut graph, "QLinearSoftmax", &[scores, scale, zero, scale, zero], &version);
        let mixed = product(&mut graph, softmax, v);
        let joined = graph.op("Squeeze", "joined", &[mixed, axis], &[]);
        let [to_scale, to_zero] = if wide && block == 0 { each } else { [scale, zero] };
        let operands = [stream, scale, zero, joined, scale, zero, to_scale, to_zero];
        stream = contrib(&mut graph, "QLinearAdd", &operands, &[]);
    }
    let x = graph.op("DequantizeLinear", "numbers", &[stream, scale, zero], &[]);
    let out = mean(&mut graph, x);
    graph.output("y", out, None);
    graph.into_model(8, &[("", 17), ("com.microsoft", 1)], Vec::new())
}

#[test]
fn integers_are_merged_as_the_numbers_they_stand_for() {
    let merged = merge(&quantised(false), "r = [4, 0]").unwrap();
    let graph = merged.graph();
    let (_, call) = graph.nodes().find(|(_, node)| node.op.name == "TokenMerge").unwrap();
    let producer = |slot: usize| graph.node(graph.producer(call.input(slot).unwrap()).unwrap().0);
    assert!(producer(0).is("DequantizeLinear"));
    let readers = graph.value(call.output(0).unwrap()).uses();
    assert!(readers.iter().all(|used| graph.node(used.node).is("QuantizeLinear")));
    // The first attention is as it was; the second is of floats, in proportion to sizes.
    assert_eq!((count(&merged, "QLinearSoftmax"), count(&merged, "Softmax"), count(&merged, "Log")), (1, 1, 1));
    assert_eq!(count(&merge(&quantised(false), "r = [4, 0]\nproportional = false").unwrap(), "QLinearSoftmax"), 2);
}

#[test]
fn a_scale_for_each_channel_of_the_stream_is_refused() {
    let reason = refusal(&quantised(true), "r = 4");
    assert!(reason.contains("quantised with several scales"), "{reason}");
}

#[test]
fn attention_without_an_image_is_no_vit() {
    let mut graph = GraphBuilder::new();
    let ty = TensorType { dtype: DataType::F32, dims: Some([2, 7, 8].map(DimSpec::Known).to_vec()) };
    let x = graph.input("embeddings", Some(&ty));
    let transposed = graph.op("Transpose", "t", &[x], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let scores = graph.op("MatMul", "scores", &[x, transposed], &[]);
    let weights = graph.op("Softmax", "weights", &[scores], &[("axis", Attribute::Int(-1))]);
    let mixed = graph.op("MatMul", "mixed", &[weights, x], &[]);
    graph.output("y", mixed, None);
    let reason = refusal(&graph.into_model(8, &[("", 17)], Vec::new()), "r = 1");
    assert!(reason.starts_with("no vision transformer found: "), "{reason}");
}

/// What rewriting with the keys given does to each tower, and what is noted.
fn towers(model: &Model, keys: &str) -> (Vec<(String, Vec<usize>)>, Vec<String>) {
    let recipe = Recipe::parse(&format!("[[pass]]\nkind = \"merge\"\n{keys}")).unwrap();
    let (_, report) = driver::rewrite(model, &recipe, Options::default()).unwrap();
    let left = |tower: &driver::TowerReport| tower.steps.iter().map(|step| step.after()).collect();
    (report.towers.iter().map(|tower| (tower.name.clone(), left(tower))).collect(), report.notes)
}

#[test]
fn every_tower_is_merged_or_the_one_that_is_named() {
    let model = tiny::siamese();
    let [left, right] = ["left", "right"].map(str::to_owned);
    assert_eq!(towers(&model, "r = 2").0, [(left, vec![14, 12]), (right.clone(), vec![14, 12])]);
    assert_eq!(towers(&model, "r = 2\ntower = \"right\"").0, [(right, vec![14, 12])]);
    let (both, one) = (merge(&model, "r = 2").unwrap(), merge(&model, "r = 2\ntower = \"right\"").unwrap());
    assert_eq!((count(&both, "TokenMerge"), count(&one, "TokenMerge")), (4, 2));
    assert_eq!(both.metadata("vitrim.tokens"), Some("left=14,12;right=14,12"));
    assert_eq!(one.metadata("vitrim.tokens"), Some("right=14,12"));
    assert_eq!(
        refusal(&model, "r = 2\ntower = \"middle\""),
        "there is no tower 'middle': the model has 'left', 'right'"
    );
    // One tower after the other, each in its own way.
    let passes = "r = 2\ntower = \"right\"\n[[pass]]\nkind = \"merge\"\nr = [1, 4]\ntower = \"left\"";
    assert_eq!(merge(&model, passes).unwrap().metadata("vitrim.tokens"), Some("left=15,11;right=14,12"));
}

#[test]
fn towers_that_read_one_image_are_numbered() {
    let mut graph = GraphBuilder::new();
    let image = tiny::image(&mut graph, "image");
    let streams = ["a", "b"].map(|name| tiny::tower(&mut graph, name, image, 1));
    let y = tiny::sum_of_means(&mut graph, streams);
    let (merged, _) = towers(&tiny::model(graph, y), "r = 2");
    assert_eq!(merged, [("image#1".to_owned(), vec![14]), ("image#2".to_owned(), vec![14])]);
}

#[test]
fn towers_on_the_same_tokens_are_apart() {
    let mut graph = GraphBuilder::new();
    let image = tiny::image(&mut graph, "image");
    let tokens = tiny::tokens(&mut graph, "tokens", image);
    let streams = ["a", "b"].map(|name| tiny::block(&mut graph, name, tokens));
    let y = tiny::sum_of_means(&mut graph, streams);
    let (merged, notes) = towers(&tiny::model(graph, y), "r = 2");
    assert_eq!(merged, [("image#1".to_owned(), vec![14]), ("image#2".to_owned(), vec![14])], "{notes:?}");
}

#[test]
fn tokens_of_two_towers_in_one_output_are_restored() {
    let mut graph = GraphBuilder::new();
    let images = ["left", "right"].map(|name| tiny::image(&mut graph, name));
    let streams = [("a", images[0]), ("b", images[1])].map(|(name, image)| tiny::tower(&mut graph, name, image, 1));
    let y = graph.op("Concat", "all", &streams, &[("axis", Attribute::Int(1))]);
    let model = tiny::model(graph, y);
    assert_eq!(count(&merge(&model, "r = 2").unwrap(), "TokenRestore"), 2);
}

#[test]
fn a_tower_that_cannot_be_merged_is_left_and_named() {
    let mut graph = GraphBuilder::new();
    let images = ["left", "right"].map(|name| tiny::image(&mut graph, name));
    let left = tiny::tower(&mut graph, "left", images[0], 2);
    // Between its blocks the tokens change places, which nothing is known of.
    let right = tiny::tower(&mut graph, "right", images[1], 1);
    let places = graph.initializer("places", Tensor::shape(&(0..TOKENS as i64).rev().collect::<Vec<_>>()));
    let right = graph.op("Gather", "turned", &[right, places], &[("axis", Attribute::Int(1))]);
    let right = tiny::block(&mut graph, "right/1", right);
    let y = tiny::sum_of_means(&mut graph, [left, right]);
    let model = tiny::model(graph, y);
    let (merged, notes) = towers(&model, "r = 2");
    assert_eq!(merged, [("left".to_owned(), vec![14, 12])]);
    let [note] = notes.as_slice() else { panic!("{notes:?}") };
    assert!(note.starts_with("the tower 'right' is left as it is: the tokens cannot be regrouped: "), "{note}");
    assert!(refusal(&model, "r = 2\ntower = \"right\"").starts_with("the tokens cannot be regrouped: "));
    // What fits neither is refused.
    assert_eq!(refusal(&model, "r = [1, 1, 1]"), "r names 3 blocks, the model has 2");
}

#[test]
fn a_crowd_of_attentions_is_no_vit() {
    let mut graph = GraphBuilder::new();
    let image = tiny::image(&mut graph, "image");
    let streams: Vec<ValueId> = (0..65).map(|number| tiny::tower(&mut graph, &format!("{number}"), image, 1)).collect();
    let y = graph.op("Sum", "sum", &streams, &[]);
    let reason = refusal(&tiny::model(graph, y), "r = 1");
    assert_eq!(reason, "no vision transformer found: 65 attentions read images and have nothing to do with each other");
}

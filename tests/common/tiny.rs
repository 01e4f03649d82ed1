//! Vision Transformers as small as they can be: one head, no norms, no MLP.

// Every test file is a crate of its own and uses its part of this.
#![allow(dead_code)]

use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, Tensor, TensorType, ValueId};

pub const TOKENS: usize = 16;
pub const WIDTH: usize = 8;

/// An input of images.
pub fn image(graph: &mut GraphBuilder, name: &str) -> ValueId {
    let fixed = [3, 16, 16].map(DimSpec::Known);
    let dims = std::iter::once(DimSpec::Named("batch".into())).chain(fixed).collect();
    graph.input(name, Some(&TensorType { dtype: DataType::F32, dims: Some(dims) }))
}

/// Weights that look random; others for every name.
fn noise(name: &str, n: usize) -> Vec<f32> {
    let seed: usize = name.bytes().map(usize::from).sum();
    (0..n).map(|i| (((i + seed) * 37 % 101) as f32 - 50.0) / 100.0).collect()
}

/// The patches of images, as tokens.
pub fn tokens(graph: &mut GraphBuilder, name: &str, image: ValueId) -> ValueId {
    let kernel = Tensor::f32s(&[WIDTH, 3, 4, 4], &noise(name, WIDTH * 48));
    let kernel = graph.initializer(&format!("{name}/kernel"), kernel);
    let strides = [("strides", Attribute::Ints(vec![4, 4]))];
    let patches = graph.op("Conv", &format!("{name}/patches"), &[image, kernel], &strides);
    let shape = graph.initializer(&format!("{name}/shape"), Tensor::shape(&[0, WIDTH as i64, -1]));
    let flat = graph.op("Reshape", &format!("{name}/flat"), &[patches, shape], &[]);
    graph.op("Transpose", &format!("{name}/tokens"), &[flat], &[("perm", Attribute::Ints(vec![0, 2, 1]))])
}

/// One block: attention, and its residual sum.
pub fn block(graph: &mut GraphBuilder, name: &str, x: ValueId) -> ValueId {
    let project = |graph: &mut GraphBuilder, what: &str| {
        let name = format!("{name}/{what}");
        let weight = Tensor::f32s(&[WIDTH, WIDTH], &noise(&name, WIDTH * WIDTH));
        let weight = graph.initializer(&format!("{name}/weight"), weight);
        let y = graph.op("MatMul", &format!("{name}/flat"), &[x, weight], &[]);
        let axis = graph.initializer(&format!("{name}/axis"), Tensor::shape(&[1]));
        graph.op("Unsqueeze", &format!("{name}/heads"), &[y, axis], &[])
    };
    let [q, k, v] = ["q", "k", "v"].map(|what| project(graph, what));
    let order = [("perm", Attribute::Ints(vec![0, 1, 3, 2]))];
    let k = graph.op("Transpose", &format!("{name}/k/transposed"), &[k], &order);
    let scores = graph.op("MatMul", &format!("{name}/scores"), &[q, k], &[]);
    let weights = graph.op("Softmax", &format!("{name}/weights"), &[scores], &[("axis", Attribute::Int(-1))]);
    let mixed = graph.op("MatMul", &format!("{name}/mixed"), &[weights, v], &[]);
    let axis = graph.initializer(&format!("{name}/head_axis"), Tensor::shape(&[1]));
    let mixed = graph.op("Squeeze", &format!("{name}/joined"), &[mixed, axis], &[]);
    graph.op("Add", &format!("{name}/stream"), &[x, mixed], &[])
}

/// A Vision Transformer of `depth` blocks: the tokens that leave the last one.
pub fn tower(graph: &mut GraphBuilder, name: &str, image: ValueId, depth: usize) -> ValueId {
    let x = tokens(graph, name, image);
    (0..depth).fold(x, |x, number| block(graph, &format!("{name}/{number}"), x))
}

/// The mean over tokens of a stream.
pub fn mean(graph: &mut GraphBuilder, x: ValueId) -> ValueId {
    graph.op("ReduceMean", "mean", &[x], &[("axes", Attribute::Ints(vec![1])), ("keepdims", Attribute::Int(0))])
}

/// What two streams hold on average, added up.
pub fn sum_of_means(graph: &mut GraphBuilder, streams: [ValueId; 2]) -> ValueId {
    let means = streams.map(|x| mean(graph, x));
    graph.op("Add", "sum", &means, &[])
}

/// The model that gives `y`.
pub fn model(mut graph: GraphBuilder, y: ValueId) -> Model {
    graph.output("y", y, Some(&TensorType { dtype: DataType::F32, dims: None }));
    graph.into_model(8, &[("", 17)], Vec::new())
}

/// Two images, a tower of two blocks for each; their attentions take turns. The sum of what they see is the output.
pub fn siamese() -> Model {
    let mut graph = GraphBuilder::new();
    let images = ["left", "right"].map(|name| (name, image(&mut graph, name)));
    let mut streams = images.map(|(name, image)| (name, tokens(&mut graph, name, image)));
    for number in 0..2 {
        streams = streams.map(|(name, x)| (name, block(&mut graph, &format!("{name}/{number}"), x)));
    }
    let y = sum_of_means(&mut graph, streams.map(|(_, x)| x));
    model(graph, y)
}

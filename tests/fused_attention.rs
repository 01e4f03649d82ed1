//! One ViT written with every fused operator that vitrim knows: with the same weights, all of them merge to what the
//! decomposed one merges to.

mod common;

use common::{Scratch, conclude, constant, images, merge, ort, relative, try_run};
use vitrim::runtime::Feeds;
use vitrim::tensor::Tensor as Array;
use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, Tensor, TensorType, ValueId};
use vitrim_passes::recipe::{MergeSpec, RSpec};

const BLOCKS: usize = 3;
const HEADS: i64 = 3;
const WIDTH: i64 = 24;
const CHANNELS: i64 = WIDTH / HEADS;
/// 6 × 6 patches.
const TOKENS: i64 = 36;
/// Tokens to merge in every block.
const R: usize = 8;

/// Another operator adds in another order.
const TOLERANCE: f64 = 1e-5;
/// Where tokens are rounded to 8 bits, a rounding of float32 may move one by a step of 255.
const COARSE_TOLERANCE: f64 = 2e-2;
/// What merging must change, for the comparison to have teeth.
const LEAST_CHANGE: f64 = 1e-2;

const MICROSOFT: &str = "com.microsoft";

/// How attention is written.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    Decomposed,
    /// The same, with projections that went through 8 bits.
    Rounded,
    /// The standard operator, with heads on an axis of their own or with the channels.
    Standard {
        heads_apart: bool,
    },
    /// `MultiHeadAttention`: with a constant bias, one that is computed, or keys and values with an axis of heads.
    MultiHead(Projected),
    /// `Attention` of ONNX Runtime: with a constant matrix, or one that is computed.
    Packed {
        computed: bool,
    },
    /// The same with an attention bias whose entries are equal.
    PackedBiased,
    /// `QAttention`.
    Quantized,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Projected {
    ConstantBias,
    ComputedBias,
    HeadsApart,
}

/// How sums and norms are written.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Norms {
    Plain,
    /// Sum and norm in one operator.
    Skip,
    /// The same without a mean to take off.
    SkipSimplified,
    /// The norm alone goes on.
    Post,
}

struct Writer {
    graph: GraphBuilder,
    norms: Norms,
}

impl Writer {
    /// Weights of a mean of zero that depend on the name alone.
    fn weight(&mut self, name: &str, dims: &[i64], scale: f32) -> ValueId {
        let values = noise(name, dims, scale);
        let dims: Vec<usize> = dims.iter().map(|&extent| extent as usize).collect();
        self.graph.tensor(name, Tensor::f32s(&dims, &values))
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.tensor("ints", Tensor::shape(values))
    }

    fn op(&mut self, name: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        self.graph.op(name, &name.to_lowercase(), inputs, attributes)
    }

    fn microsoft(
        &mut self,
        name: &str,
        inputs: &[Option<ValueId>],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let op = OpType::of(MICROSOFT, name);
        self.graph.call(op, &name.to_lowercase(), inputs.to_vec(), attributes, results)
    }

    /// A value that is the same at run time, but no constant.
    fn computed(&mut self, value: ValueId) -> ValueId {
        let one = self.graph.tensor("one", Tensor::f32(1.0));
        self.op("Mul", &[value, one], &[])
    }

    fn norm(&mut self, x: ValueId, gain: ValueId, shift: ValueId) -> ValueId {
        let epsilon = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(1e-6))];
        match self.norms {
            Norms::SkipSimplified => self.op("SimplifiedLayerNormalization", &[x, gain], &epsilon),
            _ => self.op("LayerNormalization", &[x, gain, shift], &epsilon),
        }
    }

    /// The sum of a stream and what a branch adds to it, and the norm of the sum.
    fn sum_and_norm(&mut self, name: &str, stream: ValueId, branch: ValueId) -> (ValueId, ValueId) {
        let [gain, shift, bias] =
            ["gain", "shift", "bias"].map(|part| self.weight(&format!("{name}/{part}"), &[WIDTH], 0.3));
        let one = self.graph.tensor("one", Tensor::f32(1.0));
        let gain = self.op("Add", &[gain, one], &[]);
        let epsilon = [("epsilon", Attribute::Float(1e-6))];
        let (x, y) = (Some(stream), Some(branch));
        match self.norms {
            Norms::Plain => {
                let branch = self.op("Add", &[branch, bias], &[]);
                let sum = self.op("Add", &[stream, branch], &[]);
                (sum, self.norm(sum, gain, shift))
            }
            Norms::Skip => {
                let operands = [y, x, Some(gain), Some(shift), Some(bias)];
                let results = self.microsoft("SkipLayerNormalization", &operands, &epsilon, 4);
                (results[3], results[0])
            }
            Norms::SkipSimplified => {
                let branch = self.op("Add", &[branch, bias], &[]);
                let operands = [Some(branch), x, Some(gain)];
                let results = self.microsoft("SkipSimplifiedLayerNormalization", &operands, &epsilon, 4);
                (results[3], results[0])
            }
            Norms::Post => {
                let operands = [y, x, Some(gain), Some(shift), Some(bias)];
                let norm = self.microsoft("SkipLayerNormalization", &operands, &epsilon, 1)[0];
                (norm, norm)
            }
        }
    }

    /// Tokens at their positions, and what the first block reads of them.
    fn first_norm(&mut self, tokens: ValueId, positions: ValueId) -> (ValueId, ValueId) {
        let [gain, shift] = ["gain", "shift"].map(|part| self.weight(&format!("first/{part}"), &[WIDTH], 1.0));
        if self.norms == Norms::Skip {
            let operands = [tokens, positions, gain, shift].map(Some);
            let epsilon = [("epsilon", Attribute::Float(1e-6))];
            let results = self.microsoft("SkipLayerNormalization", &operands, &epsilon, 4);
            return (results[3], results[0]);
        }
        let stream = self.op("Add", &[tokens, positions], &[]);
        (stream, if self.norms == Norms::Post { stream } else { self.norm(stream, gain, shift) })
    }

    fn by_heads(&mut self, x: ValueId) -> ValueId {
        let shape = self.ints(&[0, 0, HEADS, CHANNELS]);
        let split = self.op("Reshape", &[x, shape], &[]);
        self.op("Transpose", &[split], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))])
    }

    fn joined(&mut self, x: ValueId) -> ValueId {
        let joined = self.op("Transpose", &[x], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))]);
        let shape = self.ints(&[0, 0, WIDTH]);
        self.op("Reshape", &[joined, shape], &[])
    }

    fn attention(&mut self, name: &str, x: ValueId, form: Form) -> ValueId {
        let heads = [("num_heads", Attribute::Int(HEADS))];
        let names = ["q", "k", "v"].map(|part| format!("{name}/{part}"));
        let row: Vec<f32> = names.iter().flat_map(|name| noise(&format!("{name}_bias"), &[WIDTH], 1.0)).collect();
        let row = self.graph.tensor(&format!("{name}/row"), Tensor::f32s(&[3 * WIDTH as usize], &row));
        match form {
            Form::Packed { .. } | Form::PackedBiased => {
                let matrix = self.packed(&names);
                let matrix = self.graph.tensor("packed", Tensor::f32s(&[WIDTH as usize, 3 * WIDTH as usize], &matrix));
                let matrix = if form == (Form::Packed { computed: true }) { self.computed(matrix) } else { matrix };
                let mut operands = vec![Some(x), Some(matrix), Some(row)];
                if form == Form::PackedBiased {
                    let tokens = TOKENS as usize;
                    let equal = vec![0.25; HEADS as usize * tokens * tokens];
                    let equal = Tensor::f32s(&[1, HEADS as usize, tokens, tokens], &equal);
                    operands.extend([None, None, Some(self.graph.tensor("equal", equal))]);
                }
                return self.microsoft("Attention", &operands, &heads, 1)[0];
            }
            Form::Quantized => {
                let (matrix, scale) = self.rounded(&names);
                let [scale, zero] = [self.graph.tensor("scale", Tensor::f32(scale)), self.zero()];
                let tokens = self.quantized(x);
                let operands = [tokens[0], matrix, row, tokens[1], scale].map(Some);
                let operands = [&operands[..], &[None, Some(tokens[2]), Some(zero)]].concat();
                return self.microsoft("QAttention", &operands, &heads, 1)[0];
            }
            _ => {}
        }
        let biased = !matches!(form, Form::MultiHead(Projected::ConstantBias | Projected::ComputedBias));
        let parts =
            if form == Form::Rounded { self.rounded_projections(&names, x) } else { self.projections(&names, x) };
        let rows = names.map(|name| self.weight(&format!("{name}_bias"), &[WIDTH], 1.0));
        let mut part = 0..3;
        let [q, k, v] = parts.map(|projected| {
            let row = rows[part.next().expect("three parts")];
            if biased { self.op("Add", &[projected, row], &[]) } else { projected }
        });
        match form {
            Form::MultiHead(Projected::HeadsApart) => {
                let [k, v] = [k, v].map(|operand| self.by_heads(operand));
                self.microsoft("MultiHeadAttention", &[q, k, v].map(Some), &heads, 1)[0]
            }
            Form::MultiHead(projected) => {
                let row = if projected == Projected::ComputedBias { self.computed(row) } else { row };
                self.microsoft("MultiHeadAttention", &[q, k, v, row].map(Some), &heads, 1)[0]
            }
            Form::Standard { heads_apart: false } => {
                let heads = ["q_num_heads", "kv_num_heads"].map(|name| (name, Attribute::Int(HEADS)));
                self.op("Attention", &[q, k, v], &heads)
            }
            Form::Standard { heads_apart: true } => {
                let operands = [q, k, v].map(|operand| self.by_heads(operand));
                let mixed = self.op("Attention", &operands, &[]);
                self.joined(mixed)
            }
            _ => {
                let [q, k, v] = [q, k, v].map(|operand| self.by_heads(operand));
                let keys = self.op("Transpose", &[k], &[("perm", Attribute::Ints(vec![0, 1, 3, 2]))]);
                let scores = self.op("MatMul", &[q, keys], &[]);
                let scale = self.graph.tensor("scale", Tensor::f32((CHANNELS as f32).sqrt().recip()));
                let scores = self.op("Mul", &[scores, scale], &[]);
                let weights = self.op("Softmax", &[scores], &[("axis", Attribute::Int(-1))]);
                let mixed = self.op("MatMul", &[weights, v], &[]);
                self.joined(mixed)
            }
        }
    }

    fn projections(&mut self, names: &[String; 3], x: ValueId) -> [ValueId; 3] {
        names.each_ref().map(|name| {
            let matrix = self.weight(name, &[WIDTH, WIDTH], 0.6);
            self.op("MatMul", &[x, matrix], &[])
        })
    }

    /// The same of tokens and matrices that went through 8 bits.
    fn rounded_projections(&mut self, names: &[String; 3], x: ValueId) -> [ValueId; 3] {
        let tokens = self.quantized(x);
        let tokens = self.op("DequantizeLinear", &tokens, &[]);
        let (matrix, scale) = self.rounded(names);
        let scale = self.graph.tensor("scale", Tensor::f32(scale));
        let matrix = self.op("DequantizeLinear", &[matrix, scale], &[]);
        let projected = self.op("MatMul", &[tokens, matrix], &[]);
        let widths = self.ints(&[WIDTH; 3]);
        let op = OpType::standard("Split");
        let parts =
            self.graph.call(op, "parts", vec![Some(projected), Some(widths)], &[("axis", Attribute::Int(2))], 3);
        parts.try_into().expect("three parts")
    }

    /// Tokens in 8 bits, their scale and their zero.
    fn quantized(&mut self, x: ValueId) -> Vec<ValueId> {
        self.graph.call(OpType::standard("DynamicQuantizeLinear"), "tokens", vec![Some(x)], &[], 3)
    }

    /// The packed matrix in 7 bits around zero, and its scale: with 8, sums of two products overflow on CPUs without
    /// instructions for such products.
    fn rounded(&mut self, names: &[String; 3]) -> (ValueId, f32) {
        let matrix = self.packed(names);
        let scale = matrix.iter().fold(0f32, |largest, x| largest.max(x.abs())) / 63.0;
        let rounded: Vec<i64> = matrix.iter().map(|x| (x / scale).round() as i64).collect();
        let rounded = Tensor::integers(DataType::I8, &[WIDTH as usize, 3 * WIDTH as usize], &rounded);
        (self.graph.tensor("matrix", rounded), scale)
    }

    fn zero(&mut self) -> ValueId {
        self.graph.tensor("zero", Tensor::integers(DataType::I8, &[], &[0]))
    }

    /// The matrices of queries, keys and values beside each other.
    fn packed(&self, names: &[String; 3]) -> Vec<f32> {
        let matrices = names.each_ref().map(|name| noise(name, &[WIDTH, WIDTH], 0.6));
        let row = |at: usize| matrices.iter().flat_map(move |matrix| &matrix[at * WIDTH as usize..][..WIDTH as usize]);
        (0..WIDTH as usize).flat_map(row).copied().collect()
    }

    fn perceptron(&mut self, name: &str, x: ValueId) -> ValueId {
        let [up, down] = [("up", [WIDTH, 2 * WIDTH]), ("down", [2 * WIDTH, WIDTH])]
            .map(|(part, dims)| self.weight(&format!("{name}/{part}"), &dims, 0.4));
        let hidden = self.op("MatMul", &[x, up], &[]);
        let hidden = self.op("Tanh", &[hidden], &[]);
        self.op("MatMul", &[hidden, down], &[])
    }
}

/// Numbers of a mean of zero that depend on the name alone.
fn noise(name: &str, dims: &[i64], scale: f32) -> Vec<f32> {
    let mut state = name
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15u64, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / 8_388_608.0 - 1.0) * scale
    };
    (0..dims.iter().product::<i64>()).map(|_| next()).collect()
}

fn vit(form: Form, norms: Norms) -> Model {
    let ty = |dims: &[i64]| {
        let named = std::iter::once(DimSpec::Named("batch".into()));
        TensorType { dtype: DataType::F32, dims: Some(named.chain(dims.iter().map(|&n| DimSpec::Known(n))).collect()) }
    };
    let mut writer = Writer { graph: GraphBuilder::new(), norms };
    let image = writer.graph.input("image", Some(&ty(&[3, 24, 24])));
    let kernel = writer.weight("kernel", &[WIDTH, 3, 4, 4], 0.3);
    let patches = writer.op("Conv", &[image, kernel], &[("strides", Attribute::Ints(vec![4, 4]))]);
    let shape = writer.ints(&[0, WIDTH, -1]);
    let flat = writer.op("Reshape", &[patches, shape], &[]);
    let tokens = writer.op("Transpose", &[flat], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let positions = writer.weight("positions", &[TOKENS, WIDTH], 0.5);
    let (mut stream, mut norm) = writer.first_norm(tokens, positions);
    for block in 0..BLOCKS {
        let mixed = writer.attention(&format!("{block}/attention"), norm, form);
        (stream, norm) = writer.sum_and_norm(&format!("{block}/middle"), stream, mixed);
        let added = writer.perceptron(&format!("{block}/mlp"), norm);
        (stream, norm) = writer.sum_and_norm(&format!("{block}/end"), stream, added);
    }
    let axes = [("axes", Attribute::Ints(vec![1])), ("keepdims", Attribute::Int(0))];
    let opset = if matches!(form, Form::Standard { .. }) { 23 } else { 17 };
    let mean = if opset < 18 {
        writer.op("ReduceMean", &[norm], &axes)
    } else {
        let along = writer.ints(&[1]);
        writer.op("ReduceMean", &[norm, along], &axes[1..])
    };
    writer.graph.output("y", mean, Some(&ty(&[WIDTH])));
    writer.graph.into_model(if opset < 23 { 8 } else { 10 }, &[("", opset), (MICROSOFT, 1)], Vec::new())
}

/// Two images.
fn feeds() -> Feeds {
    let pixels = noise("pixels", &[2, 3, 24, 24], 2.0).into_iter().map(f64::from).collect();
    let pixels = ndarray::ArrayD::from_shape_vec(vec![2, 3, 24, 24], pixels).expect("so many pixels");
    std::iter::once(("image".to_owned(), Array::from_f64(vitrim::tensor::DType::F32, &pixels))).collect()
}

/// Merges in every block; with tokens in 8 bits in the first alone, where both sides have the same ones: behind it, one
/// that is a step away may be merged with another.
fn schedule(form: Form) -> MergeSpec {
    match form {
        Form::Rounded | Form::Quantized => MergeSpec { r: Some(RSpec::PerBlock(vec![R])), ..MergeSpec::default() },
        _ => constant(R),
    }
}

#[test]
fn all_forms_merge_alike() {
    let scratch = Scratch::new("forms");
    let backend = ort();
    let feeds = feeds();
    let run = |name: &str, model: &Model| {
        try_run(backend.as_ref(), &scratch.save(name, model), &feeds)
            .map(|outputs| outputs.get("y").expect("y").clone())
    };
    let forms = [
        Form::Standard { heads_apart: true },
        Form::Standard { heads_apart: false },
        Form::MultiHead(Projected::ConstantBias),
        Form::MultiHead(Projected::ComputedBias),
        Form::MultiHead(Projected::HeadsApart),
        Form::Packed { computed: false },
        Form::Packed { computed: true },
        Form::PackedBiased,
        Form::Quantized,
    ];
    let (mut count, mut failures) = (0, Vec::new());
    for norms in [Norms::Plain, Norms::Skip, Norms::SkipSimplified, Norms::Post] {
        let references = [Form::Decomposed, Form::Rounded].map(|form| {
            let reference = vit(form, norms);
            let (merged, _) = merge(&reference, schedule(form)).expect("it merges");
            let outputs = [reference, merged].map(|model| run("reference", &model).expect("it runs"));
            assert!(relative(&outputs[0], &outputs[1]) > LEAST_CHANGE, "merging changes nothing");
            outputs
        });
        for form in forms {
            count += 1;
            let case = format!("{form:?}, {norms:?}");
            let model = vit(form, norms);
            let (fused, report) = merge(&model, schedule(form)).unwrap_or_else(|refusal| panic!("{case}: {refusal}"));
            let split = form == Form::Quantized;
            assert_eq!(report.notes.iter().any(|note| note.contains("was split")), split, "{case}");
            let tolerance = if split { COARSE_TOLERANCE } else { TOLERANCE };
            let [whole, merged] = &references[usize::from(split)];
            for (what, expected, model) in [("whole", whole, &model), ("merged", merged, &fused)] {
                match run("form", model) {
                    Ok(y) if relative(expected, &y) <= tolerance => {}
                    Ok(y) => failures.push(format!("{case}: {what} is {:e} off", relative(expected, &y))),
                    Err(reason) => failures.push(format!("{case}: {what}: {reason}")),
                }
            }
        }
    }
    conclude("forms", count, &failures);
}

/// Sum and norm in one operator merge to what they merge to apart, and batches do not matter.
#[test]
fn a_sum_with_its_norm_merges_as_both_apart() {
    let scratch = Scratch::new("norms");
    let backend = ort();
    let both = feeds();
    let one = images(&both, 1, 2);
    let path = |norms: Norms| {
        let (merged, _) = merge(&vit(Form::Decomposed, norms), constant(R)).expect("it merges");
        scratch.save(&format!("{norms:?}"), &merged)
    };
    let run = |path: &std::path::Path, feeds: &Feeds| {
        try_run(backend.as_ref(), path, feeds).expect("it runs").get("y").expect("y").clone()
    };
    let (plain, skip) = (path(Norms::Plain), path(Norms::Skip));
    let (expected, got) = (run(&plain, &both), run(&skip, &both));
    assert!(relative(&expected, &got) <= TOLERANCE, "{:e}", relative(&expected, &got));
    assert!(relative(&expected.rows(1, 2).expect("two rows"), &run(&skip, &one)) <= TOLERANCE);
}

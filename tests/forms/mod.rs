//! One ViT written with every fused operator that vitrim knows, all of the same weights.

// The test that compares what forms compute and the example that compares how fast they are use a part each.
#![allow(dead_code)]

use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, Tensor, TensorType, ValueId};

const MICROSOFT: &str = "com.microsoft";
/// Classes of the head.
const CLASSES: i64 = 10;
/// The gain of projections: large enough for attention to prefer some tokens.
const PROJECTION: f32 = 3.0;

/// What the ViT is, however it is written. Extents are `i64` because that is what shapes are made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Pixels along each side of an image.
    pub image: i64,
    /// Pixels along each side of a patch.
    pub patch: i64,
    pub width: i64,
    pub heads: i64,
    pub depth: i64,
    /// Channels within the perceptrons, as a multiple of the width.
    pub expansion: i64,
    /// Whether the head reads the mean of all tokens, and not the class token.
    pub pooled: bool,
    /// What becomes of the products of queries and keys.
    pub scores: Scores,
}

/// What becomes of the products of queries and keys: scaled, capped, biased.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scores {
    /// What they are multiplied with; the usual where not given.
    pub scale: Option<f32>,
    pub cap: Option<f32>,
    pub bias: Bias,
}

impl Scores {
    /// Scaled, as usual.
    pub const PLAIN: Self = Self { scale: None, cap: None, bias: Bias::None };
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Bias {
    None,
    /// A number for each head and pair of tokens.
    Table,
    /// Each token sees two thirds of the others, the class token among them; a mask of booleans where the operator takes
    /// one.
    Mask,
}

impl Plan {
    /// Patches and the class token.
    pub fn tokens(&self) -> i64 {
        (self.image / self.patch).pow(2) + 1
    }

    /// The shape of one image.
    pub fn image_shape(&self) -> [i64; 3] {
        [3, self.image, self.image]
    }
}

/// How attention is written.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Form {
    Decomposed,
    /// The same, with projections that went through 8 bits.
    Rounded,
    /// The standard operator, with heads on an axis of their own or with the channels.
    Standard {
        heads_apart: bool,
    },
    /// The same with one head of keys and values for all of the queries.
    Shared,
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
    /// Two attentions that read the same tokens, whose results are added; or one with the heads of both.
    Two {
        joint: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Projected {
    ConstantBias,
    ComputedBias,
    HeadsApart,
}

/// How sums and norms are written.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Norms {
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
    plan: Plan,
    norms: Norms,
}

impl Writer {
    /// Weights of a mean of zero that depend on the name alone.
    fn weight(&mut self, name: &str, dims: &[i64], scale: f32) -> ValueId {
        let values = noise(name, dims, scale);
        let dims: Vec<usize> = dims.iter().map(|&extent| extent as usize).collect();
        self.graph.tensor(name, Tensor::f32s(&dims, &values))
    }

    /// A matrix for `dims[0]` channels of size one, whose results are of size `gain`.
    fn matrix(&mut self, name: &str, dims: [i64; 2], gain: f32) -> ValueId {
        self.weight(name, &dims, spread(dims[0], gain))
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
            ["gain", "shift", "bias"].map(|part| self.weight(&format!("{name}/{part}"), &[self.plan.width], 0.3));
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
        let [gain, shift] =
            ["gain", "shift"].map(|part| self.weight(&format!("first/{part}"), &[self.plan.width], 1.0));
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
        let head_dim = self.plan.width / self.plan.heads;
        let shape = self.ints(&[0, 0, -1, head_dim]);
        let split = self.op("Reshape", &[x, shape], &[]);
        self.op("Transpose", &[split], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))])
    }

    fn joined(&mut self, x: ValueId) -> ValueId {
        let joined = self.op("Transpose", &[x], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))]);
        let shape = self.ints(&[0, 0, self.plan.width]);
        self.op("Reshape", &[joined, shape], &[])
    }

    /// What is added to the scores, `[1, H, N, N]`; as a mask in booleans where the operator takes one.
    fn scores_bias(&mut self, name: &str, booleans: bool) -> Option<ValueId> {
        let [heads, tokens] = [self.plan.heads, self.plan.tokens()].map(|extent| extent as usize);
        let dims = [1, heads, tokens, tokens];
        let sees = |at: usize| {
            let (row, column) = (at / tokens % tokens, at % tokens);
            column == 0 || row.abs_diff(column) % 3 != 2
        };
        let pairs = || (0..heads * tokens * tokens).map(sees);
        let bias = match self.plan.scores.bias {
            Bias::None => return None,
            Bias::Table => {
                let name = format!("{name}/bias");
                return Some(self.weight(&name, &dims.map(|extent| extent as i64), 2.0));
            }
            Bias::Mask if booleans => {
                Tensor::integers(DataType::Bool, &dims, &pairs().map(i64::from).collect::<Vec<_>>())
            }
            Bias::Mask => {
                let open = |sees: bool| if sees { 0.0 } else { f32::NEG_INFINITY };
                Tensor::f32s(&dims, &pairs().map(open).collect::<Vec<_>>())
            }
        };
        Some(self.graph.tensor(&format!("{name}/mask"), bias))
    }

    fn attention(&mut self, name: &str, x: ValueId, form: Form) -> ValueId {
        let Plan { width, heads: count, scores: Scores { scale, cap, .. }, .. } = self.plan;
        let scaled = scale.map(|scale| ("scale", Attribute::Float(scale)));
        let heads: Vec<_> = [("num_heads", Attribute::Int(count))].into_iter().chain(scaled.clone()).collect();
        let bias = self.scores_bias(name, matches!(form, Form::Standard { .. }));
        let names = ["q", "k", "v"].map(|part| format!("{name}/{part}"));
        let row: Vec<f32> = names.iter().flat_map(|name| noise(&format!("{name}_bias"), &[width], 1.0)).collect();
        let row = self.graph.tensor(&format!("{name}/row"), Tensor::f32s(&[row.len()], &row));
        match form {
            Form::Packed { .. } | Form::PackedBiased => {
                let matrix = self.packed(&names);
                let matrix = self.graph.tensor("packed", Tensor::f32s(&[width as usize, 3 * width as usize], &matrix));
                let matrix = if form == (Form::Packed { computed: true }) { self.computed(matrix) } else { matrix };
                let mut operands = vec![Some(x), Some(matrix), Some(row)];
                if form == Form::PackedBiased {
                    let [heads, tokens] = [count, self.plan.tokens()].map(|extent| extent as usize);
                    let equal = Tensor::f32s(&[1, heads, tokens, tokens], &vec![0.25; heads * tokens * tokens]);
                    operands.extend([None, None, Some(self.graph.tensor("equal", equal))]);
                } else if bias.is_some() {
                    operands.extend([None, None, bias]);
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
        if let Form::Two { joint } = form {
            let sides = ["left", "right"].map(|side| format!("{name}/{side}"));
            return if joint { self.joint(&sides, x) } else { self.side_by_side(&sides, x) };
        }
        let biased = !matches!(form, Form::MultiHead(Projected::ConstantBias | Projected::ComputedBias));
        let parts =
            if form == Form::Rounded { self.rounded_projections(&names, x) } else { self.projections(&names, x) };
        let rows = names.map(|name| self.weight(&format!("{name}_bias"), &[width], 1.0));
        let mut part = 0..3;
        let [q, k, v] = parts.map(|projected| {
            let row = rows[part.next().expect("three parts")];
            if biased { self.op("Add", &[projected, row], &[]) } else { projected }
        });
        match form {
            Form::MultiHead(Projected::HeadsApart) => {
                let [k, v] = [k, v].map(|operand| self.by_heads(operand));
                let operands = [Some(q), Some(k), Some(v), None, None, bias];
                self.microsoft("MultiHeadAttention", &operands, &heads, 1)[0]
            }
            Form::MultiHead(projected) => {
                let row = if projected == Projected::ComputedBias { self.computed(row) } else { row };
                let operands = [Some(q), Some(k), Some(v), Some(row), None, bias];
                self.microsoft("MultiHeadAttention", &operands, &heads, 1)[0]
            }
            Form::Standard { heads_apart } => {
                let counts = ["q_num_heads", "kv_num_heads"].map(|name| (name, Attribute::Int(count)));
                let capped = cap.map(|cap| ("softcap", Attribute::Float(cap)));
                let counts = counts.into_iter().filter(|_| !heads_apart);
                let attributes: Vec<_> = counts.chain(scaled).chain(capped).collect();
                let operands = [q, k, v].map(|operand| if heads_apart { self.by_heads(operand) } else { operand });
                let operands: Vec<ValueId> = operands.into_iter().chain(bias).collect();
                let mixed = self.op("Attention", &operands, &attributes);
                if heads_apart { self.joined(mixed) } else { mixed }
            }
            Form::Shared => {
                let [q, k, v] = [q, k, v].map(|operand| self.by_heads(operand));
                let bounds = [0, 1, 1].map(|bound| self.ints(&[bound]));
                let [k, v] = [k, v].map(|part| self.op("Slice", &[part, bounds[0], bounds[1], bounds[2]], &[]));
                let mixed = self.op("Attention", &[q, k, v], &[]);
                self.joined(mixed)
            }
            _ => {
                let mixed = self.decomposed([q, k, v], bias);
                self.joined(mixed)
            }
        }
    }

    /// Attention in single operators, `[B, H, N, d]`.
    fn decomposed(&mut self, operands: [ValueId; 3], bias: Option<ValueId>) -> ValueId {
        let Plan { width, heads, scores: Scores { scale, cap, .. }, .. } = self.plan;
        let [q, k, v] = operands.map(|operand| self.by_heads(operand));
        let keys = self.op("Transpose", &[k], &[("perm", Attribute::Ints(vec![0, 1, 3, 2]))]);
        let scores = self.op("MatMul", &[q, keys], &[]);
        let scale = scale.unwrap_or(((width / heads) as f32).sqrt().recip());
        let scale = self.graph.tensor("scale", Tensor::f32(scale));
        let mut scores = self.op("Mul", &[scores, scale], &[]);
        if let Some(cap) = cap {
            let cap = self.graph.tensor("cap", Tensor::f32(cap));
            let part = self.op("Div", &[scores, cap], &[]);
            let part = self.op("Tanh", &[part], &[]);
            scores = self.op("Mul", &[part, cap], &[]);
        }
        if let Some(bias) = bias {
            scores = self.op("Add", &[scores, bias], &[]);
        }
        let weights = self.op("Softmax", &[scores], &[("axis", Attribute::Int(-1))]);
        self.op("MatMul", &[weights, v], &[])
    }

    fn side_by_side(&mut self, sides: &[String; 2], x: ValueId) -> ValueId {
        let results = sides.each_ref().map(|side| self.attention(side, x, Form::Decomposed));
        self.op("Add", &results, &[])
    }

    fn joint(&mut self, sides: &[String; 2], x: ValueId) -> ValueId {
        let parts = ["q", "k", "v"].map(|part| {
            let of_sides = sides.each_ref().map(|side| {
                let matrix = self.matrix(&format!("{side}/{part}"), [self.plan.width; 2], PROJECTION);
                let row = self.weight(&format!("{side}/{part}_bias"), &[self.plan.width], 1.0);
                let projected = self.op("MatMul", &[x, matrix], &[]);
                self.op("Add", &[projected, row], &[])
            });
            self.op("Concat", &of_sides, &[("axis", Attribute::Int(2))])
        });
        let mixed = self.decomposed(parts, None);
        let by_token = self.op("Transpose", &[mixed], &[("perm", Attribute::Ints(vec![0, 2, 1, 3]))]);
        let shape = self.ints(&[0, 0, 2, self.plan.width]);
        let of_sides = self.op("Reshape", &[by_token, shape], &[]);
        let along = self.ints(&[2]);
        self.op("ReduceSum", &[of_sides, along], &[("keepdims", Attribute::Int(0))])
    }

    fn projections(&mut self, names: &[String; 3], x: ValueId) -> [ValueId; 3] {
        names.each_ref().map(|name| {
            let matrix = self.matrix(name, [self.plan.width; 2], PROJECTION);
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
        let widths = self.ints(&[self.plan.width; 3]);
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
        let width = self.plan.width as usize;
        let rounded = Tensor::integers(DataType::I8, &[width, 3 * width], &rounded);
        (self.graph.tensor("matrix", rounded), scale)
    }

    fn zero(&mut self) -> ValueId {
        self.graph.tensor("zero", Tensor::integers(DataType::I8, &[], &[0]))
    }

    /// The matrices of queries, keys and values beside each other.
    fn packed(&self, names: &[String; 3]) -> Vec<f32> {
        let Plan { width, .. } = self.plan;
        let matrices = names.each_ref().map(|name| noise(name, &[width, width], spread(width, PROJECTION)));
        let width = width as usize;
        let row = |at: usize| matrices.iter().flat_map(move |matrix| &matrix[at * width..][..width]);
        (0..width).flat_map(row).copied().collect()
    }

    fn perceptron(&mut self, name: &str, x: ValueId) -> ValueId {
        let Plan { width, expansion, .. } = self.plan;
        let hidden = width * expansion;
        let [up, down] = [("up", [width, hidden]), ("down", [hidden, width])]
            .map(|(part, dims)| self.matrix(&format!("{name}/{part}"), dims, 2.0));
        let bias = self.weight(&format!("{name}/bias"), &[hidden], 0.3);
        let hidden = self.op("MatMul", &[x, up], &[]);
        let hidden = self.op("Add", &[hidden, bias], &[]);
        let hidden = self.gelu(hidden);
        self.op("MatMul", &[hidden, down], &[])
    }

    fn gelu(&mut self, x: ValueId) -> ValueId {
        let [root, one, half] = [2f32.sqrt(), 1.0, 0.5].map(|number| self.graph.tensor("number", Tensor::f32(number)));
        let scaled = self.op("Div", &[x, root], &[]);
        let error = self.op("Erf", &[scaled], &[]);
        let gate = self.op("Add", &[error, one], &[]);
        let gated = self.op("Mul", &[x, gate], &[]);
        self.op("Mul", &[gated, half], &[])
    }

    /// A class token for each image, and its patches.
    fn embedding(&mut self, image: ValueId) -> ValueId {
        let Plan { patch, width, .. } = self.plan;
        let bound = spread(3 * patch * patch, 2.0);
        let kernel = self.weight("kernel", &[width, 3, patch, patch], bound);
        let patches = self.op("Conv", &[image, kernel], &[("strides", Attribute::Ints(vec![patch; 2]))]);
        let shape = self.ints(&[0, width, -1]);
        let flat = self.op("Reshape", &[patches, shape], &[]);
        let patches = self.op("Transpose", &[flat], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
        let class = self.weight("class", &[1, 1, width], 1.0);
        let shape = self.op("Shape", &[image], &[]);
        let [zero, ones] = [&[0][..], &[1, 1]].map(|values| self.ints(values));
        let batch = self.op("Gather", &[shape, zero], &[]);
        let every = self.op("Concat", &[batch, ones], &[("axis", Attribute::Int(0))]);
        let class = self.op("Expand", &[class, every], &[]);
        self.op("Concat", &[class, patches], &[("axis", Attribute::Int(1))])
    }

    /// What each class gets.
    fn head(&mut self, norm: ValueId) -> ValueId {
        let matrix = self.matrix("head", [self.plan.width, CLASSES], 1.0);
        let token = if self.plan.pooled {
            let along = self.ints(&[1]);
            self.op("ReduceMean", &[norm, along], &[("keepdims", Attribute::Int(0))])
        } else {
            let first = self.graph.tensor("first", Tensor::i64(0));
            self.op("Gather", &[norm, first], &[("axis", Attribute::Int(1))])
        };
        self.op("MatMul", &[token, matrix], &[])
    }
}

/// How far entries of a matrix must spread around zero for results of size `gain`, from `channels` of size one.
fn spread(channels: i64, gain: f32) -> f32 {
    gain / (channels as f32).sqrt()
}

/// Numbers of a mean of zero that depend on the name alone.
pub fn noise(name: &str, dims: &[i64], scale: f32) -> Vec<f32> {
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

/// The ViT, from `image` to `y`.
pub fn vit(plan: Plan, form: Form, norms: Norms) -> Model {
    let ty = |dims: &[i64]| {
        let named = std::iter::once(DimSpec::Named("batch".into()));
        TensorType { dtype: DataType::F32, dims: Some(named.chain(dims.iter().map(|&n| DimSpec::Known(n))).collect()) }
    };
    let mut writer = Writer { graph: GraphBuilder::new(), plan, norms };
    let image = writer.graph.input("image", Some(&ty(&plan.image_shape())));
    let tokens = writer.embedding(image);
    let positions = writer.weight("positions", &[plan.tokens(), plan.width], 0.5);
    let (mut stream, mut norm) = writer.first_norm(tokens, positions);
    for block in 0..plan.depth {
        let mixed = writer.attention(&format!("{block}/attention"), norm, form);
        (stream, norm) = writer.sum_and_norm(&format!("{block}/middle"), stream, mixed);
        let added = writer.perceptron(&format!("{block}/mlp"), norm);
        (stream, norm) = writer.sum_and_norm(&format!("{block}/end"), stream, added);
    }
    let y = writer.head(norm);
    writer.graph.output("y", y, Some(&ty(&[CLASSES])));
    let (ir_version, opset) = if matches!(form, Form::Standard { .. } | Form::Shared) { (10, 23) } else { (8, 18) };
    writer.graph.into_model(ir_version, &[("", opset), (MICROSOFT, 1)], Vec::new())
}

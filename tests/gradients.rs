//! Gradient rules against difference quotients: every rule by itself, and whole models.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use common::{Entry, Scratch, conclude, load, ort, zoo};
use ndarray::{ArrayD, IxDyn};
use vitrim::runtime::{Backend, Feeds, Session};
use vitrim::tensor::{DType, Tensor};
use vitrim_autodiff::{Emitter, Rule, gradients, rules};
use vitrim_ir::{
    Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, Patch, Shapes, Tensor as Constant, TensorType, ValueId,
};
use vitrim_train::loss::Loss;
use vitrim_train::parameters::Parameter;
use vitrim_train::{Request, Training, gradient_name};

/// Steps and tolerances of difference quotients. They are of fourth order: what they leave out is h⁴/30 times the fifth
/// derivative. Where ONNX Runtime has float64 kernels, that is below 1e-13, and roundings of results over `h` are, too: what
/// is left are the float32 attributes and constants of operators (1/6 in `HardSwish`, the scale of `Attention`).
const DOUBLE: Precision = Precision { dtype: DataType::F64, step: 1e-3, tolerance: 1e-7 };

/// In float32 both are about 1e-6 for each entry that is summed.
const SINGLE: Precision = Precision { dtype: DataType::F32, step: 0.0625, tolerance: 1e-4 };

#[derive(Clone, Copy)]
struct Precision {
    dtype: DataType,
    step: f64,
    /// Of a gradient, relative to the largest entry of all gradients of a case, and to 0.1 where that is less.
    tolerance: f64,
}

/// What is known of extents when a gradient is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// All.
    Static,
    /// All but the first one of operand 0.
    Batch,
    /// None.
    Open,
    /// Not even how many there are, which many rules need.
    Unranked,
}

const FORMS: [Form; 4] = [Form::Static, Form::Batch, Form::Open, Form::Unranked];

#[derive(Clone)]
enum Operand {
    Missing,
    Floats {
        dims: Vec<usize>,
        elements: Vec<f64>,
    },
    Constant(Constant),
    /// Integers that are fed.
    Fed(Vec<usize>, Vec<i64>),
}

/// One call of an operator.
#[derive(Clone)]
struct Case {
    op: &'static str,
    opset: i64,
    operands: Vec<Operand>,
    attributes: Vec<(&'static str, Attribute)>,
    results: usize,
    unread: Vec<usize>,
    /// Forms whose gradient cannot be written, and a part of the reason.
    refused: Vec<(Form, &'static str)>,
}

fn case(op: &'static str) -> Case {
    Case {
        op,
        opset: 18,
        operands: Vec::new(),
        attributes: Vec::new(),
        results: 1,
        unread: Vec::new(),
        refused: Vec::new(),
    }
}

/// Numbers from `from` to `to` in a mixed order, all at the same distances.
fn mixed(count: usize, from: f64, to: f64, shift: f64) -> Vec<f64> {
    let distance = (to - from) / count.max(1) as f64;
    // A step that has no factor in common with the count meets every place once.
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let step = (count * 5 / 8..).find(|&step| step > 0 && gcd(step, count) == 1).unwrap_or(1);
    (0..count).map(|at| from + distance * ((at * step % count) as f64 + 0.5 + shift)).collect()
}

impl Case {
    fn x(self, dims: &[usize]) -> Self {
        self.within(dims, -1.5, 1.5)
    }

    fn within(mut self, dims: &[usize], from: f64, to: f64) -> Self {
        // Operands of one case do not meet.
        let shift = self.operands.len() as f64 / 9.0;
        let elements = mixed(dims.iter().product(), from, to, shift);
        self.operands.push(Operand::Floats { dims: dims.to_vec(), elements });
        self
    }

    fn values(mut self, dims: &[usize], elements: &[f64]) -> Self {
        self.operands.push(Operand::Floats { dims: dims.to_vec(), elements: elements.to_vec() });
        self
    }

    fn none(mut self) -> Self {
        self.operands.push(Operand::Missing);
        self
    }

    fn constant(mut self, tensor: Constant) -> Self {
        self.operands.push(Operand::Constant(tensor));
        self
    }

    fn ints(self, ints: &[i64]) -> Self {
        self.constant(Constant::shape(ints))
    }

    fn int(self, int: i64) -> Self {
        self.constant(Constant::i64(int))
    }

    fn fed(mut self, dims: &[usize], ints: &[i64]) -> Self {
        self.operands.push(Operand::Fed(dims.to_vec(), ints.to_vec()));
        self
    }

    fn set(mut self, name: &'static str, int: i64) -> Self {
        self.attributes.push((name, Attribute::Int(int)));
        self
    }

    fn float(mut self, name: &'static str, float: f32) -> Self {
        self.attributes.push((name, Attribute::Float(float)));
        self
    }

    fn list(mut self, name: &'static str, ints: &[i64]) -> Self {
        self.attributes.push((name, Attribute::Ints(ints.to_vec())));
        self
    }

    fn text(mut self, name: &'static str, text: &'static str) -> Self {
        self.attributes.push((name, Attribute::String(text.into())));
        self
    }

    fn opset(mut self, opset: i64) -> Self {
        self.opset = opset;
        self
    }

    fn results(mut self, results: usize) -> Self {
        self.results = results;
        self
    }

    fn unread(mut self, slot: usize) -> Self {
        self.unread.push(slot);
        self
    }

    /// Without all extents, there is no gradient for that reason.
    fn refused(mut self, forms: &[Form], reason: &'static str) -> Self {
        self.refused.extend(forms.iter().map(|&form| (form, reason)));
        self
    }

    fn describe(&self, form: Form) -> String {
        let operands = self.operands.iter().map(|operand| match operand {
            Operand::Missing => "-".into(),
            Operand::Floats { dims, .. } => format!("{dims:?}"),
            Operand::Constant(tensor) => format!("{:?}", tensor.to_i64s().unwrap_or_default()),
            Operand::Fed(dims, _) => format!("fed {dims:?}"),
        });
        let operands: Vec<String> = operands.collect();
        format!("{} {} {:?} {form:?} opset {}", self.op, operands.join(" "), self.attributes, self.opset)
    }

    /// The model with inputs `x0`, .. and outputs `y0`, ..: all floats that are not left unread.
    fn model(&self, dtype: DataType, form: Form) -> Model {
        let mut graph = GraphBuilder::new();
        let mut inputs = Vec::new();
        for (slot, operand) in self.operands.iter().enumerate() {
            let dim = |axis: usize, extent: usize| match form {
                Form::Static => DimSpec::Known(extent as i64),
                Form::Batch if (slot, axis) != (0, 0) => DimSpec::Known(extent as i64),
                Form::Batch => DimSpec::Named("batch".into()),
                Form::Open | Form::Unranked => DimSpec::Named(format!("n{slot}_{axis}")),
            };
            let typed = |dtype, dims: &[usize]| TensorType {
                dtype,
                dims: (form != Form::Unranked)
                    .then(|| dims.iter().enumerate().map(|(axis, &extent)| dim(axis, extent)).collect()),
            };
            let name = format!("x{slot}");
            inputs.push(match operand {
                Operand::Missing => None,
                Operand::Floats { dims, .. } => Some(graph.input(&name, Some(&typed(dtype, dims)))),
                Operand::Fed(dims, _) => Some(graph.input(&name, Some(&typed(DataType::I64, dims)))),
                Operand::Constant(tensor) => {
                    let tensor = match tensor.to_f64s() {
                        Some(elements) if self.op != "Resize" => {
                            let dims: Vec<usize> = tensor.dims().iter().map(|&extent| extent as usize).collect();
                            Constant::floats(dtype, &dims, &elements)
                        }
                        _ => tensor.clone(),
                    };
                    Some(graph.initializer(&name, tensor))
                }
            });
        }
        let attributes: Vec<_> = self
            .attributes
            .iter()
            .map(|(name, value)| match (*name, value) {
                // The test's own type.
                ("to", _) => (*name, Attribute::Int(dtype.code().into())),
                _ => (*name, value.clone()),
            })
            .collect();
        let results = graph.call(OpType::standard(self.op), "y", inputs, &attributes, self.results);
        for (slot, &result) in results.iter().enumerate().filter(|(slot, _)| !self.unread.contains(slot)) {
            graph.output(&format!("y{slot}"), result, Some(&TensorType { dtype, dims: None }));
        }
        graph.into_model(10, &[("", self.opset)], Vec::new())
    }

    fn feeds(&self, dtype: DType) -> Feeds {
        let mut feeds = Feeds::default();
        for (slot, operand) in self.operands.iter().enumerate() {
            let tensor = match operand {
                Operand::Floats { dims, elements } => Tensor::from_f64(dtype, &array(dims, elements)),
                Operand::Fed(dims, elements) => {
                    Tensor::from_vec(dims, elements.clone()).expect("as many as the dims say")
                }
                _ => continue,
            };
            feeds.push(format!("x{slot}"), tensor);
        }
        feeds
    }
}

fn array(dims: &[usize], elements: &[f64]) -> ArrayD<f64> {
    ArrayD::from_shape_vec(IxDyn(dims), elements.to_vec()).expect("as many elements as the dims say")
}

/// The model with the gradients `dx0`, .. of its inputs, given those of its outputs, `dy0`, ..
fn differentiated(model: &Model) -> Result<Model, String> {
    let graph = model.graph();
    let shapes = Shapes::infer(model);
    let mut patch = Patch::new(model, "gradients");
    let dtype = |value: ValueId| graph.value(value).ty().expect("inputs and outputs have types").dtype;
    let wrt: Vec<ValueId> = graph.feeds().filter(|&input| dtype(input).is_float()).collect();
    let mut seeds = Vec::new();
    for &output in graph.outputs() {
        let name = graph.value(output).name().replace('y', "dy");
        seeds.push((output, patch.feed(&name, &TensorType { dtype: dtype(output), dims: None })));
    }
    let found: HashMap<ValueId, ValueId> = {
        let mut emit = Emitter::new(model, &shapes, &mut patch);
        gradients(&mut emit, &seeds, &wrt, &rules::standard).map_err(|error| error.to_string())?
    };
    for input in wrt {
        let Some(&gradient) = found.get(&input) else { continue };
        let gradient = patch.op("Identity", "gradient", &[gradient], &[]);
        let name = graph.value(input).name().replace('x', "dx");
        patch.append_output(&name, gradient, TensorType { dtype: dtype(input), dims: None });
    }
    let (model, _) = patch.apply(model).map_err(|error| error.to_string())?;
    Ok(model)
}

/// Why a case failed.
enum Failure {
    /// The runtime has no kernel of the type.
    NoKernel,
    Wrong(String),
}

/// Loads a model that ONNX Runtime must accept, unless it has no kernel, or the operator no version, of the type.
fn session(backend: &dyn Backend, path: &Path, lacks: &[&str]) -> Result<Box<dyn Session>, Failure> {
    vitrim::runtime::load(backend, path).map_err(|error| match format!("{error:#}") {
        text if lacks.iter().any(|lack| text.contains(lack)) => Failure::NoKernel,
        text => Failure::Wrong(text),
    })
}

/// Whether a case has no gradient because ranks are unknown, or for a reason that it has with them.
fn expected_unranked(case: &Case, reason: &str) -> bool {
    reason.contains("unknown") || case.refused.iter().any(|(_, part)| reason.contains(part))
}

/// Compares the gradients of a case with difference quotients of Σ dy · y.
fn check(
    backend: &dyn Backend,
    scratch: &Scratch,
    case: &Case,
    form: Form,
    precision: Precision,
) -> Result<(), Failure> {
    let wrong = |text: String| Failure::Wrong(text);
    let Precision { dtype, step, tolerance } = precision;
    let runtime_type = if dtype == DataType::F64 { DType::F64 } else { DType::F32 };
    let model = case.model(dtype, form);
    let refusal = case.refused.iter().find(|(refused, _)| *refused == form);
    let whole = match (differentiated(&model), refusal) {
        (Ok(whole), None) => whole,
        (Ok(_), Some(_)) => return Err(wrong("it has a gradient after all".into())),
        (Err(reason), Some((_, expected))) if reason.contains(expected) => return Ok(()),
        (Err(reason), None) if form == Form::Unranked && expected_unranked(case, &reason) => return Ok(()),
        (Err(reason), _) => return Err(wrong(reason)),
    };
    // What the gradient is written with must be of the right type: it may lack kernels alone.
    let lacks =
        ["Could not find an implementation", "Failed to find kernel", "Type 'tensor(double)' of input parameter"];
    let mut forward = session(backend, &scratch.save("forward", &model), &lacks)?;
    let mut backward = session(backend, &scratch.save("backward", &whole), &lacks[..2])?;
    let mut feeds = case.feeds(runtime_type);
    let results = forward.run(&feeds).map_err(|error| wrong(format!("{error:#}")))?;
    let seeds: Vec<(String, ArrayD<f64>)> = results
        .iter()
        .enumerate()
        .map(|(at, (name, y))| {
            (name.replace('y', "dy"), array(y.shape(), &mixed(y.len(), -1.0, 1.0, 0.3 + at as f64 / 7.0)))
        })
        .collect();
    for (name, seed) in &seeds {
        feeds.push(name.clone(), Tensor::from_f64(runtime_type, seed));
    }
    let found = backward.run(&feeds).map_err(|error| wrong(format!("backward: {error:#}")))?;
    let mut loss = |changed: &Feeds| -> Result<f64, Failure> {
        let results = forward.run(changed).map_err(|error| wrong(format!("{error:#}")))?;
        let sum = |((_, seed), (_, y)): (&(String, ArrayD<f64>), (&str, &Tensor))| (seed * &y.to_f64()).sum();
        Ok(seeds.iter().zip(results.iter()).map(sum).sum())
    };
    let (mut apart, mut largest): (f64, f64) = (0.0, 0.1);
    for (slot, operand) in case.operands.iter().enumerate() {
        let Operand::Floats { dims, elements } = operand else { continue };
        let gradient = match found.get(&format!("dx{slot}")) {
            Some(gradient) if gradient.shape() != dims => {
                return Err(wrong(format!("the gradient of operand {slot} is {:?}, not {dims:?}", gradient.shape())));
            }
            Some(gradient) => gradient.to_f64(),
            None => ArrayD::zeros(IxDyn(dims)),
        };
        for (at, &derivative) in gradient.iter().enumerate() {
            let mut at_step = |steps: f64| {
                let mut moved = elements.clone();
                moved[at] += steps * step;
                let moved = Tensor::from_f64(runtime_type, &array(dims, &moved));
                // The first of a name counts.
                let mut changed = Feeds::default();
                changed.push(format!("x{slot}"), moved);
                feeds.iter().for_each(|(name, tensor)| changed.push(name, tensor.clone()));
                loss(&changed)
            };
            let near = at_step(1.0)? - at_step(-1.0)?;
            let far = at_step(2.0)? - at_step(-2.0)?;
            let expected = (8.0 * near - far) / (12.0 * step);
            let off = (derivative - expected).abs();
            // Not a number is as far apart as can be.
            apart = if off.is_nan() { f64::INFINITY } else { apart.max(off) };
            largest = largest.max(expected.abs());
        }
    }
    match apart <= tolerance * largest {
        true => Ok(()),
        false => Err(wrong(format!("{apart:e} off, the largest entry is {largest:e}"))),
    }
}

/// All cases.
fn cases() -> Vec<Case> {
    use Form::{Batch, Open};
    let mut cases = Vec::new();
    let shape = &[2, 3, 4];

    // Entry by entry, with broadcasting to either side, along inner axes and by rank.
    let pairs: [(&[usize], &[usize], &[usize]); 6] = [
        (&[2, 3], &[2, 3], &[2, 1]),
        (&[2, 3], &[3], &[]),
        (&[3, 1], &[2, 1, 4], &[3, 1]),
        (&[2, 3], &[], &[2, 3]),
        (&[1], &[1], &[2, 3]),
        (&[1, 3], &[2, 3], &[3]),
    ];
    for (a, b, condition) in pairs {
        for op in ["Add", "Sub", "Mul", "Max", "Min"] {
            cases.push(case(op).x(a).x(b));
        }
        cases.push(case("Div").x(a).within(b, 0.5, 2.0));
        cases.push(case("Div").x(a).within(b, -2.0, -0.5));
        cases.push(case("Pow").within(a, 0.4, 2.0).x(b));
        let holds: Vec<i64> = (0..condition.iter().product::<usize>() as i64).map(|at| at % 2).collect();
        let condition = Constant::integers(DataType::Bool, condition, &holds);
        cases.push(case("Where").constant(condition).x(a).x(b));
    }
    cases.push(case("PRelu").x(&[2, 3, 2]).within(&[3, 1], 0.1, 0.4));
    cases.push(case("PRelu").x(&[2, 3]).within(&[1], 0.1, 0.4));
    for op in ["Max", "Min", "Sum", "Mean"] {
        cases.push(case(op).x(&[2, 3]));
        cases.push(case(op).x(&[2, 3]).x(&[3]).x(&[2, 1]));
        cases.push(case(op).x(&[]).x(&[2, 1]).x(&[3]).x(&[2, 3]));
    }
    for exponent in [0.0, 1.0, 2.0, 3.0, -1.5, 0.5] {
        cases.push(case("Pow").within(&[2, 3], 0.4, 2.0).constant(Constant::f32(exponent)));
    }
    cases.push(case("Pow").x(&[2, 3]).int(3));
    cases.push(case("Pow").x(&[2, 3]).fed(&[3], &[0, 1, 2]));
    for op in ["Identity", "Neg", "Abs", "Exp", "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Softplus", "Softsign", "Relu"]
    {
        cases.push(case(op).x(&[2, 5]));
        cases.push(case(op).within(&[], 0.5, 1.5));
    }
    for op in ["Log", "Sqrt", "Reciprocal"] {
        cases.push(case(op).within(&[2, 5], 0.4, 2.0));
    }
    cases.push(case("Cast").x(&[2, 3]).set("to", 0));
    cases.push(case("CastLike").x(&[2, 3]).x(&[1]));
    cases.push(case("Dropout").x(&[2, 3]).results(2).unread(1));
    cases.push(case("Dropout").x(&[2, 3]).constant(Constant::f32(0.5)));
    cases.push(case("Clip").x(&[2, 5]).constant(Constant::f32(-0.7)).constant(Constant::f32(0.8)));
    cases.push(case("Clip").x(&[2, 5]).none().constant(Constant::f32(0.8)));
    cases.push(case("Clip").x(&[2, 5]));
    cases.push(case("Clip").x(&[2, 5]).x(&[]).refused(&[Form::Static, Batch, Open], "its bounds depend on parameters"));
    cases.push(case("Gelu").x(&[2, 5]).opset(20));
    cases.push(case("Gelu").x(&[2, 5]).text("approximate", "tanh").opset(20));
    cases.push(case("Swish").x(&[2, 5]).opset(24));
    cases.push(case("Swish").x(&[2, 5]).float("alpha", 1.7).opset(24));
    cases.push(case("Mish").x(&[2, 5]));
    for op in ["HardSigmoid", "HardSwish"] {
        cases.push(case(op).within(&[2, 5], -4.1, 4.3));
    }
    cases.push(
        case("HardSigmoid")
            .values(&[4, 2], &[-2.0, 0.3, -0.6, 1.4, 0.9, -1.2, -0.1, 2.0])
            .float("alpha", 0.5)
            .float("beta", 0.4),
    );
    for op in ["LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu"] {
        let bent = || case(op).values(&[2, 4], &[-1.2, 0.45, -0.2, 1.7, 0.3, -0.6, 0.85, 1.3]);
        cases.push(bent());
        cases.push(bent().float("alpha", 0.7));
    }
    cases.push(case("Selu").x(&[2, 4]).float("gamma", 1.3));

    // Products.
    let factors: [(&[usize], &[usize]); 10] = [
        (&[2, 3], &[3, 4]),
        (&[2, 2, 3], &[3, 2]),
        (&[2, 2, 3], &[2, 3, 2]),
        (&[2, 1, 2, 3], &[3, 3, 2]),
        (&[2, 3], &[2, 3, 2]),
        (&[3], &[3]),
        (&[3], &[3, 2]),
        (&[3], &[2, 3, 2]),
        (&[2, 3], &[3]),
        (&[2, 2, 3], &[3]),
    ];
    for (a, b) in factors {
        cases.push(case("MatMul").x(a).x(b));
    }
    for (trans_a, trans_b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (a, b) = (if trans_a == 1 { [3, 2] } else { [2, 3] }, if trans_b == 1 { [4, 3] } else { [3, 4] });
        let gemm = || case("Gemm").x(&a).x(&b).set("transA", trans_a).set("transB", trans_b);
        cases.push(gemm());
        cases.push(gemm().x(&[4]).float("alpha", 0.5).float("beta", 1.5));
        cases.push(gemm().x(&[2, 1]));
        cases.push(gemm().x(&[]).float("beta", 0.25));
    }
    let einsum = |equation: &'static str| case("Einsum").text("equation", equation);
    cases.push(einsum("bhwc,hkc->bhwk").x(&[2, 3, 2, 2]).x(&[3, 3, 2]));
    cases.push(einsum("bij,bjk").x(&[2, 2, 3]).x(&[2, 3, 2]));
    cases.push(einsum("...ij,...jk->...ik").x(&[2, 2, 3]).x(&[2, 3, 2]));
    cases.push(einsum("...ij, ...kj").x(&[2, 1, 2, 3]).x(&[1, 2, 2, 3]));
    cases.push(einsum("ij->ji").x(&[2, 3]));
    cases.push(einsum("ij->i").x(&[2, 3]));
    cases.push(einsum("ij->").x(&[2, 3]));
    cases.push(einsum("i,i->").x(&[4]).x(&[4]));
    cases.push(einsum("ij,k->ik").x(&[2, 3]).x(&[2]));
    cases.push(einsum("i,j,k->kji").x(&[2]).x(&[3]).x(&[2]));
    cases.push(einsum("ij,jk,kl->il").x(&[2, 3]).x(&[3, 2]).x(&[2, 2]));
    cases.push(einsum("ii->i").x(&[3, 3]).refused(&[Form::Static, Batch, Open], "names an axis twice"));

    // Attention.
    let attention = || {
        let attention = case("Attention").opset(23).x(&[2, 2, 3, 2]).x(&[2, 2, 4, 2]).x(&[2, 2, 4, 3]);
        attention.refused(&[Open], "several heads share keys and values")
    };
    let joined = || {
        let joined = case("Attention").opset(23).x(&[2, 3, 4]).x(&[2, 4, 4]).x(&[2, 4, 6]);
        joined.set("q_num_heads", 2).set("kv_num_heads", 2).refused(&[Open], "its number of channels is unknown")
    };
    cases.push(attention());
    cases.push(attention().float("scale", 0.3));
    cases.push(attention().float("scale", 0.3).x(&[3, 4]));
    cases.push(attention().float("scale", 0.3).x(&[2, 1, 3, 4]));
    cases.push(attention().constant(Constant::integers(
        DataType::Bool,
        &[3, 4],
        &[1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1],
    )));
    cases.push(attention().set("is_causal", 1).float("scale", 1.0));
    cases.push(joined());
    cases.push(joined().x(&[2, 2, 3, 4]));

    // Convolutions: 1, 2 and 3 axes; overlapping, padded, dilated, in steps with a rest, in groups, by channel.
    let conv = |x: &[usize], w: &[usize]| case("Conv").x(x).x(w).x(&w[..1]);
    let kernel_open = "the extents of its kernel are unknown";
    let convolutions = [
        conv(&[2, 2, 4, 4], &[3, 2, 2, 2]).list("strides", &[2, 2]),
        conv(&[2, 2, 5, 4], &[3, 2, 2, 2]).list("strides", &[2, 2]),
        conv(&[2, 2, 3, 4], &[2, 2, 1, 1]),
        conv(&[1, 2, 4, 3], &[2, 2, 3, 3]).list("pads", &[1, 1, 1, 1]),
        conv(&[2, 1, 6, 5], &[2, 1, 3, 2]).list("strides", &[2, 3]).list("pads", &[1, 0, 0, 1]),
        conv(&[1, 2, 6, 6], &[1, 2, 2, 2]).list("dilations", &[2, 3]),
        conv(&[1, 1, 7, 8], &[2, 1, 2, 2])
            .list("dilations", &[3, 2])
            .list("strides", &[2, 3])
            .list("pads", &[1, 2, 0, 1]),
        conv(&[2, 4, 3, 3], &[4, 2, 2, 2]).set("group", 2),
        conv(&[2, 3, 4, 4], &[3, 1, 3, 3]).set("group", 3).list("pads", &[1, 1, 1, 1]).list("strides", &[2, 2]),
        conv(&[1, 2, 3, 3], &[4, 1, 2, 2]).set("group", 2).list("dilations", &[2, 1]),
        conv(&[1, 1, 5, 4], &[2, 1, 3, 3]).text("auto_pad", "VALID"),
        conv(&[2, 2, 7], &[3, 2, 3]).list("strides", &[2]).list("pads", &[1, 1]),
        conv(&[1, 1, 3, 4, 3], &[2, 1, 2, 2, 2]).list("strides", &[1, 2, 1]),
        conv(&[1, 2, 2, 2, 2], &[2, 2, 2, 2, 2]).list("strides", &[2, 2, 2]),
        case("Conv").x(&[1, 2, 4, 4]).x(&[2, 2, 3, 3]).list("strides", &[3, 3]),
    ];
    cases.extend(convolutions.into_iter().map(|case| case.refused(&[Open], kernel_open)));
    let same = || conv(&[1, 1, 5, 4], &[2, 1, 3, 2]).refused(&[Open], kernel_open);
    for mode in ["SAME_UPPER", "SAME_LOWER"] {
        cases.push(same().text("auto_pad", mode).list("strides", &[2, 2]));
        cases.push(same().text("auto_pad", mode));
    }
    // Images of any size.
    let any_size = |case: Case, w: &[usize]| {
        let elements = mixed(w.iter().product(), -1.0, 1.0, 0.0);
        case.constant(Constant::floats(DataType::F32, w, &elements))
    };
    cases.push(any_size(case("Conv").x(&[1, 2, 6, 5]), &[2, 2, 3, 2]).list("strides", &[2, 2]));
    cases.push(
        any_size(case("Conv").x(&[1, 2, 7, 5]), &[2, 2, 2, 2]).list("strides", &[3, 1]).list("pads", &[0, 1, 1, 0]),
    );
    let channels_open = "its number of channels is unknown";
    for include in [0, 1] {
        let pool = || case("AveragePool").set("count_include_pad", include).refused(&[Open], channels_open);
        cases.push(pool().x(&[2, 2, 4, 4]).list("kernel_shape", &[2, 2]).list("strides", &[2, 2]));
        cases.push(pool().x(&[1, 2, 4, 3]).list("kernel_shape", &[3, 3]).list("pads", &[1, 1, 1, 1]));
        cases.push(
            pool().x(&[1, 2, 5, 4]).list("kernel_shape", &[3, 2]).list("pads", &[1, 0, 0, 1]).list("strides", &[2, 2]),
        );
        cases.push(pool().x(&[1, 2, 7]).list("kernel_shape", &[3]).list("strides", &[2]));
    }
    cases.push(
        case("AveragePool")
            .x(&[1, 1, 5, 5])
            .list("kernel_shape", &[2, 2])
            .list("dilations", &[2, 2])
            .opset(19)
            .refused(&[Open], channels_open),
    );
    cases.push(
        case("AveragePool")
            .x(&[1, 1, 5, 5])
            .list("kernel_shape", &[2, 2])
            .list("strides", &[2, 2])
            .set("ceil_mode", 1)
            .refused(&[Form::Static, Batch, Open], "set ceil_mode to 0"),
    );
    cases.push(case("MaxPool").x(&[2, 2, 4, 4]).list("kernel_shape", &[2, 2]).list("strides", &[2, 2]));
    cases.push(case("MaxPool").x(&[2, 2, 4, 4]).list("kernel_shape", &[2, 2]).list("strides", &[2, 2]).opset(13));
    cases.push(
        case("MaxPool").x(&[1, 2, 4, 3]).list("kernel_shape", &[3, 3]).list("pads", &[1, 1, 1, 1]).results(2).unread(1),
    );
    cases.push(
        case("MaxPool")
            .x(&[1, 2, 4, 3])
            .list("kernel_shape", &[3, 3])
            .opset(13)
            .refused(&[Form::Static, Batch, Open], "operator set 16"),
    );

    // Resampling.
    let resize = |x: &[usize]| case("Resize").x(x).refused(&[Open], "the size of the image is unknown");
    for mode in ["nearest", "linear", "cubic"] {
        let resize = |x: &[usize]| resize(x).none().text("mode", mode);
        let sized = |x: &[usize], sizes: &[i64]| resize(x).none().ints(sizes).list("axes", &[2, 3]);
        cases.push(sized(&[1, 2, 3, 4], &[5, 7]));
        cases.push(sized(&[2, 2, 4, 5], &[2, 3]).text("coordinate_transformation_mode", "align_corners"));
        cases.push(resize(&[2, 1, 3, 4]).constant(Constant::f32s(&[4], &[1.0, 1.0, 1.7, 2.0])));
        cases.push(
            resize(&[2, 1, 3, 4])
                .constant(Constant::f32s(&[4], &[1.0, 1.0, 2.0, 1.0]))
                .text("coordinate_transformation_mode", "asymmetric"),
        );
    }
    cases.push(
        resize(&[1, 1, 4, 3])
            .none()
            .none()
            .ints(&[6, 6])
            .list("axes", &[2, 3])
            .text("mode", "cubic")
            .float("cubic_coeff_a", -0.5)
            .set("antialias", 1),
    );

    // What only moves.
    cases.push(case("Reshape").x(shape).ints(&[2, 12]));
    cases.push(case("Reshape").x(shape).ints(&[0, -1, 2, 2]));
    cases.push(case("Reshape").x(&[1]).ints(&[]));
    cases.push(case("Squeeze").x(&[2, 1, 3, 1]).ints(&[1, -1]));
    cases.push(case("Squeeze").x(&[2, 1, 3]));
    cases.push(case("Unsqueeze").x(&[2, 3]).ints(&[0, -1]));
    cases.push(case("Flatten").x(shape).set("axis", 2));
    cases.push(case("Flatten").x(shape).set("axis", -1));
    cases.push(case("Transpose").x(shape));
    cases.push(case("Transpose").x(shape).list("perm", &[1, 2, 0]));
    cases.push(case("Expand").x(&[3, 1]).ints(&[2, 1, 4]));
    cases.push(case("Expand").x(&[2, 3]).ints(&[1, 1]));
    cases.push(case("Expand").x(&[1, 1, 4]).fed(&[3], &[2, 3, 1]).refused(&[Open], "the shape of 'y0' is unknown"));
    cases.push(case("Tile").x(&[2, 3]).ints(&[1, 2]));
    cases.push(case("Tile").x(&[2, 3]).ints(&[3, 2]));
    cases.push(case("Tile").x(&[2, 3]).ints(&[1, 1]));
    cases.push(case("Tile").x(&[1, 3]).fed(&[2], &[2, 1]));
    cases.push(case("Concat").x(&[2, 3]).set("axis", 0));
    cases.push(case("Concat").x(&[2, 1]).x(&[2, 3]).x(&[2, 2]).set("axis", -1));
    cases.push(case("Concat").x(&[1, 2, 3]).x(&[2, 2, 3]).set("axis", 0));
    cases.push(case("Split").x(&[2, 5]).ints(&[2, 3]).set("axis", 1).results(2));
    cases.push(case("Split").x(&[2, 6]).set("axis", -1).set("num_outputs", 3).results(3).unread(1));
    cases.push(case("Split").x(&[5, 2]).set("num_outputs", 2).results(2));
    cases.push(case("Split").x(&[4, 2]).results(2).opset(13));
    let slice = |x: &[usize], starts: &[i64], ends: &[i64]| case("Slice").x(x).ints(starts).ints(ends);
    const END: i64 = i64::MAX;
    cases.push(slice(&[4, 3], &[1], &[3]));
    cases.push(slice(&[2, 5], &[1], &[END]).ints(&[1]));
    cases.push(slice(&[2, 5], &[0], &[1]).ints(&[-1]));
    cases.push(slice(&[2, 5], &[-2], &[END]).ints(&[1]));
    cases.push(slice(&[2, 5], &[-9], &[-1]).ints(&[1]));
    cases.push(slice(&[3, 5, 4], &[0, 1, -3], &[2, END, -1]));
    cases.push(slice(&[2, 6, 5], &[0, 1], &[END, END]).ints(&[1, 2]).ints(&[2, 2]));
    cases.push(slice(&[7, 2], &[1], &[END]).ints(&[0]).ints(&[3]));
    cases.push(slice(&[2, 5], &[-1], &[i64::MIN]).ints(&[1]).ints(&[-1]));
    cases.push(slice(&[2, 6], &[4], &[0]).ints(&[-1]).ints(&[-2]));
    cases.push(slice(&[2, 5], &[3], &[2]).ints(&[1]));
    cases.push(slice(&[2, 5], &[3], &[4]).ints(&[1]).ints(&[1 << 40]));
    cases.push(case("Slice").x(&[4, 5]).fed(&[2], &[1, -4]).fed(&[2], &[4, END]).ints(&[0, 1]));
    cases.push(case("Slice").x(&[2, 6]).fed(&[1], &[5]).fed(&[1], &[0]).ints(&[1]).fed(&[1], &[-2]));
    cases.push(case("Pad").x(&[2, 3]).ints(&[0, 1, 2, 0]));
    cases.push(case("Pad").x(&[3, 4]).ints(&[1, -1, -1, 2]).constant(Constant::f32(0.5)));
    cases.push(case("Pad").x(&[2, 3]).fed(&[4], &[1, 0, 0, 2]));
    cases.push(case("Pad").x(&[2, 3]).ints(&[2, 1]).none().ints(&[-1]));
    for mode in ["reflect", "edge"] {
        cases.push(case("Pad").x(&[3, 4]).ints(&[1, 2, 2, 1]).text("mode", mode));
    }
    cases.push(case("Pad").x(&[3, 4]).ints(&[1, 2, 2, 1]).text("mode", "wrap").opset(19));
    cases.push(case("Trilu").x(&[2, 3, 4]));
    cases.push(case("Trilu").x(&[3, 4]).int(-1).set("upper", 0));
    cases.push(case("SpaceToDepth").x(&[1, 2, 4, 4]).set("blocksize", 2));
    cases.push(case("DepthToSpace").x(&[2, 8, 1, 2]).set("blocksize", 2));
    cases.push(
        case("DepthToSpace").x(&[1, 8, 2, 1]).set("blocksize", 2).text("mode", "CRD").refused(&[Open], channels_open),
    );

    // By index: one, neighbours, repeated ones, from the end, at run time; before operator set 16, too.
    for opset in [13, 18] {
        let gather = |x: &[usize], dims: &[usize], ints: &[i64], axis: i64| {
            case("Gather").x(x).constant(Constant::i64s(dims, ints)).set("axis", axis).opset(opset)
        };
        cases.push(gather(&[2, 4, 3], &[], &[0], 1));
        cases.push(gather(&[2, 4, 3], &[], &[-1], 1));
        cases.push(gather(&[2, 4], &[1], &[-2], -1));
        cases.push(gather(&[5, 2], &[3], &[1, 2, 3], 0));
        cases.push(gather(&[5, 2], &[2], &[-3, -2], 0));
        cases.push(gather(&[4, 2], &[5], &[3, 0, 0, -1, 2], 0));
        cases.push(gather(&[2, 4, 2], &[3], &[1, 1, 3], 1));
        cases.push(gather(&[2, 3, 4], &[2, 2], &[1, 1, 3, -4], 2));
        cases.push(gather(&[3, 2], &[2, 3], &[0, 1, 0, 2, 2, 0], 0));
        cases.push(case("Gather").x(&[2, 4, 2]).fed(&[2, 2], &[1, 1, 3, -1]).set("axis", 1).opset(opset));
        cases.push(case("Gather").x(&[2, 4, 2]).fed(&[], &[2]).set("axis", 1).opset(opset));
        let by_image = case("GatherND").x(&[2, 4, 2]).fed(&[2, 3, 1], &[1, 1, 3, 0, -1, 0]).set("batch_dims", 1);
        let refused: &[Form] = if opset < 16 { &[Open] } else { &[] };
        cases.push(by_image.opset(opset).refused(refused, "operator set 16"));
    }
    let elements = || case("GatherElements").x(&[3, 3]).fed(&[2, 3], &[0, 2, 2, 0, -1, 1]);
    cases.push(elements());
    cases.push(case("GatherElements").x(&[2, 4]).fed(&[2, 3], &[0, 0, 3, 1, -1, 2]).set("axis", -1));
    cases.push(elements().opset(13).refused(&[Form::Static, Batch, Open], "operator set 16"));
    cases.push(case("GatherND").x(&[3, 2, 2]).fed(&[3, 2], &[0, 1, 2, 0, 0, -1]));
    cases.push(case("GatherND").x(&[2, 2, 3]).fed(&[2, 2, 1, 1], &[0, 2, 1, 1]).set("batch_dims", 2));
    for reduction in ["none", "add"] {
        let repeated: [i64; 4] = if reduction == "add" { [1, 1, 0, -1] } else { [1, 2, 0, -1] };
        cases.push(
            case("ScatterElements")
                .x(&[2, 4])
                .fed(&[2, 2], &repeated)
                .x(&[2, 2])
                .set("axis", 1)
                .text("reduction", reduction),
        );
        let rows: [i64; 2] = if reduction == "add" { [1, 1] } else { [1, -1] };
        cases.push(case("ScatterND").x(&[3, 2]).fed(&[2, 1], &rows).x(&[2, 2]).text("reduction", reduction));
    }
    cases.push(
        case("ScatterND")
            .x(&[3, 2])
            .fed(&[1, 1], &[1])
            .x(&[1, 2])
            .text("reduction", "mul")
            .refused(&[Form::Static, Batch, Open], "only adding"),
    );
    cases.push(case("TopK").x(&[2, 5]).ints(&[3]).results(2).unread(1));
    cases.push(case("TopK").x(&[5, 2]).ints(&[2]).set("axis", 0).set("largest", 0).results(2).unread(1));

    // Sums and the like: axes as an attribute and as an operand, kept or not.
    let reductions = [
        ("ReduceSum", -1.5),
        ("ReduceMean", -1.5),
        ("ReduceMax", -1.5),
        ("ReduceMin", -1.5),
        ("ReduceProd", -1.5),
        ("ReduceL1", -1.5),
        ("ReduceL2", -1.5),
        ("ReduceSumSquare", -1.5),
        ("ReduceLogSum", 0.3),
        ("ReduceLogSumExp", -1.5),
    ];
    for (op, from) in reductions {
        for keep in [0, 1] {
            for opset in [13, 18] {
                for axes in [&[1][..], &[-1, 0], &[2]] {
                    let case = case(op).within(shape, from, 1.6).set("keepdims", keep).opset(opset);
                    cases.push(match opset < 18 && op != "ReduceSum" {
                        true => case.list("axes", axes),
                        false => case.ints(axes),
                    });
                }
            }
            cases.push(case(op).within(&[2, 3], from, 1.6).set("keepdims", keep));
        }
        cases.push(case(op).within(&[], 0.5, 1.6));
    }
    cases.push(case("ReduceSum").x(&[2, 3]).none().set("noop_with_empty_axes", 1));
    cases.push(
        case("ReduceSum").x(&[2, 3]).fed(&[1], &[1]).refused(&[Form::Static, Batch, Open], "known only at run time"),
    );
    cases.push(case("ReduceProd").values(&[3, 3], &[0.5, 0.0, 2.0, 0.0, 3.0, 0.0, 1.5, -2.0, 0.7]).ints(&[1]));
    cases.push(case("GlobalAveragePool").x(&[2, 2, 3, 2]));
    cases.push(case("GlobalMaxPool").x(&[2, 2, 3, 2]));
    for (exclusive, reverse) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        cases.push(case("CumSum").x(&[2, 4]).int(-1).set("exclusive", exclusive).set("reverse", reverse));
    }

    // Norms.
    for op in ["Softmax", "LogSoftmax"] {
        cases.push(case(op).x(shape));
        cases.push(case(op).x(shape).set("axis", 1));
        cases.push(case(op).x(shape).set("axis", -3));
    }
    for (axis, scale) in [(-1, &[4][..]), (1, &[3, 4]), (2, &[3, 4]), (0, &[1, 1, 4])] {
        cases.push(case("LayerNormalization").x(shape).x(scale).x(&[4]).set("axis", axis));
        cases.push(case("RMSNormalization").x(shape).x(scale).set("axis", axis).opset(23));
    }
    cases.push(case("LayerNormalization").x(shape).x(&[4]).float("epsilon", 0.1));
    cases.push(case("InstanceNormalization").x(&[2, 2, 3, 2]).x(&[2]).x(&[2]).float("epsilon", 0.01));
    cases.push(case("InstanceNormalization").x(&[1, 2, 4]).x(&[2]).x(&[2]));
    // In float64 throughout.
    let group_norm = || case("GroupNormalization").x(&[2, 4, 3]).x(&[4]).x(&[4]).set("num_groups", 2).opset(21);
    cases.push(group_norm().set("stash_type", DataType::F64.code().into()));
    cases.push(case("GroupNormalization").x(&[1, 4, 2, 2]).x(&[2]).x(&[2]).set("num_groups", 2).opset(18));
    let batch_norm = |x: &[usize]| case("BatchNormalization").x(x).x(&[2]).x(&[2]).x(&[2]).within(&[2], 0.5, 2.0);
    cases.push(batch_norm(&[3, 2, 2, 2]));
    cases.push(batch_norm(&[3, 2]).float("epsilon", 0.1));
    cases
}

/// Whether ONNX Runtime knows a case in an earlier version of the operator set.
fn exists_before(backend: &dyn Backend, scratch: &Scratch, case: &Case) -> bool {
    let model = case.model(DataType::F32, Form::Static);
    vitrim::runtime::load(backend, &scratch.save("earlier", &model)).is_ok()
}

#[test]
fn every_rule_is_the_derivative() {
    let (scratch, backend) = (Scratch::new("rules"), ort());
    let (mut count, mut singles, mut failures) = (0, BTreeSet::new(), Vec::new());
    for case in cases() {
        let earlier = case.clone().opset(13);
        let mut versions = vec![(case, "")];
        if versions[0].0.opset > 13 && exists_before(backend.as_ref(), &scratch, &earlier) {
            versions.push((earlier, "operator set 16"));
        }
        for ((case, missing), form) in versions.iter().flat_map(|version| FORMS.map(|form| (version, form))) {
            if form != Form::Static && !matches!(&case.operands[0], Operand::Floats { dims, .. } if !dims.is_empty()) {
                continue;
            }
            let run = |precision| check(backend.as_ref(), &scratch, case, form, precision);
            let outcome = match run(DOUBLE) {
                Err(Failure::NoKernel) => {
                    singles.insert(case.op);
                    run(SINGLE)
                }
                outcome => outcome,
            };
            count += 1;
            match outcome {
                Ok(()) => {}
                Err(Failure::Wrong(reason)) if !missing.is_empty() && reason.contains(missing) => {}
                Err(Failure::NoKernel) => failures.push(format!("{}: no kernel", case.describe(form))),
                Err(Failure::Wrong(reason)) => failures.push(format!("{}: {reason}", case.describe(form))),
            }
        }
    }
    println!("in float32: {singles:?}");
    conclude("rules", count, &failures);
}

/// The operators of the table that have a derivative.
fn differentiable() -> BTreeSet<String> {
    let source = include_str!("../autodiff/src/rules/mod.rs");
    let names = source.split('"').skip(1).step_by(2).filter(|text| text.chars().all(|c| c.is_ascii_alphanumeric()));
    let has_rule = |name: &&str| matches!(rules::standard(&OpType::standard(name)), Rule::Vjp(_));
    names.filter(has_rule).map(str::to_owned).collect()
}

#[test]
fn every_rule_has_a_case() {
    let rules = differentiable();
    let tested: BTreeSet<String> = cases().iter().map(|case| case.op.to_owned()).collect();
    assert!(rules.len() > 80, "the table is read: {rules:?}");
    assert_eq!(rules, tested);
}

/// Where difference quotients do not exist: the gradients of `case`, given ones.
fn at_a_kink(case: &Case) -> Vec<Vec<f64>> {
    let (scratch, backend) = (Scratch::new(&format!("kinks-{}", case.op)), ort());
    let model = case.model(DataType::F32, Form::Static);
    let mut feeds = case.feeds(DType::F32);
    let results = common::run(backend.as_ref(), &scratch.save("forward", &model), &feeds);
    for (name, y) in results.iter() {
        feeds.push(name.replace('y', "dy"), Tensor::from_f64(DType::F32, &ArrayD::ones(y.shape())));
    }
    let model = differentiated(&model).unwrap_or_else(|reason| panic!("{reason}"));
    let found = common::run(backend.as_ref(), &scratch.save("backward", &model), &feeds);
    let inputs = (0..case.operands.len()).filter_map(|slot| found.get(&format!("dx{slot}")));
    inputs.map(|gradient| gradient.to_f64().into_iter().collect()).collect()
}

#[test]
fn kinks_have_the_gradients_that_are_documented() {
    // The first among equals takes all of it.
    let max = case("Max").values(&[3], &[1.0, 2.0, 5.0]).values(&[3], &[1.0, 3.0, 4.0]).values(&[3], &[1.0, 3.0, 5.0]);
    assert_eq!(at_a_kink(&max), [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]);
    // Entries of a reduction share it.
    let largest = case("ReduceMax").values(&[4], &[2.0, 1.0, 2.0, 0.0]);
    assert_eq!(at_a_kink(&largest), [[0.5, 0.0, 0.5, 0.0]]);
    // A bound counts as inside.
    let clip = case("Clip").values(&[3], &[-1.0, 0.0, 2.0]).constant(Constant::f32(-1.0)).constant(Constant::f32(1.0));
    assert_eq!(at_a_kink(&clip), [[1.0, 1.0, 0.0]]);
    for (op, at_zero) in [("Relu", 0.0), ("Abs", 0.0), ("ReduceL2", 0.0), ("ReduceL1", 0.0), ("LeakyRelu", 0.25)] {
        let case = case(op).values(&[2], &[0.0, 0.0]);
        let case = if op == "LeakyRelu" { case.float("alpha", 0.25) } else { case };
        assert_eq!(at_a_kink(&case), [[at_zero, at_zero]], "{op}");
    }
    let power = case("Pow").values(&[2], &[0.0, 0.0]).values(&[2], &[0.0, 2.0]);
    assert_eq!(at_a_kink(&power), [[0.0, 0.0], [0.0, 0.0]]);
    // What was dropped has none, what was kept was scaled: the mask is all that tells.
    let ratio = || case("Dropout").values(&[64], &[1.0; 64]).constant(Constant::f32(0.75)).set("seed", 1);
    let training = || ratio().constant(Constant::integers(DataType::Bool, &[], &[1]));
    let [gradient] = &at_a_kink(&training().results(2).unread(1))[..] else { panic!("of one operand") };
    assert!(gradient.iter().all(|&entry| entry == 0.0 || entry == 4.0) && gradient.contains(&4.0), "{gradient:?}");
    let reason = differentiated(&training().model(DataType::F32, Form::Static)).expect_err("its mask is no result");
    assert!(reason.contains("only its mask tells"), "{reason}");
}

#[test]
fn gradients_add_up_over_all_paths() {
    let dtype = DataType::F64;
    let ty = TensorType { dtype, dims: Some(vec![DimSpec::Known(3)]) };
    let mut graph = GraphBuilder::new();
    let x = graph.input("x0", Some(&ty));
    let _unused = graph.input("x1", Some(&ty));
    let power = graph.op("Exp", "power", &[x], &[]);
    // Read twice by one node, by another, and an output itself.
    let square = graph.op("Mul", "square", &[power, power], &[]);
    let sum = graph.op("Add", "sum", &[square, power], &[]);
    // Constant almost everywhere: a factor, but no path.
    let floor = graph.op("Floor", "floor", &[x], &[]);
    let scaled = graph.op("Mul", "scaled", &[floor, power], &[]);
    for (slot, value) in [power, sum, scaled].into_iter().enumerate() {
        graph.output(&format!("y{slot}"), value, Some(&ty));
    }
    let model = graph.into_model(10, &[("", 18)], Vec::new());
    let x = array(&[3], &[-0.7, 0.4, 1.3]);
    let seeds = [array(&[3], &[1.0, -2.0, 0.5]), array(&[3], &[0.3, 1.1, -0.7]), array(&[3], &[2.0, 0.6, 1.0])];
    let mut feeds = Feeds::default();
    feeds.push("x0", Tensor::from_f64(DType::F64, &x));
    feeds.push("x1", Tensor::from_f64(DType::F64, &x));
    for (slot, seed) in seeds.iter().enumerate() {
        feeds.push(format!("dy{slot}"), Tensor::from_f64(DType::F64, seed));
    }
    let scratch = Scratch::new("paths");
    let whole = differentiated(&model).unwrap_or_else(|reason| panic!("{reason}"));
    let found = common::run(ort().as_ref(), &scratch.save("paths", &whole), &feeds);
    let power = x.mapv(f64::exp);
    let expected = &power * &(&seeds[0] + &seeds[1] * (&power * 2.0 + 1.0) + &seeds[2] * &x.mapv(f64::floor));
    let apart = (found.get("dx0").expect("a gradient").to_f64() - expected).mapv(f64::abs);
    assert!(apart.iter().all(|&apart| apart < 1e-12), "{apart}");
    assert!(found.get("dx1").is_none(), "nothing depends on it");
}

#[test]
fn what_has_no_rule_is_refused_even_through_integers() {
    let ty = TensorType { dtype: DataType::F32, dims: Some(vec![DimSpec::Known(3)]) };
    let mut graph = GraphBuilder::new();
    let x = graph.input("x0", Some(&ty));
    let scale = graph.initializer("scale", Constant::f32(0.1));
    let coded = graph.op("QuantizeLinear", "coded", &[x, scale], &[]);
    let back = graph.op("DequantizeLinear", "back", &[coded, scale], &[]);
    graph.output("y0", back, Some(&ty));
    let reason = differentiated(&graph.into_model(10, &[("", 18)], Vec::new())).expect_err("it is rounded");
    assert!(reason.contains("'x0'") && reason.contains("rounds to integers"), "{reason}");
}

#[test]
fn depth_is_no_recursion() {
    let ty = TensorType { dtype: DataType::F32, dims: Some(vec![DimSpec::Known(3)]) };
    let mut graph = GraphBuilder::new();
    let mut value = graph.input("x0", Some(&ty));
    for _ in 0..50_000 {
        value = graph.op("Sin", "deep", &[value], &[]);
    }
    graph.output("y0", value, Some(&ty));
    let whole = differentiated(&graph.into_model(10, &[("", 18)], Vec::new())).expect("a gradient");
    assert!(whole.graph().len() >= 150_000);
}

/// Nodes as no exporter writes them: without operands, of other ranks, with extreme attributes and constants. Rules may
/// refuse them or not, but never panic.
#[test]
fn hostile_nodes_do_no_harm() {
    const EXTREMES: [i64; 7] = [i64::MIN, i64::MIN + 1, -1, 0, 1, 1 << 40, i64::MAX];
    let (mut count, mut failures) = (0, Vec::new());
    let mut attempt = |case: &Case| {
        for form in FORMS {
            let model = case.model(DataType::F32, form);
            if std::panic::catch_unwind(|| differentiated(&model).is_ok()).is_err() {
                failures.push(format!("{} panics", case.describe(form)));
            }
            count += 1;
        }
    };
    for case in cases() {
        for slot in 0..case.operands.len() {
            let mut with = |operand: Operand| {
                let mut hostile = case.clone();
                hostile.operands[slot] = operand;
                attempt(&hostile);
            };
            with(Operand::Missing);
            for dims in [&[][..], &[0], &[1], &[5, 5], &[2, 0, 3], &[1, 1, 1, 1, 1, 1]] {
                let count = dims.iter().product();
                with(Operand::Floats { dims: dims.to_vec(), elements: vec![0.0; count] });
                with(Operand::Fed(dims.to_vec(), vec![0; count]));
            }
            for extreme in EXTREMES {
                with(Operand::Constant(Constant::i64(extreme)));
                with(Operand::Constant(Constant::shape(&[extreme; 4])));
            }
            let mut hostile = case.clone();
            hostile.operands.truncate(slot);
            attempt(&hostile);
        }
        for at in 0..case.attributes.len() {
            let mut with = |value: Attribute| {
                let mut hostile = case.clone();
                hostile.attributes[at].1 = value;
                attempt(&hostile);
            };
            for extreme in EXTREMES {
                with(Attribute::Int(extreme));
                with(Attribute::Ints(vec![extreme]));
                with(Attribute::Ints(vec![extreme; 4]));
            }
            with(Attribute::Ints(Vec::new()));
            with(Attribute::Float(f32::NAN));
            for text in ["", "...", "->", ",", "a,b->zz", "...a...,...->...", "é,ü->é", "SAME_UPPER", "CRD"] {
                with(Attribute::String(text.into()));
            }
            let mut hostile = case.clone();
            hostile.attributes.remove(at);
            attempt(&hostile);
        }
        for results in [0, 5] {
            attempt(&case.clone().results(results));
        }
    }
    conclude("hostile nodes", count, &failures);
}

/// Numbers that look random, from −1 to 1.
fn noise(seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        // Marsaglia, Xorshift RNGs, 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    })
}

fn norm(values: &ArrayD<f64>) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Parameters are moved together in so many groups, each along its gradient and at random in equal shares.
const GROUPS: usize = 8;

/// What a slope may differ from the difference quotient, in float32, relative to the slope: quotients of fourth order with
/// steps of 1 % and less of each parameter leave out about 1e-5.
const SLOPE_TOLERANCE: f64 = 1e-3;

/// The same where a step crosses kinks.
const BENT_SLOPE_TOLERANCE: f64 = 2e-2;

/// The loss is rounded: what a quotient over a relative step may be off besides, over that step.
const LOSS_ROUNDING: f64 = 4e-7;

/// The gradients of a model against difference quotients of its loss, or why it has none.
fn check_model(backend: &dyn Backend, scratch: &Scratch, entry: &Entry) -> Result<(f64, Vec<String>), String> {
    let model = entry.read();
    let of = |loss| Training::of(&model, &Request::new(loss));
    let (training, by_class) = match of(Loss::CrossEntropy { label_smoothing: 0.0, soft_targets: false }) {
        Err(refusal) if refusal.to_string().contains("cross-entropy is of") => {
            (of(Loss::MeanSquaredError).map_err(|refusal| refusal.to_string())?, false)
        }
        training => (training.map_err(|refusal| refusal.to_string())?, true),
    };
    let mut original = load(backend, &entry.model);
    let mut feeds = entry.feeds(original.as_ref()).swap_remove(0);
    let outputs = original.run(&feeds).map_err(|error| format!("{error:#}"))?;
    let logits =
        training.heads.logits.as_deref().and_then(|name| outputs.get(name)).ok_or("its output has another name")?;
    let count = logits.shape()[0];
    feeds.push(
        "labels",
        match by_class {
            true => Tensor::from_vec(&[count], (0..count as i64).map(|at| at % 2).collect()).expect("a class for each"),
            false => Tensor::from_f64(DType::F32, &array(logits.shape(), &mixed(logits.len(), -1.0, 1.0, 0.0))),
        },
    );
    let path = scratch.save_as("model", &training.gradients, &entry.model);
    let (trained, others): (Vec<&Parameter>, Vec<_>) =
        training.parameters.iter().partition(|parameter| parameter.trainable);
    let initial = |parameter: &&Parameter| {
        let dims: Vec<usize> = parameter.tensor.dims().iter().map(|&extent| extent as usize).collect();
        array(&dims, &parameter.tensor.to_f64s().expect("parameters are floats"))
    };
    // What the loss does not depend on has no gradient, but is fed.
    for parameter in others {
        feeds.push(parameter.name.clone(), Tensor::from_f64(DType::F32, &initial(&parameter)));
    }
    let begin: Vec<ArrayD<f64>> = trained.iter().map(initial).collect();
    let fed = |parameters: &[ArrayD<f64>]| {
        let mut fed = feeds.clone();
        for (parameter, values) in trained.iter().zip(parameters) {
            fed.push(parameter.name.clone(), Tensor::from_f64(DType::F32, values));
        }
        fed
    };
    let mut session = vitrim::runtime::load(backend, &path).map_err(|error| format!("{error:#}"))?;
    let mut run = |parameters: &[ArrayD<f64>]| session.run(&fed(parameters)).map_err(|error| format!("{error:#}"));
    let outputs = run(&begin)?;
    let loss_of = |outputs: &vitrim::runtime::Outputs| outputs.get("loss").expect("the loss").to_f64().sum();
    let loss = loss_of(&outputs);
    let gradient = |at: usize| outputs.get(&gradient_name(&trained[at].name)).expect("a gradient").to_f64();
    let bends = model.graph().nodes().any(|(_, node)| node.is("Relu"));
    let tolerance = if bends { BENT_SLOPE_TOLERANCE } else { SLOPE_TOLERANCE };
    let (mut worst, mut wrong): (f64, Vec<String>) = (0.0, Vec::new());
    for group in 0..GROUPS.min(begin.len()) {
        let (mut slope, mut direction) = (0.0, Vec::new());
        for at in (group..begin.len()).step_by(GROUPS) {
            let gradient = gradient(at);
            let random: Vec<f64> = noise(at as u64 + 1).take(gradient.len()).collect();
            let random = array(gradient.shape(), &random);
            let length = norm(&begin[at]).max(0.01 * (gradient.len() as f64).sqrt());
            let along = |values: &ArrayD<f64>| values * (length / norm(values).max(f64::MIN_POSITIVE));
            let step = along(&gradient) + along(&random);
            slope += (&gradient * &step).sum();
            direction.push((at, step));
        }
        let mut quotient = |step: f64| -> Result<f64, String> {
            let mut at_step = |steps: f64| {
                let mut moved = begin.clone();
                direction.iter().for_each(|(at, direction)| moved[*at] += &(direction * (steps * step)));
                Ok::<f64, String>(loss_of(&run(&moved)?))
            };
            let near = at_step(1.0)? - at_step(-1.0)?;
            let far = at_step(2.0)? - at_step(-2.0)?;
            Ok((8.0 * near - far) / (12.0 * step))
        };
        // Short steps drown in roundings, long ones miss the slope: one of them has to do.
        let mut best = f64::INFINITY;
        for step in [1e-2, 1e-3, 1e-4] {
            let off = (quotient(step)? - slope).abs();
            let allowed = tolerance * slope.abs() + LOSS_ROUNDING * loss.abs() / step;
            best = best.min(if off.is_nan() { f64::INFINITY } else { off / allowed });
        }
        worst = worst.max(best);
        if best > 1.0 {
            wrong.push(format!("group {group} is off by {best:.2} of what is allowed, the slope is {slope:e}"));
        }
    }
    Ok((worst, wrong))
}

/// What keeps models of the zoo from being trained: parts of the reasons.
const UNTRAINABLE: [&str; 3] =
    ["it is no float32", "no parameters that can be trained", "the size of the image is unknown"];

#[test]
fn gradients_of_the_zoo_are_the_slopes_of_the_loss() {
    let (scratch, backend) = (Scratch::new("slopes"), ort());
    let (mut count, mut refused, mut failures) = (0, Vec::new(), Vec::new());
    for entry in zoo() {
        match check_model(backend.as_ref(), &scratch, &entry) {
            Ok((worst, wrong)) => {
                println!("{}: {worst:.3}", entry.name);
                count += 1;
                failures.extend(wrong.into_iter().map(|wrong| format!("{}: {wrong}", entry.name)));
            }
            Err(reason) => refused.push(format!("{}: {reason}", entry.name)),
        }
    }
    println!("refused {}:\n{}", refused.len(), refused.join("\n"));
    failures.extend(refused.into_iter().filter(|reason| !UNTRAINABLE.iter().any(|part| reason.contains(part))));
    conclude("slopes", count, &failures);
}

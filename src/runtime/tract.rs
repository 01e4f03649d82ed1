//! The embedded runtime, tract.
//!
//! tract has no model-local functions, so models pass through [`flatten`](super::flatten) on their way in. It plans for
//! fixed shapes: a session keeps one plan per set of input shapes it has seen.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tract_onnx::pb::tensor_shape_proto::dimension;
use tract_onnx::pb::{AttributeProto, ModelProto, NodeProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, IntoTValue, TValue, TVec,
    TypedRunnableModel,
};

use super::flatten::flatten;
use super::{Backend, Dim, Feeds, Outputs, Port, Session, match_feeds};
use crate::tensor::{DType, Tensor};

/// The tract runtime.
pub struct Tract;

impl Backend for Tract {
    fn name(&self) -> &str {
        "tract"
    }

    fn load(&self, path: &Path) -> Result<Box<dyn Session>> {
        let bytes = flatten(path)?;
        let folder = path.parent().and_then(Path::to_str).filter(|folder| !folder.is_empty()).unwrap_or(".");
        let session = guarded(|| {
            let proto = tract_onnx::onnx().proto_model_for_read(&mut bytes.as_slice());
            TractSession::new(proto.context("this is no ONNX model")?, folder)
        })?;
        Ok(Box::new(session))
    }
}

/// A plan for input shapes.
type Plan = Arc<TypedRunnableModel>;

struct TractSession {
    model: InferenceModel,
    /// Whether weights or activations are quantised.
    quantised: bool,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    plans: HashMap<Vec<Vec<usize>>, Plan>,
}

impl Session for TractSession {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn run(&mut self, feeds: &Feeds) -> Result<Outputs> {
        let (plan, values) = self.prepare(feeds)?;
        let results = guarded(|| plan.run(values))?;
        std::iter::zip(&self.outputs, results)
            .map(|(port, value)| Ok((port.name.clone(), extract(value, port)?)))
            .collect()
    }

    fn time(&mut self, feeds: &Feeds) -> Result<Duration> {
        let (plan, values) = self.prepare(feeds)?;
        let start = Instant::now();
        guarded(|| plan.run(values))?;
        Ok(start.elapsed())
    }
}

impl TractSession {
    /// Takes in a model whose external data is in `folder`.
    fn new(mut proto: ModelProto, folder: &str) -> Result<Self> {
        split_gemm(&mut proto);
        let (inputs, outputs) = ports(&proto)?;
        // Declared shapes of inner and output values may be stale or symbolic; tract infers its own.
        let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true);
        let parsed = onnx.parse(&proto, Some(folder))?;
        if let [first, ..] = parsed.unresolved_inputs.as_slice() {
            bail!("the value `{first}` is used but never computed");
        }
        let mut nodes = proto.graph.iter().flat_map(|graph| &graph.node);
        let quantised = nodes.any(|node| node.op_type == "DequantizeLinear");
        Ok(TractSession { model: parsed.model, quantised, inputs, outputs, plans: HashMap::new() })
    }

    /// The plan for these feeds' shapes, and the feeds as tract wants them.
    fn prepare(&mut self, feeds: &Feeds) -> Result<(Plan, TVec<TValue>)> {
        let tensors = match_feeds(&self.inputs, feeds)?;
        let shapes: Vec<Vec<usize>> = tensors.iter().map(|tensor| tensor.shape().to_vec()).collect();
        let values = tensors.into_iter().map(value).collect::<Result<TVec<TValue>>>()?;
        let plan = match self.plans.get(&shapes) {
            Some(plan) => plan.clone(),
            None => {
                let planned = guarded(|| self.plan(&shapes)).with_context(|| format!("cannot plan for {shapes:?}"))?;
                self.plans.insert(shapes, planned.clone());
                planned
            }
        };
        Ok((plan, values))
    }

    fn plan(&self, shapes: &[Vec<usize>]) -> Result<Plan> {
        let mut model = self.model.clone();
        for (index, (port, shape)) in std::iter::zip(&self.inputs, shapes).enumerate() {
            model.set_input_fact(index, InferenceFact::dt_shape(datum_type(port.dtype)?, shape.as_slice()))?;
        }
        // tract 0.23 optimises MatMul between DequantizeLinear and QuantizeLinear into a graph that computes something
        // else. The plain plan is slower and right.
        if self.quantised {
            return model.into_typed()?.into_runnable();
        }
        model.into_optimized()?.into_runnable()
    }
}

/// Writes Gemm as MatMul and Add: tract's Gemm multiplies the bias by a float32 one, which makes it fail in float16.
fn split_gemm(proto: &mut ModelProto) {
    let Some(graph) = &mut proto.graph else { return };
    let node = |op: &str, name: String, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>| NodeProto {
        op_type: op.to_owned(),
        name,
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute,
        ..NodeProto::default()
    };
    for gemm in std::mem::take(&mut graph.node) {
        let attribute = |name: &str| gemm.attribute.iter().find(|attribute| attribute.name == name);
        let is_one = |name: &str| attribute(name).is_none_or(|attribute| attribute.f == 1.0);
        let ([a, b, c], [y]) = (gemm.input.as_slice(), gemm.output.as_slice()) else {
            graph.node.push(gemm);
            continue;
        };
        if gemm.op_type != "Gemm" || !gemm.domain.is_empty() || c.is_empty() || !is_one("alpha") || !is_one("beta") {
            graph.node.push(gemm);
            continue;
        }
        let mut operand = |name: &str, flag: &str| match attribute(flag).is_some_and(|flag| flag.i != 0) {
            true => {
                let perm =
                    AttributeProto { name: "perm".into(), r#type: 7, ints: vec![1, 0], ..AttributeProto::default() };
                let transposed = format!("{y}.{flag}");
                graph.node.push(node("Transpose", transposed.clone(), &[name], &transposed, vec![perm]));
                transposed
            }
            false => name.to_owned(),
        };
        let (a, b) = (operand(a, "transA"), operand(b, "transB"));
        let product = format!("{y}.product");
        graph.node.push(node("MatMul", product.clone(), &[&a, &b], &product, Vec::new()));
        graph.node.push(node("Add", gemm.name.clone(), &[&product, c], y, Vec::new()));
    }
}

/// Runs tract, which panics on some models that it does not expect.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(anyhow!("tract gave up: {}", text.as_deref().unwrap_or("no reason given")))
    })
}

/// The inputs without default value, and the outputs.
fn ports(proto: &ModelProto) -> Result<(Vec<Port>, Vec<Port>)> {
    let graph = proto.graph.as_ref().context("the model has no graph")?;
    let inputs = graph.input.iter().filter(|input| graph.initializer.iter().all(|init| init.name != input.name));
    Ok((inputs.map(port).collect::<Result<_>>()?, graph.output.iter().map(port).collect::<Result<_>>()?))
}

fn port(info: &ValueInfoProto) -> Result<Port> {
    let name = &info.name;
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
        bail!("`{name}` is not a tensor");
    };
    let dims = tensor.shape.as_ref().map(|shape| {
        let dims = shape.dim.iter().map(|dim| match &dim.value {
            Some(dimension::Value::DimValue(size)) => usize::try_from(*size).map_or(Dim::Unknown, Dim::Fixed),
            Some(dimension::Value::DimParam(symbol)) if !symbol.is_empty() => Dim::Symbol(symbol.clone()),
            _ => Dim::Unknown,
        });
        dims.collect()
    });
    let dtype = dtype(tensor.elem_type).with_context(|| format!("`{name}`"))?;
    Ok(Port { name: name.clone(), dtype, dims })
}

/// The element type of ONNX's code.
fn dtype(code: i32) -> Result<DType> {
    Ok(match code {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::Bf16,
        _ => bail!("the element type {code} is not supported"),
    })
}

fn datum_type(dtype: DType) -> Result<DatumType> {
    Ok(match dtype {
        DType::F16 => DatumType::F16,
        DType::F32 => DatumType::F32,
        DType::F64 => DatumType::F64,
        DType::I8 => DatumType::I8,
        DType::I16 => DatumType::I16,
        DType::I32 => DatumType::I32,
        DType::I64 => DatumType::I64,
        DType::U8 => DatumType::U8,
        DType::U16 => DatumType::U16,
        DType::U32 => DatumType::U32,
        DType::U64 => DatumType::U64,
        DType::Bool => DatumType::Bool,
        DType::Bf16 => bail!("tract has no bfloat16"),
    })
}

fn value(tensor: &Tensor) -> Result<TValue> {
    macro_rules! convert {
        ($($variant:ident),*) => {
            match tensor {
                $(Tensor::$variant(array) => Ok(tract_onnx::prelude::Tensor::from(array.clone()).into_tvalue()),)*
                Tensor::Bf16(_) => bail!("tract has no bfloat16"),
            }
        };
    }
    convert!(F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, Bool)
}

/// A result as the type that the model declares; tract computes shapes in a type of its own.
fn extract(value: TValue, port: &Port) -> Result<Tensor> {
    let cast = value.cast_to_dt(datum_type(port.dtype)?).with_context(|| format!("the output {port}"))?;
    macro_rules! convert {
        ($($variant:ident: $type:ty),*) => {
            match port.dtype {
                $(DType::$variant => Ok(Tensor::from(cast.to_plain_array_view::<$type>()?.to_owned())),)*
                DType::Bf16 => bail!("tract has no bfloat16"),
            }
        };
    }
    convert!(F16: half::f16, F32: f32, F64: f64, I8: i8, I16: i16, I32: i32, I64: i64, U8: u8, U16: u16, U32: u32, U64: u64, Bool: bool)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use tract_onnx::pb::{
        GraphProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, tensor_shape_proto,
    };

    use super::*;

    fn value_info(name: &str, columns: i64) -> ValueInfoProto {
        let dim = |value| tensor_shape_proto::Dimension { value: Some(value), ..Default::default() };
        let shape = vec![dim(dimension::Value::DimParam("batch".into())), dim(dimension::Value::DimValue(columns))];
        let tensor = type_proto::Tensor { elem_type: 10, shape: Some(TensorShapeProto { dim: shape }) };
        let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() });
        ValueInfoProto { name: name.into(), r#type, ..Default::default() }
    }

    fn weight(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
        let raw_data = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
        TensorProto { name: name.into(), data_type: 10, dims: dims.to_vec(), raw_data, ..Default::default() }
    }

    /// y = x·wᵀ + c in float16, as exporters write the last linear layer.
    fn linear() -> ModelProto {
        let transposed = AttributeProto { name: "transB".into(), r#type: 2, i: 1, ..Default::default() };
        let gemm = NodeProto {
            name: "head".into(),
            op_type: "Gemm".into(),
            input: ["x", "w", "c"].map(String::from).to_vec(),
            output: vec!["y".into()],
            attribute: vec![transposed],
            ..Default::default()
        };
        let graph = GraphProto {
            node: vec![gemm],
            initializer: vec![
                weight("w", &[3, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
                weight("c", &[3], &[0.0, 0.0, 0.5]),
            ],
            input: vec![value_info("x", 2), value_info("c", 3)],
            output: vec![value_info("y", 3)],
            ..Default::default()
        };
        let opset_import = vec![OperatorSetIdProto { version: 17, ..Default::default() }];
        ModelProto { ir_version: 8, graph: Some(graph), opset_import, ..Default::default() }
    }

    fn half(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_vec(shape, values.iter().copied().map(f16::from_f32).collect()).unwrap()
    }

    #[test]
    fn half_precision_runs_at_any_batch() {
        let mut session = TractSession::new(linear(), ".").unwrap();
        assert_eq!(session.inputs().iter().map(Port::to_string).collect::<Vec<_>>(), ["`x` float16[batch, 2]"]);
        let mut run = |rows, values: &[f32]| {
            let outputs = session.run(&Feeds::from_iter([("x".to_owned(), half(&[rows, 2], values))])).unwrap();
            outputs.get("y").unwrap().clone()
        };
        assert_eq!(run(1, &[1.0, 2.0]), half(&[1, 3], &[1.0, 2.0, 3.5]));
        assert_eq!(run(2, &[1.0, 2.0, 0.0, 4.0]), half(&[2, 3], &[1.0, 2.0, 3.5, 0.0, 4.0, 4.5]));
        assert_eq!(run(1, &[0.0, 0.0]), half(&[1, 3], &[0.0, 0.0, 0.5]));
        assert_eq!(session.plans.len(), 2);
    }

    #[test]
    fn broken_models_are_errors() {
        let mut dangling = linear();
        dangling.graph.as_mut().unwrap().node[0].input[0] = "nowhere".into();
        let mut missing = linear();
        missing.graph.as_mut().unwrap().output[0].name = "nowhere".into();
        for model in [ModelProto::default(), dangling, missing] {
            assert!(guarded(|| TractSession::new(model, ".")).is_err());
        }
    }
}

//! Which element type each operator gives its results.

use super::call::Call;
use crate::{Attribute, DataType};

/// The element type that attribute `name` gives.
fn attribute(call: &Call<'_>, name: &str) -> Option<DataType> {
    let code = i32::try_from(call.node.int(name)?).ok()?;
    Some(DataType::from_code(code)).filter(|dtype| dtype.code() != 0)
}

/// The type that a zero point of operand `slot` has, else `default`.
fn zero_point(call: &Call<'_>, slot: usize, default: Option<DataType>) -> Option<DataType> {
    if call.has(slot) { call.dtype(slot) } else { default }
}

/// The element type of result `slot` of `call`.
pub(super) fn infer(call: &Call<'_>, slot: usize) -> Option<DataType> {
    let node = call.node;
    let own = || call.dtype(0);
    // Quantised integers have the type of their zero point.
    if let (Some(quantisation), false) = (node.quantised_result(), node.op.name == "QuantizeLinear") {
        let data = || node.quantised_operands().first().and_then(|(slot, _)| call.dtype(*slot));
        return call.dtype(quantisation.zero_point).or_else(data);
    }
    match (node.op.domain.as_str(), node.op.name.as_str()) {
        ("" | "com.microsoft", name) => match (name, slot) {
            ("Shape" | "Size" | "ArgMax" | "ArgMin" | "NonZero", _) | ("TopK" | "MaxPool", 1) => Some(DataType::I64),
            (
                "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "Not"
                | "IsNaN" | "IsInf",
                _,
            )
            | ("Dropout", 1) => Some(DataType::Bool),
            ("Cast" | "BitCast", _) => attribute(call, "to"),
            ("CastLike" | "Where", _) => call.dtype(1).or_else(|| (name == "Where").then(|| call.dtype(2))?),
            ("Max" | "Min" | "Sum" | "Add" | "Sub" | "Mul" | "Div" | "Concat" | "MatMul" | "Gemm" | "Einsum", _) => {
                (0..call.inputs.len()).find_map(|slot| call.dtype(slot))
            }
            ("ConstantOfShape", _) => match node.attribute("value") {
                Some(Attribute::Tensor(tensor)) => Some(tensor.dtype()),
                _ => Some(DataType::F32),
            },
            ("RandomNormal" | "RandomUniform", _) => attribute(call, "dtype").or(Some(DataType::F32)),
            ("EyeLike" | "RandomNormalLike" | "RandomUniformLike" | "Bernoulli", _) => {
                attribute(call, "dtype").or_else(own)
            }
            ("OneHot", _) => call.dtype(2),
            ("QuantizeLinear", _) => zero_point(call, 2, attribute(call, "output_dtype").or(Some(DataType::U8))),
            ("DequantizeLinear", _) => attribute(call, "output_dtype").or_else(|| call.dtype(1)),
            ("DynamicQuantizeLinear", 0 | 2) => Some(DataType::U8),
            ("DynamicQuantizeLinear", _) => Some(DataType::F32),
            ("MatMulInteger" | "ConvInteger" | "MatMulInteger16", _) => Some(DataType::I32),
            ("MatMulIntegerToFloat", _) => call.dtype(2),
            ("QGemm", _) => Some(DataType::F32),
            ("QAttention", _) => call.dtype(3),
            ("LayerNormalization" | "SkipLayerNormalization" | "SimplifiedLayerNormalization", 1 | 2)
            | ("SkipSimplifiedLayerNormalization", 1 | 2) => Some(DataType::F32),
            _ if call.ruled => own(),
            _ => None,
        },
        ("com.microsoft.nchwc", _) => own(),
        _ => None,
    }
}

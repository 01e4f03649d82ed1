//! The rules of the standard operators: one table.

mod elementwise;
mod linear;
mod movement;
mod norms;
mod reductions;

use vitrim_ir::OpType;

use crate::Rule::{self, Undefined, Vjp, Zero};

/// How gradients pass an operator of the standard set.
pub fn standard(op: &OpType) -> Rule {
    if !op.domain.is_empty() {
        return Undefined("its operator is no standard one");
    }
    match op.name.as_str() {
        "Identity" | "Cast" | "Dropout" => Vjp(elementwise::identity),
        "Add" | "Sum" => Vjp(elementwise::add),
        "Sub" => Vjp(elementwise::sub),
        "Mul" => Vjp(elementwise::mul),
        "Div" => Vjp(elementwise::div),
        "Pow" => Vjp(elementwise::pow),
        "Max" | "Min" => Vjp(elementwise::extremum),
        "Where" => Vjp(elementwise::select),
        "Clip" => Vjp(elementwise::clip),
        "Neg" => Vjp(elementwise::neg),
        "Abs" => Vjp(elementwise::abs),
        "Exp" => Vjp(elementwise::exp),
        "Log" => Vjp(elementwise::log),
        "Sqrt" => Vjp(elementwise::sqrt),
        "Reciprocal" => Vjp(elementwise::reciprocal),
        "Sin" => Vjp(elementwise::sin),
        "Cos" => Vjp(elementwise::cos),
        "Erf" => Vjp(elementwise::erf),
        "Tanh" => Vjp(elementwise::tanh),
        "Sigmoid" => Vjp(elementwise::sigmoid),
        "Softplus" => Vjp(elementwise::softplus),
        "Relu" => Vjp(elementwise::relu),
        "Gelu" => Vjp(elementwise::gelu),

        "MatMul" => Vjp(linear::matmul),
        "Gemm" => Vjp(linear::gemm),
        "Conv" => Vjp(linear::conv),

        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => Vjp(movement::reshape),
        "Transpose" => Vjp(movement::transpose),
        "Concat" => Vjp(movement::concat),
        "Split" => Vjp(movement::split),
        "Slice" => Vjp(movement::slice),
        "Gather" => Vjp(movement::gather),
        "Expand" => Vjp(movement::expand),

        "ReduceSum" => Vjp(reductions::sum),
        "ReduceMean" => Vjp(reductions::mean),
        "GlobalAveragePool" => Vjp(reductions::global_average),

        "Softmax" => Vjp(norms::softmax),
        "LogSoftmax" => Vjp(norms::log_softmax),
        "LayerNormalization" => Vjp(norms::layer_norm),

        "Shape" | "Size" | "ConstantOfShape" | "Constant" | "Range" | "NonZero" | "OneHot" | "ArgMax" | "ArgMin"
        | "Floor" | "Ceil" | "Round" | "Sign" | "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual"
        | "Not" | "And" | "Or" | "Xor" | "IsNaN" | "IsInf" | "EyeLike" | "RandomUniform" | "RandomNormal"
        | "RandomUniformLike" | "RandomNormalLike" | "Bernoulli" => Zero,

        "QuantizeLinear"
        | "DequantizeLinear"
        | "QLinearMatMul"
        | "QLinearConv"
        | "MatMulInteger"
        | "ConvInteger"
        | "DynamicQuantizeLinear" => {
            Undefined("it rounds to integers, whose gradient is zero: train the model that was quantised")
        }
        _ => Undefined("its operator has no gradient rule"),
    }
}

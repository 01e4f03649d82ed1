//! The rules of the standard operators: one table.

mod activations;
mod attention;
mod convolution;
mod elementwise;
mod indexing;
mod linear;
mod movement;
mod norms;
mod reductions;
mod resize;

use vitrim_ir::OpType;

use crate::Rule::{self, Undefined, Vjp, Zero};

/// How gradients pass an operator of the standard set.
pub fn standard(op: &OpType) -> Rule {
    if !op.domain.is_empty() {
        return Undefined("its operator is no standard one: decompose it, or give it a rule");
    }
    match op.name.as_str() {
        "Identity" | "Cast" | "CastLike" => Vjp(elementwise::identity),
        "Dropout" => Vjp(elementwise::dropout),
        "Add" | "Sum" => Vjp(elementwise::add),
        "Mean" => Vjp(elementwise::mean),
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

        "Erf" => Vjp(activations::erf),
        "Gelu" => Vjp(activations::gelu),
        "Tanh" => Vjp(activations::tanh),
        "Sigmoid" => Vjp(activations::sigmoid),
        "Swish" => Vjp(activations::swish),
        "HardSigmoid" => Vjp(activations::hard_sigmoid),
        "HardSwish" => Vjp(activations::hard_swish),
        "Mish" => Vjp(activations::mish),
        "Softplus" => Vjp(activations::softplus),
        "Softsign" => Vjp(activations::softsign),
        "Relu" => Vjp(activations::relu),
        "ThresholdedRelu" => Vjp(activations::thresholded_relu),
        "LeakyRelu" => Vjp(activations::leaky_relu),
        "PRelu" => Vjp(activations::prelu),
        "Elu" => Vjp(activations::elu),
        "Celu" => Vjp(activations::celu),
        "Selu" => Vjp(activations::selu),

        "MatMul" => Vjp(linear::matmul),
        "Gemm" => Vjp(linear::gemm),
        "Einsum" => Vjp(linear::einsum),
        "Attention" => Vjp(attention::attention),

        "Conv" => Vjp(convolution::conv),
        "AveragePool" => Vjp(convolution::average_pool),
        "MaxPool" => Vjp(indexing::max_pool),
        "Resize" => Vjp(resize::resize),

        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => Vjp(movement::reshape),
        "Transpose" => Vjp(movement::transpose),
        "Concat" => Vjp(movement::concat),
        "Split" => Vjp(movement::split),
        "Slice" => Vjp(movement::slice),
        "Pad" => Vjp(movement::pad),
        "Expand" => Vjp(movement::expand),
        "Tile" => Vjp(movement::tile),
        "Trilu" => Vjp(movement::trilu),
        "DepthToSpace" => Vjp(movement::depth_to_space),
        "SpaceToDepth" => Vjp(movement::space_to_depth),

        "Gather" => Vjp(indexing::gather),
        "GatherElements" => Vjp(indexing::gather_elements),
        "GatherND" => Vjp(indexing::gather_nd),
        "ScatterElements" => Vjp(indexing::scatter_elements),
        "ScatterND" => Vjp(indexing::scatter_nd),
        "TopK" => Vjp(indexing::top_k),

        "ReduceSum" => Vjp(reductions::sum),
        "ReduceMean" => Vjp(reductions::mean),
        "ReduceMax" | "ReduceMin" => Vjp(reductions::extremum),
        "ReduceProd" => Vjp(reductions::product),
        "ReduceL1" => Vjp(reductions::l1),
        "ReduceL2" => Vjp(reductions::l2),
        "ReduceSumSquare" => Vjp(reductions::sum_square),
        "ReduceLogSum" => Vjp(reductions::log_sum),
        "ReduceLogSumExp" => Vjp(reductions::log_sum_exp),
        "GlobalAveragePool" => Vjp(reductions::global_average),
        "GlobalMaxPool" => Vjp(reductions::global_max),
        "CumSum" => Vjp(reductions::running_sum),

        "Softmax" => Vjp(norms::softmax),
        "LogSoftmax" => Vjp(norms::log_softmax),
        "LayerNormalization" => Vjp(norms::layer_norm),
        "RMSNormalization" => Vjp(norms::rms_norm),
        "GroupNormalization" => Vjp(norms::group_norm),
        "InstanceNormalization" => Vjp(norms::instance_norm),
        "BatchNormalization" => Vjp(norms::batch_norm),

        "Hardmax" | "Shape" | "Size" | "ConstantOfShape" | "Constant" | "Range" | "NonZero" | "OneHot" | "ArgMax"
        | "ArgMin" | "Floor" | "Ceil" | "Round" | "Sign" | "Equal" | "Less" | "LessOrEqual" | "Greater"
        | "GreaterOrEqual" | "Not" | "And" | "Or" | "Xor" | "IsNaN" | "IsInf" | "EyeLike" | "RandomUniform"
        | "RandomNormal" | "RandomUniformLike" | "RandomNormalLike" | "Bernoulli" => Zero,

        "QuantizeLinear"
        | "DequantizeLinear"
        | "QLinearMatMul"
        | "QLinearConv"
        | "MatMulInteger"
        | "ConvInteger"
        | "DynamicQuantizeLinear" => {
            Undefined("it rounds to integers, whose gradient is zero: train the model that was quantised")
        }
        "If" | "Loop" | "Scan" | "SequenceMap" => {
            Undefined("it runs nested graphs: export the model without control flow, or with the branch decided")
        }
        _ => Undefined("its operator has no gradient rule: write it in others, or freeze the parameters before it"),
    }
}

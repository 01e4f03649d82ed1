//! Which operands of an operator are what: the factors of a product, its bias, what is combined entry by entry, and what
//! quantised integers stand for.

use crate::{Node, ValueId};

/// Where an operator has the scale and the zero point of a tensor of integers, as operand slots: an integer stands for
/// (integer − zero point) · scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// The scale; `None` where the operator does without.
    pub scale: Option<usize>,
    /// The zero point; the operand may be left out where it is zero.
    pub zero_point: usize,
}

impl Quantisation {
    /// The operand slots.
    pub fn slots(self) -> impl Iterator<Item = usize> {
        self.scale.into_iter().chain([self.zero_point])
    }
}

const fn by(scale: usize, zero_point: usize) -> Quantisation {
    Quantisation { scale: Some(scale), zero_point }
}

const fn unscaled(zero_point: usize) -> Quantisation {
    Quantisation { scale: None, zero_point }
}

impl Node {
    /// Its operator, if ONNX or ONNX Runtime defines it.
    fn known_op(&self) -> Option<&str> {
        matches!(self.op.domain.as_str(), "" | "com.microsoft").then_some(self.op.name.as_str())
    }

    /// The operand slots of the matrices that a product multiplies, left and right.
    pub fn factors(&self) -> Option<[usize; 2]> {
        match self.known_op()? {
            "MatMul"
            | "Gemm"
            | "Einsum"
            | "FusedMatMul"
            | "TransposeMatMul"
            | "FusedMatMulActivation"
            | "FusedGemm"
            | "GemmFastGelu"
            | "MatMulInteger"
            | "MatMulInteger16"
            | "MatMulIntegerToFloat"
            | "DynamicQuantizeMatMul" => Some([0, 1]),
            "QLinearMatMul" | "QGemm" => Some([0, 3]),
            _ => None,
        }
    }

    /// The operand that a product adds to what it multiplies.
    pub fn bias(&self) -> Option<usize> {
        match self.known_op()? {
            "Gemm" | "FusedGemm" | "GemmFastGelu" => Some(2),
            "DynamicQuantizeMatMul" => Some(4),
            "MatMulIntegerToFloat" | "QGemm" => Some(6),
            _ => None,
        }
    }

    /// The operands that it combines entry by entry, with broadcasting; `None` if it does anything else.
    pub fn elementwise_operands(&self) -> Option<Vec<(usize, ValueId)>> {
        let name = self.known_op()?;
        match name {
            "Identity" | "Cast" | "Dropout" | "Erf" | "Gelu" | "FastGelu" | "QuickGelu" | "BiasGelu" | "BiasAdd"
            | "Relu" | "LeakyRelu" | "Elu" | "Celu" | "Selu" | "PRelu" | "HardSigmoid" | "HardSwish" | "Mish"
            | "Swish" | "Sigmoid" | "Tanh" | "Softplus" | "Softsign" | "Exp" | "Log" | "Sqrt" | "Reciprocal"
            | "Neg" | "Abs" | "Sign" | "Floor" | "Ceil" | "Round" | "Not" | "IsNaN" | "IsInf" | "Clip" | "Sin"
            | "Cos" | "CastLike" | "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Sum" | "Mean" | "Mod"
            | "And" | "Or" | "Xor" | "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Where"
            | "SwiGLU" | "BitCast" | "QLinearAdd" | "QLinearMul" | "QLinearSigmoid" | "QLinearLeakyRelu"
            | "QLinearWhere" => {}
            _ => return None,
        }
        // Ratio, training flag, bounds and target types are no tensors of entries.
        let count = if matches!(name, "Dropout" | "Clip" | "CastLike") { 1 } else { usize::MAX };
        Some(self.data_operands().take(count).collect())
    }

    /// The axes whose extents it states, of an operand with `rank` axes: for `Shape`.
    pub fn stated_axes(&self, rank: usize) -> std::ops::Range<usize> {
        let rank = rank as i64;
        let position = |at: i64| (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize;
        let first = position(self.int("start").unwrap_or(0));
        first..position(self.int("end").unwrap_or(rank)).max(first)
    }

    /// Its operands that are quantised: their slots, and what the integers stand for.
    pub fn quantised_operands(&self) -> Vec<(usize, Quantisation)> {
        let Some(name) = self.known_op() else { return Vec::new() };
        match name {
            "DequantizeLinear"
            | "QLinearSoftmax"
            | "QLinearSigmoid"
            | "QLinearLeakyRelu"
            | "QLinearReduceMean"
            | "QLinearGlobalAveragePool"
            | "QLinearAveragePool" => vec![(0, by(1, 2))],
            "QLinearMatMul" | "QLinearConv" | "QLinearAdd" | "QLinearMul" | "QGemm" => {
                vec![(0, by(1, 2)), (3, by(4, 5))]
            }
            "QLinearWhere" => vec![(1, by(2, 3)), (4, by(5, 6))],
            "QLinearConcat" => (2..self.inputs.len()).step_by(3).map(|slot| (slot, by(slot + 1, slot + 2))).collect(),
            "MatMulInteger" | "ConvInteger" => vec![(0, unscaled(2)), (1, unscaled(3))],
            "MatMulIntegerToFloat" => vec![(0, by(2, 4)), (1, by(3, 5))],
            "DynamicQuantizeMatMul" => vec![(1, by(2, 3))],
            _ => Vec::new(),
        }
    }

    /// What the integers of its result stand for; `None` where they are no quantised numbers.
    pub fn quantised_result(&self) -> Option<Quantisation> {
        match self.known_op()? {
            "QuantizeLinear" => Some(by(1, 2)),
            "QLinearSoftmax"
            | "QLinearSigmoid"
            | "QLinearLeakyRelu"
            | "QLinearReduceMean"
            | "QLinearGlobalAveragePool"
            | "QLinearAveragePool" => Some(by(3, 4)),
            "QLinearMatMul" | "QLinearConv" | "QLinearAdd" | "QLinearMul" => Some(by(6, 7)),
            // Without a scale for it the result is no integer.
            "QGemm" => self.input(7).map(|_| by(7, 8)),
            "QLinearWhere" => Some(by(7, 8)),
            "QLinearConcat" => Some(by(0, 1)),
            _ => None,
        }
    }

    /// The operands but for scales and zero points, with their slots.
    pub fn data_operands(&self) -> impl Iterator<Item = (usize, ValueId)> + '_ {
        let quantised = self.quantised_operands().into_iter().map(|(_, quantisation)| quantisation);
        let parameters: Vec<usize> = quantised.chain(self.quantised_result()).flat_map(Quantisation::slots).collect();
        let given = self.inputs.iter().enumerate().filter_map(|(slot, value)| Some((slot, (*value)?)));
        given.filter(move |(slot, _)| !parameters.contains(slot))
    }
}

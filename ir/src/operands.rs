//! Which operands of an operator are what: the factors of a product, its bias, and what quantised integers stand for.

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
    pub(crate) fn bias(&self) -> Option<usize> {
        match self.known_op()? {
            "Gemm" | "FusedGemm" | "GemmFastGelu" => Some(2),
            "DynamicQuantizeMatMul" => Some(4),
            "MatMulIntegerToFloat" | "QGemm" => Some(6),
            _ => None,
        }
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

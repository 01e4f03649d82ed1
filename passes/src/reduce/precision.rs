//! Arithmetic on tokens in float32, whatever the model keeps them in: half precision is cast, quantised integers are
//! dequantised, and the result goes back the same way.

use vitrim_ir::{Attribute, DataType, Node, Quantisation, Tensor, ValueId};

use super::Rewriter;

/// How a tensor holds numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Coding {
    /// As they are, in this type.
    Plain(DataType),
    /// As integers that stand for (integer − zero point) · scale.
    Scaled {
        /// One where there is no need for it.
        scale: Option<ValueId>,
        zero_point: Option<ValueId>,
    },
}

impl Rewriter<'_> {
    /// How operand `slot` of a node holds its numbers; `None` where it has integers of which that is not known.
    pub(super) fn coding_of_operand(&self, node: &Node, slot: usize) -> Option<Coding> {
        let quantised = node.quantised_operands().into_iter().find(|(at, _)| *at == slot);
        self.coding(node, node.input(slot)?, quantised.map(|(_, quantisation)| quantisation))
    }

    /// As [`Rewriter::coding_of_operand`], of a node's result.
    pub(super) fn coding_of_result(&self, node: &Node) -> Option<Coding> {
        self.coding(node, node.output(0)?, node.quantised_result())
    }

    fn coding(&self, node: &Node, value: ValueId, quantisation: Option<Quantisation>) -> Option<Coding> {
        let dtype = self.dtype(value);
        // Other integers can be scaled from version 21 on.
        let scalable = matches!(dtype, DataType::U8 | DataType::I8) || self.model.opsets().standard() >= 21;
        match quantisation {
            _ if dtype.is_float() => Some(Coding::Plain(dtype)),
            Some(Quantisation { scale, zero_point }) if scalable => Some(Coding::Scaled {
                scale: scale.and_then(|slot| node.input(slot)),
                zero_point: node.input(zero_point),
            }),
            _ => None,
        }
    }

    /// The numbers of a tensor as float32.
    pub(super) fn as_f32(&mut self, value: ValueId, coding: Coding, hint: &str) -> ValueId {
        match coding {
            Coding::Plain(dtype) => self.cast(value, dtype, DataType::F32, &format!("{hint}_f32")),
            Coding::Scaled { scale, zero_point } => {
                let (scale, dtype) = self.scale(scale, hint);
                let number = self.scaled("DequantizeLinear", value, scale, zero_point, &format!("{hint}_numbers"));
                self.cast(number, dtype, DataType::F32, &format!("{hint}_f32"))
            }
        }
    }

    /// Numbers in float32 as the tensor held them that [`Rewriter::as_f32`] took them from.
    pub(super) fn as_coded(&mut self, value: ValueId, coding: Coding, hint: &str) -> ValueId {
        match coding {
            Coding::Plain(dtype) => self.cast(value, DataType::F32, dtype, hint),
            Coding::Scaled { scale, zero_point } => {
                let (scale, dtype) = self.scale(scale, hint);
                let number = self.cast(value, DataType::F32, dtype, &format!("{hint}_as_scale"));
                self.scaled("QuantizeLinear", number, scale, zero_point, hint)
            }
        }
    }

    /// A scale and its type, which is that of the numbers as well.
    fn scale(&mut self, scale: Option<ValueId>, hint: &str) -> (ValueId, DataType) {
        match scale {
            Some(scale) => (scale, self.dtype(scale)),
            None => (self.patch.constant(&format!("{hint}_scale"), Tensor::f32(1.0)), DataType::F32),
        }
    }

    fn scaled(&mut self, op: &str, value: ValueId, scale: ValueId, zero_point: Option<ValueId>, hint: &str) -> ValueId {
        let inputs: Vec<ValueId> = [value, scale].into_iter().chain(zero_point).collect();
        self.patch.op(op, hint, &inputs, &[])
    }

    pub(super) fn cast(&mut self, value: ValueId, from: DataType, to: DataType, hint: &str) -> ValueId {
        if from == to {
            return value;
        }
        self.patch.op("Cast", hint, &[value], &[("to", Attribute::Int(to.code().into()))])
    }
}

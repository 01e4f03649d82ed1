//! Stating older versions for readers that know no newer ones, where nothing in a model needs these.

use crate::graph::{Attribute, Def, Graph};
use crate::inline::same_meaning;
use crate::onnx::OperatorSetIdProto;
use crate::{DataType, Model};

/// Why a model needs the versions that it states.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LowerError {
    #[error("{node} is not known to mean the same in opset {to} as in {from}: export the model with opset {to}")]
    Node { node: String, from: i64, to: i64 },
    #[error("'{value}' is of type {dtype}, which version {to} of the format does not have")]
    Type { value: String, dtype: DataType, to: i64 },
    #[error("it has configurations of devices, which version {to} of the format does not have")]
    Devices { to: i64 },
}

impl Model {
    /// The same model in at most version `opset` (13 or newer) of the standard operator set and `ir_version` (4 or newer)
    /// of the format, its functions included. Nothing is converted: what means something else there is refused.
    pub fn lowered(&self, opset: i64, ir_version: i64) -> Result<Self, LowerError> {
        let mut model = self.clone();
        if self.ir_version() > ir_version {
            if !self.rest.configuration.is_empty() {
                return Err(LowerError::Devices { to: ir_version });
            }
            for graph in self.functions.iter().map(|function| &function.graph).chain([&self.graph]) {
                check_types(graph, ir_version)?;
            }
            model.rest.ir_version = Some(ir_version);
        }
        let own = (&self.graph, &mut model.opsets);
        let functions = self.functions.iter().zip(&mut model.functions);
        let functions = functions.map(|(before, function)| (&before.graph, &mut function.opsets));
        for (graph, opsets) in functions.chain([own]) {
            let from = opsets.standard();
            if from > opset {
                check_nodes(graph, from, opset)?;
                let standard = |entry: &&mut OperatorSetIdProto| matches!(entry.domain(), "" | "ai.onnx");
                opsets.0.iter_mut().filter(standard).for_each(|entry| entry.version = Some(opset));
            }
        }
        Ok(model)
    }
}

/// The version of the format that brought an element type, for those of the last ones.
fn introduced(dtype: DataType) -> i64 {
    match dtype {
        DataType::F4E2M1 => 11,
        DataType::F8E8M0 => 12,
        DataType::U2 | DataType::I2 => 13,
        DataType::U4 | DataType::I4 => 10,
        DataType::F8E4M3FN | DataType::F8E4M3FNUZ | DataType::F8E5M2 | DataType::F8E5M2FNUZ => 9,
        DataType::Unknown(_) => i64::MAX,
        _ => 0,
    }
}

fn check_types(graph: &Graph, to: i64) -> Result<(), LowerError> {
    for (_, value) in graph.values().filter(|(_, value)| !matches!(value.def(), Def::Captured(_))) {
        if let Some(ty) = value.ty().filter(|ty| introduced(ty.dtype) > to) {
            return Err(LowerError::Type { value: value.name().into(), dtype: ty.dtype, to });
        }
    }
    for (id, node) in graph.nodes() {
        if !node.rest.0.device_configurations.is_empty() {
            return Err(LowerError::Devices { to });
        }
        for (_, attribute) in &node.attributes {
            if let Attribute::Tensor(tensor) = attribute
                && introduced(tensor.dtype()) > to
            {
                return Err(LowerError::Type { value: graph.describe(id), dtype: tensor.dtype(), to });
            }
        }
        node.subgraphs().try_for_each(|nested| check_types(nested, to))?;
    }
    Ok(())
}

fn check_nodes(graph: &Graph, from: i64, to: i64) -> Result<(), LowerError> {
    for (id, node) in graph.nodes() {
        if node.op.domain.is_empty() && !same_meaning(node, from, to) {
            return Err(LowerError::Node { node: graph.describe(id), from, to });
        }
        node.subgraphs().try_for_each(|nested| check_nodes(nested, from, to))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TensorType;
    use crate::onnx::testing::*;
    use crate::onnx::{ModelProto, ValueInfo};

    /// `y = op(x)` in a version of the operator set and of the format.
    fn one(op: &str, opset: i64, ir_version: i64) -> ModelProto {
        let mut proto = model(graph(&["x"], vec![node(op, &["x"], &["y"])], &["y"]));
        proto.ir_version = Some(ir_version);
        proto.opset_import = vec![OperatorSetIdProto { domain: None, version: Some(opset) }];
        proto
    }

    #[test]
    fn versions_are_lowered_where_nothing_needs_them() {
        let lowered = one("Neg", 23, 11).read().lowered(21, 10).unwrap();
        assert_eq!((lowered.opsets().standard(), lowered.ir_version()), (21, 10));
        assert!(lowered.verify().is_ok());
        // Never raised.
        let old = one("Neg", 17, 8).read();
        assert_eq!(old.lowered(21, 10).unwrap(), old);
    }

    #[test]
    fn what_needs_a_newer_version_is_refused() {
        let told = |proto: ModelProto| proto.read().lowered(21, 10).unwrap_err().to_string();
        let swish = told(one("Swish", 24, 10));
        assert_eq!(
            swish,
            "Swish -> 'y' is not known to mean the same in opset 21 as in 24: export the model with opset 21"
        );
        let mut cast = one("Cast", 23, 11);
        let graph = cast.graph.as_mut().unwrap();
        graph.node[0] = node("Cast", &["x"], &["y"]).with_int("to", DataType::F4E2M1.code().into());
        let mut info = info("y");
        info.r#type = ValueInfo::of(&TensorType { dtype: DataType::F4E2M1, dims: None }).0.r#type;
        graph.output = vec![info];
        assert_eq!(told(cast), "'y' is of type f4e2m1, which version 10 of the format does not have");
    }
}

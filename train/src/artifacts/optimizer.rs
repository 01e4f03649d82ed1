//! The model that takes a step.

use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, TensorType};
use vitrim_passes::Refusal;

use super::{MICROSOFT, refuse};
use crate::optimizer::{Optimizer, Update};

/// The model. The runtime feeds its inputs by position and changes parameters and moments in place.
///
/// # Errors
///
/// [`Refusal::Request`] for what the runtime's operators cannot do: momentum and decay of SGD, running means.
pub(super) fn model(update: &Update) -> Result<Model, Refusal> {
    if update.ema.is_some() {
        return Err(refuse("it keeps no running means of parameters"));
    }
    let one = |dtype| TensorType { dtype, dims: Some(vec![DimSpec::Known(1)]) };
    let tensors = TensorType { dtype: DataType::F32, dims: None };
    let mut graph = GraphBuilder::new();
    let rate = graph.input("learning_rate", Some(&one(DataType::F32)));
    let step = graph.input("step", Some(&one(DataType::I64)));
    let parameters = graph.sequence_input("params", &tensors);
    let mut gradients = graph.sequence_input("gradients", &tensors);
    let first = graph.sequence_input("first_order_moments", &tensors);
    if let Some(norm) = update.clip {
        let op = OpType::of(MICROSOFT, "InplaceClipGradNorm");
        let attributes = [("max_norm", Attribute::Float(norm as f32))];
        gradients = graph.call(op, "clipped_gradients", vec![Some(gradients)], &attributes, 1)[0];
    }
    let done = match update.optimizer {
        Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } => {
            let second = graph.sequence_input("second_order_moments", &tensors);
            let float = |value: f64| Attribute::Float(value as f32);
            let attributes = [
                ("alpha", float(beta1)),
                ("beta", float(beta2)),
                ("epsilon", float(epsilon)),
                ("weight_decay", float(weight_decay)),
                ("correct_bias", Attribute::Int(1)),
                // Decay first, and epsilon beside the corrected root: PyTorch's; 1 is that of Transformers.
                ("adam_mode", Attribute::Int(0)),
            ];
            let inputs = [rate, step, parameters, gradients, first, second].map(Some).to_vec();
            graph.call(OpType::of(MICROSOFT, "AdamWOptimizer"), "updated", inputs, &attributes, 1)[0]
        }
        Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0 } => {
            let inputs = [rate, parameters, gradients].map(Some).to_vec();
            graph.call(OpType::of(MICROSOFT, "SGDOptimizerV2"), "updated", inputs, &[], 1)[0]
        }
        Optimizer::Sgd { .. } => return Err(refuse("its gradient descent has neither momentum nor weight decay")),
    };
    graph.output("updated_flag", done, Some(&one(DataType::Bool)));
    Ok(graph.into_model(8, &[("", 17), (MICROSOFT, 1)], Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Optimizer = Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0 };

    fn update(optimizer: Optimizer) -> Update {
        Update { optimizer, clip: None, ema: None, accumulate: false }
    }

    #[test]
    fn inputs_and_operators_are_those_that_the_runtime_expects() {
        let names = ["learning_rate", "step", "params", "gradients", "first_order_moments", "second_order_moments"];
        for (update, inputs, operators) in [
            (update(Optimizer::ADAMW), &names[..], &["AdamWOptimizer"][..]),
            (Update { clip: Some(1.0), ..update(PLAIN) }, &names[..5], &["InplaceClipGradNorm", "SGDOptimizerV2"]),
        ] {
            let model = model(&update).unwrap();
            let graph = model.graph();
            assert!(graph.inputs().iter().map(|&input| graph.value(input).name()).eq(inputs.iter().copied()));
            assert!(graph.nodes().map(|(_, node)| node.op.name.as_str()).eq(operators.iter().copied()));
        }
    }

    #[test]
    fn what_the_runtime_cannot_do_is_refused() {
        let told = |update: &Update| model(update).unwrap_err().to_string();
        let reason = "ONNX Runtime Training 1.19.2 cannot train it: its gradient descent has neither momentum nor weight \
                      decay";
        assert_eq!(told(&update(Optimizer::SGD)), reason);
        assert_eq!(told(&update(Optimizer::Sgd { momentum: 0.0, weight_decay: 0.1 })), reason);
        let means = told(&Update { ema: Some(0.9), ..update(PLAIN) });
        assert_eq!(means, "ONNX Runtime Training 1.19.2 cannot train it: it keeps no running means of parameters");
    }
}

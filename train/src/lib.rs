//! Training graphs: a model's parameters, a loss, its gradients and an optimizer in one file.
#![forbid(unsafe_code)]

pub mod loss;
pub mod parameters;

use std::collections::HashMap;

use vitrim_autodiff::{Emitter, gradients, rules};
use vitrim_ir::{DataType, Model, Patch, Shapes, ValueId};
use vitrim_passes::Refusal;

use crate::loss::{Heads, Loss, declared};
use crate::parameters::{Parameter, parameters, separate};

/// A graph of loss and gradients.
#[derive(Debug)]
pub struct Gradients {
    /// The graph: its inputs are the model's, the labels and the parameters; its outputs are those of the loss, and the
    /// gradients.
    pub model: Model,
    /// The values of the loss.
    pub heads: Heads,
    /// The parameters, with the names of their gradients where they are trained.
    pub parameters: Vec<(Parameter, Option<String>)>,
}

fn internal(error: impl std::fmt::Display) -> Refusal {
    Refusal::Internal(error.to_string())
}

/// The graph that computes a loss of a prepared model, and its gradients.
pub fn gradient_graph(model: &Model, loss: &Loss, output: Option<&str>) -> Result<Gradients, Refusal> {
    let model = separate(model)?;
    let (model, heads) = loss::attach(&model, loss, output)?;
    let shapes = Shapes::infer(&model);
    let parameters = parameters(&model);
    let wrt: Vec<ValueId> = parameters.iter().filter(|parameter| parameter.trainable).map(|one| one.value).collect();
    let mut patch = Patch::new(&model, "gradients");
    let found: HashMap<ValueId, ValueId> = {
        let mut emit = Emitter::new(&model, &shapes, &mut patch);
        let of = model.graph().outputs()[0];
        let one = emit.number(DataType::F32, 1.0);
        gradients(&mut emit, &[(of, one)], &wrt, &rules::standard)
            .map_err(|error| Refusal::Request(error.to_string()))?
    };
    let mut list = Vec::new();
    for parameter in parameters {
        let Some(&gradient) = found.get(&parameter.value) else { continue };
        patch.externalise(parameter.value, &parameter.name);
        let name = format!("{}.grad", parameter.name);
        let ty = declared(&shapes, parameter.value, DataType::F32);
        patch.append_output(&name, gradient, ty);
        list.push((parameter, Some(name)));
    }
    let (model, _) = patch.apply(&model).map_err(internal)?;
    model.verify().map_err(internal)?;
    Ok(Gradients { model, heads, parameters: list })
}

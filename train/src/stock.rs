//! Training in any ONNX Runtime: graphs of standard operators and ours, fed with parameters and optimizer state and giving
//! back what they are after the step.

use vitrim_ir::Model;
use vitrim_passes::Refusal;

use crate::manifest::{Graphs, Manifest, ParameterEntry, ScheduleEntry};
use crate::optimizer::{self, Trained, Update};
use crate::{Training, gradient_name};

/// The files, by name, and what they are.
#[derive(Debug)]
pub struct Stock {
    /// Graphs by file name.
    pub graphs: Vec<(String, Model)>,
    /// What they are.
    pub manifest: Manifest,
}

/// The graphs of a training: with an update a whole step, without one the gradients alone.
pub fn stock(training: Training, update: Option<&Update>) -> Result<Stock, Refusal> {
    let Training { eval, gradients, last, earlier, heads, parameters, dials, .. } = training;
    let is_parameter = |name: &str| parameters.iter().any(|parameter| parameter.name == name);
    let inputs = eval.graph().feeds().map(|input| eval.graph().value(input).name().to_owned());
    let inputs = inputs.filter(|name| !is_parameter(name) && heads.labels.as_ref() != Some(name)).collect();
    let trained: Vec<Trained> = parameters
        .iter()
        .filter(|parameter| parameter.trainable)
        .map(|parameter| Trained {
            name: parameter.name.clone(),
            gradient: gradient_name(&parameter.name),
            decay: parameter.decay,
        })
        .collect();
    let entries = parameters.iter().map(|parameter| ParameterEntry {
        name: parameter.name.clone(),
        gradient: parameter.trainable.then(|| gradient_name(&parameter.name)),
        shape: parameter.tensor.dims().to_vec(),
        trainable: parameter.trainable,
        decay: parameter.decay,
    });
    let mut manifest = Manifest {
        schema_version: 1,
        graphs: Graphs { eval: "eval.onnx".into(), ..Graphs::default() },
        inputs,
        labels: heads.labels,
        loss: heads.loss,
        logits: heads.logits,
        per_example_loss: heads.per_example,
        correct: heads.correct,
        parameters: entries.collect(),
        dials: dials.iter().map(Into::into).collect(),
        scalars: Vec::new(),
        schedules: Vec::new(),
        state: Vec::new(),
        accumulated: Vec::new(),
    };
    let mut graphs = vec![("eval.onnx".to_owned(), eval)];
    let kind = if update.is_some() { "train" } else { "gradients" };
    let earlier =
        earlier.into_iter().map(|stage| (stage.of, format!("{kind}_{}.onnx", stage.of.keep), stage.gradients));
    for (of, file, gradients) in earlier.chain([(last, format!("{kind}.onnx"), gradients.clone())]) {
        let graph = match update {
            Some(update) => {
                let (train, next) = optimizer::stepping(&gradients, &trained, update)?;
                // The same of every stage: what a step changes does not depend on the tokens.
                manifest.state = next.iter().map(Into::into).collect();
                train
            }
            None => gradients,
        };
        manifest.schedules.push(ScheduleEntry { epoch: of.epoch, keep: of.keep, graph: file.clone() });
        graphs.push((file, graph));
    }
    match update {
        None => manifest.graphs.gradients = Some("gradients.onnx".into()),
        Some(update) => {
            manifest.scalars = update.scalars().into_iter().map(Into::into).collect();
            manifest.graphs.train = Some("train.onnx".into());
            if update.accumulate {
                let (accumulate, next) = optimizer::accumulating(&gradients, &trained)?;
                manifest.accumulated = next.iter().map(Into::into).collect();
                manifest.graphs.accumulate = Some("accumulate.onnx".into());
                graphs.push(("accumulate.onnx".into(), accumulate));
            }
        }
    }
    Ok(Stock { graphs, manifest })
}

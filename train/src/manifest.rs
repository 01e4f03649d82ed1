//! What a folder of training graphs holds, for the program that runs them.

use serde::Serialize;

use crate::Dial;
use crate::optimizer::Next;

/// The manifest: `manifest.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// Version of this layout.
    pub schema_version: u32,
    /// The files.
    pub graphs: Graphs,
    /// What the model is fed, beside labels and parameters.
    pub inputs: Vec<String>,
    /// The input with what the output should be.
    pub labels: Option<String>,
    /// The scalar that is made small.
    pub loss: String,
    /// The output that is judged.
    pub logits: Option<String>,
    /// The loss of each example.
    pub per_example_loss: Option<String>,
    /// Whether each example's likeliest class is right.
    pub correct: Option<String>,
    /// The parameters: inputs of all graphs. `parameters.safetensors` has what they begin with.
    pub parameters: Vec<ParameterEntry>,
    /// Inputs of the graphs that train which may be left out: how much is done to the tokens.
    pub dials: Vec<DialEntry>,
    /// What the step beside is fed: learning rate, number of the step and of batches, where there are any.
    pub scalars: Vec<String>,
    /// Which graph trains from which epoch on; the last is the one of `graphs`.
    pub schedules: Vec<ScheduleEntry>,
    /// What a step changes.
    pub state: Vec<StateEntry>,
    /// What the batches before the last of a step change.
    pub accumulated: Vec<StateEntry>,
}

/// Files by what they compute.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Graphs {
    /// A whole step: loss, and what parameters and optimizer are after it.
    pub train: Option<String>,
    /// Loss, and the sum of gradients so far.
    pub accumulate: Option<String>,
    /// Loss and outputs of the original model.
    pub eval: String,
    /// Loss and gradients.
    pub gradients: Option<String>,
}

/// A stage of the training.
#[derive(Clone, Debug, Serialize)]
pub struct ScheduleEntry {
    /// Its first epoch.
    pub epoch: usize,
    /// The share of the tokens that are kept in it.
    pub keep: f64,
    /// The graph of its steps: of gradients where there is no optimizer.
    pub graph: String,
}

/// A parameter.
#[derive(Clone, Debug, Serialize)]
pub struct ParameterEntry {
    /// Its input.
    pub name: String,
    /// The output of the gradients graph with its gradient, where it is trained.
    pub gradient: Option<String>,
    /// Its extents.
    pub shape: Vec<i64>,
    /// Whether it is trained.
    pub trainable: bool,
    /// Whether the optimizer decays it.
    pub decay: bool,
}

/// A number that a graph that trains can be told.
#[derive(Clone, Debug, Serialize)]
pub struct DialEntry {
    /// Its input, a scalar: `r` (tokens to merge in each block), `keep` (the share of the patches to keep) or
    /// `attention_keep` (that of the connections between them).
    pub input: String,
    /// `int64` or `float64`.
    pub dtype: String,
    /// What it is where it is left out.
    pub default: f64,
}

/// An input that is, in the next run, what an output is in this one.
#[derive(Clone, Debug, Serialize)]
pub struct StateEntry {
    /// The input.
    pub input: String,
    /// The output.
    pub output: String,
    /// What the input is in the first run: a parameter's elements, or zeros of a parameter's shape.
    pub initial: Initial,
    /// The parameter whose elements, or shape, it has.
    pub parameter: String,
}

/// How state begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Initial {
    /// As the parameter.
    Parameter,
    /// With zeros.
    Zeros,
}

impl From<&Dial> for DialEntry {
    fn from(Dial { name, default }: &Dial) -> Self {
        let (dtype, default) = match default.to_i64s() {
            Some(integers) => ("int64", integers.first().map(|&integer| integer as f64)),
            None => ("float64", default.to_f64s().and_then(|numbers| numbers.first().copied())),
        };
        Self { input: name.clone(), dtype: dtype.into(), default: default.unwrap_or_default() }
    }
}

impl From<&Next> for StateEntry {
    fn from(next: &Next) -> Self {
        let initial = if next.copies { Initial::Parameter } else { Initial::Zeros };
        let Next { input, output, parameter, .. } = next.clone();
        Self { input, output, initial, parameter }
    }
}

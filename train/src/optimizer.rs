//! Optimizers: from gradients to the parameters after a step.

use vitrim_ir::{Attribute, DataType, Model, Patch, Tensor, TensorType, ValueId};
use vitrim_ops::{AdamW, DOMAIN, OpDef, VERSION};
use vitrim_passes::Refusal;

use crate::internal;

/// The input with the learning rate, a float32 scalar.
pub const LEARNING_RATE: &str = "learning_rate";
/// The input with the number of the step, an int64 scalar: 1 for the first.
pub const STEP: &str = "step";
/// The output with the norm of all gradients together, before they are clipped.
pub const GRADIENT_NORM: &str = "gradient_norm";

/// How parameters follow their gradients.
#[derive(Clone, Debug, PartialEq)]
pub enum Optimizer {
    /// Adam with decoupled weight decay (arXiv 1711.05101).
    AdamW {
        /// β₁, of the first moment.
        beta1: f64,
        /// β₂, of the second moment.
        beta2: f64,
        /// What keeps divisors from zero.
        epsilon: f64,
        /// Share of a parameter that a step takes away, times the learning rate.
        weight_decay: f64,
    },
    /// Stochastic gradient descent with momentum; decay is added to gradients.
    Sgd {
        /// Share of the former steps in the next.
        momentum: f64,
        /// Share of a parameter that is added to its gradient.
        weight_decay: f64,
    },
}

impl Optimizer {
    /// AdamW as most Vision Transformers are trained.
    pub const ADAMW: Self = Self::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.05 };
    /// Plain momentum.
    pub const SGD: Self = Self::Sgd { momentum: 0.9, weight_decay: 0.0 };

    /// What it keeps of each parameter from step to step.
    fn state(&self) -> &'static [&'static str] {
        match self {
            Self::AdamW { .. } => &["exp_avg", "exp_avg_sq"],
            Self::Sgd { .. } => &["momentum"],
        }
    }
}

/// What is done with gradients and parameters beside the optimizer's step.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Largest norm of all gradients together; larger ones are scaled down to it.
    pub clip: Option<f64>,
    /// Share of the running mean of a parameter that a step keeps, where such means are wanted.
    pub ema: Option<f64>,
    /// Whether gradients of earlier batches come in as inputs, to be averaged with this one's.
    pub accumulate: bool,
}

impl Update {
    /// The scalars that a step is fed.
    pub fn scalars(&self) -> Vec<&'static str> {
        let step = matches!(self.optimizer, Optimizer::AdamW { .. }).then_some(STEP);
        [Some(LEARNING_RATE), step, self.accumulate.then_some(BATCHES)].into_iter().flatten().collect()
    }
}

/// A trained parameter of a gradient graph.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The input with its elements.
    pub name: String,
    /// The output with its gradient.
    pub gradient: String,
    /// Whether it decays.
    pub decay: bool,
}

/// What a step changes: an input of the next step is an output of this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The input.
    pub input: String,
    /// The output.
    pub output: String,
    /// The parameter that it belongs to.
    pub parameter: String,
    /// Whether it begins as that parameter; with zeros of its shape where it does not.
    pub copies: bool,
}

/// The names of what gradients add up in from batch to batch.
pub fn accumulated(parameter: &str) -> String {
    format!("{parameter}.accumulated")
}

/// The input with the number of batches that a step averages over, a float32 scalar.
pub const BATCHES: &str = "batches";

/// A graph that adds its gradients to those that came in, for all batches of a step but the last.
pub fn accumulating(gradients: &Model, trained: &[Trained]) -> Result<(Model, Vec<Next>), Refusal> {
    let mut writer = Writer::new(gradients, "accumulate");
    let mut next = Vec::new();
    for parameter in trained {
        let (gradient, ty) = writer.output(&parameter.gradient)?;
        let sum = writer.with_accumulated(parameter, gradient, &ty);
        next.push(writer.next(&accumulated(&parameter.name), &parameter.name, false, sum, &ty));
    }
    writer.finish(&trained.iter().map(|one| one.gradient.as_str()).collect::<Vec<_>>(), next)
}

/// The graph of a whole step: gradients as they are computed by `gradients`, and the parameters after it.
pub fn stepping(gradients: &Model, trained: &[Trained], update: &Update) -> Result<(Model, Vec<Next>), Refusal> {
    let mut writer = Writer::new(gradients, "optimizer");
    let scalar = |dtype| TensorType { dtype, dims: Some(Vec::new()) };
    let rate = writer.patch.feed(LEARNING_RATE, &scalar(DataType::F32));
    let batches = update.accumulate.then(|| writer.patch.feed(BATCHES, &scalar(DataType::F32)));
    let mut found = Vec::new();
    for parameter in trained {
        let (gradient, ty) = writer.output(&parameter.gradient)?;
        let gradient = match batches {
            Some(batches) => {
                let sum = writer.with_accumulated(parameter, gradient, &ty);
                writer.op("Div", &parameter.name, &[sum, batches])
            }
            None => gradient,
        };
        found.push((parameter, gradient, ty));
    }
    let scale = update.clip.map(|limit| {
        let all: Vec<ValueId> = found.iter().map(|(_, gradient, _)| *gradient).collect();
        writer.clipping(&all, limit)
    });
    let step = Step::new(&mut writer, &update.optimizer, rate);
    let mut next = Vec::new();
    for (parameter, gradient, ty) in found {
        let name = &parameter.name;
        let gradient = match scale {
            Some(scale) => writer.op("Mul", name, &[gradient, scale]),
            None => gradient,
        };
        let value = writer.gradients.graph().find_value(name).ok_or_else(|| internal(format!("'{name}' is gone")))?;
        let state: Vec<String> = update.optimizer.state().iter().map(|kind| format!("{name}.{kind}")).collect();
        let moments: Vec<ValueId> = state.iter().map(|name| writer.patch.feed(name, &ty)).collect();
        let made = step.of(&mut writer, name, value, gradient, &moments, parameter.decay);
        next.push(writer.next(name, name, true, made[0], &ty));
        for (state, made) in state.iter().zip(&made[1..]) {
            next.push(writer.next(state, name, false, *made, &ty));
        }
        if let Some(kept) = update.ema {
            let mean = format!("{name}.ema");
            let before = writer.patch.feed(&mean, &ty);
            let away = writer.op("Sub", &mean, &[made[0], before]);
            let share = writer.number(1.0 - kept);
            let by = writer.op("Mul", &mean, &[away, share]);
            let after = writer.op("Add", &mean, &[before, by]);
            next.push(writer.next(&mean, name, true, after, &ty));
        }
    }
    writer.finish(&trained.iter().map(|one| one.gradient.as_str()).collect::<Vec<_>>(), next)
}

/// What a step has in common for all parameters.
enum Step {
    AdamW { rate: ValueId, deviation: ValueId, kept: ValueId, whole: ValueId, attributes: [(&'static str, f32); 3] },
    Sgd { rate: ValueId, momentum: ValueId, decay: Option<ValueId> },
}

impl Step {
    fn new(writer: &mut Writer, optimizer: &Optimizer, rate: ValueId) -> Self {
        match *optimizer {
            Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } => {
                let count = writer.patch.feed(STEP, &TensorType { dtype: DataType::I64, dims: Some(Vec::new()) });
                // In float64: 1 − 0.999 has no digits left in float32 to lose.
                let count = writer.cast(count, DataType::F64);
                let [first, second] = [beta1, beta2].map(|beta| {
                    let beta = writer.constant(DataType::F64, beta);
                    let power = writer.op("Pow", STEP, &[beta, count]);
                    let one = writer.constant(DataType::F64, 1.0);
                    writer.op("Sub", STEP, &[one, power])
                });
                let root = writer.op("Sqrt", STEP, &[second]);
                let (first, deviation) = (writer.cast(first, DataType::F32), writer.cast(root, DataType::F32));
                let unbiased = writer.op("Div", LEARNING_RATE, &[rate, first]);
                let (decay, whole) = (writer.number(weight_decay), writer.number(1.0));
                let lost = writer.op("Mul", LEARNING_RATE, &[rate, decay]);
                let kept = writer.op("Sub", LEARNING_RATE, &[whole, lost]);
                let attributes = [("mean_rate", 1.0 - beta1), ("variance_rate", 1.0 - beta2), ("epsilon", epsilon)];
                let attributes = attributes.map(|(name, value)| (name, value as f32));
                writer.patch.function(AdamW.function(writer.gradients.opsets().standard()));
                writer.patch.import(DOMAIN, VERSION);
                Self::AdamW { rate: unbiased, deviation, kept, whole, attributes }
            }
            Optimizer::Sgd { momentum, weight_decay } => {
                let momentum = writer.number(momentum);
                let decay = (weight_decay != 0.0).then(|| writer.number(weight_decay));
                Self::Sgd { rate, momentum, decay }
            }
        }
    }

    /// The parameter and its state after the step.
    fn of(
        &self,
        writer: &mut Writer,
        name: &str,
        parameter: ValueId,
        gradient: ValueId,
        state: &[ValueId],
        decays: bool,
    ) -> Vec<ValueId> {
        match *self {
            Self::AdamW { rate, deviation, kept, whole, attributes } => {
                let kept = if decays { kept } else { whole };
                let inputs = [parameter, gradient, state[0], state[1], kept, rate, deviation].map(Some);
                let attributes = attributes.map(|(name, value)| (name, Attribute::Float(value)));
                let hint = format!("{}/{name}", AdamW.name());
                writer.patch.call(AdamW.op_type(), &hint, inputs.to_vec(), &attributes, 3)
            }
            Self::Sgd { rate, momentum, decay } => {
                let gradient = match decay.filter(|_| decays) {
                    Some(decay) => {
                        let decay = writer.op("Mul", name, &[parameter, decay]);
                        writer.op("Add", name, &[gradient, decay])
                    }
                    None => gradient,
                };
                let former = writer.op("Mul", name, &[state[0], momentum]);
                let direction = writer.op("Add", name, &[former, gradient]);
                let step = writer.op("Mul", name, &[direction, rate]);
                vec![writer.op("Sub", name, &[parameter, step]), direction]
            }
        }
    }
}

/// Writes what follows the gradients.
struct Writer<'g> {
    gradients: &'g Model,
    patch: Patch,
    pass: &'static str,
}

impl<'g> Writer<'g> {
    fn new(gradients: &'g Model, pass: &'static str) -> Self {
        let mut patch = Patch::new(gradients, pass);
        (0..gradients.graph().outputs().len()).for_each(|slot| patch.remove_output(slot));
        Self { gradients, patch, pass }
    }

    fn op(&mut self, name: &str, hint: &str, inputs: &[ValueId]) -> ValueId {
        self.patch.op(name, &format!("{}/{hint}", self.pass), inputs, &[])
    }

    fn constant(&mut self, dtype: DataType, value: f64) -> ValueId {
        let hint = format!("{}/number", self.pass);
        self.patch.constant(&hint, Tensor::floats(dtype, &[], &[value]))
    }

    fn number(&mut self, value: f64) -> ValueId {
        self.constant(DataType::F32, value)
    }

    fn cast(&mut self, value: ValueId, to: DataType) -> ValueId {
        let to = [("to", Attribute::Int(to.code().into()))];
        self.patch.op("Cast", &format!("{}/cast", self.pass), &[value], &to)
    }

    /// An output of the gradient graph, and its type.
    fn output(&self, name: &str) -> Result<(ValueId, TensorType), Refusal> {
        let graph = self.gradients.graph();
        let value = graph.outputs().iter().copied().find(|&output| graph.value(output).name() == name);
        let value = value.ok_or_else(|| internal(format!("there is no gradient '{name}'")))?;
        let ty = graph.value(value).ty().ok_or_else(|| internal(format!("'{name}' has no type")))?;
        Ok((value, ty))
    }

    /// This batch's gradient and those of earlier ones, which are a new input, added up.
    fn with_accumulated(&mut self, parameter: &Trained, gradient: ValueId, ty: &TensorType) -> ValueId {
        let name = accumulated(&parameter.name);
        let before = self.patch.feed(&name, ty);
        self.op("Add", &name, &[before, gradient])
    }

    /// What gradients are multiplied by so that their norm is at most `limit`.
    fn clipping(&mut self, gradients: &[ValueId], limit: f64) -> ValueId {
        let squares: Vec<ValueId> = gradients
            .iter()
            .map(|&gradient| {
                let keep = [("keepdims", Attribute::Int(0))];
                self.patch.op("ReduceSumSquare", "optimizer/squares", &[gradient], &keep)
            })
            .collect();
        let total = self.op("Sum", GRADIENT_NORM, &squares);
        let norm = self.op("Sqrt", GRADIENT_NORM, &[total]);
        self.patch.append_output(GRADIENT_NORM, norm, TensorType { dtype: DataType::F32, dims: Some(Vec::new()) });
        let [limit, least, one] = [limit, 1e-6, 1.0].map(|value| self.number(value));
        let divisor = self.op("Add", GRADIENT_NORM, &[norm, least]);
        let scale = self.op("Div", GRADIENT_NORM, &[limit, divisor]);
        self.op("Min", GRADIENT_NORM, &[scale, one])
    }

    /// Lets `value` be an output: what the input `input` is in the next step.
    fn next(&mut self, input: &str, parameter: &str, copies: bool, value: ValueId, ty: &TensorType) -> Next {
        let output = format!("{input}.next");
        self.patch.append_output(&output, value, ty.clone());
        Next { input: input.into(), output, parameter: parameter.into(), copies }
    }

    /// The graph with the outputs of the gradient graph but for `without`, and those appended.
    fn finish(mut self, without: &[&str], next: Vec<Next>) -> Result<(Model, Vec<Next>), Refusal> {
        let graph = self.gradients.graph();
        for &output in graph.outputs() {
            let value = graph.value(output);
            if !without.contains(&value.name()) {
                let ty = value.ty().ok_or_else(|| internal(format!("'{}' has no type", value.name())))?;
                self.patch.append_output(value.name(), output, ty);
            }
        }
        let (model, _) = self.patch.apply(self.gradients).map_err(internal)?;
        model.verify().map_err(internal)?;
        Ok((model, next))
    }
}

//! Losses.

use vitrim_autodiff::{Emitter, Undefined};
use vitrim_ir::{Attribute, DataType, DimSpec, Expr, Model, OpType, Patch, Shapes, Tensor, TensorType, ValueId};
use vitrim_passes::Refusal;

/// What is made small.
#[derive(Clone, Debug, PartialEq)]
pub enum Loss {
    /// Cross-entropy of a softmax over the last of two axes.
    CrossEntropy {
        /// Share of the target that is spread over all classes, from 0 to 1.
        label_smoothing: f64,
        /// Whether the target is a distribution `[B, C]` (mixup, distillation) instead of a class `[B]`.
        soft_targets: bool,
    },
    /// Binary cross-entropy of a sigmoid, entry by entry; the targets are of the outputs' shape.
    BinaryCrossEntropy,
    /// The mean of squared differences; the targets are of the outputs' shape.
    MeanSquaredError,
    /// An output of the model: a scalar.
    Output(String),
}

/// The values of a loss. All but `loss` are left out where the model computes it itself.
#[derive(Clone, Debug)]
pub struct Heads {
    /// The model's output that is judged.
    pub logits: Option<String>,
    /// The input with what it should be.
    pub labels: Option<String>,
    /// The mean over the batch, a scalar.
    pub loss: String,
    /// The loss of each example, `[B]`.
    pub per_example: Option<String>,
    /// Whether the likeliest class is the target's, `[B]` bool; of cross-entropy only.
    pub correct: Option<String>,
}

/// What is known of a value as a declared type.
pub(crate) fn declared(shapes: &Shapes, value: ValueId, dtype: DataType) -> TensorType {
    let dim = |dim: &Expr| match (dim.as_known(), dim.as_symbol()) {
        (Some(n), _) => DimSpec::Known(n),
        (None, Some(name)) => DimSpec::Named(name.into()),
        (None, None) => DimSpec::Unknown,
    };
    TensorType { dtype, dims: shapes.dims(value).map(|dims| dims.iter().map(dim).collect()) }
}

/// The model with a loss on its output `output` (the first where none is named), which then are all its outputs: the loss,
/// what it is of each example, whether it was right, and the output itself.
pub fn attach(model: &Model, loss: &Loss, output: Option<&str>) -> Result<(Model, Heads), Refusal> {
    let graph = model.graph();
    let named = |name: &str| {
        let outputs = graph.outputs().iter().copied();
        let names = || outputs.clone().map(|output| graph.value(output).name()).collect::<Vec<_>>().join(", ");
        outputs
            .clone()
            .find(|&output| graph.value(output).name() == name)
            .ok_or_else(|| Refusal::Request(format!("the model has no output '{name}'; its outputs are {}", names())))
    };
    let shapes = Shapes::infer(model);
    let mut patch = Patch::new(model, "loss");
    (0..graph.outputs().len()).for_each(|slot| patch.remove_output(slot));
    let heads = match loss {
        Loss::Output(name) => {
            let value = named(name)?;
            if shapes.dims(value).is_none_or(|dims| !dims.is_empty()) {
                return Err(Refusal::Request(format!("the output '{name}' is no scalar, which a loss must be")));
            }
            patch.append_output(name, value, declared(&shapes, value, DataType::F32));
            Heads { logits: None, labels: None, loss: name.clone(), per_example: None, correct: None }
        }
        _ => {
            let value = match output {
                Some(name) => named(name)?,
                None => *graph.outputs().first().ok_or_else(|| Refusal::Request("the model has no output".into()))?,
            };
            let name = graph.value(value).name().to_owned();
            let refuse =
                |Undefined(reason)| Refusal::Request(format!("there is no loss of the output '{name}': {reason}"));
            Writer { emit: Emitter::new(model, &shapes, &mut patch), logits: value, name: name.clone() }
                .write(loss)
                .map_err(refuse)?
        }
    };
    let (model, _) = patch.apply(model).map_err(|error| Refusal::Internal(error.to_string()))?;
    Ok((model, heads))
}

struct Writer<'p> {
    emit: Emitter<'p>,
    logits: ValueId,
    name: String,
}

impl Writer<'_> {
    fn write(mut self, loss: &Loss) -> Result<Heads, Undefined> {
        let (logits, dtype) = (self.logits, DataType::F32);
        if self.emit.dtype(logits)? != dtype {
            return Err("it is no float32".into());
        }
        self.emit.name_after("loss");
        let like = declared(self.emit.shapes, logits, dtype);
        let batch = like.dims.as_ref().and_then(|dims| dims.first().cloned()).ok_or("it has no batch")?;
        let per_example_type = |dtype| TensorType { dtype, dims: Some(vec![batch.clone()]) };
        let rank = self.emit.rank(logits)?;
        let (per_example, correct) = match loss {
            Loss::CrossEntropy { label_smoothing, soft_targets } => {
                if rank != 2 {
                    return Err("cross-entropy is of [batch, classes]".into());
                }
                let (target, class) = match soft_targets {
                    true => {
                        let labels = self.emit.patch().feed("labels", &like);
                        let attributes = [("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(0))];
                        let class = self.emit.op_with("ArgMax", &[labels], &attributes);
                        (self.smooth(labels, *label_smoothing)?, class)
                    }
                    false => {
                        let labels = self.emit.patch().feed("labels", &per_example_type(DataType::I64));
                        (self.one_hot(labels, *label_smoothing)?, labels)
                    }
                };
                let log = self.emit.op_with("LogSoftmax", &[logits], &[("axis", Attribute::Int(-1))]);
                let weighted = self.emit.op("Mul", &[target, log]);
                let sum = self.emit.reduce("ReduceSum", weighted, &[1], false);
                let per_example = self.emit.op("Neg", &[sum]);
                let attributes = [("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(0))];
                let predicted = self.emit.op_with("ArgMax", &[logits], &attributes);
                let correct = self.emit.op("Equal", &[predicted, class]);
                (per_example, Some(correct))
            }
            Loss::BinaryCrossEntropy => {
                let labels = self.emit.patch().feed("labels", &like);
                let certain = self.emit.op("Softplus", &[logits]);
                let right = self.emit.op("Mul", &[logits, labels]);
                let entries = self.emit.op("Sub", &[certain, right]);
                (self.mean_of_each(entries, rank), None)
            }
            _ => {
                let labels = self.emit.patch().feed("labels", &like);
                let difference = self.emit.op("Sub", &[logits, labels]);
                let squares = self.emit.op("Mul", &[difference, difference]);
                (self.mean_of_each(squares, rank), None)
            }
        };
        let loss = self.emit.reduce("ReduceMean", per_example, &[0], false);
        let name = self.name.clone();
        let patch = self.emit.patch();
        patch.append_output("loss", loss, TensorType { dtype, dims: Some(Vec::new()) });
        patch.append_output("per_example_loss", per_example, per_example_type(dtype));
        if let Some(correct) = correct {
            patch.append_output("correct", correct, per_example_type(DataType::Bool));
        }
        patch.append_output(&name, logits, like);
        Ok(Heads {
            logits: Some(name),
            labels: Some("labels".into()),
            loss: "loss".into(),
            per_example: Some("per_example_loss".into()),
            correct: correct.map(|_| "correct".into()),
        })
    }

    /// The number of classes.
    fn classes(&self) -> Result<i64, Undefined> {
        let last = self.emit.dims(self.logits)?.last().and_then(Expr::as_known);
        last.ok_or_else(|| "the number of classes is unknown".into())
    }

    fn smooth(&mut self, target: ValueId, smoothing: f64) -> Result<ValueId, Undefined> {
        if smoothing == 0.0 {
            return Ok(target);
        }
        let classes = self.classes()? as f64;
        let (kept, spread) =
            (self.emit.number(DataType::F32, 1.0 - smoothing), self.emit.number(DataType::F32, smoothing / classes));
        let scaled = self.emit.op("Mul", &[target, kept]);
        Ok(self.emit.op("Add", &[scaled, spread]))
    }

    fn one_hot(&mut self, labels: ValueId, smoothing: f64) -> Result<ValueId, Undefined> {
        let classes = self.classes()?;
        let off = smoothing / classes as f64;
        let values = Tensor::floats(DataType::F32, &[2], &[off, 1.0 - smoothing + off]);
        let values = self.emit.patch().constant("loss/off_on", values);
        let depth = self.emit.ints(&[classes]);
        let inputs = [Some(labels), Some(depth), Some(values)];
        Ok(self.emit.call(OpType::standard("OneHot"), &inputs, &[("axis", Attribute::Int(-1))], 1)[0])
    }

    /// The mean over all axes but the first.
    fn mean_of_each(&mut self, entries: ValueId, rank: usize) -> ValueId {
        match rank {
            1 => entries,
            _ => {
                let axes: Vec<i64> = (1..rank as i64).collect();
                self.emit.reduce("ReduceMean", entries, &axes, false)
            }
        }
    }
}

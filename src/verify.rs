//! `vitrim verify`: does a candidate compute what a reference computes?
//!
//! Both are run on the same feeds and compared output by output ([`Comparison`]). Without a tolerance nothing is judged
//! but shapes, missing outputs and values that are not finite; each tolerance given is one more check per output. The
//! reference may also be an `.npz` of recorded runs.

mod report;
pub(crate) mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::feeds::{self, Batch, FeedArgs};
use crate::runtime::{self, Backends, Dim, Outputs, Port, RuntimeArgs, Session};
use crate::tensor::compare::{Comparison, Ratio, ShapeMismatch, is_scores, top1};

pub use report::Report;

/// Options of `vitrim verify`.
#[derive(Clone, Debug, clap::Args)]
pub struct VerifyArgs {
    /// The model to compare with, or an .npz of recorded runs
    pub reference: PathBuf,
    /// The model to judge
    pub candidate: PathBuf,
    /// Images per run [default: 2 for noise, 32 for pictures]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Accuracy is read from this output [default: the first one with a score per class]
    #[arg(long, value_name = "OUTPUT")]
    pub scores: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Write the checks as a JUnit file
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// What to judge.
    #[command(flatten)]
    pub tolerances: Tolerances,
    /// What to feed.
    #[command(flatten)]
    pub feeds: FeedArgs,
    /// What to run on.
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Limits to judge by; those not given are not judged.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
#[command(next_help_heading = "Tolerances")]
pub struct Tolerances {
    /// Largest absolute difference, max|candidate − reference|
    #[arg(long, value_name = "X")]
    pub atol: Option<f64>,
    /// Largest relative difference, max|candidate − reference| / max|reference|
    #[arg(long, value_name = "X")]
    pub rtol: Option<f64>,
    /// Smallest cosine between the rows of an output
    #[arg(long, value_name = "X")]
    pub min_cosine: Option<f64>,
    /// Largest loss in percentage points: of accuracy with labels, else of top-1 agreement
    #[arg(long, value_name = "POINTS")]
    pub max_top1_drop: Option<f64>,
}

/// What a reference and a candidate computed, compared.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// The outputs of the reference, in its order.
    pub outputs: Vec<OutputFinding>,
    /// Outputs that only the candidate has.
    pub extra: Vec<String>,
    /// Images fed.
    pub images: usize,
    /// How often each side's best class is the label.
    pub accuracy: Option<Accuracy>,
}

/// One output of the reference and its counterpart.
#[derive(Clone, Debug)]
pub struct OutputFinding {
    /// Its name.
    pub name: String,
    /// How far the candidate is off, or why that cannot be told.
    pub result: Result<Comparison, Incomparable>,
}

/// Why an output cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incomparable {
    /// The candidate has no such output.
    Missing,
    /// The shapes differ.
    Shape(ShapeMismatch),
}

/// Accuracy on labelled images.
#[derive(Clone, Debug)]
pub struct Accuracy {
    /// The output that holds the scores.
    pub output: String,
    /// The reference's hits.
    pub reference: Ratio,
    /// The candidate's hits.
    pub candidate: Ratio,
}

impl Accuracy {
    /// What the candidate loses, in percentage points.
    pub fn drop(&self) -> f64 {
        self.reference.percent() - self.candidate.percent()
    }
}

/// Runs `vitrim verify`: exit code 0, or 1 when a check failed. An error means that there was nothing to judge (exit
/// code 2).
pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let (findings, input) = find(args)?;
    let report = Report::new(args, &findings, input)?;
    if let Some(path) = &args.junit {
        std::fs::write(path, report.junit()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() })?;
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes to standard output; that nobody reads to the end is no error.
pub(crate) fn print(text: String) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write the report"),
        _ => Ok(()),
    }
}

/// Runs both sides on all feeds; also says what was fed.
pub fn find(args: &VerifyArgs) -> Result<(Findings, String)> {
    // Kernels are judged by what models mean without them.
    let Backends { plain, native } = args.runtime.backends()?;
    let mut feed_args = args.feeds.clone();
    let mut reference = if args.reference.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("npz")) {
        ensure!(feed_args.input.is_none(), "a recorded reference is fed its own inputs; leave --input out");
        feed_args.input = Some(args.reference.clone());
        None
    } else {
        Some(runtime::load(plain.as_ref(), &args.reference)?)
    };
    let mut candidate = runtime::load(native.as_ref().unwrap_or(&plain).as_ref(), &args.candidate)?;

    let model = reference.as_deref().unwrap_or(candidate.as_ref());
    let (inputs, outputs) = (tighten(model.inputs(), candidate.inputs()), model.outputs().to_vec());
    let source = feeds::open(&feed_args, args.batch, &inputs, &outputs)?;

    let mut findings = Findings::default();
    for batch in source.batches {
        let batch = batch?;
        let expected = match &mut reference {
            Some(session) => session.run(&batch.feeds).with_context(|| failed_run(&args.reference))?,
            None => match batch.recorded.clone() {
                Some(recorded) => recorded,
                None => bail!("{} records no outputs", args.reference.display()),
            },
        };
        let actual = candidate.run(&batch.feeds).with_context(|| failed_run(&args.candidate))?;
        findings.add(&batch, &expected, &actual, args.scores.as_deref())?;
    }
    findings.extra = extra(candidate.as_ref(), &findings.outputs);
    Ok((findings, source.description))
}

/// A model's inputs, with the sizes that it leaves open and the other model fixes.
fn tighten(inputs: &[Port], other: &[Port]) -> Vec<Port> {
    let mut inputs = inputs.to_vec();
    for port in &mut inputs {
        let fixed = other.iter().find(|other| other.name == port.name).and_then(|other| other.dims.as_ref());
        for (dim, other) in port.dims.iter_mut().flatten().zip(fixed.into_iter().flatten()) {
            if matches!((&*dim, other), (Dim::Symbol(_) | Dim::Unknown, Dim::Fixed(_))) {
                *dim = other.clone();
            }
        }
    }
    inputs
}

fn failed_run(model: &Path) -> String {
    format!("{} cannot be run", model.display())
}

/// The candidate's outputs without counterpart.
fn extra(candidate: &dyn Session, known: &[OutputFinding]) -> Vec<String> {
    let names = candidate.outputs().iter().map(|port: &Port| port.name.clone());
    names.filter(|name| known.iter().all(|output| output.name != *name)).collect()
}

impl Findings {
    /// Takes in the outputs of one batch.
    fn add(&mut self, batch: &Batch, expected: &Outputs, actual: &Outputs, scores: Option<&str>) -> Result<()> {
        self.images += batch.images;
        for (name, reference) in expected.iter() {
            let index = self.outputs.iter().position(|output| output.name == name).unwrap_or_else(|| {
                self.outputs.push(OutputFinding { name: name.to_owned(), result: Ok(Comparison::default()) });
                self.outputs.len() - 1
            });
            let result = &mut self.outputs[index].result;
            if let Ok(comparison) = result {
                let added = match actual.get(name) {
                    Some(candidate) => comparison.add(reference, candidate).map_err(Incomparable::Shape),
                    None => Err(Incomparable::Missing),
                };
                if let Err(reason) = added {
                    *result = Err(reason);
                }
            }
        }
        let Some(labels) = &batch.labels else { return Ok(()) };
        let with_scores =
            |(name, tensor): &(&str, &_)| is_scores(tensor) && scores.is_none_or(|scores| scores == *name);
        let Some((output, reference)) = expected.iter().find(with_scores) else {
            ensure!(scores.is_none(), "the output {} does not hold a score per class", scores.unwrap_or_default());
            return Ok(());
        };
        let Some(candidate) = actual.get(output).filter(|candidate| candidate.shape() == reference.shape()) else {
            return Ok(());
        };
        let accuracy = self.accuracy.get_or_insert_with(|| Accuracy {
            output: output.to_owned(),
            reference: Ratio::default(),
            candidate: Ratio::default(),
        });
        let is = |class: Option<usize>, label: i64| class.is_some_and(|class| i64::try_from(class) == Ok(label));
        for ((&label, reference), candidate) in labels.iter().zip(top1(reference)).zip(top1(candidate)) {
            accuracy.reference.add(is(reference, label));
            accuracy.candidate.add(is(candidate, label));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn scores(values: &[f32]) -> Outputs {
        Outputs::from_iter([("logits".to_owned(), Tensor::from_vec(&[values.len() / 2, 2], values.to_vec()).unwrap())])
    }

    #[test]
    fn accuracy_counts_labels() {
        let mut findings = Findings::default();
        let batch = Batch { images: 2, labels: Some(vec![0, 1]), ..Batch::default() };
        findings.add(&batch, &scores(&[2.0, 1.0, 1.0, 2.0]), &scores(&[2.0, 1.0, 2.0, 1.0]), None).unwrap();
        let accuracy = findings.accuracy.as_ref().unwrap();
        assert_eq!((accuracy.reference.percent(), accuracy.candidate.percent(), accuracy.drop()), (100.0, 50.0, 50.0));
        assert!(findings.add(&batch, &scores(&[0.0; 4]), &scores(&[0.0; 4]), Some("other")).is_err());
    }

    #[test]
    fn a_size_fixed_in_either_model_is_fixed() {
        let port =
            |dims: [Dim; 2]| Port { name: "x".into(), dtype: crate::tensor::DType::F32, dims: Some(dims.to_vec()) };
        let reference = port([Dim::Symbol("n".into()), Dim::Fixed(3)]);
        let candidate = port([Dim::Fixed(2), Dim::Unknown]);
        assert_eq!(tighten(&[reference], &[candidate]), [port([Dim::Fixed(2), Dim::Fixed(3)])]);
    }

    #[test]
    fn missing_and_misshapen_outputs_are_found() {
        let mut findings = Findings::default();
        findings.add(&Batch::default(), &scores(&[1.0, 2.0]), &Outputs::default(), None).unwrap();
        assert_eq!(findings.outputs[0].result, Err(Incomparable::Missing));
        let mut findings = Findings::default();
        findings.add(&Batch::default(), &scores(&[1.0, 2.0]), &scores(&[1.0, 2.0, 3.0, 4.0]), None).unwrap();
        findings.add(&Batch::default(), &scores(&[1.0, 2.0]), &scores(&[1.0, 2.0]), None).unwrap();
        assert!(matches!(findings.outputs[0].result, Err(Incomparable::Shape(_))));
    }
}

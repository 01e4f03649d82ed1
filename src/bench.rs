//! `vitrim bench`: how much faster is a candidate than a reference?
//!
//! The models run in turns, A B C, C B A, …, so that whatever slows the machine down slows all of them, and drift
//! within a round cancels over two. The speed-up is the median over the rounds of the ratio of times within a round.

mod floor;
mod stats;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;

use crate::feeds;
use crate::feeds::noise::{Noise, NoiseArgs};
use crate::runtime::{self, Backends, OpsLibrary, RuntimeArgs, Session};
use crate::verify::print;
use crate::verify::table::table;

pub use stats::{Summary, percentile};

/// Options of `vitrim bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// The model to compare with
    pub reference: PathBuf,
    /// The models to compare
    #[arg(required = true)]
    pub candidates: Vec<PathBuf>,
    /// Batch sizes [default: 1, or the one that the models are bound to]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Rounds to measure; each runs every model once
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub rounds: usize,
    /// Go on measuring for at least this long per batch size
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub min_time: f64,
    /// Rounds to run first, unmeasured
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub warm_up: usize,
    /// Add the slicing floor of each candidate: as many tokens after every block, by mere slicing
    #[arg(long)]
    pub floor: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// How the noise that is fed is made.
    #[command(flatten)]
    pub noise: NoiseArgs,
    /// What to run on.
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// What was measured, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this layout.
    pub schema_version: u32,
    /// What ran the models.
    pub runtime: String,
    /// Threads within an operator, if limited.
    pub threads: Option<usize>,
    /// The custom-op library.
    pub ops: Option<String>,
    /// A table for each batch size.
    pub batches: Vec<BatchReport>,
}

/// The models at one batch size.
#[derive(Clone, Debug, Serialize)]
pub struct BatchReport {
    /// Images per run.
    pub batch: usize,
    /// Rounds measured.
    pub rounds: usize,
    /// The reference, then the others.
    pub models: Vec<ModelReport>,
}

/// One model at one batch size.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// Its name in the table.
    pub label: String,
    /// Its file.
    pub path: String,
    /// Milliseconds per run.
    pub milliseconds: Summary,
    /// Images per second, at the median time.
    pub images_per_second: f64,
    /// The reference's time divided by this model's, within each round; absent for the reference itself.
    pub speed_up: Option<Summary>,
}

/// Runs `vitrim bench`. An error means that there was nothing to measure (exit code 2).
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    if !args.floor {
        return run_with(args, Vec::new());
    }
    // Beside the candidate, where there is room for a model.
    let folder = tempfile::tempdir_in(
        args.candidates[0].parent().filter(|path| *path != Path::new("")).unwrap_or(Path::new(".")),
    )?;
    let mut floors = Vec::new();
    for (number, candidate) in args.candidates.iter().enumerate() {
        let (path, report) = floor::write(&args.reference, candidate, folder.path(), number)?;
        let ideal = match (report.cost_before, report.cost_after) {
            (Some(before), Some(after)) => {
                format!(" (FLOP-ideal {:.2}x)", before.flops as f64 / after.flops.max(1) as f64)
            }
            _ => String::new(),
        };
        floors.push((format!("slicing floor of {}{ideal}", candidate.display()), path));
    }
    run_with(args, floors)
}

/// Runs `vitrim bench` with further models after the candidates, each with its label.
pub fn run_with(args: &BenchArgs, extra: Vec<(String, PathBuf)>) -> Result<ExitCode> {
    let report = measure(args, extra)?;
    print(if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() })?;
    Ok(ExitCode::SUCCESS)
}

/// Measures the reference, the candidates and further models.
pub fn measure(args: &BenchArgs, extra: Vec<(String, PathBuf)>) -> Result<Report> {
    ensure!(args.rounds > 0, "--rounds must be at least 1");
    ensure!(args.min_time.is_finite() && args.min_time >= 0.0, "--min-time must be a number of seconds");
    let Backends { plain, native } = args.runtime.backends()?;
    let paths: Vec<&Path> = std::iter::once(&args.reference).chain(&args.candidates).map(PathBuf::as_path).collect();
    let mut models: Vec<(String, PathBuf)> =
        labels(&paths).into_iter().zip(paths.iter().map(|path| path.to_path_buf())).collect();
    models.extend(extra);
    let load = |(_, path): &(String, PathBuf)| runtime::load(plain.as_ref(), path);
    let mut sessions = models.iter().map(load).collect::<Result<Vec<_>>>()?;
    // With a library, candidates run once more, on its kernels.
    if let Some(native) = native {
        for at in 1..paths.len() {
            let (label, path) = models[at].clone();
            sessions.push(runtime::load(native.as_ref(), &path)?);
            models.push((format!("{label} with kernels"), path));
        }
    }

    args.noise.check(sessions[0].inputs())?;
    let batches = match args.batch.as_slice() {
        [] => vec![feeds::fixed_batch(sessions[0].inputs(), None)?.unwrap_or(1)],
        batches => batches.to_vec(),
    };
    let mut reports = Vec::new();
    for batch in batches {
        let timings = at_batch(args, batch, &models, &mut sessions)?;
        reports.push(BatchReport::new(batch, &models, &timings));
    }
    Ok(Report {
        schema_version: 1,
        runtime: args.runtime.runtime.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default(),
        threads: args.runtime.threads,
        ops: match &args.runtime.ops {
            OpsLibrary::None => None,
            OpsLibrary::At(path) => Some(path.display().to_string()),
        },
        batches: reports,
    })
}

/// The seconds that each model took in each round.
fn at_batch(
    args: &BenchArgs,
    batch: usize,
    models: &[(String, PathBuf)],
    sessions: &mut [Box<dyn Session>],
) -> Result<Vec<Vec<f64>>> {
    let fed = models.iter().zip(sessions.iter_mut()).map(|((_, path), session)| {
        // Noise of one seed: models with the same inputs are fed the same.
        let bound = feeds::fixed_batch(session.inputs(), Some(batch));
        let feeds = bound.and_then(|_| Noise::new(args.noise.seed).feeds(session.inputs(), batch, &args.noise));
        Ok((session, feeds.with_context(|| path.display().to_string())?, path))
    });
    let mut fed = fed.collect::<Result<Vec<_>>>()?;
    let time = |model: usize| {
        let (session, feeds, path) = &mut fed[model];
        session.time(feeds).with_context(|| format!("{} cannot be run at batch {batch}", path.display()))
    };
    interleave(models.len(), args.warm_up, args.rounds, Duration::from_secs_f64(args.min_time), time)
}

/// Runs `count` models in turns, each round in the opposite order of the one before, until there are `rounds` rounds
/// and `min_time` is measured. Returns seconds by model and round.
pub fn interleave(
    count: usize,
    warm_up: usize,
    rounds: usize,
    min_time: Duration,
    mut time: impl FnMut(usize) -> Result<Duration>,
) -> Result<Vec<Vec<f64>>> {
    /// Enough for any percentile, however short a run is.
    const MOST_ROUNDS: usize = 10_000;
    let mut timings = vec![Vec::new(); count];
    let mut measured = Duration::ZERO;
    for round in 0usize.. {
        let done = round.saturating_sub(warm_up);
        if round >= warm_up && done >= rounds && (measured >= min_time || done >= MOST_ROUNDS) {
            break;
        }
        for turn in 0..count {
            let model = if round % 2 == 0 { turn } else { count - 1 - turn };
            let elapsed = time(model)?;
            if round >= warm_up {
                timings[model].push(elapsed.as_secs_f64());
                measured += elapsed;
            }
        }
    }
    Ok(timings)
}

/// What the table calls each model: its file name, or its path where that is not enough to tell it from the others.
fn labels(paths: &[&Path]) -> Vec<String> {
    let name = |path: &Path| path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let unique = |path: &Path| paths.iter().filter(|other| name(other) == name(path)).count() == 1;
    paths.iter().map(|path| if unique(path) { name(path) } else { path.display().to_string() }).collect()
}

impl BatchReport {
    fn new(batch: usize, models: &[(String, PathBuf)], timings: &[Vec<f64>]) -> Self {
        let model = |(index, ((label, path), seconds)): (usize, (&(String, PathBuf), &Vec<f64>))| {
            let milliseconds = Summary::of(&seconds.iter().map(|seconds| seconds * 1e3).collect::<Vec<_>>());
            let ratios: Vec<f64> = timings[0].iter().zip(seconds).map(|(reference, own)| reference / own).collect();
            ModelReport {
                label: label.clone(),
                path: path.display().to_string(),
                milliseconds,
                images_per_second: batch as f64 * 1e3 / milliseconds.median,
                speed_up: (index > 0).then(|| Summary::of(&ratios)),
            }
        };
        let models = models.iter().zip(timings).enumerate().map(model).collect();
        BatchReport { batch, rounds: timings.first().map_or(0, Vec::len), models }
    }
}

impl Report {
    /// The report for people to read.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for report in &self.batches {
            let header = ["", "ms", "p10", "p90", "images/s", "speed-up", "p10", "p90", "MAD"];
            let mut rows = vec![header.map(str::to_owned).to_vec()];
            for model in &report.models {
                let ms = model.milliseconds;
                let mut row = vec![model.label.clone()];
                row.extend([ms.median, ms.p10, ms.p90].map(|value| format!("{value:.3}")));
                row.push(format!("{:.1}", model.images_per_second));
                row.extend(
                    model
                        .speed_up
                        .iter()
                        .flat_map(|s| [s.median, s.p10, s.p90, s.mad])
                        .map(|value| format!("{value:.3}")),
                );
                rows.push(row);
            }
            let separator = if text.is_empty() { "" } else { "\n" };
            text += &format!(
                "{separator}{}, batch {}, {} rounds\n{}",
                self.runtime,
                report.batch,
                report.rounds,
                table(&rows)
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_alternate_in_direction() {
        let mut order = Vec::new();
        let timings = interleave(3, 1, 2, Duration::ZERO, |model| {
            order.push(model);
            Ok(Duration::from_millis(model as u64 + 1))
        });
        assert_eq!(order, [0, 1, 2, 2, 1, 0, 0, 1, 2]);
        assert_eq!(timings.unwrap(), [vec![0.001; 2], vec![0.002; 2], vec![0.003; 2]]);
    }

    #[test]
    fn measuring_goes_on_for_the_minimum_time() {
        let run = |elapsed| interleave(2, 0, 2, Duration::from_secs(10), |_| Ok(elapsed)).unwrap()[0].len();
        assert_eq!(run(Duration::from_secs(1)), 5);
        assert_eq!(run(Duration::from_secs(60)), 2);
        assert_eq!(run(Duration::ZERO), 10_000);
    }

    #[test]
    fn speed_ups_are_paired_within_rounds() {
        let models = [("a".to_owned(), PathBuf::from("a.onnx")), ("b".to_owned(), PathBuf::from("b.onnx"))];
        // The machine slows down tenfold halfway; within each round, b takes half the time of a.
        let report = BatchReport::new(4, &models, &[vec![0.2, 0.2, 2.0, 2.0], vec![0.1, 0.1, 1.0, 1.0]]);
        assert_eq!(report.models[0].speed_up, None);
        let speed_up = report.models[1].speed_up.unwrap();
        assert_eq!((speed_up.median, speed_up.mad), (2.0, 0.0));
        assert!((report.models[0].images_per_second - 4.0 / 1.1).abs() < 1e-9);
    }

    #[test]
    fn labels_tell_models_apart() {
        let paths = [Path::new("x/a.onnx"), Path::new("y/a.onnx"), Path::new("y/b.onnx")];
        assert_eq!(labels(&paths), ["x/a.onnx", "y/a.onnx", "b"]);
    }
}

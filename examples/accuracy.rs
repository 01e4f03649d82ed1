//! What merging and pruning cost and bring on a model: accuracy on labelled pictures (else how often the best class, or how
//! closely the features, stay the same), work, and speed in ONNX Runtime on the CPU.
//!
//! ```sh
//! cargo run --example accuracy                                        the trained model of fixtures/
//! cargo run --example accuracy -- model.onnx --input photos/ --size 224
//! ```
//!
//! Speed-ups are medians of ratios of interleaved runs, with their median absolute deviation.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use vitrim::bench::{Summary, interleave};
use vitrim::feeds::FeedArgs;
use vitrim::feeds::noise::{Noise, NoiseArgs};
use vitrim::runtime::{self, RuntimeArgs, RuntimeKind};
use vitrim::verify::{self, Tolerances, VerifyArgs};
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options, Report};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};

/// Prints a table of accuracy, work and speed.
#[derive(Parser)]
struct Args {
    /// The model [default: the trained one of fixtures/, on its pictures]
    model: Option<PathBuf>,
    /// Tokens to merge per block
    #[arg(long, value_delimiter = ',', default_value = "2,4,6,8")]
    r: Vec<usize>,
    /// Shares of the patches to keep
    #[arg(long, value_delimiter = ',', default_value = "0.9,0.8,0.7,0.6,0.5")]
    keep: Vec<f64>,
    /// Blocks that prune [default: after a quarter, half and three quarters of them]
    #[arg(long, value_delimiter = ',')]
    at: Option<Vec<usize>>,
    /// Images per timed run
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Rounds to measure; each runs every model once
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// What to judge by.
    #[command(flatten)]
    feeds: FeedArgs,
    /// What to run on.
    #[command(flatten)]
    runtime: RuntimeArgs,
}

fn main() -> Result<()> {
    let Args { model, r, keep, at, batch, rounds, mut feeds, mut runtime } = Args::parse();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fashion");
    if model.is_none() && feeds.input.is_none() {
        feeds.input = Some(fixtures.join("fashion_test.npz"));
    }
    let path = model.unwrap_or_else(|| fixtures.join("fashion_vit.onnx"));
    runtime.runtime = RuntimeKind::Ort;
    let model = Model::read(&path)?;
    let (_, vit) = driver::inspect(&model)?;
    let depth = vit.blocks.len();
    let at = at.unwrap_or_else(|| (1..4).map(|quarter| quarter * depth / 4).collect());

    let mut passes = Vec::new();
    for r in r {
        let spec = MergeSpec { r: Some(RSpec::Constant(r)), ..MergeSpec::default() };
        passes.push((format!("merge, r {r}"), PassSpec::Merge(spec)));
    }
    for fuse in [false, true] {
        for &keep in &keep {
            let spec = PruneSpec { keep: KeepSpec::Constant(keep), at: Some(at.clone()), fuse, ..PruneSpec::default() };
            passes.push((format!("prune{}, keep {keep}", if fuse { " and fuse" } else { "" }), PassSpec::Prune(spec)));
        }
    }
    let work = tempfile::tempdir()?;
    let mut rows = vec![("original".to_owned(), path.clone(), None)];
    for (number, (name, pass)) in passes.into_iter().enumerate() {
        let (rewritten, report) = driver::rewrite(&model, &Recipe { passes: vec![pass] }, Options::default())?;
        let out = work.path().join(format!("{number}.onnx"));
        Model::write(rewritten.verify()?, &out, &path)?;
        rows.push((name, out, Some(report)));
    }

    let backend = runtime.backend()?;
    let mut sessions =
        rows.iter().map(|(_, path, _)| runtime::load(backend.as_ref(), path)).collect::<Result<Vec<_>>>()?;
    let noise = Noise::new(0).feeds(sessions[0].inputs(), batch, &NoiseArgs::default())?;
    let time = |model: usize| sessions[model].time(&noise).context(rows[model].0.clone());
    let seconds = interleave(rows.len(), 2, rounds, Duration::ZERO, time)?;

    println!("{}, pruned in blocks {at:?}, timed with {batch} images\n", path.display());
    println!(
        "{:<26}{:>7}{:>9}{:>10}{:>9}{:>10}{:>7}",
        "", "tokens", "FLOPs, %", "top-1, %", "cosine ≥", "speed-up", "MAD"
    );
    for ((name, candidate, report), own) in rows.iter().zip(&seconds) {
        let args = VerifyArgs {
            reference: path.clone(),
            candidate: candidate.clone(),
            batch: None,
            scores: None,
            json: false,
            junit: None,
            tolerances: Tolerances::default(),
            feeds: feeds.clone(),
            runtime: runtime.clone(),
        };
        let (findings, _) = verify::find(&args)?;
        let first = findings.outputs.first().and_then(|output| output.result.as_ref().ok());
        let agreement = first.and_then(|comparison| comparison.top1).map(|top1| top1.percent());
        let top1 = findings.accuracy.as_ref().map(|accuracy| accuracy.candidate.percent()).or(agreement);
        let top1 = top1.map_or("-".to_owned(), |top1| format!("{top1:.2}"));
        let cosine = first.map_or("-".to_owned(), |comparison| format!("{:.4}", comparison.min_cosine));
        let ratios: Vec<f64> = seconds[0].iter().zip(own).map(|(original, own)| original / own).collect();
        let Summary { median, mad, .. } = Summary::of(&ratios);
        let tokens = report
            .as_ref()
            .and_then(|report| report.steps.last())
            .map_or(String::new(), |step| step.after().to_string());
        let flops = report.as_ref().and_then(share_of_flops).map_or(String::new(), |share| format!("{share:.1}"));
        println!("{name:<26}{tokens:>7}{flops:>9}{top1:>10}{cosine:>9}{median:>10.3}{mad:>7.3}");
    }
    Ok(())
}

/// Work that is left, in per cent.
fn share_of_flops(report: &Report) -> Option<f64> {
    Some(100.0 * report.cost_after?.flops as f64 / report.cost_before?.flops as f64)
}

//! What merging and pruning cost and bring on a model: how closely its outputs stay the same, work, and speed in ONNX
//! Runtime on the CPU.
//!
//! ```sh
//! cargo run --example accuracy                                        the trained model of fixtures/
//! cargo run --example accuracy -- model.onnx --input photos/ --size 224
//! cargo run --example accuracy -- model.onnx --input photos/ --size 224 --class-of TENSOR
//! cargo xtask accuracy                                                that model, and a pretrained one on photographs
//! ```
//!
//! Outputs are judged picture by picture: class scores by their best class (is it the label? without labels: is it the
//! original's?), vectors by the cosine with the original's, maps by the correlation. `deviation` is the largest
//! difference, relative to the largest value. Speed-ups are medians of ratios of interleaved runs, with their median
//! absolute deviation.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use vitrim::bench::{Summary, interleave};
use vitrim::feeds::noise::{Noise, NoiseArgs};
use vitrim::feeds::{self, FeedArgs};
use vitrim::runtime::{self, RuntimeArgs, RuntimeKind, Session};
use vitrim::tensor::compare::{Comparison, Ratio, is_scores, top1};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{Attribute, Model, Patch, Shapes, TensorType};
use vitrim_passes::driver::{self, Options, Report};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};

/// Prints a table of accuracy, work and speed.
#[derive(Parser)]
#[command(args_override_self = true)]
struct Args {
    /// The model [default: the trained one of fixtures/, on its pictures]
    model: Option<PathBuf>,
    /// Judge by the class token, the first, of this tensor [batch, tokens, channels], and leave out what is behind it
    #[arg(long, value_name = "TENSOR")]
    class_of: Option<String>,
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

/// A model of the table.
struct Row {
    name: String,
    session: Box<dyn Session>,
    report: Option<Report>,
    agreement: Agreement,
}

fn main() -> Result<()> {
    let Args { model, class_of, r, keep, at, batch, rounds, mut feeds, mut runtime } = Args::parse();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fashion");
    if model.is_none() && feeds.input.is_none() {
        feeds.input = Some(fixtures.join("fashion_test.npz"));
    }
    let path = model.unwrap_or_else(|| fixtures.join("fashion_vit.onnx"));
    runtime.runtime = RuntimeKind::Ort;
    let mut model = Model::read(&path)?;
    if let Some(tensor) = &class_of {
        model = class_token_of(&model, tensor)?;
    }
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
    let backend = runtime.backend()?;
    let row = |name: String, model: &Model, report| {
        let file = work.path().join(format!("{name}.onnx"));
        Model::write(model.verify()?, &file, &path)?;
        let session = runtime::load(backend.as_ref(), &file)?;
        anyhow::Ok(Row { name, session, report, agreement: Agreement::default() })
    };
    let mut rows = vec![row("original".into(), &model, None)?];
    for (name, pass) in passes {
        let (rewritten, report) = driver::rewrite(&model, &Recipe { passes: vec![pass] }, Options::default())?;
        rows.push(row(name, &rewritten, Some(report))?);
    }

    let source = feeds::open(&feeds, None, rows[0].session.inputs(), rows[0].session.outputs())?;
    for batch in source.batches {
        let batch = batch?;
        let mut outputs = Vec::new();
        for Row { name, session, .. } in &mut rows {
            let all = session.run(&batch.feeds).with_context(|| name.clone())?;
            outputs.push(all.iter().next().context("the model has no output")?.1.clone());
        }
        for (row, output) in rows.iter_mut().zip(&outputs) {
            row.agreement.add(&outputs[0], output, batch.labels.as_deref()).with_context(|| row.name.clone())?;
        }
    }

    let noise = Noise::new(0).feeds(rows[0].session.inputs(), batch, &NoiseArgs::default())?;
    let count = rows.len();
    let time = |model: usize| {
        let Row { name, session, .. } = &mut rows[model];
        session.time(&noise).with_context(|| name.clone())
    };
    let seconds = interleave(count, 2, rounds, Duration::ZERO, time)?;

    let part = class_of.as_ref().map_or(String::new(), |tensor| format!(" up to the class token of {tensor}"));
    println!("{}{part}", path.display());
    println!("judged by {}, pruned in blocks {at:?}, timed with {batch} images\n", source.description);
    let likeness = rows[0].agreement.measure();
    println!(
        "{:<26}{:>7}{:>9}{:>10}{likeness:>13}{:>8}{:>11}{:>10}{:>7}",
        "", "tokens", "FLOPs, %", "top-1, %", "worst", "deviation", "speed-up", "MAD"
    );
    for (Row { name, report, agreement, .. }, own) in rows.iter().zip(&seconds) {
        let ratios: Vec<f64> = seconds[0].iter().zip(own).map(|(original, own)| original / own).collect();
        let Summary { median, mad, .. } = Summary::of(&ratios);
        let tokens = report
            .as_ref()
            .and_then(|report| report.steps.last())
            .map_or(String::new(), |step| step.after().to_string());
        let flops = report.as_ref().and_then(share_of_flops).map_or(String::new(), |share| format!("{share:.1}"));
        // The channels of a class token are no classes.
        let top1 = agreement.top1.filter(|_| class_of.is_none()).map(Ratio::percent);
        let top1 = top1.map_or("-".to_owned(), |top1| format!("{top1:.2}"));
        let (mean, worst, deviation) = (agreement.mean(), agreement.worst(), agreement.overall.relative());
        println!(
            "{name:<26}{tokens:>7}{flops:>9}{top1:>10}{mean:>13.4}{worst:>8.4}{deviation:>11.4}{median:>10.3}{mad:>7.3}"
        );
    }
    Ok(())
}

/// The part of a model that computes the first token of a tensor `[batch, tokens, channels]`, which is its one output.
fn class_token_of(model: &Model, tensor: &str) -> Result<Model> {
    let graph = model.graph();
    let tokens = graph.find_value(tensor).with_context(|| format!("the model has no tensor '{tensor}'"))?;
    let shapes = Shapes::infer(model);
    let rank = shapes.dims(tokens).map(<[_]>::len);
    ensure!(rank.is_none_or(|rank| rank == 3), "'{tensor}' is not [batch, tokens, channels]");
    let dtype = shapes.dtype(tokens).with_context(|| format!("the type of '{tensor}' is not known"))?;
    let mut patch = Patch::new(model, "accuracy");
    (0..graph.outputs().len()).for_each(|slot| patch.remove_output(slot));
    let first = patch.constant("first", vitrim_ir::Tensor::i64(0));
    let class = patch.op("Gather", "class_token", &[tokens, first], &[("axis", Attribute::Int(1))]);
    patch.append_output("class_token", class, TensorType { dtype, dims: None });
    Ok(patch.apply(model)?.0)
}

/// How far the outputs of a model are from the original's.
#[derive(Default)]
struct Agreement {
    /// Cosine or correlation of every picture.
    likeness: Vec<f64>,
    overall: Comparison,
    /// How often the best class is the label, or else the original's.
    top1: Option<Ratio>,
    is_map: bool,
}

impl Agreement {
    /// Takes in the outputs for one batch.
    fn add(&mut self, original: &Tensor, output: &Tensor, labels: Option<&[i64]>) -> Result<()> {
        self.overall.add(original, output).map_err(|mismatch| anyhow!("{mismatch}"))?;
        ensure!(self.overall.non_finite == 0, "it computes what is not finite");
        self.is_map = original.shape().len() > 2;
        for image in 0..original.shape()[0] {
            let row = |tensor: &Tensor| {
                let row = tensor.rows(image, image + 1)?;
                anyhow::Ok(if self.is_map { centred(&row) } else { row })
            };
            let comparison =
                Comparison::of(&row(original)?, &row(output)?).map_err(|mismatch| anyhow!("{mismatch}"))?;
            self.likeness.push(comparison.min_cosine);
        }
        if is_scores(original) {
            let best = |scores: &Tensor| top1(scores).into_iter().map(|class| class.map(|class| class as i64));
            let wanted: Vec<_> = match labels {
                Some(labels) => labels.iter().copied().map(Some).collect(),
                None => best(original).collect(),
            };
            let hits = self.top1.get_or_insert_default();
            best(output).zip(wanted).for_each(|(class, wanted)| hits.add(class.is_some() && class == wanted));
        }
        Ok(())
    }

    /// What `likeness` is called.
    fn measure(&self) -> &'static str {
        if self.is_map { "correlation" } else { "cosine" }
    }

    fn mean(&self) -> f64 {
        self.likeness.iter().sum::<f64>() / self.likeness.len() as f64
    }

    fn worst(&self) -> f64 {
        self.likeness.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// A map less its mean: the cosine of two such is their correlation.
fn centred(map: &Tensor) -> Tensor {
    let values = map.to_f64();
    let mean = values.mean().unwrap_or(0.0);
    Tensor::from_f64(DType::F64, &(values - mean))
}

/// Work that is left, in per cent.
fn share_of_flops(report: &Report) -> Option<f64> {
    Some(100.0 * report.cost_after?.flops as f64 / report.cost_before?.flops as f64)
}

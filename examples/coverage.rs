//! Writes the table of `docs/coverage.md`: every model of a folder, what was recognised, whether it merges and prunes,
//! and if not, why not.
//!
//! ```sh
//! cargo xtask coverage FOLDER
//! ```
//!
//! A model counts as merged or pruned only if the rewritten file runs in ONNX Runtime on the recorded inputs with the
//! recorded output shapes, and the file rewritten with r = 0, or a share of 1 to keep, gives the recorded outputs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vitrim::feeds::{self, FeedArgs};
use vitrim::inspect::{Found, Heads, Inspection, Tokens};
use vitrim::runtime::{self, RuntimeArgs, RuntimeKind};
use vitrim::tensor::compare::Comparison;
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};

/// Tokens merged per block.
const R: usize = 4;
/// The share of the patches that is kept, and the blocks that prune.
const KEEP: f64 = 0.7;
const AT: [usize; 2] = [0, 1];
/// How far outputs with nothing reduced may be from the recorded ones, relative to the largest: rounding of float32 in
/// another version of the runtime. Half precision and 8-bit models get [`LOW_PRECISION`].
const TOLERANCE: f64 = 1e-5;
/// As [`TOLERANCE`], for files whose own arithmetic is that coarse.
const LOW_PRECISION: f64 = 5e-3;

fn main() -> Result<()> {
    let folder: PathBuf = std::env::args_os().nth(1).context("name a folder of models")?.into();
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "onnx"));
    files.sort();
    let work = tempfile::tempdir()?;
    let mut rows = Vec::new();
    let (mut merged, mut pruned, mut vits) = (0, 0, 0);
    for file in &files {
        let row = Row::of(file, work.path()).with_context(|| file.display().to_string())?;
        merged += usize::from(row.merge.is_none());
        pruned += usize::from(row.prune.is_none());
        vits += usize::from(!row.windowed);
        rows.push(row);
    }
    println!("# Coverage\n");
    println!(
        "Made by `cargo xtask coverage`. Every file is a real export of a small model with random weights. *Merged*:"
    );
    println!("r = {R} runs in ONNX Runtime with the output shapes of the original, and r = 0 gives its outputs.");
    println!(
        "*Pruned*: the same of keeping {KEEP} of the patches in the blocks {} and {}, and of keeping all.\n",
        AT[0], AT[1]
    );
    println!("{merged} of {} files merge, {pruned} prune; {vits} of the files have global attention.\n", files.len());
    let columns = ["model", "exported by", "opset", "blocks", "heads", "width", "tokens", "special", "pooling"];
    let columns = [&columns[..], &["merged", "pruned", "why not"]].concat();
    println!("| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
    rows.iter().for_each(Row::print);
    Ok(())
}

struct Row {
    name: String,
    exporter: String,
    found: Option<Found>,
    opset: i64,
    windowed: bool,
    /// Why it does not merge.
    merge: Option<String>,
    /// Why it does not prune.
    prune: Option<String>,
}

impl Row {
    fn of(file: &Path, work: &Path) -> Result<Self> {
        let facts: Value = serde_json::from_str(&fs::read_to_string(file.with_extension("json"))?)?;
        let text = |key: &str| facts[key].as_str().unwrap_or_default().to_owned();
        let model = Model::read(file)?;
        let inspection = Inspection::of(&model);
        let refusal = |method: fn(bool) -> PassSpec| match &inspection.seen.reason {
            Some(reason) => Some(reason.clone()),
            None => attempt(file, &model, work, method).err().map(|error| format!("{error:#}")),
        };
        let (merge, prune) = (refusal(merging), refusal(pruning));
        Ok(Self {
            name: file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            exporter: text("exporter").split(" (").next().unwrap_or_default().into(),
            found: inspection.seen.found,
            opset: model.opsets().standard(),
            windowed: facts["negative_for_tome"].as_bool().unwrap_or(false),
            merge,
            prune,
        })
    }

    fn print(&self) {
        let word = |refusal: &Option<String>| if refusal.is_none() { "yes" } else { "no" }.to_owned();
        let why_not = self.merge.as_ref().or(self.prune.as_ref()).cloned().unwrap_or_default();
        let found = |show: fn(&Found) -> String| self.found.as_ref().map(show).unwrap_or_default();
        let cells = [
            self.name.clone(),
            self.exporter.clone(),
            self.opset.to_string(),
            found(|found| found.num_blocks.to_string()),
            found(|found| match &found.heads {
                Heads::Same(heads) => heads.to_string(),
                Heads::PerBlock(heads) => format!("{heads:?}"),
            }),
            found(|found| found.embed_dim.map_or(String::new(), |width| width.to_string())),
            found(|found| match &found.num_tokens {
                Tokens::Known(tokens) => tokens.to_string(),
                Tokens::Symbolic(text) => text.clone(),
            }),
            found(|found| {
                let prefix = &found.prefix_tokens;
                let counts =
                    [("cls", prefix.cls), ("dist", prefix.dist), ("reg", prefix.reg), ("end", found.suffix_tokens)];
                let shown =
                    counts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} {count}"));
                shown.collect::<Vec<_>>().join(", ")
            }),
            found(|found| found.pooling.clone()),
            word(&self.merge),
            word(&self.prune),
            why_not.replace('|', "\\|").replace('\n', " "),
        ];
        println!("| {} |", cells.join(" | "));
    }
}

/// A merge, or one of no tokens.
fn merging(reduces: bool) -> PassSpec {
    PassSpec::Merge(MergeSpec { r: Some(RSpec::Constant(if reduces { R } else { 0 })), ..MergeSpec::default() })
}

/// A pruning, or one of no tokens.
fn pruning(reduces: bool) -> PassSpec {
    let keep = KeepSpec::Constant(if reduces { KEEP } else { 1.0 });
    PassSpec::Prune(PruneSpec { keep, at: Some(AT.to_vec()), ..PruneSpec::default() })
}

/// Rewrites and runs; an error says why the model does not count as merged or pruned.
fn attempt(file: &Path, model: &Model, work: &Path, method: fn(bool) -> PassSpec) -> Result<()> {
    let backend = RuntimeArgs { runtime: RuntimeKind::Ort, ..RuntimeArgs::default() }.backend()?;
    for reduces in [true, false] {
        let (rewritten, _) = driver::rewrite(model, &Recipe { passes: vec![method(reduces)] }, Options::default())?;
        let path = work.join("rewritten.onnx");
        Model::write(rewritten.verify()?, &path, file)?;
        let mut session = runtime::load(backend.as_ref(), &path)?;
        let args = FeedArgs { input: Some(file.with_extension("npz")), ..FeedArgs::default() };
        let source = feeds::open(&args, None, session.inputs(), session.outputs())?;
        for batch in source.batches {
            let batch = batch?;
            let outputs = session.run(&batch.feeds)?;
            for (name, recorded) in batch.recorded.iter().flat_map(|recorded| recorded.iter()) {
                let output = outputs.get(name).with_context(|| format!("the output '{name}' is gone"))?;
                let Ok(comparison) = Comparison::of(recorded, output) else {
                    bail!("the output '{name}' changes its shape");
                };
                let low = rewritten.graph().values().any(|(_, value)| {
                    value.ty().is_some_and(|ty| {
                        matches!(ty.dtype, vitrim_ir::DataType::F16 | vitrim_ir::DataType::I8 | vitrim_ir::DataType::U8)
                    })
                });
                let tolerance = if low { LOW_PRECISION } else { TOLERANCE };
                let relative = comparison.relative();
                // Quantised files differ between processors by more than rounding: there only shapes are compared.
                let quantised = rewritten.graph().nodes().any(|(_, node)| node.is("DequantizeLinear"));
                ensure!(
                    reduces || quantised || relative <= tolerance,
                    "with nothing reduced the output '{name}' changes by {relative:.1e}"
                );
            }
        }
    }
    Ok(())
}

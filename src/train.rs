//! `vitrim train`: from a model file to a folder of graphs that train it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use vitrim_ir::Model;
use vitrim_passes::Refusal;
use vitrim_passes::recipe::{ExpandSpec, MergeSpec, PassSpec, PruneSpec, Recipe};
use vitrim_train::artifacts::Artifacts;
use vitrim_train::drop_path::DropPath;
use vitrim_train::head::Classes;
use vitrim_train::loss::Loss;
use vitrim_train::optimizer::{Optimizer, Update};
use vitrim_train::parameters::{Parameter, Selection};
use vitrim_train::stock::stock;
use vitrim_train::{Request, Training, weights};

use crate::rewrite::{MergeOptions, PruneOptions, read_recipe};
use crate::verify::print;

/// Options of `vitrim train`.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainArgs {
    /// The model to read
    pub input: PathBuf,
    /// The folder to write; it must not exist, or be empty
    pub output: PathBuf,
    /// What it is trained with
    #[arg(long, value_name = "WHICH", default_value = "stock")]
    pub format: FormatArg,
    /// What to make small: cross-entropy (labels are classes), soft-cross-entropy (labels are distributions: mixup,
    /// distillation), binary-cross-entropy, mse, or output:NAME (a scalar that the model computes itself)
    #[arg(long, value_name = "LOSS", default_value = "cross-entropy")]
    pub loss: LossArg,
    /// Share of the target to spread over all classes, of cross-entropy
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub label_smoothing: f64,
    /// The output that the loss is of [default: the first]
    #[arg(long, value_name = "NAME")]
    pub of: Option<String>,
    /// How parameters follow their gradients
    #[arg(long, value_name = "WHICH", default_value = "adamw")]
    pub optimizer: OptimizerArg,
    /// Share of the matrices that a step takes away, times the learning rate [default: 0.05; of sgd 0]
    #[arg(long, value_name = "SHARE")]
    pub weight_decay: Option<f64>,
    /// β₁ and β₂ of adamw
    #[arg(long, value_name = "B1,B2", value_delimiter = ',', num_args = 1..=2, default_values_t = [0.9, 0.999])]
    pub betas: Vec<f64>,
    /// Share of former steps in the next, of sgd
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    pub momentum: f64,
    /// Largest norm of all gradients together
    #[arg(long, value_name = "NORM")]
    pub clip: Option<f64>,
    /// Keep running means of the parameters too, of which a step keeps this share
    #[arg(long, value_name = "SHARE")]
    pub ema: Option<f64>,
    /// Add gradients up over several batches: one more graph, for all batches of a step but the last
    #[arg(long)]
    pub accumulate: bool,
    /// Write loss and gradients alone, for an optimizer of your own
    #[arg(long, conflicts_with_all = ["clip", "ema", "accumulate", "weight_decay"])]
    pub gradients_only: bool,
    /// Parameters that stay as they are, by name; * stands for anything
    #[arg(long, value_name = "GLOB")]
    pub freeze: Vec<String>,
    /// Parameters that are trained, of those frozen
    #[arg(long, value_name = "GLOB")]
    pub unfreeze: Vec<String>,
    /// Give the head this many classes, with weights that begin anew: a normal distribution of standard deviation 0.02, and
    /// zeros for biases
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub classes: Option<i64>,
    /// Compute all tokens, also those that nothing reads
    #[arg(long)]
    pub keep_dead: bool,
    /// Leave residual branches out at random in training, image by image: with this probability in the last block, less
    /// in those before
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    pub drop_path: f64,
    /// Seed of what is drawn at random: new weights, branches that are left out
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub seed: u64,
    /// Print the manifest, of the stock format
    #[arg(long)]
    pub json: bool,
    /// What to do to the tokens in training, a TOML file; what is evaluated is the original model. Passes of the options
    /// below come after those of the file, a merge before a pruning
    #[arg(long, value_name = "FILE", help_heading = TOKENS)]
    pub recipe: Option<PathBuf>,
    /// Merge, prune or expand in this tower only, of a model with several [default: in every one that allows it]
    #[arg(long, value_name = "NAME", help_heading = TOKENS)]
    pub tower: Option<String>,
    /// Train with few tokens first and with more from stage to stage (ToE): the share of each, as in 0.5,0.75,1
    #[arg(long, value_name = "SHARES", value_delimiter = ',', requires = "expand_at", help_heading = TOKENS)]
    pub expand: Option<Vec<f64>>,
    /// The first epoch of each stage of --expand, as in 0,100,200
    #[arg(long, value_name = "EPOCHS", value_delimiter = ',', requires = "expand", help_heading = TOKENS)]
    pub expand_at: Option<Vec<usize>>,
    /// Merging, where wanted.
    #[command(flatten, next_help_heading = MERGING)]
    pub merge: Option<MergeOptions>,
    /// Let attention take the sizes of tokens into account: a model that is trained without learns what they weigh
    #[arg(long, requires = "MergeOptions", help_heading = MERGING)]
    pub proportional: bool,
    /// Pruning, where wanted.
    #[command(flatten, next_help_heading = PRUNING)]
    pub prune: Option<PruneOptions>,
}

/// Headings of the help.
const TOKENS: &str = "Tokens in training";
const MERGING: &str = "Merging in training (ToMe)";
const PRUNING: &str = "Pruning in training (EViT, Tri-Level E-ViT)";

/// A set of files on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FormatArg {
    /// Any ONNX Runtime: graphs, parameters and a manifest
    Stock,
    /// ONNX Runtime Training 1.19.2, in Python, C++ and the browser: its artifacts and checkpoint
    OrtTraining,
}

/// A loss on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossArg {
    /// Of classes.
    CrossEntropy,
    /// Of distributions.
    SoftCrossEntropy,
    /// Of each entry.
    BinaryCrossEntropy,
    /// Of squared differences.
    Mse,
    /// An output of the model.
    Output(String),
}

impl FromStr for LossArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "cross-entropy" => Self::CrossEntropy,
            "soft-cross-entropy" => Self::SoftCrossEntropy,
            "binary-cross-entropy" => Self::BinaryCrossEntropy,
            "mse" => Self::Mse,
            _ => match text.strip_prefix("output:") {
                Some(name) => Self::Output(name.into()),
                None => {
                    let known = "cross-entropy, soft-cross-entropy, binary-cross-entropy, mse or output:NAME";
                    return Err(format!("it is none of {known}"));
                }
            },
        })
    }
}

/// An optimizer on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum OptimizerArg {
    /// Adam with decoupled weight decay
    Adamw,
    /// Stochastic gradient descent with momentum
    Sgd,
}

impl TrainArgs {
    fn request(&self) -> Result<Request> {
        let loss = match &self.loss {
            LossArg::CrossEntropy | LossArg::SoftCrossEntropy => {
                let soft_targets = self.loss == LossArg::SoftCrossEntropy;
                Loss::CrossEntropy { label_smoothing: share("--label-smoothing", self.label_smoothing)?, soft_targets }
            }
            _ if self.label_smoothing != 0.0 => bail!("--label-smoothing is of cross-entropy"),
            LossArg::BinaryCrossEntropy => Loss::BinaryCrossEntropy,
            LossArg::Mse => Loss::MeanSquaredError,
            LossArg::Output(name) => Loss::Output(name.clone()),
        };
        let recipe = self.recipe()?;
        let selection = Selection { freeze: self.freeze.clone(), unfreeze: self.unfreeze.clone() };
        let rate = share("--drop-path", self.drop_path)?;
        let drop_path = (rate > 0.0).then_some(DropPath { rate, seed: self.seed });
        let classes = self.classes.map(|count| Classes { count, seed: self.seed });
        let (output, keep_dead) = (self.of.clone(), self.keep_dead);
        Ok(Request { loss, output, classes, selection, recipe, keep_dead, drop_path })
    }

    /// What the file says, then what the options do. A merge before a pruning: what that fuses is not merged.
    fn recipe(&self) -> Result<Recipe> {
        let tower = || self.tower.clone();
        let mut passes = Vec::new();
        if let Some(options) = &self.merge {
            let proportional = self.proportional.then_some(true);
            passes.push(PassSpec::Merge(MergeSpec { tower: tower(), proportional, ..options.spec()? }));
        }
        if let Some(options) = &self.prune {
            passes.push(PassSpec::Prune(PruneSpec { tower: tower(), ..options.spec() }));
        }
        if let (Some(keep), Some(epochs)) = (self.expand.clone(), self.expand_at.clone()) {
            passes.push(PassSpec::Expand(ExpandSpec { tower: tower(), keep, epochs, ..ExpandSpec::default() }));
        }
        if self.tower.is_some() && passes.is_empty() {
            bail!("--tower is of merging, pruning and expansion: say which, with -r, --keep or --expand");
        }
        let mut recipe = self.recipe.as_deref().map(read_recipe).transpose()?.unwrap_or_default();
        recipe.passes.extend(passes);
        Ok(recipe)
    }

    fn update(&self) -> Result<Option<Update>> {
        if self.format == FormatArg::OrtTraining {
            for (option, given) in [("--gradients-only", self.gradients_only), ("--json", self.json)] {
                anyhow::ensure!(!given, "{option} is of --format stock");
            }
        }
        if self.gradients_only {
            return Ok(None);
        }
        let optimizer = match self.optimizer {
            OptimizerArg::Adamw => {
                let [beta1, beta2] = self.betas[..] else { bail!("--betas wants two numbers") };
                let (beta1, beta2) = (share("--betas", beta1)?, share("--betas", beta2)?);
                let weight_decay = self.weight_decay.unwrap_or(0.05);
                Optimizer::AdamW { beta1, beta2, epsilon: 1e-8, weight_decay }
            }
            OptimizerArg::Sgd => Optimizer::Sgd {
                momentum: share("--momentum", self.momentum)?,
                weight_decay: self.weight_decay.unwrap_or(0.0),
            },
        };
        let clip = match self.clip {
            Some(clip) if !(clip > 0.0 && clip.is_finite()) => bail!("--clip wants a number above 0, not {clip}"),
            clip => clip,
        };
        let ema = self.ema.map(|kept| share("--ema", kept)).transpose()?;
        Ok(Some(Update { optimizer, clip, ema, accumulate: self.accumulate }))
    }
}

/// A number from 0 to below 1.
fn share(option: &str, value: f64) -> Result<f64> {
    match value {
        0.0..1.0 => Ok(value),
        _ => bail!("{option} wants a number from 0 to below 1, not {value}"),
    }
}

/// Runs `vitrim train`.
pub fn train(args: &TrainArgs) -> Result<ExitCode> {
    let (request, update) = (args.request()?, args.update()?);
    let model = Model::read(&args.input)?;
    model.verify().with_context(|| format!("'{}' is not a valid model", args.input.display()))?;
    let training = Training::of(&model, &request).with_context(|| args.input.display().to_string())?;
    let (mut notes, parameters) = (training.notes.clone(), training.parameters.clone());
    let folder = Folder::create(&args.output)?;
    let mut printed = Summary(&parameters, &args.output).to_string();
    match (args.format, &update) {
        (FormatArg::OrtTraining, Some(update)) => {
            let artifacts = Artifacts::new(&training, update)?;
            artifacts.write(folder.temporary.path(), &args.input)?;
            notes.extend(artifacts.notes);
        }
        _ => {
            let manifest = write_stock(training, update.as_ref(), &args.input, &folder)?;
            if args.json {
                printed = manifest;
            }
        }
    }
    folder.commit()?;
    notes.iter().for_each(|note| eprintln!("note: {note}"));
    print(printed)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes what any ONNX Runtime trains with; gives the manifest.
fn write_stock(training: Training, update: Option<&Update>, input: &Path, folder: &Folder) -> Result<String> {
    weights::write(&training.parameters, &folder.path("parameters.safetensors"))?;
    let made = stock(training, update)?;
    for (name, graph) in &made.graphs {
        let verified = graph.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
        Model::write(verified, &folder.path(name), input)?;
    }
    let manifest = serde_json::to_string_pretty(&made.manifest)? + "\n";
    std::fs::write(folder.path("manifest.json"), &manifest)?;
    Ok(manifest)
}

/// What was written, for people.
struct Summary<'a>(&'a [Parameter], &'a Path);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(parameters, folder) = self;
        let trained = || parameters.iter().filter(|parameter| parameter.trainable);
        let elements: usize = trained().map(|parameter| parameter.tensor.len()).sum();
        let (count, all) = (trained().count(), parameters.len());
        writeln!(f, "trains {count} of {all} parameters, {elements} elements")?;
        writeln!(f, "written to {}", folder.display())
    }
}

/// A folder that appears under its name when all its files are there, or not at all.
struct Folder {
    target: PathBuf,
    temporary: tempfile::TempDir,
}

impl Folder {
    fn create(target: &Path) -> Result<Self> {
        let exists = || format!("'{}' exists already and is no empty folder", target.display());
        match std::fs::read_dir(target) {
            Ok(mut entries) => anyhow::ensure!(entries.next().is_none(), exists()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(_) => bail!(exists()),
        }
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::Builder::new().prefix(".vitrim-train").tempdir_in(parent);
        let temporary = temporary.with_context(|| format!("cannot write to {}", parent.display()))?;
        Ok(Self { target: target.into(), temporary })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temporary.path().join(name)
    }

    fn commit(self) -> Result<()> {
        let target = self.target;
        std::fs::rename(self.temporary.path(), &target)
            .with_context(|| format!("cannot write {}", target.display()))?;
        // It is no temporary folder any more.
        let _ = self.temporary.keep();
        Ok(())
    }
}

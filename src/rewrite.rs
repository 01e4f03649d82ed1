//! `vitrim merge`, `vitrim prune` and `vitrim rewrite`: from one model file to another.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ArgGroup;
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options, Report};
use vitrim_passes::recipe::{Align, KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};
use vitrim_passes::reduce::Metric;
use vitrim_passes::schedule::{Schedule, Step};

use crate::verify::print;
use crate::verify::table::table;

/// Options that every rewrite has.
#[derive(Clone, Debug, clap::Args)]
pub struct OutputArgs {
    /// Write the bodies of vitrim's operators in place of calls, for runtimes that know no local functions (TensorRT,
    /// OpenVINO, Core ML)
    #[arg(long)]
    pub inline: bool,
    /// Compute all tokens, also those that nothing reads
    #[arg(long)]
    pub keep_dead: bool,
    /// Rewrite a model that vitrim has written
    #[arg(long)]
    pub force: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `vitrim merge`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = ArgGroup::new("how_much").args(["r", "ratio", "keep_tokens"]).required(true))]
pub struct MergeArgs {
    /// The model to read
    pub input: PathBuf,
    /// The model to write
    pub output: PathBuf,
    /// Merge in this tower only, of a model with several (`vitrim inspect` names them) [default: in every one that allows
    /// it]
    #[arg(long, value_name = "NAME")]
    pub tower: Option<String>,
    /// How to merge.
    #[command(flatten)]
    pub options: MergeOptions,
    /// Leave the sizes of tokens out of attention: for models trained with merging, and MAE-style models
    #[arg(long)]
    pub no_proportional: bool,
    /// Add the output token_source: the final slot of every original token (token_source/NAME for each of several towers)
    #[arg(long)]
    pub trace_source: bool,
    /// What to write.
    #[command(flatten)]
    pub output_args: OutputArgs,
}

/// How to merge, for inference or in training.
#[derive(Clone, Debug, clap::Args)]
pub struct MergeOptions {
    /// Tokens to merge per block: 8, 16:-1 (falling from 32 to 0), or 8,8,4,0 (per block)
    #[arg(short, long, value_name = "R", allow_negative_numbers = true, conflicts_with_all = ["ratio", "keep_tokens"])]
    pub r: Option<String>,
    /// Share of the unprotected tokens to merge per block, from 0 to 1
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, conflicts_with = "keep_tokens")]
    pub ratio: Option<f64>,
    /// Tokens left after each block, special ones included
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub keep_tokens: Option<Vec<usize>>,
    /// Merge more where that makes the token count a multiple of this number; auto: what fused attention kernels want
    #[arg(long, value_name = "K|auto")]
    pub align: Option<Align>,
    /// First tokens to keep out of matching [default: all class, distillation and register tokens]
    #[arg(long, value_name = "P")]
    pub protect: Option<usize>,
    /// Keep means over tokens unweighted
    #[arg(long)]
    pub plain_pooling: bool,
    /// What decides which tokens are alike
    #[arg(long, value_name = "WHAT", default_value = "key")]
    pub metric: MetricArg,
    /// Make r an input of the model, `r` (an int64 scalar), for one file at every speed; -r is what it is where it is left
    /// out
    #[arg(long)]
    pub runtime_r: bool,
}

/// [`Metric`] on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum MetricArg {
    /// Keys, averaged over heads
    Key,
    /// Queries, averaged over heads
    Query,
    /// Values, averaged over heads
    Value,
    /// The tokens themselves
    Hidden,
}

impl From<MetricArg> for Metric {
    fn from(metric: MetricArg) -> Self {
        match metric {
            MetricArg::Key => Self::Key,
            MetricArg::Query => Self::Query,
            MetricArg::Value => Self::Value,
            MetricArg::Hidden => Self::Hidden,
        }
    }
}

/// Options of `vitrim prune`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = ArgGroup::new("how_much").args(["keep"]).required(true))]
pub struct PruneArgs {
    /// The model to read
    pub input: PathBuf,
    /// The model to write
    pub output: PathBuf,
    /// Prune in this tower only, of a model with several (`vitrim inspect` names them) [default: in every one that allows
    /// it]
    #[arg(long, value_name = "NAME")]
    pub tower: Option<String>,
    /// How to prune.
    #[command(flatten)]
    pub options: PruneOptions,
    /// Add the output token_source: the final slot of every original token, -1 for those that were dropped
    /// (token_source/NAME for each of several towers)
    #[arg(long)]
    pub trace_source: bool,
    /// What to write.
    #[command(flatten)]
    pub output_args: OutputArgs,
}

/// How to prune, for inference or in training.
#[derive(Clone, Debug, clap::Args)]
pub struct PruneOptions {
    /// Share of the patches to keep: 0.7 in the blocks of --at, or 1,1,0.7,… with one for each block
    #[arg(long, value_name = "SHARE", value_delimiter = ',', allow_negative_numbers = true)]
    pub keep: Vec<f64>,
    /// Blocks that prune, from 0 on [default: 3,6,9]
    #[arg(long, value_name = "BLOCKS", value_delimiter = ',', requires = "keep")]
    pub at: Option<Vec<usize>>,
    /// Make one token of those that leave, weighted by the attention that they receive (EViT)
    #[arg(long, requires = "keep")]
    pub fuse: bool,
    /// Share of the connections between patches that later blocks keep (Tri-Level E-ViT's attention level). It saves no
    /// time: runtimes compute what a mask hides, and fused attention is written out
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, requires = "keep")]
    pub attention_keep: Option<f64>,
    /// Make the share an input of the model, `keep` (a float64 scalar), for one file at every speed, and that of
    /// --attention-keep another, `attention_keep`; where they are left out, they are what is given here
    #[arg(long, requires = "keep")]
    pub runtime_keep: bool,
}

impl PruneOptions {
    /// The pass that they stand for.
    pub fn spec(&self) -> PruneSpec {
        let keep = match self.keep[..] {
            [keep] => KeepSpec::Constant(keep),
            ref list => KeepSpec::PerBlock(list.to_vec()),
        };
        PruneSpec {
            keep,
            at: self.at.clone(),
            fuse: self.fuse,
            attention_keep: self.attention_keep,
            runtime_keep: self.runtime_keep,
            ..PruneSpec::default()
        }
    }
}

/// Options of `vitrim rewrite`.
#[derive(Clone, Debug, clap::Args)]
pub struct RewriteArgs {
    /// The model to read
    pub input: PathBuf,
    /// The model to write
    pub output: PathBuf,
    /// The recipe, a TOML file; one without passes leaves out what is computed for tokens that nothing reads, and no more
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// What to write.
    #[command(flatten)]
    pub output_args: OutputArgs,
}

impl MergeOptions {
    /// The pass that they stand for.
    pub fn spec(&self) -> Result<MergeSpec> {
        let r = match &self.r {
            Some(text) => Some(match text.parse::<Schedule>().map_err(anyhow::Error::msg).context("-r")? {
                Schedule::Constant(r) => RSpec::Constant(r),
                Schedule::PerBlock(rs) => RSpec::PerBlock(rs),
                _ => RSpec::Text(text.clone()),
            }),
            None => None,
        };
        let metric = Metric::from(self.metric);
        Ok(MergeSpec {
            r,
            ratio: self.ratio,
            keep_tokens: self.keep_tokens.clone(),
            align: self.align,
            protect: self.protect,
            plain_pooling: self.plain_pooling,
            metric: (metric != Metric::Key).then_some(metric),
            runtime_r: self.runtime_r,
            ..MergeSpec::default()
        })
    }
}

/// Runs `vitrim merge`.
pub fn merge(args: &MergeArgs) -> Result<ExitCode> {
    let MergeArgs { tower, options, trace_source, .. } = args.clone();
    let proportional = args.no_proportional.then_some(false);
    let pass = PassSpec::Merge(MergeSpec { tower, proportional, trace_source, ..options.spec()? });
    run(&args.input, &args.output, &Recipe { passes: vec![pass] }, &args.output_args)
}

/// Runs `vitrim prune`.
pub fn prune(args: &PruneArgs) -> Result<ExitCode> {
    let PruneArgs { tower, options, trace_source, .. } = args.clone();
    let pass = PassSpec::Prune(PruneSpec { tower, trace_source, ..options.spec() });
    run(&args.input, &args.output, &Recipe { passes: vec![pass] }, &args.output_args)
}

/// Runs `vitrim rewrite`.
pub fn rewrite(args: &RewriteArgs) -> Result<ExitCode> {
    run(&args.input, &args.output, &read_recipe(&args.recipe)?, &args.output_args)
}

/// The recipe in a file.
pub fn read_recipe(path: &Path) -> Result<Recipe> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Recipe::parse(&text)?)
}

fn run(input: &Path, output: &Path, recipe: &Recipe, args: &OutputArgs) -> Result<ExitCode> {
    if is_same_file(input, output) {
        bail!("the output would replace the input '{}': inputs are never modified", input.display());
    }
    let model = Model::read(input)?;
    model.verify().with_context(|| format!("'{}' is not a valid model", input.display()))?;
    let options = Options { inline: args.inline, force: args.force, keep_dead: args.keep_dead, ..Options::default() };
    let (rewritten, report) = driver::rewrite(&model, recipe, options).with_context(|| input.display().to_string())?;
    let verified = rewritten.verify().map_err(|violations| vitrim_passes::Refusal::Internal(violations.to_string()))?;
    Model::write(verified, output, input)?;
    if args.json {
        let json = serde_json::json!({ "schema_version": 1, "output": output.display().to_string(), "report": report });
        print(serde_json::to_string_pretty(&json)? + "\n")?;
    } else {
        report.notes.iter().for_each(|note| eprintln!("note: {note}"));
        print(text(&report, output))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether both paths lead to one file, be it through links.
fn is_same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let file = |path: &Path| std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        file(a).is_some_and(|a| file(b) == Some(a))
    }
    #[cfg(not(unix))]
    {
        std::fs::canonicalize(a).is_ok_and(|a| std::fs::canonicalize(b).is_ok_and(|b| a == b))
    }
}

/// The closing report.
fn text(report: &Report, output: &Path) -> String {
    let mut text = String::new();
    if report.towers.is_empty() {
        text += &steps_text(&report.steps);
    }
    for tower in &report.towers {
        text += &format!("tower {}\n{}", tower.name, steps_text(&tower.steps));
    }
    text += &format!("nodes   {} -> {}\n", report.nodes_before, report.nodes_after);
    if let (Some(before), Some(after)) = (report.cost_before, report.cost_after) {
        let giga = |flops: u64| flops as f64 / 1e9;
        let ratio = before.flops as f64 / after.flops.max(1) as f64;
        text += &format!(
            "GFLOPs  {:.3} -> {:.3} per image ({ratio:.2} times fewer)\n",
            giga(before.flops),
            giga(after.flops)
        );
    }
    text += &format!("written to {}\n", output.display());
    text
}

/// What each block does, as a table; nothing where that is known only at run time.
fn steps_text(steps: &[Step]) -> String {
    if steps.is_empty() {
        return String::new();
    }
    let head = ["block", "tokens in", "removed", "tokens out"].map(str::to_owned).to_vec();
    let rows = steps.iter().enumerate().map(|(block, step)| {
        [block, step.before, step.removed, step.after()].map(|number| number.to_string()).to_vec()
    });
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()) + "\n"
}

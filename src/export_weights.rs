//! `vitrim export-weights`: from a checkpoint back to a model file.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use vitrim_ir::Model;
use vitrim_passes::Refusal;
use vitrim_train::export::{Choice, Exported, export};
use vitrim_train::weights;

use crate::verify::print;

/// Options of `vitrim export-weights`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExportWeightsArgs {
    /// The weights to read: a safetensors file of parameters by the names that `vitrim train` gives them; what else it holds
    /// is ignored
    pub checkpoint: PathBuf,
    /// The model that was given to `vitrim train`
    pub model: PathBuf,
    /// The model to write
    pub output: PathBuf,
    /// Take the running means of the parameters (NAME.ema) where there are any
    #[arg(long)]
    pub ema: bool,
    /// Classes of the head, as given to `vitrim train`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub classes: Option<i64>,
    /// The output that the loss was of, as given to `vitrim train` [default: the first]
    #[arg(long, value_name = "NAME", requires = "classes")]
    pub of: Option<String>,
}

/// Runs `vitrim export-weights`.
pub fn run(args: &ExportWeightsArgs) -> Result<ExitCode> {
    let checkpoint = weights::read(&args.checkpoint)?;
    let model = Model::read(&args.model)?;
    model.verify().with_context(|| format!("'{}' is not a valid model", args.model.display()))?;
    let choice = Choice { ema: args.ema, classes: args.classes, output: args.of.clone() };
    let Exported { model, parameters, notes } =
        export(&model, &checkpoint, &choice).with_context(|| args.checkpoint.display().to_string())?;
    let verified = model.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    Model::write(verified, &args.output, &args.model)?;
    notes.iter().for_each(|note| eprintln!("note: {note}"));
    print(format!("{parameters} parameters written to {}\n", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}

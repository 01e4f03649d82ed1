//! The command line: what the user may ask, and what each outcome exits with.
//!
//! 0: done. 1: a check failed. 2: refused, or bad input; nothing was written. 3: an error of vitrim itself.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::{Parser, Subcommand};
use vitrim_passes::Refusal;

use crate::{bench, export_weights, inspect, ops, rewrite, train, verify};

/// Token reduction for Vision Transformers, as compiler passes on ONNX graphs
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what vitrim sees in a model: blocks, tokens, heads, and where tokens can be regrouped
    Inspect(inspect::InspectArgs),
    /// Merge similar tokens after the attention of every block (ToMe)
    Merge(Box<rewrite::MergeArgs>),
    /// Drop the tokens that receive the least attention, in chosen blocks (EViT, Tri-Level E-ViT)
    Prune(rewrite::PruneArgs),
    /// Apply the passes of a recipe
    Rewrite(rewrite::RewriteArgs),
    /// Write graphs that train a model: gradients, optimizer and losses, for any ONNX Runtime
    Train(Box<train::TrainArgs>),
    /// Write a model with trained weights
    ExportWeights(export_weights::ExportWeightsArgs),
    /// Compare the outputs of two models
    Verify(Box<verify::VerifyArgs>),
    /// Compare the speed of models
    Bench(Box<bench::BenchArgs>),
    /// Print the path of the library of native kernels, for ONNX Runtime to register
    Ops,
}

/// Exit code of refusals and bad input.
const REFUSED: u8 = 2;
/// Exit code of defects of vitrim.
const INTERNAL: u8 = 3;

/// What the last panic said, and where it was.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // Help and version are answers, not errors.
            let code = if error.use_stderr() { REFUSED } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    // A panic is a defect: it must not look like a refusal, nor leave the user without a word. Those of a runtime are
    // caught and become errors; only one that arrives here is told.
    std::panic::set_hook(Box::new(|info| {
        let reason = info.payload_as_str().unwrap_or("no reason given");
        let place = info.location().map(|place| format!(" ({place})")).unwrap_or_default();
        let trace = Backtrace::capture();
        let trace = if trace.status() == BacktraceStatus::Captured { format!("\n{trace}") } else { String::new() };
        if let Ok(mut last) = LAST_PANIC.lock() {
            *last = format!("{reason}{place}{trace}");
        }
    }));
    let outcome = std::panic::catch_unwind(|| match &command {
        Command::Inspect(args) => inspect::run(args),
        Command::Merge(args) => rewrite::merge(args),
        Command::Prune(args) => rewrite::prune(args),
        Command::Rewrite(args) => rewrite::rewrite(args),
        Command::Train(args) => train::train(args),
        Command::ExportWeights(args) => export_weights::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Ops => ops::run(),
    });
    match outcome {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("vitrim: {error:#}");
            let internal = matches!(error.downcast_ref::<Refusal>(), Some(Refusal::Internal(_)));
            ExitCode::from(if internal { INTERNAL } else { REFUSED })
        }
        Err(_) => {
            let panic = LAST_PANIC.lock().map(|last| last.clone()).unwrap_or_default();
            eprintln!("vitrim: internal error, please report it: {panic}");
            ExitCode::from(INTERNAL)
        }
    }
}

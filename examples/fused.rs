//! Times one ViT with attention written in every way, merged: with a fused operator it must stay at least as fast as
//! with attention in single operators. Weights are random; ONNX Runtime runs everything on the CPU.
//!
//! ```sh
//! cargo run --example fused [-- --width 384 --heads 6 --depth 12 --r 13 --batch 8]
//! ```
//!
//! Models run in turns, so that whatever slows the machine down slows all of them. The table has each model's time as
//! a multiple of that of the model in single operators: the median over the rounds, its median absolute deviation, and
//! the number of rounds.

#[path = "../tests/forms/mod.rs"]
mod forms;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use forms::{Form, Norms, Plan, Projected, Scores, vit};
use vitrim::bench::{Summary, interleave};
use vitrim::feeds::noise::{Noise, NoiseArgs};
use vitrim::runtime::{self, RuntimeArgs, RuntimeKind};
use vitrim_ir::Model;
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::{MergeSpec, PassSpec, RSpec, Recipe};

/// Every way of writing attention (and sums with their norms); the first is what the others are compared with.
const FORMS: [(&str, Form, Norms); 8] = [
    ("single operators", Form::Decomposed, Norms::Plain),
    ("com.microsoft.Attention", Form::Packed { computed: false }, Norms::Plain),
    ("com.microsoft.MultiHeadAttention", Form::MultiHead(Projected::ConstantBias), Norms::Plain),
    ("ai.onnx.Attention 23, 4-D", Form::Standard { heads_apart: true }, Norms::Plain),
    ("ai.onnx.Attention 23, 3-D", Form::Standard { heads_apart: false }, Norms::Plain),
    ("single operators, SkipLayerNormalization", Form::Decomposed, Norms::Skip),
    ("com.microsoft.Attention, SkipLayerNormalization", Form::Packed { computed: false }, Norms::Skip),
    ("com.microsoft.MultiHeadAttention, SkipLayerNormalization", Form::MultiHead(Projected::ConstantBias), Norms::Skip),
];

/// Times merged models with fused attention beside one without. The sizes default to ViT-S/16.
#[derive(Parser)]
struct Args {
    /// Pixels along each side of an image
    #[arg(long, default_value_t = 224)]
    image: i64,
    /// Pixels along each side of a patch
    #[arg(long, default_value_t = 16)]
    patch: i64,
    /// Channels of a token
    #[arg(long, default_value_t = 384)]
    width: i64,
    /// Heads of an attention
    #[arg(long, default_value_t = 6)]
    heads: i64,
    /// Blocks
    #[arg(long, default_value_t = 12)]
    depth: i64,
    /// Tokens merged in every block
    #[arg(long, default_value_t = 13)]
    r: usize,
    /// Images per run
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Rounds to measure; each runs every model once
    #[arg(long, default_value_t = 21)]
    rounds: usize,
    /// Rounds to run first, unmeasured
    #[arg(long, default_value_t = 2)]
    warm_up: usize,
    /// Threads that ONNX Runtime uses within an operator [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let Args { image, patch, width, heads, depth, .. } = args;
    let plan = Plan { image, patch, width, heads, depth, expansion: 4, pooled: false, scores: Scores::PLAIN };
    let backend =
        RuntimeArgs { runtime: RuntimeKind::Ort, threads: args.threads, ..RuntimeArgs::default() }.backend()?;
    let work = tempfile::tempdir()?;
    let mut sessions = Vec::new();
    for (number, (name, form, norms)) in FORMS.into_iter().enumerate() {
        let path = work.path().join(format!("{number}.onnx"));
        write_merged(&vit(plan, form, norms), args.r, &path).context(name)?;
        sessions.push(runtime::load(backend.as_ref(), &path)?);
    }
    let feeds = Noise::new(0).feeds(sessions[0].inputs(), args.batch, &NoiseArgs::default())?;
    let time = |model: usize| sessions[model].time(&feeds).context(FORMS[model].0);
    let seconds = interleave(FORMS.len(), args.warm_up, args.rounds, Duration::ZERO, time)?;

    println!("{image} pixels, patches of {patch}, width {width}, {heads} heads, {depth} blocks");
    println!("r = {}, batch {}, time relative to '{}'\n", args.r, args.batch, FORMS[0].0);
    println!("{:<58}{:>6}{:>8}{:>8}", "", "time", "MAD", "rounds");
    for ((name, ..), own) in FORMS.iter().zip(&seconds).skip(1) {
        let ratios: Vec<f64> = own.iter().zip(&seconds[0]).map(|(own, reference)| own / reference).collect();
        let Summary { median, mad, .. } = Summary::of(&ratios);
        println!("{name:<58}{median:>6.3}{mad:>8.3}{:>8}", ratios.len());
    }
    Ok(())
}

/// Merges `r` tokens in every block.
fn write_merged(model: &Model, r: usize, path: &Path) -> Result<()> {
    let spec = MergeSpec { r: Some(RSpec::Constant(r)), ..MergeSpec::default() };
    let (merged, _) = driver::rewrite(model, &Recipe { passes: vec![PassSpec::Merge(spec)] }, Options::default())?;
    Ok(Model::write(merged.verify()?, path, path)?)
}

//! `vitrim inspect`: what vitrim sees in a model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;
use vitrim_ir::Model;
use vitrim_passes::driver;
use vitrim_passes::recognise::{Head, Pin, VitModel};

use crate::verify::print;
use crate::verify::table::table;

/// Options of `vitrim inspect`.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    /// The model
    pub model: PathBuf,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// What `inspect --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Version of this form.
    pub schema_version: u32,
    /// Whether a Vision Transformer was found whose tokens can be regrouped.
    pub vit: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was found.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub found: Option<Found>,
}

/// The Vision Transformer.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Transformer blocks.
    pub num_blocks: usize,
    /// Heads per block; one number where all blocks have as many.
    pub heads: Heads,
    /// Width of the residual stream.
    pub embed_dim: Option<i64>,
    /// Tokens that enter the first block, or an expression where known only at run time.
    pub num_tokens: Tokens,
    /// Special tokens before the patches.
    pub prefix_tokens: Prefix,
    /// Special tokens after the patches.
    pub suffix_tokens: usize,
    /// How the heads read the tokens, in one word.
    pub pooling: String,
    /// How the heads read the tokens.
    pub reads: Vec<Head>,
    /// Axes of the residual stream; `T` stands for the tokens.
    pub stream: String,
    /// Where tokens can be regrouped: the node after each block's attention.
    pub cuts: Vec<String>,
    /// Nodes before which tokens are restored.
    pub restored_before: Vec<Pin>,
    /// Version of the standard operator set.
    pub opset: i64,
}

/// One number, or one per block.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Heads {
    /// In every block.
    Same(usize),
    /// One per block.
    PerBlock(Vec<usize>),
}

/// A token count.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Tokens {
    /// Fixed.
    Known(i64),
    /// Known at run time.
    Symbolic(String),
}

/// Special tokens before the patches, by kind.
#[derive(Clone, Debug, Serialize)]
pub struct Prefix {
    /// Class tokens.
    pub cls: usize,
    /// Distillation tokens.
    pub dist: usize,
    /// Registers.
    pub reg: usize,
}

impl Inspection {
    /// Inspects a model.
    pub fn of(model: &Model) -> Self {
        match driver::inspect(model) {
            Ok((model, vit)) => {
                Self { schema_version: 1, vit: true, reason: None, found: Some(Found::of(&model, &vit)) }
            }
            Err(refusal) => Self { schema_version: 1, vit: false, reason: Some(refusal.to_string()), found: None },
        }
    }
}

impl Found {
    fn of(model: &Model, vit: &VitModel) -> Self {
        let heads: Vec<usize> = vit.blocks.iter().map(|block| block.heads(model.graph())).collect();
        let same = heads.windows(2).all(|pair| pair[0] == pair[1]);
        let tokens = vit.tokens();
        Self {
            num_blocks: vit.blocks.len(),
            heads: match heads.first() {
                Some(&first) if same => Heads::Same(first),
                _ => Heads::PerBlock(heads),
            },
            embed_dim: vit.width(),
            num_tokens: tokens.as_known().map_or_else(|| Tokens::Symbolic(tokens.to_string()), Tokens::Known),
            prefix_tokens: Prefix { cls: vit.special.cls, dist: vit.special.dist, reg: vit.special.reg },
            suffix_tokens: vit.special.suffix,
            pooling: vit.pooling(),
            reads: vit.heads.clone(),
            stream: vit.axes.layout(vit.axes.origin()).map_or(String::new(), |layout| layout.to_string()),
            cuts: vit.blocks.iter().map(|block| model.graph().describe(block.cut)).collect(),
            restored_before: vit.restore_before.clone(),
            opset: model.opsets().standard(),
        }
    }

    fn text(&self) -> String {
        let heads = match &self.heads {
            Heads::Same(heads) => heads.to_string(),
            Heads::PerBlock(heads) => format!("{heads:?}"),
        };
        let tokens = match &self.num_tokens {
            Tokens::Known(tokens) => tokens.to_string(),
            Tokens::Symbolic(text) => text.clone(),
        };
        let Prefix { cls, dist, reg } = self.prefix_tokens;
        let special = format!("{cls} class, {dist} distillation, {reg} register, {} at the end", self.suffix_tokens);
        let rows = [
            ("blocks", self.num_blocks.to_string()),
            ("heads", heads),
            ("width", self.embed_dim.map_or("?".into(), |width| width.to_string())),
            ("tokens", tokens),
            ("special tokens", special),
            ("pooling", self.pooling.clone()),
            ("opset", self.opset.to_string()),
        ];
        let mut text = String::new();
        for (name, value) in rows {
            text += &format!("{name:<16}{value}\n");
        }
        text += "\ntokens can be regrouped after\n";
        let cuts = self.cuts.iter().enumerate().map(|(block, cut)| vec![format!("  block {block}"), cut.clone()]);
        text += &table(&cuts.collect::<Vec<_>>());
        for pin in &self.restored_before {
            text += &format!("\nall tokens are restored before {}: {}\n", pin.name, pin.reason);
        }
        text
    }
}

/// Runs `vitrim inspect`.
pub fn run(args: &InspectArgs) -> Result<ExitCode> {
    let model = Model::read(&args.model)?;
    model.verify().with_context(|| format!("'{}' is not a valid model", args.model.display()))?;
    let inspection = Inspection::of(&model);
    let code = if inspection.vit { ExitCode::SUCCESS } else { ExitCode::from(2) };
    match (&inspection.found, &inspection.reason) {
        _ if args.json => print(serde_json::to_string_pretty(&inspection)? + "\n")?,
        (Some(found), _) => print(found.text())?,
        (None, reason) => eprintln!("vitrim: {}", reason.as_deref().unwrap_or("nothing found")),
    }
    Ok(code)
}

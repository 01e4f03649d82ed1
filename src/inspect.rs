//! `vitrim inspect`: what vitrim sees in a model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use vitrim_ir::Model;
use vitrim_passes::recognise::{Head, Pin, Tower, VitModel};
use vitrim_passes::{Refusal, driver};

use crate::verify::print;
use crate::verify::table::table;

/// Options of `vitrim inspect`.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    /// The model
    pub model: PathBuf,
    /// Show this tower only, of a model with several
    #[arg(long, value_name = "NAME")]
    pub tower: Option<String>,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// What `inspect --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Version of this form.
    pub schema_version: u32,
    /// What is seen; of several towers, the first whose tokens can be regrouped.
    #[serde(flatten)]
    pub seen: Seen,
    /// What is seen of each tower, where the model has several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub towers: Vec<NamedTower>,
}

/// A Vision Transformer, or why there is none.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// Whether a Vision Transformer was found whose tokens can be regrouped.
    pub vit: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was found.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub found: Option<Found>,
}

/// One of several towers.
#[derive(Clone, Debug, Serialize)]
pub struct NamedTower {
    /// What `--tower` calls it.
    pub name: String,
    /// What is seen of it.
    #[serde(flatten)]
    pub seen: Seen,
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
        let (seen, towers) = match driver::towers(model) {
            Err(refusal) => (Seen::nothing(&refusal), Vec::new()),
            Ok((model, towers)) => {
                let named = |tower: &Tower| NamedTower { name: tower.name.clone(), seen: Seen::of(&model, tower) };
                let towers: Vec<NamedTower> = towers.iter().map(named).collect();
                let first = towers.iter().find(|tower| tower.seen.vit).unwrap_or(&towers[0]).seen.clone();
                (first, if towers.len() > 1 { towers } else { Vec::new() })
            }
        };
        Self { schema_version: 1, seen, towers }
    }

    /// Inspects one tower of a model.
    pub fn of_tower(model: &Model, name: &str) -> Result<Self, Refusal> {
        let (model, towers) = driver::towers(model)?;
        let seen = Seen::of(&model, Tower::named(&towers, name)?);
        Ok(Self { schema_version: 1, seen, towers: Vec::new() })
    }

    fn text(&self) -> String {
        let seen = |seen: &Seen| match (&seen.found, &seen.reason) {
            (Some(found), _) => found.text(),
            (None, reason) => reason.as_deref().unwrap_or("nothing found").to_owned() + "\n",
        };
        if self.towers.is_empty() {
            return seen(&self.seen);
        }
        let towers = self.towers.iter().map(|tower| format!("tower {}\n\n{}", tower.name, seen(&tower.seen)));
        towers.collect::<Vec<_>>().join("\n")
    }
}

impl Seen {
    fn of(model: &Model, tower: &Tower) -> Self {
        match &tower.found {
            Ok(vit) => Self { vit: true, reason: None, found: Some(Found::of(model, vit)) },
            Err(refusal) => Self::nothing(refusal),
        }
    }

    fn nothing(refusal: &Refusal) -> Self {
        Self { vit: false, reason: Some(refusal.to_string()), found: None }
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
    let file = args.model.display();
    let inspection = match &args.tower {
        Some(name) => Inspection::of_tower(&model, name).with_context(|| file.to_string())?,
        None => Inspection::of(&model),
    };
    if args.json {
        print(serde_json::to_string_pretty(&inspection)? + "\n")?;
    } else if let (false, Some(reason)) = (inspection.seen.vit, &inspection.seen.reason) {
        bail!("{file}: {reason}");
    } else {
        print(inspection.text())?;
    }
    Ok(if inspection.seen.vit { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

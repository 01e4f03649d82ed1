//! The driver: the one door through which models change. Passes propose, the driver applies, validates after each, and
//! records in the file what was done.

use serde::Serialize;
use vitrim_ir::{
    DataType, InlineError, LIFTED, LiftError, Model, Patch, PatchError, canonicalise, inline_functions, lift_opset,
};
use vitrim_ops::DOMAIN;

use crate::Refusal;
use crate::cost::{Cost, cost};
use crate::merge::{Merge, Reduction};
use crate::recipe::{PassSpec, Recipe};
use crate::recognise::{VitModel, recognise};
use crate::schedule::Step;

/// Key of the recipe in a model's `metadata_props`.
pub const RECIPE_KEY: &str = "vitrim.recipe";
/// Key of the version that wrote the file.
pub const VERSION_KEY: &str = "vitrim.version";
/// Key of the tokens that leave each block.
pub const TOKENS_KEY: &str = "vitrim.tokens";

/// The newest version of the standard operator set whose operators the rules of the analysis, and the bodies of our
/// operators, were checked against. What came after 24, beside new element types:
/// - 25: `Attention` has windows (refused);
/// - 26: `BitCast` is new (elementwise), and `CumProd` (no rule: it depends on the order of tokens);
/// - 27: `CausalConvWithState` and `LinearAttention` are new (no rule: the same); `Range` computes float16 in float32,
///   which positions, being integers, are not subject to;
/// - 28: `SwiGLU` is new (elementwise); `Mod` takes floats, `SpaceToDepth` another order of channels.
const NEWEST_OPSET: i64 = 28;

/// The version of the format that introduced local functions.
const FUNCTIONS_SINCE: i64 = 8;

/// How to rewrite.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Write bodies in place of calls of our operators, for runtimes that know no local functions.
    pub inline: bool,
    /// Rewrite a model that was rewritten before.
    pub force: bool,
    /// How tokens are removed.
    pub reduction: Reduction,
}

/// What was done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What each block does to the token count; empty where it is known only at run time.
    pub steps: Vec<Step>,
    /// Nodes before.
    pub nodes_before: usize,
    /// Nodes after; calls of our operators count as one unless inlined.
    pub nodes_after: usize,
    /// Work for one image before, where all extents are known.
    pub cost_before: Option<Cost>,
    /// Work for one image after.
    pub cost_after: Option<Cost>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A model that is ready to be analysed: local functions of others inlined, its operators those of a version that bodies
/// of ours can be written in, and in canonical form.
pub fn prepare(model: &Model) -> Result<(Model, Vec<String>), Refusal> {
    let mut model = model.clone();
    let refused = |error: InlineError| Refusal::Request(error.to_string());
    let mut notes = Vec::new();
    if inline_functions(&mut model, |op| op.domain != DOMAIN).map_err(refused)? {
        notes.push("the model's local functions were inlined".into());
    }
    let opset = model.opsets().standard();
    if opset > NEWEST_OPSET {
        return Err(Refusal::Request(format!(
            "the model uses version {opset} of the standard operator set, which is newer than vitrim knows; export it \
             again with version {NEWEST_OPSET} or older"
        )));
    }
    if lift_opset(&mut model).map_err(|error: LiftError| Refusal::Request(error.to_string()))? {
        notes.push(format!("the model was lifted from opset {opset} to {LIFTED}"));
    }
    if canonicalise(&mut model).map_err(|error: PatchError| Refusal::Internal(error.to_string()))? {
        model.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    }
    Ok((model, notes))
}

/// Applies the passes of a recipe.
pub fn rewrite(model: &Model, recipe: &Recipe, options: Options) -> Result<(Model, Report), Refusal> {
    if let Some(version) = model.metadata(VERSION_KEY).filter(|_| !options.force) {
        return Err(Refusal::Request(format!(
            "this model was rewritten before (by vitrim {version}); rewrite the original, or pass --force"
        )));
    }
    let (mut model, notes) = prepare(model)?;
    let mut report = Report { notes, nodes_before: model.graph().len(), ..Report::default() };
    let mut changed = false;
    for spec in &recipe.passes {
        let vit = recognise(&model)?;
        let PassSpec::Merge(spec) = spec;
        let half = vit.shapes.dtype(vit.axes.origin()) == Some(DataType::F16);
        let merge = Merge { reduction: options.reduction, ..spec.resolve(vit.tokens().as_known(), half)? };
        let proposal = merge.propose(&model, &vit)?;
        report.cost_before = report.cost_before.or_else(|| cost(&model, &vit, &[]));
        report.cost_after = cost(&model, &vit, &proposal.steps);
        changed |= !proposal.patch.is_empty();
        report.steps = proposal.steps;
        report.notes.extend(proposal.notes);
        model = apply(&model, proposal.patch)?;
    }
    if changed {
        let mut provenance = Patch::new(&model, "provenance");
        provenance.metadata(VERSION_KEY, env!("CARGO_PKG_VERSION").into());
        provenance.metadata(RECIPE_KEY, recipe.to_toml());
        let counts: Vec<String> = report.steps.iter().map(|step| step.after().to_string()).collect();
        if !counts.is_empty() {
            provenance.metadata(TOKENS_KEY, counts.join(","));
        }
        model = apply(&model, provenance)?;
    }
    if options.inline {
        inline_functions(&mut model, |_| true).map_err(|error| Refusal::Request(error.to_string()))?;
    }
    if changed && !model.functions().is_empty() && model.require_ir_version(FUNCTIONS_SINCE) > 0 {
        report.notes.push("weights are no graph inputs any more: the format has them apart since IR version 4".into());
    }
    report.nodes_after = model.graph().len();
    Ok((model, report))
}

/// Applies one patch and validates the result. A failure here is a defect of the pass, not of the user's model.
fn apply(model: &Model, patch: Patch) -> Result<Model, Refusal> {
    let (edited, _) = patch.apply(model).map_err(|error| Refusal::Internal(error.to_string()))?;
    edited.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    Ok(edited)
}

/// Recognises without rewriting.
pub fn inspect(model: &Model) -> Result<(Model, VitModel), Refusal> {
    let (model, _) = prepare(model)?;
    let vit = recognise(&model)?;
    Ok((model, vit))
}

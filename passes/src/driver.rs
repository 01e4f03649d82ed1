//! The driver: the one door through which models change. Passes propose, the driver applies, validates after each, and
//! records in the file what was done.

use std::borrow::Cow;

use serde::Serialize;
use vitrim_ir::{
    CONSTANTS_APART, DataType, InlineError, LIFTED, LiftError, Model, Patch, PatchError, canonicalise,
    inline_functions, lift_opset,
};
use vitrim_ops::{Attention, DOMAIN, OpDef, ProportionalAttention};

use crate::cost::{Cost, cost};
use crate::recipe::{PassSpec, Recipe};
use crate::recognise::{self, Tower, VitModel};
use crate::reduce::{Reduction, SOURCE_OUTPUT};
use crate::schedule::Step;
use crate::{Refusal, dead};

/// Key of the recipe in a model's `metadata_props`.
pub const RECIPE_KEY: &str = "vitrim.recipe";
/// Key of the version that wrote the file.
pub const VERSION_KEY: &str = "vitrim.version";
/// Key of the tokens that leave each block: `61,57,53`, or `left=61,57,53;right=61,57,53` in a model with several towers.
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
pub const FUNCTIONS_SINCE: i64 = 8;

/// What the user should know where a model leaves version 3 of the format.
const CONSTANTS_CAME_APART: &str = "weights are no graph inputs any more: the format has them apart since IR version 4";

/// How to rewrite.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Write bodies in place of calls of our operators, for runtimes that know no local functions.
    pub inline: bool,
    /// Rewrite a model that was rewritten before.
    pub force: bool,
    /// Cut tokens off instead of reducing them: the slicing floor ([`Reduction::sliced`]).
    pub sliced: bool,
    /// Compute all tokens, also those that nothing reads.
    pub keep_dead: bool,
    /// The model is to be trained: passes that act in training alone are allowed.
    pub training: bool,
}

/// What was done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What each block does to the token count; empty where it is known only at run time. Of several towers, this is
    /// the first that was rewritten.
    pub steps: Vec<Step>,
    /// What was done to each tower; empty where the model has only one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub towers: Vec<TowerReport>,
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

/// What was done to one of several towers.
#[derive(Clone, Debug, Serialize)]
pub struct TowerReport {
    /// Its name.
    pub name: String,
    /// What each of its blocks does to the token count; empty where it is known only at run time.
    pub steps: Vec<Step>,
}

/// A model that is ready to be analysed: local functions of others and attention of ours inlined, its operators those of a
/// version that bodies of ours can be written in, and in canonical form.
pub fn prepare(model: &Model) -> Result<(Model, Vec<String>), Refusal> {
    let mut model = model.clone();
    let refused = |error: InlineError| Refusal::Request(error.to_string());
    let mut notes = Vec::new();
    // Attention of ours becomes what it was: it is found by its softmax, whoever wrote it.
    let attention = [Attention.op_type(), ProportionalAttention.op_type()];
    if inline_functions(&mut model, |op| op.domain != DOMAIN || attention.contains(op)).map_err(refused)? {
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

/// Applies the passes of a recipe, and leaves out tokens that nothing reads.
pub fn rewrite(model: &Model, recipe: &Recipe, options: Options) -> Result<(Model, Report), Refusal> {
    if let Some(version) = model.metadata(VERSION_KEY).filter(|_| !options.force) {
        return Err(Refusal::Request(format!(
            "this model was rewritten before (by vitrim {version}); rewrite the original, or pass --force"
        )));
    }
    if !options.training && recipe.passes.iter().any(PassSpec::only_trains) {
        return Err(Refusal::Request(
            "expansion acts in training alone: for inference the model stays as it is; leave kind = \"expand\" out"
                .into(),
        ));
    }
    let (mut original, mut notes) = prepare(model)?;
    // What is given at run time is an input that may be left out.
    if recipe.passes.iter().any(PassSpec::at_run_time) && original.require_ir_version(CONSTANTS_APART) > 0 {
        notes.push(CONSTANTS_CAME_APART.into());
    }
    let towers = recognise::towers(&original)?;
    let cost_before = towers.iter().find_map(|tower| cost(&original, tower.found.as_ref().ok()?, &[]));
    let nodes_before = original.graph().len();
    let report = Report { notes, nodes_before, cost_before, cost_after: cost_before, ..Report::default() };
    let (original, towers) = (&original, towers.as_slice());
    let mut rewrite = Rewrite { original, towers, model: original.clone(), options, report, changed: false };
    if !recipe.passes.is_empty() {
        rewrite.reduce(&recipe.passes)?;
    }
    if !options.keep_dead {
        rewrite.eliminate_dead_tokens()?;
    }
    rewrite.finish(recipe)
}

/// A rewrite under way.
struct Rewrite<'a> {
    original: &'a Model,
    /// The towers of the original.
    towers: &'a [Tower],
    model: Model,
    options: Options,
    report: Report,
    changed: bool,
}

impl<'a> Rewrite<'a> {
    /// Reduces the tokens of every tower that passes name, and of those that allow it for the passes that name none: all
    /// passes that concern a tower at once.
    fn reduce(&mut self, passes: &[PassSpec]) -> Result<(), Refusal> {
        for name in passes.iter().filter_map(PassSpec::tower) {
            Tower::named(self.towers, name)?;
        }
        let mut refused = Vec::new();
        for tower in self.towers {
            let named = |pass: &&PassSpec| pass.tower() == Some(&tower.name);
            let concerned = |pass: &&PassSpec| named(pass) || pass.tower().is_none();
            let passes_of_tower: Vec<&PassSpec> = passes.iter().filter(concerned).collect();
            if passes_of_tower.is_empty() {
                continue;
            }
            match self.reduce_tower(tower, &passes_of_tower) {
                Err(Refusal::Internal(reason)) => return Err(Refusal::Internal(reason)),
                Err(refusal) if passes_of_tower.iter().any(named) => return Err(refusal),
                Err(refusal) => refused.push((&tower.name, refusal)),
                Ok(()) => {}
            }
        }
        if refused.len() == self.towers.len() {
            return Err(refused.swap_remove(0).1);
        }
        let note = |(name, refusal): &(&String, Refusal)| format!("the tower '{name}' is left as it is: {refusal}");
        self.report.notes.extend(refused.iter().map(note));
        Ok(())
    }

    fn reduce_tower(&mut self, tower: &'a Tower, passes: &[&PassSpec]) -> Result<(), Refusal> {
        let several = self.towers.len() > 1;
        let vit = self.current(tower)?;
        let half = vit.shapes.dtype(vit.axes.origin()) == Some(DataType::F16);
        let tokens = vit.tokens().as_known();
        let name = if several { format!("{SOURCE_OUTPUT}/{}", tower.name) } else { SOURCE_OUTPUT.to_owned() };
        let reduction = Reduction {
            methods: passes.iter().map(|pass| pass.resolve(tokens, half)).collect::<Result<_, _>>()?,
            trace_source: passes.iter().any(|pass| pass.trace_source()).then_some(name),
            sliced: self.options.sliced,
        };
        let proposal = reduction.propose(&self.model, &vit)?;
        self.changed |= !proposal.patch.is_empty();
        self.model = apply(&self.model, proposal.patch)?;
        let saved = tower.found.as_ref().ok().and_then(|vit| {
            let flops = |steps| Some(cost(self.original, vit, steps)?.flops);
            Some(Cost { flops: flops(&[])?.checked_sub(flops(&proposal.steps)?)? })
        });
        let report = &mut self.report;
        report.cost_after = report.cost_after.zip(saved).map(|(cost, saved)| cost.without(saved));
        let of = if several { format!("the tower '{}': ", tower.name) } else { String::new() };
        report.notes.extend(proposal.notes.iter().map(|note| format!("{of}{note}")));
        if several {
            report.towers.push(TowerReport { name: tower.name.clone(), steps: proposal.steps.clone() });
        }
        if report.steps.is_empty() {
            report.steps = proposal.steps;
        }
        Ok(())
    }

    /// Leaves out tokens that nothing reads, of all towers at once.
    fn eliminate_dead_tokens(&mut self) -> Result<(), Refusal> {
        let found = self.towers.iter().map(|tower| tower.found.as_ref());
        let towers: Vec<&VitModel> = found.clone().filter_map(Result::ok).collect();
        if let (true, Some(Err(refusal))) = (towers.is_empty(), found.into_iter().next()) {
            return Err(refusal.clone());
        }
        let proposal = dead::propose(&self.model, &towers)?;
        self.changed |= !proposal.patch.is_empty();
        self.model = apply(&self.model, proposal.patch)?;
        let report = &mut self.report;
        report.cost_after = report.cost_after.zip(proposal.saved).map(|(cost, saved)| cost.without(saved));
        report.notes.extend(proposal.notes);
        Ok(())
    }

    /// What is recognised of a tower by now. Towers may meet behind their last blocks, so what is known of one holds
    /// only until another is rewritten.
    fn current(&self, tower: &'a Tower) -> Result<Cow<'a, VitModel>, Refusal> {
        if self.model.graph().revision() == self.original.graph().revision() {
            return tower.found.as_ref().map(Cow::Borrowed).map_err(Refusal::clone);
        }
        let mut towers = recognise::towers(&self.model)?.into_iter();
        let same = towers.find(|other| other.attention == tower.attention);
        same.ok_or_else(|| Refusal::Internal(format!("the tower '{}' is gone", tower.name)))?.found.map(Cow::Owned)
    }

    /// Records what was done, and writes bodies out if that is asked for.
    fn finish(self, recipe: &Recipe) -> Result<(Model, Report), Refusal> {
        let Self { mut model, options, mut report, changed, .. } = self;
        if changed {
            let mut provenance = Patch::new(&model, "provenance");
            provenance.metadata(VERSION_KEY, env!("CARGO_PKG_VERSION").into());
            provenance.metadata(RECIPE_KEY, recipe.to_toml());
            if let Some(tokens) = report.tokens() {
                provenance.metadata(TOKENS_KEY, tokens);
            }
            model = apply(&model, provenance)?;
        }
        if options.inline {
            inline_functions(&mut model, |_| true).map_err(|error| Refusal::Request(error.to_string()))?;
        }
        if changed && !model.functions().is_empty() && model.require_ir_version(FUNCTIONS_SINCE) > 0 {
            report.notes.push(CONSTANTS_CAME_APART.into());
        }
        report.nodes_after = model.graph().len();
        Ok((model, report))
    }
}

impl Report {
    /// The tokens that leave each block, as metadata states them.
    fn tokens(&self) -> Option<String> {
        let counts = |steps: &[Step]| {
            let counts: Vec<String> = steps.iter().map(|step| step.after().to_string()).collect();
            (!counts.is_empty()).then(|| counts.join(","))
        };
        if self.towers.is_empty() {
            return counts(&self.steps);
        }
        let of_tower = |tower: &TowerReport| Some(format!("{}={}", tower.name, counts(&tower.steps)?));
        let towers: Vec<String> = self.towers.iter().filter_map(of_tower).collect();
        (!towers.is_empty()).then(|| towers.join(";"))
    }
}

/// Applies one patch and validates the result. A failure here is a defect of the pass, not of the user's model.
fn apply(model: &Model, patch: Patch) -> Result<Model, Refusal> {
    let (edited, _) = patch.apply(model).map_err(|error| Refusal::Internal(error.to_string()))?;
    edited.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    Ok(edited)
}

/// Recognises without rewriting; of several towers it is the first that can be rewritten.
pub fn inspect(model: &Model) -> Result<(Model, VitModel), Refusal> {
    let (model, _) = prepare(model)?;
    let vit = recognise::recognise(&model)?;
    Ok((model, vit))
}

/// Recognises all towers without rewriting.
pub fn towers(model: &Model) -> Result<(Model, Vec<Tower>), Refusal> {
    let (model, _) = prepare(model)?;
    let towers = recognise::towers(&model)?;
    Ok((model, towers))
}

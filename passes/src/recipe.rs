//! Recipes: passes in order, as a file or as the short forms of the command line.

use serde::{Deserialize, Serialize};

use crate::Refusal;
use crate::reduce::{Convention, Distance, Expand, Merge, Method, Metric, Prune};
use crate::schedule::{Expansion, KeepSchedule, Schedule};

/// Passes in order. Without any, dead tokens alone are eliminated.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The passes.
    #[serde(default, rename = "pass")]
    pub passes: Vec<PassSpec>,
}

/// One pass of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum PassSpec {
    /// Token merging.
    Merge(MergeSpec),
    /// Token pruning.
    Prune(PruneSpec),
    /// Token expansion; in training alone.
    Expand(ExpandSpec),
}

impl PassSpec {
    /// Which tower it is for; every one that allows it where not given.
    pub fn tower(&self) -> Option<&str> {
        match self {
            Self::Merge(spec) => spec.tower.as_deref(),
            Self::Prune(spec) => spec.tower.as_deref(),
            Self::Expand(spec) => spec.tower.as_deref(),
        }
    }

    /// Whether to add the output that tells where tokens went.
    pub fn trace_source(&self) -> bool {
        match self {
            Self::Merge(spec) => spec.trace_source,
            Self::Prune(spec) => spec.trace_source,
            Self::Expand(spec) => spec.trace_source,
        }
    }

    /// Whether how much is an input of the model.
    pub fn at_run_time(&self) -> bool {
        match self {
            Self::Merge(spec) => spec.runtime_r,
            Self::Prune(spec) => spec.runtime_keep,
            Self::Expand(_) => false,
        }
    }

    /// Whether it is for training alone.
    pub fn only_trains(&self) -> bool {
        matches!(self, Self::Expand(_))
    }

    /// The method, for a model of `tokens` tokens in half precision or not.
    pub fn resolve(&self, tokens: Option<i64>, half: bool) -> Result<Method, Refusal> {
        match self {
            Self::Merge(spec) => spec.resolve(tokens, half).map(Method::Merge),
            Self::Prune(spec) => spec.resolve().map(Method::Prune),
            Self::Expand(spec) => spec.resolve().map(Method::Expand),
        }
    }
}

/// `kind = "merge"`. Exactly one of `r`, `ratio` and `keep_tokens` is given.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeSpec {
    /// Which tower of a model with several; every one that allows it where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tower: Option<String>,
    /// `8`, `"16:-1"` or `[8, 8, 4]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<RSpec>,
    /// Share of the tokens that are not protected, per block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Tokens left after each block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_tokens: Option<Vec<usize>>,
    /// Multiple that token counts are brought to: a number, or `"auto"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub align: Option<Align>,
    /// First tokens kept out of matching; all special tokens at the front where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protect: Option<usize>,
    /// Whether attention takes sizes into account; yes where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proportional: Option<bool>,
    /// Whether means over tokens stay unweighted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub plain_pooling: bool,
    /// What decides which tokens are alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Whether r is an input of the model; what is given here is its default.
    #[serde(default, skip_serializing_if = "is_false")]
    pub runtime_r: bool,
    /// Whether to add the output `token_source`; `token_source/NAME` for each tower of a model with several.
    #[serde(default, skip_serializing_if = "is_false")]
    pub trace_source: bool,
}

/// `kind = "prune"`.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneSpec {
    /// Which tower of a model with several; every one that allows it where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tower: Option<String>,
    /// Share of the patches to keep: one for the blocks of `at`, or a list with one for each block.
    pub keep: KeepSpec,
    /// Blocks that prune, from 0 on; 3, 6 and 9 where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<Vec<usize>>,
    /// Whether what leaves becomes one more token (EViT).
    #[serde(default, skip_serializing_if = "is_false")]
    pub fuse: bool,
    /// Share of the connections between patches that later blocks keep (Tri-Level's attention level).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_keep: Option<f64>,
    /// Whether the shares are inputs of the model; what is given here are their defaults.
    #[serde(default, skip_serializing_if = "is_false")]
    pub runtime_keep: bool,
    /// Whether to add the output `token_source`; `token_source/NAME` for each tower of a model with several.
    #[serde(default, skip_serializing_if = "is_false")]
    pub trace_source: bool,
}

/// `kind = "expand"`. Every key but `stage` has the default of the paper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpandSpec {
    /// Which tower of a model with several; every one that allows it where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tower: Option<String>,
    /// The first epoch of each stage.
    pub epochs: Vec<usize>,
    /// The share of the patches that each stage keeps.
    pub keep: Vec<f64>,
    /// The share that expansion begins with.
    pub seed_rate: f64,
    /// Rounds in which each stage adds patches.
    pub repeats: usize,
    /// How far patches are from each other.
    pub distance: Distance,
    /// What of the distance is near; what the paper says where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub convention: Option<Convention>,
    /// The stage, from 1 on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<usize>,
    /// Whether to add the output `token_source`; `token_source/NAME` for each tower of a model with several.
    #[serde(skip_serializing_if = "is_false")]
    pub trace_source: bool,
}

impl Default for ExpandSpec {
    fn default() -> Self {
        let Expansion { epochs, keep, seed_rate, repeats } = Expansion::default();
        let (distance, trace_source) = (Distance::default(), false);
        Self { tower: None, epochs, keep, seed_rate, repeats, distance, convention: None, stage: None, trace_source }
    }
}

/// Shares to keep in their two spellings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KeepSpec {
    /// The same in every block that prunes.
    Constant(f64),
    /// One per block.
    PerBlock(Vec<f64>),
}

impl Default for KeepSpec {
    fn default() -> Self {
        Self::Constant(1.0)
    }
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// r in its three spellings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RSpec {
    /// The same in every block.
    Constant(usize),
    /// One per block.
    PerBlock(Vec<usize>),
    /// As on the command line.
    Text(String),
}

/// What token counts are brought to a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// This number.
    To(usize),
    /// What fused attention kernels want: 8 for half precision, 16 for single precision from 256 tokens on.
    Auto,
}

impl std::str::FromStr for Align {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => match number.parse() {
                Ok(number @ 1..=4096) => Ok(Self::To(number)),
                _ => Err(format!("'{text}' is neither 'auto' nor a number from 1 to 4096")),
            },
        }
    }
}

impl Serialize for Align {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::To(number) => serializer.serialize_u64(*number as u64),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Align {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Spelling {
            Number(usize),
            Text(String),
        }
        let text = match Spelling::deserialize(deserializer)? {
            Spelling::Number(number) => number.to_string(),
            Spelling::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Align {
    /// The multiple for a model of `tokens` tokens, in half precision or not.
    pub fn resolve(self, tokens: Option<i64>, half: bool) -> usize {
        match self {
            Self::To(number) => number,
            Self::Auto if half => 8,
            Self::Auto if tokens.is_some_and(|tokens| tokens >= 256) => 16,
            Self::Auto => 1,
        }
    }
}

impl Recipe {
    /// Reads a recipe from TOML.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let refused = |error: toml::de::Error| {
            let before = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(before).filter(|&byte| byte == b'\n').count();
            Refusal::Request(format!("the recipe is not valid: line {line}: {}", error.message().replace('\n', ", ")))
        };
        toml::from_str(text).map_err(refused)
    }

    /// The recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }
}

impl MergeSpec {
    /// The pass, for a model of `tokens` tokens in half precision or not.
    pub fn resolve(&self, tokens: Option<i64>, half: bool) -> Result<Merge, Refusal> {
        let schedule = match (&self.r, self.ratio, &self.keep_tokens) {
            (Some(RSpec::Constant(r)), None, None) => Schedule::Constant(*r),
            (Some(RSpec::PerBlock(rs)), None, None) => Schedule::PerBlock(rs.clone()),
            (Some(RSpec::Text(text)), None, None) => text.parse().map_err(Refusal::Request)?,
            (None, Some(ratio), None) => Schedule::Ratio(ratio),
            (None, None, Some(kept)) => Schedule::Keep(kept.clone()),
            (None, None, None) => {
                return Err(Refusal::Request("how much to merge is not given: r, ratio or keep_tokens".into()));
            }
            _ => return Err(Refusal::Request("r, ratio and keep_tokens exclude each other: give one".into())),
        };
        Ok(Merge {
            align: self.align.map_or(1, |align| align.resolve(tokens, half)),
            protect: self.protect,
            proportional: self.proportional.unwrap_or(true),
            plain_pooling: self.plain_pooling,
            metric: self.metric.unwrap_or_default(),
            runtime: self.runtime_r,
            schedule,
        })
    }
}

impl PruneSpec {
    /// The method.
    pub fn resolve(&self) -> Result<Prune, Refusal> {
        let schedule = match (&self.keep, &self.at) {
            (KeepSpec::Constant(keep), at) => {
                KeepSchedule::At(*keep, at.clone().unwrap_or_else(|| KeepSchedule::BLOCKS.into()))
            }
            (KeepSpec::PerBlock(keep), None) => KeepSchedule::PerBlock(keep.clone()),
            (KeepSpec::PerBlock(_), Some(_)) => {
                return Err(Refusal::Request("a share for each block says where to prune: leave at out".into()));
            }
        };
        if let Some(share) = self.attention_keep.filter(|&share| !(share > 0.0 && share <= 1.0)) {
            return Err(Refusal::Request(format!("the share of connections to keep, {share}, lies outside 0 to 1")));
        }
        Ok(Prune { schedule, fuse: self.fuse, attention_keep: self.attention_keep, runtime: self.runtime_keep })
    }
}

impl ExpandSpec {
    /// The course of the training.
    pub fn schedule(&self) -> Result<Expansion, Refusal> {
        let Self { epochs, keep, seed_rate, repeats, .. } = self.clone();
        let schedule = Expansion { epochs, keep, seed_rate, repeats };
        schedule.check()?;
        Ok(schedule)
    }

    /// The method.
    pub fn resolve(&self) -> Result<Expand, Refusal> {
        let schedule = self.schedule()?;
        let stages = schedule.keep.len();
        let Some(stage) = self.stage.filter(|&stage| (1..=stages).contains(&stage)) else {
            return Err(Refusal::Request(format!("a graph expands as one stage does: give stage, from 1 to {stages}")));
        };
        Ok(Expand { schedule, stage, distance: self.distance, convention: self.convention.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expansion_has_the_defaults_of_the_paper() {
        let recipe = Recipe::parse("[[pass]]\nkind = \"expand\"\nstage = 2\ndistance = \"manhattan\"").unwrap();
        let PassSpec::Expand(spec) = &recipe.passes[0] else { panic!("an expansion") };
        let expand = spec.resolve().unwrap();
        assert_eq!(expand.schedule, Expansion::default());
        assert_eq!((expand.stage, expand.convention), (2, Convention::Paper));
        assert_eq!(Recipe::parse(&recipe.to_toml()).unwrap(), recipe);
        let refused = |spec: ExpandSpec| spec.resolve().unwrap_err().to_string();
        assert!(refused(ExpandSpec::default()).contains("from 1 to 3"));
        assert!(refused(ExpandSpec { stage: Some(4), ..ExpandSpec::default() }).contains("from 1 to 3"));
        let falling = ExpandSpec { keep: vec![0.5, 0.4, 1.0], stage: Some(1), ..ExpandSpec::default() };
        assert!(refused(falling).contains("rise"));
        assert!(refused(ExpandSpec { seed_rate: f64::NAN, ..ExpandSpec::default() }).contains("above 0"));
    }

    #[test]
    fn a_recipe_survives_being_stored() {
        let text = "[[pass]]\nkind = \"merge\"\nr = \"16:-1\"\nalign = \"auto\"\nprotect = 1\nproportional = false\n";
        let recipe = Recipe::parse(text).unwrap();
        let PassSpec::Merge(spec) = &recipe.passes[0] else { panic!("a merge") };
        assert_eq!(spec.resolve(Some(577), false).unwrap().align, 16);
        assert_eq!(spec.resolve(Some(197), true).unwrap().schedule, Schedule::Inflection(16, -1.0));
        assert_eq!(Recipe::parse(&recipe.to_toml()).unwrap(), recipe);
    }

    #[test]
    fn a_recipe_without_passes_is_one() {
        let recipe = Recipe::parse("").unwrap();
        assert_eq!(recipe, Recipe::default());
        assert_eq!(Recipe::parse(&recipe.to_toml()).unwrap(), recipe);
    }

    #[test]
    fn unknown_keys_and_contradictions_are_refused() {
        assert!(Recipe::parse("[[pass]]\nkind = \"merge\"\nr = 8\nratioo = 0.1").is_err());
        assert!(Recipe::parse("[[pass]]\nkind = \"blend\"").is_err());
        let Recipe { passes } = Recipe::parse("[[pass]]\nkind = \"merge\"\nr = 8\nratio = 0.1").unwrap();
        let PassSpec::Merge(spec) = &passes[0] else { panic!("a merge") };
        assert!(spec.resolve(None, false).unwrap_err().to_string().contains("exclude each other"));
    }
}

//! The plan: which acts each block's tokens go through, and how many are left.

use vitrim_ir::Graph;

use crate::Refusal;
use crate::recognise::{SpecialTokens, VitModel};
use crate::schedule::{KeepSchedule, Schedule, Step, keep_count};

use super::{Expand, Merge, Method, Reduction};

/// One change of the tokens at a cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Act {
    /// The `r` most similar pairs become one token each.
    Merge {
        /// Which of the reduction's methods asks for it.
        method: usize,
        r: usize,
    },
    /// The best patches stay.
    Prune {
        keep: Keep,
        /// Whether those that leave, if any do, become one token behind the patches.
        fuse: bool,
        /// Share of the connections that each patch keeps, if not all.
        attention_keep: Option<f64>,
    },
    /// So many patches stay, and the others join them. It is behind the whole block, not its attention.
    Expand { keep: usize },
}

/// How many patches stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Keep {
    /// So many.
    Count(usize),
    /// A share of those that are there when the model runs.
    Share(f64),
    /// The share that the model is given when it runs.
    Input,
}

/// What happens at each block.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// In order, for each block.
    pub acts: Vec<Vec<Act>>,
    /// What each block does to the token count; empty where it is known only at run time.
    pub steps: Vec<Step>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Plans a reduction of `tokens` tokens, if their number is known, in `depth` blocks.
    pub fn of(
        reduction: &Reduction,
        depth: usize,
        tokens: Option<usize>,
        special: SpecialTokens,
    ) -> Result<Self, Refusal> {
        for method in &reduction.methods {
            match method {
                Method::Merge(merge) => merge.schedule.check(depth)?,
                Method::Prune(prune) => prune.schedule.check(depth)?,
                Method::Expand(expand) => expand.schedule.check()?,
            }
        }
        if let Some(expand) = reduction.methods.iter().find_map(|method| match method {
            Method::Expand(expand) => Some(expand),
            Method::Merge(_) | Method::Prune(_) => None,
        }) {
            if reduction.methods.len() > 1 {
                return Err(Refusal::Request("expansion acts alone: leave other passes out".into()));
            }
            return Self::expanded(expand, depth, tokens, special);
        }
        let at_run_time = reduction.methods.iter().any(|method| match method {
            Method::Merge(merge) => merge.runtime,
            Method::Prune(prune) => prune.runtime,
            Method::Expand(_) => false,
        });
        match tokens {
            Some(tokens) if !at_run_time => Self::counted(reduction, depth, tokens, special),
            _ => Self::uncounted(reduction, depth),
        }
    }

    /// Whether all counts are known.
    pub fn is_counted(&self) -> bool {
        !self.steps.is_empty()
    }

    /// One act, between the first block and the second.
    fn expanded(expand: &Expand, depth: usize, tokens: Option<usize>, special: SpecialTokens) -> Result<Self, Refusal> {
        let refuse = |what: &str| Err(Refusal::Request(what.into()));
        let Some(tokens) = tokens else {
            return refuse("expansion needs token counts that are fixed; this model's are not");
        };
        let mut acts = vec![Vec::new(); depth];
        let mut after = tokens;
        if expand.schedule.is_active(expand.stage) {
            let others = special.prefix() + special.suffix;
            let patches = tokens.saturating_sub(others);
            if depth < 2 {
                return refuse("expansion acts between the first block and the second: the model has no second");
            }
            if expand.schedule.seeds(patches).is_empty() {
                return Err(Refusal::Request(format!("{patches} patches are too few to begin an expansion with")));
            }
            let keep = expand.schedule.kept(patches, expand.stage).min(patches);
            acts[0].push(Act::Expand { keep });
            after = others + keep;
        }
        let step =
            |block: usize| Step { before: if block == 0 { tokens } else { after }, removed: 0, unaligned: false };
        Ok(Self { acts, steps: (0..depth).map(step).collect(), notes: Vec::new() })
    }

    /// Refuses an expansion where no one stream of tokens enters the second block.
    pub fn check_places(&self, graph: &Graph, vit: &VitModel) -> Result<(), Refusal> {
        let expands = self.acts.first().is_some_and(|acts| matches!(acts[..], [Act::Expand { .. }]));
        match vit.blocks.get(1) {
            Some(second) if expands && second.entry.is_none() => Err(Refusal::Pinned {
                node: graph.describe(second.cut),
                reason: "it ends the attention of a block that no single stream of tokens enters".into(),
            }),
            _ => Ok(()),
        }
    }

    fn counted(reduction: &Reduction, depth: usize, tokens: usize, special: SpecialTokens) -> Result<Self, Refusal> {
        let mut plan = Self::default();
        let mut before = tokens;
        // Whether the last patch is what EViT makes of those that left.
        let mut extra = false;
        for block in 0..depth {
            let mut acts = Vec::new();
            let mut unaligned = false;
            let mut left = before;
            for (method, of) in reduction.methods.iter().enumerate() {
                match of {
                    Method::Merge(merge) => {
                        let protected = merge.protected(special).saturating_add(usize::from(extra));
                        if protected >= tokens {
                            return Err(Refusal::Request(format!(
                                "all {tokens} tokens are protected: nothing is left to merge"
                            )));
                        }
                        let step = merge.schedule.step(block, depth, left, protected, merge.align)?;
                        unaligned |= step.unaligned;
                        if step.removed > 0 {
                            acts.push(Act::Merge { method, r: step.removed });
                        }
                        left = step.after();
                    }
                    Method::Prune(prune) => {
                        let others = special.prefix() + special.suffix;
                        // With fewer protected tokens than special ones a merge may have left no patches.
                        let Some(patches) = left.checked_sub(others).filter(|&patches| patches > 0) else { continue };
                        let Some(share) = prune.schedule.share(block) else { continue };
                        let keep = keep_count(patches, share);
                        let (drops, attention_keep) = (keep < patches, prune.attention_keep);
                        if drops || attention_keep.is_some() {
                            extra = prune.fuse && drops;
                            acts.push(Act::Prune { keep: Keep::Count(keep), fuse: extra, attention_keep });
                            left = others + keep + usize::from(extra);
                        }
                    }
                    Method::Expand(_) => {}
                }
            }
            plan.acts.push(acts);
            plan.steps.push(Step { before, removed: before - left, unaligned });
            before = left;
        }
        let unaligned = plan.steps.iter().filter(|step| step.unaligned).count();
        if unaligned > 0 {
            let align = reduction.methods.iter().find_map(|method| match method {
                Method::Merge(merge) => Some(merge.align).filter(|&align| align > 1),
                Method::Prune(_) | Method::Expand(_) => None,
            });
            let align = align.unwrap_or(1);
            plan.notes.push(format!("{unaligned} block(s) cannot reach a multiple of {align} tokens and keep their r"));
        }
        Ok(plan)
    }

    /// Without a count before the model runs: numbers of tokens to merge, and shares of patches to keep.
    fn uncounted(reduction: &Reduction, depth: usize) -> Result<Self, Refusal> {
        let refuse = |what: &str| Err(Refusal::Request(what.into()));
        let mut plan = Self { acts: vec![Vec::new(); depth], ..Self::default() };
        for (method, of) in reduction.methods.iter().enumerate() {
            match of {
                Method::Merge(merge) => {
                    if merge.align > 1 {
                        return refuse("alignment needs token counts that are fixed; this model's are not");
                    }
                    if merge.runtime && !matches!(merge.schedule, Schedule::Constant(_)) {
                        return refuse("what is merged at run time is one r for all blocks: give one number");
                    }
                    let Some(requested) = merge.schedule.requested(depth) else {
                        return refuse("token counts are known only at run time: give r, not a ratio or kept counts");
                    };
                    let acts = plan.acts.iter_mut().zip(requested).filter(|&(_, r)| r > 0 || merge.runtime);
                    acts.for_each(|(acts, r)| acts.push(Act::Merge { method, r }));
                }
                Method::Prune(prune) => {
                    if prune.fuse && prune.attention_keep.is_some() {
                        return refuse(
                            "connections of the token that is made of those that leave stay open, and whether there is \
                             one is known only at run time: prune without fusing, or without the attention level",
                        );
                    }
                    if prune.runtime && !matches!(prune.schedule, KeepSchedule::At(..)) {
                        return refuse("what is kept at run time is one share: say in which blocks with at");
                    }
                    for (block, acts) in plan.acts.iter_mut().enumerate() {
                        let Some(share) = prune.schedule.share(block) else { continue };
                        let keep = if prune.runtime { Keep::Input } else { Keep::Share(share) };
                        acts.push(Act::Prune { keep, fuse: prune.fuse, attention_keep: prune.attention_keep });
                    }
                }
                Method::Expand(_) => {}
            }
        }
        let mut acts = plan.acts.iter().flatten().skip_while(|act| !matches!(act, Act::Prune { fuse: true, .. }));
        if acts.any(|act| matches!(act, Act::Merge { .. })) {
            return refuse(
                "a merge leaves out the token that a pruning before it makes of those that leave, and whether there is \
                 one is known only at run time: prune without fusing, or merge before",
            );
        }
        Ok(plan)
    }
}

impl Merge {
    /// Tokens that take no part: at the front those asked for or all special ones, and those at the end.
    fn protected(&self, special: SpecialTokens) -> usize {
        self.protect.unwrap_or(special.prefix()).saturating_add(special.suffix)
    }
}

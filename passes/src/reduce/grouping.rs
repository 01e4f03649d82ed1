//! Groupings at work: which slot an original token is in, and whose place a slot keeps, after all acts up to a stage.

use vitrim_ir::{Attribute, Tensor, ValueId};
use vitrim_ops::{TokenAssign, TokenRestore};

use super::Rewriter;

/// Where the tokens of one stage are in the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grouping {
    /// The token whose place each slot keeps, `[B, M]`; -1 for a slot made from scratch.
    pub anchor: ValueId,
    pub others: Others,
}

/// What became of the tokens that are no anchors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Others {
    /// They joined others.
    Merged { leaving: ValueId, into: ValueId },
    /// They joined others too: the slot of every token.
    Joined { assign: ValueId },
    /// They were dropped, or are together in one slot more.
    Dropped {
        /// The slot of every token; -1 for those that are nowhere.
        assign: ValueId,
        /// What decided, `[B, N]` float32.
        score: ValueId,
        /// All tokens before, `[B, N, C]`.
        tokens: ValueId,
    },
}

impl Rewriter<'_> {
    /// The slot of every original token at `stage`, -1 for those that are nowhere.
    pub(super) fn owner(&mut self, stage: usize) -> Option<ValueId> {
        if stage == 0 {
            return None;
        }
        if let Some(owner) = self.stages.entry(stage).owner {
            return Some(owner);
        }
        let before = self.owner(stage - 1);
        let assign = self.assign(stage)?;
        let owner = self.followed_by(before, assign, stage, "owner");
        self.stages.entry_mut(stage).owner = Some(owner);
        Some(owner)
    }

    /// As [`Rewriter::owner`], but those who left for EViT's extra token count as nowhere: it is no average of them.
    fn own_slot(&mut self, stage: usize) -> Option<ValueId> {
        if !self.stages.has_fused(stage) {
            return self.owner(stage);
        }
        if let Some(own) = self.stages.entry(stage).own_slot {
            return Some(own);
        }
        let before = self.own_slot(stage - 1);
        let mut assign = self.assign(stage)?;
        if let Some(is_fused) = self.is_fused(stage) {
            let hint = format!("vitrim/assign{stage}");
            let nowhere = self.ints(&format!("{hint}_nowhere"), &[-1]);
            assign = self.patch.op("Where", &format!("{hint}_own"), &[is_fused, nowhere, assign], &[]);
        }
        let own = self.followed_by(before, assign, stage, "own_slot");
        self.stages.entry_mut(stage).own_slot = Some(own);
        Some(own)
    }

    /// Whether each token of the stage before is in the extra token that a pruning makes at `stage`, `[B, N]`: it has no
    /// anchor. Where that slot is, and whether there is one, may be known only at run time.
    fn is_fused(&mut self, stage: usize) -> Option<ValueId> {
        let Grouping { anchor, others } = self.stages.entry(stage).grouping?;
        let Others::Dropped { assign, .. } = others else { return None };
        if !self.stages.fuses(stage) {
            return None;
        }
        if let Some(known) = self.stages.entry(stage).is_fused {
            return Some(known);
        }
        // Everyone has a slot: those that leave have that one.
        let hint = format!("vitrim/fused{stage}");
        let along = [("axis", Attribute::Int(1))];
        let anchor = self.patch.op("GatherElements", &format!("{hint}_anchor"), &[anchor, assign], &along);
        let is_fused = self.is_negative(anchor, &hint);
        self.stages.entry_mut(stage).is_fused = Some(is_fused);
        Some(is_fused)
    }

    /// Whether positions are those of no token: of a slot that was made from scratch.
    pub(super) fn is_negative(&mut self, positions: ValueId, hint: &str) -> ValueId {
        let zero = self.ints(&format!("{hint}_zero"), &[0]);
        self.patch.op("Less", hint, &[positions, zero], &[])
    }

    /// The token of the stage before whose place each slot has, `[B, M]`: its anchor; for EViT's extra token the one that
    /// weighs most in it, of equals the first.
    pub(super) fn places(&mut self, stage: usize) -> Option<ValueId> {
        let Grouping { anchor, others } = self.stages.entry(stage).grouping?;
        let (Others::Dropped { score, .. }, Some(is_fused)) = (others, self.is_fused(stage)) else {
            return Some(anchor);
        };
        if let Some(known) = self.stages.entry(stage).places {
            return Some(known);
        }
        let hint = format!("vitrim/places{stage}");
        let least = self.patch.constant(&format!("{hint}_least"), Tensor::f32s(&[1], &[f32::NEG_INFINITY]));
        let weights = self.patch.op("Where", &format!("{hint}_weights"), &[is_fused, score, least], &[]);
        let along = [("axis", Attribute::Int(1))];
        let heaviest = self.patch.op("ArgMax", &format!("{hint}_heaviest"), &[weights], &along);
        let is_extra = self.is_negative(anchor, &format!("{hint}_extra"));
        let places = self.patch.op("Where", &hint, &[is_extra, heaviest, anchor], &[]);
        self.stages.entry_mut(stage).places = Some(places);
        Some(places)
    }

    /// The slot of every token of the stage before.
    fn assign(&mut self, stage: usize) -> Option<ValueId> {
        match self.stages.entry(stage).grouping? {
            Grouping { others: Others::Dropped { assign, .. } | Others::Joined { assign }, .. } => Some(assign),
            Grouping { anchor, others: Others::Merged { leaving, into } } => {
                if let Some(known) = self.stages.entry(stage).assign {
                    return Some(known);
                }
                let hint = format!("vitrim/assign{stage}");
                let assign = self.vitrim(&TokenAssign, &hint, &[anchor, leaving, into], &[], 1)[0];
                self.stages.entry_mut(stage).assign = Some(assign);
                Some(assign)
            }
        }
    }

    /// `assign` of `stage` after what came `before` it.
    fn followed_by(&mut self, before: Option<ValueId>, assign: ValueId, stage: usize, name: &str) -> ValueId {
        let Some(before) = before else { return assign };
        let axis = [("axis", Attribute::Int(1))];
        let hint = format!("vitrim/{name}{stage}");
        if !self.stages.has_dropped(stage - 1) {
            return self.patch.op("GatherElements", &hint, &[assign, before], &axis);
        }
        let (somewhere, zero) = self.somewhere(before, &hint);
        let slot = self.patch.op("Max", &format!("{hint}_before"), &[before, zero], &[]);
        let slot = self.patch.op("GatherElements", &format!("{hint}_after"), &[assign, slot], &axis);
        self.patch.op("Where", &hint, &[somewhere, slot, before], &[])
    }

    /// Whether each position is one, and a zero.
    fn somewhere(&mut self, positions: ValueId, hint: &str) -> (ValueId, ValueId) {
        let [nowhere, zero] = [-1, 0].map(|position| self.ints(&format!("{hint}_position"), &[position]));
        (self.patch.op("Greater", &format!("{hint}_somewhere"), &[positions, nowhere], &[]), zero)
    }

    /// `tokens`, `[B, M, C]` of `stage`, as `[B, N, C]` of all original tokens. Those that were dropped are as they were
    /// then.
    pub(super) fn all_tokens(&mut self, tokens: ValueId, stage: usize, hint: &str) -> Option<ValueId> {
        if stage == 0 {
            return Some(tokens);
        }
        let own = self.own_slot(stage)?;
        if !self.stages.has_dropped(stage) {
            return Some(self.vitrim(&TokenRestore, &format!("{hint}/restored"), &[tokens, own], &[], 1)[0]);
        }
        let last = self.last_tokens(stage)?;
        let (somewhere, zero) = self.somewhere(own, hint);
        let slot = self.patch.op("Max", &format!("{hint}_slot"), &[own, zero], &[]);
        let restored = self.vitrim(&TokenRestore, &format!("{hint}/of_slots"), &[tokens, slot], &[], 1)[0];
        let somewhere = self.with_axes("Unsqueeze", somewhere, &[2], &format!("{hint}/lives"));
        Some(self.patch.op("Where", &format!("{hint}/restored"), &[somewhere, restored, last], &[]))
    }

    /// All original tokens as they were when the last tokens up to `stage` were dropped.
    fn last_tokens(&mut self, stage: usize) -> Option<ValueId> {
        let dropping = (1..=stage).rev().find(|&at| self.stages.drops(at))?;
        if let Some(known) = self.stages.entry(dropping).all_before {
            return Some(known);
        }
        let Others::Dropped { tokens, .. } = self.stages.entry(dropping).grouping?.others else { return None };
        let all = self.all_tokens(tokens, dropping - 1, &format!("vitrim/all_before{dropping}"))?;
        self.stages.entry_mut(dropping).all_before = Some(all);
        Some(all)
    }

    /// The original token whose place each slot has, composed of the acts up to `stage`.
    pub(super) fn anchor(&mut self, stage: usize) -> Option<ValueId> {
        let places = self.places(stage)?;
        if let Some(known) = self.stages.entry(stage).anchor {
            return Some(known);
        }
        let composed = match self.anchor(stage - 1) {
            Some(before) => {
                let axis = [("axis", Attribute::Int(1))];
                self.patch.op("GatherElements", &format!("vitrim/anchor{stage}"), &[before, places], &axis)
            }
            None => places,
        };
        self.stages.entry_mut(stage).anchor = Some(composed);
        Some(composed)
    }

    /// What has a row for each token of stage `from`, `[B, N, ·]`, for the slots of a later stage: the rows of those whose
    /// places they have.
    pub(super) fn rows_at(&mut self, value: ValueId, from: usize, stage: usize, hint: &str) -> ValueId {
        (from + 1..=stage).fold(value, |value, stage| {
            let Some(places) = self.places(stage) else { return value };
            self.vitrim(&TokenRestore, &format!("{hint}/of_anchors"), &[value, places], &[], 1)[0]
        })
    }
}

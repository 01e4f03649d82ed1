//! Expansion on the output of the first block: `TokenExpand`, round after round, then `TokenAbsorb`.

use vitrim_ir::{Attribute, ValueId};
use vitrim_ops::{CosineSimilarity, ManhattanDistance, OpDef, TokenAbsorb, TokenExpand};

use super::grouping::{Grouping, Others};
use super::{Convention, Distance, Expand, Method, Rewriter, Stream};
use crate::Refusal;

impl Rewriter<'_> {
    /// The expansion that is asked for, if one is.
    pub(super) fn expansion(&self) -> Option<&Expand> {
        self.options.methods.iter().find_map(|method| match method {
            Method::Expand(expand) => Some(expand),
            Method::Merge(_) | Method::Prune(_) => None,
        })
    }

    /// Chooses `keep` patches, and lets the others join them.
    pub(super) fn expand(&mut self, stream: &mut Stream, keep: usize) -> Result<(), Refusal> {
        let Some(expand) = self.expansion().cloned() else { return Ok(()) };
        let (x, stage, hint) = (stream.value, stream.stage, stream.hint.clone());
        let (protect, suffix) = (self.vit.special.prefix() as i64, self.vit.special.suffix as i64);
        let tokens = self.stages.count(stage).and_then(|tokens| tokens.as_known());
        let tokens = tokens.ok_or_else(|| Refusal::Internal("tokens are counted without a count".into()))?;
        let candidates = tokens - protect - suffix;

        let op: &dyn OpDef = match expand.distance {
            Distance::Cosine | Distance::Euclidean => &CosineSimilarity,
            Distance::Manhattan => &ManhattanDistance,
        };
        let attributes = [("protect", protect), ("suffix", suffix), ("sign", expand.sign())];
        let closeness = self.vitrim(op, &format!("{hint}/closeness"), &[x], &attributes, 1)[0];
        let seeds = expand.schedule.seeds(candidates as usize);
        let mut order = self.seeds_first(x, &seeds, candidates as usize, &hint);
        let mut chosen = seeds.len();
        let rounds = expand.schedule.additions(candidates as usize, expand.stage);
        for (round, add) in rounds.concat().into_iter().filter(|&add| add > 0).enumerate() {
            let attributes = [("candidates", candidates), ("chosen", chosen as i64)];
            let name = format!("{hint}/expand{round}");
            order = self.vitrim(&TokenExpand, &name, &[closeness, order], &attributes, 1)[0];
            chosen += add;
        }
        let dtype = stream.dtype.code().into();
        let attributes =
            [("tokens", tokens), ("keep", keep as i64), ("protect", protect), ("suffix", suffix), ("dtype", dtype)];
        let results = self.vitrim(&TokenAbsorb, &format!("{hint}/absorb"), &[x, closeness, order], &attributes, 4);
        stream.value = results[0];
        stream.stage += 1;
        let after = self.stages.entry_mut(stream.stage);
        after.size = Some(results[1]);
        after.grouping = Some(Grouping { anchor: results[2], others: Others::Joined { assign: results[3] } });
        Ok(())
    }

    /// All candidates, the seeds first and then the others by position, for each image of `x`: `[B, P]`.
    fn seeds_first(&mut self, x: ValueId, seeds: &[usize], candidates: usize, hint: &str) -> ValueId {
        let others = (0..candidates).filter(|candidate| !seeds.contains(candidate));
        let positions: Vec<i64> = seeds.iter().copied().chain(others).map(|candidate| candidate as i64).collect();
        let row = self.ints(&format!("{hint}/seeds_first_row"), &positions);
        let along = [("axis", Attribute::Int(0))];
        let shape = self.patch.op("Shape", &format!("{hint}/shape"), &[x], &[]);
        let first = self.ints(&format!("{hint}/batch_axis"), &[0]);
        let batch = self.patch.op("Gather", &format!("{hint}/batch"), &[shape, first], &along);
        let count = self.ints(&format!("{hint}/candidates"), &[candidates as i64]);
        let target = self.patch.op("Concat", &format!("{hint}/seeds_first_shape"), &[batch, count], &along);
        self.patch.op("Expand", &format!("{hint}/seeds_first"), &[row, target], &[])
    }
}

impl Expand {
    /// What the operators' closeness is multiplied with, for the largest to be the nearest as the convention has it.
    fn sign(&self) -> i64 {
        match (self.distance, self.convention) {
            // A Euclidean distance is read off the cosine, which falls as it grows.
            (Distance::Cosine, _) | (Distance::Euclidean, Convention::Paper) => 1,
            (Distance::Euclidean, Convention::Code) => -1,
            (Distance::Manhattan, Convention::Paper) => -1,
            (Distance::Manhattan, Convention::Code) => 1,
        }
    }
}

//! How many tokens each block removes.

use std::fmt;
use std::str::FromStr;

use crate::Refusal;

/// A reduction schedule (arXiv 2210.09461, the merging-schedule study), before it meets a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// r tokens in every block.
    Constant(usize),
    /// A straight line from r(1 − f) to r(1 + f), truncated: f = −1 falls to zero, f = 1 rises from zero.
    Inflection(usize, f64),
    /// r per block; blocks beyond the list remove nothing.
    PerBlock(Vec<usize>),
    /// This share of the tokens that are not protected, per block, rounded down.
    Ratio(f64),
    /// Tokens left after each block, protected ones included; blocks beyond the list remove nothing.
    Keep(Vec<usize>),
}

impl FromStr for Schedule {
    type Err = String;

    /// `8`, `16:-1` (r:inflection) or `8,8,4,0` (per block).
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.trim()
                .parse::<u32>()
                .map(|number| number as usize)
                .map_err(|_| format!("'{text}' is no number of tokens (a whole number from 0 up)"))
        };
        if let Some((r, bend)) = text.split_once(':') {
            let bend: f64 =
                bend.trim().parse().map_err(|_| format!("'{bend}' is no inflection (a number from -1 to 1)"))?;
            if !(-1.0..=1.0).contains(&bend) {
                return Err(format!("the inflection {bend} lies outside -1 to 1"));
            }
            return Ok(Self::Inflection(number(r)?, bend));
        }
        if text.contains(',') {
            return text.split(',').map(number).collect::<Result<_, _>>().map(Self::PerBlock);
        }
        number(text).map(Self::Constant)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &[usize]| values.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        match self {
            Self::Constant(r) => write!(f, "{r}"),
            Self::Inflection(r, bend) => write!(f, "{r}:{bend}"),
            Self::PerBlock(rs) => f.write_str(&list(rs)),
            Self::Ratio(ratio) => write!(f, "ratio {ratio}"),
            Self::Keep(kept) => write!(f, "keep {}", list(kept)),
        }
    }
}

/// What one block does to the number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Step {
    /// Tokens that enter its attention.
    pub before: usize,
    /// Tokens removed after it.
    pub removed: usize,
    /// Whether the count that alignment asks for was out of reach.
    pub unaligned: bool,
}

impl Step {
    /// Tokens that leave the block.
    pub fn after(&self) -> usize {
        self.before - self.removed
    }
}

impl Schedule {
    /// Refuses lists that say something of more blocks than there are.
    pub fn check(&self, depth: usize) -> Result<(), Refusal> {
        let (what, named) = match self {
            Self::PerBlock(rs) => ("r", rs.len()),
            Self::Keep(kept) => ("keep_tokens", kept.len()),
            Self::Constant(_) | Self::Inflection(..) | Self::Ratio(_) => return Ok(()),
        };
        if named > depth {
            return Err(Refusal::Request(format!("{what} names {named} blocks, the model has {depth}")));
        }
        Ok(())
    }

    /// What the schedule asks of each of `depth` blocks, as a number of tokens; `None` for schedules that depend on
    /// the token count.
    pub fn requested(&self, depth: usize) -> Option<Vec<usize>> {
        match self {
            Self::Constant(r) => Some(vec![*r; depth]),
            Self::Inflection(r, bend) => {
                let r = *r as f64;
                let first = (r * (1.0 - bend)).trunc();
                // One block has no line to follow.
                let slope = if depth > 1 { (2.0 * r - 2.0 * first) / (depth as f64 - 1.0) } else { 0.0 };
                Some((0..depth).map(|block| (first + slope * block as f64).trunc().max(0.0) as usize).collect())
            }
            Self::PerBlock(rs) => Some(rs.iter().copied().chain(std::iter::repeat(0)).take(depth).collect()),
            Self::Ratio(_) | Self::Keep(_) => None,
        }
    }

    /// What `block` of `depth` does to `before` tokens of which `protected` take no part: at most half of the others can
    /// leave. With `align`, a block that removes tokens removes up to `align − 1` more, so that a multiple of it is left,
    /// where that is in reach.
    pub fn step(
        &self,
        block: usize,
        depth: usize,
        before: usize,
        protected: usize,
        align: usize,
    ) -> Result<Step, Refusal> {
        let free = before.saturating_sub(protected);
        let limit = free / 2;
        let asked = match (self, self.requested(depth)) {
            (Self::Ratio(ratio), _) if !(0.0..1.0).contains(ratio) => {
                return Err(Refusal::Request(format!("the ratio {ratio} lies outside 0 to 1")));
            }
            (Self::Ratio(ratio), _) => ((ratio * free as f64).floor() as usize).min(limit),
            (Self::Keep(kept), _) => match kept.get(block) {
                Some(&keep) if keep > before || before - keep > limit => {
                    return Err(Refusal::Request(format!(
                        "block {block} cannot keep {keep} of {before} tokens: at most half of the {free} that are not \
                         protected can merge; ask for {} to {before}",
                        before - limit
                    )));
                }
                Some(&keep) => before - keep,
                None => 0,
            },
            (_, requested) => requested.map_or(0, |requested| requested[block].min(limit)),
        };
        let surplus = if asked > 0 { (before - asked) % align } else { 0 };
        let unaligned = asked + surplus > limit;
        Ok(Step { before, removed: if unaligned { asked } else { asked + surplus }, unaligned })
    }
}

/// How many patches each block keeps (EViT, arXiv 2202.07800; Tri-Level E-ViT, arXiv 2211.10801).
#[derive(Clone, Debug, PartialEq)]
pub enum KeepSchedule {
    /// This share at these blocks.
    At(f64, Vec<usize>),
    /// A share per block; one keeps everything as it is, and so do blocks beyond the list.
    PerBlock(Vec<f64>),
}

impl KeepSchedule {
    /// The blocks of Tri-Level E-ViT and EViT, for models of twelve blocks.
    pub const BLOCKS: [usize; 3] = [3, 6, 9];

    /// Refuses what says something of more blocks than there are, and shares that are none.
    pub fn check(&self, depth: usize) -> Result<(), Refusal> {
        let (ratios, last) = match self {
            Self::At(ratio, blocks) => (std::slice::from_ref(ratio), blocks.iter().max().copied()),
            Self::PerBlock(ratios) => (ratios.as_slice(), ratios.len().checked_sub(1)),
        };
        if let Some(ratio) = ratios.iter().find(|&&ratio| !(ratio > 0.0 && ratio <= 1.0)) {
            return Err(Refusal::Request(format!("the share to keep, {ratio}, lies outside 0 to 1")));
        }
        match last.filter(|&last| last >= depth) {
            Some(last) => Err(Refusal::Request(format!(
                "tokens are to be pruned in block {last}, and the model has the blocks 0 to {}: say in which with at",
                depth.saturating_sub(1)
            ))),
            None => Ok(()),
        }
    }

    /// The share that `block` keeps; `None` where it does not prune.
    pub fn share(&self, block: usize) -> Option<f64> {
        match self {
            Self::At(share, blocks) => blocks.contains(&block).then_some(*share),
            Self::PerBlock(shares) => shares.get(block).copied().filter(|&share| share < 1.0),
        }
    }
}

/// ⌈count · ratio⌉ in double precision, without a guard against rounding: as the papers' models count.
pub fn keep_count(count: usize, ratio: f64) -> usize {
    (count as f64 * ratio).ceil() as usize
}

/// The share to keep in the course of a training: all at first, then along half a cosine down to what is wanted (EViT; both
/// levels of Tri-Level E-ViT).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CosineDecay {
    /// The share in the end.
    pub base: f64,
    /// The share where the decay begins.
    pub top: f64,
    /// Epochs that keep everything.
    pub warmup: usize,
    /// Epochs of the decay.
    pub decay: usize,
}

impl CosineDecay {
    /// Down to `base` after 10 and 100 epochs, as in the papers.
    pub fn to(base: f64) -> Self {
        Self { base, top: 1.0, warmup: 10, decay: 100 }
    }

    /// The share at an iteration, counted over the whole training, in `epoch`, from 0 on.
    pub fn share(&self, iteration: usize, epoch: usize, iterations_per_epoch: usize) -> f64 {
        let &Self { base, top, warmup, decay } = self;
        if epoch < warmup {
            return 1.0;
        }
        if epoch >= warmup + decay {
            return base;
        }
        let begins = iterations_per_epoch as f64 * warmup as f64;
        let done = (iteration as f64 - begins) / (iterations_per_epoch as f64 * decay as f64);
        base + (top - base) * ((done * std::f64::consts::PI).cos() + 1.0) * 0.5
    }
}

/// Token expansion in the course of a training (ToE, arXiv 2404.00672): each stage keeps more of the patches.
#[derive(Clone, Debug, PartialEq)]
pub struct Expansion {
    /// The first epoch of each stage.
    pub epochs: Vec<usize>,
    /// The share of the patches that each stage keeps.
    pub keep: Vec<f64>,
    /// The share that expansion begins with.
    pub seed_rate: f64,
    /// Rounds in which each stage adds patches.
    pub repeats: usize,
}

impl Default for Expansion {
    /// As in the paper.
    fn default() -> Self {
        Self { epochs: vec![0, 100, 200], keep: vec![0.5, 0.75, 1.0], seed_rate: 0.25, repeats: 2 }
    }
}

impl Expansion {
    /// Refuses shares that do not rise from more than 0 to 1 at most, and stages that do not follow each other.
    pub fn check(&self) -> Result<(), Refusal> {
        let refuse = |what: &str| Err(Refusal::Request(format!("the expansion is not possible: {what}")));
        let shares: Vec<f64> = std::iter::once(self.seed_rate).chain(self.keep.iter().copied()).collect();
        if self.keep.len() != self.epochs.len() || self.keep.is_empty() {
            return refuse("epochs and keep must name as many stages, one at least");
        }
        if !(shares[0] > 0.0 && shares.is_sorted() && shares[shares.len() - 1] <= 1.0) {
            return refuse("seed_rate must be above 0, and the shares of keep rise from it to 1 at most");
        }
        if !self.epochs.windows(2).all(|pair| pair[0] < pair[1]) {
            return refuse("each stage must begin after the one before");
        }
        match self.repeats {
            0 => refuse("repeats must be 1 or more"),
            _ => Ok(()),
        }
    }

    /// The stage that an epoch is in, from 1 on; 0 before the first.
    pub fn stage(&self, epoch: usize) -> usize {
        self.epochs.partition_point(|&first| first <= epoch)
    }

    /// Whether anything happens in a stage. Not where the last one keeps everything: then not even the order changes.
    pub fn is_active(&self, stage: usize) -> bool {
        stage > 0 && !(stage == self.epochs.len() && self.keep.last() == Some(&1.0))
    }

    /// The patches that expansion begins with: every ⌊1 / seed rate⌋-th, the quotient as Python's `//` rounds it (9 for
    /// 0.1), and no more than the share.
    pub fn seeds(&self, patches: usize) -> Vec<usize> {
        let step = ((1.0 - 1.0 % self.seed_rate) / self.seed_rate).round() as usize;
        let count = (patches as f64 * self.seed_rate) as usize;
        (0..patches).step_by(step.max(1)).take(count).collect()
    }

    /// How many patches each round of each stage up to `stage` adds. Every stage is rounded down by itself; the last of all
    /// makes up for that. Its last round takes what is left over of a stage.
    pub fn additions(&self, patches: usize, stage: usize) -> Vec<Vec<usize>> {
        let share = |share: f64| (patches as f64 * share) as usize;
        let before = std::iter::once(&self.seed_rate).chain(&self.keep);
        let increments: Vec<f64> = self.keep.iter().zip(before).map(|(after, before)| after - before).collect();
        let of_stage = |stage: usize| {
            let total = if stage == self.keep.len() {
                let so_far = self.seed_rate + increments[..stage - 1].iter().sum::<f64>();
                share(self.keep[stage - 1]).saturating_sub(share(so_far))
            } else {
                share(increments[stage - 1])
            };
            let each = total / self.repeats;
            let mut rounds = vec![each; self.repeats];
            rounds[self.repeats - 1] = total - (self.repeats - 1) * each;
            rounds
        };
        (1..=stage.min(self.keep.len())).map(of_stage).collect()
    }

    /// How many of the patches a stage keeps.
    pub fn kept(&self, patches: usize, stage: usize) -> usize {
        match self.is_active(stage) {
            true => self.seeds(patches).len() + self.additions(patches, stage).into_iter().flatten().sum::<usize>(),
            false => patches,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One block after the other.
    fn follow(
        schedule: &Schedule,
        depth: usize,
        mut tokens: usize,
        protected: usize,
        align: usize,
    ) -> Result<Vec<Step>, Refusal> {
        let mut step = |block: usize| {
            let step = schedule.step(block, depth, tokens, protected, align)?;
            tokens = step.after();
            Ok(step)
        };
        (0..depth).map(&mut step).collect()
    }

    fn removed(schedule: &str, depth: usize, tokens: usize, protected: usize, align: usize) -> Vec<usize> {
        let steps = follow(&schedule.parse().unwrap(), depth, tokens, protected, align).unwrap();
        steps.iter().map(|step| step.removed).collect()
    }

    #[test]
    fn at_most_half_of_the_free_tokens_leave() {
        assert_eq!(removed("98", 1, 197, 1, 1), [98]);
        assert_eq!(removed("500", 2, 197, 1, 1), [98, 49]);
        assert_eq!(removed("40", 1, 67, 2, 1), [32]);
        assert_eq!(removed("5", 1, 2, 1, 1), [0]);
    }

    #[test]
    fn alignment_removes_more_but_never_more_than_half() {
        assert_eq!(removed("13", 3, 197, 1, 8), [13, 16, 16]);
        assert_eq!(removed("0,13", 2, 197, 1, 8), [0, 13]);
        let steps = follow(&Schedule::Constant(4), 1, 13, 1, 8).unwrap();
        assert_eq!((steps[0].removed, steps[0].unaligned), (5, false));
        let steps = follow(&Schedule::Constant(4), 1, 11, 1, 16).unwrap();
        assert_eq!((steps[0].removed, steps[0].unaligned), (4, true));
    }

    #[test]
    fn kept_counts_must_be_in_reach() {
        let keep = Schedule::Keep(vec![180, 160]);
        let steps = follow(&keep, 3, 197, 1, 1).unwrap();
        assert_eq!(steps.iter().map(Step::after).collect::<Vec<_>>(), [180, 160, 160]);
        let error = follow(&Schedule::Keep(vec![50]), 1, 197, 1, 1).unwrap_err().to_string();
        assert!(error.contains("block 0 cannot keep 50 of 197"), "{error}");
    }

    #[test]
    fn lists_name_no_more_blocks_than_there_are() {
        assert!("8,8,4".parse::<Schedule>().unwrap().check(3).is_ok());
        let error = "8,8,4,0".parse::<Schedule>().unwrap().check(3).unwrap_err().to_string();
        assert_eq!(error, "r names 4 blocks, the model has 3");
        let error = Schedule::Keep(vec![9, 8]).check(1).unwrap_err().to_string();
        assert_eq!(error, "keep_tokens names 2 blocks, the model has 1");
        assert!(Schedule::Constant(8).check(0).is_ok());
    }

    #[test]
    fn malformed_schedules_are_refused() {
        for text in ["", "-3", "8:x", "8:2", "1,2,x", "1.5"] {
            assert!(text.parse::<Schedule>().is_err(), "{text}");
        }
    }
}

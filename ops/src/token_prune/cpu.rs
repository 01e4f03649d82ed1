//! Pruning on the CPU: a partial selection for each image, then one pass over its tokens.

use super::Problem;
use crate::cpu::{Element, Error, Isa, Pool, Rank, check_len, each, fill, mean};

#[cfg(test)]
mod tests;

/// What [`token_prune`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Tokens, `[B, N, C]`.
    pub x: &'a [T],
    /// What decides, and weighs what is fused, `[B, N]`.
    pub score: &'a [f32],
    /// Original tokens in each token, `[B, N]`.
    pub size: &'a [f32],
}

/// What [`token_prune`] writes, all of it; M is [`Problem::slots`].
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// The token of each slot, `[B, M, C]`.
    pub y: &'a mut [T],
    /// The size of each slot, `[B, M]`.
    pub size: &'a mut [f32],
    /// The token that each slot keeps the place of, `[B, M]`.
    pub anchor: &'a mut [i64],
    /// The slot of each token, `[B, N]`.
    pub assign: &'a mut [i64],
}

/// Where no token is, or no slot.
const NONE: i64 = -1;
/// Bytes of slots, about, that one task writes.
const GATHERED: usize = 64 << 10;
/// Positions are kept in 32 bits.
const MOST_TOKENS: usize = 1 << 31;

/// Keeps the tokens of the highest scores of each image, as [`TokenPrune`](super) means it.
///
/// Tokens that are kept are copies to the bit. Results do not depend on the number of threads.
///
/// # Errors
/// Where the slices are not of their shapes, or more tokens are to be protected and kept than there are, or there are 2³¹.
pub fn token_prune<T: Element>(
    problem: &Problem,
    inputs: Inputs<T>,
    outputs: Outputs<T>,
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, tokens, channels, keep, protect, suffix, .. } = problem;
    let slots = problem.slots().filter(|_| tokens < MOST_TOKENS).ok_or_else(|| {
        Error::new(format!("{keep} of {tokens} tokens cannot be kept beside {protect} and {suffix} protected ones"))
    })?;
    check_len("x", inputs.x.len(), &[batch, tokens, channels])?;
    check_len("score", inputs.score.len(), &[batch, tokens])?;
    check_len("size", inputs.size.len(), &[batch, tokens])?;
    check_len("y", outputs.y.len(), &[batch, slots, channels])?;
    check_len("size of slots", outputs.size.len(), &[batch, slots])?;
    check_len("anchor", outputs.anchor.len(), &[batch, slots])?;
    check_len("assign", outputs.assign.len(), &[batch, tokens])?;
    if batch == 0 || tokens == 0 {
        return Ok(());
    }

    let Outputs { y, size, anchor, assign } = outputs;
    let mut fused: Vec<Vec<u32>> = vec![Vec::new(); batch];
    // What is empty for all images has no parts.
    let (mut sizes, mut anchors) = (size.chunks_exact_mut(slots.max(1)), anchor.chunks_exact_mut(slots.max(1)));
    let images = inputs.score.chunks_exact(tokens).zip(inputs.size.chunks_exact(tokens));
    let images = images.zip(assign.chunks_exact_mut(tokens)).zip(&mut fused);
    let images = images.map(|(((score, size), assign), fused)| Image {
        score,
        size,
        size_out: sizes.next().unwrap_or_default(),
        anchor: anchors.next().unwrap_or_default(),
        assign,
        fused,
    });
    each(pool, images, |image| image.select(problem));

    if y.is_empty() {
        return Ok(());
    }
    let block = (GATHERED / (channels * size_of::<T>())).clamp(1, slots);
    let (isa, anchor, fused) = (Isa::best(), &*anchor, &fused);
    let blocks = y.chunks_exact_mut(slots * channels).enumerate().flat_map(|(image, y)| {
        y.chunks_mut(block * channels).enumerate().map(move |(part, y)| (image, part * block, y))
    });
    each(pool, blocks, |(image, first, y)| {
        let x = &inputs.x[image * tokens * channels..][..tokens * channels];
        let score = &inputs.score[image * tokens..][..tokens];
        for (slot, y) in (first..).zip(y.chunks_exact_mut(channels)) {
            match anchor[image * slots + slot] {
                NONE => {
                    let members = fused[image].iter().map(|&token| (token as usize, score[token as usize]));
                    // Over one: the weights are not normalised.
                    mean(isa, x, members, 1.0, y);
                }
                token => y.copy_from_slice(&x[token as usize * channels..][..channels]),
            }
        }
    });
    Ok(())
}

/// What selection reads and writes of one image.
struct Image<'a> {
    score: &'a [f32],
    size: &'a [f32],
    size_out: &'a mut [f32],
    anchor: &'a mut [i64],
    assign: &'a mut [i64],
    /// The tokens that are fused, in order of position.
    fused: &'a mut Vec<u32>,
}

impl Image<'_> {
    /// Decides who stays, and where everyone goes.
    fn select(self, problem: &Problem) {
        let &Problem { tokens, keep, protect, suffix, .. } = problem;
        let (end, kept_end) = (tokens - suffix, protect + keep);
        let mut ranks: Vec<Rank> = (protect..end).map(|token| Rank::new(self.score[token], token)).collect();
        if 0 < keep && keep < ranks.len() {
            ranks.select_nth_unstable(keep - 1);
        }
        let kept = &mut ranks[..keep];
        kept.sort_unstable();

        let (front, back) = self.anchor.split_at_mut(kept_end);
        fill(front, (0..protect).chain(kept.iter().map(|rank| rank.position())));
        let (extra, back) = back.split_at_mut(usize::from(problem.fuses()));
        extra.fill(NONE);
        fill(back, end..tokens);

        self.assign.fill(if problem.fuses() { kept_end as i64 } else { NONE });
        for (slot, (&token, size)) in self.anchor.iter().zip(self.size_out).enumerate() {
            *size = 1.0;
            if token != NONE {
                self.assign[token as usize] = slot as i64;
                *size = self.size[token as usize];
            }
        }
        if problem.fuses() {
            self.fused.extend(
                (protect..end).filter(|&token| self.assign[token] == kept_end as i64).map(|token| token as u32),
            );
        }
    }
}

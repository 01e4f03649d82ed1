//! Absorbing on the CPU: one pass over the rows of the chosen tokens finds who joins whom; then means over slots.

use crate::cpu::{Element, Error, Isa, Kernel, Pool, Simd, check_len, each, fill, position};
use crate::token_mean::cpu::{self as mean, token_mean};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Channels of each token, C.
    pub channels: usize,
    /// Tokens that are chosen, k.
    pub keep: usize,
    /// Tokens at the front that take no part.
    pub protect: usize,
    /// Tokens at the end that take no part.
    pub suffix: usize,
}

/// What [`token_absorb`] reads; P = N − `protect` − `suffix`.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Tokens, `[B, N, C]`.
    pub x: &'a [T],
    /// Of the tokens that take part to each other, `[B, P, P]`.
    pub closeness: &'a [f32],
    /// Those of them first that are chosen, `[B, P]`.
    pub order: &'a [i64],
}

/// What [`token_absorb`] writes, all of it; M is [`Problem::slots`].
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// The mean of each slot, `[B, M, C]`.
    pub y: &'a mut [T],
    /// Tokens in each slot, `[B, M]`.
    pub size: &'a mut [f32],
    /// The token that each slot keeps the place of, `[B, M]`.
    pub anchor: &'a mut [i64],
    /// The slot of each token, `[B, N]`.
    pub assign: &'a mut [i64],
}

impl Problem {
    /// Tokens that take part, P; none where more are protected than there are.
    pub fn candidates(&self) -> Option<usize> {
        self.tokens.checked_sub(self.protect)?.checked_sub(self.suffix)
    }

    /// Slots of each image, M; none where so many cannot be chosen.
    pub fn slots(&self) -> Option<usize> {
        let gone = self.candidates()?.checked_sub(self.keep)?;
        if self.keep == 0 { None } else { Some(self.tokens - gone) }
    }
}

/// Lets every token join the closest of the chosen ones, as [`TokenAbsorb`](super) means it.
///
/// Slots that no token joins are copies of their token.
///
/// # Errors
/// Where the slices are not of their shapes, no token is to be chosen or more than there are, or a token is not there.
pub fn token_absorb<T: Element>(
    problem: &Problem,
    inputs: Inputs<T>,
    outputs: Outputs<T>,
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, tokens, channels, keep, protect, suffix } = problem;
    let (Some(candidates), Some(slots)) = (problem.candidates(), problem.slots()) else {
        let why = format!("{keep} of {tokens} tokens cannot be chosen beside {protect} and {suffix} protected ones");
        return Err(Error::new(why));
    };
    let Outputs { y, size, anchor, assign } = outputs;
    check_len("x", inputs.x.len(), &[batch, tokens, channels])?;
    check_len("closeness", inputs.closeness.len(), &[batch, candidates, candidates])?;
    check_len("order", inputs.order.len(), &[batch, candidates])?;
    check_len("y", y.len(), &[batch, slots, channels])?;
    check_len("size of slots", size.len(), &[batch, slots])?;
    check_len("anchor", anchor.len(), &[batch, slots])?;
    check_len("assign", assign.len(), &[batch, tokens])?;
    for &token in inputs.order {
        position("order", token, candidates)?;
    }
    if batch == 0 {
        return Ok(());
    }

    let isa = Isa::best();
    let images = inputs.closeness.chunks_exact(candidates * candidates).zip(inputs.order.chunks_exact(candidates));
    let slots_of_images = size.chunks_exact_mut(slots).zip(anchor.chunks_exact_mut(slots));
    let images = images.zip(slots_of_images).zip(assign.chunks_exact_mut(tokens));
    each(pool, images, |(((closeness, order), (size, anchor)), assign)| {
        let chosen = &order[..keep];
        let closest = isa.run(Closest { closeness, chosen, candidates });
        let end = protect + candidates;
        fill(
            assign,
            (0..protect).chain(closest.iter().map(|&slot| protect + slot as usize)).chain(protect + keep..slots),
        );
        let chosen = chosen.iter().map(|&token| protect + token as usize);
        fill(anchor, (0..protect).chain(chosen).chain(end..tokens));
        size.fill(0.0);
        assign.iter().for_each(|&slot| size[slot as usize] += 1.0);
    });
    let problem = mean::Problem { batch, tokens, slots, channels, shared: false };
    token_mean(&problem, inputs.x, assign, size, y, pool)
}

/// Which of the chosen tokens each token is closest to; a chosen one to itself, and to the first among equals.
struct Closest<'a> {
    closeness: &'a [f32],
    chosen: &'a [i64],
    candidates: usize,
}

impl Kernel for Closest<'_> {
    type Out = Vec<u32>;

    /// Without vectors of its own: the compiler makes them of a loop as simple as this.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<u32> {
        let Self { closeness, chosen, candidates } = self;
        let (mut most, mut closest) = (vec![f32::NEG_INFINITY; candidates], vec![0; candidates]);
        for (slot, &token) in (0..).zip(chosen) {
            let row = &closeness[token as usize * candidates..][..candidates];
            for ((most, closest), &own) in most.iter_mut().zip(&mut closest).zip(row) {
                let closer = own > *most;
                *most = if closer { own } else { *most };
                *closest = if closer { slot } else { *closest };
            }
            if most[token as usize] < f32::INFINITY {
                (most[token as usize], closest[token as usize]) = (f32::INFINITY, slot);
            }
        }
        closest
    }
}

//! A round of expansion on the CPU: one pass over the rows of the chosen tokens, then a sort of the others.

use crate::cpu::{Error, Isa, Kernel, Pool, Rank, Simd, check_len, each, position};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each that take part, P.
    pub candidates: usize,
    /// Those of them that are chosen already.
    pub chosen: usize,
}

/// Positions are kept in 32 bits.
const MOST_TOKENS: usize = 1 << 31;

/// Writes the tokens of `order`, `[B, P]`, in the order in which [`TokenExpand`](super) means them to be chosen to
/// `order_out`, `[B, P]`, given their `closeness` to each other, `[B, P, P]`.
///
/// # Errors
/// Where the slices are not of these shapes, no token is chosen or all are, a token is not there, or there are 2³¹.
pub fn token_expand(
    problem: &Problem,
    closeness: &[f32],
    order: &[i64],
    order_out: &mut [i64],
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, candidates, chosen } = problem;
    if chosen == 0 || chosen >= candidates || candidates >= MOST_TOKENS {
        return Err(Error::new(format!("{chosen} of {candidates} tokens are said to be chosen")));
    }
    check_len("closeness", closeness.len(), &[batch, candidates, candidates])?;
    check_len("order", order.len(), &[batch, candidates])?;
    check_len("order_out", order_out.len(), &[batch, candidates])?;
    for &token in order {
        position("order", token, candidates)?;
    }
    if batch == 0 {
        return Ok(());
    }
    let isa = Isa::best();
    let images = closeness.chunks_exact(candidates * candidates).zip(order.chunks_exact(candidates));
    each(pool, images.zip(order_out.chunks_exact_mut(candidates)), |((closeness, order), order_out)| {
        let (chosen, rest) = order.split_at(chosen);
        let closest = isa.run(Closest { closeness, chosen, candidates });
        // The least close is to be first: ranks fall as what they are of rises.
        let rank = |(place, &token): (usize, &i64)| Rank::new(-closest[token as usize], place);
        let mut ranks: Vec<Rank> = rest.iter().enumerate().map(rank).collect();
        ranks.sort_unstable();
        let (to_chosen, to_rest) = order_out.split_at_mut(chosen.len());
        to_chosen.copy_from_slice(chosen);
        to_rest.iter_mut().zip(ranks).for_each(|(to, rank)| *to = rest[rank.position()]);
    });
    Ok(())
}

/// How close each token is to the closest of the chosen ones.
struct Closest<'a> {
    closeness: &'a [f32],
    chosen: &'a [i64],
    candidates: usize,
}

impl Kernel for Closest<'_> {
    type Out = Vec<f32>;

    /// Without vectors of its own: the compiler makes them of a loop as simple as this.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<f32> {
        let mut closest = vec![f32::NEG_INFINITY; self.candidates];
        for &token in self.chosen {
            let row = &self.closeness[token as usize * self.candidates..][..self.candidates];
            closest.iter_mut().zip(row).for_each(|(most, &own)| *most = if own > *most { own } else { *most });
        }
        closest
    }
}

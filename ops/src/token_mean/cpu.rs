//! Means over slots on the CPU.

use crate::cpu::{Element, Error, Isa, Pool, check_len, each, mean, position};

/// Extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Slots of each, M.
    pub slots: usize,
    /// Channels of each entry, C.
    pub channels: usize,
    /// Whether all images have one table.
    pub shared: bool,
}

/// Writes the mean of the entries of each slot to `y`, `[B, M, C]`: of `table`, `[B, N, C]`, or `[N, C]` where it is
/// shared, those of the tokens that `assign`, `[B, N]`, has in the slot, over its `size`, `[B, M]`.
///
/// # Errors
/// Where the slices are not of these shapes, or a token is in no slot that there is.
pub fn token_mean<T: Element>(
    problem: &Problem,
    table: &[T],
    assign: &[i64],
    size: &[f32],
    y: &mut [T],
    pool: &dyn Pool,
) -> Result<(), Error> {
    // Bytes, about, that one task writes.
    const PART: usize = 64 << 10;
    let &Problem { batch, tokens, slots, channels, shared } = problem;
    check_len("table", table.len(), &[if shared { 1 } else { batch }, tokens, channels])?;
    check_len("assign", assign.len(), &[batch, tokens])?;
    check_len("size", size.len(), &[batch, slots])?;
    check_len("y", y.len(), &[batch, slots, channels])?;
    // Slots, each with a token that is in it, in this order.
    let mut members = Vec::with_capacity(assign.len());
    for (i, &slot) in assign.iter().enumerate() {
        members.push((i / tokens * slots + position("assign", slot, slots)?, i));
    }
    if y.is_empty() {
        return Ok(());
    }
    members.sort_unstable();
    let isa = Isa::best();
    let rows = (PART / (channels * size_of::<T>())).max(1);
    each(pool, y.chunks_mut(rows * channels).enumerate(), |(part, y)| {
        let mut members = &members[members.partition_point(|&(slot, _)| slot < part * rows)..];
        for (slot, y) in (part * rows..).zip(y.chunks_exact_mut(channels)) {
            let (own, others) = members.split_at(members.iter().take_while(|member| member.0 == slot).count());
            members = others;
            let entries = own.iter().map(|&(_, token)| (if shared { token % tokens } else { token }, 1.0));
            mean(isa, table, entries, size[slot], y);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::cpu::testing::{Noise, Threads, exact, rounding};

    fn check<T: Element>(problem: Problem) {
        let Problem { batch, tokens, slots, channels, shared } = problem;
        let mut noise = Noise(channels as u64);
        let table: Vec<T> = noise.elements(if shared { 1 } else { batch } * tokens * channels);
        let assign: Vec<i64> = (0..batch * tokens).map(|_| noise.below(slots) as i64).collect();
        let size: Vec<f32> = (0..batch * slots)
            .map(|slot| {
                let own = &assign[slot / slots * tokens..][..tokens];
                own.iter().filter(|&&own| own as usize == slot % slots).count().max(1) as f32
            })
            .collect();
        let mut y = vec![T::from_f32(f32::NAN); batch * slots * channels];
        token_mean(&problem, &table, &assign, &size, &mut y, &Threads(2)).unwrap();
        for (i, y) in y.into_iter().enumerate() {
            let (image, slot, channel) = (i / channels / slots, i / channels % slots, i % channels);
            let first = if shared { 0 } else { image * tokens };
            let members = (0..tokens).filter(|token| assign[image * tokens + token] as usize == slot);
            let sum: f64 = members.map(|token| exact(table[(first + token) * channels + channel])).sum();
            assert!((exact(y) - sum / f64::from(size[image * slots + slot])).abs() <= rounding::<T>(1e-6));
        }
    }

    #[test]
    fn entries_are_averaged_over_their_slot() {
        for (batch, tokens, slots, channels) in
            [(1, 1, 1, 1), (2, 9, 5, 7), (3, 60, 21, 1500), (2, 0, 2, 3), (0, 1, 1, 1)]
        {
            for shared in [false, true] {
                let problem = Problem { batch, tokens, slots, channels, shared };
                check::<f32>(problem);
                check::<f16>(problem);
                check::<bf16>(problem);
            }
        }
    }

    #[test]
    fn slots_that_are_not_there_are_refused() {
        let problem = Problem { batch: 1, slots: 2, tokens: 3, channels: 1, shared: true };
        for (assign, sound) in [([0, 1, 1], true), ([0, 1, 2], false), ([0, -1, 1], false)] {
            let result = token_mean(&problem, &[1.0f32; 3], &assign, &[1.0, 2.0], &mut [0.0; 2], &Threads(1));
            assert_eq!(result.is_ok(), sound);
        }
        assert!(token_mean(&problem, &[1.0f32; 2], &[0; 3], &[1.0; 2], &mut [0.0; 2], &Threads(1)).is_err());
        assert!(token_mean(&problem, &[1.0f32; 3], &[0; 3], &[1.0; 1], &mut [0.0; 2], &Threads(1)).is_err());
        assert!(token_mean(&problem, &[1.0f32; 3], &[0; 3], &[1.0; 2], &mut [0.0; 1], &Threads(1)).is_err());
    }
}

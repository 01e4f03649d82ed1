//! Slots back to tokens on the CPU.

use super::Problem;
use crate::cpu::{Error, Pool, check_len, each, position};

/// Copies every slot of `y`, `[B, M, row_bytes]`, to the tokens that `assign`, `[B, N]`, has in it: `x` is
/// `[B, N, row_bytes]`.
///
/// # Errors
/// Where the slices are not of these shapes, or a token is in no slot that there is.
pub fn token_restore(problem: &Problem, y: &[u8], assign: &[i64], x: &mut [u8], pool: &dyn Pool) -> Result<(), Error> {
    // Bytes, about, that one task writes.
    const PART: usize = 64 << 10;
    let &Problem { batch, slots, tokens, row_bytes } = problem;
    check_len("y", y.len(), &[batch, slots, row_bytes])?;
    check_len("assign", assign.len(), &[batch, tokens])?;
    check_len("x", x.len(), &[batch, tokens, row_bytes])?;
    for &slot in assign {
        position("assign", slot, slots)?;
    }
    if x.is_empty() {
        return Ok(());
    }
    let rows = (PART / row_bytes).max(1);
    let parts = x.chunks_mut(rows * row_bytes).zip(assign.chunks(rows)).enumerate();
    each(pool, parts, |(part, (x, assign))| {
        for ((token, x), &slot) in (part * rows..).zip(x.chunks_exact_mut(row_bytes)).zip(assign) {
            x.copy_from_slice(&y[(token / tokens * slots + slot as usize) * row_bytes..][..row_bytes]);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Noise, Threads};

    #[test]
    fn every_token_is_a_copy_of_its_slot() {
        let mut noise = Noise(1);
        for (batch, slots, tokens, row_bytes) in
            [(1, 1, 1, 1), (3, 5, 9, 12), (2, 70, 190, 3072), (2, 3, 0, 4), (0, 1, 1, 1)]
        {
            let problem = Problem { batch, slots, tokens, row_bytes };
            let y: Vec<u8> = (0..batch * slots * row_bytes).map(|_| noise.below(256) as u8).collect();
            let assign: Vec<i64> = (0..batch * tokens).map(|_| noise.below(slots) as i64).collect();
            let mut x = vec![0; batch * tokens * row_bytes];
            token_restore(&problem, &y, &assign, &mut x, &Threads(2)).unwrap();
            for (i, x) in x.into_iter().enumerate() {
                let (token, byte) = (i / row_bytes, i % row_bytes);
                let slot = token / tokens * slots + assign[token] as usize;
                assert_eq!(x, y[slot * row_bytes + byte]);
            }
        }
    }

    #[test]
    fn slots_that_are_not_there_are_refused() {
        let problem = Problem { batch: 1, slots: 2, tokens: 3, row_bytes: 1 };
        for (assign, sound) in [([0, 1, 1], true), ([0, 1, 2], false), ([0, -1, 1], false)] {
            assert_eq!(token_restore(&problem, &[1, 2], &assign, &mut [0; 3], &Threads(1)).is_ok(), sound);
        }
        assert!(token_restore(&problem, &[1, 2], &[0; 2], &mut [0; 3], &Threads(1)).is_err());
        assert!(token_restore(&problem, &[1, 2], &[0; 3], &mut [0; 4], &Threads(1)).is_err());
        assert!(token_restore(&problem, &[1], &[0; 3], &mut [0; 3], &Threads(1)).is_err());
    }
}

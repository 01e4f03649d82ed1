//! Slots of tokens on the CPU.

use super::Problem;
use crate::cpu::{Error, check_len, position};

/// Writes the slot of every token to `assign`, `[B, M + r]`, from `anchor`, `[B, M]`, and `leaving` and `into`, `[B, r]`.
///
/// # Errors
/// Where the slices are not of these shapes, or tokens and slots are not what a merge gives: a position that is out of
/// range, a token that is there twice. `assign` is of no use then.
pub fn token_assign(
    problem: &Problem,
    anchor: &[i64],
    leaving: &[i64],
    into: &[i64],
    assign: &mut [i64],
) -> Result<(), Error> {
    let &Problem { batch, slots, r } = problem;
    let tokens = slots.checked_add(r).ok_or_else(|| Error::new("too many tokens"))?;
    check_len("anchor", anchor.len(), &[batch, slots])?;
    check_len("leaving", leaving.len(), &[batch, r])?;
    check_len("into", into.len(), &[batch, r])?;
    check_len("assign", assign.len(), &[batch, tokens])?;
    if assign.is_empty() {
        return Ok(());
    }
    for (image, assign) in assign.chunks_exact_mut(tokens).enumerate() {
        const NONE: i64 = -1;
        assign.fill(NONE);
        let mut put = |name: &str, token: i64, slot: usize| {
            let place = &mut assign[position(name, token, tokens)?];
            if *place != NONE {
                return Err(Error::new(format!("{name} has token {token} once more")));
            }
            *place = slot as i64;
            Ok(())
        };
        for (slot, &token) in anchor[image * slots..][..slots].iter().enumerate() {
            put("anchor", token, slot)?;
        }
        for (&token, &slot) in leaving[image * r..][..r].iter().zip(&into[image * r..][..r]) {
            put("leaving", token, position("into", slot, slots)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBLEM: Problem = Problem { batch: 2, slots: 3, r: 2 };

    fn assign(anchor: [i64; 6], leaving: [i64; 4], into: [i64; 4]) -> Result<[i64; 10], Error> {
        let mut assign = [7; 10];
        token_assign(&PROBLEM, &anchor, &leaving, &into, &mut assign).map(|()| assign)
    }

    #[test]
    fn tokens_are_where_a_merge_put_them() {
        let assigned = assign([0, 1, 3, 4, 0, 2], [4, 2, 1, 3], [2, 2, 0, 1]);
        assert_eq!(assigned, Ok([0, 1, 2, 2, 2, 1, 0, 2, 1, 0]));
    }

    #[test]
    fn what_is_no_merge_is_refused() {
        assert!(assign([0, 1, 5, 4, 0, 2], [4, 2, 1, 3], [2, 2, 0, 1]).is_err());
        assert!(assign([0, 1, 3, 4, 0, 2], [4, -1, 1, 3], [2, 2, 0, 1]).is_err());
        assert!(assign([0, 1, 3, 4, 0, 2], [4, 2, 1, 3], [2, 2, 0, 3]).is_err());
        assert!(assign([0, 1, 3, 4, 0, 2], [4, 3, 1, 3], [2, 2, 0, 1]).is_err());
        assert!(token_assign(&PROBLEM, &[0; 6], &[0; 4], &[0; 3], &mut [0; 10]).is_err());
        assert!(token_assign(&Problem { slots: usize::MAX, ..PROBLEM }, &[], &[], &[], &mut []).is_err());
        token_assign(&Problem { batch: 0, ..PROBLEM }, &[], &[], &[], &mut []).unwrap();
    }
}

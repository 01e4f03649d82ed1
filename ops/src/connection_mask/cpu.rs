//! Masks of connections on the CPU.

use super::Problem;
use crate::cpu::{Element, Error, Isa, Pool, check_len, check_scratch, each, mean, position};

impl Problem {
    /// How many float32 of scratch memory `workers` workers need.
    pub fn scratch_len(&self, workers: usize) -> usize {
        self.worker_len().saturating_mul(workers)
    }

    /// A row of means, and one that is put in order.
    fn worker_len(&self) -> usize {
        self.tokens.saturating_add(self.free().map_or(0, |free| free.len()))
    }
}

/// Writes 1 for every connection that stays and 0 for the others to `mask`, `[B, M, M]`, as
/// [`ConnectionMask`](super) means it, of `weights`, `[B, H, N, N]`, and `anchor`, `[B, M]`.
///
/// `scratch` is of [`Problem::scratch_len`] of as many `workers` as should share the work: at least the threads of the
/// pool, a few times as many where they may be busy with other things. It holds nothing between calls.
///
/// Equal weights have equal means, to the bit, wherever they are.
///
/// # Errors
/// Where the slices are not of these shapes, there are no heads, more slots are protected than there are, an anchor
/// that is read is no token, or scratch memory or workers are too few.
pub fn connection_mask<T: Element>(
    problem: &Problem,
    weights: &[T],
    anchor: &[i64],
    mask: &mut [f32],
    workers: usize,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, heads, tokens, slots, connections, protect, suffix } = problem;
    let free = problem
        .free()
        .ok_or_else(|| Error::new(format!("{protect} and {suffix} of {slots} slots are to keep all connections")))?;
    check_len("weights", weights.len(), &[batch, heads, tokens, tokens])?;
    check_len("anchor", anchor.len(), &[batch, slots])?;
    check_len("mask", mask.len(), &[batch, slots, slots])?;
    if mask.is_empty() {
        return Ok(());
    }
    if heads == 0 {
        return Err(Error::new("attention weights of no heads"));
    }
    if workers == 0 {
        return Err(Error::new("no workers"));
    }
    for &token in anchor.chunks_exact(slots).flat_map(|anchor| &anchor[free.clone()]) {
        position("anchor", token, tokens)?;
    }
    // Slots that keep everything have ones all round.
    mask.fill(1.0);
    if connections >= free.len() {
        return Ok(());
    }
    check_scratch(scratch.len(), problem.scratch_len(workers))?;
    let (rows, isa) = ((batch * slots).div_ceil(workers), Isa::best());
    let parts = mask.chunks_mut(rows * slots).zip(scratch.chunks_exact_mut(problem.worker_len())).enumerate();
    each(pool, parts, |(part, (mask, scratch))| {
        let (means, order) = scratch.split_at_mut(tokens);
        for (row, mask) in (part * rows..).zip(mask.chunks_exact_mut(slots)) {
            let (image, slot) = (row / slots, row % slots);
            if !free.contains(&slot) {
                continue;
            }
            let anchor = &anchor[image * slots..][..slots];
            let of_heads = (0..heads).map(|head| ((image * heads + head) * tokens + anchor[slot] as usize, 1.0));
            mean(isa, weights, of_heads, heads as f32, means);
            let strengths = anchor[free.clone()].iter().map(|&column| {
                let mean = means[column as usize];
                if mean.is_nan() { f32::INFINITY } else { mean }
            });
            order.iter_mut().zip(strengths.clone()).for_each(|(to, strength)| *to = strength);
            let (_, &mut weakest, _) = order.select_nth_unstable_by(connections.max(1) - 1, |a, b| b.total_cmp(a));
            for (stays, strength) in mask[free.clone()].iter_mut().zip(strengths) {
                *stays = f32::from(strength >= weakest);
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::cpu::Serial;
    use crate::cpu::testing::{Noise, Threads, exact};

    /// Weights of a few values, so that many are equal. Means of one, two, four or eight of them are exact in any order
    /// of summation.
    struct Case<T> {
        problem: Problem,
        weights: Vec<T>,
        anchor: Vec<i64>,
    }

    impl<T: Element> Case<T> {
        fn new(problem: Problem) -> Self {
            let Problem { batch, heads, tokens, slots, protect, suffix, .. } = problem;
            let mut noise = Noise((tokens * 7 + slots) as u64);
            let weights = (0..batch * heads * tokens * tokens).map(|_| T::from_f32(noise.below(16) as f32 / 16.0));
            let weights = weights.collect();
            let anchor = (0..batch * slots).map(|row| match row % slots {
                slot if slot < protect || slot >= slots - suffix => -1,
                _ => noise.below(tokens) as i64,
            });
            Self { problem, weights, anchor: anchor.collect() }
        }

        fn run(&self, workers: usize, pool: &dyn Pool) -> Vec<f32> {
            let Problem { batch, slots, .. } = self.problem;
            let mut mask = vec![f32::NAN; batch * slots * slots];
            let mut scratch = vec![f32::NAN; self.problem.scratch_len(workers)];
            connection_mask(&self.problem, &self.weights, &self.anchor, &mut mask, workers, &mut scratch, pool)
                .unwrap();
            mask
        }

        /// By the definition.
        fn expected(&self) -> Vec<f32> {
            let Problem { batch, heads, tokens, slots, connections, protect, suffix } = self.problem;
            let free = protect..slots - suffix;
            let mut mask = Vec::new();
            for (image, row) in (0..batch).flat_map(|image| (0..slots).map(move |row| (image, row))) {
                let strength = |column: usize| {
                    let [from, to] = [row, column].map(|slot| self.anchor[image * slots + slot] as usize);
                    let weight = |head| exact(self.weights[((image * heads + head) * tokens + from) * tokens + to]);
                    (0..heads).map(weight).sum::<f64>()
                };
                mask.extend((0..slots).map(|column| {
                    if !free.contains(&row) || !free.contains(&column) {
                        return 1.0;
                    }
                    // It stays if fewer are stronger than there is room for.
                    let stronger = free.clone().filter(|&other| strength(other) > strength(column)).count();
                    if stronger < connections.max(1) { 1.0 } else { 0.0 }
                }));
            }
            mask
        }

        fn check(&self) {
            let expected = self.expected();
            for (workers, threads) in [(1, 1), (3, 2), (1000, 2)] {
                assert_eq!(self.run(workers, &Threads(threads)), expected, "{:?}", self.problem);
            }
        }
    }

    const PROBLEM: Problem = Problem { batch: 2, heads: 2, tokens: 9, slots: 7, connections: 2, protect: 1, suffix: 1 };

    #[test]
    fn the_strongest_stay_and_what_equals_them() {
        for (batch, heads, tokens, slots, connections, protect, suffix) in [
            (2, 2, 9, 7, 2, 1, 1),
            (1, 1, 1, 1, 1, 0, 0),
            (3, 4, 30, 22, 7, 1, 0),
            (2, 8, 50, 36, 11, 1, 1),
            (1, 2, 197, 139, 42, 1, 0),
            (2, 1, 6, 6, 3, 0, 0),
            (2, 4, 20, 20, 1, 2, 3),
            (2, 4, 20, 20, 0, 2, 3),
            (2, 4, 20, 20, 15, 2, 3),
            (2, 4, 20, 20, usize::MAX, 2, 3),
            (2, 4, 20, 5, 1, 2, 3),
            (1, 2, 1100, 9, 4, 0, 0),
            (0, 2, 9, 7, 2, 1, 1),
        ] {
            let problem = Problem { batch, heads, tokens, slots, connections, protect, suffix };
            Case::<f32>::new(problem).check();
            Case::<f16>::new(problem).check();
            Case::<bf16>::new(problem).check();
        }
    }

    #[test]
    fn equal_weights_have_equal_means() {
        // Thirds and tenths: their sums are rounded. Each row has six weights, of which three are as strong as another.
        let problem = Problem { batch: 1, heads: 7, tokens: 40, slots: 40, connections: 4, protect: 0, suffix: 0 };
        let mut case = Case::<f32>::new(problem);
        case.anchor = (0..40).collect();
        for (i, weight) in case.weights.iter_mut().enumerate() {
            let (head, column) = (i / 1600, i % 40);
            *weight = ((1 + column % 3) as f32 / 30.0) * (1.0 + head as f32 / 10.0);
        }
        let mask = case.run(1, &Serial);
        assert!(mask.chunks(40).all(|row| row.iter().enumerate().all(|(column, &stays)| {
            // Columns 2, 5, 8, … are the strongest: thirteen, for four that were asked for.
            stays == f32::from(column % 3 == 2)
        })));
    }

    #[test]
    fn what_is_not_a_number_is_the_strongest() {
        let mut case = Case::<f32>::new(Problem { connections: 1, ..PROBLEM });
        case.anchor = [-1, 1, 2, 3, 4, 5, -1].repeat(2);
        // In the row of token 3, column 5, one head. In that of token 4 everywhere.
        case.weights[3 * 9 + 5] = f32::NAN;
        case.weights[4 * 9..5 * 9].fill(f32::NAN);
        let mask = case.run(1, &Serial);
        assert_eq!(mask[3 * 7..4 * 7], [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(mask[4 * 7..5 * 7], [1.0; 7]);
    }

    #[test]
    fn arguments_are_checked() {
        let case = Case::<f32>::new(PROBLEM);
        let refused =
            |problem: Problem, weights: usize, anchor: &[i64], mask: usize, workers: usize, scratch: usize| {
                let (mut mask, mut scratch) = (vec![0.0; mask], vec![0.0; scratch]);
                let weights = &vec![0.5; weights];
                connection_mask(&problem, weights, anchor, &mut mask, workers, &mut scratch, &Serial).is_err()
            };
        let (anchor, len) = (&case.anchor[..], PROBLEM.scratch_len(2));
        assert!(!refused(PROBLEM, 2 * 2 * 81, anchor, 2 * 49, 2, len));
        assert!(refused(PROBLEM, 2 * 2 * 81 + 1, anchor, 2 * 49, 2, len));
        assert!(refused(PROBLEM, 2 * 2 * 81, &anchor[1..], 2 * 49, 2, len));
        assert!(refused(PROBLEM, 2 * 2 * 81, anchor, 2 * 48, 2, len));
        assert!(refused(PROBLEM, 2 * 2 * 81, anchor, 2 * 49, 0, len));
        assert!(refused(PROBLEM, 2 * 2 * 81, anchor, 2 * 49, 2, len - 1));
        for token in [-1, 9, i64::MAX, i64::MIN] {
            let mut anchor = case.anchor.clone();
            anchor[8] = token;
            assert!(refused(PROBLEM, 2 * 2 * 81, &anchor, 2 * 49, 2, len), "{token}");
        }
        assert!(refused(Problem { heads: 0, ..PROBLEM }, 0, anchor, 2 * 49, 2, len));
        assert!(refused(Problem { tokens: 0, ..PROBLEM }, 0, anchor, 2 * 49, 2, len));
        for (protect, suffix) in [(7, 1), (usize::MAX, 1), (1, usize::MAX)] {
            assert!(refused(Problem { protect, suffix, ..PROBLEM }, 2 * 2 * 81, anchor, 2 * 49, 2, len));
        }
        let endless = Problem { tokens: usize::MAX, slots: usize::MAX, ..PROBLEM };
        assert_eq!(endless.scratch_len(usize::MAX), usize::MAX);
        assert!(refused(endless, 0, &[], 0, 2, 0));
        assert!(!refused(Problem { slots: 0, protect: 0, suffix: 0, ..PROBLEM }, 2 * 2 * 81, &[], 0, 2, 0));
    }
}

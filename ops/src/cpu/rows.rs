//! Means and sums of rows.

use super::{Element, Isa, Kernel, MAX_LANES, Simd, fold};

/// Writes the weighted mean of some rows of a matrix `[·, C]` to `mean`, `[C]`: the sum of weight · row, in order, over
/// `total`.
pub(crate) fn mean<T: Element, U: Element>(
    isa: Isa,
    matrix: &[T],
    members: impl Iterator<Item = (usize, f32)> + Clone,
    total: f32,
    mean: &mut [U],
) {
    isa.run(Mean { matrix, members, total, mean });
}

struct Mean<'a, T, U, M> {
    matrix: &'a [T],
    members: M,
    total: f32,
    mean: &'a mut [U],
}

impl<T: Element, U: Element, M: Iterator<Item = (usize, f32)> + Clone> Kernel for Mean<'_, T, U, M> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // As many channels at a time as fit the first cache, twice.
        const PART: usize = 1024;
        let Self { matrix, members, total, mean } = self;
        let channels = mean.len();
        let (mut sums, mut wide) = ([0.0; PART], [0.0; PART]);
        for (part, mean) in mean.chunks_mut(PART).enumerate() {
            let sums = &mut sums[..mean.len()];
            sums.fill(0.0);
            for (member, weight) in members.clone() {
                let row = &matrix[member * channels + part * PART..][..mean.len()];
                simd.add_scaled(T::wide(row, &mut wide[..row.len()]), weight, sums);
            }
            for sum in &mut *sums {
                *sum /= total;
            }
            U::narrow(sums, mean);
        }
    }
}

/// The sum of `term` over the entries of two rows of one length: as many sums as the widest vector has lanes, so that it is
/// the same on every machine, and compilers see vectors.
#[inline(always)]
pub(crate) fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    let (a_parts, b_parts) = (a.chunks_exact(MAX_LANES), b.chunks_exact(MAX_LANES));
    let rest = a_parts.remainder().iter().zip(b_parts.remainder());
    for (a, b) in a_parts.zip(b_parts) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(a, b);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(rest) {
        *lane += term(a, b);
    }
    fold(&lanes, |a, b| a + b)
}

//! Means of rows.

use super::{Element, Isa, Kernel, Simd};

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

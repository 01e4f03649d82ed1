//! Means of rows.

use super::Element;

/// Writes the weighted mean of some rows of a matrix `[·, C]` to `mean`, `[C]`: the sum of weight · row, over `total`.
pub(crate) fn mean<T: Element>(
    matrix: &[T],
    members: impl Iterator<Item = (usize, f32)> + Clone,
    total: f32,
    mean: &mut [T],
) {
    // As many channels at a time as fit the first cache, twice.
    const PART: usize = 1024;
    let channels = mean.len();
    let (mut sums, mut row) = ([0.0; PART], [0.0; PART]);
    for (part, mean) in mean.chunks_mut(PART).enumerate() {
        let (sums, row) = (&mut sums[..mean.len()], &mut row[..mean.len()]);
        sums.fill(0.0);
        for (member, weight) in members.clone() {
            T::widen(&matrix[member * channels + part * PART..][..mean.len()], row);
            for (sum, &x) in sums.iter_mut().zip(&*row) {
                *sum += weight * x;
            }
        }
        for sum in &mut *sums {
            *sum /= total;
        }
        T::narrow(sums, mean);
    }
}

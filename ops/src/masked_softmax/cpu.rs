//! The masked softmax on the CPU: each row is read once and written once.

use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, Pool, Simd, check_len, check_scratch, each, exp2, fold, take,
};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Heads of each, H.
    pub heads: usize,
    /// Queries of each, N.
    pub queries: usize,
    /// Keys of each, M.
    pub keys: usize,
    /// What a row has beside its open connections, spread over all keys.
    pub eps: f32,
}

impl Problem {
    /// How many float32 of scratch memory `workers` workers need.
    pub fn scratch_len(&self, workers: usize) -> usize {
        let workers = self.worker_len().saturating_mul(workers);
        self.padded().saturating_mul(self.batch).saturating_add(workers)
    }

    /// A row in whole vectors.
    fn padded(&self) -> usize {
        self.keys.checked_next_multiple_of(MAX_LANES).unwrap_or(usize::MAX)
    }

    /// A row of scores as float32, and one of exponentials.
    fn worker_len(&self) -> usize {
        self.padded().saturating_mul(2)
    }
}

/// What [`masked_softmax`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Scaled scores, `[B, H, N, M]`.
    pub scores: &'a [T],
    /// 1 where a connection is open, else 0, `[B, N, M]`.
    pub mask: &'a [f32],
    /// Original tokens in each key, `[B, M]`, positive.
    pub size: &'a [f32],
}

/// Writes attention weights to `weights`, `[B, H, N, M]`, as [`MaskedSoftmax`](super) means them.
///
/// `scratch` is of [`Problem::scratch_len`] of as many `workers` as should share the work: at least the threads of the
/// pool, a few times as many where they may be busy with other things. It holds nothing between calls.
///
/// # Errors
/// Where the slices are not of these shapes, `eps` is negative or not finite, or scratch memory or workers are too few.
pub fn masked_softmax<T: Element>(
    problem: &Problem,
    inputs: Inputs<T>,
    weights: &mut [T],
    workers: usize,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    masked_softmax_on(Isa::best(), problem, inputs, weights, workers, scratch, pool)
}

/// [`masked_softmax`] on given instructions.
pub(crate) fn masked_softmax_on<T: Element>(
    isa: Isa,
    problem: &Problem,
    inputs: Inputs<T>,
    weights: &mut [T],
    workers: usize,
    mut scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, heads, queries, keys, eps } = problem;
    check_len("scores", inputs.scores.len(), &[batch, heads, queries, keys])?;
    check_len("mask", inputs.mask.len(), &[batch, queries, keys])?;
    check_len("size", inputs.size.len(), &[batch, keys])?;
    check_len("weights", weights.len(), &[batch, heads, queries, keys])?;
    if !(0.0..f32::INFINITY).contains(&eps) {
        return Err(Error::new(format!("eps is {eps}")));
    }
    if weights.is_empty() {
        return Ok(());
    }
    if workers == 0 {
        return Err(Error::new("no workers"));
    }
    check_scratch(scratch.len(), problem.scratch_len(workers))?;

    let padded = problem.padded();
    let log_size = take(&mut scratch, batch * padded);
    for (log_size, size) in log_size.chunks_exact_mut(padded).zip(inputs.size.chunks_exact(keys)) {
        // What fills the last vector is never the peak, and has no share.
        log_size[keys..].fill(f32::NEG_INFINITY);
        log_size.iter_mut().zip(size).for_each(|(log, size)| *log = size.ln());
    }
    let log_size = &*log_size;
    let rows = (batch * heads * queries).div_ceil(workers);
    let parts = weights.chunks_mut(rows * keys).zip(scratch.chunks_exact_mut(problem.worker_len())).enumerate();
    each(pool, parts, |(part, (weights, scratch))| {
        let (wide, line) = scratch.split_at_mut(padded);
        for (row, weights) in (part * rows..).zip(weights.chunks_exact_mut(keys)) {
            let (image, query) = (row / queries / heads, row % queries);
            isa.run(Row {
                scores: &inputs.scores[row * keys..][..keys],
                mask: &inputs.mask[(image * queries + query) * keys..][..keys],
                log_size: &log_size[image * padded..][..padded],
                eps,
                wide: &mut wide[..keys],
                line,
                weights,
            });
        }
    });
    Ok(())
}

/// A row; `log_size` and `line` are padded.
struct Row<'a, T> {
    scores: &'a [T],
    mask: &'a [f32],
    log_size: &'a [f32],
    eps: f32,
    wide: &'a mut [f32],
    line: &'a mut [f32],
    weights: &'a mut [T],
}

impl<T: Element> Kernel for Row<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scores, mask, log_size, eps, wide, line, weights } = self;
        let scores = T::wide(scores, wide);
        let mut lanes = [0.0; MAX_LANES];
        // Finite, so that a row of nothing but −∞ has a difference.
        let mut peaks = simd.splat(f32::MIN);
        let columns = scores.chunks(S::LANES).zip(log_size.chunks_exact(S::LANES));
        for ((score, log_size), line) in columns.zip(line.chunks_exact_mut(S::LANES)) {
            let sized = simd.add(load_part(simd, score), simd.load(log_size));
            simd.store(sized, line);
            peaks = simd.max(peaks, sized);
        }
        simd.store(peaks, &mut lanes);
        let peak = simd.splat(fold(&lanes[..S::LANES], |a, b| if a > b { a } else { b }));

        let share = simd.splat(eps / scores.len() as f32);
        // An exponential of base two is cheaper and as exact. Scores are scaled last: the difference cannot overflow.
        let log2_e = simd.splat(std::f32::consts::LOG2_E);
        let mut totals = simd.splat(0.0);
        for (mask, line) in mask.chunks(S::LANES).zip(line.chunks_exact_mut(S::LANES)) {
            let power = exp2(simd, simd.mul(simd.sub(simd.load(line), peak), log2_e));
            let open = simd.mul(power, load_part(simd, mask));
            totals = simd.add(totals, open);
            simd.store(simd.add(open, share), line);
        }
        simd.store(totals, &mut lanes);
        let total = fold(&lanes[..S::LANES], |a, b| a + b);
        T::narrow_scaled(&mut line[..weights.len()], 1.0 / (total + eps), weights);
    }
}

/// Loads as many entries as there are lanes, or what is left of a row and zeros.
#[inline(always)]
fn load_part<S: Simd>(simd: S, part: &[f32]) -> S::V {
    if part.len() == S::LANES {
        return simd.load(part);
    }
    let mut padded = [0.0; MAX_LANES];
    padded[..part.len()].copy_from_slice(part);
    simd.load(&padded)
}

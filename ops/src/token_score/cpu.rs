//! Received attention on the CPU: a block of queries at a time, of which sums alone are kept.

use super::Problem;
use crate::Heads;
use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, Pool, Simd, Softmax, SoftmaxLayout, align, check_len, check_scratch, each,
    pad, take,
};

#[cfg(test)]
mod tests;

impl Problem {
    /// How many float32 of scratch memory `workers` workers need: none for what is refused, or absurd attributes would ask
    /// for absurd amounts.
    pub fn scratch_len(&self, workers: usize) -> usize {
        if self.check().is_err() {
            return 0;
        }
        let received = pad(self.keys).saturating_mul(self.q.heads).saturating_mul(self.batch);
        // So that parts begin where vectors do.
        self.layout().len().saturating_mul(workers).saturating_add(received).saturating_add(MAX_LANES)
    }

    fn layout(&self) -> SoftmaxLayout {
        SoftmaxLayout::of(self.chosen(), self.keys, self.q.head_dim)
    }

    fn check(&self) -> Result<(), Error> {
        for (name, heads) in [("q", &self.q), ("k", &self.k)] {
            heads.check(name)?;
        }
        if (self.k.heads, self.k.head_dim) != (self.q.heads, self.q.head_dim) {
            return Err(Error::new("heads of queries and keys differ in number or width"));
        }
        if self.chosen() == 0 {
            return Err(Error::new("the attention of no query"));
        }
        Ok(())
    }
}

/// What [`token_score`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries, `[B, N, Wq]`.
    pub q: &'a [T],
    /// Keys, `[B, M, Wk]`.
    pub k: &'a [T],
    /// How often each key counts, `[B, M]`, positive.
    pub size: &'a [f32],
}

/// Writes the attention that each token receives, as [`TokenScore`](super) means it, to `score`, `[B, M]`.
///
/// `scratch` is of [`Problem::scratch_len`] of as many `workers` as should share the work: at least the threads of the
/// pool, a few times as many where they may be busy with other things. It holds nothing between calls. Results do not
/// depend on the number of workers or threads.
///
/// NaN and infinity among the scores of a query do what they do in a softmax: all that it attends to becomes NaN.
///
/// # Errors
/// Where the slices are not of these shapes, heads are not within them or differ, there is no query, or scratch memory or
/// workers are too few.
pub fn token_score<T: Element>(
    problem: &Problem,
    inputs: Inputs<T>,
    score: &mut [f32],
    workers: usize,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    token_score_on(Isa::best(), problem, inputs, score, workers, scratch, pool)
}

/// [`token_score`] on given instructions.
pub(crate) fn token_score_on<T: Element>(
    isa: Isa,
    problem: &Problem,
    inputs: Inputs<T>,
    score: &mut [f32],
    workers: usize,
    mut scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    problem.check()?;
    let &Problem { batch, queries, keys, q, k, scale, .. } = problem;
    let Heads { heads, .. } = q;
    check_len("q", inputs.q.len(), &[batch, queries, q.width])?;
    check_len("k", inputs.k.len(), &[batch, keys, k.width])?;
    check_len("size", inputs.size.len(), &[batch, keys])?;
    check_len("score", score.len(), &[batch, keys])?;
    if score.is_empty() {
        return Ok(());
    }
    if workers == 0 {
        return Err(Error::new("no workers"));
    }
    check_scratch(scratch.len(), problem.scratch_len(workers))?;

    // A unit is a head of an image: what it receives is summed by one worker, in one order.
    let (layout, stride, chosen) = (problem.layout(), pad(keys), problem.chosen());
    align(&mut scratch);
    let received = take(&mut scratch, batch * heads * stride);
    received.fill(0.0);
    let share = (batch * heads).div_ceil(workers);
    let shares = received.chunks_mut(share * stride).zip(scratch.chunks_exact_mut(layout.len())).enumerate();
    each(pool, shares, |(worker, (received, mut scratch))| {
        let mut softmax = Softmax::new(layout, &mut scratch);
        for (unit, received) in (worker * share..).zip(received.chunks_exact_mut(stride)) {
            let (image, head) = (unit / heads, unit % heads);
            let size = &inputs.size[image * keys..][..keys];
            softmax.set_keys(isa, |key| k.of(inputs.k, image * keys + key, head), Some(size));
            for first in (0..chosen).step_by(layout.rows) {
                let count = layout.rows.min(chosen - first);
                softmax.set_queries(isa, count, scale, |i| q.of(inputs.q, image * queries + first + i, head));
                isa.run(Receive { softmax: &mut softmax, keys, received });
            }
        }
    });

    let all = heads as f32 * chosen as f32;
    for (score, of_heads) in score.chunks_exact_mut(keys).zip(received.chunks_exact(heads * stride)) {
        score.fill(0.0);
        for received in of_heads.chunks_exact(stride) {
            score.iter_mut().zip(received).for_each(|(sum, x)| *sum += x);
        }
        score.iter_mut().for_each(|sum| *sum /= all);
    }
    Ok(())
}

/// A block of queries: adds the weights of each key.
struct Receive<'a, 'b> {
    softmax: &'a mut Softmax<'b>,
    keys: usize,
    received: &'a mut [f32],
}

impl Kernel for Receive<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { softmax, keys, received } = self;
        softmax.run(simd);
        let weights = softmax.weights();
        for (key, received) in (0..keys).step_by(S::LANES).zip(received.chunks_exact_mut(S::LANES)) {
            // The sum of the block by itself: what is small loses less beside it than beside the sum of all.
            let mut sum = simd.splat(0.0);
            for (row, &factor) in weights.data.chunks_exact(weights.stride).zip(softmax.factors()) {
                sum = simd.fma(simd.load(&row[key..]), simd.splat(factor), sum);
            }
            simd.store(simd.add(simd.load(received), sum), received);
        }
    }
}

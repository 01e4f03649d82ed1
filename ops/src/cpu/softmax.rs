//! The softmax of attention: of a block of queries of one head over all its keys, in memory that stays in the cache.

use super::{Element, Isa, Kernel, MAX_LANES, Panels, Rows, Simd, Sink, exp2, fold, pad, product, take};

/// Extents. They are for the widest vectors: enough for all.
#[derive(Clone, Copy)]
pub(crate) struct SoftmaxLayout {
    keys: usize,
    head_dim: usize,
    /// Queries of a block.
    pub(crate) rows: usize,
    /// From one row of scores to the next.
    stride: usize,
}

impl SoftmaxLayout {
    /// For heads of so many queries and keys.
    pub(crate) fn of(queries: usize, keys: usize, head_dim: usize) -> Self {
        // A block's scores stay in the second cache, beside the keys and values of a head of usual extents.
        const SCORES: usize = 64 << 10;
        const ROWS: usize = 48;
        // Not a power of two, lest all rows want the same places of the first cache.
        let stride = pad(keys).saturating_add(MAX_LANES);
        let most = (SCORES / stride).clamp(1, ROWS).next_multiple_of(6);
        let blocks = queries.div_ceil(most).max(1);
        Self { keys, head_dim, rows: queries.div_ceil(blocks).next_multiple_of(6), stride }
    }

    /// Numbers in each part: keys, weights, wide, queries, scores, peaks, factors.
    fn parts(&self) -> [usize; 7] {
        let &Self { keys, head_dim, rows, stride } = self;
        let parts = [
            pad(keys).saturating_mul(head_dim),
            pad(keys),
            head_dim.saturating_mul(8),
            rows.saturating_mul(head_dim),
            rows.saturating_mul(stride),
            rows * MAX_LANES,
            rows,
        ];
        parts.map(pad)
    }

    /// How many numbers a [`Softmax`] holds.
    pub(crate) fn len(&self) -> usize {
        self.parts().iter().fold(0, |sum, &len| sum.saturating_add(len))
    }
}

/// The keys of a head, and room for a block of its queries.
pub(crate) struct Softmax<'a> {
    layout: SoftmaxLayout,
    /// Panels of keys: `[panels, d, panel]`.
    keys: &'a mut [f32],
    /// How often each key counts; those that fill the last panel never.
    weights: &'a mut [f32],
    /// Eight rows of a head as float32, whoever needs them.
    pub(crate) wide: &'a mut [f32],
    /// Queries of the block.
    count: usize,
    /// `[rows, d]`
    queries: &'a mut [f32],
    /// `[rows, M]`, at `stride`; first scores, then weights.
    scores: &'a mut [f32],
    /// `[rows, lanes]`: the largest score in each lane, then the sum of weights.
    peaks: &'a mut [f32],
    /// What the weights of each row are to be multiplied with.
    factors: &'a mut [f32],
}

impl<'a> Softmax<'a> {
    /// In the first [`SoftmaxLayout::len`] numbers of `scratch`, which it takes off.
    pub(crate) fn new(layout: SoftmaxLayout, scratch: &mut &'a mut [f32]) -> Self {
        let [keys, weights, wide, queries, scores, peaks, factors] = layout.parts().map(|len| take(scratch, len));
        Self { layout, keys, weights, wide, count: 0, queries, scores, peaks, factors }
    }

    /// Lays out the keys of a head, each of which counts as often as its size says, or once.
    pub(crate) fn set_keys<'t, T: Element>(&mut self, isa: Isa, key: impl Fn(usize) -> &'t [T], size: Option<&[f32]>) {
        let count = self.layout.keys;
        isa.run(Transpose { count, key, keys: self.keys, wide: self.wide });
        let (weights, others) = self.weights.split_at_mut(count);
        match size {
            Some(size) => weights.copy_from_slice(size),
            None => weights.fill(1.0),
        }
        others.fill(0.0);
    }

    /// Takes a block of `count` queries, whose scores are to be multiplied with `scale`.
    pub(crate) fn set_queries<'t, T: Element>(
        &mut self,
        isa: Isa,
        count: usize,
        scale: f32,
        query: impl Fn(usize) -> &'t [T],
    ) {
        self.count = count;
        // Scores are of base two: the exponential is cheaper and as exact.
        let scale = scale * std::f32::consts::LOG2_E;
        isa.run(Enter { query, scale, count, queries: self.queries, wide: self.wide });
    }

    /// Computes the weights of the block, but for their [factors](Self::factors).
    #[inline(always)]
    pub(crate) fn run<S: Simd>(&mut self, simd: S) {
        let SoftmaxLayout { keys, head_dim, stride, .. } = self.layout;
        let count = self.count;
        let queries = Rows { data: self.queries, stride: head_dim, count };
        let keys = Panels { data: self.keys, depth: head_dim, columns: keys };
        self.peaks.fill(f32::NEG_INFINITY);
        product(simd, queries, keys, &mut Scores { scores: self.scores, stride, peaks: self.peaks });

        let padded = keys.columns.next_multiple_of(S::LANES);
        let weights = &self.weights[..padded];
        // Reductions of lanes wait for one another; in loops of their own, those of one row wait beside those of others.
        for (peaks, factor) in self.peaks.chunks_exact(S::LANES).zip(&mut *self.factors).take(count) {
            *factor = fold(peaks, |a, b| if a > b { a } else { b });
        }
        let lines = self.scores.chunks_exact_mut(stride).zip(self.peaks.chunks_exact_mut(S::LANES));
        for ((row, totals), &peak) in lines.zip(&*self.factors).take(count) {
            let peak = simd.splat(peak);
            let mut total = simd.splat(0.0);
            for (score, weight) in row[..padded].chunks_exact_mut(S::LANES).zip(weights.chunks_exact(S::LANES)) {
                let share = simd.mul(exp2(simd, simd.sub(simd.load(score), peak)), simd.load(weight));
                total = simd.add(total, share);
                simd.store(share, score);
            }
            simd.store(total, totals);
        }
        for (totals, factor) in self.peaks.chunks_exact(S::LANES).zip(&mut *self.factors).take(count) {
            *factor = 1.0 / fold(totals, |a, b| a + b);
        }
    }

    /// The weights of the block, a row for each query. Behind the keys there are zeros, up to the end of a vector, unless
    /// the row is NaN.
    pub(crate) fn weights(&self) -> Rows<'_> {
        Rows { data: self.scores, stride: self.layout.stride, count: self.count }
    }

    /// What the weights of each query are to be multiplied with, lest they sum up to something else than one.
    pub(crate) fn factors(&self) -> &[f32] {
        &self.factors[..self.count]
    }
}

/// Keys of a head to panels.
struct Transpose<'a, K> {
    count: usize,
    key: K,
    keys: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, T: Element, K: Fn(usize) -> &'t [T]> Kernel for Transpose<'_, K> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { count, key, keys, wide } = self;
        let panel = 2 * S::LANES;
        let dim = key(0).len();
        // Eight keys at a time. The last key fills the last panel: it leaves the largest score what it is.
        for (first, keys) in (0..count).step_by(panel).zip(keys.chunks_exact_mut(panel * dim)) {
            for part in (0..panel).step_by(8) {
                let mut rows = [&[][..]; 8];
                for ((i, row), wide) in rows.iter_mut().enumerate().zip(wide.chunks_exact_mut(dim)) {
                    simd.prefetch(key((first + part + i + 8).min(count - 1)));
                    *row = T::wide(key((first + part + i).min(count - 1)), wide);
                }
                simd.transpose(&rows, &mut keys[part..], panel);
            }
        }
    }
}

/// A block of queries to float32, scaled.
struct Enter<'a, Q> {
    query: Q,
    scale: f32,
    count: usize,
    queries: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, T: Element, Q: Fn(usize) -> &'t [T]> Kernel for Enter<'_, Q> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { query, scale, count, queries, wide } = self;
        let dim = query(0).len();
        for (i, queries) in queries.chunks_exact_mut(dim).take(count).enumerate() {
            simd.prefetch(query((i + 8).min(count - 1)));
            let row = T::wide(query(i), &mut wide[..dim]);
            simd.scale(row, scale, queries);
        }
    }
}

/// Keeps scores and the largest of each row.
struct Scores<'a> {
    scores: &'a mut [f32],
    stride: usize,
    peaks: &'a mut [f32],
}

impl<S: Simd> Sink<S> for Scores<'_> {
    #[inline(always)]
    fn take<const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize, tile: [[S::V; C]; R]) {
        for (tile, row) in tile.into_iter().zip(row..) {
            let peaks = &mut self.peaks[row * S::LANES..];
            let scores = &mut self.scores[row * self.stride + column..][..C * S::LANES];
            let mut peak = simd.load(peaks);
            for (vector, to) in tile.into_iter().zip(scores.chunks_exact_mut(S::LANES)) {
                simd.store(vector, to);
                peak = simd.max(peak, vector);
            }
            simd.store(peak, peaks);
        }
    }
}

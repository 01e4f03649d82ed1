//! Attention on the CPU: a block of queries at a time, scores never leaving the cache.

use crate::Heads;
use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, MAX_PANEL, Panels, Pool, Rows, Simd, Sink, Window, check_len,
    check_scratch, each, exp2, product, take,
};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Queries of each, N.
    pub queries: usize,
    /// Keys of each, M.
    pub keys: usize,
    /// Where the heads of `q` are.
    pub q: Heads,
    /// Where the heads of `k` are: as many, and as wide, as those of `q`.
    pub k: Heads,
    /// Where the heads of `v` are: likewise.
    pub v: Heads,
    /// The factor of the scores.
    pub scale: f32,
}

impl Problem {
    /// How many float32 of scratch memory `workers` workers need: none for what is refused, or absurd attributes would ask
    /// for absurd amounts.
    pub fn scratch_len(&self, workers: usize) -> usize {
        if self.check().is_err() {
            return 0;
        }
        Layout::of(self).worker_len().saturating_mul(workers)
    }

    fn check(&self) -> Result<(), Error> {
        for (name, heads) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            heads.check(name)?;
            if (heads.heads, heads.head_dim) != (self.q.heads, self.q.head_dim) {
                return Err(Error::new("heads of queries, keys and values differ in number or width"));
            }
        }
        Ok(())
    }
}

/// What [`attention`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries, `[B, N, Wq]`.
    pub q: &'a [T],
    /// Keys, `[B, M, Wk]`.
    pub k: &'a [T],
    /// Values, `[B, M, Wv]`.
    pub v: &'a [T],
    /// Original tokens in each key, `[B, M]`, positive; without it all are one.
    pub size: Option<&'a [f32]>,
}

/// Writes softmax(scale · q kᵀ + log(size)) v for every head to `y`, `[B, N, heads · head_dim]`.
///
/// `scratch` is of [`Problem::scratch_len`] of as many `workers` as should share the work: at least the threads of the
/// pool, a few times as many where they may be busy with other things. It holds nothing between calls.
///
/// NaN and infinity among the scores do what they do in a softmax: the row of their query is NaN.
///
/// # Errors
/// Where the slices are not of these shapes, heads are not within them or differ, there are no keys, or scratch memory or
/// workers are too few.
pub fn attention<T: Element>(
    problem: &Problem,
    inputs: Inputs<T>,
    y: &mut [T],
    workers: usize,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    attention_on(Isa::best(), problem, inputs, y, workers, scratch, pool)
}

/// [`attention`] on given instructions.
pub(crate) fn attention_on<T: Element>(
    isa: Isa,
    problem: &Problem,
    inputs: Inputs<T>,
    y: &mut [T],
    workers: usize,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    problem.check()?;
    let &Problem { batch, queries, keys, .. } = problem;
    let Heads { heads, head_dim, .. } = problem.q;
    check_len("q", inputs.q.len(), &[batch, queries, problem.q.width])?;
    check_len("k", inputs.k.len(), &[batch, keys, problem.k.width])?;
    check_len("v", inputs.v.len(), &[batch, keys, problem.v.width])?;
    check_len("y", y.len(), &[batch, queries, heads * head_dim])?;
    if let Some(size) = inputs.size {
        check_len("size", size.len(), &[batch, keys])?;
    }
    if y.is_empty() {
        return Ok(());
    }
    if keys == 0 {
        return Err(Error::new("attention to no keys"));
    }
    if workers == 0 {
        return Err(Error::new("no workers"));
    }
    check_scratch(scratch.len(), problem.scratch_len(workers))?;

    // Units are blocks of queries of a head of an image. Each worker has some that follow one another, so that it
    // prepares few heads.
    let layout = Layout::of(problem);
    let blocks = queries.div_ceil(layout.rows);
    let units = batch * heads * blocks;
    let workers = workers.min(units);
    let mut shares: Vec<Vec<Run<T>>> = (0..workers).map(|_| Vec::new()).collect();
    for (image, tokens) in y.chunks_exact_mut(queries * heads * head_dim).enumerate() {
        let mut rest = Window::new(tokens, heads * head_dim);
        for head in 0..heads {
            let (mut window, others) = rest.split_columns(head_dim);
            rest = others;
            let first = (image * heads + head) * blocks;
            let mut block = 0;
            while block < blocks {
                // Worker w has the units from ⌈w · units / workers⌉ on.
                let worker = (first + block) * workers / units;
                let end = ((worker + 1) * units).div_ceil(workers) - first;
                let query = block * layout.rows;
                let (run, others) = window.split_rows((end.min(blocks) * layout.rows).min(queries) - query);
                window = others;
                shares[worker].push(Run { image, head, query, y: run });
                block = end.min(blocks);
            }
        }
    }
    let scratches = scratch.chunks_exact_mut(layout.worker_len());
    each(pool, shares.into_iter().zip(scratches), |(runs, scratch)| {
        let mut worker = Worker::new(isa, problem, &layout, scratch);
        for run in runs {
            worker.prepare(&inputs, run.image, run.head);
            worker.run(&inputs, run);
        }
    });
    Ok(())
}

/// Queries of one head, and where their results go.
struct Run<'a, T> {
    image: usize,
    head: usize,
    query: usize,
    y: Window<'a, T>,
}

/// How much of everything a worker holds. Extents are for the widest vectors: enough for all.
struct Layout {
    /// Queries of a block.
    rows: usize,
    /// From one row of scores to the next.
    score_stride: usize,
    /// From one row of results to the next.
    mixed_stride: usize,
    /// Numbers in each part: keys, values, weights, rows, queries, scores, peaks, factors, mixed.
    parts: [usize; 9],
}

impl Layout {
    fn of(problem: &Problem) -> Self {
        // A block's scores stay in the second cache, beside the keys and values of a head of usual extents.
        const SCORES: usize = 64 << 10;
        const ROWS: usize = 48;
        let Problem { queries, keys, q: Heads { head_dim, .. }, .. } = *problem;
        let pad = |len: usize| len.div_ceil(MAX_PANEL).saturating_mul(MAX_PANEL);
        // Not a power of two, lest all rows want the same places of the first cache.
        let score_stride = pad(keys).saturating_add(MAX_LANES);
        let most = (SCORES / score_stride).clamp(1, ROWS).next_multiple_of(6);
        let blocks = queries.div_ceil(most).max(1);
        let rows = queries.div_ceil(blocks).next_multiple_of(6);
        let mixed_stride = pad(head_dim);
        let parts = [
            pad(keys).saturating_mul(head_dim),
            keys.saturating_mul(mixed_stride),
            pad(keys),
            head_dim.saturating_mul(8),
            rows.saturating_mul(head_dim),
            rows.saturating_mul(score_stride),
            rows * MAX_LANES,
            rows,
            rows.saturating_mul(mixed_stride),
        ];
        Self { rows, score_stride, mixed_stride, parts: parts.map(pad) }
    }

    fn worker_len(&self) -> usize {
        // So that parts begin where vectors do.
        self.parts.iter().fold(MAX_LANES, |sum, &len| sum.saturating_add(len))
    }
}

/// What computes runs: the keys, values and weights of a head, and room for a block of its queries.
struct Worker<'a> {
    isa: Isa,
    problem: &'a Problem,
    layout: &'a Layout,
    /// Panels of keys: `[panels, d, panel]`.
    keys: &'a mut [f32],
    /// Panels of channels: `[panels, M, panel]`.
    values: &'a mut [f32],
    /// How often each key counts; those that fill the last panel never.
    weights: &'a mut [f32],
    /// Some keys or values as float32.
    wide: &'a mut [f32],
    block: Block<'a>,
}

/// Room for a block of queries.
struct Block<'a> {
    /// `[rows, d]`
    queries: &'a mut [f32],
    /// `[rows, M]`, at `score_stride`; first scores, then weights.
    scores: &'a mut [f32],
    /// `[rows, lanes]`: the largest score in each lane.
    peaks: &'a mut [f32],
    /// What the results of each row are to be multiplied with.
    factors: &'a mut [f32],
    /// `[rows, d]`, at `mixed_stride`.
    mixed: &'a mut [f32],
}

impl<'a> Worker<'a> {
    fn new(isa: Isa, problem: &'a Problem, layout: &'a Layout, scratch: &'a mut [f32]) -> Self {
        let aligned = scratch.as_ptr().align_offset(MAX_LANES * size_of::<f32>()).min(MAX_LANES);
        let mut rest = &mut scratch[aligned..];
        let [keys, values, weights, wide, queries, scores, peaks, factors, mixed] =
            layout.parts.map(|len| take(&mut rest, len));
        Self {
            isa,
            problem,
            layout,
            keys,
            values,
            weights,
            wide,
            block: Block { queries, scores, peaks, factors, mixed },
        }
    }

    /// Lays out the keys and values of a head.
    fn prepare<T: Element>(&mut self, inputs: &Inputs<T>, image: usize, head: usize) {
        let Problem { keys: count, k, v, .. } = *self.problem;
        self.isa.run(Prepare {
            count,
            key: |key| k.of(inputs.k, image * count + key, head),
            value: |value| v.of(inputs.v, image * count + value, head),
            keys: self.keys,
            values: self.values,
            wide: self.wide,
        });
        let (weights, others) = self.weights.split_at_mut(count);
        match inputs.size {
            Some(size) => weights.copy_from_slice(&size[image * count..][..count]),
            None => weights.fill(1.0),
        }
        others.fill(0.0);
    }

    /// Computes a run, of the head that was prepared last.
    fn run<T: Element>(&mut self, inputs: &Inputs<T>, run: Run<T>) {
        let Problem { queries, keys, q, scale, .. } = *self.problem;
        let Run { image, head, query, mut y } = run;
        for first in (0..y.rows()).step_by(self.layout.rows) {
            let rows = self.layout.rows.min(y.rows() - first);
            // Scores are of base two: the exponential is cheaper and as exact.
            self.isa.run(Enter {
                query: |i| q.of(inputs.q, image * queries + query + first + i, head),
                scale: scale * std::f32::consts::LOG2_E,
                rows,
                queries: self.block.queries,
                wide: self.wide,
            });
            self.isa.run(Mix {
                keys: Panels { data: self.keys, depth: q.head_dim, columns: keys },
                values: Panels { data: self.values, depth: keys, columns: q.head_dim },
                weights: self.weights,
                layout: self.layout,
                rows,
                block: &mut self.block,
            });
            self.isa.run(Leave {
                mixed: self.block.mixed,
                stride: self.layout.mixed_stride,
                factors: &self.block.factors[..rows],
                first,
                y: &mut y,
            });
        }
    }
}

/// Keys and values of a head to panels.
struct Prepare<'a, K, V> {
    count: usize,
    key: K,
    value: V,
    keys: &'a mut [f32],
    values: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, T, K, V> Kernel for Prepare<'_, K, V>
where
    T: Element,
    K: Fn(usize) -> &'t [T],
    V: Fn(usize) -> &'t [T],
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { count, key, value, keys, values, wide } = self;
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
        for i in 0..count {
            simd.prefetch(value((i + 8).min(count - 1)));
            let row = T::wide(value(i), &mut wide[..dim]);
            for (at, row) in row.chunks(panel).enumerate() {
                simd.scale(row, 1.0, &mut values[(at * count + i) * panel..][..row.len()]);
            }
        }
    }
}

/// A block of queries to float32, scaled.
struct Enter<'a, Q> {
    query: Q,
    scale: f32,
    rows: usize,
    queries: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, T: Element, Q: Fn(usize) -> &'t [T]> Kernel for Enter<'_, Q> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { query, scale, rows, queries, wide } = self;
        let dim = query(0).len();
        for (i, queries) in queries.chunks_exact_mut(dim).take(rows).enumerate() {
            simd.prefetch(query((i + 8).min(rows - 1)));
            let row = T::wide(query(i), &mut wide[..dim]);
            simd.scale(row, scale, queries);
        }
    }
}

/// The results of a block to their places and type.
struct Leave<'a, 'b, T> {
    mixed: &'a mut [f32],
    stride: usize,
    factors: &'a [f32],
    first: usize,
    y: &'a mut Window<'b, T>,
}

impl<T: Element> Kernel for Leave<'_, '_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.mixed.chunks_exact_mut(self.stride).zip(self.factors);
        for (row, (mixed, &factor)) in (self.first..).zip(rows) {
            let y = self.y.row(row);
            T::narrow_scaled(&mut mixed[..y.len()], factor, y);
        }
    }
}

/// A block of queries: from `queries` to `mixed`.
struct Mix<'a, 'b> {
    keys: Panels<'a>,
    values: Panels<'a>,
    weights: &'a [f32],
    layout: &'a Layout,
    rows: usize,
    block: &'a mut Block<'b>,
}

impl Kernel for Mix<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { keys, values, weights, layout, rows, block } = self;
        let stride = layout.score_stride;
        let queries = Rows { data: block.queries, stride: keys.depth, count: rows };
        block.peaks.fill(f32::NEG_INFINITY);
        let mut scores = Scores { scores: block.scores, stride, peaks: block.peaks };
        product(simd, queries, keys, &mut scores);

        let padded = keys.columns.next_multiple_of(S::LANES);
        let weights = &weights[..padded];
        // Reductions of lanes wait for one another; in loops of their own, those of one row wait beside those of others.
        for (peaks, factor) in block.peaks.chunks_exact(S::LANES).zip(&mut *block.factors).take(rows) {
            *factor = fold(peaks, |a, b| if a > b { a } else { b });
        }
        let lines = block.scores.chunks_exact_mut(stride).zip(block.peaks.chunks_exact_mut(S::LANES));
        for ((row, totals), &peak) in lines.zip(&*block.factors).take(rows) {
            let peak = simd.splat(peak);
            let mut total = simd.splat(0.0);
            for (score, weight) in row[..padded].chunks_exact_mut(S::LANES).zip(weights.chunks_exact(S::LANES)) {
                let share = simd.mul(exp2(simd, simd.sub(simd.load(score), peak)), simd.load(weight));
                total = simd.add(total, share);
                simd.store(share, score);
            }
            simd.store(total, totals);
        }
        for (totals, factor) in block.peaks.chunks_exact(S::LANES).zip(&mut *block.factors).take(rows) {
            *factor = 1.0 / fold(totals, |a, b| a + b);
        }

        let shares = Rows { data: block.scores, stride, count: rows };
        product(simd, shares, values, &mut Mixed { mixed: block.mixed, stride: layout.mixed_stride });
    }
}

/// Reduces lanes, pairwise.
#[inline(always)]
fn fold(lanes: &[f32], pair: impl Fn(f32, f32) -> f32) -> f32 {
    let mut all = [0.0; MAX_LANES];
    all[..lanes.len()].copy_from_slice(lanes);
    let mut half = lanes.len() / 2;
    while half > 0 {
        for i in 0..half {
            all[i] = pair(all[i], all[i + half]);
        }
        half /= 2;
    }
    all[0]
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

/// Keeps sums.
struct Mixed<'a> {
    mixed: &'a mut [f32],
    stride: usize,
}

impl<S: Simd> Sink<S> for Mixed<'_> {
    #[inline(always)]
    fn take<const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize, tile: [[S::V; C]; R]) {
        for (tile, row) in tile.into_iter().zip(row..) {
            let mixed = &mut self.mixed[row * self.stride + column..][..C * S::LANES];
            for (vector, to) in tile.into_iter().zip(mixed.chunks_exact_mut(S::LANES)) {
                simd.store(vector, to);
            }
        }
    }
}

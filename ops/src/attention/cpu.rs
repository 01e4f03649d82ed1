//! Attention on the CPU: a block of queries at a time, scores never leaving the cache.

use crate::Heads;
use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, Panels, Pool, Simd, Sink, Softmax, SoftmaxLayout, Window, align, check_len,
    check_scratch, each, pad, product, take,
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
        self.worker_len().saturating_mul(workers)
    }

    fn layout(&self) -> SoftmaxLayout {
        SoftmaxLayout::of(self.queries, self.keys, self.q.head_dim)
    }

    /// From one row of results of a block to the next.
    fn mixed_stride(&self) -> usize {
        pad(self.q.head_dim)
    }

    fn worker_len(&self) -> usize {
        let (layout, stride) = (self.layout(), self.mixed_stride());
        let parts = [layout.len(), self.keys.saturating_mul(stride), layout.rows.saturating_mul(stride)];
        // So that parts begin where vectors do.
        parts.iter().fold(MAX_LANES, |sum, &len| sum.saturating_add(len))
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
    let layout = problem.layout();
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
    let scratches = scratch.chunks_exact_mut(problem.worker_len());
    each(pool, shares.into_iter().zip(scratches), |(runs, scratch)| {
        let mut worker = Worker::new(isa, problem, layout, scratch);
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

/// What computes runs: the keys and values of a head, and room for a block of its queries.
struct Worker<'a> {
    isa: Isa,
    problem: &'a Problem,
    layout: SoftmaxLayout,
    softmax: Softmax<'a>,
    /// Panels of channels: `[panels, M, panel]`.
    values: &'a mut [f32],
    /// `[rows, d]`, at `mixed_stride`.
    mixed: &'a mut [f32],
}

impl<'a> Worker<'a> {
    fn new(isa: Isa, problem: &'a Problem, layout: SoftmaxLayout, mut scratch: &'a mut [f32]) -> Self {
        align(&mut scratch);
        let softmax = Softmax::new(layout, &mut scratch);
        let stride = problem.mixed_stride();
        let [values, mixed] = [problem.keys, layout.rows].map(|rows| take(&mut scratch, rows * stride));
        Self { isa, problem, layout, softmax, values, mixed }
    }

    /// Lays out the keys and values of a head.
    fn prepare<T: Element>(&mut self, inputs: &Inputs<T>, image: usize, head: usize) {
        let Problem { keys: count, k, v, .. } = *self.problem;
        let size = inputs.size.map(|size| &size[image * count..][..count]);
        self.softmax.set_keys(self.isa, |key| k.of(inputs.k, image * count + key, head), size);
        self.isa.run(Prepare {
            count,
            value: |value| v.of(inputs.v, image * count + value, head),
            values: self.values,
            wide: self.softmax.wide,
        });
    }

    /// Computes a run, of the head that was prepared last.
    fn run<T: Element>(&mut self, inputs: &Inputs<T>, run: Run<T>) {
        let Problem { queries, keys, q, scale, .. } = *self.problem;
        let Run { image, head, query, mut y } = run;
        let stride = self.problem.mixed_stride();
        for first in (0..y.rows()).step_by(self.layout.rows) {
            let rows = self.layout.rows.min(y.rows() - first);
            let row = |i| q.of(inputs.q, image * queries + query + first + i, head);
            self.softmax.set_queries(self.isa, rows, scale, row);
            self.isa.run(Mix {
                softmax: &mut self.softmax,
                values: Panels { data: self.values, depth: keys, columns: q.head_dim },
                mixed: self.mixed,
                stride,
            });
            self.isa.run(Leave { mixed: self.mixed, stride, factors: self.softmax.factors(), first, y: &mut y });
        }
    }
}

/// Values of a head to panels.
struct Prepare<'a, V> {
    count: usize,
    value: V,
    values: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, T: Element, V: Fn(usize) -> &'t [T]> Kernel for Prepare<'_, V> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { count, value, values, wide } = self;
        let panel = 2 * S::LANES;
        let dim = value(0).len();
        for i in 0..count {
            simd.prefetch(value((i + 8).min(count - 1)));
            let row = T::wide(value(i), &mut wide[..dim]);
            for (at, row) in row.chunks(panel).enumerate() {
                simd.scale(row, 1.0, &mut values[(at * count + i) * panel..][..row.len()]);
            }
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

/// A block of queries: from their softmax to `mixed`.
struct Mix<'a, 'b> {
    softmax: &'a mut Softmax<'b>,
    values: Panels<'a>,
    mixed: &'a mut [f32],
    stride: usize,
}

impl Kernel for Mix<'_, '_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { softmax, values, mixed, stride } = self;
        softmax.run(simd);
        product(simd, softmax.weights(), values, &mut Mixed { mixed, stride });
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

//! Closeness on the CPU: rows of length one, once as rows and once as columns; then tile by tile, in registers.

use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, MAX_PANEL, Panels, Pool, Rows, Simd, Sink, align, check_len, check_scratch,
    each, product, sum, take,
};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Channels of each token, C.
    pub channels: usize,
    /// Tokens at the front that take no part.
    pub protect: usize,
    /// Tokens at the end that take no part.
    pub suffix: usize,
    /// What closeness is multiplied with.
    pub sign: f32,
}

/// How close two tokens of length one are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measure {
    /// Their inner product: `CosineSimilarity`.
    Cosine,
    /// The sum of absolute differences of their channels: `ManhattanDistance`.
    Manhattan,
}

/// Tokens that one task prepares: whole panels on every machine.
const PREPARED: usize = MAX_PANEL;
/// Rows of closeness that one task computes.
const COMPARED: usize = 24;

impl Problem {
    /// Tokens that take part, P; none where more are protected than there are.
    pub fn candidates(&self) -> Option<usize> {
        self.tokens.checked_sub(self.protect)?.checked_sub(self.suffix)
    }

    /// How many float32 of scratch memory [`token_similarity`] needs: none for what it refuses.
    pub fn scratch_len(&self) -> usize {
        let rows = self.candidates().unwrap_or(0).div_ceil(PREPARED).saturating_mul(PREPARED);
        match rows.saturating_mul(self.channels).saturating_mul(self.batch) {
            0 => 0,
            rows => rows.saturating_mul(2).saturating_add(MAX_LANES),
        }
    }
}

/// Writes how close the candidates of each image of `x`, `[B, N, C]`, are to each other to `closeness`, `[B, P, P]`, as
/// the [operators](super) mean it.
///
/// `scratch` is of [`Problem::scratch_len`]; it holds nothing between calls. Equal tokens are equally close to any other,
/// to the bit. Results do not depend on the number of threads.
///
/// # Errors
/// Where the slices are not of their shapes, more tokens are protected than there are, or scratch memory is too short.
pub fn token_similarity<T: Element>(
    measure: Measure,
    problem: &Problem,
    x: &[T],
    closeness: &mut [f32],
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    token_similarity_on(Isa::best(), measure, problem, x, closeness, scratch, pool)
}

/// [`token_similarity`] on given instructions.
pub(crate) fn token_similarity_on<T: Element>(
    isa: Isa,
    measure: Measure,
    problem: &Problem,
    x: &[T],
    closeness: &mut [f32],
    mut scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { batch, tokens, channels, protect, suffix, sign } = problem;
    let candidates = problem
        .candidates()
        .ok_or_else(|| Error::new(format!("{protect} and {suffix} of {tokens} tokens are to be protected")))?;
    check_len("x", x.len(), &[batch, tokens, channels])?;
    check_len("closeness", closeness.len(), &[batch, candidates, candidates])?;
    check_scratch(scratch.len(), problem.scratch_len())?;
    if closeness.is_empty() || channels == 0 {
        closeness.fill(0.0);
        return Ok(());
    }

    align(&mut scratch);
    let blocks = candidates.div_ceil(PREPARED);
    let image_len = blocks * PREPARED * channels;
    let [rows, panels] = [(); 2].map(|()| take(&mut scratch, batch * image_len));
    let parts = rows.chunks_exact_mut(PREPARED * channels).zip(panels.chunks_exact_mut(PREPARED * channels));
    each(pool, parts.enumerate(), |(block, (rows, panels))| {
        let (image, first) = (block / blocks, block % blocks * PREPARED);
        let tokens = &x[(image * tokens + protect) * channels..][..candidates * channels];
        isa.run(Prepare { tokens, channels, first, rows, panels });
    });

    let (rows, panels) = (&*rows, &*panels);
    let parts = closeness.chunks_exact_mut(candidates * candidates).enumerate().flat_map(|(image, closeness)| {
        let parts = closeness.chunks_mut(COMPARED * candidates).enumerate();
        parts.map(move |(part, closeness)| (image * image_len, part * COMPARED, closeness))
    });
    each(pool, parts, |(image, first, closeness)| {
        let rows = &rows[image + first * channels..];
        let rows = Rows { data: rows, stride: channels, count: closeness.len() / candidates };
        let panels = Panels { data: &panels[image..][..image_len], depth: channels, columns: candidates };
        isa.run(Compare { measure, rows, panels, closeness: Signed { closeness, candidates, sign } });
    });
    Ok(())
}

/// Some of the tokens of an image, scaled to length one: as rows, and as columns in panels.
struct Prepare<'a, T> {
    tokens: &'a [T],
    channels: usize,
    first: usize,
    rows: &'a mut [f32],
    panels: &'a mut [f32],
}

impl<T: Element> Kernel for Prepare<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { tokens, channels, first, rows, panels } = self;
        let (panel, last) = (2 * S::LANES, tokens.len() / channels - 1);
        for (token, row) in (first..).zip(rows.chunks_exact_mut(channels)) {
            // The last token fills the last panel, which nothing reads there.
            T::widen(&tokens[token.min(last) * channels..][..channels], row);
            let norm = sum(row, row, |x, y| x * y).sqrt().max(1e-12);
            row.iter_mut().for_each(|x| *x /= norm);
        }
        for (rows, columns) in rows.chunks_exact(panel * channels).zip(panels.chunks_exact_mut(panel * channels)) {
            for (part, rows) in rows.chunks_exact(8 * channels).enumerate() {
                let rows = std::array::from_fn(|i| &rows[i * channels..][..channels]);
                simd.transpose(&rows, &mut columns[8 * part..], panel);
            }
        }
    }
}

/// Some rows of closeness.
struct Compare<'a> {
    measure: Measure,
    rows: Rows<'a>,
    panels: Panels<'a>,
    closeness: Signed<'a>,
}

impl Kernel for Compare<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { measure, rows, panels, mut closeness } = self;
        match measure {
            Measure::Cosine => product(simd, rows, panels, &mut closeness),
            Measure::Manhattan => distances(simd, rows, panels, &mut closeness),
        }
    }
}

/// As [`product`], but sums of absolute differences.
#[inline(always)]
fn distances<S: Simd>(simd: S, rows: Rows, panels: Panels, sink: &mut impl Sink<S>) {
    const TILE: usize = 4;
    let width = 2 * S::LANES;
    for column in (0..panels.columns).step_by(width) {
        let panel = &panels.data[column * panels.depth..][..panels.depth * width];
        let whole = rows.count - rows.count % TILE;
        for row in (0..whole).step_by(TILE) {
            sink.take(simd, row, column, apart::<S, TILE>(simd, rows, row, panel));
        }
        for row in whole..rows.count {
            sink.take(simd, row, column, apart::<S, 1>(simd, rows, row, panel));
        }
    }
}

/// How far apart `R` rows and the columns of a panel are.
#[inline(always)]
fn apart<S: Simd, const R: usize>(simd: S, rows: Rows, row: usize, panel: &[f32]) -> [[S::V; 2]; R] {
    let columns = panel.chunks_exact(2 * S::LANES);
    let rows: [&[f32]; R] = std::array::from_fn(|i| &rows.data[(row + i) * rows.stride..][..columns.len()]);
    let mut sums = [[simd.splat(0.0); 2]; R];
    for (channel, columns) in columns.enumerate() {
        let (first, second) = columns.split_at(S::LANES);
        let columns = [simd.load(first), simd.load(second)];
        for (sums, row) in sums.iter_mut().zip(rows) {
            let x = simd.splat(row[channel]);
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = simd.add(*sum, simd.max(simd.sub(x, column), simd.sub(column, x)));
            }
        }
    }
    sums
}

/// Where closeness goes: `[·, P]`.
struct Signed<'a> {
    closeness: &'a mut [f32],
    candidates: usize,
    sign: f32,
}

impl<S: Simd> Sink<S> for Signed<'_> {
    #[inline(always)]
    fn take<const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize, tile: [[S::V; C]; R]) {
        let sign = simd.splat(self.sign);
        for (tile, row) in tile.into_iter().zip(self.closeness.chunks_exact_mut(self.candidates).skip(row)) {
            for (closeness, to) in tile.into_iter().zip(row[column..].chunks_mut(S::LANES)) {
                // What is not a number becomes the largest, which nothing else reaches: rows have length one.
                let closeness = simd.min(simd.mul(closeness, sign), simd.splat(f32::MAX));
                if to.len() == S::LANES {
                    simd.store(closeness, to);
                } else {
                    let mut lanes = [0.0; MAX_LANES];
                    simd.store(closeness, &mut lanes);
                    to.copy_from_slice(&lanes[..to.len()]);
                }
            }
        }
    }
}

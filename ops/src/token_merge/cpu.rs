//! Merging on the CPU: similarities never leave registers.

use crate::Heads;
use crate::cpu::{
    Element, Error, Isa, Kernel, MAX_LANES, Panels, Pool, Rank, Rows, Simd, Sink, align, check_len, check_scratch,
    each, fill, mean, product, take,
};

#[cfg(test)]
mod tests;

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Channels of each token, C.
    pub channels: usize,
    /// Tokens that leave each image.
    pub r: usize,
    /// Tokens at the front that take no part.
    pub protect: usize,
    /// Tokens at the end that take no part.
    pub suffix: usize,
    /// Where the heads of `metric` are.
    pub metric: Heads,
}

/// What [`token_merge`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T, M> {
    /// Tokens, `[B, N, C]`.
    pub x: &'a [T],
    /// What decides, `[B, N, W]`.
    pub metric: &'a [M],
    /// Original tokens in each token, `[B, N]`, positive.
    pub size: &'a [f32],
}

/// What [`token_merge`] writes, all of it; M = N − r.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// The mean of each slot, `[B, M, C]`.
    pub y: &'a mut [T],
    /// The size of each slot, `[B, M]`.
    pub size: &'a mut [f32],
    /// The token that each slot keeps the place of, `[B, M]`.
    pub anchor: &'a mut [i64],
    /// The tokens that left, the most similar first, `[B, r]`.
    pub leaving: &'a mut [i64],
    /// The slot that each of them joined, `[B, r]`.
    pub into: &'a mut [i64],
}

/// Tokens of A, and of B, that one task prepares.
const PREPARED: usize = 32;
/// Rows of A whose similarities one task computes.
const COMPARED: usize = 24;
/// Rows of float32 that one task prepares them with: eight of B, and a head.
const WIDE: usize = 9;
/// Bytes of slots, about, that one task writes.
const GATHERED: usize = 64 << 10;
/// Tokens are numbers in float32 for a while, which has no more integers.
const MOST_TOKENS: usize = 1 << 24;

impl Problem {
    /// How many float32 of scratch memory [`token_merge`] needs: none for what it refuses, or absurd attributes would ask
    /// for absurd amounts.
    pub fn scratch_len(&self) -> usize {
        let split = Split::of(self);
        if !split.compares || self.check().is_err() {
            return 0;
        }
        let padded = split.blocks.saturating_mul(PREPARED);
        let unit = padded
            .saturating_mul(2)
            .saturating_add(split.blocks.saturating_mul(WIDE))
            .saturating_mul(self.metric.head_dim);
        unit.saturating_add(split.a.saturating_mul(2)).saturating_mul(self.batch).saturating_add(MAX_LANES)
    }

    fn check(&self) -> Result<(), Error> {
        let &Self { tokens, r, protect, suffix, .. } = self;
        self.metric.check("metric")?;
        if tokens >= MOST_TOKENS {
            return Err(Error::new(format!("{tokens} tokens are too many")));
        }
        let free = protect.checked_add(suffix).and_then(|protected| tokens.checked_sub(protected));
        match free {
            None => Err(Error::new(format!("{protect} and {suffix} of {tokens} tokens are to be protected"))),
            Some(free) if r > free / 2 => Err(Error::new(format!("{r} of {free} tokens cannot leave"))),
            Some(_) => Ok(()),
        }
    }
}

/// The parts of the tokens of an image.
struct Split {
    /// The first token that may leave; every other one from it on may, until `end`.
    first_a: usize,
    /// The first token that receives, likewise.
    first_b: usize,
    /// Where the tokens at the end begin that take no part.
    end: usize,
    /// How many may leave.
    a: usize,
    /// How many receive.
    b: usize,
    /// How many of the former do not leave.
    staying: usize,
    /// Whether similarities matter.
    compares: bool,
    /// Tasks that prepare rows.
    blocks: usize,
}

impl Split {
    fn of(problem: &Problem) -> Self {
        let &Problem { tokens, r, protect, suffix, .. } = problem;
        // What is not protected by position in the image: A at even, B at odd ones.
        let (first_a, first_b) = (protect.saturating_add(protect % 2), protect.saturating_add(1 - protect % 2));
        let end = tokens.saturating_sub(suffix);
        let [a, b] = [first_a, first_b].map(|first| end.saturating_sub(first).div_ceil(2));
        Self {
            first_a,
            first_b,
            end,
            a,
            b,
            staying: a.saturating_sub(r),
            compares: b > 0 && a > 0 && (r > 0 || protect == 0),
            blocks: a.max(b).div_ceil(PREPARED),
        }
    }
}

/// Merges the `r` most similar pairs of tokens of each image, as [`TokenMerge`](super) means it.
///
/// `scratch` is of [`Problem::scratch_len`]; it holds nothing between calls.
///
/// Slots that no token joins are copies of their token. Of equal similarities the lowest position wins, and equal rows
/// of the metric have equal similarities, to the bit. A similarity that is NaN counts as the highest: a token whose
/// metric is NaN leaves among the first, or is joined by all that leave. Runtimes do not agree what the standard operators
/// make of NaN; here no token is lost or doubled for it.
///
/// # Errors
/// Where the slices are not of their shapes, heads are not within the metric, more tokens are protected than there are,
/// `r` is more than half of the others, there are 2²⁴ tokens, or scratch memory is too short.
pub fn token_merge<T: Element, M: Element>(
    problem: &Problem,
    inputs: Inputs<T, M>,
    outputs: Outputs<T>,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    token_merge_on(Isa::best(), problem, inputs, outputs, scratch, pool)
}

/// [`token_merge`] on given instructions.
pub(crate) fn token_merge_on<T: Element, M: Element>(
    isa: Isa,
    problem: &Problem,
    inputs: Inputs<T, M>,
    outputs: Outputs<T>,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    problem.check()?;
    let &Problem { batch, tokens, channels, r, metric, .. } = problem;
    let slots = tokens - r;
    check_len("x", inputs.x.len(), &[batch, tokens, channels])?;
    check_len("metric", inputs.metric.len(), &[batch, tokens, metric.width])?;
    check_len("size", inputs.size.len(), &[batch, tokens])?;
    check_len("y", outputs.y.len(), &[batch, slots, channels])?;
    check_len("size of slots", outputs.size.len(), &[batch, slots])?;
    check_len("anchor", outputs.anchor.len(), &[batch, slots])?;
    check_len("leaving", outputs.leaving.len(), &[batch, r])?;
    check_len("into", outputs.into.len(), &[batch, r])?;
    if batch == 0 || tokens == 0 {
        return Ok(());
    }
    check_scratch(scratch.len(), problem.scratch_len())?;

    let split = &Split::of(problem);
    let (best, partner) = match split.compares {
        true => compare(isa, problem, split, inputs.metric, scratch, pool),
        false => (&[][..], &[][..]),
    };
    let mut joins: Vec<Vec<Join>> = vec![Vec::new(); batch];
    let Outputs { y, size, anchor, leaving, into } = outputs;
    let (mut best, mut partner) = (best.chunks_exact(split.a.max(1)), partner.chunks_exact(split.a.max(1)));
    let (mut leaving, mut into) = (leaving.chunks_exact_mut(r.max(1)), into.chunks_exact_mut(r.max(1)));
    let images = joins.iter_mut().zip(anchor.chunks_exact_mut(slots)).zip(size.chunks_exact_mut(slots));
    // What is empty for all images has no parts.
    let images = images.zip(inputs.size.chunks_exact(tokens)).map(|(((joins, anchor), size_out), size)| Image {
        best: best.next().unwrap_or_default(),
        partner: partner.next().unwrap_or_default(),
        size,
        size_out,
        anchor,
        leaving: leaving.next().unwrap_or_default(),
        into: into.next().unwrap_or_default(),
        joins,
    });
    each(pool, images, |image| image.select(problem, split));

    if y.is_empty() {
        return Ok(());
    }
    let block = (GATHERED / (channels * size_of::<T>())).clamp(1, slots);
    let (anchor, size_out, joins) = (&*anchor, &*size, &joins);
    let blocks = y.chunks_exact_mut(slots * channels).enumerate().flat_map(|(image, y)| {
        y.chunks_mut(block * channels).enumerate().map(move |(part, y)| (image, part * block, y))
    });
    each(pool, blocks, |(image, first, y)| {
        let x = &inputs.x[image * tokens * channels..][..tokens * channels];
        let size = &inputs.size[image * tokens..][..tokens];
        let mut joins = &joins[image][joins[image].partition_point(|join| (join.slot as usize) < first)..];
        for (slot, y) in (first..).zip(y.chunks_exact_mut(channels)) {
            let anchor = anchor[image * slots + slot] as usize;
            let (members, others) = joins.split_at(joins.iter().take_while(|join| join.slot as usize == slot).count());
            joins = others;
            if members.is_empty() {
                y.copy_from_slice(&x[anchor * channels..][..channels]);
                continue;
            }
            let members = members.iter().map(|join| join.token as usize);
            let members = std::iter::once(anchor).chain(members).map(|token| (token, size[token]));
            mean(isa, x, members, size_out[image * slots + slot], y);
        }
    });
    Ok(())
}

/// The similarity of each token of A to the one of B that is most similar, and the number of that among B: `[B, a]`.
fn compare<'a, M: Element>(
    isa: Isa,
    problem: &Problem,
    split: &Split,
    metric: &[M],
    mut scratch: &'a mut [f32],
    pool: &dyn Pool,
) -> (&'a [f32], &'a [f32]) {
    let &Problem { batch, tokens, metric: heads, .. } = problem;
    let dim = heads.head_dim;
    align(&mut scratch);
    let image_len = split.blocks * PREPARED * dim;
    let [rows, panels] = [(); 2].map(|()| take(&mut scratch, batch * image_len));
    let wide = take(&mut scratch, batch * split.blocks * WIDE * dim);
    let [best, partner] = [(); 2].map(|()| take(&mut scratch, batch * split.a));

    let parts = rows.chunks_exact_mut(PREPARED * dim).zip(panels.chunks_exact_mut(PREPARED * dim));
    let parts = parts.zip(wide.chunks_exact_mut(WIDE * dim)).enumerate();
    each(pool, parts, |(block, ((rows, panels), wide))| {
        let (image, first) = (block / split.blocks, block % split.blocks * PREPARED);
        let head = |token: usize, head| heads.of(metric, image * tokens + token, head);
        isa.run(Prepare { heads, head, split, first, rows, panels, wide });
    });

    let (rows, panels) = (&*rows, &*panels);
    let parts = best.chunks_exact_mut(split.a).zip(partner.chunks_exact_mut(split.a)).enumerate();
    let parts = parts.flat_map(|(image, (best, partner))| {
        let parts = best.chunks_mut(COMPARED).zip(partner.chunks_mut(COMPARED)).enumerate();
        parts.map(move |(part, edges)| (image, part * COMPARED, edges))
    });
    each(pool, parts, |(image, first, (best, partner))| {
        let rows = &rows[image * image_len + first * dim..];
        isa.run(Compare {
            rows: Rows { data: rows, stride: dim, count: best.len() },
            panels: Panels { data: &panels[image * image_len..][..image_len], depth: dim, columns: split.b },
            best,
            partner,
        });
    });
    (best, partner)
}

/// Some rows of the metric: the mean over heads, of unit length; those of A as rows, those of B in panels.
struct Prepare<'a, H> {
    heads: Heads,
    head: H,
    split: &'a Split,
    first: usize,
    rows: &'a mut [f32],
    panels: &'a mut [f32],
    wide: &'a mut [f32],
}

impl<'t, M: Element, H: Fn(usize, usize) -> &'t [M]> Kernel for Prepare<'_, H> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { heads, head, split, first, rows, panels, wide } = self;
        let (dim, panel) = (heads.head_dim, 2 * S::LANES);
        let (wide, eight) = wide.split_at_mut(dim);
        for (a, row) in (first..split.a).zip(rows.chunks_exact_mut(dim)) {
            unit(|i| head(split.first_a + 2 * a, i), heads.heads, row, wide);
        }
        for (first, columns) in (first..split.b).step_by(panel).zip(panels.chunks_exact_mut(panel * dim)) {
            for part in (0..panel).step_by(8) {
                for (i, row) in eight.chunks_exact_mut(dim).enumerate() {
                    // The last token fills the last panel: as similar as itself, but later.
                    let b = (first + part + i).min(split.b - 1);
                    unit(|i| head(split.first_b + 2 * b, i), heads.heads, row, wide);
                }
                let rows = std::array::from_fn(|i| &eight[i * dim..][..dim]);
                simd.transpose(&rows, &mut columns[part..], panel);
            }
        }
    }
}

/// The mean of heads, of unit length. Equal heads give an equal `row`: sums are in a fixed order.
#[inline(always)]
fn unit<'t, M: Element>(head: impl Fn(usize) -> &'t [M], heads: usize, row: &mut [f32], wide: &mut [f32]) {
    M::widen(head(0), row);
    for i in 1..heads {
        let wide = M::wide(head(i), wide);
        row.iter_mut().zip(wide).for_each(|(sum, x)| *sum += x);
    }
    let mut squares = [0.0; MAX_LANES];
    for part in row.chunks_mut(MAX_LANES) {
        for (x, sum) in part.iter_mut().zip(&mut squares) {
            *x /= heads as f32;
            *sum += *x * *x;
        }
    }
    let norm = squares.iter().sum::<f32>().sqrt().max(1e-12);
    row.iter_mut().for_each(|x| *x /= norm);
}

/// The best column of some rows.
struct Compare<'a> {
    rows: Rows<'a>,
    panels: Panels<'a>,
    best: &'a mut [f32],
    partner: &'a mut [f32],
}

impl Kernel for Compare<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut lanes = Best { best: [f32::NEG_INFINITY; COMPARED * MAX_LANES], column: [0.0; COMPARED * MAX_LANES] };
        product(simd, self.rows, self.panels, &mut lanes);
        let lanes = lanes.best.chunks_exact(S::LANES).zip(lanes.column.chunks_exact(S::LANES));
        for ((best, partner), (bests, columns)) in self.best.iter_mut().zip(self.partner).zip(lanes) {
            (*best, *partner) = (bests[0], columns[0]);
            for (&score, &column) in bests.iter().zip(columns) {
                if score > *best || (score == *best && column < *partner) {
                    (*best, *partner) = (score, column);
                }
            }
        }
    }
}

/// The largest of each row in each lane, and the first column that has it.
struct Best {
    best: [f32; COMPARED * MAX_LANES],
    column: [f32; COMPARED * MAX_LANES],
}

impl<S: Simd> Sink<S> for Best {
    #[inline(always)]
    fn take<const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize, tile: [[S::V; C]; R]) {
        const LANES: [f32; MAX_LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let lanes = simd.load(&LANES);
        for (tile, row) in tile.into_iter().zip(row..) {
            let (bests, columns) = (&mut self.best[row * S::LANES..], &mut self.column[row * S::LANES..]);
            let (mut best, mut best_column) = (simd.load(bests), simd.load(columns));
            for (scores, column) in tile.into_iter().zip((column..).step_by(S::LANES)) {
                // NaN becomes infinity, which nothing else is: rows have unit length.
                let scores = simd.min(scores, simd.splat(f32::INFINITY));
                let column = simd.add(lanes, simd.splat(column as f32));
                best_column = simd.where_greater(scores, best, column, best_column);
                best = simd.max(scores, best);
            }
            simd.store(best, bests);
            simd.store(best_column, columns);
        }
    }
}

/// A token that joins a slot: the `rank`th that leaves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Join {
    slot: u32,
    rank: u32,
    token: u32,
}

/// What selection reads and writes of one image.
struct Image<'a> {
    best: &'a [f32],
    partner: &'a [f32],
    size: &'a [f32],
    size_out: &'a mut [f32],
    anchor: &'a mut [i64],
    leaving: &'a mut [i64],
    into: &'a mut [i64],
    /// In order of slots, and of leaving.
    joins: &'a mut Vec<Join>,
}

impl Image<'_> {
    /// Decides who leaves, and where everyone goes.
    fn select(self, problem: &Problem, split: &Split) {
        let &Problem { tokens, r, protect, .. } = problem;
        // Without similarities all are equally similar.
        let key = |a: usize| Rank::new(self.best.get(a).copied().unwrap_or(0.0), a);
        let mut keys: Vec<Rank> = (0..split.a).map(key).collect();
        if protect == 0 {
            keys.sort_unstable();
        } else if r > 0 {
            keys.select_nth_unstable(r - 1);
            keys[..r].sort_unstable();
        }
        let (leaving, others) = keys.split_at(r);
        let token = |key: &Rank| split.first_a + 2 * key.position();

        let last = leaving.last().copied();
        let by_position =
            (0..split.a).filter(|&a| last.is_none_or(|last| key(a) > last)).map(|a| split.first_a + 2 * a);
        let by_similarity = others.iter().map(token);
        let receiving = (split.first_b..split.end).step_by(2);
        let (front, staying) = self.anchor.split_at_mut(protect);
        let (staying, back) = staying.split_at_mut(split.staying);
        fill(front, 0..protect);
        match protect {
            0 => fill(staying, by_similarity),
            _ => fill(staying, by_position),
        }
        fill(back, receiving.chain(split.end..tokens));

        fill(self.leaving, leaving.iter().map(token));
        let slot = |key: &Rank| protect + split.staying + self.partner[key.position()] as usize;
        fill(self.into, leaving.iter().map(slot));
        self.joins.extend(leaving.iter().zip(0..).map(|(key, rank)| Join {
            slot: slot(key) as u32,
            rank,
            token: token(key) as u32,
        }));
        self.joins.sort_unstable();

        for (size, &anchor) in self.size_out.iter_mut().zip(&*self.anchor) {
            *size = self.size[anchor as usize];
        }
        for join in &*self.joins {
            self.size_out[join.slot as usize] += self.size[join.token as usize];
        }
    }
}

//! Products of matrices that are handed over tile by tile, while they are in registers.

use super::simd::Simd;

/// Rows of a matrix: the first `depth` of every `stride` numbers, `count` times.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

/// Columns of a matrix, two vectors of them at a time: `[panels, depth, 2 · lanes]`. The last panel is as wide as the others, whatever is in it.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) depth: usize,
    pub(crate) columns: usize,
}

/// What becomes of a product.
pub(crate) trait Sink<S: Simd> {
    /// Takes the entries from row `row` and column `column` on. Columns come in ascending order for every row. The last
    /// vector of a row may reach beyond the last column: what it has there comes of what fills the last panel.
    fn take<const R: usize, const C: usize>(&mut self, simd: S, row: usize, column: usize, tile: [[S::V; C]; R]);
}

/// Multiplies.
#[inline(always)]
pub(crate) fn product<S: Simd>(simd: S, rows: Rows, panels: Panels, sink: &mut impl Sink<S>) {
    let width = 2 * S::LANES;
    for column in (0..panels.columns).step_by(width) {
        let panel = &panels.data[column * panels.depth..][..panels.depth * width];
        // Tiles of nearly the same number of rows: one of few would wait for its own sums.
        let tiles = rows.count.div_ceil(S::ROWS);
        for tile in 0..tiles {
            let row = tile * rows.count / tiles;
            let count = (tile + 1) * rows.count / tiles - row;
            if panels.columns - column > S::LANES {
                step::<S, 2>(simd, rows, row, count, panel, panels.depth, column, sink);
            } else {
                step::<S, 1>(simd, rows, row, count, panel, panels.depth, column, sink);
            }
        }
    }
}

/// One tile, of `count` rows.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the middle of a loop")]
fn step<S: Simd, const C: usize>(
    simd: S,
    rows: Rows,
    row: usize,
    count: usize,
    panel: &[f32],
    depth: usize,
    column: usize,
    sink: &mut impl Sink<S>,
) {
    let data = &rows.data[row * rows.stride..];
    // A tile is unrolled by its rows, so each number of them is code of its own; none has more than `S::ROWS`.
    macro_rules! of_rows {
        ($($count:literal)*) => {
            match count {
                $($count if $count <= S::ROWS => {
                    let tile = simd.tile::<$count, C>(data, rows.stride, panel, 2 * S::LANES, depth);
                    sink.take(simd, row, column, tile);
                })*
                _ => unreachable!("a tile of more rows than registers hold"),
            }
        };
    }
    of_rows!(1 2 3 4 5 6 7 8 9 10 11 12)
}

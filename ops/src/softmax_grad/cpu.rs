//! The gradient of a softmax on the CPU: each row is in the first cache while it is read twice.

use crate::cpu::{Error, Isa, Kernel, Pool, Simd, check_len, each, sum};

/// Extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Rows.
    pub rows: usize,
    /// Entries of each, K.
    pub columns: usize,
}

/// Writes y · (dy − Σ dy · y) to `dx`; all are `[rows, K]`.
///
/// # Errors
/// Where the slices are not of these shapes.
pub fn softmax_grad(problem: &Problem, y: &[f32], dy: &[f32], dx: &mut [f32], pool: &dyn Pool) -> Result<(), Error> {
    softmax_grad_on(Isa::best(), problem, y, dy, dx, pool)
}

/// [`softmax_grad`] on given instructions.
pub(crate) fn softmax_grad_on(
    isa: Isa,
    problem: &Problem,
    y: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    // Entries, about, that one task writes.
    const PART: usize = 16 << 10;
    let &Problem { rows, columns } = problem;
    check_len("y", y.len(), &[rows, columns])?;
    check_len("dy", dy.len(), &[rows, columns])?;
    check_len("dx", dx.len(), &[rows, columns])?;
    if dx.is_empty() {
        return Ok(());
    }
    let part = (PART / columns).max(1) * columns;
    let parts = y.chunks(part).zip(dy.chunks(part)).zip(dx.chunks_mut(part));
    each(pool, parts, |((y, dy), dx)| isa.run(Rows { columns, y, dy, dx }));
    Ok(())
}

struct Rows<'a> {
    columns: usize,
    y: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Out = ();

    /// Without vectors of its own: the compiler makes them of loops that are as simple as these.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { columns, y, dy, dx } = self;
        let rows = y.chunks_exact(columns).zip(dy.chunks_exact(columns));
        for ((y, dy), dx) in rows.zip(dx.chunks_exact_mut(columns)) {
            let mean = sum(y, dy, |y, dy| y * dy);
            for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
                *dx = y * (dy - mean);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Noise, Threads};

    #[test]
    fn gradients_are_those_of_float64() {
        for (rows, columns) in [(1, 1), (3, 197), (50, 64), (2, 40_000), (0, 5), (5, 0)] {
            let problem = Problem { rows, columns };
            let mut noise = Noise(rows as u64);
            // Weights, up to their sum.
            let y: Vec<f32> = noise.elements::<f32>(rows * columns).iter().map(|x| x.abs() / columns as f32).collect();
            let dy: Vec<f32> = noise.elements(rows * columns);
            let mean = |row: usize| -> f64 {
                (row * columns..(row + 1) * columns).map(|i| f64::from(y[i]) * f64::from(dy[i])).sum()
            };
            let means: Vec<f64> = (0..rows).map(mean).collect();
            for isa in Isa::all() {
                let mut dx = vec![f32::NAN; rows * columns];
                softmax_grad_on(isa, &problem, &y, &dy, &mut dx, &Threads(2)).unwrap();
                for (at, dx) in dx.into_iter().enumerate() {
                    let expected = f64::from(y[at]) * (f64::from(dy[at]) - means[at / columns]);
                    // Each entry of y is below 1 / K, those of dy below 1: a few roundings of their product.
                    assert!((f64::from(dx) - expected).abs() <= 1e-6 / columns as f64, "{isa:?}: {dx} for {expected}");
                }
            }
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let problem = Problem { rows: 2, columns: 3 };
        let run = |y: usize, dy: usize, dx: usize| {
            softmax_grad(&problem, &vec![0.0; y], &vec![0.0; dy], &mut vec![0.0; dx], &Threads(1)).is_ok()
        };
        assert_eq!([run(6, 6, 6), run(5, 6, 6), run(6, 7, 6), run(6, 6, 4)], [true, false, false, false]);
    }
}

//! The gradient of a layer normalisation on the CPU: each row of `x` and `dy` comes from memory once.

use crate::cpu::{Error, Isa, Kernel, Pool, Simd, check_len, check_scratch, each, sum, take};

/// Extents and attributes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Rows that are normalised, each for itself.
    pub rows: usize,
    /// Entries of each.
    pub columns: usize,
    /// What is added to variances.
    pub epsilon: f32,
}

impl Problem {
    /// Parts of the rows that are summed up each for itself, and then together: as many whatever there is to compute on,
    /// so that sums are too.
    fn parts(&self) -> usize {
        const ROWS: usize = 16;
        const MOST: usize = 128;
        self.rows.div_ceil(ROWS).min(MOST)
    }

    /// How many float32 of scratch memory are needed.
    pub fn scratch_len(&self) -> usize {
        self.part_len().saturating_mul(self.parts())
    }

    /// Sums for scale and bias, and a normalised row.
    fn part_len(&self) -> usize {
        self.columns.saturating_mul(3)
    }
}

/// What [`layer_norm_grad`] reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[rows, columns]`.
    pub x: &'a [f32],
    /// `[columns]`.
    pub scale: &'a [f32],
    /// `[rows, columns]`.
    pub dy: &'a [f32],
}

/// What it writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// `[rows, columns]`.
    pub dx: &'a mut [f32],
    /// `[columns]`.
    pub dscale: &'a mut [f32],
    /// `[columns]`.
    pub dbias: &'a mut [f32],
}

/// Writes the gradients as [`LayerNormGrad`](super) means them. `scratch` is of [`Problem::scratch_len`] and holds nothing
/// between calls. Results do not depend on the pool.
///
/// # Errors
/// Where the slices are not of these shapes, or scratch memory is too little.
pub fn layer_norm_grad(
    problem: &Problem,
    inputs: Inputs,
    outputs: Outputs,
    scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    layer_norm_grad_on(Isa::best(), problem, inputs, outputs, scratch, pool)
}

/// [`layer_norm_grad`] on given instructions.
pub(crate) fn layer_norm_grad_on(
    isa: Isa,
    problem: &Problem,
    inputs: Inputs,
    outputs: Outputs,
    mut scratch: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    let &Problem { rows, columns, epsilon } = problem;
    let Outputs { dx, dscale, dbias } = outputs;
    check_len("x", inputs.x.len(), &[rows, columns])?;
    check_len("dy", inputs.dy.len(), &[rows, columns])?;
    check_len("dx", dx.len(), &[rows, columns])?;
    check_len("scale", inputs.scale.len(), &[columns])?;
    check_len("dscale", dscale.len(), &[columns])?;
    check_len("dbias", dbias.len(), &[columns])?;
    check_scratch(scratch.len(), problem.scratch_len())?;
    dscale.fill(0.0);
    dbias.fill(0.0);
    if dx.is_empty() {
        return Ok(());
    }
    let scratch = take(&mut scratch, problem.scratch_len());
    let part = rows.div_ceil(problem.parts()) * columns;
    let read = inputs.x.chunks(part).zip(inputs.dy.chunks(part));
    let parts = read.zip(dx.chunks_mut(part)).zip(scratch.chunks_exact_mut(problem.part_len()));
    each(pool, parts, |(((x, dy), dx), scratch)| {
        isa.run(Rows { scale: inputs.scale, epsilon, x, dy, dx, scratch });
    });
    // Rounding may leave fewer parts than room for them.
    for sums in scratch.chunks_exact(problem.part_len()).take((rows * columns).div_ceil(part)) {
        let add = |to: &mut [f32], sums: &[f32]| to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
        add(dscale, &sums[..columns]);
        add(dbias, &sums[columns..2 * columns]);
    }
    Ok(())
}

/// Some rows, and what they add to the gradients of scale and bias.
struct Rows<'a> {
    scale: &'a [f32],
    epsilon: f32,
    x: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Out = ();

    /// Without vectors of its own: the compiler makes them of loops that are as simple as these.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { scale, epsilon, x, dy, dx, scratch } = self;
        let columns = scale.len();
        let (sums, normal) = scratch.split_at_mut(2 * columns);
        sums.fill(0.0);
        let (dscale, dbias) = sums.split_at_mut(columns);
        let share = 1.0 / columns as f32;
        let rows = x.chunks_exact(columns).zip(dy.chunks_exact(columns));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(columns)) {
            let mean = sum(x, x, |x, _| x) * share;
            let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) * share;
            let steepness = 1.0 / (variance + epsilon).sqrt();
            for (normal, x) in normal.iter_mut().zip(x) {
                *normal = (x - mean) * steepness;
            }
            for ((dscale, dy), normal) in dscale.iter_mut().zip(dy).zip(&*normal) {
                *dscale += dy * normal;
            }
            for (dbias, dy) in dbias.iter_mut().zip(dy) {
                *dbias += dy;
            }
            for ((slope, dy), scale) in dx.iter_mut().zip(dy).zip(scale) {
                *slope = dy * scale;
            }
            let mean = sum(dx, dx, |slope, _| slope) * share;
            let along = sum(dx, normal, |slope, normal| slope * normal) * share;
            for (slope, normal) in dx.iter_mut().zip(&*normal) {
                *slope = (*slope - mean - normal * along) * steepness;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Noise, Threads};

    /// The gradients in float64.
    fn expected(problem: &Problem, inputs: Inputs) -> [Vec<f64>; 3] {
        let (columns, wide) = (problem.columns, |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let scale = wide(inputs.scale);
        let [mut dx, mut dscale, mut dbias] = [Vec::new(), vec![0.0; columns], vec![0.0; columns]];
        for (x, dy) in inputs.x.chunks_exact(columns).zip(inputs.dy.chunks_exact(columns)) {
            let (x, dy) = (wide(x), wide(dy));
            let mean = |of: &dyn Fn(usize) -> f64| (0..columns).map(of).sum::<f64>() / columns as f64;
            let centre = mean(&|i| x[i]);
            let deviation = (mean(&|i| (x[i] - centre).powi(2)) + f64::from(problem.epsilon)).sqrt();
            let normal: Vec<f64> = x.iter().map(|x| (x - centre) / deviation).collect();
            let (slope, along) = (mean(&|i| dy[i] * scale[i]), mean(&|i| dy[i] * scale[i] * normal[i]));
            for i in 0..columns {
                dx.push((dy[i] * scale[i] - slope - normal[i] * along) / deviation);
                dscale[i] += dy[i] * normal[i];
                dbias[i] += dy[i];
            }
        }
        [dx, dscale, dbias]
    }

    #[test]
    fn gradients_are_those_of_float64() {
        for (rows, columns, centre) in
            [(1, 1, 0.0), (3, 7, 0.0), (50, 192, 0.0), (50, 192, 30.0), (5000, 33, 0.0), (2, 9000, 1.0), (0, 4, 0.0)]
        {
            let problem = Problem { rows, columns, epsilon: 1e-6 };
            let mut noise = Noise(rows as u64);
            let x: Vec<f32> = noise.elements::<f32>(rows * columns).iter().map(|x| x + centre).collect();
            let [scale, dy] = [columns, rows * columns].map(|len| noise.elements::<f32>(len));
            let inputs = Inputs { x: &x, scale: &scale, dy: &dy };
            let expected = expected(&problem, inputs);
            for isa in Isa::all() {
                let [mut dx, mut dscale, mut dbias] = [rows * columns, columns, columns].map(|len| vec![f32::NAN; len]);
                let outputs = Outputs { dx: &mut dx, dscale: &mut dscale, dbias: &mut dbias };
                let mut scratch = vec![f32::NAN; problem.scratch_len()];
                layer_norm_grad_on(isa, &problem, inputs, outputs, &mut scratch, &Threads(2)).unwrap();
                // Relative to the largest. A mean that is `centre` deviations away takes as many roundings of x with it.
                let tolerance = 2e-6 * f64::from(1.0 + centre);
                for (given, expected) in [dx, dscale, dbias].iter().zip(&expected) {
                    let largest = expected.iter().fold(1e-3, |largest: f64, x| largest.max(x.abs()));
                    for (&given, &expected) in given.iter().zip(expected) {
                        let off = (f64::from(given) - expected).abs() / largest;
                        assert!(off <= tolerance, "{isa:?}, {problem:?}: {given} for {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_pool() {
        let problem = Problem { rows: 700, columns: 20, epsilon: 1e-6 };
        let mut noise = Noise(1);
        let [x, scale, dy] = [14_000, 20, 14_000].map(|len| noise.elements::<f32>(len));
        let run = |threads: usize| {
            let [mut dx, mut dscale, mut dbias] = [14_000, 20, 20].map(|len| vec![0.0; len]);
            let outputs = Outputs { dx: &mut dx, dscale: &mut dscale, dbias: &mut dbias };
            let mut scratch = vec![0.0; problem.scratch_len()];
            let inputs = Inputs { x: &x, scale: &scale, dy: &dy };
            layer_norm_grad(&problem, inputs, outputs, &mut scratch, &Threads(threads)).unwrap();
            [dx, dscale, dbias]
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn other_shapes_are_refused() {
        let problem = Problem { rows: 2, columns: 3, epsilon: 1e-6 };
        let whole = [6, 3, 6, 6, 3, 3, problem.scratch_len()];
        let run = |lens: [usize; 7]| {
            let [x, scale, dy, mut dx, mut dscale, mut dbias, mut scratch] = lens.map(|len| vec![0.0; len]);
            let inputs = Inputs { x: &x, scale: &scale, dy: &dy };
            let outputs = Outputs { dx: &mut dx, dscale: &mut dscale, dbias: &mut dbias };
            layer_norm_grad(&problem, inputs, outputs, &mut scratch, &Threads(1)).is_ok()
        };
        assert!(run(whole));
        for wrong in 0..7 {
            let mut lens = whole;
            lens[wrong] -= 1;
            assert!(!run(lens), "{wrong}");
        }
    }
}

//! A step of AdamW on the CPU: everything is read once and written once.

use crate::cpu::{Error, Isa, Kernel, Pool, Simd, check_len, each};

/// The scalars of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    /// 1 − β₁.
    pub mean_rate: f32,
    /// 1 − β₂.
    pub variance_rate: f32,
    /// What keeps divisors from zero.
    pub epsilon: f32,
    /// What decay leaves of a parameter.
    pub kept: f32,
    /// Learning rate / (1 − β₁ᵗ).
    pub rate: f32,
    /// √(1 − β₂ᵗ).
    pub deviation: f32,
}

/// A parameter, its gradient and moments, all of one length.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// θ.
    pub parameter: &'a [f32],
    /// g.
    pub gradient: &'a [f32],
    /// m.
    pub mean: &'a [f32],
    /// v.
    pub variance: &'a [f32],
}

/// What they are after the step.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// θ.
    pub parameter: &'a mut [f32],
    /// m.
    pub mean: &'a mut [f32],
    /// v.
    pub variance: &'a mut [f32],
}

/// Takes one step. Rounds as the body does, operation by operation: results are the same on every machine.
///
/// # Errors
/// Where the slices are not of one length.
pub fn adam_w(step: &Step, inputs: Inputs, outputs: Outputs, pool: &dyn Pool) -> Result<(), Error> {
    // Entries that one task writes, of each output.
    const PART: usize = 16 << 10;
    let isa = Isa::best();
    let Inputs { parameter, gradient, mean, variance } = inputs;
    let len = parameter.len();
    for (name, slice) in [("gradient", gradient), ("mean", mean), ("variance", variance)] {
        check_len(name, slice.len(), &[len])?;
    }
    for (name, slice) in
        [("parameter_out", &outputs.parameter), ("mean_out", &outputs.mean), ("variance_out", &outputs.variance)]
    {
        check_len(name, slice.len(), &[len])?;
    }
    let read = parameter.chunks(PART).zip(gradient.chunks(PART)).zip(mean.chunks(PART).zip(variance.chunks(PART)));
    let Outputs { parameter, mean, variance } = outputs;
    let written = parameter.chunks_mut(PART).zip(mean.chunks_mut(PART).zip(variance.chunks_mut(PART)));
    let parts = read.zip(written).map(|(((parameter, gradient), (mean, variance)), to)| {
        let (to_parameter, (to_mean, to_variance)) = to;
        let outputs = Outputs { parameter: to_parameter, mean: to_mean, variance: to_variance };
        Part { step, inputs: Inputs { parameter, gradient, mean, variance }, outputs }
    });
    each(pool, parts, |part| isa.run(part));
    Ok(())
}

struct Part<'a> {
    step: &'a Step,
    inputs: Inputs<'a>,
    outputs: Outputs<'a>,
}

impl Kernel for Part<'_> {
    type Out = ();

    /// Without vectors of its own: the compiler makes them, of square roots and quotients too, and nothing is fused.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let &Step { mean_rate, variance_rate, epsilon, kept, rate, deviation } = self.step;
        let Self { inputs, outputs, .. } = self;
        let len = inputs.parameter.len();
        let [parameter, gradient, mean, variance] =
            [inputs.parameter, inputs.gradient, inputs.mean, inputs.variance].map(|slice| &slice[..len]);
        let (to_parameter, to_mean) = (&mut outputs.parameter[..len], &mut outputs.mean[..len]);
        let to_variance = &mut outputs.variance[..len];
        for i in 0..len {
            let g = gradient[i];
            let m = mean[i] + (g - mean[i]) * mean_rate;
            let v = variance[i] + (g * g - variance[i]) * variance_rate;
            let direction = m / (v.sqrt() / deviation + epsilon);
            to_parameter[i] = parameter[i] * kept - direction * rate;
            to_mean[i] = m;
            to_variance[i] = v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Noise, Threads};

    #[test]
    fn steps_are_those_of_float64() {
        let step =
            Step { mean_rate: 0.1, variance_rate: 0.001, epsilon: 1e-8, kept: 0.999, rate: 0.01, deviation: 0.3 };
        for len in [0, 1, 17, 40_000] {
            let mut noise = Noise(len as u64);
            let [parameter, gradient, mean] = [(); 3].map(|()| noise.elements::<f32>(len));
            let variance: Vec<f32> = noise.elements::<f32>(len).iter().map(|x| x * x).collect();
            let [mut to_parameter, mut to_mean, mut to_variance] = [(); 3].map(|()| vec![f32::NAN; len]);
            let inputs = Inputs { parameter: &parameter, gradient: &gradient, mean: &mean, variance: &variance };
            let outputs = Outputs { parameter: &mut to_parameter, mean: &mut to_mean, variance: &mut to_variance };
            adam_w(&step, inputs, outputs, &Threads(2)).unwrap();
            let wide = |x: f32| f64::from(x);
            for i in 0..len {
                let g = wide(gradient[i]);
                let m = wide(mean[i]) + (g - wide(mean[i])) * wide(step.mean_rate);
                let v = wide(variance[i]) + (g * g - wide(variance[i])) * wide(step.variance_rate);
                let divisor = v.sqrt() / wide(step.deviation) + wide(step.epsilon);
                let p = wide(parameter[i]) * wide(step.kept) - m / divisor * wide(step.rate);
                // A few roundings of numbers of at most one, the step relative to its size.
                let size = 1.0 + (m / divisor * wide(step.rate)).abs();
                assert!((wide(to_mean[i]) - m).abs() <= 3e-7);
                assert!((wide(to_variance[i]) - v).abs() <= 3e-7);
                assert!((wide(to_parameter[i]) - p).abs() <= 1e-6 * size, "{} for {p}", to_parameter[i]);
            }
        }
    }

    #[test]
    fn other_lengths_are_refused() {
        let step = Step { mean_rate: 0.1, variance_rate: 0.1, epsilon: 1e-8, kept: 1.0, rate: 0.1, deviation: 1.0 };
        for wrong in 0..7 {
            let room = |at: usize| vec![0.0; if at == wrong { 3 } else { 4 }];
            let [parameter, gradient, mean, variance] = [0, 1, 2, 3].map(room);
            let inputs = Inputs { parameter: &parameter, gradient: &gradient, mean: &mean, variance: &variance };
            let [mut parameter, mut mean, mut variance] = [4, 5, 6].map(room);
            let outputs = Outputs { parameter: &mut parameter, mean: &mut mean, variance: &mut variance };
            assert!(adam_w(&step, inputs, outputs, &Threads(1)).is_err(), "{wrong}");
        }
    }
}

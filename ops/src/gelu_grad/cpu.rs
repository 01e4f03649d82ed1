//! Gradients of the Gaussian error linear unit on the CPU: everything is read once and written once.

use std::f32::consts::LOG2_E;

use crate::cpu::{Error, Isa, Kernel, MAX_LANES, Pool, Simd, check_len, each, exp2};

/// Which unit it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// x · ½ (1 + erf(x / √2)).
    Exact,
    /// x · ½ (1 + tanh(√(2/π) (x + 0.044715 x³))).
    Tanh,
}

/// Writes dy times the derivative of the unit at `x` to `dx`.
///
/// # Errors
/// Where the slices are not of one length.
pub fn gelu_grad(form: Form, x: &[f32], dy: &[f32], dx: &mut [f32], pool: &dyn Pool) -> Result<(), Error> {
    gelu_grad_on(Isa::best(), form, x, dy, dx, pool)
}

/// [`gelu_grad`] on given instructions.
pub(crate) fn gelu_grad_on(
    isa: Isa,
    form: Form,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    pool: &dyn Pool,
) -> Result<(), Error> {
    // Entries that one task writes.
    const PART: usize = 16 << 10;
    check_len("dy", dy.len(), &[x.len()])?;
    check_len("dx", dx.len(), &[x.len()])?;
    let parts = x.chunks(PART).zip(dy.chunks(PART)).zip(dx.chunks_mut(PART));
    each(pool, parts, |((x, dy), dx)| match form {
        Form::Exact => isa.run(Part { derivative: Exact, x, dy, dx }),
        Form::Tanh => isa.run(Part { derivative: Tanh, x, dy, dx }),
    });
    Ok(())
}

/// A derivative in every lane. Not a closure: those are compiled apart, without the instructions of their caller.
trait Derivative {
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V;
}

struct Part<'a, D> {
    derivative: D,
    x: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
}

impl<D: Derivative> Kernel for Part<'_, D> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { derivative, x, dy, dx } = self;
        let (x, dy) = (x.chunks(S::LANES), dy.chunks(S::LANES));
        for ((x, dy), dx) in x.zip(dy).zip(dx.chunks_mut(S::LANES)) {
            if dx.len() == S::LANES {
                s.store(s.mul(s.load(dy), derivative.of(s, s.load(x))), dx);
                continue;
            }
            let [mut wide_x, mut wide_dy, mut wide_dx] = [[0.0; MAX_LANES]; 3];
            wide_x[..x.len()].copy_from_slice(x);
            wide_dy[..x.len()].copy_from_slice(dy);
            s.store(s.mul(s.load(&wide_dy), derivative.of(s, s.load(&wide_x))), &mut wide_dx);
            dx.copy_from_slice(&wide_dx[..dx.len()]);
        }
    }
}

/// Φ(x) + x · Φ′(x) with the normal distribution, to 3e-7.
///
/// Where x is negative it is e^(−x²/2) · (R(|x|) − |x| / √(2π)), with R = (1 − Φ(|x|)) · e^(x²/2); at −x it is what is left
/// to one. R is smooth in t = 1 / (1 + 0.3 |x|): the polynomial has the least relative error on [0, 14], 1.5e-7. Both parts
/// share the exponential, so that the tails are exact too.
struct Exact;

impl Derivative for Exact {
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        const POLYNOMIAL: [f32; 8] = [
            0.119_629_3,
            0.120_753_97,
            0.099_913_41,
            0.128_561_93,
            -0.053_684_242,
            0.206_354_19,
            -0.157_203_5,
            0.035_674_877,
        ];
        const PEAK: f32 = 0.398_942_3;
        // Beyond, the derivative is 0 or 1. An operand that is NaN comes second, and stays.
        let size = s.min(s.splat(14.0), s.max(s.sub(s.splat(0.0), x), x));
        let t = s.div(s.splat(1.0), s.fma(s.splat(0.3), size, s.splat(1.0)));
        let mut tail = s.splat(0.0);
        for factor in POLYNOMIAL.into_iter().rev() {
            tail = s.fma(tail, t, s.splat(factor));
        }
        let tail = s.sub(s.mul(tail, t), s.mul(size, s.splat(PEAK)));
        let bell = exp2(s, s.mul(s.mul(size, size), s.splat(-0.5 * LOG2_E)));
        let below = s.mul(bell, tail);
        s.where_greater(x, s.splat(0.0), s.sub(s.splat(1.0), below), below)
    }
}

/// Φ(x) + x · Φ′(x) with Φ(x) = ½ (1 + tanh u) = 1 / (1 + e^(−2u)), whose derivative by 2u is e^(−2u) · Φ².
struct Tanh;

impl Derivative for Tanh {
    #[inline(always)]
    fn of<S: Simd>(&self, s: S, x: S::V) -> S::V {
        const ROOT_2_OVER_PI: f32 = 0.797_884_6;
        const CUBIC: f32 = 0.044_715;
        // Beyond, the derivative is 0 or 1, and the exponential overflows. An operand that is NaN comes second, and stays.
        let x = s.max(s.splat(-9.9), s.min(s.splat(9.9), x));
        let square = s.mul(x, x);
        let u = s.mul(x, s.fma(square, s.splat(ROOT_2_OVER_PI * CUBIC), s.splat(ROOT_2_OVER_PI)));
        let power = exp2(s, s.mul(u, s.splat(-2.0 * LOG2_E)));
        let cumulative = s.div(s.splat(1.0), s.add(s.splat(1.0), power));
        let steep = s.fma(square, s.splat(6.0 * ROOT_2_OVER_PI * CUBIC), s.splat(2.0 * ROOT_2_OVER_PI));
        // In this order: the square of Φ alone would be below what float32 has.
        let density = s.mul(s.mul(s.mul(power, cumulative), cumulative), steep);
        s.fma(x, density, cumulative)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::Threads;

    /// erf in float64, by its series, or where that loses digits by its continued fraction.
    fn erf(x: f64) -> f64 {
        let size = x.abs();
        let value = if size < 3.0 {
            let (mut term, mut sum) = (size, size);
            for n in 1..100 {
                term *= -size * size / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let fraction = (1..=60).rev().fold(size, |fraction, n| size + f64::from(n) / 2.0 / fraction);
            1.0 - (-size * size).exp() / (fraction * std::f64::consts::PI.sqrt())
        };
        value.copysign(x)
    }

    fn expected(form: Form, x: f64) -> f64 {
        use std::f64::consts::{FRAC_1_SQRT_2, PI};
        match form {
            Form::Exact => 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2)) + x * (-x * x / 2.0).exp() / (2.0 * PI).sqrt(),
            Form::Tanh => {
                let root = (2.0 / PI).sqrt();
                let t = (root * (x + 0.044715 * x.powi(3))).tanh();
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * root * (1.0 + 3.0 * 0.044715 * x * x)
            }
        }
    }

    #[test]
    fn derivatives_are_exact_enough_everywhere() {
        let x: Vec<f32> = (-60_001..60_001).map(|i| i as f32 / 4000.0).collect();
        let dy = vec![1.0; x.len()];
        for (isa, form) in Isa::all().into_iter().flat_map(|isa| [(isa, Form::Exact), (isa, Form::Tanh)]) {
            let mut dx = vec![f32::NAN; x.len()];
            gelu_grad_on(isa, form, &x, &dy, &mut dx, &Threads(2)).unwrap();
            for (&x, dx) in x.iter().zip(dx) {
                // Derivatives are at most 1.13: a few roundings. Those of the exponent of base two, up to 20 where the
                // derivative is not 0 or 1 yet, count in full.
                let off = (f64::from(dx) - expected(form, x.into())).abs();
                assert!(off <= 1e-6, "{isa:?}, {form:?}: {off:e} off at {x}");
            }
        }
    }

    #[test]
    fn there_is_a_derivative_at_infinity_and_none_at_nan() {
        let x = [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, f32::NAN];
        for (isa, form) in Isa::all().into_iter().flat_map(|isa| [(isa, Form::Exact), (isa, Form::Tanh)]) {
            let mut dx = [0.0; 7];
            gelu_grad_on(isa, form, &x, &[1.0; 7], &mut dx, &Threads(1)).unwrap();
            for (dx, expected) in dx.into_iter().zip([1.0, 0.0, 1.0, 0.0, 0.5, 0.5]) {
                assert!((dx - expected).abs() <= 2e-7, "{isa:?}, {form:?}: {dx} for {expected}");
            }
            assert!(dx[6].is_nan(), "{isa:?}, {form:?}");
        }
    }

    #[test]
    fn other_lengths_are_refused() {
        let run = |x: usize, dy: usize, dx: usize| {
            gelu_grad(Form::Exact, &vec![0.0; x], &vec![0.0; dy], &mut vec![0.0; dx], &Threads(1)).is_ok()
        };
        assert_eq!([run(4, 4, 4), run(3, 4, 4), run(4, 3, 4), run(4, 4, 5)], [true, false, false, false]);
    }
}

use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact, rounding};
use crate::masked_softmax::EPSILON;

/// A problem with its inputs.
struct Case<T> {
    problem: Problem,
    scores: Vec<T>,
    mask: Vec<f32>,
    size: Vec<f32>,
}

impl<T: Element> Case<T> {
    fn new(batch: usize, heads: usize, queries: usize, keys: usize) -> Self {
        let mut noise = Noise((batch * 31 + queries * 7 + keys * 3) as u64);
        let scores = (0..batch * heads * queries * keys).map(|_| T::from_f32(8.0 * noise.signed())).collect();
        let mask = (0..batch * queries * keys).map(|_| f32::from(noise.below(3) > 0)).collect();
        let size = noise.sizes(batch * keys);
        Self { problem: Problem { batch, heads, queries, keys, eps: EPSILON }, scores, mask, size }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs { scores: &self.scores, mask: &self.mask, size: &self.size }
    }

    fn run(&self, isa: Isa, workers: usize, pool: &dyn Pool) -> Vec<T> {
        let mut weights = vec![T::from_f32(f32::NAN); self.scores.len()];
        let mut scratch = vec![f32::NAN; self.problem.scratch_len(workers)];
        masked_softmax_on(isa, &self.problem, self.inputs(), &mut weights, workers, &mut scratch, pool).unwrap();
        weights
    }

    /// By the definition.
    fn expected(&self) -> Vec<f64> {
        let Problem { heads, queries, keys, eps, .. } = self.problem;
        let mut weights = Vec::new();
        for (row, scores) in self.scores.chunks(keys).enumerate() {
            let (image, query) = (row / queries / heads, row % queries);
            let mask = &self.mask[(image * queries + query) * keys..][..keys];
            let size = &self.size[image * keys..][..keys];
            let sized: Vec<f64> = scores.iter().zip(size).map(|(&l, &s)| exact(l) + f64::from(s).ln()).collect();
            let peak = sized.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let open: Vec<f64> = sized.iter().zip(mask).map(|(l, &open)| (l - peak).exp() * f64::from(open)).collect();
            let total: f64 = open.iter().sum();
            weights.extend(open.iter().map(|e| (e + f64::from(eps) / keys as f64) / (total + f64::from(eps))));
        }
        weights
    }

    fn check(&self) {
        let expected = self.expected();
        // What a type rounds to zero: float16 has nothing below 2⁻²⁴, and the floor of closed connections is there.
        let lost = 2f32.powi(-25);
        let lost = if T::from_f32(lost).to_f32() == 0.0 { f64::from(lost) } else { 0.0 };
        for (isa, (workers, threads)) in
            Isa::all().into_iter().flat_map(|isa| [(1, 1), (3, 2), (1000, 2)].map(|w| (isa, w)))
        {
            for (weight, &expected) in self.run(isa, workers, &Threads(threads)).into_iter().zip(&expected) {
                // Relative to each weight, however small: in float32 an exponent of -23 is 1.4e-6 off, and a sum of
                // thousands another 1e-6.
                let error = (exact(weight) - expected).abs();
                let allowed = rounding::<T>(4e-6) * expected + lost;
                assert!(error <= allowed, "{isa:?}, {:?}: {} for {expected}", self.problem, exact(weight));
            }
        }
    }
}

#[test]
fn weights_are_what_they_say() {
    for (heads, queries, keys) in [
        (1, 1, 1),
        (2, 3, 5),
        (3, 7, 8),
        (1, 6, 16),
        (2, 13, 33),
        (2, 50, 50),
        (1, 31, 66),
        (2, 197, 197),
        (1, 2, 4097),
    ] {
        Case::<f32>::new(2, heads, queries, keys).check();
        Case::<f16>::new(2, heads, queries, keys).check();
        Case::<bf16>::new(2, heads, queries, keys).check();
    }
}

#[test]
fn closed_connections_share_the_floor() {
    let mut case = Case::<f32>::new(1, 2, 9, 21);
    // One row has no open connection, one is closed where its largest score is.
    case.mask[21..42].fill(0.0);
    case.scores[2 * 21] = 60.0;
    case.mask[2 * 21] = 0.0;
    case.check();
    for isa in Isa::all() {
        let weights = case.run(isa, 1, &Serial);
        for (row, weights) in weights.chunks(21).enumerate() {
            let mask = &case.mask[row % 9 * 21..][..21];
            let closed: Vec<f32> =
                weights.iter().zip(mask).filter(|(_, open)| **open == 0.0).map(|(&w, _)| w).collect();
            // To the bit: `ConnectionMask` compares them.
            assert!(closed.iter().all(|&weight| weight == closed[0] && weight > 0.0), "{isa:?}: {closed:?}");
        }
        assert!(weights[21..42].iter().all(|weight| (weight * 21.0 - 1.0).abs() < 1e-6), "{isa:?}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for factor in [1e3, 1e18, 1e37] {
        let mut case = Case::<f32>::new(1, 2, 20, 30);
        case.scores.iter_mut().for_each(|score| *score *= factor);
        for isa in Isa::all() {
            let weights = case.run(isa, 1, &Serial);
            assert!(weights.iter().all(|weight| (0.0..=1.0).contains(weight)), "{isa:?}");
            assert!(weights.chunks(30).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5), "{isa:?}");
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for (value, ruins) in [(f32::NAN, true), (f32::INFINITY, true), (f32::NEG_INFINITY, false)] {
        for column in [0, 16, 29] {
            let mut case = Case::<f32>::new(1, 1, 20, 30);
            case.scores[3 * 30 + column] = value;
            // Open or closed.
            for open in [0.0, 1.0] {
                case.mask[3 * 30 + column] = open;
                for isa in Isa::all() {
                    for (query, row) in case.run(isa, 1, &Serial).chunks(30).enumerate() {
                        let expected = ruins && query == 3;
                        assert!(row.iter().all(|w| w.is_nan() == expected), "{isa:?}, {value} in {column}");
                    }
                }
            }
        }
    }
    let mut case = Case::<f32>::new(1, 1, 20, 30);
    case.scores[3 * 30..4 * 30].fill(f32::NEG_INFINITY);
    for isa in Isa::all() {
        let row = &case.run(isa, 1, &Serial)[3 * 30..4 * 30];
        assert!(row.iter().all(|weight| (weight * 30.0 - 1.0).abs() < 1e-6), "{isa:?}: {row:?}");
    }
}

#[test]
fn arguments_are_checked() {
    let case = Case::<f32>::new(2, 2, 5, 6);
    let refused = |problem: Problem, inputs: Inputs<f32>, weights: usize, workers: usize, scratch: usize| {
        let (mut weights, mut scratch) = (vec![0.0; weights], vec![0.0; scratch]);
        masked_softmax(&problem, inputs, &mut weights, workers, &mut scratch, &Serial).is_err()
    };
    let (problem, inputs, len) = (case.problem, case.inputs(), case.problem.scratch_len(2));
    let count = 2 * 2 * 5 * 6;
    assert!(!refused(problem, inputs, count, 2, len));
    assert!(refused(problem, inputs, count + 1, 2, len));
    assert!(refused(problem, inputs, count, 0, len));
    assert!(refused(problem, inputs, count, 2, len - 1));
    assert!(refused(problem, Inputs { scores: &case.scores[1..], ..inputs }, count, 2, len));
    assert!(refused(problem, Inputs { mask: &case.mask[1..], ..inputs }, count, 2, len));
    assert!(refused(problem, Inputs { size: &case.size[1..], ..inputs }, count, 2, len));
    assert!(refused(Problem { batch: usize::MAX, ..problem }, inputs, count, 2, len));
    for eps in [-1e-6, f32::NAN, f32::INFINITY] {
        assert!(refused(Problem { eps, ..problem }, inputs, count, 2, len), "{eps}");
    }
    let endless = Problem { keys: usize::MAX, ..problem };
    assert_eq!(endless.scratch_len(usize::MAX), usize::MAX);
    assert!(refused(endless, inputs, count, 2, len));
    let none = Inputs { scores: &[], mask: &[], size: &[] };
    assert!(!refused(Problem { keys: 0, ..problem }, none, 0, 1, 0));
    assert!(!refused(Problem { batch: 0, ..problem }, none, 0, 1, 0));
}

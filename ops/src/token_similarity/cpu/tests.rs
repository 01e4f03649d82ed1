use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact};

const MEASURES: [Measure; 2] = [Measure::Cosine, Measure::Manhattan];

fn run<T: Element>(isa: Isa, measure: Measure, problem: &Problem, x: &[T], pool: &dyn Pool) -> Vec<f32> {
    let candidates = problem.candidates().unwrap();
    let mut closeness = vec![f32::NAN; problem.batch * candidates * candidates];
    let mut scratch = vec![f32::NAN; problem.scratch_len()];
    token_similarity_on(isa, measure, problem, x, &mut closeness, &mut scratch, pool).unwrap();
    closeness
}

/// In float64.
fn expected<T: Element>(measure: Measure, problem: &Problem, x: &[T]) -> Vec<f64> {
    let &Problem { batch, tokens, channels, protect, suffix, sign } = problem;
    let unit = |image: usize, token: usize| -> Vec<f64> {
        let row: Vec<f64> = x[(image * tokens + token) * channels..][..channels].iter().map(|&x| exact(x)).collect();
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
        row.into_iter().map(|x| x / norm).collect()
    };
    let mut all = Vec::new();
    for image in 0..batch {
        let units: Vec<_> = (protect..tokens - suffix).map(|token| unit(image, token)).collect();
        for (a, b) in units.iter().flat_map(|a| units.iter().map(move |b| (a, b))) {
            let term = |(a, b): (&f64, &f64)| if measure == Measure::Cosine { a * b } else { (a - b).abs() };
            all.push(a.iter().zip(b).map(term).sum::<f64>() * f64::from(sign));
        }
    }
    all
}

/// Candidates around every edge of a tile and of a panel.
fn problems() -> impl Iterator<Item = Problem> {
    let extents = [(1, 1), (2, 3), (7, 16), (8, 5), (24, 7), (33, 33), (50, 64), (65, 2), (196, 40)];
    extents.into_iter().zip(0..).flat_map(|((candidates, channels), i)| {
        [(0, 0), (1, 0), (2, 3)].map(|(protect, suffix)| Problem {
            batch: 1 + i % 3,
            tokens: candidates + protect + suffix,
            channels,
            protect,
            suffix,
            sign: [1.0, -1.0][i % 2],
        })
    })
}

fn check<T: Element>(measure: Measure, problem: Problem, x: &[T]) {
    let expected = expected(measure, &problem, x);
    for (isa, threads) in Isa::all().into_iter().flat_map(|isa| [(isa, 1), (isa, 2)]) {
        let closeness = run(isa, measure, &problem, x, &Threads(threads));
        assert_eq!(closeness.len(), expected.len());
        for (closeness, expected) in closeness.into_iter().zip(&expected) {
            // Some roundings of sums that are at most 1, or of at most √C terms' worth.
            let allowed = 1e-6 * (problem.channels as f64).sqrt();
            assert!((f64::from(closeness) - expected).abs() <= allowed, "{isa:?}, {problem:?}: {closeness} {expected}");
        }
    }
}

#[test]
fn closeness_is_that_of_float64() {
    for (problem, measure) in problems().flat_map(|problem| MEASURES.map(|measure| (problem, measure))) {
        let mut noise = Noise(problem.tokens as u64);
        let len = problem.batch * problem.tokens * problem.channels;
        let mut x: Vec<f32> = noise.elements(len);
        // A row of zeros is one.
        x[problem.protect * problem.channels..][..problem.channels].fill(0.0);
        check::<f32>(measure, problem, &x);
        check::<f16>(measure, problem, &noise.elements(len));
        check::<bf16>(measure, problem, &noise.elements(len));
    }
}

#[test]
fn equal_tokens_are_equally_close() {
    for (problem, measure) in problems().flat_map(|problem| MEASURES.map(|measure| (problem, measure))) {
        let candidates = problem.candidates().unwrap();
        let rows: Vec<f32> = Noise(3).elements(2 * problem.channels);
        // Two rows in turn: closeness depends on nothing but which of them.
        let x =
            rows.repeat(problem.batch * problem.tokens)[..problem.batch * problem.tokens * problem.channels].to_vec();
        let problem = Problem { batch: 1, ..problem };
        let x = &x[..problem.tokens * problem.channels];
        for isa in Isa::all() {
            let closeness = run(isa, measure, &problem, x, &Serial);
            for (at, own) in closeness.iter().enumerate() {
                let (row, column) = (at / candidates % 2, at % candidates % 2);
                assert_eq!(own.to_bits(), closeness[row * candidates + column].to_bits(), "{isa:?}, {problem:?}");
                assert_eq!(own.to_bits(), closeness[at % candidates * candidates + at / candidates].to_bits());
            }
        }
    }
}

#[test]
fn what_is_no_number_is_the_largest() {
    let problem = Problem { batch: 1, tokens: 37, channels: 5, protect: 1, suffix: 1, sign: -1.0 };
    for (measure, value) in MEASURES
        .into_iter()
        .flat_map(|measure| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|value| (measure, value)))
    {
        let mut x: Vec<f32> = Noise(1).elements(37 * 5);
        x[7 * 5 + 2] = value;
        for isa in Isa::all() {
            for (at, closeness) in run(isa, measure, &problem, &x, &Serial).into_iter().enumerate() {
                let undefined = at / 35 == 6 || at % 35 == 6;
                assert_eq!(closeness == f32::MAX, undefined, "{isa:?}: {closeness} at {at}");
                assert!(closeness.is_finite());
            }
        }
    }
    // A length beyond all numbers makes a row of zeros.
    let x = [f32::MAX; 37 * 5];
    assert!(run(Isa::best(), Measure::Cosine, &problem, &x, &Serial).into_iter().all(|closeness| closeness == 0.0));
}

#[test]
fn arguments_are_checked() {
    let problem = Problem { batch: 2, tokens: 9, channels: 3, protect: 1, suffix: 2, sign: 1.0 };
    let len = problem.scratch_len();
    let run = |problem: &Problem, x: usize, closeness: usize, scratch: usize| {
        let (x, mut closeness, mut scratch) = (vec![1.0f32; x], vec![0.0; closeness], vec![0.0; scratch]);
        token_similarity(Measure::Cosine, problem, &x, &mut closeness, &mut scratch, &Serial).is_ok()
    };
    assert!(run(&problem, 54, 72, len));
    assert!(!run(&problem, 53, 72, len) && !run(&problem, 54, 71, len) && !run(&problem, 54, 72, len - 1));
    for problem in [
        Problem { protect: 8, ..problem },
        Problem { suffix: usize::MAX, ..problem },
        Problem { protect: usize::MAX, ..problem },
        Problem { tokens: usize::MAX, ..problem },
        Problem { batch: usize::MAX, ..problem },
        Problem { channels: usize::MAX, ..problem },
    ] {
        assert!(!run(&problem, 54, 72, len), "{problem:?}");
    }
    // Nothing is close to nothing; without channels all are the same.
    assert!(run(&Problem { batch: 0, ..problem }, 0, 0, 0));
    assert!(run(&Problem { batch: 0, tokens: usize::MAX, ..problem }, 0, 0, 0));
    assert!(run(&Problem { tokens: 3, ..problem }, 18, 0, 0));
    assert!(run(&Problem { channels: 0, ..problem }, 0, 72, 0));
}

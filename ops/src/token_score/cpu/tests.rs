use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact};

/// A problem with its inputs.
struct Case<T> {
    problem: Problem,
    q: Vec<T>,
    k: Vec<T>,
    size: Vec<f32>,
}

impl<T: Element> Case<T> {
    /// Each operand has channels before and after its heads.
    fn new(batch: usize, heads: usize, queries: usize, keys: usize, head_dim: usize, first: usize) -> Self {
        let mut noise = Noise((batch * 31 + queries * 7 + keys * 3 + head_dim) as u64);
        let window = |at, after| Heads { width: at + heads * head_dim + after, at, heads, head_dim };
        let problem = Problem { batch, queries, keys, q: window(0, 3), k: window(5, 1), scale: 0.7, first };
        Self {
            q: noise.elements(batch * queries * problem.q.width),
            k: noise.elements(batch * keys * problem.k.width),
            size: noise.sizes(batch * keys),
            problem,
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs { q: &self.q, k: &self.k, size: &self.size }
    }

    fn run(&self, isa: Isa, workers: usize, pool: &dyn Pool) -> Vec<f32> {
        let mut score = vec![f32::NAN; self.problem.batch * self.problem.keys];
        let mut scratch = vec![f32::NAN; self.problem.scratch_len(workers)];
        token_score_on(isa, &self.problem, self.inputs(), &mut score, workers, &mut scratch, pool).unwrap();
        score
    }

    /// By the definition.
    fn expected(&self) -> Vec<f64> {
        let Problem { batch, queries, keys, q, k, scale, first } = self.problem;
        let chosen = first.min(queries);
        let mut score = vec![0.0; batch * keys];
        for (image, score) in score.chunks_exact_mut(keys).enumerate() {
            for (head, query) in (0..q.heads).flat_map(|head| (0..chosen).map(move |query| (head, query))) {
                let query = q.of(&self.q, image * queries + query, head);
                let weights: Vec<f64> = (image * keys..(image + 1) * keys)
                    .map(|key| {
                        let key_row = k.of(&self.k, key, head);
                        let dot: f64 = query.iter().zip(key_row).map(|(&a, &b)| exact(a) * exact(b)).sum();
                        (dot * f64::from(scale)).exp() * f64::from(self.size[key])
                    })
                    .collect();
                let total: f64 = weights.iter().sum::<f64>() * (q.heads * chosen) as f64;
                score.iter_mut().zip(weights).for_each(|(score, weight)| *score += weight / total);
            }
        }
        score
    }

    fn check(&self) {
        // Operands are what they are in any type, scores float32: some roundings of that, relative to the largest.
        const TOLERANCE: f64 = 2e-6;
        let expected = self.expected();
        let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(*x));
        for isa in Isa::all() {
            let score = self.run(isa, 1, &Serial);
            for (score, expected) in score.iter().zip(&expected) {
                let error = (f64::from(*score) - expected).abs() / largest;
                assert!(error <= TOLERANCE, "{isa:?}, {:?}: {score} for {expected}", self.problem);
            }
            for (workers, threads) in [(3, 2), (50, 3)] {
                let other = self.run(isa, workers, &Threads(threads));
                assert!(other == score, "{isa:?}, {:?}: {workers} workers make a difference", self.problem);
            }
        }
    }
}

#[test]
fn scores_are_what_they_say() {
    for (heads, queries, keys, head_dim) in [
        (1, 1, 1, 1),
        (2, 1, 7, 5),
        (3, 7, 1, 8),
        (1, 6, 16, 32),
        (2, 13, 33, 48),
        (2, 49, 50, 72),
        (3, 25, 17, 96),
        (2, 197, 197, 64),
        (1, 60, 577, 16),
        (1, 5, 4097, 8),
    ] {
        for first in [1, 2, 50, usize::MAX] {
            Case::<f32>::new(2, heads, queries, keys, head_dim, first).check();
        }
        Case::<f16>::new(3, heads, queries, keys, head_dim, 1).check();
        Case::<bf16>::new(1, heads, queries, keys, head_dim, usize::MAX).check();
    }
}

#[test]
fn what_is_received_adds_up_to_one() {
    for first in [1, usize::MAX] {
        let case = Case::<f32>::new(1, 3, 1000, 1000, 16, first);
        let sum: f64 = case.run(Isa::best(), 1, &Serial).into_iter().map(f64::from).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}

#[test]
fn scores_far_from_zero_count() {
    // The score of the last key fills its panel; the largest decides what overflows.
    for factor in [1e3, -1e3] {
        let mut case = Case::<f32>::new(1, 2, 3, 11, 4, usize::MAX);
        case.q.fill(factor);
        case.k.fill(100.0);
        case.size.fill(1.0);
        for isa in Isa::all() {
            assert!(case.run(isa, 1, &Serial).into_iter().all(|score| (score - 1.0 / 11.0).abs() < 1e-7), "{isa:?}");
        }
    }
}

#[test]
fn queries_that_are_not_chosen_do_not_count() {
    let mut case = Case::<f32>::new(2, 2, 9, 20, 8, 3);
    let expected = case.run(Isa::best(), 1, &Serial);
    let row = case.problem.q.width;
    for image in case.q.chunks_exact_mut(9 * row) {
        image[3 * row..].fill(f32::NAN);
    }
    assert_eq!(case.run(Isa::best(), 1, &Serial), expected);
}

#[test]
fn nan_stays_in_its_image() {
    let mut case = Case::<f32>::new(2, 2, 9, 20, 8, 3);
    case.k[2 * case.problem.k.width + 5] = f32::NAN;
    for isa in Isa::all() {
        let score = case.run(isa, 1, &Serial);
        assert!(score[..20].iter().all(|score| score.is_nan()) && score[20..].iter().all(|score| score.is_finite()));
    }
}

#[test]
fn arguments_are_checked() {
    let case = Case::<f32>::new(2, 2, 5, 6, 4, 1);
    let refused = |problem: Problem, inputs: Inputs<f32>, score: usize, workers: usize, scratch: usize| {
        let (mut score, mut scratch) = (vec![0.0; score], vec![0.0; scratch]);
        token_score(&problem, inputs, &mut score, workers, &mut scratch, &Serial).is_err()
    };
    let (problem, inputs, len) = (case.problem, case.inputs(), case.problem.scratch_len(1));
    assert!(!refused(problem, inputs, 12, 1, len));
    assert!(refused(problem, inputs, 11, 1, len));
    assert!(refused(problem, inputs, 12, 0, len));
    assert!(refused(problem, inputs, 12, 1, len - 1));
    assert!(refused(problem, inputs, 12, 2, len));
    assert!(refused(problem, Inputs { q: &case.q[1..], ..inputs }, 12, 1, len));
    assert!(refused(problem, Inputs { k: &case.k[1..], ..inputs }, 12, 1, len));
    assert!(refused(problem, Inputs { size: &[], ..inputs }, 12, 1, len));
    assert!(refused(Problem { first: 0, ..problem }, inputs, 12, 1, len));
    assert!(refused(Problem { batch: usize::MAX, ..problem }, inputs, 12, 1, len));
    for q in [
        Heads { at: 4, ..problem.q },
        Heads { at: usize::MAX, ..problem.q },
        Heads { heads: 1, ..problem.q },
        Heads { heads: 0, ..problem.q },
        Heads { head_dim: 0, ..problem.q },
    ] {
        assert!(refused(Problem { q, ..problem }, inputs, 12, 1, len), "{q:?}");
    }
    let wide = Heads { head_dim: usize::MAX / 64, ..problem.q };
    assert_eq!(Problem { q: wide, k: wide, ..problem }.scratch_len(1), 0);
    let endless = Problem { queries: usize::MAX, keys: usize::MAX, ..problem };
    assert_eq!(endless.scratch_len(usize::MAX), usize::MAX);
    assert!(refused(endless, inputs, 12, 1, len));
    // Nothing receives anything, and no one gives anything.
    let none = Inputs { k: &[], size: &[], ..inputs };
    assert!(!refused(Problem { keys: 0, ..problem }, none, 0, 1, len));
    assert!(!refused(Problem { batch: 0, ..problem }, Inputs { q: &[], ..none }, 0, 1, len));
    assert!(refused(Problem { queries: 0, ..problem }, Inputs { q: &[], ..inputs }, 12, 1, len));
}

use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact, rounding};

/// A problem with its inputs.
struct Case<T> {
    problem: Problem,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    size: Option<Vec<f32>>,
}

impl<T: Element> Case<T> {
    /// Each operand has channels before and after its heads.
    fn new(batch: usize, heads: usize, queries: usize, keys: usize, head_dim: usize, sized: bool) -> Self {
        let mut noise = Noise((batch * 31 + queries * 7 + keys * 3 + head_dim) as u64);
        let window = |at, after| Heads { width: at + heads * head_dim + after, at, heads, head_dim };
        let problem = Problem { batch, queries, keys, q: window(0, 3), k: window(5, 0), v: window(2, 1), scale: 0.7 };
        Self {
            q: noise.elements(batch * queries * problem.q.width),
            k: noise.elements(batch * keys * problem.k.width),
            v: noise.elements(batch * keys * problem.v.width),
            size: sized.then(|| noise.sizes(batch * keys)),
            problem,
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs { q: &self.q, k: &self.k, v: &self.v, size: self.size.as_deref() }
    }

    fn run(&self, isa: Isa, workers: usize, pool: &dyn Pool) -> Vec<T> {
        let Problem { batch, queries, q, .. } = self.problem;
        let mut y = vec![T::from_f32(f32::NAN); batch * queries * q.heads * q.head_dim];
        let mut scratch = vec![f32::NAN; self.problem.scratch_len(workers)];
        attention_on(isa, &self.problem, self.inputs(), &mut y, workers, &mut scratch, pool).unwrap();
        y
    }

    /// By the definition.
    fn expected(&self) -> Vec<f64> {
        let Problem { batch, queries, keys, q, k, v, scale } = self.problem;
        let mut y = Vec::new();
        for (image, query) in (0..batch).flat_map(|image| (0..queries).map(move |query| (image, query))) {
            for head in 0..q.heads {
                let query = q.of(&self.q, image * queries + query, head);
                let scores: Vec<f64> = (image * keys..(image + 1) * keys)
                    .map(|key| {
                        let key_row = k.of(&self.k, key, head);
                        let dot: f64 = query.iter().zip(key_row).map(|(&a, &b)| exact(a) * exact(b)).sum();
                        dot * f64::from(scale) + self.size.as_ref().map_or(0.0, |size| f64::from(size[key]).ln())
                    })
                    .collect();
                let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - peak).exp()).sum();
                y.extend((0..q.head_dim).map(|channel| {
                    let value = |key| exact(v.of(&self.v, image * keys + key, head)[channel]);
                    scores.iter().enumerate().map(|(key, score)| (score - peak).exp() * value(key)).sum::<f64>() / total
                }));
            }
        }
        y
    }

    fn check(&self) {
        let expected = self.expected();
        let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        for (isa, (workers, threads)) in
            Isa::all().into_iter().flat_map(|isa| [(1, 1), (3, 2), (50, 2)].map(|w| (isa, w)))
        {
            for (y, expected) in self.run(isa, workers, &Threads(threads)).into_iter().zip(&expected) {
                let error = (exact(y) - expected).abs() / largest;
                assert!(error <= rounding::<T>(2e-6), "{isa:?}, {:?}: {y} for {expected}", self.problem, y = exact(y));
            }
        }
    }
}

#[test]
fn attention_is_what_it_says() {
    for (heads, queries, keys, head_dim) in [
        (1, 1, 1, 1),
        (2, 1, 7, 5),
        (3, 7, 1, 8),
        (1, 6, 16, 32),
        (2, 13, 33, 48),
        (2, 50, 49, 64),
        (2, 49, 50, 72),
        (1, 31, 66, 80),
        (3, 25, 17, 96),
        (1, 97, 12, 128),
        (2, 197, 197, 64),
        (1, 60, 577, 16),
        (1, 5, 4097, 8),
    ] {
        Case::<f32>::new(2, heads, queries, keys, head_dim, true).check();
        Case::<f32>::new(1, heads, queries, keys, head_dim, false).check();
        Case::<f16>::new(1, heads, queries, keys, head_dim, true).check();
        Case::<bf16>::new(1, heads, queries, keys, head_dim, true).check();
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for factor in [1.0, 1e3, 1e6, 1e18] {
        let mut case = Case::<f32>::new(1, 2, 20, 30, 16, true);
        case.q.iter_mut().for_each(|x| *x *= factor);
        for isa in Isa::all() {
            assert!(case.run(isa, 1, &Serial).into_iter().all(|y| y.abs() <= 1.0), "{isa:?}");
        }
    }
}

#[test]
fn scores_far_below_zero_count() {
    // One direction for all keys, and queries against it: all that is larger is what fills panels.
    let mut case = Case::<f32>::new(1, 1, 9, 11, 4, false);
    case.q.fill(-100.0);
    case.k.fill(100.0);
    case.check();
}

#[test]
fn nan_stays_in_its_row() {
    let mut case = Case::<f32>::new(1, 1, 20, 30, 8, false);
    case.q[3 * case.problem.q.width] = f32::NAN;
    for isa in Isa::all() {
        let y = case.run(isa, 1, &Serial);
        for (query, row) in y.chunks(8).enumerate() {
            assert!(row.iter().all(|y| y.is_nan() == (query == 3)), "{isa:?}");
        }
    }
}

#[test]
fn arguments_are_checked() {
    let case = Case::<f32>::new(2, 2, 5, 6, 4, true);
    let refused = |problem: Problem, inputs: Inputs<f32>, y: usize, workers: usize, scratch: usize| {
        let (mut y, mut scratch) = (vec![0.0; y], vec![0.0; scratch]);
        attention_on(Isa::best(), &problem, inputs, &mut y, workers, &mut scratch, &Serial).is_err()
    };
    let (problem, inputs, len) = (case.problem, case.inputs(), case.problem.scratch_len(1));
    let y = 2 * 5 * 8;
    assert!(!refused(problem, inputs, y, 1, len));
    assert!(refused(problem, inputs, y + 1, 1, len));
    assert!(refused(problem, inputs, y, 0, len));
    assert!(refused(problem, inputs, y, 1, len - 1));
    let wide = Heads { head_dim: usize::MAX / 64, ..problem.q };
    assert_eq!(Problem { q: wide, k: wide, v: wide, ..problem }.scratch_len(1), 0);
    assert!(refused(problem, inputs, y, 2, len));
    assert!(refused(problem, Inputs { q: &case.q[1..], ..inputs }, y, 1, len));
    assert!(refused(problem, Inputs { size: Some(&[]), ..inputs }, y, 1, len));
    assert!(refused(Problem { batch: usize::MAX, ..problem }, inputs, y, 1, len));
    for q in [
        Heads { at: 4, ..problem.q },
        Heads { at: usize::MAX, ..problem.q },
        Heads { heads: 1, ..problem.q },
        Heads { heads: 0, ..problem.q },
        Heads { head_dim: 0, ..problem.q },
    ] {
        assert!(refused(Problem { q, ..problem }, inputs, y, 1, len), "{q:?}");
    }
    let endless = Problem { queries: usize::MAX, keys: usize::MAX, ..problem };
    assert_eq!(endless.scratch_len(usize::MAX), usize::MAX);
    assert!(refused(endless, inputs, y, 1, len));
    let none = Inputs { k: &[], v: &[], size: None, ..inputs };
    assert!(refused(Problem { keys: 0, ..problem }, none, y, 1, len));
    assert!(!refused(Problem { queries: 0, keys: 0, ..problem }, Inputs { q: &[], ..none }, 0, 1, len));
    assert!(!refused(Problem { batch: 0, ..problem }, Inputs { q: &[], ..none }, 0, 1, len));
}

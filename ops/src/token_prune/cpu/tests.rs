use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact, rounding};

struct Case<T> {
    problem: Problem,
    x: Vec<T>,
    score: Vec<f32>,
    size: Vec<f32>,
}

/// What comes out, for all images.
#[derive(Clone, Default)]
struct Pruned<T> {
    y: Vec<T>,
    size: Vec<f32>,
    anchor: Vec<i64>,
    assign: Vec<i64>,
}

impl<T: Element> Case<T> {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let Problem { batch, tokens, channels, .. } = problem;
        Self {
            problem,
            x: noise.elements(batch * tokens * channels),
            score: noise.elements(batch * tokens),
            size: noise.sizes(batch * tokens),
        }
    }

    fn run(&self, pool: &dyn Pool) -> Pruned<T> {
        let Problem { batch, tokens, channels, .. } = self.problem;
        let slots = self.problem.slots().expect("a sound problem");
        let mut pruned = Pruned {
            y: vec![T::from_f32(f32::NAN); batch * slots * channels],
            size: vec![f32::NAN; batch * slots],
            anchor: vec![-7; batch * slots],
            assign: vec![-7; batch * tokens],
        };
        let inputs = Inputs { x: &self.x, score: &self.score, size: &self.size };
        let outputs = Outputs {
            y: &mut pruned.y,
            size: &mut pruned.size,
            anchor: &mut pruned.anchor,
            assign: &mut pruned.assign,
        };
        token_prune(&self.problem, inputs, outputs, pool).unwrap();
        pruned
    }

    /// By the definition.
    fn expected(&self) -> Pruned<f64> {
        let Problem { batch, tokens, channels, keep, protect, suffix, fuse } = self.problem;
        let mut all = Pruned::default();
        for image in 0..batch {
            let score = &self.score[image * tokens..][..tokens];
            let key = |token: usize| if score[token].is_nan() { f32::INFINITY } else { score[token] };
            let mut order: Vec<usize> = (protect..tokens - suffix).collect();
            // Stable: of equals, the lowest position first.
            order.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).unwrap());
            let mut dropped = order.split_off(keep);
            dropped.sort();
            let mut slots: Vec<Option<usize>> = (0..protect).chain(order).map(Some).collect();
            let extra = slots.len();
            let fuses = fuse && !dropped.is_empty();
            slots.extend(fuses.then_some(None));
            slots.extend((tokens - suffix..tokens).map(Some));

            let first = all.assign.len();
            all.assign.extend((0..tokens).map(|_| if fuses { extra as i64 } else { -1 }));
            for (slot, token) in slots.into_iter().enumerate() {
                match token {
                    Some(token) => {
                        all.assign[first + token] = slot as i64;
                        all.anchor.push(token as i64);
                        all.size.push(self.size[image * tokens + token]);
                    }
                    None => {
                        all.anchor.push(-1);
                        all.size.push(1.0);
                    }
                }
                let row = |token: usize| self.x[(image * tokens + token) * channels..][..channels].iter();
                match token {
                    Some(token) => all.y.extend(row(token).map(|&x| exact(x))),
                    None => {
                        let mut sum = vec![0.0; channels];
                        for &token in &dropped {
                            let weight = f64::from(score[token]);
                            sum.iter_mut().zip(row(token)).for_each(|(sum, &x)| *sum += weight * exact(x));
                        }
                        all.y.extend(sum);
                    }
                }
            }
        }
        all
    }

    fn check(&self) {
        let Problem { channels, .. } = self.problem;
        let expected = self.expected();
        // Of sums of many tokens, relative to the largest that a sum of so many may be.
        let most = self.problem.dropped().unwrap_or(0).max(1) as f64;
        for threads in [1, 2] {
            let pruned = self.run(&Threads(threads));
            let case = format!("{:?}", self.problem);
            assert_eq!(pruned.anchor, expected.anchor, "{case}");
            assert_eq!(pruned.assign, expected.assign, "{case}");
            assert_eq!(pruned.size, expected.size, "{case}");
            for (i, (&y, &expected)) in pruned.y.iter().zip(&expected.y).enumerate() {
                let copied = pruned.anchor[i / channels] != NONE;
                let tolerance = if copied { 0.0 } else { rounding::<T>(1e-6) * most };
                let y = exact(y);
                assert!(
                    (y - expected).abs() <= tolerance || y.is_nan() && expected.is_nan(),
                    "{case}: {y}, {expected}"
                );
            }
        }
    }
}

/// Problems of many kinds: protected tokens, from none to all of the others kept.
fn problems() -> impl Iterator<Item = Problem> {
    [1, 2, 3, 8, 17, 50, 131, 197].into_iter().zip(0usize..).flat_map(|(tokens, i)| {
        let protected = [(0, 0), (1, 0), (2, 0), (5, 0), (0, 3), (1, 1), (4, 2)];
        protected.into_iter().filter(move |(front, back)| front + back <= tokens).flat_map(move |(protect, suffix)| {
            let most = tokens - protect - suffix;
            [0, 1, most / 2, most - most.min(1), most].into_iter().filter(move |&keep| keep <= most).flat_map(
                move |keep| {
                    [false, true].map(|fuse| Problem {
                        batch: 1 + i % 3,
                        tokens,
                        channels: [1, 7, 24, 1500][(i + protect + keep) % 4],
                        keep,
                        protect,
                        suffix,
                        fuse,
                    })
                },
            )
        })
    })
}

#[test]
fn pruning_is_what_it_says() {
    for (problem, seed) in problems().zip(1..) {
        Case::<f32>::new(problem, seed).check();
        if problem.tokens < 60 {
            Case::<f16>::new(problem, seed).check();
            Case::<bf16>::new(problem, seed).check();
        }
    }
}

#[test]
fn ties_go_to_the_lowest_position() {
    for (problem, seed) in problems().zip(1..) {
        let mut case = Case::<f32>::new(problem, seed);
        let mut noise = Noise(seed);
        // Zeros of both signs are equal.
        case.score.iter_mut().for_each(|score| *score = [1.0, 0.0, -0.0, -2.0, 0.5][noise.below(5)]);
        case.check();
    }
}

#[test]
fn what_is_not_finite_loses_no_token() {
    for (problem, seed) in problems().zip(1..) {
        let mut case = Case::<f32>::new(problem, seed);
        let mut noise = Noise(seed);
        for _ in 0..1 + case.score.len() / 4 {
            let at = noise.below(case.score.len());
            case.score[at] = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY][noise.below(4)];
        }
        // Which of them a sum has makes it infinite or NaN: only decisions are compared.
        case.x.fill(0.0);
        let (pruned, expected) = (case.run(&Serial), case.expected());
        assert_eq!(pruned.anchor, expected.anchor, "{problem:?}");
        assert_eq!(pruned.assign, expected.assign, "{problem:?}");
    }
}

#[test]
fn what_is_kept_does_not_reach_what_is_fused() {
    let problem = Problem { batch: 1, tokens: 6, channels: 2, keep: 2, protect: 1, suffix: 1, fuse: true };
    let mut case = Case::<f32>::new(problem, 1);
    case.score = vec![9.0, 0.1, 0.5, 0.2, 0.6, 9.0];
    for token in [0, 2, 4, 5] {
        case.x[2 * token..][..2].fill(f32::NAN);
    }
    let pruned = case.run(&Serial);
    assert_eq!(pruned.anchor, [0, 4, 2, -1, 5]);
    assert_eq!(pruned.assign, [0, 3, 2, 3, 1, 4]);
    let [.., first, second, _, _] = pruned.y[..] else { unreachable!("five slots") };
    assert_eq!([first, second], [0, 1].map(|channel| 0.1 * case.x[2 + channel] + 0.2 * case.x[6 + channel]));
}

#[test]
fn arguments_are_checked() {
    let problem = Problem { batch: 2, tokens: 9, channels: 3, keep: 3, protect: 1, suffix: 1, fuse: true };
    let refused = |problem: Problem, short: [usize; 7]| {
        let len = [54, 18, 18, 36, 12, 12, 18];
        let len: [usize; 7] = std::array::from_fn(|i| len[i] - short[i]);
        let (x, score, size) = (vec![1.0f32; len[0]], vec![1.0; len[1]], vec![1.0; len[2]]);
        let (mut y, mut size_out) = (vec![0.0; len[3]], vec![0.0; len[4]]);
        let [mut anchor, mut assign] = [5, 6].map(|i| vec![0; len[i]]);
        let outputs = Outputs { y: &mut y, size: &mut size_out, anchor: &mut anchor, assign: &mut assign };
        token_prune(&problem, Inputs { x: &x, score: &score, size: &size }, outputs, &Serial).is_err()
    };
    assert!(!refused(problem, [0; 7]));
    for i in 0..7 {
        let mut short = [0; 7];
        short[i] = 1;
        assert!(refused(problem, short), "operand {i}");
    }
    for problem in [
        Problem { keep: 8, ..problem },
        Problem { keep: usize::MAX, ..problem },
        Problem { protect: 9, ..problem },
        Problem { protect: usize::MAX, ..problem },
        Problem { suffix: usize::MAX, ..problem },
        Problem { tokens: usize::MAX, ..problem },
        Problem { batch: usize::MAX, ..problem },
        Problem { fuse: false, ..problem },
    ] {
        assert!(refused(problem, [0; 7]), "{problem:?}");
    }
}

#[test]
fn nothing_is_pruned_to_nothing() {
    for (batch, tokens, channels, fuse) in
        [(0, 5, 3, true), (2, 0, 3, true), (2, 5, 0, true), (2, 5, 3, false), (0, 0, 0, false)]
    {
        let problem = Problem { batch, tokens, channels, keep: 0, protect: 0, suffix: 0, fuse };
        Case::<f32>::new(problem, 1).check();
    }
}

use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact, rounding};

struct Case<T, M> {
    problem: Problem,
    x: Vec<T>,
    metric: Vec<M>,
    size: Vec<f32>,
}

/// What comes out, for all images.
#[derive(Clone, Default)]
struct Merged<T> {
    y: Vec<T>,
    size: Vec<f32>,
    anchor: Vec<i64>,
    leaving: Vec<i64>,
    into: Vec<i64>,
}

impl<T: Element, M: Element> Case<T, M> {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let Problem { batch, tokens, channels, metric, .. } = problem;
        Self {
            problem,
            x: noise.elements(batch * tokens * channels),
            metric: noise.elements(batch * tokens * metric.width),
            size: noise.sizes(batch * tokens),
        }
    }

    fn run(&self, isa: Isa, pool: &dyn Pool) -> Merged<T> {
        let Problem { batch, tokens, channels, r, .. } = self.problem;
        let slots = tokens - r;
        let mut merged = Merged {
            y: vec![T::from_f32(f32::NAN); batch * slots * channels],
            size: vec![f32::NAN; batch * slots],
            anchor: vec![-1; batch * slots],
            leaving: vec![-1; batch * r],
            into: vec![-1; batch * r],
        };
        let inputs = Inputs { x: &self.x, metric: &self.metric, size: &self.size };
        let outputs = Outputs {
            y: &mut merged.y,
            size: &mut merged.size,
            anchor: &mut merged.anchor,
            leaving: &mut merged.leaving,
            into: &mut merged.into,
        };
        let mut scratch = vec![f32::NAN; self.problem.scratch_len()];
        token_merge_on(isa, &self.problem, inputs, outputs, &mut scratch, pool).unwrap();
        merged
    }

    /// By the definition.
    fn expected(&self) -> Merged<f64> {
        let Problem { batch, tokens, channels, r, protect, suffix, metric } = self.problem;
        let mut all = Merged::default();
        for image in 0..batch {
            let rows: Vec<Vec<f64>> = (0..tokens)
                .map(|token| {
                    let channel = |i| (0..metric.heads).map(move |h| (h, i));
                    let token = image * tokens + token;
                    let at = |(h, i): (usize, usize)| {
                        exact(self.metric[token * metric.width + metric.at + h * metric.head_dim + i])
                    };
                    let mean: Vec<f64> =
                        (0..metric.head_dim).map(|i| channel(i).map(at).sum::<f64>() / metric.heads as f64).collect();
                    let norm = mean.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                    mean.into_iter().map(|x| x / norm).collect()
                })
                .collect();
            let free = protect..tokens - suffix;
            let (a, b): (Vec<usize>, Vec<usize>) = free.partition(|token| token % 2 == 0);
            let similarity = |a: usize, b: usize| rows[a].iter().zip(&rows[b]).map(|(x, y)| x * y).sum::<f64>();
            let mut edges: Vec<(f64, usize, usize)> = Vec::new();
            for &a in &a {
                let mut best = (f64::NEG_INFINITY, 0);
                for (i, &b) in b.iter().enumerate() {
                    if similarity(a, b) > best.0 {
                        best = (similarity(a, b), i);
                    }
                }
                edges.push((best.0, a, best.1));
            }
            // Stable: of equals, the lowest position first.
            edges.sort_by(|x, y| y.0.partial_cmp(&x.0).unwrap());
            let mut staying: Vec<usize> = edges[r..].iter().map(|edge| edge.1).collect();
            if protect > 0 {
                staying.sort();
            }
            let first_b = protect + staying.len();
            let anchor: Vec<usize> = (0..protect).chain(staying).chain(b).chain(tokens - suffix..tokens).collect();
            for (slot, &token) in anchor.iter().enumerate() {
                let joined = edges[..r].iter().filter(|edge| first_b + edge.2 == slot).map(|edge| edge.1);
                let members: Vec<usize> =
                    std::iter::once(token).chain(joined).map(|token| image * tokens + token).collect();
                let total: f64 = members.iter().map(|&token| f64::from(self.size[token])).sum();
                all.size.push(total as f32);
                all.y.extend((0..channels).map(|c| {
                    members.iter().map(|&t| f64::from(self.size[t]) * exact(self.x[t * channels + c])).sum::<f64>()
                        / total
                }));
            }
            all.anchor.extend(anchor.into_iter().map(|token| token as i64));
            all.leaving.extend(edges[..r].iter().map(|edge| edge.1 as i64));
            all.into.extend(edges[..r].iter().map(|edge| (first_b + edge.2) as i64));
        }
        all
    }

    fn check(&self) {
        let Problem { tokens, channels, r, .. } = self.problem;
        let expected = self.expected();
        for (isa, threads) in Isa::all().into_iter().flat_map(|isa| [(isa, 1), (isa, 2)]) {
            let merged = self.run(isa, &Threads(threads));
            let case = format!("{isa:?}, {:?}", self.problem);
            assert_eq!(merged.leaving, expected.leaving, "{case}");
            assert_eq!(merged.into, expected.into, "{case}");
            assert_eq!(merged.anchor, expected.anchor, "{case}");
            assert_eq!(merged.size, expected.size, "{case}");
            for (i, (&y, expected)) in merged.y.iter().zip(&expected.y).enumerate() {
                assert!((exact(y) - expected).abs() <= rounding::<T>(1e-6), "{case}: {} for {expected}", exact(y));
                let (slot, channel) = (i / channels, i % channels);
                let token = slot / (tokens - r) * tokens + merged.anchor[slot] as usize;
                if merged.size[slot] == self.size[token] {
                    assert_eq!(y.to_f32().to_bits(), self.x[token * channels + channel].to_f32().to_bits(), "{case}");
                }
            }
        }
    }
}

/// Problems of many kinds: protected tokens, r from none to all that may leave.
fn problems() -> impl Iterator<Item = Problem> {
    let metrics = [
        Heads { width: 5, at: 0, heads: 1, head_dim: 5 },
        Heads { width: 64, at: 0, heads: 1, head_dim: 64 },
        Heads { width: 70, at: 7, heads: 3, head_dim: 20 },
        Heads { width: 49, at: 17, heads: 2, head_dim: 16 },
    ];
    let extents = [1, 2, 3, 8, 17, 50, 131, 197].into_iter().zip(0usize..);
    extents.flat_map(move |(tokens, i)| {
        let protected = [(0, 0), (1, 0), (2, 0), (5, 0), (0, 3), (1, 1), (4, 2)];
        protected.into_iter().filter(move |(front, back)| front + back <= tokens).flat_map(move |(protect, suffix)| {
            let most = (tokens - protect - suffix) / 2;
            [0, 1, most / 2, most].into_iter().filter(move |&r| r <= most).map(move |r| Problem {
                batch: 1 + i % 3,
                tokens,
                channels: [1, 7, 24][(i + protect) % 3],
                r,
                protect,
                suffix,
                metric: metrics[(i + r) % 4],
            })
        })
    })
}

#[test]
fn merging_is_what_it_says() {
    for (problem, seed) in problems().zip(1..) {
        Case::<f32, f32>::new(problem, seed).check();
        if problem.tokens < 60 {
            Case::<f16, f16>::new(problem, seed).check();
            Case::<bf16, f32>::new(problem, seed).check();
            Case::<f32, bf16>::new(problem, seed).check();
        }
    }
}

#[test]
fn ties_go_to_the_lowest_position() {
    // A few rows over and over, of one or four ones: similarities are exact, and most are equal.
    for (mut problem, seed) in problems().zip(1..) {
        problem.metric.heads = 1;
        let dim = problem.metric.head_dim;
        let mut case = Case::<f32, f32>::new(problem, seed);
        let mut noise = Noise(seed);
        for row in case.metric.chunks_mut(problem.metric.width) {
            row.fill(0.0);
            let sign = [1.0, -1.0, 0.0][noise.below(3)];
            let first = noise.below(3).min(dim - 1);
            let count = if first + 4 <= dim && noise.below(2) == 0 { 4 } else { 1 };
            row[problem.metric.at + first..][..count].fill(sign);
        }
        case.check();
    }
}

#[test]
fn equal_rows_have_equal_similarities() {
    // All rows are one row, whose length is not exact: wherever tiles end, the order must be that of position.
    for (problem, seed) in problems().zip(1..) {
        let mut case = Case::<f32, f32>::new(problem, seed);
        let row = case.metric[..problem.metric.width].to_vec();
        case.metric = row.repeat(problem.batch * problem.tokens);
        case.check();
    }
}

#[test]
fn nan_loses_no_token() {
    for (problem, seed) in problems().zip(1..) {
        let mut case = Case::<f32, f32>::new(problem, seed);
        let mut noise = Noise(seed);
        for _ in 0..3 {
            let at = noise.below(case.metric.len());
            case.metric[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][noise.below(3)];
        }
        for isa in Isa::all() {
            let merged = case.run(isa, &Serial);
            let (slots, r) = (problem.tokens - problem.r, problem.r);
            for image in 0..problem.batch {
                let mut listed = merged.anchor[image * slots..][..slots].to_vec();
                listed.extend(&merged.leaving[image * r..][..r]);
                listed.sort();
                assert!(listed.into_iter().eq(0..problem.tokens as i64), "{isa:?}, {problem:?}");
            }
            let b = problem.protect + Split::of(&problem).staying;
            assert!(merged.into.iter().all(|&slot| slot as usize >= b && (slot as usize) < slots - problem.suffix));
        }
    }
}

#[test]
fn nan_counts_as_the_highest() {
    let metric = Heads { width: 2, at: 0, heads: 1, head_dim: 2 };
    let problem = Problem { batch: 1, tokens: 8, channels: 1, r: 2, protect: 0, suffix: 0, metric };
    let mut case = Case::<f32, f32>::new(problem, 1);
    case.metric.fill(1.0);
    case.metric[2 * 4] = f32::NAN;
    let merged = case.run(Isa::best(), &Serial);
    assert_eq!((merged.leaving, merged.into), (vec![4, 0], vec![2, 2]));
}

#[test]
fn arguments_are_checked() {
    let metric = Heads { width: 6, at: 1, heads: 2, head_dim: 2 };
    let problem = Problem { batch: 2, tokens: 9, channels: 3, r: 3, protect: 1, suffix: 1, metric };
    let refused = |problem: Problem, short: [usize; 8], scratch: usize| {
        let len = [54, 108, 18, 36, 12, 12, 6, 6];
        let len: [usize; 8] = std::array::from_fn(|i| len[i] - short[i]);
        let (x, metric, size) = (vec![1.0f32; len[0]], vec![1.0f32; len[1]], vec![1.0; len[2]]);
        let (mut y, mut size_out) = (vec![0.0; len[3]], vec![0.0; len[4]]);
        let [mut anchor, mut leaving, mut into] = [5, 6, 7].map(|i| vec![0; len[i]]);
        let outputs =
            Outputs { y: &mut y, size: &mut size_out, anchor: &mut anchor, leaving: &mut leaving, into: &mut into };
        let inputs = Inputs { x: &x, metric: &metric, size: &size };
        token_merge(&problem, inputs, outputs, &mut vec![0.0; scratch], &Serial).is_err()
    };
    let len = problem.scratch_len();
    assert!(!refused(problem, [0; 8], len));
    assert!(refused(problem, [0; 8], len - 1));
    let absurd = Problem { metric: Heads { head_dim: usize::MAX / 64, ..metric }, ..problem };
    assert_eq!(absurd.scratch_len(), 0);
    for i in 0..8 {
        let mut short = [0; 8];
        short[i] = 1;
        assert!(refused(problem, short, len), "operand {i}");
    }
    for problem in [
        Problem { r: 4, ..problem },
        Problem { protect: 9, ..problem },
        Problem { protect: usize::MAX, ..problem },
        Problem { suffix: usize::MAX, ..problem },
        Problem { tokens: usize::MAX, ..problem },
        Problem { batch: usize::MAX, ..problem },
        Problem { metric: Heads { at: 3, ..metric }, ..problem },
        Problem { metric: Heads { heads: 0, ..metric }, ..problem },
    ] {
        assert!(problem.scratch_len() > 0 || problem.protect > 0);
        assert!(refused(problem, [0; 8], len), "{problem:?}");
    }
}

#[test]
fn nothing_is_merged_to_nothing() {
    let metric = Heads { width: 2, at: 0, heads: 1, head_dim: 2 };
    for (batch, tokens, channels) in [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)] {
        let problem = Problem { batch, tokens, channels, r: tokens / 2, protect: 0, suffix: 0, metric };
        Case::<f32, f32>::new(problem, 1).check();
    }
}

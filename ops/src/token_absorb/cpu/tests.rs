use half::{bf16, f16};

use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads, exact, rounding};

struct Case<T> {
    problem: Problem,
    x: Vec<T>,
    closeness: Vec<f32>,
    order: Vec<i64>,
}

struct Absorbed<T> {
    y: Vec<T>,
    size: Vec<f32>,
    anchor: Vec<i64>,
    assign: Vec<i64>,
}

impl<T: Element> Case<T> {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let candidates = problem.candidates().unwrap();
        let mut order = Vec::new();
        for _ in 0..problem.batch {
            let mut own: Vec<_> = (0..candidates as i64).map(|token| (noise.below(1 << 20), token)).collect();
            own.sort_unstable();
            order.extend(own.into_iter().map(|(_, token)| token));
        }
        let x = noise.elements(problem.batch * problem.tokens * problem.channels);
        Self { problem, x, closeness: noise.elements(problem.batch * candidates * candidates), order }
    }

    fn run(&self, pool: &dyn Pool) -> Absorbed<T> {
        let Problem { batch, tokens, channels, .. } = self.problem;
        let slots = self.problem.slots().unwrap();
        let (mut y, mut size) = (vec![T::from_f32(f32::NAN); batch * slots * channels], vec![f32::NAN; batch * slots]);
        let (mut anchor, mut assign) = (vec![-9; batch * slots], vec![-9; batch * tokens]);
        let outputs = Outputs { y: &mut y, size: &mut size, anchor: &mut anchor, assign: &mut assign };
        let inputs = Inputs { x: &self.x, closeness: &self.closeness, order: &self.order };
        token_absorb(&self.problem, inputs, outputs, pool).unwrap();
        Absorbed { y, size, anchor, assign }
    }

    /// Against the definition, image by image.
    fn check(&self) {
        let Problem { batch, tokens, channels, keep, protect, suffix } = self.problem;
        let (candidates, slots) = (self.problem.candidates().unwrap(), self.problem.slots().unwrap());
        let absorbed = self.run(&Threads(2));
        for image in 0..batch {
            let chosen = &self.order[image * candidates..][..keep];
            let slot_of = |token: usize| {
                if token < protect {
                    return token;
                }
                if token >= tokens - suffix {
                    return token + slots - tokens;
                }
                let own = token - protect;
                let close =
                    |slot: usize| self.closeness[(image * candidates + chosen[slot] as usize) * candidates + own];
                let itself = chosen.iter().position(|&chosen| chosen as usize == own);
                let closest = || (0..keep).reduce(|best, slot| if close(slot) > close(best) { slot } else { best });
                protect + itself.or_else(closest).unwrap()
            };
            let assign: Vec<usize> = (0..tokens).map(slot_of).collect();
            assert!(
                absorbed.assign[image * tokens..][..tokens]
                    .iter()
                    .eq(&assign.iter().map(|&slot| slot as i64).collect::<Vec<_>>())
            );
            let anchor = (0..protect as i64).chain(chosen.iter().map(|&token| token + protect as i64));
            let anchor: Vec<i64> = anchor.chain((tokens - suffix) as i64..tokens as i64).collect();
            assert_eq!(absorbed.anchor[image * slots..][..slots], anchor);
            for slot in 0..slots {
                let members: Vec<usize> = (0..tokens).filter(|&token| assign[token] == slot).collect();
                assert_eq!(absorbed.size[image * slots + slot], members.len() as f32);
                for channel in 0..channels {
                    let x = |token: usize| self.x[(image * tokens + token) * channels + channel];
                    let y = absorbed.y[(image * slots + slot) * channels + channel];
                    let mean = members.iter().map(|&token| exact(x(token))).sum::<f64>() / members.len() as f64;
                    assert!((exact(y) - mean).abs() <= rounding::<T>(1e-6), "{:?}", self.problem);
                    if let [alone] = members[..] {
                        assert_eq!(y.to_f32().to_bits(), x(alone).to_f32().to_bits());
                    }
                }
            }
        }
    }
}

/// One token kept, some, all.
fn problems() -> impl Iterator<Item = Problem> {
    let extents: [(usize, usize); 5] = [(1, 1), (2, 3), (9, 7), (50, 24), (196, 5)];
    extents.into_iter().zip(0..).flat_map(|((candidates, channels), i)| {
        [(0, 0), (1, 0), (2, 3)].into_iter().flat_map(move |(protect, suffix)| {
            let tokens = candidates + protect + suffix;
            [1, candidates.div_ceil(2), candidates].map(|keep| Problem {
                batch: 1 + i % 3,
                tokens,
                channels,
                keep,
                protect,
                suffix,
            })
        })
    })
}

#[test]
fn tokens_join_the_closest() {
    for (problem, seed) in problems().zip(1..) {
        Case::<f32>::new(problem, seed).check();
        Case::<f16>::new(problem, seed).check();
        Case::<bf16>::new(problem, seed).check();
    }
}

#[test]
fn ties_go_to_the_first_slot() {
    for (problem, seed) in problems().zip(1..) {
        let mut case = Case::<f32>::new(problem, seed);
        for closeness in &mut case.closeness {
            *closeness = [-1.0, -0.0, 0.0, f32::MAX][((*closeness + 1.0) * 1.99) as usize];
        }
        case.check();
    }
}

#[test]
fn no_token_is_lost_over_what_is_no_number() {
    let problem = Problem { batch: 1, tokens: 7, channels: 2, keep: 2, protect: 1, suffix: 1 };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = Case::<f32>::new(problem, 1);
        case.closeness.fill(value);
        let absorbed = case.run(&Serial);
        assert!(absorbed.assign.iter().all(|&slot| (0..4).contains(&slot)) && absorbed.size.iter().sum::<f32>() == 7.0);
    }
}

#[test]
fn arguments_are_checked() {
    let problem = Problem { batch: 2, tokens: 6, channels: 3, keep: 2, protect: 1, suffix: 1 };
    let run = |problem: &Problem, token: i64, short: [usize; 7]| {
        let len = [36, 32, 8, 24, 8, 8, 12];
        let len: [usize; 7] = std::array::from_fn(|i| len[i] - short[i]);
        let (x, closeness, mut y, mut size) =
            (vec![1.0f32; len[0]], vec![0.0; len[1]], vec![0.0; len[3]], vec![0.0; len[4]]);
        let (mut anchor, mut assign) = (vec![0; len[5]], vec![0; len[6]]);
        let mut order = [0, 1, 2, 3].repeat(2);
        order[5] = token;
        let outputs = Outputs { y: &mut y, size: &mut size, anchor: &mut anchor, assign: &mut assign };
        let inputs = Inputs { x: &x, closeness: &closeness, order: &order[..len[2]] };
        token_absorb(problem, inputs, outputs, &Serial).is_ok()
    };
    assert!(run(&problem, 1, [0; 7]));
    for i in 0..7 {
        let mut short = [0; 7];
        short[i] = 1;
        assert!(!run(&problem, 1, short), "operand {i}");
    }
    assert!(!run(&problem, 4, [0; 7]) && !run(&problem, -1, [0; 7]) && !run(&problem, i64::MAX, [0; 7]));
    for problem in [
        Problem { keep: 0, ..problem },
        Problem { keep: 5, ..problem },
        Problem { keep: usize::MAX, ..problem },
        Problem { protect: 6, ..problem },
        Problem { protect: usize::MAX, ..problem },
        Problem { suffix: usize::MAX, ..problem },
        Problem { tokens: usize::MAX, ..problem },
        Problem { batch: usize::MAX, ..problem },
        Problem { channels: usize::MAX, ..problem },
    ] {
        assert!(!run(&problem, 1, [0; 7]), "{problem:?}");
    }
}

#[test]
fn nothing_joins_nothing() {
    for (batch, channels) in [(0, 3), (2, 0)] {
        Case::<f32>::new(Problem { batch, tokens: 6, channels, keep: 2, protect: 1, suffix: 0 }, 1).check();
    }
}

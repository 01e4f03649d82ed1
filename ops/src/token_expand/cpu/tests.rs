use super::*;
use crate::cpu::Serial;
use crate::cpu::testing::{Noise, Threads};

fn run(problem: &Problem, closeness: &[f32], order: &[i64], pool: &dyn Pool) -> Vec<i64> {
    let mut order_out = vec![-1; order.len()];
    token_expand(problem, closeness, order, &mut order_out, pool).unwrap();
    order_out
}

/// As plain as can be.
fn expected(problem: &Problem, closeness: &[f32], order: &[i64]) -> Vec<i64> {
    let &Problem { candidates, chosen, .. } = problem;
    let mut all = Vec::new();
    for (image, order) in order.chunks(candidates).enumerate() {
        let close = |a: i64, b: i64| closeness[(image * candidates + a as usize) * candidates + b as usize];
        let (chosen, rest) = order.split_at(chosen);
        let most = |token: i64| chosen.iter().map(|&to| close(to, token)).fold(f32::NEG_INFINITY, f32::max);
        let mut rest = rest.to_vec();
        // Stable.
        rest.sort_by(|&a, &b| most(a).partial_cmp(&most(b)).unwrap());
        all.extend(chosen);
        all.extend(rest);
    }
    all
}

/// Permutations.
fn orders(noise: &mut Noise, batch: usize, candidates: usize) -> Vec<i64> {
    let mut all = Vec::new();
    for _ in 0..batch {
        let mut order: Vec<_> = (0..candidates as i64).map(|token| (noise.below(1 << 20), token)).collect();
        order.sort_unstable();
        all.extend(order.into_iter().map(|(_, token)| token));
    }
    all
}

#[test]
fn the_least_close_come_first() {
    for (batch, candidates) in [(1, 2), (3, 5), (2, 40), (1, 196)] {
        for chosen in [1, candidates / 2, candidates - 1] {
            let mut noise = Noise((batch * candidates + chosen) as u64);
            let problem = Problem { batch, candidates, chosen };
            let order = orders(&mut noise, batch, candidates);
            let mut closeness: Vec<f32> = noise.elements(batch * candidates * candidates);
            let decided = expected(&problem, &closeness, &order);
            assert_eq!(run(&problem, &closeness, &order, &Threads(2)), decided, "{problem:?}");
            // Many ties, and the largest number, and zeros of both signs.
            for x in &mut closeness {
                *x = [-1.0, -0.0, 0.0, 0.5, f32::MAX][((*x + 1.0) * 2.49) as usize];
            }
            let decided = expected(&problem, &closeness, &order);
            assert_eq!(run(&problem, &closeness, &order, &Serial), decided, "{problem:?}");
        }
    }
}

#[test]
fn no_token_is_lost_over_what_is_no_number() {
    let problem = Problem { batch: 1, candidates: 6, chosen: 2 };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut order = run(&problem, &[value; 36], &[5, 1, 0, 2, 4, 3], &Serial);
        assert_eq!(order[..2], [5, 1]);
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3, 4, 5]);
    }
}

#[test]
fn arguments_are_checked() {
    let problem = Problem { batch: 2, candidates: 3, chosen: 1 };
    let run = |problem: &Problem, closeness: usize, order: &[i64], order_out: usize| {
        token_expand(problem, &vec![0.0; closeness], order, &mut vec![0; order_out], &Serial).is_ok()
    };
    let order = [0, 1, 2, 2, 1, 0];
    assert!(run(&problem, 18, &order, 6));
    assert!(!run(&problem, 17, &order, 6) && !run(&problem, 18, &order[1..], 6) && !run(&problem, 18, &order, 5));
    assert!(!run(&problem, 18, &[0, 1, 2, 2, 1, 3], 6) && !run(&problem, 18, &[0, 1, 2, i64::MIN, 1, 0], 6));
    for problem in [
        Problem { chosen: 0, ..problem },
        Problem { chosen: 3, ..problem },
        Problem { chosen: usize::MAX, ..problem },
        Problem { candidates: usize::MAX, ..problem },
        Problem { batch: usize::MAX, ..problem },
        Problem { batch: 0, candidates: 1 << 32, ..problem },
    ] {
        assert!(!run(&problem, 18, &order, 6), "{problem:?}");
    }
    assert!(run(&Problem { batch: 0, ..problem }, 0, &[], 0));
}

//! Times of the CPU kernels on one thread: medians of interleaved runs, beside what the machine could do at most.

use std::hint::black_box;
use std::time::{Duration, Instant};

use vitrim_ops::Heads;
use vitrim_ops::cpu::Serial;
use vitrim_ops::{attention, connection_mask, masked_softmax, token_merge, token_prune, token_score};

const ROUNDS: usize = 31;
/// The name of what the others are compared with.
const PEAK: &str = "multiplying and adding alone";

/// Something to time.
struct Case<'a> {
    name: String,
    /// Floating-point operations.
    operations: f64,
    run: Box<dyn FnMut() + 'a>,
    times: Vec<Duration>,
}

impl<'a> Case<'a> {
    fn new(name: String, operations: usize, run: impl FnMut() + 'a) -> Self {
        Self { name, operations: operations as f64, run: Box::new(run), times: Vec::new() }
    }

    fn median(&mut self) -> f64 {
        self.times.sort();
        self.times[self.times.len() / 2].as_secs_f64()
    }
}

fn main() {
    // Arguments choose cases: `cargo bench --bench kernels -- N=50`.
    let parts: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let chosen = |name: &str| parts.is_empty() || parts.iter().any(|part| name.contains(part));
    let mut cases = vec![peak()];
    for (batch, heads, tokens, head_dim) in [
        (8, 6, 197, 64),
        (8, 6, 148, 64),
        (8, 6, 99, 64),
        (8, 6, 50, 64),
        (4, 12, 197, 64),
        (2, 16, 197, 64),
        (1, 12, 197, 64),
        (1, 12, 577, 64),
        (1, 12, 1025, 64),
        (1, 4, 4097, 64),
        (4, 12, 197, 32),
        (4, 12, 197, 72),
        (4, 12, 197, 80),
        (4, 12, 197, 96),
    ] {
        let name = format!("attention B={batch} H={heads} N={tokens} d={head_dim}");
        if chosen(&name) {
            cases.push(attention(name, batch, heads, tokens, head_dim));
        }
    }
    for (batch, tokens, channels, r) in
        [(8, 197, 384, 49), (4, 197, 768, 16), (1, 197, 768, 16), (1, 577, 1024, 144), (1, 4097, 768, 1024)]
    {
        let name = format!("merge B={batch} N={tokens} C={channels} r={r} d=64");
        if chosen(&name) {
            cases.push(merge(name, batch, tokens, channels, r));
        }
    }
    for (batch, heads, tokens) in [(8, 6, 197), (1, 12, 197), (1, 16, 577)] {
        let name = format!("masked softmax B={batch} H={heads} N={tokens}");
        if chosen(&name) {
            cases.push(softmax(name, batch, heads, tokens));
        }
        let name = format!("connection mask B={batch} H={heads} N={tokens}");
        if chosen(&name) {
            cases.push(mask(name, batch, heads, tokens));
        }
    }
    for (batch, heads, tokens, first) in [(8, 6, 197, 1), (1, 16, 577, 1), (8, 6, 197, 197), (1, 16, 577, 577)] {
        let name = format!("score B={batch} H={heads} N={tokens} queries={first} d=64");
        if chosen(&name) {
            cases.push(score(name, batch, heads, tokens, first));
        }
    }
    for (batch, tokens, channels, keep) in [(8, 197, 384, 137), (1, 197, 768, 137), (1, 577, 1024, 403)] {
        let name = format!("prune B={batch} N={tokens} C={channels} k={keep}");
        if chosen(&name) {
            cases.push(prune(name, batch, tokens, channels, keep));
        }
    }
    for _ in 0..ROUNDS {
        for case in &mut cases {
            let start = Instant::now();
            (case.run)();
            case.times.push(start.elapsed());
        }
    }
    let peak = cases[0].operations / cases[0].median();
    println!("{:44} {:>10} {:>9} {:>6}", "", "ms", "GFLOP/s", "peak");
    for case in &mut cases {
        let seconds = case.median();
        let speed = case.operations / seconds;
        println!("{:44} {:10.3} {:9.1} {:5.0}%", case.name, 1e3 * seconds, speed / 1e9, 100.0 * speed / peak);
    }
}

/// Attention of heads in a packed projection.
fn attention(name: String, batch: usize, heads: usize, tokens: usize, head_dim: usize) -> Case<'static> {
    let channels = heads * head_dim;
    let at = |at| Heads { width: 3 * channels, at, heads, head_dim };
    let problem = attention::cpu::Problem {
        batch,
        queries: tokens,
        keys: tokens,
        q: at(0),
        k: at(channels),
        v: at(2 * channels),
        scale: (head_dim as f32).sqrt().recip(),
    };
    let qkv = noise(batch * tokens * 3 * channels);
    let size = vec![1.0; batch * tokens];
    let mut y = vec![0.0; batch * tokens * channels];
    let mut scratch = vec![0.0; problem.scratch_len(1)];
    Case::new(name, 4 * batch * heads * tokens * tokens * head_dim, move || {
        let inputs = attention::cpu::Inputs { q: &qkv, k: &qkv, v: &qkv, size: Some(&size) };
        attention::cpu::attention(&problem, inputs, &mut y, 1, &mut scratch, &Serial).expect("a sound problem");
        black_box(&y);
    })
}

/// Merging by the keys of a packed projection. Only the similarities count as operations.
fn merge(name: String, batch: usize, tokens: usize, channels: usize, r: usize) -> Case<'static> {
    let metric = Heads { width: 3 * channels, at: channels, heads: channels / 64, head_dim: 64 };
    let problem = token_merge::cpu::Problem { batch, tokens, channels, r, protect: 1, suffix: 0, metric };
    let (x, metric) = (noise(batch * tokens * channels), noise(batch * tokens * metric.width));
    let size = vec![1.0; batch * tokens];
    let slots = tokens - r;
    let (mut y, mut size_out) = (vec![0.0; batch * slots * channels], vec![0.0; batch * slots]);
    let [mut anchor, mut leaving, mut into] = [slots, r, r].map(|len| vec![0; batch * len]);
    let mut scratch = vec![0.0; problem.scratch_len()];
    Case::new(name, 2 * batch * (tokens / 2) * (tokens / 2) * 64, move || {
        let inputs = token_merge::cpu::Inputs { x: &x, metric: &metric, size: &size };
        let outputs = token_merge::cpu::Outputs {
            y: &mut y,
            size: &mut size_out,
            anchor: &mut anchor,
            leaving: &mut leaving,
            into: &mut into,
        };
        token_merge::cpu::token_merge(&problem, inputs, outputs, &mut scratch, &Serial).expect("a sound problem");
        black_box(&y);
    })
}

/// Weights of attention half of whose connections are closed. An exponential counts as ten operations.
fn softmax(name: String, batch: usize, heads: usize, tokens: usize) -> Case<'static> {
    let eps = masked_softmax::EPSILON;
    let problem = masked_softmax::cpu::Problem { batch, heads, queries: tokens, keys: tokens, eps };
    let scores = noise(batch * heads * tokens * tokens);
    let mask: Vec<f32> = noise(batch * tokens * tokens).iter().map(|x| f32::from(*x > 0.0)).collect();
    let size = vec![1.0; batch * tokens];
    let mut weights = vec![0.0; scores.len()];
    let mut scratch = vec![0.0; problem.scratch_len(1)];
    Case::new(name, 10 * scores.len(), move || {
        let inputs = masked_softmax::cpu::Inputs { scores: &scores, mask: &mask, size: &size };
        masked_softmax::cpu::masked_softmax(&problem, inputs, &mut weights, 1, &mut scratch, &Serial)
            .expect("a sound problem");
        black_box(&weights);
    })
}

/// The mask behind a block that keeps 0.7 of the patches, and 0.3 of their connections. Only sums of heads count.
fn mask(name: String, batch: usize, heads: usize, tokens: usize) -> Case<'static> {
    let slots = 1 + (tokens - 1) * 7 / 10;
    let (connections, protect, suffix) = ((slots - 1) * 3 / 10, 1, 0);
    let problem = connection_mask::Problem { batch, heads, tokens, slots, connections, protect, suffix };
    let weights = noise(batch * heads * tokens * tokens);
    let anchor: Vec<i64> = (0..batch * slots).map(|at| (at % slots * 10 / 7) as i64).collect();
    let mut mask = vec![0.0; batch * slots * slots];
    let mut scratch = vec![0.0; problem.scratch_len(1)];
    Case::new(name, batch * heads * slots * tokens, move || {
        connection_mask::cpu::connection_mask(&problem, &weights, &anchor, &mut mask, 1, &mut scratch, &Serial)
            .expect("a sound problem");
        black_box(&mask);
    })
}

/// The attention that tokens receive, of heads in a packed projection.
fn score(name: String, batch: usize, heads: usize, tokens: usize, first: usize) -> Case<'static> {
    let (head_dim, channels) = (64, heads * 64);
    let at = |at| Heads { width: 3 * channels, at, heads, head_dim };
    let (q, k) = (at(0), at(channels));
    let problem = token_score::Problem { batch, queries: tokens, keys: tokens, q, k, scale: 0.125, first };
    let (qkv, size) = (noise(batch * tokens * 3 * channels), vec![1.0; batch * tokens]);
    let (mut score, mut scratch) = (vec![0.0; batch * tokens], vec![0.0; problem.scratch_len(1)]);
    Case::new(name, 2 * batch * heads * first * tokens * head_dim, move || {
        let inputs = token_score::cpu::Inputs { q: &qkv, k: &qkv, size: &size };
        token_score::cpu::token_score(&problem, inputs, &mut score, 1, &mut scratch, &Serial).expect("a sound problem");
        black_box(&score);
    })
}

/// Pruning and fusing. Only the sum of what is fused counts as operations.
fn prune(name: String, batch: usize, tokens: usize, channels: usize, keep: usize) -> Case<'static> {
    let problem = token_prune::Problem { batch, tokens, channels, keep, protect: 1, suffix: 0, fuse: true };
    let slots = problem.slots().expect("a sound problem");
    let (x, scores, size) = (noise(batch * tokens * channels), noise(batch * tokens), vec![1.0; batch * tokens]);
    let (mut y, mut size_out) = (vec![0.0; batch * slots * channels], vec![0.0; batch * slots]);
    let [mut anchor, mut assign] = [slots, tokens].map(|len| vec![0; batch * len]);
    Case::new(name, 2 * batch * (tokens - 1 - keep) * channels, move || {
        let inputs = token_prune::cpu::Inputs { x: &x, score: &scores, size: &size };
        let outputs =
            token_prune::cpu::Outputs { y: &mut y, size: &mut size_out, anchor: &mut anchor, assign: &mut assign };
        token_prune::cpu::token_prune(&problem, inputs, outputs, &Serial).expect("a sound problem");
        black_box(&y);
    })
}

/// Numbers from -1 to 1.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Multiplications and additions that wait for nothing.
fn peak() -> Case<'static> {
    const SUMS: usize = 12;
    const STEPS: usize = 200_000;

    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;

        #[target_feature(enable = "avx512f")]
        fn avx512() -> f32 {
            let factor = _mm512_set1_ps(black_box(0.5));
            let mut sums = [factor; SUMS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, factor, factor);
                }
            }
            _mm512_reduce_add_ps(sums[1..].iter().fold(sums[0], |a, &b| _mm512_add_ps(a, b)))
        }

        #[target_feature(enable = "avx,fma")]
        fn avx2() -> f32 {
            let factor = _mm256_set1_ps(black_box(0.5));
            let mut sums = [factor; SUMS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, factor, factor);
                }
            }
            _mm256_cvtss_f32(sums[1..].iter().fold(sums[0], |a, &b| _mm256_add_ps(a, b)))
        }

        if is_x86_feature_detected!("avx512f") {
            return Case::new(format!("{PEAK}, AVX-512"), STEPS * SUMS * 32, || {
                // SAFETY: the machine has the feature.
                black_box(unsafe { avx512() });
            });
        }
        if is_x86_feature_detected!("avx") && is_x86_feature_detected!("fma") {
            return Case::new(format!("{PEAK}, AVX2"), STEPS * SUMS * 16, || {
                // SAFETY: the machine has the features.
                black_box(unsafe { avx2() });
            });
        }
    }
    Case::new(format!("{PEAK}, four lanes"), STEPS * SUMS * 8, || {
        let factor = black_box(0.5);
        let mut sums = [[factor; 4]; SUMS];
        for _ in 0..STEPS {
            sums = sums.map(|lanes| lanes.map(|sum| sum * factor + factor));
        }
        black_box(sums);
    })
}

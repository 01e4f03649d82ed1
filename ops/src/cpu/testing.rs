//! What tests of kernels share.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Element, Pool};

/// So many threads, started anew for every call.
pub(crate) struct Threads(pub(crate) usize);

impl Pool for Threads {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let work = || {
                while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < tasks) {
                    task(i);
                }
            };
            let threads: Vec<_> = (0..self.0).map(|_| scope.spawn(work)).collect();
            // The scope would wait as well, by means that ThreadSanitizer does not see.
            threads.into_iter().for_each(|thread| thread.join().expect("a task panicked"));
        });
    }
}

/// Pseudo-random numbers.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    /// An integer below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % end
    }

    /// From -1 to 1.
    pub(crate) fn signed(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Numbers from -1 to 1.
    pub(crate) fn elements<T: Element>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.signed())).collect()
    }

    /// Sizes: small integers.
    pub(crate) fn sizes(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (1 + self.below(4)) as f32).collect()
    }
}

/// As float64.
pub(crate) fn exact<T: Element>(x: T) -> f64 {
    x.to_f32().into()
}

/// Half a unit in the last place of a type, relative, and what float32 arithmetic may add.
pub(crate) fn rounding<T: Element>(arithmetic: f64) -> f64 {
    let one = 1.0f32;
    // The first power of two that is lost beside one.
    let lost = (1..30).map(|n| 0.5f32.powi(n)).find(|&x| T::from_f32(one + x).to_f32() == one);
    arithmetic + f64::from(lost.unwrap_or(0.0))
}

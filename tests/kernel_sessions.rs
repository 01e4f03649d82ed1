//! Sessions with the library of native kernels come and go without a trace, in several threads at once. Alone in its
//! process, whose memory is measured.
#![cfg(target_os = "linux")]

mod common;

use common::ops::{Case, Reference};
use common::{Scratch, kernels, load};
use ndarray::{ArrayD, IxDyn};
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, Tensor};

#[test]
fn ten_thousand_sessions_leave_nothing_behind() {
    let scratch = Scratch::new("sessions");
    let mut next = 0.0;
    let mut floats = |shape: &[usize]| {
        let array = ArrayD::from_shape_simple_fn(IxDyn(shape), || {
            next = (next + 0.717) % 2.0;
            next - 1.0
        });
        Tensor::from_f64(DType::F32, &array)
    };
    let feeds: Feeds = [("x", floats(&[2, 21, 8])), ("metric", floats(&[2, 21, 6])), ("y_in", floats(&[2, 15, 3]))]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into_iter()
        .collect();
    let case = Case { name: "session".into(), r: 6, tokens: 21, protect: 1, suffix: 0, heads: [2, 3, 0], feeds };
    let path = scratch.save("call", &case.model(17, false));
    let expected = Reference::new(&case).expected();
    let sessions = |count: usize| {
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let backend = kernels();
                    for _ in 0..count / 2 {
                        let outputs = load(backend.as_ref(), &path).run(&case.feeds).expect("it runs");
                        expected.check(&case, &outputs, common::ops::VALUE_TOLERANCE).expect("it merges");
                    }
                });
            }
        });
    };
    // The first thousand fill pools and caches of the runtime.
    sessions(1000);
    let before = resident();
    sessions(10_000);
    let grown = resident().saturating_sub(before);
    // 1 KiB a session would be 10 MiB. Arenas of the allocator breathe by less than half of that.
    assert!(grown < 5 << 20, "{grown} bytes more after ten thousand sessions");
}

/// Bytes of memory that this process holds.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the resident set");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number of KiB") << 10
}

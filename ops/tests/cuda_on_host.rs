//! The CUDA kernels, run on the host and compared with references in float64.
//!
//! The very sources that become PTX are compiled with the system's C++ compiler (`CXX`, else `c++`) behind a header
//! that provides what they need of CUDA (`cuda_on_host/shim.hpp`), and launched as `cuda.rs` would launch them. Each
//! launch is repeated with threads and blocks in other orders, which must not change a bit. One test runs all others
//! again under the address and undefined behaviour sanitizers.
//!
//! What only a GPU can show is not tested: that PTX does what the source says, and how fast.

use std::alloc::{self, Layout};
use std::collections::BTreeMap;
use std::env;
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::slice;
use std::sync::{LazyLock, Mutex, OnceLock};

use half::{bf16, f16};
use libloading::Library;
use vitrim_ops::Heads;
use vitrim_ops::cuda::{Arguments, Device, Dtype, Launch};
use vitrim_ops::{
    attention, connection_mask, masked_softmax, token_assign, token_mean, token_merge, token_prune, token_restore,
    token_score, token_size,
};

// ---------------------------------------------------------------------------------------------------- compiled kernels

/// Says that something is not tested, past the test harness: it would keep it to itself.
fn skipped(why: impl Display) {
    let _ = writeln!(io::stderr(), "SKIPPED: CUDA kernels on the host: {why}");
}

/// Set where tests run under sanitizers.
const SANITIZED: &str = "CUDA_ON_HOST_SANITIZED";

fn sanitized() -> bool {
    env::var_os(SANITIZED).is_some()
}

fn compiler() -> OsString {
    env::var_os("CXX").unwrap_or_else(|| "c++".into())
}

fn has_compiler() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| {
        if !cfg!(target_os = "linux") || !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            skipped("fibers are written for Linux on x86-64 and AArch64");
            return false;
        }
        let found = Command::new(compiler()).arg("--version").output().is_ok_and(|output| output.status.success());
        if !found {
            skipped(format_args!("no C++ compiler `{}`; CXX names another", compiler().display()));
        }
        found
    });
    *FOUND
}

/// The kernels of one operator, compiled for the host.
struct Kernels {
    library: Library,
    /// Kernels use globals of the library.
    one_at_a_time: Mutex<()>,
}

impl Kernels {
    /// Those in folder `operator`, as for a compute capability; nothing where there is no compiler.
    fn of(operator: &'static str, capability: u32) -> Option<&'static Self> {
        static ALL: Mutex<BTreeMap<(&str, u32), &OnceLock<Kernels>>> = Mutex::new(BTreeMap::new());
        let mut all = ALL.lock().expect("no panic while it is held");
        let kernels: &OnceLock<Self> = all.entry((operator, capability)).or_insert_with(|| Box::leak(Box::default()));
        drop(all);
        has_compiler().then(|| kernels.get_or_init(|| Self::compile(operator, capability)))
    }

    fn compile(operator: &str, capability: u32) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let suffix = if sanitized() { "-sanitized" } else { "" };
        let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{operator}-{capability}{suffix}.so"));
        let mut command = Command::new(compiler());
        command.args(["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off"]);
        command.args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
        if sanitized() {
            command.args([
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer",
                "-g1",
            ]);
        }
        command.arg(format!("-DHOST_ARCH={}", 10 * capability));
        command.arg("-include").arg(root.join("tests/cuda_on_host/shim.hpp"));
        command.arg("-I").arg(root.join("src/cuda"));
        command.args(["-x", "c++"]).arg(root.join("src").join(operator).join("kernel.cu")).arg("-o").arg(&output);
        let done = command.output().expect("the compiler runs");
        assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
        // SAFETY: the library has just been made, of sources that run nothing when it is loaded.
        let library = unsafe { Library::new(&output) }.expect("the library loads");
        Self { library, one_at_a_time: Mutex::new(()) }
    }

    fn int(&self, name: String) -> i32 {
        // SAFETY: the header defines the symbol as a constant of this type.
        *unsafe { self.library.get::<*const c_int>(name.as_bytes()).map(|symbol| &**symbol) }
            .expect("the constant is there")
    }

    /// Runs `launches` with blocks and threads in some order.
    fn run<A: Arguments>(&self, launches: impl Iterator<Item = Launch<A>>, order: u32) {
        type Kernel = unsafe extern "C" fn(*const c_void);
        type Run = unsafe extern "C" fn(Kernel, c_int, c_int, c_int, *const c_void, u32) -> *const c_char;
        let _held = self.one_at_a_time.lock().expect("no test has failed before");
        // SAFETY: so the header defines it.
        let run = unsafe { self.library.get::<Run>(b"host_launch") }.expect("the header is there");
        for launch in launches {
            let name = launch.kernel;
            assert!(launch.shared <= 48 << 10, "{name}: more shared memory than a block has without asking");
            assert_eq!(self.int(format!("{name}_threads")), launch.threads as i32, "{name}");
            assert_eq!(self.int(format!("{name}_arguments")), size_of::<A>() as i32, "{name}");
            let arguments = (&raw const launch.arguments).cast();
            // SAFETY: the arguments are of the kernel's type; the buffers that they name outlive the call.
            let wrong = unsafe {
                let kernel = self.library.get::<Kernel>(name.as_bytes()).unwrap_or_else(|_| panic!("no kernel {name}"));
                run(*kernel, launch.blocks as i32, launch.threads as i32, launch.shared as i32, arguments, order)
            };
            if !wrong.is_null() {
                // SAFETY: a literal of the header.
                panic!("{name}: {:?}", unsafe { CStr::from_ptr(wrong) });
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- tensors

/// Memory as a device would give it: aligned to 256 bytes, and of exactly the size, so that a sanitizer sees what is
/// read or written behind it. It begins `skipped` bytes later where addresses are to be odd.
struct Buffer {
    data: *mut u8,
    layout: Layout,
    skipped: usize,
    size: usize,
}

impl Buffer {
    fn with_skipped(bytes: &[u8], skipped: usize) -> Self {
        let layout = Layout::from_size_align(skipped + bytes.len().max(1), 256).expect("a small layout");
        // SAFETY: the layout is not empty; what is allocated is as large as what is copied there.
        let data = unsafe {
            let data = alloc::alloc(layout);
            assert!(!data.is_null());
            data.add(skipped).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            data
        };
        Self { data, layout, skipped, size: bytes.len() }
    }

    fn new(bytes: &[u8]) -> Self {
        Self::with_skipped(bytes, 0)
    }

    /// To be written: full of what is not a plausible result.
    fn output(bytes: usize) -> Self {
        Self::new(&vec![0xa5; bytes])
    }

    fn ints(values: impl IntoIterator<Item = i64>) -> Self {
        Self::new(&values.into_iter().flat_map(i64::to_ne_bytes).collect::<Vec<_>>())
    }

    fn floats(values: &[f64], dtype: Dtype) -> Self {
        Self::new(&encode(values, dtype))
    }

    fn at(&self) -> u64 {
        self.data as u64 + self.skipped as u64
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised; nothing writes to it while no kernel runs.
        unsafe { slice::from_raw_parts(self.data.add(self.skipped), self.size) }
    }

    fn to_ints(&self) -> Vec<i64> {
        self.bytes().chunks_exact(8).map(|bytes| i64::from_ne_bytes(bytes.try_into().expect("eight"))).collect()
    }

    fn to_floats(&self, dtype: Dtype) -> Vec<f64> {
        decode(self.bytes(), dtype)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { alloc::dealloc(self.data, self.layout) }
    }
}

fn encode(values: &[f64], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|&value| (value as f32).to_ne_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f64(value).to_ne_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&value| bf16::from_f64(value).to_ne_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    let words = || bytes.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
    match dtype {
        Dtype::F32 => {
            bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four")).into()).collect()
        }
        Dtype::F16 => words().map(|word| f16::from_ne_bytes(word).into()).collect(),
        Dtype::Bf16 => words().map(|word| bf16::from_ne_bytes(word).into()).collect(),
    }
}

/// As the type keeps it.
fn rounded(values: Vec<f64>, dtype: Dtype) -> Vec<f64> {
    decode(&encode(&values, dtype), dtype)
}

/// How much a rounded value may be off, in parts of it.
fn unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
    }
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Numbers that only look random (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Between -1 and 1.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / 2f64.powi(52) - 1.0
    }

    fn values(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.uniform()).collect()
    }

    /// Small whole numbers, as sizes are.
    fn sizes(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| 1.0 + self.below(5) as f64).collect()
    }
}

/// How many sampled cases there is time for.
fn samples(count: usize) -> usize {
    if sanitized() { count / 6 } else { count }
}

/// Runs `enqueue` in several orders: each must give the same.
fn in_all_orders<T: PartialEq>(orders: u32, mut enqueue: impl FnMut(u32) -> T) -> T {
    let first = enqueue(0);
    for order in 1..if sanitized() { 1 } else { orders } {
        assert!(enqueue(order) == first, "the result depends on the order of threads: a barrier is missing");
    }
    first
}

// ---------------------------------------------------------------------------------------------------------- TokenMerge

/// What the metric of a test looks like.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Metric {
    /// No two similarities are close.
    Random,
    /// Many similarities are equal, exactly.
    Ties,
    /// All rows are zero.
    Zeros,
    /// Ties, and a row that is not a number.
    Nan,
}

struct Merged {
    y: Vec<f64>,
    size: Vec<f64>,
    anchor: Vec<i64>,
    leaving: Vec<i64>,
    into: Vec<i64>,
}

/// A tensor of which only some channels are heads; the others are large, so that reading them shows.
fn with_heads(heads: &Heads, rows: usize, mut channel: impl FnMut(usize, usize) -> f64) -> Vec<f64> {
    let mut values = vec![1000.0; rows * heads.width];
    for row in 0..rows {
        for at in 0..heads.heads * heads.head_dim {
            values[row * heads.width + heads.at + at] = channel(row, at);
        }
    }
    values
}

fn check_merge(kernels: &Kernels, problem: &token_merge::cuda::Problem, kind: Metric, seed: u64, orders: u32) {
    let &token_merge::cuda::Problem { batch, tokens, channels, protect, suffix, r, metric: heads, dtype, .. } = problem;
    let named = format!("{problem:?}, {kind:?}, seed {seed}");
    let mut random = Random(seed);
    let x = rounded(random.values(batch * tokens * channels), dtype);
    let size = random.sizes(batch * tokens);
    let patterns: Vec<usize> = (0..batch * tokens).map(|_| random.below(4)).collect();
    let metric = with_heads(&heads, batch * tokens, |row, at| match kind {
        Metric::Random => random.uniform(),
        Metric::Zeros => 0.0,
        // One channel is not zero: similarities are 0, 1 or -1, whatever the rounding.
        Metric::Nan if row % tokens == tokens / 2 => f64::NAN,
        Metric::Ties | Metric::Nan => {
            let pattern = patterns[row];
            if at % heads.head_dim == pattern.min(heads.head_dim - 1) { [1.0, -2.0, 0.0, 4.0][pattern] } else { 0.0 }
        }
    });
    let metric = rounded(metric, problem.metric_dtype);

    let slots = tokens - r;
    // Now and then where no wide access is possible.
    let skipped = if seed.is_multiple_of(3) { dtype.bytes() } else { 0 };
    let of = (
        Buffer::with_skipped(&encode(&x, dtype), skipped),
        Buffer::floats(&metric, problem.metric_dtype),
        Buffer::floats(&size, Dtype::F32),
    );
    let device = Device { capability: 80, multiprocessors: [1, 3, 40][seed as usize % 3] };
    let bytes = in_all_orders(orders, |order| {
        let to = [
            Buffer::output(batch * slots * channels * dtype.bytes()),
            Buffer::output(batch * slots * 4),
            Buffer::output(batch * slots * 8),
            Buffer::output(batch * r * 8),
            Buffer::output(batch * r * 8),
        ];
        let scratch = Buffer::output(token_merge::cuda::scratch_bytes(problem));
        let tensors = token_merge::cuda::Tensors {
            x: of.0.at(),
            metric: of.1.at(),
            size: of.2.at(),
            y: to[0].at(),
            size_out: to[1].at(),
            anchor: to[2].at(),
            leaving: to[3].at(),
            into: to[4].at(),
            scratch: scratch.at(),
        };
        kernels.run(token_merge::cuda::launches(problem, &tensors, &device).expect("the problem is fine"), order);
        to.map(|buffer| buffer.bytes().to_vec())
    });
    let ints = |bytes: &[u8]| Buffer::new(bytes).to_ints();
    let out = Merged {
        y: decode(&bytes[0], dtype),
        size: decode(&bytes[1], Dtype::F32),
        anchor: ints(&bytes[2]),
        leaving: ints(&bytes[3]),
        into: ints(&bytes[4]),
    };

    for image in 0..batch {
        let token = |position: usize| image * tokens + position;
        let end = tokens - suffix;
        let of_a: Vec<usize> = (protect..end).filter(|position| position % 2 == 0).collect();
        let of_b: Vec<usize> = (protect..end).filter(|position| position % 2 == 1).collect();
        let row = |position: usize| -> Vec<f64> {
            let row = &metric[token(position) * heads.width + heads.at..][..heads.heads * heads.head_dim];
            let mean = |d| row.iter().skip(d).step_by(heads.head_dim).sum::<f64>() / heads.heads as f64;
            let mean: Vec<f64> = (0..heads.head_dim).map(mean).collect();
            let norm = mean.iter().map(|value| value * value).sum::<f64>().sqrt();
            // Not `max`: it would hide a NaN.
            let norm = if norm < 1e-12 { 1e-12 } else { norm };
            mean.iter().map(|value| value / norm).collect()
        };
        // NaN above all.
        let rank = |score: f64| if score.is_nan() { f64::INFINITY } else { score };
        let (rows_a, rows_b): (Vec<_>, Vec<_>) =
            (of_a.iter().map(|&at| row(at)).collect(), of_b.iter().map(|&at| row(at)).collect());
        let similarity = |a: usize, b: usize| {
            rank(rows_a[a].iter().zip(&rows_b[b]).map(|(left, right): (&f64, &f64)| left * right).sum())
        };
        let best: Vec<(f64, usize)> = (0..of_a.len())
            .map(|a| {
                (0..of_b.len())
                    .map(|b| (similarity(a, b), b))
                    .fold((f64::NEG_INFINITY, 0), |best, next| if next.0 > best.0 { next } else { best })
            })
            .collect();
        let mut order: Vec<usize> = (0..of_a.len()).collect();
        order.sort_by(|&left, &right| best[right].0.total_cmp(&best[left].0)); // stable: the lower position first

        // Which tokens leave, in which order, and into what.
        let leaving = &out.leaving[image * r..][..r];
        let into = &out.into[image * r..][..r];
        let before_b = protect + of_a.len() - r;
        let close = 1e-6;
        let mut left = vec![false; of_a.len()];
        let mut joined = vec![Vec::new(); slots];
        for l in 0..r {
            let a = of_a.iter().position(|&at| at as i64 == leaving[l]);
            let a = a.unwrap_or_else(|| panic!("{named}: {} leaves but is not in A", leaving[l]));
            assert!(!left[a], "{named}: {a} leaves twice");
            left[a] = true;
            let b = into[l] as usize - before_b;
            if kind == Metric::Random {
                let off = (best[a].0 - best[order[l]].0).abs();
                assert!(off < close, "{named}: leaving {l} is {a}, not {}, off by {off}", order[l]);
                assert!(best[a].0 - similarity(a, b) < close, "{named}: {a} joins {b}, not {}", best[a].1);
            } else {
                assert_eq!((a, b), (order[l], best[order[l]].1), "{named}: leaving {l}");
            }
            joined[into[l] as usize].push(of_a[a]);
        }

        // Anchors.
        let staying: Vec<usize> = if protect > 0 {
            (0..of_a.len()).filter(|&a| !left[a]).map(|a| of_a[a]).collect()
        } else {
            let anchors = &out.anchor[image * slots..][..of_a.len() - r];
            for (&anchor, &a) in anchors.iter().zip(&order[r..]) {
                let found = anchor as usize / 2;
                let off = if found == a { 0.0 } else { (best[found].0 - best[a].0).abs() };
                let fine = if kind == Metric::Random { off < close } else { found == a };
                assert!(fine && !left[found] && anchor % 2 == 0, "{named}: staying {anchor}, not {}", of_a[a]);
            }
            anchors.iter().map(|&anchor| anchor as usize).collect()
        };
        let anchors: Vec<usize> = (0..protect).chain(staying).chain(of_b.iter().copied()).chain(end..tokens).collect();
        assert_eq!(anchors.len(), slots);

        // Rows.
        for (slot, &anchor) in anchors.iter().enumerate() {
            let at = image * slots + slot;
            assert_eq!(out.anchor[at], anchor as i64, "{named}: anchor of slot {slot}");
            let members: Vec<usize> = [anchor].into_iter().chain(joined[slot].iter().copied()).collect();
            let total: f64 = members.iter().map(|&position| size[token(position)]).sum();
            assert_eq!(out.size[at], total, "{named}: size of slot {slot}");
            for channel in 0..channels {
                let of = |&position: &usize| size[token(position)] / total * x[token(position) * channels + channel];
                let expected: f64 = members.iter().map(of).sum();
                let off = (out.y[at * channels + channel] - expected).abs();
                let allowed = if members.len() == 1 { 0.0 } else { unit(dtype) * expected.abs() + 1e-6 };
                assert!(off <= allowed, "{named}: slot {slot}, channel {channel} is off by {off}");
            }
        }
    }
}

#[test]
fn merge() {
    let Some(kernels) = Kernels::of("token_merge", 80) else { return };
    let mut random = Random(7);
    for seed in 0..samples(180) as u64 {
        let (heads, head_dim, at) =
            random.of(&[(1, 5, 0), (3, 32, 7), (12, 64, 0), (2, 80, 160), (1, 128, 1), (2, 130, 0)]);
        let metric = Heads { width: heads * head_dim + at + random.below(3), at, heads, head_dim };
        let (protect, suffix) = random.of(&[(0, 0), (1, 0), (2, 3), (5, 1), (0, 1)]);
        let tokens = protect + suffix + random.of(&[0, 1, 2, 3, 17, 50, 101, 196]);
        let limit = (tokens - protect - suffix) / 2;
        let problem = token_merge::cuda::Problem {
            batch: random.of(&[1, 2, 3]),
            tokens: tokens.max(1),
            channels: random.of(&[1, 5, 24, 72, 520]),
            protect,
            suffix,
            r: random.of(&[0, limit.min(1), limit / 2, limit, limit]),
            metric,
            dtype: random.of(&DTYPES),
            metric_dtype: random.of(&DTYPES),
        };
        let kind = random.of(&[Metric::Random, Metric::Random, Metric::Ties, Metric::Zeros, Metric::Nan]);
        check_merge(kernels, &problem, kind, seed, 3);
    }
}

#[test]
fn merge_of_common_models() {
    if sanitized() {
        return; // others have all the paths
    }
    let Some(kernels) = Kernels::of("token_merge", 80) else { return };
    for (channels, heads, dtype) in [(768, 12, Dtype::F16), (1664, 16, Dtype::Bf16), (384, 6, Dtype::F32)] {
        let head_dim = channels / heads;
        let metric = Heads { width: 3 * channels, at: channels, heads, head_dim };
        let problem = token_merge::cuda::Problem {
            batch: 2,
            tokens: 197,
            channels,
            protect: 1,
            suffix: 0,
            r: 16,
            metric,
            dtype,
            metric_dtype: dtype,
        };
        check_merge(kernels, &problem, Metric::Random, 1, 2);
    }
}

#[test]
fn merge_of_many_tokens() {
    let Some(kernels) = Kernels::of("token_merge", 80) else { return };
    // The last sorts in scratch memory.
    for (tokens, r, protect) in [(577, 288, 1), (2049, 700, 0), (4097, 1500, 1), (8300, 2000, 2)] {
        if sanitized() && (600..8000).contains(&tokens) {
            continue;
        }
        let metric = Heads { width: 6, at: 0, heads: 2, head_dim: 3 };
        let problem = token_merge::cuda::Problem {
            batch: 1,
            tokens,
            channels: 3,
            protect,
            suffix: 0,
            r,
            metric,
            dtype: Dtype::F32,
            metric_dtype: Dtype::F16,
        };
        check_merge(kernels, &problem, Metric::Ties, 2, 2);
    }
}

#[test]
fn merges_that_make_no_sense() {
    let metric = Heads { width: 8, at: 0, heads: 2, head_dim: 4 };
    let problem = token_merge::cuda::Problem {
        batch: 1,
        tokens: 10,
        channels: 4,
        protect: 1,
        suffix: 0,
        r: 4,
        metric,
        dtype: Dtype::F32,
        metric_dtype: Dtype::F32,
    };
    let tensors = token_merge::cuda::Tensors {
        x: 0,
        metric: 0,
        size: 0,
        y: 0,
        size_out: 0,
        anchor: 0,
        leaving: 0,
        into: 0,
        scratch: 0,
    };
    let device = Device { capability: 80, multiprocessors: 1 };
    let fails = |problem| token_merge::cuda::launches(&problem, &tensors, &device).is_err();
    assert!(!fails(problem));
    assert!(fails(token_merge::cuda::Problem { r: 5, ..problem }));
    assert!(fails(token_merge::cuda::Problem { protect: 11, r: 0, ..problem }));
    assert!(fails(token_merge::cuda::Problem { tokens: 1 << 32, ..problem }));
    assert!(fails(token_merge::cuda::Problem { metric: Heads { at: 1, ..metric }, ..problem }));
}

// ----------------------------------------------------------------------------------------------------------- Attention

/// How sizes of keys are given.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Sizes {
    /// Not at all: they are one.
    None,
    /// As merging makes them.
    Small,
    /// More than float16 has room for.
    Huge,
    /// Most are zero.
    Sparse,
}

fn check_attention(problem: &attention::cuda::Problem, capability: u32, sizes: Sizes, packed: bool, seed: u64) {
    let Some(kernels) = Kernels::of("attention", if capability < 80 { 75 } else { 80 }) else { return };
    let &attention::cuda::Problem { batch, queries, keys, scale, dtype, .. } = problem;
    let Heads { heads, head_dim, .. } = problem.q;
    let named = format!("{problem:?}, {sizes:?}, sm_{capability}, packed: {packed}, seed {seed}");
    let mut random = Random(seed);
    let skipped = if seed.is_multiple_of(4) { dtype.bytes() } else { 0 };
    let mut operand = |of: &Heads, rows: usize| {
        let values = rounded(with_heads(of, batch * rows, |_, _| 2.0 * random.uniform()), dtype);
        let buffer = Buffer::with_skipped(&encode(&values, dtype), skipped);
        (values, buffer)
    };
    let (q, k, v);
    if packed {
        // One tensor; what is no head of an operand is one of another.
        let all = Heads { at: 0, heads: 3 * heads, ..problem.q };
        q = operand(&all, queries);
        (k, v) = ((q.0.clone(), None), (q.0.clone(), None));
    } else {
        q = operand(&problem.q, queries);
        let (of_k, of_v) = (operand(&problem.k, keys), operand(&problem.v, keys));
        (k, v) = ((of_k.0, Some(of_k.1)), (of_v.0, Some(of_v.1)));
    }
    let size: Vec<f64> = match sizes {
        Sizes::None => vec![1.0; batch * keys],
        Sizes::Small => random.sizes(batch * keys),
        Sizes::Huge => random.sizes(batch * keys).iter().map(|size| size * 100_000.0).collect(),
        // The only key, or the last, counts.
        Sizes::Sparse => {
            (0..batch * keys).map(|at| if at % keys == keys - 1 || at % 7 == 3 { 1.0 } else { 0.0 }).collect()
        }
    };
    let of_size = Buffer::floats(&size, Dtype::F32);
    let width = heads * head_dim;
    let device = Device { capability, multiprocessors: 4 };
    let y = in_all_orders(3, |order| {
        let y = Buffer::output(batch * queries * width * dtype.bytes());
        let tensors = attention::cuda::Tensors {
            q: q.1.at(),
            k: k.1.as_ref().unwrap_or(&q.1).at(),
            v: v.1.as_ref().unwrap_or(&q.1).at(),
            size: if sizes == Sizes::None { 0 } else { of_size.at() },
            y: y.at(),
        };
        kernels.run(attention::cuda::launches(problem, &tensors, &device).expect("the problem is fine"), order);
        y.bytes().to_vec()
    });
    let y = decode(&y, dtype);

    // Scores are as good as float32, so weights the less the larger those are; else weights are rounded to the type of
    // the values.
    let steep = f64::from(scale.abs()) * (head_dim as f64).sqrt();
    let tolerance = if dtype == Dtype::F32 { 4e-6 * steep.max(1.0) } else { 2.0 * unit(dtype) };
    for image in 0..batch {
        for head in 0..heads {
            let row = |of: &[f64], rows: usize, window: &Heads, at: usize| -> Vec<f64> {
                of[(image * rows + at) * window.width + window.at + head * head_dim..][..head_dim].to_vec()
            };
            let all_k: Vec<_> = (0..keys).map(|at| row(&k.0, keys, &problem.k, at)).collect();
            let all_v: Vec<_> = (0..keys).map(|at| row(&v.0, keys, &problem.v, at)).collect();
            for query in 0..queries {
                let of_q = row(&q.0, queries, &problem.q, query);
                let scores: Vec<f64> = all_k
                    .iter()
                    .map(|key| f64::from(scale) * key.iter().zip(&of_q).map(|(left, right)| left * right).sum::<f64>())
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> =
                    scores.iter().zip(&size[image * keys..]).map(|(score, size)| (score - top).exp() * size).collect();
                let total: f64 = weights.iter().sum();
                for channel in 0..head_dim {
                    let expected = weights.iter().zip(&all_v).map(|(w, v)| w * v[channel]).sum::<f64>() / total;
                    let found = y[(image * queries + query) * width + head * head_dim + channel];
                    let off = (found - expected).abs();
                    assert!(off <= tolerance, "{named}: query {query}, channel {channel}: {found}, not {expected}");
                }
            }
        }
    }
}

fn sample_attention(capability: u32, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut random = Random(seed);
        let head_dim = random.of(&[1, 5, 16, 32, 64, 64, 64, 72, 80, 88, 96, 128, 128, 160]);
        let heads = random.of(&[1, 1, 2]);
        let packed = random.below(2) == 0;
        let (queries, keys) = random.of(&[(1, 1), (7, 3), (50, 50), (65, 130), (70, 64), (33, 65), (16, 200)]);
        let dtype = random.of(&DTYPES);
        let mut window = || {
            let at = random.of(&[0, 0, 8, 3]);
            Heads { width: at + heads * head_dim + random.of(&[0, 8, 1]), at, heads, head_dim }
        };
        let (q, k, v) = if packed {
            let of = |at| Heads { width: 3 * heads * head_dim, at: at * heads * head_dim, heads, head_dim };
            (of(0), of(1), of(2))
        } else {
            (window(), window(), window())
        };
        let scale = random.of(&[1.0, 1.0, 1.0, -1.0, 0.0, 3.0]) / (head_dim as f32).sqrt();
        let keys = if packed { queries } else { keys };
        let problem = attention::cuda::Problem { batch: random.of(&[1, 2]), queries, keys, q, k, v, scale, dtype };
        let sizes = random.of(&[Sizes::None, Sizes::Small, Sizes::Small, Sizes::Huge, Sizes::Sparse]);
        check_attention(&problem, capability, sizes, packed, seed);
    }
}

#[test]
fn attention_since_ampere() {
    sample_attention(80, 0..samples(120) as u64);
}

#[test]
fn attention_on_turing() {
    if sanitized() {
        return; // the newer code has all accesses
    }
    sample_attention(75, 1000..1000 + samples(48) as u64);
}

#[test]
fn attention_of_common_models() {
    if sanitized() {
        return; // others have all the paths
    }
    for (seed, (head_dim, dtype)) in
        [64usize, 80, 128].into_iter().flat_map(|dim| DTYPES.map(|dtype| (dim, dtype))).enumerate()
    {
        let of = |at: usize| Heads { width: 6 * head_dim, at: at * 2 * head_dim, heads: 2, head_dim };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (queries, keys) = (197, 197);
        let problem = attention::cuda::Problem { batch: 1, queries, keys, q: of(0), k: of(1), v: of(2), scale, dtype };
        check_attention(&problem, 90, Sizes::Small, true, seed as u64);
    }
}

// ------------------------------------------------------------------------------------------------- what merging leaves

/// A grouping as a merge might return it: anchor, leaving, into, and the slot of every token.
fn grouping(random: &mut Random, batch: usize, slots: usize, r: usize) -> [Vec<i64>; 4] {
    let tokens = slots + r;
    let mut all: [Vec<i64>; 4] = Default::default();
    for _ in 0..batch {
        let mut listed: Vec<i64> = (0..tokens as i64).collect();
        for at in 1..tokens {
            listed.swap(at, random.below(at + 1));
        }
        let into: Vec<i64> = (0..r).map(|_| random.below(slots) as i64).collect();
        let mut assign = vec![0; tokens];
        for (at, &token) in listed.iter().enumerate() {
            assign[token as usize] = if at < slots { at as i64 } else { into[at - slots] };
        }
        all[0].extend(&listed[..slots]);
        all[1].extend(&listed[slots..]);
        all[2].extend(into);
        all[3].extend(assign);
    }
    all
}

#[test]
fn assign() {
    let Some(kernels) = Kernels::of("token_assign", 80) else { return };
    let mut random = Random(1);
    for (batch, slots, r) in [(1, 1, 0), (3, 5, 2), (2, 197, 98), (1, 3000, 1097), (0, 4, 1)] {
        let [anchor, leaving, into, expected] = grouping(&mut random, batch, slots, r);
        let [anchor, leaving, into] = [anchor, leaving, into].map(Buffer::ints);
        let assign = in_all_orders(3, |order| {
            let assign = Buffer::output(batch * (slots + r) * 8);
            let tensors = token_assign::cuda::Tensors {
                anchor: anchor.at(),
                leaving: leaving.at(),
                into: into.at(),
                assign: assign.at(),
            };
            let problem = token_assign::Problem { batch, slots, r };
            kernels.run(token_assign::cuda::launches(&problem, &tensors).expect("the problem is fine"), order);
            assign.to_ints()
        });
        assert_eq!(assign, expected);
    }
}

#[test]
fn restore() {
    let Some(kernels) = Kernels::of("token_restore", 80) else { return };
    let mut random = Random(2);
    for (batch, slots, r, row_bytes, skipped) in [
        (1, 1, 0, 1, 0),
        (2, 5, 3, 768 * 2, 0),
        (2, 50, 47, 1664 * 4, 4),
        (3, 7, 2, 10, 0),
        (1, 9, 9, 16, 1),
        (1, 3, 1, 4 * 33, 0),
    ] {
        let [.., assign] = grouping(&mut random, batch, slots, r);
        let rows: Vec<u8> = (0..batch * slots * row_bytes).map(|_| random.below(256) as u8).collect();
        let expected: Vec<u8> = (0..batch * (slots + r))
            .flat_map(|token| &rows[(token / (slots + r) * slots + assign[token] as usize) * row_bytes..][..row_bytes])
            .copied()
            .collect();
        let (y, assign) = (Buffer::with_skipped(&rows, skipped), Buffer::ints(assign));
        let x = in_all_orders(3, |order| {
            let x = Buffer::output(batch * (slots + r) * row_bytes);
            let tensors = token_restore::cuda::Tensors { y: y.at(), assign: assign.at(), x: x.at() };
            let problem = token_restore::Problem { batch, tokens: slots + r, slots, row_bytes };
            kernels.run(token_restore::cuda::launches(&problem, &tensors).expect("the problem is fine"), order);
            x.bytes().to_vec()
        });
        assert_eq!(x, expected);
    }
}

#[test]
fn mean() {
    let Some(kernels) = Kernels::of("token_mean", 80) else { return };
    let mut random = Random(3);
    for seed in 0..samples(60) {
        let dtype = random.of(&DTYPES);
        let (batch, slots, r) = (1 + random.below(3), 1 + random.below(60), random.below(50));
        let (channels, shared) = (random.of(&[1, 5, 64, 300, 520, 1032]), random.below(2) == 0);
        let tokens = slots + r;
        let [.., assign] = grouping(&mut random, batch, slots, r);
        let table = rounded(random.values(if shared { 1 } else { batch } * tokens * channels), dtype);
        let size: Vec<f64> = (0..batch * slots)
            .map(|at| {
                let members = &assign[at / slots * tokens..][..tokens];
                members.iter().filter(|&&slot| slot as usize == at % slots).count() as f64
            })
            .collect();
        let skipped = if seed.is_multiple_of(3) { dtype.bytes() } else { 0 };
        let of_table = Buffer::with_skipped(&encode(&table, dtype), skipped);
        let (of_assign, of_size) = (Buffer::ints(assign.iter().copied()), Buffer::floats(&size, Dtype::F32));
        let y = in_all_orders(3, |order| {
            let y = Buffer::output(batch * slots * channels * dtype.bytes());
            let tensors = token_mean::cuda::Tensors {
                table: of_table.at(),
                assign: of_assign.at(),
                size: of_size.at(),
                y: y.at(),
            };
            let problem = token_mean::cuda::Problem { batch, tokens, slots, channels, shared, dtype };
            kernels.run(token_mean::cuda::launches(&problem, &tensors).expect("the problem is fine"), order);
            y.to_floats(dtype)
        });
        for (at, found) in y.into_iter().enumerate() {
            let (row, channel) = (at / channels, at % channels);
            let image = row / slots;
            let members = (0..tokens).filter(|token| assign[image * tokens + token] as usize == row % slots);
            let from = if shared { 0 } else { image * tokens };
            let sum: f64 = members.map(|token| table[(from + token) * channels + channel]).sum();
            let expected = sum / size[row];
            let off = (found - expected).abs();
            assert!(off <= unit(dtype) * expected.abs() + 1e-6, "slot {row}, channel {channel} is off by {off}");
        }
    }
}

#[test]
fn size() {
    let Some(kernels) = Kernels::of("token_size", 80) else { return };
    for count in [0, 1, 255, 256, 1000] {
        let size = Buffer::output(count * 4);
        kernels.run(token_size::cuda::launches(count, size.at()).expect("the problem is fine"), 0);
        assert_eq!(size.to_floats(Dtype::F32), vec![1.0; count]);
    }
}

// ----------------------------------------------------------------------------------------------------- attention level

#[test]
fn masked_softmax() {
    let Some(kernels) = Kernels::of("masked_softmax", 80) else { return };
    let mut random = Random(4);
    for seed in 0..samples(90) {
        let dtype = random.of(&DTYPES);
        let (batch, heads) = (1 + random.below(3), 1 + random.below(4));
        let (queries, keys) = random.of(&[(1, 1), (7, 3), (50, 50), (3, 33), (65, 64), (2, 577)]);
        let eps = random.of(&[masked_softmax::EPSILON, masked_softmax::EPSILON, 1e-3]);
        let scores = random.values(batch * heads * queries * keys).iter().map(|score| 8.0 * score).collect();
        let scores = rounded(scores, dtype);
        let closed = random.of(&[0, 30, 70, 100]);
        let mask: Vec<f64> = (0..batch * queries * keys).map(|_| (random.below(100) >= closed).into()).collect();
        let size = random.sizes(batch * keys);
        let skipped = if seed.is_multiple_of(3) { dtype.bytes() } else { 0 };
        let of_scores = Buffer::with_skipped(&encode(&scores, dtype), skipped);
        let (of_mask, of_size) = (Buffer::floats(&mask, Dtype::F32), Buffer::floats(&size, Dtype::F32));
        let problem = masked_softmax::cuda::Problem { batch, heads, queries, keys, eps, dtype };
        let weights = in_all_orders(3, |order| {
            let weights = Buffer::output(scores.len() * dtype.bytes());
            let tensors = masked_softmax::cuda::Tensors {
                scores: of_scores.at(),
                mask: of_mask.at(),
                size: of_size.at(),
                weights: weights.at(),
            };
            kernels.run(masked_softmax::cuda::launches(&problem, &tensors).expect("the problem is fine"), order);
            weights.to_floats(dtype)
        });
        for (row, (weights, scores)) in weights.chunks(keys).zip(scores.chunks(keys)).enumerate() {
            let (image, query) = (row / queries / heads, row % queries);
            let mask = &mask[(image * queries + query) * keys..][..keys];
            let size = &size[image * keys..][..keys];
            let sized: Vec<f64> = scores.iter().zip(size).map(|(score, size)| score + size.ln()).collect();
            let peak = sized.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let open: Vec<f64> = sized.iter().zip(mask).map(|(score, open)| (score - peak).exp() * open).collect();
            let (total, eps) = (open.iter().sum::<f64>(), f64::from(eps));
            for ((open, found), is_open) in open.iter().zip(weights).zip(mask) {
                let expected = (open + eps / keys as f64) / (total + eps);
                // Exponents of 24 are off by as many times 6e-8; float16 has nothing below 2⁻²⁴.
                let lost = if dtype == Dtype::F16 { 2f64.powi(-25) } else { 0.0 };
                let off = (found - expected).abs();
                assert!(off <= (unit(dtype) + 4e-6) * expected + lost, "{problem:?}: {found}, not {expected}");
                let first = weights[mask.iter().position(|open| open == is_open).expect("itself")];
                // `ConnectionMask` compares them.
                assert!(*is_open == 1.0 || *found == first, "{problem:?}: two floors, {found} and {first}");
            }
        }
    }
}

#[test]
fn masked_softmax_of_what_is_not_finite() {
    let Some(kernels) = Kernels::of("masked_softmax", 80) else { return };
    let ones = Buffer::floats(&[1.0; 3 * 40], Dtype::F32);
    let problem = masked_softmax::cuda::Problem {
        batch: 1,
        heads: 1,
        queries: 3,
        keys: 40,
        eps: masked_softmax::EPSILON,
        dtype: Dtype::F32,
    };
    for (value, count, ruins) in
        [(f64::NAN, 1, true), (f64::INFINITY, 1, true), (f64::NEG_INFINITY, 1, false), (f64::NEG_INFINITY, 40, false)]
    {
        // In the second row.
        let mut scores = vec![0.5; 3 * 40];
        scores[79 - (count - 1)..80].fill(value);
        let (scores, weights) = (Buffer::floats(&scores, Dtype::F32), Buffer::output(3 * 40 * 4));
        let tensors = masked_softmax::cuda::Tensors {
            scores: scores.at(),
            mask: ones.at(),
            size: ones.at(),
            weights: weights.at(),
        };
        kernels.run(masked_softmax::cuda::launches(&problem, &tensors).expect("the problem is fine"), 0);
        for (at, weight) in weights.to_floats(Dtype::F32).into_iter().enumerate() {
            assert_eq!(weight.is_nan(), ruins && at / 40 == 1, "{count} times {value}: {weight} in {at}");
            let uniform = count == 40 && at / 40 == 1;
            assert!(!uniform || (weight * 40.0 - 1.0).abs() < 1e-6, "{weight} in {at}");
        }
    }
    let tensors = masked_softmax::cuda::Tensors { scores: 0, mask: 0, size: 0, weights: 0 };
    let fails = |problem| masked_softmax::cuda::launches(&problem, &tensors).is_err();
    assert!(!fails(problem));
    assert!(fails(masked_softmax::cuda::Problem { eps: -1.0, ..problem }));
    assert!(fails(masked_softmax::cuda::Problem { eps: f32::NAN, ..problem }));
    assert!(fails(masked_softmax::cuda::Problem { keys: 1 << 32, ..problem }));
}

#[test]
fn mask_of_connections() {
    let Some(kernels) = Kernels::of("connection_mask", 80) else { return };
    let mut random = Random(5);
    for seed in 0..samples(120) {
        let dtype = random.of(&DTYPES);
        let (batch, tokens) = (1 + random.below(3), random.of(&[1, 6, 33, 50, 101]));
        let (protect, suffix) = (random.below(3), random.below(3));
        let free = random.of(&[0, 1, tokens / 3, tokens]).min(tokens);
        let slots = protect + free + suffix;
        // Means of one, two, four or eight small multiples of 1/16 are exact, and often equal.
        let heads = random.of(&[1, 2, 4, 8]);
        let weights: Vec<f64> = (0..batch * heads * tokens * tokens).map(|_| random.below(16) as f64 / 16.0).collect();
        let nan = random.below(4) == 0;
        let weights: Vec<f64> =
            weights.into_iter().map(|weight| if nan && random.below(20) == 0 { f64::NAN } else { weight }).collect();
        let anchor: Vec<i64> = (0..batch * slots)
            .map(|at| if (protect..protect + free).contains(&(at % slots)) { random.below(tokens) as i64 } else { -1 })
            .collect();
        let connections = random.of(&[0, 1, free / 4, free / 2, free, free + 3]);
        let problem = connection_mask::Problem { batch, heads, tokens, slots, connections, protect, suffix };
        let skipped = if seed.is_multiple_of(3) { dtype.bytes() } else { 0 };
        let of_weights = Buffer::with_skipped(&encode(&weights, dtype), skipped);
        let of_anchor = Buffer::ints(anchor.iter().copied());
        let mask = in_all_orders(3, |order| {
            let mask = Buffer::output(batch * slots * slots * 4);
            let tensors =
                connection_mask::cuda::Tensors { weights: of_weights.at(), anchor: of_anchor.at(), mask: mask.at() };
            let launches = connection_mask::cuda::launches(&problem, dtype, &tensors).expect("the problem is fine");
            kernels.run(launches, order);
            mask.to_floats(Dtype::F32)
        });
        for (at, stays) in mask.into_iter().enumerate() {
            let (image, row, column) = (at / slots / slots, at / slots % slots, at % slots);
            let compared = protect..protect + free;
            let token = |slot: usize| anchor[image * slots + slot] as usize;
            let strength = |column: usize| {
                let sum: f64 = (0..heads)
                    .map(|head| weights[((image * heads + head) * tokens + token(row)) * tokens + token(column)])
                    .sum();
                // NaN above all.
                if sum.is_nan() { f64::INFINITY } else { sum }
            };
            let expected = !compared.contains(&row) || !compared.contains(&column) || {
                let own = strength(column);
                compared.filter(|&other| strength(other) > own).count() < connections.max(1)
            };
            assert_eq!(stays, f64::from(expected), "{problem:?}: row {row}, column {column} of image {image}");
        }
    }
}

/// On a GPU nothing is refused for what it holds: connections of what is no token are the weakest.
#[test]
fn mask_of_slots_without_tokens() {
    let Some(kernels) = Kernels::of("connection_mask", 80) else { return };
    let problem =
        connection_mask::Problem { batch: 1, heads: 2, tokens: 3, slots: 4, connections: 2, protect: 0, suffix: 0 };
    let weights = Buffer::floats(&[0.5; 2 * 9], Dtype::F32);
    for none in [-1, 3, i64::MAX, i64::MIN] {
        let (anchor, mask) = (Buffer::ints([0, none, 1, 2]), Buffer::output(16 * 4));
        let tensors = connection_mask::cuda::Tensors { weights: weights.at(), anchor: anchor.at(), mask: mask.at() };
        kernels.run(connection_mask::cuda::launches(&problem, Dtype::F32, &tensors).expect("all is fine"), 0);
        let open = [1.0, 0.0, 1.0, 1.0];
        assert_eq!(mask.to_floats(Dtype::F32), [open, [1.0; 4], open, open].concat(), "{none}");
    }
    let tensors = connection_mask::cuda::Tensors { weights: 0, anchor: 0, mask: 0 };
    let fails = |problem| connection_mask::cuda::launches(&problem, Dtype::F32, &tensors).is_err();
    assert!(!fails(problem));
    assert!(fails(connection_mask::Problem { protect: 3, suffix: 2, ..problem }));
    assert!(fails(connection_mask::Problem { suffix: usize::MAX, ..problem }));
    assert!(fails(connection_mask::Problem { heads: 0, ..problem }));
    assert!(fails(connection_mask::Problem { tokens: 1 << 32, ..problem }));
}

// ---------------------------------------------------------------------------------------------------------- TokenScore

fn check_score(kernels: &Kernels, problem: &token_score::Problem, dtype: Dtype, seed: u64) {
    let &token_score::Problem { batch, queries, keys, q, k, scale, first } = problem;
    let named = format!("{problem:?}, {dtype:?}, seed {seed}");
    let mut random = Random(seed);
    // Now and then where no wide access is possible.
    let skipped = if seed.is_multiple_of(4) { dtype.bytes() } else { 0 };
    let mut operand = |of: &Heads, rows: usize| {
        let values = rounded(with_heads(of, batch * rows, |_, _| 2.0 * random.uniform()), dtype);
        let buffer = Buffer::with_skipped(&encode(&values, dtype), skipped);
        (values, buffer)
    };
    let (of_q, of_k) = (operand(&q, queries), operand(&k, keys));
    let size = random.sizes(batch * keys);
    let of_size = Buffer::floats(&size, Dtype::F32);
    let device = Device { capability: 80, multiprocessors: [1, 3, 40][seed as usize % 3] };
    let score = in_all_orders(3, |order| {
        let score = Buffer::output(batch * keys * 4);
        let scratch = Buffer::output(token_score::cuda::scratch_bytes(problem));
        let tensors = token_score::cuda::Tensors {
            q: of_q.1.at(),
            k: of_k.1.at(),
            size: of_size.at(),
            score: score.at(),
            scratch: scratch.at(),
        };
        let launches = token_score::cuda::launches(problem, dtype, &tensors, &device).expect("the problem is fine");
        kernels.run(launches, order);
        score.to_floats(Dtype::F32)
    });

    // Scores are as good as float32, so weights the less the larger those are.
    let steep = f64::from(scale.abs()) * (q.head_dim as f64).sqrt();
    let tolerance = 2e-6 * steep.max(1.0);
    let chosen = first.min(queries);
    for image in 0..batch {
        let mut expected = vec![0.0; keys];
        for (head, query) in (0..q.heads).flat_map(|head| (0..chosen).map(move |query| (head, query))) {
            let row = |of: &[f64], rows: usize, window: &Heads, at: usize| -> Vec<f64> {
                of[(image * rows + at) * window.width + window.at + head * q.head_dim..][..q.head_dim].to_vec()
            };
            let of_query = row(&of_q.0, queries, &q, query);
            let scores: Vec<f64> = (0..keys)
                .map(|key| row(&of_k.0, keys, &k, key).iter().zip(&of_query).map(|(left, right)| left * right).sum())
                .map(|product: f64| product * f64::from(scale))
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> =
                scores.iter().zip(&size[image * keys..]).map(|(score, size)| (score - top).exp() * size).collect();
            let total = weights.iter().sum::<f64>() * (q.heads * chosen) as f64;
            expected.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight / total);
        }
        let largest = expected.iter().copied().fold(0.0, f64::max);
        for (key, (found, expected)) in score[image * keys..].iter().zip(&expected).enumerate() {
            let off = (found - expected).abs() / largest;
            assert!(off <= tolerance, "{named}: key {key} is {found}, not {expected}");
        }
    }
}

#[test]
fn score() {
    let Some(kernels) = Kernels::of("token_score", 80) else { return };
    let mut random = Random(11);
    for seed in 0..samples(90) as u64 {
        let (heads, head_dim, at) = random.of(&[(1, 5, 0), (3, 32, 7), (12, 64, 0), (2, 80, 160), (2, 136, 8)]);
        let mut window = || Heads { width: heads * head_dim + at + random.below(2) * 8, at, heads, head_dim };
        let (q, k) = (window(), window());
        let problem = token_score::Problem {
            batch: random.of(&[1, 2, 3]),
            queries: random.of(&[1, 4, 7, 50]),
            keys: random.of(&[1, 3, 50, 257, 600]),
            q,
            k,
            scale: random.of(&[0.1, 1.0, -0.5]),
            first: random.of(&[1, 1, 5, usize::MAX]),
        };
        check_score(kernels, &problem, random.of(&DTYPES), seed);
    }
}

#[test]
fn scores_of_what_is_not_finite() {
    let Some(kernels) = Kernels::of("token_score", 80) else { return };
    let heads = Heads { width: 1, at: 0, heads: 1, head_dim: 1 };
    let (q, k) = (heads, heads);
    let problem = token_score::Problem { batch: 1, queries: 1, keys: 3, q, k, scale: 1.0, first: 1 };
    let device = Device { capability: 80, multiprocessors: 1 };
    for (key, expected) in [(f64::NEG_INFINITY, Some(0.0)), (f64::INFINITY, None), (f64::NAN, None)] {
        for at in 0..3 {
            let mut keys = [0.0; 3];
            keys[at] = key;
            let (of_q, of_k) = (Buffer::floats(&[1.0], Dtype::F32), Buffer::floats(&keys, Dtype::F32));
            let of_size = Buffer::floats(&[1.0; 3], Dtype::F32);
            let score = Buffer::output(12);
            let scratch = Buffer::output(token_score::cuda::scratch_bytes(&problem));
            let tensors = token_score::cuda::Tensors {
                q: of_q.at(),
                k: of_k.at(),
                size: of_size.at(),
                score: score.at(),
                scratch: scratch.at(),
            };
            let launches = token_score::cuda::launches(&problem, Dtype::F32, &tensors, &device);
            kernels.run(launches.expect("the problem is fine"), 0);
            for (i, score) in score.to_floats(Dtype::F32).into_iter().enumerate() {
                match expected {
                    Some(expected) => assert_eq!(score, if i == at { expected } else { 0.5 }),
                    None => assert!(score.is_nan()),
                }
            }
        }
    }
}

#[test]
fn scores_that_make_no_sense() {
    let heads = Heads { width: 8, at: 0, heads: 2, head_dim: 4 };
    let problem = token_score::Problem { batch: 1, queries: 5, keys: 5, q: heads, k: heads, scale: 1.0, first: 1 };
    let tensors = token_score::cuda::Tensors { q: 0, k: 0, size: 0, score: 0, scratch: 0 };
    let device = Device { capability: 80, multiprocessors: 1 };
    let fails = |problem| token_score::cuda::launches(&problem, Dtype::F32, &tensors, &device).is_err();
    assert!(!fails(problem));
    for wrong in [
        token_score::Problem { first: 0, ..problem },
        token_score::Problem { queries: 0, ..problem },
        token_score::Problem { q: Heads { at: 1, ..heads }, ..problem },
        token_score::Problem { k: Heads { heads: 1, ..heads }, ..problem },
        token_score::Problem { k: Heads { head_dim: usize::MAX, ..heads }, ..problem },
    ] {
        assert!(fails(wrong), "{wrong:?}");
        assert_eq!(token_score::cuda::scratch_bytes(&wrong), 0);
    }
    assert!(fails(token_score::Problem { keys: 1 << 32, ..problem }));
}

// ---------------------------------------------------------------------------------------------------------- TokenPrune

/// What the scores of a test look like.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Scores {
    Random,
    /// Many are equal.
    Ties,
    /// Some are not finite.
    NotFinite,
}

fn check_prune(kernels: &Kernels, problem: &token_prune::Problem, dtype: Dtype, kind: Scores, seed: u64, orders: u32) {
    let &token_prune::Problem { batch, tokens, channels, keep, protect, suffix, fuse } = problem;
    let named = format!("{problem:?}, {dtype:?}, {kind:?}, seed {seed}");
    let mut random = Random(seed);
    let x = rounded(random.values(batch * tokens * channels), dtype);
    let size = random.sizes(batch * tokens);
    let score: Vec<f64> = match kind {
        Scores::Random => rounded(random.values(batch * tokens), Dtype::F32),
        Scores::Ties => (0..batch * tokens).map(|_| random.of(&[0.0, -0.0, 1.0, -2.0])).collect(),
        Scores::NotFinite => (0..batch * tokens)
            .map(|_| random.of(&[f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.5, 0.25]))
            .collect(),
    };
    let slots = problem.slots().expect("the problem is fine");
    let skipped = if seed.is_multiple_of(3) { dtype.bytes() } else { 0 };
    let of_x = Buffer::with_skipped(&encode(&x, dtype), skipped);
    let (of_score, of_size) = (Buffer::floats(&score, Dtype::F32), Buffer::floats(&size, Dtype::F32));
    let device = Device { capability: 80, multiprocessors: [1, 3, 40][seed as usize % 3] };
    let bytes = in_all_orders(orders, |order| {
        let to = [
            Buffer::output(batch * slots * channels * dtype.bytes()),
            Buffer::output(batch * slots * 4),
            Buffer::output(batch * slots * 8),
            Buffer::output(batch * tokens * 8),
        ];
        let scratch = Buffer::output(token_prune::cuda::scratch_bytes(problem));
        let tensors = token_prune::cuda::Tensors {
            x: of_x.at(),
            score: of_score.at(),
            size: of_size.at(),
            y: to[0].at(),
            size_out: to[1].at(),
            anchor: to[2].at(),
            assign: to[3].at(),
            scratch: scratch.at(),
        };
        let launches = token_prune::cuda::launches(problem, dtype, &tensors, &device).expect("the problem is fine");
        kernels.run(launches, order);
        to.map(|buffer| buffer.bytes().to_vec())
    });
    let (y, size_out) = (decode(&bytes[0], dtype), decode(&bytes[1], Dtype::F32));
    let [anchor, assign] = [2, 3].map(|at| Buffer::new(&bytes[at]).to_ints());

    for image in 0..batch {
        let row = |token: usize| &x[(image * tokens + token) * channels..][..channels];
        let own = &score[image * tokens..][..tokens];
        let key = |token: usize| if own[token].is_nan() { f64::INFINITY } else { own[token] };
        let mut order: Vec<usize> = (protect..tokens - suffix).collect();
        // Stable: the lower position first.
        order.sort_by(|&left, &right| key(right).partial_cmp(&key(left)).expect("no NaN"));
        let mut dropped = order.split_off(keep);
        dropped.sort_unstable();
        let extra = protect + keep;
        let fuses = fuse && !dropped.is_empty();
        let mut tokens_of: Vec<Option<usize>> = (0..protect).chain(order).map(Some).collect();
        tokens_of.extend(fuses.then_some(None));
        tokens_of.extend((tokens - suffix..tokens).map(Some));
        assert_eq!(tokens_of.len(), slots);
        let mut slot_of = vec![if fuses { extra as i64 } else { -1 }; tokens];
        for (slot, token) in tokens_of.into_iter().enumerate() {
            let at = image * slots + slot;
            let found = &y[at * channels..][..channels];
            match token {
                Some(token) => {
                    slot_of[token] = slot as i64;
                    assert_eq!((anchor[at], size_out[at]), (token as i64, size[image * tokens + token]), "{named}");
                    assert_eq!(found, row(token), "{named}: slot {slot}");
                }
                None => {
                    assert_eq!((anchor[at], size_out[at]), (-1, 1.0), "{named}");
                    for (channel, found) in found.iter().enumerate() {
                        let products = dropped.iter().map(|&token| own[token] * row(token)[channel]);
                        let (expected, most) =
                            products.fold((0.0, 0.0), |(sum, most): (f64, f64), x| (sum + x, most + x.abs()));
                        // As many roundings of float32 as there are products, of sums that are no larger than this.
                        let allowed = unit(dtype) * expected.abs() + 1e-6 * most;
                        let same = (found - expected).abs() <= allowed || !expected.is_finite() && !found.is_finite();
                        assert!(same, "{named}: channel {channel} of the sum is {found}, not {expected}");
                    }
                }
            }
        }
        assert_eq!(&assign[image * tokens..][..tokens], slot_of, "{named}");
    }
}

#[test]
fn prune() {
    let Some(kernels) = Kernels::of("token_prune", 80) else { return };
    let mut random = Random(13);
    for seed in 0..samples(180) as u64 {
        let (protect, suffix) = random.of(&[(0, 0), (1, 0), (2, 3), (5, 1), (0, 1)]);
        let free = random.of(&[0, 1, 2, 3, 17, 50, 101, 196]);
        let problem = token_prune::Problem {
            batch: random.of(&[1, 2, 3]),
            tokens: protect + suffix + free,
            channels: random.of(&[1, 5, 24, 72, 520]),
            keep: random.of(&[0, free.min(1), free / 2, free - free.min(1), free]),
            protect,
            suffix,
            fuse: random.of(&[false, true]),
        };
        let kind = random.of(&[Scores::Random, Scores::Ties, Scores::NotFinite]);
        check_prune(kernels, &problem, random.of(&DTYPES), kind, seed, 3);
    }
}

#[test]
fn prune_of_many_tokens() {
    let Some(kernels) = Kernels::of("token_prune", 80) else { return };
    // The last sorts in scratch memory.
    for (tokens, keep) in [(577, 403), (4097, 2000), (8300, 5000)] {
        if sanitized() && (600..8000).contains(&tokens) {
            continue;
        }
        let problem = token_prune::Problem { batch: 2, tokens, channels: 8, keep, protect: 1, suffix: 0, fuse: true };
        check_prune(kernels, &problem, Dtype::F32, Scores::Ties, 2, 2);
    }
}

#[test]
fn prunings_that_make_no_sense() {
    let problem =
        token_prune::Problem { batch: 1, tokens: 10, channels: 4, keep: 4, protect: 1, suffix: 2, fuse: true };
    let tensors =
        token_prune::cuda::Tensors { x: 0, score: 0, size: 0, y: 0, size_out: 0, anchor: 0, assign: 0, scratch: 0 };
    let device = Device { capability: 80, multiprocessors: 1 };
    let fails = |problem| token_prune::cuda::launches(&problem, Dtype::F32, &tensors, &device).is_err();
    assert!(!fails(problem));
    assert!(fails(token_prune::Problem { keep: 8, ..problem }));
    assert!(fails(token_prune::Problem { protect: usize::MAX, ..problem }));
    assert!(fails(token_prune::Problem { suffix: 10, keep: 0, ..problem }));
    assert!(fails(token_prune::Problem { tokens: 1 << 32, ..problem }));
    assert!(fails(token_prune::Problem { tokens: usize::MAX, ..problem }));
}

// ---------------------------------------------------------------------------------------------------------- sanitizers

/// Runs all other tests in a process of its own, with kernels that are compiled for the sanitizers.
#[test]
fn under_sanitizers() {
    if sanitized() || !has_compiler() {
        return;
    }
    // The runtime of the address sanitizer must be the first library of a process.
    let output = Command::new(compiler()).arg("-print-file-name=libasan.so").output().expect("the compiler runs");
    let runtime = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !Path::new(&runtime).is_absolute() {
        skipped(format_args!("`{}` has no address sanitizer", compiler().display()));
        return;
    }
    let output = Command::new(env::current_exe().expect("a test is a program"))
        .env(SANITIZED, "1")
        .env("LD_PRELOAD", runtime)
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .expect("the program runs again");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

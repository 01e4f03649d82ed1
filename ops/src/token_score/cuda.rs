//! `TokenScore` on CUDA: two launches of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_float, c_int, c_longlong};

use super::Problem;
use crate::cuda::{
    Arguments, CUdeviceptr, CUstream, Device, Dtype, Error, Launch, Operator, aligned, enqueue_all, ensure, int,
};

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// Queries `[B, N, q.width]`.
    pub q: CUdeviceptr,
    /// Keys `[B, M, k.width]`.
    pub k: CUdeviceptr,
    /// float32 `[B, M, 1]`.
    pub size: CUdeviceptr,
    /// Written: float32 `[B, M]`.
    pub score: CUdeviceptr,
    /// [`scratch_bytes`] of memory, aligned to 256 bytes; what is in it before and after means nothing.
    pub scratch: CUdeviceptr,
}

/// As `Score` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ScoreArguments {
    q: CUdeviceptr,
    k: CUdeviceptr,
    size: CUdeviceptr,
    score: CUdeviceptr,
    received: CUdeviceptr,
    count: c_longlong,
    queries: c_int,
    keys: c_int,
    chosen: c_int,
    heads: c_int,
    head_dim: c_int,
    q_width: c_int,
    q_at: c_int,
    k_width: c_int,
    k_at: c_int,
    parts: c_int,
    scale: c_float,
    wide: c_int,
}

// SAFETY: the fields of `Score` in kernel.cu, in order.
unsafe impl Arguments for ScoreArguments {
    const OPERATOR: Operator = Operator::TokenScore;
}

// As in kernel.cu.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
const GROUP: usize = 4;

/// Blocks for each head, at most: what each receives is a row of scratch memory.
const MOST_PARTS: usize = 16;

impl Problem {
    /// Blocks for each head, at most.
    fn most_parts(&self) -> usize {
        self.chosen().div_ceil(GROUP).min(MOST_PARTS)
    }
}

/// Bytes of scratch memory that [`score`] needs: none for what it refuses, or absurd attributes would ask for absurd
/// amounts.
pub fn scratch_bytes(problem: &Problem) -> usize {
    if check(problem).is_err() {
        return 0;
    }
    problem.batch * problem.q.heads * problem.most_parts() * problem.keys * size_of::<f32>()
}

fn check(problem: &Problem) -> Result<(), Error> {
    let Problem { q, k, .. } = problem;
    q.check_on_device()?;
    k.check_on_device()?;
    ensure((q.heads, q.head_dim) == (k.heads, k.head_dim), "heads of queries and keys differ in number or width")?;
    ensure(problem.chosen() > 0, "the attention of no query")
}

/// What [`score`] launches on `device`, for operands of type `dtype`, in order.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    dtype: Dtype,
    tensors: &Tensors,
    device: &Device,
) -> Result<impl Iterator<Item = Launch<ScoreArguments>> + use<>, Error> {
    check(problem)?;
    let &Problem { batch, queries, keys, q, k, scale, .. } = problem;
    // Enough blocks to fill the device four times.
    let units = batch * q.heads;
    let parts = problem.most_parts().min((4 * device.multiprocessors).div_ceil(units.max(1)));
    let distances = [q.width, q.at, k.width, k.at, q.head_dim].map(|count| count * dtype.bytes());
    let arguments = ScoreArguments {
        q: tensors.q,
        k: tensors.k,
        size: tensors.size,
        score: tensors.score,
        received: tensors.scratch,
        count: (batch * keys) as c_longlong,
        queries: int(queries)?,
        keys: int(keys)?,
        chosen: int(problem.chosen())?,
        heads: int(q.heads)?,
        head_dim: int(q.head_dim)?,
        q_width: int(q.width)?,
        q_at: int(q.at)?,
        k_width: int(k.width)?,
        k_at: int(k.at)?,
        parts: int(parts)?,
        scale,
        wide: aligned(16, &[tensors.q, tensors.k], &distances).into(),
    };
    let kernel = ["score_receive_f32", "score_receive_f16", "score_receive_bf16"][dtype as usize];
    // A maximum and a sum for each query of a group, of each warp.
    let shared = WARPS * GROUP * 8;
    // Without keys nothing is received.
    let units = if keys == 0 { 0 } else { units };
    let receive = Launch::of(kernel, &[units, parts], THREADS, shared, arguments)?;
    let mean = Launch::of("score_mean", &[(batch * keys).div_ceil(THREADS)], THREADS, 0, arguments)?;
    Ok([receive, mean].into_iter().flatten())
}

/// The attention that each token receives: enqueues the kernels on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does; nothing is known of the output then.
///
/// # Safety
///
/// `stream` is valid. Until it has passed these kernels, `tensors` are device memory of the extents that `problem` says,
/// `q` and `k` of type `dtype`, which nothing else writes to; the output and scratch memory overlap nothing.
pub unsafe fn score(stream: CUstream, problem: &Problem, dtype: Dtype, tensors: &Tensors) -> Result<(), Error> {
    let launches = launches(problem, dtype, tensors, &Device::current()?)?;
    // SAFETY: as the caller vouches; launches read and write what the operator says, and the scratch memory.
    unsafe { enqueue_all(launches, stream) }
}

//! `TokenPrune` on CUDA: one launch of `kernel.cu`.
//!
//! Each block sorts the candidates of its image anew, in shared memory where that has room (up to 4096), else in
//! scratch memory.
#![allow(unsafe_code)]

use std::ffi::c_int;

use super::Problem;
use crate::cuda::{
    Arguments, CUdeviceptr, CUstream, Device, Dtype, Error, Launch, Operator, aligned, enqueue_all, int,
};

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// Tokens `[B, N, C]`.
    pub x: CUdeviceptr,
    /// float32 `[B, N]`.
    pub score: CUdeviceptr,
    /// float32 `[B, N, 1]`.
    pub size: CUdeviceptr,
    /// Written: slots `[B, M, C]`, M as [`Problem::slots`].
    pub y: CUdeviceptr,
    /// Written: float32 `[B, M, 1]`.
    pub size_out: CUdeviceptr,
    /// Written: int64 `[B, M]`.
    pub anchor: CUdeviceptr,
    /// Written: int64 `[B, N]`.
    pub assign: CUdeviceptr,
    /// [`scratch_bytes`] of memory, aligned to 256 bytes; what is in it before and after means nothing.
    pub scratch: CUdeviceptr,
}

/// As `Prune` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PruneArguments {
    x: CUdeviceptr,
    score: CUdeviceptr,
    size: CUdeviceptr,
    y: CUdeviceptr,
    size_out: CUdeviceptr,
    anchor: CUdeviceptr,
    assign: CUdeviceptr,
    order: CUdeviceptr,
    tokens: c_int,
    channels: c_int,
    keep: c_int,
    protect: c_int,
    suffix: c_int,
    fuses: c_int,
    padded: c_int,
    parts: c_int,
    wide: c_int,
}

// SAFETY: eight pointers and nine ints, in the order of `Prune` in kernel.cu.
unsafe impl Arguments for PruneArguments {
    const OPERATOR: Operator = Operator::TokenPrune;
}

// As in kernel.cu.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// Candidates that are sorted in shared memory: 32 KiB of them.
const SHARED_CANDIDATES: usize = 4096;
/// Blocks for each image that sort in scratch memory.
const SCRATCH_PARTS: usize = 8;

impl Problem {
    /// Candidates of an image, up to a power of two.
    fn padded(&self) -> usize {
        self.tokens.saturating_sub(self.protect).saturating_sub(self.suffix).next_power_of_two()
    }

    fn sorts_in_scratch(&self) -> bool {
        self.padded() > SHARED_CANDIDATES
    }
}

/// Bytes of scratch memory that [`prune`] needs.
pub fn scratch_bytes(problem: &Problem) -> usize {
    if problem.sorts_in_scratch() { problem.batch * SCRATCH_PARTS * 8 * problem.padded() } else { 0 }
}

/// What [`prune`] launches on `device`, for tokens of type `dtype`.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    dtype: Dtype,
    tensors: &Tensors,
    device: &Device,
) -> Result<impl Iterator<Item = Launch<PruneArguments>> + use<>, Error> {
    let slots = problem.slots().ok_or(Error::Problem("more tokens are protected or kept than there are"))?;
    let tokens = int(problem.tokens)?;
    // Enough blocks to fill the device four times, but no warps without a slot. All that are dropped may be all there is.
    let parts = slots.div_ceil(WARPS).max(1).min((4 * device.multiprocessors).div_ceil(problem.batch.max(1)));
    let parts = if problem.sorts_in_scratch() { parts.min(SCRATCH_PARTS) } else { parts };
    let arguments = PruneArguments {
        x: tensors.x,
        score: tensors.score,
        size: tensors.size,
        y: tensors.y,
        size_out: tensors.size_out,
        anchor: tensors.anchor,
        assign: tensors.assign,
        order: if problem.sorts_in_scratch() { tensors.scratch } else { 0 },
        tokens,
        channels: int(problem.channels)?,
        keep: int(problem.keep)?,
        protect: int(problem.protect)?,
        suffix: int(problem.suffix)?,
        fuses: problem.fuses().into(),
        padded: int(problem.padded())?,
        parts: int(parts)?,
        wide: aligned(16, &[tensors.x, tensors.y], &[problem.channels * dtype.bytes()]).into(),
    };
    let kernel = ["token_prune_f32", "token_prune_f16", "token_prune_bf16"][dtype as usize];
    let shared = if problem.sorts_in_scratch() { 0 } else { 8 * problem.padded() };
    // Nothing is read or written where there are no tokens.
    let blocks = if problem.tokens == 0 { 0 } else { parts };
    Ok(Launch::of(kernel, &[problem.batch, blocks], THREADS, shared, arguments)?.into_iter())
}

/// Prunes: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does; nothing is known of the outputs then.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents that `problem` says,
/// `x` and `y` of type `dtype`, which nothing else writes to; outputs and scratch memory overlap nothing.
pub unsafe fn prune(stream: CUstream, problem: &Problem, dtype: Dtype, tensors: &Tensors) -> Result<(), Error> {
    let launches = launches(problem, dtype, tensors, &Device::current()?)?;
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says, and the scratch memory.
    unsafe { enqueue_all(launches, stream) }
}

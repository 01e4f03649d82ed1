//! `TokenMean` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong};

use crate::cuda::{Arguments, CUdeviceptr, CUstream, Dtype, Error, Launch, Operator, aligned, enqueue_all, int};

/// What is averaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Slots of each, M.
    pub slots: usize,
    /// Channels of an entry, C.
    pub channels: usize,
    /// Whether all images have the same table, `[N, C]`.
    pub shared: bool,
    /// The type of the table and of what comes out.
    pub dtype: Dtype,
}

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// `[N, C]` or `[B, N, C]`.
    pub table: CUdeviceptr,
    /// int64 `[B, N]`.
    pub assign: CUdeviceptr,
    /// float32 `[B, M, 1]`.
    pub size: CUdeviceptr,
    /// Written: `[B, M, C]`.
    pub y: CUdeviceptr,
}

/// As `Mean` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MeanArguments {
    table: CUdeviceptr,
    assign: CUdeviceptr,
    size: CUdeviceptr,
    y: CUdeviceptr,
    image_entries: c_longlong,
    rows: c_longlong,
    tokens: c_int,
    slots: c_int,
    channels: c_int,
    wide: c_int,
}

// SAFETY: the fields of `Mean` in kernel.cu, in order.
unsafe impl Arguments for MeanArguments {
    const OPERATOR: Operator = Operator::TokenMean;
}

const THREADS: usize = 256;

/// What [`mean`] launches.
///
/// Fails if there are counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
) -> Result<impl Iterator<Item = Launch<MeanArguments>> + use<>, Error> {
    let &Problem { batch, tokens, slots, channels, shared, dtype } = problem;
    let arguments = MeanArguments {
        table: tensors.table,
        assign: tensors.assign,
        size: tensors.size,
        y: tensors.y,
        image_entries: if shared { 0 } else { (tokens * channels) as c_longlong },
        rows: (batch * slots) as c_longlong,
        tokens: int(tokens)?,
        slots: int(slots)?,
        channels: int(channels)?,
        wide: aligned(16, &[tensors.table, tensors.y], &[channels * dtype.bytes()]).into(),
    };
    let kernel = ["token_mean_f32", "token_mean_f16", "token_mean_bf16"][dtype as usize];
    let blocks = (batch * slots).div_ceil(THREADS / 32);
    Ok(Launch::of(kernel, &[blocks], THREADS, 0, arguments)?.into_iter())
}

/// The mean over each slot: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if there are counts of more than 31 bits, or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents and types that
/// `problem` says, which nothing else writes to, and the output overlaps nothing.
pub unsafe fn mean(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches(problem, tensors)?, stream) }
}

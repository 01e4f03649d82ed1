//! `TokenRestore` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong};

use super::Problem;
use crate::cuda::{Arguments, CUdeviceptr, CUstream, Error, Launch, Operator, aligned, enqueue_all, ensure, int};

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// Slots `[B, M, C]`.
    pub y: CUdeviceptr,
    /// int64 `[B, N]`; where it names no slot, the token becomes zeros.
    pub assign: CUdeviceptr,
    /// Written: tokens `[B, N, C]`.
    pub x: CUdeviceptr,
}

/// As `Restore` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RestoreArguments {
    y: CUdeviceptr,
    assign: CUdeviceptr,
    x: CUdeviceptr,
    rows: c_longlong,
    pieces: c_longlong,
    tokens: c_int,
    slots: c_int,
}

// SAFETY: the fields of `Restore` in kernel.cu, in order.
unsafe impl Arguments for RestoreArguments {
    const OPERATOR: Operator = Operator::TokenRestore;
}

const THREADS: usize = 256;

/// What [`restore`] launches.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
) -> Result<impl Iterator<Item = Launch<RestoreArguments>> + use<>, Error> {
    let &Problem { batch, tokens, slots, row_bytes } = problem;
    ensure(slots > 0 || batch * tokens == 0, "tokens without slots")?;
    // The largest pieces that rows consist of.
    let fits = |bytes| aligned(bytes, &[tensors.x, tensors.y], &[row_bytes]);
    let kernels = [("restore_16", 16), ("restore_4", 4), ("restore_2", 2), ("restore_1", 1)];
    let (kernel, bytes) = kernels.into_iter().find(|&(_, bytes)| fits(bytes)).expect("all is made of bytes");
    let arguments = RestoreArguments {
        y: tensors.y,
        assign: tensors.assign,
        x: tensors.x,
        rows: (batch * tokens) as c_longlong,
        pieces: (row_bytes / bytes) as c_longlong,
        tokens: int(tokens)?,
        slots: int(slots)?,
    };
    let blocks = (batch * tokens).div_ceil(THREADS / 32);
    Ok(Launch::of(kernel, &[blocks], THREADS, 0, arguments)?.into_iter())
}

/// Copies every slot to its tokens: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents that `problem` says,
/// which nothing else writes to, and the output overlaps nothing.
pub unsafe fn restore(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches(problem, tensors)?, stream) }
}

//! `ConnectionMask` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong};

use super::Problem;
use crate::cuda::{Arguments, CUdeviceptr, CUstream, Dtype, Error, Launch, Operator, enqueue_all, ensure, int};

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// `[B, H, N, N]`.
    pub weights: CUdeviceptr,
    /// int64 `[B, M]`; connections of a slot whose anchor is no token are as weak as a weight of zero.
    pub anchor: CUdeviceptr,
    /// Written: float32 `[B, M, M]`.
    pub mask: CUdeviceptr,
}

/// As `Mask` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaskArguments {
    weights: CUdeviceptr,
    anchor: CUdeviceptr,
    mask: CUdeviceptr,
    rows: c_longlong,
    heads: c_int,
    tokens: c_int,
    slots: c_int,
    protect: c_int,
    free: c_int,
    kept: c_int,
}

// SAFETY: the fields of `Mask` in kernel.cu, in order.
unsafe impl Arguments for MaskArguments {
    const OPERATOR: Operator = Operator::ConnectionMask;
}

const THREADS: usize = 256;

/// What [`connection_mask`] launches, for weights of type `dtype`.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    dtype: Dtype,
    tensors: &Tensors,
) -> Result<impl Iterator<Item = Launch<MaskArguments>> + use<>, Error> {
    let &Problem { batch, heads, tokens, slots, connections, protect, .. } = problem;
    let free = problem.free().ok_or(Error::Problem("more slots are to keep all connections than there are"))?.len();
    ensure(heads > 0 || batch * slots == 0, "attention weights of no heads")?;
    let arguments = MaskArguments {
        weights: tensors.weights,
        anchor: tensors.anchor,
        mask: tensors.mask,
        rows: (batch * slots) as c_longlong,
        heads: int(heads)?,
        tokens: int(tokens)?,
        slots: int(slots)?,
        protect: int(protect)?,
        free: int(free)?,
        kept: int(connections.max(1).min(free))?,
    };
    let kernel = ["connection_mask_f32", "connection_mask_f16", "connection_mask_bf16"][dtype as usize];
    let blocks = (batch * slots).div_ceil(THREADS / 32);
    Ok(Launch::of(kernel, &[blocks], THREADS, 0, arguments)?.into_iter())
}

/// The mask of connections: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents and types that
/// `problem` and `dtype` say, which nothing else writes to, and the output overlaps nothing.
pub unsafe fn connection_mask(
    stream: CUstream,
    problem: &Problem,
    dtype: Dtype,
    tensors: &Tensors,
) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches(problem, dtype, tensors)?, stream) }
}

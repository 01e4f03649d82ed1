//! `MaskedSoftmax` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_float, c_int, c_longlong};

use crate::cuda::{Arguments, CUdeviceptr, CUstream, Dtype, Error, Launch, Operator, enqueue_all, ensure, int};

/// Extents, attributes and types.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Heads of each, H.
    pub heads: usize,
    /// Queries of each, N.
    pub queries: usize,
    /// Keys of each, M.
    pub keys: usize,
    /// What a row has beside its open connections, spread over all keys.
    pub eps: f32,
    /// The type of scores and weights.
    pub dtype: Dtype,
}

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// `[B, H, N, M]`.
    pub scores: CUdeviceptr,
    /// float32 `[B, N, M]`.
    pub mask: CUdeviceptr,
    /// float32 `[B, M, 1]`.
    pub size: CUdeviceptr,
    /// Written: `[B, H, N, M]`.
    pub weights: CUdeviceptr,
}

/// As `Softmax` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxArguments {
    scores: CUdeviceptr,
    mask: CUdeviceptr,
    size: CUdeviceptr,
    weights: CUdeviceptr,
    rows: c_longlong,
    heads: c_int,
    queries: c_int,
    keys: c_int,
    eps: c_float,
}

// SAFETY: the fields of `Softmax` in kernel.cu, in order.
unsafe impl Arguments for SoftmaxArguments {
    const OPERATOR: Operator = Operator::MaskedSoftmax;
}

const THREADS: usize = 256;

/// What [`masked_softmax`] launches.
///
/// Fails if `eps` is negative or not finite, or there are counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
) -> Result<impl Iterator<Item = Launch<SoftmaxArguments>> + use<>, Error> {
    let &Problem { batch, heads, queries, keys, eps, dtype } = problem;
    ensure((0.0..f32::INFINITY).contains(&eps), "eps is negative or not finite")?;
    let rows = if keys == 0 { 0 } else { batch * heads * queries };
    let arguments = SoftmaxArguments {
        scores: tensors.scores,
        mask: tensors.mask,
        size: tensors.size,
        weights: tensors.weights,
        rows: rows as c_longlong,
        heads: int(heads)?,
        queries: int(queries)?,
        keys: int(keys)?,
        eps,
    };
    let kernel = ["masked_softmax_f32", "masked_softmax_f16", "masked_softmax_bf16"][dtype as usize];
    Ok(Launch::of(kernel, &[rows.div_ceil(THREADS / 32)], THREADS, 0, arguments)?.into_iter())
}

/// Attention weights where connections are closed: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if `eps` is negative or not finite, there are counts of more than 31 bits, or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents and types that
/// `problem` says, which nothing else writes to, and the output overlaps nothing.
pub unsafe fn masked_softmax(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches(problem, tensors)?, stream) }
}

//! `TokenSize` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::c_longlong;

use crate::cuda::{Arguments, CUdeviceptr, CUstream, Error, Launch, Operator, enqueue_all};

/// As `Size` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SizeArguments {
    size: CUdeviceptr,
    count: c_longlong,
}

// SAFETY: the fields of `Size` in kernel.cu, in order.
unsafe impl Arguments for SizeArguments {
    const OPERATOR: Operator = Operator::TokenSize;
}

const THREADS: usize = 256;

/// What [`ones`] launches.
///
/// Fails if a grid has no room for them.
pub fn launches(count: usize, size: CUdeviceptr) -> Result<impl Iterator<Item = Launch<SizeArguments>> + use<>, Error> {
    let arguments = SizeArguments { size, count: count as c_longlong };
    Ok(Launch::of("token_size", &[count.div_ceil(THREADS)], THREADS, 0, arguments)?.into_iter())
}

/// Writes one for each of `count` = B · N tokens to `size`, float32 `[B, N, 1]`: enqueues the kernel on `stream`, whose
/// context is current.
///
/// Fails if a grid has no room for them, or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `size` is device memory of `count` float32 that nothing else
/// writes to.
pub unsafe fn ones(stream: CUstream, count: usize, size: CUdeviceptr) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel writes `count` float32.
    unsafe { enqueue_all(launches(count, size)?, stream) }
}

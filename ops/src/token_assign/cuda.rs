//! `TokenAssign` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong};

use super::Problem;
use crate::cuda::{Arguments, CUdeviceptr, CUstream, Error, Launch, Operator, enqueue_all, int};

/// Device memory of the operands, all int64 and contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// `[B, M]`.
    pub anchor: CUdeviceptr,
    /// `[B, r]`.
    pub leaving: CUdeviceptr,
    /// `[B, r]`.
    pub into: CUdeviceptr,
    /// Written: `[B, M + r]`, where anchors and leaving tokens name it.
    pub assign: CUdeviceptr,
}

/// As `Assign` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AssignArguments {
    anchor: CUdeviceptr,
    leaving: CUdeviceptr,
    into: CUdeviceptr,
    assign: CUdeviceptr,
    count: c_longlong,
    slots: c_int,
    r: c_int,
}

// SAFETY: the fields of `Assign` in kernel.cu, in order.
unsafe impl Arguments for AssignArguments {
    const OPERATOR: Operator = Operator::TokenAssign;
}

const THREADS: usize = 256;

/// What [`assign`] launches.
///
/// Fails if there are counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
) -> Result<impl Iterator<Item = Launch<AssignArguments>> + use<>, Error> {
    let count = problem.batch * (problem.slots + problem.r);
    int(problem.slots + problem.r)?;
    let arguments = AssignArguments {
        anchor: tensors.anchor,
        leaving: tensors.leaving,
        into: tensors.into,
        assign: tensors.assign,
        count: count as c_longlong,
        slots: int(problem.slots)?,
        r: int(problem.r)?,
    };
    Ok(Launch::of("token_assign", &[count.div_ceil(THREADS)], THREADS, 0, arguments)?.into_iter())
}

/// The slot of every token: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if there are counts of more than 31 bits, or the driver does.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents that `problem` says,
/// which nothing else writes to, and the output overlaps nothing.
pub unsafe fn assign(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches(problem, tensors)?, stream) }
}

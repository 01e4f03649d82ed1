//! `TokenAssign` on CUDA: one launch of `kernel.cu`.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong};

use crate::cuda::{Arguments, CUdeviceptr, CUstream, Error, Launch, Operator, enqueue_all, grid, int};

/// Which extents the operands have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Slots of each, M.
    pub slots: usize,
    /// Tokens of each that left.
    pub r: usize,
}

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
    let blocks = grid(&[count.div_ceil(THREADS)])?;
    let launch = Launch { kernel: "token_assign", blocks, threads: THREADS as u32, shared: 0, arguments };
    Ok((blocks > 0).then_some(launch).into_iter())
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

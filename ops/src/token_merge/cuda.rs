//! `TokenMerge` on CUDA: launches of `kernel.cu`.
//!
//! Two launches: `match` finds the most similar B token of each A token, `reduce` selects, and writes every output.
//! Where images have many tokens, or heads many channels, `unit` goes before them and computes the unit rows once,
//! which `match` else does wherever it needs them: the same numbers in either way.
//!
//! Each block of `reduce` sorts the edges of its image anew, in shared memory where that has room (up to
//! 4096 A tokens), else in scratch memory.
#![allow(unsafe_code)]

use std::ffi::c_int;

use crate::Heads;
use crate::cuda::{
    Arguments, CUdeviceptr, CUstream, Device, Dtype, Error, Launch, Operator, aligned, enqueue_all, ensure, int,
};

/// What is merged: extents and attributes of the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens of each, N.
    pub tokens: usize,
    /// Channels of each token, C.
    pub channels: usize,
    /// Tokens at the front that take no part.
    pub protect: usize,
    /// Tokens at the end that take no part.
    pub suffix: usize,
    /// Tokens that leave; at most (N − protect − suffix) / 2.
    pub r: usize,
    /// The heads of the metric.
    pub metric: Heads,
    /// The type of x and y.
    pub dtype: Dtype,
    /// The type of the metric.
    pub metric_dtype: Dtype,
}

/// Device memory of the operands, all contiguous and aligned to their elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// Tokens `[B, N, C]`.
    pub x: CUdeviceptr,
    /// `[B, N, metric.width]`.
    pub metric: CUdeviceptr,
    /// float32 `[B, N, 1]`.
    pub size: CUdeviceptr,
    /// Written: slots `[B, M, C]`, M = N − r.
    pub y: CUdeviceptr,
    /// Written: float32 `[B, M, 1]`.
    pub size_out: CUdeviceptr,
    /// Written: int64 `[B, M]`.
    pub anchor: CUdeviceptr,
    /// Written: int64 `[B, r]`.
    pub leaving: CUdeviceptr,
    /// Written: int64 `[B, r]`.
    pub into: CUdeviceptr,
    /// [`scratch_bytes`] of memory, aligned to 256 bytes; what is in it before and after means nothing.
    pub scratch: CUdeviceptr,
}

/// As `Merge` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MergeArguments {
    x: CUdeviceptr,
    metric: CUdeviceptr,
    size: CUdeviceptr,
    y: CUdeviceptr,
    size_out: CUdeviceptr,
    anchor: CUdeviceptr,
    leaving: CUdeviceptr,
    into: CUdeviceptr,
    unit: CUdeviceptr,
    best: CUdeviceptr,
    partner: CUdeviceptr,
    order: CUdeviceptr,
    tokens: c_int,
    channels: c_int,
    protect: c_int,
    suffix: c_int,
    r: c_int,
    heads: c_int,
    head_dim: c_int,
    width: c_int,
    at: c_int,
    parts: c_int,
    region: c_int,
    wide: c_int,
}

// SAFETY: twelve pointers and twelve ints, in the order of `Merge` in kernel.cu.
unsafe impl Arguments for MergeArguments {
    const OPERATOR: Operator = Operator::TokenMerge;
}

// As in kernel.cu.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
const TILE_A: usize = 32;
const TILE_B: usize = 64;
const MAX_DIM: usize = 120;
const CHUNK: usize = 64;

/// With more tiles of A than this, computing unit rows in each of them takes longer than a launch.
const MANY_TILES: usize = 8;
/// A tokens that are sorted in shared memory: 32 KiB of edges.
const SHARED_EDGES: usize = 4096;
/// Blocks for each image that sort in scratch memory.
const SCRATCH_PARTS: usize = 8;

impl Problem {
    fn check(&self) -> Result<(), Error> {
        self.metric.check_on_device()?;
        let fixed = self.protect.checked_add(self.suffix).filter(|&fixed| fixed <= self.tokens);
        let fixed = fixed.ok_or(Error::Problem("more tokens are protected than there are"))?;
        ensure(self.r <= (self.tokens - fixed) / 2, "more tokens would leave than can")
    }

    fn candidates(&self) -> usize {
        self.tokens.saturating_sub(self.protect).saturating_sub(self.suffix)
    }

    fn count_a(&self) -> usize {
        (self.candidates() + 1 - self.protect % 2) / 2
    }

    fn tiles(&self) -> usize {
        self.count_a().div_ceil(TILE_A)
    }

    fn prepares(&self) -> bool {
        self.metric.head_dim > MAX_DIM || self.tiles() > MANY_TILES
    }

    fn sorts_in_scratch(&self) -> bool {
        self.count_a() > SHARED_EDGES
    }

    /// Bytes in which a block of `reduce` selects: an edge for each A token up to the next power of two, and two words
    /// for each 32 of them.
    fn region(&self) -> usize {
        let words = self.count_a().div_ceil(32);
        8 * (self.count_a().next_power_of_two() + words)
    }

    /// Where things lie in scratch memory, in bytes: unit rows, best, partner, order, end.
    fn layout(&self) -> [usize; 5] {
        let count = self.batch * self.count_a();
        let unit = if self.prepares() { 4 * self.batch * self.candidates() * self.metric.head_dim } else { 0 };
        let order = if self.sorts_in_scratch() { self.batch * SCRATCH_PARTS * self.region() } else { 0 };
        let mut at = 0;
        let mut offsets = [0; 5];
        for (offset, bytes) in offsets[1..].iter_mut().zip([unit, 4 * count, 4 * count, order]) {
            at += bytes.next_multiple_of(256);
            *offset = at;
        }
        offsets
    }
}

/// Bytes of scratch memory that [`merge`] needs.
pub fn scratch_bytes(problem: &Problem) -> usize {
    problem.layout()[4]
}

/// What [`merge`] launches on `device`, in order.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
    device: &Device,
) -> Result<impl Iterator<Item = Launch<MergeArguments>> + use<>, Error> {
    problem.check()?;
    let [unit, best, partner, order, _] = problem.layout().map(|offset| tensors.scratch + offset as CUdeviceptr);
    let slots = problem.tokens - problem.r;
    let row = problem.channels * problem.dtype.bytes();
    let arguments = MergeArguments {
        x: tensors.x,
        metric: tensors.metric,
        size: tensors.size,
        y: tensors.y,
        size_out: tensors.size_out,
        anchor: tensors.anchor,
        leaving: tensors.leaving,
        into: tensors.into,
        unit,
        best,
        partner,
        order: if problem.sorts_in_scratch() { order } else { 0 },
        tokens: int(problem.tokens)?,
        channels: int(problem.channels)?,
        protect: int(problem.protect)?,
        suffix: int(problem.suffix)?,
        r: int(problem.r)?,
        heads: int(problem.metric.heads)?,
        head_dim: int(problem.metric.head_dim)?,
        width: int(problem.metric.width)?,
        at: int(problem.metric.at)?,
        parts: 0,
        region: int(problem.region() / 4)?,
        wide: aligned(16, &[tensors.x, tensors.y], &[row]).into(),
    };
    let launch = |kernel, parts: usize, shared: usize| {
        let arguments = MergeArguments { parts: int(parts)?, ..arguments };
        Launch::of(kernel, &[problem.batch, parts], THREADS, shared, arguments)
    };

    let of = |kernels: [&'static str; 3], dtype: Dtype| kernels[dtype as usize];
    let tile_bytes = |dim: usize| (TILE_A + TILE_B) * 16 * (dim.div_ceil(4) | 1);
    let dim = problem.metric.head_dim;
    let (prepare, matching) = if problem.prepares() {
        let kernel = of(["merge_unit_f32", "merge_unit_f16", "merge_unit_bf16"], problem.metric_dtype);
        let prepare = launch(kernel, problem.candidates().div_ceil(WARPS), 0)?;
        (prepare, launch("merge_match_unit", problem.tiles(), tile_bytes(dim.min(CHUNK)))?)
    } else {
        let kernel = of(["merge_match_f32", "merge_match_f16", "merge_match_bf16"], problem.metric_dtype);
        (None, launch(kernel, problem.tiles(), tile_bytes(dim))?)
    };
    // Enough blocks to fill the device four times, but no warps without a slot.
    let parts = slots.div_ceil(WARPS).min((4 * device.multiprocessors).div_ceil(problem.batch.max(1)));
    let (parts, shared) =
        if problem.sorts_in_scratch() { (parts.min(SCRATCH_PARTS), 0) } else { (parts, problem.region()) };
    let kernel = of(["merge_reduce_f32", "merge_reduce_f16", "merge_reduce_bf16"], problem.dtype);
    let reduce = launch(kernel, parts, shared)?;
    Ok([prepare, matching, reduce].into_iter().flatten())
}

/// Merges: enqueues the kernels on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does; nothing is known of the outputs then.
///
/// # Safety
///
/// `stream` is valid. Until it has passed these kernels, `tensors` are device memory of the extents and types that
/// `problem` says, which nothing else writes to; outputs and scratch memory overlap nothing.
pub unsafe fn merge(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    let launches = launches(problem, tensors, &Device::current()?)?;
    // SAFETY: as the caller vouches; launches read and write what the operator says, and the scratch memory.
    unsafe { enqueue_all(launches, stream) }
}

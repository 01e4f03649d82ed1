//! `Attention` and `ProportionalAttention` on CUDA: one launch of `kernel.cu`.
//!
//! Tensor cores compute heads of up to 128 channels: float16 from compute capability 7.5 on, bfloat16 and float32
//! (three products of TF32 for one, which is as good) from 8.0 on. A plain kernel does the rest.
#![allow(unsafe_code)]

use std::ffi::{c_float, c_int};

use crate::Heads;
use crate::cuda::{
    Arguments, CUdeviceptr, CUstream, Device, Dtype, Error, Launch, Operator, aligned, enqueue_all, ensure, int,
};

/// What attends to what: extents and attributes of the operators.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Problem {
    /// Images, B.
    pub batch: usize,
    /// Tokens that ask, N.
    pub queries: usize,
    /// Tokens that are asked, M; at least one.
    pub keys: usize,
    /// The heads of q; those of k and v are as many and as wide.
    pub q: Heads,
    /// The heads of k.
    pub k: Heads,
    /// The heads of v.
    pub v: Heads,
    /// What scores are multiplied with.
    pub scale: f32,
    /// The type of q, k, v and y.
    pub dtype: Dtype,
}

/// Device memory of the operands, all contiguous and aligned to their elements. q, k and v may be one tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tensors {
    /// Queries `[B, N, q.width]`.
    pub q: CUdeviceptr,
    /// Keys `[B, M, k.width]`.
    pub k: CUdeviceptr,
    /// Values `[B, M, v.width]`.
    pub v: CUdeviceptr,
    /// float32 `[B, M, 1]`, not negative, and in each image one is positive; null (0) if all count once.
    pub size: CUdeviceptr,
    /// Written: `[B, N, heads · head_dim]`.
    pub y: CUdeviceptr,
}

/// As `Attention` in kernel.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionArguments {
    q: CUdeviceptr,
    k: CUdeviceptr,
    v: CUdeviceptr,
    size: CUdeviceptr,
    y: CUdeviceptr,
    queries: c_int,
    keys: c_int,
    heads: c_int,
    head_dim: c_int,
    q_width: c_int,
    q_at: c_int,
    k_width: c_int,
    k_at: c_int,
    v_width: c_int,
    v_at: c_int,
    scale: c_float,
    wide: c_int,
    tiles: c_int,
}

// SAFETY: the fields of `Attention` in kernel.cu, in order.
unsafe impl Arguments for AttentionArguments {
    const OPERATOR: Operator = Operator::Attention;
}

const THREADS: usize = 128;

/// How a kernel divides the work.
struct Kernel {
    name: &'static str,
    /// Queries of a block.
    queries: usize,
    /// Blocks that share the channels of one head.
    groups: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl Kernel {
    /// The kernel for heads of `head_dim` channels on a device.
    fn of(dtype: Dtype, head_dim: usize, device: &Device) -> Self {
        let (since, tensor_core): (u32, &[(usize, &'static str)]) = match dtype {
            Dtype::F16 => {
                let kernels = &[
                    (64, "attention_f16_64"),
                    (80, "attention_f16_80"),
                    (96, "attention_f16_96"),
                    (128, "attention_f16_128"),
                ];
                (75, kernels)
            }
            Dtype::Bf16 => {
                let kernels = &[
                    (64, "attention_bf16_64"),
                    (80, "attention_bf16_80"),
                    (96, "attention_bf16_96"),
                    (128, "attention_bf16_128"),
                ];
                (80, kernels)
            }
            Dtype::F32 => (80, &[(64, "attention_f32_64"), (80, "attention_f32_80"), (128, "attention_f32_128")]),
        };
        let fits = tensor_core.iter().find(|(dim, _)| head_dim <= *dim && device.capability >= since);
        match fits {
            Some(&(dim, name)) => {
                // Keys and values of a tile, rows a piece of 16 bytes apart, and a float32 for each key.
                let keys = if dtype == Dtype::F32 { 32 } else { 64 };
                let row = dim * dtype.bytes() + 16;
                Self { name, queries: 64, groups: 1, shared: keys * (2 * row + 4) }
            }
            None => {
                let name = ["attention_f32_plain", "attention_f16_plain", "attention_bf16_plain"][dtype as usize];
                // `PlainMemory`: queries, weights, keys.
                let shared = 4 * 64 * 16 + 4 * 32 * 16 + 32 * 65 * 4;
                Self { name, queries: 16, groups: head_dim.div_ceil(128), shared }
            }
        }
    }
}

/// What [`attention`] launches on `device`.
///
/// Fails if the problem makes no sense or has counts of more than 31 bits.
pub fn launches(
    problem: &Problem,
    tensors: &Tensors,
    device: &Device,
) -> Result<impl Iterator<Item = Launch<AttentionArguments>> + use<>, Error> {
    let &Problem { batch, queries, keys, q, k, v, scale, dtype } = problem;
    for operand in [q, k, v] {
        operand.check_on_device()?;
        let same = operand.heads == q.heads && operand.head_dim == q.head_dim;
        ensure(same, "queries, keys and values have different heads")?;
    }
    ensure(keys > 0, "attention to nothing")?;
    let kernel = Kernel::of(dtype, q.head_dim, device);
    let tiles = queries.div_ceil(kernel.queries);
    let distances = [q.width, q.at, k.width, k.at, v.width, v.at, q.head_dim].map(|count| count * dtype.bytes());
    let arguments = AttentionArguments {
        q: tensors.q,
        k: tensors.k,
        v: tensors.v,
        size: tensors.size,
        y: tensors.y,
        queries: int(queries)?,
        keys: int(keys)?,
        heads: int(q.heads)?,
        head_dim: int(q.head_dim)?,
        q_width: int(q.width)?,
        q_at: int(q.at)?,
        k_width: int(k.width)?,
        k_at: int(k.at)?,
        v_width: int(v.width)?,
        v_at: int(v.at)?,
        scale,
        wide: aligned(16, &[tensors.q, tensors.k, tensors.v, tensors.y], &distances).into(),
        tiles: int(tiles)?,
    };
    let blocks = [batch, q.heads, tiles, kernel.groups];
    Ok(Launch::of(kernel.name, &blocks, THREADS, kernel.shared, arguments)?.into_iter())
}

/// Attends: enqueues the kernel on `stream`, whose context is current.
///
/// Fails if the problem makes no sense or the driver does; nothing is known of the output then.
///
/// # Safety
///
/// `stream` is valid. Until it has passed this kernel, `tensors` are device memory of the extents and types that
/// `problem` says, which nothing else writes to, and the output overlaps nothing.
pub unsafe fn attention(stream: CUstream, problem: &Problem, tensors: &Tensors) -> Result<(), Error> {
    let launches = launches(problem, tensors, &Device::current()?)?;
    // SAFETY: as the caller vouches; the kernel reads and writes what the operator says.
    unsafe { enqueue_all(launches, stream) }
}

//! One call of a kernel: its tensors, memory and threads.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::slice;
use std::sync::Mutex;

use half::{bf16, f16};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::operator::ComputeContext;
use ort::value::{DynTensor, DynTensorValueType, TensorElementType, ValueRef, ValueRefMut};
use vitrim_ops::cpu::Pool;
use vitrim_ops::cuda::{CUdeviceptr, CUstream, Dtype};

/// Why a call fails, for people to read.
pub struct Failure(pub String);

impl<E: fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure(error.to_string())
    }
}

/// A type of tensor elements, as ONNX Runtime names it.
pub trait Typed: Copy + Send + Sync + 'static {
    /// Its name there.
    const TYPE: TensorElementType;
}

macro_rules! typed {
    ($($ty:ty => $name:ident),*) => {
        $(impl Typed for $ty { const TYPE: TensorElementType = TensorElementType::$name; })*
    };
}
typed!(f32 => Float32, f16 => Float16, bf16 => Bfloat16, i64 => Int64);

/// A type of tokens, as CUDA kernels name it.
pub trait OnDevice: Typed {
    /// Its name there.
    const DTYPE: Dtype;
}

impl OnDevice for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl OnDevice for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl OnDevice for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// A call.
pub struct Call<'a> {
    context: &'a ComputeContext,
}

/// An operand of elements of type `T`: where they are, and the extents of its axes.
#[derive(Clone, Copy)]
pub struct Operand<'a, T, const RANK: usize> {
    pub shape: [usize; RANK],
    data: *const c_void,
    call: PhantomData<&'a [T]>,
}

impl<'a, T, const RANK: usize> Operand<'a, T, RANK> {
    /// The elements, of an operand on the CPU.
    pub fn slice(&self) -> &'a [T] {
        // SAFETY: ONNX Runtime keeps the operand for the time of the call, with as many elements of this type as its
        // extents say. Kernels for the CPU have theirs there.
        unsafe { elements(self.data, self.shape.iter().product()) }
    }

    /// The address of the elements, of an operand on a GPU.
    pub fn address(&self) -> CUdeviceptr {
        self.data as CUdeviceptr
    }
}

impl<T, const RANK: usize> Operand<'_, T, RANK> {
    /// Refuses an operand of other extents; those that are none may be any.
    pub fn expect(self, what: &str, extents: [Option<usize>; RANK]) -> Result<Self, Failure> {
        let fits = self.shape.iter().zip(extents).all(|(&own, wanted)| wanted.is_none_or(|wanted| wanted == own));
        match fits {
            true => Ok(self),
            false => Err(format!("{what} has shape {:?}, which does not fit the others", self.shape).into()),
        }
    }
}

impl<'a, T> Operand<'a, T, 2> {
    /// The same with an axis of one entry before the others.
    pub fn with_axis(self) -> Operand<'a, T, 3> {
        let [first, second] = self.shape;
        Operand { shape: [1, first, second], data: self.data, call: PhantomData }
    }
}

impl<'a> Call<'a> {
    pub fn new(context: &'a ComputeContext) -> Self {
        Call { context }
    }

    /// The extents of operand `at`.
    pub fn extents(&self, at: usize) -> Result<Vec<usize>, Failure> {
        Ok(extents(&*self.operand(at)?))
    }

    /// Operand `at`, which must have this type and rank.
    pub fn input<T: Typed, const RANK: usize>(&self, at: usize) -> Result<Operand<'a, T, RANK>, Failure> {
        let shape = self.extents(at)?.try_into();
        let shape = shape.map_err(|shape| format!("operand {at} has shape {shape:?}, and {RANK} axes are wanted"))?;
        Ok(Operand { shape, data: self.input_flat::<T>(at)?.data, call: PhantomData })
    }

    /// Operand `at` of any rank, as one list.
    pub fn input_flat<T: Typed>(&self, at: usize) -> Result<Operand<'a, T, 1>, Failure> {
        let operand = self.operand(at)?;
        if *operand.data_type() != T::TYPE {
            return Err(format!("operand {at} has elements of type {}, not {}", operand.data_type(), T::TYPE).into());
        }
        Ok(Operand { shape: [extents(&operand).iter().product()], data: operand.data_ptr(), call: PhantomData })
    }

    /// Operand `at` as bytes, whatever its type.
    pub fn input_bytes(&self, at: usize) -> Result<Operand<'a, u8, 1>, Failure> {
        let operand = self.operand(at)?;
        let element = operand.data_type().byte_size(1).ok_or("strings are no numbers")?;
        let count = extents(&operand).iter().product::<usize>() * element;
        Ok(Operand { shape: [count], data: operand.data_ptr(), call: PhantomData })
    }

    /// Allocates output `at`, once.
    pub fn output<T: Typed>(&self, at: usize, shape: &[usize]) -> Result<Output<'a, T>, Failure> {
        let output = self.result(at, shape)?;
        if *output.data_type() != T::TYPE {
            return Err(format!("output {at} has elements of type {}, not {}", output.data_type(), T::TYPE).into());
        }
        Ok(Output { data: output.data_ptr().cast_mut(), count: shape.iter().product(), call: PhantomData })
    }

    /// Allocates output `at`, whatever its type, once: its bytes, and how many an element has.
    pub fn output_bytes(&self, at: usize, shape: &[usize]) -> Result<(Output<'a, u8>, usize), Failure> {
        let output = self.result(at, shape)?;
        let element = output.data_type().byte_size(1).ok_or("strings are no numbers")?;
        let count = shape.iter().product::<usize>() * element;
        Ok((Output { data: output.data_ptr().cast_mut(), count, call: PhantomData }, element))
    }

    fn operand(&self, at: usize) -> Result<ValueRef<'a, DynTensorValueType>, Failure> {
        let value = self.context.input(at)?.ok_or_else(|| format!("operand {at} is missing"))?;
        Ok(value.downcast()?)
    }

    fn result(&self, at: usize, shape: &[usize]) -> Result<ValueRefMut<'a, DynTensorValueType>, Failure> {
        let dims: Vec<i64> = shape.iter().map(|&extent| extent as i64).collect();
        let value = self.context.output(at, dims)?.ok_or_else(|| format!("output {at} is missing"))?;
        Ok(value.downcast()?)
    }

    /// Lends `count` floats from ONNX Runtime's allocator. What they are is not said.
    pub fn with_scratch<R>(&self, count: usize, work: impl FnOnce(&mut [f32]) -> R) -> Result<R, Failure> {
        if count == 0 {
            return Ok(work(&mut []));
        }
        // Beyond that no memory is, and ONNX Runtime's arena (1.17 to 1.20) takes what it cannot count for a small number.
        if count > isize::MAX as usize / size_of::<f32>() {
            return Err(format!("{count} numbers of scratch memory are too many").into());
        }
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Arena, MemoryType::Default);
        let allocator = self.context.allocator(&memory?)?;
        let mut block = allocator.alloc::<f32>(count)?;
        // SAFETY: the block has room for so many floats, is aligned for them, and is ours until it is dropped. What
        // ONNX Runtime left there is bytes, and all bytes are floats.
        let floats = unsafe { elements_mut(block.as_mut_ptr(), count) };
        Ok(work(floats))
    }

    /// The stream that this call's kernels belong to, on a GPU.
    pub fn stream(&self) -> Result<CUstream, Failure> {
        // None is the default stream.
        Ok(self.context.stream()?.map_or(std::ptr::null_mut(), |stream| stream.as_ptr().cast()))
    }
}

/// An output of elements of type `T`, of this call alone.
pub struct Output<'a, T> {
    data: *mut c_void,
    count: usize,
    call: PhantomData<&'a mut [T]>,
}

impl<'a, T> Output<'a, T> {
    /// Room for the elements, of an output on the CPU.
    pub fn slice(self) -> &'a mut [T] {
        // SAFETY: ONNX Runtime has just allocated that many elements of this type, for this call alone. Kernels for the
        // CPU have theirs there.
        unsafe { elements_mut(self.data, self.count) }
    }

    /// The address of the elements, of an output on a GPU.
    pub fn address(&self) -> CUdeviceptr {
        self.data as CUdeviceptr
    }
}

/// Memory on a GPU that a node keeps from call to call, a block for each stream: what runs later in a stream may
/// overwrite it, what runs in another may not, and a graph that was captured replays with the same addresses.
#[derive(Default)]
pub struct DeviceScratch(Mutex<Vec<Block>>);

struct Block {
    stream: usize,
    bytes: usize,
    allocator: Allocator,
    data: *mut c_void,
}

// SAFETY: the address is that of device memory, and ONNX Runtime's allocators serve any thread.
unsafe impl Send for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the block is this allocator's, and the node that used it is gone.
        unsafe { self.allocator.free(self.data) };
    }
}

impl DeviceScratch {
    /// At least so many bytes for this call, from the allocator of the device of operand 0.
    pub fn of(&self, call: &Call, bytes: usize) -> Result<CUdeviceptr, Failure> {
        if bytes == 0 {
            return Ok(0);
        }
        let stream = call.stream()? as usize;
        let mut blocks = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(block) = blocks.iter().find(|block| block.stream == stream && block.bytes >= bytes) {
            return Ok(block.data as CUdeviceptr);
        }
        // What is too small stays: kernels that use it may not have run yet. Sizes double, so that there are few.
        let bytes = bytes.next_power_of_two();
        let first = call.operand(0)?;
        let allocator = call.context.allocator(first.memory_info())?;
        let data = allocator.alloc::<u8>(bytes)?.into_raw();
        blocks.push(Block { stream, bytes, allocator, data });
        Ok(data as CUdeviceptr)
    }
}

impl Pool for Call<'_> {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // A panic must not cross ONNX Runtime's threads: it is carried over to this one.
        let panicked = Mutex::new(None);
        let guarded = |at: usize| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(at))) {
                *panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(panic);
            }
        };
        match tasks {
            1 => guarded(0),
            _ => self.context.par_for(tasks, 0, guarded).expect("ONNX Runtime runs tasks"),
        }
        if let Some(panic) = panicked.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            resume_unwind(panic);
        }
    }
}

fn extents(tensor: &DynTensor) -> Vec<usize> {
    tensor.shape().iter().map(|&extent| extent as usize).collect()
}

/// # Safety
///
/// There are `count` elements of this type, on the CPU, which nobody writes to during the call.
unsafe fn elements<'a, T>(data: *const c_void, count: usize) -> &'a [T] {
    // SAFETY: as the caller says; where there are none, the pointer may be null.
    if count == 0 { &[] } else { unsafe { slice::from_raw_parts(data.cast(), count) } }
}

/// # Safety
///
/// There is room for `count` elements of this type, on the CPU, which nobody else has during the call.
unsafe fn elements_mut<'a, T>(data: *mut c_void, count: usize) -> &'a mut [T] {
    // SAFETY: as the caller says; where there are none, the pointer may be null.
    if count == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(data.cast(), count) } }
}

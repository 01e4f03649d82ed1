//! What the CUDA kernels share: which kernel is launched how, and the modules that hold them.
//!
//! Each operator's `kernel.cu` is compiled to PTX ahead of time (`cargo xtask ptx`); the driver assembles it for the
//! GPU when it is first used in a context. Whatever is enqueued goes to the caller's stream and can be captured in a
//! graph: nothing is allocated, nothing waits, results do not depend on timing.
//!
//! [`Launch`] is data, so that tests run the same kernels with the same arguments on the host.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;
use std::sync::{LazyLock, Mutex, PoisonError};

use cudarc::driver::sys;
pub use cudarc::driver::sys::{CUdeviceptr, CUstream};

use crate::Heads;

/// A type that tokens are stored in. All arithmetic is in float32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl Heads {
    /// Refuses heads that are none, or not all within the tensor.
    pub(crate) fn check_on_device(&self) -> Result<(), Error> {
        ensure(self.fit(), "the heads are none, or wider than the tensor")
    }
}

/// Why nothing was enqueued, or not all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Error {
    /// The driver's library is missing: there is no GPU to use.
    NoDriver,
    /// The GPU is older than all that there is code for; its compute capability.
    OldDevice(u32),
    /// The operands do not fit together, or exceed what a kernel can do.
    Problem(&'static str),
    /// A call of the driver failed.
    Driver {
        /// The function.
        call: &'static str,
        /// The name of what it returned.
        status: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver => f.write_str("the CUDA driver is not installed"),
            Self::OldDevice(found) => {
                write!(f, "compute capability {}.{} is below 7.5", found / 10, found % 10)
            }
            Self::Problem(what) => f.write_str(what),
            Self::Driver { call, status } => write!(f, "{call}: {status}"),
        }
    }
}

impl std::error::Error for Error {}

/// An operator with kernels of its own; those of an operator are loaded at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operator {
    /// `TokenMerge` and `TokenMergeDynamic`
    TokenMerge,
    /// `Attention` and `ProportionalAttention`
    Attention,
    /// `TokenRestore`
    TokenRestore,
    /// `TokenAssign`
    TokenAssign,
    /// `TokenMean`
    TokenMean,
    /// `TokenSize`
    TokenSize,
    /// `ConnectionMask` and `ConnectionMaskDynamic`
    ConnectionMask,
    /// `MaskedSoftmax`
    MaskedSoftmax,
    /// `TokenScore`
    TokenScore,
    /// `TokenPrune` and `TokenPruneDynamic`
    TokenPrune,
}

/// PTX by compute capability, the highest first.
type Ptx = [(u32, &'static str); 3];

macro_rules! ptx {
    ($operator:literal) => {
        [
            (90, include_str!(concat!("../../ptx/", $operator, ".sm_90.ptx"))),
            (80, include_str!(concat!("../../ptx/", $operator, ".sm_80.ptx"))),
            (75, include_str!(concat!("../../ptx/", $operator, ".sm_75.ptx"))),
        ]
    };
}

impl Operator {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::TokenMerge,
        Self::Attention,
        Self::TokenRestore,
        Self::TokenAssign,
        Self::TokenMean,
        Self::TokenSize,
        Self::ConnectionMask,
        Self::MaskedSoftmax,
        Self::TokenScore,
        Self::TokenPrune,
    ];

    fn ptx(self) -> &'static Ptx {
        match self {
            Self::TokenMerge => &const { ptx!("token_merge") },
            Self::Attention => &const { ptx!("attention") },
            Self::TokenRestore => &const { ptx!("token_restore") },
            Self::TokenAssign => &const { ptx!("token_assign") },
            Self::TokenMean => &const { ptx!("token_mean") },
            Self::TokenSize => &const { ptx!("token_size") },
            Self::ConnectionMask => &const { ptx!("connection_mask") },
            Self::MaskedSoftmax => &const { ptx!("masked_softmax") },
            Self::TokenScore => &const { ptx!("token_score") },
            Self::TokenPrune => &const { ptx!("token_prune") },
        }
    }
}

/// What launches depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Device {
    /// Compute capability: 10 · major + minor.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
}

impl Device {
    /// The device of the calling thread's current context.
    pub fn current() -> Result<Self, Error> {
        with_context(|context| Ok(context.device))
    }
}

/// The structure that an operator's kernels take by value.
///
/// # Safety
///
/// The layout is that of the structure in `kernel.cu`.
pub unsafe trait Arguments: Copy {
    /// Whose kernels take it.
    const OPERATOR: Operator;
}

/// A kernel with everything that it is started with. Grids and blocks have one dimension.
#[derive(Clone, Copy, Debug)]
pub struct Launch<A> {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks of the grid; not zero.
    pub blocks: u32,
    /// Threads of each block.
    pub threads: u32,
    /// Dynamic shared memory of each block, in bytes; at most 48 KiB.
    pub shared: u32,
    /// What the kernel is called with.
    pub arguments: A,
}

impl<A: Arguments> Launch<A> {
    /// A launch of as many blocks as the product of `blocks`; none where there are none, as a grid must not be empty.
    ///
    /// Fails if a grid has no room for them.
    pub(crate) fn of(
        kernel: &'static str,
        blocks: &[usize],
        threads: usize,
        shared: usize,
        arguments: A,
    ) -> Result<Option<Self>, Error> {
        let blocks = grid(blocks)?;
        let launch = Self { kernel, blocks, threads: threads as u32, shared: shared as u32, arguments };
        Ok((blocks > 0).then_some(launch))
    }

    /// Puts the kernel in the queue of `stream`, whose context is current.
    ///
    /// # Safety
    ///
    /// `stream` is valid, and the pointers of the arguments hold as much as the kernel reads and writes until it is
    /// done.
    unsafe fn enqueue(&self, stream: CUstream) -> Result<(), Error> {
        let function = with_context(|context| {
            let functions = context.functions(A::OPERATOR)?;
            functions.get(self.kernel).copied().ok_or(Error::Problem("no kernel for these operands on this device"))
        })?;
        let mut parameters = [ptr::from_ref(&self.arguments).cast_mut().cast::<c_void>()];
        // SAFETY: the function belongs to the current context; it takes one parameter, which has its layout
        // (`Arguments`), is copied during the call and not written to. The caller vouches for stream and pointers.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                function.0,
                self.blocks,
                1,
                1,
                self.threads,
                1,
                1,
                self.shared,
                stream,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

/// Puts all `launches` in the queue of `stream`.
///
/// # Safety
///
/// As for [`Launch::enqueue`].
pub(crate) unsafe fn enqueue_all<A: Arguments>(
    launches: impl Iterator<Item = Launch<A>>,
    stream: CUstream,
) -> Result<(), Error> {
    for launch in launches {
        // SAFETY: as the caller vouches.
        unsafe { launch.enqueue(stream) }?;
    }
    Ok(())
}

/// Loads the kernels of `operators` into the calling thread's current context, unless they are there.
///
/// Launching does so too, but takes as long as the driver needs to assemble PTX, and must not happen while a graph is
/// captured. Call this before.
pub fn prepare(operators: &[Operator]) -> Result<(), Error> {
    with_context(|context| operators.iter().try_for_each(|&operator| context.functions(operator).map(drop)))
}

/// A kernel in a context.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a handle, not memory of this process: the driver takes it from any thread.
unsafe impl Send for Function {}

/// Kernels by name.
type Functions = HashMap<&'static str, Function>;

/// What is loaded in a context. Never unloaded: it goes with the context.
struct Context {
    device: Device,
    operators: HashMap<Operator, Functions>,
}

impl Context {
    /// Of the current context.
    fn new() -> Result<Self, Error> {
        let mut device = 0;
        // SAFETY: a context is current; the result is written to a local variable.
        check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&mut device) })?;
        let attribute = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: the device is that of a context; the result is written to a local variable.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value.unsigned_abs())
        };
        let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let device = Device { capability: 10 * major + minor, multiprocessors: multiprocessors as usize };
        Ok(Self { device, operators: HashMap::new() })
    }

    /// The kernels of `operator`; loads them into the current context, which is this, the first time.
    fn functions(&mut self, operator: Operator) -> Result<&Functions, Error> {
        if !self.operators.contains_key(&operator) {
            let ptx = best_ptx(operator, self.device.capability)?;
            self.operators.insert(operator, load(ptx)?);
        }
        Ok(&self.operators[&operator])
    }
}

/// The PTX for a device: that of the highest compute capability which is not above its own.
fn best_ptx(operator: Operator, capability: u32) -> Result<&'static str, Error> {
    let fits = operator.ptx().iter().find(|(of, _)| *of <= capability);
    fits.map(|(_, ptx)| *ptx).ok_or(Error::OldDevice(capability))
}

/// The names of the kernels in PTX.
fn kernels(ptx: &'static str) -> impl Iterator<Item = &'static str> {
    ptx.split(".visible .entry ").skip(1).filter_map(|rest| rest.split('(').next())
}

/// Loads PTX into the current context. Looking up its kernels makes the driver load them, however lazy it is set.
fn load(ptx: &'static str) -> Result<Functions, Error> {
    let text = CString::new(ptx).expect("PTX is text");
    let mut module = ptr::null_mut();
    // SAFETY: a context is current; the image is text that ends with a zero and is read during the call alone.
    check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, text.as_ptr().cast()) })?;
    kernels(ptx)
        .map(|name| {
            let text = CString::new(name).expect("names are text");
            let mut function = ptr::null_mut();
            // SAFETY: the module was just loaded; the name ends with a zero.
            check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut function, module, text.as_ptr()) })?;
            Ok((name, Function(function)))
        })
        .collect()
}

/// Calls `run` with what is loaded in the current context.
fn with_context<T>(run: impl FnOnce(&mut Context) -> Result<T, Error>) -> Result<T, Error> {
    // By identity, not by address: a new context may have the address of one that is gone.
    static CONTEXTS: LazyLock<Mutex<HashMap<u64, Context>>> = LazyLock::new(Mutex::default);
    // SAFETY: looks whether a library can be loaded; the driver's runs no code that could harm this process.
    static PRESENT: LazyLock<bool> = LazyLock::new(|| unsafe { sys::is_culib_present() });
    // The bindings panic where the library is missing.
    if !*PRESENT {
        return Err(Error::NoDriver);
    }
    let mut current = ptr::null_mut();
    // SAFETY: the result is written to a local variable.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut current) })?;
    if current.is_null() {
        return Err(Error::Problem("no CUDA context is current"));
    }
    let mut id = 0;
    // SAFETY: the context is current, so it is valid; the result is written to a local variable.
    check("cuCtxGetId", unsafe { sys::cuCtxGetId(current, &mut id) })?;
    // What a panic left behind is complete: an entry is inserted when all of it is there.
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let std::collections::hash_map::Entry::Vacant(entry) = contexts.entry(id) {
        entry.insert(Context::new()?);
    }
    run(contexts.get_mut(&id).expect("was inserted"))
}

fn check(call: &'static str, result: sys::CUresult) -> Result<(), Error> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: gives null or a static string, for any value.
    let found = unsafe { sys::cuGetErrorName(result, &mut name) };
    let status = if found == sys::CUresult::CUDA_SUCCESS && !name.is_null() {
        // SAFETY: a static string that ends with a zero, as the driver says.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    } else {
        format!("{result:?}")
    };
    Err(Error::Driver { call, status })
}

pub(crate) fn ensure(holds: bool, otherwise: &'static str) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Error::Problem(otherwise)) }
}

/// A count as kernels have it.
pub(crate) fn int(count: usize) -> Result<c_int, Error> {
    c_int::try_from(count).map_err(|_| Error::Problem("a count of more than 31 bits"))
}

/// The number of blocks of a grid.
fn grid(factors: &[usize]) -> Result<c_uint, Error> {
    let blocks = factors.iter().try_fold(1usize, |product, &factor| product.checked_mul(factor));
    blocks
        .filter(|&blocks| blocks <= c_int::MAX as usize)
        .map(|blocks| blocks as c_uint)
        .ok_or(Error::Problem("more blocks than a grid has"))
}

/// Whether all addresses and distances, in bytes, allow access to `bytes` at once.
pub(crate) fn aligned(bytes: usize, addresses: &[CUdeviceptr], distances: &[usize]) -> bool {
    let fits = |distance: &usize| distance.is_multiple_of(bytes);
    addresses.iter().all(|address| address.is_multiple_of(bytes as CUdeviceptr)) && distances.iter().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_code_that_a_device_runs() {
        let target = |capability| best_ptx(Operator::TokenMerge, capability).map(|ptx| ptx.contains(".target sm_80"));
        assert_eq!(target(70), Err(Error::OldDevice(70)));
        assert_eq!(target(75), Ok(false));
        assert_eq!(target(80), Ok(true));
        assert_eq!(target(89), Ok(true));
        assert_eq!(target(120), Ok(false));
    }

    #[test]
    fn every_module_has_kernels() {
        for operator in Operator::ALL {
            for (_, ptx) in operator.ptx() {
                assert_ne!(kernels(ptx).count(), 0, "{operator:?}");
            }
        }
    }

    #[test]
    fn without_a_driver_there_is_an_error() {
        // Where there is one, no context is current in this thread.
        assert!(prepare(&Operator::ALL).is_err());
    }
}

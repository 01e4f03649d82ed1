//! An operator as ONNX Runtime wants it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use ort::memory::MemoryType;
use ort::operator::ShapeInferenceContext;
use ort::operator::{self, ComputeContext, Kernel, KernelContext, OperatorInput, OperatorOutput};
use ort::value::{Shape, SymbolicDimensions, TensorElementType, ValueType};

use vitrim_ops::cuda::{self, Operator};

use crate::call::{Call, Failure};
use crate::panic_message;

/// What an operator computes: the tensors of a call to results in it.
pub type Compute = Box<dyn Fn(&Call) -> Result<(), Failure> + Send + Sync>;

/// An extent, as far as it is known before anything runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dim {
    /// -1 where it is not known.
    extent: i64,
    /// Its name, or empty.
    symbol: String,
}

impl Dim {
    /// An extent that is known. What is below zero is none: kernels refuse what asks for it.
    pub fn known(extent: i64) -> Self {
        if extent < 0 { Dim::unknown() } else { Dim { extent, symbol: String::new() } }
    }

    /// One that is not. ONNX Runtime takes -1 without a name for an extent: so it gets a name that no other has.
    pub fn unknown() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Dim { extent: -1, symbol: format!("ai.vitrim/{}", NEXT.fetch_add(1, Ordering::Relaxed)) }
    }

    /// An extent that is so much smaller.
    pub fn minus(&self, other: i64) -> Self {
        match self.extent {
            0.. if other >= 0 => Dim::known(self.extent - other),
            _ => Dim::unknown(),
        }
    }
}

/// A tensor that an operator takes: the type of its elements, and whether they are on the CPU wherever it runs.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    ty: TensorElementType,
    on_cpu: bool,
}

impl Operand {
    /// One that is where the operator runs.
    pub fn of(ty: TensorElementType) -> Self {
        Operand { ty, on_cpu: false }
    }

    /// One that is on the CPU.
    pub fn on_cpu(ty: TensorElementType) -> Self {
        Operand { ty, on_cpu: true }
    }
}

/// The type of what an operator gives.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// This, whatever it takes.
    Of(TensorElementType),
    /// That of its first operand.
    AsFirst,
}

impl Output {
    fn given(self, first: TensorElementType) -> TensorElementType {
        match self {
            Output::Of(ty) => ty,
            Output::AsFirst => first,
        }
    }
}

/// Where a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda,
}

impl Device {
    /// Every one.
    pub const ALL: [Device; 2] = [Device::Cpu, Device::Cuda];
}

/// The shapes of outputs from those of the operands; nothing where they are not known.
pub type Shapes = fn(&ShapeInferenceContext, &[Vec<Dim>]) -> Option<Vec<Vec<Dim>>>;

/// Reads the attributes of a node, for a device.
pub type Create = fn(&KernelContext, Device) -> Result<Compute, Failure>;

/// One operator for one combination of types.
pub struct Entry {
    pub name: &'static str,
    pub device: Device,
    pub inputs: Vec<Operand>,
    pub outputs: Vec<Output>,
    pub shapes: Shapes,
    /// Reads the attributes of a node.
    pub create: Create,
    /// What must be loaded before its kernels run on a GPU; none where it has none there.
    pub kernels: Option<Operator>,
}

impl operator::Operator for Entry {
    type Kernel<'attr> = Guarded;

    fn name(&self) -> &str {
        self.name
    }

    fn execution_provider_type(&self) -> Option<&str> {
        match self.device {
            Device::Cpu => None,
            Device::Cuda => Some("CUDAExecutionProvider"),
        }
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        self.inputs.iter().map(|operand| {
            let place = if operand.on_cpu { MemoryType::CPUInput } else { MemoryType::Default };
            OperatorInput::required(operand.ty).memory_type(place)
        })
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        self.outputs.iter().map(|output| OperatorOutput::required(output.given(self.inputs[0].ty)))
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Guarded> {
        let name = self.name;
        if let (Device::Cuda, Some(kernels)) = (self.device, self.kernels) {
            // The driver takes its time, and must not while a graph is captured. Where no context is current yet, it
            // happens in the first call; what is wrong with the device is said then.
            let _ = catch_unwind(|| cuda::prepare(&[kernels]));
        }
        Ok(Guarded { name, compute: guard(name, || (self.create)(context, self.device))? })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        // Without shapes ONNX Runtime would fuse less behind the operator. What is not known is no error; ONNX Runtime
        // would not look at one, nor release it.
        let _ = catch_unwind(AssertUnwindSafe(|| self.infer(context)));
        Ok(())
    }
}

impl Entry {
    fn infer(&self, context: &mut ShapeInferenceContext) -> Option<()> {
        let inputs = context.inputs();
        let shapes: Option<Vec<Vec<Dim>>> = inputs.iter().map(dims).collect();
        // Of the entries with one name ONNX Runtime asks the first: types are those of the operands at hand.
        let ValueType::Tensor { ty: first, .. } = *inputs.first()? else { return None };
        for (at, (dims, output)) in (self.shapes)(context, &shapes?)?.iter().zip(&self.outputs).enumerate() {
            let ty = output.given(first);
            let shape = Shape::new(dims.iter().map(|dim| dim.extent));
            let dimension_symbols = SymbolicDimensions::new(dims.iter().map(|dim| dim.symbol.clone()));
            context.set_output(at, &ValueType::Tensor { ty, shape, dimension_symbols }).ok()?;
        }
        Some(())
    }
}

fn dims(ty: &ValueType) -> Option<Vec<Dim>> {
    let ValueType::Tensor { shape, dimension_symbols, .. } = ty else { return None };
    let dim = |(&extent, symbol): (&i64, &String)| match extent {
        0.. => Dim::known(extent),
        _ if symbol.is_empty() => Dim::unknown(),
        _ => Dim { extent, symbol: symbol.clone() },
    };
    Some(shape.iter().zip(dimension_symbols.iter()).map(dim).collect())
}

/// A kernel whose panics become errors: they must not cross into ONNX Runtime.
///
/// ONNX Runtime runs one kernel in several threads at once, where a session has several. `ort` makes a `&mut` for each
/// of them, so nothing in here may change: what computes is [`Fn`] and [`Sync`], and keeps what it needs in its call.
pub struct Guarded {
    name: &'static str,
    compute: Compute,
}

impl Kernel for Guarded {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        guard(self.name, || (self.compute)(&Call::new(context)))
    }
}

fn guard<T>(name: &str, work: impl FnOnce() -> Result<T, Failure>) -> ort::Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panic_message(panic.as_ref()).into()));
    done.map_err(|Failure(reason)| ort::Error::new(format!("ai.vitrim {name}: {reason}")))
}

/// The integer attribute `name`, which must not be negative.
pub fn int(context: &KernelContext, name: &str) -> Result<usize, Failure> {
    let value: i64 = context.get(name).ok_or_else(|| format!("attribute {name} is missing"))?;
    usize::try_from(value).map_err(|_| format!("attribute {name} is {value}").into())
}

//! ONNX Runtime, loaded at run time from wherever [`discover`](super::discover) finds it.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ort::ep::{self, ExecutionProvider};
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::SessionInputValue;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{DynValue, Outlet, TensorElementType, TensorRef, ValueType};

use super::discover::{Found, Search};
use super::{
    Backend, Dim, Feeds, OpsLibrary, Optimization, Outputs, Port, RuntimeArgs, RuntimeKind, Session, match_feeds,
};
use crate::tensor::{DType, Tensor, dispatch, dispatch_dtype};

/// The process's one environment and where its library is: ONNX Runtime cannot be loaded twice.
static LOADED: Mutex<Option<(PathBuf, ort::environment::Environment)>> = Mutex::new(None);

/// ONNX Runtime with the options for its sessions.
pub struct Ort {
    environment: ort::environment::Environment,
    cuda: bool,
    threads: Option<usize>,
    optimization: Optimization,
    ops: OpsLibrary,
}

impl Ort {
    /// Finds and loads ONNX Runtime. CUDA must be there if it is asked for: nothing falls back to the CPU.
    pub fn new(args: &RuntimeArgs) -> Result<Self> {
        let found = Search::from_env(args.ort_lib.clone()).find()?;
        let environment = environment(&found)?;
        let cuda = args.runtime == RuntimeKind::Cuda;
        if cuda {
            let available = ep::CUDA::is_available().map_err(plain)?;
            ensure!(available, "the ONNX Runtime of {} is built without CUDA; install onnxruntime-gpu", found.origin);
            preload_cuda(&found.path);
        }
        if let OpsLibrary::At(path) = &args.ops {
            ensure!(path.is_file(), "the custom-op library {} does not exist", path.display());
        }
        Ok(Ort { environment, cuda, threads: args.threads, optimization: args.optimize, ops: args.ops.clone() })
    }

    fn builder(&self) -> Result<SessionBuilder> {
        // Threads that spin on after a run would slow the next session's; `bench` interleaves sessions.
        let mut builder = ort::session::Session::builder(&self.environment)
            .map_err(plain)?
            .with_config_entry("session.force_spinning_stop", "1")
            .map_err(plain)?
            .with_optimization_level(match self.optimization {
                Optimization::Off => GraphOptimizationLevel::Disable,
                Optimization::Basic => GraphOptimizationLevel::Level1,
                Optimization::Extended => GraphOptimizationLevel::Level2,
                Optimization::All => GraphOptimizationLevel::All,
            })
            .map_err(plain)?;
        if let Some(threads) = self.threads {
            builder = builder.with_intra_threads(threads).map_err(plain)?;
        }
        if let OpsLibrary::At(path) = &self.ops {
            let registered = builder.with_operator_library(path).map_err(plain);
            builder = registered.with_context(|| format!("cannot register the custom ops of {}", path.display()))?;
        }
        if self.cuda {
            let cuda = ep::CUDA::default().build().error_on_failure();
            builder = builder.with_execution_providers([cuda]).map_err(plain).context("CUDA cannot be used")?;
        }
        Ok(builder)
    }
}

impl Backend for Ort {
    fn name(&self) -> &str {
        match (self.cuda, &self.ops) {
            (false, OpsLibrary::None) => "ort",
            (false, OpsLibrary::At(_)) => "ort with kernels",
            (true, OpsLibrary::None) => "cuda",
            (true, OpsLibrary::At(_)) => "cuda with kernels",
        }
    }

    fn load(&self, model: &Path) -> Result<Box<dyn Session>> {
        let session = self.builder()?.commit_from_file(model).map_err(plain)?;
        let inputs = session.inputs().iter().map(port).collect::<Result<_>>()?;
        let outputs = session.outputs().iter().map(port).collect::<Result<_>>()?;
        let optional = session.overridable_initializers().iter().map(|input| input.name().to_owned()).collect();
        let device = if self.cuda { AllocationDevice::CUDA } else { AllocationDevice::CPU };
        let memory = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default).map_err(plain)?;
        Ok(Box::new(OrtSession { session, inputs, optional, outputs, memory }))
    }
}

struct OrtSession {
    session: ort::session::Session,
    inputs: Vec<Port>,
    /// Inputs that may be left out.
    optional: Vec<String>,
    outputs: Vec<Port>,
    /// Where [`Session::time`] leaves outputs: on the device, not copied back.
    memory: MemoryInfo<'static>,
}

impl Session for OrtSession {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn run(&mut self, feeds: &Feeds) -> Result<Outputs> {
        let values =
            fed(&self.inputs, &self.optional, feeds)?.into_iter().map(|(name, tensor)| Ok((name, borrowed(tensor)?)));
        let values = values.collect::<Result<Vec<_>>>()?;
        let outputs = self.session.run(values).map_err(plain)?;
        let take = |port: &Port| {
            let value = outputs.get(&port.name).with_context(|| format!("the output {port} was not computed"))?;
            anyhow::Ok((port.name.clone(), extract(value, port)?))
        };
        self.outputs.iter().map(take).collect()
    }

    fn time(&mut self, feeds: &Feeds) -> Result<Duration> {
        let mut binding = self.session.create_binding().map_err(plain)?;
        for (name, tensor) in fed(&self.inputs, &self.optional, feeds)? {
            binding.bind_input(name, &owned(tensor)?).map_err(plain)?;
        }
        for port in &self.outputs {
            binding.bind_output_to_device(&port.name, &self.memory).map_err(plain)?;
        }
        binding.synchronize_inputs().map_err(plain)?;
        let start = Instant::now();
        self.session.run_binding(&binding).map_err(plain)?;
        binding.synchronize_outputs().map_err(plain)?;
        Ok(start.elapsed())
    }
}

/// The tensors of all inputs, and of those that may be left out and are not.
fn fed<'a>(inputs: &'a [Port], optional: &'a [String], feeds: &'a Feeds) -> Result<Vec<(&'a str, &'a Tensor)>> {
    let inputs = std::iter::zip(inputs, match_feeds(inputs, feeds)?).map(|(port, tensor)| (port.name.as_str(), tensor));
    let optional = optional.iter().filter_map(|name| Some((name.as_str(), feeds.get(name)?)));
    Ok(inputs.chain(optional).collect())
}

/// Loads the library, or returns the environment of the one already loaded.
fn environment(found: &Found) -> Result<ort::environment::Environment> {
    let mut loaded = LOADED.lock().map_err(|_| anyhow!("loading ONNX Runtime failed before"))?;
    if let Some((path, environment)) = &*loaded {
        ensure!(*path == found.path, "ONNX Runtime is already loaded from {}", path.display());
        return Ok(environment.clone());
    }
    let builder = ort::init_from(&found.path).map_err(|error| match error {
        ort::LoadDynamicError::Dlopen { .. } if !found.path.is_absolute() => anyhow!(
            "ONNX Runtime is not installed: install it with `pip install onnxruntime` (1.20 or newer), name its library with --ort-lib \
             or ORT_DYLIB_PATH, or use --runtime tract"
        ),
        error => anyhow!("the library from {} cannot be used: {error}", found.origin),
    })?;
    let environment = builder.with_name("vitrim").with_telemetry(false).build().map_err(plain)?;
    // What goes wrong is returned as an error; logging it too would say it twice. ORT_LOG asks for more.
    if std::env::var_os("ORT_LOG").is_none() {
        environment.set_log_level(LogLevel::Fatal);
    }
    *loaded = Some((found.path.clone(), environment.clone()));
    Ok(environment)
}

/// Loads the CUDA libraries that pip installs beside onnxruntime-gpu, where the loader would not look. Those that are
/// missing or unfit are left to the system; registering the provider reports what is then still missing.
fn preload_cuda(library: &Path) {
    let site_packages = library.ancestors().nth(3).map(|site| site.join("nvidia"));
    let folders: Vec<PathBuf> = site_packages
        .and_then(|nvidia| nvidia.read_dir().ok())
        .into_iter()
        .flatten()
        .flatten()
        .map(|package| package.path().join(if cfg!(windows) { "bin" } else { "lib" }))
        .collect();
    for name in ep::cuda::CUDA_DYLIBS.iter().chain(ep::cuda::CUDNN_DYLIBS) {
        if let Some(path) = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) {
            let _ = ort::util::preload_dylib(path);
        }
    }
}

/// An error of ONNX Runtime on one line, without the builder that some carry.
fn plain<R>(error: ort::Error<R>) -> anyhow::Error {
    anyhow!(error.message().split_whitespace().collect::<Vec<_>>().join(" "))
}

fn port(outlet: &Outlet) -> Result<Port> {
    let name = outlet.name();
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
        bail!("`{name}` is a {}, not a tensor", outlet.dtype());
    };
    let dtype = dtype(*ty).with_context(|| format!("`{name}` has elements of type {ty}"))?;
    let dim = |(&size, symbol): (&i64, &String)| match usize::try_from(size) {
        Ok(size) => Dim::Fixed(size),
        Err(_) if symbol.is_empty() => Dim::Unknown,
        Err(_) => Dim::Symbol(symbol.clone()),
    };
    // ONNX Runtime does not tell a scalar from an unknown rank.
    let dims = (!shape.is_empty()).then(|| shape.iter().zip(dimension_symbols.iter()).map(dim).collect());
    Ok(Port { name: name.to_owned(), dtype, dims })
}

fn dtype(ty: TensorElementType) -> Result<DType> {
    Ok(match ty {
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Int16 => DType::I16,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Uint16 => DType::U16,
        TensorElementType::Uint32 => DType::U32,
        TensorElementType::Uint64 => DType::U64,
        TensorElementType::Bool => DType::Bool,
        _ => bail!("such elements are not supported"),
    })
}

fn borrowed(tensor: &Tensor) -> Result<SessionInputValue<'_>> {
    dispatch!(tensor, array => Ok(TensorRef::from_array_view(array.view()).map_err(plain)?.into()))
}

fn owned(tensor: &Tensor) -> Result<DynValue> {
    dispatch!(tensor, array => Ok(ort::value::Tensor::from_array(array.clone()).map_err(plain)?.into_dyn()))
}

fn extract(value: &DynValue, port: &Port) -> Result<Tensor> {
    dispatch_dtype!(port.dtype, T => {
        let (shape, data) = value.try_extract_tensor::<T>().map_err(plain)?;
        let shape = shape.iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>()?;
        Tensor::from_vec(&shape, data.to_vec())
    })
}

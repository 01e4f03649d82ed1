//! Running models, whatever runs them.
//!
//! A [`Backend`] loads model files into [`Session`]s. Two exist: [`tract`], compiled in and always there, and [`ort`],
//! ONNX Runtime loaded from wherever it is installed ([`discover`]), on the CPU or on CUDA. [`RuntimeArgs`] are the
//! command-line options that choose between them.

pub mod discover;
pub mod flatten;
pub mod ort;
pub mod tract;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::ops;
use crate::tensor::{DType, NamedTensors};

/// What a session is fed, by input name.
pub type Feeds = NamedTensors;
/// What a session returns, in the model's order.
pub type Outputs = NamedTensors;

/// Something that runs models.
pub trait Backend {
    /// The name that the command line uses.
    fn name(&self) -> &str;
    /// Loads a model file, with the external data beside it if it has any.
    fn load(&self, model: &Path) -> Result<Box<dyn Session>>;
}

/// A loaded model.
pub trait Session {
    /// The inputs that must be fed, in the model's order; those with a default value are left out.
    fn inputs(&self) -> &[Port];
    /// The outputs, in the model's order.
    fn outputs(&self) -> &[Port];
    /// Runs once. Feeds that are no input of the model are ignored.
    fn run(&mut self, feeds: &Feeds) -> Result<Outputs>;
    /// Runs once and tells how long the runtime took, without what it takes to convert feeds and outputs.
    fn time(&mut self, feeds: &Feeds) -> Result<Duration>;
}

/// A graph input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its declared axes; `None` if not even their number is known.
    pub dims: Option<Vec<Dim>>,
}

/// A declared dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// A number.
    Fixed(usize),
    /// Any number, the same wherever the name occurs.
    Symbol(String),
    /// Any number.
    Unknown,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(size) => write!(f, "{size}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

impl Port {
    /// The dimension of the first axis, if it is fixed.
    pub fn fixed_batch(&self) -> Option<usize> {
        match self.dims.as_deref() {
            Some([Dim::Fixed(size), ..]) => Some(*size),
            _ => None,
        }
    }

    /// Whether a tensor of this shape may be fed.
    fn accepts(&self, shape: &[usize]) -> bool {
        self.dims.as_ref().is_none_or(|dims| {
            dims.len() == shape.len()
                && dims.iter().zip(shape).all(|(dim, &size)| !matches!(dim, Dim::Fixed(fixed) if *fixed != size))
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.name, self.dtype)?;
        let Some(dims) = &self.dims else { return Ok(()) };
        let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

/// The feed of each port, in the ports' order, of the right type and of a shape that the port admits.
fn match_feeds<'f>(ports: &[Port], feeds: &'f Feeds) -> Result<Vec<&'f crate::tensor::Tensor>> {
    let matched = ports.iter().map(|port| {
        let Some(tensor) = feeds.get(&port.name) else {
            let names: Vec<&str> = feeds.names().collect();
            bail!("the input {port} is not fed; there is {}", names.join(", "));
        };
        ensure!(
            tensor.dtype() == port.dtype && port.accepts(tensor.shape()),
            "the input {port} is fed {}{:?}",
            tensor.dtype(),
            tensor.shape()
        );
        Ok(tensor)
    });
    matched.collect()
}

/// The runtimes that the command line knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RuntimeKind {
    /// The embedded runtime: always there, CPU only, one thread.
    Tract,
    /// ONNX Runtime on the CPU.
    Ort,
    /// ONNX Runtime on CUDA.
    Cuda,
}

/// How far ONNX Runtime optimises a graph before running it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Optimization {
    /// Not at all.
    Off,
    /// Constant folding and removal of redundant nodes.
    Basic,
    /// Fusions too.
    Extended,
    /// Everything.
    All,
}

/// The custom-op library that ONNX Runtime is to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpsLibrary {
    /// None: every op runs as the function that the model carries.
    None,
    /// The library at this path.
    At(PathBuf),
}

impl FromStr for OpsLibrary {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(OpsLibrary::None),
            "auto" => ops::library().map(OpsLibrary::At).map_err(|error| format!("{error:#}")),
            path => Ok(OpsLibrary::At(path.into())),
        }
    }
}

/// Which runtime to use, and how.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Runtime")]
pub struct RuntimeArgs {
    /// What runs the models
    #[arg(long, value_enum, default_value = "tract")]
    pub runtime: RuntimeKind,
    /// ONNX Runtime's shared library, or the folder that holds it [default: ORT_DYLIB_PATH, then the active Python
    /// environment's onnxruntime package, then a .venv here or above, then the system's]
    #[arg(long, value_name = "FILE")]
    pub ort_lib: Option<PathBuf>,
    /// Threads that ONNX Runtime uses within an operator [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// How far ONNX Runtime optimises the graph
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "all")]
    pub optimize: Optimization,
    /// Library of native kernels for the candidates: a path, `auto` for the one that `vitrim ops` prints, or `none` to run
    /// the functions that the models carry
    #[arg(long, value_name = "LIB|auto|none", default_value = "none")]
    pub ops: OpsLibrary,
}

impl Default for RuntimeArgs {
    fn default() -> Self {
        RuntimeArgs {
            runtime: RuntimeKind::Tract,
            ort_lib: None,
            threads: None,
            optimize: Optimization::All,
            ops: OpsLibrary::None,
        }
    }
}

/// One runtime, twice.
pub struct Backends {
    /// Without a custom-op library: what a reference runs on.
    pub plain: Box<dyn Backend>,
    /// With the custom-op library, if there is one.
    pub native: Option<Box<dyn Backend>>,
}

impl RuntimeArgs {
    /// The chosen runtime, without a custom-op library and with the chosen one.
    pub fn backends(&self) -> Result<Backends> {
        let plain = RuntimeArgs { ops: OpsLibrary::None, ..self.clone() }.backend()?;
        let native = (self.ops != OpsLibrary::None).then(|| self.backend()).transpose()?;
        Ok(Backends { plain, native })
    }

    /// The chosen runtime, ready to load models.
    pub fn backend(&self) -> Result<Box<dyn Backend>> {
        ensure!(self.threads != Some(0), "--threads must be at least 1");
        match self.runtime {
            RuntimeKind::Tract => {
                ensure!(self.threads.unwrap_or(1) == 1, "tract uses one thread; choose --runtime ort for --threads");
                ensure!(self.ops == OpsLibrary::None, "tract cannot load custom-op libraries; choose --runtime ort");
                Ok(Box::new(tract::Tract))
            }
            RuntimeKind::Ort | RuntimeKind::Cuda => Ok(Box::new(ort::Ort::new(self)?)),
        }
    }
}

/// Loads a model, naming it in errors.
pub fn load(backend: &dyn Backend, model: &Path) -> Result<Box<dyn Session>> {
    backend.load(model).with_context(|| format!("{} cannot load {}", backend.name(), model.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn port(dims: &[Dim]) -> Port {
        Port { name: "x".into(), dtype: DType::F32, dims: Some(dims.to_vec()) }
    }

    #[test]
    fn feeds_are_matched_by_name_type_and_shape() {
        let ports = [port(&[Dim::Symbol("batch".into()), Dim::Fixed(2)])];
        let feeds = |name: &str, tensor| Feeds::from_iter([(name.to_owned(), tensor)]);
        let tensor = || Tensor::from_vec(&[1, 2], vec![1.0f32, 2.0]).unwrap();
        assert_eq!(match_feeds(&ports, &feeds("x", tensor())).unwrap(), [&tensor()]);
        for bad in [
            feeds("y", tensor()),
            feeds("x", Tensor::from_vec(&[1, 2], vec![1.0f64, 2.0]).unwrap()),
            feeds("x", Tensor::from_vec(&[2, 1], vec![1.0f32, 2.0]).unwrap()),
            feeds("x", Tensor::from_vec(&[2], vec![1.0f32, 2.0]).unwrap()),
        ] {
            let error = match_feeds(&ports, &bad).unwrap_err().to_string();
            assert!(error.contains("`x` float32[batch, 2]"), "{error}");
        }
    }

    #[test]
    fn tract_refuses_what_it_cannot_do() {
        let threads = RuntimeArgs { threads: Some(2), ..RuntimeArgs::default() };
        let ops = RuntimeArgs { ops: "lib.so".parse().unwrap(), ..RuntimeArgs::default() };
        assert!(threads.backend().is_err() && ops.backend().is_err());
        assert_eq!("none".parse(), Ok(OpsLibrary::None));
        assert_eq!(RuntimeArgs::default().backend().unwrap().name(), "tract");
    }
}

//! ONNX Runtime Training 1.19.2, the real one, as a client has it.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use vitrim::tensor::npz::{read_npz, write_npz};
use vitrim::tensor::{DType, NamedTensors, Tensor};

/// What a variable of the environment names; a missing one is announced past the test harness.
pub fn needed(variable: &str, what: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if found.is_none() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {what} is not tested, since {variable} is not set");
    }
    found
}

/// The Python that has ONNX Runtime Training.
pub fn python() -> Option<PathBuf> {
    needed("VITRIM_ORT_TRAINING", "ONNX Runtime Training")
}

/// Runs a program to its end and gives what it printed.
pub fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Steps `from..to` of a training by ONNX Runtime Training.
pub struct Client<'t> {
    pub python: &'t Path,
    pub artifacts: &'t Path,
    pub data: &'t Path,
}

impl Client<'_> {
    pub fn run(&self, steps: std::ops::Range<usize>, rate: f64, options: &[&OsStr]) -> NamedTensors {
        let out = self.artifacts.join(format!("{}_{}.npz", steps.start, steps.end));
        let numbers = [steps.start.to_string(), steps.end.to_string(), rate.to_string()];
        let mut command = Command::new(self.python);
        command.arg(script("python/ort_training.py")).args([self.artifacts, self.data, &out]);
        command.args(["--from", &numbers[0], "--to", &numbers[1], "--rate", &numbers[2]]).args(options);
        output(&mut command);
        read_npz(&out).unwrap_or_else(|error| panic!("{error:#}"))
    }
}

pub fn named<'t>(tensors: &'t NamedTensors, name: &str) -> &'t Tensor {
    tensors.get(name).unwrap_or_else(|| panic!("there is '{name}'"))
}

pub fn save(path: &Path, tensors: &NamedTensors) {
    let file = std::fs::File::create(path).expect("the folder can be written");
    write_npz(file, tensors).unwrap_or_else(|error| panic!("{error:#}"));
}

/// What a file of vectors has of a parameter: models have the matrices of products the other way round.
pub fn expected(tensor: &Tensor) -> Tensor {
    let array = tensor.to_f64();
    let array = if array.ndim() == 2 { array.reversed_axes() } else { array };
    Tensor::from_f64(DType::F64, &array.as_standard_layout().into_owned())
}

/// One batch of a training.
pub fn batch(tensor: &Tensor, step: usize) -> Tensor {
    Tensor::from_f64(tensor.dtype(), &tensor.to_f64().index_axis_move(ndarray::Axis(0), step))
}

//! Files of tensors by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use vitrim_io::MappedFile;
use vitrim_ir::{DataType, Tensor};
use vitrim_passes::Refusal;

use crate::artifacts::Checkpoint;
use crate::parameters::Parameter;

/// Writes what parameters begin with, in the `safetensors` format.
pub fn write(parameters: &[Parameter], path: &Path) -> io::Result<()> {
    let elements: Vec<Cow<'_, [u8]>> = parameters
        .iter()
        .map(|parameter| match parameter.tensor.raw() {
            Some(raw) => Cow::Borrowed(&raw[..]),
            None => {
                let elements = parameter.tensor.to_f64s().unwrap_or_default();
                elements.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect()
            }
        })
        .collect();
    let mut views = Vec::with_capacity(parameters.len());
    for (parameter, elements) in parameters.iter().zip(&elements) {
        let shape = parameter.tensor.dims().iter().map(|&extent| extent as usize).collect();
        let view = TensorView::new(Dtype::F32, shape, elements).map_err(io::Error::other)?;
        views.push((parameter.name.as_str(), view));
    }
    // In memory first: the library gives the files that it writes the permissions of temporary ones.
    std::fs::write(path, safetensors::serialize(views, None).map_err(io::Error::other)?)
}

/// Reads a file of tensors, of a format that its first bytes tell: `safetensors`, or a checkpoint of ONNX Runtime Training.
/// Tensors of types that weights cannot have are left out.
///
/// # Errors
///
/// [`Refusal::Request`] where the file cannot be read, or is malformed or of no format that is known.
pub fn read(path: &Path) -> Result<BTreeMap<String, Tensor>, Refusal> {
    let refuse = |reason: String| Refusal::Request(format!("cannot read '{}': {reason}", path.display()));
    let bytes = MappedFile::open(path).map_err(|error| Refusal::Request(format!("cannot read {error}")))?.bytes();
    if Checkpoint::is(&bytes) {
        let Checkpoint { trained, frozen } =
            Checkpoint::read(path).map_err(|error| Refusal::Request(error.to_string()))?;
        return Ok(trained.into_iter().chain(frozen).collect());
    }
    match bytes.get(8) {
        // The length of the header, then the header: JSON, an object.
        Some(b'{') => safetensors(&bytes).map_err(refuse),
        _ => Err(refuse("it is neither a safetensors file nor a checkpoint of ONNX Runtime Training".into())),
    }
}

fn safetensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("it is malformed: {error}"))?;
    let tensor = |view: &TensorView<'_>| {
        let (dims, raw) = (view.shape(), view.data());
        let floats = |dtype: DataType, elements: Vec<f64>| Some(Tensor::floats(dtype, dims, &elements));
        match view.dtype() {
            Dtype::F32 => {
                let elements: Vec<f32> = raw.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect();
                Some(Tensor::f32s(dims, &elements))
            }
            Dtype::F64 => {
                floats(DataType::F64, raw.as_chunks().0.iter().map(|&chunk| f64::from_le_bytes(chunk)).collect())
            }
            Dtype::I64 => {
                let elements: Vec<i64> = raw.as_chunks().0.iter().map(|&chunk| i64::from_le_bytes(chunk)).collect();
                Some(Tensor::i64s(dims, &elements))
            }
            // Only their type will be told.
            Dtype::F16 => floats(DataType::F16, vec![0.0; raw.len() / 2]),
            Dtype::BF16 => floats(DataType::BF16, vec![0.0; raw.len() / 2]),
            _ => None,
        }
    };
    Ok(file.iter().filter_map(|(name, view)| Some((name.to_owned(), tensor(&view)?))).collect())
}

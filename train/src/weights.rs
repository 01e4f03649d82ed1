//! Files of parameters by name, in the `safetensors` format.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::parameters::Parameter;

/// Writes what parameters begin with.
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

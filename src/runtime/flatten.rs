//! Models as runtimes without local functions want them.

use std::path::Path;

use anyhow::{Context, Result};
use vitrim_ir::{Model, inline_functions};

/// The bytes of the model at `path` with every local function inlined and all weights inside.
pub fn flatten(path: &Path) -> Result<Vec<u8>> {
    let mut model = Model::read(path)?;
    inline_functions(&mut model, |_| true)
        .with_context(|| format!("cannot inline the functions of {}", path.display()))?;
    let verified = model.verify().with_context(|| format!("'{}' is not a valid model", path.display()))?;
    Ok(Model::to_bytes(verified))
}

//! The slicing floor: what the reduced token counts alone are worth.
//!
//! The recipe that a candidate carries is applied to the reference with one constant `Slice` in place of every merge:
//! the same cuts and counts, no matching, no sizes, nothing else changed. Tokens that nothing reads are computed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vitrim_ir::Model;
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, Options, RECIPE_KEY, Report};
use vitrim_passes::recipe::Recipe;

/// Writes the floor of `candidate` into `folder`; gives the file and how much less work it is.
pub(super) fn write(reference: &Path, candidate: &Path, folder: &Path, number: usize) -> Result<(PathBuf, Report)> {
    let recipe = Model::read(candidate)?;
    let recipe = recipe.metadata(RECIPE_KEY).with_context(|| {
        format!("'{}' carries no recipe: the slicing floor is for models that vitrim wrote", candidate.display())
    })?;
    let options = Options { sliced: true, keep_dead: true, ..Options::default() };
    let (floor, report) = driver::rewrite(&Model::read(reference)?, &Recipe::parse(recipe)?, options)
        .with_context(|| format!("no slicing floor for '{}'", candidate.display()))?;
    let path = folder.join(format!("floor{number}.onnx"));
    let verified = floor.verify().map_err(|violations| Refusal::Internal(violations.to_string()))?;
    Model::write(verified, &path, reference)?;
    Ok((path, report))
}

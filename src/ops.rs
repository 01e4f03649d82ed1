//! `vitrim ops`: where the library of native kernels is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};

use crate::verify::print;

/// Names the library outright.
const VARIABLE: &str = "VITRIM_OPS";

/// Runs `vitrim ops`.
pub fn run() -> Result<ExitCode> {
    print(format!("{}\n", library()?.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The custom-op library: the one that the environment variable `VITRIM_OPS` names, else the one beside this program
/// or in `lib` beside its folder.
pub fn library() -> Result<PathBuf> {
    if let Some(path) = env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from) {
        ensure!(path.is_file(), "{VARIABLE} names {}, which does not exist", path.display());
        return Ok(std::path::absolute(path)?);
    }
    let program = env::current_exe().context("cannot tell where this program is")?;
    let beside = program.parent().unwrap_or(Path::new("."));
    let name = format!("{}vitrim_ops{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    // Tests run in `deps` below the folder that libraries are built into.
    let places = [beside.join(&name), beside.join("../lib").join(&name), beside.join("..").join(&name)];
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.canonicalize()?),
        None => bail!(
            "{name} is not beside {}; `cargo build --release -p vitrim-ops-abi` builds it, and {VARIABLE} can name it",
            program.display()
        ),
    }
}

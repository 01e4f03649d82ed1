//! Finding ONNX Runtime's shared library.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where to look, in this order. What is named outright must exist; the rest is tried.
#[derive(Default)]
pub struct Search {
    /// `--ort-lib`: the library or its folder.
    pub flag: Option<PathBuf>,
    /// The environment variable `ORT_DYLIB_PATH`: likewise.
    pub variable: Option<OsString>,
    /// The environment variable `VIRTUAL_ENV`: the root of the active Python environment.
    pub virtual_env: Option<PathBuf>,
    /// Asks Python for the folder of its onnxruntime package.
    pub python: Option<fn() -> Option<PathBuf>>,
    /// The folder in which, and above which, a `.venv` is looked for.
    pub start: Option<PathBuf>,
}

/// A library, and how it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The library; a bare file name is for the system's loader to find.
    pub path: PathBuf,
    /// Where it comes from, for people to read.
    pub origin: String,
}

impl Search {
    /// The search that the environment of this process asks for.
    pub fn from_env(flag: Option<PathBuf>) -> Self {
        Search {
            flag,
            variable: env::var_os("ORT_DYLIB_PATH").filter(|value| !value.is_empty()),
            virtual_env: env::var_os("VIRTUAL_ENV").map(PathBuf::from),
            python: Some(ask_python),
            start: env::current_dir().ok(),
        }
    }

    /// The first library there is, or else the name by which the system may know one.
    pub fn find(&self) -> Result<Found> {
        let found = |path, origin: &str| Found { path, origin: origin.to_owned() };
        if let Some(path) = &self.flag {
            return Ok(found(named(path).context("--ort-lib")?, "--ort-lib"));
        }
        if let Some(path) = &self.variable {
            return Ok(found(named(Path::new(path)).context("ORT_DYLIB_PATH")?, "ORT_DYLIB_PATH"));
        }
        if let Some(path) = self.virtual_env.as_deref().and_then(in_environment) {
            return Ok(found(path, "the active Python environment"));
        }
        if let Some(path) = self.python.and_then(|ask| ask()).and_then(|package| in_folder(&package.join("capi"))) {
            return Ok(found(path, "the onnxruntime package of python3"));
        }
        if let Some(path) =
            self.start.iter().flat_map(|start| start.ancestors()).find_map(|dir| in_environment(&dir.join(".venv")))
        {
            return Ok(found(path, "a local .venv"));
        }
        Ok(found(format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX).into(), "the system"))
    }
}

/// A path that somebody gave: a file as it is, or the library in a folder.
fn named(path: &Path) -> Result<PathBuf> {
    ensure!(path.exists(), "{} does not exist", path.display());
    let path = std::path::absolute(path)?;
    if path.is_dir() {
        return in_folder(&path).with_context(|| format!("{} holds no ONNX Runtime library", path.display()));
    }
    Ok(path)
}

/// The library of the onnxruntime package of a Python environment.
fn in_environment(root: &Path) -> Option<PathBuf> {
    let mut site_packages = vec![root.join("Lib").join("site-packages")];
    let versions = root.join("lib").read_dir().into_iter().flatten().flatten();
    site_packages.extend(versions.map(|version| version.path().join("site-packages")));
    site_packages.sort();
    site_packages.iter().find_map(|site| in_folder(&site.join("onnxruntime").join("capi")))
}

/// The ONNX Runtime library in a folder, whatever version its file name carries; the newest name if there are several.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let files = folder.read_dir().ok()?.flatten().map(|entry| entry.path());
    let mut libraries: Vec<PathBuf> = files
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name == "onnxruntime.dll"
                || name.starts_with("libonnxruntime.so")
                || (name.starts_with("libonnxruntime.") && name.ends_with(".dylib"))
        })
        .collect();
    libraries.sort();
    libraries.pop()
}

/// Asks the first `python3` on the path, without importing anything of the package.
fn ask_python() -> Option<PathBuf> {
    const QUESTION: &str =
        "import importlib.util as u; s = u.find_spec('onnxruntime'); print(s.submodule_search_locations[0])";
    let interpreter = if cfg!(windows) { "python" } else { "python3" };
    let output =
        Command::new(interpreter).args(["-c", QUESTION]).output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a Python environment `name` that holds a library, and the path of that library.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> Self {
            let path = env::temp_dir().join(format!("vitrim-discover-{}-{test}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Scratch(path)
        }

        fn package(&self, site_packages: &str) -> PathBuf {
            let capi = self.0.join(site_packages).join("onnxruntime/capi");
            std::fs::create_dir_all(&capi).unwrap();
            std::fs::write(capi.join("libonnxruntime_providers_shared.so"), "").unwrap();
            let library = capi.join("libonnxruntime.so.1.31.1");
            std::fs::write(&library, "").unwrap();
            library
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_order_is_flag_variable_environment_local_system() {
        let scratch = Scratch::new("order");
        let active = scratch.package("active/lib/python3.11/site-packages");
        let local = scratch.package(".venv/lib/python3.12/site-packages");
        let (flag, variable) = (scratch.0.join("flag.so"), scratch.0.join("variable.so"));
        std::fs::write(&flag, "").unwrap();
        std::fs::write(&variable, "").unwrap();
        let nested = scratch.0.join("a/b");
        std::fs::create_dir_all(&nested).unwrap();

        let mut search = Search {
            flag: Some(flag.clone()),
            variable: Some(variable.clone().into()),
            virtual_env: Some(scratch.0.join("active")),
            python: None,
            start: Some(nested),
        };
        assert_eq!(search.find().unwrap().path, flag);
        search.flag = None;
        assert_eq!(search.find().unwrap().path, variable);
        search.variable = None;
        assert_eq!(search.find().unwrap().path, active);
        search.virtual_env = Some(scratch.0.join("without onnxruntime"));
        assert_eq!(search.find().unwrap().path, local);
        search.start = None;
        assert_eq!(search.find().unwrap().origin, "the system");
    }

    #[test]
    fn python_is_asked_before_a_local_environment() {
        let scratch = Scratch::new("python");
        let local = scratch.package(".venv/lib/python3.12/site-packages");
        let mut search = Search { start: Some(scratch.0.clone()), python: Some(|| None), ..Search::default() };
        assert_eq!(search.find().unwrap().path, local);
        let asked = scratch.package("python");
        std::thread_local!(static PACKAGE: std::cell::RefCell<PathBuf> = const { std::cell::RefCell::new(PathBuf::new()) });
        PACKAGE.set(asked.parent().unwrap().parent().unwrap().to_owned());
        search.python = Some(|| Some(PACKAGE.with_borrow(PathBuf::clone)));
        assert_eq!(search.find().unwrap().path, asked);
    }

    #[test]
    fn what_is_named_must_exist() {
        let scratch = Scratch::new("named");
        let library = scratch.package("x");
        let capi = library.parent().unwrap().to_owned();
        let find = |flag: PathBuf| Search { flag: Some(flag), ..Search::default() }.find();
        assert_eq!(find(capi).unwrap().path, library);
        assert!(find(scratch.0.join("absent.so")).is_err());
        assert!(format!("{:#}", find(scratch.0.clone()).unwrap_err()).contains("holds no ONNX Runtime library"));
        let variable = Search { variable: Some("/absent.so".into()), ..Search::default() };
        assert!(variable.find().is_err());
    }
}

//! Environments of Python, packages for Node, and packages of which only the files are wanted: made once and used by many
//! commands.
//!
//! Each is a folder of the workspace (ignored by git) and the requirements file that it was made from. A copy of that
//! file, written last, marks the folder as complete: as long as the two are equal, nothing is installed again.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The oldest minor version of Python 3 that environments are made with.
const OLDEST: u32 = 9;

/// A virtual environment of the workspace, and what is in it.
pub struct Environment {
    place: Place,
    /// The newest minor version of Python 3 that its packages exist for.
    newest: Option<u32>,
}

/// Packages for Node; their requirements are a `package.json`.
pub struct NodePackages {
    place: Place,
}

/// Packages whose files are read and whose code is never run: models, pictures. Their requirements have hashes.
pub struct Files {
    place: Place,
}

/// A folder and what it is made from, both relative to the workspace's root.
struct Place {
    folder: &'static str,
    requirements: &'static str,
}

/// The interpreter of an environment that is ready.
pub struct Python {
    program: PathBuf,
}

impl Environment {
    /// Names an environment; [`Environment::prepare`] makes it.
    pub const fn new(folder: &'static str, requirements: &'static str) -> Self {
        Self { place: Place { folder, requirements }, newest: None }
    }

    /// The same for packages that exist for Python 3 up to that minor version.
    pub const fn up_to(self, newest: u32) -> Self {
        Self { newest: Some(newest), ..self }
    }

    /// Its folder, relative to the workspace's root.
    pub fn folder(&self) -> &'static str {
        self.place.folder
    }

    /// Makes the environment unless it is there and up to date.
    pub fn prepare(&self, root: &Path, offline: bool) -> Result<Python, String> {
        let program = if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" };
        let python = Python { program: root.join(self.place.folder).join(program) };
        self.place.prepare(root, offline, &python.program, |folder, requirements| {
            create(folder, &interpreter(self.newest)?)?;
            install(&python, requirements, &[])
        })?;
        Ok(python)
    }
}

impl NodePackages {
    /// Names packages; [`NodePackages::prepare`] fetches them.
    pub const fn new(folder: &'static str, requirements: &'static str) -> Self {
        Self { place: Place { folder, requirements } }
    }

    /// Fetches the packages by npm unless they are there and up to date; gives the folder that has one for each.
    pub fn prepare(&self, root: &Path, offline: bool) -> Result<PathBuf, String> {
        let packages = root.join(self.place.folder).join("node_modules");
        self.place.prepare(root, offline, &packages, |folder, requirements| {
            let npm = if cfg!(windows) { "npm.cmd" } else { "npm" };
            // Before anything is made: without Node there is nothing to be left behind.
            run(Command::new(npm).arg("--version"))?;
            fs::create_dir_all(folder).map_err(|error| at(folder, error))?;
            fs::copy(requirements, folder.join("package.json")).map_err(|error| at(requirements, error))?;
            run(Command::new(npm)
                .args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"])
                .current_dir(folder))
            .map(drop)
        })?;
        Ok(packages)
    }
}

impl Files {
    /// Names packages; [`Files::prepare`] fetches them.
    pub const fn new(folder: &'static str, requirements: &'static str) -> Self {
        Self { place: Place { folder, requirements } }
    }

    /// Fetches the packages, by an environment's pip, unless they are there and up to date; gives the folder that they
    /// are unpacked in.
    pub fn prepare(&self, root: &Path, offline: bool, python: &Python) -> Result<PathBuf, String> {
        let folder = root.join(self.place.folder);
        self.place.prepare(root, offline, &folder, |folder, requirements| {
            let target = folder.display().to_string();
            install(python, requirements, &["--require-hashes", "--no-deps", "--no-compile", "--target", &target])
        })?;
        Ok(folder)
    }
}

impl Place {
    /// Has the folder made unless it is up to date and `proof` exists. Two processes may try at once: one waits.
    fn prepare(
        &self,
        root: &Path,
        offline: bool,
        proof: &Path,
        make: impl FnOnce(&Path, &Path) -> Result<(), String>,
    ) -> Result<(), String> {
        let folder = root.join(self.folder);
        let source = root.join(self.requirements);
        let wanted = fs::read(&source).map_err(|error| at(&source, error))?;
        let stamp = folder.join("requirements.txt");
        let ready = || proof.exists() && fs::read(&stamp).is_ok_and(|made| made == wanted);
        if ready() {
            return Ok(());
        }

        let lock = root.join(format!("{}.lock", self.folder));
        if let Some(parent) = lock.parent() {
            fs::create_dir_all(parent).map_err(|error| at(parent, error))?;
        }
        let held = File::create(&lock).map_err(|error| at(&lock, error))?;
        held.lock().map_err(|error| at(&lock, error))?;
        if ready() {
            return Ok(());
        }
        if offline {
            return Err(format!("{} is missing or out of date: run the command once without --offline", self.folder));
        }
        eprintln!("xtask: making {} from {}", self.folder, self.requirements);
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|error| at(&folder, error))?;
        }
        make(&folder, &source)?;
        fs::write(&stamp, &wanted).map_err(|error| at(&stamp, error))
    }
}

impl Python {
    /// The interpreter's path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The shared library of the environment's onnxruntime package.
    pub fn runtime_library(&self) -> Result<PathBuf, String> {
        let script = "import importlib.util as i; print(i.find_spec('onnxruntime').submodule_search_locations[0])";
        let output = run(Command::new(&self.program).args(["-c", script]))?;
        let capi = Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("capi");
        let entries = fs::read_dir(&capi).map_err(|error| at(&capi, error))?;
        entries
            .flatten()
            .find(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().starts_with("libonnxruntime.") || name == "onnxruntime.dll"
            })
            .map(|entry| entry.path())
            .ok_or_else(|| format!("{} holds no onnxruntime library", capi.display()))
    }
}

/// The interpreter that environments are made with: the one that PYTHON names or else python3; where that is too new, an
/// older one beside it.
fn interpreter(newest: Option<u32>) -> Result<OsString, String> {
    let base = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let Some(newest) = newest else { return Ok(base) };
    let fits = |program: &OsString| {
        let minor = run(Command::new(program).args(["-c", "import sys; print(sys.version_info[1])"])).ok()?;
        let minor: u32 = String::from_utf8(minor.stdout).ok()?.trim().parse().ok()?;
        Some((OLDEST..=newest).contains(&minor))
    };
    let beside = (OLDEST..=newest).rev().map(|minor| format!("python3.{minor}").into());
    let mut candidates = std::iter::once(base).chain(beside);
    candidates.find(|program| fits(program) == Some(true)).ok_or_else(|| {
        format!("there is no Python 3.{OLDEST} to 3.{newest}, which its packages need; PYTHON names an interpreter")
    })
}

/// An empty virtual environment in `folder`.
fn create(folder: &Path, base: &OsStr) -> Result<(), String> {
    let named = Path::new(base).display();
    run(Command::new(base).args(["-m", "venv"]).arg(folder)).map(drop).map_err(|error| {
        // A half-made environment must not be taken for a broken one next time.
        let _ = fs::remove_dir_all(folder);
        format!(
            "{error}\n`{named} -m venv` failed. Python 3.9 or newer with the modules venv and pip is needed (Debian and \
             Ubuntu: apt-get install python3-venv); PYTHON names another interpreter."
        )
    })
}

/// The packages of `requirements`, as wheels: nothing is compiled.
fn install(python: &Python, requirements: &Path, options: &[&str]) -> Result<(), String> {
    run(Command::new(&python.program)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"])
        .args(options)
        .arg("-r")
        .arg(requirements))
    .map(drop)
    .map_err(|error| {
        format!(
            "{error}\ncannot install {}. If no version matches, the package has no wheel for this Python or system: name \
             another interpreter in PYTHON.",
            requirements.display()
        )
    })
}

/// Runs to the end; an error carries everything that the program printed.
fn run(command: &mut Command) -> Result<Output, String> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&said).trim_end()))
}

/// An I/O error with the file it is about.
fn at(path: &Path, error: io::Error) -> String {
    format!("{}: {error}", path.display())
}

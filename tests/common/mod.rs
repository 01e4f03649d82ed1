//! What the integration tests share: runtimes, files, and how results are compared.

// Every test file is a crate of its own and uses its part of this.
#![allow(dead_code)]

pub mod expansion;
pub mod ops;
pub mod ort_training;
pub mod pruning;
pub mod vectors;

use std::path::{Path, PathBuf};

use ndarray::ArrayD;
use serde_json::Value as Json;
use tempfile::TempDir;
use vitrim::feeds::{self, FeedArgs};
use vitrim::runtime::{self, Backend, Feeds, OpsLibrary, Outputs, RuntimeArgs, RuntimeKind, Session};
use vitrim::tensor::compare::Comparison;
use vitrim::tensor::npz::read_npz;
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::Model;
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, Options, Report};
use vitrim_passes::recipe::{MergeSpec, PassSpec, RSpec, Recipe};

/// ONNX Runtime on one thread: tests run beside each other.
pub fn ort() -> Box<dyn Backend> {
    let args = RuntimeArgs { runtime: RuntimeKind::Ort, threads: Some(1), ..RuntimeArgs::default() };
    args.backend().expect("ONNX Runtime is needed: `cargo xtask test` installs it and runs the tests")
}

/// The same with native kernels of our operators.
pub fn kernels() -> Box<dyn Backend> {
    let library = vitrim::ops::library().expect("the kernels are needed: `cargo xtask test` builds them");
    let ops = OpsLibrary::At(library);
    let args = RuntimeArgs { runtime: RuntimeKind::Ort, threads: Some(1), ops, ..RuntimeArgs::default() };
    args.backend().expect("ONNX Runtime is needed: `cargo xtask test` installs it and runs the tests")
}

/// The embedded runtime.
pub fn tract() -> Box<dyn Backend> {
    RuntimeArgs::default().backend().expect("tract is compiled in")
}

/// Every runtime that results must agree in.
pub fn runtimes() -> [Box<dyn Backend>; 3] {
    [tract(), ort(), kernels()]
}

/// Loads a model and runs it once.
pub fn run(backend: &dyn Backend, model: &Path, feeds: &Feeds) -> Outputs {
    try_run(backend, model, feeds).unwrap_or_else(|reason| panic!("{reason}"))
}

/// Loads a model and runs it once, or says why it cannot.
pub fn try_run(backend: &dyn Backend, model: &Path, feeds: &Feeds) -> Result<Outputs, String> {
    let run = || runtime::load(backend, model)?.run(feeds);
    run().map_err(|error| format!("{} runs {}: {error:#}", backend.name(), model.display()))
}

/// Loads a model.
pub fn load(backend: &dyn Backend, model: &Path) -> Box<dyn Session> {
    runtime::load(backend, model).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A folder for the files of one test, removed afterwards.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(test: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the target folder can be written");
        Scratch(path)
    }

    /// Writes a model that was read from `source`.
    pub fn save_as(&self, name: &str, model: &Model, source: &Path) -> PathBuf {
        let path = self.0.join(format!("{name}.onnx"));
        let verified = model.verify().unwrap_or_else(|violations| panic!("{name}: {violations}"));
        Model::write(verified, &path, source).unwrap_or_else(|error| panic!("{name}: {error}"));
        path
    }

    /// Writes a model that was built from scratch.
    pub fn save(&self, name: &str, model: &Model) -> PathBuf {
        self.save_as(name, model, &self.0.join("no source.onnx"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed lies in the target folder, where it does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A folder in which a test runs the program, removed afterwards.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.at(name), bytes).expect("the folder can be written");
        self.at(name)
    }
}

/// The fixtures of the repository.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The index of the vectors.
pub fn vector_index() -> Json {
    let path = fixtures().join("vectors/index.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("the index is JSON")
}

/// The arrays of a vector file.
pub fn vector(file: &str) -> NamedTensors {
    read_npz(&fixtures().join("vectors").join(file)).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A model of the zoo.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub model: PathBuf,
    /// What it is, from its `.json`.
    pub facts: Json,
}

/// The models of `fixtures/zoo` and of the folder that VITRIM_ZOO names.
pub fn zoo() -> Vec<Entry> {
    let folders = [Some(fixtures().join("zoo")), std::env::var_os("VITRIM_ZOO").map(PathBuf::from)];
    let mut entries: Vec<Entry> = Vec::new();
    for folder in folders.into_iter().flatten() {
        let files = folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut models: Vec<PathBuf> = files.map(|file| file.expect("the folder can be listed").path()).collect();
        models.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
        models.sort();
        for model in models {
            let name = model.file_stem().and_then(|stem| stem.to_str()).expect("zoo names are text").to_owned();
            if entries.iter().any(|entry| entry.name == name) {
                continue;
            }
            let facts = std::fs::read_to_string(model.with_extension("json")).expect("every model has its facts");
            entries.push(Entry { name, model, facts: serde_json::from_str(&facts).expect("facts are JSON") });
        }
    }
    entries
}

impl Entry {
    /// Reads the model.
    pub fn read(&self) -> Model {
        Model::read(&self.model).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The feeds that were recorded for the model.
    pub fn feeds(&self, session: &dyn Session) -> Vec<Feeds> {
        let args = FeedArgs { input: Some(self.model.with_extension("npz")), ..FeedArgs::default() };
        let source = feeds::open(&args, None, session.inputs(), session.outputs());
        let source = source.unwrap_or_else(|error| panic!("{}: {error:#}", self.name));
        source.batches.map(|batch| batch.unwrap_or_else(|error| panic!("{}: {error:#}", self.name)).feeds).collect()
    }

    /// Whether activations have less than single precision somewhere inside: what is then "equal" is coarser.
    pub fn is_coarse(&self, model: &Model) -> bool {
        use vitrim_ir::DataType::{BF16, F16, I8, U8};
        let graph = model.graph();
        let coarse = |value| graph.constant(value).is_some_and(|tensor| matches!(tensor.dtype(), F16 | BF16 | I8 | U8));
        graph.nodes().any(|(_, node)| node.operands().any(coarse))
    }
}

/// A float32 tensor of a model as it is fed.
pub fn fed(tensor: &vitrim_ir::Tensor) -> Tensor {
    let dims: Vec<usize> = tensor.dims().iter().map(|&extent| extent as usize).collect();
    let elements = tensor.to_f64s().expect("floats").into_owned();
    Tensor::from_f64(DType::F32, &ArrayD::from_shape_vec(dims, elements).expect("as many as its extents say"))
}

/// The part of each feed that holds images `from..to`.
pub fn images(feeds: &Feeds, from: usize, to: usize) -> Feeds {
    feeds.iter().map(|(name, tensor)| (name.to_owned(), tensor.rows(from, to).expect("so many images"))).collect()
}

/// A recipe of one merge.
pub fn recipe(spec: MergeSpec) -> Recipe {
    Recipe { passes: vec![PassSpec::Merge(spec)] }
}

/// Merges `r` tokens in every block, with all defaults.
pub fn constant(r: usize) -> MergeSpec {
    MergeSpec { r: Some(RSpec::Constant(r)), ..MergeSpec::default() }
}

/// Rewrites a model as `vitrim merge` does.
pub fn merge(model: &Model, spec: MergeSpec) -> Result<(Model, Report), Refusal> {
    driver::rewrite(model, &recipe(spec), Options::default())
}

/// Rewrites a model with one pass.
pub fn rewrite(model: &Model, pass: PassSpec) -> Result<(Model, Report), Refusal> {
    driver::rewrite(model, &Recipe { passes: vec![pass] }, Options::default())
}

/// The same, but computes tokens that nothing reads.
pub fn merge_all(model: &Model, spec: MergeSpec) -> Result<(Model, Report), Refusal> {
    driver::rewrite(model, &recipe(spec), Options { keep_dead: true, ..Options::default() })
}

/// Leaves out what is computed for tokens that nothing reads, and does nothing else.
pub fn without_dead_tokens(model: &Model) -> Result<(Model, Report), Refusal> {
    driver::rewrite(model, &Recipe::default(), Options::default())
}

/// max |candidate − reference|, infinite where shapes differ or anything is not a number.
pub fn distance(reference: &Tensor, candidate: &Tensor) -> f64 {
    finite(reference, candidate).map_or(f64::INFINITY, |comparison| comparison.max_abs)
}

/// max |candidate − reference| / max |reference|, likewise.
pub fn relative(reference: &Tensor, candidate: &Tensor) -> f64 {
    finite(reference, candidate).map_or(f64::INFINITY, |comparison| comparison.relative())
}

fn finite(reference: &Tensor, candidate: &Tensor) -> Option<Comparison> {
    Comparison::of(reference, candidate).ok().filter(|comparison| comparison.non_finite == 0)
}

/// The elements of an integer tensor, whatever its width.
pub fn integers(tensor: &Tensor) -> ArrayD<i64> {
    assert!(!tensor.dtype().is_float(), "indices are integers");
    tensor.to_f64().mapv(|x| x as i64)
}

/// Fails with every line of `failures`, if there are any; prints how many cases there were.
pub fn conclude(what: &str, cases: usize, failures: &[String]) {
    println!("{what}: {cases} cases, {} failed", failures.len());
    assert!(cases > 0, "{what}: there was nothing to test");
    assert!(failures.is_empty(), "{what}: {} of {cases}\n{}", failures.len(), failures.join("\n"));
}

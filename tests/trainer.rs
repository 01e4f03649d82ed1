//! The example client, examples/trainer.py, with what `vitrim train` writes; checked in tests/python/trainer.py.

mod common;

use std::process::Command;

use common::Folder;
use common::ort_training::{output, script};

/// A graph that is told how much to keep trains as one that was made so, and the examples of each epoch are those of
/// fixtures/oracle.
#[test]
fn the_example_client_turns_dials_and_selects_examples() {
    let python = std::env::var_os("VITRIM_PYTHON").expect("`cargo xtask test` says which Python has numpy");
    let folder = Folder::new();
    let root = env!("CARGO_MANIFEST_DIR");
    let model = format!("{root}/fixtures/zoo/timm_vit_ts17_unfused");
    for (name, keep, more) in [("dial", ["0.7", "0.5"], &["--runtime-keep"][..]), ("fixed", ["0.5", "0.3"], &[])] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vitrim"));
        command.args(["train", &format!("{model}.onnx")]).arg(folder.at(name)).args(["--keep", keep[0], "--at", "1"]);
        output(command.args(["--attention-keep", keep[1], "--accumulate"]).args(more));
    }
    let data = format!("{model}.npz");
    let (dial, fixed) = (folder.at("dial"), folder.at("fixed"));
    output(Command::new(python).arg(script("python/trainer.py")).args([root, &data]).args([dial, fixed]));
}

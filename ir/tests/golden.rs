//! The text form of models in `fixtures/zoo`, against `tests/golden`. `VITRIM_BLESS=1` writes it anew.

use std::fs;
use std::path::Path;

use vitrim_ir::{Model, inline_functions, print_graph};

fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    if std::env::var_os("VITRIM_BLESS").is_some() {
        fs::write(&path, text).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    let difference = golden.lines().zip(text.lines()).position(|(old, new)| old != new);
    let line = difference.unwrap_or_else(|| golden.lines().count().min(text.lines().count()));
    assert!(
        golden == text,
        "{} differs from line {} on, where the text is now\n{}\nRun with VITRIM_BLESS=1 if that is right.",
        path.display(),
        line + 1,
        text.lines().nth(line).unwrap_or("(at its end)")
    );
}

fn model(name: &str) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/zoo").join(format!("{name}.onnx"));
    Model::read(&path).unwrap()
}

#[test]
fn a_plain_export() {
    check("timm_vit_ts17_unfused", &print_graph(model("timm_vit_ts17_unfused").graph()));
}

#[test]
fn functions_inlined() {
    let mut model = model("flax_nnx_vit_functions_op18");
    check("flax_nnx_vit_functions_op18", &print_graph(model.graph()));
    inline_functions(&mut model, |_| true).unwrap();
    check("flax_nnx_vit_functions_op18.inlined", &print_graph(model.graph()));
}

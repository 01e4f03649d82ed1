//! Keeps the library in memory once it is loaded: ONNX Runtime unloads it with every session that registered it, and
//! what it shares between sessions would be made again for each, and lost.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}

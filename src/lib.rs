//! Token reduction for Vision Transformers, as compiler passes on ONNX graphs.

pub mod bench;
pub mod cli;
pub mod feeds;
pub mod inspect;
pub mod rewrite;
pub mod runtime;
pub mod tensor;
pub mod verify;

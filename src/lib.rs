//! Token reduction for Vision Transformers, as compiler passes on ONNX graphs.
//!
//! This crate is the command line: runtimes, comparison and measurement around the passes of `vitrim_passes`.
#![doc = include_str!("../README.md")]

pub mod bench;
pub mod cli;
pub mod export_weights;
pub mod feeds;
pub mod inspect;
pub mod ops;
pub mod rewrite;
pub mod runtime;
pub mod tensor;
pub mod train;
pub mod verify;

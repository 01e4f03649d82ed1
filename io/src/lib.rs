//! Files for models that are too large to be copied through memory.
//!
//! - [`MappedFile`] reads: the file's bytes without a copy, for as long as anything refers to them.
//! - [`AtomicFile`] writes: a stream of any length that appears under its name at once, complete, or not at all.
//! - [`resolve_external`] finds the files that a model refers to, and refuses those outside the model's folder.
//! - [`place_beside`] takes such a file along unchanged, by link where that is possible.
//!
//! Reading and writing fit together: a model decoded from a [`MappedFile`] refers to its weights by [`bytes::Bytes`],
//! and encoding it into an [`AtomicFile`] hands those to the kernel. Rewriting a model costs what copying it costs, and
//! no memory.
//!
//! This crate and the kernels of the operators are the only ones with unsafe code; here it is the mapping of a file and
//! the implementation of [`bytes::BufMut`].

#![deny(missing_docs)]

mod atomic;
mod external;
mod map;
mod place;

pub use atomic::AtomicFile;
pub use external::{ConfinementError, resolve_external};
pub use map::MappedFile;
pub use place::place_beside;

use std::{io, path::Path};

/// Puts the path in front of an error's message; the kind stays.
fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The error for a path that exists but holds no bytes to read or replace.
fn not_a_regular_file(path: &Path, file_type: std::fs::FileType) -> io::Error {
    let what = if file_type.is_dir() { "is a folder" } else { "is not a regular file" };
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", path.display()))
}

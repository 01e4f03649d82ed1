//! `TokenSize`: the sizes before any merge, all one.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[B, N, ..]` | any | tokens; only the extents matter |
//! | out `size` | `[B, N, 1]` | float32 | ones |

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

#[cfg(feature = "bodies")]
pub use body::TokenSize;

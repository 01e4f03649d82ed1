//! `Gelu` and `TanhGelu`: the Gaussian error linear unit, for models of versions of the standard operator set before 20,
//! which do not have it.
//!
//! Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016 (arXiv 1606.08415), section 2.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | any | float32 | |
//! | out `y` | as `x` | float32 | x · Φ(x) |
//!
//! Φ is the cumulative distribution function of the standard normal distribution: ½ (1 + erf(x / √2)) in `Gelu`, and in
//! `TanhGelu` the approximation ½ (1 + tanh(√(2/π) (x + 0.044715 x³))). The bodies are forms that runtimes fuse; there are
//! no kernels.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub(crate) use body::{CUBIC, ROOT_2_OVER_PI, tanh};
#[cfg(feature = "bodies")]
pub use body::{Gelu, TanhGelu};

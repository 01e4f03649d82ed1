//! `LayerNormGrad`: how the gradient passes a layer normalisation.
//!
//! Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv 1607.06450), section 3; of ONNX's `LayerNormalization`.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | `[…, axes…]` | float32 | what was normalised, over the axes from `axis` on |
//! | in `scale` | `[axes…]` | float32 | γ |
//! | in `dy` | as `x` | float32 | the gradient of the result |
//! | out `dx` | as `x` | float32 | (g − mean g − x̂ · mean(g · x̂)) / σ, with g = γ · dy |
//! | out `dscale` | as `scale` | float32 | Σ dy · x̂, over all rows |
//! | out `dbias` | as `scale` | float32 | Σ dy, over all rows |
//!
//! with x̂ = (x − mean x) / σ, σ = √(variance x + `epsilon`). Mean and variance are computed again: that takes one pass over
//! `x`, and x̂ would take its memory from the forward pass to the backward one.
//!
//! Attributes: `axis` (int; negative counts from the end), `epsilon` (float).

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::LayerNormGrad;

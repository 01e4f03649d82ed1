//! `GeluGrad` and `TanhGeluGrad`: how the gradient passes the Gaussian error linear unit, exact and
//! [approximated](crate::gelu).
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `x` | any | float32 | what the unit was applied to |
//! | in `dy` | as `x` | float32 | the gradient of its result |
//! | out `dx` | as `x` | float32 | dy · (Φ(x) + x · Φ′(x)) |
//!
//! With Φ(x) = ½ (1 + erf(x / √2)), Φ′ is the density of the standard normal distribution. With Φ(x) = ½ (1 + tanh u),
//! u = √(2/π) (x + 0.044715 x³), Φ′(x) = ½ (1 − tanh² u) · √(2/π) (1 + 0.134145 x²).

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;

#[cfg(feature = "bodies")]
pub use body::{GeluGrad, TanhGeluGrad};

//! `SoftmaxGrad`: how the gradient passes a softmax along the last axis.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `y` | `[…, K]` | float32 | what the softmax gave |
//! | in `dy` | as `y` | float32 | the gradient of that |
//! | out `dx` | as `y` | float32 | y · (dy − Σ dy · y), the sum over the last axis |

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "gradients")]
pub(crate) mod gradient;

#[cfg(feature = "bodies")]
pub use body::SoftmaxGrad;

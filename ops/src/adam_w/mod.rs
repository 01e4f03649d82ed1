//! `AdamW`: one step of Adam with decoupled weight decay.
//!
//! Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv 1711.05101), algorithm 2.
//!
//! | | shape | type | |
//! |---|---|---|---|
//! | in `parameter` | any | float32 | θ |
//! | in `gradient` | as `parameter` | float32 | g |
//! | in `mean` | as `parameter` | float32 | m, the first moment |
//! | in `variance` | as `parameter` | float32 | v, the second moment |
//! | in `kept` | scalar | float32 | what decay leaves of θ: 1 − learning rate · decay |
//! | in `rate` | scalar | float32 | learning rate / (1 − β₁ᵗ) |
//! | in `deviation` | scalar | float32 | √(1 − β₂ᵗ) |
//! | out `parameter_out`, `mean_out`, `variance_out` | as `parameter` | float32 | after the step |
//!
//! m ← m + `mean_rate` · (g − m); v ← v + `variance_rate` · (g² − v); θ ← `kept` · θ − `rate` · m / (√v / `deviation` +
//! `epsilon`). The attributes are 1 − β₁ and 1 − β₂: a β₂ of 0.999 in float32 would leave 5e-5 of 0.001 in error. What
//! depends on the step alone comes as scalars, computed once for all parameters.

#[cfg(feature = "bodies")]
mod body;
#[cfg(feature = "cpu")]
pub mod cpu;

#[cfg(feature = "bodies")]
pub use body::AdamW;

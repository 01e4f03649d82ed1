//! What the CPU kernels share: element types, threads, products.
//!
//! A kernel is a function of extents, slices, and a [`Pool`]. It checks all of them and returns an [`Error`] where they
//! do not fit; it does not panic. What memory it needs beside its outputs, the caller gives, as much as `scratch_len`
//! says: kernels allocate no more than a few words for each row.

mod product;
mod rank;
mod rows;
mod share;
mod simd;
mod softmax;
#[cfg(test)]
pub(crate) mod testing;

use std::borrow::Cow;
use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::Heads;

pub(crate) use self::product::{Panels, Rows, Sink, product};
pub(crate) use self::rank::Rank;
pub(crate) use self::rows::{mean, sum};
pub(crate) use self::share::{Window, each};
pub(crate) use self::simd::{Isa, Kernel, MAX_LANES, MAX_PANEL, Simd, exp2, fold};
pub(crate) use self::softmax::{Softmax, SoftmaxLayout};

/// A type that tokens are stored in. All arithmetic is in float32.
pub trait Element: Copy + Send + Sync + 'static {
    /// As float32, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even.
    fn from_f32(value: f32) -> Self;

    /// A row as float32: the row itself, or converted in `room`, which has as many entries.
    fn wide<'a>(row: &'a [Self], room: &'a mut [f32]) -> &'a [f32] {
        Self::widen(row, room);
        room
    }

    /// [`Self::to_f32`] of a row. Both have one length.
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }

    /// [`Self::from_f32`] of a row times a factor. Both have one length; what is left in `from` means nothing.
    fn narrow_scaled(from: &mut [f32], factor: f32, to: &mut [Self]) {
        from.iter_mut().for_each(|x| *x *= factor);
        Self::narrow(from, to);
    }

    /// [`Self::from_f32`] of a row. Both have one length.
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = Self::from_f32(from);
        }
    }
}

impl Element for f32 {
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn wide<'a>(row: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        row
    }
    #[inline(always)]
    fn narrow_scaled(from: &mut [f32], factor: f32, to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from * factor;
        }
    }
}

impl Element for f16 {
    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    // These use the instructions of the machine.
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    #[inline]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// Threads to compute on: those of the session that a kernel runs in.
pub trait Pool {
    /// Calls `task` with every number below `tasks`, in any order, possibly at once; returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// The calling thread alone.
pub struct Serial;

impl Pool for Serial {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

impl Heads {
    /// Refuses heads that are none, or not all within the tensor.
    pub(crate) fn check(&self, name: &str) -> Result<(), Error> {
        if self.fit() { Ok(()) } else { Err(Error::new(format!("{name} has no such heads: {self:?}"))) }
    }

    /// Head `head` of token `token`, counted over all images.
    pub(crate) fn of<'a, T>(&self, tensor: &'a [T], token: usize, head: usize) -> &'a [T] {
        &tensor[token * self.width + self.at + head * self.head_dim..][..self.head_dim]
    }
}

/// Why a kernel refuses to run: its arguments do not fit one another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error(Cow<'static, str>);

impl Error {
    pub(crate) fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Refuses a tensor `name` of `len` entries where `extents` ask for another number.
pub(crate) fn check_len(name: &str, len: usize, extents: &[usize]) -> Result<(), Error> {
    if product_of(extents) != Some(len) {
        return Err(Error::new(format!("{name} has {len} entries; its extents are {extents:?}")));
    }
    Ok(())
}

/// Refuses scratch memory that is shorter than `needed`.
pub(crate) fn check_scratch(len: usize, needed: usize) -> Result<(), Error> {
    if len < needed {
        return Err(Error::new(format!("{len} numbers of scratch memory, {needed} are needed")));
    }
    Ok(())
}

/// The entry at `index` as a position below `end`.
pub(crate) fn position(name: &str, index: i64, end: usize) -> Result<usize, Error> {
    let position = usize::try_from(index).ok().filter(|&position| position < end);
    position.ok_or_else(|| Error::new(format!("{name} has {index}, beyond 0..{end}")))
}

/// Writes positions.
pub(crate) fn fill(to: &mut [i64], positions: impl Iterator<Item = usize>) {
    to.iter_mut().zip(positions).for_each(|(to, position)| *to = position as i64);
}

/// The product of extents; none where it is beyond what can be addressed. Zero where any of them is.
fn product_of(extents: &[usize]) -> Option<usize> {
    if extents.contains(&0) {
        return Some(0);
    }
    extents.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
}

/// Takes the first `len` entries off a slice.
pub(crate) fn take<'a>(slice: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    slice.split_off_mut(..len).expect("scratch memory of the length that was checked")
}

/// Takes numbers off a slice up to where vectors begin: at most [`MAX_LANES`].
pub(crate) fn align(slice: &mut &mut [f32]) {
    let skipped = slice.as_ptr().align_offset(MAX_LANES * size_of::<f32>()).min(MAX_LANES);
    take(slice, skipped);
}

/// `len` and what fills the widest panel: parts of memory of such lengths begin where vectors do, if the first does.
pub(crate) fn pad(len: usize) -> usize {
    len.div_ceil(MAX_PANEL).saturating_mul(MAX_PANEL)
}

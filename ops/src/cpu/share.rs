//! Work in parts that write to disjoint places.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

use super::Pool;

/// Calls `work` with every part, on the threads of `pool`.
pub(crate) fn each<P: Send>(pool: &dyn Pool, parts: impl IntoIterator<Item = P>, work: impl Fn(P) + Sync) {
    let parts: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    pool.run(parts.len(), &|i| {
        let part = parts[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        part.into_iter().for_each(&work);
    });
}

/// A rectangle of a matrix: some columns of some rows.
pub(crate) struct Window<'a, T> {
    first: *mut T,
    stride: usize,
    rows: usize,
    columns: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: a window is the only way to its entries, as a mutable slice is.
unsafe impl<T: Send> Send for Window<'_, T> {}

impl<'a, T> Window<'a, T> {
    /// All of a matrix with `columns` columns.
    pub(crate) fn new(matrix: &'a mut [T], columns: usize) -> Self {
        let rows = matrix.len().checked_div(columns).unwrap_or(0);
        Self { first: matrix.as_mut_ptr(), stride: columns, rows, columns, of: PhantomData }
    }

    /// The first `rows` rows, and the others.
    pub(crate) fn split_rows(self, rows: usize) -> (Self, Self) {
        assert!(rows <= self.rows);
        // Within the matrix, or one past its end; wrapping, as the columns of a window may end before the matrix does.
        let first = self.first.wrapping_add(rows * self.stride);
        (Self { rows, ..self }, Self { first, rows: self.rows - rows, ..self })
    }

    /// The first `columns` columns, and the others.
    pub(crate) fn split_columns(self, columns: usize) -> (Self, Self) {
        assert!(columns <= self.columns);
        let first = self.first.wrapping_add(columns);
        (Self { columns, ..self }, Self { first, columns: self.columns - columns, ..self })
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Row `i`.
    pub(crate) fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: `columns` entries of row i are within the matrix that is borrowed for 'a, as every window is within
        // the one that it was split from; no other window has them, as splitting consumes; and `&mut self` keeps this
        // one from handing them out twice.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(i * self.stride), self.columns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::Threads;

    #[test]
    fn windows_part_a_matrix() {
        let mut matrix = [0; 7 * 5];
        let (left, right) = Window::new(&mut matrix, 5).split_columns(2);
        let (top, bottom) = right.split_rows(3);
        let (nothing, bottom) = bottom.split_rows(0);
        each(&Threads(3), [(left, 1), (top, 2), (bottom, 3), (nothing, 4)], |(mut window, number)| {
            for row in 0..window.rows() {
                window.row(row).fill(number);
            }
        });
        for (i, number) in matrix.into_iter().enumerate() {
            assert_eq!(
                number,
                if i % 5 < 2 {
                    1
                } else if i / 5 < 3 {
                    2
                } else {
                    3
                }
            );
        }
    }
}

//! How far a candidate's values are from a reference's.

use std::fmt;

use ndarray::ArrayView1;

use super::Tensor;

/// Two tensors that cannot be compared element by element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeMismatch {
    /// The reference's shape.
    pub reference: Vec<usize>,
    /// The candidate's shape.
    pub candidate: Vec<usize>,
}

impl fmt::Display for ShapeMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the reference has shape {:?}, the candidate {:?}", self.reference, self.candidate)
    }
}

/// The distance between a reference and a candidate, accumulated over any number of batches.
///
/// All figures are computed in double precision. Elements that are not finite on both sides are counted in
/// [`non_finite`](Self::non_finite) and left out of every other figure, unless they are the same infinity on both
/// sides, which is no difference at all.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Elements compared.
    pub elements: usize,
    /// Elements that are NaN on either side, or infinite and different.
    pub non_finite: usize,
    /// max |candidate − reference|.
    pub max_abs: f64,
    /// max |reference|.
    pub max_reference: f64,
    /// The smallest cosine between corresponding rows; a row is one entry of the first axis, or the whole tensor below
    /// rank 2. Two zero rows have cosine 1, a zero and a non-zero row 0.
    pub min_cosine: f64,
    /// Rows compared.
    pub rows: usize,
    /// How often both sides have their largest value in the same column, for class scores: rank 2, floating point,
    /// at least two columns. Ties go to the lower column; a row with a NaN agrees with nothing.
    pub top1: Option<Ratio>,
}

/// A count of hits among trials.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ratio {
    /// Hits.
    pub hits: usize,
    /// Trials.
    pub of: usize,
}

impl Ratio {
    /// Counts one trial.
    pub fn add(&mut self, hit: bool) {
        self.hits += usize::from(hit);
        self.of += 1;
    }

    /// Hits per trial, in percent; of no trials, 0.
    pub fn percent(self) -> f64 {
        if self.of == 0 { 0.0 } else { 100.0 * self.hits as f64 / self.of as f64 }
    }
}

impl Default for Comparison {
    fn default() -> Self {
        Comparison {
            elements: 0,
            non_finite: 0,
            max_abs: 0.0,
            max_reference: 0.0,
            min_cosine: 1.0,
            rows: 0,
            top1: None,
        }
    }
}

impl Comparison {
    /// Compares one pair of tensors.
    pub fn of(reference: &Tensor, candidate: &Tensor) -> Result<Self, ShapeMismatch> {
        let mut comparison = Comparison::default();
        comparison.add(reference, candidate)?;
        Ok(comparison)
    }

    /// Takes in one more batch.
    pub fn add(&mut self, reference: &Tensor, candidate: &Tensor) -> Result<(), ShapeMismatch> {
        if reference.shape() != candidate.shape() {
            return Err(ShapeMismatch { reference: reference.shape().to_vec(), candidate: candidate.shape().to_vec() });
        }
        let scores = is_scores(reference) && is_scores(candidate);
        let rows = if reference.shape().len() < 2 { 1 } else { reference.shape()[0] };
        let columns = reference.len().checked_div(rows).unwrap_or(0);
        let (reference, candidate) = (reference.to_f64().into_flat(), candidate.to_f64().into_flat());
        for row in 0..rows {
            let range = ndarray::s![row * columns..(row + 1) * columns];
            let (a, b) = (reference.slice(range), candidate.slice(range));
            self.add_row(a, b);
            if scores {
                let agree = argmax(a).is_some_and(|column| argmax(b) == Some(column));
                self.top1.get_or_insert_default().add(agree);
            }
        }
        Ok(())
    }

    fn add_row(&mut self, reference: ArrayView1<f64>, candidate: ArrayView1<f64>) {
        let (mut dot, mut norm_a, mut norm_b) = (0.0, 0.0, 0.0);
        for (&a, &b) in reference.iter().zip(candidate) {
            if a.is_finite() && b.is_finite() {
                self.max_abs = self.max_abs.max((a - b).abs());
                self.max_reference = self.max_reference.max(a.abs());
                dot += a * b;
                norm_a += a * a;
                norm_b += b * b;
            } else if a != b {
                self.non_finite += 1;
            }
        }
        let cosine = match (norm_a > 0.0, norm_b > 0.0) {
            (true, true) => (dot / (norm_a.sqrt() * norm_b.sqrt())).clamp(-1.0, 1.0),
            (false, false) => 1.0,
            _ => 0.0,
        };
        self.min_cosine = self.min_cosine.min(cosine);
        self.rows += 1;
        self.elements += reference.len();
    }

    /// max |candidate − reference| / max |reference|; infinite where only the reference is zero.
    pub fn relative(&self) -> f64 {
        match (self.max_abs == 0.0, self.max_reference == 0.0) {
            (true, _) => 0.0,
            (false, true) => f64::INFINITY,
            (false, false) => self.max_abs / self.max_reference,
        }
    }
}

/// Whether a tensor looks like one row of class scores per image.
pub fn is_scores(tensor: &Tensor) -> bool {
    tensor.dtype().is_float() && matches!(tensor.shape(), [_, columns] if *columns > 1)
}

/// The column of each row's largest score, the lowest one among equals; `None` where a row holds a NaN.
pub fn top1(scores: &Tensor) -> Vec<Option<usize>> {
    scores.to_f64().rows().into_iter().map(argmax).collect()
}

fn argmax(row: ArrayView1<f64>) -> Option<usize> {
    let mut best = None;
    for (column, &value) in row.iter().enumerate() {
        if value.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, largest)| value > largest) {
            best = Some((column, value));
        }
    }
    best.map(|(column, _)| column)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], data: &[f32]) -> Tensor {
        Tensor::from_vec(shape, data.to_vec()).unwrap()
    }

    #[test]
    fn equal_tensors_are_at_no_distance() {
        let a = tensor(&[2, 2], &[1.0, 2.0, 3.0, -4.0]);
        let c = Comparison::of(&a, &a).unwrap();
        assert_eq!((c.max_abs, c.relative(), c.non_finite, c.elements, c.rows), (0.0, 0.0, 0, 4, 2));
        assert!((c.min_cosine - 1.0).abs() < 1e-12);
        assert_eq!(c.top1, Some(Ratio { hits: 2, of: 2 }));
    }

    #[test]
    fn distances_are_relative_to_the_largest_reference() {
        let c = Comparison::of(&tensor(&[2], &[1.0, -10.0]), &tensor(&[2], &[1.5, -10.0])).unwrap();
        assert_eq!((c.max_abs, c.relative()), (0.5, 0.05));
        let zero = Comparison::of(&tensor(&[1], &[0.0]), &tensor(&[1], &[1.0])).unwrap();
        assert_eq!(zero.relative(), f64::INFINITY);
    }

    #[test]
    fn the_cosine_is_the_worst_row() {
        let c =
            Comparison::of(&tensor(&[2, 2], &[1.0, 0.0, 1.0, 0.0]), &tensor(&[2, 2], &[5.0, 0.0, 0.0, 2.0])).unwrap();
        assert_eq!(c.min_cosine, 0.0);
        let zeros = Comparison::of(&tensor(&[1, 2], &[0.0; 2]), &tensor(&[1, 2], &[0.0; 2])).unwrap();
        assert_eq!(zeros.min_cosine, 1.0);
    }

    #[test]
    fn batches_add_up() {
        let mut c = Comparison::of(&tensor(&[1, 2], &[4.0, 1.0]), &tensor(&[1, 2], &[4.0, 2.0])).unwrap();
        c.add(&tensor(&[1, 2], &[1.0, 8.0]), &tensor(&[1, 2], &[1.0, 0.0])).unwrap();
        assert_eq!((c.max_abs, c.relative(), c.top1), (8.0, 1.0, Some(Ratio { hits: 1, of: 2 })));
    }

    #[test]
    fn what_is_not_finite_is_counted() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let c = Comparison::of(&tensor(&[5], &[nan, inf, inf, -inf, 1.0]), &tensor(&[5], &[nan, inf, -inf, 0.0, nan]));
        assert_eq!(c.unwrap().non_finite, 4);
        let scores = Comparison::of(&tensor(&[1, 2], &[nan, 1.0]), &tensor(&[1, 2], &[nan, 1.0])).unwrap();
        assert_eq!(scores.top1, Some(Ratio { hits: 0, of: 1 }));
    }

    #[test]
    fn types_may_differ_and_shapes_may_not() {
        let half = Tensor::from_f64(crate::tensor::DType::F16, &tensor(&[1, 2], &[1.0, 2.0]).to_f64());
        assert_eq!(Comparison::of(&tensor(&[1, 2], &[1.0, 2.0]), &half).unwrap().max_abs, 0.0);
        let mismatch = Comparison::of(&tensor(&[2, 1], &[1.0, 2.0]), &half).unwrap_err();
        assert_eq!(mismatch, ShapeMismatch { reference: vec![2, 1], candidate: vec![1, 2] });
    }

    #[test]
    fn ties_go_to_the_lowest_column() {
        assert_eq!(top1(&tensor(&[2, 3], &[1.0, 1.0, 0.0, 0.0, f32::NAN, 2.0])), [Some(0), None]);
    }

    #[test]
    fn empty_tensors_compare() {
        let c = Comparison::of(&tensor(&[0, 3], &[]), &tensor(&[0, 3], &[])).unwrap();
        assert_eq!((c.elements, c.rows, c.relative()), (0, 0, 0.0));
    }
}

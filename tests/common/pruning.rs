//! Pruning: models of it, and what it must give.

use ndarray::{ArrayD, Axis, IxDyn};
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::Tensor;
use vitrim_ir::{DataType, Model};

use super::integers;
use super::ops::{Calls, data_type};

/// One pruning: how it is called, and what is fed.
#[derive(Clone, Debug)]
pub struct Pruning {
    pub name: String,
    /// As it is asked for; the dynamic form takes any number.
    pub keep: i64,
    pub tokens: usize,
    pub protect: usize,
    pub suffix: usize,
    pub fuse: bool,
    /// `x` `[B, N, C]`, `score` `[B, N]`, and `size` `[B, N, 1]` unless all are one.
    pub feeds: Feeds,
}

/// What it must give.
pub struct Pruned {
    pub y: ArrayD<f64>,
    pub size: ArrayD<f64>,
    pub anchor: ArrayD<i64>,
    pub assign: ArrayD<i64>,
}

impl Pruning {
    /// How many candidates there are.
    pub fn candidates(&self) -> usize {
        self.tokens - self.protect - self.suffix
    }

    /// How many of them are kept.
    pub fn kept(&self) -> usize {
        usize::try_from(self.keep).unwrap_or(0).min(self.candidates())
    }

    pub fn model(&self, opset: i64, dynamic: bool) -> Model {
        use DataType::{F32, I64};
        let mut calls = Calls::new(opset);
        let dtype = data_type(self.feeds.get("x").expect("it is fed"));
        let x = calls.input("x", dtype, 3);
        let score = calls.input("score", F32, 2);
        let size = match self.feeds.get("size") {
            Some(_) => calls.input("size", F32, 3),
            None => calls.op("TokenSize", "size", &[x], &[], 1)[0],
        };
        let common = [
            ("protect", self.protect as i64),
            ("suffix", self.suffix as i64),
            ("fuse", self.fuse.into()),
            ("dtype", dtype.code().into()),
        ];
        let pruned = if dynamic {
            let keep = calls.graph.tensor("keep", vitrim_ir::Tensor::shape(&[self.keep]));
            calls.op("TokenPruneDynamic", "pruned", &[x, score, size, keep], &common, 4)
        } else {
            let attributes = [&[("keep", self.keep), ("tokens", self.tokens as i64)][..], &common].concat();
            calls.op("TokenPrune", "pruned", &[x, score, size], &attributes, 4)
        };
        calls.output("y", pruned[0], dtype, 3);
        calls.output("size_out", pruned[1], F32, 3);
        calls.output("anchor", pruned[2], I64, 2);
        calls.output("assign", pruned[3], I64, 2);
        calls.model()
    }

    /// The definition once more, as plain as can be and in float64.
    pub fn expected(&self) -> Pruned {
        let array = |name: &str| self.feeds.get(name).map(Tensor::to_f64);
        let (x, score) = (array("x").expect("it is fed"), array("score").expect("it is fed"));
        let (batch, n, width) = (x.shape()[0], self.tokens, x.shape()[2]);
        let size = array("size").unwrap_or_else(|| ArrayD::ones(IxDyn(&[batch, n, 1])));
        let (mut ys, mut sizes, mut anchors, mut assigns) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for image in 0..batch {
            let key = |token: usize| {
                let score = score[[image, token]];
                if score.is_nan() { f64::INFINITY } else { score }
            };
            let mut order: Vec<usize> = (self.protect..n - self.suffix).collect();
            // Stable: of equals, the lowest position first.
            order.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).expect("no NaN"));
            let dropped = order.split_off(self.kept());
            let fused = self.fuse && !dropped.is_empty();
            let mut slots: Vec<i64> = (0..self.protect).chain(order).map(|token| token as i64).collect();
            let extra = slots.len() as i64;
            slots.extend(fused.then_some(-1));
            slots.extend((n - self.suffix..n).map(|token| token as i64));
            let mut assign = vec![if fused { extra } else { -1 }; n];
            for (slot, &token) in slots.iter().enumerate() {
                if token < 0 {
                    let sum = |at: usize| dropped.iter().map(|&t| score[[image, t]] * x[[image, t, at]]).sum::<f64>();
                    ys.extend((0..width).map(sum));
                    sizes.push(1.0);
                } else {
                    assign[token as usize] = slot as i64;
                    ys.extend((0..width).map(|at| x[[image, token as usize, at]]));
                    sizes.push(size[[image, token as usize, 0]]);
                }
            }
            anchors.extend(slots);
            assigns.extend(assign);
        }
        let slots = anchors.len() / batch;
        let shape = |last: &[usize]| IxDyn(&[&[batch], last].concat());
        Pruned {
            y: ArrayD::from_shape_vec(shape(&[slots, width]), ys).expect("a row for each slot"),
            size: ArrayD::from_shape_vec(shape(&[slots, 1]), sizes).expect("one for each slot"),
            anchor: ArrayD::from_shape_vec(shape(&[slots]), anchors).expect("one for each slot"),
            assign: ArrayD::from_shape_vec(shape(&[n]), assigns).expect("one for each token"),
        }
    }
}

impl Pruned {
    /// What is wrong with `outputs`: decisions, sizes and tokens that are kept must be the same to the bit, sums may differ
    /// by `tolerance`, relative to the largest value.
    pub fn check(&self, outputs: &Outputs, tolerance: f64) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        let (anchor, assign) = (integers(get("anchor")), integers(get("assign")));
        if anchor != self.anchor || assign != self.assign {
            return Err(format!("anchor {anchor}\nfor {}\nassign {assign}\nfor {}", self.anchor, self.assign));
        }
        if get("size_out").to_f64() != self.size {
            return Err("size_out differs".into());
        }
        let y = get("y").to_f64();
        if y.shape() != self.y.shape() {
            return Err(format!("y has shape {:?}, not {:?}", y.shape(), self.y.shape()));
        }
        let largest = self.y.iter().filter(|y| y.is_finite()).fold(1.0, |largest: f64, y| largest.max(y.abs()));
        for (index, &expected) in self.y.indexed_iter() {
            let allowed = if anchor[[index[0], index[1]]] < 0 { tolerance * largest } else { 0.0 };
            let found = y[&index];
            let same = if expected.is_nan() { found.is_nan() } else { (found - expected).abs() <= allowed };
            if !same {
                return Err(format!("y at {index:?} is {found}, not {expected}"));
            }
        }
        Ok(())
    }

    /// What is wrong with `outputs` where all are kept and in the order that the scores give: every token must have a slot
    /// of its own, unchanged. `x` is `[B, N, C]`.
    pub fn check_permuted(outputs: &Outputs, x: &ArrayD<f64>) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        let (y, assign) = (get("y").to_f64(), integers(get("assign")));
        if y.shape() != x.shape() {
            return Err(format!("y has shape {:?}, not {:?}", y.shape(), x.shape()));
        }
        for (image, slots) in assign.outer_iter().enumerate() {
            let mut all: Vec<i64> = slots.iter().copied().collect();
            all.sort_unstable();
            let row = |of: &ArrayD<f64>, at: usize| of.index_axis(Axis(0), image).index_axis(Axis(0), at).to_owned();
            let unchanged = slots.iter().enumerate().all(|(token, &slot)| row(&y, slot as usize) == row(x, token));
            if !all.into_iter().eq(0..x.shape()[1] as i64) || !unchanged {
                return Err(format!("image {image}: {slots} is no permutation, or tokens have changed"));
            }
        }
        Ok(())
    }
}

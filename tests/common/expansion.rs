//! Expansion: models of the operators that make it up, and the definition once more.

use ndarray::{ArrayD, Axis, IxDyn};
use vitrim::runtime::{Feeds, Outputs};
use vitrim_ir::{DataType, Model, Tensor};

use super::integers;
use super::ops::{Calls, data_type};

/// One expansion: how the operators are called, and what is fed.
#[derive(Clone, Debug)]
pub struct Expanding {
    pub name: String,
    pub tokens: usize,
    pub protect: usize,
    pub suffix: usize,
    /// Candidates that are chosen at first.
    pub seeds: Vec<usize>,
    /// How many each round adds.
    pub rounds: Vec<usize>,
    /// `CosineSimilarity` or `ManhattanDistance`.
    pub closeness: &'static str,
    pub sign: i64,
    /// `x` `[B, N, C]`.
    pub feeds: Feeds,
}

/// What it must give.
pub struct Expanded {
    pub y: ArrayD<f64>,
    pub anchor: ArrayD<i64>,
    pub assign: ArrayD<i64>,
}

/// By how much the better of two was better, the closest of all times that it mattered.
#[derive(Clone, Copy)]
struct Margin(f64);

impl Margin {
    /// Something is chosen for `best`, and not for `next`.
    fn decide(&mut self, best: f64, next: f64) {
        self.0 = self.0.min((best - next).abs());
    }
}

impl Expanding {
    pub fn model(&self, opset: i64) -> Model {
        use DataType::{F32, I64};
        let mut calls = Calls::new(opset);
        let tensor = self.feeds.get("x").expect("it is fed");
        let (dtype, batch) = (data_type(tensor), tensor.shape()[0]);
        let x = calls.input("x", dtype, 3);
        let ends = [("protect", self.protect as i64), ("suffix", self.suffix as i64)];
        let candidates = self.tokens - self.protect - self.suffix;
        let attributes = [&ends[..], &[("sign", self.sign)]].concat();
        let closeness = calls.op(self.closeness, "closeness", &[x], &attributes, 1)[0];
        let others = (0..candidates).filter(|candidate| !self.seeds.contains(candidate));
        let seeds: Vec<i64> = self.seeds.iter().copied().chain(others).map(|candidate| candidate as i64).collect();
        let seeds = Tensor::i64s(&[batch, seeds.len()], &seeds.repeat(batch));
        let mut order = calls.graph.tensor("seeds_first", seeds);
        let mut keep = self.seeds.len();
        for (round, &add) in self.rounds.iter().enumerate() {
            let attributes = [("candidates", candidates as i64), ("chosen", keep as i64)];
            order = calls.op("TokenExpand", &format!("order{round}"), &[closeness, order], &attributes, 1)[0];
            keep += add;
        }
        let own = [("tokens", self.tokens as i64), ("keep", keep as i64), ("dtype", dtype.code().into())];
        let absorbed = calls.op("TokenAbsorb", "absorbed", &[x, closeness, order], &[&own[..], &ends].concat(), 4);
        calls.output("y", absorbed[0], dtype, 3);
        calls.output("size_out", absorbed[1], F32, 3);
        calls.output("anchor", absorbed[2], I64, 2);
        calls.output("assign", absorbed[3], I64, 2);
        calls.model()
    }

    /// The definition once more, as plain as can be and in float64.
    pub fn expected(&self) -> Expanded {
        self.expected_within().0
    }

    /// The same, and the smallest gap that decided anything.
    pub fn expected_within(&self) -> (Expanded, f64) {
        let mut margin = Margin(f64::INFINITY);
        let x = self.feeds.get("x").expect("it is fed").to_f64();
        let (batch, width) = (x.shape()[0], x.shape()[2]);
        let (mut ys, mut anchors, mut assigns) = (Vec::new(), Vec::new(), Vec::new());
        for image in 0..batch {
            let row = |token: usize| (0..width).map(|at| x[[image, token, at]]).collect::<Vec<f64>>();
            let unit = |token: usize| {
                let row = row(token);
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.iter().map(|x| if norm > 0.0 { x / norm } else { *x }).collect::<Vec<f64>>()
            };
            let units: Vec<Vec<f64>> = (0..self.tokens).map(unit).collect();
            let close = |a: usize, b: usize| {
                let pairs = units[a].iter().zip(&units[b]);
                let closeness: f64 = match self.closeness {
                    "CosineSimilarity" => pairs.map(|(a, b)| a * b).sum(),
                    _ => pairs.map(|(a, b)| (a - b).abs()).sum(),
                };
                let closeness = closeness * self.sign as f64;
                if closeness.is_nan() { f64::MAX } else { closeness }
            };
            let mut chosen: Vec<usize> = self.seeds.iter().map(|&seed| seed + self.protect).collect();
            let mut rest: Vec<usize> =
                (self.protect..self.tokens - self.suffix).filter(|token| !chosen.contains(token)).collect();
            for &add in &self.rounds {
                let best = |token: usize| chosen.iter().map(|&to| close(to, token)).fold(f64::NEG_INFINITY, f64::max);
                let mut order: Vec<(f64, usize)> = rest.iter().map(|&token| (best(token), token)).collect();
                // Stable: equals stay in the order that the round before left them in.
                order.sort_by(|a, b| a.0.partial_cmp(&b.0).expect("no NaN"));
                if let Some((last, next)) = order[..add].last().zip(order.get(add)) {
                    margin.decide(last.0, next.0);
                }
                order[..add].windows(2).for_each(|pair| margin.decide(pair[0].0, pair[1].0));
                rest = order.into_iter().map(|(_, token)| token).collect();
                chosen.extend(rest.drain(..add));
            }
            let slots: Vec<usize> =
                (0..self.protect).chain(chosen.iter().copied()).chain(self.tokens - self.suffix..self.tokens).collect();
            let mut slot_of = |token: usize| match slots.iter().position(|&slot| slot == token) {
                Some(slot) => slot,
                None => {
                    let closeness: Vec<f64> = chosen.iter().map(|&to| close(to, token)).collect();
                    let first = |best: usize, at: usize| if closeness[at] > closeness[best] { at } else { best };
                    let best = (0..chosen.len()).reduce(first).expect("some are chosen");
                    let others = (0..chosen.len()).filter(|&at| at != best);
                    others.for_each(|at| margin.decide(closeness[best], closeness[at]));
                    self.protect + best
                }
            };
            let assign: Vec<usize> = (0..self.tokens).map(&mut slot_of).collect();
            for slot in 0..slots.len() {
                let members: Vec<usize> = (0..self.tokens).filter(|&token| assign[token] == slot).collect();
                let sum = |at: usize| members.iter().map(|&token| x[[image, token, at]]).sum::<f64>();
                ys.extend((0..width).map(|at| sum(at) / members.len() as f64));
            }
            anchors.extend(slots.iter().map(|&token| token as i64));
            assigns.extend(assign.iter().map(|&slot| slot as i64));
        }
        let slots = anchors.len() / batch;
        let shape = |last: &[usize]| IxDyn(&[&[batch], last].concat());
        let expanded = Expanded {
            y: ArrayD::from_shape_vec(shape(&[slots, width]), ys).expect("a row for each slot"),
            anchor: ArrayD::from_shape_vec(shape(&[slots]), anchors).expect("one for each slot"),
            assign: ArrayD::from_shape_vec(shape(&[self.tokens]), assigns).expect("one for each token"),
        };
        (expanded, margin.0)
    }
}

impl Expanded {
    /// What is wrong with `outputs`: decisions must be the same, means may differ by `tolerance`.
    pub fn check(&self, outputs: &Outputs, tolerance: f64) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        let (anchor, assign) = (integers(get("anchor")), integers(get("assign")));
        if anchor != self.anchor || assign != self.assign {
            return Err(format!("anchor {anchor}\nfor {}\nassign {assign}\nfor {}", self.anchor, self.assign));
        }
        let (y, size) = (get("y").to_f64(), get("size_out").to_f64());
        if y.shape() != self.y.shape() || size.shape() != [y.shape()[0], y.shape()[1], 1] {
            return Err(format!("y has shape {:?}, sizes have {:?}", y.shape(), size.shape()));
        }
        let counted = |image: usize, slot: usize| {
            assign.index_axis(Axis(0), image).iter().filter(|&&of| of == slot as i64).count() as f64
        };
        if size.indexed_iter().any(|(index, &size)| size != counted(index[0], index[1])) {
            return Err("sizes are no counts".into());
        }
        let apart = |(&found, &expected): (&f64, &f64)| match expected.is_nan() {
            true => found.is_nan(),
            false => (found - expected).abs() <= tolerance,
        };
        match y.iter().zip(&self.y).all(apart) {
            true => Ok(()),
            false => Err("y differs".into()),
        }
    }
}

//! Calls of our operators: models of them, and what a merge must give.

use ndarray::{Array2, ArrayD, ArrayView1, Axis, IxDyn};
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{Attribute, DataType, DimSpec, GraphBuilder, Model, OpType, TensorType, ValueId};
use vitrim_ops::{DEFS, DOMAIN, VERSION};

use super::{distance, integers};

/// A model of calls to our operators.
pub struct Calls {
    pub graph: GraphBuilder,
    pub opset: i64,
}

impl Calls {
    pub fn new(opset: i64) -> Self {
        Calls { graph: GraphBuilder::new(), opset }
    }

    pub fn input(&mut self, name: &str, dtype: DataType, rank: usize) -> ValueId {
        self.graph.input(name, Some(&ty(dtype, rank)))
    }

    pub fn op(
        &mut self,
        name: &str,
        hint: &str,
        inputs: &[ValueId],
        attributes: &[(&str, i64)],
        results: usize,
    ) -> Vec<ValueId> {
        let attributes: Vec<_> = attributes.iter().map(|&(key, value)| (key, Attribute::Int(value))).collect();
        self.op_with(name, hint, inputs, &attributes, results)
    }

    pub fn op_with(
        &mut self,
        name: &str,
        hint: &str,
        inputs: &[ValueId],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let known = DEFS.iter().any(|def| def.name() == name);
        assert!(known, "{name} is one of ours");
        let inputs = inputs.iter().copied().map(Some).collect();
        self.graph.call(OpType::of(DOMAIN, name), hint, inputs, attributes, results)
    }

    pub fn output(&mut self, name: &str, value: ValueId, dtype: DataType, rank: usize) {
        self.graph.output(name, value, Some(&ty(dtype, rank)));
    }

    pub fn model(self) -> Model {
        let functions = DEFS.iter().map(|def| def.function(self.opset)).collect();
        self.graph.into_model(10, &[("", self.opset), (DOMAIN, VERSION)], functions)
    }
}

/// A type with every extent left open.
pub fn ty(dtype: DataType, rank: usize) -> TensorType {
    TensorType { dtype, dims: Some(vec![DimSpec::Unknown; rank]) }
}

/// One merge: how it is called, and what is fed.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub r: usize,
    pub tokens: usize,
    pub protect: usize,
    pub suffix: usize,
    /// Heads of the metric, channels of each, and the channel where they begin.
    pub heads: [usize; 3],
    pub feeds: Feeds,
}

impl Case {
    /// How many tokens can merge.
    pub fn r_effective(&self) -> usize {
        self.r.min((self.tokens - self.protect - self.suffix) / 2)
    }

    /// A model that merges, tells where each token went, and (if there is an input `y_in`) restores.
    pub fn model(&self, opset: i64, dynamic: bool) -> Model {
        use DataType::{F32, I64};
        let mut calls = Calls::new(opset);
        let feed = |name: &str| data_type(self.feeds.get(name).expect("it is fed"));
        let x = feed("x");
        let tokens = calls.input("x", x, 3);
        let metric = calls.input("metric", feed("metric"), 3);
        let size = match self.feeds.get("size") {
            Some(_) => calls.input("size", F32, 3),
            None => calls.op("TokenSize", "size", &[tokens], &[], 1)[0],
        };
        let (r, n) = (self.r as i64, self.tokens as i64);
        let [heads, head_dim, at] = self.heads.map(|number| number as i64);
        let common = [
            ("protect", self.protect as i64),
            ("suffix", self.suffix as i64),
            ("heads", heads),
            ("head_dim", head_dim),
            ("metric_at", at),
            ("dtype", x.code().into()),
        ];
        let merged = if dynamic {
            let r = calls.graph.tensor("r", vitrim_ir::Tensor::shape(&[r]));
            calls.op("TokenMergeDynamic", "merged", &[tokens, metric, size, r], &common, 5)
        } else {
            let attributes = [&[("r", r), ("tokens", n)][..], &common].concat();
            calls.op("TokenMerge", "merged", &[tokens, metric, size], &attributes, 5)
        };
        let assign = calls.op("TokenAssign", "assigned", &merged[2..], &[], 1)[0];
        if self.feeds.get("y_in").is_some() {
            let dtype = feed("y_in");
            let slots = calls.input("y_in", dtype, 3);
            let restored = calls.op("TokenRestore", "spread", &[slots, assign], &[], 1)[0];
            calls.output("restored", restored, dtype, 3);
        }
        calls.output("y", merged[0], x, 3);
        calls.output("size_out", merged[1], F32, 3);
        calls.output("anchor", merged[2], I64, 2);
        calls.output("leaving", merged[3], I64, 2);
        calls.output("into", merged[4], I64, 2);
        calls.output("assign", assign, I64, 2);
        calls.model()
    }
}

/// The type of a tensor's elements, as models say it.
pub fn data_type(tensor: &Tensor) -> DataType {
    match tensor.dtype() {
        DType::F32 => DataType::F32,
        DType::F16 => DataType::F16,
        DType::Bf16 => DataType::BF16,
        DType::I64 => DataType::I64,
        other => panic!("no case has {other:?}"),
    }
}

/// What a merge must give.
pub struct Expected {
    pub assign: ArrayD<i64>,
    pub anchor: ArrayD<i64>,
    pub y: Tensor,
    pub size: Tensor,
    pub restored: Option<Tensor>,
}

/// What an operator's values may differ from the oracle's: a few roundings of float32 on entries of size 1 to 4.
pub const VALUE_TOLERANCE: f64 = 1e-5;

impl Expected {
    /// What is wrong with `outputs`, if their values may differ by `tolerance`.
    pub fn check(&self, case: &Case, outputs: &Outputs, tolerance: f64) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        let (assign, anchor) = (integers(get("assign")), integers(get("anchor")));
        if case.r_effective() == 0 {
            return self.check_reordered(&assign, &anchor, outputs, tolerance);
        }
        if assign != self.assign || anchor != self.anchor {
            return Err(format!("assign {assign}\nfor {}\nanchor {anchor}\nfor {}", self.assign, self.anchor));
        }
        self.check_values(outputs, tolerance)
    }

    fn check_values(&self, outputs: &Outputs, tolerance: f64) -> Result<(), String> {
        let get = |name: &str| outputs.get(name).unwrap_or_else(|| panic!("{name} is an output"));
        for (name, expected, tolerance) in [("y", &self.y, tolerance), ("size_out", &self.size, VALUE_TOLERANCE)] {
            let apart = distance(expected, get(name));
            if apart.is_nan() || apart > tolerance {
                return Err(format!("{name} is {apart:e} off"));
            }
        }
        match &self.restored {
            // Copies are exact.
            Some(expected) if distance(expected, get("restored")) > 0.0 => Err("restored tokens are no copies".into()),
            _ => Ok(()),
        }
    }

    /// Nothing merges: the oracle leaves the tokens where they are, the body lists them in the order of its slots. Every
    /// token is a slot of its own, unchanged.
    fn check_reordered(
        &self,
        assign: &ArrayD<i64>,
        anchor: &ArrayD<i64>,
        outputs: &Outputs,
        tolerance: f64,
    ) -> Result<(), String> {
        let undo = |name: &str| {
            let values = outputs.get(name).expect("an output").to_f64();
            let mut undone = values.clone();
            for ((image, mut rows), slots) in undone.outer_iter_mut().enumerate().zip(assign.outer_iter()) {
                for (mut row, &slot) in rows.outer_iter_mut().zip(slots) {
                    row.assign(&values.index_axis(Axis(0), image).index_axis(Axis(0), slot as usize));
                }
            }
            Tensor::from(undone)
        };
        let own = anchor.shape() == assign.shape()
            && anchor.outer_iter().zip(assign.outer_iter()).all(|(anchor, assign)| {
                anchor.iter().enumerate().all(|(slot, &token)| assign[token as usize] == slot as i64)
            });
        let apart = distance(&self.y, &undo("y")).max(distance(&self.size, &undo("size_out")));
        if own && apart <= tolerance { Ok(()) } else { Err(format!("r = 0 changes tokens by {apart:e}")) }
    }
}

/// Who merges with whom in one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matching {
    /// The token of every slot.
    pub anchors: Vec<usize>,
    /// Each leaving token, the most similar first, and the one that it joins.
    pub leaving: Vec<(usize, usize)>,
}

/// Bipartite soft matching once more, as plain as can be and in float64.
pub struct Reference<'a> {
    case: &'a Case,
    x: ArrayD<f64>,
    size: ArrayD<f64>,
    /// `cosine[image][a][b]`, of all pairs of tokens.
    cosine: Vec<Array2<f64>>,
    /// The metric's rows, which are equal where a tie is none of rounding.
    rows: ArrayD<f64>,
}

impl<'a> Reference<'a> {
    pub fn new(case: &'a Case) -> Self {
        let array = |name: &str| case.feeds.get(name).map(Tensor::to_f64);
        let (x, metric) = (array("x").expect("it is fed"), array("metric").expect("it is fed"));
        let size = array("size").unwrap_or_else(|| ArrayD::ones(IxDyn(&[x.shape()[0], case.tokens, 1])));
        let [heads, head_dim, at] = case.heads;
        let rows = ArrayD::from_shape_fn(IxDyn(&[x.shape()[0], case.tokens, head_dim]), |index| {
            let entry = |head: usize| metric[[index[0], index[1], at + head * head_dim + index[2]]];
            (0..heads).map(entry).sum::<f64>() / heads as f64
        });
        let cosine = rows.outer_iter().map(|rows| {
            let rows = rows.into_dimensionality().expect("rows of channels");
            let norms: Vec<f64> = rows.outer_iter().map(|row: ArrayView1<f64>| row.dot(&row).sqrt()).collect();
            Array2::from_shape_fn((case.tokens, case.tokens), |(a, b)| {
                let norms = norms[a] * norms[b];
                if norms > 0.0 { rows.row(a).dot(&rows.row(b)) / norms } else { 0.0 }
            })
        });
        let cosine = cosine.collect();
        Reference { case, x, size, cosine, rows }
    }

    /// What the merge must give.
    pub fn expected(&self) -> Expected {
        self.merged(&(0..self.cosine.len()).map(|image| self.matching(image)).collect::<Vec<_>>())
    }

    fn ab(&self) -> (Vec<usize>, Vec<usize>) {
        let end = self.case.tokens - self.case.suffix;
        (self.case.protect..end).partition(|token| token % 2 == 0)
    }

    /// Each A token's strongest edge, in falling order of strength; the lowest position first among equals.
    fn edges(&self, image: usize) -> Vec<(f64, usize, usize)> {
        let (even, odd) = self.ab();
        let strongest = |&a: &usize| {
            let first = (f64::NEG_INFINITY, a, 0);
            odd.iter().fold(first, |best, &b| {
                if self.cosine[image][[a, b]] > best.0 { (self.cosine[image][[a, b]], a, b) } else { best }
            })
        };
        let mut edges: Vec<_> = even.iter().map(strongest).collect();
        edges.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("numbers"));
        edges
    }

    fn matching(&self, image: usize) -> Matching {
        let (case, edges) = (self.case, self.edges(image));
        let r = case.r_effective();
        let mut staying: Vec<usize> = edges.iter().skip(r).map(|&(_, a, _)| a).collect();
        if case.protect > 0 {
            staying.sort_unstable();
        }
        let end = case.tokens - case.suffix;
        Matching {
            anchors: (0..case.protect).chain(staying).chain(self.ab().1).chain(end..case.tokens).collect(),
            leaving: edges.iter().take(r).map(|&(_, a, b)| (a, b)).collect(),
        }
    }

    /// What merging by `matchings` gives.
    fn merged(&self, matchings: &[Matching]) -> Expected {
        let (batch, n, width) = (self.x.shape()[0], self.case.tokens, self.x.shape()[2]);
        let slots = n - self.case.r_effective();
        let mut y: ArrayD<f64> = ArrayD::zeros(IxDyn(&[batch, slots, width]));
        let mut sizes: ArrayD<f64> = ArrayD::zeros(IxDyn(&[batch, slots, 1]));
        let (mut assign, mut anchor) = (Vec::new(), Vec::new());
        for (image, Matching { anchors, leaving }) in matchings.iter().enumerate() {
            let mut slot_of = vec![0; n];
            anchors.iter().enumerate().for_each(|(slot, &token)| slot_of[token] = slot);
            leaving.iter().for_each(|&(token, into)| slot_of[token] = slot_of[into]);
            for (token, &slot) in slot_of.iter().enumerate() {
                let weight = self.size[[image, token, 0]];
                sizes[[image, slot, 0]] += weight;
                (0..width).for_each(|at| y[[image, slot, at]] += weight * self.x[[image, token, at]]);
            }
            assign.extend(slot_of.iter().map(|&slot| slot as i64));
            anchor.extend(anchors.iter().map(|&token| token as i64));
        }
        y /= &sizes;
        let indices =
            |count, values| ArrayD::from_shape_vec(IxDyn(&[batch, count]), values).expect("one row per image");
        let (assign, anchor) = (indices(n, assign), indices(slots, anchor));
        let restored = self.case.feeds.get("y_in").map(|slots| {
            let slots = slots.to_f64();
            let shape = [batch, n, slots.shape()[2]];
            Tensor::from(ArrayD::from_shape_fn(IxDyn(&shape), |at| {
                slots[[at[0], assign[[at[0], at[1]]] as usize, at[2]]]
            }))
        });
        Expected { assign, anchor, y: Tensor::from(y), size: Tensor::from(sizes), restored }
    }

    /// Whether float32 decides as float64 does: no two candidates are closer than `margin`, but those of equal rows if
    /// equal rows are sure to have equal similarities.
    pub fn is_decided(&self, margin: f64, equal_rows_tie: bool) -> bool {
        (0..self.cosine.len()).all(|image| {
            let row = |token: usize| self.rows.index_axis(Axis(0), image).index_axis_move(Axis(0), token);
            let same = |a: usize, b: usize| equal_rows_tie && row(a) == row(b);
            let apart = |a: f64, b: f64| (a - b).abs() > margin;
            let edges = self.edges(image);
            let partners = edges.iter().all(|&(best, a, partner)| {
                let others = self.ab().1.into_iter().filter(|&b| b != partner);
                others.into_iter().all(|b| apart(best, self.cosine[image][[a, b]]) || same(b, partner))
            });
            let r = self.case.r_effective();
            // Which tokens leave matters, in which order does not. Those that stay are sorted by position, unless
            // nothing is protected.
            let order = edges.iter().enumerate().all(|(at, &(score, a, b))| {
                let beyond = if at < r { r } else { at + 1 };
                let matters = at < r || self.case.protect == 0;
                let rivals = edges.get(beyond..).unwrap_or_default();
                !matters || rivals.iter().all(|&(other, c, d)| apart(score, other) || same(a, c) && b == d)
            });
            partners && order
        })
    }

    /// What is wrong with a merge whose decisions rounding may have made: they must be as good as the best within
    /// `margin`, and what was merged must be what they say.
    pub fn check_as_decided(&self, outputs: &Outputs, margin: f64, tolerance: f64) -> Result<(), String> {
        let case = self.case;
        let indices = |name: &str| integers(outputs.get(name).unwrap_or_else(|| panic!("{name} is an output")));
        let (anchor, leaving, into) = (indices("anchor"), indices("leaving"), indices("into"));
        let mut matchings = Vec::new();
        for image in 0..self.cosine.len() {
            let of = |array: &ArrayD<i64>| -> Vec<usize> {
                array.index_axis(Axis(0), image).iter().map(|&index| index as usize).collect()
            };
            let (anchors, left, slots) = (of(&anchor), of(&leaving), of(&into));
            let mut all: Vec<usize> = anchors.iter().chain(&left).copied().collect();
            all.sort_unstable();
            let best = self.matching(image);
            let fixed = |anchors: &[usize]| {
                let staying = case.protect..anchors.len() - case.suffix - self.ab().1.len();
                [&anchors[..staying.start], &anchors[staying.end..]].concat()
            };
            if !all.iter().copied().eq(0..case.tokens) || fixed(&anchors) != fixed(&best.anchors) {
                return Err(format!("image {image}: no grouping of all tokens: {anchors:?}, {left:?}"));
            }
            let leaving: Vec<_> = left.iter().zip(&slots).map(|(&token, &slot)| (token, anchors[slot])).collect();
            let edges = self.edges(image);
            let weakest = edges.get(case.r_effective().max(1) - 1).map_or(0.0, |edge| edge.0);
            for &(a, b) in &leaving {
                let strongest = edges.iter().find(|edge| edge.1 == a).map_or(f64::INFINITY, |edge| edge.0);
                let own = self.cosine[image][[a, b]];
                if own + margin < strongest || own + margin < weakest {
                    return Err(format!("image {image}: {a} joined {b}, and there were better pairs"));
                }
            }
            matchings.push(Matching { anchors, leaving });
        }
        let expected = self.merged(&matchings);
        if expected.assign != indices("assign") {
            return Err("assign contradicts anchor, leaving and into".into());
        }
        expected.check_values(outputs, tolerance)
    }
}

//! Writing nodes: equal ones once, and the shapes and forms that rules share.

use std::collections::HashMap;

use vitrim_ir::{Attribute, DataType, Expr, Graph, Model, OpType, Patch, Shapes, Tensor, ValueId};

use crate::Undefined;

/// What makes two nodes, or two constants, the same.
#[derive(PartialEq, Eq, Hash)]
struct Key(OpType, Vec<Option<ValueId>>, String);

/// Writes nodes into a patch.
pub struct Emitter<'p> {
    /// The graph that the patch is for.
    pub graph: &'p Graph,
    /// What is known of its values. Of those that the patch makes nothing is.
    pub shapes: &'p Shapes,
    patch: &'p mut Patch,
    opset: i64,
    written: HashMap<Key, Vec<ValueId>>,
    transposed: HashMap<ValueId, (ValueId, Vec<i64>)>,
    /// What names of new values begin with.
    hint: String,
}

impl<'p> Emitter<'p> {
    /// An emitter into `patch`, which is for `model`, whose shapes are `shapes`.
    pub fn new(model: &'p Model, shapes: &'p Shapes, patch: &'p mut Patch) -> Self {
        let (written, transposed) = (HashMap::new(), HashMap::new());
        let opset = model.opsets().standard();
        Self { graph: model.graph(), shapes, patch, opset, written, transposed, hint: String::new() }
    }

    /// The patch.
    pub fn patch(&mut self) -> &mut Patch {
        self.patch
    }

    /// Names values written from now on after `hint`.
    pub fn name_after(&mut self, hint: &str) {
        self.hint = hint.into();
    }

    /// A node with `results` results, or the one that was written before.
    pub fn call(
        &mut self,
        op: OpType,
        inputs: &[Option<ValueId>],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let key = Key(op.clone(), inputs.to_vec(), format!("{attributes:?}"));
        if let Some(known) = self.written.get(&key).filter(|known| known.len() == results) {
            return known.clone();
        }
        let hint = format!("{}/{}", self.hint, op.name);
        let made = self.patch.call(op, &hint, inputs.to_vec(), attributes, results);
        self.written.insert(key, made.clone());
        made
    }

    /// A standard operator with one result.
    pub fn op(&mut self, name: &str, inputs: &[ValueId]) -> ValueId {
        self.op_with(name, inputs, &[])
    }

    /// A standard operator with attributes and one result.
    pub fn op_with(&mut self, name: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        let inputs: Vec<Option<ValueId>> = inputs.iter().copied().map(Some).collect();
        self.call(OpType::standard(name), &inputs, attributes, 1)[0]
    }

    fn constant(&mut self, kind: &str, text: String, tensor: impl FnOnce() -> Tensor) -> ValueId {
        let key = Key(OpType::of("constant", kind), Vec::new(), text);
        if let Some(known) = self.written.get(&key) {
            return known[0];
        }
        let hint = format!("{}/{kind}", self.hint);
        let made = self.patch.constant(&hint, tensor());
        self.written.insert(key, vec![made]);
        made
    }

    /// A list of integers, `[K]`.
    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.constant("ints", format!("{values:?}"), || Tensor::shape(values))
    }

    /// A number of rank 0 of a float type.
    pub fn number(&mut self, dtype: DataType, value: f64) -> ValueId {
        self.constant("number", format!("{dtype} {value:?}"), || Tensor::floats(dtype, &[], &[value]))
    }

    /// `x` times a number, of the type of `of`.
    pub fn scale(&mut self, x: ValueId, by: f64, of: ValueId) -> Result<ValueId, Undefined> {
        if by == 1.0 {
            return Ok(x);
        }
        let by = self.number(self.dtype(of)?, by);
        Ok(self.op("Mul", &[x, by]))
    }

    /// The type of a value of the graph.
    pub fn dtype(&self, value: ValueId) -> Result<DataType, Undefined> {
        let dtype = self.shapes.dtype(value);
        dtype.ok_or_else(|| Undefined(format!("the type of '{}' is unknown", self.graph.value(value).name())))
    }

    /// The extents of a value of the graph.
    pub fn dims(&self, value: ValueId) -> Result<&'p [Expr], Undefined> {
        self.shapes
            .dims(value)
            .ok_or_else(|| Undefined(format!("the shape of '{}' is unknown", self.graph.value(value).name())))
    }

    /// The number of axes of a value of the graph.
    pub fn rank(&self, value: ValueId) -> Result<usize, Undefined> {
        Ok(self.dims(value)?.len())
    }

    /// The extent of an axis of a value of the graph, as `[1]`.
    pub fn extent(&mut self, value: ValueId, axis: usize) -> Result<ValueId, Undefined> {
        if let Some(extent) = self.dims(value)?.get(axis).and_then(Expr::as_known) {
            return Ok(self.ints(&[extent]));
        }
        let shape = self.op("Shape", &[value]);
        let at = self.ints(&[axis as i64]);
        Ok(self.op("Gather", &[shape, at]))
    }

    /// The extents of a value of the graph, `[rank]`.
    pub fn shape(&mut self, value: ValueId) -> Result<ValueId, Undefined> {
        let known: Option<Vec<i64>> = self.dims(value)?.iter().map(Expr::as_known).collect();
        Ok(match known {
            Some(dims) => self.ints(&dims),
            None => self.op("Shape", &[value]),
        })
    }

    /// `x` with the extents of `like`, a value of the graph with as many elements.
    pub fn reshape_like(&mut self, x: ValueId, like: ValueId) -> Result<ValueId, Undefined> {
        let dims = self.dims(like)?;
        let target: Vec<i64> = dims.iter().map(|dim| dim.as_known().unwrap_or(-1)).collect();
        let target = match target.iter().filter(|&&extent| extent == -1).count() {
            0 | 1 => self.ints(&target),
            _ => self.op("Shape", &[like]),
        };
        Ok(self.op("Reshape", &[x, target]))
    }

    /// `x` with the extents `dims`, of which one may be −1: what is left.
    pub fn reshape(&mut self, x: ValueId, dims: &[i64]) -> ValueId {
        let dims = self.ints(dims);
        self.op("Reshape", &[x, dims])
    }

    /// `x` with its axes in another order. One transposition of another is written as one.
    pub fn transpose(&mut self, x: ValueId, perm: &[i64]) -> ValueId {
        let before = self.transposed.get(&x).cloned().or_else(|| {
            let (node, _) = self.graph.get_value(x).and_then(|_| self.graph.producer(x))?;
            let node = self.graph.node(node);
            let perm = node.is("Transpose").then(|| node.ints("perm"))??;
            Some((node.input(0)?, perm.to_vec()))
        });
        let (from, perm) = match before {
            Some((from, first)) if first.len() == perm.len() => {
                (from, perm.iter().map(|&axis| first[axis as usize]).collect())
            }
            _ => (x, perm.to_vec()),
        };
        if perm.iter().enumerate().all(|(at, &axis)| at as i64 == axis) {
            return from;
        }
        let made = self.op_with("Transpose", &[from], &[("perm", Attribute::Ints(perm.clone()))]);
        self.transposed.insert(made, (from, perm));
        made
    }

    /// `x`, of `rank` axes, with the last two swapped.
    pub fn matrix_transpose(&mut self, x: ValueId, rank: usize) -> ValueId {
        let mut perm: Vec<i64> = (0..rank as i64).collect();
        perm.swap(rank - 2, rank - 1);
        self.transpose(x, &perm)
    }

    /// A reduction over `axes`, which are an operand from some version of the operator set on.
    pub fn reduce(&mut self, name: &str, x: ValueId, axes: &[i64], keep: bool) -> ValueId {
        let keep = ("keepdims", Attribute::Int(keep.into()));
        if self.opset >= if name == "ReduceSum" { 13 } else { 18 } {
            let axes = self.ints(axes);
            self.op_with(name, &[x, axes], &[keep])
        } else {
            self.op_with(name, &[x], &[("axes", Attribute::Ints(axes.to_vec())), keep])
        }
    }

    /// Entries `from` to before `to` along an axis; negative ones count from the end.
    pub fn slice(&mut self, x: ValueId, axis: usize, from: i64, to: i64) -> ValueId {
        let [from, to, axis] = [from, to, axis as i64].map(|bound| self.ints(&[bound]));
        self.op("Slice", &[x, from, to, axis])
    }

    /// The sum of several gradients of one value.
    pub fn sum(&mut self, parts: &[ValueId]) -> Option<ValueId> {
        match *parts {
            [] => None,
            [one] => Some(one),
            [one, other] => Some(self.op("Add", &[one, other])),
            _ => Some(self.op("Sum", parts)),
        }
    }

    /// `x`, of extents `from`, summed to the extents of `to`, a value of the graph that broadcasting stretched to them.
    pub fn sum_to(&mut self, x: ValueId, from: &[Expr], to: ValueId) -> Result<ValueId, Undefined> {
        let dims = self.dims(to)?;
        let lead = from.len().checked_sub(dims.len()).ok_or("an operand has more axes than the result")?;
        let mut axes: Vec<i64> = (0..lead as i64).collect();
        for (axis, (whole, own)) in from[lead..].iter().zip(dims).enumerate() {
            if own.is(1) && !whole.is(1) {
                axes.push((lead + axis) as i64);
            } else if own != whole && own.as_known().is_none() {
                let name = self.graph.value(to).name();
                return Err(Undefined(format!("whether '{name}' is broadcast along axis {axis} is unknown")));
            }
        }
        let (leading, inner) = (lead > 0, axes.len() > lead);
        Ok(match (leading, inner) {
            (false, false) => x,
            (true, false) => self.reduce("ReduceSum", x, &axes, false),
            (false, true) => self.reduce("ReduceSum", x, &axes, true),
            (true, true) => {
                let sum = self.reduce("ReduceSum", x, &axes, false);
                self.reshape_like(sum, to)?
            }
        })
    }
}

//! Writing nodes: equal ones once, and the shapes and forms that rules share.

use std::collections::HashMap;

use vitrim_ir::{Attribute, DataType, Expr, Graph, Model, OpType, Patch, Shapes, Tensor, ValueId};

use crate::Undefined;

/// An integer: known now, or `[1]` at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int {
    /// Known now.
    Known(i64),
    /// A value that holds it.
    Given(ValueId),
}

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
    /// The operands of products that were written, of as many axes as the product.
    products: HashMap<ValueId, [ValueId; 2]>,
    /// What nodes read instead of values that were replaced.
    instead: HashMap<ValueId, ValueId>,
    /// What names of new values begin with.
    hint: String,
}

impl<'p> Emitter<'p> {
    /// An emitter into `patch`, which is for `model`, whose shapes are `shapes`.
    pub fn new(model: &'p Model, shapes: &'p Shapes, patch: &'p mut Patch) -> Self {
        let (written, transposed, instead) = (HashMap::new(), HashMap::new(), HashMap::new());
        let (graph, opset, products) = (model.graph(), model.opsets().standard(), HashMap::new());
        Self { graph, shapes, patch, opset, written, transposed, products, instead, hint: String::new() }
    }

    /// The version of the standard operator set.
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// The patch.
    pub fn patch(&mut self) -> &mut Patch {
        self.patch
    }

    /// Names values written from now on after `hint`.
    pub fn name_after(&mut self, hint: &str) {
        self.hint = hint.into();
    }

    /// Lets nodes written from now on read `new` where they would read `old`.
    pub fn replace(&mut self, old: ValueId, new: ValueId) {
        self.instead.insert(old, new);
    }

    /// A node with `results` results, or the one that was written before.
    pub fn call(
        &mut self,
        op: OpType,
        inputs: &[Option<ValueId>],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        // Operands that are left out at the end do not exist in earlier versions of an operator.
        let given = inputs.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let read = |value: &ValueId| *self.instead.get(value).unwrap_or(value);
        let inputs: Vec<Option<ValueId>> = inputs[..given].iter().map(|input| input.as_ref().map(read)).collect();
        let key = Key(op.clone(), inputs.clone(), format!("{attributes:?}"));
        if let Some(known) = self.written.get(&key).filter(|known| known.len() == results) {
            return known.clone();
        }
        let hint = format!("{}/{}", self.hint, op.name);
        let made = self.patch.call(op, &hint, inputs, attributes, results);
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
        let by = self.number(self.float(of)?, by);
        Ok(self.op("Mul", &[x, by]))
    }

    /// Numbers `[K]` of a float type.
    pub fn numbers(&mut self, dtype: DataType, values: &[f64]) -> ValueId {
        self.constant("numbers", format!("{dtype} {values:?}"), || Tensor::floats(dtype, &[values.len()], values))
    }

    fn name(&self, value: ValueId) -> &str {
        self.graph.get_value(value).map_or("a new value", vitrim_ir::Value::name)
    }

    /// The type of a value of the graph.
    pub fn dtype(&self, value: ValueId) -> Result<DataType, Undefined> {
        let dtype = self.shapes.dtype(value);
        dtype.ok_or_else(|| Undefined(format!("the type of '{}' is unknown: declare it", self.name(value))))
    }

    /// The type of a value of the graph that must hold floats.
    pub fn float(&self, value: ValueId) -> Result<DataType, Undefined> {
        let dtype = self.dtype(value)?;
        match dtype.is_float() {
            true => Ok(dtype),
            false => Err(Undefined(format!("'{}' is of {dtype}, not of floats", self.name(value)))),
        }
    }

    /// The extents of a value of the graph.
    pub fn dims(&self, value: ValueId) -> Result<&'p [Expr], Undefined> {
        let dims = self.shapes.dims(value);
        dims.ok_or_else(|| Undefined(format!("the shape of '{}' is unknown: declare its axes", self.name(value))))
    }

    /// The extent of an axis of a value of the graph, as far as it is known.
    pub fn dim(&self, value: ValueId, axis: usize) -> Result<&'p Expr, Undefined> {
        let dim = self.dims(value)?.get(axis);
        dim.ok_or_else(|| Undefined(format!("'{}' has no axis {axis}", self.name(value))))
    }

    /// The number of axes of a value of the graph.
    pub fn rank(&self, value: ValueId) -> Result<usize, Undefined> {
        Ok(self.dims(value)?.len())
    }

    /// The extent of an axis of a value of the graph.
    pub fn extent(&mut self, value: ValueId, axis: usize) -> Result<Int, Undefined> {
        if let Some(extent) = self.dim(value, axis)?.as_known() {
            return Ok(Int::Known(extent));
        }
        let shape = self.op("Shape", &[value]);
        let at = self.ints(&[axis as i64]);
        Ok(Int::Given(self.op("Gather", &[shape, at])))
    }

    /// The extents of a value of the graph, one by one.
    pub fn extents(&mut self, value: ValueId) -> Result<Vec<Int>, Undefined> {
        (0..self.rank(value)?).map(|axis| self.extent(value, axis)).collect()
    }

    /// Integers one after the other, `[K]`.
    pub fn list(&mut self, ints: &[Int]) -> ValueId {
        let is_known = |int: &Int| matches!(int, Int::Known(_));
        let mut parts = Vec::new();
        for run in ints.chunk_by(|a, b| is_known(a) && is_known(b)) {
            parts.push(match run {
                [Int::Given(value)] => *value,
                known => {
                    let known = known.iter().filter_map(|int| if let Int::Known(n) = int { Some(*n) } else { None });
                    self.ints(&known.collect::<Vec<_>>())
                }
            });
        }
        match parts[..] {
            [] => self.ints(&[]),
            [one] => one,
            _ => self.op_with("Concat", &parts, &[("axis", Attribute::Int(0))]),
        }
    }

    fn arithmetic(&mut self, name: &str, a: Int, b: Int, fold: fn(i64, i64) -> Option<i64>) -> Int {
        if let (Int::Known(a), Int::Known(b)) = (a, b)
            && let Some(known) = fold(a, b)
        {
            return Int::Known(known);
        }
        let (a, b) = (self.list(&[a]), self.list(&[b]));
        Int::Given(self.op(name, &[a, b]))
    }

    /// `a + b`.
    pub fn plus(&mut self, a: Int, b: Int) -> Int {
        self.arithmetic("Add", a, b, i64::checked_add)
    }

    /// `a − b`.
    pub fn minus(&mut self, a: Int, b: Int) -> Int {
        self.arithmetic("Sub", a, b, i64::checked_sub)
    }

    /// `a · b`.
    pub fn times(&mut self, a: Int, b: Int) -> Int {
        self.arithmetic("Mul", a, b, i64::checked_mul)
    }

    /// The larger of `a` and `b`.
    pub fn larger(&mut self, a: Int, b: Int) -> Int {
        self.arithmetic("Max", a, b, |a, b| Some(a.max(b)))
    }

    /// The integers from 0 to before `end`, `[end]`.
    pub fn range(&mut self, end: Int) -> ValueId {
        let [zero, one] = [0, 1].map(|n| self.constant("int", n.to_string(), || Tensor::i64(n)));
        let end = self.list(&[end]);
        let end = self.reshape(end, &[]);
        self.op("Range", &[zero, end, one])
    }

    /// The positions along an axis of a value of the graph: 0, 1, … `[extent]`.
    pub fn positions(&mut self, value: ValueId, axis: usize) -> Result<ValueId, Undefined> {
        Ok(match self.extent(value, axis)? {
            Int::Known(extent) => self.ints(&(0..extent).collect::<Vec<_>>()),
            extent => self.range(extent),
        })
    }

    /// The extents of a value of the graph, `[rank]`.
    pub fn shape(&mut self, value: ValueId) -> ValueId {
        let known = |dims: &[Expr]| dims.iter().map(Expr::as_known).collect::<Option<Vec<i64>>>();
        match self.shapes.dims(value).and_then(known) {
            Some(dims) => self.ints(&dims),
            None => self.op("Shape", &[value]),
        }
    }

    /// `x` with the extents of `like`, a value of the graph with as many elements.
    pub fn reshape_like(&mut self, x: ValueId, like: ValueId) -> Result<ValueId, Undefined> {
        let target = match self.shapes.dims(like) {
            // To `Reshape`, 0 stands for an extent as it is.
            Some(dims) if dims.iter().any(|dim| dim.is(0)) => return self.zeros_like(like),
            Some(dims) if dims.iter().filter(|dim| dim.as_known().is_none()).count() <= 1 => {
                self.ints(&dims.iter().map(|dim| dim.as_known().unwrap_or(-1)).collect::<Vec<_>>())
            }
            _ => self.op("Shape", &[like]),
        };
        Ok(self.op("Reshape", &[x, target]))
    }

    /// `x` with the extents `dims`, of which one may be −1: what is left.
    pub fn reshape(&mut self, x: ValueId, dims: &[i64]) -> ValueId {
        let dims = self.ints(dims);
        self.op("Reshape", &[x, dims])
    }

    /// `x` with the extents `dims`, of which one may be −1: what is left.
    pub fn reshape_to(&mut self, x: ValueId, dims: &[Int]) -> ValueId {
        let dims = self.list(dims);
        self.op("Reshape", &[x, dims])
    }

    /// `x` with new axes of extent 1.
    pub fn unsqueeze(&mut self, x: ValueId, axes: &[i64]) -> ValueId {
        if axes.is_empty() {
            return x;
        }
        let axes = self.ints(axes);
        self.op("Unsqueeze", &[x, axes])
    }

    /// `x` as that type.
    pub fn cast(&mut self, x: ValueId, to: DataType) -> ValueId {
        if self.shapes.dtype(x) == Some(to) {
            return x;
        }
        self.op_with("Cast", &[x], &[("to", Attribute::Int(to.code().into()))])
    }

    /// A number of a float type everywhere.
    pub fn full(&mut self, dtype: DataType, value: f64, dims: ValueId) -> ValueId {
        let number = self.number(dtype, value);
        self.op("Expand", &[number, dims])
    }

    /// Zeros of the type and extents of a value of the graph.
    pub fn zeros_like(&mut self, value: ValueId) -> Result<ValueId, Undefined> {
        let (dtype, dims) = (self.float(value)?, self.shape(value));
        Ok(self.full(dtype, 0.0, dims))
    }

    /// `x`, of `rank` axes, summed along one of them with the rows of a matrix as weights: that axis gets its columns.
    pub fn contract(&mut self, x: ValueId, rank: usize, axis: usize, matrix: ValueId) -> ValueId {
        let mut perm: Vec<i64> = (0..rank as i64).collect();
        perm.swap(axis, rank - 1);
        let last = self.transpose(x, &perm);
        let product = self.op("MatMul", &[last, matrix]);
        self.transpose(product, &perm)
    }

    /// The product of two matrices, or of as many of each, all in tensors of one rank.
    pub fn product(&mut self, a: ValueId, b: ValueId) -> ValueId {
        let made = self.op("MatMul", &[a, b]);
        self.products.insert(made, [a, b]);
        made
    }

    /// `x` with its axes in another order. One transposition of another is written as one, that of a
    /// [product](Self::product) as the product of the transposed: runtimes read operands of products either way.
    pub fn transpose(&mut self, x: ValueId, perm: &[i64]) -> ValueId {
        let rank = perm.len();
        let swaps = rank >= 2 && perm.iter().enumerate().all(|(at, &axis)| axis == swapped(at, rank) as i64);
        if let Some(&[a, b]) = self.products.get(&x).filter(|_| swaps) {
            let [a, b] = [a, b].map(|operand| self.transpose(operand, perm));
            return self.product(b, a);
        }
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
        let perm: Vec<i64> = (0..rank).map(|at| swapped(at, rank) as i64).collect();
        self.transpose(x, &perm)
    }

    /// A reduction over `axes`, which are an operand from some version of the operator set on.
    pub fn reduce(&mut self, name: &str, x: ValueId, axes: &[i64], keep: bool) -> ValueId {
        // None named would be all.
        if axes.is_empty() {
            return x;
        }
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

    /// `x` with the order of its entries along an axis reversed.
    pub fn reverse(&mut self, x: ValueId, axis: usize) -> ValueId {
        let [last, end, axis] = [-1, i64::MIN, axis as i64].map(|bound| self.ints(&[bound]));
        self.op("Slice", &[x, last, end, axis, last])
    }

    /// `x` with zeros before and after its entries along each axis, or with as many entries cut off where negative.
    pub fn pad(&mut self, x: ValueId, before: &[Int], after: &[Int]) -> ValueId {
        let pads = [before, after].concat();
        if pads.iter().all(|&pad| pad == Int::Known(0)) {
            return x;
        }
        let pads = self.list(&pads);
        self.op("Pad", &[x, pads])
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
        let pairs = || from[lead..].iter().zip(dims);
        if pairs().any(|(whole, own)| own != whole && own.as_known().is_none()) {
            return Ok(self.sum_to_at_run_time(x, lead, to));
        }
        let stretched = pairs().enumerate().filter(|(_, (whole, own))| own.is(1) && !whole.is(1));
        let axes: Vec<i64> = (0..lead).chain(stretched.map(|(axis, _)| lead + axis)).map(|axis| axis as i64).collect();
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

    /// The same where it takes the extents themselves to tell what was stretched: sums along all axes of extent 1.
    fn sum_to_at_run_time(&mut self, x: ValueId, lead: usize, to: ValueId) -> ValueId {
        let shape = self.op("Shape", &[to]);
        let aligned = match lead {
            0 => shape,
            _ => {
                let ones = self.ints(&vec![1; lead]);
                self.op_with("Concat", &[ones, shape], &[("axis", Attribute::Int(0))])
            }
        };
        let one = self.ints(&[1]);
        let stretched = self.op("Equal", &[aligned, one]);
        let axes = self.op("NonZero", &[stretched]);
        let axes = self.reshape(axes, &[-1]);
        let attributes = [("keepdims", Attribute::Int(1)), ("noop_with_empty_axes", Attribute::Int(1))];
        let sum = self.op_with("ReduceSum", &[x, axes], &attributes);
        self.op("Reshape", &[sum, shape])
    }
}

/// Axis `at` of `rank`, the last two swapped.
fn swapped(at: usize, rank: usize) -> usize {
    if at + 2 < rank { at } else { 2 * rank - 3 - at }
}

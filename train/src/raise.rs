//! Operators that exporters wrote out, in one piece again: what a gradient passes at once needs a fraction of the work and
//! memory that its parts do.
//!
//! [`norms`] and [`gelus`] put `LayerNormalization` and `Gelu` (of ours, before version 20 of the standard operator set) in
//! the place of what computes the same, up to rounding, where nothing else reads any of its parts. [`scales`] makes of
//! the numbers that queries and keys are scaled by one for both.

use std::collections::{HashMap, HashSet, VecDeque};

use vitrim_ir::{
    Attribute, DataType, Graph, Model, Node, NodeId, OpType, Patch, RAISED, Shapes, Tensor, ValueId, raise_opset,
};
use vitrim_ops::{DOMAIN, Gelu, OpDef, TanhGelu, VERSION};
use vitrim_passes::Refusal;

use crate::internal;

/// The first version of the standard operator set with `Gelu`.
const GELU_SINCE: i64 = 20;

/// What a constant may differ from what it stands for, relative: exporters have them in float32, some with 9 digits.
const DIGITS: f64 = 1e-6;

/// The model with its layer normalisations in one piece each, and their number. Before version 17, which is the first with
/// the operator, the model is brought there; one that cannot be stays as it is.
pub fn norms(model: &Model) -> Result<(Model, usize), Refusal> {
    let shapes = Shapes::infer(model);
    let graph = model.graph();
    let written = Written { graph, shapes: &shapes };
    let (mut found, mut taken) = (Vec::new(), HashSet::new());
    // Backwards: a sum with a bias before the product that it has in it.
    for (id, node) in graph.nodes().rev().filter(|(_, node)| node.is("Add") || node.is("Mul")) {
        let mut parts = vec![id];
        let Some(norm) = written.norm(node, &mut parts) else { continue };
        if written.is_closed(&parts) && parts.iter().all(|part| !taken.contains(part)) {
            taken.extend(parts);
            found.push(norm);
        }
    }
    let mut raised = model.clone();
    if found.is_empty() || (model.opsets().standard() < RAISED && !raise_opset(&mut raised)) {
        return Ok((model.clone(), 0));
    }
    let count = found.len();
    let mut edit = Edit::new(&raised);
    for Norm { old, x, scale, bias, axis, epsilon } in found.into_iter().rev() {
        let inputs = [Some(edit.now(x)), Some(scale), bias];
        let inputs = &inputs[..if bias.is_some() { 3 } else { 2 }];
        let attributes = [("axis", Attribute::Int(axis)), ("epsilon", Attribute::Float(epsilon as f32))];
        edit.replace(old, OpType::standard("LayerNormalization"), inputs, &attributes);
    }
    Ok((edit.finish()?, count))
}

/// The model with its Gaussian error linear units in one piece each, and their number.
pub fn gelus(model: &Model) -> Result<(Model, usize), Refusal> {
    let shapes = Shapes::infer(model);
    let graph = model.graph();
    let written = Written { graph, shapes: &shapes };
    let found: Vec<Unit> = graph
        .nodes()
        .filter(|(_, node)| node.is("Erf") || node.is("Tanh"))
        .filter_map(|(id, node)| written.unit(id, node))
        .collect();
    let count = found.len();
    let mut edit = Edit::new(model);
    let opset = model.opsets().standard();
    for Unit { old, x, tanh } in found {
        let x = edit.now(x);
        if opset >= GELU_SINCE {
            let approximate = [("approximate", Attribute::String("tanh".into()))];
            edit.replace(old, OpType::standard("Gelu"), &[Some(x)], if tanh { &approximate } else { &[] });
        } else {
            let op: &dyn OpDef = if tanh { &TanhGelu } else { &Gelu };
            edit.patch.function(op.function(opset));
            edit.patch.import(DOMAIN, VERSION);
            edit.replace(old, op.op_type(), &[Some(x)], &[]);
        }
    }
    Ok((edit.finish()?, count))
}

/// The model with scales of products as constants, and on the left operand alone: runtimes take one that is constant into
/// the product, and what is on the right of it, keys that are transposed for it, then reads what was transposed as it is.
pub fn scales(model: &Model) -> Result<Model, Refusal> {
    let shapes = Shapes::infer(model);
    let written = Written { graph: model.graph(), shapes: &shapes };
    let mut edit = Edit::new(model);
    for (id, node) in model.graph().nodes().filter(|(_, node)| node.is("MatMul")) {
        let Some((left, right)) = node.input(0).zip(node.input(1)) else { continue };
        let ((a, by_left), (b, by_right)) = (written.scaled(left), written.scaled(right));
        let is_float = |value| shapes.dtype(value).filter(|dtype| dtype.is_float());
        let Some(dtype) = is_float(a).filter(|_| (a, b) != (left, right)) else { continue };
        let by = edit.patch.constant("raise/scale", Tensor::floats(dtype, &[], &[by_left * by_right]));
        let hint = format!("{}/scaled", model.graph().value(left).name());
        let scaled = edit.patch.op("Mul", &hint, &[a, by], &[]);
        edit.patch.rewire(id, 0, scaled);
        edit.patch.rewire(id, 1, b);
    }
    edit.finish()
}

/// Operators that take the place of others.
struct Edit<'m> {
    model: &'m Model,
    patch: Patch,
    replaced: HashMap<ValueId, ValueId>,
}

impl<'m> Edit<'m> {
    fn new(model: &'m Model) -> Self {
        Self { model, patch: Patch::new(model, "raise"), replaced: HashMap::new() }
    }

    /// What a value is by now.
    fn now(&self, value: ValueId) -> ValueId {
        self.replaced.get(&value).copied().unwrap_or(value)
    }

    fn replace(&mut self, old: ValueId, op: OpType, inputs: &[Option<ValueId>], attributes: &[(&str, Attribute)]) {
        let graph = self.model.graph();
        let hint = format!("{}/{}", graph.value(old).name(), op.name);
        let new = self.patch.call(op, &hint, inputs.to_vec(), attributes, 1)[0];
        self.patch.rewire_uses(graph, old, new, |_| true);
        self.replaced.insert(old, new);
    }

    fn finish(self) -> Result<Model, Refusal> {
        if self.patch.is_empty() {
            return Ok(self.model.clone());
        }
        let (model, _) = self.patch.apply(self.model).map_err(internal)?;
        model.verify().map_err(internal)?;
        Ok(model)
    }
}

/// A layer normalisation, and the value that it takes the place of.
struct Norm {
    old: ValueId,
    x: ValueId,
    scale: ValueId,
    bias: Option<ValueId>,
    axis: i64,
    epsilon: f64,
}

/// (x − mean x) / σ, over the axes from `axis` on.
#[derive(Clone, Copy)]
struct Normal {
    x: ValueId,
    axis: usize,
    epsilon: f64,
}

/// A Gaussian error linear unit, and the value that it takes the place of.
struct Unit {
    old: ValueId,
    x: ValueId,
    tanh: bool,
}

/// Coefficients of 1, x, x², x³.
type Polynomial = [f64; 4];

/// What exporters wrote. What matches lists its nodes in `parts`; those of what does not match may be there too, before
/// another way is tried: [`Self::is_closed`] then only asks for more.
struct Written<'m> {
    graph: &'m Graph,
    shapes: &'m Shapes,
}

impl<'m> Written<'m> {
    fn producer(&self, value: ValueId, op: &str) -> Option<(NodeId, &'m Node)> {
        let (id, _) = self.graph.producer(value)?;
        Some((id, self.graph.node(id))).filter(|(_, node)| node.is(op))
    }

    /// A constant of one element; no parameter is one.
    fn number(&self, value: ValueId) -> Option<f64> {
        let single = self.shapes.dims(value)?.iter().all(|dim| dim.is(1));
        self.shapes.uniform(value).filter(|_| single)
    }

    /// What a product with a number is of, and the number; where it is none that nothing else reads, the value and one.
    fn scaled(&self, value: ValueId) -> (ValueId, f64) {
        let is_read_once = self.graph.value(value).uses().len() == 1 && self.graph.output_slots(value).next().is_none();
        let product = self.producer(value, "Mul").filter(|_| is_read_once);
        let parts = product.and_then(|(_, product)| {
            // A number may have more axes than what it scales.
            let rank = |value| self.shapes.dims(value).map(<[_]>::len);
            let same_rank = |x| rank(x).is_some() && rank(x) == rank(value);
            orders(product).find_map(|[x, by]| Some((x, self.number(by)?)).filter(|_| same_rank(x)))
        });
        parts.unwrap_or((value, 1.0))
    }

    /// Whether an operand is this number.
    fn is_number(&self, value: Option<ValueId>, wanted: f64) -> bool {
        value.and_then(|value| self.number(value)).is_some_and(|number| close(number, wanted))
    }

    /// Whether only the nodes among `parts` read what they give, but for the first, whose result is read by others and is
    /// no graph output.
    fn is_closed(&self, parts: &[NodeId]) -> bool {
        let is_output = |value: ValueId| self.graph.output_slots(value).next().is_some();
        parts.iter().enumerate().all(|(at, &part)| {
            self.graph.node(part).results().all(|result| {
                let inside = |used: &vitrim_ir::Use| used.slot.is_some() && parts.contains(&used.node);
                !is_output(result) && (at == 0 || self.graph.value(result).uses().iter().all(inside))
            })
        })
    }

    /// x̂ · scale + bias, or without a bias.
    fn norm(&self, node: &Node, parts: &mut Vec<NodeId>) -> Option<Norm> {
        let old = node.output(0)?;
        let (product, bias) = match node.is("Add") {
            true => {
                let product = |value| self.producer(value, "Mul");
                let ((id, product), bias) = orders(node).find_map(|[a, b]| Some((product(a)?, b)))?;
                parts.push(id);
                (product, Some(bias))
            }
            false => (node, None),
        };
        let own = parts.len();
        let (normal, scale) = orders(product).find_map(|[a, b]| {
            parts.truncate(own);
            Some((self.normal(a, parts)?, b))
        })?;
        let dims = self.shapes.dims(normal.x)?;
        let over = &dims[normal.axis..];
        let fits = |operand| self.shapes.dims(operand).is_some_and(|own| own == over);
        let is_f32 = self.shapes.dtype(normal.x) == Some(DataType::F32);
        let whole = fits(scale) && bias.is_none_or(fits) && is_f32;
        let Normal { x, axis, epsilon } = normal;
        // Counted from the end, as axes of ever so many may come before.
        let axis = axis as i64 - dims.len() as i64;
        whole.then_some(Norm { old, x, scale, bias, axis, epsilon })
    }

    fn normal(&self, value: ValueId, parts: &mut Vec<NodeId>) -> Option<Normal> {
        if let Some((id, quotient)) = self.producer(value, "Div") {
            let centred = self.centred(quotient.input(0)?, parts)?;
            parts.push(id);
            return self.variance(self.squared(quotient.input(1)?, 0.5, parts)?, centred, parts);
        }
        let (id, product) = self.producer(value, "Mul")?;
        parts.push(id);
        let own = parts.len();
        orders(product).find_map(|[centred, inverse]| {
            parts.truncate(own);
            let centred = self.centred(centred, parts)?;
            self.variance(self.squared(inverse, -0.5, parts)?, centred, parts)
        })
    }

    /// x − mean x: the difference, x, and the first axis of the mean.
    fn centred(&self, value: ValueId, parts: &mut Vec<NodeId>) -> Option<(ValueId, ValueId, usize)> {
        let (id, difference) = self.producer(value, "Sub")?;
        let x = difference.input(0)?;
        let (mean, of, axis) = self.mean(difference.input(1)?)?;
        parts.extend([id, mean]);
        (of == x).then_some((value, x, axis))
    }

    /// A mean over all axes from one on, which it keeps: its node, what it is of, and the first axis.
    fn mean(&self, value: ValueId) -> Option<(NodeId, ValueId, usize)> {
        let (id, node) = self.producer(value, "ReduceMean")?;
        let of = node.input(0)?;
        let rank = self.shapes.dims(of)?.len() as i64;
        let from_operand = || self.shapes.ints(node.input(1)?)?.iter().map(vitrim_ir::Expr::as_known).collect();
        let axes: Vec<i64> = node.ints("axes").map(<[i64]>::to_vec).or_else(from_operand)?;
        let mut axes: Vec<i64> = axes.into_iter().map(|axis| if axis < 0 { axis + rank } else { axis }).collect();
        axes.sort_unstable();
        let first = *axes.first()?;
        let last = axes.iter().copied().eq(first..rank);
        (last && first >= 0 && node.int("keepdims") != Some(0)).then_some((id, of, first as usize))
    }

    /// What `value` is a power of, ½ or −½.
    fn squared(&self, value: ValueId, power: f64, parts: &mut Vec<NodeId>) -> Option<ValueId> {
        let (id, _) = self.graph.producer(value)?;
        let node = self.graph.node(id);
        parts.push(id);
        match node.standard_op()? {
            "Sqrt" if power > 0.0 => node.input(0),
            "Pow" if self.is_number(node.input(1), power) => node.input(0),
            "Reciprocal" if power < 0.0 => self.squared(node.input(0)?, -power, parts),
            "Div" if power < 0.0 && self.is_number(node.input(0), 1.0) => self.squared(node.input(1)?, -power, parts),
            _ => None,
        }
    }

    /// `value` as the variance of what is centred, and an epsilon.
    fn variance(
        &self,
        value: ValueId,
        (centred, x, axis): (ValueId, ValueId, usize),
        parts: &mut Vec<NodeId>,
    ) -> Option<Normal> {
        let (id, sum) = self.producer(value, "Add")?;
        let (variance, epsilon) = orders(sum).find_map(|[a, b]| Some((a, self.number(b)?)))?;
        let (mean, square, first) = self.mean(variance)?;
        let (square_id, _) = self.graph.producer(square)?;
        let square = self.graph.node(square_id);
        parts.extend([id, mean, square_id]);
        let once = match square.standard_op()? {
            "Pow" => self.is_number(square.input(1), 2.0),
            "Mul" => square.input(0) == square.input(1),
            _ => false,
        };
        let root = square.input(0)?;
        // Some exporters take the difference twice.
        let same = root == centred || self.centred(root, parts)? == (root, x, axis);
        (once && same && first == axis && epsilon > 0.0).then_some(Normal { x, axis, epsilon })
    }

    /// The unit that an `Erf` or `Tanh` is part of.
    fn unit(&self, id: NodeId, node: &Node) -> Option<Unit> {
        let tanh = node.is("Tanh");
        let root = (2.0 / std::f64::consts::PI).sqrt();
        let wanted = match tanh {
            true => [0.0, root, 0.0, root * 0.044715],
            false => [0.0, std::f64::consts::FRAC_1_SQRT_2, 0.0, 0.0],
        };
        let inner = node.input(0)?;
        let (x, mut parts) = self.candidates(inner).into_iter().find_map(|x| {
            let mut parts = vec![id];
            let same = self.polynomial(inner, x, &mut parts, 0)?.iter().zip(wanted).all(|(&a, b)| close(a, b));
            same.then_some((x, parts))
        })?;
        if self.shapes.dtype(x) != Some(DataType::F32) {
            return None;
        }
        // So far the value is factor · (erf + 1), or before the one is added factor · erf; perhaps times x.
        let (mut value, mut factor, mut raised, mut times_x) = (node.output(0)?, 1.0, false, false);
        while !(raised && times_x && close(factor, 0.5)) {
            let [used] = self.graph.value(value).uses() else { return None };
            let reader = self.graph.node(used.node);
            let slot = used.slot?;
            let other = reader.input(1 - slot.min(1))?;
            let of_other = self.polynomial(other, x, &mut parts, 0)?;
            match (reader.standard_op()?, of_other) {
                ("Mul", [by, 0.0, 0.0, 0.0]) => factor *= by,
                ("Mul", [0.0, by, 0.0, 0.0]) if !times_x => (factor, times_x) = (factor * by, true),
                ("Div", [by, 0.0, 0.0, 0.0]) if slot == 0 => factor /= by,
                ("Add", [one, 0.0, 0.0, 0.0]) if !raised && !times_x && close(one, factor) => raised = true,
                _ => return None,
            }
            value = reader.output(0)?;
            parts.insert(0, used.node);
        }
        self.is_closed(&parts).then_some(Unit { old: value, x, tanh })
    }

    /// What the sums, products and powers that give a value may be of, the nearest first.
    fn candidates(&self, value: ValueId) -> Vec<ValueId> {
        const MOST: usize = 24;
        let (mut found, mut open) = (Vec::new(), VecDeque::from([value]));
        while let Some(value) = open.pop_front().filter(|_| found.len() < MOST) {
            if self.number(value).is_some() || found.contains(&value) {
                continue;
            }
            found.push(value);
            if let Some((id, _)) = self.graph.producer(value) {
                let node = self.graph.node(id);
                if matches!(node.standard_op(), Some("Add" | "Mul" | "Div" | "Pow")) {
                    open.extend(node.operands());
                }
            }
        }
        found
    }

    /// A value as a polynomial of `x`.
    fn polynomial(&self, value: ValueId, x: ValueId, parts: &mut Vec<NodeId>, depth: usize) -> Option<Polynomial> {
        const DEEPEST: usize = 8;
        if value == x {
            return Some([0.0, 1.0, 0.0, 0.0]);
        }
        if let Some(number) = self.number(value) {
            return Some([number, 0.0, 0.0, 0.0]);
        }
        let (id, _) = self.graph.producer(value).filter(|_| depth < DEEPEST)?;
        let node = self.graph.node(id);
        let mut operand = |slot: usize| self.polynomial(node.input(slot)?, x, parts, depth + 1);
        let result = match node.standard_op()? {
            "Add" => {
                let (a, b) = (operand(0)?, operand(1)?);
                std::array::from_fn(|n| a[n] + b[n])
            }
            "Mul" => product(operand(0)?, operand(1)?)?,
            "Div" => {
                let by = self.number(node.input(1)?)?;
                operand(0)?.map(|factor| factor / by)
            }
            "Pow" => {
                let (base, power) = (operand(0)?, self.number(node.input(1)?)?);
                match power {
                    2.0 => product(base, base)?,
                    3.0 => product(base, product(base, base)?)?,
                    _ => return None,
                }
            }
            _ => return None,
        };
        if !parts.contains(&id) {
            parts.push(id);
        }
        Some(result)
    }
}

/// The product of two polynomials, where it has no higher powers.
fn product(a: Polynomial, b: Polynomial) -> Option<Polynomial> {
    let mut product = [0.0; 4];
    for (n, a) in a.into_iter().enumerate().filter(|(_, a)| *a != 0.0) {
        for (m, b) in b.into_iter().enumerate().filter(|(_, b)| *b != 0.0) {
            *product.get_mut(n + m)? += a * b;
        }
    }
    Some(product)
}

/// Whether a constant stands for a number.
fn close(constant: f64, number: f64) -> bool {
    (constant - number).abs() <= DIGITS * number.abs()
}

/// The two operands of a node, in both orders.
fn orders(node: &Node) -> impl Iterator<Item = [ValueId; 2]> + use<> {
    let pair = node.input(0).zip(node.input(1));
    pair.into_iter().flat_map(|(a, b)| [[a, b], [b, a]])
}

#[cfg(test)]
mod tests {
    use vitrim_ir::{DimSpec, GraphBuilder, TensorType};

    use super::*;

    /// A model of one input `x` `[B, 4]`, whose output `write` makes.
    fn model(write: impl Fn(&mut GraphBuilder, ValueId) -> ValueId) -> Model {
        let dims = Some(vec![DimSpec::Named("B".into()), DimSpec::Known(4)]);
        let ty = TensorType { dtype: DataType::F32, dims };
        let mut graph = GraphBuilder::new();
        let x = graph.input("x", Some(&ty));
        // What is a graph output stays: something has to follow.
        let given = write(&mut graph, x);
        let y = graph.op("Neg", "y", &[given], &[]);
        graph.output("y", y, Some(&ty));
        graph.into_model(10, &[("", 17)], vec![])
    }

    fn number(graph: &mut GraphBuilder, value: f32) -> ValueId {
        graph.initializer("number", Tensor::f32(value))
    }

    fn with(graph: &mut GraphBuilder, op: &str, x: ValueId, value: f32) -> ValueId {
        let value = number(graph, value);
        graph.op(op, "part", &[x, value], &[])
    }

    fn op(graph: &mut GraphBuilder, name: &str, inputs: &[ValueId]) -> ValueId {
        graph.op(name, "part", inputs, &[])
    }

    /// The operators of a model with its units in one piece.
    fn raised(model: &Model) -> Vec<String> {
        let (raised, _) = gelus(model).expect("it can be edited");
        raised.graph().nodes().map(|(_, node)| node.op.to_string()).collect()
    }

    #[test]
    fn tanh_units_are_found_however_they_are_written() {
        let root = 0.797_884_6;
        let cubes: [fn(&mut GraphBuilder, ValueId) -> ValueId; 2] = [
            |graph, x| with(graph, "Pow", x, 3.0),
            |graph, x| {
                let square = op(graph, "Mul", &[x, x]);
                op(graph, "Mul", &[square, x])
            },
        ];
        for (cube, half_first) in cubes.into_iter().flat_map(|cube| [(cube, false), (cube, true)]) {
            let found = raised(&model(|graph, x| {
                let cube = cube(graph, x);
                let bent = with(graph, "Mul", cube, 0.044_715);
                let sum = op(graph, "Add", &[x, bent]);
                let inner = with(graph, "Mul", sum, root);
                let tanh = op(graph, "Tanh", &[inner]);
                let raised = with(graph, "Add", tanh, 1.0);
                if half_first {
                    let half = with(graph, "Mul", x, 0.5);
                    op(graph, "Mul", &[half, raised])
                } else {
                    let product = op(graph, "Mul", &[raised, x]);
                    with(graph, "Mul", product, 0.5)
                }
            }));
            assert_eq!(found, ["ai.vitrim.TanhGelu", "Neg"], "{half_first}");
        }
    }

    #[test]
    fn what_is_no_unit_stays() {
        let unit = |root: f32, one: f32, half: f32, read_twice: bool| {
            model(move |graph, x| {
                let scaled = with(graph, "Div", x, root);
                let erf = op(graph, "Erf", &[scaled]);
                let raised = with(graph, "Add", erf, one);
                let product = op(graph, "Mul", &[x, raised]);
                let y = with(graph, "Mul", product, half);
                if read_twice { op(graph, "Add", &[y, erf]) } else { y }
            })
        };
        let root = std::f32::consts::SQRT_2;
        assert_eq!(raised(&unit(root, 1.0, 0.5, false)), ["ai.vitrim.Gelu", "Neg"]);
        for model in [
            unit(root * 1.001, 1.0, 0.5, false),
            unit(root, 1.01, 0.5, false),
            unit(root, 1.0, 0.51, false),
            unit(root, 1.0, 0.5, true),
        ] {
            assert!(raised(&model).contains(&"Erf".to_owned()));
        }
    }

    #[test]
    fn scales_of_a_product_become_one_on_its_left() {
        let product = |read_twice: bool, matrix: bool| {
            model(move |graph, x| {
                // A number that takes some computing, as of an extent.
                let four = graph.initializer("four", Tensor::f32s(&[1], &[4.0]));
                let root = op(graph, "Sqrt", &[four]);
                let left = op(graph, "Mul", &[x, root]);
                let keys = graph.op("Transpose", "keys", &[x], &[("perm", Attribute::Ints(vec![1, 0]))]);
                let by = match matrix {
                    true => graph.initializer("matrix", Tensor::f32s(&[1, 1, 1], &[3.0])),
                    false => number(graph, 3.0),
                };
                let right = op(graph, "Mul", &[by, keys]);
                let scores = op(graph, "MatMul", &[left, right]);
                match read_twice {
                    true => op(graph, "MatMul", &[scores, left]),
                    false => scores,
                }
            })
        };
        let scaled = |model: &Model| {
            let scaled = scales(model).expect("it can be edited");
            let shapes = Shapes::infer(&scaled);
            let graph = scaled.graph();
            let ops: Vec<String> = graph.nodes().map(|(_, node)| node.op.to_string()).collect();
            let by =
                graph.nodes().find(|(_, node)| node.is("Mul")).and_then(|(_, node)| shapes.uniform(node.input(1)?));
            (ops.join(" "), by)
        };
        assert_eq!(scaled(&product(false, false)), ("Transpose Mul MatMul Neg".into(), Some(6.0)));
        // What something else reads stays, and is scaled by what was on the right.
        let (ops, by) = scaled(&product(true, false));
        assert_eq!((ops.matches("Mul").count(), by), (2 + 2, Some(2.0)), "{ops}");
        // A number with more axes makes another product.
        let (ops, _) = scaled(&product(false, true));
        assert_eq!(ops.matches(" Mul").count(), 2, "{ops}");
    }
}

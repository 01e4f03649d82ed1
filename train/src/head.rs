//! A head for other classes: the last product before the output that is judged, with a matrix that begins anew.
//!
//! The output is followed back to the product (or products, whose sum or mean it may be) through what keeps classes apart:
//! biases, other shapes, scalars, a softmax. Matrices are drawn from a normal distribution of standard deviation 0.02,
//! redrawn beyond two of them, as Vision Transformers begin; biases are zero.

use std::collections::HashSet;

use vitrim_ir::{DataType, Def, DimSpec, Graph, Model, Node, NodeId, Patch, Shapes, Tensor, ValueId};
use vitrim_passes::Refusal;

use crate::internal;
use crate::parameters::held;

/// Standard deviation of matrices that begin anew.
const DEVIATION: f64 = 0.02;

/// The classes that a new head tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classes {
    /// How many.
    pub count: i64,
    /// What the matrix is drawn from.
    pub seed: u64,
}

/// The model with a new head for an output (the first where none is named). Its names stay.
///
/// # Errors
///
/// [`Refusal::Request`] where there is no such output, or no product whose columns are its classes and nothing else's.
pub fn replace(model: &Model, output: Option<&str>, classes: Classes) -> Result<Model, Refusal> {
    let graph = model.graph();
    let is_it = |&&value: &&ValueId| output.is_none_or(|name| graph.value(value).name() == name);
    let Some(&output) = graph.outputs().iter().find(is_it) else {
        return Err(Refusal::Request(match output {
            Some(name) => format!("the model has no output '{name}'"),
            None => "the model has no output".into(),
        }));
    };
    let name = graph.value(output).name();
    let refuse =
        |reason: String| Refusal::Request(format!("the head of the output '{name}' has no new classes: {reason}"));
    if classes.count < 1 {
        return Err(refuse("there has to be one".into()));
    }
    let shapes = Shapes::infer(model);
    let last = |value| shapes.dims(value)?.last()?.as_known();
    let before = last(output).ok_or_else(|| refuse("how many it has is unknown".into()))?;
    let mut head = Head { graph, shapes: &shapes, before, ..Head::new(graph, &shapes) };
    head.follow(output).map_err(refuse)?;

    let mut patch = Patch::new(model, "head");
    let mut random = Random(classes.seed);
    for &(matrix, axis) in &head.matrices {
        let mut dims: Vec<usize> =
            held(graph, matrix).iter().flat_map(|held| held.dims()).map(|&d| d as usize).collect();
        dims[axis] = classes.count as usize;
        let elements: Vec<f64> = (0..dims.iter().product()).map(|_| DEVIATION * random.normal()).collect();
        patch.refill(matrix, Tensor::floats(DataType::F32, &dims, &elements));
    }
    for &(node, slot, bias) in &head.biases {
        let mut dims: Vec<usize> = held(graph, bias).iter().flat_map(|held| held.dims()).map(|&d| d as usize).collect();
        dims.iter_mut().next_back().into_iter().for_each(|last| *last = classes.count as usize);
        let zeros = Tensor::f32s(&dims, &vec![0.0; dims.iter().product()]);
        match graph.value(bias).uses() {
            [_] => patch.refill(bias, zeros),
            // It is the zeros of others too.
            _ => {
                let own = patch.constant(graph.value(bias).name(), zeros);
                patch.rewire(node, slot, own);
            }
        }
    }
    for (node, mut target) in head.reshapes {
        target.iter_mut().next_back().into_iter().for_each(|last| *last = classes.count);
        let target = patch.constant("head/shape", Tensor::shape(&target));
        patch.rewire(node, 1, target);
    }
    for value in head.values {
        match graph.value(value).ty() {
            Some(mut ty) if graph.outputs().contains(&value) => {
                if let Some(last) = ty.dims.as_mut().and_then(|dims| dims.last_mut()) {
                    *last = DimSpec::Known(classes.count);
                    patch.declare(value, &ty);
                }
            }
            _ => patch.forget_type(value),
        }
    }
    let name = name.to_owned();
    let (model, _) = patch.apply(model).map_err(internal)?;
    let shapes = Shapes::infer(&model);
    let now = model.graph().find_value(&name).and_then(|output| shapes.dims(output)?.last()?.as_known());
    match now {
        Some(count) if count == classes.count => Ok(model),
        _ => Err(Refusal::Request(format!("the output '{name}' does not follow the classes of its head"))),
    }
}

/// A head on the way back from its output.
struct Head<'g> {
    graph: &'g Graph,
    shapes: &'g Shapes,
    /// The classes that it tells by now.
    before: i64,
    path: HashSet<NodeId>,
    /// The matrices, and the axis of each that classes lie on.
    matrices: Vec<(ValueId, usize)>,
    /// The operands that are biases.
    biases: Vec<(NodeId, usize, ValueId)>,
    /// Where classes are stated as an extent, and the extents.
    reshapes: Vec<(NodeId, Vec<i64>)>,
    /// What has classes for its last axis.
    values: Vec<ValueId>,
}

impl<'g> Head<'g> {
    fn new(graph: &'g Graph, shapes: &'g Shapes) -> Self {
        Self {
            graph,
            shapes,
            before: 0,
            path: HashSet::new(),
            matrices: Vec::new(),
            biases: Vec::new(),
            reshapes: Vec::new(),
            values: Vec::new(),
        }
    }

    fn follow(&mut self, value: ValueId) -> Result<(), String> {
        let (graph, name) = (self.graph, self.graph.value(value).name());
        let Some((id, _)) = graph.producer(value) else { return Err(format!("'{name}' is computed by no node")) };
        let node = graph.node(id);
        let what = graph.describe(id);
        if self.shapes.dims(value).and_then(|dims| dims.last()?.as_known()) != Some(self.before) {
            return Err(format!("the last axis of '{name}' has other extents"));
        }
        if let Some(other) = graph.value(value).uses().iter().find(|used| !self.path.contains(&used.node)) {
            return Err(format!("'{name}' is read by {} too", graph.describe(other.node)));
        }
        if !self.path.is_empty() && graph.output_slots(value).next().is_some() {
            return Err(format!("'{name}' is an output too"));
        }
        self.path.insert(id);
        self.values.push(value);
        let input = |slot| node.input(slot).ok_or_else(|| format!("{what} has no operand {slot}"));
        let rank = |value| self.shapes.dims(value).map_or(0, <[_]>::len) as i64;
        match node.standard_op() {
            Some("Identity" | "Cast" | "Dropout" | "Sigmoid" | "Squeeze" | "Unsqueeze" | "Flatten") => {
                self.follow(input(0)?)
            }
            Some("Softmax" | "LogSoftmax") if [-1, rank(value) - 1].contains(&node.int("axis").unwrap_or(-1)) => {
                self.follow(input(0)?)
            }
            Some("Gather") => {
                let axis = node.int("axis").unwrap_or(0);
                if [-1, rank(input(0)?) - 1].contains(&axis) {
                    return Err(format!("{what} picks classes"));
                }
                self.follow(input(0)?)
            }
            Some("Reshape") => {
                let target = graph.constant(input(1)?).and_then(|target| target.to_i64s());
                let target = target.ok_or_else(|| format!("the shape of {what} is computed"))?;
                if target.last() == Some(&self.before) {
                    self.reshapes.push((id, target));
                }
                self.follow(input(0)?)
            }
            Some("Mul" | "Div" | "Add" | "Sub" | "Sum") => {
                let is_sum = !(node.is("Mul") || node.is("Div"));
                let mut terms = Vec::new();
                for slot in 0..node.inputs.len() {
                    let operand = input(slot)?;
                    match held(graph, operand) {
                        Some(tensor) if tensor.len() == 1 && self.before > 1 => {}
                        Some(_) if is_sum => self.bias(id, slot, operand)?,
                        _ => terms.push(operand),
                    }
                }
                match terms.len() {
                    1 => {}
                    2.. if is_sum => {}
                    _ => return Err(format!("{what} is neither a bias nor a sum of heads")),
                }
                terms.into_iter().try_for_each(|term| self.follow(term))
            }
            Some("MatMul") => self.matrix(id, input(1)?, 1),
            Some("Gemm") => {
                let axis = if node.int("transB") == Some(1) { 0 } else { 1 };
                if let Some(bias) = node.input(2) {
                    self.bias(id, 2, bias)?;
                }
                self.matrix(id, input(1)?, axis)
            }
            _ => Err(format!("{what} is no product with a matrix")),
        }
    }

    fn matrix(&mut self, product: NodeId, matrix: ValueId, axis: usize) -> Result<(), String> {
        let graph = self.graph;
        let (what, name) = (graph.describe(product), graph.value(matrix).name());
        if let Some(tensor) = held(graph, matrix) {
            if tensor.dtype() != DataType::F32 || tensor.dims().len() != 2 || tensor.dims()[axis] != self.before {
                return Err(format!(
                    "the matrix '{name}' of {what} is not one of float32 with a column for each class"
                ));
            }
            if graph.value(matrix).uses().len() > 1 || matches!(graph.value(matrix).def(), Def::Captured(_)) {
                return Err(format!("the matrix '{name}' of {what} is read elsewhere too"));
            }
            self.matrices.push((matrix, axis));
            return Ok(());
        }
        let transposed = |node: &&Node| node.is("Transpose") && node.ints("perm").is_none_or(|perm| perm == [1, 0]);
        let producer = graph.producer(matrix).map(|(id, _)| graph.node(id));
        match producer.filter(transposed).and_then(|node| node.input(0)) {
            Some(from) if graph.value(matrix).uses().len() == 1 => {
                self.values.push(matrix);
                self.matrix(product, from, 1 - axis)
            }
            _ => Err(format!("{what} has no constant for a matrix")),
        }
    }

    fn bias(&mut self, node: NodeId, slot: usize, bias: ValueId) -> Result<(), String> {
        let (what, name) = (self.graph.describe(node), self.graph.value(bias).name());
        let tensor = held(self.graph, bias).ok_or_else(|| format!("the bias '{name}' of {what} is no constant"))?;
        let is_one = tensor.len() as i64 == self.before && tensor.dims().last() == Some(&self.before);
        if tensor.dtype() != DataType::F32 || !is_one {
            return Err(format!("the bias '{name}' of {what} is not one of float32 with an entry for each class"));
        }
        self.biases.push((node, slot, bias));
        Ok(())
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    /// From 0 to below 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal, within two standard deviations (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        loop {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            let normal = radius * (std::f64::consts::TAU * self.uniform()).cos();
            if normal.abs() <= 2.0 {
                return normal;
            }
        }
    }
}

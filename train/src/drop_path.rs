//! Stochastic depth: in training every residual branch is left out at random, image by image.
//!
//! Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016 (arXiv 1603.09382), section 3. The rate grows linearly
//! from none in the first block to the whole in the last; what stays is divided by its probability, so that the model
//! that is evaluated needs no change.

use std::collections::{HashMap, HashSet};

use vitrim_autodiff::{Emitter, Int, Undefined};
use vitrim_ir::{Attribute, DataType, Graph, Model, NodeId, Patch, Shapes, Tensor, ValueId};
use vitrim_passes::Refusal;

use crate::internal;

/// How often branches are left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropPath {
    /// Probability in the last block, from 0 to below 1.
    pub rate: f64,
    /// Seed of the draws. ONNX Runtime begins with it in each session anew.
    pub seed: u64,
}

/// Branches of each block: attention and MLP.
const BRANCHES: usize = 2;

impl DropPath {
    /// The model with its branches left out at random. `matrices` names the parameters that products are made with.
    ///
    /// # Errors
    ///
    /// [`Refusal::Request`] where there are no residual branches.
    pub fn insert(self, model: &Model, matrices: &HashSet<&str>) -> Result<Model, Refusal> {
        let (graph, shapes) = (model.graph(), Shapes::infer(model));
        let branches = branches(graph, &shapes, matrices);
        if branches.is_empty() {
            return Err(Refusal::Request(
                "there are no residual branches that stochastic depth could leave out".into(),
            ));
        }
        let last = (branches.len() - 1) / BRANCHES;
        let mut patch = Patch::new(model, "drop_path");
        for (at, &(node, slot)) in branches.iter().enumerate() {
            let rate = self.rate * (at / BRANCHES) as f64 / last.max(1) as f64;
            let Some(branch) = graph.node(node).input(slot).filter(|_| rate > 0.0) else { continue };
            let mut emit = Emitter::new(model, &shapes, &mut patch);
            emit.name_after(&format!("drop_path/{}", graph.value(branch).name()));
            let kept = self.draw(&mut emit, branch, 1.0 - rate, at).map_err(|Undefined(reason)| internal(reason))?;
            patch.rewire(node, slot, kept);
        }
        let (model, _) = patch.apply(model).map_err(internal)?;
        model.verify().map_err(internal)?;
        Ok(model)
    }

    /// The branch of each image with probability `keep`, divided by that; else zeros.
    fn draw(self, emit: &mut Emitter, branch: ValueId, keep: f64, at: usize) -> Result<ValueId, Undefined> {
        let batch = emit.extent(branch, 0)?;
        let ones = vec![Int::Known(1); emit.rank(branch)? - 1];
        let shape = emit.list(&[vec![batch], ones].concat());
        let like =
            emit.op_with("ConstantOfShape", &[shape], &[("value", Attribute::Tensor(Tensor::f32s(&[1], &[0.0])))]);
        // Draws of their own for each branch: seeds that differ.
        let seed = ("seed", Attribute::Float(self.seed.wrapping_add(at as u64) as f32));
        let drawn = emit.op_with("RandomUniformLike", &[like], &[("dtype", Attribute::Int(1)), seed]);
        let keep_number = emit.number(DataType::F32, keep);
        let lifted = emit.op("Add", &[drawn, keep_number]);
        let stays = emit.op("Floor", &[lifted]);
        let scale = emit.number(DataType::F32, 1.0 / keep);
        let factor = emit.op("Mul", &[stays, scale]);
        Ok(emit.op("Mul", &[branch, factor]))
    }
}

/// Where residual branches join the stream: sums of two tensors of the same extents, of which one has passed more
/// products with parameters than the other. That is the branch, by node and operand slot, in order.
fn branches(graph: &Graph, shapes: &Shapes, matrices: &HashSet<&str>) -> Vec<(NodeId, usize)> {
    // Products that a value has passed, on the longest way.
    let mut passed: HashMap<ValueId, usize> = HashMap::new();
    let mut found = Vec::new();
    for (id, node) in graph.nodes() {
        let of = |value: ValueId| passed.get(&value).copied();
        if let (true, Some(a), Some(b)) = (node.is("Add"), node.input(0), node.input(1)) {
            let alike = shapes.dims(a).is_some_and(|dims| dims.len() >= 3 && shapes.dims(b) == Some(dims));
            let data = shapes.is_data(a) && shapes.is_data(b);
            match (of(a), of(b)) {
                (Some(left), Some(right)) if alike && data && left != right => {
                    found.push((id, usize::from(right > left)));
                }
                _ => {}
            }
        }
        let is_matrix = |value: ValueId| matrices.contains(graph.value(value).name());
        let product = usize::from(node.operands().any(is_matrix));
        let most = node.operands().filter_map(of).max();
        if let Some(count) = most.or((product > 0).then_some(0)) {
            passed.extend(node.results().map(|result| (result, count + product)));
        }
    }
    found
}

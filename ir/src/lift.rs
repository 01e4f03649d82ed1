//! Lifting of models from old versions of the standard operator set to [`LIFTED`], without a change of meaning.
//!
//! Every operator of the set has a rule ([`rule`]): it means the same in all versions from [`OLDEST`] to [`LIFTED`], or
//! its nodes are converted, or the model is refused. Most conversions turn attributes into operands that are constants.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use crate::graph::{Attribute, CONSTANTS_APART, Def, Graph, Names, Node, OpType, Value, legible};
use crate::onnx::ValueInfo;
use crate::{DataType, Model, NodeId, Shapes, Tensor, ValueId};

/// The oldest version of the standard operator set that models can be lifted from.
const OLDEST: i64 = 9;
/// The version of the standard operator set that older models are lifted to.
pub const LIFTED: i64 = 13;
/// The first version of the format in which models name the operator sets that they use.
const OPSETS_SINCE: i64 = 3;

/// Why a model cannot be lifted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LiftError {
    #[error(
        "the model uses version {version} of the standard operator set, which is too old to be converted; export it \
         again with version {OLDEST} or newer"
    )]
    TooOld { version: i64 },
    #[error("{node} cannot be converted from opset {from} to {LIFTED}: {reason}")]
    Node { node: String, from: i64, reason: String },
    #[error("the model's {what} cannot be converted from opset {from} to {LIFTED}")]
    Part { what: String, from: i64 },
}

/// Brings a model that imports a version from 9 to 12 of the standard operator set to version [`LIFTED`], nested graphs
/// included; gives whether it did. Newer models stay as they are; one without standard operators imports [`LIFTED`].
/// An error leaves the model as it was.
pub fn lift_opset(model: &mut Model) -> Result<bool, LiftError> {
    if model.opsets.get("").is_none() && model.ir_version() >= OPSETS_SINCE {
        // It has no standard operators, so their version is free.
        model.opsets.import("", LIFTED);
    }
    let from = model.opsets.standard();
    if from >= LIFTED {
        return Ok(false);
    }
    if from < OLDEST {
        return Err(LiftError::TooOld { version: from });
    }
    let part = |what: String| Err(LiftError::Part { what, from });
    if !model.rest.training_info.is_empty() {
        return part("training information".into());
    }
    if let Some(function) = model.functions.iter().find(|function| function.opsets.standard() < LIFTED) {
        return part(format!("local function {}", legible(&function.key.to_string(), NAME)));
    }
    let shapes = Shapes::infer(model);
    let facts = facts(&model.graph, |id| Fact {
        dims: shapes.dims(id).map(|dims| dims.iter().map(|dim| dim.as_known()).collect()),
        dtype: shapes.dtype(id),
    });
    let mut graph = model.graph.clone();
    let ir_version = model.ir_version();
    Lifter { from, ir_version, names: Names::of(&graph) }.graph(&mut graph, &facts, false)?;
    graph.revision += 1;
    model.graph = graph;
    model.opsets.set_standard(LIFTED);
    Ok(true)
}

/// The version of the standard operator set that [`raise_opset`] goes to: the first with `LayerNormalization`.
pub const RAISED: i64 = 17;

/// Lets a model that imports a version from [`LIFTED`] on import version [`RAISED`], if it is older; gives whether that is
/// the version then, or a newer one. Nothing else changes: operators of version 13 mean the same in 17, where element
/// types were added, attributes whose default is the old meaning, and operators; but for `BatchNormalization` that trains and
/// `RoiAlign`, with which a model stays as it is. So does one with local functions, which import a version of their own.
pub fn raise_opset(model: &mut Model) -> bool {
    let from = model.opsets.standard();
    if from >= RAISED {
        return true;
    }
    if from < LIFTED || !model.functions.is_empty() || means_other(&model.graph) {
        return false;
    }
    model.opsets.set_standard(RAISED);
    true
}

/// Whether a node, nested ones included, may mean something else in version [`RAISED`] than in [`LIFTED`]: `BatchNormalization`
/// with the statistics of training among its results, which 14 has in another way, and `RoiAlign`, whose coordinates 16 takes
/// for others by default.
fn means_other(graph: &Graph) -> bool {
    graph.nodes().any(|(_, node)| {
        let own = match node.standard_op() {
            Some("BatchNormalization") => node.outputs.len() > 1,
            Some("RoiAlign") => node.attribute("coordinate_transformation_mode").is_none(),
            _ => false,
        };
        own || node.subgraphs().any(means_other)
    })
}

impl Model {
    /// Raises the version of the format to at least `version`: the specification has local functions from 8 on.
    ///
    /// In files of version 3 every constant is an input of the graph as well, whose value runtimes take as fixed; in
    /// later ones such an input is a default that callers may replace. To keep the meaning, constants stop being inputs
    /// where that border is crossed; gives their number.
    pub fn require_ir_version(&mut self, version: i64) -> usize {
        let has = self.ir_version();
        if has >= version {
            return 0;
        }
        self.rest.ir_version = Some(version);
        let graph = &mut self.graph;
        let before = graph.inputs.len();
        if has < CONSTANTS_APART && version >= CONSTANTS_APART {
            let values = &graph.values;
            let fed = |id: &ValueId| !matches!(values[id.slot()], Some(Value { def: Def::Initializer(_), .. }));
            graph.inputs.retain(fed);
            graph.revision += 1;
        }
        before - graph.inputs.len()
    }
}

/// Characters of a name from the file that a message has at most.
const NAME: usize = 200;

/// How an operator gets from an old version to [`LIFTED`].
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// It means the same in both: only element types were added, or attributes whose default is the old meaning.
    Same,
    /// Its nodes are looked at one by one.
    Convert(fn(&Site<'_>) -> Result<Edit, String>),
    /// It does not exist in the old version.
    Unknown,
}

/// Operators that are as old as [`OLDEST`] and mean the same in every version up to [`LIFTED`].
#[rustfmt::skip]
const SAME: &[&str] = &[
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "Ceil", "Compress", "Concat", "Constant", "ConstantOfShape", "Conv", "Cos", "Cosh",
    "DepthToSpace", "Div", "Elu", "Equal", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "Gemm",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "HardSigmoid", "Identity", "If",
    "InstanceNormalization", "IsNaN", "LRN", "LSTM", "LeakyRelu", "Less", "Log", "Loop", "LpNormalization", "LpPool",
    "MatMul", "Max", "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "Min", "Mul",
    "Multinomial", "Neg", "NonZero", "Not", "Or", "PRelu", "Pow", "RNN", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare", "Relu", "Reshape", "Scan", "Selu",
    "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Softplus", "Softsign", "SpaceToDepth", "Sqrt",
    "Sub", "Sum", "Tan", "Tanh", "TfIdfVectorizer", "Tile", "Transpose", "Where", "Xor",
];

/// Operators that came later, by version, and mean the same from then on.
#[rustfmt::skip]
const SAME_SINCE: &[(i64, &[&str])] = &[
    // Not of the specification: ONNX Runtime has these in the standard set, and its optimiser writes them.
    (OLDEST, &["LayerNormalization", "SimplifiedLayerNormalization"]),
    (10, &[
        "ConvInteger", "IsInf", "MatMulInteger", "Mod", "NonMaxSuppression", "QLinearConv", "QLinearMatMul",
        "ReverseSequence", "RoiAlign", "StringNormalizer", "ThresholdedRelu",
    ]),
    (11, &[
        "BitShift", "ConcatFromSequence", "CumSum", "Det", "DynamicQuantizeLinear", "GatherElements", "GatherND",
        "Range", "Round", "ScatterElements", "ScatterND", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
        "SequenceErase", "SequenceInsert", "SequenceLength", "SplitToSequence", "Unique",
    ]),
    (12, &["Celu", "Einsum", "GreaterOrEqual", "LessOrEqual", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"]),
];

/// The rule for the standard operator `op` of version `from`.
fn rule(op: &str, from: i64) -> Rule {
    /// Converts nodes of versions before `changed`.
    fn before(changed: i64, from: i64, convert: fn(&Site<'_>) -> Result<Edit, String>) -> Rule {
        if from < changed { Rule::Convert(convert) } else { Rule::Same }
    }
    match op {
        "Slice" => before(10, from, slice),
        "TopK" => before(10, from, top_k),
        "Upsample" if from < 10 => Rule::Convert(upsample),
        "Resize" if from == 10 => Rule::Convert(upsample),
        "Resize" if from > 10 => Rule::Convert(resize),
        "Clip" => before(11, from, clip),
        "ConvTranspose" => before(11, from, conv_transpose),
        "OneHot" => before(11, from, one_hot),
        "Pad" => before(11, from, pad),
        "Scatter" if from < 11 => Rule::Convert(|_| Ok(Edit { op: Some("ScatterElements"), ..Edit::default() })),
        "Dropout" => before(12, from, dropout),
        "DequantizeLinear" | "QuantizeLinear" if from >= 10 => Rule::Convert(quantize),
        "Erf" => Rule::Convert(erf),
        "Hardmax" | "LogSoftmax" | "Softmax" => Rule::Convert(softmax),
        "ReduceSum" => Rule::Convert(|site| list(site, "axes", Empty::LeftOut)),
        "Split" => Rule::Convert(|site| list(site, "split", Empty::Refused)),
        "Squeeze" => Rule::Convert(|site| list(site, "axes", Empty::Refused)),
        "Unsqueeze" => Rule::Convert(|site| list(site, "axes", Empty::Kept)),
        _ if SAME.binary_search(&op).is_ok() => Rule::Same,
        _ => {
            let known = SAME_SINCE.iter().any(|(since, names)| *since <= from && names.contains(&op));
            if known { Rule::Same } else { Rule::Unknown }
        }
    }
}

/// What is known of a value.
#[derive(Clone, Debug, Default)]
struct Fact {
    /// Extents, each if known.
    dims: Option<Vec<Option<i64>>>,
    dtype: Option<DataType>,
}

/// What is known of each value of a graph, by slot.
fn facts(graph: &Graph, known: impl Fn(ValueId) -> Fact) -> Vec<Fact> {
    let mut facts = vec![Fact::default(); graph.values.len()];
    graph.values().for_each(|(id, _)| facts[id.slot()] = known(id));
    facts
}

/// What is known of the values of a nested graph: what the file declares, and what is known of outer values.
fn nested_facts(graph: &Graph, outer: &[Fact]) -> Vec<Fact> {
    facts(graph, |id| {
        let value = graph.value(id);
        if let Def::Captured(target) = value.def {
            return outer.get(target.slot()).cloned().unwrap_or_default();
        }
        let Some(ty) = value.ty() else { return Fact::default() };
        let dims = ty.dims.map(|dims| {
            let known = |dim| if let crate::DimSpec::Known(n) = dim { Some(n) } else { None };
            dims.into_iter().map(known).collect()
        });
        Fact { dims, dtype: Some(ty.dtype) }
    })
}

/// A node that is to be converted, and where it is.
struct Site<'g> {
    graph: &'g Graph,
    node: &'g Node,
    facts: &'g [Fact],
}

impl Site<'_> {
    /// What is known of operand `slot`.
    fn fact(&self, slot: usize) -> Fact {
        self.node.input(slot).and_then(|id| self.facts.get(id.slot())).cloned().unwrap_or_default()
    }

    /// Operand `slot`, if it is a constant.
    fn constant(&self, slot: usize) -> Option<Tensor> {
        self.graph.constant(self.node.input(slot)?).map(|tensor| tensor.into_owned())
    }

    /// Whether operand `slot` is known to have no elements.
    fn is_empty(&self, slot: usize) -> bool {
        self.fact(slot).dims.is_some_and(|dims| dims.contains(&Some(0)))
    }

    /// The integers of an attribute, if it is there.
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, String> {
        match self.node.attribute(name) {
            None => Ok(None),
            Some(Attribute::Ints(list)) => Ok(Some(list.clone())),
            Some(_) => Err(format!("its attribute '{name}' is not a list of integers")),
        }
    }

    /// The number of an attribute, if it is there.
    fn float(&self, name: &str) -> Result<Option<f32>, String> {
        match self.node.attribute(name) {
            None => Ok(None),
            Some(Attribute::Float(x)) => Ok(Some(*x)),
            Some(_) => Err(format!("its attribute '{name}' is not a number")),
        }
    }

    /// The text of an attribute, or its default.
    fn text<'s>(&'s self, name: &str, default: &'s str) -> Result<&'s str, String> {
        match self.node.attribute(name) {
            None => Ok(default),
            Some(_) => self.node.string(name).ok_or_else(|| format!("its attribute '{name}' is not text")),
        }
    }

    /// Refuses a node with more operands than its version knows.
    fn operands(&self, most: usize) -> Result<(), String> {
        let has = self.node.inputs.len();
        if has <= most { Ok(()) } else { Err(format!("it has {has} operands, and its version takes {most}")) }
    }

    /// A number in the element type of operand 0.
    fn number(&self, x: f32) -> Result<Tensor, String> {
        match self.fact(0).dtype {
            Some(dtype) if dtype.is_float() => Ok(Tensor::floats(dtype, &[], &[x.into()])),
            Some(dtype) => Err(format!("its operand is of type {dtype}, not of floating-point numbers")),
            None => Err("the element type of its operand is not known".into()),
        }
    }
}

/// What becomes of a node.
#[derive(Debug, Default)]
struct Edit {
    /// The operator that takes its place.
    op: Option<&'static str>,
    /// Attributes that go.
    remove: &'static [&'static str],
    /// Attributes that it has from now on.
    set: Vec<(&'static str, Attribute)>,
    /// Operands that it has from now on, after those at lower places; what is not listed stays.
    operands: Vec<(usize, Operand)>,
    /// Results from this one on go: nothing reads them.
    results: Option<usize>,
}

/// An operand of a converted node.
#[derive(Debug)]
enum Operand {
    /// A constant, and what to call it.
    New(&'static str, Tensor),
    /// The operand that was at this place.
    Old(usize),
    /// None.
    LeftOut,
}

/// What an empty list as attribute means as operand.
#[derive(Clone, Copy)]
enum Empty {
    /// The same as no operand.
    LeftOut,
    /// An empty list.
    Kept,
    /// Runtimes disagree.
    Refused,
}

/// `Slice` 9: the bounds are attributes.
fn slice(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(1)?;
    let starts = site.ints("starts")?.ok_or("it has no attribute 'starts'")?;
    let ends = site.ints("ends")?.ok_or("it has no attribute 'ends'")?;
    let axes = site.ints("axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    if starts.len() != ends.len() || starts.len() != axes.len() {
        return Err("its starts, ends and axes are not as many".into());
    }
    let new = |name, list: &[i64]| Operand::New(name, Tensor::shape(list));
    let operands = vec![(1, new("starts", &starts)), (2, new("ends", &ends)), (3, new("axes", &axes))];
    Ok(Edit { remove: &["starts", "ends", "axes"], operands, ..Edit::default() })
}

/// `TopK` 9: the count is an attribute.
fn top_k(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(1)?;
    let k = site.node.int("k").ok_or("it has no attribute 'k'")?;
    Ok(Edit { remove: &["k"], operands: vec![(1, Operand::New("k", Tensor::shape(&[k])))], ..Edit::default() })
}

/// `Upsample` 9 and `Resize` 10: `x / scale` is the only way to map coordinates, and which element is nearest is agreed
/// on only where the result is not smaller.
fn upsample(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(2)?;
    let mode = site.text("mode", "nearest")?;
    if !matches!(mode, "nearest" | "linear") {
        return Err(format!("its mode '{}' has no counterpart", legible(mode, NAME)));
    }
    let scales = site.constant(1).ok_or("its scales are not constant")?;
    let scales = scales.to_f64s().ok_or("its scales are not numbers")?;
    if !scales.iter().all(|scale| (1.0..f64::INFINITY).contains(scale)) {
        return Err("it makes its operand smaller, which runtimes do in different ways".into());
    }
    let text = |text: &'static str| Attribute::String(text.as_bytes().into());
    let set = vec![("coordinate_transformation_mode", text("asymmetric")), ("nearest_mode", text("floor"))];
    let operands = vec![(1, Operand::LeftOut), (2, Operand::Old(1))];
    Ok(Edit { op: Some("Resize"), set, operands, ..Edit::default() })
}

/// `Resize` 11: scales and the region are empty where they are not meant.
fn resize(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(4)?;
    if site.text("coordinate_transformation_mode", "half_pixel")? == "tf_half_pixel_for_nn" {
        return Err("its coordinate_transformation_mode 'tf_half_pixel_for_nn' has no counterpart".into());
    }
    let given = |slot| site.node.input(slot).is_some();
    if given(2) && given(3) && !site.is_empty(2) {
        return Err("it has both scales and sizes".into());
    }
    let empty = [1, 2].into_iter().filter(|&slot| given(slot) && site.is_empty(slot));
    Ok(Edit { operands: empty.map(|slot| (slot, Operand::LeftOut)).collect(), ..Edit::default() })
}

/// `Clip` before 11: the bounds are attributes, by default the ends of what the type can hold.
fn clip(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(1)?;
    let mut operands = Vec::new();
    for (slot, name, default) in [(1, "min", f32::MIN), (2, "max", f32::MAX)] {
        let wide = site.fact(0).dtype == Some(DataType::F64);
        if let Some(bound) = site.float(name)?.filter(|&bound| bound != default || wide) {
            operands.push((slot, Operand::New(name, site.number(bound)?)));
        }
    }
    Ok(Edit { remove: &["min", "max"], operands, ..Edit::default() })
}

/// `ConvTranspose` before 11: an odd number of padding elements is split the other way round.
fn conv_transpose(site: &Site<'_>) -> Result<Edit, String> {
    match site.text("auto_pad", "NOTSET")? {
        "NOTSET" | "VALID" => Ok(Edit::default()),
        _ => Err("its automatic padding was defined differently".into()),
    }
}

/// `OneHot` before 11: negative indices count as too large.
fn one_hot(site: &Site<'_>) -> Result<Edit, String> {
    let positive = site.constant(0).is_some_and(|indices| match (indices.to_i64s(), indices.to_f64s()) {
        (Some(integers), _) => integers.iter().all(|&x| x >= 0),
        (_, Some(floats)) => floats.iter().all(|&x| x >= 0.0),
        _ => false,
    });
    if positive {
        Ok(Edit::default())
    } else {
        Err("its indices may be negative, which was defined differently".into())
    }
}

/// `Pad` before 11: the amounts and the value are attributes.
fn pad(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(1)?;
    let pads = site.ints("pads")?.ok_or("it has no attribute 'pads'")?;
    let mut operands = vec![(1, Operand::New("pads", Tensor::shape(&pads)))];
    let value = site.float("value")?.filter(|value| value.to_bits() != 0);
    if let (Some(value), "constant") = (value, site.text("mode", "constant")?) {
        operands.push((2, Operand::New("value", site.number(value)?)));
    }
    Ok(Edit { remove: &["pads", "value"], operands, ..Edit::default() })
}

/// `Dropout` before 12: the ratio is an attribute, and what the mask says in inference is not agreed on.
fn dropout(site: &Site<'_>) -> Result<Edit, String> {
    site.operands(1)?;
    let read = |id: ValueId| !site.graph.value(id).uses.is_empty() || site.graph.outputs.contains(&id);
    if site.node.outputs.iter().skip(1).flatten().any(|&id| read(id)) {
        return Err("its mask is read, which was defined differently".into());
    }
    let ratio = site.float("ratio")?.filter(|&ratio| ratio != 0.5);
    let operands = ratio.map(|ratio| (1, Operand::New("ratio", Tensor::f32(ratio)))).into_iter().collect();
    Ok(Edit { remove: &["ratio"], operands, results: Some(1), ..Edit::default() })
}

/// `QuantizeLinear` and `DequantizeLinear` before 13: a vector of one element as scale is a scalar, not one per channel.
fn quantize(site: &Site<'_>) -> Result<Edit, String> {
    let mut operands = Vec::new();
    for (slot, name) in [(1, "scale"), (2, "zero_point")] {
        if site.node.input(slot).is_none() || site.fact(slot).dims.is_some_and(|dims| dims.is_empty()) {
            continue;
        }
        let one = site.constant(slot).filter(|tensor| tensor.len() == 1);
        let mut one = one.ok_or_else(|| format!("its {} may be a vector", name.replace('_', " ")))?;
        let mut proto = one.proto.as_ref().clone();
        proto.dims.clear();
        one.proto = proto.into();
        operands.push((slot, Operand::New(name, one)));
    }
    Ok(Edit { operands, ..Edit::default() })
}

/// `Erf` before 13: integers are allowed.
fn erf(site: &Site<'_>) -> Result<Edit, String> {
    match site.fact(0).dtype {
        Some(dtype) if dtype.is_integer() => Err(format!("its operand is of type {dtype}")),
        _ => Ok(Edit::default()),
    }
}

/// `Softmax` and its like before 13: normalised over all axes from `axis` on, which is 1 by default.
fn softmax(site: &Site<'_>) -> Result<Edit, String> {
    let axis = match site.node.attribute("axis") {
        None => 1,
        Some(Attribute::Int(axis)) => *axis,
        Some(_) => return Err("its attribute 'axis' is not an integer".into()),
    };
    let set = |axis: i64| {
        let set = if site.node.int("axis") == Some(axis) { vec![] } else { vec![("axis", Attribute::Int(axis))] };
        Ok(Edit { set, ..Edit::default() })
    };
    if axis == -1 {
        return set(-1);
    }
    let dims = site.fact(0).dims.ok_or("the rank of its operand is not known")?;
    let rank = dims.len() as i64;
    let first = if axis < 0 { axis.saturating_add(rank) } else { axis };
    let over = usize::try_from(first).ok().and_then(|first| dims.get(first..)).filter(|over| !over.is_empty());
    let over = over.ok_or_else(|| format!("its axis {axis} is none of an operand of rank {rank}"))?;
    // An axis of extent 1 adds nothing: the other one decides.
    let mut long = (first..).zip(over).filter(|(_, dim)| **dim != Some(1)).map(|(axis, _)| axis);
    match (long.next(), long.next()) {
        (Some(_), Some(_)) => Err("it is taken over several axes at once".into()),
        (Some(long), None) if long == rank - 1 && site.node.int("axis") != Some(long) => set(-1),
        (Some(long), None) => set(long),
        (None, _) => set(-1),
    }
}

/// A list that is operand 1 from version 13 on, and an attribute before.
fn list(site: &Site<'_>, name: &'static str, empty: Empty) -> Result<Edit, String> {
    site.operands(1)?;
    let remove: &[&str] = if name == "axes" { &["axes"] } else { &["split"] };
    let operands = match (site.ints(name)?, empty) {
        (None, Empty::Kept) => return Err(format!("it has no attribute '{name}'")),
        (None, _) => vec![],
        (Some(list), Empty::LeftOut) if list.is_empty() => vec![],
        (Some(list), Empty::Refused) if list.is_empty() => return Err(format!("its attribute '{name}' is empty")),
        (Some(list), _) => vec![(1, Operand::New(name, Tensor::shape(&list)))],
    };
    Ok(Edit { remove, operands, ..Edit::default() })
}

/// Converts graphs.
struct Lifter {
    from: i64,
    ir_version: i64,
    names: Names,
}

/// Constants that were added to a graph, by what they are for, element type, extents and elements.
type Constants = HashMap<(&'static str, DataType, Vec<i64>, Vec<u8>), ValueId>;

impl Lifter {
    fn refuse(&self, graph: &Graph, id: NodeId, reason: String) -> LiftError {
        LiftError::Node { node: legible(&graph.describe(id), NAME), from: self.from, reason }
    }

    /// Converts a graph and those nested in it.
    fn graph(&mut self, graph: &mut Graph, facts: &[Fact], nested: bool) -> Result<(), LiftError> {
        let mut constants = Constants::new();
        let mut replaced = Vec::new();
        for id in graph.order.clone() {
            self.nested_graphs(graph, id, facts)?;
            let node = graph.node(id);
            let convert = match node.standard_op().map(|op| rule(op, self.from)) {
                None | Some(Rule::Same) => continue,
                Some(Rule::Convert(convert)) => convert,
                Some(Rule::Unknown) => {
                    return Err(self.refuse(graph, id, format!("it is no operator of opset {}", self.from)));
                }
            };
            let site = Site { graph, node, facts };
            let edit = convert(&site).map_err(|reason| self.refuse(graph, id, reason))?;
            replaced.extend(self.edit(graph, id, edit, &mut constants, nested));
        }
        graph.reconnect();
        remove_unused(graph, &replaced);
        Ok(())
    }

    fn nested_graphs(&mut self, graph: &mut Graph, id: NodeId, facts: &[Fact]) -> Result<(), LiftError> {
        let opaque = |value: &Attribute| matches!(value, Attribute::Other(other) if !other.0.graphs.is_empty());
        if graph.node(id).attributes.iter().any(|(_, value)| opaque(value)) {
            return Err(self.refuse(graph, id, "it has a list of graphs".into()));
        }
        for at in 0..graph.node(id).attributes.len() {
            let Attribute::Graph(inner) = &mut graph.node_mut(id).attributes[at].1 else { continue };
            let mut inner = std::mem::take(inner.as_mut());
            let facts = nested_facts(&inner, facts);
            self.graph(&mut inner, &facts, true)?;
            graph.node_mut(id).attributes[at].1 = Attribute::Graph(Box::new(inner));
        }
        Ok(())
    }

    /// Makes an edit; users of values are out of step afterwards. Gives the operands that the node had.
    fn edit(
        &mut self,
        graph: &mut Graph,
        id: NodeId,
        edit: Edit,
        constants: &mut Constants,
        nested: bool,
    ) -> Vec<ValueId> {
        let old = graph.node(id).inputs.clone();
        let mut inputs = old.clone();
        for (slot, operand) in edit.operands {
            let operand = match operand {
                Operand::New(hint, tensor) => Some(self.constant(graph, hint, tensor, constants, nested)),
                Operand::Old(slot) => old.get(slot).copied().flatten(),
                Operand::LeftOut => None,
            };
            inputs.resize(inputs.len().max(slot + 1), None);
            inputs[slot] = operand;
        }
        let node = graph.node_mut(id);
        node.inputs = inputs;
        if let Some(op) = edit.op {
            node.op = OpType::standard(op);
        }
        node.attributes.retain(|(name, _)| !edit.remove.contains(&name.as_str()));
        for (name, value) in edit.set {
            match node.attributes.iter_mut().find(|(known, _)| known == name) {
                Some(entry) => entry.1 = value,
                None => node.attributes.push((name.into(), value)),
            }
        }
        if let Some(results) = edit.results {
            for gone in node.outputs.split_off(results.min(node.outputs.len())).into_iter().flatten() {
                graph.values[gone.slot()] = None;
                graph.declared.retain(|&id| id != gone);
            }
        }
        old.into_iter().flatten().collect()
    }

    /// A constant of the graph: an initializer, or in nested graphs a node, for some of those may have no initializers.
    fn constant(
        &mut self,
        graph: &mut Graph,
        hint: &'static str,
        tensor: Tensor,
        constants: &mut Constants,
        nested: bool,
    ) -> ValueId {
        let bytes = tensor.raw().map(|raw| raw.to_vec()).unwrap_or_default();
        let key = (hint, tensor.dtype(), tensor.dims().to_vec(), bytes);
        // Tensors that store their elements in another way are few.
        let comparable = tensor.raw().is_some();
        if let Some(&known) = constants.get(&key).filter(|_| comparable) {
            return known;
        }
        let name = self.names.fresh(&format!("lift/{hint}"));
        let info = ValueInfo::of(&tensor.ty());
        let id = if nested {
            let id = graph.add_value(Value::new(name, Def::Undefined));
            let mut node =
                Node::new(OpType::standard("Constant"), vec![], vec![("value".into(), Attribute::Tensor(tensor))]);
            node.outputs.push(Some(id));
            graph.add_node(node);
            graph.order.rotate_right(1);
            id
        } else {
            let id = graph.add_value(Value::new(name, Def::Initializer(tensor)));
            graph.initializers.push(id);
            if self.ir_version < CONSTANTS_APART {
                graph.inputs.push(id);
                graph.value_mut(id).info = Some(info);
            }
            id
        };
        constants.insert(key, id);
        id
    }
}

/// Removes constants among `replaced` that nothing reads any more; runtimes warn of those. What callers may replace stays:
/// it belongs to the interface.
fn remove_unused(graph: &mut Graph, replaced: &[ValueId]) {
    let kept: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    let mut gone = HashSet::new();
    let mut producers = HashSet::new();
    for &id in replaced {
        let Some(value) = graph.get_value(id).filter(|value| value.uses.is_empty() && !kept.contains(&id)) else {
            continue;
        };
        match value.def {
            Def::Initializer(_) => drop(gone.insert(id)),
            Def::Node(producer, _) => {
                let node = graph.node(producer);
                if node.is("Constant") && node.outputs.len() == 1 {
                    gone.insert(id);
                    producers.insert(producer);
                }
            }
            _ => {}
        }
    }
    gone.iter().for_each(|id| graph.values[id.slot()] = None);
    producers.iter().for_each(|id| graph.nodes[id.slot()] = None);
    graph.order.retain(|id| !producers.contains(id));
    for list in [&mut graph.inputs, &mut graph.initializers, &mut graph.declared] {
        list.retain(|id| !gone.contains(id));
    }
}

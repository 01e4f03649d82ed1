//! Lifting of models from old versions of the standard operator set to [`LIFTED`], without a change of meaning.
//!
//! Every operator of the set has a rule ([`rule`]): it means the same in all versions from [`OLDEST`] to [`LIFTED`], or
//! its nodes are converted, or the model is refused. Most conversions turn attributes into operands that are constants.

use std::collections::{HashMap, HashSet};

use crate::graph::{Attribute, Def, Graph, Names, Node, OpType, Value, legible};
use crate::onnx::{OperatorSetIdProto, ValueInfo};
use crate::{DataType, Model, NodeId, Shapes, Tensor, ValueId};

/// The oldest version of the standard operator set that models can be lifted from.
const OLDEST: i64 = 9;
/// The version of the standard operator set that older models are lifted to.
pub const LIFTED: i64 = 13;
/// The first version of the format in which models name the operator sets that they use.
const OPSETS_SINCE: i64 = 3;
/// The first version of the format in which constants need not be inputs of the graph.
const CONSTANTS_APART: i64 = 4;

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
    let entries = &mut model.opsets.0;
    let standard = |entry: &&mut OperatorSetIdProto| matches!(entry.domain.as_deref(), None | Some("" | "ai.onnx"));
    entries.iter_mut().filter(standard).for_each(|entry| entry.version = Some(LIFTED));
    Ok(true)
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
    /// Whether callers may replace constants that are inputs of the graph.
    replaceable: bool,
}

impl Site<'_> {
    /// What is known of operand `slot`.
    fn fact(&self, slot: usize) -> Fact {
        self.node.input(slot).and_then(|id| self.facts.get(id.slot())).cloned().unwrap_or_default()
    }

    /// Operand `slot`, if it is a constant that nobody can replace.
    fn constant(&self, slot: usize) -> Option<Tensor> {
        let id = self.node.input(slot)?;
        let fixed = !(self.replaceable && self.graph.inputs.contains(&id));
        self.graph.constant(id).filter(|_| fixed).map(|tensor| tensor.into_owned())
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
        let replaceable = self.ir_version >= CONSTANTS_APART || nested;
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
            let site = Site { graph, node, facts, replaceable };
            let edit = convert(&site).map_err(|reason| self.refuse(graph, id, reason))?;
            replaced.extend(self.edit(graph, id, edit, &mut constants, nested));
        }
        graph.reconnect();
        remove_unused(graph, &replaced, replaceable);
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

/// Removes constants among `replaced` that nothing reads any more; runtimes warn of those. Those that callers may replace
/// stay: they belong to the interface.
fn remove_unused(graph: &mut Graph, replaced: &[ValueId], replaceable: bool) {
    let mut kept: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    kept.extend(graph.inputs.iter().filter(|_| replaceable));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DimSpec, GraphBuilder, OpaqueAttribute, TensorType, print_graph};

    fn ty(dtype: DataType, dims: &[i64]) -> TensorType {
        let dim = |&n: &i64| if n < 0 { DimSpec::Named(format!("n{}", -n)) } else { DimSpec::Known(n) };
        TensorType { dtype, dims: Some(dims.iter().map(dim).collect()) }
    }

    fn f32(dims: &[i64]) -> TensorType {
        ty(DataType::F32, dims)
    }

    fn ints(list: &[i64]) -> Attribute {
        Attribute::Ints(list.to_vec())
    }

    fn text(text: &'static str) -> Attribute {
        Attribute::String(text.as_bytes().into())
    }

    /// `y = op(x, ..)` of a version of the standard operator set, where `x` is a graph input.
    struct Case {
        op: &'static str,
        from: i64,
        ir_version: i64,
        x: Option<TensorType>,
        operands: Vec<Option<Tensor>>,
        attributes: Vec<(&'static str, Attribute)>,
        results: usize,
        /// A constant is a graph input as well.
        replaceable: bool,
    }

    fn case(op: &'static str, from: i64) -> Case {
        let x = Some(f32(&[-1, 3, 8, 8]));
        Case { op, from, ir_version: 6, x, operands: vec![], attributes: vec![], results: 1, replaceable: false }
    }

    impl Case {
        fn x(self, x: TensorType) -> Self {
            Self { x: Some(x), ..self }
        }

        fn attribute(mut self, name: &'static str, value: Attribute) -> Self {
            self.attributes.push((name, value));
            self
        }

        fn operand(mut self, tensor: Tensor) -> Self {
            self.operands.push(Some(tensor));
            self
        }

        fn model(&self) -> Model {
            let mut builder = GraphBuilder::new();
            let x = builder.input("x", self.x.as_ref());
            let mut inputs = vec![Some(x)];
            for operand in &self.operands {
                let operand = operand.clone().map(|tensor| builder.initializer("c", tensor));
                inputs.push(operand);
            }
            let results = builder.call(OpType::standard(self.op), "r", inputs.clone(), &self.attributes, self.results);
            builder.output("y", results[0], None);
            let mut model = builder.into_model(self.ir_version, &[("", self.from)], vec![]);
            if self.replaceable || self.ir_version < CONSTANTS_APART {
                model.graph.inputs.extend(inputs.iter().skip(1).flatten());
            }
            model
        }

        /// The node and the types of the inputs that it has afterwards.
        fn lifted(&self) -> String {
            let mut model = self.model();
            assert_eq!(lift_opset(&mut model), Ok(true));
            model.verify().unwrap();
            assert_eq!(model.opsets().standard(), LIFTED);
            let text = print_graph(model.graph());
            let line = text.lines().find(|line| line.starts_with("%y")).unwrap();
            line.strip_prefix("%y = ").unwrap_or(line).into()
        }

        /// The reason, after which the model must be as it was.
        fn refused(&self) -> String {
            let before = self.model();
            let mut model = before.clone();
            let Err(LiftError::Node { node, from, reason }) = lift_opset(&mut model) else { panic!("{}", self.op) };
            assert!(model == before);
            assert_eq!((node, from), (format!("{} -> 'y'", self.op), self.from));
            reason
        }
    }

    #[test]
    fn the_table_is_in_order() {
        assert!(SAME.is_sorted_by(|a, b| a < b));
        for name in SAME_SINCE.iter().flat_map(|(_, names)| *names) {
            assert!(!SAME.contains(name), "{name}");
        }
    }

    #[test]
    fn bounds_of_slices_become_operands() {
        let case = |starts: &[i64], ends: &[i64]| {
            super::tests::case("Slice", 9).attribute("starts", ints(starts)).attribute("ends", ints(ends))
        };
        assert_eq!(case(&[0, 1], &[9, -1]).lifted(), "Slice(x, [0,1], [9,-1], [0,1])");
        let some = case(&[1], &[2]).attribute("axes", ints(&[-1]));
        assert_eq!(some.lifted(), "Slice(x, [1], [2], [-1])");
        assert_eq!(case(&[1], &[1, 2]).refused(), "its starts, ends and axes are not as many");
        assert_eq!(super::tests::case("Slice", 9).refused(), "it has no attribute 'starts'");
        let many = case(&[1], &[2]).operand(Tensor::shape(&[0]));
        assert_eq!(many.refused(), "it has 2 operands, and its version takes 1");
        let wrong = super::tests::case("Slice", 9).attribute("starts", Attribute::Int(1));
        assert_eq!(wrong.refused(), "its attribute 'starts' is not a list of integers");
        let new = super::tests::case("Slice", 10).operand(Tensor::shape(&[0])).operand(Tensor::shape(&[1]));
        assert_eq!(new.lifted(), "Slice(x, [0], [1])");
    }

    #[test]
    fn the_count_of_top_k_becomes_an_operand() {
        let two = Case { results: 2, ..case("TopK", 9).attribute("axis", Attribute::Int(-1)) };
        assert_eq!(two.attribute("k", Attribute::Int(5)).lifted(), "%y, %r_2 = TopK(x, [5]) axis=-1");
        assert_eq!(case("TopK", 9).refused(), "it has no attribute 'k'");
        assert_eq!(case("TopK", 10).operand(Tensor::shape(&[2])).lifted(), "TopK(x, [2])");
    }

    #[test]
    fn upsampling_becomes_resizing() {
        let scales = |scales: &[f32]| Tensor::f32s(&[scales.len()], scales);
        for (op, from) in [("Upsample", 9), ("Resize", 10)] {
            let larger = || case(op, from).operand(scales(&[1.0, 1.0, 2.0, 2.5]));
            let resized = "Resize(x, _, c{f32[4]}) ";
            let how = "coordinate_transformation_mode=\"asymmetric\" nearest_mode=\"floor\"";
            assert_eq!(larger().lifted(), format!("{resized}{how}"));
            let linear = larger().attribute("mode", text("linear"));
            assert_eq!(linear.lifted(), format!("{resized}mode=\"linear\" {how}"));
            assert_eq!(larger().attribute("mode", text("cubic")).refused(), "its mode 'cubic' has no counterpart");
            let fed = Case { replaceable: true, ..larger() };
            assert_eq!(fed.refused(), "its scales are not constant");
            let smaller = case(op, from).operand(scales(&[1.0, 1.0, 0.5, 2.0]));
            assert_eq!(smaller.refused(), "it makes its operand smaller, which runtimes do in different ways");
            assert_eq!(case(op, from).operand(Tensor::shape(&[1])).refused(), "its scales are not numbers");
        }
        let deprecated = case("Upsample", 10).operand(scales(&[1.0; 4]));
        assert_eq!(deprecated.refused(), "it is no operator of opset 10");
        assert_eq!(case("Resize", 9).refused(), "it is no operator of opset 9");
    }

    #[test]
    fn resizing_leaves_out_what_is_empty() {
        let sizes = || Some(Tensor::shape(&[1, 3, 16, 16]));
        let empty = || Some(Tensor::f32s(&[0], &[]));
        let scales = || Some(Tensor::f32s(&[4], &[1.0, 1.0, 2.0, 2.0]));
        for from in [11, 12] {
            let of = |operands| Case { operands, ..case("Resize", from) };
            let by_size = of(vec![empty(), empty(), sizes()]).attribute("mode", text("cubic"));
            assert_eq!(by_size.lifted(), "Resize(x, _, _, [1,3,16,16]) mode=\"cubic\"");
            let mut model = by_size.model();
            lift_opset(&mut model).unwrap();
            assert_eq!(model.graph().initializers().len(), 1);
            assert_eq!(of(vec![empty(), scales()]).lifted(), "Resize(x, _, c_2{f32[4]})");
            assert_eq!(of(vec![None, scales(), sizes()]).refused(), "it has both scales and sizes");
            let gone = of(vec![empty(), scales()]);
            let gone = gone.attribute("coordinate_transformation_mode", text("tf_half_pixel_for_nn"));
            let reason = "its coordinate_transformation_mode 'tf_half_pixel_for_nn' has no counterpart";
            assert_eq!(gone.refused(), reason);
        }
        // What callers may feed stays an input.
        let fed = Case { replaceable: true, operands: vec![empty(), scales()], ..case("Resize", 11) };
        let mut model = fed.model();
        lift_opset(&mut model).unwrap();
        assert_eq!((model.graph().inputs().len(), model.graph().initializers().len()), (3, 2));
    }

    #[test]
    fn bounds_of_clips_become_operands() {
        let of = |low: f32, high: f32| {
            case("Clip", 10).attribute("min", Attribute::Float(low)).attribute("max", Attribute::Float(high))
        };
        assert_eq!(of(0.0, 6.0).lifted(), "Clip(x, 0.0, 6.0)");
        assert_eq!(of(f32::MIN, 6.0).lifted(), "Clip(x, _, 6.0)");
        assert_eq!(of(0.5, f32::MAX).lifted(), "Clip(x, 0.5)");
        assert_eq!(case("Clip", 9).lifted(), "Clip(x)");
        assert_eq!(of(0.0, f32::INFINITY).lifted(), "Clip(x, 0.0, inf)");
        assert_eq!(of(0.0, 0.5).x(ty(DataType::F16, &[2])).lifted(), "Clip(x, 0.0, 0.5)");
        let wide = of(f32::MIN, 0.5).x(ty(DataType::F64, &[2])).lifted();
        assert_eq!(wide, "Clip(x, -3.4028234663852886e38, 0.5)");
        let integers = of(0.0, 6.0).x(ty(DataType::I32, &[2]));
        assert_eq!(integers.refused(), "its operand is of type i32, not of floating-point numbers");
        let unknown = Case { x: None, ..of(0.0, 6.0) };
        assert_eq!(unknown.refused(), "the element type of its operand is not known");
        let wrong = case("Clip", 9).attribute("min", Attribute::Int(0));
        assert_eq!(wrong.refused(), "its attribute 'min' is not a number");
        assert_eq!(case("Clip", 11).operand(Tensor::f32(1.0)).lifted(), "Clip(x, 1.0)");
    }

    #[test]
    fn padding_becomes_an_operand() {
        let of =
            |value: f32| case("Pad", 9).attribute("pads", ints(&[0; 8])).attribute("value", Attribute::Float(value));
        assert_eq!(of(0.0).lifted(), "Pad(x, [0,0,0,0,0,0,0,0])");
        assert_eq!(of(-1.5).lifted(), "Pad(x, [0,0,0,0,0,0,0,0], -1.5)");
        let edge = of(-1.5).attribute("mode", text("edge"));
        assert_eq!(edge.lifted(), "Pad(x, [0,0,0,0,0,0,0,0]) mode=\"edge\"");
        assert_eq!(of(1.0).attribute("mode", Attribute::Int(1)).refused(), "its attribute 'mode' is not text");
        assert_eq!(case("Pad", 9).refused(), "it has no attribute 'pads'");
    }

    #[test]
    fn dropout_loses_a_mask_that_nothing_reads() {
        let of = |results| Case { results, ..case("Dropout", 11) };
        assert_eq!(of(2).lifted(), "Dropout(x)");
        assert_eq!(of(2).attribute("ratio", Attribute::Float(0.5)).lifted(), "Dropout(x)");
        assert_eq!(of(1).attribute("ratio", Attribute::Float(0.25)).lifted(), "Dropout(x, 0.25)");
        let mut model = of(2).model();
        let mask = model.graph.find_value("r_2").unwrap();
        model.graph.outputs.push(mask);
        let error = lift_opset(&mut model).unwrap_err().to_string();
        let reason =
            "Dropout -> 'y' cannot be converted from opset 11 to 13: its mask is read, which was defined differently";
        assert_eq!(error, reason);
    }

    #[test]
    fn scatter_has_another_name() {
        let case = case("Scatter", 9).operand(Tensor::shape(&[0])).operand(Tensor::f32s(&[1], &[1.0]));
        assert_eq!(case.attribute("axis", Attribute::Int(1)).lifted(), "ScatterElements(x, [0], c_2{f32[1]}) axis=1");
        assert_eq!(super::tests::case("Scatter", 11).refused(), "it is no operator of opset 11");
    }

    #[test]
    fn what_was_defined_differently_is_refused() {
        let padded = |how| case("ConvTranspose", 10).attribute("auto_pad", text(how));
        assert_eq!(padded("VALID").lifted(), "ConvTranspose(x) auto_pad=\"VALID\"");
        assert_eq!(padded("SAME_UPPER").refused(), "its automatic padding was defined differently");
        assert_eq!(case("OneHot", 10).refused(), "its indices may be negative, which was defined differently");
        assert_eq!(case("OneHot", 11).lifted(), "OneHot(x)");
        assert_eq!(case("Erf", 9).lifted(), "Erf(x)");
        assert_eq!(case("Erf", 12).x(ty(DataType::I8, &[1])).refused(), "its operand is of type i8");
        for op in ["Trilu", "Gelu", "Mish", "NoSuch", ""] {
            assert_eq!(case(op, 12).refused(), "it is no operator of opset 12");
        }
        assert_eq!(case("Range", 10).refused(), "it is no operator of opset 10");
        assert_eq!(case("Range", 11).lifted(), "Range(x)");
        assert_eq!(case("LayerNormalization", 12).lifted(), "LayerNormalization(x)");
    }

    #[test]
    fn indices_of_one_hot_may_be_known() {
        let one_hot = |indices: Tensor| {
            let mut builder = GraphBuilder::new();
            let depth = builder.initializer("depth", Tensor::i64(4));
            let values = builder.input("values", Some(&f32(&[2])));
            let indices = builder.tensor("indices", indices);
            let y = builder.op("OneHot", "y", &[indices, depth, values], &[]);
            builder.output("y", y, None);
            lift_opset(&mut builder.into_model(6, &[("", 9)], vec![])).is_ok()
        };
        assert!(one_hot(Tensor::shape(&[0, 3])));
        assert!(!one_hot(Tensor::shape(&[0, -1])));
        assert!(one_hot(Tensor::f32s(&[2], &[0.0, 9.0])));
        assert!(!one_hot(Tensor::f32s(&[2], &[0.0, -1.0])));
    }

    #[test]
    fn softmax_is_over_one_axis() {
        let of = |dims: &[i64]| case("Softmax", 11).x(f32(dims));
        let on = |dims: &[i64], axis| of(dims).attribute("axis", Attribute::Int(axis));
        assert_eq!(of(&[-1, 10]).lifted(), "Softmax(x) axis=-1");
        assert_eq!(on(&[-1, 3, -2, -3], 3).lifted(), "Softmax(x) axis=3");
        assert_eq!(on(&[-1, 3, -2, -3], -1).lifted(), "Softmax(x) axis=-1");
        assert_eq!(on(&[-1, 7, 1, 1], 1).lifted(), "Softmax(x) axis=1");
        assert_eq!(on(&[-1, 7, 1, 1], -3).lifted(), "Softmax(x) axis=1");
        assert_eq!(of(&[-1, 1, -2]).lifted(), "Softmax(x) axis=-1");
        assert_eq!(of(&[-1, 1, 1]).lifted(), "Softmax(x) axis=-1");
        assert_eq!(of(&[-1, 1, -2, 1]).lifted(), "Softmax(x) axis=2");
        assert_eq!(of(&[-1, 4, 4]).refused(), "it is taken over several axes at once");
        assert_eq!(of(&[-1, -2, -3]).refused(), "it is taken over several axes at once");
        assert_eq!(on(&[2, 2], 2).refused(), "its axis 2 is none of an operand of rank 2");
        assert_eq!(on(&[2, 2], -3).refused(), "its axis -3 is none of an operand of rank 2");
        assert_eq!(on(&[2, 2], i64::MIN).refused(), format!("its axis {} is none of an operand of rank 2", i64::MIN));
        assert_eq!(on(&[], 0).refused(), "its axis 0 is none of an operand of rank 0");
        let unknown = Case { x: None, ..case("LogSoftmax", 9) };
        assert_eq!(unknown.refused(), "the rank of its operand is not known");
        let last = Case { x: None, ..case("Hardmax", 9).attribute("axis", Attribute::Int(-1)) };
        assert_eq!(last.lifted(), "Hardmax(x) axis=-1");
        let wrong = case("Softmax", 9).attribute("axis", Attribute::Float(1.0));
        assert_eq!(wrong.refused(), "its attribute 'axis' is not an integer");
    }

    #[test]
    fn lists_become_operands() {
        for op in ["Squeeze", "Unsqueeze", "ReduceSum"] {
            for from in 9..13 {
                let line = case(op, from).attribute("axes", ints(&[0, 2])).lifted();
                assert_eq!(line, format!("{op}(x, [0,2])"));
            }
        }
        let split = Case { results: 2, ..case("Split", 9).attribute("axis", Attribute::Int(3)) };
        assert_eq!(split.lifted(), "%y, %r_2 = Split(x) axis=3");
        assert_eq!(split.attribute("split", ints(&[3, 5])).lifted(), "%y, %r_2 = Split(x, [3,5]) axis=3");
        assert_eq!(case("Squeeze", 9).lifted(), "Squeeze(x)");
        assert_eq!(case("ReduceSum", 9).lifted(), "ReduceSum(x)");
        assert_eq!(case("ReduceSum", 9).attribute("axes", ints(&[])).lifted(), "ReduceSum(x)");
        assert_eq!(case("Squeeze", 9).attribute("axes", ints(&[])).refused(), "its attribute 'axes' is empty");
        assert_eq!(case("Unsqueeze", 9).refused(), "it has no attribute 'axes'");
        assert_eq!(case("ReduceMean", 9).attribute("axes", ints(&[1])).lifted(), "ReduceMean(x) axes=[1]");
    }

    #[test]
    fn scales_of_quantisation_are_scalars() {
        let of = |scale: Tensor, zero: Tensor| case("QuantizeLinear", 10).operand(scale).operand(zero);
        let zeros = |dims: &[usize], n| Tensor::integers(DataType::U8, dims, &vec![0; n]);
        let scalar = of(Tensor::f32(0.5), zeros(&[], 1));
        assert_eq!(scalar.lifted(), "QuantizeLinear(x, 0.5, 0)");
        let short = of(Tensor::f32s(&[1], &[0.5]), zeros(&[1], 1));
        assert_eq!(short.lifted(), "QuantizeLinear(x, 0.5, 0)");
        let mut model = short.model();
        lift_opset(&mut model).unwrap();
        assert_eq!(model.graph().initializers().len(), 2);
        let long = of(Tensor::f32s(&[2], &[0.5; 2]), zeros(&[2], 2));
        assert_eq!(long.refused(), "its scale may be a vector");
        let fed = Case { replaceable: true, ..short };
        assert_eq!(fed.refused(), "its scale may be a vector");
        let mixed = of(Tensor::f32(0.5), zeros(&[2], 2));
        assert_eq!(mixed.refused(), "its zero point may be a vector");
        assert_eq!(case("DequantizeLinear", 9).refused(), "it is no operator of opset 9");
    }

    #[test]
    fn equal_constants_are_one() {
        let mut builder = GraphBuilder::new();
        let x = builder.input("lift/axes", Some(&f32(&[4])));
        let mut y = x;
        for axes in [[0], [0], [1]] {
            y = builder.op("Unsqueeze", "v", &[y], &[("axes", ints(&axes))]);
        }
        builder.output("y", y, None);
        let model = builder.into_model(3, &[("", 9)], vec![]);
        for (ir_version, inputs) in [(3, 3), (4, 1)] {
            let mut model = model.clone();
            model.rest.ir_version = Some(ir_version);
            assert_eq!(lift_opset(&mut model), Ok(true));
            let graph = model.verify().unwrap().model().graph();
            let names: Vec<&str> = graph.initializers().iter().map(|&id| graph.value(id).name()).collect();
            assert_eq!(names, ["lift/axes_2", "lift/axes_3"]);
            assert_eq!((graph.inputs().len(), graph.revision()), (inputs, 1));
        }
    }

    /// `y = If(c)`, whose branches unsqueeze `x` of the outer graph and take its softmax.
    fn branches(axis: i64) -> Model {
        let mut builder = GraphBuilder::new();
        let (c, x) = (builder.input("c", Some(&ty(DataType::Bool, &[]))), builder.input("x", Some(&f32(&[2, -1]))));
        let branch = |name: &'static str| {
            let mut inner = Graph::default();
            let outer = inner.add_value(Value::new("x".into(), Def::Captured(x)));
            let mut add = |op: &str, input: ValueId, result: &str, attribute: &str, value: Attribute| {
                let id = inner.add_value(Value::new(format!("{name}/{result}"), Def::Undefined));
                let mut node = Node::new(OpType::standard(op), vec![Some(input)], vec![(attribute.into(), value)]);
                node.outputs.push(Some(id));
                inner.add_node(node);
                id
            };
            let soft = add("Softmax", outer, "soft", "axis", Attribute::Int(axis));
            let first = add("Unsqueeze", soft, "first", "axes", ints(&[0]));
            let second = add("Unsqueeze", first, "second", "axes", ints(&[0]));
            inner.outputs.push(second);
            Attribute::Graph(Box::new(inner))
        };
        let attributes = [("then_branch", branch("then")), ("else_branch", branch("else"))];
        let y = builder.op("If", "y", &[c], &attributes);
        builder.output("y", y, None);
        let mut model = builder.into_model(7, &[("", 11)], vec![]);
        model.graph.reconnect();
        // The closures name outer values that the builder does not know of.
        let (id, _) = model.graph.producer(model.graph.find_value("y").unwrap()).unwrap();
        let captures = model.graph.node(id).read_by_nested();
        model.graph.node_mut(id).captures = captures;
        model.graph.reconnect();
        model
    }

    #[test]
    fn nested_graphs_are_lifted() {
        let mut model = branches(1);
        model.verify().unwrap();
        assert_eq!(lift_opset(&mut model), Ok(true));
        model.verify().unwrap();
        let text = print_graph(model.graph());
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.contains("squeeze")).collect();
        let expected = ["then/first = Unsqueeze(%then/soft, [0])", "then/second = Unsqueeze(%then/first, [0])"];
        assert_eq!(lines[..2], expected.map(|line| format!("%{line}")));
        assert_eq!(lines.len(), 4);

        let error = lift_opset(&mut branches(0)).unwrap_err().to_string();
        let reason =
            "Softmax -> 'then/soft' cannot be converted from opset 11 to 13: it is taken over several axes at once";
        assert_eq!(error, reason);
    }

    #[test]
    fn lists_of_graphs_are_refused() {
        let graphs = crate::onnx::AttributeProto { graphs: vec![Default::default()], ..Default::default() };
        let case = case("Relu", 11).attribute("bodies", Attribute::Other(OpaqueAttribute(Box::new(graphs))));
        assert_eq!(case.refused(), "it has a list of graphs");
    }

    #[test]
    fn versions_out_of_range() {
        let of = |from| case("Relu", from).model();
        for from in [13, 14, 22, 99] {
            let mut model = of(from);
            assert_eq!(lift_opset(&mut model), Ok(false));
            assert!(model == of(from));
        }
        for from in [-1, 0, 1, 8] {
            assert_eq!(lift_opset(&mut of(from)), Err(LiftError::TooOld { version: from }));
        }
        let none = |ir_version| Case { ir_version, ..case("Relu", 9) }.model();
        let (mut new, mut old) = (none(7), none(2));
        new.opsets.0.clear();
        old.opsets.0.clear();
        assert_eq!((lift_opset(&mut new), new.opsets().standard()), (Ok(false), LIFTED));
        assert_eq!(lift_opset(&mut old), Err(LiftError::TooOld { version: 1 }));
    }

    #[test]
    fn parts_that_are_not_lifted() {
        let mut model = case("Relu", 11).model();
        model.rest.training_info.push(Default::default());
        let error = lift_opset(&mut model).unwrap_err().to_string();
        assert_eq!(error, "the model's training information cannot be converted from opset 11 to 13");

        let function = |opset| crate::Function::new(OpType::of("f", "g"), vec![], Graph::default(), opset, "");
        let mut model = case("Relu", 11).model();
        model.functions = vec![function(13), function(11)];
        let error = lift_opset(&mut model).unwrap_err().to_string();
        assert_eq!(error, "the model's local function f.g cannot be converted from opset 11 to 13");
        model.functions = vec![function(13)];
        assert_eq!(lift_opset(&mut model), Ok(true));
    }

    #[test]
    fn constants_stop_being_inputs() {
        let of = |ir_version| Case { ir_version, ..case("Clip", 12) }.operand(Tensor::f32(0.0)).model();
        for (has, wants, dropped) in [(3, 3, 0), (3, 8, 1), (4, 8, 0), (9, 8, 0)] {
            let mut model = of(has);
            assert_eq!((model.require_ir_version(wants), model.ir_version()), (dropped, wants.max(has)));
            model.verify().unwrap();
        }
        let fed = Case { replaceable: true, ..case("Clip", 12) }.operand(Tensor::f32(0.0));
        assert_eq!(fed.model().require_ir_version(8), 0);
    }
}

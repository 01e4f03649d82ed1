//! Which extents each operator gives its results.

use super::call::{Call, Dims, Known, axis_of, plus, product, times, too_large};
use super::linear;
use super::number::Number;
use crate::{Attribute, Expr};

/// The shapes of a call's results, in order; `None` for results that the rule says nothing about.
pub(super) type Results = Vec<Option<Dims>>;

fn one(dims: Dims) -> Known<Results> {
    Ok(vec![Some(dims)])
}

/// The shapes of the results of `call`.
pub(super) fn infer(call: &mut Call<'_>) -> Known<Results> {
    let node = call.node;
    let results = match (node.op.domain.as_str(), node.op.name.as_str()) {
        ("", name) => standard(call, name),
        ("com.microsoft", name) => microsoft(call, name),
        ("com.microsoft.nchwc", name) => blocked(call, name),
        _ => unknown(call),
    }?;
    if results.iter().flatten().flatten().any(|extent| extent.as_known().is_some_and(|n| n < 0)) {
        return call.why("an extent is negative");
    }
    Ok(results)
}

fn unknown(call: &mut Call<'_>) -> Known<Results> {
    call.ruled = false;
    call.why("there is no shape rule for this operator")
}

fn standard(call: &mut Call<'_>, name: &str) -> Known<Results> {
    match name {
        "Abs"
        | "Acos"
        | "Acosh"
        | "Asin"
        | "Asinh"
        | "Atan"
        | "Atanh"
        | "BitCast"
        | "BitwiseNot"
        | "Cast"
        | "CastLike"
        | "Ceil"
        | "Celu"
        | "Clip"
        | "Cos"
        | "Cosh"
        | "CumSum"
        | "CumProd"
        | "DequantizeLinear"
        | "Elu"
        | "Erf"
        | "Exp"
        | "EyeLike"
        | "Floor"
        | "Gelu"
        | "GroupNormalization"
        | "HardSigmoid"
        | "HardSwish"
        | "Hardmax"
        | "Identity"
        | "InstanceNormalization"
        | "IsInf"
        | "IsNaN"
        | "LRN"
        | "LeakyRelu"
        | "Log"
        | "LogSoftmax"
        | "LpNormalization"
        | "MeanVarianceNormalization"
        | "Mish"
        | "Neg"
        | "Not"
        | "PRelu"
        | "QuantizeLinear"
        | "RMSNormalization"
        | "RandomNormalLike"
        | "RandomUniformLike"
        | "Bernoulli"
        | "Reciprocal"
        | "Relu"
        | "ReverseSequence"
        | "Round"
        | "RotaryEmbedding"
        | "Scatter"
        | "ScatterElements"
        | "ScatterND"
        | "Selu"
        | "Shrink"
        | "Sigmoid"
        | "Sign"
        | "Sin"
        | "Sinh"
        | "Softmax"
        | "Softplus"
        | "Softsign"
        | "Sqrt"
        | "SwiGLU"
        | "Swish"
        | "Tan"
        | "Tanh"
        | "TensorScatter"
        | "ThresholdedRelu"
        | "Trilu"
        | "ImageScaler"
        | "ParametricSoftplus"
        | "ScaledTanh"
        | "Affine" => same_as(call, 0),
        "Add" | "And" | "BitShift" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "Div" | "Equal" | "Greater"
        | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Max" | "Mean" | "Min" | "Mod" | "Mul" | "Or" | "Pow" | "Sub"
        | "Sum" | "Where" | "Xor" => elementwise(call),
        "Dropout" => {
            let dims = call.dims(0)?.to_vec();
            Ok(vec![Some(dims.clone()), Some(dims)])
        }
        "Constant" => call.why("the constant is of a kind that is not read"),
        "Shape" => {
            let (start, end) = shape_range(call)?;
            one(vec![Expr::known((end - start) as i64)])
        }
        "Size" => one(Dims::new()),
        "Reshape" => reshape(call),
        "Flatten" => flatten(call),
        "Transpose" => transpose(call),
        "Squeeze" => squeeze(call),
        "Unsqueeze" => unsqueeze(call),
        "Concat" => concat(call),
        "Split" => split(call),
        "Slice" | "DynamicSlice" => slice(call),
        "Gather" => gather(call),
        "GatherElements" => {
            let dims = call.dims(1)?.to_vec();
            one(dims)
        }
        "GatherND" => gather_nd(call),
        "Expand" => expand(call),
        "Tile" => tile(call),
        "Pad" => pad(call),
        "ConstantOfShape" => one(fill(call, call.extents(0)?)?),
        "RandomNormal" | "RandomUniform" => {
            let Some(shape) = call.node.ints("shape") else { return call.why("the attribute 'shape' is missing") };
            one(shape.iter().map(|&n| Expr::known(n)).collect())
        }
        "Range" => range(call),
        "OneHot" => one_hot(call),
        "NonZero" => {
            let rank = call.rank(0)?;
            one(vec![Expr::known(rank as i64), call.fresh(0, 1)])
        }
        "Compress" => {
            let rank = if call.node.int("axis").is_some() { call.rank(0)? } else { 1 };
            let mut dims = if rank == 1 { vec![call.fresh(0, 0)] } else { call.dims(0)?.to_vec() };
            if rank > 1 {
                let axis = call.axis("axis", 0, rank)?;
                dims[axis] = call.fresh(0, axis);
            }
            one(dims)
        }
        "TopK" => top_k(call),
        "ArgMax" | "ArgMin" => {
            let rank = call.rank(0)?;
            let axis = call.axis("axis", 0, rank)?;
            one(reduced(call.dims(0)?, &[axis], call.node.int("keepdims").unwrap_or(1) != 0))
        }
        "ReduceL1" | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp" | "ReduceMax" | "ReduceMean" | "ReduceMin"
        | "ReduceProd" | "ReduceSum" | "ReduceSumSquare" => reduce(call),
        // ONNX Runtime writes its simplified form into the standard domain.
        "LayerNormalization" | "SimplifiedLayerNormalization" => layer_normalization(call, &[1, 2]),
        "BatchNormalization" => {
            let dims = call.dims(0)?.to_vec();
            let channels = call.dims(1).ok().map(<[Expr]>::to_vec);
            let mut results = vec![Some(dims)];
            results.resize(call.node.outputs.len().clamp(1, 5), channels);
            Ok(results)
        }
        "DynamicQuantizeLinear" => {
            let dims = call.dims(0)?.to_vec();
            Ok(vec![Some(dims), Some(Dims::new()), Some(Dims::new())])
        }
        "DepthToSpace" => depth_to_space(call, true),
        "SpaceToDepth" => depth_to_space(call, false),
        "Resize" | "Upsample" => resize(call),
        "Det" => {
            let dims = call.dims(0)?;
            match dims {
                [batch @ .., _, _] => one(batch.to_vec()),
                _ => call.why("the operand has too low a rank"),
            }
        }
        "MatMul" | "MatMulInteger" => one(linear::matmul(call, 0, 1, &linear::Layout::default())?),
        "QLinearMatMul" => one(linear::matmul(call, 0, 3, &linear::Layout::default())?),
        "Gemm" => one(linear::gemm(call, 0, 1)?),
        "Einsum" => one(linear::einsum(call)?),
        "Conv" | "ConvInteger" => one(linear::conv(call, 0, 1)?),
        "QLinearConv" => one(linear::conv(call, 0, 3)?),
        "ConvTranspose" => one(linear::conv_transpose(call)?),
        "AveragePool" | "LpPool" | "MaxPool" => {
            let dims = linear::pool(call)?;
            Ok(vec![Some(dims.clone()), Some(dims)])
        }
        "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => match call.dims(0)? {
            [n, c, space @ ..] => {
                let ones = space.iter().map(|_| Expr::known(1));
                one([n.clone(), c.clone()].into_iter().chain(ones).collect())
            }
            _ => call.why("the operand has too low a rank"),
        },
        "GridSample" => match (call.dims(0)?, call.dims(1)?) {
            ([n, c, ..], [_, space @ .., _]) => {
                one([n.clone(), c.clone()].into_iter().chain(space.iter().cloned()).collect())
            }
            _ => call.why("an operand has too low a rank"),
        },
        "Attention" => linear::attention(call),
        _ => unknown(call),
    }
}

fn microsoft(call: &mut Call<'_>, name: &str) -> Known<Results> {
    match name {
        "BiasAdd"
        | "BiasDropout"
        | "BiasGelu"
        | "BiasSoftmax"
        | "DequantizeLinear"
        | "FastGelu"
        | "Gelu"
        | "GemmaRotaryEmbedding"
        | "GroupNorm"
        | "QLinearLeakyRelu"
        | "QLinearSigmoid"
        | "QLinearSoftmax"
        | "QuantizeLinear"
        | "QuickGelu"
        | "RotaryEmbedding"
        | "Trilu" => same_as(call, 0),
        "SimplifiedLayerNormalization" | "LayerNormalization" => layer_normalization(call, &[1, 2]),
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => {
            let mut results = layer_normalization(call, &[1, 2])?;
            results.push(results[0].clone());
            Ok(results)
        }
        "MatMulInteger16" | "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => {
            one(linear::matmul(call, 0, 1, &linear::Layout::default())?)
        }
        "FusedMatMul" | "TransposeMatMul" | "FusedMatMulActivation" => {
            let flag = |name| call.node.int(name).unwrap_or(0) != 0;
            let layout = linear::Layout {
                left: flag("transA"),
                right: flag("transB"),
                left_batch: flag("transBatchA"),
                right_batch: flag("transBatchB"),
            };
            one(linear::matmul(call, 0, 1, &layout)?)
        }
        "FusedGemm" | "GemmFastGelu" => one(linear::gemm(call, 0, 1)?),
        "QGemm" => one(linear::gemm(call, 0, 3)?),
        "FusedConv" => one(linear::conv(call, 0, 1)?),
        "MatMulNBits" | "MatMulBnb4" | "MatMulFpQ4" => {
            let (Some(k), Some(n)) = (call.node.int("K"), call.node.int("N")) else {
                return call.why("the attributes K and N are missing");
            };
            let Some((last, batch)) = call.dims(0)?.split_last() else { return call.why("operand 0 is a scalar") };
            call.same(last, &Expr::known(k));
            one(batch.iter().cloned().chain([Expr::known(n)]).collect())
        }
        "QLinearAdd" | "QLinearMul" | "QLinearWhere" => elementwise(call),
        "QLinearConcat" => concat(call),
        "QLinearReduceMean" => {
            let rank = call.rank(0)?;
            let axes = match call.node.ints("axes") {
                Some(axes) => call.axes(axes, rank)?,
                None => (0..rank).collect(),
            };
            one(reduced(call.dims(0)?, &axes, call.node.int("keepdims").unwrap_or(1) != 0))
        }
        "QLinearAveragePool" if channels_first(call) => one(linear::pool(call)?),
        "QLinearGlobalAveragePool" => {
            let mut dims = call.dims(0)?.to_vec();
            let rank = dims.len();
            let space = if channels_first(call) { 2..rank } else { 1..rank.saturating_sub(1) };
            let Some(space) = dims.get_mut(space) else { return call.why("the operand has too low a rank") };
            space.fill(Expr::known(1));
            one(dims)
        }
        "BiasSplitGelu" => {
            let mut dims = call.dims(0)?.to_vec();
            let Some(last) = dims.last_mut() else { return call.why("operand 0 is a scalar") };
            *last = last.quotient(&Expr::known(2)).ok_or_else(too_large)?;
            one(dims)
        }
        "Attention" => linear::packed_attention(call, 1, 4),
        "QAttention" => linear::packed_attention(call, 1, 8),
        "MultiHeadAttention" => linear::multi_head_attention(call),
        _ => unknown(call),
    }
}

/// Whether the channels come before the positions.
fn channels_first(call: &Call<'_>) -> bool {
    call.node.int("channels_last").unwrap_or(0) == 0
}

/// Operators on tensors whose channels ONNX Runtime has cut into blocks that suit the processor. The shapes that they
/// state do not show the blocks, but channels that fill up the last one are counted until the way back.
fn blocked(call: &mut Call<'_>, name: &str) -> Known<Results> {
    match name {
        "Conv" => one(linear::blocked_conv(call)?),
        "AveragePool" | "MaxPool" => one(linear::pool(call)?),
        "GlobalAveragePool" | "GlobalMaxPool" => standard(call, name),
        "ReorderInput" if channels_first(call) => same_as(call, 0),
        "ReorderInput" => match call.dims(0)? {
            [n, space @ .., c] => one([n, c].into_iter().chain(space).cloned().collect()),
            _ => call.why("the operand has too low a rank"),
        },
        "ReorderOutput" => {
            let [n, _, space @ ..] = call.dims(0)? else { return call.why("the operand has too low a rank") };
            let Some(channels) = call.node.int("channels") else { return call.why("the channels are missing") };
            let channels = Expr::known(channels);
            one(match channels_first(call) {
                true => [n, &channels].into_iter().chain(space).cloned().collect(),
                false => [n].into_iter().chain(space).chain([&channels]).cloned().collect(),
            })
        }
        _ => unknown(call),
    }
}

fn same_as(call: &Call<'_>, slot: usize) -> Known<Results> {
    one(call.dims(slot)?.to_vec())
}

fn elementwise(call: &mut Call<'_>) -> Known<Results> {
    if call.inputs.is_empty() {
        return call.why("it has no operands");
    }
    // Operator sets before 7 align the second operand at attribute `axis`; the result is then like the first.
    if call.opset < 7 && call.node.int("broadcast").unwrap_or(0) != 0 {
        return same_as(call, 0);
    }
    let dims = call.broadcast_all(call.node.data_operands().map(|(slot, _)| slot))?;
    one(dims)
}

/// The extents that a `Shape` operator gives, as a range.
pub(super) fn shape_range(call: &Call<'_>) -> Known<(usize, usize)> {
    let rank = call.rank(0)?;
    let signed = rank as i64;
    let place = |name, default: i64| {
        let at = call.node.int(name).unwrap_or(default);
        let at = if at < 0 { at.saturating_add(signed) } else { at };
        at.clamp(0, signed) as usize
    };
    let (start, end) = (place("start", 0), place("end", signed));
    Ok((start, end.max(start)))
}

/// Known extents, and symbols of their own where nothing is known.
fn fill(call: &Call<'_>, extents: Vec<Option<Expr>>) -> Known<Dims> {
    let fresh = call.fresh_dims(0, extents.len())?;
    Ok(extents.into_iter().zip(fresh).map(|(extent, fresh)| extent.unwrap_or(fresh)).collect())
}

fn reshape(call: &mut Call<'_>) -> Known<Results> {
    let target = match call.node.ints("shape") {
        Some(shape) => shape.iter().map(|&n| Some(Expr::known(n))).collect(),
        None => call.extents(1)?,
    };
    let copies = call.node.int("allowzero").unwrap_or(0) == 0;
    let source = call.dims(0);
    let mut dims: Vec<Option<Expr>> = Vec::with_capacity(target.len());
    for (axis, extent) in target.into_iter().enumerate() {
        dims.push(match extent.as_ref().map(|extent| (extent, extent.as_known())) {
            None | Some((_, Some(-1))) => None,
            Some((_, Some(0))) if copies => match &source {
                Ok(source) => match source.get(axis) {
                    Some(extent) => Some(extent.clone()),
                    None => return call.why("the target copies an extent that does not exist"),
                },
                Err(_) => None,
            },
            Some((_, Some(n))) if n < -1 => return call.why("the target has a negative extent"),
            Some((extent, _)) => Some(extent.clone()),
        });
    }
    if let Ok(source) = source {
        let total = product(source);
        let given = product(dims.iter().flatten());
        match (dims.iter().filter(|extent| extent.is_none()).count(), total, given) {
            (0, Ok(total), Ok(given)) => call.equations.equate(&total, &given),
            (1, _, _) => {
                let rest = remaining_extent(source, dims.iter().flatten());
                dims.iter_mut().filter(|extent| extent.is_none()).for_each(|extent| *extent = rest.clone());
            }
            _ => {}
        }
    }
    one(fill(call, dims)?)
}

/// The extent that, with those given, makes as many elements as the source has.
fn remaining_extent<'e>(source: &[Expr], given: impl Iterator<Item = &'e Expr>) -> Option<Expr> {
    let mut source: Vec<&Expr> = source.iter().collect();
    // Equal factors cancel first: the products stay small.
    let mut left = Vec::new();
    for extent in given {
        match source.iter().position(|own| *own == extent) {
            Some(at) => drop(source.swap_remove(at)),
            None => left.push(extent),
        }
    }
    Expr::product(source)?.quotient(&Expr::product(left)?)
}

fn flatten(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let at = call.node.int("axis").unwrap_or(1);
    let rank = dims.len() as i64;
    let at = if at < 0 { at.saturating_add(rank) } else { at };
    if !(0..=rank).contains(&at) {
        return call.why("the axis does not exist");
    }
    let (left, right) = dims.split_at(at as usize);
    one(vec![product(left)?, product(right)?])
}

fn transpose(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let order = permutation(call, dims.len())?;
    one(order.into_iter().map(|axis| dims[axis].clone()).collect())
}

/// The axes of the operand in the order that a `Transpose` gives them.
pub(super) fn permutation(call: &Call<'_>, rank: usize) -> Known<Vec<usize>> {
    match call.node.ints("perm") {
        None => Ok((0..rank).rev().collect()),
        Some(perm) if perm.len() == rank => call.axes(perm, rank),
        Some(_) => call.why("the permutation does not have the operand's rank"),
    }
}

fn squeeze(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let Some(axes) = call.list("axes", 1)? else {
        if dims.iter().any(|extent| extent.as_known().is_none()) {
            return call.why("which extents are 1 shows at run time only");
        }
        return one(dims.iter().filter(|extent| !extent.is(1)).cloned().collect());
    };
    let axes = call.axes(&axes, dims.len())?;
    for &axis in &axes {
        call.equations.equate(&dims[axis], &Expr::known(1));
    }
    one(dims.iter().enumerate().filter(|(axis, _)| !axes.contains(axis)).map(|(_, extent)| extent.clone()).collect())
}

fn unsqueeze(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let Some(axes) = call.list("axes", 1)? else { return call.why("the axes are missing") };
    let rank = dims.len() + axes.len();
    call.fresh_dims(0, rank)?;
    let axes = call.axes(&axes, rank)?;
    let mut old = dims.iter();
    let place = |axis| if axes.contains(&axis) { Some(Expr::known(1)) } else { old.next().cloned() };
    one((0..rank).map_while(place).collect())
}

fn concat(call: &mut Call<'_>) -> Known<Results> {
    let mut slots = call.node.data_operands().map(|(slot, _)| slot);
    let Some(first) = slots.next() else { return call.why("it has no operands") };
    let mut result = call.dims(first)?.to_vec();
    let default = if call.opset < 4 { Some(1) } else { None };
    let Some(axis) = call.node.int("axis").or(default) else { return call.why("the axis is missing") };
    let axis = axis_of(axis, result.len())?;
    for slot in slots {
        let dims = call.dims(slot)?;
        if dims.len() != result.len() {
            return call.why("the operands differ in rank");
        }
        for (place, extent) in dims.iter().enumerate() {
            result[place] = match place == axis {
                true => plus(&result[place], extent)?,
                false => call.same(&result[place], extent),
            };
        }
    }
    one(result)
}

/// The extents of the parts that a split gives.
pub(super) fn split_sizes(call: &Call<'_>, extent: &Expr, parts: usize) -> Known<Vec<Option<Expr>>> {
    if let Some(sizes) = call.node.ints("split") {
        return Ok(sizes.iter().map(|&n| Some(Expr::known(n))).collect());
    }
    if call.has(1) {
        return call.extents(1);
    }
    let count = call.node.int("num_outputs").unwrap_or(parts as i64);
    if count < 1 || count != parts as i64 {
        return call.why("the number of parts is wrong");
    }
    match extent.as_known() {
        Some(n) => {
            let size = n.div_euclid(count) + i64::from(n.rem_euclid(count) != 0);
            let part = |at: i64| size.min(n.saturating_sub(size.saturating_mul(at)).max(0));
            Ok((0..count).map(|at| Some(Expr::known(part(at)))).collect())
        }
        None => {
            let even = extent.div_exact(&Expr::known(count));
            // Before `num_outputs` existed, the parts had to be equal.
            let even = even.or_else(|| (call.opset < 18).then(|| extent.quotient(&Expr::known(count)))?);
            Ok(vec![even; parts])
        }
    }
}

fn split(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let axis = call.axis("axis", 0, dims.len())?;
    let parts = call.node.outputs.len();
    let sizes = split_sizes(call, &dims[axis], parts)?;
    if sizes.len() != parts {
        return call.why("the number of parts is wrong");
    }
    if let Some(sum) = sizes.iter().try_fold(Expr::known(0), |sum, size| sum.plus(size.as_ref()?)) {
        call.equations.equate(&dims[axis], &sum);
    }
    let part = |(slot, size): (usize, Option<Expr>)| {
        let mut part = dims.to_vec();
        part[axis] = size.unwrap_or_else(|| call.fresh(slot, axis));
        Some(part)
    };
    Ok(sizes.into_iter().enumerate().map(part).collect())
}

/// What a slice takes of one axis.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    pub axis: usize,
    pub start: Option<Expr>,
    pub end: Option<Expr>,
    pub step: Option<i64>,
}

/// The cuts of a `Slice`, in either form of the operator.
pub(super) fn cuts(call: &Call<'_>, rank: usize) -> Known<Vec<Cut>> {
    let known = |list: &[i64]| -> Vec<Option<Expr>> { list.iter().map(|&n| Some(Expr::known(n))).collect() };
    let (starts, ends) = match (call.node.ints("starts"), call.node.ints("ends")) {
        (Some(starts), Some(ends)) => (known(starts), known(ends)),
        _ => (call.extents(1)?, call.extents(2)?),
    };
    let axes = match call.list("axes", 3)? {
        Some(axes) => call.axes(&axes, rank)?,
        None => (0..starts.len()).collect(),
    };
    let steps = match call.fact(4) {
        Some(_) => call.extents(4)?,
        None => vec![Some(Expr::known(1)); starts.len()],
    };
    if starts.len() != ends.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return call.why("starts, ends, axes and steps differ in length");
    }
    if axes.iter().any(|&axis| axis >= rank) {
        return call.why("the axis does not exist");
    }
    let steps = steps.into_iter().map(|step| step.and_then(|step| step.as_known()));
    let cuts = axes.into_iter().zip(starts).zip(ends).zip(steps);
    Ok(cuts.map(|(((axis, start), end), step)| Cut { axis, start, end, step }).collect())
}

impl Cut {
    /// First index, one past the last, and the step, on an axis of known extent.
    pub(super) fn indices(&self, extent: i64) -> Option<(i64, i64, i64)> {
        let last = extent.checked_sub(1).filter(|&last| last >= -1)?;
        let (start, end, step) = (self.start.as_ref()?.as_known()?, self.end.as_ref()?.as_known()?, self.step?);
        let wrap = |at: i64| if at < 0 { at.saturating_add(extent) } else { at };
        match step {
            0 => None,
            1.. => Some((wrap(start).clamp(0, extent), wrap(end).clamp(0, extent), step)),
            _ => Some((wrap(start).clamp(-1, last), wrap(end).clamp(-1, last), step)),
        }
    }

    /// The extent that remains.
    fn extent(&self, extent: &Expr) -> Option<Expr> {
        if let Some((start, end, step)) = extent.as_known().and_then(|n| self.indices(n)) {
            let (distance, stride) = (end.checked_sub(start)?, step.checked_abs()?);
            let distance = if step > 0 { distance } else { distance.checked_neg()? };
            let whole = distance.max(0).checked_add(stride - 1)? / stride;
            return Some(Expr::known(whole));
        }
        let (start, end, step) = (self.start.as_ref()?, self.end.as_ref()?, self.step?);
        let stride = Expr::known(step.checked_abs().filter(|&stride| stride > 0)?);
        let length = if step > 0 {
            let (start, end) = (Self::place(start, extent)?, Self::place(end, extent)?);
            end.minus(&start)?.larger_extent(&Expr::known(0))?
        } else {
            // Only whole axes are taken backwards where the extent is symbolic.
            let from_last = start.as_known().is_some_and(|at| at == -1 || at >= i64::from(i32::MAX));
            let to_first = end.as_known().is_some_and(|at| at <= -i64::from(i32::MAX));
            (from_last && to_first).then(|| extent.clone())?
        };
        length.plus(&stride)?.minus(&Expr::known(1))?.quotient(&stride)
    }

    /// The index that `at` means on an axis of extent `extent`, within `0..=extent`.
    fn place(at: &Expr, extent: &Expr) -> Option<Expr> {
        match at.as_known() {
            Some(at) if at >= i64::from(i32::MAX) => Some(extent.clone()),
            Some(at) if at <= -i64::from(i32::MAX) => Some(Expr::known(0)),
            Some(n) if n < 0 => extent.plus(at)?.larger_extent(&Expr::known(0)),
            Some(_) => at.smaller_extent(extent),
            None if at.extent_at_least().is_some_and(|least| least >= 0) => at.smaller_extent(extent),
            None if at.times(&Expr::known(-1))?.extent_at_least().is_some_and(|least| least > 0) => {
                extent.plus(at)?.larger_extent(&Expr::known(0))
            }
            // The sign is open, as of `h - 3`.
            None => None,
        }
    }
}

fn slice(call: &mut Call<'_>) -> Known<Results> {
    let mut dims = call.dims(0)?.to_vec();
    match cuts(call, dims.len()) {
        Ok(cuts) => {
            for cut in cuts {
                dims[cut.axis] = cut.extent(&dims[cut.axis]).unwrap_or_else(|| call.fresh(0, cut.axis));
            }
            one(dims)
        }
        // Where even the axes are unknown, the rank is not.
        Err(why) => match call.known_ints(3) {
            Some(axes) => {
                for axis in call.axes(&axes, dims.len())? {
                    dims[axis] = call.fresh(0, axis);
                }
                one(dims)
            }
            None if call.has(1) => one(call.fresh_dims(0, dims.len())?),
            None => Err(why),
        },
    }
}

fn gather(call: &mut Call<'_>) -> Known<Results> {
    let (dims, indices) = (call.dims(0)?, call.dims(1)?);
    let axis = call.axis("axis", 0, dims.len())?;
    call.fresh_dims(0, dims.len() + indices.len())?;
    one(dims[..axis].iter().chain(indices).chain(&dims[axis + 1..]).cloned().collect())
}

fn gather_nd(call: &mut Call<'_>) -> Known<Results> {
    let (dims, indices) = (call.dims(0)?, call.dims(1)?);
    let batch = call.node.int("batch_dims").unwrap_or(0);
    let Some((depth, outer)) = indices.split_last() else { return call.why("the indices are a scalar") };
    let Some(depth) = depth.as_known() else { return call.why("the depth of the indices is not known") };
    let from = batch.checked_add(depth).and_then(|from| usize::try_from(from).ok());
    match from.and_then(|from| dims.get(from..)) {
        Some(rest) if batch >= 0 && depth >= 0 => one(outer.iter().chain(rest).cloned().collect()),
        _ => call.why("the indices are deeper than the operand"),
    }
}

fn expand(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let target = call.extents(1)?;
    let target = fill(call, target)?;
    let dims = call.broadcast(dims, &target)?;
    one(dims)
}

fn tile(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    // The first version of the operator repeats one axis.
    let repeats = if call.opset < 6 { vec![None; dims.len()] } else { call.extents(1)? };
    if repeats.len() != dims.len() {
        return call.why("the repeats do not have the operand's rank");
    }
    let tiled = dims.iter().zip(repeats).map(|(extent, repeat)| repeat.and_then(|repeat| extent.times(&repeat)));
    one(fill(call, tiled.collect())?)
}

fn pad(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let pads = match call.node.ints("pads").or_else(|| call.node.ints("paddings")) {
        Some(pads) => pads.iter().map(|&n| Some(Expr::known(n))).collect(),
        None => match call.extents(1) {
            Ok(pads) => pads,
            Err(_) => return one(call.fresh_dims(0, dims.len())?),
        },
    };
    let axes = match call.list("axes", 3)? {
        Some(axes) => call.axes(&axes, dims.len())?,
        None => (0..dims.len()).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return call.why("there are not two pads per axis");
    }
    let (before, after) = pads.split_at(axes.len());
    let mut padded: Vec<Option<Expr>> = dims.iter().cloned().map(Some).collect();
    for ((&axis, before), after) in axes.iter().zip(before).zip(after) {
        let sum = before.as_ref().zip(after.as_ref()).and_then(|(before, after)| before.plus(after));
        padded[axis] = sum.and_then(|sum| dims[axis].plus(&sum));
    }
    one(fill(call, padded)?)
}

fn range(call: &mut Call<'_>) -> Known<Results> {
    let length = || {
        let whole = |slot| call.scalar(slot);
        let steps = whole(1)?.sub(whole(0)?)?.div(whole(2)?)?.ceil()?;
        let steps = steps.whole()?;
        match steps.as_known() {
            Some(n) => Some(Expr::known(n.max(0))),
            None => steps.larger_extent(&Expr::known(0)),
        }
    };
    one(vec![length().unwrap_or_else(|| call.fresh(0, 0))])
}

fn one_hot(call: &mut Call<'_>) -> Known<Results> {
    let mut dims = call.dims(0)?.to_vec();
    let axis = call.axis("axis", -1, dims.len() + 1)?;
    let depth = call.scalar(1).and_then(|depth| depth.whole().cloned());
    dims.insert(axis, depth.unwrap_or_else(|| call.fresh(0, axis)));
    one(dims)
}

fn top_k(call: &mut Call<'_>) -> Known<Results> {
    let mut dims = call.dims(0)?.to_vec();
    let axis = call.axis("axis", -1, dims.len())?;
    let count = match call.node.int("k") {
        Some(k) => Some(Expr::known(k)),
        None => call.scalar(1).and_then(|k| k.whole().cloned()),
    };
    let count = count.unwrap_or_else(|| call.fresh(0, axis));
    dims[axis] = count;
    Ok(vec![Some(dims.clone()), Some(dims)])
}

/// The axes that a reduction reduces, and whether they stay with extent 1.
pub(super) fn reduction(call: &Call<'_>) -> Known<(Vec<usize>, bool)> {
    let rank = call.rank(0)?;
    let keep = call.node.int("keepdims").unwrap_or(1) != 0;
    let axes = match call.list("axes", 1)? {
        Some(axes) if !axes.is_empty() => call.axes(&axes, rank)?,
        _ if call.node.int("noop_with_empty_axes").unwrap_or(0) != 0 => Vec::new(),
        _ => (0..rank).collect(),
    };
    Ok((axes, keep))
}

fn reduced(dims: &[Expr], axes: &[usize], keep: bool) -> Dims {
    let place = |(axis, extent): (usize, &Expr)| match (axes.contains(&axis), keep) {
        (false, _) => Some(extent.clone()),
        (true, true) => Some(Expr::known(1)),
        (true, false) => None,
    };
    dims.iter().enumerate().filter_map(place).collect()
}

fn reduce(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    match reduction(call) {
        Ok((axes, keep)) => one(reduced(dims, &axes, keep)),
        // Axes computed at run time: the rank is known where the axes stay.
        Err(_) if call.has(1) && call.known_ints(1).is_none() && call.node.int("keepdims").unwrap_or(1) != 0 => {
            one(call.fresh_dims(0, dims.len())?)
        }
        Err(why) => Err(why),
    }
}

/// A norm with its statistics in the results `statistics`.
fn layer_normalization(call: &mut Call<'_>, statistics: &[usize]) -> Known<Results> {
    let dims = call.dims(0)?;
    let axis = call.axis("axis", -1, dims.len())?;
    let axes: Vec<usize> = (axis..dims.len()).collect();
    let small = reduced(dims, &axes, true);
    // The gain spans the normalised axes.
    if let (Ok([weight]), [last], true) = (call.dims(1), &dims[axis..], call.node.op.domain.is_empty())
        && !weight.is(1)
    {
        call.same(last, weight);
    }
    let mut results = vec![Some(dims.to_vec())];
    results.extend(statistics.iter().map(|_| Some(small.clone())));
    Ok(results)
}

fn depth_to_space(call: &mut Call<'_>, widen: bool) -> Known<Results> {
    let [n, c, h, w] = call.dims_of_rank::<4>(0)?;
    let Some(block) = call.node.int("blocksize").filter(|&block| block > 0) else {
        return call.why("the block size is missing");
    };
    let Some(area) = block.checked_mul(block) else { return Err(too_large()) };
    let (block, area) = (Expr::known(block), Expr::known(area));
    let divide = |a: &Expr, b: &Expr| a.quotient(b).ok_or_else(too_large);
    one(if widen {
        vec![n.clone(), divide(c, &area)?, times(h, &block)?, times(w, &block)?]
    } else {
        vec![n.clone(), times(c, &area)?, divide(h, &block)?, divide(w, &block)?]
    })
}

fn resize(call: &mut Call<'_>) -> Known<Results> {
    let dims = call.dims(0)?;
    let axes = match call.node.ints("axes") {
        Some(axes) => call.axes(axes, dims.len())?,
        None => (0..dims.len()).collect(),
    };
    let stretched = call.node.string("keep_aspect_ratio_policy").is_none_or(|policy| policy == "stretch");
    let is_empty = |slot: usize| call.dims(slot).is_ok_and(|dims| dims.iter().any(|extent| extent.is(0)));
    let mut result: Vec<Option<Expr>> = dims.iter().cloned().map(Some).collect();
    if call.has(3) && !is_empty(3) {
        let sizes = call.extents(3)?;
        if sizes.len() != axes.len() {
            return call.why("there is not one size per axis");
        }
        for (&axis, size) in axes.iter().zip(sizes) {
            result[axis] = size.filter(|_| stretched);
        }
        return one(fill(call, result)?);
    }
    let slot = if call.opset < 11 { 1 } else { 2 };
    for (at, &axis) in axes.iter().enumerate() {
        let scale = match call.node.attribute("scales") {
            Some(Attribute::Floats(scales)) => scales.get(at).map(|&x| Number::float(x.into())),
            _ => call.items(slot).and_then(|items| items.get(at)?.clone()),
        };
        result[axis] = scale.and_then(|scale| scaled(&dims[axis], &scale));
    }
    one(fill(call, result)?)
}

/// The whole part of an extent times a scale, as runtimes compute it.
fn scaled(extent: &Expr, scale: &Number) -> Option<Expr> {
    if let (Some(n), Some(scale)) = (extent.as_known(), scale.as_f64()) {
        let scaled = (n as f32 * scale as f32).floor();
        return (0.0..1e15).contains(&scaled).then(|| Expr::known(scaled as i64));
    }
    let product = Number::from(extent.clone()).mul(scale)?.floor()?;
    product.whole().cloned()
}

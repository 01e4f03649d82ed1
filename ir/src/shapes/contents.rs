//! What small tensors hold, and what every element of a tensor equals.
//!
//! Together they are constant folding for the arithmetic on shapes that exporters leave in their graphs, with symbols
//! where an extent is known only at run time.

use std::cmp::Ordering;

use super::call::{Call, Dims};
use super::dims::{Cut, cuts, permutation, reduction, shape_range, split_sizes};
use super::number::{Number, round};
use super::{Fact, MAX_ITEMS};
use crate::{Attribute, DataType, Expr};

/// Whole numbers below this one are exact as floats.
const MAX_EXACT: f64 = (1u64 << 53) as f64;

/// Elements in row-major order, each if known.
pub(super) type Items = Vec<Option<Number>>;

/// Known extents as numbers, if their product is small.
pub(super) fn small(dims: &[Expr]) -> Option<Vec<usize>> {
    let mut total = 1usize;
    let mut extents = Vec::with_capacity(dims.len());
    for extent in dims {
        let n = usize::try_from(extent.as_known()?).ok()?;
        total = total.checked_mul(n)?;
        extents.push(n);
    }
    (total <= MAX_ITEMS).then_some(extents)
}

/// For each element of a tensor of extents `to`, the element at the index that `map` makes of its index.
fn permuted(
    items: &[Option<Number>],
    from: &[usize],
    to: &[usize],
    map: impl Fn(&[usize]) -> Option<Vec<usize>>,
) -> Option<Items> {
    let total: usize = to.iter().product();
    let mut index = vec![0usize; to.len()];
    let mut result = Vec::with_capacity(total);
    for _ in 0..total {
        let source = map(&index)?;
        let mut at = 0usize;
        for (&place, &extent) in source.iter().zip(from) {
            if place >= extent {
                return None;
            }
            at = at * extent + place;
        }
        result.push(items.get(at)?.clone());
        for (place, &extent) in index.iter_mut().zip(to).rev() {
            *place += 1;
            if *place < extent {
                break;
            }
            *place = 0;
        }
    }
    Some(result)
}

/// The elements of operand `slot` with its extents.
fn operand<'c>(call: &Call<'c>, slot: usize) -> Option<(&'c [Option<Number>], Vec<usize>)> {
    let items = call.items(slot)?;
    let dims = small(call.dims(slot).ok()?)?;
    (dims.iter().product::<usize>() == items.len()).then_some((items, dims))
}

/// The elements of operand `slot` broadcast to `to`.
fn broadcast(call: &Call<'_>, slot: usize, to: &[usize]) -> Option<Items> {
    let (items, from) = operand(call, slot)?;
    let offset = to.len().checked_sub(from.len())?;
    permuted(items, &from, to, |index| {
        let places = index[offset..].iter().zip(&from);
        Some(places.map(|(&place, &extent)| if extent == 1 { 0 } else { place }).collect())
    })
}

/// The elements of result `slot` of `call`, whose extents are `dims`.
pub(super) fn items(call: &Call<'_>, slot: usize, dims: Option<&Dims>, dtype: Option<DataType>) -> Option<Items> {
    let to = small(dims?)?;
    let name = folded(call)?;
    let wants_type = |items: Items| -> Option<Items> {
        let dtype = dtype?;
        Some(items.into_iter().map(|item| item?.cast(dtype)).collect())
    };
    match name {
        "Shape" => {
            let (start, end) = shape_range(call).ok()?;
            let dims = call.dims(0).ok()?.get(start..end)?;
            Some(dims.iter().map(|extent| Some(extent.clone().into())).collect())
        }
        "Size" => Some(vec![Expr::product(call.dims(0).ok()?).map(Number::from)]),
        "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Dropout" if slot == 0 => {
            let items = call.items(0)?;
            (items.len() == to.iter().product::<usize>()).then(|| items.to_vec())
        }
        "Cast" | "CastLike" => wants_type(call.items(0)?.to_vec()),
        "QuantizeLinear" | "DequantizeLinear" => {
            let (scale, zero_point) = scaling(call)?;
            let item = |item: &Option<Number>| scaled(name, item.as_ref()?.as_f64()?, scale, zero_point, dtype?);
            Some(call.items(0)?.iter().map(|x| item(x).map(Number::float)).collect())
        }
        "Transpose" => {
            let (items, from) = operand(call, 0)?;
            let order = permutation(call, from.len()).ok()?;
            permuted(items, &from, &to, |index| {
                let mut source = vec![0; from.len()];
                order.iter().zip(index).for_each(|(&axis, &place)| source[axis] = place);
                Some(source)
            })
        }
        "Slice" => {
            let (items, from) = operand(call, 0)?;
            let cuts = cuts(call, from.len()).ok()?;
            let taken = |cut: &Cut| Some((cut.axis, cut.indices(from[cut.axis] as i64)?));
            let cuts = cuts.iter().map(taken).collect::<Option<Vec<_>>>()?;
            permuted(items, &from, &to, |index| {
                let mut source = index.to_vec();
                for &(axis, (start, _, step)) in &cuts {
                    let place = i64::try_from(index[axis]).ok()?.checked_mul(step)?.checked_add(start)?;
                    source[axis] = usize::try_from(place).ok()?;
                }
                Some(source)
            })
        }
        "Gather" => {
            let (items, from) = operand(call, 0)?;
            let (indices, shape) = operand(call, 1)?;
            let axis = call.axis("axis", 0, from.len()).ok()?;
            permuted(items, &from, &to, |index| {
                let (before, rest) = index.split_at_checked(axis)?;
                let (inner, after) = rest.split_at_checked(shape.len())?;
                let at = inner.iter().zip(&shape).fold(0, |at, (&place, &extent)| at * extent + place);
                let wanted = indices.get(at)?.as_ref()?.whole()?.as_known()?;
                let wanted = if wanted < 0 { wanted.checked_add(from[axis] as i64)? } else { wanted };
                let wanted = usize::try_from(wanted).ok()?;
                Some(before.iter().copied().chain([wanted]).chain(after.iter().copied()).collect())
            })
        }
        "Expand" => broadcast(call, 0, &to),
        "Tile" => {
            let (items, from) = operand(call, 0)?;
            permuted(items, &from, &to, |index| {
                Some(index.iter().zip(&from).map(|(&place, &extent)| place % extent.max(1)).collect())
            })
        }
        "Concat" => concat(call, &to),
        "Split" => {
            let (items, from) = operand(call, 0)?;
            let axis = call.axis("axis", 0, from.len()).ok()?;
            let sizes = split_sizes(call, &Expr::known(from[axis] as i64), call.node.outputs.len()).ok()?;
            let before = sizes.get(..slot)?.iter();
            let start = before.map(|size| size.as_ref()?.as_known()).sum::<Option<i64>>()?;
            let start = usize::try_from(start).ok()?;
            permuted(items, &from, &to, |index| {
                let mut source = index.to_vec();
                source[axis] = source[axis].checked_add(start)?;
                Some(source)
            })
        }
        "Range" => {
            let (start, step) = (call.scalar(0)?, call.scalar(2)?);
            let item = |at: usize| start.add(&step.mul(&Number::known(at as i64))?);
            wants_type((0..to.iter().product()).map(item).collect())
        }
        "Where" => {
            let (test, yes, no) = (broadcast(call, 0, &to), broadcast(call, 1, &to), broadcast(call, 2, &to));
            let choose = |at: usize| {
                let get = |items: &Option<Items>| items.as_ref()?.get(at)?.clone();
                match get(&test).and_then(|test| test.is_zero()) {
                    Some(false) => get(&yes),
                    Some(true) => get(&no),
                    None => get(&yes).filter(|yes| Some(yes) == get(&no).as_ref()),
                }
            };
            Some((0..to.iter().product()).map(choose).collect())
        }
        "ReduceProd" | "ReduceSum" | "ReduceMax" | "ReduceMin" => wants_type(reduce(call, name, &to)?),
        "Max" | "Min" | "Sum" => {
            let parts =
                (0..call.inputs.len()).map(|slot| broadcast(call, slot, &to)).collect::<Option<Vec<Items>>>()?;
            let merge = |a: Option<Number>, b: Option<Number>| match name {
                "Sum" => a?.add(&b?),
                _ => a?.extremum(&b?, name == "Max"),
            };
            let item = |at: usize| parts.iter().map(|part| part[at].clone()).reduce(merge)?;
            wants_type((0..to.iter().product()).map(item).collect())
        }
        "Neg" | "Abs" | "Sqrt" | "Floor" | "Ceil" | "Round" | "Not" | "Reciprocal" | "Sign" => {
            let items = call.items(0)?.iter().map(|item| unary(name, item.as_ref()?)).collect();
            wants_type(items)
        }
        "Mod" if call.node.int("fmod").unwrap_or(0) != 0 => None,
        "Add" | "Sub" | "Mul" | "Div" | "Mod" | "Pow" | "Equal" | "Less" | "LessOrEqual" | "Greater"
        | "GreaterOrEqual" | "And" | "Or" | "Xor" => {
            if call.opset < 7 && call.node.int("broadcast").unwrap_or(0) != 0 {
                return None;
            }
            let (a, b) = (broadcast(call, 0, &to)?, broadcast(call, 1, &to)?);
            let integers = call.dtype(0).is_none_or(|dtype| !dtype.is_float());
            let items = a.iter().zip(&b).map(|(a, b)| binary(name, a.as_ref(), b.as_ref(), integers)).collect();
            wants_type(items)
        }
        _ => None,
    }
}

fn concat(call: &Call<'_>, to: &[usize]) -> Option<Items> {
    let axis = call.axis("axis", 1, to.len()).ok()?;
    let outer: usize = to[..axis].iter().product();
    let mut parts = Vec::with_capacity(call.inputs.len());
    for slot in 0..call.inputs.len() {
        let dims = small(call.dims(slot).ok()?)?;
        let length: usize = dims.get(axis..)?.iter().product();
        let total = length.checked_mul(outer)?;
        let items = match operand(call, slot) {
            Some((items, _)) if items.len() == total => items.to_vec(),
            _ => vec![None; total],
        };
        parts.push((items, length));
    }
    let row = |row: usize| parts.iter().flat_map(move |(items, length)| &items[row * length..(row + 1) * length]);
    Some((0..outer).flat_map(row).cloned().collect())
}

fn reduce(call: &Call<'_>, name: &str, to: &[usize]) -> Option<Items> {
    let (items, from) = operand(call, 0)?;
    let (axes, keep) = reduction(call).ok()?;
    let mut result: Vec<Option<Option<Number>>> = vec![None; to.iter().product()];
    for (at, item) in items.iter().enumerate() {
        let (mut rest, mut place, mut stride) = (at, 0usize, 1usize);
        for (axis, &extent) in from.iter().enumerate().rev() {
            let own = rest % extent;
            rest /= extent;
            if !axes.contains(&axis) {
                place += own * stride;
                stride *= extent;
            }
        }
        let merged = match (result.get(place)?, item) {
            (None, item) => item.clone(),
            (Some(Some(sum)), Some(item)) => match name {
                "ReduceProd" => sum.mul(item),
                "ReduceSum" => sum.add(item),
                _ => sum.extremum(item, name == "ReduceMax"),
            },
            _ => None,
        };
        *result.get_mut(place)? = Some(merged);
    }
    debug_assert!(keep || to.len() + axes.len() == from.len());
    let empty = match name {
        "ReduceProd" => Some(Number::known(1)),
        "ReduceSum" => Some(Number::known(0)),
        _ => None,
    };
    Some(result.into_iter().map(|item| item.unwrap_or_else(|| empty.clone())).collect())
}

fn unary(name: &str, item: &Number) -> Option<Number> {
    match name {
        "Neg" => item.neg(),
        "Abs" => item.abs(),
        "Sqrt" => item.sqrt(),
        "Floor" => item.floor(),
        "Ceil" => item.ceil(),
        "Round" => item.whole().cloned().map(Number::from),
        "Not" => Some(Number::boolean(item.is_zero()?)),
        "Reciprocal" => Number::known(1).div(item),
        "Sign" => Some(Number::known(match item.compare(&Number::known(0))? {
            Ordering::Less => -1,
            Ordering::Equal => 0,
            Ordering::Greater => 1,
        })),
        _ => None,
    }
}

fn binary(name: &str, a: Option<&Number>, b: Option<&Number>, integers: bool) -> Option<Number> {
    let truth = |item: Option<&Number>| item.and_then(Number::is_zero).map(|zero| !zero);
    match (name, truth(a), truth(b)) {
        ("And", Some(false), _) | ("And", _, Some(false)) => return Some(Number::boolean(false)),
        ("Or", Some(true), _) | ("Or", _, Some(true)) => return Some(Number::boolean(true)),
        _ => {}
    }
    let (a, b) = (a?, b?);
    match name {
        "Add" => a.add(b),
        "Sub" => a.sub(b),
        "Mul" => a.mul(b),
        "Div" if integers => a.div_integers(b),
        "Div" => a.div(b),
        "Mod" => a.modulo(b),
        "Pow" if b.as_f64() == Some(0.5) => a.sqrt(),
        "Pow" => {
            let power = b.whole()?.as_known().filter(|power| (0..=8).contains(power))?;
            (0..power).try_fold(Number::known(1), |product, _| product.mul(a))
        }
        "And" => Some(Number::boolean(!a.is_zero()? && !b.is_zero()?)),
        "Or" => Some(Number::boolean(!a.is_zero()? || !b.is_zero()?)),
        "Xor" => Some(Number::boolean(a.is_zero()? != b.is_zero()?)),
        _ => {
            // Symbolic numbers that are written alike are equal; others may be so for some extents.
            let order = if a == b { Ordering::Equal } else { a.compare(b)? };
            Some(Number::boolean(holds(name, Some(order))?))
        }
    }
}

/// Whether a comparison holds between numbers in this order; `None` stands for NaN.
fn holds(name: &str, order: Option<Ordering>) -> Option<bool> {
    Some(match name {
        "Equal" => order == Some(Ordering::Equal),
        "Less" => order == Some(Ordering::Less),
        "LessOrEqual" => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        "Greater" => order == Some(Ordering::Greater),
        "GreaterOrEqual" => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
        _ => return None,
    })
}

/// The number that every element of result `slot` equals.
pub(super) fn uniform(call: &Call<'_>, slot: usize, dtype: Option<DataType>) -> Option<f64> {
    let name = folded(call)?;
    let of = |slot: usize| call.fact(slot)?.uniform;
    match name {
        "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Transpose" | "Expand" | "Tile" | "Slice"
        | "Split" | "Gather" | "GatherElements" | "GatherND" | "DepthToSpace" | "SpaceToDepth" => of(0),
        "Dropout" if slot == 0 && call.node.int("training_mode").unwrap_or(0) == 0 && !call.has(2) => of(0),
        "Cast" | "CastLike" => convert(of(0)?, dtype?),
        "QuantizeLinear" | "DequantizeLinear" => {
            let (scale, zero_point) = scaling(call)?;
            scaled(name, of(0)?, scale, zero_point, dtype?)
        }
        "ConstantOfShape" => match call.node.attribute("value") {
            Some(Attribute::Tensor(value)) if value.len() == 1 => value.uniform(),
            Some(_) => None,
            None => Some(0.0),
        },
        "Concat" => {
            let first = of(0)?;
            (1..call.inputs.len()).all(|slot| of(slot) == Some(first)).then_some(first)
        }
        "Where" => match of(0) {
            Some(0.0) => of(2),
            Some(_) => of(1),
            None => of(1).filter(|&yes| of(2) == Some(yes)),
        },
        "And" if of(0) == Some(0.0) || of(1) == Some(0.0) => Some(0.0),
        "Or" if of(0).is_some_and(|x| x != 0.0) || of(1).is_some_and(|x| x != 0.0) => Some(1.0),
        "Max" | "Min" => {
            let pick = |a: f64, b: f64| if name == "Max" { a.max(b) } else { a.min(b) };
            let mut all = (0..call.inputs.len()).map(of);
            let first = all.next()??;
            all.try_fold(first, |best, x| Some(pick(best, x?)))
        }
        "ReduceMax" | "ReduceMin" | "ReduceMean" => of(0),
        "Neg" | "Abs" | "Sqrt" | "Floor" | "Ceil" | "Not" | "IsNaN" | "IsInf" | "Reciprocal" => {
            let x = of(0)?;
            let y = match name {
                "Neg" => -x,
                "Abs" => x.abs(),
                "Sqrt" => x.sqrt(),
                "Floor" => x.floor(),
                "Ceil" => x.ceil(),
                "Not" => f64::from(x == 0.0),
                "IsNaN" => f64::from(x.is_nan()),
                "IsInf" => f64::from(x.is_infinite()),
                _ => 1.0 / x,
            };
            Some(round(y, dtype?)).filter(|y| !y.is_nan())
        }
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual"
        | "And" | "Or" | "Xor" => {
            let (a, b) = (of(0)?, of(1)?);
            let truth = |truth: bool| Some(f64::from(truth));
            let dtype = dtype?;
            let y = match name {
                "Add" => a + b,
                "Sub" => a - b,
                "Mul" => a * b,
                "Div" if dtype.is_float() => a / b,
                "Div" if b == 0.0 => return None,
                "Div" => (a / b).trunc(),
                "Pow" if dtype.is_float() => a.powf(b),
                "Pow" => return None,
                "And" => return truth(a != 0.0 && b != 0.0),
                "Or" => return truth(a != 0.0 || b != 0.0),
                "Xor" => return truth((a != 0.0) != (b != 0.0)),
                _ => return truth(holds(name, a.partial_cmp(&b))?),
            };
            // Integers may wrap around or lose digits as floats: only small ones are computed.
            let signed = matches!(dtype, DataType::I64 | DataType::I32);
            let narrow = !signed && !matches!(dtype, DataType::U64 | DataType::U32);
            let limit = if narrow { i8::MAX.into() } else { f64::from(i32::MAX) };
            let sound = dtype.is_float() || y.abs() <= limit && (y >= 0.0 || signed);
            sound.then(|| round(y, dtype)).filter(|y| !y.is_nan())
        }
        _ => None,
    }
}

/// The operator, where its results can be computed here.
fn folded<'c>(call: &Call<'c>) -> Option<&'c str> {
    let node = call.node;
    let quantises = matches!(node.op.name.as_str(), "QuantizeLinear" | "DequantizeLinear");
    node.standard_op().or_else(|| (node.op.domain == "com.microsoft" && quantises).then_some(node.op.name.as_str()))
}

/// The scale and the zero point by which a call quantises or dequantises, where there is one.
fn scaling(call: &Call<'_>) -> Option<(f64, f64)> {
    let of = |slot: usize| call.fact(slot)?.uniform;
    Some((of(1)?, if call.has(2) { of(2)? } else { 0.0 }))
}

/// A number quantised or dequantised.
fn scaled(name: &str, x: f64, scale: f64, zero_point: f64, dtype: DataType) -> Option<f64> {
    if name == "DequantizeLinear" {
        return Some(round((x - zero_point) * scale, dtype)).filter(|x| x.is_finite());
    }
    let (low, high) = match dtype {
        DataType::U8 => (0.0, u8::MAX.into()),
        DataType::I8 => (i8::MIN.into(), i8::MAX.into()),
        DataType::U16 => (0.0, u16::MAX.into()),
        DataType::I16 => (i16::MIN.into(), i16::MAX.into()),
        _ => return None,
    };
    let quotient = round(x / scale, DataType::F32).round_ties_even() + zero_point;
    quotient.is_finite().then(|| f64::clamp(quotient, low, high))
}

/// A number as a tensor of type `dtype` holds it.
fn convert(x: f64, dtype: DataType) -> Option<f64> {
    match dtype {
        DataType::Bool => Some(f64::from(x != 0.0)),
        dtype if dtype.is_float() => Some(round(x, dtype)),
        _ => Number::float(x).cast(dtype)?.as_f64(),
    }
}

/// Brings what is known of the elements together: small uniform tensors have known elements, and the reverse.
pub(super) fn settle(fact: &mut Fact) {
    let extents = fact.dims.as_deref().and_then(small);
    let Some(extents) = extents else {
        fact.items = None;
        fact.uniform = fact.uniform.filter(|x| x.abs() < MAX_EXACT || fact.dtype.is_some_and(DataType::is_float));
        return;
    };
    let total: usize = extents.iter().product();
    let mut items = fact.items.take().filter(|items| items.len() == total).unwrap_or_else(|| vec![None; total]);
    if fact.uniform.is_none() {
        let first = items.first().and_then(|first| first.as_ref()?.as_f64());
        let same = |item: &Option<Number>| item.as_ref().and_then(Number::as_f64).is_some_and(|x| Some(x) == first);
        fact.uniform = first.filter(|_| items.iter().all(same));
    }
    // Integers that a float does not hold exactly are known as elements only.
    fact.uniform = fact.uniform.filter(|x| x.abs() < MAX_EXACT || fact.dtype.is_some_and(DataType::is_float));
    if let Some(x) = fact.uniform {
        items.iter_mut().for_each(|item| *item = item.take().or_else(|| Some(Number::float(x))));
    }
    fact.items = Some(items).filter(|items| items.is_empty() || items.iter().any(Option::is_some));
}

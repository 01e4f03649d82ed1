//! Extents of products, convolutions, pools and attention.

use std::collections::{BTreeMap, HashMap};

use super::call::{Call, Dims, Known, plus, times, too_large};
use super::dims::Results;
use crate::Expr;

/// How the operands of a matrix product lie in memory.
#[derive(Default)]
pub(super) struct Layout {
    /// The left matrices are transposed.
    pub left: bool,
    /// The right matrices are transposed.
    pub right: bool,
    /// The left operand has its batch axes after the rows.
    pub left_batch: bool,
    /// The right operand, likewise.
    pub right_batch: bool,
}

/// The operand's axes as batch, rows, columns.
fn as_matrices(dims: &[Expr], transposed: bool, batch_inside: bool) -> Dims {
    let mut dims = dims.to_vec();
    let rank = dims.len();
    if batch_inside && rank > 2 {
        dims[..rank - 1].rotate_left(1);
    }
    if transposed && rank > 1 {
        dims.swap(rank - 1, rank - 2);
    }
    dims
}

/// `MatMul` of the operands in `left` and `right`.
pub(super) fn matmul(call: &mut Call<'_>, left: usize, right: usize, layout: &Layout) -> Known<Dims> {
    let mut a = as_matrices(call.dims(left)?, layout.left, layout.left_batch);
    let mut b = as_matrices(call.dims(right)?, layout.right, layout.right_batch);
    if a.is_empty() || b.is_empty() {
        return call.why("an operand is a scalar");
    }
    let (row, column) = (a.len() == 1, b.len() == 1);
    if row {
        a.insert(0, Expr::known(1));
    }
    if column {
        b.push(Expr::known(1));
    }
    let ([batch_a @ .., rows, inner_a], [batch_b @ .., inner_b, columns]) = (a.as_slice(), b.as_slice()) else {
        return call.why("an operand has too low a rank");
    };
    call.same(inner_a, inner_b);
    let mut dims = call.broadcast(batch_a, batch_b)?;
    if !row {
        dims.push(rows.clone());
    }
    if !column {
        dims.push(columns.clone());
    }
    Ok(dims)
}

/// `Gemm` of the operands in `left` and `right`.
pub(super) fn gemm(call: &mut Call<'_>, left: usize, right: usize) -> Known<Dims> {
    let ([a0, a1], [b0, b1]) = (call.dims_of_rank::<2>(left)?, call.dims_of_rank::<2>(right)?);
    let flag = |name| call.node.int(name).unwrap_or(0) != 0;
    let (rows, inner_a) = if flag("transA") { (a1, a0) } else { (a0, a1) };
    let (inner_b, columns) = if flag("transB") { (b1, b0) } else { (b0, b1) };
    call.same(inner_a, inner_b);
    Ok(vec![rows.clone(), columns.clone()])
}

/// What a term of an `Einsum` equation lists: letters, and where the ellipsis stands.
#[derive(Debug)]
pub(super) struct Term {
    /// Letters before the ellipsis, or all.
    pub before: Vec<char>,
    /// Whether there is an ellipsis.
    pub ellipsis: bool,
    /// Letters after it.
    pub after: Vec<char>,
}

impl Term {
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.split_once("...").map_or((text, None), |(before, after)| (before, Some(after)));
        let letters = |text: &str| text.chars().map(|c| c.is_alphabetic().then_some(c)).collect::<Option<Vec<char>>>();
        Some(Self { before: letters(before)?, ellipsis: after.is_some(), after: letters(after.unwrap_or(""))? })
    }
}

/// The terms of an equation and its result; the result is spelled out where the equation leaves it implicit.
pub(super) fn parse_einsum(equation: &str) -> Option<(Vec<Term>, Term)> {
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = equation.split_once("->").map_or((equation.as_str(), None), |(l, r)| (l, Some(r)));
    let terms = left.split(',').map(Term::parse).collect::<Option<Vec<Term>>>()?;
    let result = match right {
        Some(right) => Term::parse(right)?,
        None => {
            let mut counts: BTreeMap<char, usize> = BTreeMap::new();
            for &letter in terms.iter().flat_map(|term| term.before.iter().chain(&term.after)) {
                *counts.entry(letter).or_default() += 1;
            }
            let once = counts.into_iter().filter(|&(_, count)| count == 1).map(|(letter, _)| letter).collect();
            let ellipsis = terms.iter().any(|term| term.ellipsis);
            match ellipsis {
                true => Term { before: Vec::new(), ellipsis, after: once },
                false => Term { before: once, ellipsis, after: Vec::new() },
            }
        }
    };
    Some((terms, result))
}

/// `Einsum`.
pub(super) fn einsum(call: &mut Call<'_>) -> Known<Dims> {
    let Some(equation) = call.node.string("equation") else { return call.why("the equation is missing") };
    let Some((terms, result)) = parse_einsum(equation) else { return call.why("the equation is malformed") };
    if terms.len() != call.inputs.len() {
        return call.why("the equation does not have one term per operand");
    }
    let mut letters: HashMap<char, Expr> = HashMap::new();
    let mut shared = Dims::new();
    for (slot, term) in terms.iter().enumerate() {
        let dims = call.dims(slot)?;
        let Some(middle) = dims.len().checked_sub(term.before.len() + term.after.len()) else {
            return call.why("an operand has too low a rank for its term");
        };
        if middle > 0 && !term.ellipsis {
            return call.why("an operand has too high a rank for its term");
        }
        let (before, rest) = dims.split_at(term.before.len());
        let (middle, after) = rest.split_at(middle);
        shared = call.broadcast(&shared, middle)?;
        for (&letter, extent) in term.before.iter().chain(&term.after).zip(before.iter().chain(after)) {
            let merged = match letters.get(&letter) {
                Some(known) => call.broadcast_one(&known.clone(), extent)?,
                None => extent.clone(),
            };
            letters.insert(letter, merged);
        }
    }
    let mut dims = Dims::new();
    let pick = |letter: &char| letters.get(letter).cloned();
    let parts = [&result.before, &result.after].map(|part| part.iter().map(pick).collect::<Option<Dims>>());
    let [Some(before), Some(after)] = parts else { return call.why("the result has a letter that no operand has") };
    dims.extend(before);
    if result.ellipsis {
        dims.extend(shared);
    }
    dims.extend(after);
    Ok(dims)
}

/// The windows that a convolution or pool slides over the spatial axes.
struct Windows {
    kernel: Vec<Expr>,
    strides: Vec<i64>,
    dilations: Vec<i64>,
    pads: Vec<i64>,
    auto_pad: String,
    round_up: bool,
}

impl Windows {
    fn of(call: &Call<'_>, kernel: Vec<Expr>) -> Known<Self> {
        let rank = kernel.len();
        let list = |name, length: usize, default: i64| match call.node.ints(name) {
            None => Ok(vec![default; length]),
            Some(list) if list.len() == length => Ok(list.to_vec()),
            Some(_) => call.why(&format!("the attribute '{name}' has the wrong length")),
        };
        let windows = Self {
            strides: list("strides", rank, 1)?,
            dilations: list("dilations", rank, 1)?,
            pads: list("pads", 2 * rank, 0)?,
            auto_pad: call.node.string("auto_pad").unwrap_or("NOTSET").to_owned(),
            round_up: call.node.int("ceil_mode").unwrap_or(0) != 0,
            kernel,
        };
        match windows.strides.iter().chain(&windows.dilations).all(|&n| n > 0) {
            true => Ok(windows),
            false => call.why("a stride or dilation is not positive"),
        }
    }

    /// The extent that a window reaches over on spatial axis `at`.
    fn reach(&self, at: usize) -> Option<Expr> {
        let gaps = self.kernel[at].minus(&Expr::known(1))?;
        gaps.times(&Expr::known(self.dilations[at]))?.plus(&Expr::known(1))
    }

    fn padding(&self, at: usize) -> Option<i64> {
        self.pads[at].checked_add(self.pads[at + self.kernel.len()])
    }

    /// The number of windows on spatial axis `at`.
    fn count(&self, at: usize, extent: &Expr) -> Option<Expr> {
        let stride = Expr::known(self.strides[at]);
        let round_up = |expr: &Expr| expr.plus(&stride)?.minus(&Expr::known(1))?.quotient(&stride);
        match self.auto_pad.as_str() {
            "SAME_UPPER" | "SAME_LOWER" => round_up(extent),
            "VALID" => round_up(&extent.minus(&self.reach(at)?)?.plus(&Expr::known(1))?),
            _ => {
                let slack = extent.plus(&Expr::known(self.padding(at)?))?.minus(&self.reach(at)?)?;
                let steps = slack.quotient(&stride)?;
                if !self.round_up || slack.div_exact(&stride).is_some() {
                    return steps.plus(&Expr::known(1));
                }
                // The last window must not start beyond the operand and its padding in front.
                let count = round_up(&slack)?.plus(&Expr::known(1))?.as_known()?;
                let last = count.checked_sub(1)?.checked_mul(self.strides[at])?;
                let beyond = last >= extent.as_known()?.checked_add(self.pads[at])?;
                Some(Expr::known(count - i64::from(beyond)))
            }
        }
    }

    fn counts(&self, call: &Call<'_>, space: &[Expr]) -> Dims {
        let count = |(at, extent)| self.count(at, extent).unwrap_or_else(|| call.fresh(0, at + 2));
        space.iter().enumerate().map(count).collect()
    }
}

/// The extents of a kernel: the attribute, else the weight's.
fn kernel(call: &Call<'_>, weight: Option<&[Expr]>, rank: usize) -> Known<Vec<Expr>> {
    let kernel: Vec<Expr> = match (call.node.ints("kernel_shape"), weight) {
        (Some(shape), _) => shape.iter().map(|&n| Expr::known(n)).collect(),
        (None, Some([_, _, kernel @ ..])) => kernel.to_vec(),
        _ => return call.why("the kernel's extents are missing"),
    };
    if kernel.len() == rank { Ok(kernel) } else { call.why("the kernel does not have the operand's rank") }
}

/// A convolution of the operand in `data` with the weights in `weight`.
pub(super) fn conv(call: &mut Call<'_>, data: usize, weight: usize) -> Known<Dims> {
    if let (Ok([_, c, ..]), Ok([_, inner, ..])) = (call.dims(data), call.dims(weight)) {
        let groups = Expr::known(call.node.int("group").unwrap_or(1));
        let channels = times(inner, &groups)?;
        call.same(c, &channels);
    }
    windows_of(call, data, weight)
}

/// A convolution whose channels are in blocks; their number may be more than the operand's.
pub(super) fn blocked_conv(call: &Call<'_>) -> Known<Dims> {
    windows_of(call, 0, 1)
}

fn windows_of(call: &Call<'_>, data: usize, weight: usize) -> Known<Dims> {
    let ([n, _, space @ ..], weights @ [out, _, ..]) = (call.dims(data)?, call.dims(weight)?) else {
        return call.why("an operand has too low a rank");
    };
    let windows = Windows::of(call, kernel(call, Some(weights), space.len())?)?;
    Ok([n.clone(), out.clone()].into_iter().chain(windows.counts(call, space)).collect())
}

/// `ConvTranspose`.
pub(super) fn conv_transpose(call: &mut Call<'_>) -> Known<Dims> {
    let ([n, c, space @ ..], weights @ [first, inner, ..]) = (call.dims(0)?, call.dims(1)?) else {
        return call.why("an operand has too low a rank");
    };
    call.same(c, first);
    let out = times(inner, &Expr::known(call.node.int("group").unwrap_or(1)))?;
    let windows = Windows::of(call, kernel(call, Some(weights), space.len())?)?;
    let extra = call.node.ints("output_padding").map_or(vec![0; space.len()], <[i64]>::to_vec);
    let fixed = call.node.ints("output_shape");
    if extra.len() != space.len() {
        return call.why("the attribute 'output_padding' has the wrong length");
    }
    let extent = |(at, extent): (usize, &Expr)| {
        if let Some(fixed) = fixed {
            return Some(Expr::known(*fixed.get(fixed.len().checked_sub(space.len())? + at)?));
        }
        let stride = Expr::known(windows.strides[at]);
        if windows.auto_pad.starts_with("SAME") {
            return extent.times(&stride);
        }
        let grown = extent.minus(&Expr::known(1))?.times(&stride)?.plus(&windows.reach(at)?)?;
        let padding = if windows.auto_pad == "VALID" { 0 } else { windows.padding(at)? };
        grown.plus(&Expr::known(extra[at].checked_sub(padding)?))
    };
    let space: Dims =
        space.iter().enumerate().map(|part| extent(part).unwrap_or_else(|| call.fresh(0, part.0 + 2))).collect();
    Ok([n.clone(), out].into_iter().chain(space).collect())
}

/// Pools with a window.
pub(super) fn pool(call: &mut Call<'_>) -> Known<Dims> {
    let [n, c, space @ ..] = call.dims(0)? else { return call.why("the operand has too low a rank") };
    let windows = Windows::of(call, kernel(call, None, space.len())?)?;
    Ok([n.clone(), c.clone()].into_iter().chain(windows.counts(call, space)).collect())
}

/// A positive attribute.
fn count(call: &Call<'_>, name: &str) -> Known<Expr> {
    match call.node.int(name).filter(|&n| n > 0) {
        Some(n) => Ok(Expr::known(n)),
        None => call.why(&format!("the attribute '{name}' is missing")),
    }
}

fn divide(a: &Expr, b: &Expr) -> Known<Expr> {
    a.quotient(b).ok_or_else(too_large)
}

/// The extents of one operand of `Attention`: batch, heads, tokens, width of a head.
fn heads_of(call: &Call<'_>, slot: usize, heads: &str) -> Known<[Expr; 4]> {
    match call.dims(slot)? {
        [b, h, s, d] => Ok([b.clone(), h.clone(), s.clone(), d.clone()]),
        [b, s, width] => {
            let heads = count(call, heads)?;
            Ok([b.clone(), heads.clone(), s.clone(), divide(width, &heads)?])
        }
        _ => call.why("an operand has neither rank 3 nor rank 4"),
    }
}

/// `Attention` of the standard operator set.
pub(super) fn attention(call: &mut Call<'_>) -> Known<Results> {
    let flat = call.rank(0)? == 3;
    let [qb, qh, qs, qd] = heads_of(call, 0, "q_num_heads")?;
    let [kb, kh, ks, kd] = heads_of(call, 1, "kv_num_heads")?;
    let [vb, vh, vs, vd] = heads_of(call, 2, "kv_num_heads")?;
    let batch = call.same(&qb, &kb);
    let batch = call.same(&batch, &vb);
    call.same(&qd, &kd);
    let (kh, ks) = (call.same(&kh, &vh), call.same(&ks, &vs));
    let y = match flat {
        true => vec![batch.clone(), qs.clone(), times(&qh, &vd)?],
        false => vec![batch.clone(), qh.clone(), qs.clone(), vd.clone()],
    };
    let total = match call.has(4) {
        true => plus(&call.dims_of_rank::<4>(4)?[2], &ks)?,
        false => ks,
    };
    let present = |width: &Expr| Some(vec![batch.clone(), kh.clone(), total.clone(), width.clone()]);
    Ok(vec![Some(y), present(&kd), present(&vd), Some(vec![batch.clone(), qh, qs, total.clone()])])
}

/// `Attention` of ONNX Runtime, whose projections are in one matrix.
pub(super) fn packed_attention(call: &mut Call<'_>, weight: usize, past: usize) -> Known<Results> {
    let [b, s, width] = call.dims_of_rank::<3>(0)?;
    let [inner, all] = call.dims_of_rank::<2>(weight)?;
    call.same(width, inner);
    let value_width = match call.node.ints("qkv_hidden_sizes") {
        Some([_, _, value]) => Expr::known(*value),
        _ => divide(all, &Expr::known(3))?,
    };
    let mut results = vec![Some(vec![b.clone(), s.clone(), value_width.clone()])];
    let heads = count(call, "num_heads")?;
    let total = match call.has(past) {
        true => call.dims_of_rank::<5>(past).and_then(|dims| plus(&dims[3], s)),
        false => Ok(s.clone()),
    };
    let present = total
        .and_then(|total| Ok(vec![Expr::known(2), b.clone(), heads.clone(), total, divide(&value_width, &heads)?]));
    results.push(present.ok());
    Ok(results)
}

/// `MultiHeadAttention` of ONNX Runtime.
pub(super) fn multi_head_attention(call: &mut Call<'_>) -> Known<Results> {
    let heads = count(call, "num_heads")?;
    let (b, s, width, mut keys) = match call.dims(0)? {
        [b, s, width] => (b, s, width.clone(), s.clone()),
        [b, s, h, _, d] => (b, s, times(h, d)?, s.clone()),
        _ => return call.why("the query has neither rank 3 nor rank 5"),
    };
    if let Ok(dims) = call.dims(1) {
        keys = match dims {
            [_, _, tokens, _] => tokens.clone(),
            [_, tokens, ..] => tokens.clone(),
            _ => return call.why("the key has too low a rank"),
        };
    }
    let value_width = match call.dims(2) {
        Ok([_, _, width]) => width.clone(),
        Ok([_, h, _, d]) => times(h, d)?,
        _ => width.clone(),
    };
    let total = match call.has(6) {
        true => call.dims_of_rank::<4>(6).and_then(|dims| plus(&dims[2], &keys))?,
        false => keys,
    };
    let present = |width: &Expr| Some(vec![b.clone(), heads.clone(), total.clone(), divide(width, &heads).ok()?]);
    let y = vec![b.clone(), s.clone(), value_width.clone()];
    Ok(vec![
        Some(y),
        present(&width),
        present(&value_width),
        Some(vec![b.clone(), heads.clone(), s.clone(), total.clone()]),
    ])
}

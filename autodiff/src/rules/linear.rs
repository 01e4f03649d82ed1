//! Products of matrices and their generalisation.

use std::collections::{BTreeMap, HashMap};

use vitrim_ir::{Attribute, Expr, ValueId};

use crate::{Int, Undefined, Vjp};

type Done = Result<(), Undefined>;

/// A general product of two matrices, transposed where asked for, times a number.
fn product(vjp: &mut Vjp, [a, b]: [ValueId; 2], [trans_a, trans_b]: [bool; 2], alpha: f32) -> ValueId {
    let flag = |set: bool| Attribute::Int(set.into());
    let attributes = [("alpha", Attribute::Float(alpha)), ("transA", flag(trans_a)), ("transB", flag(trans_b))];
    vjp.op_with("Gemm", &[a, b], &attributes)
}

/// The last extent of a value, if it is fixed.
fn channels(vjp: &Vjp, value: ValueId) -> Result<Option<i64>, Undefined> {
    Ok(vjp.dims(value)?.last().and_then(Expr::as_known))
}

/// A vector is a matrix of one row on the left, of one column on the right.
pub(super) fn matmul(vjp: &mut Vjp) -> Done {
    let (a, b, y, mut dy) = (vjp.x(0)?, vjp.x(1)?, vjp.y(0)?, vjp.dy()?);
    let (rank_a, rank_b) = (vjp.rank(a)?, vjp.rank(b)?);
    if rank_a == 0 || rank_b == 0 {
        return Err("an operand is no matrix".into());
    }
    let mut dims = vjp.dims(y)?.to_vec();
    if rank_b == 1 {
        dy = vjp.unsqueeze(dy, &[dims.len() as i64]);
        dims.push(Expr::known(1));
    }
    if rank_a == 1 {
        let row = dims.len().checked_sub(1).ok_or("its result is no product")?;
        dy = vjp.unsqueeze(dy, &[row as i64]);
        dims.insert(row, Expr::known(1));
    }
    let rank = dims.len();
    if rank < rank_a.max(rank_b).max(2) {
        return Err("its result is no product".into());
    }
    let inner = vjp.dim(a, rank_a - 1)?.clone();
    if vjp.wants(0) {
        let transposed = if rank_b == 1 { vjp.unsqueeze(b, &[0]) } else { vjp.matrix_transpose(b, rank_b) };
        let da = vjp.op("MatMul", &[dy, transposed]);
        let mut from = dims.clone();
        from[rank - 1] = inner.clone();
        let da = vjp.sum_to(da, &from, a)?;
        vjp.give(0, da);
    }
    if vjp.wants(1) {
        let db = match (rank_a, rank_b, channels(vjp, a)?, dims[rank - 1].as_known()) {
            // Of all rows at once: one product instead of one for each entry of the batch and a sum of them.
            (2.., 2, Some(inner), Some(outer)) => {
                let [a, dy] = [(a, inner, rank_a), (dy, outer, rank)].map(|(value, extent, rank)| match rank {
                    2 => value,
                    _ => vjp.reshape(value, &[-1, extent]),
                });
                product(vjp, [a, dy], [true, false], 1.0)
            }
            _ => {
                let transposed = if rank_a == 1 { vjp.unsqueeze(a, &[1]) } else { vjp.matrix_transpose(a, rank_a) };
                let db = match rank_a == rank {
                    true => vjp.product(transposed, dy),
                    false => vjp.op("MatMul", &[transposed, dy]),
                };
                let mut from = dims;
                from[rank - 2] = inner;
                match rank_b {
                    1 => {
                        let axes = vjp.ints(&[-1]);
                        let db = vjp.op("Squeeze", &[db, axes]);
                        from.pop();
                        vjp.sum_to(db, &from, b)?
                    }
                    _ => vjp.sum_to(db, &from, b)?,
                }
            }
        };
        vjp.give(1, db);
    }
    Ok(())
}

pub(super) fn gemm(vjp: &mut Vjp) -> Done {
    let (a, b, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let flag = |name: &str| vjp.node.int(name).unwrap_or(0) != 0;
    let (trans_a, trans_b) = (flag("transA"), flag("transB"));
    let alpha = vjp.node.float("alpha").unwrap_or(1.0);
    if vjp.wants(0) {
        let da = match trans_a {
            false => product(vjp, [dy, b], [false, !trans_b], alpha),
            true => product(vjp, [b, dy], [trans_b, true], alpha),
        };
        vjp.give(0, da);
    }
    if vjp.wants(1) {
        let db = match trans_b {
            false => product(vjp, [a, dy], [!trans_a, false], alpha),
            true => product(vjp, [dy, a], [true, trans_a], alpha),
        };
        vjp.give(1, db);
    }
    if vjp.wants(2) {
        let (c, beta) = (vjp.x(2)?, vjp.node.float("beta").unwrap_or(1.0));
        let dc = vjp.scale(dy, beta.into(), c)?;
        vjp.give_broadcast(2, dc)?;
    }
    Ok(())
}

/// An equation of `Einsum`: the axes of each operand and of the result, each a letter; an ellipsis has been written out.
struct Equation {
    operands: Vec<Vec<char>>,
    result: Vec<char>,
}

impl Equation {
    fn of(vjp: &Vjp) -> Result<Self, Undefined> {
        let text: String = vjp.node.string("equation").unwrap_or_default().split_whitespace().collect();
        let (left, right) = text.split_once("->").map_or((text.as_str(), None), |(left, right)| (left, Some(right)));
        let terms: Vec<&str> = left.split(',').collect();
        if terms.len() != vjp.node.inputs.len() {
            return Err("its equation has another number of operands".into());
        }
        let ranks = (0..terms.len()).map(|slot| vjp.rank(vjp.x(slot)?)).collect::<Result<Vec<_>, _>>()?;
        let letters = |term: &str| term.replace("...", "").chars().count();
        let hidden = |(term, rank): (&&str, &usize)| rank.checked_sub(letters(term)).filter(|_| term.contains("..."));
        let width = terms.iter().zip(&ranks).filter_map(hidden).max().unwrap_or(0);
        let unused: Vec<char> =
            ('a'..='z').chain('A'..='Z').filter(|&letter| !text.contains(letter)).take(width).collect();
        if unused.len() < width {
            return Err("its equation has too many axes".into());
        }
        let spell = |term: &str, hidden: usize| -> Vec<char> {
            let (before, after) = term.split_once("...").unwrap_or((term, ""));
            before.chars().chain(unused[width - hidden..].iter().copied()).chain(after.chars()).collect()
        };
        let operands: Vec<Vec<char>> =
            terms.iter().zip(&ranks).map(|(term, rank)| spell(term, hidden((term, rank)).unwrap_or(0))).collect();
        let result = match right {
            Some(term) => spell(term, if term.contains("...") { width } else { 0 }),
            None => {
                let mut counts: BTreeMap<char, usize> = BTreeMap::new();
                operands.iter().flatten().for_each(|&letter| *counts.entry(letter).or_default() += 1);
                let once = counts.into_iter().filter(|&(letter, count)| count == 1 && !unused.contains(&letter));
                unused.iter().copied().chain(once.map(|(letter, _)| letter)).collect()
            }
        };
        let sound = operands.iter().zip(&ranks).all(|(term, &rank)| term.len() == rank)
            && result.len() == vjp.rank(vjp.y(0)?)?
            && operands.iter().chain([&result]).flatten().all(char::is_ascii_alphabetic);
        if !sound {
            return Err("its equation does not fit its operands".into());
        }
        let repeats = |term: &Vec<char>| (1..term.len()).any(|at| term[..at].contains(&term[at]));
        if operands.iter().chain([&result]).any(repeats) {
            return Err("an operand or result names an axis twice, which takes a diagonal: use Mul with a mask".into());
        }
        Ok(Self { operands, result })
    }
}

/// The same with the result and the other operands for operands, the operand for result.
pub(super) fn einsum(vjp: &mut Vjp) -> Done {
    let (y, dy) = (vjp.y(0)?, vjp.dy()?);
    let Equation { operands, result } = Equation::of(vjp)?;
    for (slot, own) in operands.iter().enumerate().filter(|&(slot, _)| vjp.wants(slot)).collect::<Vec<_>>() {
        let x = vjp.x(slot)?;
        // Extents after broadcasting, where the gradient has these axes.
        let mut extents: HashMap<char, Expr> = HashMap::new();
        let (mut terms, mut values) = (Vec::new(), Vec::new());
        let others = (0..operands.len()).filter(|&other| other != slot).map(|other| (&operands[other], vjp.x(other)));
        for (term, value) in [(&result, Ok(y))].into_iter().chain(others.collect::<Vec<_>>()) {
            let value = value?;
            for (&letter, dim) in term.iter().zip(vjp.dims(value)?) {
                let known = extents.entry(letter).or_insert_with(|| dim.clone());
                if known.is(1) {
                    *known = dim.clone();
                }
            }
            // A result without axes is a factor: it is no operand of the equation.
            if !(value == y && term.is_empty()) {
                terms.push(term.iter().collect::<String>());
                values.push(if value == y { dy } else { value });
            }
        }
        let common: String = own.iter().filter(|letter| extents.contains_key(letter)).collect();
        let mut dx = match values[..] {
            [] => dy,
            _ => {
                let equation = format!("{}->{common}", terms.join(","));
                vjp.op_with("Einsum", &values, &[("equation", Attribute::String(equation.into()))])
            }
        };
        if result.is_empty() && !values.is_empty() {
            dx = vjp.op("Mul", &[dx, dy]);
        }
        // What the operand alone has was summed: every entry along it gets the same.
        let missing: Vec<usize> = (0..own.len()).filter(|&axis| !extents.contains_key(&own[axis])).collect();
        if !missing.is_empty() {
            dx = vjp.unsqueeze(dx, &missing.iter().map(|&axis| axis as i64).collect::<Vec<_>>());
            let mut shape = vec![Int::Known(1); own.len()];
            for &axis in &missing {
                shape[axis] = vjp.extent(x, axis)?;
            }
            let shape = vjp.list(&shape);
            dx = vjp.op("Expand", &[dx, shape]);
        }
        let dims = vjp.dims(x)?;
        let from: Vec<Expr> =
            own.iter().zip(dims).map(|(letter, dim)| extents.get(letter).unwrap_or(dim).clone()).collect();
        let dx = vjp.sum_to(dx, &from, x)?;
        vjp.give(slot, dx);
    }
    Ok(())
}

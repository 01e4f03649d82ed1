//! Operators that read or write entries by index: what is read several times gets the sum of the gradients.

use vitrim_ir::{Attribute, DataType, ValueId};

use crate::{Int, Undefined, Vjp};

type Done = Result<(), Undefined>;

/// Why entries cannot be added up.
const NO_SUM: &str = "adding up the gradients of an entry that is read several times takes float32 or float64 and \
                      operator set 16: export it so";

/// Whether a scatter can add up: its reductions came with operator set 16, and runtimes have them for these types.
fn scatters(vjp: &Vjp, dtype: DataType) -> bool {
    vjp.opset() >= 16 && matches!(dtype, DataType::F32 | DataType::F64)
}

/// `ScatterElements` or `ScatterND` that adds up, or one that need not because its indices are `distinct`.
fn scatter(
    vjp: &mut Vjp,
    name: &str,
    inputs: [ValueId; 3],
    axis: Option<usize>,
    distinct: bool,
) -> Result<ValueId, Undefined> {
    let mut attributes = Vec::new();
    attributes.extend(axis.map(|axis| ("axis", Attribute::Int(axis as i64))));
    if !distinct {
        if !scatters(vjp, vjp.float(vjp.x(0)?)?) {
            return Err(NO_SUM.into());
        }
        attributes.push(("reduction", Attribute::String("add".into())));
    }
    Ok(vjp.op_with(name, &inputs, &attributes))
}

/// The number of elements of a value of the graph.
pub(super) fn count(vjp: &mut Vjp, value: ValueId) -> Result<Int, Undefined> {
    let extents = vjp.extents(value)?;
    Ok(extents.into_iter().fold(Int::Known(1), |count, extent| vjp.times(count, extent)))
}

/// Gradients added up at positions in the elements of operand 0, of that operand's extents.
pub(super) fn add_at_positions(
    vjp: &mut Vjp,
    positions: ValueId,
    dy: ValueId,
    distinct: bool,
) -> Result<ValueId, Undefined> {
    let x = vjp.x(0)?;
    let count = count(vjp, x)?;
    let (dtype, count) = (vjp.float(x)?, vjp.list(&[count]));
    let zeros = vjp.full(dtype, 0.0, count);
    let [positions, dy] = [positions, dy].map(|value| vjp.reshape(value, &[-1]));
    let sums = scatter(vjp, "ScatterElements", [zeros, positions, dy], Some(0), distinct)?;
    vjp.reshape_like(sums, x)
}

/// Indices from the front, as 64-bit integers.
fn from_front(vjp: &mut Vjp, indices: ValueId, extent: Int) -> ValueId {
    let indices = vjp.cast(indices, DataType::I64);
    let (zero, extent) = (vjp.ints(&[0]), vjp.list(&[extent]));
    let behind = vjp.op("Less", &[indices, zero]);
    let shifted = vjp.op("Add", &[indices, extent]);
    vjp.op("Where", &[behind, shifted, indices])
}

/// A row for each index `[.., K]` with a one at that position: `[.., K, extent]`.
pub(super) fn one_hot(vjp: &mut Vjp, indices: ValueId, extent: Int, dtype: DataType) -> ValueId {
    let indices = from_front(vjp, indices, extent);
    let last = vjp.ints(&[-1]);
    let (indices, all) = (vjp.op("Unsqueeze", &[indices, last]), vjp.range(extent));
    let hits = vjp.op("Equal", &[indices, all]);
    vjp.cast(hits, dtype)
}

pub(super) fn gather(vjp: &mut Vjp) -> Done {
    let (x, index, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let (rank, depth) = (vjp.rank(x)?, vjp.rank(index)?);
    let axis = vjp.axis("axis", 0, rank)?;
    let extent = vjp.extent(x, axis)?;
    let dtype = vjp.float(x)?;
    let known = vjp.int_operand(1).ok().filter(|known| !known.is_empty());
    let run = known.filter(|known| {
        let signs_agree = known.iter().all(|&at| (at < 0) == (known[0] < 0));
        signs_agree && known.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]))
    });
    let dx = if let Some(run) = run {
        // Neighbours: zeros before and after them.
        let (first, count) = (run[0], run.len() as i64);
        let entries = if depth == 0 { vjp.unsqueeze(dy, &[axis as i64]) } else { dy };
        let (mut before, mut after) = (vec![Int::Known(0); rank], vec![Int::Known(0); rank]);
        before[axis] = match first {
            0.. => Int::Known(first),
            _ => vjp.plus(extent, Int::Known(first)),
        };
        // From where they begin to the end.
        let behind = match first {
            0.. => vjp.minus(extent, Int::Known(first)),
            _ => vjp.minus(Int::Known(0), Int::Known(first)),
        };
        after[axis] = vjp.minus(behind, Int::Known(count));
        vjp.pad(entries, &before, &after)
    } else if scatters(vjp, dtype) {
        // The indexed axes first.
        let indexed = axis..axis + depth;
        let others = (0..axis).chain(indexed.end..rank + depth - 1);
        let perm: Vec<i64> = indexed.chain(others).map(|axis| axis as i64).collect();
        let updates = vjp.transpose(dy, &perm);
        let mut dims = vec![extent];
        for other in (0..rank).filter(|&other| other != axis) {
            dims.push(vjp.extent(x, other)?);
        }
        let dims = vjp.list(&dims);
        let zeros = vjp.full(dtype, 0.0, dims);
        let index = vjp.cast(index, DataType::I64);
        let index = vjp.unsqueeze(index, &[depth as i64]);
        let sums = scatter(vjp, "ScatterND", [zeros, index, updates], None, false)?;
        let back = |at: usize| if at == axis { 0 } else { at as i64 + i64::from(at < axis) };
        let back: Vec<i64> = (0..rank).map(back).collect();
        vjp.transpose(sums, &back)
    } else {
        let mut dims = vjp.extents(x)?;
        dims[axis] = Int::Known(-1);
        let entries = if depth == 1 { dy } else { vjp.reshape_to(dy, &dims) };
        let index = if depth == 1 { index } else { vjp.reshape(index, &[-1]) };
        let picks = one_hot(vjp, index, extent, dtype);
        vjp.contract(entries, rank, axis, picks)
    };
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn gather_elements(vjp: &mut Vjp) -> Done {
    let (x, index, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let axis = vjp.axis("axis", 0, vjp.rank(x)?)?;
    let zeros = vjp.zeros_like(x)?;
    let dx = scatter(vjp, "ScatterElements", [zeros, index, dy], Some(axis), false)?;
    vjp.give(0, dx);
    Ok(())
}

pub(super) fn gather_nd(vjp: &mut Vjp) -> Done {
    let (x, index, dy) = (vjp.x(0)?, vjp.x(1)?, vjp.dy()?);
    let (rank, depth) = (vjp.rank(x)?, vjp.rank(index)?);
    let batch = usize::try_from(vjp.node.int("batch_dims").unwrap_or(0)).unwrap_or(rank);
    if batch >= rank.min(depth) {
        return Err("it has no axis beside those of its batch".into());
    }
    let dtype = vjp.float(x)?;
    let dx = if scatters(vjp, dtype) {
        // Beside each index, where it is in the batch.
        let mut dims = vjp.extents(index)?;
        dims[depth - 1] = Int::Known(1);
        let shape = vjp.list(&dims);
        let mut parts = Vec::with_capacity(batch + 1);
        for axis in 0..batch {
            let extent = vjp.extent(x, axis)?;
            let all = vjp.range(extent);
            let axes: Vec<i64> = (0..depth as i64).filter(|&other| other != axis as i64).collect();
            let along = vjp.unsqueeze(all, &axes);
            parts.push(vjp.op("Expand", &[along, shape]));
        }
        parts.push(index);
        let index = match parts[..] {
            [one] => one,
            _ => vjp.op_with("Concat", &parts, &[("axis", Attribute::Int(-1))]),
        };
        let zeros = vjp.zeros_like(x)?;
        scatter(vjp, "ScatterND", [zeros, index, dy], None, false)?
    } else if depth == batch + 2 && vjp.dim(index, depth - 1)?.is(1) {
        // One axis is indexed by a list for each entry of the batch, as `[.., K, 1]`: what follows it is one axis for now.
        let extent = vjp.extent(x, batch)?;
        let taken = vjp.extent(index, batch)?;
        let axes = vjp.ints(&[-1]);
        let index = vjp.op("Squeeze", &[index, axes]);
        let picks = one_hot(vjp, index, extent, dtype);
        let picks = vjp.matrix_transpose(picks, depth);
        let mut dims = vjp.extents(x)?[..batch].to_vec();
        dims.extend([taken, Int::Known(-1)]);
        let entries = vjp.reshape_to(dy, &dims);
        let sums = vjp.op("MatMul", &[picks, entries]);
        vjp.reshape_like(sums, x)?
    } else {
        return Err(NO_SUM.into());
    };
    vjp.give(0, dx);
    Ok(())
}

/// Whether a scatter adds to what is there; if not, it replaces that.
fn adds(vjp: &Vjp) -> Result<bool, Undefined> {
    match vjp.node.string("reduction") {
        None | Some("none") => Ok(false),
        Some("add") => Ok(true),
        Some(_) => Err("it multiplies or compares what meets at one position: only adding has a gradient here".into()),
    }
}

/// Of what is scattered, what arrived; of what it is scattered into, what was not replaced.
fn scattered(vjp: &mut Vjp, gather: &str, axis: Option<usize>) -> Done {
    let (index, updates, dy) = (vjp.x(1)?, vjp.x(2)?, vjp.dy()?);
    let adds = adds(vjp)?;
    if vjp.wants(0) {
        let dx = match adds {
            true => dy,
            false => {
                let zeros = vjp.zeros_like(updates)?;
                let name = vjp.node.op.name.clone();
                scatter(vjp, &name, [dy, index, zeros], axis, true)?
            }
        };
        vjp.give(0, dx);
    }
    if vjp.wants(2) {
        let axis: Vec<_> = axis.map(|axis| ("axis", Attribute::Int(axis as i64))).into_iter().collect();
        let dupdates = vjp.op_with(gather, &[dy, index], &axis);
        vjp.give(2, dupdates);
    }
    Ok(())
}

pub(super) fn scatter_elements(vjp: &mut Vjp) -> Done {
    let axis = vjp.axis("axis", 0, vjp.rank(vjp.x(0)?)?)?;
    scattered(vjp, "GatherElements", Some(axis))
}

pub(super) fn scatter_nd(vjp: &mut Vjp) -> Done {
    scattered(vjp, "GatherND", None)
}

/// Entries are chosen once at most.
pub(super) fn top_k(vjp: &mut Vjp) -> Done {
    let (x, dy) = (vjp.x(0)?, vjp.dy()?);
    let axis = vjp.axis("axis", -1, vjp.rank(x)?)?;
    let index = match vjp.node.output(1) {
        Some(index) => index,
        None => vjp.again(2)[1],
    };
    let zeros = vjp.zeros_like(x)?;
    let dx = scatter(vjp, "ScatterElements", [zeros, index, dy], Some(axis), true)?;
    vjp.give(0, dx);
    Ok(())
}

/// The largest entry of each window takes its gradient.
pub(super) fn max_pool(vjp: &mut Vjp) -> Done {
    let (dy, node) = (vjp.dy()?, vjp.node);
    if node.int("storage_order").unwrap_or(0) != 0 {
        return Err("it counts positions by columns: set storage_order to 0".into());
    }
    let kernel = node.ints("kernel_shape").ok_or("it has no kernel_shape")?;
    let undilated = node.ints("dilations").is_none_or(|dilations| dilations.iter().all(|&dilation| dilation == 1));
    let stride = |axis: usize| node.ints("strides").and_then(|strides| strides.get(axis).copied()).unwrap_or(1);
    let distinct = undilated && kernel.iter().enumerate().all(|(axis, &extent)| extent <= stride(axis));
    let positions = match node.output(1) {
        Some(positions) => positions,
        None => vjp.again(2)[1],
    };
    let dx = add_at_positions(vjp, positions, dy, distinct)?;
    vjp.give(0, dx);
    Ok(())
}

//! How the tokens may run in the residual stream.

use vitrim_ir::{Axis, Expr, Graph, Layout, Shapes, Source, Span, ValueId};

use super::core::Core;
use crate::Refusal;

/// Every way in which `origin` may hold the tokens, the most common first: along an axis of their own, or along one with
/// the batch where `core` says how many there are.
pub(super) fn sources(graph: &Graph, shapes: &Shapes, origin: ValueId, core: &Core) -> Result<Vec<Source>, Refusal> {
    let dims = shapes.dims(origin).ok_or_else(|| {
        let (name, why) = (graph.value(origin).name(), shapes.reason(origin).unwrap_or("no rule"));
        Refusal::NotAVit(format!("the shape of '{name}' is not known: {why}"))
    })?;
    let mut axes: Vec<usize> = (0..dims.len()).filter(|&axis| !dims[axis].is(1)).collect();
    axes.sort_by_key(|&axis| (axis != 1, axis));
    let source = |axis: usize, atoms: Axis, tokens: Expr, batch: Expr| {
        let mut layout: Vec<Axis> = dims.iter().map(Axis::plain).collect();
        layout[axis] = atoms;
        Source { value: origin, layout: Layout(layout), tokens, batch }
    };
    let mut sources = Vec::new();
    // Two axes are tokens and channels of one image.
    for &axis in axes.iter().filter(|&&axis| dims.len() > 2 || axis == 0) {
        let batch = if dims.len() > 2 { dims[usize::from(axis == 0)].clone() } else { Expr::known(1) };
        sources.push(source(axis, Axis::tokens(Span::ALL), dims[axis].clone(), batch));
    }
    if let Some(tokens) = core.keys(graph, shapes) {
        for &axis in &axes {
            let Some(batch) = dims[axis].div_exact(&tokens).filter(|batch| !batch.is(1)) else { continue };
            let images = Axis::plain(&batch);
            let joined = [Axis::join(&images, &Axis::tokens(Span::ALL)), Axis::join(&Axis::tokens(Span::ALL), &images)];
            sources.extend(joined.map(|atoms| source(axis, atoms, tokens.clone(), batch.clone())));
        }
    }
    Ok(sources)
}

/// Whether the tokens of `origin`, as many as `core` attends over, lie on a grid: along two axes.
pub(super) fn is_grid(graph: &Graph, shapes: &Shapes, origin: ValueId, core: &Core) -> bool {
    let dims = shapes.dims(origin).unwrap_or_default();
    let tokens = core.keys(graph, shapes);
    tokens.is_some() && dims.len() > 3 && dims.windows(2).any(|pair| pair[0].times(&pair[1]) == tokens)
}

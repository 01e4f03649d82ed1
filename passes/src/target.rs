//! Targets of `Reshape` that hold whatever the batch is.

/// A target that states these extents, of which some are known only at run time. Zero copies the operand's extent in
/// the same place, where that `copies` it; -1 is what is left, once. `None` where that does not suffice.
pub(crate) fn reshape_target(extents: &[Option<i64>], copies: impl Fn(usize) -> bool) -> Option<Vec<i64>> {
    let open: Vec<usize> = (0..extents.len()).filter(|&at| extents[at].is_none()).collect();
    let inferred = match open.as_slice() {
        [only] => Some(*only),
        open => open.iter().copied().find(|&at| !copies(at)),
    };
    let entry = |(at, extent): (usize, &Option<i64>)| match extent {
        Some(extent) => Some(*extent),
        None if inferred == Some(at) => Some(-1),
        None if copies(at) => Some(0),
        None => None,
    };
    extents.iter().enumerate().map(entry).collect()
}

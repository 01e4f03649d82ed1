//! The twin-token test: a truth about merging that needs no reference.
//!
//! Without position embeddings, equal patches give equal tokens in every block. Merging a token with its twin, with
//! attention in proportion to sizes, is then no approximation: one token of size two acts as the two did. So every
//! output must stay as it is, be it read from a class token, a mean, or the tokens themselves.
//!
//! Positions 2k and 2k+1 behind the special tokens are neighbours of which one is in A and one in B, whatever the
//! number of special tokens; every other such pair gets twins. The rest have patches of their own, so that sizes differ.
//!
//! Tables that have an entry for each token within the blocks (rotary positions, biases) are replaced by noise in which
//! twins have equal entries: then it does not matter either whether a slot has the mean of its tokens' or one of them.

mod common;

use std::collections::{BTreeSet, HashSet};

use common::{Entry, Scratch, conclude, integers, load, merge, ort, relative, run, zoo};
use ndarray::{ArrayD, Axis, IxDyn, Slice};
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::Tensor;
use vitrim_ir::{DataType, Effect, Model, NodeId, Patch, ValueId};
use vitrim_passes::driver;
use vitrim_passes::recipe::{MergeSpec, RSpec};
use vitrim_passes::recognise::{VitModel, recognise};
use vitrim_passes::reduce::SOURCE_OUTPUT;

/// Merging twins changes only how sums are split: float32 roundings of 6e-8, over a few blocks.
const TOLERANCE: f64 = 1e-4;

/// What attention that ignores sizes must change outputs by, for the test to have teeth: well above the tolerance.
const LEAST_CHANGE: f64 = 1e-3;

/// Architectures (families of the facts) that must take part: what `fixtures/zoo` has, and what a full zoo must have.
const FEWEST: usize = 5;
const FEWEST_IN_FULL_ZOO: usize = 10;

/// The model with every table of positions zeroed; `None` if there is none before the blocks.
fn without_positions(model: &Model, vit: &VitModel) -> Option<Model> {
    let graph = model.graph();
    let tokens = vit.tokens().as_known()?;
    let patches = tokens - (vit.special.prefix() + vit.special.suffix) as i64;
    let extents = |value: ValueId| {
        let dims = vit.shapes.dims(value)?.iter().map(|dim| usize::try_from(dim.as_known()?).ok());
        dims.collect::<Option<Vec<usize>>>()
    };
    // A table has an axis of tokens, or of patches. A bias of so many channels may be zeroed with it: the merged model
    // is compared with one that lacks it as well, and a table that is missed leaves twins that differ.
    let is_table = |dims: &[usize]| dims.iter().any(|&dim| [tokens, patches].contains(&(dim as i64)));
    let mut patch = Patch::new(model, "zero positions");
    let mut found = false;
    for id in upstream(model, vit.axes.origin()) {
        let node = graph.node(id);
        let sums = node.is("Add") && node.operands().any(|value| vit.shapes.is_data(value));
        for (slot, value) in node.operands().enumerate().filter(|&(_, value)| sums && !vit.shapes.is_data(value)) {
            let Some(dims) = extents(value).filter(|dims| is_table(dims)) else { continue };
            let zeros = vec![0.0; dims.iter().product()];
            let dtype = vit.shapes.dtype(value).unwrap_or(DataType::F32);
            let zeros = patch.constant("no_positions", vitrim_ir::Tensor::floats(dtype, &dims, &zeros));
            patch.rewire(id, slot, zeros);
            found = true;
        }
    }
    found.then(|| patch.apply(model).unwrap_or_else(|error| panic!("{error}")).0)
}

/// The model with every table that follows the tokens replaced by one in which twins are equal, and whether there is any;
/// an error where a table cannot be made up.
fn with_twin_tables(model: &Model, vit: &VitModel) -> Result<(Model, bool), String> {
    let graph = model.graph();
    let (prefix, suffix) = (vit.special.prefix(), vit.special.suffix);
    let patches = vit.tokens().as_known().expect("a fixed count") as usize - prefix - suffix;
    let mut patch = Patch::new(model, "twin tables");
    let mut found = false;
    for (id, effect) in vit.axes.effects() {
        let Effect::Table { slot, axes } = effect else { continue };
        let value = graph.node(*id).input(*slot).expect("the operand is there");
        let dims = vit.shapes.dims(value).ok_or("a table of unknown extents")?.iter().map(|dim| dim.as_known());
        let dims = dims.map(|dim| dim.map(|dim| dim as usize)).collect::<Option<Vec<usize>>>();
        let dims = dims.ok_or("a table of unknown extents")?;
        let dtype = vit.shapes.dtype(value).filter(|dtype| dtype.is_float()).ok_or("a table of no numbers")?;
        // The place along a token axis by which twins are the same.
        let class = |axis: usize, at: usize| {
            let Some((_, span)) = axes.iter().find(|(other, _)| *other == axis) else { return at };
            let token = at as i64 + span.front;
            let patch = usize::try_from(token - prefix as i64).ok().filter(|&patch| patch < patches);
            patch.and_then(|patch| twins(patch, patches).map(|_| at - patch % 2)).unwrap_or(at)
        };
        let entry = |index: IxDyn| {
            let hash = (0..dims.len()).fold(7u64, |hash, axis| {
                hash.wrapping_mul(31)
                    .wrapping_add(class(axis, index[axis]) as u64)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .rotate_left(23)
            });
            (hash % 2001) as f64 / 1000.0 - 1.0
        };
        let entries: Vec<f64> = ArrayD::from_elem(IxDyn(&dims), ()).indexed_iter().map(|(at, ())| entry(at)).collect();
        let table = patch.constant("twin_table", vitrim_ir::Tensor::floats(dtype, &dims, &entries));
        patch.rewire(*id, *slot, table);
        found = true;
    }
    Ok((patch.apply(model).unwrap_or_else(|error| panic!("{error}")).0, found))
}

/// The nodes that a value comes from.
fn upstream(model: &Model, value: ValueId) -> HashSet<NodeId> {
    let graph = model.graph();
    let mut found = HashSet::new();
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        let Some((id, _)) = graph.producer(value) else { continue };
        if found.insert(id) {
            open.extend(graph.node(id).operands());
        }
    }
    found
}

/// The pair of neighbours that a patch belongs to, if they are to be twins.
fn twins(patch: usize, patches: usize) -> Option<usize> {
    let pair = patch / 2;
    (pair.is_multiple_of(2) && 2 * pair + 1 < patches).then_some(pair)
}

/// `images` with the second patch of every pair of twins painted over by the first.
fn with_twins(images: &ArrayD<f64>, patches: usize) -> ArrayD<f64> {
    // NHWC where the last axis is too short for pixels.
    let (rows_at, columns_at) = if images.shape()[3] <= 4 { (1, 2) } else { (2, 3) };
    let (height, width) = (images.shape()[rows_at], images.shape()[columns_at]);
    let side = ((height * width / patches) as f64).sqrt() as usize;
    assert_eq!((height / side) * (width / side), patches, "the patches of a {height}x{width} image are squares");
    let place = |patch: usize| {
        let (row, column) = (patch / (width / side) * side, patch % (width / side) * side);
        (Slice::from(row..row + side), Slice::from(column..column + side))
    };
    let mut painted = images.clone();
    for patch in (1..patches).step_by(2).filter(|&patch| twins(patch, patches).is_some()) {
        let (rows, columns) = place(patch - 1);
        let first = images.slice_axis(Axis(rows_at), rows);
        let first = first.slice_axis(Axis(columns_at), columns);
        let (rows, columns) = place(patch);
        let mut second = painted.slice_axis_mut(Axis(rows_at), rows);
        second.slice_axis_mut(Axis(columns_at), columns).assign(&first);
    }
    painted
}

/// The largest relative distance of any output but the traced source.
fn apart(reference: &Outputs, candidate: &Outputs) -> f64 {
    let distance = |(name, tensor): (&str, &Tensor)| relative(tensor, candidate.get(name).expect("the same outputs"));
    reference.iter().map(distance).fold(0.0, f64::max)
}

/// Whether tokens of one slot are twins, and twins in one slot, in every image.
fn merged_twins_only(source: &Tensor, prefix: usize, patches: usize) -> bool {
    let source = integers(source);
    let name = |token: usize| match token.checked_sub(prefix).filter(|&patch| patch < patches) {
        Some(patch) => twins(patch, patches).map_or((1, token), |pair| (2, pair)),
        None => (0, token),
    };
    source.outer_iter().all(|slots| {
        let pairs: BTreeSet<_> = slots.iter().enumerate().map(|(token, &slot)| (name(token), slot)).collect();
        let names: BTreeSet<_> = pairs.iter().map(|&(name, _)| name).collect();
        let places: BTreeSet<_> = pairs.iter().map(|&(_, slot)| slot).collect();
        pairs.len() == names.len() && pairs.len() == places.len()
    })
}

/// What the twin-token test finds on one model: `None` where it does not apply.
fn examine(entry: &Entry, scratch: &Scratch) -> Option<Result<(), String>> {
    let backend = ort();
    let (model, towers) = driver::towers(&entry.read()).ok()?;
    let (name, vit) = towers.into_iter().find_map(|tower| Some((tower.name, tower.found.ok()?)))?;
    let tokens = vit.tokens().as_known()? as usize;
    // Half precision and int8 are too coarse to tell a wrong weight from a rounding.
    if entry.is_coarse(&model) {
        return None;
    }
    let (prefix, suffix) = (vit.special.prefix(), vit.special.suffix);
    let patches = tokens - prefix - suffix;
    let r = (0..patches).filter(|&patch| twins(patch, patches).is_some()).count() / 2;
    let merged = |model: &Model, proportional: bool| {
        let spec = MergeSpec {
            tower: Some(name.clone()),
            r: Some(RSpec::PerBlock(vec![r])),
            proportional: Some(proportional),
            trace_source: true,
            ..MergeSpec::default()
        };
        merge(model, spec).map(|(merged, _)| merged)
    };
    // What the pass refuses is not this test's matter.
    merged(&model, true).ok()?;
    // Without a way to make twins equal, merging them changes outputs.
    let (plain, tables) = with_twin_tables(&model, &vit).ok()?;
    let vit = recognise(&plain).expect("only entries of tables differ");
    let plain = match without_positions(&plain, &vit) {
        Some(plain) => plain,
        None if tables => plain,
        None => return Some(Err("has no table of positions".into())),
    };

    let reference = scratch.save_as("plain", &plain, &entry.model);
    let image = model.graph().value(vit.image).name();
    let recorded = entry.feeds(load(backend.as_ref(), &reference).as_ref()).remove(0);
    let paint = |(name, tensor): (&str, &Tensor)| {
        let painted = if name == image {
            Tensor::from_f64(tensor.dtype(), &with_twins(&tensor.to_f64(), patches))
        } else {
            tensor.clone()
        };
        (name.to_owned(), painted)
    };
    let feeds: Feeds = recorded.iter().map(paint).collect();
    let expected = run(backend.as_ref(), &reference, &feeds);
    let outputs = |proportional: bool| {
        let merged = merged(&plain, proportional).map_err(|refusal| refusal.to_string())?;
        common::try_run(backend.as_ref(), &scratch.save_as("merged", &merged, &entry.model), &feeds)
    };
    let check = || {
        let proportional = outputs(true)?;
        let (_, source) =
            (proportional.iter().find(|(output, _)| output.starts_with(SOURCE_OUTPUT))).expect("the source is traced");
        if !merged_twins_only(source, prefix, patches) {
            return Err("other tokens than twins merged".into());
        }
        let (same, changed) = (apart(&expected, &proportional), apart(&expected, &outputs(false)?));
        if same > TOLERANCE {
            return Err(format!("outputs are {same:e} off"));
        }
        if changed < LEAST_CHANGE {
            return Err(format!("outputs without proportional attention are {changed:e} off only"));
        }
        Ok(())
    };
    Some(check())
}

#[test]
fn merging_twins_changes_nothing() {
    let scratch = Scratch::new("twins");
    let (mut count, mut failures) = (0, Vec::new());
    let mut families = BTreeSet::new();
    for entry in zoo() {
        let Some(result) = examine(&entry, &scratch) else { continue };
        count += 1;
        match result {
            Ok(()) => drop(families.insert(entry.facts["family"].as_str().expect("a family").to_owned())),
            Err(reason) => failures.push(format!("{}: {reason}", entry.name)),
        }
    }
    println!("architectures: {}", families.iter().cloned().collect::<Vec<_>>().join("; "));
    conclude("twins", count, &failures);
    let fewest = if std::env::var_os("VITRIM_ZOO").is_some() { FEWEST_IN_FULL_ZOO } else { FEWEST };
    assert!(families.len() >= fewest, "only {} architectures took part", families.len());
}

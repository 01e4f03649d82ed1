//! Closed connections across several acts: which ones are open behind them, on every model of the zoo.

mod common;

use common::{Entry, Scratch, conclude, integers, load, ort, relative, runtimes, tract, try_run, zoo};
use ndarray::{Array2, Array3, Axis, Ix2, Ix3, Ix4};
use vitrim::runtime::Outputs;
use vitrim_ir::{DataType, Model, Node, Patch, TensorType, ValueId};
use vitrim_passes::driver::{self, Options};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};
use vitrim_passes::recognise::SpecialTokens;

/// Keeps 70 % of the patches in one block.
fn prune_in(block: usize) -> PruneSpec {
    PruneSpec { keep: KeepSpec::Constant(0.7), at: Some(vec![block]), ..PruneSpec::default() }
}

/// And 50 % of the connections between them.
fn close_in(block: usize) -> PruneSpec {
    PruneSpec { attention_keep: Some(0.5), ..prune_in(block) }
}

/// A model rewritten with all its tokens; `None` where that is refused.
fn rewritten(entry: &Entry, passes: Vec<PassSpec>) -> Option<(Model, SpecialTokens)> {
    let model = entry.read();
    let options = Options { keep_dead: true, ..Options::default() };
    let (reduced, _) = driver::rewrite(&model, &Recipe { passes }, options).ok()?;
    let (_, vit) = driver::inspect(&model).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
    Some((reduced, vit.special))
}

/// The calls of an operator, in the order in which tokens reach them.
fn calls<'m>(model: &'m Model, op: &str) -> Vec<&'m Node> {
    model.graph().nodes().map(|(_, node)| node).filter(|node| node.op.name == op).collect()
}

/// What inner values are in every runtime that runs the model to begin with.
fn inner(
    entry: &Entry,
    model: &Model,
    values: &[(&str, ValueId, DataType)],
    scratch: &Scratch,
) -> Vec<(String, Outputs)> {
    let mut patch = Patch::new(model, "test");
    for &(name, value, dtype) in values {
        patch.append_output(name, value, TensorType { dtype, dims: None });
    }
    let (shown, _) = patch.apply(model).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
    let path = scratch.save_as(&entry.name, &shown, &entry.model);
    let feeds = entry.feeds(load(ort().as_ref(), &entry.model).as_ref()).remove(0);
    let runs = runtimes().into_iter().filter(|backend| {
        // What tract does not run to begin with proves nothing; ONNX Runtime runs the whole zoo.
        backend.name() != "tract" || try_run(backend.as_ref(), &entry.model, &feeds).is_ok()
    });
    let outputs = |run: Result<Outputs, String>| run.unwrap_or_else(|reason| panic!("{reason}"));
    runs.map(|backend| (backend.name().to_owned(), outputs(try_run(backend.as_ref(), &path, &feeds)))).collect()
}

fn mask(outputs: &Outputs, name: &str) -> Array3<f64> {
    let mask = outputs.get(name).expect("a mask").to_f64().into_dimensionality::<Ix3>();
    mask.expect("rows and columns for each image")
}

fn anchor(outputs: &Outputs, name: &str) -> Array2<i64> {
    integers(outputs.get(name).expect("anchors")).into_dimensionality::<Ix2>().expect("a token for each slot")
}

/// The masked softmax adds a millionth to the sum of each row, which is one at least.
const TOLERANCE: f64 = 1e-5;

/// In float16 and 8 bits other operators round in other places. tract computes what files say; ONNX Runtime takes a softmax
/// between 8 bits for a coarser one of integers.
const COARSE_TOLERANCE: f64 = 5e-3;

/// Wherever tokens can be pruned connections can be closed, and where all stay open the model computes what it did.
#[test]
fn all_connections_open_change_nothing() {
    let scratch = Scratch::new("all_open");
    let backends = [tract(), ort()];
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let keep = KeepSpec::Constant(1.0);
        let open = PruneSpec { keep, at: Some(vec![0]), attention_keep: Some(1.0), ..PruneSpec::default() };
        let Some((model, _)) = rewritten(&entry, vec![PassSpec::Prune(open)]) else {
            let refused = rewritten(&entry, vec![PassSpec::Prune(prune_in(0))]).is_none();
            assert!(refused, "{} is pruned, but connections are not closed", entry.name);
            continue;
        };
        count += 1;
        let path = scratch.save_as(&entry.name, &model, &entry.model);
        let feeds = entry.feeds(load(ort().as_ref(), &entry.model).as_ref()).remove(0);
        let mut runs = backends
            .iter()
            .filter_map(|backend| Some((backend, try_run(backend.as_ref(), &entry.model, &feeds).ok()?)));
        let (backend, before) = runs.next().unwrap_or_else(|| panic!("{} runs nowhere", entry.name));
        let after = try_run(backend.as_ref(), &path, &feeds).unwrap_or_else(|reason| panic!("{reason}"));
        let tolerance = if entry.is_coarse(&entry.read()) { COARSE_TOLERANCE } else { TOLERANCE };
        for (name, expected) in before.iter() {
            let apart = after.get(name).map_or(f64::INFINITY, |tensor| relative(expected, tensor));
            failures.extend((apart > tolerance).then(|| format!("{}: {name} is {apart:e} off", entry.name)));
        }
    }
    conclude("models with all connections open", count, &failures);
}

/// Behind a pruning that closes no connections those of the tokens that stay are as they were, and all of the token that is
/// made of the others are open.
#[test]
fn a_token_made_of_those_that_leave_has_all_connections_open() {
    let scratch = Scratch::new("extra_connections");
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let fusing = PruneSpec { fuse: true, ..prune_in(1) };
        let Some((model, _)) = rewritten(&entry, vec![PassSpec::Prune(close_in(0)), PassSpec::Prune(fusing)]) else {
            continue;
        };
        let (softmaxes, prunings) = (calls(&model, "MaskedSoftmax"), calls(&model, "TokenPrune"));
        // Other towers, or blocks with several attentions.
        let ([_, before, after, ..], [_, pruning]) = (&softmaxes[..], &prunings[..]) else { continue };
        let values = [("before", before.input(1), DataType::F32), ("after", after.input(1), DataType::F32)];
        let values = values.into_iter().chain([("anchor", pruning.output(2), DataType::I64)]);
        let values: Vec<_> = values.map(|(name, value, dtype)| (name, value.expect("a value"), dtype)).collect();
        for (runtime, outputs) in inner(&entry, &model, &values, &scratch) {
            let (before, after) = (mask(&outputs, "before"), mask(&outputs, "after"));
            let anchor = anchor(&outputs, "anchor");
            let expected = Array3::from_shape_fn(after.dim(), |(image, row, column)| {
                match [row, column].map(|slot| usize::try_from(anchor[[image, slot]])) {
                    [Ok(row), Ok(column)] => before[[image, row, column]],
                    _ => 1.0,
                }
            });
            count += 1;
            assert!(anchor.iter().any(|&token| token < 0) && before.iter().any(|&open| open == 0.0));
            failures.extend((after != expected).then(|| format!("{} in {runtime}", entry.name)));
        }
    }
    conclude("connections of a fused token", count, &failures);
}

/// Means of weights over heads that differ by less, relative to the largest of a row, are in one order here and in
/// another there.
const MARGIN: f64 = 1e-5;

/// Where tokens are merged first, connections are those between the tokens whose places slots keep.
#[test]
fn connections_are_closed_behind_a_merge_in_the_same_block() {
    let scratch = Scratch::new("merged_connections");
    let (mut count, mut close, mut failures) = (0, 0, Vec::new());
    for entry in zoo() {
        let merging = MergeSpec { r: Some(RSpec::PerBlock(vec![4])), ..MergeSpec::default() };
        let Some((model, special)) = rewritten(&entry, vec![PassSpec::Merge(merging), PassSpec::Prune(close_in(0))])
        else {
            continue;
        };
        let [merge, prune, mask_of] =
            ["TokenMerge", "TokenPrune", "ConnectionMask"].map(|op| calls(&model, op).first().copied());
        let (Some(merge), Some(prune), Some(mask_of)) = (merge, prune, mask_of) else { continue };
        let weights = calls(&model, "MaskedSoftmax")[0];
        // In half precision weights tie, and means are rounded to others.
        if weights.int("dtype") != Some(DataType::F32.code().into()) {
            continue;
        }
        let values = [
            ("weights", weights.output(0), DataType::F32),
            ("merged", merge.output(2), DataType::I64),
            ("pruned", prune.output(2), DataType::I64),
            ("mask", mask_of.output(0), DataType::F32),
        ];
        let values = values.map(|(name, value, dtype)| (name, value.expect("a value"), dtype));
        for (runtime, outputs) in inner(&entry, &model, &values, &scratch) {
            let weights = outputs.get("weights").expect("weights").to_f64().into_dimensionality::<Ix4>();
            let mean = weights.expect("heads apart").mean_axis(Axis(1)).expect("heads");
            let (merged, pruned) = (anchor(&outputs, "merged"), anchor(&outputs, "pruned"));
            let mask = mask(&outputs, "mask");
            let slots = pruned.dim().1;
            let free = special.prefix()..slots - special.suffix;
            let connections = (free.len() as f64 * 0.5).ceil() as usize;
            for ((image, row), open) in
                mask.lanes(Axis(2)).into_iter().enumerate().map(|(at, open)| ((at / slots, at % slots), open))
            {
                count += 1;
                let token = |slot: usize| merged[[image, pruned[[image, slot]] as usize]] as usize;
                let strength = |column: usize| mean[[image, token(row), token(column)]];
                let mut sorted: Vec<f64> = free.clone().map(strength).collect();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let weakest = sorted[connections - 1];
                let wrong = (0..slots).any(|column| {
                    let is_free = free.contains(&row) && free.contains(&column);
                    let expected = !is_free || strength(column) >= weakest;
                    let decided = !is_free || (strength(column) - weakest).abs() > MARGIN * sorted[0];
                    close += usize::from(!decided && strength(column) != weakest);
                    decided && (open[column] != 0.0) != expected
                });
                failures.extend(wrong.then(|| format!("{} in {runtime}: row {row} of image {image}", entry.name)));
            }
        }
    }
    println!("{close} connections too close to call");
    conclude("rows of connections", count, &failures);
}

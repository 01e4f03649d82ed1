//! The permutation probe on every model of the zoo: an experiment beside the proof that tokens may be regrouped.

mod common;

use common::{Entry, Scratch, conclude, constant, fixtures, images, load, merge, ort, relative, zoo};
use vitrim::runtime::{Backend, Feeds, Outputs};
use vitrim_ir::{Model, Patch, Tensor};
use vitrim_passes::driver;
use vitrim_passes::probe::permuted;
use vitrim_passes::recipe::MergeSpec;
use vitrim_passes::recognise::{Tower, VitModel, recognise};

/// Permuting tokens changes the order in which attention adds them up, in every block: float32 roundings of 6e-8, and
/// what a few blocks make of them.
const TOLERANCE: f64 = 1e-4;

/// The same where activations have 11 bits or fewer: a rounding that falls to the other side moves an entry by 5e-4 to
/// 1e-3, and int8 steps are larger still but rarer.
const COARSE_TOLERANCE: f64 = 5e-3;

/// What a permutation must change outputs by where the model depends on order, for the probe to have teeth.
const LEAST_CHANGE: f64 = 1e-2;

/// Outputs of two models for the same feeds, compared; the reason where the candidate cannot run.
fn apart(
    backend: &dyn Backend,
    scratch: &Scratch,
    source: &Entry,
    models: [&Model; 2],
    feeds: &[Feeds],
) -> Result<f64, String> {
    let outputs = models.map(|model| {
        let path = scratch.save_as("probed", model, &source.model);
        let mut session = load(backend, &path);
        feeds
            .iter()
            .map(|feeds| session.run(feeds).map_err(|error| format!("{error:#}")))
            .collect::<Result<Vec<Outputs>, _>>()
    });
    let [reference, candidate] = outputs;
    let pairs = reference?.into_iter().zip(candidate?);
    let worst = |(a, b): (Outputs, Outputs)| {
        a.iter().map(|(name, tensor)| relative(tensor, b.get(name).expect("the same outputs"))).fold(0.0, f64::max)
    };
    Ok(pairs.map(worst).fold(0.0, f64::max))
}

/// Recorded feeds at batch 2 and, where the batch is open, at batch 1.
fn feeds(backend: &dyn Backend, entry: &Entry) -> Vec<Feeds> {
    let session = load(backend, &entry.model);
    let recorded = entry.feeds(session.as_ref());
    let both = recorded.into_iter().next().expect("a recorded run");
    let open = session.inputs().iter().all(|port| port.fixed_batch().is_none());
    if open { vec![images(&both, 0, 1), both] } else { vec![both] }
}

#[test]
fn recognised_models_do_not_depend_on_the_order_of_tokens() {
    let scratch = Scratch::new("probes");
    let backend = ort();
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let Ok((model, towers)) = driver::towers(&entry.read()) else { continue };
        let tolerance = if entry.is_coarse(&model) { COARSE_TOLERANCE } else { TOLERANCE };
        // What a pass refuses on other grounds (a head that reads patches by position) is not claimed to be indifferent.
        let merges =
            |tower: &Tower| merge(&entry.read(), MergeSpec { tower: Some(tower.name.clone()), ..constant(1) }).is_ok();
        let vits = towers.iter().filter(|tower| merges(tower)).filter_map(|tower| tower.found.as_ref().ok());
        let vits: Vec<&VitModel> = vits.filter(|vit| vit.tokens().as_known().is_some()).collect();
        let feeds = if vits.is_empty() { Vec::new() } else { feeds(backend.as_ref(), &entry) };
        for (vit, block) in vits.iter().flat_map(|vit| [0, vit.blocks.len() - 1].map(|block| (*vit, block))) {
            count += 1;
            let probed = permuted(&model, vit, block).map_err(|refusal| refusal.to_string());
            let result = probed.and_then(|probed| apart(backend.as_ref(), &scratch, &entry, [&model, &probed], &feeds));
            match result {
                Ok(apart) if apart <= tolerance => {}
                Ok(apart) => {
                    failures.push(format!("{}: permuted behind block {block}, outputs are {apart:e} off", entry.name))
                }
                Err(reason) => failures.push(format!("{}: behind block {block}: {reason}", entry.name)),
            }
        }
    }
    conclude("probes", count, &failures);
}

/// A model with a table of one row per token, added behind the cut of block 0.
fn with_table(model: &Model, vit: &VitModel, entry: impl Fn(usize, usize) -> f32) -> Model {
    let (graph, cut) = (model.graph(), vit.blocks[0].cut);
    let stream = graph.node(cut).output(0).expect("a residual stream");
    let (tokens, width) =
        (vit.tokens().as_known().expect("a fixed count") as usize, vit.width().expect("a fixed width") as usize);
    let rows: Vec<f32> = (0..tokens * width).map(|at| entry(at / width, at % width)).collect();
    let mut patch = Patch::new(model, "table");
    let table = patch.constant("positions", Tensor::f32s(&[1, tokens, width], &rows));
    let sum = patch.op("Add", "with_positions", &[stream, table], &[]);
    patch.rewire_uses(graph, stream, sum, |_| true);
    patch.apply(model).expect("the patch fits").0
}

#[test]
fn a_position_table_behind_the_cut_follows_the_tokens_or_the_probe_fails() {
    let path = fixtures().join("zoo/timm_vit_ts17_unfused.onnx");
    let entry = zoo().into_iter().find(|entry| entry.model == path).expect("it is a fixture");
    let model = entry.read();
    let vit = recognise(&model).expect("a plain ViT");
    // A table of zeros means nothing, and both models have the same ids.
    let without = with_table(&model, &vit, |_, _| 0.0);
    // What all channels have in common, normalisation takes away: entries differ along both axes.
    let with = with_table(&model, &vit, |token, channel| (token * (channel + 1) % 7) as f32 / 3.0 - 1.0);
    let blind = recognise(&without).expect("a table of equal entries is no obstacle");
    let seeing = recognise(&with).expect("a table can follow the tokens");

    let scratch = Scratch::new("teeth");
    let backend = ort();
    let feeds = feeds(backend.as_ref(), &entry);
    let probe = |model: &Model, analysis: &VitModel| {
        let probed = permuted(model, analysis, 0).expect("it can be built");
        apart(backend.as_ref(), &scratch, &entry, [model, &probed], &feeds).expect("it runs")
    };
    assert!(probe(&without, &blind) <= TOLERANCE);
    assert!(probe(&with, &seeing) <= TOLERANCE);
    let change = probe(&with, &blind);
    assert!(change > LEAST_CHANGE, "a position table changes outputs by {change:e} only");
}

//! Pruning on every model of the zoo: the right tokens leave, whatever the exporter wrote, and outputs keep their shapes.

mod common;

use std::collections::HashSet;
use std::path::PathBuf;

use common::{
    Entry, Scratch, conclude, constant, images, integers, kernels, load, ort, relative, rewrite, runtimes, tract,
    try_run, zoo,
};
use ndarray::{ArrayD, Axis, Ix2, Ix4, s};
use vitrim::runtime::{Feeds, Outputs, Session};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{DataType, Effect, Model, Patch, Span, TensorType, ValueId};
use vitrim_passes::driver;
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, Recipe};
use vitrim_passes::reduce::{ATTENTION_KEEP_INPUT, KEEP_INPUT, R_INPUT, SOURCE_OUTPUT};

/// Keeps 70 % of the patches in these blocks.
fn pruning(at: &[usize], fuse: bool) -> PassSpec {
    let (keep, at) = (KeepSpec::Constant(0.7), Some(at.to_vec()));
    PassSpec::Prune(PruneSpec { keep, at, fuse, trace_source: true, ..PruneSpec::default() })
}

/// Attention that differs by less, relative to the largest, is the same for float32 sums in another order, which decide
/// ten times as finely.
const MARGIN: f64 = 1e-5;

/// In float16 and 8 bits the model's own softmax rounds to this, relative to the largest.
const COARSE_MARGIN: f64 = 1e-2;

/// What the first attention of a model gives to each token: from the class token, or from all where there is none; from
/// the softmax that the model itself computes. `None` where that is inside of a fused operator.
fn received(entry: &Entry, scratch: &Scratch, feeds: &Feeds) -> Option<(ArrayD<f64>, usize, usize)> {
    let model = entry.read();
    let (prepared, vit) = driver::inspect(&model).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
    let [attention] = &vit.blocks[0].attentions[..] else { return None };
    if attention.core.is_fused() {
        return None;
    }
    let graph = prepared.graph();
    let weights = graph.node(attention.core.softmax).output(0)?;
    let dtype = vit.shapes.dtype(weights).filter(|dtype| matches!(dtype, DataType::F32 | DataType::F16))?;
    let mut patch = Patch::new(&prepared, "test");
    patch.append_output("weights_of_first", weights, TensorType { dtype, dims: None });
    let (shown, _) = patch.apply(&prepared).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
    let path = scratch.save_as(&format!("{}_shown", entry.name), &shown, &entry.model);
    let outputs = try_run(ort().as_ref(), &path, feeds).unwrap_or_else(|reason| panic!("{reason}"));
    let weights = outputs.get("weights_of_first")?.to_f64();
    let (heads, tokens) = (attention.heads, *weights.shape().last()?);
    let weights =
        weights.into_shape_with_order((weights_images(&outputs, heads, tokens)?, heads, tokens, tokens)).ok()?;
    let weights = weights.into_dimensionality::<Ix4>().ok()?;
    let of_heads = weights.mean_axis(Axis(1))?;
    let received =
        if vit.special.cls > 0 { of_heads.slice(s![.., 0, ..]).to_owned() } else { of_heads.mean_axis(Axis(1))? };
    Some((received.into_dyn(), vit.special.prefix(), vit.special.suffix))
}

fn weights_images(outputs: &Outputs, heads: usize, tokens: usize) -> Option<usize> {
    let count: usize = outputs.get("weights_of_first")?.shape().iter().product();
    Some(count / (heads * tokens * tokens))
}

#[test]
fn those_stay_that_receive_the_most_attention() {
    let scratch = Scratch::new("attended");
    let (mut count, mut close, mut inside, mut failures) = (0, 0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((pruned, _)) = rewrite(&model, pruning(&[0], false)) else { continue };
        let path = scratch.save_as(&entry.name, &pruned, &entry.model);
        let margin = if entry.is_coarse(&model) { COARSE_MARGIN } else { MARGIN };
        for feeds in entry.feeds(load(ort().as_ref(), &entry.model).as_ref()) {
            let Some((received, prefix, suffix)) = received(&entry, &scratch, &feeds) else {
                inside += 1;
                continue;
            };
            let received = received.into_dimensionality::<Ix2>().expect("a number for each token");
            let outputs = try_run(ort().as_ref(), &path, &feeds).unwrap_or_else(|reason| panic!("{reason}"));
            let source = outputs.iter().find(|(name, _)| name.starts_with(SOURCE_OUTPUT));
            let source = integers(source.expect("the source is traced").1).into_dimensionality::<Ix2>();
            let source = source.expect("a slot for each token");
            for (received, source) in received.outer_iter().zip(source.outer_iter()) {
                count += 1;
                let patches = prefix..received.len() - suffix;
                let stays = |token: &usize| source[*token] >= 0;
                let (stay, leave): (Vec<usize>, Vec<usize>) = patches.clone().partition(stays);
                let expected = (patches.len() as f64 * 0.7).ceil() as usize;
                let others = (0..received.len()).filter(|token| !patches.contains(token));
                if stay.len() != expected || !others.clone().all(|token| stays(&token)) {
                    failures.push(format!("{}: {} of {} patches stay", entry.name, stay.len(), patches.len()));
                    continue;
                }
                let least = stay.iter().map(|&token| received[token]).fold(f64::INFINITY, f64::min);
                let most = leave.iter().map(|&token| received[token]).fold(f64::NEG_INFINITY, f64::max);
                let largest = patches.map(|token| received[token]).fold(0.0, f64::max);
                close += usize::from((least - most).abs() < margin * largest);
                if least < most - margin * largest {
                    failures.push(format!("{}: {most:e} leaves and {least:e} stays", entry.name));
                }
            }
        }
    }
    println!("{close} of the images too close to call; the attention of {inside} runs is inside of an operator");
    conclude("attention received", count, &failures);
}

/// What a change that reaches nothing may do to outputs: the graphs are the same, so are all routes to their numbers.
const UNCHANGED: f64 = 0.0;

/// The least that a change does that reaches something, far above what float32 rounds to.
const CHANGED: f64 = 1e-4;

/// A model with a bias for each pair of tokens in the attention behind the first cut.
fn with_bias(entry: &Entry) -> Model {
    let (prepared, vit) = driver::inspect(&entry.read()).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
    let tokens = vit.tokens().as_known().expect("it is fixed") as usize;
    let entries: Vec<f32> = (0..tokens * tokens).map(|at| (at as f32).sin()).collect();
    let mut patch = Patch::new(&prepared, "test");
    let bias = patch.constant("bias", vitrim_ir::Tensor::f32s(&[tokens, tokens], &entries));
    for attention in vit.blocks[1..].iter().flat_map(|block| &block.attentions) {
        let softmax = attention.core.softmax;
        let scores = prepared.graph().node(softmax).input(0).expect("scores");
        let biased = patch.op("Add", "biased", &[scores, bias], &[]);
        patch.rewire(softmax, 0, biased);
    }
    patch.apply(&prepared).unwrap_or_else(|error| panic!("{}: {error}", entry.name)).0
}

/// Adds or takes one in turn in the entries that tables behind the first cut have for these tokens; `None` where there are
/// no tables.
fn with_other_entries(model: &Model, tokens: &[usize]) -> Option<Model> {
    let (prepared, vit) = driver::inspect(model).expect("it was pruned before");
    let graph = prepared.graph();
    let mut behind: HashSet<ValueId> = HashSet::new();
    let mut patch = Patch::new(&prepared, "test");
    for (id, node) in graph.nodes() {
        if id == vit.blocks[0].cut || node.operands().any(|operand| behind.contains(&operand)) {
            behind.extend(node.results());
        }
        for effect in vit.axes.effects_of(id) {
            let Effect::Table { slot, axes } = effect else { continue };
            if !node.results().any(|result| behind.contains(&result)) {
                continue;
            }
            let table = node.input(*slot).expect("a table");
            let dims = vit.shapes.dims(table).expect("the shape of a table is known");
            let dims: Vec<usize> = dims.iter().map(|dim| dim.as_known().expect("it is fixed") as usize).collect();
            let entries = ArrayD::from_shape_fn(dims.clone(), |at| {
                let of = |&(axis, span): &(usize, Span)| tokens.contains(&((at[axis] as i64 + span.front) as usize));
                // What is the same in all channels would be lost in norms.
                let sign = if at[dims.len() - 1] % 2 == 0 { 1.0 } else { -1.0 };
                if axes.iter().any(of) { sign } else { 0.0 }
            });
            let entries = vitrim_ir::Tensor::f32s(&dims, &entries.into_iter().collect::<Vec<f32>>());
            let entries = patch.constant("other", entries);
            let other = patch.op("Add", "with_other", &[table, entries], &[]);
            patch.rewire(id, *slot, other);
        }
    }
    if patch.is_empty() {
        return None;
    }
    Some(patch.apply(&prepared).unwrap_or_else(|error| panic!("{error}")).0)
}

/// In tables the extra token takes the place of the token that weighs most in it: it has the entries of that one, and
/// nothing has those of the others that left.
#[test]
fn what_is_fused_has_the_place_of_its_heaviest() {
    let scratch = Scratch::new("places");
    let backend = ort();
    let (mut count, mut failures) = (0, Vec::new());
    let plain = zoo().into_iter().find(|entry| entry.name == "timm_vit_ts17_unfused").expect("it is a fixture");
    let biased = [(with_bias(&plain), plain)];
    for (model, entry) in zoo().into_iter().map(|entry| (entry.read(), entry)).chain(biased) {
        let Ok((pruned, _)) = rewrite(&model, pruning(&[0], true)) else { continue };
        if entry.is_coarse(&model) || with_other_entries(&model, &[]).is_none() {
            continue;
        }
        let feeds = entry.feeds(load(backend.as_ref(), &entry.model).as_ref()).remove(0);
        // Tables are those of all images: with one image it is clear which entries are read.
        let feeds = images(&feeds, 0, 1);
        let path = scratch.save_as(&entry.name, &pruned, &entry.model);
        let outputs = try_run(backend.as_ref(), &path, &feeds).unwrap_or_else(|reason| panic!("{reason}"));
        let source = outputs.iter().find(|(name, _)| name.starts_with(SOURCE_OUTPUT));
        let source: Vec<i64> = integers(source.expect("the source is traced").1).into_iter().collect();
        let together = |token: &usize| source.iter().filter(|&&slot| slot == source[*token]).count() > 1;
        let (received, ..) = received(&entry, &scratch, &feeds).expect("attention that is written out");
        let received: Vec<f64> = received.into_iter().collect();
        let mut fused: Vec<usize> = (0..source.len()).filter(together).collect();
        fused.sort_by(|&a, &b| received[b].total_cmp(&received[a]));
        let (&heaviest, others) = fused.split_first().expect("some leave");
        assert!(received[heaviest] - received[others[0]] > MARGIN * received[heaviest], "{}: a tie", entry.name);
        let changed = [&[], others, &[heaviest]].map(|tokens| {
            let changed = with_other_entries(&model, tokens).expect("it has tables");
            let (pruned, _) = rewrite(&changed, pruning(&[0], true)).unwrap_or_else(|refusal| panic!("{refusal}"));
            let path = scratch.save_as(&entry.name, &pruned, &entry.model);
            try_run(backend.as_ref(), &path, &feeds).unwrap_or_else(|reason| panic!("{reason}"))
        });
        let apart = |at: usize| {
            let apart = changed[0].iter().filter_map(|(name, tensor)| Some(relative(tensor, changed[at].get(name)?)));
            apart.fold(0.0, f64::max)
        };
        count += 1;
        if apart(1) > UNCHANGED || apart(2) < CHANGED {
            failures.push(format!("{}: {:e} by others, {:e} by the heaviest", entry.name, apart(1), apart(2)));
        }
    }
    conclude("places of what is fused", count, &failures);
}

/// Kernels take other routes to the same numbers.
const KERNEL_TOLERANCE: f64 = 1e-4;

/// Where activations have 11 bits or fewer, another route rounds in other places.
const COARSE_TOLERANCE: f64 = 5e-3;

/// What a file with a dial gives at a setting, and what one that was written for it gives, may differ by: the same
/// operators in other fusions.
const DIAL_TOLERANCE: f64 = 1e-5;

/// The feeds of a model with a dial at a setting.
fn turned(feeds: &Feeds, input: &str, setting: &Tensor) -> Feeds {
    let feeds = feeds.iter().map(|(name, tensor)| (name.to_owned(), tensor.clone()));
    feeds.chain([(input.to_owned(), setting.clone())]).collect()
}

/// The largest difference between outputs, each relative to its own largest number.
fn apart(expected: &Outputs, given: &Outputs) -> f64 {
    let of_output =
        |(name, tensor): (&str, &Tensor)| given.get(name).map_or(f64::INFINITY, |given| relative(tensor, given));
    expected.iter().map(of_output).fold(0.0, f64::max)
}

/// One file for every setting of `input`, in one session: at each it is the file that was written for it, and the file in
/// which all tokens are computed; left alone, it is at the setting `default`.
fn dial_is_exact(input: &str, settings: &[Tensor], default: usize, pass: impl Fn(usize, bool) -> PassSpec) {
    let scratch = Scratch::new(&format!("dial_{input}"));
    let (mut count, mut dead, mut in_tract, mut failures) = (0, 0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let name = &entry.name;
        let tolerance = if entry.is_coarse(&model) { COARSE_DIAL_TOLERANCE } else { DIAL_TOLERANCE };
        let fixed: Result<Vec<_>, _> = (0..settings.len()).map(|at| rewrite(&model, pass(at, false))).collect();
        let (fixed, dialled) = match (fixed, rewrite(&model, pass(default, true))) {
            (Ok(fixed), Ok((dialled, report))) => {
                dead += usize::from(report.notes.iter().any(|note| note.starts_with("dead tokens")));
                (fixed, scratch.save_as(&format!("{name}_dial"), &dialled, &entry.model))
            }
            // What cannot be regrouped has no dial either, and nothing else.
            (Err(_), Err(refusal)) => {
                assert!(!refusal.to_string().contains("internal error"), "{name}: {refusal}");
                continue;
            }
            (Ok(_), Err(refusal)) => panic!("{name} can be rewritten, but not with a dial: {refusal}"),
            (Err(refusal), Ok(_)) => panic!("{name} can be rewritten with a dial only: {refusal}"),
        };
        let options = driver::Options { keep_dead: true, ..driver::Options::default() };
        let (whole, _) = driver::rewrite(&model, &Recipe { passes: vec![pass(default, true)] }, options)
            .unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        let whole = scratch.save_as(&format!("{name}_whole"), &whole, &entry.model);
        let save =
            |(at, (fixed, _)): (usize, &(Model, _))| scratch.save_as(&format!("{name}_{at}"), fixed, &entry.model);
        let fixed: Vec<PathBuf> = fixed.iter().enumerate().map(save).collect();
        let feeds = entry.feeds(load(ort().as_ref(), &entry.model).as_ref()).remove(0);
        for backend in [ort(), kernels()] {
            let run = |session: &mut Box<dyn Session>, feeds: &Feeds| {
                session.run(feeds).unwrap_or_else(|error| panic!("{name} in {}: {error:#}", backend.name()))
            };
            let [mut session, mut whole] = [&dialled, &whole].map(|path| load(backend.as_ref(), path));
            let left_alone = run(&mut session, &feeds);
            for (at, setting) in settings.iter().enumerate() {
                let expected =
                    try_run(backend.as_ref(), &fixed[at], &feeds).unwrap_or_else(|reason| panic!("{reason}"));
                let feeds = turned(&feeds, input, setting);
                let (given, all) = (run(&mut session, &feeds), run(&mut whole, &feeds));
                let pairs = [
                    ("the file for it", &expected, Some(&given)),
                    ("the file with all tokens", &all, Some(&given)),
                    ("the file for it, left alone,", &expected, (at == default).then_some(&left_alone)),
                ];
                for (other, expected, given) in pairs {
                    let Some(given) = given else { continue };
                    count += 1;
                    let apart = apart(expected, given);
                    if apart > tolerance {
                        let backend = backend.name();
                        failures.push(format!("{name} at setting {at} in {backend}: {apart:e} from {other}"));
                    }
                }
            }
        }
        // Tract takes what may be left out for what it is then. What it does not run to begin with proves nothing.
        if let Ok(expected) = try_run(tract().as_ref(), &fixed[default], &feeds) {
            in_tract += 1;
            match try_run(tract().as_ref(), &dialled, &feeds) {
                Ok(given) if apart(&expected, &given) <= tolerance => {}
                Ok(given) => failures.push(format!("{name} in tract: {:e} off", apart(&expected, &given))),
                Err(reason) => failures.push(reason),
            }
        }
    }
    println!("{dead} models compute fewer tokens than there are; {in_tract} run in tract");
    assert!(dead > 0 && in_tract > 0);
    conclude(&format!("settings of {input}"), count, &failures);
}

/// In float16 and 8 bits another fusion rounds elsewhere, with a step of 255 in 8 bits.
const COARSE_DIAL_TOLERANCE: f64 = 5e-2;

#[test]
fn one_file_keeps_every_share() {
    let shares = [0.5, 0.7, 1.0];
    let settings = shares.map(|share| Tensor::from_f64(DType::F64, &ArrayD::from_elem(vec![], share)));
    for fuse in [false, true] {
        dial_is_exact(KEEP_INPUT, &settings, 1, |at, runtime_keep| {
            let (keep, at) = (KeepSpec::Constant(shares[at]), Some(vec![0, 1]));
            PassSpec::Prune(PruneSpec { keep, at, fuse, runtime_keep, ..PruneSpec::default() })
        });
    }
}

#[test]
fn one_file_keeps_every_share_of_connections() {
    let shares = [0.3, 0.6, 1.0];
    let settings = shares.map(|share| Tensor::from_f64(DType::F64, &ArrayD::from_elem(vec![], share)));
    dial_is_exact(ATTENTION_KEEP_INPUT, &settings, 1, |at, runtime_keep| {
        let (keep, attention_keep) = (KeepSpec::Constant(0.7), Some(shares[at]));
        let at = Some(vec![0, 1]);
        PassSpec::Prune(PruneSpec { keep, at, attention_keep, runtime_keep, ..PruneSpec::default() })
    });
}

#[test]
fn one_file_merges_every_number_of_tokens() {
    // The last are more than half of the tokens, in the end or from the start: as many as there are pairs.
    let numbers = [0, 4, 8, 16, 100];
    let settings = numbers.map(|r| Tensor::from_f64(DType::I64, &ArrayD::from_elem(vec![], r as f64)));
    dial_is_exact(R_INPUT, &settings, 2, |at, runtime_r| {
        PassSpec::Merge(MergeSpec { runtime_r, ..constant(numbers[at]) })
    });
}

#[test]
fn pruned_models_run_and_keep_the_shapes_of_outputs() {
    let scratch = Scratch::new("pruned_shapes");
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        // Behind the first pruning, roundings in float16 or 8 bits decide who leaves in the second.
        let at = if entry.is_coarse(&model) { &[0][..] } else { &[0, 1] };
        for fuse in [false, true] {
            let Ok((pruned, report)) = rewrite(&model, pruning(at, fuse)) else { continue };
            let prunes = report.steps.first().is_none_or(|step| step.removed > 0);
            assert!(prunes, "{} is too small to prune", entry.name);
            let path = scratch.save_as(&entry.name, &pruned, &entry.model);
            let feeds = entry.feeds(load(ort().as_ref(), &entry.model).as_ref()).remove(0);
            let mut meant: Option<Outputs> = None;
            for backend in runtimes() {
                let reference = match try_run(backend.as_ref(), &entry.model, &feeds) {
                    Ok(outputs) => outputs,
                    // What tract does not run to begin with proves nothing; ONNX Runtime runs the whole zoo.
                    Err(_) if backend.name() == "tract" => continue,
                    Err(reason) => panic!("{reason}"),
                };
                count += 1;
                let outputs = match try_run(backend.as_ref(), &path, &feeds) {
                    Ok(outputs) => outputs,
                    Err(reason) => {
                        failures.push(reason);
                        continue;
                    }
                };
                let wrong = reference.iter().find(|(name, tensor)| {
                    outputs.get(name).is_none_or(|other| {
                        other.shape() != tensor.shape() || other.to_f64().iter().any(|x| !x.is_finite())
                    })
                });
                failures.extend(wrong.map(|(name, _)| format!("{} in {}: {name}", entry.name, backend.name())));
                if backend.name() == ort().name() && meant.is_none() {
                    meant = Some(outputs);
                } else if let Some(meant) = meant.as_ref().filter(|_| backend.name() == kernels().name()) {
                    let tolerance = if entry.is_coarse(&model) { COARSE_TOLERANCE } else { KERNEL_TOLERANCE };
                    let apart = meant.iter().filter_map(|(name, tensor)| Some(relative(tensor, outputs.get(name)?)));
                    let apart = apart.fold(0.0, f64::max);
                    if apart > tolerance {
                        failures.push(format!("{}, fuse {fuse}: kernels are {apart:e} off", entry.name));
                    }
                }
            }
        }
    }
    conclude("pruned shapes", count, &failures);
}

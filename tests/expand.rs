//! Expansion on every model of the zoo: the right tokens join, whatever the exporter wrote, and outputs keep their shapes.

mod common;

use common::expansion::Expanding;
use common::{Entry, Scratch, conclude, constant, integers, load, ort, run, zoo};
use ndarray::{ArrayD, Axis};
use vitrim::runtime::Feeds;
use vitrim::tensor::Tensor;
use vitrim_ir::{DataType, Model, Patch, TensorType};
use vitrim_passes::Refusal;
use vitrim_passes::driver::{self, Options, Report};
use vitrim_passes::recipe::{ExpandSpec, PassSpec, Recipe};
use vitrim_passes::recognise::Head;
use vitrim_passes::reduce::SOURCE_OUTPUT;
use vitrim_passes::schedule::Expansion;

/// The first stage of the paper's, traced.
fn first_stage() -> ExpandSpec {
    ExpandSpec { stage: Some(1), trace_source: true, ..ExpandSpec::default() }
}

fn expand(model: &Model, spec: ExpandSpec) -> Result<(Model, Report), Refusal> {
    let options = Options { training: true, ..Options::default() };
    driver::rewrite(model, &Recipe { passes: vec![PassSpec::Expand(spec)] }, options)
}

/// Decisions closer than this depend on the order in which a runtime adds up.
const MARGIN: f64 = 1e-5;

/// The output of a model's first block, `[batch, tokens, channels]` float32, with its tokens at the front and at the end
/// that are no patches. None where it is anything else.
fn output_of_first_block(entry: &Entry, scratch: &Scratch, feeds: &Feeds) -> Option<(Tensor, [usize; 2])> {
    let (prepared, vit) = driver::inspect(&entry.read()).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
    let graph = prepared.graph();
    let node = graph.node(vit.blocks.get(1)?.entry?);
    let [stream] = node.results().filter(|&value| vit.axes.carries(value)).collect::<Vec<_>>()[..] else { return None };
    let dims = vit.shapes.dims(stream)?;
    if vit.shapes.dtype(stream)? != DataType::F32 || dims.len() != 3 || dims[1] != *vit.tokens() {
        return None;
    }
    let mut patch = Patch::new(&prepared, "test");
    patch.append_output("output_of_first_block", stream, TensorType { dtype: DataType::F32, dims: None });
    let (shown, _) = patch.apply(&prepared).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
    let path = scratch.save_as(&format!("{}_shown", entry.name), &shown, &entry.model);
    let outputs = run(ort().as_ref(), &path, feeds);
    Some((outputs.get("output_of_first_block")?.clone(), [vit.special.prefix(), vit.special.suffix]))
}

#[test]
fn tokens_join_those_that_the_first_block_made_alike() {
    let scratch = Scratch::new("expanded");
    let (mut count, mut close, mut other, mut failures) = (0, 0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((expanded, _)) = expand(&model, first_stage()) else { continue };
        let path = scratch.save_as(&entry.name, &expanded, &entry.model);
        for feeds in entry.feeds(load(ort().as_ref(), &entry.model).as_ref()) {
            let outputs = run(ort().as_ref(), &path, &feeds);
            let Some((x, [protect, suffix])) = output_of_first_block(&entry, &scratch, &feeds) else {
                other += 1;
                continue;
            };
            let (schedule, tokens) = (Expansion::default(), x.shape()[1]);
            let patches = tokens - protect - suffix;
            let (seeds, rounds) = (schedule.seeds(patches), schedule.additions(patches, 1).concat());
            let (name, feeds) = (entry.name.clone(), Feeds::from_iter([("x".to_owned(), x)]));
            let closeness = "CosineSimilarity";
            let case = Expanding { name, tokens, protect, suffix, seeds, rounds, closeness, sign: 1, feeds };
            let (expected, margin) = case.expected_within();
            count += 1;
            if margin < MARGIN {
                close += 1;
                continue;
            }
            let source = outputs.iter().find(|(name, _)| name.starts_with(SOURCE_OUTPUT));
            if integers(source.expect("the source is traced").1) != expected.assign {
                failures.push(format!("{}: tokens went elsewhere (margin {margin:e})", entry.name));
            }
        }
    }
    println!("{close} runs too close to call; {other} have no float32 stream [batch, tokens, channels]");
    assert!(close < count, "all were too close to call");
    conclude("expansions", count, &failures);
}

#[test]
fn tokens_that_joined_others_are_zero_where_all_are_restored() {
    let scratch = Scratch::new("in_place");
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((expanded, report)) = expand(&model, first_stage()) else { continue };
        let (_, vit) = driver::inspect(&model).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
        let named = |head: &Head| if let Head::PerToken { output } = head { Some(output.clone()) } else { None };
        let Some(output) = &vit.heads.iter().find_map(named) else { continue };
        let path = scratch.save_as(&entry.name, &expanded, &entry.model);
        for feeds in entry.feeds(load(ort().as_ref(), &entry.model).as_ref()) {
            let before = run(ort().as_ref(), &entry.model, &feeds);
            let before = before.get(output).expect("an output").shape().to_vec();
            let outputs = run(ort().as_ref(), &path, &feeds);
            let tokens = outputs.get(output).expect("an output");
            let (values, step) = (tokens.to_f64(), report.steps[1]);
            if tokens.shape() != before || values.ndim() != 3 || values.shape()[1] != report.steps[0].before {
                continue;
            }
            count += 1;
            let living =
                |image: &ArrayD<f64>| image.axis_iter(Axis(0)).filter(|token| token.iter().any(|&x| x != 0.0)).count();
            let living: Vec<usize> = values.axis_iter(Axis(0)).map(|image| living(&image.to_owned())).collect();
            if living.iter().any(|&living| living != step.before) {
                failures.push(format!("{}: {living:?} tokens are not zero, not {}", entry.name, step.before));
            }
        }
    }
    conclude("outputs for each token", count, &failures);
}

/// A small model of the zoo.
fn some() -> Entry {
    zoo().into_iter().find(|entry| entry.name == "timm_vit_ts17_unfused").expect("it is in the zoo")
}

#[test]
fn what_cannot_be_expanded_is_refused() {
    let model = some().read();
    let says = |result: Result<(Model, Report), Refusal>| result.expect_err("it is refused").to_string();
    let recipe = Recipe { passes: vec![PassSpec::Expand(first_stage())] };
    assert!(says(driver::rewrite(&model, &recipe, Options::default())).contains("in training alone"));
    assert!(says(expand(&model, ExpandSpec::default())).contains("give stage, from 1 to 3"));
    let passes = vec![PassSpec::Expand(first_stage()), PassSpec::Merge(constant(2))];
    let options = Options { training: true, ..Options::default() };
    assert!(says(driver::rewrite(&model, &Recipe { passes }, options)).contains("acts alone"));
    let few = ExpandSpec { seed_rate: 1e-3, ..first_stage() };
    assert!(says(expand(&model, few)).contains("too few"));
}

#[test]
fn all_blocks_but_the_first_have_fewer_tokens() {
    let (_, report) = expand(&some().read(), first_stage()).unwrap_or_else(|refusal| panic!("{refusal}"));
    let (first, others) = report.steps.split_first().expect("blocks");
    let patches = first.before - 1;
    let kept = 1 + Expansion::default().kept(patches, 1);
    assert!(kept < first.before);
    assert_eq!(first.after(), first.before);
    assert!(!others.is_empty() && others.iter().all(|step| (step.before, step.after()) == (kept, kept)));
    let (before, after) = (report.cost_before.expect("fixed extents"), report.cost_after.expect("fixed extents"));
    assert!(after.flops < before.flops, "{after:?} of {before:?}");
}

#[test]
fn a_stage_that_keeps_everything_changes_nothing() {
    let model = some().read();
    let spec = ExpandSpec { stage: Some(3), ..ExpandSpec::default() };
    let options = Options { training: true, keep_dead: true, ..Options::default() };
    let (same, _) = driver::rewrite(&model, &Recipe { passes: vec![PassSpec::Expand(spec)] }, options)
        .unwrap_or_else(|refusal| panic!("{refusal}"));
    let (prepared, _) = driver::prepare(&model).unwrap_or_else(|refusal| panic!("{refusal}"));
    let bytes = |model: &Model| Model::to_bytes(model.verify().unwrap_or_else(|violations| panic!("{violations}")));
    assert!(bytes(&same) == bytes(&prepared), "nothing is edited");
}

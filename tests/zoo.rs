//! Every model of the zoo: what is recognised, what is refused, and what merging must not change.

mod common;

use common::{
    Entry, Scratch, conclude, constant, fixtures, images, integers, kernels, load, merge, merge_all, ort, relative,
    tract, try_run, without_dead_tokens, zoo,
};
use serde_json::Value as Json;
use vitrim::inspect::Inspection;
use vitrim::runtime::{Feeds, Outputs};
use vitrim::tensor::compare::Comparison;
use vitrim_ir::Model;
use vitrim_passes::driver;
use vitrim_passes::recipe::MergeSpec;
use vitrim_passes::reduce::SOURCE_OUTPUT;

/// With nothing merged the graph computes the same function, in float32 up to what another fusion of the same
/// operators costs.
const SAME_TOLERANCE: f64 = 1e-5;

/// Where activations have 11 bits or fewer, another fusion rounds in other places.
const COARSE_TOLERANCE: f64 = 5e-3;

/// Tokens to merge in every block: few enough for the smallest models of the zoo (17 tokens, 4 blocks) to do so.
const R: usize = 4;

/// What is wrong with `candidate`, which must compute what `reference` is.
fn difference(entry: &Entry, coarse: bool, reference: &Outputs, candidate: &Outputs) -> Option<String> {
    let tolerance = if coarse { COARSE_TOLERANCE } else { SAME_TOLERANCE };
    reference.iter().find_map(|(name, tensor)| {
        let other = candidate.get(name)?;
        let apart = relative(tensor, other);
        let top1 = Comparison::of(tensor, other).ok().and_then(|comparison| comparison.top1);
        let agrees = top1.is_none_or(|top1| top1.hits == top1.of);
        let wrong = apart > tolerance || !agrees;
        wrong.then(|| format!("{}: {name} is {apart:e} off, the same classes: {agrees}", entry.name))
    })
}

#[test]
fn merging_nothing_changes_nothing() {
    let scratch = Scratch::new("nothing");
    let backend = ort();
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        for trace_source in [false, true] {
            let Ok((merged, _)) = merge(&model, MergeSpec { trace_source, ..constant(0) }) else { continue };
            let path = scratch.save_as(&entry.name, &merged, &entry.model);
            let mut original = load(backend.as_ref(), &entry.model);
            let mut candidate = match vitrim::runtime::load(backend.as_ref(), &path) {
                Ok(session) => session,
                Err(error) => {
                    failures.push(format!("{error:#}"));
                    continue;
                }
            };
            let coarse = entry.is_coarse(&model);
            for feeds in entry.feeds(original.as_ref()) {
                count += 1;
                let reference = original.run(&feeds).unwrap_or_else(|error| panic!("{}: {error:#}", entry.name));
                match candidate.run(&feeds) {
                    Ok(outputs) => {
                        failures.extend(difference(&entry, coarse, &reference, &outputs));
                        let traced = outputs.iter().filter(|(name, _)| name.starts_with(SOURCE_OUTPUT));
                        let sources: Vec<_> = traced.map(|(_, source)| integers(source)).collect();
                        let stays = |(token, &slot): (usize, &i64)| slot == token as i64;
                        let identity = (sources.iter().flat_map(|source| source.outer_iter()))
                            .all(|row| row.iter().enumerate().all(stays));
                        if sources.is_empty() == trace_source || !identity {
                            failures.push(format!("{}: tokens do not stay where they are", entry.name));
                        }
                    }
                    Err(error) => failures.push(format!("{}, trace {trace_source}: {error:#}", entry.name)),
                }
            }
        }
    }
    conclude("r = 0", count, &failures);
}

/// Shapes by name, and whether all numbers are finite.
fn shapes(outputs: &Outputs) -> Vec<(String, Vec<usize>, bool)> {
    let finite = |tensor: &vitrim::tensor::Tensor| tensor.to_f64().iter().all(|x| x.is_finite());
    outputs.iter().map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec(), finite(tensor))).collect()
}

#[test]
fn merged_models_run_and_keep_the_shapes_of_outputs() {
    let scratch = Scratch::new("shapes");
    let (mut count, mut in_tract, mut failures) = (0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((merged, report)) = merge(&model, constant(R)) else { continue };
        let removes = report.steps.is_empty() || report.steps.iter().any(|step| step.removed > 0);
        assert!(removes, "{} is too small to merge {R} tokens", entry.name);
        let path = scratch.save_as(&entry.name, &merged, &entry.model);
        let batches = two_batches(&entry);
        // tract plans anew for every shape, which takes longer than running; one is enough to see whether it can.
        for (backend, batches) in [(ort(), &batches[..]), (tract(), &batches[..1])] {
            for feeds in batches {
                let reference = match try_run(backend.as_ref(), &entry.model, feeds) {
                    Ok(outputs) => outputs,
                    // What tract does not run to begin with proves nothing; ONNX Runtime runs the whole zoo.
                    Err(_) if backend.name() == "tract" => continue,
                    Err(reason) => panic!("{reason}"),
                };
                count += 1;
                in_tract += usize::from(backend.name() == "tract");
                match try_run(backend.as_ref(), &path, feeds) {
                    Ok(outputs) if shapes(&outputs) == shapes(&reference) => {}
                    Ok(outputs) => failures.push(format!(
                        "{} in {}: {:?}, not {:?}",
                        entry.name,
                        backend.name(),
                        shapes(&outputs),
                        shapes(&reference)
                    )),
                    Err(reason) => failures.push(reason),
                }
            }
        }
    }
    assert!(in_tract > 0, "tract runs no model of the zoo");
    println!("{in_tract} of the runs in tract");
    conclude("shapes", count, &failures);
}

/// Attention without bias or mask becomes one operator, however the exporter wrote it. Others keep their softmax.
#[test]
fn plain_attention_becomes_one_operator() {
    let plain = [
        "flax_nnx_vit_functions_op18",
        "hf_vit_sdpa_dynamo18",
        "hf_vit_sdpa_ts14",
        "timm_deit_dist_ts17",
        "timm_dinov2_reg4_swiglu_ts17",
        "timm_vit_avg_nocls_ts17",
        "timm_vit_dynamo18_fused",
        "timm_vit_features_ts17",
        "timm_vit_fp16_ts17",
        "timm_vit_ts17_fused",
        "timm_vit_ts17_unfused",
    ];
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((merged, report)) = merge(&model, constant(R)) else { continue };
        let of = |names: &[&str]| {
            let called = |node: &vitrim_ir::Node| node.op.domain == "ai.vitrim" || node.op.domain.is_empty();
            merged.graph().nodes().filter(|(_, node)| called(node) && names.contains(&node.op.name.as_str())).count()
        };
        let (ours, softmax) = (of(&["ProportionalAttention"]), of(&["Softmax"]));
        if plain.contains(&entry.name.as_str()) {
            count += 1;
            // All blocks but the first attend over merged tokens.
            if softmax > 0 || ours + 1 != report.steps.len() {
                failures.push(format!("{}: {ours} operators, {softmax} softmaxes left", entry.name));
            }
        } else if ours > 0 && entry.name.contains("rope") {
            failures
                .push(format!("{}: rotary positions between projection and scores are no plain attention", entry.name));
        }
    }
    assert!(count > 0, "no plain model is here");
    conclude("plain attention", count, &failures);
}

/// Models all of whose tokens are read, and by what.
const ALL_READ: [(&str, &str); 18] = [
    ("flax_linen_vit_gap_op17", "a mean over tokens"),
    ("hf_dinov2_dynamo18", "a class token and a mean over the others"),
    ("hf_dinov2_swiglu_ts17", "an output"),
    ("hf_dinov2_ts17", "a class token and a mean over the others"),
    ("hf_siglip_vision_dynamo18", "attention of a learned query"),
    ("hf_siglip_vision_ts17", "an output, and attention of a learned query"),
    ("hf_vitmodel_pooler_ts17", "an output"),
    ("keras_hub_vit_export", "an output"),
    ("keras_mha_vit_flatten_tf2onnx17", "a product with tokens and channels as one axis"),
    ("keras_mha_vit_tf2onnx15", "a mean over tokens"),
    ("openclip_tokens_ts17", "an output"),
    ("timm_eva02_rope_dynamo18", "a mean over tokens"),
    ("timm_eva02_rope_ts17", "a mean over tokens"),
    ("timm_eva_qkvbias_ts17", "a mean over tokens"),
    ("timm_vit_avg_nocls_dynamo18", "a mean over tokens"),
    ("timm_vit_avg_nocls_ts17", "a mean over tokens"),
    ("timm_vit_cls_avgpool_ts17", "a mean over tokens"),
    ("timm_vit_features_ts17", "an output"),
];

/// What is left of the work, at most, where the last block has one or two tokens: the models of the zoo have 3 to 6 of
/// them, and in some of them the operator of the attention itself needs all tokens.
const LEFT: f64 = 0.87;

/// Of the recorded feeds, as they are and, where batches are open, of the first image alone.
fn two_batches(entry: &Entry) -> Vec<Feeds> {
    let session = load(ort().as_ref(), &entry.model);
    let both = entry.feeds(session.as_ref()).into_iter().next().expect("a recorded run");
    let open = session.inputs().iter().all(|port| port.fixed_batch().is_none());
    if open { vec![images(&both, 0, 1), both] } else { vec![both] }
}

fn bytes(model: &Model) -> Vec<u8> {
    Model::to_bytes(model.verify().unwrap_or_else(|violations| panic!("{violations}")))
}

/// A token that nothing reads is not computed, whoever exported the model, and everything stays what it was.
#[test]
fn dead_tokens_are_not_computed() {
    let scratch = Scratch::new("dead");
    let (mut count, mut in_tract, mut shrunk, mut failures) = (0, 0, 0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let Ok((rewritten, report)) = without_dead_tokens(&model) else { continue };
        let applies = report.notes.iter().any(|note| note.starts_with("dead tokens: "));
        if ALL_READ.iter().any(|(name, _)| *name == entry.name) {
            let (same, _) = driver::prepare(&model).unwrap_or_else(|refusal| panic!("{refusal}"));
            if applies || bytes(&rewritten) != bytes(&same) {
                failures.push(format!("{}: all tokens are read", entry.name));
            }
            continue;
        }
        shrunk += 1;
        let left = report.cost_before.zip(report.cost_after).map(|(all, left)| left.flops as f64 / all.flops as f64);
        if !applies || left.is_some_and(|left| left > LEFT) {
            failures.push(format!("{}: {left:?} of the work is left, {:?}", entry.name, report.notes));
        }
        let path = scratch.save_as(&entry.name, &rewritten, &entry.model);
        let coarse = entry.is_coarse(&model);
        for feeds in two_batches(&entry) {
            for backend in [ort(), tract()] {
                let reference = match try_run(backend.as_ref(), &entry.model, &feeds) {
                    Ok(outputs) => outputs,
                    // What tract does not run to begin with proves nothing; ONNX Runtime runs the whole zoo.
                    Err(_) if backend.name() == "tract" => continue,
                    Err(reason) => panic!("{reason}"),
                };
                count += 1;
                in_tract += usize::from(backend.name() == "tract");
                match try_run(backend.as_ref(), &path, &feeds) {
                    Ok(outputs) => failures.extend(difference(&entry, coarse, &reference, &outputs)),
                    Err(reason) => failures.push(reason),
                }
            }
        }
    }
    assert!(in_tract > 0, "tract runs no model of the zoo");
    println!("{shrunk} models, {in_tract} of the runs in tract");
    conclude("dead tokens", count, &failures);
}

/// The same behind merges, with native kernels and without.
#[test]
fn dead_tokens_of_merged_models_are_not_computed() {
    let scratch = Scratch::new("dead_merged");
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let (Ok((all, _)), Ok((merged, report))) = (merge_all(&model, constant(R)), merge(&model, constant(R))) else {
            continue;
        };
        let applies = report.notes.iter().any(|note| note.starts_with("dead tokens: "));
        if applies == ALL_READ.iter().any(|(name, _)| *name == entry.name) {
            failures.push(format!("{}: {:?}", entry.name, report.notes));
        }
        if !applies {
            continue;
        }
        let paths = [("all", &all), ("merged", &merged)]
            .map(|(name, model)| scratch.save_as(&format!("{}.{name}", entry.name), model, &entry.model));
        let coarse = entry.is_coarse(&model);
        for feeds in two_batches(&entry) {
            for backend in [ort(), kernels()] {
                count += 1;
                let outputs = [&paths[0], &paths[1]].map(|path| try_run(backend.as_ref(), path, &feeds));
                match &outputs {
                    [Ok(reference), Ok(outputs)] => failures.extend(difference(&entry, coarse, reference, outputs)),
                    [Err(reason), _] | [_, Err(reason)] => failures.push(reason.clone()),
                }
            }
        }
    }
    conclude("dead tokens of merged models", count, &failures);
}

/// Kernels take other routes to the same numbers: sums in another order, an exponential of their own, and no scores in
/// float16.
const KERNEL_TOLERANCE: f64 = 1e-4;

#[test]
fn kernels_compute_what_the_files_mean() {
    let scratch = Scratch::new("kernels");
    let (plain, native) = (ort(), kernels());
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let model = entry.read();
        let spec = MergeSpec { trace_source: true, ..constant(R) };
        let Ok((merged, _)) = merge(&model, spec) else { continue };
        let tolerance = if entry.is_coarse(&model) { COARSE_TOLERANCE } else { KERNEL_TOLERANCE };
        let path = scratch.save_as(&entry.name, &merged, &entry.model);
        for feeds in entry.feeds(load(plain.as_ref(), &entry.model).as_ref()) {
            count += 1;
            let meant = try_run(plain.as_ref(), &path, &feeds).unwrap_or_else(|reason| panic!("{reason}"));
            match try_run(native.as_ref(), &path, &feeds) {
                Ok(outputs) => failures.extend(meant.iter().filter_map(|(name, tensor)| {
                    let apart = relative(tensor, outputs.get(name)?);
                    (apart.is_nan() || apart > tolerance).then(|| format!("{}: {name} is {apart:e} off", entry.name))
                })),
                Err(reason) => failures.push(reason),
            }
        }
    }
    conclude("kernels", count, &failures);
}

/// What is seen of a model, as the facts have it: blocks of all towers together, and one number where all have the same.
fn of_all_towers(seen: &Json, key: &str) -> Json {
    let Some(towers) = seen["towers"].as_array() else { return seen[key].clone() };
    let values: Vec<Json> = towers.iter().map(|tower| tower[key].clone()).collect();
    if key == "num_blocks" {
        return values.iter().filter_map(Json::as_u64).sum::<u64>().into();
    }
    if values.windows(2).all(|pair| pair[0] == pair[1]) { values[0].clone() } else { values.into() }
}

#[test]
fn what_is_seen_agrees_with_what_the_models_are() {
    const KEYS: [&str; 5] = ["num_blocks", "heads", "embed_dim", "num_tokens", "prefix_tokens"];
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let seen = serde_json::to_value(Inspection::of(&entry.read())).expect("it is JSON");
        if seen["vit"] == Json::Bool(false) {
            continue;
        }
        for key in KEYS {
            let value = of_all_towers(&seen, key);
            // A token count that is known at run time only is an expression; the facts have that of the usual size.
            if key == "num_tokens" && value.is_string() {
                continue;
            }
            count += 1;
            if value != entry.facts[key] {
                failures.push(format!("{}: {key} is {value}, not {}", entry.name, entry.facts[key]));
            }
        }
    }
    conclude("facts", count, &failures);
}

#[test]
fn plain_transformers_are_merged_and_windows_refused() {
    let ours = fixtures().join("zoo");
    let (mut standard, mut merged, mut failures) = (0, 0, Vec::new());
    for entry in zoo() {
        let result = merge(&entry.read(), constant(R));
        let negative = entry.facts["negative_for_tome"] == Json::Bool(true);
        match (&result, negative) {
            (Ok(_), true) => failures.push(format!("{} has windows and was merged", entry.name)),
            (Err(refusal), false) if entry.model.starts_with(&ours) => {
                failures.push(format!("{}: {refusal}", entry.name))
            }
            (Err(refusal), _) => {
                println!("{}: {refusal}", entry.name);
                // A refusal is a sentence about the model, never a defect of ours.
                if refusal.to_string().contains("internal error") {
                    failures.push(format!("{}: {refusal}", entry.name));
                }
            }
            (Ok(_), false) => merged += 1,
        }
        standard += usize::from(!negative);
    }
    println!("{merged} of {standard} are merged");
    assert!(2 * merged >= standard, "only {merged} of {standard} are merged");
    conclude("refusals", standard, &failures);
}

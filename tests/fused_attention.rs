//! One ViT written with every fused operator that vitrim knows: with the same weights, all of them merge and are pruned to
//! what the decomposed one is.

mod common;
mod forms;

use common::{
    Scratch, conclude, constant, images, kernels, merge, ort, relative, rewrite, tract, try_run, without_dead_tokens,
};
use forms::{Bias, Form, Norms, Plan, Projected, Scores, noise, vit};
use ndarray::ArrayD;
use vitrim::runtime::{Backend, Feeds};
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{FusedAttention, Model, Node, Shapes};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec};

/// 6 × 6 patches and a class token.
const PLAN: Plan =
    Plan { image: 24, patch: 4, width: 24, heads: 3, depth: 3, expansion: 2, pooled: true, scores: Scores::PLAIN };
/// Tokens to merge in every block.
const R: usize = 8;

/// Another operator adds in another order.
const TOLERANCE: f64 = 1e-5;
/// So do other runtimes, and kernels.
const RUNTIME_TOLERANCE: f64 = 1e-4;
/// Where tokens are rounded to 8 bits, a rounding of float32 may move one by a step of 255.
const COARSE_TOLERANCE: f64 = 2e-2;
/// What merging must change, for the comparison to have teeth.
const LEAST_CHANGE: f64 = 1e-2;

/// Two images.
fn feeds() -> Feeds {
    let [channels, height, width] = PLAN.image_shape();
    let shape = [2, channels, height, width];
    let pixels = noise("pixels", &shape, 2.0).into_iter().map(f64::from).collect();
    let pixels = ArrayD::from_shape_vec(shape.map(|extent| extent as usize).to_vec(), pixels).expect("so many pixels");
    std::iter::once(("image".to_owned(), Tensor::from_f64(DType::F32, &pixels))).collect()
}

/// Merges in every block; with tokens in 8 bits in the first alone, where both sides have the same ones: behind it, one
/// that is a step away may be merged with another.
fn merging(form: Form) -> PassSpec {
    PassSpec::Merge(match form {
        Form::Rounded | Form::Quantized => MergeSpec { r: Some(RSpec::PerBlock(vec![R])), ..MergeSpec::default() },
        _ => constant(R),
    })
}

/// Keeps 70 % of the patches: likewise.
fn prune_spec(form: Form) -> PruneSpec {
    let at = match form {
        Form::Rounded | Form::Quantized => vec![0],
        _ => vec![0, 1],
    };
    PruneSpec { keep: KeepSpec::Constant(0.7), at: Some(at), ..PruneSpec::default() }
}

/// And one token of the others.
fn fusing(form: Form) -> PassSpec {
    PassSpec::Prune(PruneSpec { fuse: true, ..prune_spec(form) })
}

fn pruning(form: Form) -> PassSpec {
    PassSpec::Prune(prune_spec(form))
}

/// And half of the connections.
fn closing(form: Form) -> PassSpec {
    PassSpec::Prune(PruneSpec { attention_keep: Some(0.5), ..prune_spec(form) })
}

fn closing_and_fusing(form: Form) -> PassSpec {
    PassSpec::Prune(PruneSpec { attention_keep: Some(0.5), fuse: true, ..prune_spec(form) })
}

/// Forms with an operator for attention.
const FUSED: [Form; 9] = [
    Form::Standard { heads_apart: true },
    Form::Standard { heads_apart: false },
    Form::MultiHead(Projected::ConstantBias),
    Form::MultiHead(Projected::ComputedBias),
    Form::MultiHead(Projected::HeadsApart),
    Form::Packed { computed: false },
    Form::Packed { computed: true },
    Form::PackedBiased,
    Form::Quantized,
];

const NORMS: [Norms; 4] = [Norms::Plain, Norms::Skip, Norms::SkipSimplified, Norms::Post];

#[test]
fn all_forms_merge_alike() {
    all_forms_are_alike("merged", PLAN, &NORMS, &FUSED, merging);
}

#[test]
fn all_forms_are_pruned_alike() {
    all_forms_are_alike("fused", PLAN, &NORMS, &FUSED, fusing);
}

#[test]
fn all_forms_close_connections_alike() {
    all_forms_are_alike("closed", PLAN, &NORMS, &FUSED, closing);
    all_forms_are_alike("closed_and_fused", PLAN, &[Norms::Plain], &FUSED, closing_and_fusing);
}

/// What an operator does to the scores inside counts for the tokens and connections that stay.
#[test]
fn scores_inside_are_those_outside() {
    let scaled = Scores { scale: Some(0.2), ..Scores::PLAIN };
    let capped = Scores { cap: Some(1.5), ..Scores::PLAIN };
    let [biased, masked] = [Bias::Table, Bias::Mask].map(|bias| Scores { bias, ..Scores::PLAIN });
    for (what, scores) in [("scaled", scaled), ("capped", capped), ("biased", biased), ("masked", masked)] {
        let takes = |form: &&Form| match form {
            Form::Standard { .. } => true,
            Form::PackedBiased => scores.bias == Bias::None && scores.cap.is_none(),
            Form::Quantized => scores == scaled,
            // Nor do ONNX Runtime's operators take masks of pairs that close a connection altogether.
            _ => scores.cap.is_none() && scores.bias != Bias::Mask,
        };
        let forms: Vec<Form> = FUSED.iter().filter(takes).copied().collect();
        for pooled in [false, true] {
            let plan = Plan { pooled, scores, ..PLAN };
            all_forms_are_alike(&format!("{what}_pruned"), plan, &[Norms::Plain], &forms, pruning);
            all_forms_are_alike(&format!("{what}_closed"), plan, &[Norms::Plain], &forms, closing);
        }
    }
}

/// Of attentions side by side all heads count, for tokens and connections alike.
#[test]
fn attentions_side_by_side_are_pruned_as_one() {
    let scratch = Scratch::new("side_by_side");
    for backend in [ort(), kernels(), tract()] {
        for pass in [pruning, fusing, closing, closing_and_fusing] {
            let outputs = [true, false].map(|joint| {
                let form = Form::Two { joint };
                let (reduced, _) = rewrite(&vit(PLAN, form, Norms::Plain), pass(form)).expect("it is pruned");
                let outputs = try_run(backend.as_ref(), &scratch.save("two", &reduced), &feeds());
                outputs.expect("it runs").get("y").expect("y").clone()
            });
            let apart = relative(&outputs[0], &outputs[1]);
            assert!(apart <= RUNTIME_TOLERANCE, "{} of {:?}: {apart:e}", backend.name(), pass(Form::Decomposed));
        }
    }
}

/// With all tokens and connections kept, what an operator was opened to computes the same.
#[test]
fn opened_operators_compute_the_same() {
    let scratch = Scratch::new("opened");
    let keep_all = PassSpec::Prune(PruneSpec {
        keep: KeepSpec::Constant(1.0),
        at: Some(vec![0, 1]),
        attention_keep: Some(1.0),
        ..PruneSpec::default()
    });
    let backend = ort();
    let (mut count, mut failures) = (0, Vec::new());
    for form in FUSED {
        count += 1;
        let model = vit(PLAN, form, Norms::Plain);
        let (opened, _) = rewrite(&model, keep_all.clone()).unwrap_or_else(|refusal| panic!("{form:?}: {refusal}"));
        let [before, after] = [&model, &opened].map(|model| {
            try_run(backend.as_ref(), &scratch.save("model", model), &feeds())
                .expect("it runs")
                .get("y")
                .expect("y")
                .clone()
        });
        // The masked softmax adds a millionth to each row's sum, which is one at least.
        let tolerance = if form == Form::Quantized { COARSE_TOLERANCE } else { TOLERANCE };
        let apart = relative(&before, &after);
        failures.extend((apart > tolerance).then(|| format!("{form:?}: {apart:e} off")));
    }
    conclude("opened forms", count, &failures);
}

/// Operators whose scores runtimes do not agree on, or whose heads are shared, are left alone.
#[test]
fn what_cannot_be_opened_is_refused() {
    let scores = Scores { cap: Some(1.5), bias: Bias::Table, ..Scores::PLAIN };
    for heads_apart in [false, true] {
        let form = Form::Standard { heads_apart };
        let model = vit(Plan { scores, ..PLAN }, form, Norms::Plain);
        for pass in [pruning, closing] {
            let refusal = rewrite(&model, pass(form)).expect_err("it is ambiguous").to_string();
            assert!(refusal.contains("Attention") && refusal.contains("runtimes differ"), "{refusal}");
        }
    }
    let shared = vit(PLAN, Form::Shared, Norms::Plain);
    let refusal = rewrite(&shared, closing(Form::Shared)).expect_err("keys are shared").to_string();
    assert!(refusal.contains("Attention") && refusal.contains("share keys"), "{refusal}");
}

fn all_forms_are_alike(what: &str, plan: Plan, norms: &[Norms], forms: &[Form], pass: fn(Form) -> PassSpec) {
    let scratch = Scratch::new(&format!("{what}_forms"));
    let [ort, kernels, tract] = [ort(), kernels(), tract()];
    let feeds = feeds();
    let run = |backend: &dyn Backend, model: &Model| {
        try_run(backend, &scratch.save("form", model), &feeds).map(|outputs| outputs.get("y").expect("y").clone())
    };
    let (mut count, mut failures) = (0, Vec::new());
    for &norms in norms {
        let references = [Form::Decomposed, Form::Rounded].map(|form| {
            let reference = vit(plan, form, norms);
            let (reduced, _) = rewrite(&reference, pass(form)).expect("it is reduced");
            let outputs = [reference, reduced].map(|model| run(ort.as_ref(), &model).expect("it runs"));
            assert!(relative(&outputs[0], &outputs[1]) > LEAST_CHANGE, "{what} changes nothing");
            outputs
        });
        for &form in forms {
            let case = format!("{form:?}, {norms:?}");
            let model = vit(plan, form, norms);
            let (reduced, report) =
                rewrite(&model, pass(form)).unwrap_or_else(|refusal| panic!("{what}: {case}: {refusal}"));
            let quantised = form == Form::Quantized;
            // Sizes need a bias of the scores, which that operator does not take.
            let split = quantised && what == "merged";
            assert_eq!(report.notes.iter().any(|note| note.contains("was split")), split, "{case}");
            let tolerance = |other: f64| if quantised { COARSE_TOLERANCE } else { other };
            let [whole, expected] = &references[usize::from(quantised)];
            let mut cases = vec![
                ("whole", whole, &ort, &model, TOLERANCE),
                (what, expected, &ort, &reduced, TOLERANCE),
                (what, expected, &kernels, &reduced, RUNTIME_TOLERANCE),
            ];
            // tract knows none of the operators: it runs what is left where they were opened, unless a scale is no constant.
            let opened = reduced.graph().nodes().all(|(_, node)| FusedAttention::of(reduced.graph(), node).is_none());
            let closes = matches!(pass(form), PassSpec::Prune(PruneSpec { attention_keep: Some(_), .. }));
            assert_eq!(opened, closes, "{what}: {case}");
            if opened && norms == Norms::Plain && !quantised {
                cases.push((what, expected, &tract, &reduced, RUNTIME_TOLERANCE));
            }
            for (what, expected, backend, model, most) in cases {
                count += 1;
                match run(backend.as_ref(), model) {
                    Ok(y) if relative(expected, &y) <= tolerance(most) => {}
                    Ok(y) => {
                        failures.push(format!(
                            "{case}: {what}, {} is {:e} off",
                            backend.name(),
                            relative(expected, &y)
                        ));
                    }
                    Err(reason) => failures.push(format!("{case}: {what}: {reason}")),
                }
            }
        }
    }
    conclude(&format!("{what} forms"), count, &failures);
}

/// Sum and norm in one operator merge to what they merge to apart, and batches do not matter.
#[test]
fn a_sum_with_its_norm_merges_as_both_apart() {
    let scratch = Scratch::new("norms");
    let backend = ort();
    let both = feeds();
    let one = images(&both, 1, 2);
    let path = |norms: Norms| {
        let (merged, _) = merge(&vit(PLAN, Form::Decomposed, norms), constant(R)).expect("it merges");
        scratch.save(&format!("{norms:?}"), &merged)
    };
    let run = |path: &std::path::Path, feeds: &Feeds| {
        try_run(backend.as_ref(), path, feeds).expect("it runs").get("y").expect("y").clone()
    };
    let (plain, skip) = (path(Norms::Plain), path(Norms::Skip));
    let (expected, got) = (run(&plain, &both), run(&skip, &both));
    assert!(relative(&expected, &got) <= TOLERANCE, "{:e}", relative(&expected, &got));
    assert!(relative(&expected.rows(1, 2).expect("two rows"), &run(&skip, &one)) <= TOLERANCE);
}

/// Where only the class token is read, the last attention has one query, if the operator allows for fewer queries than
/// keys.
#[test]
fn all_forms_leave_out_dead_tokens() {
    let scratch = Scratch::new("dead_forms");
    let backend = ort();
    let feeds = feeds();
    let (mut count, mut failures) = (0, Vec::new());
    for norms in [Norms::Plain, Norms::Skip, Norms::SkipSimplified, Norms::Post] {
        for form in [Form::Decomposed, Form::Rounded].into_iter().chain(FUSED) {
            count += 1;
            let case = format!("{form:?}, {norms:?}");
            let model = vit(Plan { pooled: false, ..PLAN }, form, norms);
            let (rewritten, report) = without_dead_tokens(&model).unwrap_or_else(|refusal| panic!("{case}: {refusal}"));
            let queries = |model: &Model| {
                let shapes = Shapes::infer(model);
                let fused = |node: &Node| FusedAttention::of(model.graph(), node).is_some() || node.is("Softmax");
                let (_, last) = model.graph().nodes().rfind(|(_, node)| fused(node)).expect("an attention");
                let dims = shapes.dims(last.output(0).expect("a result")).expect("a shape");
                dims[dims.len() - 2].as_known()
            };
            let projects = matches!(form, Form::Packed { .. } | Form::PackedBiased | Form::Quantized);
            let expected = if projects { PLAN.tokens() } else { 1 };
            if queries(&rewritten) != Some(expected) || report.notes.is_empty() {
                failures.push(format!("{case}: {:?} queries, {:?}", queries(&rewritten), report.notes));
            }
            let outputs =
                [&model, &rewritten].map(|model| try_run(backend.as_ref(), &scratch.save("form", model), &feeds));
            let tolerance = if matches!(form, Form::Rounded | Form::Quantized) { COARSE_TOLERANCE } else { TOLERANCE };
            match outputs {
                [Ok(expected), Ok(outputs)] => {
                    let apart = relative(expected.get("y").expect("y"), outputs.get("y").expect("y"));
                    failures.extend((apart > tolerance).then(|| format!("{case}: {apart:e} off")));
                }
                [Err(reason), _] | [_, Err(reason)] => failures.push(format!("{case}: {reason}")),
            }
        }
    }
    conclude("dead tokens of forms", count, &failures);
}

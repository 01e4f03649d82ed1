//! One ViT written with every fused operator that vitrim knows: with the same weights, all of them merge and are pruned to
//! what the decomposed one is.

mod common;
mod forms;

use common::{Scratch, conclude, constant, images, merge, ort, relative, rewrite, try_run, without_dead_tokens};
use forms::{Form, Norms, Plan, Projected, noise, vit};
use ndarray::ArrayD;
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{FusedAttention, Model, Node, Shapes};
use vitrim_passes::recipe::{KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec};

/// 6 × 6 patches and a class token.
const PLAN: Plan = Plan { image: 24, patch: 4, width: 24, heads: 3, depth: 3, expansion: 2, pooled: true };
/// Tokens to merge in every block.
const R: usize = 8;

/// Another operator adds in another order.
const TOLERANCE: f64 = 1e-5;
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

/// Keeps 70 % of the patches, and one token of the others: likewise.
fn pruning(form: Form) -> PassSpec {
    let at = match form {
        Form::Rounded | Form::Quantized => vec![0],
        _ => vec![0, 1],
    };
    PassSpec::Prune(PruneSpec { keep: KeepSpec::Constant(0.7), at: Some(at), fuse: true, ..PruneSpec::default() })
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

#[test]
fn all_forms_merge_alike() {
    all_forms_are_alike("merged", merging);
}

#[test]
fn all_forms_are_pruned_alike() {
    all_forms_are_alike("pruned", pruning);
}

fn all_forms_are_alike(what: &str, pass: fn(Form) -> PassSpec) {
    let scratch = Scratch::new(&format!("{what}_forms"));
    let backend = ort();
    let feeds = feeds();
    let run = |name: &str, model: &Model| {
        try_run(backend.as_ref(), &scratch.save(name, model), &feeds)
            .map(|outputs| outputs.get("y").expect("y").clone())
    };
    let (mut count, mut failures) = (0, Vec::new());
    for norms in [Norms::Plain, Norms::Skip, Norms::SkipSimplified, Norms::Post] {
        let references = [Form::Decomposed, Form::Rounded].map(|form| {
            let reference = vit(PLAN, form, norms);
            let (reduced, _) = rewrite(&reference, pass(form)).expect("it is reduced");
            let outputs = [reference, reduced].map(|model| run("reference", &model).expect("it runs"));
            assert!(relative(&outputs[0], &outputs[1]) > LEAST_CHANGE, "{what} changes nothing");
            outputs
        });
        for form in FUSED {
            count += 1;
            let case = format!("{form:?}, {norms:?}");
            let model = vit(PLAN, form, norms);
            let (fused, report) = match rewrite(&model, pass(form)) {
                // What is added to the scores would have to be known to prune by them.
                Err(refusal) if form == Form::PackedBiased && what == "pruned" => {
                    assert!(refusal.to_string().contains("has a bias"), "{case}: {refusal}");
                    continue;
                }
                result => result.unwrap_or_else(|refusal| panic!("{case}: {refusal}")),
            };
            let quantised = form == Form::Quantized;
            // Sizes need a bias of the scores, which that operator does not take.
            let split = quantised && what == "merged";
            assert_eq!(report.notes.iter().any(|note| note.contains("was split")), split, "{case}");
            let tolerance = if quantised { COARSE_TOLERANCE } else { TOLERANCE };
            let [whole, reduced] = &references[usize::from(quantised)];
            for (what, expected, model) in [("whole", whole, &model), (what, reduced, &fused)] {
                match run("form", model) {
                    Ok(y) if relative(expected, &y) <= tolerance => {}
                    Ok(y) => failures.push(format!("{case}: {what} is {:e} off", relative(expected, &y))),
                    Err(reason) => failures.push(format!("{case}: {what}: {reason}")),
                }
            }
        }
    }
    conclude("forms", count, &failures);
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

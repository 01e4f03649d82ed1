//! One ViT written with every fused operator that vitrim knows: with the same weights, all of them merge to what the
//! decomposed one merges to.

mod common;
mod forms;

use common::{Scratch, conclude, constant, images, merge, ort, relative, try_run};
use forms::{Form, Norms, Plan, Projected, noise, vit};
use ndarray::ArrayD;
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::Model;
use vitrim_passes::recipe::{MergeSpec, RSpec};

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
fn schedule(form: Form) -> MergeSpec {
    match form {
        Form::Rounded | Form::Quantized => MergeSpec { r: Some(RSpec::PerBlock(vec![R])), ..MergeSpec::default() },
        _ => constant(R),
    }
}

#[test]
fn all_forms_merge_alike() {
    let scratch = Scratch::new("forms");
    let backend = ort();
    let feeds = feeds();
    let run = |name: &str, model: &Model| {
        try_run(backend.as_ref(), &scratch.save(name, model), &feeds)
            .map(|outputs| outputs.get("y").expect("y").clone())
    };
    let forms = [
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
    let (mut count, mut failures) = (0, Vec::new());
    for norms in [Norms::Plain, Norms::Skip, Norms::SkipSimplified, Norms::Post] {
        let references = [Form::Decomposed, Form::Rounded].map(|form| {
            let reference = vit(PLAN, form, norms);
            let (merged, _) = merge(&reference, schedule(form)).expect("it merges");
            let outputs = [reference, merged].map(|model| run("reference", &model).expect("it runs"));
            assert!(relative(&outputs[0], &outputs[1]) > LEAST_CHANGE, "merging changes nothing");
            outputs
        });
        for form in forms {
            count += 1;
            let case = format!("{form:?}, {norms:?}");
            let model = vit(PLAN, form, norms);
            let (fused, report) = merge(&model, schedule(form)).unwrap_or_else(|refusal| panic!("{case}: {refusal}"));
            let split = form == Form::Quantized;
            assert_eq!(report.notes.iter().any(|note| note.contains("was split")), split, "{case}");
            let tolerance = if split { COARSE_TOLERANCE } else { TOLERANCE };
            let [whole, merged] = &references[usize::from(split)];
            for (what, expected, model) in [("whole", whole, &model), ("merged", merged, &fused)] {
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

//! Training graphs against the oracle's vectors.

mod common;

use common::{Scratch, conclude, fixtures, ort, relative, run, vector, vector_index};
use ndarray::ArrayD;
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::Model;
use vitrim_passes::driver;
use vitrim_train::gradient_graph;
use vitrim_train::loss::Loss;
use vitrim_train::parameters::Parameter;

/// What a gradient may differ from the oracle's, in float64, relative to its largest entry: float32 roundings over up to
/// 6 blocks and back.
const GRADIENT_TOLERANCE: f64 = 1e-4;

#[test]
fn gradients_are_what_the_oracle_says() {
    let scratch = Scratch::new("gradients");
    let index = vector_index();
    let (mut count, mut failures) = (0, Vec::new());
    for json in index["grads"].as_array().expect("the index has gradients") {
        let name = json["file"].as_str().expect("a file");
        if !name.contains("none") {
            continue;
        }
        let (arrays, inputs) = (vector(name), vector(json["model"].as_str().expect("a model")));
        let weights = json["weights"].as_str().expect("weights").trim_end_matches(".npz").to_owned();
        for variant in ["", "_op13", "_op18"] {
            let file = fixtures().join(format!("vectors/{weights}{variant}.onnx"));
            let Ok(model) = Model::read(&file) else { continue };
            let (model, _) = driver::prepare(&model).unwrap_or_else(|refusal| panic!("{refusal}"));
            let loss = Loss::CrossEntropy { label_smoothing: 0.0, soft_targets: false };
            let graph = gradient_graph(&model, &loss, None).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
            let mut feeds = Feeds::default();
            feeds.push("images", inputs.get("in_images").expect("images").clone());
            feeds.push("labels", Tensor::from_f64(DType::I64, &arrays.get("labels").expect("labels").to_f64()));
            for (parameter, _) in &graph.parameters {
                feeds.push(parameter.name.clone(), initial(parameter));
            }
            let path = scratch.save_as("gradients", &graph.model, &file);
            let outputs = run(ort().as_ref(), &path, &feeds);
            for (parameter, gradient) in &graph.parameters {
                let expected = arrays.get(&format!("grad.{}", parameter.name));
                let expected =
                    expected.unwrap_or_else(|| panic!("{name}: '{}' is a parameter", parameter.name)).to_f64();
                // The files have the matrices of products the other way round.
                let expected = match parameter.tensor.dims().len() {
                    2 => expected.reversed_axes(),
                    _ => expected,
                };
                let expected = Tensor::from_f64(DType::F64, &expected.as_standard_layout().into_owned());
                let gradient = outputs.get(gradient.as_ref().expect("it is trained")).expect("an output");
                let apart = relative(&expected, gradient);
                count += 1;
                if apart > GRADIENT_TOLERANCE {
                    failures.push(format!("{name}{variant}: {} {apart:e} off", parameter.name));
                }
            }
            let all = arrays.names().filter(|name| name.starts_with("grad.")).count();
            if all != graph.parameters.len() {
                failures.push(format!("{name}{variant}: {} of {all} parameters", graph.parameters.len()));
            }
        }
    }
    conclude("gradients", count, &failures);
}

/// The elements that a parameter begins with.
fn initial(parameter: &Parameter) -> Tensor {
    let dims: Vec<usize> = parameter.tensor.dims().iter().map(|&extent| extent as usize).collect();
    let elements = parameter.tensor.to_f64s().expect("floats").into_owned();
    Tensor::from_f64(DType::F32, &ArrayD::from_shape_vec(dims, elements).expect("as many as its extents say"))
}

//! Training graphs against the oracle's vectors.

mod common;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use common::vectors::Case;
use common::{Scratch, conclude, constant, fed, fixtures, kernels, ort, relative, run, vector, vector_index, zoo};
use ndarray::{ArrayD, arr0};
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, NamedTensors, Tensor};
use vitrim_ir::{Def, Graph, Model, Node, NodeId, ValueId};
use vitrim_passes::driver::prepare;
use vitrim_passes::recipe::{ExpandSpec, KeepSpec, MergeSpec, PassSpec, PruneSpec, RSpec, Recipe};
use vitrim_passes::reduce::{ATTENTION_KEEP_INPUT, KEEP_INPUT, R_INPUT};
use vitrim_train::loss::Loss;
use vitrim_train::manifest::Initial;
use vitrim_train::optimizer::{Optimizer, Update};
use vitrim_train::parameters::Parameter;
use vitrim_train::raise::{gelus, norms};
use vitrim_train::stock::stock;
use vitrim_train::{Request, Training, gradient_name};

/// What a gradient may differ from the oracle's, in float64, relative to its largest entry: float32 roundings over up to
/// 6 blocks and back.
const GRADIENT_TOLERANCE: f64 = 1e-4;

/// What state may differ after three steps, relative to its largest entry: float32 roundings of a gradient, clipped by the
/// norm of all of them, and of three steps.
const STEP_TOLERANCE: f64 = 1e-4;

/// Everything is trained to tell classes, with these passes.
fn request(passes: Vec<PassSpec>) -> Request {
    let loss = Loss::CrossEntropy { label_smoothing: 0.0, soft_targets: false };
    Request { recipe: Recipe { passes }, ..Request::new(loss) }
}

#[test]
fn gradients_are_what_the_oracle_says() {
    check(&["none"]);
}

#[test]
fn gradients_of_merged_models_are_what_the_oracle_says() {
    check(&["tome"]);
}

#[test]
fn gradients_of_pruned_models_are_what_the_oracle_says() {
    check(&["prune", "trilevel", "evit"]);
}

#[test]
fn gradients_of_expanded_models_are_what_the_oracle_says() {
    check(&["toe"]);
}

/// As many as are merged or kept in every block anyway, but said when the model runs.
#[test]
fn gradients_of_models_reduced_at_run_time_are_what_the_oracle_says() {
    check_as(&["tome", "prune", "trilevel"], |pass| match pass {
        PassSpec::Merge(spec @ MergeSpec { r: Some(RSpec::Constant(_)), .. }) => {
            PassSpec::Merge(MergeSpec { runtime_r: true, ..spec })
        }
        PassSpec::Prune(spec) => PassSpec::Prune(PruneSpec { runtime_keep: true, ..spec }),
        other => other,
    });
}

/// What a graph with a dial gives at a setting, and what one that was made for it gives, may differ by, relative to the
/// largest entry: the same operators in other fusions, and float32 roundings of up to 4 blocks and back.
const DIAL_TOLERANCE: f64 = 1e-5;

/// What a graph is told where it is to do what this pass does.
fn settings(pass: &PassSpec) -> Vec<(&'static str, DType, f64)> {
    match pass {
        PassSpec::Merge(MergeSpec { r: Some(RSpec::Constant(r)), .. }) => vec![(R_INPUT, DType::I64, *r as f64)],
        PassSpec::Prune(PruneSpec { keep: KeepSpec::Constant(keep), attention_keep, .. }) => {
            let attention_keep = attention_keep.map(|share| (ATTENTION_KEEP_INPUT, DType::F64, share));
            [(KEEP_INPUT, DType::F64, *keep)].into_iter().chain(attention_keep).collect()
        }
        other => panic!("{other:?} has no dial"),
    }
}

/// One graph for every setting: its gradients are those of the graph that was made for it; left alone, those of the
/// setting that it was made with. The graph that evaluates cannot be told anything.
#[test]
fn one_graph_trains_at_every_setting() {
    let shares = [(0.5, 0.3), (0.7, 1.0), (1.0, 0.5)];
    let prune = |at: usize, fuse: bool, attention: bool| PruneSpec {
        keep: KeepSpec::Constant(shares[at].0),
        at: Some(vec![1, 2]),
        fuse,
        attention_keep: attention.then_some(shares[at].1),
        ..PruneSpec::default()
    };
    let merge = |at: usize| PassSpec::Merge(constant([0, 2, 5][at]));
    let kinds: [&dyn Fn(usize) -> PassSpec; 4] = [
        &merge,
        &|at| PassSpec::Prune(prune(at, false, false)),
        &|at| PassSpec::Prune(prune(at, true, false)),
        &|at| PassSpec::Prune(prune(at, false, true)),
    ];
    const DEFAULT: usize = 1;
    let scratch = Scratch::new("training_dials");
    let (mut count, mut failures) = (0, Vec::new());
    // With a class token, and without.
    for (weights, inputs) in [("a", "model_a_00_none.npz"), ("b", "model_b_08_tome.npz"), ("f", "model_f_41_tome.npz")]
    {
        let file = fixtures().join(format!("vectors/weights_{weights}.onnx"));
        let model = Model::read(&file).unwrap_or_else(|error| panic!("{error}"));
        let (inputs, mut arrays) = (vector(inputs), NamedTensors::default());
        let size = inputs.get("in_images").expect("images").shape()[0];
        arrays.push("labels", Tensor::from_vec(&[size], (0..size as i64).collect()).expect("one for each image"));
        let training = |pass: PassSpec| {
            Training::of(&model, &request(vec![pass])).unwrap_or_else(|refusal| panic!("{weights}: {refusal}"))
        };
        for kind in kinds {
            let made = training(match kind(DEFAULT) {
                PassSpec::Merge(spec) => PassSpec::Merge(MergeSpec { runtime_r: true, ..spec }),
                PassSpec::Prune(spec) => PassSpec::Prune(PruneSpec { runtime_keep: true, ..spec }),
                other => other,
            });
            let names = |graph: &Graph| {
                graph.inputs().iter().map(|&input| graph.value(input).name().to_owned()).collect::<Vec<_>>()
            };
            let plain = Training::of(&model, &request(Vec::new())).unwrap_or_else(|refusal| panic!("{refusal}"));
            assert_eq!(names(made.eval.graph()), names(plain.eval.graph()));
            let path = scratch.save_as("dial", &made.gradients, &file);
            let alone = feeds(&made, &arrays, &inputs);
            let parameters: Vec<String> = made.parameters.iter().map(|one| gradient_name(&one.name)).collect();
            let manifest = stock(made, None).unwrap_or_else(|refusal| panic!("{refusal}")).manifest;
            let dials = manifest.dials.iter().map(|dial| (dial.input.as_str(), dial.dtype.as_str(), dial.default));
            let expected = settings(&kind(DEFAULT));
            let dtype = |dtype: &DType| if *dtype == DType::I64 { "int64" } else { "float64" };
            assert!(dials.eq(expected.iter().map(|(name, kind, value)| (*name, dtype(kind), *value))), "{manifest:?}");
            for at in 0..shares.len() {
                let fixed = scratch.save_as("fixed", &training(kind(at)).gradients, &file);
                let mut told = alone.clone();
                for (name, dtype, value) in settings(&kind(at)) {
                    told.push(name, Tensor::from_f64(dtype, &arr0(value).into_dyn()));
                }
                for backend in [ort(), kernels()] {
                    let expected = run(backend.as_ref(), &fixed, &alone);
                    let given = [Some(&told), (at == DEFAULT).then_some(&alone)];
                    for (feeds, given) in given.into_iter().flatten().enumerate() {
                        let given = run(backend.as_ref(), &path, given);
                        for name in &parameters {
                            let [expected, given] = [&expected, &given].map(|outputs| outputs.get(name));
                            let apart = relative(expected.expect("a gradient"), given.expect("a gradient"));
                            count += 1;
                            if apart > DIAL_TOLERANCE {
                                let (pass, backend) = (kind(at), backend.name());
                                failures
                                    .push(format!("{weights}, {pass:?}, {feeds} in {backend}: {name} {apart:e} off"));
                            }
                        }
                    }
                }
            }
        }
    }
    conclude("settings", count, &failures);
}

/// The gradients of all parameters of the models that these methods were applied to, with the tokens that nothing reads
/// and without, in ONNX Runtime with our kernels and without.
fn check(methods: &[&str]) {
    check_as(methods, |pass| pass);
}

/// The same for passes that say the same in another way.
fn check_as(methods: &[&str], spelled: fn(PassSpec) -> PassSpec) {
    let scratch = Scratch::new(&format!("gradients_{}_{spelled:p}", methods[0]));
    let index = vector_index();
    let (mut count, mut failures, mut seen) = (0, Vec::new(), Vec::new());
    for json in index["grads"].as_array().expect("the index has gradients") {
        let name = json["file"].as_str().expect("a file");
        let model = json["model"].as_str().expect("a file");
        if !methods.iter().any(|method| model.contains(method)) {
            continue;
        }
        let mut case = Case::named(model, &index, false);
        case.recipe.passes = case.recipe.passes.into_iter().map(spelled).collect();
        let method = case.json["method"]["name"].as_str().expect("a method").to_owned();
        seen.push(method);
        let (arrays, inputs) = (vector(name), vector(&case.name));
        for file in case.files() {
            let model = Model::read(&file).unwrap_or_else(|error| panic!("{error}"));
            for keep_dead in [true, false] {
                let what = format!("{name} of {}, dead tokens {keep_dead}", file.display());
                let request = Request { keep_dead, ..request(case.recipe.passes.clone()) };
                let graph = Training::of(&model, &request).unwrap_or_else(|reason| panic!("{what}: {reason}"));
                let feeds = feeds(&graph, &arrays, &inputs);
                let path = scratch.save_as("gradients", &graph.gradients, &file);
                for backend in [ort(), kernels()] {
                    let outputs = run(backend.as_ref(), &path, &feeds);
                    for parameter in &graph.parameters {
                        let gradient = outputs.get(&gradient_name(&parameter.name)).expect("an output");
                        let apart = relative(&expected(parameter, &arrays), gradient);
                        count += 1;
                        if apart > GRADIENT_TOLERANCE {
                            failures.push(format!("{what} in {}: {} {apart:e} off", backend.name(), parameter.name));
                        }
                    }
                }
                let all = arrays.names().filter(|name| name.starts_with("grad.")).count();
                if all != graph.parameters.len() {
                    failures.push(format!("{what}: {} of {all} parameters", graph.parameters.len()));
                }
            }
        }
    }
    assert!(methods.iter().all(|&method| seen.iter().any(|seen| seen == method)), "a method is missing: {seen:?}");
    conclude("gradients", count, &failures);
}

/// Images, labels, and the parameters as they begin.
fn feeds(graph: &Training, arrays: &NamedTensors, inputs: &NamedTensors) -> Feeds {
    let mut feeds = Feeds::default();
    feeds.push("images", inputs.get("in_images").expect("images").clone());
    feeds.push("labels", Tensor::from_f64(DType::I64, &arrays.get("labels").expect("labels").to_f64()));
    for parameter in &graph.parameters {
        feeds.push(parameter.name.clone(), fed(&parameter.tensor));
    }
    feeds
}

/// The gradient of a parameter as the oracle has it.
fn expected(parameter: &Parameter, arrays: &NamedTensors) -> Tensor {
    let expected = arrays.get(&format!("grad.{}", parameter.name));
    let expected = expected.unwrap_or_else(|| panic!("'{}' is a parameter", parameter.name)).to_f64();
    // The files have the matrices of products the other way round.
    let expected = match parameter.tensor.dims().len() {
        2 => expected.reversed_axes(),
        _ => expected,
    };
    Tensor::from_f64(DType::F64, &expected.as_standard_layout().into_owned())
}

/// Of the models of the zoo that have gradients as they are, for as many parameters. These are the last inputs of both
/// graphs, in one order.
#[test]
fn what_has_gradients_has_them_reduced() {
    let prune = |fuse| PruneSpec { keep: KeepSpec::Constant(0.7), at: Some(vec![0]), fuse, ..PruneSpec::default() };
    let passes = [
        PassSpec::Merge(constant(2)),
        PassSpec::Prune(prune(false)),
        PassSpec::Prune(prune(true)),
        PassSpec::Prune(PruneSpec { attention_keep: Some(0.5), ..prune(false) }),
        PassSpec::Expand(ExpandSpec { stage: Some(1), ..ExpandSpec::default() }),
    ];
    let (mut count, mut failures) = (0, Vec::new());
    for entry in zoo() {
        let trained = |training: &Training| training.parameters.iter().filter(|parameter| parameter.trainable).count();
        let is_aligned = |training: &Training| {
            [&training.eval, &training.gradients].into_iter().all(|model| {
                let graph = model.graph();
                let parameters = training.parameters.iter().map(|parameter| parameter.name.as_str()).rev();
                graph
                    .inputs()
                    .iter()
                    .rev()
                    .map(|&input| graph.value(input).name())
                    .take(parameters.len())
                    .eq(parameters)
            })
        };
        let Ok(plain) = Training::of(&entry.read(), &request(Vec::new())) else { continue };
        for pass in &passes {
            let reduced = Training::of(&entry.read(), &request(vec![pass.clone()]));
            count += 1;
            match reduced {
                Ok(graph) if !is_aligned(&graph) => {
                    failures.push(format!("{}, {pass:?}: parameters are not the last inputs of both", entry.name));
                }
                Ok(graph) if trained(&graph) == trained(&plain) => {}
                Ok(graph) => {
                    let (found, all) = (trained(&graph), trained(&plain));
                    failures.push(format!("{}, {pass:?}: {found} of {all} parameters", entry.name));
                }
                Err(refusal) if refusal.to_string().contains("no gradient") => {
                    failures.push(format!("{}, {pass:?}: {refusal}", entry.name));
                }
                // The pass itself does not fit the model.
                Err(_) => count -= 1,
            }
        }
    }
    conclude("reduced models with gradients", count, &failures);
}

/// What is evaluated is the original model, node for node: as it was prepared (functions of others inlined, an old operator
/// set lifted, in canonical form), each parameter an input or a constant of the same elements (equal ones are untied), and
/// no dropout that acts. Besides there is the loss alone, behind the output that is judged. What is done to the tokens in
/// training changes not a byte of it.
#[test]
fn what_is_evaluated_is_the_original_model() {
    let prune = PruneSpec { keep: KeepSpec::Constant(0.7), at: Some(vec![0]), ..PruneSpec::default() };
    let passes = [
        PassSpec::Merge(constant(2)),
        PassSpec::Prune(PruneSpec { attention_keep: Some(0.5), runtime_keep: true, ..prune.clone() }),
        PassSpec::Prune(prune),
        PassSpec::Expand(ExpandSpec::default()),
    ];
    let (mut nodes, mut models, mut reduced, mut failures) = (0, 0, 0, Vec::new());
    for entry in zoo() {
        // A loss of any output, whatever its shape.
        let request = |passes| Request { recipe: Recipe { passes }, ..Request::new(Loss::MeanSquaredError) };
        let Ok(plain) = Training::of(&entry.read(), &request(Vec::new())) else { continue };
        let (prepared, _) = prepare(&entry.read()).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
        models += 1;
        match is_original(&prepared, &plain) {
            Ok(count) => nodes += count,
            Err(reason) => failures.push(format!("{}: {reason}", entry.name)),
        }
        let bytes = |training: &Training| Model::to_bytes(training.eval.verify().expect("it is valid"));
        for pass in &passes {
            let Ok(training) = Training::of(&entry.read(), &request(vec![pass.clone()])) else { continue };
            reduced += 1;
            if bytes(&training) != bytes(&plain) {
                failures.push(format!("{}: {pass:?} changes what is evaluated", entry.name));
            }
        }
    }
    println!("{nodes} nodes of {models} models; {reduced} evaluations beside reduced ones");
    assert!(reduced > 0);
    conclude("models that are evaluated", models, &failures);
}

/// Whether `training` evaluates `original`; says how many nodes there are to the output that is judged.
fn is_original(original: &Model, training: &Training) -> Result<usize, String> {
    let (original, eval) = (original.graph(), training.eval.graph());
    let judged = original.outputs()[0];
    let twin = |value: ValueId| eval.find_value(original.value(value).name());
    let is_twin = |value: ValueId, other: ValueId| match held(original, value) {
        None => twin(value) == Some(other),
        Some(tensor) => {
            let name = eval.value(other).name();
            let parameter = training.parameters.iter().find(|parameter| parameter.name == name);
            match parameter.filter(|_| *eval.value(other).def() == Def::Input) {
                Some(parameter) => parameter.tensor == *tensor,
                None => held(eval, other).is_some_and(|own| own == tensor),
            }
        }
    };
    let own = ancestors(original, judged);
    for &id in &own {
        let node = original.node(id);
        let first = node.results().next().ok_or("a node without results")?;
        let what = || original.value(first).name().to_owned();
        let (other, _) =
            twin(first).and_then(|value| eval.producer(value)).ok_or_else(|| format!("no '{}'", what()))?;
        let other = eval.node(other);
        // Of dropout the third operand says whether it acts.
        let taken = if node.is("Dropout") { 2 } else { node.inputs.len() };
        let operands = |node: &Node| node.inputs.iter().take(taken).copied().collect::<Vec<_>>();
        let (before, after) = (operands(node), operands(other));
        let is_same = before.len() == after.len()
            && other.inputs.iter().skip(taken).all(Option::is_none)
            && before.into_iter().zip(after).all(|pair| match pair {
                (Some(value), Some(other)) => is_twin(value, other),
                (before, after) => before == after,
            });
        let captures: Vec<ValueId> = node.dependencies().skip(node.operands().count()).collect();
        let are_captured = captures.iter().all(|&value| other.dependencies().any(|other| is_twin(value, other)));
        if node.op != other.op || node.attributes != other.attributes || !is_same || !are_captured {
            return Err(format!("'{}' is computed in another way", what()));
        }
    }
    // What else there is reads the judged output, the labels, numbers of its own, and nothing else of the model.
    let judged = twin(judged).ok_or("no output")?;
    let kept: HashSet<NodeId> = ancestors(eval, judged).into_iter().collect();
    if kept.len() != own.len() {
        return Err(format!("{} nodes are {}", own.len(), kept.len()));
    }
    let allowed = |value: ValueId| {
        let name = eval.value(value).name();
        let is_parameter = training.parameters.iter().any(|parameter| parameter.name == name);
        match eval.producer(value) {
            Some((id, _)) => value == judged || !kept.contains(&id),
            None => !is_parameter && (eval.constant(value).is_some() || training.heads.labels.as_deref() == Some(name)),
        }
    };
    let mut others = eval.nodes().filter(|(id, _)| !kept.contains(id));
    match others.find(|(_, node)| !node.dependencies().all(allowed)) {
        Some((_, node)) => Err(format!("{} '{}' is none of the loss", node.op, node.name)),
        None => Ok(own.len()),
    }
}

/// The elements of a constant, or of an input that may be left out.
fn held(graph: &Graph, value: ValueId) -> Option<Cow<'_, vitrim_ir::Tensor>> {
    match graph.value(value).def() {
        Def::Default(tensor) => Some(Cow::Borrowed(tensor)),
        _ => graph.constant(value),
    }
}

/// The nodes that a value depends on, constants apart.
fn ancestors(graph: &Graph, value: ValueId) -> Vec<NodeId> {
    let (mut found, mut seen, mut pending) = (Vec::new(), HashSet::new(), vec![value]);
    while let Some(value) = pending.pop() {
        if let Some((id, _)) = graph.producer(value).filter(|_| graph.constant(value).is_none())
            && seen.insert(id)
        {
            found.push(id);
            pending.extend(graph.node(id).dependencies());
        }
    }
    found
}

/// Three steps with everything on, against the same arithmetic in float64 on the gradients that the graph without an
/// optimizer gives.
#[test]
fn steps_follow_the_gradients() {
    let scratch = Scratch::new("steps");
    let file = fixtures().join("vectors/weights_a.onnx");
    let model = Model::read(&file).unwrap_or_else(|error| panic!("{error}"));
    let arrays = vector("model_a_00_none.npz");
    let images = arrays.get("in_images").expect("images");
    let labels = Tensor::from_f64(DType::I64, &vector("grad_a_00_none.npz").get("labels").expect("labels").to_f64());
    // The gradient of the keys' bias is mere rounding, as softmax does not see it: with a smaller epsilon Adam would take
    // its sign for a direction.
    let (beta1, beta2, epsilon, weight_decay) = (0.9, 0.999, 1e-4, 0.05);
    let adam = Optimizer::AdamW { beta1, beta2, epsilon, weight_decay };
    let (learning_rate, momentum, clip, kept) = (1e-3, 0.9, 1.0, 0.99);
    let mut failures = Vec::new();
    for optimizer in [adam, Optimizer::Sgd { momentum, weight_decay }] {
        let adam = matches!(optimizer, Optimizer::AdamW { .. });
        let update = Update { optimizer, clip: Some(clip), ema: Some(kept), accumulate: true };
        let training = || Training::of(&model, &request(Vec::new())).expect("it can be trained");
        let alone = stock(training(), None).expect("gradients");
        let whole = stock(training(), Some(&update)).expect("steps");
        let file_of = |graphs: &[(String, Model)], name: &str| {
            let (_, graph) = graphs.iter().find(|(file, _)| *file == name).expect("the graph");
            scratch.save_as(name.trim_end_matches(".onnx"), graph, &file)
        };
        let [gradients, train, accumulate] = [
            file_of(&alone.graphs, "gradients.onnx"),
            file_of(&whole.graphs, "train.onnx"),
            file_of(&whole.graphs, "accumulate.onnx"),
        ];
        let parameters = training().parameters;
        let mut state: HashMap<String, Tensor> = HashMap::new();
        let first = |name: &str| fed(&parameters.iter().find(|one| one.name == name).expect("a parameter").tensor);
        for entry in whole.manifest.state.iter().chain(&whole.manifest.accumulated) {
            let begin = first(&entry.parameter);
            let zeros = Tensor::from_f64(DType::F32, &ArrayD::zeros(begin.shape()));
            state.insert(entry.input.clone(), if entry.initial == Initial::Parameter { begin } else { zeros });
        }
        let mut expected: HashMap<String, ArrayD<f64>> =
            state.iter().map(|(name, tensor)| (name.clone(), tensor.to_f64())).collect();
        for step in 1..=3 {
            let feeds = |state: &HashMap<String, Tensor>| {
                let mut feeds = Feeds::default();
                feeds.push("images", images.clone());
                feeds.push("labels", labels.clone());
                let scalar = |dtype, value: f64| Tensor::from_f64(dtype, &arr0(value).into_dyn());
                feeds.push("learning_rate", scalar(DType::F32, learning_rate));
                feeds.push("step", scalar(DType::I64, f64::from(step)));
                feeds.push("batches", scalar(DType::F32, 2.0));
                state.iter().for_each(|(name, tensor)| feeds.push(name.clone(), tensor.clone()));
                feeds
            };
            let now: HashMap<String, Tensor> =
                expected.iter().map(|(name, array)| (name.clone(), Tensor::from_f64(DType::F32, array))).collect();
            let given = run(ort().as_ref(), &gradients, &feeds(&now));
            let given = |name: &str| given.get(&gradient_name(name)).expect("a gradient").to_f64();
            let norm = parameters.iter().map(|one| given(&one.name).mapv(|g| g * g).sum()).sum::<f64>().sqrt();
            let scale = (clip / (norm + 1e-6)).min(1.0);
            assert!(scale < 1.0, "clipping shows nothing");
            for parameter in &parameters {
                let name = &parameter.name;
                let decay = if parameter.decay { weight_decay } else { 0.0 };
                let gradient = given(name) * scale;
                let get =
                    |expected: &HashMap<String, ArrayD<f64>>, kind: &str| expected[&format!("{name}{kind}")].clone();
                let before = get(&expected, "");
                let after = if adam {
                    let mean = get(&expected, ".exp_avg") * beta1 + &gradient * (1.0 - beta1);
                    let variance = get(&expected, ".exp_avg_sq") * beta2 + (&gradient * &gradient) * (1.0 - beta2);
                    let deviation = (1.0 - beta2.powi(step)).sqrt();
                    let direction = &mean / (variance.mapv(f64::sqrt) / deviation + epsilon);
                    let after = &before * (1.0 - learning_rate * decay)
                        - direction * (learning_rate / (1.0 - beta1.powi(step)));
                    expected.insert(format!("{name}.exp_avg"), mean);
                    expected.insert(format!("{name}.exp_avg_sq"), variance);
                    after
                } else {
                    let direction = get(&expected, ".momentum") * momentum + gradient + &before * decay;
                    let after = before - &direction * learning_rate;
                    expected.insert(format!("{name}.momentum"), direction);
                    after
                };
                let mean = get(&expected, ".ema") * kept + &after * (1.0 - kept);
                expected.insert(format!("{name}.ema"), mean);
                expected.insert(name.clone(), after);
            }
            // The same batch twice: the mean of its gradients is its gradient.
            let outputs = run(ort().as_ref(), &accumulate, &feeds(&state));
            for entry in &whole.manifest.accumulated {
                state.insert(entry.input.clone(), outputs.get(&entry.output).expect("a sum").clone());
            }
            let outputs = run(ort().as_ref(), &train, &feeds(&state));
            for entry in &whole.manifest.state {
                state.insert(entry.input.clone(), outputs.get(&entry.output).expect("state").clone());
            }
            for entry in &whole.manifest.accumulated {
                let zeros = ArrayD::zeros(state[&entry.input].shape());
                state.insert(entry.input.clone(), Tensor::from_f64(DType::F32, &zeros));
            }
            for entry in &whole.manifest.state {
                let reference = Tensor::from_f64(DType::F64, &expected[&entry.input]);
                let apart = relative(&reference, &state[&entry.input]);
                if apart > STEP_TOLERANCE {
                    failures.push(format!("adam {adam}, step {step}: {} {apart:e} off", entry.input));
                }
            }
        }
    }
    conclude("steps", 6, &failures);
}

/// How far a model that is put together from larger operators may be from the original, relative to the largest entry: a
/// few roundings of float32 in each block, of which the exporter's form has as many.
const RAISED_TOLERANCE: f64 = 1e-5;

/// Norms and Gaussian error linear units of real exports: each model computes what it did, and nothing of them is left
/// written out.
#[test]
fn what_exporters_wrote_out_is_raised() {
    let scratch = Scratch::new("raised");
    let (mut count, mut failures, mut all) = (0, Vec::new(), [0, 0]);
    for entry in zoo() {
        let model = entry.read();
        // What is left to test is large; numbers are those of any size.
        let large = std::fs::metadata(&entry.model).is_ok_and(|file| file.len() > 40 << 20);
        let Ok((prepared, _)) = prepare(&model) else { continue };
        let (raised, of_norms) = norms(&prepared).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
        let (raised, of_gelus) = gelus(&raised).unwrap_or_else(|refusal| panic!("{}: {refusal}", entry.name));
        let left = |op: &str| raised.graph().nodes().filter(|(_, node)| node.is(op)).count();
        println!(
            "{}: {of_norms} norms, {of_gelus} units; left: {} Erf, {} Tanh, {} Sqrt, opset {}",
            entry.name,
            left("Erf"),
            left("Tanh"),
            left("Sqrt"),
            raised.opsets().standard()
        );
        if of_norms + of_gelus == 0 || large {
            continue;
        }
        (all[0], all[1]) = (all[0] + of_norms, all[1] + of_gelus);
        let (path, runtime) = (scratch.save_as("raised", &raised, &entry.model), ort());
        let session = common::load(runtime.as_ref(), &entry.model);
        for feeds in entry.feeds(session.as_ref()) {
            let (before, after) = (run(ort().as_ref(), &entry.model, &feeds), run(ort().as_ref(), &path, &feeds));
            for name in session.outputs().iter().map(|output| output.name.clone()) {
                let [before, after] = [&before, &after].map(|outputs| outputs.get(&name).expect("an output"));
                let apart = relative(before, after);
                count += 1;
                if apart > RAISED_TOLERANCE {
                    failures.push(format!("{}: '{name}' {apart:e} off", entry.name));
                }
            }
        }
    }
    println!("{} norms, {} units", all[0], all[1]);
    conclude("raised", count, &failures);
}

//! Tests of the rules, and of whole models where a folder of them is at hand.

use std::collections::BTreeMap;
use std::path::Path;

use super::Shapes;
use crate::{Attribute, DataType, DimSpec, Expr, GraphBuilder, Model, OpType, Tensor, TensorType, ValueId};

fn ty(dtype: DataType, dims: &[&str]) -> TensorType {
    let dim = |text: &&str| match (text.parse(), *text) {
        (Ok(n), _) => DimSpec::Known(n),
        (_, "?") => DimSpec::Unknown,
        (_, name) => DimSpec::Named(name.into()),
    };
    TensorType { dtype, dims: Some(dims.iter().map(dim).collect()) }
}

fn text(dims: Option<&[Expr]>) -> String {
    match dims {
        Some(dims) => format!("[{}]", dims.iter().map(Expr::to_string).collect::<Vec<_>>().join(",")),
        None => "unknown".into(),
    }
}

/// What a runtime saw: per run, the shapes of the inputs and of every value, small integers and equal elements.
struct Truth {
    runs: BTreeMap<String, Vec<(bool, String, Vec<i64>, Option<Vec<i64>>, Option<f64>)>>,
}

impl Truth {
    /// Lines `run in|out name dtype dims ints uniform`, separated by tabs.
    fn read(path: &Path) -> Option<Self> {
        let list = |text: &str| text.split(',').filter_map(|n| n.parse().ok()).collect::<Vec<i64>>();
        let mut runs: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for line in std::fs::read_to_string(path).ok()?.lines() {
            let mut parts = line.split('\t');
            let (run, kind, name) = (parts.next()?, parts.next()?, parts.next()?);
            let (_, dims, ints) = (parts.next()?, parts.next()?, parts.next()?);
            let uniform = parts.next().and_then(|text| text.parse().ok());
            let ints = ints.strip_suffix(';').map(list);
            runs.entry(run.into()).or_default().push((kind == "in", name.into(), list(dims), ints, uniform));
        }
        Some(Self { runs })
    }
}

/// Over every model in the folder that `VITRIM_ZOO` names: nothing inferred contradicts what the file declares, or what
/// a runtime saw (`VITRIM_ZOO_TRUTH`, a folder of tables). Prints how much is known of each model.
#[test]
fn zoo() {
    let Some(folder) = std::env::var_os("VITRIM_ZOO") else {
        println!("VITRIM_ZOO is not set: no models to infer the shapes of");
        return;
    };
    let verbose = std::env::var_os("VITRIM_VERBOSE").is_some();
    let truths = std::env::var_os("VITRIM_ZOO_TRUTH");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    paths.sort();
    let mut missing: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let model = match Model::read(&path) {
            Ok(model) => model,
            Err(error) => {
                println!("{name}: {error}");
                continue;
            }
        };
        let shapes = Shapes::infer(&model);
        let graph = model.graph();
        let (mut ranked, mut closed, mut total) = (0, 0, 0);
        let inputs: std::collections::BTreeSet<String> =
            graph.inputs().iter().filter_map(|&id| shapes.dims(id)).flatten().flat_map(Expr::symbols).collect();
        for (id, value) in graph.values() {
            if value.name().is_empty() {
                continue;
            }
            total += 1;
            match shapes.dims(id) {
                Some(dims) => {
                    ranked += 1;
                    let open = !dims.iter().all(|dim| dim.symbols().is_subset(&inputs));
                    closed += usize::from(!open);
                    if open && verbose {
                        println!("  open extent {} {}", value.name(), text(Some(dims)));
                    }
                }
                None if matches!(value.def(), crate::Def::Undefined) => total -= 1,
                None => *missing.entry(shapes.reason(id).unwrap_or("no reason").into()).or_default() += 1,
            }
            let Some(declared) = value.ty() else { continue };
            if shapes.dtype(id).is_some_and(|dtype| dtype != declared.dtype) {
                wrong.push(format!("{name}: {} has type {:?}, declared {}", value.name(), shapes.dtype(id), declared));
            }
            let (Some(dims), Some(declared_dims)) = (shapes.dims(id), &declared.dims) else { continue };
            let clash = dims.len() != declared_dims.len()
                || dims.iter().zip(declared_dims).any(|(dim, declared)| match (dim.as_known(), declared) {
                    (Some(n), DimSpec::Known(declared)) => n != *declared,
                    _ => false,
                });
            if clash {
                wrong.push(format!("{name}: {} is {}, declared {declared}", value.name(), text(Some(dims))));
            }
        }
        let outputs: Vec<String> = graph.outputs().iter().map(|&id| text(shapes.dims(id))).collect();
        println!("{name}: {ranked}/{total} ranked, {closed}/{total} in input symbols; outputs {}", outputs.join(" "));
        let truth = truths.as_ref().and_then(|folder| Truth::read(&Path::new(folder).join(format!("{name}.tsv"))));
        let ids: BTreeMap<&str, ValueId> = graph.values().map(|(id, value)| (value.name(), id)).collect();
        for (run, values) in truth.iter().flat_map(|truth| &truth.runs) {
            let mut bound: BTreeMap<String, i64> = BTreeMap::new();
            for (_, input, dims, ..) in values.iter().filter(|value| value.0) {
                for (dim, n) in shapes.dims(ids[input.as_str()]).unwrap().iter().zip(dims) {
                    if let Some(symbol) = dim.as_symbol() {
                        bound.insert(symbol.into(), *n);
                    }
                }
            }
            let eval = |expr: &Expr| expr.eval(&|symbol| bound.get(symbol).copied());
            for (_, value, dims, ints, uniform) in values {
                let Some(&id) = ids.get(value.as_str()) else { continue };
                if let Some(inferred) = shapes.dims(id) {
                    let agrees = inferred.len() == dims.len()
                        && inferred.iter().zip(dims).all(|(dim, n)| eval(dim).is_none_or(|dim| dim == *n));
                    if !agrees {
                        wrong.push(format!("{name}: run {run}: {value} is {}, seen {dims:?}", text(Some(inferred))));
                    }
                }
                if let (Some(inferred), Some(seen)) = (shapes.ints(id), ints) {
                    let agrees = inferred.len() == seen.len()
                        && inferred.iter().zip(seen).all(|(item, n)| eval(item).is_none_or(|item| item == *n));
                    if !agrees {
                        wrong.push(format!("{name}: run {run}: {value} holds {}, seen {seen:?}", text(Some(inferred))));
                    }
                }
                if let Some(inferred) = shapes.uniform(id) {
                    if *uniform != Some(inferred) && !dims.contains(&0) {
                        wrong.push(format!("{name}: run {run}: {value} is all {inferred}, seen {uniform:?}"));
                    }
                } else if uniform.is_some() && dims.iter().product::<i64>() > 1 && verbose {
                    println!("  missed uniform {value} {dims:?} {uniform:?}");
                }
                if shapes.ints(id).is_none() && ints.is_some() && verbose {
                    println!("  missed ints {value} {ints:?}");
                }
            }
        }
    }
    println!("unknown shapes by reason: {missing:#?}");
    assert!(wrong.is_empty(), "{} contradictions:\n{}", wrong.len(), wrong.join("\n"));
}

//! What is read is written: no field of any model is lost on the way through the graph representation.

use std::fs;
use std::path::Path;

use prost::Message;

use super::testing::*;
use super::*;
use crate::{Def, Graph, Model, inline_functions, print_graph};

/// The message in the file at `path`.
fn message(path: &Path) -> ModelProto {
    ModelProto::decode(fs::read(path).unwrap().as_slice()).unwrap()
}

fn write(model: &Model, path: &Path, source: &Path) {
    let verified = model.verify().unwrap_or_else(|error| panic!("{}: {error}", source.display()));
    Model::write(verified, path, source).unwrap();
}

/// Compares encoded: NaNs in attributes and tensors do not equal themselves.
#[track_caller]
fn assert_same(a: &ModelProto, b: &ModelProto, what: &Path) {
    assert!(a.encode_to_vec() == b.encode_to_vec(), "{} changed", what.display());
}

#[test]
fn every_model_of_the_zoo_is_written_as_it_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out.onnx");
    for path in zoo() {
        let model = Model::read(&path).unwrap();
        write(&model, &target, &path);
        let (original, mut written) = (message(&path), message(&target));
        let again = Model::read(&target).unwrap();
        let locations = model.external_locations();
        if locations.is_empty() {
            assert!(again == model, "{}", path.display());
            assert_eq!(fs::read(&path).unwrap().len(), fs::read(&target).unwrap().len(), "{}", path.display());
        } else {
            // In another folder external data has another name; that and nothing else differs.
            let renamed = again.external_locations();
            for tensor in &mut written.graph.as_mut().unwrap().initializer {
                for entry in tensor.external_data.iter_mut().filter(|entry| entry.key() == "location") {
                    let at = renamed.iter().position(|name| name == entry.value()).unwrap();
                    entry.value = Some(locations[at].clone());
                }
            }
            for (&old, &new) in model.graph().initializers().iter().zip(again.graph().initializers()) {
                let raw = |model: &Model, id| model.graph().constant(id).unwrap().raw().cloned();
                assert_eq!(raw(&model, old), raw(&again, new));
            }
        }
        assert_same(&original, &written, &path);
    }
}

#[test]
fn external_data_stays_where_it_is_in_the_same_folder() {
    let mut seen = 0;
    for path in zoo() {
        let locations = Model::read(&path).unwrap().external_locations();
        if locations.is_empty() {
            continue;
        }
        seen += 1;
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("in.onnx");
        fs::copy(&path, &source).unwrap();
        for location in &locations {
            fs::copy(path.with_file_name(location), folder.path().join(location)).unwrap();
        }
        let target = folder.path().join("out.onnx");
        let model = Model::read(&source).unwrap();
        write(&model, &target, &source);
        assert_same(&message(&source), &message(&target), &path);
        assert!(Model::read(&target).unwrap() == model);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2 + locations.len());
    }
    assert!(seen > 0 || std::env::var_os("VITRIM_ZOO").is_none());
}

#[test]
fn weights_embedded_for_runtimes_are_those_of_the_external_files() {
    let tensor = |graph: &Graph, id| match graph.value(id).def() {
        Def::Initializer(tensor) | Def::Default(tensor) => tensor.clone(),
        other => panic!("an initializer is {other:?}"),
    };
    for path in zoo() {
        let model = Model::read(&path).unwrap();
        let bytes = Model::to_bytes(model.verify().unwrap());
        let embedded = Model::from_bytes(bytes.into()).unwrap();
        assert!(embedded.external_locations().is_empty());
        for (&a, &b) in model.graph().initializers().iter().zip(embedded.graph().initializers()) {
            let (a, b) = (tensor(model.graph(), a), tensor(embedded.graph(), b));
            assert_eq!((a.ty(), a.raw()), (b.ty(), b.raw()));
        }
    }
}

#[test]
fn functions_of_the_zoo_inline_to_valid_models_without_functions() {
    let (mut seen, folder) = (0, tempfile::tempdir().unwrap());
    for path in zoo() {
        let mut model = Model::read(&path).unwrap();
        if !inline_functions(&mut model, |_| true).unwrap() {
            continue;
        }
        seen += 1;
        assert!(model.functions().is_empty());
        let target = folder.path().join(path.file_name().unwrap());
        write(&model, &target, &path);
        let again = Model::read(&target).unwrap();
        assert_eq!(print_graph(again.graph()), print_graph(model.graph()));
        // For a look at them with other tools.
        if let Some(folder) = std::env::var_os("VITRIM_KEEP") {
            fs::copy(&target, Path::new(&folder).join(path.file_name().unwrap())).unwrap();
        }
    }
    assert!(seen > 0);
}

//! Models: a main graph, local functions and what the file says about itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes};
use prost::Message;
use vitrim_io::{AtomicFile, MappedFile};

use crate::graph::{Attribute, Graph, OpType};
use crate::onnx::{
    self, AttributeProto, DecodeError, FunctionProto, GraphProto, ModelProto, OperatorSetIdProto, SparseTensorProto,
    StringStringEntryProto, TensorProto,
};
use crate::{Verified, validate};

/// Largest message that protobuf readers accept, in bytes.
const PROTOBUF_LIMIT: usize = i32::MAX as usize;

/// The version of the format that a file has which names none.
pub(crate) const IR_UNSTATED: i64 = 3;

/// Versions of the operator sets that a model or function imports.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Opsets(pub(crate) Vec<OperatorSetIdProto>);

impl Opsets {
    /// The version imported for `domain` (`""` for the standard one).
    pub fn get(&self, domain: &str) -> Option<i64> {
        let domain = if domain == "ai.onnx" { "" } else { domain };
        self.iter().find(|&(own, _)| own == domain).map(|(_, version)| version)
    }

    /// The version of the standard domain; 1 where a very old file names none.
    pub fn standard(&self) -> i64 {
        self.get("").unwrap_or(1)
    }

    /// Imports `domain` in `version` unless it is imported already.
    pub fn import(&mut self, domain: &str, version: i64) {
        if self.get(domain).is_none() {
            self.0.push(OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) });
        }
    }

    /// Lets the standard domain, where it is imported, be of `version`.
    pub(crate) fn set_standard(&mut self, version: i64) {
        let standard = |entry: &&mut OperatorSetIdProto| matches!(entry.domain.as_deref(), None | Some("" | "ai.onnx"));
        self.0.iter_mut().filter(standard).for_each(|entry| entry.version = Some(version));
    }

    /// Imported domains with their versions; the standard domain is `""` also where the file spells it `ai.onnx`.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|entry| {
            let domain = entry.domain.as_deref().filter(|&domain| domain != "ai.onnx").unwrap_or("");
            (domain, entry.version.unwrap_or(1))
        })
    }
}

/// A model-local function: an operator whose meaning is a graph of other operators.
#[derive(Clone, PartialEq, Debug)]
pub struct Function {
    /// How nodes call it.
    pub key: OpType,
    /// Names of attributes without default.
    pub attributes: Vec<String>,
    /// Attributes with their defaults.
    pub defaults: Vec<(String, Attribute)>,
    /// Its body; inputs and outputs are the function's.
    pub graph: Graph,
    /// Operator sets that the body uses.
    pub opsets: Opsets,
    pub(crate) rest: FunctionProto,
}

impl Function {
    /// A function with a body built from scratch.
    pub fn new(key: OpType, attributes: Vec<String>, graph: Graph, opset: i64, doc: &str) -> Self {
        let mut opsets = Opsets::default();
        opsets.import("", opset);
        let rest = FunctionProto {
            name: Some(key.name.clone()),
            domain: Some(key.domain.clone()),
            doc_string: Some(doc.into()),
            ..Default::default()
        };
        Self { key, attributes, defaults: Vec::new(), graph, opsets, rest }
    }
}

/// An ONNX model in memory. Weights stay in the memory map of the file that they were read from.
#[derive(Clone, PartialEq, Debug)]
pub struct Model {
    pub(crate) graph: Graph,
    pub(crate) functions: Vec<Function>,
    pub(crate) opsets: Opsets,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) rest: ModelProto,
    pub(crate) source: Source,
}

/// The file that a model was read from: as long as weights lie in its map, the kernel can copy them from there. It is no
/// part of what the model says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Source(Option<MappedFile>);

impl PartialEq for Source {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// Why a model could not be read or written. The message says it all; there is no further cause behind it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FileError {
    #[error("cannot read '{}': {}", path.display(), reason(path, error))]
    Read { path: PathBuf, error: io::Error },
    #[error("'{}': {error}", path.display())]
    Decode { path: PathBuf, error: DecodeError },
    #[error("cannot write '{}': {}", path.display(), reason(path, error))]
    Write { path: PathBuf, error: io::Error },
}

/// The error without the path, where it begins with it.
fn reason(path: &Path, error: &io::Error) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text).into()
}

impl Model {
    /// Reads a model. Weights are not copied: they stay in the memory maps of the file and of its external data.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let read = |error| FileError::Read { path: path.into(), error };
        let file = MappedFile::open(path).map_err(read)?;
        let mut maps: HashMap<String, Bytes> = HashMap::new();
        let mut external = |location: &str| {
            if let Some(bytes) = maps.get(location) {
                return Ok(bytes.clone());
            }
            let data = vitrim_io::resolve_external(path, location).map_err(|error| error.to_string())?;
            let map = MappedFile::open(&data)
                .map_err(|error| format!("its external file '{location}' cannot be read: {error}"))?;
            maps.insert(location.into(), map.bytes());
            Ok(map.bytes())
        };
        let decode = |error| FileError::Decode { path: path.into(), error };
        let model = onnx::decode_model(file.bytes(), &mut external).map_err(decode)?;
        Ok(Self { source: Source(Some(file)), ..model })
    }

    /// Reads a model from memory; external data is refused.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, DecodeError> {
        onnx::decode_model(bytes, &mut |location| Err(format!("external file '{location}' of a model in memory")))
    }

    /// The main graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Local functions.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// Operator sets of the main graph.
    pub fn opsets(&self) -> &Opsets {
        &self.opsets
    }

    /// IR version; 3 where the file does not say.
    pub fn ir_version(&self) -> i64 {
        self.rest.ir_version.unwrap_or(IR_UNSTATED)
    }

    /// Name of the tool that wrote the file.
    pub fn producer(&self) -> String {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{} {}", part(&self.rest.producer_name), part(&self.rest.producer_version)).trim().into()
    }

    /// The entry `key` of the model's `metadata_props`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Locations of the external files that tensors lie in, each once.
    pub fn external_locations(&self) -> Vec<String> {
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        each_tensor(&mut onnx::encode_model(self, false), &mut |tensor| {
            if let Some(location) = onnx::external_location(tensor).filter(|&location| seen.insert(location.to_owned()))
            {
                found.push(location.to_owned());
            }
        });
        found
    }

    /// The model as one buffer with all weights inside, for runtimes that load from memory.
    pub fn to_bytes(verified: Verified<'_>) -> Vec<u8> {
        onnx::encode_model(verified.model(), true).encode_to_vec()
    }

    /// Writes the model to `path`: all of it, or nothing.
    ///
    /// `source` is the path of the file it was read from, to find external files. Those stay where they are when `path`
    /// lies in the same folder; else they are linked (or copied) beside the new model, under names that begin with its
    /// own. Weights of a model that is too large for one file go to such a file as well. The kernel copies weights from
    /// file to file, not through memory.
    ///
    /// `path` may be `source`, but not one of the external files: that would destroy the weights of the source.
    pub fn write(verified: Verified<'_>, path: &Path, source: &Path) -> Result<(), FileError> {
        write_within(verified.model(), path, source, PROTOBUF_LIMIT)
            .map_err(|error| FileError::Write { path: path.into(), error })
    }

    /// Checks every invariant and gives the proof that writing demands.
    pub fn verify(&self) -> Result<Verified<'_>, validate::Violations> {
        validate::validate(self)
    }
}

/// Visits every tensor of a message, at every depth.
fn each_tensor(model: &mut ModelProto, visit: &mut dyn FnMut(&mut TensorProto)) {
    fn of_sparse(sparse: &mut SparseTensorProto, visit: &mut dyn FnMut(&mut TensorProto)) {
        sparse.values.iter_mut().chain(&mut sparse.indices).for_each(visit);
    }
    fn of_attribute(attribute: &mut AttributeProto, visit: &mut dyn FnMut(&mut TensorProto)) {
        attribute.t.iter_mut().for_each(|tensor| visit(tensor));
        attribute.tensors.iter_mut().for_each(&mut *visit);
        attribute.sparse_tensor.iter_mut().for_each(|sparse| of_sparse(sparse, visit));
        attribute.sparse_tensors.iter_mut().for_each(|sparse| of_sparse(sparse, visit));
        attribute.g.iter_mut().for_each(|graph| of_graph(graph, visit));
        attribute.graphs.iter_mut().for_each(|graph| of_graph(graph, visit));
    }
    fn of_graph(graph: &mut GraphProto, visit: &mut dyn FnMut(&mut TensorProto)) {
        graph.initializer.iter_mut().for_each(&mut *visit);
        graph.sparse_initializer.iter_mut().for_each(|sparse| of_sparse(sparse, visit));
        let attributes = graph.node.iter_mut().flat_map(|node| &mut node.attribute);
        attributes.for_each(|attribute| of_attribute(attribute, visit));
    }
    let training = model.training_info.iter_mut().flat_map(|info| [&mut info.initialization, &mut info.algorithm]);
    model.graph.iter_mut().chain(training.flatten()).for_each(|graph| of_graph(graph, visit));
    for function in &mut model.functions {
        let attributes = function.node.iter_mut().flat_map(|node| &mut node.attribute);
        attributes.chain(&mut function.attribute_proto).for_each(|attribute| of_attribute(attribute, visit));
    }
}

/// Writes a model into files of at most `limit` bytes, those with external data excepted.
fn write_within(model: &Model, path: &Path, source: &Path, limit: usize) -> io::Result<()> {
    let mut proto = onnx::encode_model(model, false);
    let mut companions = Companions::beside(path)?;
    companions.plan(model, source)?;
    each_tensor(&mut proto, &mut |tensor| {
        let placed = onnx::external_location(tensor).and_then(|location| companions.placed.get(location));
        if let Some((_, name)) = placed {
            set_entry(tensor, "location", name.clone());
        }
    });
    let map = model.source.0.as_ref();
    let moved = match proto.encoded_len() > limit {
        true => Some(companions.move_weights(&mut proto, map)?),
        false => None,
    };
    if proto.encoded_len() > limit {
        return Err(io::Error::other(format!("it is larger than {limit} bytes even without its weights")));
    }
    let mut file = AtomicFile::create(path)?;
    map.iter().for_each(|map| file.copy_from(map));
    proto.encode_raw(&mut file);

    // All the bytes are there. What is left is to name the files: the model last, for it refers to the others.
    let mut new = Vec::new();
    let name_all = || {
        for (from, name) in companions.placed.values() {
            let target = path.with_file_name(name);
            new.extend((!target.exists()).then(|| target.clone()));
            vitrim_io::place_beside(from, &target)?;
        }
        if let Some((file, name)) = moved {
            let target = path.with_file_name(name);
            new.extend((!target.exists()).then_some(target));
            file.commit()?;
        }
        file.commit()
    };
    let result = name_all();
    if result.is_err() {
        new.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
    result
}

/// The files with external data beside a model that is being written.
struct Companions {
    /// The model's folder and, if there is a file already, its path; both canonical.
    folder: PathBuf,
    target: Option<PathBuf>,
    /// The first part of the names of new files.
    stem: String,
    /// Files that must stay as they are.
    kept: HashSet<PathBuf>,
    /// For each location in the source that does not lead to the file from here: the file, and its new name.
    placed: BTreeMap<String, (PathBuf, String)>,
}

impl Companions {
    fn beside(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
        Ok(Self {
            folder: folder.canonicalize().map_err(at)?,
            target: path.canonicalize().ok(),
            stem: path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            kept: HashSet::new(),
            placed: BTreeMap::new(),
        })
    }

    /// Decides for each external file of `source` whether it stays.
    fn plan(&mut self, model: &Model, source: &Path) -> io::Result<()> {
        let mut leaving = Vec::new();
        for location in model.external_locations() {
            let file = vitrim_io::resolve_external(source, &location).map_err(io::Error::other)?;
            if Some(&file) == self.target.as_ref() {
                return Err(io::Error::other("it holds weights of the model that is to be written"));
            }
            let here = self.folder.join(&location).canonicalize();
            if here.is_ok_and(|here| here == file && here.starts_with(&self.folder)) {
                self.kept.insert(file);
            } else {
                leaving.push((location, file));
            }
        }
        self.kept.extend(source.canonicalize());
        for (location, file) in leaving {
            let name = self.free_name("data");
            self.placed.insert(location, (file, name));
        }
        Ok(())
    }

    /// `STEM.extension`, or else `STEM.1.extension` and so on.
    fn free_name(&mut self, extension: &str) -> String {
        let numbered = |number: usize| match number {
            0 => format!("{}.{extension}", self.stem),
            _ => format!("{}.{number}.{extension}", self.stem),
        };
        let free = |name: &String| !self.kept.contains(&self.folder.join(name));
        let name = (0..).map(numbered).find(free).expect("there are more numbers than files");
        self.kept.insert(self.folder.join(&name));
        name
    }

    /// Moves weights into an external file, so that what remains is a message that protobuf readers accept.
    fn move_weights(&mut self, proto: &mut ModelProto, map: Option<&MappedFile>) -> io::Result<(AtomicFile, String)> {
        /// Smaller tensors stay in the message.
        const WORTH_MOVING: usize = 1 << 10;
        /// Runtimes map external data: aligned offsets let them use it in place.
        const ALIGNMENT: u64 = 4096;
        let name = self.free_name("weights.data");
        let mut file = AtomicFile::create(&self.folder.join(&name))?;
        map.iter().for_each(|map| file.copy_from(map));
        for tensor in proto.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
            let Some(raw) = tensor.raw_data.take_if(|raw| raw.len() >= WORTH_MOVING) else { continue };
            let offset = file.position().next_multiple_of(ALIGNMENT);
            file.put_bytes(0, (offset - file.position()) as usize);
            tensor.data_location = Some(onnx::EXTERNAL);
            set_entry(tensor, "location", name.clone());
            set_entry(tensor, "offset", offset.to_string());
            set_entry(tensor, "length", raw.len().to_string());
            file.put(raw);
        }
        Ok((file, name))
    }
}

fn set_entry(tensor: &mut TensorProto, key: &str, value: String) {
    match tensor.external_data.iter_mut().find(|entry| entry.key.as_deref() == Some(key)) {
        Some(entry) => entry.value = Some(value),
        None => tensor.external_data.push(StringStringEntryProto { key: Some(key.into()), value: Some(value) }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use prost::Message;

    use super::*;
    use crate::inline_functions;
    use crate::onnx::testing::*;

    /// A model of three weights: one of 4 bytes and two of 8 KiB.
    fn weighty() -> ModelProto {
        let large = |name: &str, fill: u8| TensorProto {
            dims: vec![2048],
            raw_data: Some(vec![fill; 8192].into()),
            ..weight(name)
        };
        let small = TensorProto { dims: vec![1], raw_data: Some(vec![9; 4].into()), ..weight("small") };
        let nodes = vec![node("Sum", &["x", "one", "small", "two"], &["y"])];
        let initializer = vec![large("one", 1), small, large("two", 2)];
        model(GraphProto { initializer, ..graph(&["x"], nodes, &["y"]) })
    }

    fn weights(model: &Model) -> Vec<Bytes> {
        let raw = |&id: &_| model.graph().constant(id).unwrap().raw().unwrap().clone();
        model.graph().initializers().iter().map(raw).collect()
    }

    /// Names of what is in a folder.
    fn names(folder: &Path) -> Vec<String> {
        let entries = folder.read_dir().unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn write(model: &Model, path: &Path, source: &Path) -> Result<(), String> {
        Model::write(model.verify().unwrap(), path, source).map_err(|error| error.to_string())
    }

    /// A folder with `in.onnx`, whose weights lie in `in.onnx.weights.data`.
    fn external() -> (tempfile::TempDir, PathBuf, Model) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.onnx");
        write_within(&weighty().read(), &path, &path, 1000).unwrap();
        let model = Model::read(&path).unwrap();
        (folder, path, model)
    }

    #[test]
    fn what_is_too_large_for_one_file_goes_beside_it() {
        let (folder, path, model) = external();
        assert_eq!(names(folder.path()), ["in.onnx", "in.onnx.weights.data"]);
        assert_eq!(model.external_locations(), ["in.onnx.weights.data"]);
        assert_eq!(weights(&model), weights(&weighty().read()));
        assert!(fs::metadata(&path).unwrap().len() < 1000);
        assert_eq!(fs::metadata(folder.path().join("in.onnx.weights.data")).unwrap().len(), 3 * 4096 + 4096);
        let offsets = weighty();
        let offsets: Vec<_> = (0..offsets.graph.unwrap().initializer.len())
            .map(|at| {
                let proto = onnx::encode_model(&model, false).graph.unwrap();
                onnx::external_entry(&proto.initializer[at], "offset").map(str::to_owned)
            })
            .collect();
        assert_eq!(offsets, [Some("0".into()), None, Some("8192".into())]);
    }

    #[test]
    fn a_message_that_stays_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.onnx");
        let error = write_within(&weighty().read(), &path, &path, 100).unwrap_err();
        assert_eq!(error.to_string(), "it is larger than 100 bytes even without its weights");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_model_may_replace_itself() {
        let (folder, path, mut model) = external();
        let before = weights(&model);
        model.metadata.push(("key".into(), "value".into()));
        write(&model, &path, &path).unwrap();
        let again = Model::read(&path).unwrap();
        assert!(again == model && weights(&again) == before);
        assert_eq!(names(folder.path()), ["in.onnx", "in.onnx.weights.data"]);

        // More weights that do not fit: they must not go over those in use.
        let mut proto = onnx::encode_model(&model, false);
        let extra = TensorProto { dims: vec![1024], raw_data: Some(vec![3; 4096].into()), ..weight("three") };
        proto.graph.as_mut().unwrap().initializer.push(extra);
        fs::write(&path, proto.encode_to_vec()).unwrap();
        let model = Model::read(&path).unwrap();
        let before = weights(&model);
        write_within(&model, &path, &path, 1000).unwrap();
        assert_eq!(weights(&Model::read(&path).unwrap()), before);
        assert_eq!(names(folder.path()), ["in.onnx", "in.onnx.1.weights.data", "in.onnx.weights.data"]);
    }

    #[test]
    fn weights_inside_may_be_replaced_in_place_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        fs::write(&path, weighty().encode_to_vec()).unwrap();
        let model = Model::read(&path).unwrap();
        write(&model, &path, &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), weighty().encode_to_vec());
        // The model in memory keeps the file that it was read from.
        assert_eq!(weights(&model), weights(&weighty().read()));
    }

    #[test]
    fn weights_of_the_source_are_not_overwritten() {
        let (folder, path, model) = external();
        let data = folder.path().join("in.onnx.weights.data");
        let before = fs::read(&data).unwrap();
        let told = write(&model, &data, &path).unwrap_err();
        assert!(told.ends_with("it holds weights of the model that is to be written"), "{told}");
        assert_eq!(fs::read(&data).unwrap(), before);

        // The same name in another folder is free.
        let other = tempfile::tempdir().unwrap();
        let target = other.path().join("in.onnx.weights.data");
        write(&model, &target, &path).unwrap();
        assert_eq!(weights(&Model::read(&target).unwrap()), weights(&model));
        assert_eq!(names(other.path()), ["in.onnx.weights.data", "in.onnx.weights.data.data"]);
    }

    #[test]
    fn a_folder_beneath_or_above_is_another_folder() {
        let (folder, path, model) = external();
        let beneath = folder.path().join("beneath");
        fs::create_dir(&beneath).unwrap();
        let target = beneath.join("out.onnx");
        write(&model, &target, &path).unwrap();
        assert_eq!(names(&beneath), ["out.onnx", "out.onnx.data"]);
        let again = Model::read(&target).unwrap();
        let above = folder.path().join("above.onnx");
        write(&again, &above, &target).unwrap();
        assert_eq!(weights(&Model::read(&above).unwrap()), weights(&model));
    }

    #[test]
    fn several_external_files_get_several_names() {
        let (folder, path, _) = external();
        fs::copy(folder.path().join("in.onnx.weights.data"), folder.path().join("second")).unwrap();
        let mut proto = ModelProto::decode(fs::read(&path).unwrap().as_slice()).unwrap();
        set_entry(&mut proto.graph.as_mut().unwrap().initializer[2], "location", "./second".into());
        // Constants inside functions lie there as well.
        let constant = AttributeProto {
            r#type: Some(onnx::attribute_type::TENSOR),
            t: Some(Box::new(proto.graph.as_ref().unwrap().initializer[0].clone())),
            ..Default::default()
        };
        proto.functions = vec![function("f", &[], vec![node("Constant", &[], &["c"]).with("value", constant)], &["c"])];
        proto.opset_import.push(opset("f", 1));
        proto.graph.as_mut().unwrap().node.push(node("f::f", &[], &["z"]));
        fs::write(&path, proto.encode_to_vec()).unwrap();
        let mut model = Model::read(&path).unwrap();
        let other = tempfile::tempdir().unwrap();
        let target = other.path().join("out.onnx");
        write(&model, &target, &path).unwrap();
        assert_eq!(names(other.path()), ["out.onnx", "out.onnx.1.data", "out.onnx.data"]);
        let mut again = Model::read(&target).unwrap();
        assert_eq!(weights(&again), weights(&model));
        for model in [&mut model, &mut again] {
            inline_functions(model, |_| true).unwrap();
        }
        let constant =
            |model: &Model| model.graph().constant(model.graph().find_value("z").unwrap()).unwrap().raw().cloned();
        assert!(constant(&again).is_some() && constant(&again) == constant(&model));
    }

    #[cfg(unix)]
    #[test]
    fn a_linked_model_takes_its_weights_along() {
        // As in the caches of model hubs: links to files in another folder.
        let (folder, path, model) = external();
        let snapshot = tempfile::tempdir().unwrap();
        let link = snapshot.path().join("model.onnx");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        std::os::unix::fs::symlink(
            folder.path().join("in.onnx.weights.data"),
            snapshot.path().join("in.onnx.weights.data"),
        )
        .unwrap();
        let linked = Model::read(&link).unwrap();
        let target = snapshot.path().join("out.onnx");
        write(&linked, &target, &link).unwrap();
        assert_eq!(weights(&Model::read(&target).unwrap()), weights(&model));
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let (folder, path, model) = external();
        let told = write(&model, &folder.path().join("none/out.onnx"), &path).unwrap_err();
        assert!(told.starts_with("cannot write '") && told.contains("No such file"), "{told}");
        fs::create_dir(folder.path().join("taken")).unwrap();
        let told = write(&model, &folder.path().join("taken"), &path).unwrap_err();
        assert!(told.contains("is a folder") && told.matches("taken").count() == 1, "{told}");
        // The weights cannot be placed: a folder is in the way.
        let other = tempfile::tempdir().unwrap();
        fs::create_dir(other.path().join("out.onnx.data")).unwrap();
        let told = write(&model, &other.path().join("out.onnx"), &path).unwrap_err();
        assert!(told.contains("out.onnx.data: is a folder"), "{told}");
        assert_eq!(names(other.path()), ["out.onnx.data"]);
        assert_eq!(names(folder.path()), ["in.onnx", "in.onnx.weights.data", "taken"]);
    }
}

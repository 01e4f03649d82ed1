//! Checkpoints of ONNX Runtime Training: a FlatBuffer `ODTC` of version 2, with its elements beside it in
//! `<checkpoint>.data` where these are too many for one.
//!
//! ```text
//! Checkpoint  { version: int32, module_state: ModuleState, optimizer_groups: [OptimizerGroup], property_bag: PropertyBag }
//! ModuleState { requires_grad_params: [Tensor], frozen_params: [Tensor], is_nominal_state: bool, has_external_data: bool }
//! Tensor      { name: string, doc: string, dims: [int64], data_type: int32, raw_data: [ubyte], string_data: [string],
//!               external_data_offset: int64 = -1 }
//! ```
//!
//! Without optimizer groups an optimizer begins at step 0 with moments of zero.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes};
use flatbuffers::{FlatBufferBuilder, TableFinishedWIPOffset, VOffsetT, WIPOffset};
use vitrim_io::{AtomicFile, MappedFile};
use vitrim_ir::{DataType, Tensor};

use super::flat::{Malformed, Table};
use crate::parameters::Parameter;

const IDENTIFIER: &str = "ODTC";
const VERSION: i32 = 2;
/// Bytes that a FlatBuffer has at most.
const LIMIT: usize = i32::MAX as usize;
/// Bytes of a tensor's table, its entry among the others and all padding, at most: seven fields, four lengths.
const OVERHEAD: usize = 128;

/// Fields of the tables.
mod field {
    pub mod checkpoint {
        pub const VERSION: usize = 0;
        pub const MODULE_STATE: usize = 1;
    }
    pub mod module_state {
        pub const TRAINED: usize = 0;
        pub const FROZEN: usize = 1;
        pub const IS_NOMINAL: usize = 2;
        pub const HAS_EXTERNAL_DATA: usize = 3;
    }
    pub mod tensor {
        pub const NAME: usize = 0;
        pub const DIMS: usize = 2;
        pub const DATA_TYPE: usize = 3;
        pub const RAW_DATA: usize = 4;
        pub const EXTERNAL_DATA_OFFSET: usize = 6;
    }
}
use field::{checkpoint, module_state, tensor};

/// Parameters by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// Those that are trained.
    pub trained: Vec<(String, Tensor)>,
    /// Those that stay as they are.
    pub frozen: Vec<(String, Tensor)>,
}

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CheckpointError {
    #[error("cannot read the checkpoint: {0}")]
    Io(#[from] io::Error),
    #[error("'{}' is no checkpoint of ONNX Runtime Training: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
}

impl From<Malformed> for String {
    fn from(_: Malformed) -> Self {
        "it is malformed or cut off".into()
    }
}

impl Checkpoint {
    /// The initial parameters.
    pub(super) fn of(parameters: &[Parameter]) -> Self {
        let mut checkpoint = Self::default();
        for parameter in parameters {
            let list = if parameter.trainable { &mut checkpoint.trained } else { &mut checkpoint.frozen };
            list.push((parameter.name.clone(), parameter.tensor.clone()));
        }
        checkpoint
    }

    /// All parameters.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.trained.iter().chain(&self.frozen).map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Writes the checkpoint, and beside it `<path>.data` where it is too large for one file: all of it, or nothing.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let elements: usize = self.parameters().map(|(_, tensor)| stored(tensor).len()).sum();
        let whole = self.tables().saturating_add(elements);
        match whole <= LIMIT {
            true => write_all(path, self.buffer(whole, None).finished_data()).and_then(AtomicFile::commit),
            false => self.write_split(path),
        }
    }

    /// Bytes of all but the elements, at most.
    fn tables(&self) -> usize {
        let parts = self.parameters().map(|(name, one)| name.len() + 8 * one.dims().len() + OVERHEAD);
        parts.sum::<usize>() + OVERHEAD
    }

    /// Writes the checkpoint with its elements in `<path>.data`, whatever their number.
    pub fn write_split(&self, path: &Path) -> io::Result<()> {
        let mut data = AtomicFile::create(&data_path(path))?;
        let mut offsets = Vec::new();
        for (_, tensor) in self.parameters() {
            offsets.push(data.position() as i64);
            data.put_slice(&stored(tensor));
        }
        let file = write_all(path, self.buffer(self.tables(), Some(&offsets)).finished_data())?;
        data.commit()?;
        file.commit()
    }

    /// The FlatBuffer; without elements where these are at offsets elsewhere.
    fn buffer(&self, capacity: usize, offsets: Option<&[i64]>) -> FlatBufferBuilder<'static> {
        let mut to = FlatBufferBuilder::with_capacity(capacity);
        let mut tensors = Vec::new();
        for (at, (name, one)) in self.parameters().enumerate() {
            let name = to.create_string(name);
            let dims = to.create_vector(one.dims());
            let raw = offsets.is_none().then(|| to.create_vector(&stored(one)[..]));
            let table = to.start_table();
            if let Some(offsets) = offsets {
                to.push_slot(slot(tensor::EXTERNAL_DATA_OFFSET), offsets[at], -1);
            }
            to.push_slot_always(slot(tensor::NAME), name);
            to.push_slot_always(slot(tensor::DIMS), dims);
            to.push_slot(slot(tensor::DATA_TYPE), one.dtype().code(), 0);
            if let Some(raw) = raw {
                to.push_slot_always(slot(tensor::RAW_DATA), raw);
            }
            tensors.push(to.end_table(table));
        }
        let (trained, frozen): (&[WIPOffset<TableFinishedWIPOffset>], _) = tensors.split_at(self.trained.len());
        let (trained, frozen) = (to.create_vector(trained), to.create_vector(frozen));
        let table = to.start_table();
        to.push_slot_always(slot(module_state::TRAINED), trained);
        to.push_slot_always(slot(module_state::FROZEN), frozen);
        to.push_slot(slot(module_state::HAS_EXTERNAL_DATA), offsets.is_some(), false);
        let state = to.end_table(table);
        let table = to.start_table();
        to.push_slot(slot(checkpoint::VERSION), VERSION, 0);
        to.push_slot_always(slot(checkpoint::MODULE_STATE), state);
        let root = to.end_table(table);
        to.finish(root, Some(IDENTIFIER));
        to
    }

    /// Whether a file is one, to all appearance.
    pub fn is(bytes: &[u8]) -> bool {
        bytes.get(4..8) == Some(IDENTIFIER.as_bytes())
    }

    /// Reads the parameters of a checkpoint, of whatever wrote it. Elements are not copied: they stay in the memory map of
    /// the file. What it says of optimizers is left out.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let bytes = MappedFile::open(path)?.bytes();
        let data = || Ok(MappedFile::open(&data_path(path))?.bytes());
        decode(&bytes, data).map_err(|error| match error {
            Unreadable::Io(error) => CheckpointError::Io(error),
            Unreadable::Format(reason) => CheckpointError::Format { path: path.into(), reason },
        })
    }
}

/// Where elements are that have no room in a checkpoint.
fn data_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".data");
    name.into()
}

fn write_all(path: &Path, bytes: &[u8]) -> io::Result<AtomicFile> {
    let mut file = AtomicFile::create(path)?;
    file.put_slice(bytes);
    Ok(file)
}

/// Where the builder wants a field.
fn slot(field: usize) -> VOffsetT {
    (4 + 2 * field) as VOffsetT
}

/// Little-endian elements of a float tensor. Small ones may be stored as a list of numbers.
fn stored(tensor: &Tensor) -> Cow<'_, [u8]> {
    if let Some(raw) = tensor.raw() {
        return Cow::Borrowed(raw);
    }
    let dims: Vec<usize> = tensor.dims().iter().map(|&dim| dim as usize).collect();
    let elements = tensor.to_f64s().unwrap_or_default();
    let raw = Tensor::floats(tensor.dtype(), &dims, &elements).raw().map(|raw| raw.to_vec());
    Cow::Owned(raw.unwrap_or_default())
}

enum Unreadable {
    Io(io::Error),
    Format(String),
}

impl<T: Into<String>> From<T> for Unreadable {
    fn from(reason: T) -> Self {
        Self::Format(reason.into())
    }
}

fn decode(bytes: &Bytes, data: impl FnOnce() -> io::Result<Bytes>) -> Result<Checkpoint, Unreadable> {
    let root =
        Table::root(bytes, b"ODTC").map_err(|_| format!("it does not begin as a FlatBuffer '{IDENTIFIER}' does"))?;
    let version = root.scalar(checkpoint::VERSION)?.map_or(0, i32::from_le_bytes);
    if version != VERSION {
        return Err(format!("its version is {version}, not {VERSION}").into());
    }
    let state = root.table(checkpoint::MODULE_STATE)?.ok_or("it has no parameters")?;
    if state.flag(module_state::IS_NOMINAL)? {
        return Err("it is a nominal one, which has the names of parameters without their elements".into());
    }
    let external = state.flag(module_state::HAS_EXTERNAL_DATA)?;
    let data = external.then(data).transpose().map_err(Unreadable::Io)?;
    let mut reader = Reader { bytes, data: data.as_ref(), names: HashSet::new(), copied: 0 };
    let mut list = |field| state.tables(field)?.map(|one| reader.tensor(one?)).collect::<Result<Vec<_>, Unreadable>>();
    Ok(Checkpoint { trained: list(module_state::TRAINED)?, frozen: list(module_state::FROZEN)? })
}

struct Reader<'b> {
    bytes: &'b Bytes,
    data: Option<&'b Bytes>,
    names: HashSet<&'b str>,
    /// Bytes that were copied: in a buffer whose parts do not overlap, never more than there are.
    copied: usize,
}

impl<'b> Reader<'b> {
    fn tensor(&mut self, table: Table<'b>) -> Result<(String, Tensor), Unreadable> {
        let name = table.vector(tensor::NAME, 1)?.ok_or("a parameter has no name")?;
        let dims = table.vector(tensor::DIMS, 8)?.unwrap_or(0..0);
        self.copied += name.len() + dims.len();
        if self.copied > self.bytes.len() {
            return Err("its parts overlap".into());
        }
        let name = std::str::from_utf8(&self.bytes[name]).map_err(|_| "the name of a parameter is no text")?;
        if !self.names.insert(name) {
            return Err(format!("it has two parameters '{name}'").into());
        }
        let dims: Vec<i64> = self.bytes[dims].as_chunks().0.iter().map(|&dim| i64::from_le_bytes(dim)).collect();
        let dtype = DataType::from_code(table.scalar(tensor::DATA_TYPE)?.map_or(0, i32::from_le_bytes));
        let fault = || format!("the elements of '{name}' do not fit its type {dtype} and extents {dims:?}");
        let raw = match self.data {
            None => self.bytes.slice(table.vector(tensor::RAW_DATA, 1)?.unwrap_or(0..0)),
            Some(data) => {
                let from = table.scalar(tensor::EXTERNAL_DATA_OFFSET)?.map_or(-1, i64::from_le_bytes);
                let length = length(dtype, &dims);
                let range = usize::try_from(from).ok().zip(length).and_then(|(from, length)| {
                    let end = from.checked_add(length).filter(|&end| end <= data.len())?;
                    Some(from..end)
                });
                data.slice(range.ok_or_else(fault)?)
            }
        };
        let tensor = Tensor::from_raw(dtype, &dims, raw).ok_or_else(fault)?;
        Ok((name.into(), tensor))
    }
}

/// Bytes of so many elements.
fn length(dtype: DataType, dims: &[i64]) -> Option<usize> {
    let bits = dims.iter().try_fold(dtype.bits()?, |bits, &dim| bits.checked_mul(u64::try_from(dim).ok()?))?;
    usize::try_from(bits.div_ceil(8)).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn two() -> Checkpoint {
        Checkpoint {
            trained: vec![
                ("weight".into(), Tensor::f32s(&[2, 3], &[1.0, -2.0, 3.5, 0.0, f32::MIN_POSITIVE, 7.0])),
                ("bias".into(), Tensor::f32s(&[1], &[0.25])),
            ],
            frozen: vec![("table".into(), Tensor::floats(DataType::F64, &[2], &[1e300, -0.0]))],
        }
    }

    fn elements(checkpoint: &Checkpoint) -> Vec<(&str, &[i64], &[u8])> {
        checkpoint.parameters().map(|(name, one)| (name, one.dims(), one.raw().unwrap().as_ref())).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        for split in [false, true] {
            if split { two().write_split(&path) } else { two().write(&path) }.unwrap();
            let read = Checkpoint::read(&path).unwrap();
            assert_eq!(elements(&read), elements(&two()));
            assert_eq!((read.trained.len(), read.frozen.len()), (2, 1));
            assert_eq!(data_path(&path).exists(), split);
        }
        assert_eq!(fs::read(data_path(&path)).unwrap().len(), 24 + 4 + 16);
        Checkpoint::default().write(&path).unwrap();
        assert_eq!(Checkpoint::read(&path).unwrap(), Checkpoint::default());
    }

    /// The room that is made beforehand is enough: the buffer is never copied to a larger one.
    #[test]
    fn sizes_are_known_beforehand() {
        let many = (0..100).map(|at| (format!("p{at}"), Tensor::f32s(&[1, 1, 1, 1], &[at as f32])));
        let many = Checkpoint { trained: many.collect(), frozen: Vec::new() };
        for checkpoint in [two(), many, Checkpoint::default()] {
            let raw: usize = checkpoint.parameters().map(|(_, one)| stored(one).len()).sum();
            assert!(checkpoint.buffer(1, None).finished_data().len() <= checkpoint.tables() + raw);
        }
    }

    /// Whatever is flipped or cut off gives parameters or an error, never a panic.
    #[test]
    fn hostile_files_are_refused() {
        let good = two().buffer(1, None).finished_data().to_vec();
        let read = |bytes: Vec<u8>| match decode(&bytes.into(), || Err(io::Error::other("no data"))) {
            Ok(checkpoint) => Ok(checkpoint),
            Err(Unreadable::Io(error)) => Err(error.to_string()),
            Err(Unreadable::Format(reason)) => Err(reason),
        };
        let all = read(good.clone()).unwrap();
        let complete = (0..good.len()).filter(|&end| read(good[..end].to_vec()).is_ok_and(|read| read == all)).count();
        let refused = (0..good.len()).filter(|&end| read(good[..end].to_vec()).is_err()).count();
        // The last bytes are padding.
        assert!(complete < 8 && complete + refused == good.len());
        for at in 0..good.len() {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                let _ = read(bad);
            }
        }
        let twice = Checkpoint { frozen: two().trained, ..two() };
        assert_eq!(read(twice.buffer(1, None).finished_data().to_vec()), Err("it has two parameters 'weight'".into()));
        let elsewhere = two().buffer(1, Some(&[0, 24, 28])).finished_data().to_vec();
        assert_eq!(read(elsewhere.clone()), Err("no data".into()));
        let Err(Unreadable::Format(reason)) = decode(&elsewhere.into(), || Ok(Bytes::from(vec![0; 43]))) else {
            panic!("the last element is missing")
        };
        assert_eq!(reason, "the elements of 'table' do not fit its type f64 and extents [2]");
        assert_eq!(read(b"\x08\0\0\0ODTX".to_vec()), Err("it does not begin as a FlatBuffer 'ODTC' does".into()));
    }
}

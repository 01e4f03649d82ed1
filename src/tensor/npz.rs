//! NumPy's `.npy` and `.npz` files.
//!
//! Reads every numeric type of [`DType`] but bfloat16, which NumPy lacks, in either byte order and either axis order;
//! writes little-endian C order. Declared sizes are checked against the bytes that are there, so a damaged or hostile
//! header is an error and never an allocation. The format: <https://numpy.org/neps/nep-0001-npy-format.html>.

use std::fs::File;
use std::io::{BufReader, Read, Seek, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn, ShapeBuilder};
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

use super::{DType, Element, NamedTensors, Tensor, dispatch, dispatch_dtype};

const MAGIC: &[u8] = b"\x93NUMPY";

/// An `.npz` archive, its arrays read one at a time.
pub struct Npz<R> {
    archive: ZipArchive<R>,
    names: Vec<String>,
}

impl Npz<BufReader<File>> {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Npz::new(BufReader::new(file)).with_context(|| format!("cannot read {}", path.display()))
    }
}

impl<R: Read + Seek> Npz<R> {
    /// Reads the archive's table of contents.
    pub fn new(reader: R) -> Result<Self> {
        let archive = ZipArchive::new(reader).context("not an npz archive")?;
        let names = archive
            .file_names()
            .map(|name| name.map(|name| name.strip_suffix(".npy").unwrap_or(&name).to_owned()))
            .collect::<Result<_, _>>()
            .context("the archive has unreadable names")?;
        Ok(Npz { archive, names })
    }

    /// The arrays' names, in the order of the archive.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether there is an array of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    /// Reads one array.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let index = self.names.iter().position(|n| n == name).with_context(|| format!("there is no array `{name}`"))?;
        let mut bytes = Vec::new();
        self.archive
            .by_index(index)
            .map_err(anyhow::Error::from)
            .and_then(|mut entry| Ok(entry.read_to_end(&mut bytes)?))
            .with_context(|| format!("array `{name}` cannot be unpacked"))?;
        read_npy(&bytes).with_context(|| format!("array `{name}` is not a usable npy array"))
    }
}

/// Reads all arrays of an `.npz` file.
pub fn read_npz(path: &Path) -> Result<NamedTensors> {
    let mut npz = Npz::open(path)?;
    let names = npz.names().to_vec();
    let read = |name: String| npz.read(&name).map(|tensor| (name, tensor));
    names.into_iter().map(read).collect::<Result<_>>().with_context(|| format!("cannot read {}", path.display()))
}

/// Writes arrays as a compressed `.npz`.
pub fn write_npz<W: Write + Seek>(writer: W, tensors: &NamedTensors) -> Result<()> {
    let mut archive = ZipWriter::new(writer);
    for (name, tensor) in tensors.iter() {
        archive.start_file(format!("{name}.npy"), SimpleFileOptions::default().large_file(true))?;
        archive.write_all(&write_npy(tensor)?)?;
    }
    archive.finish()?;
    Ok(())
}

/// Reads the bytes of an `.npy` file.
pub fn read_npy(bytes: &[u8]) -> Result<Tensor> {
    let (header, data) = split_header(bytes)?;
    let header = Header::parse(header).with_context(|| format!("header {header:?}"))?;
    let count = header.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    let expected = count.and_then(|count| count.checked_mul(header.dtype.size()));
    ensure!(
        expected == Some(data.len()),
        "a {} array of shape {:?} does not have {} bytes",
        header.dtype,
        header.shape,
        data.len()
    );
    dispatch_dtype!(header.dtype, T => header.decode::<T>(data))
}

/// The bytes of an `.npy` file.
pub fn write_npy(tensor: &Tensor) -> Result<Vec<u8>> {
    let Some(descr) = descr(tensor.dtype()) else { bail!("NumPy files cannot hold {}", tensor.dtype()) };
    let dims: String = tensor.shape().iter().map(|dim| format!("{dim}, ")).collect();
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", dims.trim_end());
    // Magic, version and length take 10 bytes; NumPy pads with spaces so that the data starts on 64 bytes.
    let padding = 64 - (10 + header.len() + 1) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    let length = u16::try_from(header.len()).context("too many dimensions for an npy header")?;

    let mut bytes = Vec::with_capacity(10 + header.len() + tensor.len() * tensor.dtype().size());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[1, 0]);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(header.as_bytes());
    dispatch!(tensor, array => array.iter().for_each(|&x| x.put(&mut bytes)));
    Ok(bytes)
}

/// Splits a file into the text of its header and its data.
fn split_header(bytes: &[u8]) -> Result<(&str, &[u8])> {
    let rest = bytes.strip_prefix(MAGIC).context("the npy signature is missing")?;
    let (length, start) = match *rest {
        [1, _, a, b, ..] => (usize::from(u16::from_le_bytes([a, b])), 4),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([a, b, c, d]) as usize, 6),
        _ => bail!("the npy version is unknown or the header is cut off"),
    };
    let rest = &rest[start..];
    ensure!(length <= rest.len(), "the header is cut off");
    let (header, data) = rest.split_at(length);
    Ok((std::str::from_utf8(header).context("the header is not text")?, data))
}

/// What an npy header says.
struct Header {
    dtype: DType,
    big_endian: bool,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    /// Reads the Python dictionary that NumPy writes. Its keys are fixed and its values never nest, so each value is
    /// found by its key.
    fn parse(text: &str) -> Result<Header> {
        let value = |key: &str| {
            let (_, after) = text.split_once(&format!("'{key}':")).with_context(|| format!("there is no `{key}`"))?;
            anyhow::Ok(after.trim_start())
        };
        let descr = value("descr")?.strip_prefix('\'').and_then(|rest| rest.split_once('\''));
        let (descr, _) = descr.context("structured types are not supported")?;
        let (big_endian, code) = match descr.split_at_checked(1) {
            Some((">", code)) => (true, code),
            Some(("<" | "|" | "=", code)) => (false, code),
            _ => bail!("the type `{descr}` is not supported"),
        };
        let dtype = DType::ALL.iter().copied().find(|&dtype| self::descr(dtype).is_some_and(|d| &d[1..] == code));
        let dtype = dtype.with_context(|| format!("the type `{descr}` is not supported"))?;
        let shape = value("shape")?.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let (shape, _) = shape.context("the shape is not a tuple")?;
        let shape = shape
            .split(',')
            .map(str::trim)
            .filter(|dim| !dim.is_empty())
            .map(|dim| dim.parse().with_context(|| format!("`{dim}` is not a dimension")))
            .collect::<Result<_>>()?;
        Ok(Header { dtype, big_endian, fortran: value("fortran_order")?.starts_with("True"), shape })
    }

    fn decode<T: Scalar>(&self, data: &[u8]) -> Result<Tensor> {
        let mut bytes = data.to_vec();
        if self.big_endian {
            bytes.chunks_exact_mut(T::DTYPE.size()).for_each(<[u8]>::reverse);
        }
        let elements = bytes.chunks_exact(T::DTYPE.size()).map(T::get).collect();
        let shape = IxDyn(&self.shape).set_f(self.fortran);
        Ok(Tensor::from(ArrayD::from_shape_vec(shape, elements).context("the shape is not usable")?))
    }
}

/// NumPy's name of an element type as this module writes it.
fn descr(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F16 => "<f2",
        DType::F32 => "<f4",
        DType::F64 => "<f8",
        DType::I8 => "|i1",
        DType::I16 => "<i2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::U8 => "|u1",
        DType::U16 => "<u2",
        DType::U32 => "<u4",
        DType::U64 => "<u8",
        DType::Bool => "|b1",
        DType::Bf16 => return None,
    })
}

/// Elements as little-endian bytes.
trait Scalar: Element {
    /// Reads one element from exactly its size in bytes.
    fn get(bytes: &[u8]) -> Self;
    /// Appends one element.
    fn put(self, bytes: &mut Vec<u8>);
}

macro_rules! scalar {
    ($($type:ty),*) => {
        $(impl Scalar for $type {
            fn get(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<Self>()];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }
            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
scalar!(f16, bf16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64);

impl Scalar for bool {
    fn get(bytes: &[u8]) -> Self {
        bytes[0] != 0
    }
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.push(u8::from(self));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[1, 0]);
        bytes.extend_from_slice(&u16::try_from(header.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn every_numpy_type_survives_a_round_trip() {
        let array = ArrayD::from_shape_vec(IxDyn(&[2, 2]), vec![0.0, 1.0, 2.0, 100.0]).unwrap();
        let mut tensors = NamedTensors::default();
        for &dtype in DType::ALL.iter().filter(|&&dtype| dtype != DType::Bf16) {
            tensors.push(dtype.name(), Tensor::from_f64(dtype, &array));
        }
        tensors.push("scalar", Tensor::from_vec(&[], vec![7i64]).unwrap());
        tensors.push("empty", Tensor::from_vec(&[0, 3], Vec::<f32>::new()).unwrap());
        let mut file = Cursor::new(Vec::new());
        write_npz(&mut file, &tensors).unwrap();
        let mut npz = Npz::new(file).unwrap();
        for (name, tensor) in tensors.iter() {
            assert_eq!(&npz.read(name).unwrap(), tensor, "{name}");
        }
        assert!(npz.read("absent").is_err());
    }

    #[test]
    fn both_byte_orders_and_axis_orders_are_read() {
        let big = npy("{'descr': '>i2', 'fortran_order': True, 'shape': (2, 2), }\n", &[0, 1, 0, 2, 0, 3, 0, 4]);
        assert_eq!(read_npy(&big).unwrap(), Tensor::from_vec(&[2, 2], vec![1i16, 3, 2, 4]).unwrap());
        let half = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (1,), }\n", &[0x00, 0x3c]);
        assert_eq!(read_npy(&half).unwrap(), Tensor::from_vec(&[1], vec![f16::ONE]).unwrap());
    }

    #[test]
    fn the_data_starts_on_64_bytes() {
        let bytes = write_npy(&Tensor::from_vec(&[1], vec![1.0f32]).unwrap()).unwrap();
        assert_eq!((bytes.len() - 4) % 64, 0);
    }

    #[test]
    fn damaged_files_are_errors() {
        let huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296), }";
        let negative = "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }";
        let text = "{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }";
        let record = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }";
        for header in [huge, negative, text, record, "{}", "", "{'descr': 'é', 'fortran_order': False, 'shape': (1,)"]
        {
            assert!(read_npy(&npy(header, &[0; 4])).is_err(), "{header}");
        }
        let good = write_npy(&Tensor::from_vec(&[2], vec![1.0f32, 2.0]).unwrap()).unwrap();
        for end in 0..good.len() {
            assert!(read_npy(&good[..end]).is_err(), "cut to {end} bytes");
        }
        assert!(Npz::new(Cursor::new(b"PK\x03\x04 not a zip".to_vec())).is_err());
    }
}

//! Constant tensors and the types of values.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::onnx::{self, TensorProto};

macro_rules! data_types {
    ($($name:ident = $code:literal, $size:expr, $text:literal;)*) => {
        /// Element type of a tensor (`TensorProto.DataType` of the ONNX specification).
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum DataType { $($name),*, /// A code that this version does not know.
            Unknown(i32) }

        impl DataType {
            /// From the code that the ONNX specification gives it.
            pub fn from_code(code: i32) -> Self {
                match code { $($code => Self::$name,)* other => Self::Unknown(other) }
            }

            /// The code that the ONNX specification gives it.
            pub fn code(self) -> i32 {
                match self { $(Self::$name => $code,)* Self::Unknown(code) => code }
            }

            /// Bits of one element as stored in `raw_data`; `None` for strings and unknown types.
            pub fn bits(self) -> Option<u64> {
                match self { $(Self::$name => $size,)* Self::Unknown(_) => None }
            }
        }

        impl fmt::Display for DataType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self { $(Self::$name => f.write_str($text),)* Self::Unknown(code) => write!(f, "type#{code}") }
            }
        }
    };
}

data_types! {
    F32 = 1, Some(32), "f32"; U8 = 2, Some(8), "u8"; I8 = 3, Some(8), "i8"; U16 = 4, Some(16), "u16"; I16 = 5, Some(16), "i16";
    I32 = 6, Some(32), "i32"; I64 = 7, Some(64), "i64"; String = 8, None, "string"; Bool = 9, Some(8), "bool";
    F16 = 10, Some(16), "f16"; F64 = 11, Some(64), "f64"; U32 = 12, Some(32), "u32"; U64 = 13, Some(64), "u64";
    C64 = 14, Some(64), "c64"; C128 = 15, Some(128), "c128"; BF16 = 16, Some(16), "bf16";
    F8E4M3FN = 17, Some(8), "f8e4m3fn"; F8E4M3FNUZ = 18, Some(8), "f8e4m3fnuz"; F8E5M2 = 19, Some(8), "f8e5m2";
    F8E5M2FNUZ = 20, Some(8), "f8e5m2fnuz"; U4 = 21, Some(4), "u4"; I4 = 22, Some(4), "i4"; F4E2M1 = 23, Some(4), "f4e2m1";
    F8E8M0 = 24, Some(8), "f8e8m0"; U2 = 25, Some(2), "u2"; I2 = 26, Some(2), "i2";
}

impl DataType {
    /// Whether elements are floating-point numbers of any width.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::F64)
    }

    /// Whether elements are integers of any width.
    pub fn is_integer(self) -> bool {
        matches!(self, Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::I32 | Self::I64 | Self::U32 | Self::U64)
    }
}

/// One dimension as a file declares it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DimSpec {
    /// A fixed extent.
    Known(i64),
    /// A named extent, bound at run time (`dim_param`).
    Named(String),
    /// Nothing declared.
    Unknown,
}

/// Element type and shape of a tensor value as a file declares them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorType {
    /// Element type.
    pub dtype: DataType,
    /// Extents, or `None` where even the rank is undeclared.
    pub dims: Option<Vec<DimSpec>>,
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        let Some(dims) = &self.dims else { return write!(f, "[..]") };
        let texts: Vec<String> = dims
            .iter()
            .map(|dim| match dim {
                DimSpec::Known(n) => n.to_string(),
                DimSpec::Named(name) => name.clone(),
                DimSpec::Unknown => "?".into(),
            })
            .collect();
        write!(f, "[{}]", texts.join(","))
    }
}

/// A constant tensor. Cheap to clone: the elements are shared, and those of a file stay in its memory map.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    /// The message as read or built; `name` is owned by the value that holds the tensor.
    pub(crate) proto: Arc<TensorProto>,
    /// Elements of a tensor that is stored in an external file.
    pub(crate) external: Option<Bytes>,
}

impl Tensor {
    fn new(dtype: DataType, dims: &[usize], raw: Vec<u8>) -> Self {
        let proto = TensorProto {
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(dtype.code()),
            raw_data: Some(raw.into()),
            ..Default::default()
        };
        Self { proto: Arc::new(proto), external: None }
    }

    /// A tensor of little-endian elements, which are shared; none where these are not as many bytes as `dims` ask for.
    pub fn from_raw(dtype: DataType, dims: &[i64], raw: Bytes) -> Option<Self> {
        let len = dims.iter().try_fold(1u64, |len, &dim| len.checked_mul(u64::try_from(dim).ok()?))?;
        if len.checked_mul(dtype.bits()?)?.div_ceil(8) != raw.len() as u64 {
            return None;
        }
        let proto = TensorProto {
            dims: dims.to_vec(),
            data_type: Some(dtype.code()),
            raw_data: Some(raw),
            ..Default::default()
        };
        Some(Self { proto: Arc::new(proto), external: None })
    }

    /// A tensor of 64-bit integers; `dims` must multiply to `elements.len()`.
    pub fn i64s(dims: &[usize], elements: &[i64]) -> Self {
        assert_eq!(dims.iter().product::<usize>(), elements.len());
        Self::new(DataType::I64, dims, elements.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// A 1-D tensor of 64-bit integers, as shape and axes inputs want it.
    pub fn shape(elements: &[i64]) -> Self {
        Self::i64s(&[elements.len()], elements)
    }

    /// A 0-D 64-bit integer.
    pub fn i64(element: i64) -> Self {
        Self::i64s(&[], &[element])
    }

    /// A tensor of 32-bit floats; `dims` must multiply to `elements.len()`.
    pub fn f32s(dims: &[usize], elements: &[f32]) -> Self {
        assert_eq!(dims.iter().product::<usize>(), elements.len());
        Self::new(DataType::F32, dims, elements.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// A 0-D 32-bit float.
    pub fn f32(element: f32) -> Self {
        Self::f32s(&[], &[element])
    }

    /// A tensor of floats of type `dtype` (`F32`, `F16`, `BF16` or `F64`), rounded to nearest.
    pub fn floats(dtype: DataType, dims: &[usize], elements: &[f64]) -> Self {
        assert_eq!(dims.iter().product::<usize>(), elements.len());
        let raw = match dtype {
            DataType::F16 => elements.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes()).collect(),
            DataType::BF16 => elements.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect(),
            DataType::F64 => elements.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DataType::F32 => elements.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
            other => panic!("{other} is no float type"),
        };
        Self::new(dtype, dims, raw)
    }

    /// A tensor of integers or booleans of type `dtype`, which must be able to hold the elements.
    pub fn integers(dtype: DataType, dims: &[usize], elements: &[i64]) -> Self {
        assert_eq!(dims.iter().product::<usize>(), elements.len());
        let bytes = dtype.bits().unwrap_or(64).div_ceil(8) as usize;
        Self::new(dtype, dims, elements.iter().flat_map(|x| x.to_le_bytes()[..bytes].to_vec()).collect())
    }

    /// Element type.
    pub fn dtype(&self) -> DataType {
        DataType::from_code(self.proto.data_type.unwrap_or(0))
    }

    /// Extents. The decoder has checked that they are not negative and do not overflow.
    pub fn dims(&self) -> &[i64] {
        &self.proto.dims
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.proto.dims.iter().product::<i64>() as usize
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Declared type.
    pub fn ty(&self) -> TensorType {
        TensorType { dtype: self.dtype(), dims: Some(self.dims().iter().map(|&d| DimSpec::Known(d)).collect()) }
    }

    /// Little-endian elements, where the tensor stores them so (in the file or outside).
    pub fn raw(&self) -> Option<&Bytes> {
        self.external.as_ref().or(self.proto.raw_data.as_ref())
    }

    /// Location of the external file that holds the elements, relative to the model's folder.
    pub fn external_location(&self) -> Option<&str> {
        onnx::external_location(&self.proto)
    }

    /// The elements as 64-bit integers; `None` for types that are no integers or booleans.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn read<const N: usize>(raw: &[u8], get: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            raw.as_chunks::<N>().0.iter().map(|&chunk| get(chunk)).collect()
        }
        if let Some(raw) = self.raw() {
            return Some(match self.dtype() {
                DataType::I64 => read(raw, i64::from_le_bytes),
                DataType::I32 => read(raw, |b| i32::from_le_bytes(b).into()),
                DataType::I16 => read(raw, |b| i16::from_le_bytes(b).into()),
                DataType::I8 => read(raw, |b| i8::from_le_bytes(b).into()),
                DataType::U32 => read(raw, |b| u32::from_le_bytes(b).into()),
                DataType::U16 => read(raw, |b| u16::from_le_bytes(b).into()),
                DataType::U8 | DataType::Bool => read(raw, |b: [u8; 1]| b[0].into()),
                DataType::U64 => read(raw, |b| u64::from_le_bytes(b) as i64),
                _ => return None,
            });
        }
        match self.dtype() {
            DataType::I64 => Some(self.proto.int64_data.clone()),
            DataType::I32 | DataType::I16 | DataType::I8 | DataType::U16 | DataType::U8 | DataType::Bool => {
                Some(self.proto.int32_data.iter().map(|&x| x.into()).collect())
            }
            DataType::U32 | DataType::U64 => Some(self.proto.uint64_data.iter().map(|&x| x as i64).collect()),
            _ => None,
        }
    }

    /// The elements as 64-bit floats; `None` for types that are no floats.
    pub fn to_f64s(&self) -> Option<Cow<'_, [f64]>> {
        fn read<const N: usize>(raw: &[u8], get: impl Fn([u8; N]) -> f64) -> Cow<'static, [f64]> {
            raw.as_chunks::<N>().0.iter().map(|&chunk| get(chunk)).collect()
        }
        if let Some(raw) = self.raw() {
            return Some(match self.dtype() {
                DataType::F32 => read(raw, |b| f32::from_le_bytes(b).into()),
                DataType::F16 => read(raw, |b| half::f16::from_le_bytes(b).into()),
                DataType::BF16 => read(raw, |b| half::bf16::from_le_bytes(b).into()),
                DataType::F64 => read(raw, f64::from_le_bytes),
                _ => return None,
            });
        }
        match self.dtype() {
            DataType::F32 => Some(self.proto.float_data.iter().map(|&x| x.into()).collect()),
            DataType::F64 => Some(Cow::Borrowed(&self.proto.double_data)),
            DataType::F16 => {
                Some(self.proto.int32_data.iter().map(|&x| half::f16::from_bits(x as u16).into()).collect())
            }
            DataType::BF16 => {
                Some(self.proto.int32_data.iter().map(|&x| half::bf16::from_bits(x as u16).into()).collect())
            }
            _ => None,
        }
    }

    /// The one value that all elements have, if they are numbers and all alike. Empty tensors have none, nor do NaNs.
    pub fn uniform(&self) -> Option<f64> {
        let number = |tensor: &Self| match tensor.to_f64s() {
            Some(floats) => floats.first().copied(),
            None => tensor.to_i64s()?.first().map(|&x| x as f64),
        };
        if let Some(raw) = self.raw() {
            // The bytes are compared as they are: weights are large, and two elements settle most of them.
            let size = usize::try_from(self.dtype().bits()? / 8).ok().filter(|&size| size > 0)?;
            let (first, rest) = raw.split_at_checked(size)?;
            let alike = rest.chunks_exact(size).all(|element| element == first);
            let one = Self::new(self.dtype(), &[], first.to_vec());
            return alike.then(|| number(&one)).flatten().filter(|x| !x.is_nan());
        }
        match self.to_f64s() {
            Some(floats) => floats.iter().all(|x| *x == floats[0]).then(|| number(self)).flatten(),
            None => {
                let integers = self.to_i64s()?;
                integers.iter().all(|x| *x == integers[0]).then(|| number(self)).flatten()
            }
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({})", self.ty())
    }
}

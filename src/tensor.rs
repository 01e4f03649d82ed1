//! Tensors of every element type that a model feeds or returns.
//!
//! A [`Tensor`] is an [`ndarray::ArrayD`] with its element type known at run time. Arrays are always kept in C order,
//! so that a runtime can borrow them without copying. [`npz`] reads and writes them as NumPy files, [`compare`]
//! measures how far two of them are apart.

pub mod compare;
pub mod npz;

use std::fmt;

use anyhow::{Result, bail, ensure};
use half::{bf16, f16};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

/// A Rust type that can be an element of a [`Tensor`].
pub trait Element: Copy + fmt::Debug + 'static {
    /// The element type as a value.
    const DTYPE: DType;
    /// Wraps an array in C order.
    fn wrap(array: ArrayD<Self>) -> Tensor;
    /// The array of a tensor of this element type.
    fn view(tensor: &Tensor) -> Option<&ArrayD<Self>>;
    /// The nearest double.
    fn to_f64(self) -> f64;
    /// The nearest element; integers round and saturate.
    fn from_f64(value: f64) -> Self;
}

/// Calls a macro with the table of element types: variant, Rust type, ONNX and NumPy name, size in bytes, conversions.
macro_rules! with_element_types {
    ($callback:ident) => {
        $callback! {
            (F16, f16, "float16", 2, |x| x.to_f64(), |x| f16::from_f64(x));
            (Bf16, bf16, "bfloat16", 2, |x| x.to_f64(), |x| bf16::from_f64(x));
            (F32, f32, "float32", 4, |x| f64::from(x), |x| x as f32);
            (F64, f64, "float64", 8, |x| x, |x| x);
            (I8, i8, "int8", 1, |x| f64::from(x), |x| x.round() as i8);
            (I16, i16, "int16", 2, |x| f64::from(x), |x| x.round() as i16);
            (I32, i32, "int32", 4, |x| f64::from(x), |x| x.round() as i32);
            (I64, i64, "int64", 8, |x| x as f64, |x| x.round() as i64);
            (U8, u8, "uint8", 1, |x| f64::from(x), |x| x.round() as u8);
            (U16, u16, "uint16", 2, |x| f64::from(x), |x| x.round() as u16);
            (U32, u32, "uint32", 4, |x| f64::from(x), |x| x.round() as u32);
            (U64, u64, "uint64", 8, |x| x as f64, |x| x.round() as u64);
            (Bool, bool, "bool", 1, |x| f64::from(u8::from(x)), |x| x != 0.0);
        }
    };
}

macro_rules! define {
    ($(($variant:ident, $type:ty, $name:literal, $size:literal, |$to:ident| $to_body:expr, |$from:ident| $from_body:expr);)*) => {
        /// An element type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum DType {
            $(#[doc = $name] $variant,)*
        }

        /// An array in C order whose element type is known at run time.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Tensor {
            $(#[doc = concat!("Elements of type ", $name, ".")] $variant(ArrayD<$type>),)*
        }

        impl DType {
            /// Every element type.
            pub const ALL: &'static [DType] = &[$(DType::$variant),*];

            /// The name that ONNX and NumPy use, such as `float32`.
            pub fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }

            /// Bytes per element.
            pub fn size(self) -> usize {
                match self { $(DType::$variant => $size,)* }
            }
        }

        $(impl Element for $type {
            const DTYPE: DType = DType::$variant;
            fn wrap(array: ArrayD<Self>) -> Tensor { Tensor::$variant(array) }
            fn view(tensor: &Tensor) -> Option<&ArrayD<Self>> {
                match tensor { Tensor::$variant(array) => Some(array), _ => None }
            }
            fn to_f64(self) -> f64 { let $to = self; $to_body }
            fn from_f64(value: f64) -> Self { let $from = value; $from_body }
        })*
    };
}
with_element_types!(define);

/// Evaluates an expression with `$array` bound to the typed array inside a tensor.
macro_rules! dispatch {
    ($tensor:expr, $array:ident => $body:expr) => {
        match $tensor {
            $crate::tensor::Tensor::F16($array) => $body,
            $crate::tensor::Tensor::Bf16($array) => $body,
            $crate::tensor::Tensor::F32($array) => $body,
            $crate::tensor::Tensor::F64($array) => $body,
            $crate::tensor::Tensor::I8($array) => $body,
            $crate::tensor::Tensor::I16($array) => $body,
            $crate::tensor::Tensor::I32($array) => $body,
            $crate::tensor::Tensor::I64($array) => $body,
            $crate::tensor::Tensor::U8($array) => $body,
            $crate::tensor::Tensor::U16($array) => $body,
            $crate::tensor::Tensor::U32($array) => $body,
            $crate::tensor::Tensor::U64($array) => $body,
            $crate::tensor::Tensor::Bool($array) => $body,
        }
    };
}
pub(crate) use dispatch;

/// Evaluates an expression with `$type` standing for the Rust type of a [`DType`].
macro_rules! dispatch_dtype {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F16 => {
                type $type = half::f16;
                $body
            }
            $crate::tensor::DType::Bf16 => {
                type $type = half::bf16;
                $body
            }
            $crate::tensor::DType::F32 => {
                type $type = f32;
                $body
            }
            $crate::tensor::DType::F64 => {
                type $type = f64;
                $body
            }
            $crate::tensor::DType::I8 => {
                type $type = i8;
                $body
            }
            $crate::tensor::DType::I16 => {
                type $type = i16;
                $body
            }
            $crate::tensor::DType::I32 => {
                type $type = i32;
                $body
            }
            $crate::tensor::DType::I64 => {
                type $type = i64;
                $body
            }
            $crate::tensor::DType::U8 => {
                type $type = u8;
                $body
            }
            $crate::tensor::DType::U16 => {
                type $type = u16;
                $body
            }
            $crate::tensor::DType::U32 => {
                type $type = u32;
                $body
            }
            $crate::tensor::DType::U64 => {
                type $type = u64;
                $body
            }
            $crate::tensor::DType::Bool => {
                type $type = bool;
                $body
            }
        }
    };
}
pub(crate) use dispatch_dtype;

impl DType {
    /// Whether the type has fractions, infinities and NaN.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::Bf16 | DType::F32 | DType::F64)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl<T: Element> From<ArrayD<T>> for Tensor {
    fn from(array: ArrayD<T>) -> Self {
        let array = if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned() };
        T::wrap(array)
    }
}

impl Tensor {
    /// A tensor from its shape and elements in C order.
    pub fn from_vec<T: Element>(shape: &[usize], data: Vec<T>) -> Result<Tensor> {
        let count = data.len();
        match ArrayD::from_shape_vec(IxDyn(shape), data) {
            Ok(array) => Ok(T::wrap(array)),
            Err(_) => bail!("{count} elements do not fill the shape {shape:?}"),
        }
    }

    /// Doubles converted to `dtype`.
    pub fn from_f64(dtype: DType, array: &ArrayD<f64>) -> Tensor {
        dispatch_dtype!(dtype, T => Tensor::from(array.mapv(<T as Element>::from_f64)))
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        fn of<T: Element>(_: &ArrayD<T>) -> DType {
            T::DTYPE
        }
        dispatch!(self, array => of(array))
    }

    /// The extent of each axis.
    pub fn shape(&self) -> &[usize] {
        dispatch!(self, array => array.shape())
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        dispatch!(self, array => array.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The typed array, if the elements are of type `T`.
    pub fn view<T: Element>(&self) -> Option<&ArrayD<T>> {
        T::view(self)
    }

    /// The elements as doubles.
    pub fn to_f64(&self) -> ArrayD<f64> {
        dispatch!(self, array => array.mapv(Element::to_f64))
    }

    /// Entries `start..end` of the first axis.
    pub fn rows(&self, start: usize, end: usize) -> Result<Tensor> {
        let Some(&rows) = self.shape().first() else { bail!("a scalar has no rows") };
        ensure!(start <= end && end <= rows, "rows {start}..{end} of {rows} do not exist");
        Ok(dispatch!(self, array => Tensor::from(array.slice_axis(Axis(0), Slice::from(start..end)).to_owned())))
    }
}

/// Tensors by name, in order: what a model is fed or returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NamedTensors(Vec<(String, Tensor)>);

impl NamedTensors {
    /// The tensor of a name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, tensor)| tensor)
    }

    /// Adds a tensor; the first of a name counts.
    pub fn push(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.0.push((name.into(), tensor));
    }

    /// Names and tensors, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, Tensor)> for NamedTensors {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        NamedTensors(iter.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_round_and_saturate() {
        let array = ArrayD::from_shape_vec(IxDyn(&[3]), vec![-1.6, 0.0, 300.4]).unwrap();
        assert_eq!(Tensor::from_f64(DType::U8, &array), Tensor::from_vec(&[3], vec![0u8, 0, 255]).unwrap());
        assert_eq!(Tensor::from_f64(DType::I32, &array), Tensor::from_vec(&[3], vec![-2i32, 0, 300]).unwrap());
        assert_eq!(Tensor::from_f64(DType::Bool, &array), Tensor::from_vec(&[3], vec![true, false, true]).unwrap());
        for &dtype in DType::ALL {
            assert_eq!(Tensor::from_f64(dtype, &array).dtype(), dtype);
        }
    }

    #[test]
    fn arrays_are_kept_in_c_order() {
        let array = ArrayD::from_shape_vec(IxDyn(&[2, 3]), (0..6).collect::<Vec<i32>>()).unwrap();
        let tensor = Tensor::from(array.reversed_axes());
        assert_eq!(tensor, Tensor::from_vec(&[3, 2], vec![0, 3, 1, 4, 2, 5]).unwrap());
        assert!(tensor.view::<i32>().unwrap().is_standard_layout());
    }

    #[test]
    fn rows_are_checked() {
        let tensor = Tensor::from_vec(&[3, 2], vec![0, 3, 1, 4, 2, 5]).unwrap();
        assert_eq!(tensor.rows(1, 2).unwrap(), Tensor::from_vec(&[1, 2], vec![1, 4]).unwrap());
        assert!(tensor.rows(2, 4).is_err());
        assert!(Tensor::from_vec(&[], vec![1.0f32]).unwrap().rows(0, 1).is_err());
    }
}

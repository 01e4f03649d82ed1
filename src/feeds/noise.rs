//! Noise: feeds for a model of which nothing is known but its inputs.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use crate::runtime::{Dim, Feeds, Port};
use crate::tensor::{DType, Tensor};

/// How to make noise, and the sizes that a model leaves open.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct NoiseArgs {
    /// Seed of the noise that is fed without --input
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Size of a dimension that the model leaves open, by its name, or as INPUT:AXIS if it has none; repeatable
    #[arg(long = "dim", value_name = "NAME=SIZE")]
    pub dims: Vec<DimSize>,
}

/// A size for a dimension, written `height=224`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DimSize {
    /// The dimension's name, or `input:axis`.
    pub name: String,
    /// Its size.
    pub size: usize,
}

impl FromStr for DimSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, size) = text.rsplit_once('=').ok_or("write NAME=SIZE, such as height=224")?;
        match size.trim().parse() {
            Ok(size) if size > 0 => Ok(DimSize { name: name.trim().to_owned(), size }),
            _ => Err(format!("`{size}` is not a size")),
        }
    }
}

impl NoiseArgs {
    /// The size of an axis other than the batch, if it is declared or given.
    pub fn size(&self, port: &Port, axis: usize) -> Option<usize> {
        let given = |name: &str| self.dims.iter().find(|dim| dim.name == name).map(|dim| dim.size);
        match port.dims.as_ref()?.get(axis)? {
            Dim::Fixed(size) => Some(*size),
            Dim::Symbol(name) => given(name).or_else(|| given(&format!("{}:{axis}", port.name))),
            Dim::Unknown => given(&format!("{}:{axis}", port.name)),
        }
    }

    /// Refuses sizes for dimensions that no input leaves open.
    pub fn check(&self, inputs: &[Port]) -> Result<()> {
        for DimSize { name, .. } in &self.dims {
            let open = |port: &Port| {
                let dims = port.dims.iter().flatten().enumerate();
                dims.filter(|(_, dim)| !matches!(dim, Dim::Fixed(_))).any(|(axis, dim)| {
                    matches!(dim, Dim::Symbol(symbol) if symbol == name) || *name == format!("{}:{axis}", port.name)
                })
            };
            ensure!(inputs.iter().any(open), "--dim {name}: no input leaves a dimension of this name open");
        }
        Ok(())
    }

    /// The shape of an input at a batch size.
    pub fn shape(&self, port: &Port, batch: usize) -> Result<Vec<usize>> {
        let dims = port.dims.as_ref().with_context(|| format!("the input {port} does not say how many axes it has"))?;
        let shape = dims.iter().enumerate().map(|(axis, dim)| match self.size(port, axis) {
            Some(size) => Ok(size),
            None if axis == 0 || (*dim == dims[0] && matches!(dim, Dim::Symbol(_))) => Ok(batch),
            None => match dim {
                Dim::Symbol(name) => bail!("the input {port} leaves `{name}` open; give it with --dim {name}=SIZE"),
                _ => bail!("the input {port} leaves axis {axis} open; give it with --dim {}:{axis}=SIZE", port.name),
            },
        });
        shape.collect()
    }
}

/// A source of noise. Its numbers come from integer arithmetic alone, so they are the same on every machine.
pub struct Noise(u64);

impl Noise {
    /// The noise of a seed.
    pub fn new(seed: u64) -> Self {
        Noise(seed)
    }

    /// A tensor for each input: normal for floating point, uniform bytes, and zero for anything else, whose meaning is
    /// unknown.
    pub fn feeds(&mut self, inputs: &[Port], batch: usize, args: &NoiseArgs) -> Result<Feeds> {
        inputs.iter().map(|port| Ok((port.name.clone(), self.tensor(port.dtype, &args.shape(port, batch)?)?))).collect()
    }

    fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let count = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let count = count.filter(|&count| count <= isize::MAX as usize / 8).context("an input would be too large")?;
        let sample: fn(&mut Self) -> f64 = match dtype {
            dtype if dtype.is_float() => Self::normal,
            DType::U8 => |noise| (noise.next() >> 56) as f64,
            _ => |_| 0.0,
        };
        let values = (0..count).map(|_| sample(self)).collect();
        let array = ndarray::ArrayD::from_shape_vec(shape, values)?;
        Ok(Tensor::from_f64(dtype, &array))
    }

    /// The SplitMix64 generator.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal, of mean 0 and variance 1: twelve uniform 16-bit numbers added up.
    fn normal(&mut self) -> f64 {
        let sum: u64 =
            (0..3).map(|_| self.next()).flat_map(|word| (0..4).map(move |part| (word >> (16 * part)) & 0xffff)).sum();
        sum as f64 / 65_536.0 - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, dtype: DType, dims: &[Dim]) -> Port {
        Port { name: name.into(), dtype, dims: Some(dims.to_vec()) }
    }

    fn symbol(name: &str) -> Dim {
        Dim::Symbol(name.into())
    }

    fn dims(given: &[&str]) -> NoiseArgs {
        NoiseArgs { seed: 0, dims: given.iter().map(|dim| dim.parse().unwrap()).collect() }
    }

    #[test]
    fn sizes_are_parsed() {
        assert_eq!("height=224".parse(), Ok(DimSize { name: "height".into(), size: 224 }));
        assert_eq!("a=b=2".parse(), Ok(DimSize { name: "a=b".into(), size: 2 }));
        for bad in ["height", "height=", "height=-1", "height=0", "=x"] {
            assert!(bad.parse::<DimSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn open_dimensions_are_resolved() {
        let image = port("x", DType::F32, &[symbol("n"), Dim::Fixed(3), symbol("h"), Dim::Unknown]);
        assert_eq!(dims(&["h=8", "x:3=4"]).shape(&image, 2).unwrap(), [2, 3, 8, 4]);
        assert_eq!(dims(&["h=8", "x:3=4", "n=5"]).shape(&image, 2).unwrap(), [5, 3, 8, 4]);
        assert!(dims(&["x:3=4"]).shape(&image, 2).unwrap_err().to_string().contains("--dim h=SIZE"));
        assert!(dims(&["h=8"]).shape(&image, 2).unwrap_err().to_string().contains("--dim x:3=SIZE"));
        let twice = port("m", DType::F32, &[symbol("n"), symbol("n")]);
        assert_eq!(dims(&[]).shape(&twice, 2).unwrap(), [2, 2]);
        assert!(dims(&["h=8", "w=8"]).check(std::slice::from_ref(&image)).is_err());
        assert!(dims(&["h=8", "x:3=4"]).check(&[image]).is_ok());
    }

    #[test]
    fn noise_is_reproducible_and_normal() {
        let inputs = [port("x", DType::F32, &[symbol("n"), Dim::Fixed(10_000)])];
        let make = |seed| Noise::new(seed).feeds(&inputs, 1, &dims(&[])).unwrap().get("x").unwrap().clone();
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
        let values = make(0).to_f64();
        assert!(values.mean().unwrap().abs() < 0.03 && (values.std(0.0) - 1.0).abs() < 0.03);
        // SplitMix64's published sequence for seed 0, in parts of 16 bits.
        let parts = [0xe220, 0xa839, 0x7b1d, 0xcdaf, 0x6e78, 0x9e6a, 0xa1b9, 0x65f4, 0x06c4, 0x5d18, 0x8009, 0x454f];
        let first = parts.iter().sum::<u32>() as f32 / 65_536.0 - 6.0;
        assert_eq!(make(0).view::<f32>().unwrap()[[0, 0]], first);
    }

    #[test]
    fn types_without_known_meaning_are_zero() {
        let inputs = [port("i", DType::I64, &[symbol("n")]), port("u", DType::U8, &[symbol("n"), Dim::Fixed(64)])];
        let feeds = Noise::new(0).feeds(&inputs, 2, &dims(&[])).unwrap();
        assert_eq!(feeds.get("i"), Some(&Tensor::from_vec(&[2], vec![0i64, 0]).unwrap()));
        assert!(feeds.get("u").unwrap().to_f64().iter().any(|&byte| byte > 128.0));
    }
}

//! Pictures as feeds.
//!
//! Every picture goes through the same steps:
//!
//! 1. resize, bilinear with antialiasing: to `--size`, else as little as covers the crop;
//! 2. crop the centre to `--crop`, else to the model's height and width, else to an exact `--size`;
//! 3. (pixel · `--scale` − `--mean`) / `--std` for each channel;
//! 4. lay out as the model wants it.
//!
//! The number of channels and the layout follow from the model's input if it declares them. Scale, mean and standard
//! deviation default to 1/255 and ImageNet's for three channels, to 1/255, 0 and 1 for others, and to 1, 0 and 1 for a
//! model that takes integers.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use image::imageops::FilterType;
use image::{DynamicImage, GrayImage, ImageReader, RgbImage, RgbaImage};
use ndarray::{ArrayD, Axis, Slice};

use super::noise::NoiseArgs;
use crate::runtime::{Dim, Feeds, Port};
use crate::tensor::Tensor;

/// How to prepare pictures.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Pictures")]
pub struct ImageArgs {
    /// Resize the shorter side to N, or to exactly HxW [default: as little as covers the crop]
    #[arg(long, value_name = "N|HxW")]
    pub size: Option<Size>,
    /// Crop the centre to N by N, or to HxW [default: the model's height and width]
    #[arg(long, value_name = "N|HxW")]
    pub crop: Option<Size>,
    /// Mean to subtract after scaling, one or one per channel [default: ImageNet's for three channels, else 0]
    #[arg(long, value_name = "LIST", value_delimiter = ',', allow_hyphen_values = true)]
    pub mean: Vec<f64>,
    /// Standard deviation to divide by, one or one per channel [default: ImageNet's for three channels, else 1]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub std: Vec<f64>,
    /// Factor for pixels, which are 0 to 255 [default: 1/255]
    #[arg(long, value_name = "X|X/Y")]
    pub scale: Option<Scale>,
    /// Order of the input's axes [default: by where the model declares its channels]
    #[arg(long, value_enum)]
    pub layout: Option<Layout>,
    /// Channels: 1 grey, 3 RGB, 4 RGBA [default: as the model declares, else 3]
    #[arg(long, value_name = "N")]
    pub channels: Option<usize>,
}

/// The size of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// One number.
    Side(u32),
    /// Height and width.
    Exact(u32, u32),
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse() {
            Ok(number @ 1..=65_535) => Ok(number),
            _ => Err(format!("`{text}` is not a size in pixels")),
        };
        match text.split_once(['x', 'X', '×']) {
            Some((height, width)) => Ok(Size::Exact(number(height)?, number(width)?)),
            None => Ok(Size::Side(number(text)?)),
        }
    }
}

/// A factor, which may be written as a fraction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale(pub f64);

impl FromStr for Scale {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<f64>().map_err(|_| format!("`{text}` is not a number"));
        let scale = match text.split_once('/') {
            Some((above, below)) => number(above)? / number(below)?,
            None => number(text)?,
        };
        if scale.is_finite() { Ok(Scale(scale)) } else { Err(format!("`{text}` is not a finite number")) }
    }
}

/// The order of an input's axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// Batch, channels, height, width.
    Nchw,
    /// Batch, height, width, channels.
    Nhwc,
}

/// The normalisation that comes with a set of pictures; options on the command line override it.
#[derive(Clone, Debug, Default)]
pub struct Normalisation {
    /// Mean per channel.
    pub mean: Option<Vec<f64>>,
    /// Standard deviation per channel.
    pub std: Option<Vec<f64>>,
}

/// Pictures in memory or on disk.
pub enum Pictures {
    /// Files.
    Files(Vec<PathBuf>),
    /// An array [N, C, H, W].
    Array(ArrayD<u8>),
}

impl Pictures {
    /// The PNG and JPEG files in a folder, in the order of their names.
    pub fn folder(path: &Path) -> Result<Self> {
        let entries = path.read_dir().with_context(|| format!("cannot list {}", path.display()))?;
        let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|file| {
            let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            ["png", "jpg", "jpeg"].iter().any(|known| extension.eq_ignore_ascii_case(known))
        });
        files.sort();
        ensure!(!files.is_empty(), "there are no PNG or JPEG files");
        Ok(Pictures::Files(files))
    }

    /// The pictures of a uint8 tensor [N, C, H, W], or [N, H, W] for grey ones.
    pub fn array(tensor: Tensor) -> Result<Self> {
        let Tensor::U8(mut array) = tensor else { bail!("`images` must be uint8, not {}", tensor.dtype()) };
        if array.ndim() == 3 {
            array.insert_axis_inplace(Axis(1));
        }
        match *array.shape() {
            [_, 1 | 3 | 4, height, width] if (1..=65_535).contains(&height) && (1..=65_535).contains(&width) => {
                Ok(Pictures::Array(array))
            }
            ref shape => bail!("`images` must be [N, C, H, W] with 1, 3 or 4 channels, not {shape:?}"),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Pictures::Files(files) => files.len(),
            Pictures::Array(array) => array.shape()[0],
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn get(&self, index: usize) -> Result<DynamicImage> {
        match self {
            Pictures::Files(files) => {
                let path = &files[index];
                let read = || anyhow::Ok(ImageReader::open(path)?.with_guessed_format()?.decode()?);
                read().with_context(|| format!("cannot read {}", path.display()))
            }
            Pictures::Array(array) => {
                let picture = array.index_axis(Axis(0), index).permuted_axes(vec![1, 2, 0]);
                let (height, width) = (picture.shape()[0] as u32, picture.shape()[1] as u32);
                let (channels, pixels) = (picture.shape()[2], picture.iter().copied().collect());
                let image = match channels {
                    1 => GrayImage::from_raw(width, height, pixels).map(DynamicImage::from),
                    3 => RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
                    _ => RgbaImage::from_raw(width, height, pixels).map(DynamicImage::from),
                };
                image.context("the picture is damaged")
            }
        }
    }
}

/// The steps from a picture to a model's input, with everything decided.
#[derive(Clone, Debug)]
pub struct Preparation {
    port: Port,
    layout: Layout,
    channels: usize,
    size: Option<Size>,
    /// Height and width after cropping.
    crop: (u32, u32),
    scale: f64,
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl Preparation {
    /// Decides on the steps for the only input of a model.
    pub fn new(args: &ImageArgs, sizes: &NoiseArgs, recorded: &Normalisation, inputs: &[Port]) -> Result<Self> {
        let [port] = inputs else { bail!("pictures can feed a model of one input; this one has {}", inputs.len()) };
        sizes.check(inputs)?;
        let dims = port.dims.as_deref().unwrap_or(&[Dim::Unknown, Dim::Unknown, Dim::Unknown, Dim::Unknown]);
        ensure!(dims.len() == 4, "pictures can feed an input of four axes, not {port}");
        let looks_like_channels = |axis: usize| matches!(sizes.size(port, axis), Some(1 | 3 | 4));
        let layout = args.layout.unwrap_or(match looks_like_channels(3) && !looks_like_channels(1) {
            true => Layout::Nhwc,
            false => Layout::Nchw,
        });
        let (channel_axis, height_axis) = if layout == Layout::Nchw { (1, 2) } else { (3, 1) };
        let channels = args.channels.or(sizes.size(port, channel_axis)).unwrap_or(3);
        ensure!(matches!(channels, 1 | 3 | 4), "pictures have 1, 3 or 4 channels, not {channels}");

        let declared = sizes.size(port, height_axis).zip(sizes.size(port, height_axis + 1));
        let crop = match (args.crop, declared, args.size) {
            (Some(Size::Side(side)), _, _) => (side, side),
            (Some(Size::Exact(height, width)), _, _) => (height, width),
            (None, Some((height, width)), _) => (u32::try_from(height)?, u32::try_from(width)?),
            (None, None, Some(Size::Exact(height, width))) => (height, width),
            _ => bail!("the input {port} leaves height and width open; give them with --crop"),
        };
        let (mean, std) = match channels {
            _ if !port.dtype.is_float() => (vec![0.0], vec![1.0]),
            3 => (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]),
            _ => (vec![0.0], vec![1.0]),
        };
        let choose = |name: &str, given: &[f64], recorded: &Option<Vec<f64>>, default: Vec<f64>| {
            let list = match (given, recorded) {
                ([], Some(recorded)) => recorded.clone(),
                ([], None) => default,
                (given, _) => given.to_vec(),
            };
            match list.len() {
                1 => Ok(vec![list[0]; channels]),
                count if count == channels => Ok(list),
                count => bail!("{name} has {count} values for {channels} channels"),
            }
        };
        let std = choose("std", &args.std, &recorded.std, std)?;
        ensure!(std.iter().all(|&std| std != 0.0), "std must not be 0");
        let scale = args.scale.map_or(if port.dtype.is_float() { 1.0 / 255.0 } else { 1.0 }, |scale| scale.0);
        let mean = choose("mean", &args.mean, &recorded.mean, mean)?;
        Ok(Preparation { port: port.clone(), layout, channels, size: args.size, crop, scale, mean, std })
    }

    /// Prepares some of the pictures as one batch.
    pub fn batch(&self, pictures: &Pictures, range: Range<usize>) -> Result<Feeds> {
        let (height, width) = (self.crop.0 as usize, self.crop.1 as usize);
        let mut batch = ArrayD::zeros(vec![range.len(), height, width, self.channels]);
        for (row, index) in range.enumerate() {
            let pixels = self.pixels(pictures.get(index)?).with_context(|| format!("picture {index}"))?;
            let values = pixels.iter().enumerate().map(|(at, &pixel)| {
                let channel = at % self.channels;
                (f64::from(pixel) * self.scale - self.mean[channel]) / self.std[channel]
            });
            let mut target = batch.slice_axis_mut(Axis(0), Slice::from(row..row + 1));
            target.iter_mut().zip(values).for_each(|(target, value)| *target = value);
        }
        if self.layout == Layout::Nchw {
            batch = batch.permuted_axes(vec![0, 3, 1, 2]);
        }
        Ok(Feeds::from_iter([(self.port.name.clone(), Tensor::from_f64(self.port.dtype, &batch))]))
    }

    /// The resized and cropped pixels, channels last.
    fn pixels(&self, picture: DynamicImage) -> Result<Vec<u8>> {
        // In the final number of channels first, so that all of them are resized alike.
        let picture = match self.channels {
            1 => DynamicImage::from(picture.into_luma8()),
            3 => DynamicImage::from(picture.into_rgb8()),
            _ => DynamicImage::from(picture.into_rgba8()),
        };
        let (height, width) = resized(self.size, self.crop, (picture.height(), picture.width()));
        let picture = match (height, width) == (picture.height(), picture.width()) {
            true => picture,
            false => picture.resize_exact(width, height, FilterType::Triangle),
        };
        let (crop_height, crop_width) = self.crop;
        ensure!(
            crop_height <= height && crop_width <= width,
            "resized to {height}x{width} it is smaller than the crop, {crop_height}x{crop_width}"
        );
        let (top, left) = ((height - crop_height) / 2, (width - crop_width) / 2);
        Ok(picture.crop_imm(left, top, crop_width, crop_height).into_bytes())
    }
}

/// The height and width to resize a picture to before cropping it.
fn resized(size: Option<Size>, crop: (u32, u32), (height, width): (u32, u32)) -> (u32, u32) {
    let by = |above: u32, below: u32| {
        let scale = |side: u32| (u64::from(side) * u64::from(above)).div_ceil(u64::from(below)).min(65_535) as u32;
        (scale(height), scale(width))
    };
    match size {
        Some(Size::Exact(height, width)) => (height, width),
        Some(Size::Side(side)) => by(side, height.min(width)),
        // The side that has to grow most, or may shrink least, decides.
        None if u64::from(crop.0) * u64::from(width) >= u64::from(crop.1) * u64::from(height) => by(crop.0, height),
        None => by(crop.1, width),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn port(dtype: DType, dims: [usize; 3]) -> Port {
        let dims = std::iter::once(Dim::Symbol("n".into())).chain(dims.map(Dim::Fixed)).collect();
        Port { name: "x".into(), dtype, dims: Some(dims) }
    }

    fn prepare(args: &ImageArgs, port: Port) -> Result<Preparation> {
        Preparation::new(args, &NoiseArgs::default(), &Normalisation::default(), &[port])
    }

    fn array(shape: &[usize], pixels: &[u8]) -> Pictures {
        Pictures::array(Tensor::from_vec(shape, pixels.to_vec()).unwrap()).unwrap()
    }

    #[test]
    fn sizes_and_scales_are_parsed() {
        assert_eq!("224".parse(), Ok(Size::Side(224)));
        assert_eq!("224x196".parse(), Ok(Size::Exact(224, 196)));
        assert_eq!("1/255".parse(), Ok(Scale(1.0 / 255.0)));
        assert_eq!("0.5".parse(), Ok(Scale(0.5)));
        for bad in ["", "x", "0", "-3", "3x", "70000"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        assert!("1/0".parse::<Scale>().is_err());
    }

    #[test]
    fn the_shorter_side_is_resized_and_the_crop_is_covered() {
        assert_eq!(resized(Some(Size::Side(256)), (224, 224), (500, 1000)), (256, 512));
        assert_eq!(resized(Some(Size::Exact(10, 20)), (4, 4), (500, 1000)), (10, 20));
        assert_eq!(resized(None, (224, 224), (448, 1000)), (224, 500));
        assert_eq!(resized(None, (224, 224), (1000, 448)), (500, 224));
        assert_eq!(resized(None, (28, 28), (28, 28)), (28, 28));
    }

    #[test]
    fn channels_and_layout_follow_the_model() {
        let pixels: Vec<u8> = (0..12).collect();
        let pictures = array(&[1, 3, 2, 2], &pixels);
        let raw = |dims| prepare(&ImageArgs::default(), port(DType::U8, dims)).unwrap().batch(&pictures, 0..1).unwrap();
        assert_eq!(raw([3, 2, 2]).get("x"), Some(&Tensor::from_vec(&[1, 3, 2, 2], pixels.clone()).unwrap()));
        let channels_last = Tensor::from_vec(&[1, 2, 2, 3], vec![0u8, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]).unwrap();
        assert_eq!(raw([2, 2, 3]).get("x"), Some(&channels_last));
    }

    #[test]
    fn the_centre_is_cropped() {
        let pictures = array(&[1, 1, 3, 3], &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let args = ImageArgs { size: Some(Size::Side(3)), ..ImageArgs::default() };
        let feeds = prepare(&args, port(DType::U8, [1, 1, 1])).unwrap().batch(&pictures, 0..1).unwrap();
        assert_eq!(feeds.get("x"), Some(&Tensor::from_vec(&[1, 1, 1, 1], vec![4u8]).unwrap()));
        let args = ImageArgs { size: Some(Size::Side(3)), crop: Some(Size::Side(4)), ..ImageArgs::default() };
        assert!(prepare(&args, port(DType::U8, [1, 4, 4])).unwrap().batch(&pictures, 0..1).is_err());
    }

    #[test]
    fn normalisation_defaults_to_imagenet_for_colour() {
        let colour = prepare(&ImageArgs::default(), port(DType::F32, [3, 2, 2])).unwrap();
        assert_eq!((colour.mean[0], colour.std[2], colour.scale), (0.485, 0.225, 1.0 / 255.0));
        let grey = prepare(&ImageArgs::default(), port(DType::F16, [1, 2, 2])).unwrap();
        assert_eq!((grey.mean, grey.std), (vec![0.0], vec![1.0]));
        let given = ImageArgs { mean: vec![0.5], std: vec![0.1, 0.2], ..ImageArgs::default() };
        assert!(prepare(&given, port(DType::F32, [3, 2, 2])).unwrap_err().to_string().contains("std has 2 values"));
    }

    #[test]
    fn unusable_inputs_are_refused() {
        let open = Port { name: "x".into(), dtype: DType::F32, dims: None };
        assert!(prepare(&ImageArgs::default(), open.clone()).unwrap_err().to_string().contains("--crop"));
        let sized = ImageArgs { crop: Some(Size::Side(8)), ..ImageArgs::default() };
        assert_eq!(prepare(&sized, open.clone()).unwrap().crop, (8, 8));
        let two = Preparation::new(&sized, &NoiseArgs::default(), &Normalisation::default(), &[open.clone(), open]);
        assert!(two.is_err());
        assert!(Pictures::array(Tensor::from_vec(&[1, 2, 1, 1], vec![0u8, 0]).unwrap()).is_err());
        assert!(Pictures::array(Tensor::from_vec(&[1, 1, 1, 1], vec![0.0f32]).unwrap()).is_err());
    }

    #[test]
    fn folders_are_read_in_order_of_name() {
        let folder = std::env::temp_dir().join(format!("vitrim-images-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (name, grey) in [("b.png", 20), ("a.png", 10)] {
            GrayImage::from_pixel(4, 2, image::Luma([grey])).save(folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("notes.txt"), "not a picture").unwrap();
        let pictures = Pictures::folder(&folder).unwrap();
        let prepare = prepare(&ImageArgs::default(), port(DType::U8, [1, 2, 2])).unwrap();
        let feeds = prepare.batch(&pictures, 0..2).unwrap();
        assert_eq!(
            feeds.get("x"),
            Some(&Tensor::from_vec(&[2, 1, 2, 2], vec![10u8, 10, 10, 10, 20, 20, 20, 20]).unwrap())
        );
        std::fs::write(folder.join("c.jpg"), "not a picture either").unwrap();
        let broken = Pictures::folder(&folder).unwrap();
        assert!(prepare.batch(&broken, 0..3).unwrap_err().to_string().contains("c.jpg"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}

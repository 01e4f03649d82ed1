//! What models are fed: recorded tensors, pictures, or noise.
//!
//! [`open`] turns the options in [`FeedArgs`] into batches for the inputs of a model:
//!
//! - an `.npz` whose arrays have the names of the model's inputs: cut into batches along the first axis;
//! - an `.npz` of recorded runs, `in{run}_{j}` and `out{run}_{j}` for the j-th input and output of each run: one batch
//!   per run, with the recorded outputs;
//! - an `.npz` of labelled pictures, `images` (uint8, [N, C, H, W]) and optionally `labels`, `mean` and `std`;
//! - a folder of PNG and JPEG files, in the order of their names ([`images`]);
//! - nothing: normally distributed noise from a seed ([`noise`]).
//!
//! The same options give the same feeds, everywhere.

pub mod images;
pub mod noise;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::runtime::{Feeds, Outputs, Port};
use crate::tensor::npz::Npz;
use crate::tensor::{DType, Tensor};
use images::{ImageArgs, Normalisation, Pictures};
use noise::NoiseArgs;

/// Which feeds to make.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Input")]
pub struct FeedArgs {
    /// What to feed: an .npz of tensors, recorded runs or labelled images, or a folder of PNG and JPEG files [default:
    /// noise]
    #[arg(long, value_name = "NPZ|DIR")]
    pub input: Option<PathBuf>,
    /// Use only the first N images
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// How noise is made.
    #[command(flatten)]
    pub noise: NoiseArgs,
    /// How pictures become tensors.
    #[command(flatten)]
    pub images: ImageArgs,
}

/// Feeds, batch by batch.
pub struct Source {
    /// What they are, for people to read.
    pub description: String,
    /// The batches, made when asked for.
    pub batches: Box<dyn Iterator<Item = Result<Batch>>>,
}

/// One batch.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// A tensor for every input.
    pub feeds: Feeds,
    /// How many images it holds.
    pub images: usize,
    /// The outputs that were recorded for these feeds.
    pub recorded: Option<Outputs>,
    /// The class of each image.
    pub labels: Option<Vec<i64>>,
}

/// Makes feeds for a model with these inputs and outputs. Without `batch`, a fixed batch of the model is kept, noise
/// comes in twos, so that a batch baked into a graph is noticed, and pictures in batches of 32.
pub fn open(args: &FeedArgs, batch: Option<usize>, inputs: &[Port], outputs: &[Port]) -> Result<Source> {
    ensure!(args.limit != Some(0), "--limit must be at least 1");
    let fixed = fixed_batch(inputs, batch)?;
    let Some(path) = &args.input else {
        let chunk = fixed.or(batch).unwrap_or(2);
        return noise_source(args, chunk, fixed, inputs);
    };
    let source = match path.is_dir() {
        true => folder_source(args, path, batch, fixed, inputs),
        false => npz_source(args, path, batch, fixed, inputs, outputs),
    };
    source.with_context(|| format!("--input {}", path.display()))
}

/// The batch that the model is bound to, if it is; another one cannot be asked for.
pub fn fixed_batch(inputs: &[Port], batch: Option<usize>) -> Result<Option<usize>> {
    ensure!(batch != Some(0), "--batch must be at least 1");
    let Some((port, fixed)) = inputs.iter().find_map(|port| Some((port, port.fixed_batch()?))) else { return Ok(None) };
    if let Some(batch) = batch.filter(|&batch| batch != fixed) {
        bail!("the input {port} has a fixed batch, so --batch {batch} cannot be used");
    }
    Ok(Some(fixed))
}

/// Cuts `total` images into batches.
type Chunks = Box<dyn Fn(usize) -> Result<Vec<Range<usize>>>>;

fn chunks(args: &FeedArgs, fixed: Option<usize>, chunk: usize) -> Chunks {
    let limit = args.limit.unwrap_or(usize::MAX);
    Box::new(move |total| {
        let total = total.min(limit);
        ensure!(total > 0, "there are no images");
        let rest = total % chunk;
        ensure!(
            fixed.is_none() || rest == 0,
            "{total} images do not fill batches of {chunk}, which the model is bound to; use --limit {}",
            total - rest
        );
        Ok((0..total).step_by(chunk).map(|start| start..(start + chunk).min(total)).collect())
    })
}

fn noise_source(args: &FeedArgs, chunk: usize, fixed: Option<usize>, inputs: &[Port]) -> Result<Source> {
    args.noise.check(inputs)?;
    let ranges = chunks(args, fixed, chunk)(args.limit.unwrap_or(chunk))?;
    let mut noise = noise::Noise::new(args.noise.seed);
    let (dims, inputs) = (args.noise.clone(), inputs.to_vec());
    let images = ranges.last().map_or(0, |range| range.end);
    Ok(Source {
        description: format!("{images} images of noise (seed {}), batch {chunk}", args.noise.seed),
        batches: Box::new(ranges.into_iter().map(move |range| {
            Ok(Batch { feeds: noise.feeds(&inputs, range.len(), &dims)?, images: range.len(), ..Batch::default() })
        })),
    })
}

fn folder_source(
    args: &FeedArgs,
    path: &Path,
    batch: Option<usize>,
    fixed: Option<usize>,
    inputs: &[Port],
) -> Result<Source> {
    let prepare = images::Preparation::new(&args.images, &args.noise, &Normalisation::default(), inputs)?;
    picture_source(path, Pictures::folder(path)?, None, prepare, chunks(args, fixed, fixed.or(batch).unwrap_or(32)))
}

fn picture_source(
    path: &Path,
    pictures: Pictures,
    labels: Option<Vec<i64>>,
    prepare: images::Preparation,
    chunks: Chunks,
) -> Result<Source> {
    let ranges = chunks(pictures.len())?;
    let (batch, images) = (ranges[0].len(), ranges.last().map_or(0, |range| range.end));
    Ok(Source {
        description: format!("{images} images of {}, batch {batch}", path.display()),
        batches: Box::new(ranges.into_iter().map(move |range| {
            let labels = labels.as_ref().map(|labels| labels[range.clone()].to_vec());
            Ok(Batch { feeds: prepare.batch(&pictures, range.clone())?, images: range.len(), recorded: None, labels })
        })),
    })
}

fn npz_source(
    args: &FeedArgs,
    path: &Path,
    batch: Option<usize>,
    fixed: Option<usize>,
    inputs: &[Port],
    outputs: &[Port],
) -> Result<Source> {
    let mut npz = Npz::open(path)?;
    if inputs.iter().all(|port| npz.contains(&port.name)) && !npz.contains("labels") {
        return named_source(args, path, &mut npz, batch, fixed, inputs);
    }
    if npz.contains("images") {
        let images = npz.read("images")?;
        let labels = if npz.contains("labels") { Some(read_labels(&mut npz, &images)?) } else { None };
        let mut list = |name: &str| {
            let tensor = npz.contains(name).then(|| npz.read(name)).transpose();
            anyhow::Ok(tensor?.map(|tensor| tensor.to_f64().into_iter().collect()))
        };
        let recorded = Normalisation { mean: list("mean")?, std: list("std")? };
        let prepare = images::Preparation::new(&args.images, &args.noise, &recorded, inputs)?;
        let chunk = fixed.or(batch).unwrap_or(32);
        return picture_source(path, Pictures::array(images)?, labels, prepare, chunks(args, fixed, chunk));
    }
    let runs = runs(npz.names(), inputs.len())?;
    if runs.is_empty() {
        let wanted: Vec<&str> = inputs.iter().map(|port| port.name.as_str()).collect();
        bail!(
            "the arrays {} are neither the model's inputs ({}) nor recorded runs (in0_0, …) nor `images`",
            npz.names().join(", "),
            wanted.join(", ")
        );
    }
    ensure!(batch.is_none(), "recorded runs keep their batch; leave --batch out");
    let (inputs, outputs) = (inputs.to_vec(), outputs.to_vec());
    let mut left = args.limit.unwrap_or(usize::MAX);
    let mut batches = Vec::new();
    for run in runs {
        let mut batch = recorded_run(&mut npz, run, &inputs, &outputs)?;
        if batch.images > left {
            batch = first_rows(&batch, left)?;
        }
        left -= batch.images;
        batches.push(batch);
        if left == 0 {
            break;
        }
    }
    let description = format!("{} recorded runs of {}", batches.len(), path.display());
    Ok(Source { description, batches: Box::new(batches.into_iter().map(Ok)) })
}

/// Feeds under the inputs' own names.
fn named_source(
    args: &FeedArgs,
    path: &Path,
    npz: &mut Npz<impl std::io::Read + std::io::Seek>,
    batch: Option<usize>,
    fixed: Option<usize>,
    inputs: &[Port],
) -> Result<Source> {
    let read = |port: &Port| Ok((port.name.clone(), adapt(npz.read(&port.name)?, port.dtype)));
    let tensors: Feeds = inputs.iter().map(read).collect::<Result<_>>()?;
    let rows: Vec<Option<usize>> = tensors.iter().map(|(_, tensor)| tensor.shape().first().copied()).collect();
    let Some(total) = rows.first().copied().flatten().filter(|_| rows.iter().all(|count| *count == rows[0])) else {
        // Inputs that do not share a first axis can only be fed whole.
        ensure!(
            batch.is_none() && args.limit.is_none(),
            "the arrays differ in their first axis, so they cannot be cut"
        );
        let batch = Batch { feeds: tensors, images: 1, ..Batch::default() };
        return Ok(Source { description: path.display().to_string(), batches: Box::new(std::iter::once(Ok(batch))) });
    };
    let ranges = chunks(args, fixed, fixed.or(batch).unwrap_or(total.max(1)))(total)?;
    let images = ranges.last().map_or(0, |range| range.end);
    Ok(Source {
        description: format!("{images} images of {}, batch {}", path.display(), ranges[0].len()),
        batches: Box::new(ranges.into_iter().map(move |range| {
            let cut = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), tensor.rows(range.start, range.end)?));
            let feeds = tensors.iter().map(cut).collect::<Result<_>>()?;
            Ok(Batch { feeds, images: range.len(), ..Batch::default() })
        })),
    })
}

/// The numbers of the recorded runs, each of which must have all inputs.
fn runs(names: &[String], inputs: usize) -> Result<Vec<usize>> {
    let mut counts = BTreeMap::<usize, usize>::new();
    for name in names {
        let Some((run, index)) = name.strip_prefix("in").and_then(|rest| rest.split_once('_')) else { continue };
        if let (Ok(run), Ok(_)) = (run.parse(), index.parse::<usize>()) {
            *counts.entry(run).or_default() += 1;
        }
    }
    if let Some((run, count)) = counts.iter().find(|&(_, &count)| count != inputs) {
        bail!("run {run} has {count} inputs, the model {inputs}");
    }
    Ok(counts.into_keys().collect())
}

fn recorded_run(
    npz: &mut Npz<impl std::io::Read + std::io::Seek>,
    run: usize,
    inputs: &[Port],
    outputs: &[Port],
) -> Result<Batch> {
    let mut feeds = Feeds::default();
    for (index, port) in inputs.iter().enumerate() {
        feeds.push(&port.name, adapt(npz.read(&format!("in{run}_{index}"))?, port.dtype));
    }
    let mut recorded = Outputs::default();
    for (index, port) in outputs.iter().enumerate() {
        let name = format!("out{run}_{index}");
        if npz.contains(&name) {
            recorded.push(&port.name, npz.read(&name)?);
        }
    }
    let images = feeds.iter().next().and_then(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
    Ok(Batch { feeds, images, recorded: Some(recorded).filter(|outputs| !outputs.is_empty()), labels: None })
}

/// A recorded run cut to its first images.
fn first_rows(batch: &Batch, rows: usize) -> Result<Batch> {
    let cut = |tensors: &Feeds| {
        let cut = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), tensor.rows(0, rows)?));
        tensors.iter().map(cut).collect::<Result<Feeds>>().context("a recorded run cannot be cut for --limit")
    };
    let recorded = batch.recorded.as_ref().map(cut).transpose()?;
    Ok(Batch { feeds: cut(&batch.feeds)?, images: rows, recorded, labels: None })
}

/// Floating point of one width serves an input of another; other types must match.
fn adapt(tensor: Tensor, dtype: DType) -> Tensor {
    if tensor.dtype() != dtype && tensor.dtype().is_float() && dtype.is_float() {
        Tensor::from_f64(dtype, &tensor.to_f64())
    } else {
        tensor
    }
}

fn read_labels(npz: &mut Npz<impl std::io::Read + std::io::Seek>, images: &Tensor) -> Result<Vec<i64>> {
    let labels = npz.read("labels")?;
    let count = images.shape().first().copied().unwrap_or(0);
    ensure!(!labels.dtype().is_float(), "`labels` must be integers, not {}", labels.dtype());
    ensure!(labels.shape() == [count], "{count} images need as many labels, not {:?}", labels.shape());
    Ok(labels.to_f64().into_iter().map(|label| label as i64).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::runtime::Dim;
    use crate::tensor::NamedTensors;
    use crate::tensor::npz::write_npz;

    fn port(name: &str, dims: &[Dim]) -> Port {
        Port { name: name.into(), dtype: DType::F32, dims: Some(dims.to_vec()) }
    }

    fn symbol(name: &str) -> Dim {
        Dim::Symbol(name.into())
    }

    /// Writes an npz, opens it as `--input`, and collects its batches.
    fn from_npz(
        test: &str,
        tensors: &[(&str, Tensor)],
        mut args: FeedArgs,
        batch: Option<usize>,
        inputs: &[Port],
    ) -> Result<Vec<Batch>> {
        let tensors: NamedTensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        let mut bytes = Cursor::new(Vec::new());
        write_npz(&mut bytes, &tensors)?;
        let path = std::env::temp_dir().join(format!("vitrim-feeds-{}-{test}.npz", std::process::id()));
        std::fs::write(&path, bytes.into_inner())?;
        args.input = Some(path.clone());
        let batches =
            open(&args, batch, inputs, &[port("y", &[symbol("batch")])]).and_then(|source| source.batches.collect());
        std::fs::remove_file(path)?;
        batches
    }

    fn column(values: &[f32]) -> Tensor {
        Tensor::from_vec(&[values.len(), 1], values.to_vec()).unwrap()
    }

    #[test]
    fn named_tensors_are_cut_into_batches() {
        let inputs = [port("x", &[symbol("batch"), Dim::Fixed(1)])];
        let args = FeedArgs { limit: Some(3), ..FeedArgs::default() };
        let batches = from_npz("named", &[("x", column(&[1.0, 2.0, 3.0, 4.0]))], args, Some(2), &inputs).unwrap();
        assert_eq!(batches.iter().map(|batch| batch.images).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(batches[1].feeds.get("x"), Some(&column(&[3.0])));
    }

    #[test]
    fn floats_are_adapted_to_the_input() {
        let inputs = [port("x", &[symbol("batch"), Dim::Fixed(1)])];
        let half = Tensor::from_f64(DType::F16, &column(&[0.5]).to_f64());
        let batches = from_npz("adapt", &[("x", half)], FeedArgs::default(), None, &inputs).unwrap();
        assert_eq!(batches[0].feeds.get("x"), Some(&column(&[0.5])));
    }

    #[test]
    fn recorded_runs_come_with_their_outputs() {
        let inputs = [port("x", &[symbol("batch"), Dim::Fixed(1)])];
        let arrays = [
            ("in0_0", column(&[1.0, 2.0])),
            ("out0_0", column(&[3.0, 4.0])),
            ("in10_0", column(&[5.0])),
            ("in2_0", column(&[6.0])),
        ];
        let batches = from_npz("runs", &arrays, FeedArgs::default(), None, &inputs).unwrap();
        let fed: Vec<_> = batches.iter().map(|batch| batch.feeds.get("x").unwrap().clone()).collect();
        assert_eq!(fed, [column(&[1.0, 2.0]), column(&[6.0]), column(&[5.0])]);
        assert_eq!(batches[0].recorded.as_ref().unwrap().get("y"), Some(&column(&[3.0, 4.0])));
        assert!(batches[1].recorded.is_none());

        let one = FeedArgs { limit: Some(1), ..FeedArgs::default() };
        let batches = from_npz("runs-limit", &arrays, one, None, &inputs).unwrap();
        assert_eq!((batches.len(), batches[0].recorded.as_ref().unwrap().get("y")), (1, Some(&column(&[3.0]))));

        let two = [inputs[0].clone(), port("z", &[symbol("batch")])];
        assert!(from_npz("runs-missing", &arrays, FeedArgs::default(), None, &two).is_err());
        assert!(from_npz("runs-batch", &arrays, FeedArgs::default(), Some(2), &inputs).is_err());
    }

    #[test]
    fn labelled_images_are_normalised_as_recorded() {
        let inputs = [port("x", &[symbol("batch"), Dim::Fixed(1), Dim::Fixed(1), Dim::Fixed(2)])];
        let arrays = [
            ("images", Tensor::from_vec(&[3, 1, 1, 2], vec![0u8, 255, 51, 102, 0, 0]).unwrap()),
            ("labels", Tensor::from_vec(&[3], vec![7i64, 8, 9]).unwrap()),
            ("mean", Tensor::from_vec(&[], vec![0.2f64]).unwrap()),
            ("std", Tensor::from_vec(&[], vec![0.5f64]).unwrap()),
        ];
        let batches = from_npz("labelled", &arrays, FeedArgs::default(), Some(2), &inputs).unwrap();
        let expected = Tensor::from_vec(&[2, 1, 1, 2], vec![-0.4f32, 1.6, 0.0, 0.4]).unwrap();
        let distance = crate::tensor::compare::Comparison::of(&expected, batches[0].feeds.get("x").unwrap()).unwrap();
        assert!(distance.max_abs < 1e-6, "{distance:?}");
        assert_eq!(batches[1].labels, Some(vec![9]));
    }

    #[test]
    fn an_unusable_npz_says_what_was_expected() {
        let inputs = [port("x", &[symbol("batch"), Dim::Fixed(1)])];
        let error = from_npz("unusable", &[("z", column(&[1.0]))], FeedArgs::default(), None, &inputs).unwrap_err();
        assert!(format!("{error:#}").contains("the arrays z are neither the model's inputs (x)"), "{error:#}");
    }

    #[test]
    fn fixed_batches_are_kept() {
        let inputs = [port("x", &[Dim::Fixed(2), Dim::Fixed(1)])];
        let open = |limit, batch| {
            let args = FeedArgs { limit, ..FeedArgs::default() };
            open(&args, batch, &inputs, &[]).and_then(|source| source.batches.collect::<Result<Vec<_>>>())
        };
        assert_eq!(open(Some(4), None).unwrap().len(), 2);
        assert!(open(Some(3), None).unwrap_err().to_string().contains("use --limit 2"));
        assert!(open(None, Some(3)).is_err());
        assert!(open(None, Some(0)).is_err());
    }
}

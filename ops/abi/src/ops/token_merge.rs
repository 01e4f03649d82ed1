//! `TokenMerge` and `TokenMergeDynamic`.

use half::{bf16, f16};
use ort::operator::{KernelContext, ShapeInferenceContext};
use vitrim_ops::Heads;
use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_merge::{cpu, cuda};

use crate::call::{Call, DeviceScratch, Failure, OnDevice, Typed};
use crate::operator::{Compute, Device, Dim, Entry, Operand, Output, int};

/// Tokens of one type, with metrics of every type.
pub fn entries<T: OnDevice + Element>(device: Device) -> Vec<Entry> {
    let entries = [of_metric::<T, f32>(device), of_metric::<T, f16>(device), of_metric::<T, bf16>(device)];
    entries.into_iter().flatten().collect()
}

fn of_metric<T: OnDevice + Element, M: OnDevice + Element>(device: Device) -> [Entry; 2] {
    let inputs = vec![Operand::of(T::TYPE), Operand::of(M::TYPE), Operand::of(f32::TYPE)];
    let index = Output::Of(i64::TYPE);
    let outputs = vec![Output::AsFirst, Output::Of(f32::TYPE), index, index, index];
    let kernels = Operator::TokenMerge;
    [
        Entry {
            name: "TokenMergeDynamic",
            device,
            inputs: [&inputs[..], &[Operand::on_cpu(i64::TYPE)]].concat(),
            outputs: outputs.clone(),
            shapes: |_, inputs| shapes(inputs, Dim::unknown(), Dim::unknown()),
            create: |context, device| create::<T, M>(context, device, None),
            kernels: Some(kernels),
        },
        Entry {
            name: "TokenMerge",
            device,
            inputs,
            outputs,
            shapes: |context: &ShapeInferenceContext, inputs| {
                let r: i64 = context.attr("r").ok()?;
                shapes(inputs, inputs[0].get(1)?.minus(r), Dim::known(r))
            },
            create: |context, device| {
                let said = Static { r: int(context, "r")?, tokens: int(context, "tokens")? };
                create::<T, M>(context, device, Some(said))
            },
            kernels: Some(kernels),
        },
    ]
}

/// What the static form says beforehand.
#[derive(Clone, Copy)]
struct Static {
    r: usize,
    tokens: usize,
}

fn shapes(inputs: &[Vec<Dim>], slots: Dim, r: Dim) -> Option<Vec<Vec<Dim>>> {
    let [batch, _, channels] = &inputs[0][..] else { return None };
    let row = |last: &Dim| vec![batch.clone(), last.clone()];
    let of_slots = |last: &Dim| vec![batch.clone(), slots.clone(), last.clone()];
    Some(vec![of_slots(channels), of_slots(&Dim::known(1)), row(&slots), row(&r), row(&r)])
}

fn create<T: OnDevice + Element, M: OnDevice + Element>(
    context: &KernelContext,
    device: Device,
    said: Option<Static>,
) -> Result<Compute, Failure> {
    let (protect, suffix) = (int(context, "protect")?, int(context, "suffix")?);
    let (heads, head_dim, at) = (int(context, "heads")?, int(context, "head_dim")?, int(context, "metric_at")?);
    let scratch = DeviceScratch::default();
    Ok(Box::new(move |call: &Call| {
        let x = call.input::<T, 3>(0)?;
        let [batch, tokens, channels] = x.shape;
        let metric = call.input::<M, 3>(1)?.expect("metric", [Some(batch), Some(tokens), None])?;
        let size = call.input::<f32, 3>(2)?.expect("size", [Some(batch), Some(tokens), Some(1)])?;
        let r = match said {
            Some(Static { tokens: expected, .. }) if expected != tokens => {
                return Err(format!("there are {tokens} tokens, and attribute tokens is {expected}").into());
            }
            Some(Static { r, .. }) => r,
            None => match call.input::<i64, 1>(3)?.slice() {
                &[r] => usize::try_from(r).unwrap_or(0).min(tokens.saturating_sub(protect.saturating_add(suffix)) / 2),
                _ => return Err("r is not one number".into()),
            },
        };
        let slots = tokens.checked_sub(r).ok_or_else(|| format!("{r} of {tokens} tokens cannot leave"))?;
        let heads = Heads { width: metric.shape[2], at, heads, head_dim };
        let y = call.output::<T>(0, &[batch, slots, channels])?;
        let size_out = call.output::<f32>(1, &[batch, slots, 1])?;
        let anchor = call.output::<i64>(2, &[batch, slots])?;
        let [leaving, into] = [call.output::<i64>(3, &[batch, r])?, call.output::<i64>(4, &[batch, r])?];
        match device {
            Device::Cpu => {
                let problem = cpu::Problem { batch, tokens, channels, r, protect, suffix, metric: heads };
                let inputs = cpu::Inputs { x: x.slice(), metric: metric.slice(), size: size.slice() };
                let (anchor, leaving, into) = (anchor.slice(), leaving.slice(), into.slice());
                let outputs = cpu::Outputs { y: y.slice(), size: size_out.slice(), anchor, leaving, into };
                let run = |scratch: &mut [f32]| cpu::token_merge(&problem, inputs, outputs, scratch, call);
                call.with_scratch(problem.scratch_len(), run)??
            }
            Device::Cuda => {
                let (dtype, metric_dtype) = (T::DTYPE, M::DTYPE);
                let problem =
                    cuda::Problem { batch, tokens, channels, protect, suffix, r, metric: heads, dtype, metric_dtype };
                let tensors = cuda::Tensors {
                    x: x.address(),
                    metric: metric.address(),
                    size: size.address(),
                    y: y.address(),
                    size_out: size_out.address(),
                    anchor: anchor.address(),
                    leaving: leaving.address(),
                    into: into.address(),
                    scratch: scratch.of(call, cuda::scratch_bytes(&problem))?,
                };
                // SAFETY: the stream is this call's; operands and outputs are of these extents and there for what runs in
                // it, and so is the scratch memory, for this stream alone.
                unsafe { cuda::merge(call.stream()?, &problem, &tensors) }?
            }
        }
        Ok(())
    }))
}

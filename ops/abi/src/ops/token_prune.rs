//! `TokenPrune` and `TokenPruneDynamic`.

use ort::operator::{KernelContext, ShapeInferenceContext};
use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_prune::{Problem, cpu, cuda};

use crate::call::{Call, DeviceScratch, Failure, OnDevice, Typed};
use crate::operator::{Compute, Device, Dim, Entry, Operand, Output, int};

pub fn entries<T: OnDevice + Element>(device: Device) -> [Entry; 2] {
    let inputs = vec![Operand::of(T::TYPE), Operand::of(f32::TYPE), Operand::of(f32::TYPE)];
    let index = Output::Of(i64::TYPE);
    let outputs = vec![Output::AsFirst, Output::Of(f32::TYPE), index, index];
    let kernels = Operator::TokenPrune;
    [
        Entry {
            name: "TokenPruneDynamic",
            device,
            inputs: [&inputs[..], &[Operand::on_cpu(i64::TYPE)]].concat(),
            outputs: outputs.clone(),
            shapes: |_, inputs| shapes(inputs, Dim::unknown()),
            create: |context, device| create::<T>(context, device, None),
            kernels: Some(kernels),
        },
        Entry {
            name: "TokenPrune",
            device,
            inputs,
            outputs,
            shapes: |context: &ShapeInferenceContext, inputs| {
                let attribute = |name| context.attr::<i64>(name).ok()?.try_into().ok();
                let (keep, tokens) = (attribute("keep")?, attribute("tokens")?);
                let (protect, suffix) = (attribute("protect")?, attribute("suffix")?);
                let fuse = attribute("fuse")? != 0;
                let problem = Problem { batch: 1, tokens, channels: 1, keep, protect, suffix, fuse };
                shapes(inputs, Dim::known(problem.slots()?.try_into().ok()?))
            },
            create: |context, device| {
                let said = Static { keep: int(context, "keep")?, tokens: int(context, "tokens")? };
                create::<T>(context, device, Some(said))
            },
            kernels: Some(kernels),
        },
    ]
}

/// What the static form says beforehand.
#[derive(Clone, Copy)]
struct Static {
    keep: usize,
    tokens: usize,
}

fn shapes(inputs: &[Vec<Dim>], slots: Dim) -> Option<Vec<Vec<Dim>>> {
    let [batch, tokens, channels] = &inputs[0][..] else { return None };
    let of_slots = |last: &Dim| vec![batch.clone(), slots.clone(), last.clone()];
    let row = |last: &Dim| vec![batch.clone(), last.clone()];
    Some(vec![of_slots(channels), of_slots(&Dim::known(1)), row(&slots), row(tokens)])
}

fn create<T: OnDevice + Element>(
    context: &KernelContext,
    device: Device,
    said: Option<Static>,
) -> Result<Compute, Failure> {
    let (protect, suffix) = (int(context, "protect")?, int(context, "suffix")?);
    let fuse = match int(context, "fuse")? {
        fuse @ 0..=1 => fuse == 1,
        other => return Err(format!("attribute fuse is {other}, and 0 or 1 is wanted").into()),
    };
    let scratch = DeviceScratch::default();
    Ok(Box::new(move |call: &Call| {
        let x = call.input::<T, 3>(0)?;
        let [batch, tokens, channels] = x.shape;
        let score = call.input::<f32, 2>(1)?.expect("score", [Some(batch), Some(tokens)])?;
        let size = call.input::<f32, 3>(2)?.expect("size", [Some(batch), Some(tokens), Some(1)])?;
        let keep = match said {
            Some(Static { tokens: expected, .. }) if expected != tokens => {
                return Err(format!("there are {tokens} tokens, and attribute tokens is {expected}").into());
            }
            Some(Static { keep, .. }) => keep,
            None => match call.input::<i64, 1>(3)?.slice() {
                &[keep] => {
                    usize::try_from(keep).unwrap_or(0).min(tokens.saturating_sub(protect.saturating_add(suffix)))
                }
                _ => return Err("keep is not one number".into()),
            },
        };
        let problem = Problem { batch, tokens, channels, keep, protect, suffix, fuse };
        let slots = problem.slots().ok_or_else(|| {
            format!("{keep} of {tokens} tokens cannot be kept beside {protect} and {suffix} protected ones")
        })?;
        let y = call.output::<T>(0, &[batch, slots, channels])?;
        let size_out = call.output::<f32>(1, &[batch, slots, 1])?;
        let [anchor, assign] = [call.output::<i64>(2, &[batch, slots])?, call.output::<i64>(3, &[batch, tokens])?];
        match device {
            Device::Cpu => {
                let inputs = cpu::Inputs { x: x.slice(), score: score.slice(), size: size.slice() };
                let (anchor, assign) = (anchor.slice(), assign.slice());
                let outputs = cpu::Outputs { y: y.slice(), size: size_out.slice(), anchor, assign };
                cpu::token_prune(&problem, inputs, outputs, call)?
            }
            Device::Cuda => {
                let tensors = cuda::Tensors {
                    x: x.address(),
                    score: score.address(),
                    size: size.address(),
                    y: y.address(),
                    size_out: size_out.address(),
                    anchor: anchor.address(),
                    assign: assign.address(),
                    scratch: scratch.of(call, cuda::scratch_bytes(&problem))?,
                };
                // SAFETY: the stream is this call's; operands and outputs are of these extents and there for what runs in
                // it, and so is the scratch memory, for this stream alone.
                unsafe { cuda::prune(call.stream()?, &problem, T::DTYPE, &tensors) }?
            }
        }
        Ok(())
    }))
}

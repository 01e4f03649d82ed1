//! `ConnectionMask` and `ConnectionMaskDynamic`.

use std::thread::available_parallelism;

use ort::operator::KernelContext;
use vitrim_ops::connection_mask::{Problem, cpu, cuda};
use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;

use crate::call::{Call, Failure, OnDevice, Typed};
use crate::operator::{Compute, Device, Dim, Entry, Operand, Output, int};

pub fn entries<T: OnDevice + Element>(device: Device) -> [Entry; 2] {
    let inputs = vec![Operand::of(T::TYPE), Operand::of(i64::TYPE)];
    let outputs = vec![Output::Of(f32::TYPE)];
    let kernels = Operator::ConnectionMask;
    [
        Entry {
            name: "ConnectionMaskDynamic",
            device,
            inputs: [&inputs[..], &[Operand::on_cpu(i64::TYPE)]].concat(),
            outputs: outputs.clone(),
            shapes: |_, inputs| shapes(inputs),
            create: |context, device| create::<T>(context, device, None),
            kernels: Some(kernels),
        },
        Entry {
            name: "ConnectionMask",
            device,
            inputs,
            outputs,
            shapes: |_, inputs| shapes(inputs),
            create: |context, device| {
                let said = Static { connections: int(context, "connections")?, slots: int(context, "slots")? };
                create::<T>(context, device, Some(said))
            },
            kernels: Some(kernels),
        },
    ]
}

/// What the static form says beforehand.
#[derive(Clone, Copy)]
struct Static {
    connections: usize,
    slots: usize,
}

fn shapes(inputs: &[Vec<Dim>]) -> Option<Vec<Vec<Dim>>> {
    let [batch, slots] = &inputs[1][..] else { return None };
    Some(vec![vec![batch.clone(), slots.clone(), slots.clone()]])
}

fn create<T: OnDevice + Element>(
    context: &KernelContext,
    device: Device,
    said: Option<Static>,
) -> Result<Compute, Failure> {
    let (protect, suffix) = (int(context, "protect")?, int(context, "suffix")?);
    // A few shares for each thread: some may be busy elsewhere.
    let workers = 4 * available_parallelism().map_or(1, |count| count.get());
    Ok(Box::new(move |call: &Call| {
        let weights = call.input::<T, 4>(0)?;
        let [batch, heads, tokens, _] = weights.shape;
        let weights = weights.expect("weights", [Some(batch), Some(heads), Some(tokens), Some(tokens)])?;
        let anchor = call.input::<i64, 2>(1)?.expect("anchor", [Some(batch), None])?;
        let [_, slots] = anchor.shape;
        let connections = match said {
            Some(Static { slots: expected, .. }) if expected != slots => {
                return Err(format!("there are {slots} slots, and attribute slots is {expected}").into());
            }
            Some(Static { connections, .. }) => connections,
            None => match call.input::<i64, 1>(2)?.slice() {
                &[connections] => usize::try_from(connections).unwrap_or(0),
                _ => return Err("connections is not one number".into()),
            },
        };
        let problem = Problem { batch, heads, tokens, slots, connections, protect, suffix };
        let mask = call.output::<f32>(0, &[batch, slots, slots])?;
        match device {
            Device::Cpu => {
                let (weights, anchor, mask) = (weights.slice(), anchor.slice(), mask.slice());
                let run =
                    |scratch: &mut [f32]| cpu::connection_mask(&problem, weights, anchor, mask, workers, scratch, call);
                call.with_scratch(problem.scratch_len(workers), run)??
            }
            Device::Cuda => {
                let (weights, anchor) = (weights.address(), anchor.address());
                let tensors = cuda::Tensors { weights, anchor, mask: mask.address() };
                // SAFETY: the stream is this call's; operands and output are of these extents and there for what runs
                // in it.
                unsafe { cuda::connection_mask(call.stream()?, &problem, T::DTYPE, &tensors) }?
            }
        }
        Ok(())
    }))
}

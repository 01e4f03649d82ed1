//! `Attention` and `ProportionalAttention`.

use std::thread::available_parallelism;

use ort::operator::{KernelContext, ShapeInferenceContext};
use vitrim_ops::Heads;
use vitrim_ops::attention::{cpu, cuda};
use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;

use crate::call::{Call, Failure, OnDevice, Typed};
use crate::operator::{Compute, Create, Device, Dim, Entry, Operand, Output, int};

pub fn entries<T: OnDevice + Element>(device: Device) -> [Entry; 2] {
    let entry = |name, inputs, create: Create| {
        let (outputs, kernels) = (vec![Output::AsFirst], Operator::Attention);
        Entry { name, device, inputs, outputs, shapes, create, kernels: Some(kernels) }
    };
    let operands = [Operand::of(T::TYPE); 3];
    let sized = [&operands[..], &[Operand::of(f32::TYPE)]].concat();
    [
        entry("Attention", operands.into(), |context, device| create::<T>(context, device, false)),
        entry("ProportionalAttention", sized, |context, device| create::<T>(context, device, true)),
    ]
}

fn shapes(context: &ShapeInferenceContext, inputs: &[Vec<Dim>]) -> Option<Vec<Vec<Dim>>> {
    let width = context.attr::<i64>("heads").ok()?.checked_mul(context.attr("head_dim").ok()?)?;
    match &inputs[0][..] {
        [batch, queries, _] => Some(vec![vec![batch.clone(), queries.clone(), Dim::known(width)]]),
        _ => None,
    }
}

fn create<T: OnDevice + Element>(context: &KernelContext, device: Device, sized: bool) -> Result<Compute, Failure> {
    let (heads, head_dim) = (int(context, "heads")?, int(context, "head_dim")?);
    let (q_at, k_at, v_at) = (int(context, "q_at")?, int(context, "k_at")?, int(context, "v_at")?);
    let scale: f32 = context.get("scale").ok_or("attribute scale is missing")?;
    let joined = heads.checked_mul(head_dim).ok_or("too many channels")?;
    // A few shares for each thread: some may be busy elsewhere.
    let workers = 4 * available_parallelism().map_or(1, |count| count.get());
    Ok(Box::new(move |call: &Call| {
        let q = call.input::<T, 3>(0)?;
        let [batch, queries, _] = q.shape;
        let k = call.input::<T, 3>(1)?.expect("k", [Some(batch), None, None])?;
        let [_, keys, _] = k.shape;
        let v = call.input::<T, 3>(2)?.expect("v", [Some(batch), Some(keys), None])?;
        let size = match sized {
            true => Some(call.input::<f32, 3>(3)?.expect("size", [Some(batch), Some(keys), Some(1)])?),
            false => None,
        };
        let of = |operand: [usize; 3], at: usize| Heads { width: operand[2], at, heads, head_dim };
        let [of_q, of_k, of_v] = [of(q.shape, q_at), of(k.shape, k_at), of(v.shape, v_at)];
        let y = call.output::<T>(0, &[batch, queries, joined])?;
        match device {
            Device::Cpu => {
                let problem = cpu::Problem { batch, queries, keys, q: of_q, k: of_k, v: of_v, scale };
                let size = size.map(|size| size.slice());
                let inputs = cpu::Inputs { q: q.slice(), k: k.slice(), v: v.slice(), size };
                let run = |scratch: &mut [f32]| cpu::attention(&problem, inputs, y.slice(), workers, scratch, call);
                call.with_scratch(problem.scratch_len(workers), run)??
            }
            Device::Cuda => {
                let dtype = T::DTYPE;
                let problem = cuda::Problem { batch, queries, keys, q: of_q, k: of_k, v: of_v, scale, dtype };
                let [q, k, v] = [q, k, v].map(|operand| operand.address());
                let size = size.map_or(0, |size| size.address());
                let tensors = cuda::Tensors { q, k, v, size, y: y.address() };
                // SAFETY: the stream is this call's; operands and output are of these extents and there for what runs
                // in it.
                unsafe { cuda::attention(call.stream()?, &problem, &tensors) }?
            }
        }
        Ok(())
    }))
}

use std::thread::available_parallelism;

use vitrim_ops::Heads;
use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_score::{Problem, cpu, cuda};

use crate::call::{Call, DeviceScratch, OnDevice, Typed};
use crate::operator::{Device, Entry, Operand, Output, int};

pub fn entry<T: OnDevice + Element>(device: Device) -> Entry {
    Entry {
        name: "TokenScore",
        device,
        inputs: vec![Operand::of(T::TYPE), Operand::of(T::TYPE), Operand::of(f32::TYPE)],
        outputs: vec![Output::Of(f32::TYPE)],
        shapes: |_, inputs| match &inputs[1][..] {
            [batch, keys, _] => Some(vec![vec![batch.clone(), keys.clone()]]),
            _ => None,
        },
        create: |context, device| {
            let (heads, head_dim) = (int(context, "heads")?, int(context, "head_dim")?);
            let (q_at, k_at) = (int(context, "q_at")?, int(context, "k_at")?);
            let scale: f32 = context.get("scale").ok_or("attribute scale is missing")?;
            let first = int(context, "queries")?;
            // A few shares for each thread: some may be busy elsewhere.
            let workers = 4 * available_parallelism().map_or(1, |count| count.get());
            let kept = DeviceScratch::default();
            Ok(Box::new(move |call: &Call| {
                let q = call.input::<T, 3>(0)?;
                let [batch, queries, _] = q.shape;
                let k = call.input::<T, 3>(1)?.expect("k", [Some(batch), None, None])?;
                let [_, keys, _] = k.shape;
                let size = call.input::<f32, 3>(2)?.expect("size", [Some(batch), Some(keys), Some(1)])?;
                let of = |operand: [usize; 3], at: usize| Heads { width: operand[2], at, heads, head_dim };
                let [of_q, of_k] = [of(q.shape, q_at), of(k.shape, k_at)];
                let problem = Problem { batch, queries, keys, q: of_q, k: of_k, scale, first };
                let score = call.output::<f32>(0, &[batch, keys])?;
                match device {
                    Device::Cpu => {
                        let inputs = cpu::Inputs { q: q.slice(), k: k.slice(), size: size.slice() };
                        let score = score.slice();
                        let run =
                            |scratch: &mut [f32]| cpu::token_score(&problem, inputs, score, workers, scratch, call);
                        call.with_scratch(problem.scratch_len(workers), run)??
                    }
                    Device::Cuda => {
                        let tensors = cuda::Tensors {
                            q: q.address(),
                            k: k.address(),
                            size: size.address(),
                            score: score.address(),
                            scratch: kept.of(call, cuda::scratch_bytes(&problem))?,
                        };
                        // SAFETY: the stream is this call's; operands and output are of these extents and there for
                        // what runs in it, and so is the scratch memory, for this stream alone.
                        unsafe { cuda::score(call.stream()?, &problem, T::DTYPE, &tensors) }?
                    }
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::TokenScore),
    }
}

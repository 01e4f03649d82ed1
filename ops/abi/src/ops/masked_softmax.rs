use std::thread::available_parallelism;

use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;
use vitrim_ops::masked_softmax::{cpu, cuda};

use crate::call::{OnDevice, Typed};
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry<T: OnDevice + Element>(device: Device) -> Entry {
    Entry {
        name: "MaskedSoftmax",
        device,
        inputs: vec![Operand::of(T::TYPE), Operand::of(f32::TYPE), Operand::of(f32::TYPE)],
        outputs: vec![Output::AsFirst],
        shapes: |_, inputs| Some(vec![inputs[0].clone()]),
        create: |context, device| {
            let eps: f32 = context.get("eps").ok_or("attribute eps is missing")?;
            // A few shares for each thread: some may be busy elsewhere.
            let workers = 4 * available_parallelism().map_or(1, |count| count.get());
            Ok(Box::new(move |call| {
                let scores = call.input::<T, 4>(0)?;
                let [batch, heads, queries, keys] = scores.shape;
                let mask = call.input::<f32, 3>(1)?.expect("mask", [Some(batch), Some(queries), Some(keys)])?;
                let size = call.input::<f32, 3>(2)?.expect("size", [Some(batch), Some(keys), Some(1)])?;
                let weights = call.output::<T>(0, &scores.shape)?;
                match device {
                    Device::Cpu => {
                        let problem = cpu::Problem { batch, heads, queries, keys, eps };
                        let inputs = cpu::Inputs { scores: scores.slice(), mask: mask.slice(), size: size.slice() };
                        let weights = weights.slice();
                        let run = |scratch: &mut [f32]| {
                            cpu::masked_softmax(&problem, inputs, weights, workers, scratch, call)
                        };
                        call.with_scratch(problem.scratch_len(workers), run)??
                    }
                    Device::Cuda => {
                        let problem = cuda::Problem { batch, heads, queries, keys, eps, dtype: T::DTYPE };
                        let [mask, size] = [mask.address(), size.address()];
                        let (scores, weights) = (scores.address(), weights.address());
                        let tensors = cuda::Tensors { scores, mask, size, weights };
                        // SAFETY: the stream is this call's; operands and output are of these extents and there for
                        // what runs in it.
                        unsafe { cuda::masked_softmax(call.stream()?, &problem, &tensors) }?
                    }
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::MaskedSoftmax),
    }
}

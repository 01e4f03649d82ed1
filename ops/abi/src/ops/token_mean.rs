use vitrim_ops::cpu::Element;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_mean::{cpu, cuda};

use crate::call::{OnDevice, Typed};
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry<T: OnDevice + Element>(device: Device) -> Entry {
    Entry {
        name: "TokenMean",
        device,
        inputs: vec![Operand::of(T::TYPE), Operand::of(i64::TYPE), Operand::of(f32::TYPE)],
        outputs: vec![Output::AsFirst],
        shapes: |_, inputs| match (&inputs[0][..], &inputs[2][..]) {
            ([.., channels], [batch, slots, _]) => Some(vec![vec![batch.clone(), slots.clone(), channels.clone()]]),
            _ => None,
        },
        create: |_, device| {
            Ok(Box::new(move |call| {
                let assign = call.input::<i64, 2>(1)?;
                let [batch, tokens] = assign.shape;
                let size = call.input::<f32, 3>(2)?.expect("size", [Some(batch), None, Some(1)])?;
                let [_, slots, _] = size.shape;
                let shared = call.extents(0)?.len() == 2;
                let table = match shared {
                    true => call.input::<T, 2>(0)?.expect("table", [Some(tokens), None])?.with_axis(),
                    false => call.input::<T, 3>(0)?.expect("table", [Some(batch), Some(tokens), None])?,
                };
                let [_, _, channels] = table.shape;
                let y = call.output::<T>(0, &[batch, slots, channels])?;
                match device {
                    Device::Cpu => {
                        let problem = cpu::Problem { batch, tokens, slots, channels, shared };
                        cpu::token_mean(&problem, table.slice(), assign.slice(), size.slice(), y.slice(), call)?
                    }
                    Device::Cuda => {
                        let problem = cuda::Problem { batch, tokens, slots, channels, shared, dtype: T::DTYPE };
                        let [table, y] = [table.address(), y.address()];
                        let tensors = cuda::Tensors { table, assign: assign.address(), size: size.address(), y };
                        // SAFETY: the stream is this call's; operands and output are of these extents and there for
                        // what runs in it.
                        unsafe { cuda::mean(call.stream()?, &problem, &tensors) }?
                    }
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::TokenMean),
    }
}

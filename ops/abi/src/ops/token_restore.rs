use ort::value::TensorElementType;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_restore::{Problem, cpu, cuda};

use crate::call::Typed;
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry(device: Device, ty: TensorElementType) -> Entry {
    Entry {
        name: "TokenRestore",
        device,
        inputs: vec![Operand::of(ty), Operand::of(i64::TYPE)],
        outputs: vec![Output::AsFirst],
        shapes: |_, inputs| match (&inputs[0][..], &inputs[1][..]) {
            ([batch, _, rest @ ..], [_, tokens]) => {
                Some(vec![[batch, tokens].into_iter().chain(rest).cloned().collect()])
            }
            _ => None,
        },
        create: |_, device| {
            Ok(Box::new(move |call| {
                let mut shape = call.extents(0)?;
                let &[batch, slots, ref rest @ ..] = &shape[..] else {
                    return Err(format!("operand 0 has shape {shape:?}, and an axis of slots is wanted").into());
                };
                let channels: usize = rest.iter().product();
                let assign = call.input::<i64, 2>(1)?.expect("assign", [Some(batch), None])?;
                let [_, tokens] = assign.shape;
                shape[1] = tokens;
                let y = call.input_bytes(0)?;
                let (x, element) = call.output_bytes(0, &shape)?;
                let problem = Problem { batch, slots, tokens, row_bytes: channels * element };
                match device {
                    Device::Cpu => cpu::token_restore(&problem, y.slice(), assign.slice(), x.slice(), call)?,
                    Device::Cuda => {
                        let tensors = cuda::Tensors { y: y.address(), assign: assign.address(), x: x.address() };
                        // SAFETY: the stream is this call's; operands and output are of these extents and there for
                        // what runs in it.
                        unsafe { cuda::restore(call.stream()?, &problem, &tensors) }?
                    }
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::TokenRestore),
    }
}

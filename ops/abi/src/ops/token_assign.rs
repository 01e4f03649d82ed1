use vitrim_ops::cuda::Operator;
use vitrim_ops::token_assign::{Problem, cpu, cuda};

use crate::call::Typed;
use crate::operator::{Device, Dim, Entry, Operand, Output};

pub fn entry(device: Device) -> Entry {
    Entry {
        name: "TokenAssign",
        device,
        inputs: vec![Operand::of(i64::TYPE); 3],
        outputs: vec![Output::Of(i64::TYPE)],
        shapes: |_, inputs| Some(vec![vec![inputs[0].first()?.clone(), Dim::unknown()]]),
        create: |_, device| {
            Ok(Box::new(move |call| {
                let (anchor, leaving) = (call.input::<i64, 2>(0)?, call.input::<i64, 2>(1)?);
                let ([batch, slots], [_, r]) = (anchor.shape, leaving.shape);
                let leaving = leaving.expect("leaving", [Some(batch), Some(r)])?;
                let into = call.input::<i64, 2>(2)?.expect("into", [Some(batch), Some(r)])?;
                let tokens = slots.checked_add(r).ok_or("too many tokens")?;
                let assign = call.output::<i64>(0, &[batch, tokens])?;
                let problem = Problem { batch, slots, r };
                match device {
                    Device::Cpu => {
                        let [anchor, leaving, into] = [anchor, leaving, into].map(|operand| operand.slice());
                        cpu::token_assign(&problem, anchor, leaving, into, assign.slice())?
                    }
                    Device::Cuda => {
                        let [anchor, leaving, into] = [anchor, leaving, into].map(|operand| operand.address());
                        let tensors = cuda::Tensors { anchor, leaving, into, assign: assign.address() };
                        // SAFETY: the stream is this call's; operands and output are of these extents and there for
                        // what runs in it.
                        unsafe { cuda::assign(call.stream()?, &problem, &tensors) }?
                    }
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::TokenAssign),
    }
}

use ort::value::TensorElementType;
use vitrim_ops::cuda::Operator;
use vitrim_ops::token_size::{cpu, cuda};

use crate::call::Typed;
use crate::operator::{Device, Dim, Entry, Operand, Output};

pub fn entry(device: Device, ty: TensorElementType) -> Entry {
    Entry {
        name: "TokenSize",
        device,
        inputs: vec![Operand::of(ty)],
        outputs: vec![Output::Of(f32::TYPE)],
        shapes: |_, inputs| match &inputs[0][..] {
            [batch, tokens, ..] => Some(vec![vec![batch.clone(), tokens.clone(), Dim::known(1)]]),
            _ => None,
        },
        create: |_, device| {
            Ok(Box::new(move |call| {
                let shape = call.extents(0)?;
                let &[batch, tokens, ..] = &shape[..] else {
                    return Err(format!("operand 0 has shape {shape:?}, and an axis of tokens is wanted").into());
                };
                let size = call.output::<f32>(0, &[batch, tokens, 1])?;
                match device {
                    Device::Cpu => cpu::token_size(batch, tokens, size.slice())?,
                    // SAFETY: the stream is this call's, and the output is there for what runs in it.
                    Device::Cuda => unsafe { cuda::ones(call.stream()?, batch * tokens, size.address()) }?,
                }
                Ok(())
            }))
        },
        kernels: Some(Operator::TokenSize),
    }
}

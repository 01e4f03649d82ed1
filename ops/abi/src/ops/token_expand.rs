use vitrim_ops::token_expand::cpu::{Problem, token_expand};

use crate::call::Typed;
use crate::operator::{Device, Entry, Operand, Output, int};

pub fn entry() -> Entry {
    Entry {
        name: "TokenExpand",
        device: Device::Cpu,
        inputs: vec![Operand::of(f32::TYPE), Operand::of(i64::TYPE)],
        outputs: vec![Output::Of(i64::TYPE)],
        shapes: |_, inputs| Some(vec![inputs[1].clone()]),
        create: |context, _| {
            let (candidates, chosen) = (int(context, "candidates")?, int(context, "chosen")?);
            Ok(Box::new(move |call| {
                let closeness = call.input::<f32, 3>(0)?;
                let [batch, ..] = closeness.shape;
                let closeness = closeness.expect("closeness", [None, Some(candidates), Some(candidates)])?;
                let order = call.input::<i64, 2>(1)?.expect("order", [Some(batch), Some(candidates)])?;
                let order_out = call.output::<i64>(0, &[batch, candidates])?.slice();
                let problem = Problem { batch, candidates, chosen };
                Ok(token_expand(&problem, closeness.slice(), order.slice(), order_out, call)?)
            }))
        },
        kernels: None,
    }
}

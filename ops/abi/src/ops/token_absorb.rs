use vitrim_ops::cpu::Element;
use vitrim_ops::token_absorb::cpu::{Inputs, Outputs, Problem, token_absorb};

use crate::call::Typed;
use crate::operator::{Device, Dim, Entry, Operand, Output, int};

pub fn entry<T: Typed + Element>() -> Entry {
    Entry {
        name: "TokenAbsorb",
        device: Device::Cpu,
        inputs: vec![Operand::of(T::TYPE), Operand::of(f32::TYPE), Operand::of(i64::TYPE)],
        outputs: vec![Output::AsFirst, Output::Of(f32::TYPE), Output::Of(i64::TYPE), Output::Of(i64::TYPE)],
        shapes: |context, inputs| {
            let [batch, tokens, channels] = &inputs[0][..] else { return None };
            let attribute = |name| context.attr::<i64>(name).ok()?.try_into().ok();
            let (keep, protect, suffix) = (attribute("keep")?, attribute("protect")?, attribute("suffix")?);
            let problem = Problem { batch: 1, tokens: attribute("tokens")?, channels: 1, keep, protect, suffix };
            let slots = Dim::known(problem.slots()?.try_into().ok()?);
            let of_slots = |last: &Dim| vec![batch.clone(), slots.clone(), last.clone()];
            let row = |last: &Dim| vec![batch.clone(), last.clone()];
            Some(vec![of_slots(channels), of_slots(&Dim::known(1)), row(&slots), row(tokens)])
        },
        create: |context, _| {
            let (expected, keep) = (int(context, "tokens")?, int(context, "keep")?);
            let (protect, suffix) = (int(context, "protect")?, int(context, "suffix")?);
            Ok(Box::new(move |call| {
                let x = call.input::<T, 3>(0)?.expect("x", [None, Some(expected), None])?;
                let [batch, tokens, channels] = x.shape;
                let problem = Problem { batch, tokens, channels, keep, protect, suffix };
                let (Some(candidates), Some(slots)) = (problem.candidates(), problem.slots()) else {
                    let beside = format!("beside {protect} and {suffix} protected ones");
                    return Err(format!("{keep} of {tokens} tokens cannot be chosen {beside}").into());
                };
                let pairs = [Some(batch), Some(candidates), Some(candidates)];
                let closeness = call.input::<f32, 3>(1)?.expect("closeness", pairs)?;
                let order = call.input::<i64, 2>(2)?.expect("order", [Some(batch), Some(candidates)])?;
                let outputs = Outputs {
                    y: call.output::<T>(0, &[batch, slots, channels])?.slice(),
                    size: call.output::<f32>(1, &[batch, slots, 1])?.slice(),
                    anchor: call.output::<i64>(2, &[batch, slots])?.slice(),
                    assign: call.output::<i64>(3, &[batch, tokens])?.slice(),
                };
                let inputs = Inputs { x: x.slice(), closeness: closeness.slice(), order: order.slice() };
                Ok(token_absorb(&problem, inputs, outputs, call)?)
            }))
        },
        kernels: None,
    }
}

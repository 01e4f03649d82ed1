//! `CosineSimilarity` and `ManhattanDistance`.

use ort::operator::KernelContext;
use vitrim_ops::cpu::Element;
use vitrim_ops::token_similarity::cpu::{Measure, Problem, token_similarity};

use crate::call::{Call, Failure, Typed};
use crate::operator::{Compute, Create, Device, Entry, Operand, Output, int};

pub fn entries<T: Typed + Element>() -> [Entry; 2] {
    [
        entry::<T>("CosineSimilarity", |context, _| create::<T>(Measure::Cosine, context)),
        entry::<T>("ManhattanDistance", |context, _| create::<T>(Measure::Manhattan, context)),
    ]
}

fn entry<T: Typed>(name: &'static str, create: Create) -> Entry {
    Entry {
        name,
        device: Device::Cpu,
        inputs: vec![Operand::of(T::TYPE)],
        outputs: vec![Output::Of(f32::TYPE)],
        shapes: |context, inputs| {
            let [batch, tokens, _] = &inputs[0][..] else { return None };
            let candidates = tokens.minus(context.attr("protect").ok()?).minus(context.attr("suffix").ok()?);
            Some(vec![vec![batch.clone(), candidates.clone(), candidates]])
        },
        create,
        kernels: None,
    }
}

fn create<T: Typed + Element>(measure: Measure, context: &KernelContext) -> Result<Compute, Failure> {
    let (protect, suffix) = (int(context, "protect")?, int(context, "suffix")?);
    let sign: i64 = context.get("sign").ok_or("attribute sign is missing")?;
    Ok(Box::new(move |call: &Call| {
        let x = call.input::<T, 3>(0)?;
        let [batch, tokens, channels] = x.shape;
        let problem = Problem { batch, tokens, channels, protect, suffix, sign: sign as f32 };
        let candidates = problem
            .candidates()
            .ok_or_else(|| format!("{protect} and {suffix} of {tokens} tokens are to be protected"))?;
        let closeness = call.output::<f32>(0, &[batch, candidates, candidates])?.slice();
        let run = |scratch: &mut [f32]| token_similarity(measure, &problem, x.slice(), closeness, scratch, call);
        Ok(call.with_scratch(problem.scratch_len(), run)??)
    }))
}

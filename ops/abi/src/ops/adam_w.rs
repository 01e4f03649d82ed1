use ort::operator::KernelContext;
use vitrim_ops::adam_w::cpu;

use crate::call::{Failure, Typed};
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry() -> Entry {
    Entry {
        name: "AdamW",
        device: Device::Cpu,
        inputs: vec![Operand::of(f32::TYPE); 7],
        outputs: vec![Output::AsFirst; 3],
        shapes: |_, inputs| Some(vec![inputs[0].clone(); 3]),
        create: |context, _| {
            let mean_rate = float(context, "mean_rate")?;
            let [variance_rate, epsilon] = [float(context, "variance_rate")?, float(context, "epsilon")?];
            Ok(Box::new(move |call| {
                let shape = call.extents(0)?;
                for at in 1..4 {
                    if call.extents(at)? != shape {
                        return Err("a parameter, its gradient and moments have different shapes".into());
                    }
                }
                let flat = |at: usize| Ok::<_, Failure>(call.input_flat::<f32>(at)?.slice());
                let scalar = |at: usize| Ok::<_, Failure>(call.input::<f32, 0>(at)?.slice()[0]);
                let (kept, rate, deviation) = (scalar(4)?, scalar(5)?, scalar(6)?);
                let step = cpu::Step { mean_rate, variance_rate, epsilon, kept, rate, deviation };
                let (parameter, gradient) = (flat(0)?, flat(1)?);
                let inputs = cpu::Inputs { parameter, gradient, mean: flat(2)?, variance: flat(3)? };
                let outputs = cpu::Outputs {
                    parameter: call.output::<f32>(0, &shape)?.slice(),
                    mean: call.output::<f32>(1, &shape)?.slice(),
                    variance: call.output::<f32>(2, &shape)?.slice(),
                };
                Ok(cpu::adam_w(&step, inputs, outputs, call)?)
            }))
        },
        kernels: None,
    }
}

fn float(context: &KernelContext, name: &str) -> Result<f32, Failure> {
    Ok(context.get(name).ok_or_else(|| format!("attribute {name} is missing"))?)
}

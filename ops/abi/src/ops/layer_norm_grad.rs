use vitrim_ops::layer_norm_grad::cpu;

use crate::call::Typed;
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry() -> Entry {
    Entry {
        name: "LayerNormGrad",
        device: Device::Cpu,
        inputs: vec![Operand::of(f32::TYPE); 3],
        outputs: vec![Output::AsFirst; 3],
        shapes: |_, inputs| Some(vec![inputs[0].clone(), inputs[1].clone(), inputs[1].clone()]),
        create: |context, _| {
            let axis: i64 = context.get("axis").ok_or("attribute axis is missing")?;
            let epsilon: f32 = context.get("epsilon").ok_or("attribute epsilon is missing")?;
            Ok(Box::new(move |call| {
                let (shape, of_scale) = (call.extents(0)?, call.extents(1)?);
                let first = if axis < 0 { axis.saturating_add(shape.len() as i64) } else { axis };
                let first = usize::try_from(first).ok().filter(|&first| first <= shape.len());
                let (rows, columns) = shape.split_at(first.ok_or_else(|| format!("x has no axis {axis}"))?);
                if of_scale != columns || call.extents(2)? != shape {
                    return Err("x, scale and dy have shapes that do not fit one another".into());
                }
                let [x, scale, dy] =
                    [call.input_flat::<f32>(0)?, call.input_flat::<f32>(1)?, call.input_flat::<f32>(2)?];
                let problem = cpu::Problem { rows: rows.iter().product(), columns: columns.iter().product(), epsilon };
                let inputs = cpu::Inputs { x: x.slice(), scale: scale.slice(), dy: dy.slice() };
                let outputs = cpu::Outputs {
                    dx: call.output::<f32>(0, &shape)?.slice(),
                    dscale: call.output::<f32>(1, &of_scale)?.slice(),
                    dbias: call.output::<f32>(2, &of_scale)?.slice(),
                };
                let run = |scratch: &mut [f32]| cpu::layer_norm_grad(&problem, inputs, outputs, scratch, call);
                Ok(call.with_scratch(problem.scratch_len(), run)??)
            }))
        },
        kernels: None,
    }
}

use vitrim_ops::softmax_grad::cpu;

use crate::call::Typed;
use crate::operator::{Device, Entry, Operand, Output};

pub fn entry() -> Entry {
    Entry {
        name: "SoftmaxGrad",
        device: Device::Cpu,
        inputs: vec![Operand::of(f32::TYPE); 2],
        outputs: vec![Output::AsFirst],
        shapes: |_, inputs| Some(vec![inputs[0].clone()]),
        create: |_, _| {
            Ok(Box::new(|call| {
                let shape = call.extents(0)?;
                let [y, dy] = [call.input_flat::<f32>(0)?, call.input_flat::<f32>(1)?];
                let (&columns, rows) = shape.split_last().ok_or("y has no axes")?;
                if call.extents(1)? != shape {
                    return Err("y and dy have different shapes".into());
                }
                let problem = cpu::Problem { rows: rows.iter().product(), columns };
                let dx = call.output::<f32>(0, &shape)?.slice();
                Ok(cpu::softmax_grad(&problem, y.slice(), dy.slice(), dx, call)?)
            }))
        },
        kernels: None,
    }
}

use vitrim_ops::gelu_grad::cpu::{Form, gelu_grad};

use crate::call::{Call, Failure, Typed};
use crate::operator::{Create, Device, Entry, Operand, Output};

pub fn entries() -> [Entry; 2] {
    [
        entry("GeluGrad", |_, _| Ok(Box::new(|call| run(Form::Exact, call)))),
        entry("TanhGeluGrad", |_, _| Ok(Box::new(|call| run(Form::Tanh, call)))),
    ]
}

fn entry(name: &'static str, create: Create) -> Entry {
    Entry {
        name,
        device: Device::Cpu,
        inputs: vec![Operand::of(f32::TYPE); 2],
        outputs: vec![Output::AsFirst],
        shapes: |_, inputs| Some(vec![inputs[0].clone()]),
        create,
        kernels: None,
    }
}

fn run(form: Form, call: &Call) -> Result<(), Failure> {
    let shape = call.extents(0)?;
    if call.extents(1)? != shape {
        return Err("x and dy have different shapes".into());
    }
    let [x, dy] = [call.input_flat::<f32>(0)?, call.input_flat::<f32>(1)?];
    let dx = call.output::<f32>(0, &shape)?.slice();
    Ok(gelu_grad(form, x.slice(), dy.slice(), dx, call)?)
}

//! A text form of graphs, for people and golden tests. One line per node; not meant to be read back.
//!
//! ```text
//! in  images: f32[batch,3,32,32]
//! %y = Conv(images, w{f32[48,3,4,4]}) kernel_shape=[4,4] strides=[4,4]
//! out logits: f32[batch,10]
//! ```
//! Small integer constants are written out where they are read; other constants as `name{type}`.

use std::fmt::Write;

use crate::graph::{Attribute, Def, Graph, Node};
use crate::{Tensor, ValueId};

/// Constants of at most this many elements are written out.
const INLINE_ELEMENTS: usize = 8;

/// The text form of a graph.
pub fn print_graph(graph: &Graph) -> String {
    let mut text = String::new();
    for &id in graph.inputs() {
        line(&mut text, "in  ", graph, id);
    }
    for (_, node) in graph.nodes() {
        if !node.is("Constant") {
            print_node(&mut text, graph, node, "");
        }
    }
    for &id in graph.outputs() {
        line(&mut text, "out ", graph, id);
    }
    text
}

fn line(text: &mut String, head: &str, graph: &Graph, id: ValueId) {
    let value = graph.value(id);
    let ty = value.ty().map_or("?".into(), |ty| ty.to_string());
    writeln!(text, "{head}{}: {ty}", value.name()).expect("writing to a string");
}

fn print_node(text: &mut String, graph: &Graph, node: &Node, indent: &str) {
    let results: Vec<String> =
        node.outputs.iter().map(|id| id.map_or("_".into(), |id| format!("%{}", graph.value(id).name()))).collect();
    let operands: Vec<String> = node.inputs.iter().map(|id| id.map_or("_".into(), |id| operand(graph, id))).collect();
    write!(text, "{indent}{} = {}({})", results.join(", "), node.op, operands.join(", ")).expect("writing to a string");
    let mut nested = Vec::new();
    for (key, value) in &node.attributes {
        let shown = match value {
            Attribute::Int(x) => x.to_string(),
            Attribute::Float(x) => format!("{x:?}"),
            Attribute::String(x) => format!("{:?}", String::from_utf8_lossy(x)),
            Attribute::Ints(x) => format!("{x:?}").replace(' ', ""),
            Attribute::Floats(x) => format!("{x:?}").replace(' ', ""),
            Attribute::Strings(x) => format!("{} strings", x.len()),
            Attribute::Tensor(x) => constant(x),
            Attribute::Ref(target, _) => format!("@{target}"),
            Attribute::Graph(graph) => {
                nested.push((key, graph));
                continue;
            }
            Attribute::Other(_) => "..".into(),
        };
        write!(text, " {key}={shown}").expect("writing to a string");
    }
    text.push('\n');
    for (key, graph) in nested {
        let deeper = format!("{indent}  ");
        writeln!(text, "{indent} {key}:").expect("writing to a string");
        for (_, node) in graph.nodes().filter(|(_, node)| !node.is("Constant")) {
            print_node(text, graph, node, &deeper);
        }
        let outputs: Vec<String> = graph.outputs().iter().map(|&id| operand(graph, id)).collect();
        writeln!(text, "{deeper}yield {}", outputs.join(", ")).expect("writing to a string");
    }
}

fn operand(graph: &Graph, id: ValueId) -> String {
    if let Some(tensor) = graph.constant(id) {
        let shown = constant(&tensor);
        return if shown.starts_with('{') { format!("{}{shown}", graph.value(id).name()) } else { shown };
    }
    match graph.value(id).def() {
        Def::Node(..) | Def::Captured(_) => format!("%{}", graph.value(id).name()),
        _ => graph.value(id).name().to_owned(),
    }
}

fn constant(tensor: &Tensor) -> String {
    if tensor.len() > INLINE_ELEMENTS {
        return format!("{{{}}}", tensor.ty());
    }
    let scalar = tensor.dims().is_empty();
    let shown = match (tensor.to_i64s(), tensor.to_f64s()) {
        (Some(x), _) if scalar => Some(x[0].to_string()),
        (Some(x), _) => Some(format!("{x:?}").replace(' ', "")),
        (_, Some(x)) if scalar => Some(format!("{:?}", x[0])),
        _ => None,
    };
    shown.unwrap_or_else(|| format!("{{{}}}", tensor.ty()))
}

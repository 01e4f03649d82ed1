use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Static form: the number of connections and M are attributes.
pub struct ConnectionMask;

/// Dynamic form: the number of connections is an input, M comes from the tensor.
pub struct ConnectionMaskDynamic;

impl OpDef for ConnectionMask {
    fn name(&self) -> &'static str {
        "ConnectionMask"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [weights, anchor] = ["weights", "anchor"].map(|name| body.input(name));
        let [connections, slots] = ["connections", "slots"].map(|name| body.attribute(name));
        let mask = mask(&mut body, weights, anchor, connections, slots);
        body.finish(self.name(), &["connections", "slots", "protect", "suffix"], &[("mask", mask)], DOC)
    }
}

impl OpDef for ConnectionMaskDynamic {
    fn name(&self) -> &'static str {
        "ConnectionMaskDynamic"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [weights, anchor, connections] = ["weights", "anchor", "connections"].map(|name| body.input(name));
        let shape = body.op("Shape", "shape", &[anchor]);
        let (one, two) = (body.ints("from", &[1]), body.ints("to", &[2]));
        let slots = body.slice(shape, one, two, 0, 1, "slots");
        let mask = mask(&mut body, weights, anchor, connections, slots);
        body.finish(self.name(), &["protect", "suffix"], &[("mask", mask)], DOC)
    }
}

const DOC: &str = "The strongest connections of every slot (arXiv 2211.10801, attention level).";

/// The body; `connections` and `slots` are int64 `[1]`.
fn mask(body: &mut Body, weights: ValueId, anchor: ValueId, connections: ValueId, slots: ValueId) -> ValueId {
    let [protect, suffix] = ["protect", "suffix"].map(|name| body.attribute(name));
    let (zero, one) = (body.ints("c0", &[0]), body.ints("c1", &[1]));
    let end = body.op("Sub", "end", &[slots, suffix]);
    let free = body.op("Sub", "free", &[end, protect]);
    let least = body.op("Max", "at_least_one", &[connections, one]);
    let count = body.op("Min", "count", &[least, free]);

    // How strong the connections are: columns of the free slots, then rows.
    let weights = body.as_f32(weights, "weights_f32");
    let mean = body.reduce("ReduceMean", weights, &[1], 0, "mean_of_heads");
    let anchor = body.slice(anchor, protect, end, 1, 1, "free_anchor");
    let transpose = |body: &mut Body, value: ValueId, hint: &str| {
        body.op_with("Transpose", hint, &[value], &[("perm", Attribute::Ints(vec![0, 2, 1]))])
    };
    let columns = transpose(body, mean, "columns_first");
    let columns = body.rows(columns, anchor, "columns");
    let columns = transpose(body, columns, "rows_first");
    let strength = body.rows(columns, anchor, "mean_strength");
    // Runtimes do not agree how what is not a number is sorted.
    let undefined = body.op("IsNaN", "undefined", &[strength]);
    let infinite = body.float("infinite", f32::INFINITY);
    let strength = body.op("Where", "strength", &[undefined, infinite, strength]);

    let strongest = body.largest_last(strength, count, "strongest");
    let before = body.op("Sub", "count_but_one", &[count, one]);
    let weakest = body.slice(strongest, before, count, 2, 1, "weakest");
    let stays = body.op("GreaterOrEqual", "stays", &[strength, weakest]);
    let stays = body.as_f32(stays, "stays_f32");
    let pads = body.concat(&[zero, protect, protect, zero, suffix, suffix], 0, "around");
    let open = body.float("open", 1.0);
    body.op("Pad", "with_protected", &[stays, pads, open])
}

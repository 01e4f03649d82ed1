use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Every token joins the closest of the chosen ones.
pub struct TokenAbsorb;

impl OpDef for TokenAbsorb {
    fn name(&self) -> &'static str {
        "TokenAbsorb"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [x, closeness, order] = ["x", "closeness", "order"].map(|name| body.input(name));
        let [tokens, keep, protect, suffix] = ["tokens", "keep", "protect", "suffix"].map(|name| body.attribute(name));
        let (zero, one) = (body.ints("c0", &[0]), body.ints("c1", &[1]));
        let end = body.op("Sub", "end", &[tokens, suffix]);
        let candidates = body.op("Sub", "candidates", &[end, protect]);
        let gone = body.op("Sub", "gone", &[candidates, keep]);

        // A chosen token is closest to itself.
        let chosen = body.slice(order, zero, keep, 1, 1, "chosen");
        let rows = body.rows(closeness, chosen, "closeness_of_chosen");
        let positions = body.iota(candidates, "positions");
        let column = body.unsqueeze(chosen, &[2], "chosen_column");
        let itself = body.op("Equal", "itself", &[column, positions]);
        let infinite = body.float("infinite", f32::INFINITY);
        let to_chosen = body.op("Where", "closeness_to_chosen", &[itself, infinite, rows]);
        let attributes = [("axis", Attribute::Int(1)), ("keepdims", Attribute::Int(1))];
        let closest = body.op_with("ArgMax", "closest_kept", &[to_chosen], &attributes);
        let closest = body.op("Squeeze", "closest", &[closest, one]);
        let joined = body.op("Add", "slots_joined", &[closest, protect]);

        let first = body.slice(chosen, zero, one, 1, 1, "first_chosen");
        let zero_per_image = body.op("Sub", "zero_per_image", &[first, first]);
        let all = body.iota(tokens, "positions_of_all");
        let slot_of_back = body.op("Sub", "slots_of_back", &[all, gone]);
        let mut fixed = |row: ValueId, start: ValueId, end: ValueId, name: &str| {
            let row = body.slice(row, start, end, 0, 1, &format!("{name}_row"));
            body.per_image(zero_per_image, row, name)
        };
        let front = fixed(all, zero, protect, "front");
        let back = fixed(all, end, tokens, "back");
        let slot_of_back = fixed(slot_of_back, end, tokens, "back_slots");
        let chosen_at = body.op("Add", "chosen_at", &[chosen, protect]);
        let anchor = body.concat(&[front, chosen_at, back], 1, "anchors");
        let assign = body.concat(&[front, joined, slot_of_back], 1, "slots");

        let count = body.op("Sub", "count_of_slots", &[tokens, gone]);
        let slots = body.iota(count, "slot_ids");
        let slots = body.unsqueeze(slots, &[0, 2], "slot_column");
        let row = body.unsqueeze(assign, &[1], "slot_row");
        let member = body.op("Equal", "member", &[slots, row]);
        let member = body.as_f32(member, "member_f32");
        let size = body.sum_last(member, "sizes");
        let x = body.as_f32(x, "x_f32");
        let sum = body.op("MatMul", "sum", &[member, x]);
        let mean = body.op("Div", "mean", &[sum, size]);
        let y = body.as_dtype(mean, "mean_as_x");
        let outputs = [("y", y), ("size", size), ("anchor", anchor), ("assign", assign)];
        let doc = "Merges every token into the closest of the chosen ones (arXiv 2404.00672).";
        body.finish(self.name(), &["tokens", "keep", "protect", "suffix", "dtype"], &outputs, doc)
    }
}

use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Static form: N and r are attributes.
pub struct TokenMerge;

/// Dynamic form: r is an input, N comes from the tensor.
pub struct TokenMergeDynamic;

impl OpDef for TokenMerge {
    fn name(&self) -> &'static str {
        "TokenMerge"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let tokens = body.attribute("tokens");
        let r = body.attribute("r");
        let outputs = merge(&mut body, &operands, tokens, r);
        let attributes = [&["r", "tokens"], &ATTRIBUTES[..]].concat();
        body.finish(self.name(), &attributes, &outputs, "Merges the r most similar pairs of tokens (arXiv 2210.09461).")
    }
}

impl OpDef for TokenMergeDynamic {
    fn name(&self) -> &'static str {
        "TokenMergeDynamic"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let r = body.input("r");
        let tokens = body.extent(operands.x, "tokens");
        // r = max(0, min(r, (N - protect - suffix) / 2))
        let free = body.op("Sub", "behind_front", &[tokens, operands.protect]);
        let free = body.op("Sub", "free", &[free, operands.suffix]);
        let two = body.ints("two", &[2]);
        let limit = body.op("Div", "limit", &[free, two]);
        let capped = body.op("Min", "capped", &[r, limit]);
        let zero = body.ints("zero", &[0]);
        let r = body.op("Max", "r_effective", &[capped, zero]);
        let outputs = merge(&mut body, &operands, tokens, r);
        body.finish(self.name(), &ATTRIBUTES, &outputs, "Merges up to r pairs of tokens (arXiv 2210.09461).")
    }
}

const ATTRIBUTES: [&str; 6] = ["protect", "suffix", "heads", "head_dim", "metric_at", "dtype"];

struct Operands {
    x: ValueId,
    metric: ValueId,
    size: ValueId,
    protect: ValueId,
    suffix: ValueId,
}

impl Operands {
    fn declare(body: &mut Body) -> Self {
        let [x, metric, size] = ["x", "metric", "size"].map(|name| body.input(name));
        let [protect, suffix] = ["protect", "suffix"].map(|name| body.attribute(name));
        let [heads, head_dim, at] = ["heads", "head_dim", "metric_at"].map(|name| body.attribute(name));
        let metric = body.heads(metric, at, heads, head_dim, "metric");
        let metric = body.as_f32(metric, "metric_f32");
        let metric = body.reduce("ReduceMean", metric, &[2], 0, "metric_mean");
        Self { x, metric, size, protect, suffix }
    }
}

/// The body; `tokens` and `r` are int64 `[1]`.
fn merge(body: &mut Body, operands: &Operands, tokens: ValueId, r: ValueId) -> [(&'static str, ValueId); 5] {
    let &Operands { x, metric, size, protect, suffix } = operands;
    let (zero, one, two) = (body.ints("c0", &[0]), body.ints("c1", &[1]), body.ints("c2", &[2]));

    // Candidates: A at even, B at odd positions of what is not protected.
    let end = body.op("Sub", "end", &[tokens, suffix]);
    let odd = body.op("Mod", "protect_odd", &[protect, two]);
    let first_a = body.op("Add", "first_a", &[protect, odd]);
    let even = body.op("Sub", "protect_even", &[one, odd]);
    let first_b = body.op("Add", "first_b", &[protect, even]);
    let left = body.op("Sub", "range_a", &[end, first_a]);
    let left = body.op("Add", "range_a_up", &[left, one]);
    let count_a = body.op("Div", "count_a", &[left, two]);

    let unit = body.unit_rows(metric);

    // One edge per A token; one sort splits A into leaving and staying, so that no token is lost among ties.
    let a = body.slice(unit, first_a, end, 1, 2, "a");
    let b = body.slice(unit, first_b, end, 1, 2, "b");
    let b = body.op_with("Transpose", "b_transposed", &[b], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let scores = body.op("MatMul", "scores", &[a, b]);
    let best = body.max_last(scores, "best");
    let partner = body.argmax_last(scores, "partner");
    let order = body.argsort(best, count_a, true, "order");
    let leaving = body.slice(order, zero, r, 1, 1, "leaving_a");
    let staying = body.slice(order, r, count_a, 1, 1, "staying_by_similarity");

    // With protected tokens at the front, staying tokens go back into order of position.
    let count_staying = body.op("Sub", "count_staying", &[count_a, r]);
    let by_position = body.op("Greater", "by_position", &[protect, zero]);
    let present = body.iota(count_staying, "present_order");
    let key = body.op("Where", "staying_key", &[by_position, staying, present]);
    let staying_order = body.argsort(key, count_staying, false, "staying_order");
    let staying = body.entries(staying, staying_order, "staying");

    // Positions among all tokens, and slots.
    let double = body.op("Mul", "leaving_doubled", &[leaving, two]);
    let leaving_at = body.op("Add", "leaving_at", &[double, first_a]);
    let double = body.op("Mul", "staying_doubled", &[staying, two]);
    let staying_at = body.op("Add", "staying_at", &[double, first_a]);
    let zero_per_image = body.zero_per_image(size);
    let all = body.iota(tokens, "positions");
    let fixed = |body: &mut Body, start: ValueId, end: ValueId, step: i64, name: &str| {
        let row = body.slice(all, start, end, 0, step, &format!("{name}_row"));
        body.per_image(zero_per_image, row, name)
    };
    let front = fixed(body, zero, protect, 1, "front");
    let receiving = fixed(body, first_b, end, 2, "receiving");
    let back = fixed(body, end, tokens, 1, "back");
    let anchor = body.concat(&[front, staying_at, receiving, back], 1, "anchors");
    let chosen = body.entries(partner, leaving, "chosen");
    let before_b = body.op("Add", "slots_before_b", &[protect, count_staying]);
    let into = body.op("Add", "slots_joined", &[chosen, before_b]);

    // Sizes, and the share that each leaving token has in its slot.
    let slots = body.op("Sub", "slots", &[tokens, r]);
    let slot_ids = body.iota(slots, "slot_ids");
    let slot_ids = body.unsqueeze(slot_ids, &[0, 2], "slot_column");
    let into_row = body.unsqueeze(into, &[1], "into_row");
    let joins = body.op("Equal", "joins", &[slot_ids, into_row]);
    let joins = body.as_f32(joins, "joins_f32");
    let size_anchor = body.rows(size, anchor, "size_of_anchor");
    let size_leaving = body.rows(size, leaving_at, "size_of_leaving");
    let joined = body.op("MatMul", "size_joined", &[joins, size_leaving]);
    let size_out = body.op("Add", "size_sum", &[size_anchor, joined]);
    let share_anchor = body.op("Div", "share_of_anchor", &[size_anchor, size_out]);
    let size_row =
        body.op_with("Transpose", "leaving_size_row", &[size_leaving], &[("perm", Attribute::Ints(vec![0, 2, 1]))]);
    let weighted = body.op("Mul", "joins_weighted", &[joins, size_row]);
    let shares = body.op("Div", "shares", &[weighted, size_out]);

    let x_anchor = body.rows(x, anchor, "x_of_anchor");
    let x_anchor = body.as_f32(x_anchor, "x_of_anchor_f32");
    let x_leaving = body.rows(x, leaving_at, "x_of_leaving");
    let x_leaving = body.as_f32(x_leaving, "x_of_leaving_f32");
    let kept = body.op("Mul", "kept", &[x_anchor, share_anchor]);
    let added = body.op("MatMul", "added", &[shares, x_leaving]);
    let merged = body.op("Add", "merged", &[kept, added]);
    let y = body.as_dtype(merged, "merged_as_x");
    [("y", y), ("size_out", size_out), ("anchor", anchor), ("leaving", leaving_at), ("into", into)]
}

use vitrim_ir::{Attribute, Function, ValueId};

use crate::OpDef;
use crate::body::Body;

/// Static form: k and N are attributes.
pub struct TokenPrune;

/// Dynamic form: k is an input, N comes from the tensor.
pub struct TokenPruneDynamic;

impl OpDef for TokenPrune {
    fn name(&self) -> &'static str {
        "TokenPrune"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let tokens = body.attribute("tokens");
        let keep = body.attribute("keep");
        let outputs = prune(&mut body, &operands, tokens, keep);
        let attributes = [&["keep", "tokens"], &ATTRIBUTES[..]].concat();
        body.finish(self.name(), &attributes, &outputs, "Keeps the k tokens of the highest scores (arXiv 2202.07800).")
    }
}

impl OpDef for TokenPruneDynamic {
    fn name(&self) -> &'static str {
        "TokenPruneDynamic"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let operands = Operands::declare(&mut body);
        let keep = body.input("keep");
        let tokens = body.extent(operands.x, "tokens");
        // k = max(0, min(k, N - protect - suffix))
        let limit = body.op("Sub", "behind_front", &[tokens, operands.protect]);
        let limit = body.op("Sub", "limit", &[limit, operands.suffix]);
        let capped = body.op("Min", "capped", &[keep, limit]);
        let zero = body.ints("zero", &[0]);
        let keep = body.op("Max", "keep_effective", &[capped, zero]);
        let outputs = prune(&mut body, &operands, tokens, keep);
        body.finish(
            self.name(),
            &ATTRIBUTES,
            &outputs,
            "Keeps up to k tokens, those of the highest scores (arXiv 2202.07800).",
        )
    }
}

const ATTRIBUTES: [&str; 4] = ["protect", "suffix", "fuse", "dtype"];

struct Operands {
    x: ValueId,
    score: ValueId,
    size: ValueId,
    protect: ValueId,
    suffix: ValueId,
    fuse: ValueId,
}

impl Operands {
    fn declare(body: &mut Body) -> Self {
        let [x, score, size] = ["x", "score", "size"].map(|name| body.input(name));
        let [protect, suffix, fuse] = ["protect", "suffix", "fuse"].map(|name| body.attribute(name));
        Self { x, score, size, protect, suffix, fuse }
    }
}

/// The body; `tokens` and `keep` are int64 `[1]`.
fn prune(body: &mut Body, operands: &Operands, tokens: ValueId, keep: ValueId) -> [(&'static str, ValueId); 4] {
    let &Operands { x, score, size, protect, suffix, fuse } = operands;
    let (zero, one) = (body.ints("c0", &[0]), body.ints("c1", &[1]));
    let end = body.op("Sub", "end", &[tokens, suffix]);
    let candidates = body.op("Sub", "candidates", &[end, protect]);
    let dropped = body.op("Sub", "dropped", &[candidates, keep]);
    let extra = body.op("Min", "extra", &[fuse, dropped]);

    // One sort puts the candidates in order; the first are kept, so that no token is lost among ties.
    let scores = body.slice(score, protect, end, 1, 1, "candidate_scores");
    let nan = body.op("IsNaN", "score_is_nan", &[scores]);
    let infinity = body.float("infinity", f32::INFINITY);
    let key = body.op("Where", "sort_key", &[nan, infinity, scores]);
    let order = body.argsort(key, candidates, true, "order");
    let order = body.op("Add", "order_of_tokens", &[order, protect]);

    // All tokens in a row: those at the front, the candidates, of which the last are dropped, and those at the end.
    let zero_per_image = body.zero_per_image(size);
    let all = body.iota(tokens, "positions");
    let fixed = |body: &mut Body, start: ValueId, end: ValueId, name: &str| {
        let row = body.slice(all, start, end, 0, 1, &format!("{name}_row"));
        body.per_image(zero_per_image, row, name)
    };
    let front = fixed(body, zero, protect, "front");
    let back = fixed(body, end, tokens, "back");
    let row = body.concat(&[front, order, back], 1, "row");
    let kept_end = body.op("Add", "kept_end", &[protect, keep]);
    let kept = body.slice(row, zero, kept_end, 1, 1, "kept");

    // Those dropped, if they are fused, weighted and summed.
    let fused = body.op("Mul", "count_fused", &[fuse, dropped]);
    let fused_end = body.op("Add", "fused_end", &[kept_end, fused]);
    let fused = body.slice(row, kept_end, fused_end, 1, 1, "fused");
    let weights = body.entries(score, fused, "fused_scores");
    let weights = body.unsqueeze(weights, &[1], "fused_weights");
    let x_fused = body.rows(x, fused, "x_of_fused");
    let x_fused = body.as_f32(x_fused, "x_of_fused_f32");
    let sum = body.op("MatMul", "fused_sum", &[weights, x_fused]);
    let sum = body.as_dtype(sum, "fused_sum_as_x");
    let no_token = body.op("Sub", "no_token", &[zero_per_image, one]);
    let size_fused = body.op("Add", "one_per_image", &[zero_per_image, one]);
    let size_fused = body.as_f32(size_fused, "one_per_image_f32");
    let size_fused = body.unsqueeze(size_fused, &[-1], "size_of_fused");

    // What the slots have: of the tokens that are kept, of those fused if there is a slot of them, of those at the end.
    let of_slots = |body: &mut Body, kept: ValueId, fused: ValueId, back: ValueId, name: &str| {
        let fused = body.slice(fused, zero, extra, 1, 1, &format!("{name}_of_extra"));
        body.concat(&[kept, fused, back], 1, name)
    };
    let anchor = of_slots(body, kept, no_token, back, "anchors");
    let x_kept = body.rows(x, kept, "x_of_kept");
    let x_back = body.slice(x, end, tokens, 1, 1, "x_of_back");
    let y = of_slots(body, x_kept, sum, x_back, "x");
    let size_kept = body.rows(size, kept, "size_of_kept");
    let size_back = body.slice(size, end, tokens, 1, 1, "size_of_back");
    let size_out = of_slots(body, size_kept, size_fused, size_back, "sizes");

    // The slot of each place in the row. The row is a permutation; sorting it inverts it.
    let past_kept = body.op("Add", "past_kept", &[kept_end, one]);
    let slot_of_dropped = body.op("Mul", "past_kept_or_zero", &[extra, past_kept]);
    let slot_of_dropped = body.op("Sub", "slot_of_dropped", &[slot_of_dropped, one]);
    let gone = body.op("Sub", "gone", &[dropped, extra]);
    let slot_of_back = body.op("Sub", "slot_of_back", &[all, gone]);
    let is_kept = body.op("Less", "is_kept", &[all, kept_end]);
    let is_before_back = body.op("Less", "is_before_back", &[all, end]);
    let slot = body.op("Where", "slot_behind_kept", &[is_before_back, slot_of_dropped, slot_of_back]);
    let slot = body.op("Where", "slot_of_place", &[is_kept, all, slot]);
    let place = body.argsort(row, tokens, false, "place");
    let assign = body.op_with("Gather", "slot_of_token", &[slot, place], &[("axis", Attribute::Int(0))]);
    [("y", y), ("size_out", size_out), ("anchor", anchor), ("assign", assign)]
}

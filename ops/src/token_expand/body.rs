use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// A round of expansion.
pub struct TokenExpand;

impl OpDef for TokenExpand {
    fn name(&self) -> &'static str {
        "TokenExpand"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [closeness, order] = ["closeness", "order"].map(|name| body.input(name));
        let [candidates, count] = ["candidates", "chosen"].map(|name| body.attribute(name));
        let (zero, one) = (body.ints("c0", &[0]), body.ints("c1", &[1]));
        let chosen = body.slice(order, zero, count, 1, 1, "chosen_tokens");
        let rest = body.slice(order, count, candidates, 1, 1, "rest");
        let to_chosen = body.rows(closeness, chosen, "closeness_to_chosen");
        let best = body.reduce("ReduceMax", to_chosen, &[1], 1, "best_kept");
        let best = body.op("Squeeze", "best", &[best, one]);
        let best = body.entries(best, rest, "best_of_rest");
        let left = body.op("Sub", "count_of_rest", &[candidates, count]);
        let place = body.argsort(best, left, false, "place");
        let rest = body.entries(rest, place, "rest_in_order");
        let order = body.concat(&[chosen, rest], 1, "next_order");
        let doc = "Puts the tokens first that are least close to those chosen so far (arXiv 2404.00672).";
        body.finish(self.name(), &["candidates", "chosen"], &[("order_out", order)], doc)
    }
}

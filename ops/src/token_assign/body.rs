use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// The slot of every token.
pub struct TokenAssign;

impl OpDef for TokenAssign {
    fn name(&self) -> &'static str {
        "TokenAssign"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [anchor, leaving, into] = ["anchor", "leaving", "into"].map(|name| body.input(name));
        let slots = body.extent(anchor, "slots");
        let own = body.iota(slots, "slot_ids");
        let zero = body.op("Sub", "zero_per_slot", &[anchor, anchor]);
        let own = body.op("Add", "slot_of_anchor", &[zero, own]);
        // The tokens as the slots list them are a permutation; sorting it inverts it.
        let listed = body.concat(&[anchor, leaving], 1, "listed");
        let slot_of_listed = body.concat(&[own, into], 1, "slot_of_listed");
        let tokens = body.extent(listed, "tokens");
        let place = body.argsort(listed, tokens, false, "place");
        let assign = body.entries(slot_of_listed, place, "slot_of_token");
        body.finish(self.name(), &[], &[("assign", assign)], "The slot of every token after a regrouping.")
    }
}

use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// The mean over each slot.
pub struct TokenMean;

impl OpDef for TokenMean {
    fn name(&self) -> &'static str {
        "TokenMean"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [table, assign, size] = ["table", "assign", "size"].map(|name| body.input(name));
        let slots = body.extent(size, "slots");
        let slots = body.iota(slots, "slot_ids");
        let slots = body.unsqueeze(slots, &[0, 2], "slot_column");
        let assign = body.unsqueeze(assign, &[1], "assign_row");
        let member = body.op("Equal", "member", &[slots, assign]);
        let member = body.as_f32(member, "member_f32");
        let table = body.as_f32(table, "table_f32");
        let sum = body.op("MatMul", "sum", &[member, table]);
        let mean = body.op("Div", "mean", &[sum, size]);
        let y = body.as_dtype(mean, "mean_as_table");
        body.finish(self.name(), &["dtype"], &[("y", y)], "What has an entry for each token, averaged over each slot.")
    }
}

use vitrim_ir::Function;

use crate::OpDef;
use crate::body::Body;

/// Slots back to tokens.
pub struct TokenRestore;

impl OpDef for TokenRestore {
    fn name(&self) -> &'static str {
        "TokenRestore"
    }

    fn function(&self, opset: i64) -> Function {
        let mut body = Body::new(opset);
        let [y, assign] = ["y", "assign"].map(|name| body.input(name));
        let x = body.rows(y, assign, "rows");
        body.finish(self.name(), &[], &[("x", x)], "Copies every slot to the tokens that are in it.")
    }
}

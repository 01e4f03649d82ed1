//! Fused attention operators, opened: their queries, keys and values, the scores that they compute inside, and what they
//! make of the weights. For what has to see or change those.

use vitrim_ir::{DataType, Effect, FusedAttention, Node, NodeId, Operands, Tensor, ValueId};

use super::Rewriter;
use crate::Refusal;
use crate::recognise::Window;

/// All queries, where a number of first ones is asked for.
pub(super) const ALL_QUERIES: i64 = i64::MAX;

/// An operand of attention; also its place among them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Queries = 0,
    Keys = 1,
    Values = 2,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Queries => "queries",
            Self::Keys => "keys",
            Self::Values => "values",
        }
    }
}

impl Rewriter<'_> {
    /// Queries, keys or values of a fused attention, `[B, N, H * d]`, with their bias. Where the operator projects the
    /// tokens itself the projection is computed once more: of queries for the first `queries` tokens only.
    pub(super) fn fused_part(
        &mut self,
        node: &Node,
        fused: &FusedAttention,
        part: Part,
        queries: i64,
        hint: &str,
    ) -> Option<Window> {
        let at = part as usize;
        let operand = node.input(fused.slots()[at])?;
        let heads = self.fused_heads(node, fused, part)?;
        let widths = self.widths(node, fused)?;
        let (from, width) = (widths[..at].iter().sum::<i64>(), widths[at]);
        if width % heads != 0 {
            return None;
        }
        let window = |value: ValueId| Window { heads, head_dim: width / heads, ..Window::of_all(value, width) };
        let hint = format!("{hint}/{}", part.name());
        let value = match fused.operands {
            // No bias: `MultiHeadAttention` takes operands with an axis of heads as they are.
            Operands::Apart if self.rank(Some(operand)) == Some(4) => {
                // [B, H, N, d] to [B, N, H * d]
                let operand = self.replacement(operand);
                let rows = self.transpose(operand, &[0, 2, 1, 3], &format!("{hint}_by_token"));
                return Some(window(self.reshape(rows, &[0, 0, -1], &hint)));
            }
            Operands::Apart => self.replacement(operand),
            Operands::Projected | Operands::Quantized => {
                let (mut tokens, weight) = match fused.operands {
                    Operands::Projected => (self.replacement(operand), node.input(1)?),
                    _ => (
                        self.dequantized(node, 0, [3, 6], &format!("{hint}_tokens"))?,
                        self.dequantized(node, 1, [4, 7], &format!("{hint}_weight"))?,
                    ),
                };
                if part == Part::Queries && queries != ALL_QUERIES {
                    tokens = self.range(tokens, 1, [0, queries], &format!("{hint}_first"));
                }
                let weight = self.range(weight, 1, [from, from + width], &format!("{hint}_columns"));
                self.patch.op("MatMul", &format!("{hint}_projected"), &[tokens, weight], &[])
            }
        };
        Some(window(match fused.bias.and_then(|slot| node.input(slot)) {
            Some(bias) => {
                let bias = self.range(bias, 0, [from, from + width], &format!("{hint}_bias"));
                self.patch.op("Add", &hint, &[value, bias], &[])
            }
            None => value,
        }))
    }

    /// How many heads one part of the operands of a fused attention has.
    fn fused_heads(&self, node: &Node, fused: &FusedAttention, part: Part) -> Option<i64> {
        let stated = if part == Part::Queries { fused.heads } else { fused.kv_heads };
        self.heads_of(node.input(fused.slots()[part as usize])?, stated).filter(|&heads| heads > 0)
    }

    /// Queries, keys or values of a fused attention with the axes `order` of `[B, H, N, d]`, and d; queries as in
    /// [`Rewriter::fused_part`].
    fn fused_by_head(
        &mut self,
        node: &Node,
        fused: &FusedAttention,
        part: Part,
        queries: i64,
        order: [usize; 4],
        hint: &str,
    ) -> Option<(ValueId, i64)> {
        let operand = node.input(fused.slots()[part as usize])?;
        let name = format!("{hint}/{}_by_head", part.name());
        if self.rank(Some(operand)) == Some(4) {
            let channels = self.vit.shapes.dims(operand)?.last()?.as_known()?;
            let operand = self.replacement(operand);
            return Some((self.transpose(operand, &order, &name), channels));
        }
        let Window { value, heads, head_dim, .. } = self.fused_part(node, fused, part, queries, hint)?;
        let split = self.reshape(value, &[0, 0, heads, head_dim], &format!("{name}/split"));
        Some((self.transpose(split, &order.map(|axis| [0, 2, 1, 3][axis]), &name), head_dim))
    }

    /// What a fused attention multiplies the products of queries and keys with, d channels in each head.
    pub(super) fn fused_scale(node: &Node, head_dim: i64) -> f64 {
        let stated = node.float("scale").filter(|&scale| scale != 0.0).map(f64::from);
        stated.unwrap_or_else(|| (head_dim as f64).sqrt().recip())
    }

    /// A limit that a fused attention has for its scores.
    pub(super) fn fused_cap(node: &Node) -> Option<f32> {
        node.float("softcap").filter(|&cap| cap > 0.0)
    }

    /// What a fused attention adds to its scores, unless it is the same for all keys: that changes no softmax.
    pub(super) fn fused_bias(&self, node: &Node, fused: &FusedAttention) -> Option<(usize, ValueId)> {
        let slot = fused.attention_bias?;
        node.input(slot).filter(|&bias| self.vit.shapes.uniform(bias).is_none()).map(|bias| (slot, bias))
    }

    /// The scores whose softmax a fused attention takes, `[B, H, N, M]` in the type of its result: of the first `queries`
    /// tokens.
    pub(super) fn fused_scores(
        &mut self,
        id: NodeId,
        fused: &FusedAttention,
        queries: i64,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let node = self.graph.node(id);
        let heads = [Part::Queries, Part::Keys, Part::Values].map(|part| self.fused_heads(node, fused, part));
        if heads[1..].iter().any(|other| other.is_none() || *other != heads[0]) {
            return Err(self.pinned(
                id,
                "it is a fused attention whose queries share keys and values between heads, or whose heads are not \
                 known: export the model without fusion",
            ));
        }
        let (cap, bias) = (Self::fused_cap(node), self.fused_bias(node, fused));
        if cap.is_some() && fused.attention_bias.is_some_and(|slot| node.input(slot).is_some()) {
            return Err(self.pinned(
                id,
                "it is a fused attention that caps its scores and adds a bias to them: runtimes differ in which comes \
                 first. Export the model without fusion",
            ));
        }
        let unread = self.unread(id);
        let unknown = || unread.clone();
        let dtype = self.dtype(node.output(0).ok_or_else(unknown)?);
        let number = |rewriter: &mut Self, name: &str, number: f64| {
            rewriter.patch.constant(&format!("{hint}/{name}"), Tensor::floats(dtype, &[], &[number]))
        };
        let q = self.fused_by_head(node, fused, Part::Queries, queries, [0, 1, 2, 3], hint);
        let k = self.fused_by_head(node, fused, Part::Keys, ALL_QUERIES, [0, 1, 3, 2], hint);
        let (Some((q, head_dim)), Some((k, of_keys))) = (q, k) else { return Err(unknown()) };
        if head_dim != of_keys {
            return Err(unknown());
        }
        let first = fused.operands == Operands::Apart && queries != ALL_QUERIES;
        let q = if first { self.range(q, 2, [0, queries], &format!("{hint}/queries_first")) } else { q };
        // Queries are scaled, not products: those may be beyond the range of half precision.
        let scale = number(self, "scale", Self::fused_scale(node, head_dim));
        let q = self.patch.op("Mul", &format!("{hint}/queries_scaled"), &[q, scale], &[]);
        let mut scores = self.patch.op("MatMul", &format!("{hint}/scores"), &[q, k], &[]);
        if let Some(cap) = cap {
            let cap = number(self, "cap", cap.into());
            let part = self.patch.op("Div", &format!("{hint}/scores_of_cap"), &[scores, cap], &[]);
            let part = self.patch.op("Tanh", &format!("{hint}/scores_below_one"), &[part], &[]);
            scores = self.patch.op("Mul", &format!("{hint}/scores_capped"), &[part, cap], &[]);
        }
        let Some((slot, bias)) = bias else { return Ok(scores) };
        let (of_type, dims) = (self.dtype(bias), self.vit.shapes.dims(bias).unwrap_or_default());
        let for_each_query = dims.iter().rev().nth(1).is_some_and(|rows| !rows.is(1));
        let mut bias = self.fused_bias_of_slots(id, slot, bias)?;
        if for_each_query && queries != ALL_QUERIES {
            bias = self.range(bias, -2, [0, queries], &format!("{hint}/bias_first"));
        }
        if of_type == DataType::Bool {
            let closed = number(self, "closed", f64::NEG_INFINITY);
            return Ok(self.patch.op("Where", &format!("{hint}/scores_masked"), &[bias, scores, closed], &[]));
        }
        let bias = self.cast(bias, of_type, dtype, &format!("{hint}/bias_as_scores"));
        Ok(self.patch.op("Add", &format!("{hint}/scores_biased"), &[scores, bias], &[]))
    }

    /// The bias of the scores of a fused attention as the slots need it.
    fn fused_bias_of_slots(&mut self, id: NodeId, slot: usize, bias: ValueId) -> Result<ValueId, Refusal> {
        let table = self.effects().into_iter().find_map(|(of, effect)| match effect {
            Effect::Table { slot: at, axes } if of == id && at == slot => Some(axes),
            _ => None,
        });
        if let Some(axes) = table {
            self.follow_table(id, slot, axes)?;
        }
        Ok(self.tables.get(&(id, slot)).copied().unwrap_or_else(|| self.replacement(bias)))
    }

    /// What a fused attention gives with these weights, `[B, H, N, M]` in the type of its result.
    pub(super) fn fused_result(
        &mut self,
        id: NodeId,
        fused: &FusedAttention,
        weights: ValueId,
        hint: &str,
    ) -> Result<ValueId, Refusal> {
        let node = self.graph.node(id);
        let unread = self.unread(id);
        let values = self.fused_by_head(node, fused, Part::Values, ALL_QUERIES, [0, 1, 2, 3], hint);
        let (Some((values, head_dim)), Some(result)) = (values, node.output(0)) else { return Err(unread) };
        let heads = self.fused_heads(node, fused, Part::Values).ok_or(unread)?;
        let given = node.input(fused.slots()[Part::Values as usize]).map(|given| self.dtype(given));
        // Of 8 bits they are numbers by now.
        let given = given.filter(|given| given.is_float()).unwrap_or(self.dtype(result));
        let values = self.cast(values, given, self.dtype(result), &format!("{hint}/values_as_weights"));
        let mixed = self.patch.op("MatMul", &format!("{hint}/mixed_by_head"), &[weights, values], &[]);
        if self.rank(Some(result)) == Some(4) {
            return Ok(mixed);
        }
        let by_token = self.transpose(mixed, &[0, 2, 1, 3], &format!("{hint}/mixed_by_token"));
        Ok(self.reshape(by_token, &[0, 0, heads * head_dim], &format!("{hint}/mixed")))
    }

    pub(super) fn unread(&self, id: NodeId) -> Refusal {
        self.pinned(
            id,
            "it is a fused attention whose queries, keys and values cannot be read: export the model without fusion",
        )
    }
}

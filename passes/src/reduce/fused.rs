//! Fused attention operators in a merge: their metric, and proportional attention that leaves them fused.
//!
//! Two exact ways to add log(size) to the scores of a fused operator:
//!
//! - **With the keys.** scale·(q·k + log(s) / scale) = scale·(q′·k′), where q′ is q with one more channel of ones and k′
//!   is k with log(s) / scale there. Wherever queries and keys are operands: it needs memory for a channel only, and
//!   operators keep the kernels that take no bias. In ONNX Runtime 1.31 on a CPU it costs 1 to 4 % of a layer's
//!   projections and attention (ViT-S and ViT-B, 106 to 1025 tokens); sizes that scale the values and ride along with
//!   them cost 3 to 10 %, a bias 1 to 12 % (more, the more tokens there are).
//! - **As a bias.** Where the operator projects the tokens itself: 1 to 10 %; to project them outside costs 4 to 13 %. The
//!   bias has all its axes in full, `[B, H, N, M]`: ONNX Runtime refuses a single row, and versions 1.17 and 1.20 compute
//!   nonsense where batch or heads would have to stretch.

use vitrim_ir::{Attribute, DataType, FusedAttention, Node, NodeId, OpType, Operands, Tensor, ValueId};

use super::{Metric, Rewriter};
use crate::Refusal;
use crate::recognise::{Core, Window};

/// Columns of a matrix or row that belong to one of queries, keys and values.
#[derive(Clone, Copy)]
struct Columns {
    from: i64,
    to: i64,
    heads: i64,
}

impl Rewriter<'_> {
    /// The metric of a fused attention whose heads share the channel axis.
    pub(super) fn fused_metric(&mut self, core: &Core, metric: Metric, hint: &str) -> Option<Window> {
        let fused = core.fused.as_ref()?;
        let node = self.graph.node(core.softmax);
        let part = match metric {
            Metric::Query => 0,
            Metric::Value => 2,
            _ => 1,
        };
        let heads = if part == 0 { fused.heads } else { fused.kv_heads }? as i64;
        let widths = self.widths(node, fused).filter(|widths| widths[part] % heads == 0)?;
        let from = widths[..part].iter().sum();
        let columns = Columns { from, to: from + widths[part], heads };
        let mean = match fused.operands {
            Operands::Apart => {
                let operand = self.replacement(node.input(part)?);
                let shape = self.ints(&format!("{hint}/heads_shape"), &[0, 0, heads, widths[part] / heads]);
                let split = self.patch.op("Reshape", &format!("{hint}/heads"), &[operand, shape], &[]);
                self.reduce_mean(split, 2, &format!("{hint}/heads_mean"))
            }
            // The mean of the projections is the projection by the mean.
            Operands::Projected => {
                let tokens = self.replacement(node.input(0)?);
                let weight = self.head_mean(node.input(1)?, columns, &format!("{hint}/metric_weight"))?;
                self.patch.op("MatMul", &format!("{hint}/projected"), &[tokens, weight], &[])
            }
            Operands::Quantized => {
                let tokens = self.dequantized(node, 0, [3, 6], &format!("{hint}/tokens"))?;
                let weight = self.dequantized(node, 1, [4, 7], &format!("{hint}/weight"))?;
                let weight = self.head_mean(weight, columns, &format!("{hint}/metric_weight"))?;
                self.patch.op("MatMul", &format!("{hint}/projected"), &[tokens, weight], &[])
            }
        };
        let value = match fused.bias.and_then(|slot| node.input(slot)) {
            Some(bias) => {
                let bias = self.head_mean(bias, columns, &format!("{hint}/metric_bias"))?;
                self.patch.op("Add", &format!("{hint}/metric"), &[mean, bias], &[])
            }
            None => mean,
        };
        Some(Window::of_all(value, widths[part] / heads))
    }

    /// Entries `from` to before `to` along an axis.
    pub(super) fn range(&mut self, value: ValueId, axis: i64, [from, to]: [i64; 2], hint: &str) -> ValueId {
        let bounds = [from, to, axis].map(|bound| self.ints(&format!("{hint}_range"), &[bound]));
        self.patch.op("Slice", hint, &[value, bounds[0], bounds[1], bounds[2]], &[])
    }

    /// Channels of all heads together of queries, keys and values.
    pub(super) fn widths(&self, node: &Node, fused: &FusedAttention) -> Option<[i64; 3]> {
        let dims = |slot: usize| self.vit.shapes.dims(node.input(slot)?);
        let width = |slot: usize| match dims(slot)? {
            [_, heads, _, channels] => heads.times(channels)?.as_known(),
            dims => dims.last()?.as_known(),
        };
        let widths = match (fused.operands, node.ints("qkv_hidden_sizes")) {
            (Operands::Apart, _) => [width(0)?, width(1)?, width(2)?],
            (_, Some(sizes)) => sizes.try_into().ok()?,
            (_, None) => [width(1)? / 3; 3],
        };
        widths.iter().all(|width| (1..=i64::from(i32::MAX)).contains(width)).then_some(widths)
    }

    /// The mean over heads of some columns: computed here where they are constant.
    fn head_mean(&mut self, value: ValueId, columns: Columns, hint: &str) -> Option<ValueId> {
        let Columns { from, to, heads } = columns;
        let width = (to - from) / heads;
        let constant = self.graph.get_value(value).and_then(|_| self.graph.constant(value));
        if let Some((tensor, elements)) = constant.as_ref().and_then(|tensor| Some((tensor, tensor.to_f64s()?))) {
            let all = usize::try_from(*tensor.dims().last()?).ok().filter(|&all| all >= to as usize)?;
            let mean = |row: &[f64]| {
                let row = &row[from as usize..to as usize];
                (0..width as usize)
                    .map(|at| row.iter().skip(at).step_by(width as usize).sum::<f64>() / heads as f64)
                    .collect::<Vec<f64>>()
            };
            let means: Vec<f64> = elements.chunks_exact(all).flat_map(mean).collect();
            let mut dims: Vec<usize> = tensor.dims().iter().map(|&extent| extent as usize).collect();
            *dims.last_mut()? = width as usize;
            return Some(self.patch.constant(hint, Tensor::floats(tensor.dtype(), &dims, &means)));
        }
        let bounds = [from, to, -1].map(|bound| self.ints(&format!("{hint}/columns"), &[bound]));
        let part = self.patch.op("Slice", &format!("{hint}/part"), &[value, bounds[0], bounds[1], bounds[2]], &[]);
        let shape = self.ints(&format!("{hint}/shape"), &[-1, heads, width]);
        let split = self.patch.op("Reshape", &format!("{hint}/heads"), &[part, shape], &[]);
        Some(self.reduce_mean(split, 1, hint))
    }

    /// An operand in 8 bits as numbers.
    pub(super) fn dequantized(
        &mut self,
        node: &Node,
        slot: usize,
        [scale, zero]: [usize; 2],
        hint: &str,
    ) -> Option<ValueId> {
        let mut inputs = vec![Some(self.replacement(node.input(slot)?)), Some(node.input(scale)?)];
        inputs.extend(node.input(zero).map(Some));
        Some(self.patch.call(OpType::standard("DequantizeLinear"), hint, inputs, &[("axis", Attribute::Int(1))], 1)[0])
    }

    /// Proportional attention in a fused operator.
    pub(super) fn weigh_fused(&mut self, id: NodeId, fused: &FusedAttention, stage: usize) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let row = fused.bias.and_then(|slot| node.input(slot));
        let fixed = row.is_none_or(|row| self.graph.constant(row).is_some());
        // ONNX Runtime wants keys and values of one shape where they have an axis of heads.
        let free = node.is("Attention") || self.rank(node.input(1)) == Some(3);
        let done = match fused.operands {
            // A cap on the scores is one on the sum as well: sizes go with the values there.
            Operands::Apart if Self::fused_cap(node).is_some() => {
                return self.weigh_values(id, fused.slots()[2], stage);
            }
            Operands::Apart if fixed && free => self.weigh_keys(id, fused, stage),
            Operands::Apart | Operands::Projected => self.weigh_scores(id, fused, stage),
            Operands::Quantized => self.split_quantized(id, fused, stage),
        };
        done.ok_or_else(|| self.pinned(id, "it is a fused attention whose widths are not known"))
    }

    /// Sizes with the keys: `Pad` gives the queries a channel of ones, `Concat` the keys one of log(size) / scale.
    fn weigh_keys(&mut self, id: NodeId, fused: &FusedAttention, stage: usize) -> Option<()> {
        let (graph, node) = (self.graph, self.graph.node(id));
        let hint = format!("vitrim/{}", graph.value(node.output(0)?).name());
        let (q, k) = (node.input(0)?, node.input(1)?);
        let dtype = self.dtype(k);
        let [q_heads, k_heads] =
            [(q, fused.heads), (k, fused.kv_heads)].map(|(operand, heads)| self.heads_of(operand, heads));
        let (q_heads, k_heads) = (q_heads?, k_heads?);
        let width = self.widths(node, fused).filter(|widths| widths[0] % q_heads == 0)?[0] / q_heads;
        let scale = Self::fused_scale(node, width) as f32;

        let log_size = self.log_size(stage, self.span_of(k))?;
        let inverse = self.patch.constant(&format!("{hint}/inverse_scale"), Tensor::f32(scale.recip()));
        let share = self.patch.op("Mul", &format!("{hint}/log_size"), &[log_size, inverse], &[]);
        let share = self.cast(share, DataType::F32, dtype, &format!("{hint}/log_size_as_keys"));
        let queries = self.by_heads(q, q_heads, width, &format!("{hint}/queries"), |rewriter, queries, _| {
            let pads = rewriter.ints(&format!("{hint}/pads"), &[0, 0, 0, 0, 0, 0, 0, 1]);
            let one = rewriter.patch.constant(&format!("{hint}/one"), Tensor::floats(dtype, &[], &[1.0]));
            rewriter.patch.op("Pad", &format!("{hint}/queries_and_one"), &[queries, pads, one], &[])
        })?;
        let keys = self.by_heads(k, k_heads, width, &format!("{hint}/keys"), |rewriter, keys, heads_at| {
            let axis = rewriter.ints(&format!("{hint}/heads_axis"), &[heads_at as i64]);
            let share = rewriter.patch.op("Unsqueeze", &format!("{hint}/size_of_heads"), &[share, axis], &[]);
            let mut every = [1; 4];
            every[heads_at] = k_heads;
            let every = rewriter.ints(&format!("{hint}/every_head"), &every);
            let channel = rewriter.patch.op("Expand", &format!("{hint}/size_channel"), &[share, every], &[]);
            let last = [("axis", Attribute::Int(3))];
            rewriter.patch.op("Concat", &format!("{hint}/keys_and_size"), &[keys, channel], &last)
        })?;
        self.patch.rewire(id, 0, queries);
        self.patch.rewire(id, 1, keys);
        self.patch.set_attribute(id, "scale", Attribute::Float(scale));
        if let Some((slot, bias)) = fused.bias.and_then(|slot| Some((slot, node.input(slot)?))) {
            let wider = self.widened(bias, 2 * q_heads, width, &format!("{hint}/bias"))?;
            self.patch.rewire(id, slot, wider);
        }
        Some(())
    }

    pub(super) fn rank(&self, operand: Option<ValueId>) -> Option<usize> {
        Some(self.vit.shapes.dims(operand?)?.len())
    }

    /// Heads of an operand: its own axis where it has one.
    pub(super) fn heads_of(&self, operand: ValueId, heads: Option<usize>) -> Option<i64> {
        match self.vit.shapes.dims(operand)? {
            [_, heads, _, _] => heads.as_known(),
            _ => heads.map(|heads| heads as i64),
        }
    }

    /// Does something to `[B, N, H, d]` or `[B, H, N, d]` that adds one channel to each head; the axis of the heads is
    /// given with it.
    fn by_heads(
        &mut self,
        operand: ValueId,
        heads: i64,
        width: i64,
        hint: &str,
        extend: impl FnOnce(&mut Self, ValueId, usize) -> ValueId,
    ) -> Option<ValueId> {
        let rank = self.rank(Some(operand))?;
        let operand = self.replacement(operand);
        if rank == 4 {
            return Some(extend(self, operand, 1));
        }
        let shape = self.ints(&format!("{hint}/heads_shape"), &[0, 0, heads, width]);
        let split = self.patch.op("Reshape", &format!("{hint}/heads"), &[operand, shape], &[]);
        let extended = extend(self, split, 2);
        let shape = self.ints(&format!("{hint}/shape"), &[0, 0, heads * (width + 1)]);
        Some(self.patch.op("Reshape", hint, &[extended, shape], &[]))
    }

    /// A constant row with one more channel, of zero, for each of its first heads.
    fn widened(&mut self, row: ValueId, heads: i64, width: i64, hint: &str) -> Option<ValueId> {
        let tensor = self.graph.constant(row)?;
        let elements = tensor.to_f64s()?;
        let (first, rest) = elements.split_at_checked((heads * width) as usize)?;
        let first = first.chunks_exact(width as usize).flat_map(|head| head.iter().copied().chain([0.0]));
        let wider: Vec<f64> = first.chain(rest.iter().copied()).collect();
        Some(self.patch.constant(hint, Tensor::floats(tensor.dtype(), &[wider.len()], &wider)))
    }

    /// Sizes as a bias of the scores.
    fn weigh_scores(&mut self, id: NodeId, fused: &FusedAttention, stage: usize) -> Option<()> {
        let (slot, node) = (fused.attention_bias?, self.graph.node(id));
        let bias = self.attention_bias(node, fused, stage)?;
        self.patch.give_input(id, slot, bias);
        Some(())
    }

    /// log(size) of the keys for every query of every head.
    fn attention_bias(&mut self, node: &Node, fused: &FusedAttention, stage: usize) -> Option<ValueId> {
        let hint = format!("vitrim/{}", self.graph.value(node.output(0)?).name());
        let queries = node.input(0)?;
        let dtype = self.dtype(node.output(0)?);
        let keys = node.input(fused.slots()[1])?;
        let log_size = self.log_size(stage, self.span_of(keys))?;
        let log_size = self.cast(log_size, DataType::F32, dtype, &format!("{hint}/log_size_as_scores"));
        let shape = self.ints(&format!("{hint}/size_row"), &[0, 1, 1, -1]);
        let mut row = self.patch.op("Reshape", &format!("{hint}/log_size"), &[log_size, shape], &[]);
        // What is the same for all keys gives way.
        if let Some((slot, given)) = self.fused_bias(node, fused) {
            let (id, _) = self.graph.producer(node.output(0)?)?;
            let followed = self.tables.get(&(id, slot)).copied();
            let given = followed.unwrap_or_else(|| self.replacement(given));
            row = self.patch.op("Add", &format!("{hint}/bias_and_log_size"), &[given, row], &[]);
        }
        let heads = self.heads_of(queries, fused.heads)?;
        let count = match self.vit.axes.layout(queries) {
            Some(layout) => self.stages.count(stage).and_then(|tokens| layout.0[layout.rank() - 2].extent(&tokens)),
            None => self.vit.shapes.dims(queries).map(|dims| dims[dims.len() - 2].clone()),
        };
        let every = match count.and_then(|count| count.as_known()) {
            Some(count) => self.ints(&format!("{hint}/every_score"), &[1, heads, count, 1]),
            None => {
                let queries = self.replacement(queries);
                let shape = self.patch.op("Shape", &format!("{hint}/queries_shape"), &[queries], &[]);
                let at = self.ints(&format!("{hint}/queries_axis"), &[-2]);
                let along = [("axis", Attribute::Int(0))];
                let count = self.patch.op("Gather", &format!("{hint}/queries"), &[shape, at], &along);
                let [outer, last] = [&[1, heads][..], &[1]].map(|ints| self.ints(&format!("{hint}/every"), ints));
                self.patch.op("Concat", &format!("{hint}/every_score"), &[outer, count, last], &along)
            }
        };
        Some(self.patch.op("Expand", &format!("{hint}/attention_bias"), &[row, every], &[]))
    }

    /// An operator that takes no bias gives way to its projection and one that does.
    fn split_quantized(&mut self, id: NodeId, fused: &FusedAttention, stage: usize) -> Option<()> {
        let node = self.graph.node(id);
        let result = node.output(0)?;
        let hint = format!("vitrim/{}", self.graph.value(result).name());
        let heads = fused.heads?;
        let operands = [Some(self.replacement(node.input(0)?)), node.input(1), node.input(6), node.input(7)];
        let product =
            self.patch.call(OpType::standard("MatMulInteger"), &format!("{hint}/product"), operands.to_vec(), &[], 1)
                [0];
        let product = self.cast(product, DataType::I32, self.dtype(result), &format!("{hint}/product_as_float"));
        let scale = self.patch.op("Mul", &format!("{hint}/product_scale"), &[node.input(3)?, node.input(4)?], &[]);
        let projected = self.patch.op("Mul", &format!("{hint}/projected"), &[product, scale], &[]);
        let sizes = self.widths(node, fused)?;
        let sizes = self.ints(&format!("{hint}/widths"), &sizes);
        let parts = self.patch.call(
            OpType::standard("Split"),
            &format!("{hint}/parts"),
            vec![Some(projected), Some(sizes)],
            &[("axis", Attribute::Int(2))],
            3,
        );
        let bias = self.attention_bias(node, fused, stage)?;
        let mut inputs: Vec<Option<ValueId>> = parts.into_iter().map(Some).collect();
        inputs.extend([node.input(2), None, Some(bias)]);
        let mut attributes = vec![("num_heads", Attribute::Int(heads as i64))];
        attributes.extend(node.float("scale").map(|scale| ("scale", Attribute::Float(scale))));
        let op = OpType::of("com.microsoft", "MultiHeadAttention");
        let mixed = self.patch.call(op, &format!("{hint}/mixed"), inputs, &attributes, 1)[0];
        self.replace(result, mixed);
        self.notes.push(format!("{} takes no bias: it was split", self.graph.describe(id)));
        Some(())
    }
}

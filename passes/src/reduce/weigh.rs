//! Sizes at work: proportional attention and weighted means.
//!
//! Proportional attention (arXiv 2210.09461, equation 1) adds log(size) of the keys to the scaled scores of every
//! softmax over merged tokens, pooling heads included. A mean or sum over merged tokens weighs each by its size.

use vitrim_ir::{Attribute, DataType, Effect, FusedAttention, NodeId, Span, ValueId};

use super::Rewriter;
use super::precision::Coding;
use crate::Refusal;
use crate::recognise::Core;

impl Rewriter<'_> {
    pub(super) fn weigh(&mut self) -> Result<(), Refusal> {
        if self.options.sliced {
            return Ok(());
        }
        for (id, effect) in self.effects() {
            let node = self.graph.node(id);
            let carried = node.operands().find_map(|value| self.stage_read(value));
            // Where nothing was merged all tokens count once.
            let Some(stage) = carried.filter(|&stage| self.stages.entry(stage).size.is_some()) else { continue };
            if self.stages.restore_at.contains(&id) {
                continue;
            }
            match effect {
                Effect::Attend if self.plain.contains_key(&id) || self.masked.contains_key(&id) => {}
                Effect::Attend if self.weights.proportional => self.attend(id, stage)?,
                // A sum over tokens counts each as often as it stands for others, or it would not be one.
                Effect::Pool { span, axis, mean } if !mean || self.weights.pooling => {
                    self.pool(id, stage, span, axis, mean)?;
                }
                Effect::Contract { slot, axis, span } if self.weights.proportional => {
                    self.count_factors(id, slot, axis, span, stage)?;
                }
                _ => {}
            }
        }
        if self.weights.proportional {
            let graph = self.graph;
            graph.nodes().try_for_each(|(id, _)| self.weights_per_token(id))?;
        }
        Ok(())
    }

    /// The stage in which readers see a value.
    pub(super) fn stage_read(&self, value: ValueId) -> Option<usize> {
        let block = self.graph.producer(value).and_then(|(node, _)| self.acts_behind(node));
        let stage = self.stages.of(value)?;
        Some(block.map_or(stage, |block| self.stages.behind_block(block)))
    }

    fn attend(&mut self, id: NodeId, stage: usize) -> Result<(), Refusal> {
        if let Some(fused) = FusedAttention::of(self.graph, self.graph.node(id)) {
            return self.weigh_fused(id, &fused, stage);
        }
        let attentions = self.vit.blocks.iter().flat_map(|block| &block.attentions);
        let core = attentions.map(|attention| &attention.core).find(|core| core.softmax == id);
        if let Some(core) = core.filter(|core| self.sizes_can_ride(core)) {
            return self.weigh_values(core.mix, core.slots.value, stage);
        }
        let (graph, vit) = (self.graph, self.vit);
        let node = graph.node(id);
        let (Some(scores), Some(weights)) = (node.input(0), node.output(0)) else { return Ok(()) };
        let frame = self.frame_of(weights, id)?;
        let layout = vit.axes.layout(weights).cloned().unwrap_or_default();
        let keys = (0..layout.rank()).rev().find(|&at| layout.0[at].is_weights());
        let keys = keys.and_then(|at| Some((at, layout.0[at].only_tokens()?)));
        let (keys, span) = keys.ok_or_else(|| self.pinned(id, "it is an attention whose keys are not the tokens"))?;
        let hint = format!("vitrim/{}", graph.value(scores).name());
        let log_size = self.log_size(stage, span).ok_or_else(|| self.pinned(id, "it has no sizes"))?;
        let bias = if frame.is_batch_first(layout.rank()) {
            let mut row = vec![1; layout.rank()];
            (row[0], row[keys]) = (0, -1);
            self.reshape(log_size, &row, &format!("{hint}/log_size"))
        } else {
            self.spread_column(log_size, keys, &frame, &format!("{hint}/log_size"))
        };
        let current = self.replacement(scores);
        let coding = self.coding_of_operand(node, 0).ok_or_else(|| self.unscaled(id))?;
        if let Coding::Plain(dtype) = coding {
            let bias = self.cast(bias, DataType::F32, dtype, &format!("{hint}/log_size_as_scores"));
            let biased = self.patch.op("Add", &format!("{hint}/proportional"), &[current, bias], &[]);
            self.patch.rewire(id, 0, biased);
            return Ok(());
        }
        // Quantised scores were scaled to what they range over by themselves: the softmax of the sum is one of floats.
        let numbers = self.as_f32(current, coding, &format!("{hint}/scores"));
        let biased = self.patch.op("Add", &format!("{hint}/proportional"), &[numbers, bias], &[]);
        let axis = [("axis", Attribute::Int(keys as i64))];
        let softmax = self.patch.op("Softmax", &format!("{hint}/weights"), &[biased], &axis);
        let coding = self.coding_of_result(node).ok_or_else(|| self.unscaled(id))?;
        let quantised = self.as_coded(softmax, coding, &format!("{hint}/weights_quantised"));
        self.replace(weights, quantised);
        Ok(())
    }

    fn unscaled(&self, id: NodeId) -> Refusal {
        self.pinned(id, "it takes or gives integers, and what they stand for is not known")
    }

    /// Whether a decomposed attention has values `[B, H, N, d]` in float32: then its scores need not be touched.
    fn sizes_can_ride(&self, core: &Core) -> bool {
        let Some(values) = core.value(self.graph) else { return false };
        let layout = self.vit.axes.layout(values);
        let four =
            layout.is_some_and(|layout| layout.rank() == 4 && layout.token_axis().is_some_and(|(axis, _)| axis == 2));
        let batch_first = layout.is_some_and(|layout| self.frame(layout).is_some_and(|frame| frame.is_batch_first(4)));
        let mix = self.graph.node(core.mix);
        let form = four && batch_first && mix.is("MatMul") && core.slots.value == 1;
        form && self.dtype(values) == DataType::F32 && self.only_mix_reads_weights(core)
    }

    /// Whether the weights of an attention go nowhere but to its values. Where they are an output, say, they must be
    /// the proportional ones.
    fn only_mix_reads_weights(&self, core: &Core) -> bool {
        let mut open: Vec<ValueId> = self.graph.node(core.softmax).results().collect();
        let mut steps = 0;
        while let Some(value) = open.pop() {
            steps += 1;
            if steps > 16 || self.graph.output_slots(value).next().is_some() {
                return false;
            }
            for used in self.graph.value(value).uses().iter().filter(|used| used.node != core.mix) {
                let between =
                    ["Cast", "Where", "IsNaN", "Identity", "Dropout"].map(|name| self.graph.node(used.node).is(name));
                if !between.contains(&true) {
                    return false;
                }
                open.extend(self.graph.node(used.node).results());
            }
        }
        true
    }

    /// Proportional attention without touching the scores: softmax(l + log s)·v = (P·[s⊙v]) / (P·s) with
    /// P = softmax(l). Sizes scale the values and ride along as one more channel.
    pub(super) fn weigh_values(&mut self, id: NodeId, slot: usize, stage: usize) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let (Some(values), Some(result)) = (node.input(slot), node.output(0)) else { return Ok(()) };
        let rank = self.vit.axes.layout(values).map(|layout| layout.rank());
        let channels = self.vit.shapes.dims(values).and_then(|dims| dims.last()?.as_known());
        let (Some(4), Some(channels)) = (rank, channels) else {
            return Err(self.pinned(id, "it is a fused attention whose heads share an axis with the channels"));
        };
        let size = self.size_over(stage, self.span_of(values)).ok_or_else(|| self.pinned(id, "it has no sizes"))?;
        let hint = format!("vitrim/{}", self.graph.value(result).name());
        let ints = |rewriter: &mut Self, name: &str, values: &[i64]| rewriter.ints(&format!("{hint}/{name}"), values);
        let axis = ints(self, "head_axis", &[1]);
        let size = self.patch.op("Unsqueeze", &format!("{hint}/size"), &[size, axis], &[]);
        let dtype = self.dtype(values);
        let size = self.cast(size, DataType::F32, dtype, &format!("{hint}/size_as_values"));
        let scaled = self.patch.op("Mul", &format!("{hint}/scaled_values"), &[values, size], &[]);
        // The size of every head: a product keeps the shape without asking for it.
        let (zero, one) = (ints(self, "from", &[0]), ints(self, "to", &[1]));
        let last = ints(self, "last_axis", &[3]);
        let head = self.patch.op("Slice", &format!("{hint}/first_channel"), &[values, zero, one, last], &[]);
        let nothing = self.patch.op("Sub", &format!("{hint}/zero_channel"), &[head, head], &[]);
        let ride = self.patch.op("Add", &format!("{hint}/size_channel"), &[nothing, size], &[]);
        let axis = [("axis", Attribute::Int(3))];
        let extended = self.patch.op("Concat", &format!("{hint}/values_and_size"), &[scaled, ride], &axis);
        self.patch.rewire(id, slot, extended);
        let (start, end) = (ints(self, "channels", &[channels]), ints(self, "end", &[i64::MAX]));
        let mixed = self.patch.op("Slice", &format!("{hint}/mixed"), &[result, zero, start, last], &[]);
        let total = self.patch.op("Slice", &format!("{hint}/total_size"), &[result, start, end, last], &[]);
        let out = self.patch.op("Div", &format!("{hint}/proportional"), &[mixed, total], &[]);
        self.replace(result, out);
        self.patch.forget_type(result);
        Ok(())
    }

    /// Logarithm of the sizes of the slots in `span` at a stage, `[B, M, 1]` float32.
    pub(super) fn log_size(&mut self, stage: usize, span: Span) -> Option<ValueId> {
        if let Some(known) = self.part(stage, span).log_size {
            return Some(known);
        }
        let size = self.size_over(stage, span)?;
        let log_size = self.patch.op("Log", &format!("vitrim/log_size{stage}"), &[size], &[]);
        self.part(stage, span).log_size = Some(log_size);
        Some(log_size)
    }

    fn pool(&mut self, id: NodeId, stage: usize, span: Span, axis: usize, mean: bool) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let (Some(operand), Some(result)) = (node.input(0), node.output(0)) else { return Ok(()) };
        let frame = self.frame_of(operand, id)?;
        let size = self.size_over(stage, span).ok_or_else(|| self.pinned(id, "it has no sizes"))?;
        let hint = format!("vitrim/{}", self.graph.value(result).name());
        let weights = if frame.is_batch_first(3) && axis == 1 {
            size
        } else {
            self.spread_column(size, axis, &frame, &format!("{hint}/pooled_size"))
        };
        // What is no quantised operator takes integers for the numbers that they are.
        let plain = Coding::Plain(self.dtype(operand));
        let coding = self.coding_of_operand(node, 0).unwrap_or(plain);
        let result_coding = self.coding_of_result(node).unwrap_or(plain);
        let global = matches!(node.op.name.as_str(), "GlobalAveragePool" | "QLinearGlobalAveragePool");
        let keep = if global { 1 } else { node.int("keepdims").unwrap_or(1) };
        let keep = ("keepdims", Attribute::Int(keep));
        let axes = self.ints(&format!("{hint}/pool_axis"), &[axis as i64]);
        // The operand may be the merged stream itself.
        let operand = self.replacement(operand);
        let tokens = self.as_f32(operand, coding, &format!("{hint}/tokens"));
        let weighted = self.patch.op("Mul", &format!("{hint}/weighted"), &[tokens, weights], &[]);
        let sum =
            self.patch.op("ReduceSum", &format!("{hint}/weighted_sum"), &[weighted, axes], std::slice::from_ref(&keep));
        let pooled = if mean {
            let total = self.patch.op("ReduceSum", &format!("{hint}/total_size"), &[weights, axes], &[keep]);
            self.patch.op("Div", &format!("{hint}/weighted_mean"), &[sum, total], &[])
        } else {
            sum
        };
        let pooled = self.as_coded(pooled, result_coding, &format!("{hint}/pooled_as_tokens"));
        self.replace(result, pooled);
        for slot in self.graph.output_slots(result).collect::<Vec<_>>() {
            self.patch.replace_output(slot, pooled);
        }
        Ok(())
    }
}

//! Slots back to tokens: before nodes that need all tokens in their places, and at outputs.

use vitrim_ir::{Attribute, DataType, DimSpec, NodeId, Span, Tensor, TensorType, ValueId};
use vitrim_ops::{TokenRestore, TokenSize};

use super::Rewriter;
use crate::Refusal;

impl Rewriter<'_> {
    pub(super) fn restore(&mut self) -> Result<(), Refusal> {
        let graph = self.graph;
        for id in self.stages.restore_at.clone() {
            for (slot, operand) in graph.node(id).inputs.iter().enumerate() {
                let Some(operand) = *operand else { continue };
                let Some(stage) = self.stage_read(operand).filter(|&stage| stage > 0) else { continue };
                let restored = self.restored(operand, stage)?;
                self.patch.rewire(id, slot, restored);
            }
        }
        for (slot, &output) in graph.outputs().iter().enumerate() {
            // An output keeps the tensor as it was before a merge, so its own stage counts.
            let Some(stage) = self.stages.of(output).filter(|&stage| stage > 0) else { continue };
            let restored = self.restored_as(output, self.current(output), stage)?;
            self.patch.replace_output(slot, restored);
        }
        if let Some(name) = &self.options.trace_source {
            self.trace_source(name)?;
        }
        Ok(())
    }

    /// `value`, as readers see it at `stage`, with all tokens in their places.
    fn restored(&mut self, value: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        let source = self.replacement(value);
        self.restored_as(value, source, stage)
    }

    /// `source` has the layout of `value`, whose tokens it restores.
    fn restored_as(&mut self, value: ValueId, mut source: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        if self.options.sliced {
            return Err(Refusal::Request(
                "the slicing floor has no way back to all tokens, which this model needs".into(),
            ));
        }
        let name = self.graph.value(value).name().to_owned();
        let refuse = |what: &str| Refusal::Pinned { node: format!("the tensor '{name}'"), reason: what.into() };
        let layout = self.vit.axes.layout(value).cloned().unwrap_or_default();
        let hint = format!("vitrim/{name}");
        let node = self.graph.producer(value).map(|(node, _)| node).ok_or_else(|| refuse("it has no producer"))?;
        if self.stages.has_dropped(stage) {
            return self.revived(value, source, stage);
        }
        match layout.token_axes()[..] {
            [axis] => {
                let span = layout.0[axis].span().unwrap_or_default();
                let owner = self.owner_of(node, stage, span, &hint)?;
                let arrangement = self.arrangement(&layout);
                let unknown = || refuse("it has to be restored, but its tokens share an axis with something else");
                let there = self.tokens_second(source, &arrangement, stage, &hint).ok_or_else(unknown)?;
                let mut restored = self.vitrim(&TokenRestore, &format!("{hint}/restored"), &[there, owner], &[], 1)[0];
                if self.expansion().is_some() {
                    let refusal = refuse("it has to be restored behind an expansion, and has other tokens as well");
                    let kept = self.keeps_place(stage, span, &hint).ok_or(refusal)?;
                    let others: Vec<i64> = (0..arrangement.others() as i64).map(|axis| 2 + axis).collect();
                    let kept = self.with_axes("Unsqueeze", kept, &others, &format!("{hint}/keeps_place_of"));
                    let zero = Tensor::floats(self.dtype(value), &[], &[0.0]);
                    let zero = self.patch.constant(&format!("{hint}/zero"), zero);
                    restored = self.patch.op("Where", &format!("{hint}/in_place"), &[kept, restored, zero], &[]);
                }
                self.as_before(restored, &arrangement, 0, &hint).ok_or_else(unknown)
            }
            // Attention maps: a token's row is its slot's; the weight of a key is shared among the slot's tokens.
            [rows, columns] if [rows, columns].iter().all(|&at| layout.0[at].only_tokens() == Some(Span::ALL)) => {
                let batch = self.frame(&layout).and_then(|frame| frame.batch_axis());
                let batch = batch.ok_or_else(|| refuse("it has to be restored, but its batch axis cannot be told"))?;
                let owner = self.owner_of(node, stage, Span::ALL, &hint)?;
                if let Some(keys) = [rows, columns].into_iter().find(|&at| layout.0[at].is_weights()) {
                    let size = self.size_along(node, value, keys, Span::ALL, stage, &hint)?;
                    source = self.patch.op("Div", &format!("{hint}/shared"), &[source, size], &[]);
                }
                for (axis, hint) in [(rows, format!("{hint}/rows")), (columns, format!("{hint}/columns"))] {
                    source = self.gather_along(source, owner, [batch, axis], layout.rank(), &hint, "restored");
                }
                Ok(source)
            }
            _ => Err(refuse("it has to be restored, but has tokens on several axes")),
        }
    }

    /// Whether each token of a span is the one whose place its slot keeps, `[B, N]`. Behind an expansion the others are
    /// zero where tokens are restored (as the paper's dense models have them), not copies.
    fn keeps_place(&mut self, stage: usize, span: Span, hint: &str) -> Option<ValueId> {
        let (anchor, owner) = (self.anchor(stage)?, self.owner(stage)?);
        let axis = [("axis", Attribute::Int(1))];
        let place = self.patch.op("GatherElements", &format!("{hint}/place"), &[anchor, owner], &axis);
        let positions: Vec<i64> = (0..self.vit.tokens().as_known()?).collect();
        let positions = self.ints(&format!("{hint}/positions"), &positions);
        let kept = self.patch.op("Equal", &format!("{hint}/keeps_place"), &[place, positions], &[]);
        match span {
            Span::ALL => Some(kept),
            span => span.is_within().then(|| self.within(kept, span, &format!("{hint}/keeps_place"))),
        }
    }

    /// As [`Rewriter::restored_as`] where tokens were dropped: they are as they last were in the residual stream, and what
    /// the model computes of the stream from there is computed anew for all of them.
    fn revived(&mut self, value: ValueId, source: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        // Back to the stream: a walk, not a recursion, for it may be long.
        let mut way = Vec::new();
        let (mut at, mut source, mut stage) = (value, source, stage);
        let mut revived = loop {
            if let Some(&known) = self.revived.get(&at) {
                break known;
            }
            if !self.stages.has_dropped(stage) {
                break self.restored_as(at, source, stage)?;
            }
            let Some(slot) = self.only_tokens(at)? else { break self.revived_stream(at, source, stage)? };
            let operand = self.graph.producer(at).and_then(|(node, _)| self.graph.node(node).input(slot));
            let read = operand.and_then(|operand| Some((operand, self.stage_read(operand)?)));
            let (operand, read) = read.ok_or_else(|| self.lost(at, "its operand has no tokens"))?;
            way.push((at, slot));
            (at, source, stage) = (operand, self.replacement(operand), read);
        };
        for (value, slot) in way.into_iter().rev() {
            let (id, result) = self.graph.producer(value).ok_or_else(|| self.lost(value, "it has no producer"))?;
            let node = self.graph.node(id);
            let mut inputs = node.inputs.clone();
            inputs[slot] = Some(revived);
            let attributes: Vec<(&str, Attribute)> =
                node.attributes.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
            let hint = format!("vitrim/{}/of_all_tokens", self.graph.value(value).name());
            revived = self.patch.call(node.op.clone(), &hint, inputs, &attributes, node.outputs.len())[result];
            self.revived.insert(value, revived);
        }
        Ok(revived)
    }

    /// The operand slot with the tokens of which a value is computed, each by itself; none where branches join: that is
    /// the stream.
    fn only_tokens(&self, value: ValueId) -> Result<Option<usize>, Refusal> {
        let (graph, axes) = (self.graph, &self.vit.axes);
        let (id, _) = graph.producer(value).ok_or_else(|| self.lost(value, "it has no producer"))?;
        let node = graph.node(id);
        let carried: Vec<usize> = (0..node.inputs.len())
            .filter(|&slot| node.input(slot).is_some_and(|operand| axes.carries(operand)))
            .collect();
        let layout = axes.layout(value);
        if carried.len() > 1 && axes.layout(axes.origin()) == layout {
            return Ok(None);
        }
        if layout.is_some_and(|layout| layout.token_axes().len() > 1) {
            let what = "it has an entry for each pair of tokens, and none for those that were dropped";
            return Err(self.lost(value, what));
        }
        let [slot] = carried[..] else { return Err(self.lost(value, "several tensors of tokens meet there")) };
        if axes.effects_of(id).next().is_some() {
            let what = format!("{} does more than to compute each token by itself", graph.describe(id));
            return Err(self.lost(value, &what));
        }
        Ok(Some(slot))
    }

    /// The stream with all tokens, those that were dropped as they last were in it.
    fn revived_stream(&mut self, value: ValueId, source: ValueId, stage: usize) -> Result<ValueId, Refusal> {
        let arrangement = self.arrangement(&self.vit.axes.layout(value).cloned().unwrap_or_default());
        if arrangement.others() != 1 || !self.dtype(value).is_float() {
            return Err(self.lost(value, "it is no stream of [batch, tokens, channels] in floating point"));
        }
        let hint = format!("vitrim/{}", self.graph.value(value).name());
        let there = self.tokens_second(source, &arrangement, stage, &hint);
        let all = there.and_then(|there| self.all_tokens(there, stage, &hint));
        let revived = all.and_then(|all| self.as_before(all, &arrangement, 0, &hint));
        let revived = revived.ok_or_else(|| self.lost(value, "its tokens share an axis with something else"))?;
        self.revived.insert(value, revived);
        Ok(revived)
    }

    /// Why a value cannot have all its tokens back after pruning.
    fn lost(&self, value: ValueId, what: &str) -> Refusal {
        Refusal::Pinned {
            node: format!("the tensor '{}'", self.graph.value(value).name()),
            reason: format!("it has to be restored after pruning, but {what}"),
        }
    }

    /// For the tokens of `span`: their slots, counted from the first slot of the span.
    pub(super) fn owner_of(&mut self, node: NodeId, stage: usize, span: Span, hint: &str) -> Result<ValueId, Refusal> {
        if let Some(known) = self.part(stage, span).owner {
            return Ok(known);
        }
        let owner = self.owner(stage).ok_or_else(|| Refusal::Request("no merge to undo".into()))?;
        let total = self.stages.count(stage).and_then(|count| count.as_known());
        let owner = self.positions_over(node, owner, span, total, &format!("{hint}/owner"))?;
        self.part(stage, span).owner = Some(owner);
        Ok(owner)
    }

    /// Adds the output with the final slot of every original token.
    fn trace_source(&mut self, name: &str) -> Result<(), Refusal> {
        if self.graph.find_value(name).is_some() {
            return Err(Refusal::Request(format!("the model has a value named '{name}' already")));
        }
        let owner = match self.owner(self.stages.last()) {
            Some(owner) => owner,
            None => {
                // Nothing merges: every token is its own slot. A running count of ones gives 1, 2, ….
                let origin = self.vit.axes.origin();
                let arrangement = self.arrangement(&self.vit.axes.layout(origin).cloned().unwrap_or_default());
                let x = self.tokens_second(origin, &arrangement, 0, "vitrim/source");
                let x = x.ok_or_else(|| Refusal::Request("the tokens share an axis with something else".into()))?;
                let ones = self.vitrim(&TokenSize, "vitrim/initial_size", &[x], &[], 1)[0];
                let axis = self.ints("vitrim/source_axis", &[2]);
                let ones = self.patch.op("Squeeze", "vitrim/source_ones", &[ones, axis], &[]);
                let along = self.patch.constant("vitrim/source_along", Tensor::i64(1));
                let exclusive = [("exclusive", Attribute::Int(1))];
                let own = self.patch.op("CumSum", "vitrim/source_counts", &[ones, along], &exclusive);
                self.cast(own, DataType::F32, DataType::I64, "vitrim/source_own")
            }
        };
        let dim = |extent: &vitrim_ir::Expr| match (extent.as_known(), extent.as_symbol()) {
            (Some(n), _) => DimSpec::Known(n),
            (_, Some(name)) => DimSpec::Named(name.into()),
            _ => DimSpec::Unknown,
        };
        let dims = vec![dim(self.vit.axes.batch()), dim(self.vit.tokens())];
        self.patch.append_output(name, owner, TensorType { dtype: DataType::I64, dims: Some(dims) });
        Ok(())
    }
}

//! Attention as one operator.

use super::{Context, Flow, Transfer};
use crate::axes::{Axis, Effect, Layout};
use crate::graph::Node;
use crate::{FusedAttention, ValueId};

impl Context<'_> {
    /// Queries attend over keys; the operands hold tokens along their second axis (`[B, N, H·d]`) or their third
    /// (`[B, H, N, d]`).
    pub(super) fn attention(&self, node: &Node, fused: &FusedAttention) -> Transfer {
        if let Some(obstacle) = fused.obstacle {
            return Err(obstacle.into());
        }
        let [(q, queries), (k, keys), (v, values)] = fused
            .slots()
            .map(|slot| self.attended(node, slot))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
            .try_into()
            .map_err(|_| "no operand")?;
        if k[keys].only_tokens().is_none() || !v[values].same_as(&k[keys]) {
            return Err("its keys and values are not the tokens".into());
        }
        let of_tokens = |slot: usize| self.layout(node.input(slot)).is_some();
        if fused.slots()[1] == 0 && node.inputs.iter().enumerate().any(|(slot, _)| slot > 0 && of_tokens(slot)) {
            return Err("its weights are made of the tokens".into());
        }
        let mut flow = Flow::default().with(Effect::Attend);
        if let Some((slot, bias)) = fused.attention_bias.and_then(|slot| Some((slot, node.input(slot)?))) {
            let scores = [q[0].clone(), Axis::default(), q[queries].clone(), k[keys].clone()];
            flow.effects.extend(self.table(slot, bias, &scores)?);
        }
        if let Some((slot, mask)) = fused.mask.and_then(|slot| Some((slot, node.input(slot)?))) {
            flow.effects.extend(self.key_mask(slot, mask)?);
        }
        let mut out = q;
        let last = out.len() - 1;
        out[last] = Axis::plain(&self.result_dims(node, 0)?[last]);
        flow.layouts = vec![Some(Layout(out))];
        Ok(flow)
    }

    /// The axes of an operand with queries, keys or values, and which of them may hold tokens.
    fn attended(&self, node: &Node, slot: usize) -> Result<(Vec<Axis>, usize), String> {
        let axes = self.axes(node.input(slot).ok_or("no operand")?)?;
        let at = axes
            .len()
            .checked_sub(2)
            .filter(|at| [1, 2].contains(at))
            .ok_or("its operands have another rank than 3 or 4")?;
        if axes.iter().enumerate().any(|(axis, factors)| axis != at && factors.has_tokens()) {
            return Err("it has tokens on another axis than the one it attends over".into());
        }
        Ok((axes, at))
    }

    /// What becomes of a mask: one with equal entries changes no softmax.
    fn key_mask(&self, slot: usize, mask: ValueId) -> Result<Option<Effect>, String> {
        let dims = self.axes(mask)?;
        if dims.len() == 1 {
            return Err("its mask counts the tokens that are attended to".into());
        }
        match dims.iter().rev().take(2).any(|axis| !axis.atoms().is_empty()) {
            false => Ok(None),
            true if self.shapes.uniform(mask).is_some() => Ok(Some(Effect::UniformTable { slot })),
            true => Err("its mask has an entry for each token".into()),
        }
    }
}

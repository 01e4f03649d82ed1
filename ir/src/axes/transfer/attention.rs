//! Attention as one operator.

use super::{Context, Flow, Transfer};
use crate::axes::{Axis, Effect, Layout};
use crate::graph::Node;

impl Context<'_> {
    /// The standard operator, in version 23 and later: Q, K and V as `[B, H, N, d]` or `[B, N, H·d]`.
    pub(super) fn attention(&self, node: &Node) -> Transfer {
        let axes = |slot: usize| self.axes(node.input(slot).ok_or("no operand")?);
        let (q, k, v) = (axes(0)?, axes(1)?, axes(2)?);
        if node.int("is_causal").unwrap_or(0) != 0
            || node.input(4).is_some()
            || node.input(5).is_some()
            || node.input(6).is_some()
        {
            return Err("its attention is causal or has a cache".into());
        }
        // From version 25 on: which keys a query sees depends on how far they are.
        if ["left_window_size", "right_window_size"].iter().any(|name| node.int(name).unwrap_or(-1) >= 0) {
            return Err("its attention sees neighbouring tokens only".into());
        }
        let token_axis = if k.len() == 4 { 2 } else { 1 };
        if k[token_axis].only_tokens().is_none() || !v[token_axis].same_as(&k[token_axis]) {
            return Err("its keys and values are not the tokens".into());
        }
        let elsewhere = |axes: &[Axis]| axes.iter().enumerate().any(|(at, axis)| at != token_axis && axis.has_tokens());
        if elsewhere(&q) || elsewhere(&k) || elsewhere(&v) {
            return Err("it has tokens on another axis than the one it attends over".into());
        }
        let mut flow = Flow::default().with(Effect::Attend);
        if let Some(mask) = node.input(3) {
            let scores = [q[0].clone(), Axis::default(), q[token_axis].clone(), k[token_axis].clone()];
            flow.effects.extend(self.table(3, mask, &scores)?);
        }
        if node.output(3).is_some() {
            return Err("its scores are read elsewhere".into());
        }
        let mut out = q.clone();
        let last = out.len() - 1;
        out[last] = Axis::plain(&self.result_dims(node, 0)?[last]);
        flow.layouts = vec![Some(Layout(out))];
        Ok(flow)
    }
}

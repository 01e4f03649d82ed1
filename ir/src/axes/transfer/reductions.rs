//! Normalisation and reduction.

use super::{Context, Flow, Transfer};
use crate::axes::{Axis, Effect, Layout};
use crate::graph::Node;

impl Context<'_> {
    pub(super) fn softmax(&self, node: &Node) -> Transfer {
        let (biased, quantised) = (node.op.name == "BiasSoftmax", node.op.name == "QLinearSoftmax");
        let Flow { layouts, mut effects } = match (node.input(0), node.input(1)) {
            (Some(scores), Some(bias)) if biased => self.broadcast(&[(0, scores), (1, bias)])?,
            _ => Flow::of(self.operand(node, 0)?.clone()),
        };
        let layout = layouts.into_iter().flatten().next().unwrap_or_default();
        // The quantised form says which version of the standard one it was made from.
        let version = if quantised { node.int("opset").unwrap_or(self.opset) } else { self.opset };
        // Before version 13 everything from the axis on was normalised together; the biased form still does.
        let joint = biased || version < 13;
        let axis = self.axis(node.int("axis").unwrap_or(if joint && !quantised { 1 } else { -1 }), layout.rank())?;
        let covered = if joint { axis..layout.rank() } else { axis..axis + 1 };
        let tokens: Vec<usize> = covered.clone().filter(|&at| layout.0[at].has_tokens()).collect();
        match tokens.as_slice() {
            [] => Ok(Flow { layouts: vec![Some(layout)], effects }),
            [only]
                if layout.0[*only].only_tokens().is_some()
                    && covered.clone().all(|at| at == *only || layout.0[at].atoms().is_empty())
                    && node.op.name != "LogSoftmax" =>
            {
                let mut out = Layout(layout.0.iter().map(|axis| axis.with_weights(false)).collect());
                out.0[*only] = out.0[*only].with_weights(true);
                effects.push(Effect::Attend);
                Ok(Flow { layouts: vec![Some(out)], effects })
            }
            _ => Err("it normalises over tokens and more, or over part of them".into()),
        }
    }

    pub(super) fn layer_norm(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let axis = self.axis(node.int("axis").unwrap_or(-1), layout.rank())?;
        let covered = if node.is("LpNormalization") { axis..axis + 1 } else { axis..layout.rank() };
        if layout.0[covered].iter().any(Axis::has_tokens) {
            return Err("it normalises over the tokens".into());
        }
        let mut statistics = layout.clone();
        statistics.0[axis..].fill(Axis::default());
        Ok(Flow {
            layouts: vec![Some(layout.clone()), Some(statistics.clone()), Some(statistics)],
            effects: Vec::new(),
        })
    }

    pub(super) fn skip_norm(&self, node: &Node) -> Transfer {
        let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Err("no operand".into()) };
        let flow = self.broadcast(&[(0, a), (1, b)])?;
        if !flow.effects.is_empty() {
            // Even with equal entries: the operator takes no single number for it.
            return Err("it adds a table with an entry for each token".into());
        }
        let layout = flow.layouts[0].clone().unwrap_or_default();
        if layout.0.last().is_none_or(Axis::has_tokens) {
            return Err("it normalises over the tokens".into());
        }
        Ok(Flow { layouts: vec![Some(layout.clone()), None, None, Some(layout)], effects: flow.effects })
    }

    pub(super) fn per_channel(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        match layout.0.get(1) {
            Some(channels) if !channels.has_tokens() => Ok(Flow::of(layout.clone())),
            _ => Err("it has parameters for each token".into()),
        }
    }

    /// Normalisation over all of an image, in groups of channels.
    pub(super) fn norm_per_image(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        match layout.0.split_first() {
            Some((_, rest)) if !rest.iter().any(Axis::has_tokens) => Ok(Flow::of(layout.clone())),
            _ => Err("it normalises over the tokens".into()),
        }
    }

    /// A convolution whose kernel, operand `kernel`, covers one position: a matrix product with the channels.
    pub(super) fn pointwise_conv(&self, node: &Node, kernel: usize) -> Transfer {
        let layout = self.operand(node, 0)?;
        let ones = |name: &str| node.ints(name).is_none_or(|values| values.iter().all(|&x| x == 1));
        let zeros = |name: &str| node.ints(name).is_none_or(|values| values.iter().all(|&x| x == 0));
        let weight = self.dims(node.input(kernel).ok_or("no kernel")?)?;
        let [out_channels, _, space @ ..] = weight else { return Err("its kernel has too low a rank".into()) };
        if node.op.name == "FusedConv" && node.input(3).is_some() {
            return Err("it adds another tensor to what it convolves".into());
        }
        if !(space.iter().all(|dim| dim.is(1)) && ones("strides") && zeros("pads")) {
            return Err("it convolves neighbouring tokens".into());
        }
        if layout.0.get(1).is_none_or(Axis::has_tokens) {
            return Err("it multiplies the token axis with a matrix of fixed size".into());
        }
        let mut out = layout.clone();
        out.0[1] = Axis::plain(out_channels);
        Ok(Flow::of(out))
    }

    pub(super) fn reduce(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let rank = layout.rank();
        let arg = node.op.name.starts_with("Arg");
        let axes = match node.op.name.as_str() {
            _ if arg => Some(vec![node.int("axis").unwrap_or(0)]),
            "QLinearReduceMean" => node.ints("axes").map(<[i64]>::to_vec),
            _ => self.ints(node, 1, "axes")?,
        };
        let axes = match axes {
            Some(axes) if !axes.is_empty() => {
                axes.iter().map(|&axis| self.axis(axis, rank)).collect::<Result<Vec<_>, _>>()?
            }
            _ if node.int("noop_with_empty_axes").unwrap_or(0) != 0 => return Ok(Flow::of(layout.clone())),
            _ => (0..rank).collect(),
        };
        let keep = node.int("keepdims").unwrap_or(1) != 0;
        let mut out = Vec::new();
        for (at, axis) in layout.0.iter().enumerate() {
            match (axes.contains(&at), keep) {
                (false, _) => out.push(axis.clone()),
                (true, true) => out.push(Axis::default()),
                (true, false) => {}
            }
        }
        let flow = Flow::of(Layout(out));
        let over: Vec<usize> = axes.iter().copied().filter(|&axis| layout.0[axis].has_tokens()).collect();
        match over.as_slice() {
            [] => Ok(flow),
            [axis] if axes.len() == 1 => {
                let span = layout.0[*axis].only_tokens().ok_or("it reduces tokens together with something else")?;
                match node.op.name.as_str() {
                    "ReduceMean" | "QLinearReduceMean" => Ok(flow.with(Effect::Pool { span, axis: *axis, mean: true })),
                    "ReduceSum" => Ok(flow.with(Effect::Pool { span, axis: *axis, mean: false })),
                    "ReduceMax" | "ReduceMin" => Ok(flow.with(Effect::Extreme)),
                    _ => Err(format!("{} over tokens depends on their number", node.op)),
                }
            }
            _ => Err("it reduces tokens together with something else".into()),
        }
    }

    pub(super) fn global_pool(&self, node: &Node) -> Transfer {
        let layout = self.operand(node, 0)?;
        let channels_last = node.int("channels_last").unwrap_or(0) != 0;
        let space = if channels_last { 1..layout.rank().max(2) - 1 } else { 2.min(layout.rank())..layout.rank() };
        let over: Vec<usize> = space.clone().filter(|&axis| layout.0[axis].has_tokens()).collect();
        let mut out = layout.clone();
        out.0.get_mut(space).ok_or("its operand has too low a rank")?.fill(Axis::default());
        match over.as_slice() {
            [] => Ok(Flow::of(out)),
            [axis] if layout.rank() == 3 => {
                let span = layout.0[*axis].only_tokens().ok_or("it pools tokens together with something else")?;
                let mean = node.op.name != "GlobalMaxPool";
                Ok(Flow::ends(if mean { Effect::Pool { span, axis: *axis, mean } } else { Effect::Extreme }))
            }
            _ => Err("it pools tokens together with something else".into()),
        }
    }
}

//! A builder for bodies that hides what changed between versions of the standard operator set.

use vitrim_ir::{Attribute, Function, GraphBuilder, OpType, Tensor, ValueId, attribute_type};

use crate::DOMAIN;

/// A function body under construction. Scalars of the attributes are handled as 1-D tensors of one element, because
/// most operators that take positions want them so.
pub(crate) struct Body {
    graph: GraphBuilder,
    opset: i64,
}

impl Body {
    pub fn new(opset: i64) -> Self {
        assert!(opset >= crate::MIN_OPSET, "bodies need opset {} or newer", crate::MIN_OPSET);
        Self { graph: GraphBuilder::new(), opset }
    }

    pub fn input(&mut self, name: &str) -> ValueId {
        self.graph.input(name, None)
    }

    pub fn finish(mut self, name: &str, attributes: &[&str], outputs: &[(&str, ValueId)], doc: &str) -> Function {
        for (name, value) in outputs {
            self.graph.output(name, *value, None);
        }
        let attributes = attributes.iter().map(|&name| name.to_owned()).collect();
        Function::new(OpType::of(DOMAIN, name), attributes, self.graph.with_node_names().finish(), self.opset, doc)
    }

    pub fn op(&mut self, name: &str, hint: &str, inputs: &[ValueId]) -> ValueId {
        self.graph.op(name, hint, inputs, &[])
    }

    pub fn op_with(&mut self, name: &str, hint: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        self.graph.op(name, hint, inputs, attributes)
    }

    /// The extent of axis 1 of `value`, as `[1]`.
    pub fn extent(&mut self, value: ValueId, hint: &str) -> ValueId {
        let shape = self.op("Shape", &format!("{hint}_shape"), &[value]);
        let (one, two) = (self.ints(&format!("{hint}_from"), &[1]), self.ints(&format!("{hint}_to"), &[2]));
        self.slice(shape, one, two, 0, 1, hint)
    }

    /// The function's integer attribute `name`, as `[1]`.
    pub fn attribute(&mut self, name: &str) -> ValueId {
        let reference = Attribute::Ref(name.into(), attribute_type::INT);
        let scalar = self.graph.op("Constant", &format!("{name}_scalar"), &[], &[("value_int", reference)]);
        self.unsqueeze(scalar, &[0], name)
    }

    /// The function's attribute `name`, a scalar.
    pub fn float_attribute(&mut self, name: &str) -> ValueId {
        let reference = Attribute::Ref(name.into(), attribute_type::FLOAT);
        self.graph.op("Constant", name, &[], &[("value_float", reference)])
    }

    pub fn ints(&mut self, hint: &str, values: &[i64]) -> ValueId {
        self.graph.tensor(hint, Tensor::shape(values))
    }

    pub fn float(&mut self, hint: &str, value: f32) -> ValueId {
        self.graph.tensor(hint, Tensor::f32(value))
    }

    pub fn unsqueeze(&mut self, value: ValueId, axes: &[i64], hint: &str) -> ValueId {
        let axes = self.ints(&format!("{hint}_axes"), axes);
        self.op("Unsqueeze", hint, &[value, axes])
    }

    /// Converts to float32. Where it is float32 already, runtimes drop the node.
    pub fn as_f32(&mut self, value: ValueId, hint: &str) -> ValueId {
        self.op_with("Cast", hint, &[value], &[("to", Attribute::Int(1))])
    }

    /// Converts to the type that the function's attribute `dtype` says.
    pub fn as_dtype(&mut self, value: ValueId, hint: &str) -> ValueId {
        let target = Attribute::Ref("dtype".into(), attribute_type::INT);
        self.op_with("Cast", hint, &[value], &[("to", target)])
    }

    /// Heads of channels, `[B, N, heads, head_dim]`: the channels of `x` `[B, N, W]` from `at` on, head after head.
    pub fn heads(&mut self, x: ValueId, at: ValueId, heads: ValueId, head_dim: ValueId, hint: &str) -> ValueId {
        let width = self.op("Mul", &format!("{hint}_width"), &[heads, head_dim]);
        let end = self.op("Add", &format!("{hint}_end"), &[at, width]);
        let window = self.slice(x, at, end, 2, 1, &format!("{hint}_window"));
        let keep = self.ints(&format!("{hint}_keep"), &[0, 0]);
        let target = self.concat(&[keep, heads, head_dim], 0, &format!("{hint}_target"));
        self.op("Reshape", &format!("{hint}_heads"), &[window, target])
    }

    /// [`Self::heads`], permuted.
    pub fn heads_permuted(
        &mut self,
        x: ValueId,
        at: ValueId,
        heads: ValueId,
        head_dim: ValueId,
        perm: [i64; 4],
        hint: &str,
    ) -> ValueId {
        let heads = self.heads(x, at, heads, head_dim, hint);
        let perm = ("perm", Attribute::Ints(perm.to_vec()));
        self.op_with("Transpose", &format!("{hint}_of_heads"), &[heads], &[perm])
    }

    /// Every `step`-th entry of `axis` from `start` to before `end`.
    pub fn slice(&mut self, value: ValueId, start: ValueId, end: ValueId, axis: i64, step: i64, hint: &str) -> ValueId {
        let axis = self.ints(&format!("{hint}_axis"), &[axis]);
        let step = self.ints(&format!("{hint}_step"), &[step]);
        self.op("Slice", hint, &[value, start, end, axis, step])
    }

    /// The sum over the last axis, which stays with extent one.
    pub fn sum_last(&mut self, value: ValueId, hint: &str) -> ValueId {
        let axes = self.ints(&format!("{hint}_axes"), &[-1]);
        self.op_with("ReduceSum", hint, &[value, axes], &[("keepdims", Attribute::Int(1))])
    }

    /// Rows of length one; those of zeros stay as they are.
    pub fn unit_rows(&mut self, x: ValueId) -> ValueId {
        let squares = self.op("Mul", "squares", &[x, x]);
        let norm = self.sum_last(squares, "norm_squared");
        let norm = self.op("Sqrt", "norm", &[norm]);
        let tiny = self.float("tiny", 1e-12);
        let norm = self.op("Max", "norm_guarded", &[norm, tiny]);
        self.op("Div", "unit", &[x, norm])
    }

    /// The largest entry along the last axis, which goes away.
    pub fn max_last(&mut self, value: ValueId, hint: &str) -> ValueId {
        let largest = self.reduce("ReduceMax", value, &[-1], 1, &format!("{hint}_kept"));
        self.squeeze_last(largest, hint)
    }

    /// A reduction over `axes`, which are an input from operator set 18 on.
    pub fn reduce(&mut self, name: &str, value: ValueId, axes: &[i64], keep: i64, hint: &str) -> ValueId {
        let keep = ("keepdims", Attribute::Int(keep));
        if self.opset >= 18 {
            let axes = self.ints(&format!("{hint}_axes"), axes);
            self.op_with(name, hint, &[value, axes], &[keep])
        } else {
            self.op_with(name, hint, &[value], &[("axes", Attribute::Ints(axes.to_vec())), keep])
        }
    }

    /// The position of the largest entry along the last axis, which goes away; the lowest among equals.
    pub fn argmax_last(&mut self, value: ValueId, hint: &str) -> ValueId {
        let attributes = [("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(1))];
        let position = self.op_with("ArgMax", &format!("{hint}_kept"), &[value], &attributes);
        self.squeeze_last(position, hint)
    }

    /// Removes the last axis, of extent one. Reductions are asked to keep theirs and are squeezed here, because ONNX
    /// Runtime keeps it anyway when there is nothing to reduce.
    fn squeeze_last(&mut self, value: ValueId, hint: &str) -> ValueId {
        let axes = self.ints(&format!("{hint}_last"), &[-1]);
        self.op("Squeeze", hint, &[value, axes])
    }

    /// A zero for each image, `[B, 1]`: of `size`, `[B, N, 1]`, the largest of one number is the first.
    pub fn zero_per_image(&mut self, size: ValueId) -> ValueId {
        let (zero, one) = (self.ints("first_from", &[0]), self.ints("first_to", &[1]));
        let first = self.slice(size, zero, one, 1, 1, "first_size");
        self.argmax_last(first, "zero_per_image")
    }

    /// Each image's copy of some positions `[K]`: `[B, K]`, given a [zero](Self::zero_per_image) for each.
    pub fn per_image(&mut self, zero: ValueId, positions: ValueId, hint: &str) -> ValueId {
        // The larger of zero and a position is the position. Not a sum: ONNX Runtime up to 1.20 takes adding an empty
        // row for adding nothing, and loses the change of shape.
        self.op("Max", hint, &[zero, positions])
    }

    /// Positions along axis 1 in falling (or rising) order of value, the lowest position first among equals.
    pub fn argsort(&mut self, value: ValueId, count: ValueId, falling: bool, hint: &str) -> ValueId {
        let attributes = [("axis", Attribute::Int(1)), ("largest", Attribute::Int(falling.into()))];
        let inputs = vec![Some(value), Some(count)];
        self.graph.call(OpType::standard("TopK"), hint, inputs, &attributes, 2)[1]
    }

    /// The `count` largest values along the last axis, in falling order.
    pub fn largest_last(&mut self, value: ValueId, count: ValueId, hint: &str) -> ValueId {
        let attributes = [("axis", Attribute::Int(-1))];
        let inputs = vec![Some(value), Some(count)];
        self.graph.call(OpType::standard("TopK"), hint, inputs, &attributes, 2)[0]
    }

    /// `[0, 1, …, count - 1]` for a `count` of shape `[1]`.
    pub fn iota(&mut self, count: ValueId, hint: &str) -> ValueId {
        let zero = self.graph.tensor(&format!("{hint}_zero"), Tensor::i64(0));
        let one = self.graph.tensor(&format!("{hint}_one"), Tensor::i64(1));
        let axis = self.ints(&format!("{hint}_axis"), &[0]);
        let limit = self.op("Squeeze", &format!("{hint}_count"), &[count, axis]);
        self.op("Range", hint, &[zero, limit, one])
    }

    /// Rows of `x` `[B, N, C]` at positions `[B, K]`: `[B, K, C]`.
    pub fn rows(&mut self, x: ValueId, positions: ValueId, hint: &str) -> ValueId {
        let indices = self.unsqueeze(positions, &[-1], &format!("{hint}_at"));
        self.op_with("GatherND", hint, &[x, indices], &[("batch_dims", Attribute::Int(1))])
    }

    /// Entries of `table` `[B, N]` at positions `[B, K]`: `[B, K]`.
    pub fn entries(&mut self, table: ValueId, positions: ValueId, hint: &str) -> ValueId {
        self.op_with("GatherElements", hint, &[table, positions], &[("axis", Attribute::Int(1))])
    }

    /// Joins along `axis`.
    pub fn concat(&mut self, parts: &[ValueId], axis: i64, hint: &str) -> ValueId {
        self.op_with("Concat", hint, parts, &[("axis", Attribute::Int(axis))])
    }
}

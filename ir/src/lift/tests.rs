//! Tests of lifting: one operator at a time, then graphs and models.

use super::*;
use crate::{DimSpec, GraphBuilder, OpaqueAttribute, TensorType, print_graph};

fn ty(dtype: DataType, dims: &[i64]) -> TensorType {
    let dim = |&n: &i64| if n < 0 { DimSpec::Named(format!("n{}", -n)) } else { DimSpec::Known(n) };
    TensorType { dtype, dims: Some(dims.iter().map(dim).collect()) }
}

fn f32(dims: &[i64]) -> TensorType {
    ty(DataType::F32, dims)
}

fn ints(list: &[i64]) -> Attribute {
    Attribute::Ints(list.to_vec())
}

fn text(text: &'static str) -> Attribute {
    Attribute::String(text.as_bytes().into())
}

/// `y = op(x, ..)` of a version of the standard operator set, where `x` is a graph input.
struct Case {
    op: &'static str,
    from: i64,
    ir_version: i64,
    x: Option<TensorType>,
    operands: Vec<Option<Tensor>>,
    attributes: Vec<(&'static str, Attribute)>,
    results: usize,
    /// A constant is a graph input as well.
    replaceable: bool,
}

fn case(op: &'static str, from: i64) -> Case {
    let x = Some(f32(&[-1, 3, 8, 8]));
    Case { op, from, ir_version: 6, x, operands: vec![], attributes: vec![], results: 1, replaceable: false }
}

impl Case {
    fn x(self, x: TensorType) -> Self {
        Self { x: Some(x), ..self }
    }

    fn attribute(mut self, name: &'static str, value: Attribute) -> Self {
        self.attributes.push((name, value));
        self
    }

    fn operand(mut self, tensor: Tensor) -> Self {
        self.operands.push(Some(tensor));
        self
    }

    fn model(&self) -> Model {
        let mut builder = GraphBuilder::new();
        let x = builder.input("x", self.x.as_ref());
        let mut inputs = vec![Some(x)];
        for operand in &self.operands {
            let operand = operand.clone().map(|tensor| builder.initializer("c", tensor));
            inputs.push(operand);
        }
        let results = builder.call(OpType::standard(self.op), "r", inputs.clone(), &self.attributes, self.results);
        builder.output("y", results[0], None);
        let mut model = builder.into_model(self.ir_version, &[("", self.from)], vec![]);
        if self.replaceable || self.ir_version < CONSTANTS_APART {
            model.graph.inputs.extend(inputs.iter().skip(1).flatten());
        }
        if self.replaceable {
            for value in model.graph.values.iter_mut().flatten() {
                if let Def::Initializer(tensor) = &value.def {
                    value.def = Def::Default(tensor.clone());
                }
            }
        }
        model
    }

    /// The node and the types of the inputs that it has afterwards.
    fn lifted(&self) -> String {
        let mut model = self.model();
        assert_eq!(lift_opset(&mut model), Ok(true));
        model.verify().unwrap();
        assert_eq!(model.opsets().standard(), LIFTED);
        let text = print_graph(model.graph());
        let line = text.lines().find(|line| line.starts_with("%y")).unwrap();
        line.strip_prefix("%y = ").unwrap_or(line).into()
    }

    /// The reason, after which the model must be as it was.
    fn refused(&self) -> String {
        let before = self.model();
        let mut model = before.clone();
        let Err(LiftError::Node { node, from, reason }) = lift_opset(&mut model) else { panic!("{}", self.op) };
        assert!(model == before);
        assert_eq!((node, from), (format!("{} -> 'y'", self.op), self.from));
        reason
    }
}

#[test]
fn the_table_is_in_order() {
    assert!(SAME.is_sorted_by(|a, b| a < b));
    for name in SAME_SINCE.iter().flat_map(|(_, names)| *names) {
        assert!(!SAME.contains(name), "{name}");
    }
}

#[test]
fn bounds_of_slices_become_operands() {
    let case = |starts: &[i64], ends: &[i64]| {
        super::tests::case("Slice", 9).attribute("starts", ints(starts)).attribute("ends", ints(ends))
    };
    assert_eq!(case(&[0, 1], &[9, -1]).lifted(), "Slice(x, [0,1], [9,-1], [0,1])");
    let some = case(&[1], &[2]).attribute("axes", ints(&[-1]));
    assert_eq!(some.lifted(), "Slice(x, [1], [2], [-1])");
    assert_eq!(case(&[1], &[1, 2]).refused(), "its starts, ends and axes are not as many");
    assert_eq!(super::tests::case("Slice", 9).refused(), "it has no attribute 'starts'");
    let many = case(&[1], &[2]).operand(Tensor::shape(&[0]));
    assert_eq!(many.refused(), "it has 2 operands, and its version takes 1");
    let wrong = super::tests::case("Slice", 9).attribute("starts", Attribute::Int(1));
    assert_eq!(wrong.refused(), "its attribute 'starts' is not a list of integers");
    let new = super::tests::case("Slice", 10).operand(Tensor::shape(&[0])).operand(Tensor::shape(&[1]));
    assert_eq!(new.lifted(), "Slice(x, [0], [1])");
}

#[test]
fn the_count_of_top_k_becomes_an_operand() {
    let two = Case { results: 2, ..case("TopK", 9).attribute("axis", Attribute::Int(-1)) };
    assert_eq!(two.attribute("k", Attribute::Int(5)).lifted(), "%y, %r_2 = TopK(x, [5]) axis=-1");
    assert_eq!(case("TopK", 9).refused(), "it has no attribute 'k'");
    assert_eq!(case("TopK", 10).operand(Tensor::shape(&[2])).lifted(), "TopK(x, [2])");
}

#[test]
fn upsampling_becomes_resizing() {
    let scales = |scales: &[f32]| Tensor::f32s(&[scales.len()], scales);
    for (op, from) in [("Upsample", 9), ("Resize", 10)] {
        let larger = || case(op, from).operand(scales(&[1.0, 1.0, 2.0, 2.5]));
        let resized = "Resize(x, _, c{f32[4]}) ";
        let how = "coordinate_transformation_mode=\"asymmetric\" nearest_mode=\"floor\"";
        assert_eq!(larger().lifted(), format!("{resized}{how}"));
        let linear = larger().attribute("mode", text("linear"));
        assert_eq!(linear.lifted(), format!("{resized}mode=\"linear\" {how}"));
        assert_eq!(larger().attribute("mode", text("cubic")).refused(), "its mode 'cubic' has no counterpart");
        let fed = Case { replaceable: true, ..larger() };
        assert_eq!(fed.refused(), "its scales are not constant");
        let smaller = case(op, from).operand(scales(&[1.0, 1.0, 0.5, 2.0]));
        assert_eq!(smaller.refused(), "it makes its operand smaller, which runtimes do in different ways");
        assert_eq!(case(op, from).operand(Tensor::shape(&[1])).refused(), "its scales are not numbers");
    }
    let deprecated = case("Upsample", 10).operand(scales(&[1.0; 4]));
    assert_eq!(deprecated.refused(), "it is no operator of opset 10");
    assert_eq!(case("Resize", 9).refused(), "it is no operator of opset 9");
}

#[test]
fn resizing_leaves_out_what_is_empty() {
    let sizes = || Some(Tensor::shape(&[1, 3, 16, 16]));
    let empty = || Some(Tensor::f32s(&[0], &[]));
    let scales = || Some(Tensor::f32s(&[4], &[1.0, 1.0, 2.0, 2.0]));
    for from in [11, 12] {
        let of = |operands| Case { operands, ..case("Resize", from) };
        let by_size = of(vec![empty(), empty(), sizes()]).attribute("mode", text("cubic"));
        assert_eq!(by_size.lifted(), "Resize(x, _, _, [1,3,16,16]) mode=\"cubic\"");
        let mut model = by_size.model();
        lift_opset(&mut model).unwrap();
        assert_eq!(model.graph().initializers().len(), 1);
        assert_eq!(of(vec![empty(), scales()]).lifted(), "Resize(x, _, c_2{f32[4]})");
        assert_eq!(of(vec![None, scales(), sizes()]).refused(), "it has both scales and sizes");
        let gone = of(vec![empty(), scales()]);
        let gone = gone.attribute("coordinate_transformation_mode", text("tf_half_pixel_for_nn"));
        let reason = "its coordinate_transformation_mode 'tf_half_pixel_for_nn' has no counterpart";
        assert_eq!(gone.refused(), reason);
    }
    // What callers may feed stays an input.
    let fed = Case { replaceable: true, operands: vec![empty(), scales()], ..case("Resize", 11) };
    let mut model = fed.model();
    lift_opset(&mut model).unwrap();
    assert_eq!((model.graph().inputs().len(), model.graph().initializers().len()), (3, 2));
}

#[test]
fn bounds_of_clips_become_operands() {
    let of = |low: f32, high: f32| {
        case("Clip", 10).attribute("min", Attribute::Float(low)).attribute("max", Attribute::Float(high))
    };
    assert_eq!(of(0.0, 6.0).lifted(), "Clip(x, 0.0, 6.0)");
    assert_eq!(of(f32::MIN, 6.0).lifted(), "Clip(x, _, 6.0)");
    assert_eq!(of(0.5, f32::MAX).lifted(), "Clip(x, 0.5)");
    assert_eq!(case("Clip", 9).lifted(), "Clip(x)");
    assert_eq!(of(0.0, f32::INFINITY).lifted(), "Clip(x, 0.0, inf)");
    assert_eq!(of(0.0, 0.5).x(ty(DataType::F16, &[2])).lifted(), "Clip(x, 0.0, 0.5)");
    let wide = of(f32::MIN, 0.5).x(ty(DataType::F64, &[2])).lifted();
    assert_eq!(wide, "Clip(x, -3.4028234663852886e38, 0.5)");
    let integers = of(0.0, 6.0).x(ty(DataType::I32, &[2]));
    assert_eq!(integers.refused(), "its operand is of type i32, not of floating-point numbers");
    let unknown = Case { x: None, ..of(0.0, 6.0) };
    assert_eq!(unknown.refused(), "the element type of its operand is not known");
    let wrong = case("Clip", 9).attribute("min", Attribute::Int(0));
    assert_eq!(wrong.refused(), "its attribute 'min' is not a number");
    assert_eq!(case("Clip", 11).operand(Tensor::f32(1.0)).lifted(), "Clip(x, 1.0)");
}

#[test]
fn padding_becomes_an_operand() {
    let of = |value: f32| case("Pad", 9).attribute("pads", ints(&[0; 8])).attribute("value", Attribute::Float(value));
    assert_eq!(of(0.0).lifted(), "Pad(x, [0,0,0,0,0,0,0,0])");
    assert_eq!(of(-1.5).lifted(), "Pad(x, [0,0,0,0,0,0,0,0], -1.5)");
    let edge = of(-1.5).attribute("mode", text("edge"));
    assert_eq!(edge.lifted(), "Pad(x, [0,0,0,0,0,0,0,0]) mode=\"edge\"");
    assert_eq!(of(1.0).attribute("mode", Attribute::Int(1)).refused(), "its attribute 'mode' is not text");
    assert_eq!(case("Pad", 9).refused(), "it has no attribute 'pads'");
}

#[test]
fn dropout_loses_a_mask_that_nothing_reads() {
    let of = |results| Case { results, ..case("Dropout", 11) };
    assert_eq!(of(2).lifted(), "Dropout(x)");
    assert_eq!(of(2).attribute("ratio", Attribute::Float(0.5)).lifted(), "Dropout(x)");
    assert_eq!(of(1).attribute("ratio", Attribute::Float(0.25)).lifted(), "Dropout(x, 0.25)");
    let mut model = of(2).model();
    let mask = model.graph.find_value("r_2").unwrap();
    model.graph.outputs.push(mask);
    let error = lift_opset(&mut model).unwrap_err().to_string();
    let reason =
        "Dropout -> 'y' cannot be converted from opset 11 to 13: its mask is read, which was defined differently";
    assert_eq!(error, reason);
}

#[test]
fn scatter_has_another_name() {
    let case = case("Scatter", 9).operand(Tensor::shape(&[0])).operand(Tensor::f32s(&[1], &[1.0]));
    assert_eq!(case.attribute("axis", Attribute::Int(1)).lifted(), "ScatterElements(x, [0], c_2{f32[1]}) axis=1");
    assert_eq!(super::tests::case("Scatter", 11).refused(), "it is no operator of opset 11");
}

#[test]
fn what_was_defined_differently_is_refused() {
    let padded = |how| case("ConvTranspose", 10).attribute("auto_pad", text(how));
    assert_eq!(padded("VALID").lifted(), "ConvTranspose(x) auto_pad=\"VALID\"");
    assert_eq!(padded("SAME_UPPER").refused(), "its automatic padding was defined differently");
    assert_eq!(case("OneHot", 10).refused(), "its indices may be negative, which was defined differently");
    assert_eq!(case("OneHot", 11).lifted(), "OneHot(x)");
    assert_eq!(case("Erf", 9).lifted(), "Erf(x)");
    assert_eq!(case("Erf", 12).x(ty(DataType::I8, &[1])).refused(), "its operand is of type i8");
    for op in ["Trilu", "Gelu", "Mish", "NoSuch", ""] {
        assert_eq!(case(op, 12).refused(), "it is no operator of opset 12");
    }
    assert_eq!(case("Range", 10).refused(), "it is no operator of opset 10");
    assert_eq!(case("Range", 11).lifted(), "Range(x)");
    assert_eq!(case("LayerNormalization", 12).lifted(), "LayerNormalization(x)");
}

#[test]
fn indices_of_one_hot_may_be_known() {
    let one_hot = |indices: Tensor| {
        let mut builder = GraphBuilder::new();
        let depth = builder.initializer("depth", Tensor::i64(4));
        let values = builder.input("values", Some(&f32(&[2])));
        let indices = builder.tensor("indices", indices);
        let y = builder.op("OneHot", "y", &[indices, depth, values], &[]);
        builder.output("y", y, None);
        lift_opset(&mut builder.into_model(6, &[("", 9)], vec![])).is_ok()
    };
    assert!(one_hot(Tensor::shape(&[0, 3])));
    assert!(!one_hot(Tensor::shape(&[0, -1])));
    assert!(one_hot(Tensor::f32s(&[2], &[0.0, 9.0])));
    assert!(!one_hot(Tensor::f32s(&[2], &[0.0, -1.0])));
}

#[test]
fn softmax_is_over_one_axis() {
    let of = |dims: &[i64]| case("Softmax", 11).x(f32(dims));
    let on = |dims: &[i64], axis| of(dims).attribute("axis", Attribute::Int(axis));
    assert_eq!(of(&[-1, 10]).lifted(), "Softmax(x) axis=-1");
    assert_eq!(on(&[-1, 3, -2, -3], 3).lifted(), "Softmax(x) axis=3");
    assert_eq!(on(&[-1, 3, -2, -3], -1).lifted(), "Softmax(x) axis=-1");
    assert_eq!(on(&[-1, 7, 1, 1], 1).lifted(), "Softmax(x) axis=1");
    assert_eq!(on(&[-1, 7, 1, 1], -3).lifted(), "Softmax(x) axis=1");
    assert_eq!(of(&[-1, 1, -2]).lifted(), "Softmax(x) axis=-1");
    assert_eq!(of(&[-1, 1, 1]).lifted(), "Softmax(x) axis=-1");
    assert_eq!(of(&[-1, 1, -2, 1]).lifted(), "Softmax(x) axis=2");
    assert_eq!(of(&[-1, 4, 4]).refused(), "it is taken over several axes at once");
    assert_eq!(of(&[-1, -2, -3]).refused(), "it is taken over several axes at once");
    assert_eq!(on(&[2, 2], 2).refused(), "its axis 2 is none of an operand of rank 2");
    assert_eq!(on(&[2, 2], -3).refused(), "its axis -3 is none of an operand of rank 2");
    assert_eq!(on(&[2, 2], i64::MIN).refused(), format!("its axis {} is none of an operand of rank 2", i64::MIN));
    assert_eq!(on(&[], 0).refused(), "its axis 0 is none of an operand of rank 0");
    let unknown = Case { x: None, ..case("LogSoftmax", 9) };
    assert_eq!(unknown.refused(), "the rank of its operand is not known");
    let last = Case { x: None, ..case("Hardmax", 9).attribute("axis", Attribute::Int(-1)) };
    assert_eq!(last.lifted(), "Hardmax(x) axis=-1");
    let wrong = case("Softmax", 9).attribute("axis", Attribute::Float(1.0));
    assert_eq!(wrong.refused(), "its attribute 'axis' is not an integer");
}

#[test]
fn lists_become_operands() {
    for op in ["Squeeze", "Unsqueeze", "ReduceSum"] {
        for from in 9..13 {
            let line = case(op, from).attribute("axes", ints(&[0, 2])).lifted();
            assert_eq!(line, format!("{op}(x, [0,2])"));
        }
    }
    let split = Case { results: 2, ..case("Split", 9).attribute("axis", Attribute::Int(3)) };
    assert_eq!(split.lifted(), "%y, %r_2 = Split(x) axis=3");
    assert_eq!(split.attribute("split", ints(&[3, 5])).lifted(), "%y, %r_2 = Split(x, [3,5]) axis=3");
    assert_eq!(case("Squeeze", 9).lifted(), "Squeeze(x)");
    assert_eq!(case("ReduceSum", 9).lifted(), "ReduceSum(x)");
    assert_eq!(case("ReduceSum", 9).attribute("axes", ints(&[])).lifted(), "ReduceSum(x)");
    assert_eq!(case("Squeeze", 9).attribute("axes", ints(&[])).refused(), "its attribute 'axes' is empty");
    assert_eq!(case("Unsqueeze", 9).refused(), "it has no attribute 'axes'");
    assert_eq!(case("ReduceMean", 9).attribute("axes", ints(&[1])).lifted(), "ReduceMean(x) axes=[1]");
}

#[test]
fn scales_of_quantisation_are_scalars() {
    let of = |scale: Tensor, zero: Tensor| case("QuantizeLinear", 10).operand(scale).operand(zero);
    let zeros = |dims: &[usize], n| Tensor::integers(DataType::U8, dims, &vec![0; n]);
    let scalar = of(Tensor::f32(0.5), zeros(&[], 1));
    assert_eq!(scalar.lifted(), "QuantizeLinear(x, 0.5, 0)");
    let short = of(Tensor::f32s(&[1], &[0.5]), zeros(&[1], 1));
    assert_eq!(short.lifted(), "QuantizeLinear(x, 0.5, 0)");
    let mut model = short.model();
    lift_opset(&mut model).unwrap();
    assert_eq!(model.graph().initializers().len(), 2);
    let long = of(Tensor::f32s(&[2], &[0.5; 2]), zeros(&[2], 2));
    assert_eq!(long.refused(), "its scale may be a vector");
    let fed = Case { replaceable: true, ..short };
    assert_eq!(fed.refused(), "its scale may be a vector");
    let mixed = of(Tensor::f32(0.5), zeros(&[2], 2));
    assert_eq!(mixed.refused(), "its zero point may be a vector");
    assert_eq!(case("DequantizeLinear", 9).refused(), "it is no operator of opset 9");
}

#[test]
fn equal_constants_are_one() {
    let mut builder = GraphBuilder::new();
    let x = builder.input("lift/axes", Some(&f32(&[4])));
    let mut y = x;
    for axes in [[0], [0], [1]] {
        y = builder.op("Unsqueeze", "v", &[y], &[("axes", ints(&axes))]);
    }
    builder.output("y", y, None);
    let model = builder.into_model(3, &[("", 9)], vec![]);
    for (ir_version, inputs) in [(3, 3), (4, 1)] {
        let mut model = model.clone();
        model.rest.ir_version = Some(ir_version);
        assert_eq!(lift_opset(&mut model), Ok(true));
        let graph = model.verify().unwrap().model().graph();
        let names: Vec<&str> = graph.initializers().iter().map(|&id| graph.value(id).name()).collect();
        assert_eq!(names, ["lift/axes_2", "lift/axes_3"]);
        assert_eq!((graph.inputs().len(), graph.revision()), (inputs, 1));
    }
}

/// `y = If(c)`, whose branches unsqueeze `x` of the outer graph and take its softmax.
fn branches(axis: i64) -> Model {
    let mut builder = GraphBuilder::new();
    let (c, x) = (builder.input("c", Some(&ty(DataType::Bool, &[]))), builder.input("x", Some(&f32(&[2, -1]))));
    let branch = |name: &'static str| {
        let mut inner = Graph::default();
        let outer = inner.add_value(Value::new("x".into(), Def::Captured(x)));
        let mut add = |op: &str, input: ValueId, result: &str, attribute: &str, value: Attribute| {
            let id = inner.add_value(Value::new(format!("{name}/{result}"), Def::Undefined));
            let mut node = Node::new(OpType::standard(op), vec![Some(input)], vec![(attribute.into(), value)]);
            node.outputs.push(Some(id));
            inner.add_node(node);
            id
        };
        let soft = add("Softmax", outer, "soft", "axis", Attribute::Int(axis));
        let first = add("Unsqueeze", soft, "first", "axes", ints(&[0]));
        let second = add("Unsqueeze", first, "second", "axes", ints(&[0]));
        inner.outputs.push(second);
        Attribute::Graph(Box::new(inner))
    };
    let attributes = [("then_branch", branch("then")), ("else_branch", branch("else"))];
    let y = builder.op("If", "y", &[c], &attributes);
    builder.output("y", y, None);
    let mut model = builder.into_model(7, &[("", 11)], vec![]);
    model.graph.reconnect();
    // The closures name outer values that the builder does not know of.
    let (id, _) = model.graph.producer(model.graph.find_value("y").unwrap()).unwrap();
    let captures = model.graph.node(id).read_by_nested();
    model.graph.node_mut(id).captures = captures;
    model.graph.reconnect();
    model
}

#[test]
fn nested_graphs_are_lifted() {
    let mut model = branches(1);
    model.verify().unwrap();
    assert_eq!(lift_opset(&mut model), Ok(true));
    model.verify().unwrap();
    let text = print_graph(model.graph());
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.contains("squeeze")).collect();
    let expected = ["then/first = Unsqueeze(%then/soft, [0])", "then/second = Unsqueeze(%then/first, [0])"];
    assert_eq!(lines[..2], expected.map(|line| format!("%{line}")));
    assert_eq!(lines.len(), 4);

    let error = lift_opset(&mut branches(0)).unwrap_err().to_string();
    let reason =
        "Softmax -> 'then/soft' cannot be converted from opset 11 to 13: it is taken over several axes at once";
    assert_eq!(error, reason);
}

#[test]
fn lists_of_graphs_are_refused() {
    let graphs = crate::onnx::AttributeProto { graphs: vec![Default::default()], ..Default::default() };
    let case = case("Relu", 11).attribute("bodies", Attribute::Other(OpaqueAttribute(Box::new(graphs))));
    assert_eq!(case.refused(), "it has a list of graphs");
}

#[test]
fn versions_out_of_range() {
    let of = |from| case("Relu", from).model();
    for from in [13, 14, 22, 99] {
        let mut model = of(from);
        assert_eq!(lift_opset(&mut model), Ok(false));
        assert!(model == of(from));
    }
    for from in [-1, 0, 1, 8] {
        assert_eq!(lift_opset(&mut of(from)), Err(LiftError::TooOld { version: from }));
    }
    let none = |ir_version| Case { ir_version, ..case("Relu", 9) }.model();
    let (mut new, mut old) = (none(7), none(2));
    new.opsets.0.clear();
    old.opsets.0.clear();
    assert_eq!((lift_opset(&mut new), new.opsets().standard()), (Ok(false), LIFTED));
    assert_eq!(lift_opset(&mut old), Err(LiftError::TooOld { version: 1 }));
}

#[test]
fn parts_that_are_not_lifted() {
    let mut model = case("Relu", 11).model();
    model.rest.training_info.push(Default::default());
    let error = lift_opset(&mut model).unwrap_err().to_string();
    assert_eq!(error, "the model's training information cannot be converted from opset 11 to 13");

    let function = |opset| crate::Function::new(OpType::of("f", "g"), vec![], Graph::default(), opset, "");
    let mut model = case("Relu", 11).model();
    model.functions = vec![function(13), function(11)];
    let error = lift_opset(&mut model).unwrap_err().to_string();
    assert_eq!(error, "the model's local function f.g cannot be converted from opset 11 to 13");
    model.functions = vec![function(13)];
    assert_eq!(lift_opset(&mut model), Ok(true));
}

#[test]
fn constants_stop_being_inputs() {
    let of = |ir_version| Case { ir_version, ..case("Clip", 12) }.operand(Tensor::f32(0.0)).model();
    for (has, wants, dropped) in [(3, 3, 0), (3, 8, 1), (4, 8, 0), (9, 8, 0)] {
        let mut model = of(has);
        assert_eq!((model.require_ir_version(wants), model.ir_version()), (dropped, wants.max(has)));
        model.verify().unwrap();
    }
    let fed = Case { replaceable: true, ..case("Clip", 12) }.operand(Tensor::f32(0.0));
    assert_eq!(fed.model().require_ir_version(8), 0);
}

#[test]
fn models_are_raised_where_that_changes_no_meaning() {
    let raised = |case: Case| {
        let mut model = case.model();
        let graph = print_graph(model.graph());
        let done = raise_opset(&mut model);
        assert_eq!(print_graph(model.graph()), graph);
        (done, model.opsets().standard())
    };
    assert_eq!(raised(case("Softmax", 13)), (true, 17));
    assert_eq!(raised(case("Gelu", 20)), (true, 20));
    assert_eq!(raised(case("Softmax", 12)), (false, 12));
    let norm = || case("BatchNormalization", 13);
    assert_eq!(raised(norm()), (true, 17));
    assert_eq!(raised(Case { results: 5, ..norm() }), (false, 13));
    assert_eq!(raised(case("RoiAlign", 13)), (false, 13));
    let stated = case("RoiAlign", 16).attribute("coordinate_transformation_mode", text("half_pixel"));
    assert_eq!(raised(stated), (true, 17));
}

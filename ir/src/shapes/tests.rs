//! Tests of the rules, and of whole models where a folder of them is at hand.

use std::collections::BTreeMap;
use std::path::Path;

use super::Shapes;
use crate::{Attribute, DataType, DimSpec, Expr, GraphBuilder, Model, OpType, Tensor, TensorType, ValueId};

fn ty(dtype: DataType, dims: &[&str]) -> TensorType {
    let dim = |text: &&str| match (text.parse(), *text) {
        (Ok(n), _) => DimSpec::Known(n),
        (_, "?") => DimSpec::Unknown,
        (_, name) => DimSpec::Named(name.into()),
    };
    TensorType { dtype, dims: Some(dims.iter().map(dim).collect()) }
}

fn text(dims: Option<&[Expr]>) -> String {
    match dims {
        Some(dims) => format!("[{}]", dims.iter().map(Expr::to_string).collect::<Vec<_>>().join(",")),
        None => "unknown".into(),
    }
}

/// A value as a runtime saw it.
struct Seen {
    is_input: bool,
    name: String,
    dims: Vec<i64>,
    ints: Option<Vec<i64>>,
    uniform: Option<f64>,
}

/// What a runtime saw, by run.
struct Truth(BTreeMap<String, Vec<Seen>>);

impl Truth {
    /// Lines `run in|out name dtype dims ints uniform`, separated by tabs.
    fn read(path: &Path) -> Option<Self> {
        let list = |text: &str| text.split(',').filter_map(|n| n.parse().ok()).collect::<Vec<i64>>();
        let mut runs: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for line in std::fs::read_to_string(path).ok()?.lines() {
            let parts: Vec<&str> = line.split('\t').collect();
            let [run, kind, name, _, dims, ints, uniform @ ..] = parts.as_slice() else { return None };
            let seen = Seen {
                is_input: *kind == "in",
                name: (*name).into(),
                dims: list(dims),
                ints: ints.strip_suffix(';').map(list),
                uniform: uniform.first().and_then(|text| text.parse().ok()),
            };
            runs.entry((*run).into()).or_default().push(seen);
        }
        Some(Self(runs))
    }
}

/// Over every model in the folder that `VITRIM_ZOO` names: nothing inferred contradicts what the file declares, or what
/// a runtime saw (`VITRIM_ZOO_TRUTH`, a folder of tables). Prints how much is known of each model.
#[test]
fn zoo() {
    let Some(folder) = std::env::var_os("VITRIM_ZOO") else {
        println!("VITRIM_ZOO is not set: no models to infer the shapes of");
        return;
    };
    let verbose = std::env::var_os("VITRIM_VERBOSE").is_some();
    let truths = std::env::var_os("VITRIM_ZOO_TRUTH");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    paths.sort();
    let mut missing: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut models = Vec::new();
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let model = match Model::read(&path) {
            Ok(model) => model,
            Err(error) => {
                println!("{name}: {error}");
                continue;
            }
        };
        let mut inlined = model.clone();
        models.push((name.clone(), model));
        if crate::inline_functions(&mut inlined, |_| true) == Ok(true) {
            models.push((name, inlined));
        }
    }
    for (name, model) in models {
        let shapes = Shapes::infer(&model);
        let graph = model.graph();
        let (mut ranked, mut closed, mut total) = (0, 0, 0);
        let inputs: std::collections::BTreeSet<String> =
            graph.inputs().iter().filter_map(|&id| shapes.dims(id)).flatten().flat_map(Expr::symbols).collect();
        for (id, value) in graph.values() {
            if value.name().is_empty() {
                continue;
            }
            total += 1;
            match shapes.dims(id) {
                Some(dims) => {
                    ranked += 1;
                    let open = !dims.iter().all(|dim| dim.symbols().is_subset(&inputs));
                    closed += usize::from(!open);
                    if open && verbose {
                        println!("  open extent {} {}", value.name(), text(Some(dims)));
                    }
                }
                None if matches!(value.def(), crate::Def::Undefined) => total -= 1,
                None => *missing.entry(shapes.reason(id).unwrap_or("no reason").into()).or_default() += 1,
            }
            let Some(declared) = value.ty() else { continue };
            if shapes.dtype(id).is_some_and(|dtype| dtype != declared.dtype) {
                wrong.push(format!("{name}: {} has type {:?}, declared {}", value.name(), shapes.dtype(id), declared));
            }
            let (Some(dims), Some(declared_dims)) = (shapes.dims(id), &declared.dims) else { continue };
            let clash = dims.len() != declared_dims.len()
                || dims.iter().zip(declared_dims).any(|(dim, declared)| match (dim.as_known(), declared) {
                    (Some(n), DimSpec::Known(declared)) => n != *declared,
                    _ => false,
                });
            if clash {
                wrong.push(format!("{name}: {} is {}, declared {declared}", value.name(), text(Some(dims))));
            }
        }
        let outputs: Vec<String> = graph.outputs().iter().map(|&id| text(shapes.dims(id))).collect();
        println!("{name}: {ranked}/{total} ranked, {closed}/{total} in input symbols; outputs {}", outputs.join(" "));
        let truth = truths.as_ref().and_then(|folder| Truth::read(&Path::new(folder).join(format!("{name}.tsv"))));
        let ids: BTreeMap<&str, ValueId> = graph.values().map(|(id, value)| (value.name(), id)).collect();
        for (run, values) in truth.iter().flat_map(|truth| &truth.0) {
            let mut bound: BTreeMap<String, i64> = BTreeMap::new();
            for Seen { name: input, dims, .. } in values.iter().filter(|seen| seen.is_input) {
                for (dim, n) in shapes.dims(ids[input.as_str()]).unwrap().iter().zip(dims) {
                    if let Some(symbol) = dim.as_symbol() {
                        bound.insert(symbol.into(), *n);
                    }
                }
            }
            let eval = |expr: &Expr| expr.eval(&|symbol| bound.get(symbol).copied());
            for Seen { name: value, dims, ints, uniform, .. } in values {
                let Some(&id) = ids.get(value.as_str()) else { continue };
                if let Some(inferred) = shapes.dims(id) {
                    let agrees = inferred.len() == dims.len()
                        && inferred.iter().zip(dims).all(|(dim, n)| eval(dim).is_none_or(|dim| dim == *n));
                    if !agrees {
                        wrong.push(format!("{name}: run {run}: {value} is {}, seen {dims:?}", text(Some(inferred))));
                    }
                }
                if let (Some(inferred), Some(seen)) = (shapes.ints(id), ints) {
                    let agrees = inferred.len() == seen.len()
                        && inferred.iter().zip(seen).all(|(item, n)| eval(item).is_none_or(|item| item == *n));
                    if !agrees {
                        wrong.push(format!("{name}: run {run}: {value} holds {}, seen {seen:?}", text(Some(inferred))));
                    }
                }
                if let Some(inferred) = shapes.uniform(id) {
                    if *uniform != Some(inferred) && !dims.contains(&0) {
                        wrong.push(format!("{name}: run {run}: {value} is all {inferred}, seen {uniform:?}"));
                    }
                } else if uniform.is_some() && dims.iter().product::<i64>() > 1 && verbose {
                    println!("  missed uniform {value} {dims:?} {uniform:?}");
                }
                if shapes.ints(id).is_none() && ints.is_some() && verbose {
                    println!("  missed ints {value} {ints:?}");
                }
            }
        }
    }
    println!("unknown shapes by reason: {missing:#?}");
    assert!(wrong.is_empty(), "{} contradictions:\n{}", wrong.len(), wrong.join("\n"));
}

/// A graph under construction with a model around it.
struct Case {
    builder: GraphBuilder,
    opset: i64,
}

impl Case {
    fn new() -> Self {
        Self { builder: GraphBuilder::new(), opset: 18 }
    }

    fn of_opset(opset: i64) -> Self {
        Self { opset, ..Self::new() }
    }

    fn input(&mut self, dims: &[&str]) -> ValueId {
        self.builder.input("x", Some(&ty(DataType::F32, dims)))
    }

    fn ints(&mut self, items: &[i64]) -> ValueId {
        self.builder.initializer("c", Tensor::shape(items))
    }

    fn int(&mut self, item: i64) -> ValueId {
        self.builder.initializer("c", Tensor::i64(item))
    }

    fn zeros(&mut self, dims: &[usize]) -> ValueId {
        let items: Vec<f32> = (0..dims.iter().product()).map(|n| n as f32).collect();
        self.builder.initializer("w", Tensor::f32s(dims, &items))
    }

    fn op(&mut self, op: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        self.builder.op(op, "v", inputs, attributes)
    }

    fn contrib(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let inputs = inputs.iter().copied().map(Some).collect();
        self.builder.call(OpType::of("com.microsoft", op), "v", inputs, attributes, results)
    }

    fn multi(
        &mut self,
        op: &str,
        inputs: &[ValueId],
        attributes: &[(&str, Attribute)],
        results: usize,
    ) -> Vec<ValueId> {
        let inputs = inputs.iter().copied().map(Some).collect();
        self.builder.call(OpType::standard(op), "v", inputs, attributes, results)
    }

    fn infer(self) -> Shapes {
        Shapes::infer(&self.builder.into_model(8, &[("", self.opset), ("com.microsoft", 1)], Vec::new()))
    }
}

fn int(n: i64) -> Attribute {
    Attribute::Int(n)
}

fn ints(items: &[i64]) -> Attribute {
    Attribute::Ints(items.to_vec())
}

fn string(text: &str) -> Attribute {
    Attribute::String(text.to_owned().into())
}

/// The shape that `op` gives for one operand of extents `dims` and integer operands.
fn shape_of(op: &str, dims: &[&str], operands: &[&[i64]], attributes: &[(&str, Attribute)]) -> String {
    let mut case = Case::new();
    let mut inputs = vec![case.input(dims)];
    inputs.extend(operands.iter().map(|items| case.ints(items)));
    let result = case.op(op, &inputs, attributes);
    let shapes = case.infer();
    match shapes.dims(result) {
        Some(dims) => text(Some(dims)),
        None => shapes.reason(result).unwrap().to_owned(),
    }
}

#[test]
fn layout_operators() {
    let reshape = |dims: &[&str], target: &[i64]| shape_of("Reshape", dims, &[target], &[]);
    assert_eq!(reshape(&["b", "n", "48"], &[0, -1, 3, 16]), "[b,n,3,16]");
    assert_eq!(reshape(&["b", "n", "48"], &[-1, 48]), "[b*n,48]");
    assert_eq!(reshape(&["b", "48", "8", "8"], &[-1, 48, 64]), "[b,48,64]");
    assert_eq!(reshape(&["b", "n"], &[7, -1, -1]), "[7,v.1,v.2]");
    assert_eq!(reshape(&["b"], &[1, 0]), "Reshape: the target copies an extent that does not exist");
    assert_eq!(reshape(&["b"], &[-2]), "Reshape: the target has a negative extent");
    assert_eq!(shape_of("Transpose", &["a", "b", "c"], &[], &[("perm", ints(&[2, 0, 1]))]), "[c,a,b]");
    assert_eq!(shape_of("Transpose", &["a", "b", "c"], &[], &[]), "[c,b,a]");
    assert!(shape_of("Transpose", &["a", "b"], &[], &[("perm", ints(&[0, 0]))]).contains("listed twice"));
    assert_eq!(shape_of("Flatten", &["a", "b", "c"], &[], &[("axis", int(-1))]), "[a*b,c]");
    assert_eq!(shape_of("Squeeze", &["1", "b", "1"], &[&[0, -1]], &[]), "[b]");
    assert_eq!(shape_of("Squeeze", &["1", "2", "1"], &[], &[]), "[2]");
    assert!(shape_of("Squeeze", &["1", "b"], &[], &[]).contains("run time"));
    assert_eq!(shape_of("Unsqueeze", &["a", "b"], &[&[0, -1]], &[]), "[1,a,b,1]");
    assert_eq!(shape_of("Expand", &["1", "1", "48"], &[&[5, 1, 1]], &[]), "[5,1,48]");
    assert_eq!(shape_of("Tile", &["a", "2"], &[&[3, 2]], &[]), "[a*3,4]");
    assert_eq!(shape_of("Pad", &["a", "8"], &[&[0, 1, 0, 2]], &[]), "[a,11]");
    assert_eq!(shape_of("DepthToSpace", &["a", "8", "h", "w"], &[], &[("blocksize", int(2))]), "[a,2,h*2,w*2]");
    assert_eq!(shape_of("Gather", &["a", "n", "c"], &[&[0, 1]], &[("axis", int(1))]), "[a,2,c]");
}

#[test]
fn slices() {
    let slice = |extent: &str, start: i64, end: i64, step: i64| {
        shape_of("Slice", &["b", extent], &[&[start], &[end], &[1], &[step]], &[])
    };
    assert_eq!(slice("65", 1, i64::MAX, 1), "[b,64]");
    assert_eq!(slice("65", -1, i64::MIN, -1), "[b,65]");
    assert_eq!(slice("65", 0, 65, 2), "[b,33]");
    assert_eq!(slice("n", 1, i64::MAX, 1), "[b,n-1]");
    assert_eq!(slice("n", 0, -1, 1), "[b,n-1]");
    assert_eq!(slice("n", 0, 1, 1), "[b,1]");
    assert_eq!(slice("n", -1, i64::MAX, 1), "[b,1]");
    assert_eq!(slice("n", 0, 5, 1), "[b,min(5,n)]");
    assert_eq!(slice("n", -1, i64::MIN, -1), "[b,n]");
    assert_eq!(slice("n", 3, i64::MIN, -1), "[b,v.1]");
    assert_eq!(slice("n", 0, 1, 0), "[b,v.1]");
    let old = [("starts", ints(&[1])), ("ends", ints(&[3])), ("axes", ints(&[0]))];
    assert_eq!(shape_of("Slice", &["9", "c"], &[], &old), "[2,c]");
}

#[test]
fn splits() {
    let parts = |opset: i64, extent: &str, results: usize, attributes: &[(&str, Attribute)], sizes: Option<&[i64]>| {
        let mut case = Case::of_opset(opset);
        let mut inputs = vec![case.input(&["b", extent])];
        inputs.extend(sizes.map(|sizes| case.ints(sizes)));
        let axis = ("axis", int(1));
        let attributes: Vec<_> = attributes.iter().cloned().chain([axis]).collect();
        let results = case.multi("Split", &inputs, &attributes, results);
        let shapes = case.infer();
        results.iter().map(|&result| text(shapes.dims(result))).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(parts(11, "9", 3, &[], None), "[b,3] [b,3] [b,3]");
    assert_eq!(parts(11, "9", 2, &[("split", ints(&[4, 5]))], None), "[b,4] [b,5]");
    assert_eq!(parts(13, "9", 2, &[], Some(&[2, 7])), "[b,2] [b,7]");
    assert_eq!(parts(18, "7", 3, &[("num_outputs", int(3))], None), "[b,3] [b,3] [b,1]");
    assert_eq!(parts(18, "9", 2, &[("num_outputs", int(i64::MAX))], None), "unknown unknown");
    // The parts tell the whole.
    assert_eq!(parts(13, "n", 2, &[], Some(&[1, 64])), "[b,1] [b,64]");
}

#[test]
fn products() {
    let matmul = |a: &[&str], b: &[&str]| {
        let mut case = Case::new();
        let inputs = [case.input(a), case.input(b)];
        let result = case.op("MatMul", &inputs, &[]);
        text(case.infer().dims(result))
    };
    assert_eq!(matmul(&["b", "h", "n", "d"], &["b", "h", "d", "m"]), "[b,h,n,m]");
    assert_eq!(matmul(&["b", "n", "48"], &["48", "96"]), "[b,n,96]");
    assert_eq!(matmul(&["d"], &["b", "d", "m"]), "[b,m]");
    assert_eq!(matmul(&["n", "d"], &["d"]), "[n]");
    assert_eq!(matmul(&["d"], &["d"]), "[]");
    let einsum = |equation: &str, a: &[&str], b: &[&str]| {
        let mut case = Case::new();
        let inputs = [case.input(a), case.input(b)];
        let result = case.op("Einsum", &inputs, &[("equation", string(equation))]);
        text(case.infer().dims(result))
    };
    assert_eq!(einsum("...qhd,...khd->...hqk", &["b", "n", "3", "16"], &["b", "m", "3", "16"]), "[b,3,n,m]");
    assert_eq!(einsum("abc,cde->abde", &["b", "n", "48"], &["48", "3", "16"]), "[b,n,3,16]");
    assert_eq!(einsum("ij,jk", &["a", "b"], &["b", "c"]), "[a,c]");
    assert_eq!(einsum("i->,->", &["a"], &["b"]), "unknown");
    let mut case = Case::new();
    let (a, b) = (case.input(&["b", "n", "d"]), case.input(&["b", "m", "d"]));
    let fused = case.contrib("FusedMatMul", &[a, b], &[("transB", int(1))], 1)[0];
    let (c, w) = (case.input(&["k", "n"]), case.zeros(&[5, 7]));
    let gemm = case.op("Gemm", &[c, w], &[("transA", int(1)), ("transB", int(1))]);
    let shapes = case.infer();
    assert_eq!(text(shapes.dims(fused)), "[b,n,m]");
    assert_eq!(text(shapes.dims(gemm)), "[n,5]");
    // The weight fixes the inner extent.
    assert_eq!(text(shapes.dims(c)), "[7,n]");
}

#[test]
fn attention_operators() {
    let mut case = Case::of_opset(23);
    let (q, k) = (case.input(&["b", "3", "n", "16"]), case.input(&["b", "3", "m", "16"]));
    let four = case.multi("Attention", &[q, k, k], &[], 4);
    let flat = case.input(&["b", "n", "48"]);
    let heads = [("q_num_heads", int(3)), ("kv_num_heads", int(3))];
    let three = case.multi("Attention", &[flat, flat, flat], &heads, 2);
    let (weight, bias) = (case.zeros(&[48, 144]), case.zeros(&[144]));
    let packed = case.contrib("Attention", &[flat, weight, bias], &[("num_heads", int(3))], 1);
    let mha = case.contrib("MultiHeadAttention", &[flat, flat, flat], &[("num_heads", int(3))], 1);
    let gain = case.zeros(&[48]);
    let skip = case.contrib("SkipLayerNormalization", &[flat, flat, gain], &[], 4);
    let shapes = case.infer();
    let show = |values: &[ValueId]| values.iter().map(|&id| text(shapes.dims(id))).collect::<Vec<_>>().join(" ");
    assert_eq!(show(&four), "[b,3,n,16] [b,3,m,16] [b,3,m,16] [b,3,n,m]");
    assert_eq!(show(&three), "[b,n,48] [b,3,n,16]");
    assert_eq!(show(&[packed[0], mha[0]]), "[b,n,48] [b,n,48]");
    assert_eq!(show(&skip), "[b,n,48] [b,n,1] [b,n,1] [b,n,48]");
}

#[test]
fn quantised_operators() {
    let mut case = Case::new();
    let mut u8s = |dims: &[&str]| case.builder.input("x", Some(&ty(DataType::U8, dims)));
    let (x, class, zero) = (u8s(&["b", "n", "48"]), u8s(&["b", "1", "48"]), u8s(&[]));
    let scale = case.input(&[]);
    let all = |values: &[ValueId]| values.iter().flat_map(|&value| [value, scale, zero]).collect::<Vec<_>>();
    let axis = [("axis", int(1))];
    let joined = case.contrib("QLinearConcat", &[vec![scale, zero], all(&[class, x])].concat(), &axis, 1)[0];
    let sum = case.contrib("QLinearAdd", &[all(&[x, class]), vec![scale, zero]].concat(), &[], 1)[0];
    let mean =
        case.contrib("QLinearReduceMean", &[all(&[x]), vec![scale, zero]].concat(), &[("axes", ints(&[1]))], 1)[0];
    let last = [("channels_last", int(1))];
    let pooled = case.contrib("QLinearGlobalAveragePool", &[all(&[x]), vec![scale, zero]].concat(), &last, 1)[0];
    let floats = case.input(&["b", "n", "48"]);
    let halved = case.contrib("BiasSplitGelu", &[floats, scale], &[], 1)[0];
    let shapes = case.infer();
    let show = |id: ValueId| format!("{}{:?}", text(shapes.dims(id)), shapes.dtype(id).unwrap());
    assert_eq!(show(joined), "[b,n+1,48]U8");
    assert_eq!([sum, mean].map(show), ["[b,n,48]U8", "[b,1,48]U8"]);
    assert_eq!([pooled, halved].map(show), ["[b,1,48]U8", "[b,n,24]F32"]);
}

#[test]
fn extents_are_known_through_quantisation() {
    let mut case = Case::new();
    let scalar = |case: &mut Case, tensor| case.builder.initializer("c", tensor);
    let scale = scalar(&mut case, Tensor::f32(0.25));
    let [zero, four, forty] = [0, 4, 40].map(|n| scalar(&mut case, Tensor::integers(DataType::U8, &[], &[n])));
    let number = |case: &mut Case, integer| case.op("DequantizeLinear", &[integer, scale, zero], &[]);
    let (start, step, end) = (number(&mut case, zero), number(&mut case, four), number(&mut case, forty));
    let range = case.op("Range", &[start, end, step], &[]);
    let high = scalar(&mut case, Tensor::f32(100.0));
    let clipped = case.op("QuantizeLinear", &[high, scale, zero], &[]);
    let shapes = case.infer();
    assert_eq!(text(shapes.dims(range)), "[10]");
    assert_eq!(shapes.uniform(clipped), Some(255.0));
}

#[test]
fn channels_in_blocks() {
    let mut case = Case::new();
    let (image, kernel) = (case.input(&["b", "3", "32", "32"]), case.zeros(&[48, 3, 4, 4]));
    let mut nchwc = |op: &str, inputs: &[ValueId], attributes: &[(&str, Attribute)]| {
        let inputs = inputs.iter().copied().map(Some).collect();
        case.builder.call(OpType::of("com.microsoft.nchwc", op), "v", inputs, attributes, 1)[0]
    };
    let conv = nchwc("Conv", &[image, kernel], &[("strides", ints(&[4, 4]))]);
    let back = nchwc("ReorderOutput", &[conv], &[("channels", int(45))]);
    let last = nchwc("ReorderOutput", &[conv], &[("channels", int(45)), ("channels_last", int(1))]);
    let again = nchwc("ReorderInput", &[last], &[("channels_last", int(1))]);
    let shapes = case.infer();
    let show = |id: ValueId| text(shapes.dims(id));
    assert_eq!([conv, back].map(show), ["[b,48,8,8]", "[b,45,8,8]"]);
    assert_eq!([last, again].map(show), ["[b,8,8,45]", "[b,45,8,8]"]);
}

#[test]
fn reductions() {
    let x = &["b", "n", "48"];
    assert_eq!(shape_of("ReduceMean", x, &[], &[("axes", ints(&[-1]))]), "[b,n,1]");
    assert_eq!(shape_of("ReduceMean", x, &[&[1]], &[("keepdims", int(0))]), "[b,48]");
    assert_eq!(shape_of("ReduceSum", x, &[], &[]), "[1,1,1]");
    assert_eq!(shape_of("ReduceSum", x, &[], &[("noop_with_empty_axes", int(1))]), "[b,n,48]");
    assert_eq!(shape_of("ArgMax", x, &[], &[("axis", int(1)), ("keepdims", int(0))]), "[b,48]");
    assert_eq!(shape_of("TopK", x, &[&[5]], &[("axis", int(1))]), "[b,5,48]");
    assert!(shape_of("ReduceMean", x, &[], &[("axes", ints(&[i64::MIN]))]).contains("does not exist"));
    assert_eq!(shape_of("GlobalAveragePool", &["b", "c", "h", "w"], &[], &[]), "[b,c,1,1]");
}

/// A patch embedding with every extent of the images open, as some exporters declare them.
#[test]
fn weights_bind_open_extents() {
    let mut case = Case::new();
    let images = case.input(&["batch", "channels", "height", "width"]);
    let weight = case.zeros(&[48, 3, 4, 4]);
    let patches = case.op("Conv", &[images, weight], &[("strides", ints(&[4, 4]))]);
    let shape = case.op("Shape", &[patches], &[("end", int(2))]);
    let rest = case.ints(&[-1]);
    let target = case.op("Concat", &[shape, rest], &[("axis", int(0))]);
    let flat = case.op("Reshape", &[patches, target], &[]);
    let tokens = case.op("Transpose", &[flat], &[("perm", ints(&[0, 2, 1]))]);
    let class = case.zeros(&[1, 1, 48]);
    let batch = case.op("Shape", &[images], &[("end", int(1))]);
    let ones = case.ints(&[1, 48]);
    let class_shape = case.op("Concat", &[batch, ones], &[("axis", int(0))]);
    let class = case.op("Expand", &[class, class_shape], &[]);
    let all = case.op("Concat", &[class, tokens], &[("axis", int(1))]);
    let positions = case.zeros(&[1, 65, 48]);
    let sum = case.op("Add", &[all, positions], &[]);
    let shapes = case.infer();
    assert_eq!(text(shapes.dims(images)), "[batch,3,height,width]");
    assert_eq!(text(shapes.dims(sum)), "[batch,65,48]");
    assert_eq!(text(shapes.dims(all)), "[batch,65,48]");
    assert_eq!(text(shapes.dims(tokens)), "[batch,64,48]");
    assert_eq!(text(shapes.dims(class)), "[batch,1,48]");
    assert!(shapes.is_data(sum) && !shapes.is_data(class) && !shapes.is_data(target) && !shapes.is_data(positions));
    assert_eq!(shapes.dtype(target), Some(DataType::I64));
}

#[test]
fn convolutions_and_pools() {
    let conv = |dims: &[&str], attributes: &[(&str, Attribute)]| {
        let mut case = Case::new();
        let inputs = [case.input(dims), case.zeros(&[8, 3, 3, 3])];
        let result = case.op("Conv", &inputs, attributes);
        text(case.infer().dims(result))
    };
    assert_eq!(conv(&["b", "3", "32", "h"], &[]), "[b,8,30,h-2]");
    assert_eq!(
        conv(&["b", "c", "32", "32"], &[("auto_pad", string("SAME_UPPER")), ("strides", ints(&[2, 2]))]),
        "[b,8,16,16]"
    );
    assert_eq!(
        conv(&["b", "3", "32", "32"], &[("dilations", ints(&[2, 2])), ("pads", ints(&[1, 1, 1, 1]))]),
        "[b,8,30,30]"
    );
    assert_eq!(conv(&["b", "3", "2", "2"], &[]), "[b,8,0,0]");
    assert_eq!(conv(&["b", "3", "1", "1"], &[]), "unknown");
    assert_eq!(conv(&["b", "3", "h", "w"], &[("strides", ints(&[0, 0]))]), "unknown");
    assert_eq!(conv(&["b", "3", "9", "9"], &[("dilations", ints(&[i64::MAX, 1]))]), "[b,8,v.2,7]");
    let pool = [("kernel_shape", ints(&[3, 3])), ("strides", ints(&[2, 2])), ("ceil_mode", int(1))];
    assert_eq!(shape_of("MaxPool", &["b", "c", "8", "8"], &[], &pool), "[b,c,4,4]");
}

#[test]
fn resizing() {
    let resize = |dims: &[&str], scales: &[f32]| {
        let mut case = Case::new();
        let x = case.input(dims);
        let scales = case.builder.initializer("scales", Tensor::f32s(&[scales.len()], scales));
        let inputs = vec![Some(x), None, Some(scales)];
        let result = case.builder.call(OpType::standard("Resize"), "v", inputs, &[], 1)[0];
        text(case.infer().dims(result))
    };
    assert_eq!(resize(&["1", "c", "8", "h"], &[1.0, 1.0, 1.75, 0.5]), "[1,c,14,floor(h/2)]");
    assert_eq!(resize(&["1", "c", "8", "8"], &[1.0, 1.0, f32::NAN, f32::INFINITY]), "[1,c,v.2,v.3]");
}

/// Extents computed in floating point, chosen by comparisons, and put together again.
#[test]
fn arithmetic_on_shapes() {
    let mut case = Case::new();
    let x = case.input(&["b", "3", "h", "w"]);
    let shape = case.op("Shape", &[x], &[]);
    let two = case.int(2);
    let height = case.op("Gather", &[shape, two], &[]);
    let float = case.op("Cast", &[height], &[("to", int(1))]);
    let half = case.builder.initializer("half", Tensor::f32(0.5));
    let scaled = case.op("Mul", &[float, half], &[]);
    let floor = case.op("Floor", &[scaled], &[]);
    let back = case.op("Cast", &[floor], &[("to", int(7))]);
    let four = case.int(4);
    let quotient = case.op("Div", &[height, four], &[]);
    let rest = case.op("Mod", &[height, four], &[]);
    let minus = case.ints(&[-1, -1, -1, -1]);
    let open = case.op("Equal", &[shape, minus], &[]);
    let chosen = case.op("Where", &[open, minus, shape], &[]);
    let product = case.op("ReduceProd", &[chosen], &[("keepdims", int(0))]);
    let size = case.op("Size", &[x], &[]);
    let largest = case.op("Max", &[height, two], &[]);
    let (zero, one) = (case.int(0), case.int(1));
    let steps = case.op("Range", &[zero, height, one], &[]);
    let few = case.op("Range", &[zero, four, one], &[]);
    let fill = case.op("ConstantOfShape", &[shape], &[("value", Attribute::Tensor(Tensor::shape(&[1])))]);
    let data = case.op("Cast", &[x], &[("to", int(7))]);
    let shapes = case.infer();
    assert_eq!(text(shapes.ints(shape)), "[b,3,h,w]");
    assert_eq!(text(shapes.ints(back)), "[floor(h/2)]");
    assert_eq!(text(shapes.ints(quotient)), "[floor(h/4)]");
    assert_eq!(shapes.ints(rest).unwrap()[0].eval(&|_| Some(11)), Some(3));
    assert_eq!(text(shapes.ints(chosen)), "[b,3,h,w]");
    assert_eq!(text(shapes.ints(product)), "[b*h*w*3]");
    assert_eq!(shapes.ints(product), shapes.ints(size));
    assert_eq!(text(shapes.ints(largest)), "[max(2,h)]");
    assert_eq!(text(shapes.dims(steps)), "[h]");
    assert_eq!(text(shapes.ints(few)), "[0,1,2,3]");
    assert_eq!((text(shapes.dims(fill)).as_str(), shapes.uniform(fill)), ("[b,3,h,w]", Some(1.0)));
    assert!(!shapes.is_data(fill) && shapes.is_data(data));
    assert_eq!(shapes.ints(floor), None, "floats are no integers");
}

#[test]
fn uniform_masks() {
    let mut case = Case::new();
    let x = case.input(&["b", "n", "48"]);
    let shape = case.op("Shape", &[x], &[("end", int(2))]);
    let value = Attribute::Tensor(Tensor::f32s(&[1], &[1.0]));
    let ones = case.op("ConstantOfShape", &[shape], &[("value", value)]);
    let one = case.builder.initializer("one", Tensor::f32(1.0));
    let low = case.builder.initializer("low", Tensor::f32(f32::MIN));
    let inverted = case.op("Sub", &[one, ones], &[]);
    let bias = case.op("Mul", &[inverted, low], &[]);
    let test = case.op("Equal", &[ones, one], &[]);
    let chosen = case.op("Where", &[test, bias, x], &[]);
    let sum = case.op("Add", &[x, bias], &[]);
    let shapes = case.infer();
    assert_eq!(shapes.uniform(ones), Some(1.0));
    assert_eq!(shapes.uniform(bias), Some(0.0));
    assert_eq!(shapes.uniform(test), Some(1.0));
    assert_eq!(shapes.dtype(test), Some(DataType::Bool));
    assert_eq!(shapes.uniform(chosen), Some(0.0));
    assert_eq!(shapes.uniform(sum), None);
}

/// What a file declares fills gaps and loses against the operators.
#[test]
fn declarations() {
    let mut case = Case::new();
    let x = case.input(&["b", "?", "48"]);
    let doubled = case.op("Add", &[x, x], &[]);
    case.builder.output("stale", doubled, Some(&ty(DataType::F32, &["b", "7", "49"])));
    let custom = case.builder.call(OpType::of("vendor", "Thing"), "v", vec![Some(x)], &[], 2);
    case.builder.output("declared", custom[0], Some(&ty(DataType::F16, &["b", "64"])));
    let shapes = case.infer();
    assert_eq!(text(shapes.dims(doubled)), "[b,x.1,48]");
    assert_eq!((text(shapes.dims(custom[0])).as_str(), shapes.dtype(custom[0])), ("[b,64]", Some(DataType::F16)));
    assert_eq!(shapes.dims(custom[1]), None);
    assert!(shapes.reason(custom[1]).unwrap().contains("no shape rule"));
    assert!(shapes.is_data(custom[1]));
}

/// Calls of local functions are looked into, with the caller's attributes.
#[test]
fn functions() {
    let mut body = GraphBuilder::new();
    let x = body.input("x", None);
    let axis = Attribute::Ref("where".into(), crate::attribute_type::INT);
    let y = body.op("Flatten", "y", &[x], &[("axis", axis)]);
    body.output("y", y, None);
    let key = OpType::of("local", "Flat");
    let function = crate::Function::new(key.clone(), vec!["where".into()], body.finish(), 18, "");
    let mut builder = GraphBuilder::new();
    let x = builder.input("x", Some(&ty(DataType::F32, &["a", "b", "c"])));
    let y = builder.call(key, "y", vec![Some(x)], &[("where", int(2))], 1)[0];
    let shapes = Shapes::infer(&builder.into_model(8, &[("", 18), ("local", 1)], vec![function]));
    assert_eq!(text(shapes.dims(y)), "[a*b,c]");
    assert!(shapes.is_data(y));
}

/// Hostile attributes, constants and declarations never make inference panic.
#[test]
fn hostile_models() {
    let extremes = [i64::MIN, i64::MIN + 1, -1, 0, 1, 2, 63, 1 << 31, 1 << 62, i64::MAX];
    let names = [
        "axis",
        "axes",
        "perm",
        "starts",
        "ends",
        "split",
        "num_outputs",
        "blocksize",
        "kernel_shape",
        "strides",
        "pads",
        "dilations",
        "group",
        "start",
        "end",
        "batch_dims",
        "to",
        "k",
        "shape",
        "output_padding",
        "output_shape",
        "num_heads",
        "q_num_heads",
        "kv_num_heads",
        "qkv_hidden_sizes",
        "K",
        "N",
        "keepdims",
    ];
    let ops = [
        "Reshape",
        "Slice",
        "Split",
        "Gather",
        "GatherND",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Tile",
        "Pad",
        "Expand",
        "Range",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "MaxPool",
        "TopK",
        "OneHot",
        "ReduceProd",
        "Shape",
        "Cast",
        "Resize",
        "DepthToSpace",
        "SpaceToDepth",
        "Attention",
        "LayerNormalization",
        "Mul",
        "Add",
        "Sub",
        "Div",
        "Mod",
        "Pow",
        "Max",
        "Neg",
        "Abs",
        "MatMul",
        "Einsum",
        "SplitToSequence",
        "MatMulNBits",
        "MultiHeadAttention",
        "RandomNormal",
        "Where",
        "Sqrt",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for _ in 0..3000 {
        let mut case = Case::of_opset([1, 5, 11, 13, 18, 23][random(6)]);
        let dims = ["b", "?", "1", "3", "64", "0", "9223372036854775807", "4611686018427387904"];
        let mut values: Vec<ValueId> = Vec::new();
        for _ in 0..3 {
            let picked: Vec<&str> = (0..random(5)).map(|_| dims[random(dims.len())]).collect();
            values.push(case.input(&picked));
            let items: Vec<i64> = (0..random(5)).map(|_| extremes[random(extremes.len())]).collect();
            values.push(case.ints(&items));
            values.push(case.int(extremes[random(extremes.len())]));
        }
        for _ in 0..12 {
            let inputs: Vec<Option<ValueId>> =
                (0..random(5)).map(|_| (random(9) > 0).then(|| values[random(values.len())])).collect();
            let mut attributes = vec![("equation", string(["ab,bc->ac", "...a,a...", "a->b", "->,"][random(4)]))];
            for _ in 0..random(4) {
                let items: Vec<i64> = (0..random(4)).map(|_| extremes[random(extremes.len())]).collect();
                let value = if random(2) == 0 { ints(&items) } else { int(extremes[random(extremes.len())]) };
                attributes.push((names[random(names.len())], value));
            }
            let domain = if random(4) == 0 { "com.microsoft" } else { "" };
            let op = OpType::of(domain, ops[random(ops.len())]);
            values.extend(case.builder.call(op, "v", inputs, &attributes, 1 + random(3)));
        }
        let shapes = case.infer();
        for value in values {
            for dim in shapes.dims(value).into_iter().flatten() {
                assert!(dim.as_known().is_none_or(|n| n >= 0), "{dim}");
            }
        }
    }
}

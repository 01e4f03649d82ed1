//! Dead-token elimination: whatever computes the tokens and whatever picks them, outputs stay what they were.
//!
//! The real exports are in `zoo`; here are models that are made up. What is left out computes nothing that is read, so
//! the rest sees the same numbers; products of fewer rows may be added up in another order.

mod common;
#[path = "common/tiny.rs"]
mod tiny;

use common::{Scratch, conclude, ort, relative, tract, try_run, without_dead_tokens};
use ndarray::ArrayD;
use tiny::{TOKENS, WIDTH};
use vitrim::runtime::Feeds;
use vitrim::tensor::{DType, Tensor};
use vitrim_ir::{Attribute, GraphBuilder, Model, OpType, Shapes, ValueId};

/// Products of one row and of many may be added up in another order, over up to a dozen operators.
const TOLERANCE: f64 = 1e-6;

/// A source of numbers: the same in every run.
struct Dice(u64);

impl Dice {
    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn floats(&mut self, dims: &[usize]) -> vitrim_ir::Tensor {
        let entries: Vec<f32> = (0..dims.iter().product()).map(|_| self.below(2001) as f32 / 1000.0 - 1.0).collect();
        vitrim_ir::Tensor::f32s(dims, &entries)
    }
}

/// `count` images of noise for every input.
fn images(model: &Model, count: usize) -> Feeds {
    let shape = [count, 3, 16, 16];
    let mut dice = Dice(count as u64);
    let mut image = |input| {
        let pixels = (0..shape.iter().product()).map(|_| dice.below(2001) as f64 / 1000.0 - 1.0).collect();
        let pixels = ArrayD::from_shape_vec(shape.to_vec(), pixels).expect("so many pixels");
        (model.graph().value(input).name().to_owned(), Tensor::from_f64(DType::F32, &pixels))
    };
    model.graph().feeds().map(&mut image).collect()
}

fn int(name: &'static str, value: i64) -> (&'static str, Attribute) {
    (name, Attribute::Int(value))
}

fn ints(name: &'static str, values: &[i64]) -> (&'static str, Attribute) {
    (name, Attribute::Ints(values.to_vec()))
}

/// Where a tensor has its tokens.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    /// `[B, N, C]`
    Joined,
    /// `[B, C, N]`
    ChannelsFirst,
    /// `[B, H, N, d]`
    Heads,
    /// `[B · N, C]`
    Flat,
}

/// A tail that grows behind the tokens of a tower.
struct Tail {
    graph: GraphBuilder,
    dice: Dice,
    /// What was computed so far, `[B, N, C]`.
    joined: Vec<ValueId>,
    x: ValueId,
    form: Form,
}

const HEADS: usize = 2;

impl Tail {
    fn new(seed: u64) -> Self {
        let mut graph = GraphBuilder::new();
        let image = tiny::image(&mut graph, "image");
        let x = tiny::tower(&mut graph, "vit", image, 1);
        Self { graph, dice: Dice(seed), joined: vec![x], x, form: Form::Joined }
    }

    fn op(&mut self, op: &str, operands: &[ValueId], attributes: &[(&str, Attribute)]) -> ValueId {
        self.graph.op(op, &format!("tail/{op}"), operands, attributes)
    }

    fn floats(&mut self, dims: &[usize]) -> ValueId {
        let tensor = self.dice.floats(dims);
        self.graph.initializer("table", tensor)
    }

    fn list(&mut self, values: &[i64]) -> ValueId {
        self.graph.initializer("list", vitrim_ir::Tensor::shape(values))
    }

    fn reshape(&mut self, target: &[i64]) -> ValueId {
        let target = self.list(target);
        self.op("Reshape", &[self.x, target], &[])
    }

    /// Anything that was computed before.
    fn earlier(&mut self) -> ValueId {
        self.joined[self.dice.below(self.joined.len())]
    }

    /// Goes on with `x`.
    fn set(&mut self, x: ValueId, form: Form) {
        (self.x, self.form) = (x, form);
        if form == Form::Joined {
            self.joined.push(x);
        }
    }

    /// The axis of the tokens, the extents behind the batch, and an axis without tokens.
    fn axes(&self) -> (usize, Vec<usize>, i64) {
        match self.form {
            Form::Joined => (1, vec![TOKENS, WIDTH], 2),
            Form::ChannelsFirst => (2, vec![WIDTH, TOKENS], 1),
            Form::Heads => (2, vec![HEADS, TOKENS, WIDTH / HEADS], 3),
            Form::Flat => (0, vec![WIDTH], 1),
        }
    }

    /// Adds one operator, or a few that belong together.
    fn grow(&mut self) {
        let (axis, extents, other) = self.axes();
        let form = self.form;
        match self.dice.below(17) {
            0 => {
                let op = ["Erf", "Tanh", "Sigmoid", "Relu", "Identity"][self.dice.below(5)];
                let y = self.op(op, &[self.x], &[]);
                self.set(y, form);
            }
            1 => {
                // A table with an entry for each token, or for each channel.
                let dims = if self.dice.below(2) == 0 { extents } else { vec![extents[extents.len() - 1]] };
                let table = self.floats(&dims);
                let op = ["Add", "Mul", "Max", "Sub"][self.dice.below(4)];
                let y = self.op(op, &[self.x, table], &[]);
                self.set(y, form);
            }
            2 => {
                let y = self.op("Softmax", &[self.x], &[int("axis", other)]);
                self.set(y, form);
            }
            3 => {
                let mean = self.op("ReduceMean", &[self.x], &[ints("axes", &[other]), int("keepdims", 1)]);
                let y = self.op("Sub", &[self.x, mean], &[]);
                self.set(y, form);
            }
            4 if other as usize == extents.len() => {
                let width = extents[extents.len() - 1];
                let (gain, shift) = (self.floats(&[width]), self.floats(&[width]));
                let y = self.op("LayerNormalization", &[self.x, gain, shift], &[int("axis", -1)]);
                self.set(y, form);
            }
            5 if other as usize == extents.len() => {
                let width = extents[extents.len() - 1];
                let matrix = self.floats(&[width, width]);
                let y = self.op("MatMul", &[self.x, matrix], &[]);
                self.set(y, form);
            }
            6 if form == Form::Joined => {
                let block = tiny::block(&mut self.graph, "tail/attention", self.x);
                self.set(block, form);
            }
            7 if form == Form::Joined => {
                let earlier = self.earlier();
                let op = ["Add", "Mul"][self.dice.below(2)];
                let y = self.op(op, &[self.x, earlier], &[]);
                self.set(y, form);
            }
            8 if form == Form::Joined => {
                let earlier = self.earlier();
                let both = self.op("Concat", &[self.x, earlier], &[int("axis", 2)]);
                let halves = [Some(both)];
                let parts =
                    self.graph.call(OpType::standard("Split"), "tail/Split", halves.into(), &[int("axis", -1)], 2);
                let y = self.op("Add", &parts, &[]);
                self.set(y, form);
            }
            9 if form == Form::Joined => {
                let (y, form) = match self.dice.below(3) {
                    0 => (self.op("Transpose", &[self.x], &[ints("perm", &[0, 2, 1])]), Form::ChannelsFirst),
                    1 => (self.reshape(&[-1, WIDTH as i64]), Form::Flat),
                    _ => {
                        self.x = self.reshape(&[0, 0, HEADS as i64, -1]);
                        (self.op("Transpose", &[self.x], &[ints("perm", &[0, 2, 1, 3])]), Form::Heads)
                    }
                };
                self.set(y, form);
            }
            10 => self.join(),
            11 if form == Form::ChannelsFirst => {
                let kernel = self.floats(&[WIDTH, WIDTH, 1]);
                let y = self.op("Conv", &[self.x, kernel], &[]);
                self.set(y, form);
            }
            12 if form == Form::Joined => {
                // A token of every image is put in front, and the last one goes.
                let bounds = [0, TOKENS as i64 - 1, 1].map(|bound| self.list(&[bound]));
                let rest = self.op("Slice", &[self.x, bounds[0], bounds[1], bounds[2]], &[]);
                let place = self.list(&[self.dice.0 as i64 & 7]);
                let first = self.op("Gather", &[self.x, place], &[int("axis", 1)]);
                let y = self.op("Concat", &[first, rest], &[int("axis", 1)]);
                self.set(y, form);
            }
            13 => {
                // A factor that is made of the number of tokens, or of images.
                let shape = self.op("Shape", &[self.x], &[]);
                let place = if self.dice.below(3) == 0 { 0 } else { axis as i64 };
                let place = self.list(&[place]);
                let extent = self.op("Gather", &[shape, place], &[int("axis", 0)]);
                let extent = self.op("Cast", &[extent], &[int("to", 1)]);
                let y = self.op("Div", &[self.x, extent], &[]);
                self.set(y, form);
            }
            15 => {
                // What needs all entries.
                let largest = self.op("ReduceMax", &[self.x], &[int("keepdims", 0)]);
                let y = self.op("Sub", &[self.x, largest], &[]);
                self.set(y, form);
            }
            14 if form == Form::Joined => {
                // A shape that is read off another tensor.
                let earlier = self.earlier();
                let target = self.op("Shape", &[earlier], &[]);
                let y = self.op("Reshape", &[self.x, target], &[]);
                self.set(y, form);
            }
            _ => {
                let axes = self.list(&[axis as i64]);
                let apart = self.op("Unsqueeze", &[self.x, axes], &[]);
                let y = self.op("Squeeze", &[apart, axes], &[]);
                self.set(y, form);
            }
        }
    }

    /// Back to `[B, N, C]`.
    fn join(&mut self) {
        let y = match self.form {
            Form::Joined => return,
            Form::ChannelsFirst => self.op("Transpose", &[self.x], &[ints("perm", &[0, 2, 1])]),
            Form::Flat => self.reshape(&[-1, TOKENS as i64, WIDTH as i64]),
            Form::Heads => {
                self.x = self.op("Transpose", &[self.x], &[ints("perm", &[0, 2, 1, 3])]);
                self.reshape(&[0, 0, -1])
            }
        };
        self.set(y, Form::Joined);
    }

    /// Makes an output of some tokens of a tensor.
    fn pick(&mut self, x: ValueId, name: &str) {
        let (start, count) = (self.dice.below(TOKENS), 1 + self.dice.below(TOKENS / 2));
        let end = (start + count).min(TOKENS);
        let y = match self.dice.below(4) {
            0 => {
                let place = self.graph.initializer("place", vitrim_ir::Tensor::i64(start as i64 - TOKENS as i64));
                self.op("Gather", &[x, place], &[int("axis", 1)])
            }
            1 => {
                let places: Vec<i64> = (start as i64..end as i64).rev().collect();
                let places = self.list(&places);
                self.op("Gather", &[x, places], &[int("axis", 1)])
            }
            2 if start > 0 && end < TOKENS => {
                let sizes = self.list(&[start, end - start, TOKENS - end].map(|size| size as i64));
                let split = OpType::standard("Split");
                self.graph.call(split, "tail/Split", vec![Some(x), Some(sizes)], &[int("axis", 1)], 3)[1]
            }
            _ => {
                // Channels too, and positions from the end.
                let last = if end == TOKENS { i64::MAX } else { end as i64 - TOKENS as i64 };
                let (starts, ends) = (self.list(&[1, start as i64]), self.list(&[WIDTH as i64, last]));
                let axes = self.list(&[2, -2]);
                self.op("Slice", &[x, starts, ends, axes], &[])
            }
        };
        self.graph.output(name, y, None);
    }

    fn finish(self) -> Model {
        self.graph.into_model(8, &[("", 17)], Vec::new())
    }
}

/// The entries of all results of the tail, for one image.
fn entries(model: &Model) -> i64 {
    let shapes = Shapes::infer(model);
    let of_tail = |name: &str| name.contains("tail/");
    let results = model.graph().nodes().flat_map(|(_, node)| node.results());
    let results = results.filter(|&value| of_tail(model.graph().value(value).name()));
    results
        .map(|value| shapes.dims(value).expect("a rank").iter().filter_map(|dim| dim.as_known()).product::<i64>())
        .sum()
}

/// What is wrong with the model without dead tokens, in any runtime and at any of two batch sizes.
fn differences(scratch: &Scratch, case: &str, model: &Model, rewritten: &Model) -> Vec<String> {
    let paths = [scratch.save("model", model), scratch.save("rewritten", rewritten)];
    let mut failures = Vec::new();
    for backend in [ort(), tract()] {
        for count in [1, 3] {
            let feeds = images(model, count);
            match paths.each_ref().map(|path| try_run(backend.as_ref(), path, &feeds)) {
                [Ok(expected), Ok(outputs)] => failures.extend(expected.iter().filter_map(|(name, tensor)| {
                    let apart = outputs.get(name).map_or(f64::INFINITY, |other| relative(tensor, other));
                    (apart > TOLERANCE).then(|| format!("{case}: {name} is {apart:e} off in {}", backend.name()))
                })),
                [Err(_), _] if backend.name() == "tract" => {}
                [Err(reason), _] | [_, Err(reason)] => failures.push(format!("{case}: {reason}")),
            }
        }
    }
    failures
}

/// Any operators, any positions.
#[test]
fn outputs_of_any_tail_stay() {
    const CASES: u64 = 300;
    let scratch = Scratch::new("tails");
    let (mut applied, mut smaller, mut shared, mut failures) = (0, 0, 0, Vec::new());
    for seed in 0..CASES {
        let mut tail = Tail::new(seed);
        for _ in 0..2 + tail.dice.below(9) {
            tail.grow();
        }
        tail.join();
        let x = tail.x;
        tail.pick(x, "y");
        for number in 0..tail.dice.below(3) {
            let earlier = tail.earlier();
            let other = if tail.dice.below(3) == 0 { earlier } else { x };
            tail.pick(other, &format!("y{number}"));
        }
        let model = tail.finish();
        // A softmax over channels between two products looks like attention to what is inside of tokens.
        let Ok((rewritten, report)) = without_dead_tokens(&model) else { continue };
        if report.notes.is_empty() {
            continue;
        }
        applied += 1;
        smaller += u64::from(entries(&rewritten) < entries(&model));
        // Where batch and tokens share an axis, that is split for a moment.
        shared += u64::from(rewritten.graph().values().any(|(_, value)| value.name().contains("/part/apart")));
        failures.extend(differences(&scratch, &format!("tail {seed}"), &model, &rewritten));
    }
    // Picks far from each other need all that lies between.
    assert!(3 * applied > CASES, "dead tokens are found in {applied} of {CASES} tails only");
    assert!(shared > 0, "no part was cut out of an axis that tokens share");
    println!("{smaller} of {applied} tails compute less, {shared} on a shared axis");
    conclude("tails", applied as usize, &failures);
}

/// Each of two towers by itself, whatever the other's head reads.
#[test]
fn towers_leave_out_tokens_of_their_own() {
    let scratch = Scratch::new("dead_towers");
    let mut graph = GraphBuilder::new();
    let [left, right] = ["left", "right"].map(|name| {
        let image = tiny::image(&mut graph, name);
        tiny::tower(&mut graph, name, image, 2)
    });
    let place = graph.initializer("place", vitrim_ir::Tensor::i64(3));
    let left = graph.op("Gather", "tail/left", &[left, place], &[int("axis", 1)]);
    let right = tiny::mean(&mut graph, right);
    let y = graph.op("Add", "sum", &[left, right], &[]);
    let model = tiny::model(graph, y);
    let (rewritten, report) = without_dead_tokens(&model).expect("it has towers");
    assert!(report.notes.len() == 1 && report.notes[0].contains(" compute 1 of 16 tokens"), "{:?}", report.notes);
    let few = |tower: &str| {
        let shapes = Shapes::infer(&rewritten);
        let of_tower = |value: &ValueId| rewritten.graph().value(*value).name() == format!("{tower}/1/stream");
        let stream = rewritten.graph().nodes().flat_map(|(_, node)| node.results()).find(of_tower).expect("a stream");
        shapes.dims(stream).expect("a shape")[1].is(1)
    };
    assert!(few("left") && !few("right"));
    conclude("towers", 1, &differences(&scratch, "towers", &model, &rewritten));
}

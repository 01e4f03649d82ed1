//! Protobuf messages, field by field, with the field numbers of ONNX: for files that no library would write.

// Every test file is a crate of its own and uses its part of this.
#![allow(dead_code)]

pub const MODEL_GRAPH: u64 = 7;
pub const MODEL_OPSET: u64 = 8;
pub const GRAPH_NODE: u64 = 1;
pub const GRAPH_INITIALIZER: u64 = 5;
pub const GRAPH_INPUT: u64 = 11;
pub const GRAPH_OUTPUT: u64 = 12;
pub const TENSOR_RAW: u64 = 9;
pub const NODE_ATTRIBUTE: u64 = 5;
pub const ATTRIBUTE_GRAPH: u64 = 6;

pub fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A number.
pub fn int(field: u64, number: i64) -> Vec<u8> {
    [varint(field << 3), varint(number as u64)].concat()
}

/// A string, or a message within a message.
pub fn bytes(field: u64, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [&head(field, content.len()), content].concat()
}

/// What comes before `length` bytes of content.
pub fn head(field: u64, length: usize) -> Vec<u8> {
    [varint(field << 3 | 2), varint(length as u64)].concat()
}

pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|name| bytes(1, name));
    let outputs = outputs.iter().flat_map(|name| bytes(2, name));
    inputs.chain(outputs).chain(bytes(4, op)).collect()
}

/// A float tensor.
pub fn tensor(name: &str, dims: &[i64], rest: &[u8]) -> Vec<u8> {
    let dims = dims.iter().flat_map(|&dim| int(1, dim));
    dims.chain(int(2, 1)).chain(bytes(8, name)).chain(rest.iter().copied()).collect()
}

/// A float tensor of two elements in an external file.
pub fn external(entries: &[(&str, &str)]) -> Vec<u8> {
    tensor("elsewhere", &[2], &external_data(entries))
}

/// What a tensor says of the external file that it is in.
pub fn external_data(entries: &[(&str, &str)]) -> Vec<u8> {
    let entry = |(key, value): &(&str, &str)| bytes(13, [bytes(1, key), bytes(2, value)].concat());
    entries.iter().flat_map(entry).chain(int(14, 1)).collect()
}

/// An input of the graph, of floats.
pub fn input(name: &str, dims: &[i64]) -> Vec<u8> {
    let shape: Vec<u8> = dims.iter().flat_map(|&dim| bytes(1, int(1, dim))).collect();
    let tensor = [int(1, 1), bytes(2, shape)].concat();
    [bytes(1, name), bytes(2, bytes(1, tensor))].concat()
}

/// An entry of the operator sets.
pub fn opset(domain: &str, version: i64) -> Vec<u8> {
    bytes(MODEL_OPSET, [bytes(1, domain), int(2, version)].concat())
}

/// `model` with one more field in its graph. Fields of the same message add up, wherever they are in a file.
pub fn with(model: &[u8], field: u64, content: &[u8]) -> Vec<u8> {
    [model, &bytes(MODEL_GRAPH, bytes(field, content))].concat()
}

/// A number at the front, which is cut off.
fn take(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().expect("the message is whole");
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// The fields of a message: number, and the bytes of the whole field.
pub fn fields(mut message: &[u8]) -> Vec<(u64, &[u8])> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let mut rest = message;
        let tag = take(&mut rest);
        let length = match tag & 7 {
            0 => {
                take(&mut rest);
                0
            }
            1 => 8,
            2 => take(&mut rest) as usize,
            5 => 4,
            kind => panic!("no field of kind {kind} is in a fixture's model"),
        };
        rest = &rest[length..];
        found.push((tag >> 3, &message[..message.len() - rest.len()]));
        message = rest;
    }
    found
}

/// What a field of bytes holds.
pub fn content(mut field: &[u8]) -> &[u8] {
    if take(&mut field) & 7 != 2 {
        return &[];
    }
    take(&mut field);
    field
}

/// `levels` messages inside each other, with `path` as the fields on the way; written from the inside outwards, so
/// that it takes time in proportion.
pub fn nested(levels: usize, path: &[u64]) -> Vec<u8> {
    let mut reversed = Vec::new();
    for level in (0..levels).rev() {
        let head = head(path[level % path.len()], reversed.len());
        reversed.extend(head.into_iter().rev());
    }
    reversed.reverse();
    reversed
}

"""ONNX files without any package: as much of the wire format as the GPU check writes and reads."""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

IR_VERSION, OPSET = 8, 17
DOMAIN = "ai.vitrim"
# TensorProto.DataType
FLOAT, INT64, FLOAT16, BFLOAT16 = 1, 7, 10, 16
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): FLOAT16, np.dtype(np.int64): INT64}

Extent = Union[int, str]


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))


def field(key: int, value: Union[int, float, str, bytes]) -> bytes:
    """A field of a message; nested messages are bytes."""
    if isinstance(value, float):
        return varint(key << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(key << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(key << 3 | 2) + varint(len(data)) + data


def fields(data: bytes) -> Iterator[Tuple[int, bytes]]:
    """The fields of a message that are strings, bytes or messages, with their keys."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 2:
            size = number()
            yield key >> 3, data[at : at + size]
            at += size
        elif key & 7 == 0:
            number()
        else:
            at += {1: 8, 5: 4}[key & 7]


def functions(path: Path) -> Dict[str, bytes]:
    """The model-local functions of a file, by name, as they are written there."""
    messages = [value for key, value in fields(path.read_bytes()) if key == 25]
    return {next(value for key, value in fields(message) if key == 1).decode(): message for message in messages}


def attribute(name: str, value: Any) -> bytes:
    """An attribute: a float, an integer, or a list of integers."""
    if isinstance(value, float):
        return field(1, name) + field(2, value) + field(20, 1)
    if isinstance(value, int):
        return field(1, name) + field(3, value) + field(20, 2)
    return field(1, name) + b"".join(field(8, int(number)) for number in value) + field(20, 7)


def declared(name: str, dtype: int, extents: Sequence[Extent]) -> bytes:
    """A graph's input or output; extents that are names are open."""
    dims = [field(1, field(2, extent) if isinstance(extent, str) else field(1, extent)) for extent in extents]
    return field(1, name) + field(2, field(1, field(1, dtype) + field(2, b"".join(dims))))


class Graph:
    """A model under construction. Values are known by their names."""

    def __init__(self) -> None:
        # Weights stay arrays until they are written: messages of a gigabyte are not to be copied into one another.
        self.pieces: List[Union[bytes, np.ndarray]] = [field(2, "g")]
        self.count = 0

    def fresh(self, hint: str) -> str:
        self.count += 1
        return f"{hint}_{self.count}"

    def input(self, name: str, dtype: int, extents: Sequence[Extent]) -> str:
        self.pieces.append(field(11, declared(name, dtype, extents)))
        return name

    def output(self, name: str, dtype: int, extents: Sequence[Extent]) -> None:
        self.pieces.append(field(12, declared(name, dtype, extents)))

    def constant(self, value: np.ndarray, hint: str = "constant") -> str:
        name, value = self.fresh(hint), np.asarray(value, order="C")
        head = b"".join(field(1, extent) for extent in np.shape(value)) + field(2, TYPES[value.dtype]) + field(8, name)
        head += varint(9 << 3 | 2) + varint(value.nbytes)
        self.pieces += [varint(5 << 3 | 2) + varint(len(head) + value.nbytes) + head, value.reshape(-1).view(np.uint8)]
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "ints")

    def op(self, op_type: str, *inputs: str, named: Optional[str] = None, **attributes: Any) -> str:
        """A node of a standard operator with one output, whose name it returns."""
        return self.nodes(op_type, "", inputs, [named or self.fresh(op_type.lower())], attributes)[0]

    def ours(self, op_type: str, *inputs: str, named: Sequence[str], **attributes: Any) -> List[str]:
        """A call of an operator of vitrim."""
        return self.nodes(op_type, DOMAIN, inputs, named, attributes)

    def nodes(self, op_type: str, domain: str, inputs: Sequence[str], outputs: Sequence[str],
              attributes: Dict[str, Any]) -> List[str]:
        parts = [field(1, name) for name in inputs] + [field(2, name) for name in outputs]
        parts += [field(3, outputs[0]), field(4, op_type), field(7, domain)]
        parts += [field(5, attribute(name, value)) for name, value in attributes.items()]
        self.pieces.append(field(1, b"".join(parts)))
        return list(outputs)

    def save(self, path: Path, local: Sequence[bytes] = ()) -> Path:
        """Writes the model, with the functions that it calls."""
        opsets = [field(8, field(1, "") + field(2, OPSET))]
        opsets += [field(8, field(1, DOMAIN) + field(2, 1))] if local else []
        with open(path, "wb") as file:
            file.write(field(1, IR_VERSION) + b"".join(opsets) + b"".join(field(25, message) for message in local))
            file.write(varint(7 << 3 | 2) + varint(sum(map(len, self.pieces))))
            for piece in self.pieces:
                file.write(piece)
        return path

"""Vision Transformers of random weights, as timm models look when they are exported."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import numpy as np

from .wire import FLOAT, FLOAT16, Graph


@dataclass(frozen=True)
class Vit:
    """An architecture, and how many tokens each block of it is to merge."""

    name: str
    image: int
    width: int
    depth: int
    heads: int
    r: int
    patch: int = 16
    classes: int = 1000
    # For files whose functions are wanted: positions added in every block and tokens given out; pictures of any size.
    tables: bool = False
    any_size: bool = False

    @property
    def tokens(self) -> int:
        return 1 + (self.image // self.patch) ** 2

    def write(self, path: Path, half: bool, floor: Optional[Sequence[int]] = None) -> Path:
        """Writes the model. With `floor`, the first floor[i] tokens alone leave the attention of block i: the time that
        remains where merging costs nothing."""
        return Writer(self, half).write(path, floor)


class Writer:
    def __init__(self, vit: Vit, half: bool) -> None:
        self.vit, self.graph = vit, Graph()
        self.dtype, self.type = (np.float16, FLOAT16) if half else (np.float32, FLOAT)
        # The same for a model and its floor.
        self.random = np.random.default_rng(0)

    def weights(self, *shape: int) -> str:
        values = self.random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(0.02)
        return self.graph.constant(values.astype(self.dtype, copy=False), "weight")

    def scalar(self, value: float) -> str:
        return self.graph.constant(np.array(value, self.dtype), "scalar")

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        product = self.graph.op("MatMul", x, self.weights(inputs, outputs))
        return self.graph.op("Add", self.weights(outputs), product)

    def norm(self, x: str) -> str:
        scale = self.graph.constant(np.ones(self.vit.width, self.dtype))
        return self.graph.op("LayerNormalization", x, scale, self.weights(self.vit.width), axis=-1, epsilon=1e-6)

    def tokens(self) -> str:
        vit, graph = self.vit, self.graph
        extents = ["height", "width"] if vit.any_size else [vit.image, vit.image]
        picture = graph.input("pixel_values", self.type, ["batch", 3, *extents])
        patch = [vit.patch, vit.patch]
        patches = graph.op("Conv", picture, self.weights(vit.width, 3, *patch), self.weights(vit.width),
                           kernel_shape=patch, strides=patch, pads=[0] * 4, dilations=[1, 1], group=1)
        patches = graph.op("Transpose", graph.op("Reshape", patches, graph.ints(0, vit.width, -1)), perm=[0, 2, 1])
        batch = graph.op("Slice", graph.op("Shape", patches), graph.ints(0), graph.ints(1), graph.ints(0))
        target = graph.op("Concat", batch, graph.ints(1, vit.width), axis=0)
        x = graph.op("Concat", graph.op("Expand", self.weights(1, 1, vit.width), target), patches, axis=1)
        return x if vit.any_size else graph.op("Add", x, self.weights(1, vit.tokens, vit.width))

    def attention(self, x: str) -> str:
        vit, graph = self.vit, self.graph
        head = vit.width // vit.heads
        qkv = graph.op("Reshape", self.linear(x, vit.width, 3 * vit.width), graph.ints(0, 0, 3, vit.heads, head))
        qkv = graph.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = (graph.op("Gather", qkv, graph.constant(np.array(at, np.int64)), axis=0) for at in range(3))
        q = graph.op("Mul", q, self.scalar(head**-0.5))
        scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
        mixed = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints(0, 0, vit.width))
        return self.linear(mixed, vit.width, vit.width)

    def mlp(self, x: str) -> str:
        vit, graph = self.vit, self.graph
        hidden = self.linear(x, vit.width, 4 * vit.width)
        erf = graph.op("Erf", graph.op("Div", hidden, self.scalar(2**0.5)))
        gelu = graph.op("Mul", hidden, graph.op("Add", erf, self.scalar(1.0)))
        return self.linear(graph.op("Mul", gelu, self.scalar(0.5)), 4 * vit.width, vit.width)

    def write(self, path: Path, floor: Optional[Sequence[int]]) -> Path:
        vit, graph = self.vit, self.graph
        x = self.tokens()
        for block in range(vit.depth):
            if vit.tables:
                x = graph.op("Add", x, self.weights(1, vit.tokens, vit.width))
            x = graph.op("Add", x, self.attention(self.norm(x)))
            if floor is not None:
                x = graph.op("Slice", x, graph.ints(0), graph.ints(floor[block]), graph.ints(1))
            x = graph.op("Add", x, self.mlp(self.norm(x)))
        x = self.norm(x)
        if vit.tables:
            graph.output(x, self.type, ["batch", vit.tokens, vit.width])
        first = graph.op("Gather", x, graph.constant(np.array(0, np.int64)), axis=1)
        logits = graph.op("MatMul", first, self.weights(vit.width, vit.classes))
        graph.op("Add", self.weights(vit.classes), logits, named="logits")
        graph.output("logits", self.type, ["batch", vit.classes])
        return graph.save(path)

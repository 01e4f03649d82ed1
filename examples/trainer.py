"""Runs the graphs that `vitrim train` writes, in any ONNX Runtime: numpy and onnxruntime are all it needs.

    from trainer import Trainer
    trainer = Trainer("folder")
    trainer.accumulate({"images": x}, labels)                   # -> loss; of a folder made with --accumulate
    trainer.step({"images": x}, labels, learning_rate=1e-3)     # -> loss
    trainer.step({"images": x}, labels, 1e-3, trainer.graph(0)) # the same, in epoch 0 of a training with stages
    trainer.evaluate({"images": x}, labels)                     # -> loss, examples that were right
    trainer.save("trained.safetensors")                         # for `vitrim export-weights`
    trainer.begin(parameters)                                   # anew, from other weights

How much is done to the tokens is one more input of a folder made with --runtime-r or --runtime-keep, of the graphs that
train alone (`dials` of the manifest); left out, it is what it was made with:

    trainer.step({"images": x, "keep": keep_ratio(epoch, 0.7)}, labels, learning_rate=1e-3)

Tri-Level E-ViT trains with part of the examples, from which the easiest leave now and then:

    examples = Examples(len(x), aside=len(x) // 10)
    for epoch in range(150):
        if epoch and epoch % 30 == 0:
            examples.swap(len(x) // 20)
        for batch in np.array_split(examples.epoch(), 100):
            trainer.step({"images": x[batch]}, labels[batch], learning_rate=1e-3)
            examples.record(batch, trainer.correct)
"""
from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import onnxruntime as ort


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = 8 + length
        data = np.memmap(path, np.uint8, "r", start)
    header.pop("__metadata__", None)
    return {name: data[slice(*entry["data_offsets"])].view("<f4").reshape(entry["shape"]) for name, entry in header.items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())


class Trainer:
    def __init__(self, folder: str | Path, threads: int = 0, kernels: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.options = ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        if kernels:
            self.options.register_custom_ops_library(kernels)
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.begin(read_safetensors(self.folder / "parameters.safetensors"))

    def begin(self, parameters: dict[str, np.ndarray]) -> None:
        """The next step is the first, and its parameters are these."""
        self.state = {name: self.value(tensor) for name, tensor in parameters.items()}
        for entry in self.manifest["state"]:
            like = parameters[entry["parameter"]]
            start = like if entry["initial"] == "parameter" else np.zeros_like(like)
            self.state[entry["input"]] = self.value(start)
        self.zeros = {
            entry["input"]: self.value(np.zeros_like(parameters[entry["parameter"]]))
            for entry in self.manifest["accumulated"]
        }
        self.dials = {entry["input"]: entry["dtype"] for entry in self.manifest["dials"]}
        self.sums, self.batches = dict(self.zeros), 1
        self.steps = 0
        self.correct: np.ndarray | None = None
        """Whether each example of the last batch was right, where the loss tells classes."""

    @staticmethod
    def value(array: np.ndarray) -> ort.OrtValue:
        # `ascontiguousarray` would make a list of a scalar.
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))

    def session(self, file: str) -> ort.InferenceSession:
        if file not in self.sessions:
            path = str(self.folder / file)
            self.sessions[file] = ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        return self.sessions[file]

    def run(self, file: str, feeds: dict[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        session = self.session(file)
        names = [output.name for output in session.get_outputs()]
        fed = {name: self.value(np.asarray(array, self.dials.get(name))) for name, array in feeds.items()}
        known = {**self.state, **self.sums, **fed}
        inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
        wanted = {entry.name: known[entry.name] for entry in inputs if entry.name in known}
        outputs = dict(zip(names, session.run_with_ort_values(names, wanted)))
        correct = self.manifest["correct"]
        self.correct = outputs[correct].numpy() if correct else None
        return outputs

    def feeds(self, inputs: dict[str, np.ndarray], labels: np.ndarray | None) -> dict[str, np.ndarray]:
        named = self.manifest["labels"]
        return {**inputs, **({named: labels} if named else {})}

    def accumulate(self, inputs: dict[str, np.ndarray], labels: np.ndarray | None) -> float:
        """Adds the gradients of a batch to those of the next step."""
        outputs = self.run(self.manifest["graphs"]["accumulate"], self.feeds(inputs, labels))
        self.sums = {entry["input"]: outputs[entry["output"]] for entry in self.manifest["accumulated"]}
        self.batches += 1
        return float(outputs[self.manifest["loss"]].numpy())

    def graph(self, epoch: int) -> str | None:
        """The graph of the stage that an epoch is in; None before the first, where all tokens take part."""
        stages = [entry["graph"] for entry in self.manifest["schedules"] if entry["epoch"] <= epoch]
        return stages[-1] if stages else None

    def step(self, inputs: dict[str, np.ndarray], labels: np.ndarray | None, learning_rate: float, graph: str | None = None) -> float:
        """One step of the optimizer; `graph` is another than manifest.graphs.train."""
        self.steps += 1
        scalars = {"learning_rate": np.float32(learning_rate), "step": np.int64(self.steps)}
        scalars["batches"] = np.float32(self.batches)
        file = graph or self.manifest["graphs"]["train"]
        outputs = self.run(file, {**self.feeds(inputs, labels), **{name: np.array(x) for name, x in scalars.items()}})
        for entry in self.manifest["state"]:
            self.state[entry["input"]] = outputs[entry["output"]]
        self.sums, self.batches = dict(self.zeros), 1
        return float(outputs[self.manifest["loss"]].numpy())

    def evaluate(self, inputs: dict[str, np.ndarray], labels: np.ndarray) -> tuple[float, int]:
        outputs = self.run(self.manifest["graphs"]["eval"], self.feeds(inputs, labels))
        return float(outputs[self.manifest["loss"]].numpy()), 0 if self.correct is None else int(self.correct.sum())

    def save(self, path: str | Path) -> None:
        write_safetensors(Path(path), {name: value.numpy() for name, value in self.state.items()})


def keep_ratio(epoch: float, base: float, warmup: float = 10, decay: float = 100) -> float:
    """The share to keep at a time, in epochs: all in the beginning, then less along a cosine until it is `base` (EViT)."""
    done = min(max((epoch - warmup) / decay, 0.0), 1.0)
    return base + (1.0 - base) * (math.cos(done * math.pi) + 1.0) / 2.0


class Examples:
    """The examples of each epoch: Tri-Level E-ViT's example level (arXiv 2211.10801, figure 2).

    Of `count` examples, `aside` are put aside at random. `swap` lets those leave that were forgotten least since the last
    one (wrong after they had been right), the lowest numbers first where that is equal, and as many of those aside come
    back at random. What was never right counts as forgotten `period` times: in each epoch between two swaps.
    """

    def __init__(self, count: int, aside: int, period: int = 30, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.training, self.aside = np.split(self.random.permutation(count), [count - aside])
        self.count, self.period = count, period
        self.forget()

    def forget(self) -> None:
        self.forgotten = np.zeros(self.count, np.int64)
        self.learned, self.right = np.zeros((2, self.count), bool)

    def epoch(self) -> np.ndarray:
        """The examples of an epoch, in an order of their own."""
        return self.random.permutation(self.training)

    def record(self, examples: np.ndarray, correct: np.ndarray) -> None:
        """Tells which of these different examples were right."""
        self.forgotten[examples] += self.right[examples] & ~correct
        self.right[examples] = correct
        self.learned[examples] |= correct

    def swap(self, examples: int) -> None:
        """Lets so many examples leave, and as many come back: all that are aside where these are fewer."""
        examples = min(examples, len(self.aside))
        self.training.sort()
        counts = np.where(self.learned, self.forgotten, self.period)[self.training]
        leaving = self.training[np.argsort(counts, kind="stable")[:examples]]
        coming, rest = np.split(self.random.permutation(self.aside), [examples])
        self.training = np.concatenate([np.setdiff1d(self.training, leaving), coming])
        self.aside = np.concatenate([rest, leaving])
        self.forget()

"""Runs the graphs that `vitrim train` writes, in any ONNX Runtime: numpy and onnxruntime are all it needs.

    from trainer import Trainer
    trainer = Trainer("folder")
    trainer.accumulate({"images": x}, labels)                   # -> loss; of a folder made with --accumulate
    trainer.step({"images": x}, labels, learning_rate=1e-3)     # -> loss
    trainer.step({"images": x}, labels, 1e-3, trainer.graph(0)) # the same, in epoch 0 of a training with stages
    trainer.evaluate({"images": x}, labels)                     # -> loss, examples that were right
    trainer.save("trained.safetensors")                         # for `vitrim export-weights`
    trainer.begin(parameters)                                   # anew, from other weights
"""
from __future__ import annotations

import json
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
        self.sums, self.batches = dict(self.zeros), 1
        self.steps = 0

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
        known = {**self.state, **self.sums, **{name: self.value(array) for name, array in feeds.items()}}
        wanted = {entry.name: known[entry.name] for entry in session.get_inputs() if entry.name in known}
        return dict(zip(names, session.run_with_ort_values(names, wanted)))

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
        correct = self.manifest["correct"]
        return float(outputs[self.manifest["loss"]].numpy()), int(outputs[correct].numpy().sum()) if correct else 0

    def save(self, path: str | Path) -> None:
        write_safetensors(Path(path), {name: value.numpy() for name, value in self.state.items()})

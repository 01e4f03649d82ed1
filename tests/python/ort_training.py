"""Trains with ONNX Runtime Training, from artifacts that vitrim wrote.

    ort_training.py ARTIFACTS DATA OUT [--from N] [--to M] [--rate X] [--training NAME] [--checkpoint FILE] [--save FILE]
                    [--export FILE OUTPUT]

DATA (npz) has an array for each input, with one batch after the other along the first axis; steps N to M - 1 of it are
taken. OUT (npz) gets `out.NAME` for each output, step by step; `grad.NAME`, the gradients of the last step; `param.NAME`
and `eval.NAME`, parameters after it and what they give for its batch. --training names another model that trains than
training_model.onnx, that of an earlier stage. --save writes a checkpoint with the optimizer's
state; --export writes a model for inference that gives one output."""
import argparse
import importlib.machinery
import os
import sys
import types

import numpy as np


class Anything(type):
    """An empty class, and whatever is looked up in it is one too."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Inert(types.ModuleType):
    __path__ = []
    __version__ = "0"
    __getattr__ = Anything.__getattr__


class InertTorch:
    """The package imports PyTorch, of which training needs nothing: it gets empty modules."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "onnxruntime.training.ortmodule":
            raise ImportError("trains PyTorch's modules")
        if name.split(".")[0] == "torch":
            return importlib.machinery.ModuleSpec(name, InertTorch, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return Inert(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.insert(0, InertTorch)

from onnxruntime.training.api import CheckpointState, Module, Optimizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("artifacts", "data", "out"):
        parser.add_argument(name)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="end", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--training", default="training_model.onnx")
    parser.add_argument("--checkpoint")
    parser.add_argument("--save")
    parser.add_argument("--export", nargs=2)
    args = parser.parse_args()

    def file(name: str) -> str:
        return os.path.join(args.artifacts, name)

    state = CheckpointState.load_checkpoint(args.checkpoint or file("checkpoint"))
    module = Module(file(args.training), state, file("eval_model.onnx"))
    optimizer = Optimizer(file("optimizer_model.onnx"), module)
    optimizer.set_learning_rate(args.rate)
    data = np.load(args.data)
    outputs = module.output_names()
    steps, result = [], {}

    def batch(step: int) -> list:
        return [np.asarray(data[name][step]) for name in module.input_names()]

    for step in range(args.first, args.end):
        module.train()
        steps.append(as_tuple(module(*batch(step))))
        if step + 1 == args.end:
            # One that is frozen has none.
            trained = [(name, one) for name, one in state.parameters if one.requires_grad]
            result.update({f"grad.{name}": np.array(one.grad) for name, one in trained})
        optimizer.step()
        module.lazy_reset_grad()
    result.update({f"out.{name}": np.stack(values) for name, values in zip(outputs, zip(*steps))})
    result.update({f"param.{name}": np.array(one.data) for name, one in state.parameters})
    module.eval()
    result.update({f"eval.{name}": value for name, value in zip(module.output_names(), as_tuple(module(*batch(step))))})
    if args.save:
        CheckpointState.save_checkpoint(state, args.save, include_optimizer_state=True)
    if args.export:
        module.export_model_for_inferencing(args.export[0], args.export[1:])
    np.savez(args.out, **result)


def as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    main()

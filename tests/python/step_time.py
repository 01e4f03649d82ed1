"""How long a training step takes: the graph of `vitrim train` beside PyTorch and onnxsim.

    cargo xtask steps [--threads 1,2] [--rounds 20] [--batch 8] [--model vit_tiny_patch16_224] [--only NAME,...]

One timm model with seeded random weights is trained on one batch by all of them: PyTorch in eager mode with and
without fused attention, the `compile_training_loop` of onnxsim, and what `vitrim train` writes, with the functions that
the file carries and with native kernels. All start from the same weights, with AdamW without decay (onnxsim has no
other Adam), and their losses must agree in every step.

Each runs in a process of its own, which waits while another takes its step; every round asks all of them in another
order. What is printed are medians over rounds of the ratio of two steps of one round, with the median deviation of that
ratio, and the most memory that the process had resident, imports and all.

The rewriter is the program in VITRIM_BIN, else target/debug/vitrim, the kernels are the library in VITRIM_OPS. Models are
kept in .cache/steps."""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VITRIM = Path(os.environ.get("VITRIM_BIN", ROOT / "target" / "debug" / "vitrim"))
KERNELS = os.environ.get("VITRIM_OPS", "")
SEED = 20231
RATE = 1e-4
WARM = 3                # steps before the first that counts
# Adam divides by the size of a gradient, so entries whose gradient is nothing but rounding move at random, a rate's
# worth in each step: losses drift apart slowly. A wrong gradient or correction shows at once.
FIRST_LOSS = 1e-5       # of the loss before any step, relative
LATER_LOSS = 1e-3       # of those after, relative to the first


# -- contenders: each makes a function that takes a step and gives the loss before it ---------------

Step = Callable[[], float]


def with_torch(folder: Path, threads: int, fused: bool) -> Step:
    import timm
    import torch

    torch.set_num_threads(threads)
    timm.layers.set_fused_attn(fused)
    settings = json.loads((folder / "settings.json").read_text())
    model = timm.create_model(settings["model"])
    model.load_state_dict(torch.load(folder / "weights.pt"))
    images, labels = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("images", "labels"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def parameters(model: Any) -> list[Any]:
    """The initializers that onnxsim is to train: all floats but single numbers."""
    return [tensor for tensor in model.graph.initializer if tensor.data_type == 1 and np.prod(tensor.dims) > 1]


def with_onnxsim(folder: Path, threads: int) -> Step:
    import onnx
    import onnxsim
    from onnxsim import backend

    class Options(backend.rt.SessionOptions):
        """As onnxsim asks for, but for the threads, which it leaves to ONNX Runtime."""

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = threads

    model = onnx.load(folder / "static.onnx")
    params = [tensor.name for tensor in parameters(model)]
    backend.rt.SessionOptions = Options
    loop = onnxsim.compile_training_loop(model, "loss", params)
    feeds = {name: np.load(folder / f"{name}.npy") for name in ("images", "targets")}
    return lambda: loop(feeds, lr=RATE)


def with_vitrim(folder: Path, threads: int, kernels: bool) -> Step:
    sys.path.insert(0, str(ROOT / "examples"))
    from trainer import Trainer

    trainer = Trainer(folder / "vitrim", threads, KERNELS if kernels else None)
    images, labels = (np.load(folder / f"{name}.npy") for name in ("images", "labels"))
    return lambda: trainer.step({"images": images}, labels, learning_rate=RATE)


CONTENDERS: dict[str, Callable[[Path, int], Step]] = {
    "torch fused": lambda folder, threads: with_torch(folder, threads, True),
    "torch unfused": lambda folder, threads: with_torch(folder, threads, False),
    "onnxsim": with_onnxsim,
    "vitrim": lambda folder, threads: with_vitrim(folder, threads, False),
    "vitrim kernels": lambda folder, threads: with_vitrim(folder, threads, True),
}


def work(name: str, folder: Path, threads: int) -> None:
    """The process of a contender: a step for each line that comes in, and what it took."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    step = CONTENDERS[name](folder, threads)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak()}), file=answers, flush=True)


def peak() -> float:
    """The most memory that this process had resident, in MB. What `getrusage` says is that of the parent, if larger."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


# -- models ---------------------------------------------------------------------------------------

def prepare(folder: Path, name: str, batch: int) -> None:
    """Weights, a batch, the export, what onnxsim is given and what vitrim makes of it."""
    import onnx
    import onnxsim
    import timm
    import torch

    warnings.simplefilter("ignore")     # the tracer's, about Python branches that are constant here
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"model": name}))
    torch.manual_seed(SEED)
    model = timm.create_model(name)
    with torch.no_grad():
        # Exporters make one of what is equal, as biases and gains are in the beginning.
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    torch.save(model.state_dict(), folder / "weights.pt")
    channels, height, width = model.default_cfg["input_size"]
    random = np.random.default_rng(SEED)
    images = random.standard_normal((batch, channels, height, width), np.float32)
    labels = random.integers(0, model.num_classes, batch)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "targets.npy", np.eye(model.num_classes, dtype=np.float32)[labels])
    path = folder / "model.onnx"
    torch.onnx.export(model.eval(), (torch.from_numpy(images),), path, dynamo=False, opset_version=17,
                      input_names=["images"], output_names=["logits"],
                      dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}})
    shutil.rmtree(folder / "vitrim", ignore_errors=True)
    train = [VITRIM, "train", path, folder / "vitrim", "--weight-decay", "0"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)

    # onnxsim wants all shapes fixed, and the loss in operators that it has gradients of.
    static, sound = onnxsim.simplify(onnx.load(path), overwrite_input_shapes={"images": list(images.shape)})
    assert sound
    for node in [node for node in static.graph.node if node.op_type == "Constant"]:
        # It has no rule for them.
        static.graph.initializer.append(node.attribute[0].t)
        static.graph.initializer[-1].name = node.output[0]
        static.graph.node.remove(node)
    shared = [tensor for tensor in static.graph.initializer if list(tensor.dims[:2]) == [batch, 1]]
    for token in shared:
        # The class token, which has become one for each image.
        one = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(token)[:1], f"{token.name}_shared")
        shape = onnx.numpy_helper.from_array(np.array(token.dims), f"{token.name}_shape")
        expand = onnx.helper.make_node("Expand", [one.name, shape.name], [token.name])
        static.graph.initializer.remove(token)
        static.graph.initializer.extend([one, shape])
        static.graph.node.insert(0, expand)
    targets = onnx.helper.make_tensor_value_info("targets", 1, [batch, model.num_classes])
    static.graph.input.append(targets)
    constant = onnx.numpy_helper.from_array(np.array(-1 / batch, np.float32), "share")
    static.graph.initializer.append(constant)
    static.graph.node.extend([
        onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        onnx.helper.make_node("Log", ["probabilities"], ["logarithms"]),
        onnx.helper.make_node("Mul", ["logarithms", "targets"], ["hits"]),
        onnx.helper.make_node("ReduceSum", ["hits"], ["sum"], keepdims=0),
        onnx.helper.make_node("Mul", ["sum", "share"], ["loss"]),
    ])
    del static.graph.output[:]
    static.graph.output.append(onnx.helper.make_tensor_value_info("loss", 1, []))
    count = sum(int(np.prod(tensor.dims)) for tensor in parameters(static))
    assert count == sum(parameter.numel() for parameter in model.parameters()), "other parameters"
    onnx.save(static, folder / "static.onnx")


# -- measurement ----------------------------------------------------------------------------------

class Process:
    """A contender at work."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        arguments = [sys.executable, __file__, "--work", name, str(folder), str(threads)]
        self.name, self.seconds, self.losses, self.peak = name, [], [], 0.0
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended with status {self.process.wait()}")
        answer = json.loads(answer)
        self.losses.append(answer["loss"])
        self.peak = answer["peak"]
        return answer["seconds"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def deviation(numbers: np.ndarray) -> float:
    return float(np.median(np.abs(numbers - np.median(numbers))))


def race(folder: Path, names: list[str], threads: int, rounds: int) -> bool:
    processes = [Process(name, folder, threads) for name in names]
    for process in processes:
        for _ in range(WARM):
            process.step()
    for _ in range(rounds):
        for process in random.sample(processes, len(processes)):
            # Idle threads of the one before still wait for work in a loop.
            time.sleep(0.05)
            process.seconds.append(process.step())
    for process in processes:
        process.end()
    first = processes[0]
    print(f"\n{threads} thread{'s' * (threads > 1)}, {rounds} rounds")
    references = [process for process in processes if not process.name.startswith("vitrim")]
    columns = "".join(f"{'/ ' + process.name:>21}" for process in references)
    print(f"{'':<16}{'ms':>8}{'peak MB':>10}{columns}    loss {'first':>8}{'last':>9}")
    for process in processes:
        own = np.array(process.seconds)
        ratios = [own / np.array(reference.seconds) for reference in references]
        columns = "".join(f"{np.median(ratio):>12.3f} ± {deviation(ratio):.3f} " for ratio in ratios)
        losses = f"{process.losses[0]:>13.5f}{process.losses[-1]:>9.5f}"
        print(f"{process.name:<16}{np.median(own) * 1e3:>8.1f}{process.peak:>10.0f}{columns}    {losses}")
    sound = True
    for process in processes:
        apart = np.abs(np.subtract(process.losses, first.losses)) / first.losses[0]
        if apart[0] > FIRST_LOSS or apart.max() > LATER_LOSS or process.losses[-1] >= process.losses[0]:
            print(f"{process.name} computes something else: losses up to {apart.max():.1e} from those of {first.name}")
            sound = False
    return sound


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        name, folder, threads = sys.argv[2:]
        return work(name, Path(folder), int(threads))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="numbers of threads to compute on")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that count")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a model of timm")
    parser.add_argument("--only", help="contenders, by name")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CONTENDERS)
    if not KERNELS and "vitrim kernels" in names:
        sys.exit("VITRIM_OPS names no library of kernels")
    folder = ROOT / ".cache" / "steps" / f"{arguments.model}-{arguments.batch}"
    prepare(folder, arguments.model, arguments.batch)
    sound = [race(folder, names, int(threads), arguments.rounds) for threads in arguments.threads.split(",")]
    sys.exit(0 if all(sound) else 1)


if __name__ == "__main__":
    main()

"""Trains the model of fixtures/fashion from random weights on Fashion-MNIST, with all tokens and with token expansion
(ToE, https://arxiv.org/abs/2404.00672), and prints what they cost and bring.

    vitrim train fixtures/fashion/fashion_vit.onnx fashion --expand 0.5,0.75,1 --expand-at 0,2,4
    python examples/fashion.py fashion
        [--data FOLDER] [--images 6000] [--epochs 6] [--shorter 5] [--batch 64] [--seeds 3] [--learning-rate 1e-3]
        [--quick] [--threads 2] [--kernels LIBRARY] [--save FOLDER]

--data has the four files of https://github.com/zalandoresearch/fashion-mnist, train-images-idx3-ubyte.gz and so on;
Debian's package dataset-fashion-mnist puts them where they are looked for. --quick needs none of them: one seed, 600
pictures of fixtures/ to train and 400 to test. --shorter adds runs with all tokens and fewer epochs, which take about
as long as ToE. --save keeps the weights of each run, and all figures in runs.json.

All runs of a seed begin with the same weights and see the same pictures in the same order. They take turns, so that
what else the machine does slows all. CPU time is that of all threads, with what they wait for each other; with
--threads 1 it is that of the work alone.
"""
from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from trainer import Trainer

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures/fashion/fashion_test.npz"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = np.float32(0.2860), np.float32(0.3530)
WARM_UP = 0.1


@dataclass(frozen=True)
class Part:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Part:
        return Part(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Kind:
    """A way to train."""

    name: str
    file: str
    expand: bool
    epochs: int


@dataclass(frozen=True)
class Run:
    kind: Kind
    seed: int
    losses: list[float]
    accuracy: float
    seconds: float
    cpu_seconds: float


def read_idx(path: Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(data, ">i4", rank, 4))


def read_part(folder: Path, name: str) -> Part:
    images, labels = (read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return Part(images[:, None], labels.astype(np.int64))


def random_weights(trainer: Trainer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal distributions, cut off at two standard deviations: 0.02 for positions and the class token, which have
    three axes, Glorot's √(2 / (inputs + outputs)) for matrices and the patch embedding. Zeros for biases, ones for the
    scales of norms."""
    weights = {}
    for entry in trainer.manifest["parameters"]:
        name, shape = entry["name"], entry["shape"]
        if len(shape) == 1:
            weights[name] = np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
            continue
        deviation = 0.02 if len(shape) == 3 else np.sqrt(2 / (shape[0] + np.prod(shape[1:])))
        draws = rng.standard_normal(shape)
        while (far := np.abs(draws) > 2).any():
            draws[far] = rng.standard_normal(far.sum())
        weights[name] = (deviation * draws).astype(np.float32)
    return weights


def feeds(trainer: Trainer, images: np.ndarray) -> dict[str, np.ndarray]:
    return {trainer.manifest["inputs"][0]: (images / np.float32(255) - MEAN) / STD}


def train(trainer: Trainer, part: Part, kind: Kind, seed: int, batch_size: int, top_rate: float) -> list[float]:
    """Mean loss of each epoch. A cosine takes the learning rate down to 0, after a straight line up."""
    rng = np.random.default_rng(seed)
    trainer.begin(random_weights(trainer, rng))
    per_epoch = len(part) // batch_size
    steps = kind.epochs * per_epoch
    warm_up = int(WARM_UP * steps)
    losses = []
    for epoch in range(kind.epochs):
        graph = trainer.graph(epoch) if kind.expand else None
        order = rng.permutation(len(part))[: per_epoch * batch_size]
        total = 0.0
        for chosen in order.reshape(per_epoch, batch_size):
            batch = part[chosen]
            mirrored = rng.random(batch_size) < 0.5
            images = np.where(mirrored[:, None, None, None], batch.images[..., ::-1], batch.images)
            rising = (trainer.steps + 1) / (warm_up + 1)
            falling = (1 + np.cos(np.pi * (trainer.steps - warm_up) / (steps - warm_up))) / 2
            rate = top_rate * (rising if trainer.steps < warm_up else falling)
            total += trainer.step(feeds(trainer, images), batch.labels, rate, graph)
        losses.append(total / per_epoch)
        print(f"  epoch {epoch + 1}: loss {losses[-1]:.3f}", file=sys.stderr)
    return losses


def accuracy(trainer: Trainer, part: Part) -> float:
    batches = [part[i : i + 500] for i in range(0, len(part), 500)]
    return sum(trainer.evaluate(feeds(trainer, batch.images), batch.labels)[1] for batch in batches) / len(part)


def mean_std(values: list[float] | np.ndarray, form: str) -> str:
    spread = f" ± {format(np.std(values, ddof=1), form.lstrip('+'))}" if len(values) > 1 else ""
    return format(np.mean(values), form) + spread


def table(runs: list[Run]) -> str:
    """Every run; means and sample standard deviations; and those of each kind against the first, seed by seed."""
    lines = ["| tokens | seed | test accuracy, % | wall time, s | CPU time, s |", "|---|---|---|---|---|"]
    figures = {kind: np.array([(100 * run.accuracy, run.seconds, run.cpu_seconds) for run in runs if run.kind == kind])
               for kind in dict.fromkeys(run.kind for run in runs)}
    for kind, rows in figures.items():
        lines += [f"| {kind.name} | {seed} | {a:.2f} | {b:.1f} | {c:.1f} |" for seed, (a, b, c) in enumerate(rows)]
    for kind, rows in figures.items():
        right, wall, cpu = rows.T
        means = mean_std(right, ".2f"), mean_std(wall, ".1f"), mean_std(cpu, ".1f")
        lines.append(f"| {kind.name} | mean | {' | '.join(means)} |")
    (first, base), *others = figures.items()
    for kind, rows in others:
        gain, (_, wall, cpu) = (rows - base)[:, 0], (rows / base).T
        means = mean_std(gain, "+.2f"), "× " + mean_std(wall, ".3f"), "× " + mean_std(cpu, ".3f")
        lines.append(f"| {kind.name} against {first.name} | mean | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `vitrim train --expand` wrote")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="where the four files of Fashion-MNIST are")
    parser.add_argument("--images", type=int, default=6000, help="how many training pictures to use")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--shorter", type=int, metavar="EPOCHS", help="train with all tokens for so many epochs, too")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest one")
    parser.add_argument("--quick", action="store_true", help="a small run on the pictures of fixtures/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", help="libvitrim_ops, see `vitrim ops`")
    parser.add_argument("--save", type=Path, help="keep weights and figures in this folder")
    arguments = parser.parse_args()

    if arguments.quick:
        arguments.batch, arguments.seeds = 16, 1
        with np.load(FIXTURE) as arrays:
            every = Part(arrays["images"], arrays["labels"])
        learn, test = every[:600], every[600:]
    else:
        try:
            learn, test = read_part(arguments.data, "train")[: arguments.images], read_part(arguments.data, "t10k")
        except FileNotFoundError as error:
            parser.error(f"{error.filename} is missing: give the folder of the data set with --data")
    trainer = Trainer(arguments.folder, arguments.threads, arguments.kernels)
    keep = [stage["keep"] for stage in trainer.manifest["schedules"]]
    if len(keep) < 2 or keep[-1] < 1:
        parser.error(f"{arguments.folder} has no stages that end with all tokens: see --expand of `vitrim train`")
    if len(learn) < arguments.batch:
        parser.error(f"{len(learn)} pictures are less than a batch")
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
    # Loading takes its time once, not in each run.
    manifest = trainer.manifest
    for file in {manifest["graphs"]["eval"], *(stage["graph"] for stage in manifest["schedules"])}:
        trainer.session(file)

    shares = "/".join(f"{share:g}" for share in keep)
    kinds = [Kind("all", "all", False, arguments.epochs), Kind(f"ToE {shares}", "toe", True, arguments.epochs)]
    if arguments.shorter:
        kinds.append(Kind(f"all, {arguments.shorter} epochs", "shorter", False, arguments.shorter))
    runs = []
    for seed in range(arguments.seeds):
        for kind in kinds:
            print(f"{kind.name}, seed {seed}", file=sys.stderr)
            wall, cpu = time.perf_counter(), time.process_time()
            losses = train(trainer, learn, kind, seed, arguments.batch, arguments.learning_rate)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            runs.append(Run(kind, seed, losses, accuracy(trainer, test), wall, cpu))
            print(f"  {100 * runs[-1].accuracy:.2f} % right, {wall:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr)
            if arguments.save:
                trainer.save(arguments.save / f"{kind.file}_{seed}.safetensors")
                (arguments.save / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    print(f"{len(learn)} pictures, {arguments.epochs} epochs, {len(test)} pictures to test\n\n{table(runs)}")


if __name__ == "__main__":
    main()

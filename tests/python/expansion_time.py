"""What a training step with token expansion costs, beside what its number of tokens allows.

    cargo xtask expansion [--sizes small,base] [--keep 0.5,0.75] [--threads 1,2] [--batch 8] [--seconds 120] [--json FILE]

Of a plain ViT (fixtures/oracle/make_vit.py, 224/16: 197 tokens, 12 blocks) three graphs are trained with AdamW, step by
step in turns:

* *full*: all tokens, no expansion;
* *expanded*: `vitrim train --expand`, at one kept rate;
* *floor*: the plain model with one `Slice` more, behind the first block, that keeps the first M tokens, M being as many as
  expansion leaves; its gradient is a `Pad`. Trained as it is: the patch embedding and the first block have all tokens,
  the other blocks M. That is what the number of tokens allows, and all that expansion costs is above it.

Printed are medians over rounds of the ratios of times that are next to each other, with their median absolute deviations.
At a kept rate of 1 the graph must be the full one, node for node. Exits with 1 where that is not so, or where a median
of expanded / floor is above --bar. Steps run with the library of native kernels (VITRIM_OPS), which `--no-ops` leaves out;
VITRIM_BIN (else target/debug/vitrim) writes the graphs. --folder keeps them, and finds them again; --write writes them and
measures nothing."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "fixtures/oracle"), str(ROOT / "examples")]

from make_vit import SIZES, make_vit  # noqa: E402
from trainer import Trainer  # noqa: E402

IMAGE, PATCH, CLASSES = 224, 16, 1000
PATCHES = (IMAGE // PATCH) ** 2
# Time on the wall, and of the processors: of all threads together, which others on the machine disturb less.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# The output of the first block, where expansion acts.
PLACE = "blocks.0.residual2"


def floor_of(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
    """The model with the first `tokens` tokens alone behind its first block."""
    floor = onnx.ModelProto()
    floor.CopyFrom(model)
    graph = floor.graph
    for name, value in {"first": 0, "kept": tokens, "tokens_axis": 1}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    for node in graph.node:
        node.input[:] = ["sliced" if name == PLACE else name for name in node.input]
    at = next(i for i, node in enumerate(graph.node) if PLACE in node.output)
    graph.node.insert(at + 1, onnx.helper.make_node("Slice", [PLACE, "first", "kept", "tokens_axis"], ["sliced"], "sliced"))
    return floor


def write_graphs(folder: Path, vitrim: str, size: str, rates: list[float]) -> None:
    """FOLDER/full, FOLDER/expanded and FOLDER/floor_RATE: what `vitrim train` makes."""
    depth, dim, heads = SIZES[size]
    plain = make_vit(depth, dim, heads, IMAGE, PATCH)
    folder.mkdir(parents=True, exist_ok=True)

    def train(model: onnx.ModelProto, name: str, *options: str) -> None:
        path = folder / "model.onnx"
        onnx.save(model, path)
        subprocess.run([vitrim, "train", path, folder / name, *options], check=True, stdout=subprocess.DEVNULL)
        path.unlink()

    train(plain, "full")
    # Dead tokens are left out of the floor as of the others, and before it is cut: the blocks behind the Slice are no tower
    # that begins with an embedding.
    onnx.save(plain, folder / "plain.onnx")
    without_dead = folder / "without_dead.onnx"
    subprocess.run([vitrim, "merge", folder / "plain.onnx", without_dead, "-r", "0"], check=True, stdout=subprocess.DEVNULL)
    to_cut = onnx.load(without_dead)
    shares = [*rates, 1.0]
    epochs = ",".join(str(epoch) for epoch in range(len(shares)))
    train(plain, "expanded", "--expand", ",".join(map(str, shares)), "--expand-at", epochs)
    for rate in rates:
        train(floor_of(to_cut, slots(folder, rate)), f"floor_{rate}")
        # One set of weights is enough.
        (folder / f"floor_{rate}" / "parameters.safetensors").unlink()
    for path in ["expanded/parameters.safetensors", "plain.onnx", "without_dead.onnx"]:
        (folder / path).unlink()


def slots(folder: Path, rate: float) -> int:
    """Tokens that are left at a kept rate: what the graph itself says."""
    graph = onnx.load(folder / "expanded" / graph_of(folder, rate), load_external_data=False).graph
    absorb = next(node for node in graph.node if node.op_type == "TokenAbsorb")
    number = {attribute.name: attribute.i for attribute in absorb.attribute}
    return number["keep"] + number["protect"] + number["suffix"]


def graph_of(folder: Path, rate: float) -> str:
    """The file of a stage."""
    stages = json.loads((folder / "expanded" / "manifest.json").read_text())["schedules"]
    return next(stage["graph"] for stage in stages if stage["keep"] == rate)


def nodes(path: Path) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in onnx.load(path).graph.node]


class Steps:
    """The graphs of one size, their sessions, and what is fed."""

    def __init__(self, folder: Path, threads: int, batch: int, ops: str | None) -> None:
        self.folder = folder
        self.trainer = Trainer(folder / "full", threads, ops)
        # Idle threads that spin would take the time of others.
        self.trainer.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        random = np.random.default_rng(0)
        images = random.standard_normal((batch, 3, IMAGE, IMAGE), dtype=np.float32)
        self.images, self.labels = {"images": images}, random.integers(0, CLASSES, batch)

    def seconds(self, graph: Path) -> dict[str, float]:
        start = {name: clock() for name, clock in CLOCKS.items()}
        # Nothing is learned: the last step has the same numbers to compute with as the first.
        loss = self.trainer.step(self.images, self.labels, 0.0, str(graph))
        taken = {name: clock() - start[name] for name, clock in CLOCKS.items()}
        assert np.isfinite(loss), f"{graph}: the loss is {loss}"
        return taken


def measure(steps: Steps, rate: float, seconds: float, least: int) -> dict[str, list[dict[str, float]]]:
    """Times of steps in turns, another one first in each round."""
    folder = steps.folder.resolve()
    graphs = {
        "full": folder / "full" / "train.onnx",
        "expanded": folder / "expanded" / graph_of(folder, rate),
        "floor": folder / f"floor_{rate}" / "train.onnx",
    }
    for graph in graphs.values():
        steps.seconds(graph)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in graphs}
    order, start = list(graphs), time.monotonic()
    while len(times["full"]) < least or time.monotonic() - start < seconds:
        for name in order:
            times[name].append(steps.seconds(graphs[name]))
        order = order[1:] + order[:1]
    steps.trainer.sessions = {path: session for path, session in steps.trainer.sessions.items() if "full" in path}
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, float]:
    """The median of ratios within a round, and their median absolute deviation."""
    ratios = np.array(times[over]) / np.array(times[under])
    median = np.median(ratios)
    return float(median), float(np.median(np.abs(ratios - median)))


def numbers(text: str, kind: type) -> list:
    return [kind(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="small,base", help="of make_vit.py")
    parser.add_argument("--keep", default="0.5,0.75", help="kept rates below 1, from half on")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120, help="for each row of the table")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of all threads, where others use the machine")
    parser.add_argument("--bar", type=float, default=1.03, help="the largest median of expanded / floor")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--no-ops", action="store_true")
    parser.add_argument("--json", type=Path, help="append the times of each row, one line for each")
    args = parser.parse_args()
    # Below half of the tokens the floor's first block would not compute those that the Slice drops (dead tokens).
    rates = numbers(args.keep, float)
    if not all(0.5 <= rate < 1.0 for rate in rates):
        parser.error("--keep wants rates from 0.5 to below 1")
    vitrim = os.environ.get("VITRIM_BIN", str(ROOT / "target/debug/vitrim"))
    ops = None if args.no_ops else os.environ.get("VITRIM_OPS", str(Path(vitrim).with_name("libvitrim_ops.so")))

    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes.split(","):
            folder = (args.folder or Path(temporary)) / size
            if not folder.exists():
                write_graphs(folder, vitrim, size, rates)
            same = nodes(folder / "full/train.onnx") == nodes(folder / "expanded" / graph_of(folder, 1.0))
            print(f"{size}: kept rate 1 is {'the full graph, node for node' if same else 'ANOTHER GRAPH'}", flush=True)
            failed |= not same
            if args.write:
                continue
            print("| model | kept | tokens | threads | full, ms | expanded / full | floor / full | expanded / floor | rounds |")
            print("|---|---|---|---|---|---|---|---|---|", flush=True)
            for threads in numbers(args.threads, int):
                steps = Steps(folder, threads, args.batch, ops)
                for rate in rates:
                    all_times = measure(steps, rate, args.seconds, args.rounds)
                    times = {name: [step[args.clock] for step in taken] for name, taken in all_times.items()}
                    pairs = [("expanded", "full"), ("floor", "full"), ("expanded", "floor")]
                    ratios = [ratio(times, *pair) for pair in pairs]
                    failed |= ratios[-1][0] > args.bar
                    cells = [f"{median:.3f} ± {deviation:.3f}" for median, deviation in ratios]
                    full = 1e3 * np.median(times["full"])
                    row = [f"{size}, batch {args.batch}", rate, f"{1 + PATCHES} → {slots(folder, rate)}", threads, f"{full:.0f}"]
                    print("| " + " | ".join(map(str, [*row, *cells, len(times["full"])])) + " |", flush=True)
                    if args.json:
                        named = {"size": size, "keep": rate, "threads": threads, "batch": args.batch, "times": all_times}
                        with open(args.json, "a") as file:
                            file.write(json.dumps(named) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

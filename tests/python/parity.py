"""Merged exports of timm models against the reference implementation.

    cargo xtask parity [--only SUBSTRING] [--exporter torchscript|dynamo]

Every architecture is created with seeded random weights, exported by PyTorch, rewritten by `vitrim merge` at r = 8 and
r = 13, with and without proportional attention, and run in ONNX Runtime. Its logits must match those of the float64
reference (`fixtures/oracle`) on the same weights to 1e-4, absolute and relative to the largest logit.

Merging decides by comparing similarities, and float32 may decide a near tie the other way. So the graph's decisions are
read back with `--trace-source`: where they differ from the reference's, each must cost less than 1e-5 in similarity, and
the logits are compared with a reference that follows the graph's decisions. Such cases are counted as `flips`.

The rewriter is the program in VITRIM_BIN, else target/debug/vitrim. Exports are kept in .cache/parity."""
from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import onnxruntime
import timm
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "fixtures" / "oracle"))
from oracle import tome, vit  # noqa: E402
from oracle.grouping import Grouping  # noqa: E402
from oracle.reducers import Reducer, ToMe  # noqa: E402

CACHE = ROOT / ".cache" / "parity" / f"torch-{torch.__version__}-timm-{timm.__version__}"
VITRIM = Path(os.environ.get("VITRIM_BIN", ROOT / "target" / "debug" / "vitrim"))
EXPORTERS = ("torchscript", "dynamo")
REDUCTIONS = (8, 13)
TOLERANCE = 1e-4        # of logits, absolute and relative
NEAR_TIE = 1e-5         # of cosine similarities
SEED = 20231


@dataclass(frozen=True)
class Architecture:
    """A timm model; `averaged` pools over the patch tokens and keeps the class token."""

    name: str
    averaged: bool = False

    @property
    def label(self) -> str:
        return self.name + ("+avg" if self.averaged else "")


ARCHITECTURES = (
    Architecture("deit_small_patch16_224"),
    Architecture("vit_base_patch16_224"),
    Architecture("deit_small_distilled_patch16_224"),
    Architecture("vit_small_patch16_224", averaged=True),
)


# -- models ---------------------------------------------------------------------------------------

def create(architecture: Architecture) -> torch.nn.Module:
    """Random weights, every parameter with noise so that biases, gains and positions matter."""
    torch.manual_seed(SEED)
    pooling = {"global_pool": "avg"} if architecture.averaged else {}
    model = timm.create_model(architecture.name, pretrained=False, **pooling).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def export(architecture: Architecture, model: torch.nn.Module, exporter: str) -> Path:
    """The model as ONNX with a dynamic batch, from the cache if it is there."""
    path = CACHE / f"{architecture.label}-{exporter}.onnx"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    warnings.simplefilter("ignore")     # the tracer's, about Python branches that are constant here
    example = torch.zeros(2, 3, 224, 224)
    names = dict(input_names=["images"], output_names=["logits"])
    if exporter == "dynamo":
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(model, (example,), partial, dynamo=True, opset_version=18, external_data=False, verbose=False,
                          dynamic_shapes=(batch,), **names)
    else:
        torch.onnx.export(model, (example,), partial, dynamo=False, opset_version=17,
                          dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, **names)
    partial.rename(path)
    return path


# -- the graph ------------------------------------------------------------------------------------

class Case(NamedTuple):
    """One way of merging; `plain_pooling` matters only where tokens are averaged."""

    r: int
    proportional: bool
    plain_pooling: bool

    @property
    def flags(self) -> list[str]:
        flags = [] if self.proportional else ["--no-proportional"]
        return flags + (["--plain-pooling"] if self.plain_pooling else [])


def run(model: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images})))


def merge(model: Path, images: np.ndarray, *arguments: str) -> dict[str, np.ndarray]:
    """Outputs of `model` as `vitrim merge` rewrites it."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        merged = Path(folder) / "merged.onnx"
        done = subprocess.run([VITRIM, "merge", model, merged, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"vitrim merge {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return run(merged, images)


def decisions(model: Path, images: np.ndarray, case: Case, depth: int) -> Iterator[np.ndarray]:
    """The graph's `assign` of every block, from the sources after merging in the first 1, 2, ... blocks alone."""
    before = None
    for blocks in range(1, depth + 1):
        schedule = ",".join(str(case.r if i < blocks else 0) for i in range(depth))
        after = merge(model, images, "-r", schedule, "--trace-source", *case.flags)["token_source"]
        if before is None:
            yield after
        else:
            assign = np.empty((len(after), before.max() + 1), np.int64)
            np.put_along_axis(assign, before, after, axis=1)
            yield assign
        before = after


# -- the reference --------------------------------------------------------------------------------

def shortfall(assign: np.ndarray, metric: np.ndarray, prefix: int) -> float:
    """How much similarity the choice `assign` (N,) gives up against the best one, by `metric` (N, C)."""
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    score = unit[0::2] @ unit[1::2].T
    score[:(prefix + 1) // 2] = -np.inf
    score[:, :prefix // 2] = -np.inf
    best = score.max(axis=1)
    holder = {slot: token for token, slot in enumerate(assign[1::2])}
    leaving = np.array([slot in holder for slot in assign[0::2]])
    if not leaving.any():
        return np.inf
    partners = max(best[token] - score[token, holder[assign[2 * token]]] for token in np.flatnonzero(leaving))
    return float(max(partners, best[~leaving].max() - best[leaving].min()))


class Follow(ToMe):
    """ToMe by given decisions; counts those that differ from its own, and the most that one of them gives up."""

    def __init__(self, case: Case, assigns: list[np.ndarray], prefix: int) -> None:
        super().__init__(case.r, case.proportional)
        self.assigns, self.prefix = assigns, prefix
        self.flips, self.worst = 0, 0.0

    def after_attention(self, i, x, keys, probs):
        metric = np.mean(keys, axis=1)
        own = tome.match_bipartite(metric, self.r[i], **self.flags)
        assign = self.assigns[i]
        for image in np.flatnonzero((assign != own.assign).any(axis=1)):
            lost = shortfall(assign[image], metric[image], self.prefix)
            self.flips += 1
            # Nothing lost yet different: the slots are in another order, which no near tie explains.
            self.worst = max(self.worst, lost if lost > 0 else np.inf)
        grouping = Grouping(assign, own.anchor)
        x, self.size = tome.merge_weighted(grouping, x, self.size)
        return x, grouping


# -- comparison -----------------------------------------------------------------------------------

class Verdict(NamedTuple):
    difference: float       # of the logits, the larger of absolute and relative
    flips: int              # decisions that differ from the reference's
    worst_flip: float       # most similarity that one of them gives up

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE and self.worst_flip <= NEAR_TIE


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    gap = float(np.abs(got - expected).max())
    return max(gap, gap / float(np.abs(expected).max()))


class Reference:
    """The float64 reference of one architecture; results are shared by the exporters."""

    def __init__(self, architecture: Architecture, model: torch.nn.Module, images: np.ndarray) -> None:
        self.architecture, self.images = architecture, images
        self.weights = {name: value.numpy() for name, value in model.state_dict().items()}
        self.heads, self.eps = model.blocks[0].attn.num_heads, model.blocks[0].norm1.eps
        self.patch = model.patch_embed.patch_size[0]
        self.depth = len(model.blocks)
        self.known: dict[Case | None, vit.Result] = {}

    def forward(self, reducer: Reducer, plain_pooling: bool) -> vit.Result:
        pool = "token" if not self.architecture.averaged else "avg" if plain_pooling else "avg_sized"
        config = vit.ViTConfig(self.patch, self.heads, self.eps, pool)
        return vit.forward(self.weights, config, self.images, reducer)

    def unmerged(self) -> vit.Result:
        if None not in self.known:
            self.known[None] = self.forward(Reducer(), plain_pooling=True)
        return self.known[None]

    def merged(self, case: Case) -> vit.Result:
        if case not in self.known:
            self.known[case] = self.forward(ToMe(case.r, case.proportional), case.plain_pooling)
        return self.known[case]

    def judge(self, model: Path, case: Case) -> Verdict:
        """The file as a user would write it against the reference that decides as it does."""
        logits = merge(model, self.images, "-r", str(case.r), *case.flags)["logits"]
        source = merge(model, self.images, "-r", str(case.r), "--trace-source", *case.flags)["token_source"]
        expected = self.merged(case)
        if np.array_equal(source, expected.owner):
            return Verdict(difference(logits, expected.logits), 0, 0.0)
        assigns = list(decisions(model, self.images, case, self.depth))
        follow = Follow(case, assigns, vit.prefix_tokens(self.weights))
        return Verdict(difference(logits, self.forward(follow, case.plain_pooling).logits), follow.flips, follow.worst)


class Row(NamedTuple):
    """A line of the table."""

    architecture: str
    exporter: str
    r: str
    proportional: str
    pooling: str
    verdict: Verdict
    error: str = ""

    def __str__(self) -> str:
        v = self.verdict
        note = "" if v.passed else f"  FAILED (worst flip {v.worst_flip:.1e}) {self.error}"
        return (f"{self.architecture:33} {self.exporter:12} {self.r:>6} {self.proportional:12} {self.pooling:8} "
                f"{v.difference:9.1e} {v.flips:5}{note}")


def compare(architecture: Architecture, exporters: list[str], export_only: bool) -> Iterator[Row]:
    """The export itself, then every way of merging it."""
    model = create(architecture)
    images = np.random.default_rng(SEED).standard_normal((2, 3, 224, 224)).astype(np.float32)
    reference = Reference(architecture, model, images)
    for exporter in exporters:
        path = export(architecture, model, exporter)
        plain = difference(run(path, images)["logits"], reference.unmerged().logits)
        yield Row(architecture.label, exporter, "export", "", "", Verdict(plain, 0, 0.0))
        if export_only:
            continue
        for r, proportional, plain_pooling in itertools.product(REDUCTIONS, (True, False), (False, True)):
            if plain_pooling and not architecture.averaged:
                continue
            columns = (str(r), "yes" if proportional else "no",
                       "" if not architecture.averaged else "plain" if plain_pooling else "sized")
            try:
                verdict, error = reference.judge(path, Case(r, proportional, plain_pooling)), ""
            except Exception as failure:  # one broken case must not hide the others
                verdict, error = Verdict(np.inf, 0, 0.0), f"{type(failure).__name__}: {failure}"
            yield Row(architecture.label, exporter, *columns, verdict, error)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare merged timm exports with the reference.")
    parser.add_argument("--only", default="", help="architectures whose name contains this")
    parser.add_argument("--exporter", choices=EXPORTERS, help="default: both")
    parser.add_argument("--export-only", action="store_true", help="fill the cache and compare the exports alone")
    arguments = parser.parse_args()
    if not arguments.export_only and not VITRIM.exists():
        sys.exit(f"{VITRIM} does not exist: build it with `cargo build`, or set VITRIM_BIN")

    exporters = [arguments.exporter] if arguments.exporter else list(EXPORTERS)
    verdicts = []
    print(f"{'architecture':33} {'exporter':12} {'r':>6} {'proportional':12} {'pooling':8} {'max diff':>9} {'flips':>5}", flush=True)
    for architecture in ARCHITECTURES:
        if arguments.only in architecture.label:
            for row in compare(architecture, exporters, arguments.export_only):
                print(row, flush=True)
                verdicts.append(row.verdict)
    passed = sum(verdict.passed for verdict in verdicts)
    print(f"{passed} of {len(verdicts)} within {TOLERANCE}; "
          f"{sum(verdict.flips for verdict in verdicts)} decisions differ, within {NEAR_TIE} in similarity where passed")
    return int(passed < len(verdicts) or not verdicts)


if __name__ == "__main__":
    sys.exit(main())

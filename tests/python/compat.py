"""Rewritten models must load, run and check as cleanly as their originals.

    cargo xtask compat [--models FOLDER] [--only SUBSTRING] [--variants SUBSTRING]
    python compat.py --runtime PYTHON [--runtime PYTHON ...]    the same with interpreters that have onnxruntime

Every model NAME.onnx of the folder (VITRIM_ZOO, else fixtures/zoo) is rewritten by the program in VITRIM_BIN (else
target/debug/vitrim) in several ways. A rewritten file may add

* no failure of `onnx.checker.check_model(full_check=True)`,
* in no runtime that loads the original: a failure to load, a failure to run, or a warning,

that the original lacks. With the library of native kernels (VITRIM_OPS, else beside the program) all of this must hold
as well, and outputs must be those without it: to 1e-4 in float32, to 5e-3 where a model computes in float16 or integers
(there two tokens that receive nearly the same attention may change places). The inputs are those of NAME.npz
(`in{run}_{j}`: the j-th graph input). A model that vitrim refuses (exit 2, nothing written) is counted, not judged."""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("ort_warnings.py")
VITRIM = Path(os.environ.get("VITRIM_BIN", ROOT / "target" / "debug" / "vitrim"))

OPS = Path(os.environ.get("VITRIM_OPS", VITRIM.with_name("libvitrim_ops.so")))

# Command and options. All models of the zoo have three blocks or more.
VARIANTS = {
    "r=4": ["merge", "-r", "4"],
    "r=0": ["merge", "-r", "0"],
    "all": ["merge", "-r", "4", "--keep-dead"],
    "inline": ["merge", "-r", "4", "--inline"],
    "source": ["merge", "-r", "4", "--trace-source"],
    "plain": ["merge", "-r", "4", "--no-proportional", "--plain-pooling"],
    "runtime": ["merge", "-r", "4", "--runtime-r"],
    "prune": ["prune", "--keep", "0.7", "--at", "0,1"],
    "prune fuse": ["prune", "--keep", "0.7", "--at", "0,1", "--fuse", "--trace-source"],
    "prune mask": ["prune", "--keep", "0.7", "--at", "0,1", "--attention-keep", "0.5"],
    "prune inline": ["prune", "--keep", "0.7", "--at", "0,1", "--fuse", "--attention-keep", "0.5", "--inline"],
    "prune runtime": ["prune", "--keep", "0.7", "--at", "0,1", "--attention-keep", "0.5", "--runtime-keep"],
}

# An input with a default value is what --runtime-r and --runtime-keep ask for.
EXPECTED = re.compile(r"Initializer (r|keep) appears in graph inputs")

# A merged model has fewer tokens: `{2,65,48}` and `{2,61,48}` in the same message are the same warning.
SHAPE = re.compile(r"\{[-\d, ]*\}")


@dataclass(frozen=True)
class Pair:
    """A rewritten file, its original and the way it was made."""

    variant: str
    original: Path
    rewritten: Path

    def __str__(self) -> str:
        return f"{self.original.stem} {self.variant}"


@dataclass(frozen=True)
class Tally:
    """A line of the closing table."""

    judge: str
    judged: int
    skipped: int
    violations: list[str]


def rewrite(models: list[Path], variants: list[str], folder: Path) -> tuple[list[Pair], Tally]:
    """All models in these ways; a violation is any end other than success or a clean refusal."""
    pairs, refused, violations = [], 0, []
    for model in models:
        for number, variant in enumerate(variants):
            command, *flags = VARIANTS[variant]
            out = folder / f"{model.stem}.{number}" / model.name
            out.parent.mkdir()
            done = subprocess.run([VITRIM, command, model, out, *flags], capture_output=True, text=True)
            if done.returncode == 0 and out.exists():
                pairs.append(Pair(variant, model, out))
            elif done.returncode == 2 and not any(out.parent.iterdir()):
                refused += 1
            else:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                violations.append(f"{model.stem} {variant}: exit {done.returncode}, wrote "
                                  f"{sorted(f.name for f in out.parent.iterdir())}: {last}")
    return pairs, Tally("vitrim", len(models) * len(variants), refused, violations)


def checker_errors(path: Path) -> dict[bool, str]:
    """What the plain and the full check (False, True) find, "" if nothing."""
    errors = {False: "", True: ""}
    for full in errors:
        try:
            onnx.checker.check_model(str(path), full_check=full)
        except Exception as error:
            errors[full] = " ".join(str(error).split()) or type(error).__name__
    return errors


def check(pairs: list[Pair]) -> Tally:
    """The full check where the original passes it, else the plain one."""
    originals = {original: checker_errors(original) for original in {pair.original for pair in pairs}}
    skipped, violations = 0, []
    for pair in pairs:
        before, after = originals[pair.original], checker_errors(pair.rewritten)
        skipped += all(before.values())
        added = [after[full] for full in (True, False) if after[full] and not before[full]]
        violations += [f"{pair}: {error}" for error in added[:1]]
    return Tally(f"onnx.checker {onnx.__version__}", len(pairs) - skipped, skipped, violations)


@cache
def is_coarse(original: Path) -> bool:
    """Whether the model computes in less than float32."""
    coarse = {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    graph = onnx.load(original, load_external_data=False).graph
    return any(tensor.data_type in coarse for tensor in graph.initializer)


def job(model: Path, original: Path, ops: str = "") -> dict:
    """What the worker needs to know; a rewritten model has the inputs of its original."""
    graph = onnx.load(original, load_external_data=False).graph
    constants = {initializer.name for initializer in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    data = original.with_suffix(".npz")
    with np.load(data) as arrays:
        runs = sorted({key.split("_")[0][2:] for key in arrays.files if key.startswith("in")})
    feeds = [{name: f"in{run}_{j}" for j, name in enumerate(names)} for run in runs]
    return {"model": str(model), "data": str(data), "feeds": feeds, "ops": ops}


def examine(python: str, jobs: list[dict]) -> tuple[str, dict[str, dict]]:
    """The runtime's version, and what the worker says of each model. A model that kills the worker did not load."""
    runtime, results = "", {}
    while True:
        todo = [job for job in jobs if job["model"] not in results]
        lines = "".join(json.dumps(job) + "\n" for job in todo)
        done = subprocess.run([python, WORKER], input=lines, stdout=subprocess.PIPE, text=True)
        head, *said = done.stdout.splitlines() or [""]
        if not head:
            sys.exit(f"{python} {WORKER} does not start")
        runtime = json.loads(head)["runtime"]
        results |= {result["model"]: result for result in map(json.loads, said)}
        if len(said) == len(todo):
            return runtime, results
        killer = todo[len(said)]["model"]
        results[killer] = {"model": killer, "loaded": False, "ran": False, "warnings": [],
                           "error": f"the process ended with {done.returncode}", "apart": 0.0, "redecided": False}


def judge(python: str, pairs: list[Pair]) -> Tally:
    originals = sorted({pair.original for pair in pairs})
    jobs = [job(model, model) for model in originals]
    jobs += [job(pair.rewritten, pair.original, str(OPS)) for pair in pairs]
    runtime, results = examine(python, jobs)
    skipped, violations = 0, []
    for pair in pairs:
        before, after = results[str(pair.original)], results[str(pair.rewritten)]
        if not before["loaded"]:
            skipped += 1
            continue
        if not after["loaded"]:
            violations.append(f"{pair}: does not load: {after['error']}")
        elif before["ran"] and not after["ran"]:
            violations.append(f"{pair}: does not run: {after['error']}")
        elif after["apart"] > (5e-3 if is_coarse(pair.original) else 1e-4):
            violations.append(f"{pair}: kernels change outputs by {after['apart']:.1e}")
        elif after["redecided"] and not is_coarse(pair.original):
            violations.append(f"{pair}: kernels group other tokens")
        known = {SHAPE.sub("{}", warning) for warning in before["warnings"]}
        added = Counter(warning for warning in after["warnings"]
                        if SHAPE.sub("{}", warning) not in known and not EXPECTED.match(warning))
        violations += [f"{pair}: warning ({times}x): {warning}" for warning, times in added.items()]
    return Tally(f"onnxruntime {runtime}", len(pairs) - skipped, skipped, violations)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that rewritten models are as clean as their originals.")
    parser.add_argument("--runtime", action="append", required=True, help="an interpreter that has onnxruntime and numpy")
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("VITRIM_ZOO", ROOT / "fixtures" / "zoo")))
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--variants", default="", help="ways of rewriting whose name contains this")
    arguments = parser.parse_args()
    if not VITRIM.exists():
        sys.exit(f"{VITRIM} does not exist: build it with `cargo build`, or set VITRIM_BIN")
    if not OPS.exists():
        sys.exit(f"{OPS} does not exist: build it with `cargo build`, or set VITRIM_OPS")
    models = sorted(model.resolve() for model in arguments.models.glob("*.onnx") if arguments.only in model.stem)
    variants = [variant for variant in VARIANTS if arguments.variants in variant]

    with tempfile.TemporaryDirectory() as folder:
        pairs, rewriting = rewrite(models, variants, Path(folder))
        tallies = [rewriting, check(pairs), *(judge(python, pairs) for python in arguments.runtime)]

    print(f"{len(models)} models, {len(variants)} variants, {len(pairs)} rewritten files")
    print(f"{'':24} {'judged':>7} {'skipped':>8} {'violations':>11}")
    for tally in tallies:
        print(f"{tally.judge:24} {tally.judged:7} {tally.skipped:8} {len(tally.violations):11}")
    for tally in tallies:
        for violation in tally.violations:
            print(f"{tally.judge}: {violation}")
    return int(any(tally.violations for tally in tallies) or not pairs)


if __name__ == "__main__":
    sys.exit(main())

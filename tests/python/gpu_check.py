"""Everything of vitrim that needs a GPU, checked and timed on one.

    cargo xtask gpu-check                                       builds, installs and runs this
    python gpu_check.py --vitrim PATH --ops PATH                needs numpy and onnxruntime-gpu, no network
        [--models FOLDER] [--json OUT] [--quick] [--part N ...] [--cpu-only-selftest]

1. operators   Every operator on random shapes, in float32, float16 and bfloat16: the body and the native kernel, on
               the CPU and on CUDA, against float64 (gpu/cases.py has the rules). Kernels must be what runs, on their
               device.
2. models      Every model of the folder that has inputs beside it (NAME.npz), merged with r = 4 and pruned in two
               blocks: on CUDA with the library against the CPU without. No more copies between host and GPU than the
               original has.
3. sanitizers  compute-sanitizer's memcheck and racecheck on small cases of part 1, if it is installed.
4. bench       Large models with random weights: original, merged by bodies, merged by kernels, slicing floor; with CUDA
               graphs and without.
5. launches    Kernels on the GPU for one merge, by its body and by the library, if CUPTI is installed.

Each part runs in a process of its own, because an illegal access ends CUDA for the process that made it. The exit
status is 0 if no part failed; a part that cannot run here is skipped, and said to be. `--cpu-only-selftest` puts the CPU
in place of the GPU, to test this script."""
from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnxruntime as ort

from gpu import cases
from gpu.kernels import KernelCount
from gpu.runtime import NoGpu, Runner, is_fatal, load_cuda, machine
from gpu.vit import Vit
from gpu.wire import functions

ROOT = Path(__file__).resolve().parents[2]
PARTS = {1: "operators", 2: "models", 3: "sanitizers", 4: "bench", 5: "launches"}

# What outputs of a whole model may differ, relative to the largest, by whether it computes in float32 and whether both
# sides grouped the same tokens. In float32 (TF32 is off) sums of a thousand products in another order differ by some
# 1e-6, and a few blocks of layer norms and softmaxes make 1e-4 of that at most; every tensor that is rounded to float16
# on the way is off by 5e-4. Where two candidates are as close as that, another pair may merge, or another token stay:
# then outputs are those of another model that is nearly as good, and only nonsense is told apart.
MODEL_TOLERANCE = {(True, True): 1e-3, (False, True): 2e-2, (True, False): 2e-1, (False, False): 2e-1}
# The share of models in float32 that may have grouped other tokens.
MODELS_APART = 0.2
# How part 2 rewrites them, and an operator that each must then have.
MODELS_BY = {"merged": (["merge", "-r", "4"], "TokenMerge"),
             "pruned": (["prune", "--keep", "0.7", "--at", "0,1"], "TokenPrune")}

VITS = [Vit("ViT-B/16 224", 224, 768, 12, 12, r=16), Vit("ViT-L/16 384", 384, 1024, 24, 16, r=23),
        Vit("DeiT-S/16 224", 224, 384, 12, 6, r=13)]
BATCHES = [1, 2, 4, 8, 32, 64]
TINY = [Vit("tiny", 32, 64, 3, 4, r=8, patch=4)]
ROUNDS = (10, 300)


@dataclass
class Outcome:
    """What a part has to say."""

    summary: str = ""
    failures: List[str] = field(default_factory=list)
    skipped: bool = False
    figures: Dict[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        return "FAIL" if self.failures else "SKIP" if self.skipped else "PASS"


class Check:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.quick, self.ops, self.cuda = arguments.quick, arguments.ops, not arguments.cpu_only_selftest
        self.device = "CUDA" if self.cuda else "CPU"

    def rewrite(self, model: Path, to: Path, command: str, *flags: str) -> Optional[dict]:
        """Merges or prunes; the program's report, or None where it refuses."""
        command = [self.arguments.vitrim, command, model, to, "--json", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 2 and not to.exists():
            return None
        if done.returncode:
            raise RuntimeError(f"vitrim {command[1]} {model.name}: exit {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)["report"]

    def bodies(self) -> Dict[str, bytes]:
        """The functions of operators, out of files that the program writes."""
        merge, prune = ["merge", "-r", "4"], ["prune", "--keep", "0.7", "--at", "0,1"]
        mask = [*prune, "--attention-keep", "0.5"]
        files = [("tables", {"tables": True}, merge), ("any_size", {"any_size": True}, merge), ("pruned", {}, prune),
                 ("masked", {}, mask), ("masked_at_run_time", {}, [*mask, "--runtime-keep"])]
        found: Dict[str, bytes] = {}
        for name, options, command in files:
            model = Vit(name, 32, 32, 3, 2, r=4, patch=4, **options).write(self.folder / f"{name}.onnx", half=False)
            rewritten = self.folder / f"{name}.rewritten.onnx"
            self.rewrite(model, rewritten, *command)
            found |= functions(rewritten)
        return found

    # 1. operators

    def operators(self) -> Outcome:
        outcome, local = Outcome(), self.bodies()
        runners = [Runner("CUDA kernel", True, self.ops)] if self.cuda else []
        if not self.arguments.kernels_only:
            runners += [Runner("CUDA body", True)] if self.cuda else []
            runners += [Runner("CPU kernel", False, self.ops), Runner("CPU body", False)]
        elif not self.cuda:
            runners = [Runner("CPU kernel", False, self.ops)]
        tallies: Dict[Tuple[str, str, str], dict] = defaultdict(
            lambda: {"cases": 0, "unsupported": 0, "failed": 0, "images": 0, "close": 0, "error": 0.0})
        model = self.folder / "case.onnx"
        for case in cases.cases(10 if self.quick else 100, self.quick):
            feeds = case.feeds()
            case.save(model, list(local.values()))
            reference = case.reference(feeds)
            for runner in runners:
                tally = tallies[type(case).__name__, case.dtype, runner.name]
                if not runner.ops and not local.keys() >= set(case.operators):
                    # The program writes no file with such a body.
                    tally["unsupported"] += 1
                    continue
                tally["cases"] += 1
                try:
                    outputs, profile = runner.profile(model, feeds)
                    verdict = reference.check(outputs, body=not runner.ops)
                    if runner.ops:
                        verdict.wrong += [f"no kernel ran {operator} on {runner.provider}"
                                          for operator in profile.misplaced(case.operators, runner.provider)]
                        if profile.copies:
                            verdict.wrong.append(f"{profile.copies} copies between host and GPU")
                except NoGpu:
                    raise
                except Exception as error:
                    # ONNX Runtime lacks much arithmetic in bfloat16, so that some bodies do not run.
                    if not runner.ops and "bfloat16" in case.dtypes and "NOT_IMPLEMENTED" in str(error):
                        tally["cases"], tally["unsupported"] = tally["cases"] - 1, tally["unsupported"] + 1
                        continue
                    verdict = cases.Verdict([said(error)])
                    if is_fatal(error):
                        outcome.failures.append(f"{runner.name}: {verdict.wrong[0]}; the rest was not run\n    {case}")
                        return outcome
                tally["failed"] += bool(verdict.wrong)
                tally["images"] += verdict.images
                tally["close"] += verdict.close
                tally["error"] = max(tally["error"], verdict.error)
                outcome.failures += [f"{runner.name}: {wrong}\n    {case}" for wrong in verdict.wrong[:1]]
        print(f"{'':8}{'type':10}{'runs as':13}{'cases':>6}{'failed':>8}{'unsupported':>13}{'largest error':>15}"
              f"{'images':>8}{'too close':>11}")
        for (kind, dtype, name), tally in sorted(tallies.items()):
            print(f"{kind:8}{dtype:10}{name:13}{tally['cases']:6}{tally['failed']:8}{tally['unsupported']:13}"
                  f"{tally['error']:15.1e}{tally['images']:8}{tally['close']:11}")
        outcome.figures = {" ".join(key): tally for key, tally in tallies.items()}
        judged = sum(tally["cases"] for tally in tallies.values())
        close = sum(tally["close"] for tally in tallies.values())
        outcome.summary = f"{judged} runs of cases, {close} images too close for float32 to decide"
        return outcome

    # 2. models

    def models(self) -> Outcome:
        outcome, refused, float32, other = Outcome(), [], 0, 0
        device, host = Runner(self.device, self.cuda, self.ops), Runner("CPU", False)
        print(f"{'':42}{'error':>9}{'allowed':>9}  {'copies':>6}{'in original':>13}")
        models = [model for model in sorted(self.arguments.models.glob("*.onnx")) if model.with_suffix(".npz").exists()]
        for model, (how, (command, operator)) in itertools.product(models, MODELS_BY.items()):
            name = f"{model.stem} {how}"
            try:
                rewritten = self.folder / model.name
                rewritten.unlink(missing_ok=True)
                if self.rewrite(model, rewritten, *command, "--trace-source") is None:
                    refused.append(name)
                    continue
                figures = self.model(model, rewritten, operator, device, host)
            except NoGpu:
                raise
            except Exception as error:
                outcome.failures.append(f"{name}: {said(error)}")
                if is_fatal(error):
                    break
                continue
            outcome.figures[name] = figures
            error, allowed = figures["error"], figures["allowed"]
            float32 += figures["float32"]
            other += figures["float32"] and not figures["same_grouping"]
            print(f"{name:42}{error:9.1e}{allowed:9.0e}  {figures['copies']:6}{figures['original_copies']:13}"
                  f"{'' if figures['same_grouping'] else '  grouped other tokens'}")
            if not error <= allowed:
                outcome.failures.append(f"{name}: {error:.1e} off, {allowed:.0e} is allowed")
            if figures["copies"] > figures["original_copies"]:
                outcome.failures.append(f"{name}: {figures['copies']} copies between host and GPU, the original "
                                        f"has {figures['original_copies']}")
            if not figures["kernels"]:
                outcome.failures.append(f"{name}: no kernel of the library ran on {self.device}")
        if not outcome.figures:
            outcome.failures.append(f"{self.arguments.models} holds no model that can be rewritten")
        if other > MODELS_APART * float32:
            outcome.failures.append(f"{other} of {float32} models in float32 grouped other tokens")
        outcome.summary = (f"{len(outcome.figures)} rewritten models, {other} of {float32} in float32 grouped other tokens; "
                           f"refused: {', '.join(refused) or 'none'}")
        return outcome

    def model(self, model: Path, rewritten: Path, operator: str, device: Runner, host: Runner) -> dict:
        """One model on all inputs that it has; `operator` or its dynamic form must run."""
        names = [value.name for value in host.session(model).get_inputs()]
        with np.load(model.with_suffix(".npz")) as arrays:
            runs = sorted({key.split("_")[0] for key in arrays.files if key.startswith("in")})
            feeds = [{name: arrays[f"{run}_{j}"] for j, name in enumerate(names)} for run in runs]
        error, same = 0.0, True
        expecting, giving = host.session(rewritten), device.session(rewritten)
        for fed in feeds:
            for expected, given in zip(expecting.run(None, fed), giving.run(None, fed)):
                if np.issubdtype(expected.dtype, np.integer):
                    same &= np.array_equal(expected, given)
                else:
                    error = max(error, cases.apart(expected.astype(np.float64), given))
        _, profile = device.profile(rewritten, feeds[0])
        _, original = Runner("original", self.cuda).profile(model, feeds[0])
        float32 = profile.is_float32
        return {"error": error, "allowed": MODEL_TOLERANCE[float32, same], "float32": float32, "same_grouping": same,
                "copies": profile.copies, "original_copies": original.copies,
                "kernels": sum(node["op"].startswith(operator) and node["provider"] == device.provider
                               for node in profile.nodes)}

    # 3. sanitizers

    def sanitizers(self) -> Outcome:
        tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if not tool or not self.cuda:
            why = "there is no compute-sanitizer in PATH or /usr/local/cuda/bin" if self.cuda else "no GPU"
            print(f"SKIPPED: {why}")
            return Outcome(f"NOT RUN: {why}", skipped=True)
        outcome = Outcome()
        for check in ("memcheck", "racecheck"):
            # Kernels of the library alone: those of ONNX Runtime are not ours to judge, and slow in here.
            result = self.folder / f"{check}.json"
            command = [tool, "--tool", check, "--error-exitcode", "9", "--report-api-errors", "no",
                       "--target-processes", "all"]
            command += [sys.executable, __file__, "--inside", "1", "--quick", "--kernels-only", "--result", result,
                        "--vitrim", self.arguments.vitrim, "--ops", self.ops]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            lines = done.stdout.strip().splitlines()
            summary = [line for line in lines if "SUMMARY" in line]
            print(f"{check}: {summary[-1] if summary else lines[-1:]}")
            outcome.figures[check] = {"status": done.returncode, "summary": summary}
            if done.returncode or not summary:
                wrong = json.loads(result.read_text())["failures"] if result.exists() else []
                outcome.failures.append("\n    ".join([f"{check}: exit {done.returncode}", *lines[-40:], *wrong[:5]]))
        outcome.summary = "memcheck and racecheck of the library's kernels"
        return outcome

    # 4. bench

    def bench(self) -> Outcome:
        outcome = Outcome()
        vits, batches = (VITS, BATCHES) if self.cuda else (TINY, [1, 2])
        print(f"Ratios are to the original in the same round: median, and median deviation from it. {self.device}, "
              "options as ONNX Runtime has them by default.")
        for vit in (vit for vit in vits if self.arguments.only in vit.name):
            for half in (False, True):
                name = f"{vit.name} r={vit.r} {'float16' if half else 'float32'}"
                try:
                    figures, failures = self.bench_model(vit, half, batches)
                except NoGpu:
                    raise
                except Exception as error:
                    figures, failures = {}, [said(error)]
                    if is_fatal(error):
                        outcome.failures.append(f"{name}: {said(error)}; the rest was not run")
                        return outcome
                outcome.figures[name] = figures
                outcome.failures += [f"{name}: {failure}" for failure in failures]
        outcome.summary = f"{len(outcome.figures)} models timed"
        return outcome

    def bench_model(self, vit: Vit, half: bool, batches: Sequence[int]) -> Tuple[dict, List[str]]:
        paths = [self.folder / f"{kind}.onnx" for kind in ("original", "merged", "floor")]
        original, merged, floor = paths
        vit.write(original, half)
        # All tokens, as in the floor: what differs is the kernels.
        steps = self.rewrite(original, merged, "merge", "-r", str(vit.r), "--keep-dead")["steps"]
        counts = [step["before"] - step["removed"] for step in steps]
        counts += [counts[-1]] * (vit.depth - len(counts))
        vit.write(floor, half, counts)
        plain, library = Runner("plain", self.cuda), Runner("library", self.cuda, self.ops)
        variants = {"original": (original, plain), "body": (merged, plain), "library": (merged, library),
                    "floor": (floor, plain)}
        merges = sum(step["removed"] > 0 for step in steps)

        figures: dict = {"tokens": [vit.tokens, *counts], "launches": {}, "copies": {}, "no_graph": {}, "batches": {}}
        failures: List[str] = []
        picture = {"pixel_values": np.zeros([1, 3, vit.image, vit.image], np.float16 if half else np.float32)}
        for name, (model, runner) in variants.items():
            _, profile = runner.profile(model, picture)
            figures["copies"][name] = profile.copies
            if name in ("body", "library"):
                figures["launches"][name] = profile.launches("TokenMerge") / merges
            if profile.kernels:
                figures.setdefault("kernels_per_run", {})[name] = profile.kernels
        if figures["copies"]["library"] > figures["copies"]["original"]:
            failures.append(f"copies between host and GPU: {figures['copies']}")

        subjects = {name: Subject(model, runner, half) for name, (model, runner) in variants.items()}
        figures["no_graph"] = {name: subject.no_graph for name, subject in subjects.items() if subject.no_graph}
        if "library" in figures["no_graph"]:
            failures.append(f"no CUDA graph with the library: {figures['no_graph']['library']}")
        launches = ", ".join(f"{name} {count:.0f}" for name, count in figures["launches"].items())
        print(f"\n{vit.name}, r {vit.r}, {'float16' if half else 'float32'}: {vit.tokens} -> {counts[-1]} tokens. "
              f"Nodes per merge that launch something: {launches}. Copies between host and GPU: {figures['copies']}")
        if figures.get("kernels_per_run"):
            print(f"Kernels per run, from the profile: {figures['kernels_per_run']}")
        for name, why in figures["no_graph"].items():
            print(f"No CUDA graph, {name}: {why}")
        print(f"{'batch':>5}{'graphs':>8}{'original':>12}{'body':>16}{'library':>16}{'floor':>16}")
        for batch in batches:
            for graphs in (False, True):
                cell = self.bench_cell(subjects, batch, graphs)
                if cell is None:
                    continue
                figures["batches"][f"{batch}{' graphs' if graphs else ''}"] = cell
                failures += [f"batch {batch}: {failure}" for failure in cell.get("failures", [])]
                shown = "".join(f"{cell['ratio'][name]:9.2f} ± {cell['deviation'][name]:4.2f}" if name in cell["ratio"]
                                else f"{'-':>16}" for name in ("body", "library", "floor"))
                first = f"{cell['ms']['original']:9.2f} ms" if "original" in cell["ms"] else f"{'-':>12}"
                print(f"{batch:5}{'yes' if graphs else 'no':>8}{first}{shown}{cell.get('note', '')}", flush=True)
        for path in paths:
            path.unlink()
        return figures, failures

    def bench_cell(self, subjects: Dict[str, "Subject"], batch: int, graphs: bool) -> Optional[dict]:
        """All variants at one batch size, run in turn; None where there are no graphs."""
        taking_part = {name: subject for name, subject in subjects.items() if not (graphs and subject.no_graph)}
        if not taking_part or graphs and not self.cuda:
            return None
        runs, cell = {}, {"ms": {}, "ratio": {}, "deviation": {}, "failures": []}
        for name, subject in taking_part.items():
            try:
                run = subject.bound(batch, graphs)
                for _ in range(4):
                    run()
                runs[name] = run
            except Exception as error:
                if is_fatal(error):
                    raise
                cell["note"] = f"  {name}: {said(error)[:60]}"
                full = any(word in str(error).lower() for word in ("allocate", "out of memory", "alloc_failed"))
                # That ONNX Runtime cannot capture other nodes than ours is for the table.
                if not full and (name == "library" or not graphs):
                    cell["failures"].append(f"{name}{' with CUDA graphs' if graphs else ''}: {said(error)}")
                if graphs and not full:
                    subject.without_graphs(said(error))
        times: Dict[str, List[float]] = {name: [] for name in runs}
        end = time.perf_counter() + self.arguments.seconds
        rounds = 0
        while rounds < ROUNDS[0] or time.perf_counter() < end and rounds < ROUNDS[1]:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
            rounds += 1
        for name, taken in times.items():
            cell["ms"][name] = float(np.median(taken)) * 1e3
            if name != "original" and "original" in times:
                ratios = np.array(times["original"]) / np.array(taken)
                cell["ratio"][name] = float(np.median(ratios))
                cell["deviation"][name] = float(np.median(np.abs(ratios - np.median(ratios))))
        for name in runs if graphs else []:
            subject = taking_part[name]
            error = cases.apart(subject.result(batch, False), subject.result(batch, True))
            if not error <= MODEL_TOLERANCE[not subject.half, True]:
                cell["failures"].append(f"{name}: a CUDA graph changes the result by {error:.1e}")
        return cell


    # 5. launches

    def launches(self) -> Outcome:
        try:
            if not self.cuda:
                raise OSError("no GPU")
            kernels = KernelCount()
        except OSError as error:
            print(f"SKIPPED: {error}")
            return Outcome(f"NOT RUN: {error}", skipped=True)
        outcome, local, model = Outcome(), self.bodies(), self.folder / "merge.onnx"
        print(f"{'':16}{'type':>10}{'batch':>6}{'body':>8}{'library':>9}")
        for vit in VITS:
            for dtype in ("float32", "float16"):
                for batch in (1, 8):
                    head = vit.width // vit.heads
                    case = cases.Merge(0, batch, vit.tokens, vit.width, vit.heads, head, vit.r, at=vit.width,
                                       behind=vit.width, dtype=dtype, metric_dtype=dtype)
                    half = np.float16 if dtype == "float16" else np.float32
                    feeds = {name: value if name == "size" else value.astype(half)
                             for name, value in case.feeds().items() if name in ("x", "metric", "size")}
                    case.save_alone(model, list(local.values()))
                    counts = {}
                    for name, ops in (("body", None), ("library", self.ops)):
                        session = Runner(name, True, ops).session(model)
                        for _ in range(2):
                            session.run(None, feeds)
                        counts[name] = kernels.of(lambda: session.run(None, feeds))
                    print(f"{vit.name:16}{dtype:>10}{batch:6}{counts['body']:8}{counts['library']:9}")
                    outcome.figures[f"{vit.name} {dtype} {batch}"] = counts
        if not all(counts["library"] for counts in outcome.figures.values()):
            outcome.failures.append("CUPTI saw no kernel")
        most = max(counts["library"] for counts in outcome.figures.values())
        outcome.summary = f"a merge takes {most} kernels at most with the library"
        return outcome


class Subject:
    """A variant of a model that is timed: one session, whose runs are captured in a CUDA graph for each batch size
    where this is possible and wanted."""

    def __init__(self, model: Path, runner: Runner, half: bool) -> None:
        self.model, self.runner, self.half = model, runner, half
        self.device, self.no_graph = "cuda" if runner.cuda else "cpu", ""
        self.outputs: Dict[Tuple[int, bool], ort.OrtValue] = {}
        try:
            self.session = runner.session(model, graph=runner.cuda, default=True)
        except NoGpu:
            raise
        except Exception as error:
            self.without_graphs(said(error))

    def without_graphs(self, why: str) -> None:
        """A session anew: one that failed to capture may be of no more use."""
        self.no_graph = why
        self.session = self.runner.session(self.model, default=True)

    def bound(self, batch: int, graph: bool):
        """A function that runs the model once, on noise that is on the device, and waits for the end."""
        dtype = np.float16 if self.half else np.float32
        value, result = self.session.get_inputs()[0], self.session.get_outputs()[0]
        noise = np.random.default_rng(batch).standard_normal([batch, *value.shape[1:]], dtype=np.float32).astype(dtype)
        binding, options = self.session.io_binding(), ort.RunOptions()
        fed = ort.OrtValue.ortvalue_from_numpy(noise, self.device, 0)
        # A graph writes where it wrote when it was captured.
        given = ort.OrtValue.ortvalue_from_shape_and_type([batch, *result.shape[1:]], dtype, self.device, 0)
        binding.bind_ortvalue_input(value.name, fed)
        binding.bind_ortvalue_output(result.name, given)
        self.outputs[batch, graph] = given
        if self.device == "cuda" and not self.no_graph:
            # -1: neither captured nor replayed.
            options.add_run_config_entry("gpu_graph_id", str(batch) if graph else "-1")

        def run() -> None:
            self.session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        # What is bound lives as long as the function: graphs read and write there.
        run.operands = fed, given  # type: ignore[attr-defined]
        return run

    def result(self, batch: int, graph: bool) -> np.ndarray:
        return self.outputs[batch, graph].numpy().astype(np.float64)


def said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def one_part(number: int, arguments: argparse.Namespace) -> Outcome:
    """A part in this process."""
    if not arguments.cpu_only_selftest:
        load_cuda()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(arguments, Path(folder))
        try:
            return getattr(check, PARTS[number])()
        except NoGpu as error:
            return Outcome("nothing was run", [str(error)])


def all_parts(arguments: argparse.Namespace, folder: Path) -> Dict[int, Outcome]:
    """Each part in a process of its own."""
    outcomes = {}
    for number in arguments.part or PARTS:
        print(f"\n--- {number}. {PARTS[number]}", flush=True)
        result, start = folder / f"{number}.json", time.perf_counter()
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside", str(number), "--result", result])
        if result.exists():
            outcome = Outcome(**json.loads(result.read_text()))
        else:
            outcome = Outcome("broken off", [f"the process ended with {done.returncode}"])
        outcome.figures["seconds"] = round(time.perf_counter() - start, 1)
        for failure in outcome.failures[:20]:
            print(f"FAILED: {failure}")
        if len(outcome.failures) > 20:
            print(f"and {len(outcome.failures) - 20} more")
        outcomes[number] = outcome
        # After each part: whoever ends this early has what there is.
        if arguments.json:
            parts = {PARTS[key]: {"verdict": value.word, **asdict(value)} for key, value in outcomes.items()}
            arguments.json.write_text(json.dumps({"machine": machine(), "parts": parts}, indent=1))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time vitrim on a GPU.")
    parser.add_argument("--vitrim", type=Path, required=True, help="the program")
    parser.add_argument("--ops", type=Path, required=True, help="the library of native kernels")
    parser.add_argument("--models", type=Path, default=ROOT / "fixtures" / "zoo", help="of part 2")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="few and small cases in part 1")
    parser.add_argument("--part", type=int, choices=PARTS, action="append", help="this part alone; repeatable")
    parser.add_argument("--only", default="", help="part 4: models whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="part 4: time for each line of a table")
    parser.add_argument("--cpu-only-selftest", action="store_true", help="the CPU in place of the GPU; no sanitizers")
    # For the processes that this one starts.
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kernels-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("vitrim", "ops"):
        path = getattr(arguments, name).resolve()
        if not path.exists():
            sys.exit(f"{path} does not exist")
        setattr(arguments, name, path)
    if arguments.inside:
        outcome = one_part(arguments.inside, arguments)
        arguments.result.write_text(json.dumps(asdict(outcome)))
        return int(bool(outcome.failures))

    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = all_parts(arguments, Path(folder))
    print()
    for number, outcome in outcomes.items():
        print(f"{outcome.word} {number}. {PARTS[number]}: {outcome.summary} ({outcome.figures['seconds']:.0f} s)")
    passed = not any(outcome.failures for outcome in outcomes.values())
    skipped = sum(outcome.skipped for outcome in outcomes.values())
    print(f"{'PASS' if passed else 'FAIL'} overall{f', {skipped} parts not run' if skipped else ''}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())

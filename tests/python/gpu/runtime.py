"""ONNX Runtime as the GPU check uses it: sessions, profiles, what is installed."""
from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import onnxruntime as ort

Arrays = Dict[str, np.ndarray]

COPIES = ("MemcpyToHost", "MemcpyFromHost")
# Nodes that launch nothing: they look at memory in another way.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape")


class NoGpu(Exception):
    """A session was asked to run on CUDA and does not."""


@dataclass(frozen=True)
class Profile:
    """What one run of a model executed."""

    nodes: List[Dict[str, Any]]
    # Kernels on the GPU, where this build of ONNX Runtime records them.
    kernels: int

    @property
    def copies(self) -> int:
        return sum(node["op"] in COPIES for node in self.nodes)

    @property
    def is_float32(self) -> bool:
        """Whether everything is computed in float32: no coarser numbers enter any node."""
        types = {kind for node in self.nodes for operand in node["types"] for kind in operand}
        return not types & {"float16", "bfloat16", "int8", "uint8"}

    def misplaced(self, operators: Sequence[str], provider: str) -> List[str]:
        """Operators of ours that no kernel of the provider ran."""
        ran = {node["op"] for node in self.nodes if node["provider"] == provider}
        return sorted(set(operators) - ran)

    def launches(self, function: str) -> int:
        """Nodes that launch something and come from the body of a function, or are calls of its kernel."""
        inlined = f"_inlfunc_{function}_"
        ours = [node for node in self.nodes if node["op"] == function or node["name"].startswith(inlined)]
        return sum(node["op"] not in VIEWS for node in ours)


@dataclass(frozen=True)
class Runner:
    """A way to run models: on a device, with or without the library of native kernels."""

    name: str
    cuda: bool
    ops: Optional[Path] = None

    @property
    def provider(self) -> str:
        return "CUDAExecutionProvider" if self.cuda else "CPUExecutionProvider"

    def session(self, model: Path, graph: bool = False, default: bool = False,
                profile: Optional[str] = None) -> ort.InferenceSession:
        """`graph`: runs are captured as CUDA graphs. `default`: all else is as ONNX Runtime has it by default."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        if self.ops:
            options.register_custom_ops_library(str(self.ops))
        choices = {"enable_cuda_graph": str(int(graph))}
        if not default:
            # Products of float32 are not to be rounded to 10 bits. And memory by request, not by doubling: what a
            # kernel writes beyond its own is then more likely to be nobody's, and found.
            choices.update(use_tf32="0", arena_extend_strategy="kSameAsRequested")
        providers = [(self.provider, choices), "CPUExecutionProvider"] if self.cuda else [self.provider]
        session = ort.InferenceSession(str(model), options, providers=providers)
        if session.get_providers()[0] != self.provider:
            raise NoGpu(f"{self.provider} is not available; there are {ort.get_available_providers()}")
        return session

    def run(self, model: Path, feeds: Arrays) -> Arrays:
        return outputs(self.session(model), feeds)

    def profile(self, model: Path, feeds: Arrays) -> "tuple[Arrays, Profile]":
        """The outputs of a run, and what it executed."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(model, profile=f"{folder}/profile")
            results = outputs(session, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        end = "_kernel_time"
        nodes = [{"name": event["name"][: -len(end)], "op": event["args"].get("op_name"),
                  "provider": event["args"].get("provider"), "types": event["args"].get("input_type_shape", [])}
                 for event in events if event.get("cat") == "Node" and event["name"].endswith(end)]
        return results, Profile(nodes, sum(event.get("cat") == "Kernel" for event in events))


def outputs(session: ort.InferenceSession, feeds: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds)))


def is_fatal(error: Exception) -> bool:
    """Whether CUDA is of no use to this process any more: an illegal access ends the context."""
    return any(word in str(error) for word in ("illegal memory", "misaligned", "launch failure", "error 700"))


def load_cuda() -> None:
    """Finds the CUDA libraries that pip installed, if it did. Those of the system are found without help."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    if any(next(folder.glob("*/lib/libcublas.so.*"), None) for folder in folders):
        ort.preload_dlls()


def machine() -> Dict[str, str]:
    """What the figures were taken on."""
    asked = ["name", "driver_version", "compute_cap", "memory.total"]
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = ["none"] * len(asked)
    return {**dict(zip(["gpu", "driver", "compute_capability", "memory"], said)), "onnxruntime": ort.__version__,
            "numpy": np.__version__, "python": platform.python_version(), "system": platform.platform()}

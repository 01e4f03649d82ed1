"""Worker of compat.py: loads and runs models in the onnxruntime of the interpreter that runs it.

Standard input holds one JSON object a line, {"model": path, "feeds": [{input: npz key}], "data": npz path, "ops": path of
the library of native kernels, or ""}; standard output gets one a line, {"model", "loaded", "ran", "error", "warnings",
"apart", "redecided"}, in the same order. Warnings are what the runtime writes at severity 2 (warning) while it loads
and runs the model, without and with the library, without time stamps. "apart" is how far outputs with the library are
from those without it, relative to the largest, and "redecided" whether outputs of integers differ. The first line names
the runtime."""
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from typing import Iterator, List

import numpy as np
import onnxruntime

# "2025-01-31 12:00:00.123456789 [W:onnxruntime:, graph.cc:123 Function] text", coloured in some versions
STAMP = re.compile(r"^\S+ \S+ \[[WEF]:[^\]]*?, [^\]]*?\] ")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


@contextmanager
def captured_stderr(lines: List[str]) -> Iterator[None]:
    """What native code writes to file descriptor 2, as lines."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            text = COLOUR.sub("", sink.read().decode(errors="replace"))
            lines += [STAMP.sub("", line) for line in text.splitlines() if line.strip()]


def examine(job: dict) -> dict:
    result = {"model": job["model"], "loaded": False, "ran": False, "error": "", "warnings": [], "apart": 0.0,
              "redecided": False}
    with captured_stderr(result["warnings"]), np.load(job["data"]) as data:
        try:
            sessions = [load(job["model"], ops) for ops in (["", job["ops"]] if job["ops"] else [""])]
            result["loaded"] = True
            for keys in job["feeds"]:
                feeds = {name: data[key] for name, key in keys.items()}
                plain, *others = [session.run(None, feeds) for session in sessions]
                result["apart"] = max([result["apart"], *(relative(plain, other) for other in others)])
                result["redecided"] |= any(not np.array_equal(a, b) for other in others for a, b in zip(plain, other)
                                           if np.issubdtype(a.dtype, np.integer))
            result["ran"] = True
        except Exception as error:
            result["error"] = " ".join(str(error).split())
    return result


def load(model: str, ops: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = 1
    # From a session's second run on, 1.17 and 1.18 give memory of values that are still read to others: a float16
    # LayerNormalization is wrong in any file with a local function, a float32 one that has unused outputs in any file.
    options.enable_mem_pattern = VERSION >= (1, 19)
    if ops:
        options.register_custom_ops_library(ops)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def relative(expected: List[np.ndarray], given: List[np.ndarray]) -> float:
    """The largest difference of any output of floats, relative to its largest entry; infinite where shapes or NaN
    differ."""
    def one(a: np.ndarray, b: np.ndarray) -> float:
        if a.shape != b.shape:
            return float("inf")
        if np.issubdtype(a.dtype, np.integer):
            return 0.0
        a, b = a.astype(np.float64), b.astype(np.float64)
        apart = np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), np.finfo(np.float64).tiny)
        return float("inf") if np.isnan(apart) else float(apart)
    return max(map(one, expected, given), default=0.0)


def main() -> None:
    onnxruntime.set_default_logger_severity(2)
    print(json.dumps({"runtime": onnxruntime.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(examine(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

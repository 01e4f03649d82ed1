"""Worker of compat.py: loads and runs models in the onnxruntime of the interpreter that runs it.

Standard input holds one JSON object a line, {"model": path, "feeds": [{input: npz key}], "data": npz path}; standard
output gets one a line, {"model", "loaded", "ran", "error", "warnings"}, in the same order. Warnings are what the runtime
writes at severity 2 (warning) while it loads and runs the model, without time stamps. The first line names the runtime."""
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
    result = {"model": job["model"], "loaded": False, "ran": False, "error": "", "warnings": []}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = 1
    with captured_stderr(result["warnings"]), np.load(job["data"]) as data:
        try:
            session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
            result["loaded"] = True
            for feeds in job["feeds"]:
                session.run(None, {name: data[key] for name, key in feeds.items()})
            result["ran"] = True
        except Exception as error:
            result["error"] = " ".join(str(error).split())
    return result


def main() -> None:
    onnxruntime.set_default_logger_severity(2)
    print(json.dumps({"runtime": onnxruntime.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(examine(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

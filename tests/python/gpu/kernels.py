"""Counts what runs on the GPU. ONNX Runtime's own profile has no kernels in the builds that pip installs."""
from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Callable, Dict, List

# Of cupti_activity.h.
CONCURRENT_KERNEL, FORCED = 10, 1
BUFFER = 1 << 20

Requested = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
                             ctypes.POINTER(ctypes.c_size_t))
Completed = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


def find_cupti() -> ctypes.CDLL:
    """CUPTI, of a package or of the toolkit; OSError if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    packaged: List[Path] = [path for folder in folders for path in folder.glob("*/lib/libcupti.so.*")]
    toolkit = Path("/usr/local/cuda")
    installed = [*toolkit.glob("extras/CUPTI/lib64/libcupti.so.*"), *toolkit.glob("lib64/libcupti.so.*")]
    for path in [*sorted(packaged), *sorted(installed), "libcupti.so.13", "libcupti.so"]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise OSError("CUPTI is not installed (pip install nvidia-cuda-cupti)")


class KernelCount:
    """Kernels that this process ran on the GPU. To be made before anything uses CUDA."""

    def __init__(self) -> None:
        self.cupti, self.seen = find_cupti(), 0
        self.buffers: Dict[int, ctypes.Array] = {}
        # CUPTI keeps the pointers.
        self.callbacks = Requested(self.requested), Completed(self.completed)
        self.call("cuptiActivityRegisterCallbacks", *self.callbacks)
        self.call("cuptiActivityEnable", CONCURRENT_KERNEL)

    def call(self, name: str, *arguments) -> None:
        status = getattr(self.cupti, name)(*arguments)
        if status:
            raise OSError(f"{name} returned {status}")

    def requested(self, buffer, size, most_records) -> None:
        memory = ctypes.create_string_buffer(BUFFER)
        address = ctypes.addressof(memory)
        self.buffers[address] = memory
        buffer[0], size[0], most_records[0] = address, BUFFER, 0

    def completed(self, _context, _stream, buffer, _size, valid) -> None:
        start, length, record = ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.c_void_p()
        # Until there is no other; every record begins with its kind.
        while self.cupti.cuptiActivityGetNextRecord(start, length, ctypes.byref(record)) == 0:
            self.seen += ctypes.c_int32.from_address(record.value).value == CONCURRENT_KERNEL
        del self.buffers[buffer]

    def of(self, run: Callable[[], object]) -> int:
        """How many kernels `run` starts, which waits for them."""
        self.call("cuptiActivityFlushAll", FORCED)
        before = self.seen
        run()
        self.call("cuptiActivityFlushAll", FORCED)
        return self.seen - before

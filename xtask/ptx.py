"""Compiles the CUDA kernels of ops/src to ops/ptx, or checks that this has been done.

Usage: ptx.py ROOT [--check] [--verbose]

NVRTC compiles each `kernel.cu` for each architecture, warnings being errors. ptxas then assembles the result; too
many spilled registers are an error too. Both come from wheels (requirements-ptx.txt): neither a GPU nor a toolkit is
needed.
"""

import concurrent.futures
import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile

ARCHITECTURES = ["75", "80", "90"]
# Bytes of spills that are no concern: what ptxas gives up for having more warps.
SPILLS = 128


def packages():
    import nvidia

    return pathlib.Path(list(nvidia.__path__)[0])


class Nvrtc:
    """The few functions of NVRTC that compiling takes."""

    def __init__(self):
        folder = packages() / "cuda_nvrtc" / "lib"
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            return self.library.nvrtcGetErrorString(status).decode()
        return None

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def compile(self, source, name, includes, architecture):
        """PTX of `source`."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        options = [f"--gpu-architecture=compute_{architecture}", "--std=c++17", f"--include-path={includes}"]
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        error = self.call("nvrtcCompileProgram", program, len(options), encoded)
        log = self.text(program, "ProgramLog").strip()
        if error or log:
            raise SystemExit(f"{name}, sm_{architecture}: {error or 'warnings'}\n{log}")
        # Comments are a third of the lines: markers around each instruction that the source spells out.
        ptx = re.sub(r"^\s*//.*\n", "", self.text(program, "PTX"), flags=re.MULTILINE).strip()
        ptx = f"// By `cargo xtask ptx` from ops/src/{name}.\n{ptx}\n"
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return ptx


def assemble(ptx, architecture):
    """What ptxas says of each kernel: (name, registers, bytes of spills)."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernel.ptx"
        source.write_text(ptx, "utf-8")
        ptxas = packages() / "cuda_nvcc" / "bin" / "ptxas"
        command = [ptxas, "-v", f"-arch=sm_{architecture}", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ptxas, sm_{architecture}:\n{done.stdout}{done.stderr}")
    spills = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    kernel = rf"Compiling entry function '(\w+)'.*?{spills}.*?Used (\d+) registers"
    found = re.findall(kernel, done.stderr, re.DOTALL)
    return [(name, int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found]


def build(job):
    path, root, architecture = job
    operator = path.parent.name
    # Paths in the text would make it differ from machine to machine.
    ptx = Nvrtc().compile(path.read_text("utf-8"), f"{operator}/kernel.cu", root / "ops/src/cuda", architecture)
    return f"{operator}.sm_{architecture}.ptx", ptx, assemble(ptx, architecture)


def main():
    root = pathlib.Path(sys.argv[1])
    check, verbose = "--check" in sys.argv, "--verbose" in sys.argv
    folder = root / "ops" / "ptx"
    folder.mkdir(exist_ok=True)
    sources = sorted(root.glob("ops/src/*/kernel.cu"))
    jobs = [(path, root, architecture) for path in sources for architecture in ARCHITECTURES]
    wrong = []
    # NVRTC compiles one program at a time in a process.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        made = list(pool.map(build, jobs))
    for name, ptx, kernels in made:
        for kernel, registers, spills in kernels:
            if verbose:
                print(f"{name}: {kernel}: {registers} registers, {spills} bytes of spills")
            if spills > SPILLS:
                wrong.append(f"{name}: {kernel} spills {spills} bytes")
        path = folder / name
        if not check:
            path.write_text(ptx, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != ptx:
            wrong.append(f"{path.relative_to(root)} is not what the sources give: run `cargo xtask ptx`")
    for path in sorted(folder.glob("*.ptx")):
        if path.name not in {name for name, _, _ in made}:
            wrong.append(f"{path.relative_to(root)} has no source")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(made)} files of PTX are {'up to date' if check else 'written'}")


if __name__ == "__main__":
    main()

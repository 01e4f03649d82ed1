"""Packs the GPU check for a machine that has a GPU, CUDA's libraries, Python and numpy, but no network.

Usage: gpu_pack.py ROOT PROGRAM LIBRARY DIR [--python 3.12]

DIR gets the program, the library, the script with its models, ONNX Runtime in pieces, and run.sh, which joins the
pieces and hands its arguments to the script. No file is larger than 60 MB. CUDA 13 with cuBLAS and cuDNN 9 is not packed.

With SM=90 (or another compute capability) in the environment, ONNX Runtime's machine code for all other GPUs is
blanked: less than half remains, and it runs on that GPU alone.
"""
import argparse
import lzma
import mmap
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile

PIECE = 50_000_000
# In the wheels, and not needed.
LEFT_OUT = ("providers_tensorrt.so", "onnxruntime/transformers/", "onnxruntime/quantization/", "onnxruntime/tools/",
            "onnxruntime/datasets/", "onnxruntime/backend/", "/include/", "nvperf", "pcsampling", "checkpoint")

RUN = """\
#!/bin/sh
# Runs the GPU check with what lies beside this file: run.sh [ARGUMENT...]. SITE: where ONNX Runtime is unpacked to.
set -e
here=$(cd "$(dirname "$0")" && pwd)
site=${SITE:-/tmp/vitrim-onnxruntime}
if [ ! -e "$site/complete" ]; then
    mkdir -p "$site"
    cat "$here"/onnxruntime.tar.xz.* | python3 -c '
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])' "$site"
    touch "$site/complete"
fi
chmod +x "$here/vitrim"
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 exec python3 "$here/python/gpu_check.py" \\
    --vitrim "$here/vitrim" --ops "$here/libvitrim_ops.so" --models "$here/zoo" "$@"
"""


class Pieces:
    """A file that is written as files NAME.00, NAME.01, and so on."""

    def __init__(self, path):
        self.path, self.count, self.file = path, 0, None

    def write(self, data):
        for start in range(0, len(data), 1 << 16):
            if self.file is None or self.file.tell() + (1 << 16) > PIECE:
                self.close()
                self.file = open(f"{self.path}.{self.count:02}", "wb")
                self.count += 1
            self.file.write(data[start : start + (1 << 16)])
        return len(data)

    def close(self):
        if self.file:
            self.file.close()


def blank_others(library, capability):
    """Blanks the machine code for other GPUs than those of `capability`; returns how many bytes that was.

    Machine code lies in containers: magic number, version, length of the header, length of what follows; then entries:
    kind (2: machine code), version, length of the header, length of the body, and at 28 the compute capability."""
    blanked = 0
    with open(library, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        at = data.find(b"\x50\xed\x55\xba")
        while at >= 0:
            version, header, length = struct.unpack_from("<HHQ", data, at + 4)
            entry, end = at + header, at + header + length
            # Else the four bytes are there by chance.
            if version == 1 and header == 16 and end <= len(data):
                while entry + 64 <= end:
                    kind, _, header, length = struct.unpack_from("<HHIQ", data, entry)
                    (of,) = struct.unpack_from("<I", data, entry + 28)
                    body = entry + header
                    if not header or body + length > end:
                        break
                    if kind == 2 and of != capability:
                        data[body : body + length] = bytes(length)
                        blanked += length
                    entry = body + length
            at = data.find(b"\x50\xed\x55\xba", at + 4)
    return blanked


def pack_packages(requirements, python, folder):
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(17, 29)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                        "--implementation=cp", f"--python-version={python}", *platforms, "--dest", work, *requirements],
                       check=True)
        for wheel in work.glob("*.whl"):
            shutil.unpack_archive(wheel, work / "site", "zip")
        if "SM" in os.environ:
            cuda = work / "site/onnxruntime/capi/libonnxruntime_providers_cuda.so"
            blanked = blank_others(cuda, int(os.environ["SM"]))
            print(f"blanked {blanked / 1e6:.0f} MB of code for other GPUs than sm_{os.environ['SM']}")
        pieces = Pieces(folder / "onnxruntime.tar.xz")
        with lzma.open(pieces, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for path in sorted((work / "site").rglob("*")):
                name = str(path.relative_to(work / "site"))
                if path.is_file() and not any(word in name for word in LEFT_OUT):
                    tar.add(path, name)
        pieces.close()


def main():
    parser = argparse.ArgumentParser(description="Pack the GPU check for a machine without network.")
    parser.add_argument("paths", nargs=4, type=pathlib.Path, metavar=("ROOT", "PROGRAM", "LIBRARY", "DIR"))
    parser.add_argument("--python", default="3.12", help="the target's version")
    arguments = parser.parse_args()
    root, program, library, folder = arguments.paths
    folder.mkdir(parents=True, exist_ok=True)
    for path, name in ((program, "vitrim"), (library, "libvitrim_ops.so")):
        subprocess.run(["strip", "-o", folder / name, path], check=True)
    scripts = root / "tests/python"
    shutil.copytree(scripts / "gpu", folder / "python/gpu", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__*__"))
    shutil.copy(scripts / "gpu_check.py", folder / "python")
    shutil.copytree(root / "fixtures/zoo", folder / "zoo", dirs_exist_ok=True)
    # The target has numpy, and what the extras would bring.
    lines = (scripts / "requirements-gpu.txt").read_text().splitlines()
    requirements = [re.sub(r"\[.*\]", "", line) for line in lines if not line.startswith(("#", "numpy"))]
    pack_packages(requirements, arguments.python, folder)
    (folder / "run.sh").write_text(RUN)
    (folder / "run.sh").chmod(0o755)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size > 1_000_000:
            print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""`python nvrtc.py FILE.cu CUBIN` compiles device code for Volta with NVRTC 12, the last that can.

Needs libnvrtc.so.12 alone: of a CUDA 12 toolkit, of the wheel nvidia-cuda-nvrtc-cu12, or where $NVRTC says. Prints what
ptxas says of registers and spills. Uses nothing of this project but its sources.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STANDARD = ("algorithm", "cstddef", "cstdint", "stddef.h", "stdint.h", "type_traits")  # std.h stands for each of them
OPTIONS = ("-arch=sm_70", "-std=c++17", "-default-device", "-DWOG_VOLTA", "-diag-suppress=1097", "--ptxas-options=-v")
MISSING = (
    "libnvrtc.so.12 was not found. NVRTC 12 is the last that compiles for Volta: pip install nvidia-cuda-nvrtc-cu12, "
    "or set NVRTC to the library of a CUDA 12 toolkit"
)


def find() -> ctypes.CDLL:
    names = [os.environ.get("NVRTC", "")]
    spec = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvrtc")
    names += [f"{folder}/lib/libnvrtc.so.12" for folder in (spec.submodule_search_locations or ())] if spec else []
    for name in (*names, "libnvrtc.so.12", "/usr/local/cuda-12/lib64/libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name) if name else ctypes.CDLL("libnvrtc.so.12")
        except OSError:
            continue
    raise SystemExit(MISSING)


def compile_file(source: Path, *options: str) -> tuple[bytes, str]:
    """A cubin, and what the compilers said."""
    nvrtc, program = find(), ctypes.c_void_p()

    def call(function: str, *arguments: object) -> int:
        return int(getattr(nvrtc, function)(*arguments))

    def text(size: str, get: str) -> bytes:
        count = ctypes.c_size_t()
        call(size, program, ctypes.byref(count))
        buffer = ctypes.create_string_buffer(count.value)
        call(get, program, buffer)
        return buffer.raw

    count, standard = len(STANDARD), (HERE / "std.h").read_bytes()
    headers = (ctypes.c_char_p * count)(*[standard] * count)
    names = (ctypes.c_char_p * count)(*(name.encode() for name in STANDARD))
    code = source.read_bytes()
    if call("nvrtcCreateProgram", ctypes.byref(program), code, str(source).encode(), count, headers, names):
        raise SystemExit("nvrtcCreateProgram failed")
    folders = (f"-I{source.parent}", f"-I{HERE.parent / 'runtime' / 'gpu'}")
    given = [option.encode() for option in (*OPTIONS, *folders, *options)]
    failed = call("nvrtcCompileProgram", program, len(given), (ctypes.c_char_p * len(given))(*given))
    log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
    if failed:
        raise SystemExit(f"{source} does not compile:\n{log}")
    return text("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log


if __name__ == "__main__":
    cubin, said = compile_file(Path(sys.argv[1]), *sys.argv[3:])
    Path(sys.argv[2]).write_bytes(cubin)
    print(said)

"""`python nvrtc.py FILE.cu OUT.cpp` compiles device code for Volta with NVRTC 12, the last that can, into C++ to link.

Needs libnvrtc.so.12 alone: where $NVRTC says, of the wheel nvidia-cuda-nvrtc-cu12, or of a CUDA 12 toolkit. Prints what
the compilers say of registers and spills.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STANDARD = ("algorithm", "cstddef", "cstdint", "stddef.h", "stdint.h", "type_traits")  # std.h stands for each of them
OPTIONS = ("-arch=sm_70", "-std=c++20", "-default-device", "-DWOG_VOLTA", "-diag-suppress=1097", "--ptxas-options=-v")
MISSING = (
    "libnvrtc.so.12 was not found. NVRTC 12 is the last that compiles for Volta: pip install nvidia-cuda-nvrtc-cu12, "
    "or set NVRTC to the libnvrtc.so.12 of a CUDA 12 toolkit"
)
KERNEL = re.compile(r"Compiling entry function '(\w+)'")
SOURCE = """// Written by plugins/sm70/nvrtc.py.
namespace driver {{

extern unsigned char const image[];
extern char const* const kernels[];
extern int const kernel_count;

alignas(64) unsigned char const image[] = {{
{image}
}};
char const* const kernels[] = {{{names}}};
int const kernel_count = {count};

}}  // namespace driver
"""


def candidates() -> list[str]:
    if given := os.environ.get("NVRTC"):
        return [given]
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    wheels = (spec.submodule_search_locations or ()) if spec else ()
    return [*(f"{folder}/lib/libnvrtc.so.12" for folder in wheels), "libnvrtc.so.12"]


def find() -> ctypes.CDLL:
    for name in candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit(MISSING)


def strings(texts: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*texts)


def compile_file(source: Path, *options: str, result: str = "CUBIN") -> tuple[bytes, str]:
    """What NVRTC makes of a file, a CUBIN or PTX, and what the compilers said."""
    nvrtc, program = find(), ctypes.c_void_p()

    def take(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    headers = strings([(HERE / "std.h").read_bytes()] * len(STANDARD))
    names = strings([name.encode() for name in STANDARD])
    code, name = source.read_bytes(), str(source).encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, name, len(STANDARD), headers, names):
        raise SystemExit("NVRTC does not start")
    folders = (f"-I{source.parent}", f"-I{HERE.parent / 'runtime' / 'gpu'}")
    given = strings([option.encode() for option in (*OPTIONS, *folders, *options)])
    failed = nvrtc.nvrtcCompileProgram(program, len(given), given)
    said = take("ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise SystemExit(f"{source} does not compile:\n{said}")
    return take(result), said


def render(image: bytes, names: list[str]) -> str:
    rows = (",".join(map(str, image[i : i + 64])) for i in range(0, len(image), 64))
    quoted = ", ".join(f'"{name}"' for name in names)
    return SOURCE.format(image=",\n".join(rows), names=quoted, count=len(names))


def main(source: str, out: str) -> None:
    image, said = compile_file(Path(source))
    print(said)
    Path(out).write_text(render(image, KERNEL.findall(said)))


if __name__ == "__main__":
    main(*sys.argv[1:])

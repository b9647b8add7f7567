"""The kernels' C interface through ctypes, and the CPU emulator as one place to run it."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantrt.plugins.schema import Tolerance
from instantrt.plugins.weight_only_gemm.semantics import exact
from instantrt.tools.gpu.library import PTR, Library
from tests.plugins.cases import BF16, Problem
from tests.plugins.within import assert_within

Array = NDArray[Any]
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "plugins" / "weight_only_gemm"
EMULATOR = Path(__file__).parent / "emulator"
# cmake, ninja and nvcc may be Python packages of this environment
TOOLS = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
WITH_TOOLS = {**os.environ, "PATH": TOOLS}


def version(tool: str) -> str:
    """What a compiler says of itself."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True, env=WITH_TOOLS).stdout


def cuda_wheels() -> Path | None:
    """Where nvidia-cuda-nvcc and its companions are installed, if they are."""
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    return Path(next(iter(spec.submodule_search_locations or ()))) if spec else None


def cuda_headers() -> Path:
    found = [Path("/usr/local/cuda/include")]
    if nvcc := shutil.which("nvcc"):
        found.insert(0, Path(nvcc).resolve().parents[1] / "include")
    if wheels := cuda_wheels():
        found.append(wheels / "include")
    for folder in found:
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    pytest.skip("no CUDA headers: install nvidia-cuda-runtime or a CUDA toolkit")


KERNELS = ("dense.cu", "epilogue.cu", "hopper.cu", "plain.cu", "rows.cu", "stream.cu", "tiles.cu", "turing.cu")
VOLTA = ("volta.cu", "volta.cpp")


def compiled_files() -> list[Path]:
    """All of plugins/ that a compiler reads, or says how: what is Python there makes no other library."""
    found = (ROOT / "plugins").rglob("*")
    return [path for path in found if path.suffix in (".cu", ".h", ".cpp", ".map") or path.name == "CMakeLists.txt"]


def c_problem(
    p: Problem, sm: int, sm_count: int = 132, wide: bool = False, plain: bool = False, library: bool = False
) -> dict[str, int]:
    m, k = p.x.shape
    return {
        "m": m, "n": p.affine.shape[1] // 2, "k": k, **p.attrs, "type": int(p.x.dtype == BF16),
        "sm": sm, "sm_count": sm_count, "wide": int(wide), "plain": int(plain), "library": int(library),
    }  # fmt: skip


POISON, GUARD = 0xA5, 256


class Guarded:
    """Memory that ends at a page which may not be touched, and starts after bytes that must not change."""

    def __init__(self, content: bytes | int) -> None:
        size = content if isinstance(content, int) else len(content)
        page = mmap.PAGESIZE
        pages = -(-(size + GUARD) // page)
        self._map = mmap.mmap(-1, (pages + 1) * page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if ctypes.CDLL(None).mprotect(PTR(self._base + pages * page), ctypes.c_size_t(page), 0):
            raise OSError("mprotect failed")
        # 16-byte alignment: sizes that are no multiple of 16 leave a few bytes before the page
        self.address = self._base + (pages * page - size) // 16 * 16
        self.size = size
        ctypes.memset(self._base, POISON, pages * page)
        if isinstance(content, bytes):
            ctypes.memmove(self.address, content, size)

    def read(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        return np.frombuffer(ctypes.string_at(self.address, self.size), dtype).reshape(shape)

    def intact(self) -> bool:
        before = self.address - self._base
        return ctypes.string_at(self._base, before) == bytes([POISON]) * before


@dataclass(frozen=True)
class Emulated:
    """Kernels compiled by a C++ compiler against the emulator and run on this CPU."""

    library: Library
    sm: int

    def run(
        self,
        p: Problem,
        wide: bool = False,
        plain: bool = False,
        sm_count: int = 132,
        seed: int = 1,
        library: bool = False,
        row: str = "",
        splits: int = 0,
    ) -> Array:
        problem = {**c_problem(p, self.sm, sm_count, wide, plain, library), "splits": splits}
        if row:
            problem["row"] = self.library.rows().index(row) + 1
        os.environ["EMULATOR_SEED"] = str(seed)
        shape = (p.x.shape[0], p.affine.shape[1] // 2 // (1 + p.attrs["gated"]))
        dtype = np.dtype(np.float32) if wide else p.x.dtype
        memory = {
            "x": Guarded(p.x.tobytes()),
            "codes": Guarded(p.codes.tobytes()),
            "affine": Guarded(p.affine.tobytes()),
            "y": Guarded(int(np.prod(shape)) * dtype.itemsize),
            "workspace": Guarded(max(self.library.choose(**problem).workspace, 16)),
        }
        if p.bias is not None:
            memory["bias"] = Guarded(p.bias.tobytes())
        self.library.launch(problem, {name: block.address for name, block in memory.items()})
        if touched := [name for name, block in memory.items() if not block.intact()]:
            raise AssertionError(f"wrote before the start of {touched}")
        return memory["y"].read(dtype, shape)


def problem(**changes: int) -> dict[str, int]:
    """One layer of 4096 x 4096 on Hopper, but for `changes`, as the library is asked for a plan."""
    base = {
        "m": 1, "n": 4096, "k": 4096, "group": 128, "bits": 4, "type": 0, "activation": 0, "gated": 0,
        "activation_bits": 16, "sm": 90, "sm_count": 132,
    }  # fmt: skip
    return {**base, **changes}


WIDE = Tolerance(2e-5, 1e-5)  # float32 outputs: the arithmetic before the output's rounding


def check(kernels: Emulated, p: Problem, tolerance: Tolerance = WIDE, **options: Any) -> Array:
    """What `kernels` make of `p`, which is within `tolerance` of float64."""
    y = kernels.run(p, wide=tolerance is WIDE, **options)
    assert_within(y, *exact(p.x, p.codes, p.affine, p.bias, p.attributes()), tolerance)
    return y


def other_in_batches(kernels: Emulated, p: Problem, sm_count: int) -> list[int]:
    """The numbers of rows with which the last rows of y have other bits than with all rows of `p`."""
    every = check(kernels, p, sm_count=sm_count)
    batches = {m: kernels.run(replace(p, x=p.x[-m:]), wide=True, sm_count=sm_count) for m in (1, 7, 16, 33, 100)}
    return [m for m, y in batches.items() if not np.array_equal(y, every[-m:])]


def build_cublaslt(folder: Path) -> Path:
    """A stand-in for cuBLASLt whose memory is this CPU's."""
    out = folder / "libcublasLt.so.13"
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", f"-Wl,-soname,{out.name}"]
    subprocess.run([*command, str(EMULATOR / "cublaslt.cpp"), "-o", str(out)], check=True)
    return out


def build_emulators(folder: Path, sms: tuple[int, ...]) -> dict[int, Path]:
    """Side by side: a build of the kernels for the CPU, as each of these SMs sees them."""
    command = ["g++", "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-Wall", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-Wno-psabi", "-I", str(EMULATOR), "-x", "c++"]

    def options(sm: int) -> list[str]:
        names, library = (VOLTA, ["-DWOG_VOLTA"]) if sm == 70 else (KERNELS, [])
        return [f"-DDEVICE_SM={sm}", *library, *(str(SOURCE / name) for name in (*names, "choices.cpp", "config.cpp"))]

    built = {sm: folder / f"emulated_{sm}.so" for sm in sms}
    running = [subprocess.Popen([*command, *options(sm), "-o", str(out)]) for sm, out in built.items()]
    codes = [process.wait() for process in running]
    if any(codes):
        raise AssertionError("the emulator does not compile; the compiler's message is above")
    return built

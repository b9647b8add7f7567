"""The kernels' C interface through ctypes, and the CPU emulator as one place to run it."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.cases import BF16, Problem

Array = NDArray[Any]
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "plugins" / "weight_only_gemm"
KERNELS = ("gemm.cu", "int8.cu", "plain.cu")


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I32, I64, PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
CProblem = structure(
    "CProblem", m=I64, n=I32, k=I32, group=I32, bits=I32, type=I32, activation=I32, gated=I32, activation_bits=I32,
    sm=I32, sm_count=I32, wide=I32, plain=I32,
)  # fmt: skip
CTensors = structure("CTensors", x=PTR, codes=PTR, affine=PTR, bias=PTR, y=PTR, workspace=PTR)
CPlan = structure(
    "CPlan", kernel=ctypes.c_char_p, row=I32, splits=I32, grid_m=I32, grid_n=I32, threads=I32, shared=I32, workspace=I64
)


class RefusedError(Exception):
    """The C function returned an error; the message is its own."""


@dataclass(frozen=True)
class Plan:
    kernel: str
    splits: int
    grid_m: int
    grid_n: int
    threads: int
    shared: int
    workspace: int


class Library:
    """wog_choose, wog_workspace and wog_launch of one shared library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._c.wog_workspace.restype = I64

    def _call(self, function: str, *args: Any) -> None:
        message = ctypes.create_string_buffer(256)
        if getattr(self._c, function)(*args, message, ctypes.c_size_t(256)):
            raise RefusedError(message.value.decode())

    def choose(self, **problem: int) -> Plan:
        plan = CPlan()
        self._call("wog_choose", ctypes.byref(CProblem(**problem)), ctypes.byref(plan))
        return Plan(plan.kernel.decode(), *(getattr(plan, f) for f in list(Plan.__annotations__)[1:]))

    def workspace(self, **problem: int) -> int:
        return int(self._c.wog_workspace(ctypes.byref(CProblem(**problem))))

    def launch(self, problem: dict[str, int], tensors: dict[str, int], stream: int = 0) -> None:
        c = CTensors(**{k: v or None for k, v in tensors.items()})
        self._call("wog_launch", ctypes.byref(CProblem(**problem)), ctypes.byref(c), PTR(stream))


def c_problem(p: Problem, sm: int, sm_count: int = 132, wide: bool = False, plain: bool = False) -> dict[str, int]:
    m, k = p.x.shape
    return {
        "m": m, "n": p.affine.shape[1] // 2, "k": k, **p.attrs, "type": int(p.x.dtype == BF16),
        "sm": sm, "sm_count": sm_count, "wide": int(wide), "plain": int(plain),
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

    def run(self, p: Problem, wide: bool = False, plain: bool = False, sm_count: int = 132, seed: int = 1) -> Array:
        problem = c_problem(p, self.sm, sm_count, wide, plain)
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


def build_emulators(folder: Path, sms: tuple[int, ...]) -> dict[int, Path]:
    """Side by side: a build of the kernels for the CPU, as each of these SMs sees them."""
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-I", str(Path(__file__).parent / "emulator"), "-x", "c++"]
    sources = [str(SOURCE / name) for name in (*KERNELS, "config.cpp")]
    built = {sm: folder / f"emulated_{sm}.so" for sm in sms}
    running = [subprocess.Popen([*command, f"-DDEVICE_SM={sm}", *sources, "-o", str(out)]) for sm, out in built.items()]
    codes = [process.wait() for process in running]
    if any(codes):
        raise AssertionError("the emulator does not compile; the compiler's message is above")
    return built

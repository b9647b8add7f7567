"""Volta's library run in a process whose only CUDA driver is ours: `python -m tests.plugins.driver_cases LIBRARY`."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from instantrt.tools.gpu.library import Library
from tests.plugins.cases import Case
from tests.plugins.kernels import Emulated, c_problem, check


def run_cases(library: Path) -> None:
    kernels = Emulated(Library(library), 70)
    sm, count = ctypes.c_int32(), ctypes.c_int32()
    kernels.library._call("wog_device", ctypes.byref(sm), ctypes.byref(count))  # as a context does before it launches
    assert (sm.value, count.value) == (70, 80)
    for m, plain in ((3, False), (12, False), (20, False), (130, False), (3, True)):
        for bits in (4, 8):
            p = Case(m, 144, 1120, bits, 160, bias=True).make()
            check(kernels, p, plain=plain, sm_count=80)
            print(kernels.library.choose(**c_problem(p, 70, 80, plain=plain)).kernel)


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))

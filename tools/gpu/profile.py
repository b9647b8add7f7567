"""Launches of a few kernels for Nsight Compute, each once and cold: a child of instantrt.tools.gpu.watch, under ncu.

    ncu ... python -m instantrt.tools.gpu.profile LIBRARY READER CASE...      cases: "int4 g128, qwen2-7b o m=16"

Only what lies between cudaProfilerStart and cudaProfilerStop is looked at. The first kernel of each such range is an
empty one whose blocks number the case, counted from 1 as they stand in CASES: what follows in the report is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from instantrt.tools.gpu import gemm
from instantrt.tools.gpu.bench import STORED
from instantrt.tools.gpu.gemm import Gemm, random_weight
from instantrt.tools.gpu.layers import LAYERS, parse_case
from instantrt.tools.gpu.library import Library
from instantrt.tools.gpu.ncu import CASES
from instantrt.tools.gpu.roofs import kernel
from instantrt.tools.gpu.watch import emit

OURS = {"int4 g128": ("int4", 16), "int8": ("int8", 16), "a8w8": ("int8", 8)}  # weights, bits of activations


def prepare(library: Library, name: str) -> Callable[[], object]:
    """A call of what a case names. Memory is what it needs and little more: Nsight Compute saves and restores it."""
    who, _, place = name.partition(", ")
    layer, m = parse_case(place)
    n, k = LAYERS[layer]
    x = torch.randn((m, k), device=gemm.DEVICE).half()
    if who not in OURS:
        weight = torch.randn((n, k), device=gemm.DEVICE, dtype=x.dtype)
        y = torch.empty((m, n), device=gemm.DEVICE, dtype=x.dtype)
        return lambda: torch.matmul(x, weight.T, out=y)
    made, activation_bits = OURS[who]
    bits, group, dtype, zeros = STORED[made]
    w = random_weight(n, k, bits, group or k, dtype, zeros)
    w = replace(w, natural=torch.empty((1, 1), dtype=torch.uint8, device=gemm.DEVICE).expand(n, k))
    return Gemm(library, x, w, {"activation_bits": activation_bits})


def profiled(library: Library, reader: Path, name: str) -> None:
    call, number = prepare(library, name), kernel(reader, "empty", CASES.index(name) + 1)
    for each in (number, call, call):  # code is loaded, and cuBLAS has chosen
        each()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    number()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def main() -> None:
    path, reader, *cases = sys.argv[1:]
    library = Library(Path(path))
    for name in cases:
        emit(start=name)
        try:
            profiled(library, Path(reader), name)
        except Exception as error:
            emit(end=name, outcome="failed", message=f"{type(error).__name__}: {error}"[:300])
            torch.cuda.synchronize()  # an error inside a kernel ends this process
        else:
            emit(end=name, outcome="passed")


if __name__ == "__main__":
    main()

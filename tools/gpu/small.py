"""A small launch of every row of the table, checked: `small fresh|poisoned LIBRARY CASE...`

Without torch, so that it starts at once and compute-sanitizer watches our kernels alone; the truth is NumPy's. A case
is its own name: the row of the table, then the fields of the C problem. It runs as a child of tools/gpu/watch.py.
`fresh` leaves output and workspace as the driver hands them out, which initcheck needs; `poisoned` fills them.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import exact
from instantrt.tools.gpu.library import Library
from instantrt.tools.gpu.watch import emit

Array = npt.NDArray[Any]
N, K = 144, 4128  # a tile and a strip; 64 k and a half, 129 times 32
GROUPS = (32, 96, 4128)
ROWS = (3, 12, 20, 40, 70, 130, 600)  # of x: the fewest and the most that each kernel's tiles take
SPLITS = (1, 2, 4)
COMMON = {"n": N, "k": K, "wide": 1}
DENSE = {"rounded_weights": 1, "library": 1}
WIDTHS = ((4, 16), (8, 16), (4, 8), (8, 8))  # bits of codes and of activations: every pair
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
EXACT, ROUNDED = 2e-5, 1e-3  # relative error before the output's rounding; with weights rounded to 16 bits
POISON = 0xFF  # of every byte: NaN in all types
LOST_GPU = 3


def every_case(library: Library, device: dict[str, int], types: tuple[int, ...] = (0, 1)) -> list[str]:
    """Each row of the table that this device can run, in each format, type, kind of group and way to split."""
    found: dict[str, None] = {}
    for (bits, activation_bits), type_, group, m, plain in product(WIDTHS, types, GROUPS, ROWS, (0, 1)):
        fields = {**device, "m": m, "bits": bits, "activation_bits": activation_bits, "type": type_, "group": group}
        for plan in library.plans(SPLITS, **COMMON, **fields, plain=plain, **DENSE):
            more = {"plain": plain, "row": plan.row + 1, "splits": plan.splits}
            found[name_of(plan.kernel, {**fields, **more, **(DENSE if plan.kernel == "dense" else {})})] = None
    return sorted(found)


def few_cases(cases: list[str]) -> list[str]:
    """For a sanitizer: fp16, one kind of group, K whole or in two; the fewest and the most rows of each kernel."""
    chosen: dict[tuple[str, ...], list[str]] = {}
    ragged = {case.split()[0] for case in cases if f" group={GROUPS[1]} " in case}
    for case in cases:
        kernel, problem = parse(case)
        group = GROUPS[1] if kernel in ragged else K  # some kernels take whole rows alone
        if problem["type"] == 0 and problem["group"] == group and problem["splits"] <= 2 and problem["m"] < 200:
            chosen.setdefault((kernel, *(str(problem[f]) for f in ("bits", "activation_bits", "splits"))), []).append(
                case
            )
    by_rows = (sorted(same, key=lambda case: parse(case)[1]["m"]) for same in chosen.values())
    return sorted({case for same in by_rows for case in (same[0], same[-1])})


def name_of(kernel: str, problem: dict[str, int]) -> str:
    return " ".join([kernel, *(f"{field}={value}" for field, value in problem.items() if value)])


def parse(case: str) -> tuple[str, dict[str, int]]:
    kernel, *fields = case.split()
    given = {name: int(value) for name, _, value in (field.partition("=") for field in fields)}
    return kernel, {"type": 0, **COMMON, **given}


@cache
def weights(bits: int, group: int, type_: int) -> tuple[Array, Array, Array]:
    """codes, affine and bias."""
    rng, top = np.random.default_rng([bits, group]), 2**bits - 1
    codes = layout.pack(rng.integers(0, top + 1, (N, K), np.uint8), bits)
    scale = rng.uniform(0.2, 1.5, (K // group, N)) / (top * K**0.5)
    zero = rng.uniform(0.3 * top, 0.7 * top, scale.shape)
    affine = np.stack((scale, zero), axis=-1).reshape(len(scale), -1)
    return codes, affine.astype(DTYPES[type_]), rng.standard_normal(N).astype(DTYPES[type_])


@lru_cache(maxsize=1)
def rows_and_truth(m: int, type_: int, bits: int, group: int, activation_bits: int) -> tuple[Array, Array]:
    """x and the exact result. Cases that differ in how they are computed follow each other."""
    x = np.random.default_rng(m).standard_normal((m, K)).astype(DTYPES[type_])
    attrs = OP.attributes({"bits": bits, "group": group, "activation_bits": activation_bits})
    return x, exact(x.astype(np.float32), *weights(bits, group, type_), attrs)[0]


class Lost(Exception):  # noqa: N818 -- what became of the GPU
    """A CUDA call failed: in this process every later one will, too."""


def run(library: Library, device: Device, problem: dict[str, int], poisoned: bool) -> Array:
    """The relative errors of one launch, of the whole and of its worst row of x."""
    codes, affine, bias = weights(problem["bits"], problem["group"], problem["type"])
    x, truth = rows_and_truth(*(problem[f] for f in ("m", "type", "bits", "group", "activation_bits")))
    y = np.empty(truth.shape, np.float32)
    inputs = {"x": x, "codes": codes, "affine": affine, "bias": bias}
    sizes = {name: array.nbytes for name, array in inputs.items()}
    sizes |= {"y": y.nbytes, "workspace": max(library.choose(**problem).workspace, 16)}
    try:
        memory = {name: device.allocate(size) for name, size in sizes.items()}
        for name, array in inputs.items():
            device.upload(memory[name], array)
        for name in ("y", "workspace") if poisoned else ():
            fill = ctypes.c_uint64(memory[name]), ctypes.c_ubyte(POISON), ctypes.c_size_t(sizes[name])
            device.call("cuMemsetD8Async", *fill, device.stream)
        library.launch(problem, memory, device.stream.value or 0)
        device.download(y, memory["y"])
        for address in memory.values():
            device.free(address)
    except RuntimeError as error:
        raise Lost(str(error)) from None
    off, size = (np.linalg.norm(a, axis=1) for a in (y - truth, truth))
    return np.append(off / size, np.linalg.norm(off) / np.linalg.norm(size))


def check(library: Library, device: Device, case: str, poisoned: bool) -> None:
    kernel, problem = parse(case)
    if kernel == "dense" and not library.has_cublaslt():
        emit(end=case, outcome="skipped", message="no cuBLASLt that serves this GPU")
        return
    worst, allowed = run(library, device, problem, poisoned).max(), ROUNDED if kernel == "dense" else EXACT
    if worst <= allowed:
        emit(end=case, outcome="passed", data=float(worst))
    else:  # NaN, too
        emit(end=case, outcome="failed", message=f"relative error {worst:.3g}, allowed {allowed:g}")


def main() -> None:
    memory, path, *cases = sys.argv[1:]
    library, device = Library(Path(path)), Device(0)
    for case in cases:
        emit(start=case)
        try:
            check(library, device, case, memory == "poisoned")
        except Exception as error:
            lost = isinstance(error, Lost)
            emit(end=case, outcome="crashed" if lost else "failed", message=f"{type(error).__name__}: {error}")
            if lost:
                sys.exit(LOST_GPU)


if __name__ == "__main__":
    main()

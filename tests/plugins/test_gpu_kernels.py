"""The kernels on a real GPU, against float64: sizes, awkward data, determinism, graphs, streams, code of older SMs.

INSTANTRT_KERNELS names libinstantrt_kernels.so; INSTANTRT_KERNELS_75 and _80 name builds of what compute_75 and
compute_80 get, compiled for whatever GPU is here. `instantrt gpu-check` builds all three, tries
every row of the table with small sizes first, and names those that hung in INSTANTRT_HUNG_ROWS. Each case is one m, so
that a kernel that hangs here is named with its sizes.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from instantrt.plugins.schema import DType
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.tools.gpu.gemm import Gemm, HungRowError, Weight, device_numbers, random_weight
from instantrt.tools.gpu.library import Library
from instantrt.tools.gpu.small import WIDTHS
from tests.plugins.truth import check

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip(
        "needs an NVIDIA GPU: run `instantrt gpu-check` on a machine that has one",
        allow_module_level=True,
    )

F16, BF16 = torch.float16, torch.bfloat16
ROUNDED = {F16: OP.tolerance[DType.F16], BF16: OP.tolerance[DType.BF16]}
M = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 2048, 4097)
SHAPES = [  # n, k, group
    (16, 64, 32), (48, 128, 64), (128, 192, 32), (144, 3584, 128), (3584, 3584, 3584), (4608, 4096, 128),
    (18944, 3584, 64), (3584, 18944, 128),
]  # fmt: skip
SIZES = [(*shape, m) for shape in SHAPES for m in (M if shape[0] * shape[1] < 40_000_000 else M[::3])]

SHORT = [(16, 32, 32), (272, 160, 32), (144, 192, 64), (80, 2080, 2080), (400, 1120, 160)]

every_format = pytest.mark.parametrize("format_", WIDTHS, ids=[f"a{a}w{w}" for w, a in WIDTHS])


def library(sm: str = "") -> Library:
    name = f"INSTANTRT_KERNELS{sm}"
    if name not in os.environ:
        pytest.skip(f"{name} is not set: `instantrt gpu-check` builds the library and sets it")
    return Library(Path(os.environ[name]))


def rows(m: int, k: int, dtype: torch.dtype, data: str = "normal") -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(m * k)
    x = torch.randn((m, k), device="cuda", generator=generator)
    if data == "outliers":
        x[:, 7::61] *= 30
    elif data == "shifted":
        x += 0.5
    elif data == "zero_rows":
        x[::2] = 0
    return x.to(dtype)


@lru_cache(maxsize=2)
def weight_of(*arguments: Any, **options: Any) -> Weight:
    """random_weight, kept for the next case; not to be changed."""
    return random_weight(*arguments, **options)


def prepared(x: torch.Tensor, weight: Weight, options: dict[str, int], sm: str = "") -> Gemm:
    try:
        return Gemm(library(sm), x, weight, options)
    except HungRowError as error:
        pytest.skip(str(error))


# The m of a case varies fastest, so that cases of one weight follow each other.
def for_each_m(*values: int) -> Any:
    return pytest.mark.parametrize("m", values)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
@pytest.mark.parametrize("dtype", [F16, BF16])
@every_format
def test_sizes(format_: tuple[int, int], dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    """Every M of every shape, in float32 (the arithmetic) and rounded (what users get)."""
    (n, k, group, m), (bits, activation_bits) = size, format_
    weight = weight_of(n, k, bits, group, dtype, bias=True)
    x, options = rows(m, k, dtype), {"activation_bits": activation_bits}
    check(prepared(x, weight, {**options, "wide": 1}), 2e-5, 1e-5)
    check(prepared(x, weight, options), ROUNDED[dtype].frobenius, ROUNDED[dtype].element)


@for_each_m(5, 16, 40, 200)
@pytest.mark.parametrize("data", ["outliers", "shifted", "zero_rows"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@every_format
@pytest.mark.parametrize("zeros", ["float", "integer", "low", "high"])
def test_awkward_data(zeros: str, format_: tuple[int, int], dtype: torch.dtype, data: str, m: int) -> None:
    bits, activation_bits = format_
    weight = weight_of(144, 3584, bits, 128, dtype, zeros)
    options = {"activation_bits": activation_bits, "wide": 1}
    check(prepared(rows(m, 3584, dtype, data), weight, options), 2e-5, 1e-5)


@for_each_m(3, 12, 30, 100)
@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("gated", [0, 1])
@every_format
def test_epilogue(format_: tuple[int, int], gated: int, activation: int, m: int) -> None:
    weight = weight_of(288, 512, format_[0], 64, F16, bias=True)
    options = {"activation": activation, "gated": gated, "activation_bits": format_[1], "wide": 1}
    check(prepared(rows(m, 512, F16), weight, options), 2e-5, 1e-5)


@for_each_m(1, 16, 32, 64, 300)
@every_format
def test_same_bits_every_time_in_graphs_and_on_streams(format_: tuple[int, int], m: int) -> None:
    weight = weight_of(1024, 4096, format_[0], 128, F16)
    x, options = rows(m, 4096, F16), {"activation_bits": format_[1]}
    one, two = (prepared(x, weight, options) for _ in range(2))
    one()
    first = one.output().clone()
    for _ in range(5):
        one()
        assert torch.equal(one.output(), first)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        for gemm, stream in zip((one, two), streams, strict=True):
            with torch.cuda.stream(stream):
                gemm()
    assert torch.equal(one.output(), first)
    assert torch.equal(two.output(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two()
    two.y_memory[4096:-4096] = 0
    two.workspace[4096:-4096] = 0x5A
    graph.replay()
    assert torch.equal(two.output(), first)


RINGS = [
    "ring8", "ring8_narrow", "ring8_deep", "ring16", "ring16_deep", "ring8_ampere", "ring8_ampere_wide",
    "ring16_ampere", "ring16_ampere_wide", "int8_ring8", "int8_ring16", "int8_ring8_ampere", "int8_ring16_ampere",
    "ring32", "ring32_narrow", "ring64", "ring64_narrow", "ring32_ampere", "ring64_ampere", "ring64_ampere_narrow",
    "int8_ring32", "int8_ring32_ampere", "int8_ring64_ampere", "int8_ring64_ampere_narrow",
]  # fmt: skip
ROWS_OF_X = {"ring8": (1, 5), "ring16": (9, 16), "ring32": (17, 32), "ring64": (33, 64), "ring64_ampere": (130, 300)}


@for_each_m(6, 14, 28, 90)
@every_format
def test_a_bad_row_spoils_no_other(format_: tuple[int, int], m: int) -> None:
    weight, x = weight_of(256, 1024, format_[0], 128, F16), rows(m, 1024, F16)
    good, bad = prepared(x, weight, {"activation_bits": format_[1]}), x.clone()
    bad[3, 100], bad[1, 5] = float("nan"), float("inf")
    spoiled = prepared(bad, weight, {"activation_bits": format_[1]})
    good(), spoiled()
    others = [i for i in range(m) if i not in (1, 3)]
    assert torch.equal(good.output()[others], spoiled.output()[others])
    assert bool(spoiled.output()[3].isnan().all())


@pytest.mark.parametrize("row", RINGS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_ring_for_hopper(bits: int, row: str) -> None:
    """Every way to divide K, and few multiprocessors, so that blocks and clusters go from tile to tile."""
    if device_numbers()["sm"] != 90:
        pytest.skip("needs sm_90")
    many = next(m for part, m in list(ROWS_OF_X.items())[::-1] if part in row)
    for n, k, group in SHORT + SHAPES[3:5]:
        if group % 64 and row.endswith("_narrow") and row != "ring8_narrow":
            continue
        weight = random_weight(n, k, bits, group, F16, bias=True)
        for m, splits, count in product(many, (0, 2, 4, 8), (132, 8)):
            options = {"row": library().rows().index(row) + 1, "wide": 1, "splits": splits, "sm_count": count}
            options["activation_bits"] = 8 if "int8" in row else 16
            check(prepared(rows(m, k, F16), weight, options), 2e-5, 1e-5)


@pytest.mark.parametrize(
    "row", ["hopper128x128", "hopper128x128_sums", "hopper128x64", "int8_hopper128x128", "int8_hopper128x64"]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_row_for_hopper(bits: int, row: str) -> None:
    """Those that the table would not choose too: fewer stages than the ring, ragged tiles, groups of every kind."""
    if device_numbers()["sm"] != 90:
        pytest.skip("needs sm_90")
    options = {"row": library().rows().index(row) + 1, "activation_bits": 8 if "int8" in row else 16, "wide": 1}
    for n, k, group in SHORT + SHAPES[3:5]:
        weight = random_weight(n, k, bits, group, BF16, bias=True)
        for m in (33, 64, 65, 127, 300, 1000):
            check(prepared(rows(m, k, BF16), weight, options), 2e-5, 1e-5)


@pytest.mark.parametrize("row", ["hopper128x128", "hopper128x64", "int8_hopper128x128"])
@pytest.mark.parametrize("bits", [4, 8])
def test_consumers_that_take_turns_make_the_same_bits(bits: int, row: str) -> None:
    if device_numbers()["sm"] != 90:
        pytest.skip("needs sm_90")
    options = {"activation_bits": 8 if "int8" in row else 16, "wide": 1}
    for n, k, group in ((400, 1152, 128), (3584, 3584, 128), (3584, 3584, 256), (4608, 4096, 4096)):
        weight = random_weight(n, k, bits, group, F16, bias=True)
        for m, splits in product((40, 300, 1000), (1, 4)):
            pinned = ({"row": library().rows().index(name) + 1, "splits": splits} for name in (row, f"{row}_ordered"))
            pair = [prepared(rows(m, k, F16), weight, {**options, **each}) for each in pinned]
            assert torch.equal(*(check(each, 2e-5, 1e-5) for each in pair))


@every_format
def test_the_plain_kernel_agrees(format_: tuple[int, int]) -> None:
    weight = random_weight(144, 512, format_[0], 64, BF16, bias=True)
    options = {"activation_bits": format_[1], "wide": 1, "plain": 1}
    check(prepared(rows(9, 512, BF16), weight, options), 2e-5, 1e-5)


@for_each_m(1, 9, 20, 70, 130)
@pytest.mark.parametrize("sm", [75, 80])
@every_format
def test_code_of_older_gpus(format_: tuple[int, int], sm: int, m: int) -> None:
    weight = weight_of(272, 1120, format_[0], 160, F16, bias=True)
    options = {"activation_bits": format_[1], "wide": 1, "sm": sm}
    check(prepared(rows(m, 1120, F16), weight, options, f"_{sm}"), 2e-5, 1e-5)


@pytest.mark.parametrize("sm", ["", "_75", "_80"])
@every_format
def test_a_row_has_the_same_bits_in_any_batch(format_: tuple[int, int], sm: str) -> None:
    options = {"activation_bits": format_[1], "wide": 1, "batch_invariant": 1}
    options |= {"sm": int(sm[1:])} if sm else {}
    weight = weight_of(272, 3584, format_[0], 128, F16, bias=True)
    every = prepared(rows(600, 3584, F16), weight, options, sm)
    every()
    for m in (1, 7, 16, 33, 257):
        some = prepared(every.x[-m:], weight, options, sm)
        some()
        assert torch.equal(some.output(), every.output()[-m:])


@pytest.mark.parametrize("sm", [75, 80])
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_by_cublaslt(sm: int, bits: int) -> None:
    """The table of an older GPU, asked to round weights: their product, and nothing else rounded."""
    kernels, weight = library(f"_{sm}"), random_weight(272, 1120, bits, 160, F16, bias=True)
    if not kernels.has_cublaslt():
        pytest.skip("no libcublasLt.so.12 or .13 on the loader's path")
    options = {"rounded_weights": 1, "library": 1, "sm": sm, "wide": 1}
    gemm = prepared(rows(600, 1120, F16), weight, options, f"_{sm}")
    assert gemm.plan.kernel == "dense"
    gemm()
    assert weight.bias is not None
    truth = gemm.x.double() @ weight.dense(F16).double().T + weight.bias.double()
    assert float((gemm.output().double() - truth).norm()) <= 2e-5 * float(truth.norm())


def test_tolerance_bites() -> None:
    weight = random_weight(144, 512, 4, 64, F16)
    gemm = prepared(rows(16, 512, F16), weight, {})
    weight.affine[2, 77, 0] *= 1.01
    gemm()
    y = gemm.output().clone()
    weight.affine[2, 77, 0] /= 1.01
    honest = prepared(gemm.x, weight, {})
    check(honest, ROUNDED[F16].frobenius, ROUNDED[F16].element)
    assert not torch.equal(y[:, 77], honest.output()[:, 77])


def test_the_device_is_one_that_the_table_knows() -> None:
    assert library().choose(m=1, n=16, k=32, group=32, bits=4, activation_bits=16, **device_numbers()).kernel

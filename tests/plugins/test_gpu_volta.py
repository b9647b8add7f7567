"""Volta's kernels on a real GPU, against float64: a Volta, or any newer one.

INSTANTRT_KERNELS_VOLTA names a library: libinstantrt_kernels_sm70.so on a Volta; elsewhere what
`instantrt gpu-check` builds of the same sources, whose m8n8k4 products newer GPUs still compute, slowly.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from instantrt.plugins.schema import DType
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.tools.gpu.gemm import Gemm, random_weight
from instantrt.tools.gpu.library import Library
from tests.plugins.truth import check

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip(
        "needs an NVIDIA GPU: run `instantrt gpu-check` on a machine that has one",
        allow_module_level=True,
    )

F16, ROUNDED = torch.float16, OP.tolerance[DType.F16]
M = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 127, 300)
SHAPES = [(16, 64, 32), (48, 96, 96), (144, 3584, 128), (3584, 3584, 3584), (4608, 4096, 64)]  # n, k, group
VOLTA = {"sm": 70, "sm_count": 80}


@pytest.fixture(scope="module")
def library() -> Library:
    if given := os.environ.get("INSTANTRT_KERNELS_VOLTA"):
        return Library(Path(given))
    pytest.skip("INSTANTRT_KERNELS_VOLTA is not set: `instantrt gpu-check` builds the library and sets it")


def rows(m: int, k: int) -> torch.Tensor:
    return torch.randn((m, k), device="cuda", generator=torch.Generator("cuda").manual_seed(m * k)).to(F16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(library: Library, shape: tuple[int, int, int], bits: int) -> None:
    n, k, group = shape
    weight = random_weight(n, k, bits, group, F16, bias=True)
    for m in M if n * k < 10_000_000 else M[::3]:
        check(Gemm(library, rows(m, k), weight, {**VOLTA, "wide": 1}), 2e-5, 1e-5)
        check(Gemm(library, rows(m, k), weight, VOLTA), ROUNDED.frobenius, ROUNDED.element)


@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("gated", [0, 1])
def test_epilogue(library: Library, gated: int, activation: int) -> None:
    weight = random_weight(288, 512, 4, 64, F16, bias=True)
    for m in (3, 12, 100):
        options = {**VOLTA, "activation": activation, "gated": gated, "wide": 1}
        check(Gemm(library, rows(m, 512), weight, options), 2e-5, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 70])
def test_same_bits_every_time_and_in_graphs(library: Library, m: int, bits: int) -> None:
    gemm = Gemm(library, rows(m, 4096), random_weight(1024, 4096, bits, 128, F16), VOLTA)
    gemm()
    first = gemm.output().clone()
    for _ in range(5):
        gemm()
        assert torch.equal(gemm.output(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm()
    gemm.y_memory[4096:-4096] = 0
    gemm.workspace[4096:-4096] = 0x5A
    graph.replay()
    assert torch.equal(gemm.output(), first)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_plain_kernel_agrees(library: Library, bits: int) -> None:
    weight = random_weight(144, 512, bits, 64, F16, bias=True)
    check(Gemm(library, rows(9, 512), weight, {**VOLTA, "wide": 1, "plain": 1}), 2e-5, 1e-5)

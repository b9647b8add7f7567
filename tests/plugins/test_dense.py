"""Many rows by cuBLASLt: asked for, chosen by the table alone, its weights rounded once and nothing else."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import replace

import numpy as np
import pytest

from instantrt.plugins.schema import DType, Tolerance
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import ACTIVATIONS, GELU, SILU, exact
from tests.plugins.cases import BF16, F16, Case, Problem
from tests.plugins.kernels import ROOT, Emulated, build_cublaslt, c_problem
from tests.plugins.within import assert_within

pytestmark = pytest.mark.slow

Kernels = dict[int, Emulated]
M = 513  # the first that the table gives to the library


@pytest.fixture(scope="module")
def with_library(emulated: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """The emulated kernels in a process that has a cuBLASLt of its own."""
    stand_in = build_cublaslt(tmp_path_factory.mktemp("cublaslt"))
    ctypes.CDLL(str(stand_in), mode=ctypes.RTLD_GLOBAL)
    assert emulated[80].library.has_cublaslt()
    assert emulated[75].library.has_cublaslt()
    return emulated


def rounded(p: Problem) -> np.ndarray:
    """The float64 product of x and weights rounded once to x's type, with everything after it."""
    k, attrs = p.x.shape[1], p.attrs
    scale, zero = (np.repeat(p.affine[:, i::2].astype(np.float32).T, attrs["group"], axis=1) for i in (0, 1))
    w = ((layout.unpack(p.codes, attrs["bits"], k).astype(np.float32) - zero) * scale).astype(p.x.dtype)
    y = p.x.astype(np.float64) @ w.astype(np.float64).T
    y = y if p.bias is None else y + p.bias.astype(np.float64)
    if not attrs["gated"]:
        return np.asarray(ACTIVATIONS[attrs["activation"]](y))
    gate, up = np.moveaxis(y.reshape(len(y), -1, 2, 8), 2, 0)
    return np.asarray(ACTIVATIONS[attrs["activation"]](gate) * up).reshape(len(y), -1)


@pytest.mark.parametrize(("sm", "dtype"), [(75, F16), (80, F16), (80, BF16)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group", "activation", "gated"), [(48, 96, 32, 0, 0), (144, 64, 64, SILU, 1), (272, 128, 128, GELU, 0)]
)
def test_the_product_of_rounded_weights(
    with_library: Kernels, sm: int, dtype: np.dtype, bits: int, n: int, k: int, group: int, activation: int, gated: int
) -> None:
    """As near to it as fp32 sums are: every code, scale and zero lands in its own place."""
    case = Case(M, n, k, bits, group, dtype, bias=True, activation=activation, gated=gated, rounded_weights=1)
    p = case.make()
    assert with_library[sm].library.choose(**c_problem(p, sm, library=True)).kernel == "dense"
    y = with_library[sm].run(p, wide=True, library=True)
    _, magnitude = exact(p.x, p.codes, p.affine, p.bias, p.attributes())
    assert_within(y, rounded(p), magnitude, Tolerance(1e-6, 1e-6))


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_why_it_must_be_asked_for(with_library: Kernels, dtype: DType) -> None:
    """Over all elements the error stays in the op's bound, but single ones whose products cancel leave theirs."""
    p = Case(M, 48, 512, 4, 128, {DType.F16: F16, DType.BF16: BF16}[dtype], rounded_weights=1).make()
    truth, magnitude = exact(p.x, p.codes, p.affine, p.bias, p.attributes())
    y, bound = with_library[80].run(p, library=True), OP.tolerance[dtype]
    half_step = {DType.F16: 2.0**-11, DType.BF16: 2.0**-8}[dtype]
    assert_within(y, truth, magnitude * half_step * 2.0**20, bound)
    with pytest.raises(AssertionError, match="elements off"):
        assert_within(y, truth, magnitude, bound)


def test_the_table_chooses_it_only_where_all_agree(emulated: Kernels) -> None:
    base = {"m": M, "n": 4096, "k": 4096, "group": 128, "bits": 4, "activation_bits": 16, "sm": 80, "sm_count": 108}
    base |= {"rounded_weights": 1, "library": 1}
    choose = emulated[80].library.choose
    for sm in (75, 80, 86, 89, 100, 103, 120, 121):
        assert choose(**{**base, "sm": sm}).kernel == "dense"
    assert choose(**{**base, "sm": 90}).kernel != "dense", "warpgroups do not need it"
    for change, kernel in (
        ({"m": M - 1}, "ring64_ampere"), ({"rounded_weights": 0}, "ring64_ampere"), ({"library": 0}, "ring64_ampere"),
        ({"activation_bits": 8}, "int8_ring64_ampere"), ({"plain": 1}, "plain"),
    ):  # fmt: skip
        assert choose(**{**base, **change}).kernel == kernel


def test_the_workspace_covers_a_device_with_and_without_the_library(emulated: Kernels) -> None:
    base = {"m": 2048, "n": 8192, "k": 8192, "group": 128, "bits": 4, "activation_bits": 16, "sm": 80, "sm_count": 108}
    library = emulated[80].library
    asked, exact_only = (library.workspace(**base, rounded_weights=i) for i in (1, 0))
    needed = [
        library.choose(**{**base, "m": m, "sm": sm, "rounded_weights": 1, "library": has}).workspace
        for m in (1, 16, 512, M, 2048) for sm in (75, 80, 90, 120) for has in (0, 1)
    ]  # fmt: skip
    assert max(needed) <= asked
    assert asked >= 8192 * 8192 * 2 + 2048 * 8192 * 4
    assert exact_only < 32 << 20, "who does not ask pays nothing"


ALONE = """
import sys
from pathlib import Path
from tests.plugins.cases import Case
from tests.plugins.kernels import Emulated
from instantrt.tools.gpu.library import Library
kernels = Emulated(Library(Path(sys.argv[1])), 80)
assert not kernels.library.has_cublaslt()
kernels.run(Case(513, 16, 32, rounded_weights=1).make(), library=True)
"""


@pytest.mark.skipif(bool(find_library("cublasLt")), reason="this machine has a cuBLASLt, which would be called")
def test_a_caller_that_is_wrong_about_the_library_is_told(emulated: Kernels) -> None:
    path = str(emulated[80].library.path)
    alone = subprocess.run([sys.executable, "-c", ALONE, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "LaunchRefusedError: WeightOnlyGemm: launch of dense failed: there is no cuBLASLt" in alone.stderr


def test_order_of_threads_does_not_matter(with_library: Kernels) -> None:
    p = Case(M, 48, 96, 4, 32, rounded_weights=1).make()
    runs = [with_library[80].run(replace(p), library=True, seed=seed) for seed in (1, 2)]
    assert np.array_equal(*runs)

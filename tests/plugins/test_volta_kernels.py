"""The kernels of Volta's own library: their source on the CPU emulator against float64, and its table."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from instantrt.plugins.schema import DType, Tolerance
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.op import check as check_sizes
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, SILU, exact
from instantrt.tools.gpu.library import LaunchRefusedError
from tests.plugins.cases import SIZES, Case
from tests.plugins.kernels import Emulated, c_problem, check, other_in_batches, problem
from tests.plugins.within import assert_within

pytestmark = pytest.mark.slow

NEARLY_EXACT = Tolerance(2e-6, 1e-6)


@pytest.mark.parametrize(
    "size",
    [*SIZES, (32, 80, 224, 224), (2, 16, 32, 32), (129, 80, 96, 32), (130, 272, 160, 160), (140, 16, 320, 64)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes(volta: Emulated, bits: int, size: tuple[int, int, int, int]) -> None:
    m, n, k, group = size
    check(volta, Case(m, n, k, bits, group, bias=m % 2 == 0).make())


@pytest.mark.parametrize(("bits", "group", "k"), [(4, 32, 640), (8, 128, 640), (4, 608, 608)])
def test_a_row_has_the_same_bits_in_any_batch(volta: Emulated, bits: int, group: int, k: int) -> None:
    p = Case(130, 80, k, bits, group, bias=True, batch_invariant=1).make()
    assert volta.library.choose(**c_problem(p, 70, 3)).splits == 2
    assert other_in_batches(volta, p, 3) == []
    assert 1 in other_in_batches(volta, replace(p, attrs={**p.attrs, "batch_invariant": 0}), 3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [5, 12, 40, 130])
@pytest.mark.parametrize(
    ("zeros", "data"),
    [("integer", "outliers"), ("low", "shifted"), ("high", "shifted"), ("float", "shifted"), ("float", "zero_rows")],
)
def test_awkward_data(volta: Emulated, bits: int, m: int, zeros: str, data: str) -> None:
    check(volta, Case(m, 48, 192, bits, 64, zeros=zeros, data=data).make())


@pytest.mark.parametrize("activation", [0, SILU, GELU, GELU_TANH])
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("m", [3, 40, 130])
def test_epilogue(volta: Emulated, m: int, gated: int, activation: int) -> None:
    case = Case(m, 48, 64, bias=True, activation=activation, gated=gated)
    check(volta, case.make())
    check(volta, case.make(), OP.tolerance[DType.F16])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row", ["stream8", "wide32"])
def test_one_group_of_many_k(volta: Emulated, row: str, bits: int) -> None:
    """These tensor cores cut off where others round. Codes are small integers, so long sums lose next to nothing."""
    p = Case(1, 16, 8192, bits, 8192, zeros="low", data="shifted").make()
    pinned = replace(p, attrs={**p.attrs, "row": volta.library.rows().index(row) + 1})
    assert_within(volta.run(pinned, wide=True), *exact(p.x, p.codes, p.affine, None, p.attributes()), NEARLY_EXACT)


def test_split_k_over_blocks(volta: Emulated) -> None:
    p = Case(20, 144, 1120, group=160, bias=True, activation=SILU).make()
    assert volta.library.choose(**c_problem(p, 70, 80)).splits == 4, "the case must split"
    split, whole = check(volta, p, sm_count=80), check(volta, p, sm_count=1)
    assert not np.array_equal(split, whole), "different orders of summation should differ in the last bits"


@pytest.mark.parametrize("m", [3, 12, 40, 150])
def test_same_bits_whatever_order_threads_run_in(volta: Emulated, m: int) -> None:
    p = Case(m, 144, 640, bits=8, group=64).make()
    first = volta.run(p, seed=1)
    assert all(np.array_equal(first, volta.run(p, seed=seed)) for seed in (2, 3))


def test_a_bad_row_spoils_no_other(volta: Emulated) -> None:
    p = Case(10, 48, 128, bits=8).make()
    good, x = volta.run(p), p.x.copy()
    x[3, 17], x[8, 5] = np.nan, np.inf
    bad = volta.run(replace(p, x=x))
    others = [i for i in range(10) if i not in (3, 8)]
    assert np.array_equal(good[others], bad[others])
    assert np.isnan(bad[3]).all()
    assert not np.isfinite(bad[8]).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_plain_kernel_agrees(volta: Emulated, bits: int) -> None:
    check(volta, Case(3, 144, 96, bits, 96, bias=True).make(), plain=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [2, 12, 40, 130])
@pytest.mark.parametrize("part", [0, 1], ids=["scale", "zero"])
def test_tolerance_bites(volta: Emulated, bits: int, m: int, part: int) -> None:
    """One scale off by 1 %, or one zero point by as much of its range."""
    p = Case(m, 144, 256, bits, 64).make()
    right, wrong = p.affine.copy(), p.affine.copy()
    right[2, 2 * 131] = np.float16(0.01)  # not one of the dead groups
    wrong[2, 2 * 131] = np.float16(0.01)
    wrong[2, 2 * 131 + part] *= np.float16(1.01)
    assert wrong[2, 2 * 131 + part] != right[2, 2 * 131 + part]
    truth = exact(p.x, p.codes, right, None, p.attributes())
    assert_within(volta.run(replace(p, affine=right)), *truth, OP.tolerance[DType.F16])
    with pytest.raises(AssertionError, match=r"elements off|relative error"):
        assert_within(volta.run(replace(p, affine=wrong)), *truth, OP.tolerance[DType.F16])


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"m": 1}, "stream8"),
        ({"m": 9}, "stream16"),
        ({"m": 17}, "tile32"),
        ({"m": 129}, "wide32"),
        ({"plain": 1}, "plain"),
    ],
)
def test_table(volta: Emulated, changes: dict[str, int], kernel: str) -> None:
    assert volta.library.choose(**problem(sm=70, sm_count=80, **changes)).kernel == kernel


@pytest.mark.parametrize("bits", [4, 8])
def test_every_plan_fits_a_block_and_the_workspace(volta: Emulated, bits: int) -> None:
    base = problem(n=1024, k=8192, bits=bits, sm=70, sm_count=80)
    plans = [volta.library.choose(**{**base, "m": m}) for m in range(1, 300, 3)]
    assert max(plan.shared for plan in plans) <= 48 * 1024
    assert 0 < max(plan.workspace for plan in plans) <= volta.library.workspace(**{**base, "m": 300})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sm": 75}, "sm of the device is 75, expected 70 (newer: libinstantrt_plugins.so)"),
        ({"type": 1}, "sm of the device with bf16 is 70, expected 80 or more"),
        ({"activation_bits": 8}, "sm of the device with activation_bits 8 is 70, expected 75 or more"),
        ({"k": 4100}, "K (columns of x) is 4100, expected a positive multiple of 32"),
    ],
)
def test_refusals(volta: Emulated, changes: dict[str, int], message: str) -> None:
    with pytest.raises(LaunchRefusedError) as refused:
        volta.library.choose(**{**problem(sm=70, sm_count=80), **changes})
    assert str(refused.value).startswith(f"WeightOnlyGemm: {message}")


def test_the_op_definition_refuses_the_same_sizes(volta: Emulated) -> None:
    for n, k, group in itertools.product((0, 8, 16, 4096), (0, 16, 32, 96), (0, 16, 32, 48, 96)):
        sizes = problem(n=n, k=k, group=group, sm=70)
        try:
            taken = bool(volta.library.choose(**sizes).kernel)
        except LaunchRefusedError:
            taken = False
        assert taken == (check_sizes({**sizes, "N": n, "K": k}) is None)

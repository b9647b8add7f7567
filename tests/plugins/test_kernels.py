"""The kernels' own source, run lane by lane on the CPU emulator, against float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from instantrt.plugins.schema import DType
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, SILU, exact, quantize_rows
from instantrt.tools.gpu.library import LaunchRefusedError
from instantrt.tools.gpu.small import WIDTHS
from tests.plugins.cases import BF16, F16, SIZES, Case, Problem
from tests.plugins.kernels import Emulated, c_problem, check, other_in_batches
from tests.plugins.within import assert_within

pytestmark = pytest.mark.slow

Kernels = dict[int, Emulated]

KINDS = [  # sm, type, bits, activation bits
    (75, F16, 4, 16), (75, F16, 8, 16), (75, F16, 4, 8), (75, F16, 8, 8),
    (80, F16, 4, 16), (80, F16, 8, 16), (80, F16, 4, 8), (80, F16, 8, 8),
    (80, BF16, 4, 16), (80, BF16, 8, 16), (80, BF16, 4, 8), (80, BF16, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(emulated: Kernels, kind: tuple[int, np.dtype, int, int], size: tuple[int, int, int, int]) -> None:
    sm, dtype, bits, activation_bits = kind
    m, n, k, group = size
    case = Case(m, n, k, bits, group, dtype, bias=m % 2 == 0, activation_bits=activation_bits)
    check(emulated[sm], case.make())


# Fewer steps than warps, several turns of a ring, K that ends in a step, groups that end in steps, after 1024 k and
# never; a tile of strips that do not exist, a last strip; rows of x that do not exist.
RING_SIZES = [
    (1, 48, 64, 32), (7, 144, 96, 96), (8, 16, 640, 128), (5, 48, 1184, 32), (3, 80, 2080, 160), (2, 144, 2048, 64),
    (8, 80, 4096, 4096),
]  # fmt: skip


# The same for more rows of x, of which warps and blocks of a cluster have parts
MORE_SIZES = [(17, 48, 128, 64), (29, 144, 640, 128), (20, 400, 2048, 2048), (31, 80, 320, 64)]
FINE_SIZES = [(24, 272, 160, 32), (19, 80, 1120, 160)]


@pytest.mark.parametrize("kind", [(F16, 4), (BF16, 8)])
@pytest.mark.parametrize(
    ("row", "size"),
    [
        *product(("ring32", "ring64", "hopper128x64"), MORE_SIZES),
        *product(("ring32_narrow", "ring64_narrow"), (*MORE_SIZES[:2], MORE_SIZES[3])),
        *product(("hopper192x64", "hopper256x64", "hopper256x64_pairs"), MORE_SIZES),
        *product(("ring32", "ring64"), FINE_SIZES), ("hopper128x128", (140, 144, 640, 128)),
        *product(("int8_ring32",), (*MORE_SIZES, *FINE_SIZES)),
    ],
)  # fmt: skip
def test_rings_of_many_rows(
    emulated: Kernels, row: str, kind: tuple[np.dtype, int], size: tuple[int, int, int, int]
) -> None:
    (dtype, bits), (m, n, k, group) = kind, size
    m, gated = m + 32 * (row.startswith("ring64")) + 40 * ("hopper" in row and m < 64), int(n % 32 == 16)
    options = {"activation_bits": 8 if row.startswith("int8") else 16, "gated": gated, "activation": gated}
    p = Case(m, n, k, bits, group, dtype, bias=True, data="shifted", **options).make()
    check(emulated[90], p, row=row)
    check(emulated[90], p, row=row, splits=2, sm_count=3, seed=2)


@pytest.mark.parametrize("size", [(40, 144, 640, 640), (70, 400, 512, 128), (140, 80, 1024, 1024)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row", ["128x64", "192x64", "128x128", "192x128", "128x256"])
def test_int8_rings_of_many_rows(emulated: Kernels, row: str, bits: int, size: tuple[int, int, int, int]) -> None:
    m, n, k, group = size
    group = k if row in ("192x128", "128x256") else group
    p = Case(m, n, k, bits, group, BF16, bias=True, activation_bits=8).make()
    turns(p, emulated[90], f"int8_hopper{row}")


@pytest.mark.parametrize("size", RING_SIZES)
@pytest.mark.parametrize("kind", [(F16, 4), (BF16, 8)])
@pytest.mark.parametrize(
    "row", ["ring8", "ring8_narrow", "ring8_deep", "ring16", "ring16_deep", "int8_ring8", "int8_ring16"]
)
def test_rings(emulated: Kernels, row: str, kind: tuple[np.dtype, int], size: tuple[int, int, int, int]) -> None:
    (dtype, bits), (m, n, k, group) = kind, size
    m, gated, data = m + 8 * ("ring16" in row), int(n % 32 == 16), "shifted" if m % 2 else "outliers"
    options = {"activation_bits": 8 if row.startswith("int8") else 16, "gated": gated, "activation": gated}
    p = Case(m, n, k, bits, group, dtype, bias=True, data=data, **options).make()
    check(emulated[90], p, row=row)
    check(emulated[90], p, row=row, splits=2, sm_count=3, seed=2)  # a cluster that goes from tile to tile


AMPERE_SIZES = [(5, 48, 1184, 32), (8, 80, 4096, 4096), (2, 144, 2048, 64)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("row", "size"),
    [
        *product(("ring8_ampere", "ring8_ampere_wide", "ring16_ampere", "ring16_ampere_wide"), AMPERE_SIZES),
        *product(("int8_ring8_ampere", "int8_ring16_ampere"), AMPERE_SIZES),
        *product(("ring32_ampere", "int8_ring32_ampere"), (*MORE_SIZES[2:], FINE_SIZES[1])),
        *product(("ring64_ampere", "int8_ring64_ampere"), (*MORE_SIZES[2:], FINE_SIZES[1], (118, 272, 160, 32))),
        *product(("ring64_ampere_narrow", "int8_ring64_ampere_narrow"), (MORE_SIZES[2], (118, 272, 320, 64))),
    ],
)
def test_rings_without_clusters(emulated: Kernels, row: str, bits: int, size: tuple[int, int, int, int]) -> None:
    """Blocks go from tile to tile, x comes again with each, and sums of parts of K meet in the workspace."""
    m, n, k, group = size
    m, gated = m + 8 * ("ring16" in row) + 32 * ("ring64" in row), int(n % 32 == 16)
    options = {"activation_bits": 8 if row.startswith("int8") else 16, "gated": gated, "activation": gated}
    p = Case(m, n, k, bits, group, BF16 if bits == 4 else F16, bias=True, **options).make()
    check(emulated[80], p, row=row, splits=2, sm_count=3, seed=2)


# Of kernels by warpgroups: less of K than a ring holds, one short stage, several turns of the ring; groups that end in
# stages, at their ends and, longer than 1024 k, after several cuts; tiles of n without work for one group of consumers
# or for a warp; ragged rows.
WARPGROUP_SIZES = [
    (33, 16, 32, 32), (65, 272, 160, 32), (64, 48, 256, 128), (129, 144, 192, 64), (70, 80, 2112, 1056),
    (140, 400, 448, 64), (150, 144, 1120, 160), (72, 48, 1152, 96),
]  # fmt: skip


def turns(p: Problem, kernels: Emulated, row: str) -> None:
    check(kernels, p, row=row)
    check(kernels, p, row=row, sm_count=2, seed=2)  # blocks that go from tile to tile, without the end of one between


@pytest.mark.parametrize("size", WARPGROUP_SIZES)
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("hopper128x128", (BF16, 8)), ("hopper128x64", (F16, 4)),
        ("hopper128x128_sums", (F16, 4)), ("hopper128x128_sums", (BF16, 8)),
    ],
)  # fmt: skip
def test_warpgroup_products(
    emulated: Kernels, row: str, kind: tuple[np.dtype, int], size: tuple[int, int, int, int]
) -> None:
    (dtype, bits), (m, n, k, group) = kind, size
    p = Case(m, n, k, bits, group, dtype, bias=True).make()
    turns(p, emulated[90], row)
    check(emulated[90], p, row=row, sm_count=8, splits=2, seed=3)  # clusters that add up parts of K


@pytest.mark.parametrize("size", WARPGROUP_SIZES)
@pytest.mark.parametrize(("row", "kind"), [("int8_hopper128x128", (F16, 4)), ("int8_hopper128x64", (BF16, 8))])
def test_warpgroup_products_of_int8(
    emulated: Kernels, row: str, kind: tuple[np.dtype, int], size: tuple[int, int, int, int]
) -> None:
    (dtype, bits), (m, n, k, group) = kind, size
    m = min(m, 64) if row.endswith("64") else max(m, 65)
    turns(Case(m, n, k, bits, group, dtype, bias=True, activation_bits=8).make(), emulated[90], row)


@pytest.mark.parametrize("size", [(140, 144, 640, 128), (70, 400, 448, 64), (40, 80, 1024, 1024)])
@pytest.mark.parametrize(("row", "kind"), [("hopper128x64", (F16, 4)), ("hopper128x128", (BF16, 8))])
def test_consumers_that_take_turns_make_the_same_bits(
    emulated: Kernels, row: str, kind: tuple[np.dtype, int], size: tuple[int, int, int, int]
) -> None:
    """Several tiles of a block, and parts of K; a group of 1024 is longer than the ring: then nobody waits."""
    (dtype, bits), (m, n, k, group) = kind, size
    rows = [(row, 16)] if row == "hopper128x64" or group == 64 else [(row, 16), (f"int8_{row}", 8)]
    for kernel, activation_bits in rows:
        p = Case(m, n, k, bits, group, dtype, bias=True, activation_bits=activation_bits).make()
        for options in ({"sm_count": 2, "splits": 1}, {"sm_count": 8, "splits": 2}):
            same = (check(emulated[90], p, row=each, **options) for each in (kernel, f"{kernel}_ordered"))
            assert np.array_equal(*same)


@pytest.mark.parametrize(("bits", "activation_bits"), WIDTHS)
def test_warpgroup_products_of_symmetric_codes(emulated: Kernels, bits: int, activation_bits: int) -> None:
    """A zero in the middle of the codes leaves the sums of rows out; one other zero in a strip brings them back."""
    p = Case(40, 144, 320, bits, 64, bias=True, activation_bits=activation_bits, data="shifted").make()
    affine = p.affine.copy()
    affine[:, 1::2] = 2 ** (bits - 1)
    check(emulated[90], replace(p, affine=affine))
    affine[2, 2 * 37 + 1] += 1
    check(emulated[90], replace(p, affine=affine))


@pytest.mark.parametrize(("sm", "m"), [(75, 4), (80, 4), (80, 20), (80, 40), (90, 40)])
@pytest.mark.parametrize("bits", [4, 8])
def test_long_sums_do_not_drift(emulated: Kernels, bits: int, sm: int, m: int) -> None:
    """Tensor cores cut bits off their sums (the emulator's do): by channel over a long K this must not add up."""
    case = Case(m, 16, 18944, bits, 18944, zeros="low", data="shifted")
    check(emulated[sm], case.make(), sm_count=1)


@pytest.mark.parametrize(("m", "k"), [(1, 2176), (8, 2176), (3, 18944), (16, 4096), (20, 2176)])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_walk_over_many_tiles(emulated: Kernels, bits: int, m: int, k: int) -> None:
    """Fewer blocks than tiles: weights of the next tile are on their way when one ends; x stays, or comes again."""
    p = Case(m, 336, k, bits, 32 if k == 2176 else 128, bias=True).make()
    options = {**c_problem(p, 80, sm_count=2), "splits": 1}
    assert emulated[80].library.choose(**options).grid_n < -(-336 // 32)
    check(emulated[80], p, sm_count=2)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize(
    ("zeros", "data"),
    [("integer", "outliers"), ("low", "shifted"), ("high", "shifted"), ("float", "shifted"), ("float", "zero_rows")],
)
def test_awkward_data(
    emulated: Kernels, dtype: np.dtype, bits: int, activation_bits: int, zeros: str, data: str
) -> None:
    check(
        emulated[80], Case(5, 48, 192, bits, 64, dtype, activation_bits=activation_bits, zeros=zeros, data=data).make()
    )


@pytest.mark.parametrize("activation", [0, SILU, GELU, GELU_TANH])
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("m", [3, 40])
def test_epilogue(emulated: Kernels, m: int, gated: int, activation: int) -> None:
    case = Case(m, 48, 64, bias=True, activation=activation, gated=gated)
    for sm in (80, 90):
        check(emulated[sm], case.make())
    for bits in (4, 8):
        check(emulated[80], replace(case, bits=bits, activation_bits=8).make())


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
@pytest.mark.parametrize("gated", [0, 1])
def test_rounded_output(emulated: Kernels, dtype: DType, gated: int) -> None:
    case = Case(6, 144, 128, dtype={DType.F16: F16, DType.BF16: BF16}[dtype], bias=True, gated=gated)
    check(emulated[80], case.make(), OP.tolerance[dtype])


def test_split_k_over_blocks(emulated: Kernels) -> None:
    p = Case(20, 144, 1120, group=160, bias=True, activation=SILU).make()
    chosen = emulated[80].library.choose(m=20, n=144, k=1120, **p.attrs, type=0, sm=80, sm_count=132)
    assert chosen.splits > 1, "the case must split"
    split = check(emulated[80], p)
    whole = check(emulated[80], p, sm_count=1)
    assert not np.array_equal(split, whole), "different orders of summation should differ in the last bits"


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize(("bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize(("m", "splits"), [(1, 8), (5, 2), (11, 3), (20, 4), (32, 2)])
def test_clusters_add_up_as_the_workspace_does(
    emulated: Kernels, m: int, splits: int, bits: int, activation_bits: int, gated: int
) -> None:
    """On Hopper the blocks that divide K read each other's sums; elsewhere a second kernel does. The order is one.

    Of the rows that both have: 16-bit rows of x take others on Hopper.
    """
    p = Case(m, 80, 1120, bits, 160, bias=True, activation=SILU, gated=gated, activation_bits=activation_bits).make()
    row = emulated[80].library.choose(**c_problem(p, 80)).kernel
    apart, cluster = (check(emulated[sm], p, splits=splits, row=row) for sm in (80, 90))
    assert np.array_equal(apart, cluster)

    def workspace(sm: int, splits: int) -> int:
        pinned = {"row": emulated[sm].library.rows().index(row) + 1, "splits": splits}
        return emulated[sm].library.choose(**c_problem(p, sm), **pinned).workspace

    assert workspace(90, splits) == workspace(90, 1)
    assert workspace(80, splits) > workspace(80, 1)


# Activation bits, bits, M, N, K, group, multiprocessors: three for one tile of n, so that blocks have parts of K, as
# long as m is small; two for three tiles, so that blocks go from tile to tile
INVARIANT = [
    (16, 4, 300, 48, 1600, 32, 3), (16, 8, 130, 80, 1280, 128, 3), (16, 4, 130, 80, 1696, 1696, 3),
    (16, 8, 130, 272, 160, 32, 2), (8, 4, 130, 80, 2560, 128, 3), (8, 8, 130, 80, 1312, 1312, 3),
    (8, 4, 130, 272, 160, 32, 2),
]  # fmt: skip


@pytest.mark.parametrize("case", INVARIANT)
@pytest.mark.parametrize("sm", [75, 80, 90])
def test_a_row_has_the_same_bits_in_any_batch(emulated: Kernels, sm: int, case: tuple[int, ...]) -> None:
    activation_bits, bits, m, n, k, group, sm_count = case
    p = Case(m, n, k, bits, group, bias=True, gated=1, activation_bits=activation_bits, batch_invariant=1).make()
    plan = emulated[sm].library.choose(**c_problem(p, sm, sm_count))
    assert (plan.splits > 1) == (n < 272 and (activation_bits == 16 or sm > 75)), "Turing reads whole sums of int8"
    assert other_in_batches(emulated[sm], p, sm_count) == []


def test_turns_of_rows_leave_each_row_of_16_bits_where_it_belongs(emulated: Kernels) -> None:
    p = Case(257, 48, 640, 8, 128, gated=1, batch_invariant=1).make()
    assert np.array_equal(emulated[80].run(p), emulated[80].run(p, wide=True).astype(F16))


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_a_row_has_other_bits_in_another_batch_where_nobody_asked(emulated: Kernels, sm: int) -> None:
    assert 1 in other_in_batches(emulated[sm], Case(130, 80, 640, 4, 128).make(), sm_count=132)


@pytest.mark.parametrize(("sm", "activation_bits"), [(75, 16), (80, 16), (80, 8), (90, 16), (90, 8)])
@pytest.mark.parametrize("m", [12, 40])
def test_same_bits_whatever_order_threads_run_in(emulated: Kernels, sm: int, activation_bits: int, m: int) -> None:
    p = Case(m, 144, 320, bits=8, group=64, activation_bits=activation_bits).make()
    first = emulated[sm].run(p, seed=1)
    assert all(np.array_equal(first, emulated[sm].run(p, seed=seed)) for seed in (2, 3))


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize(("sm", "m"), [(80, 10), (80, 28), (80, 90), (90, 10), (90, 28), (90, 60), (90, 90)])
def test_a_bad_row_spoils_no_other(emulated: Kernels, sm: int, m: int, activation_bits: int) -> None:
    p = Case(m, 48, 128, bits=8, group=64, activation_bits=activation_bits).make()
    good = emulated[sm].run(p)
    x = p.x.copy()
    x[3, 17], x[8, 5] = np.nan, np.inf
    bad = emulated[sm].run(replace(p, x=x))
    others = [i for i in range(m) if i not in (3, 8)]
    assert np.array_equal(good[others], bad[others])
    assert np.isnan(bad[3]).all()
    assert not np.isfinite(bad[8]).any()


def test_the_plain_kernel_agrees(emulated: Kernels) -> None:
    for bits, activation_bits in WIDTHS:
        check(emulated[80], Case(3, 144, 96, bits, 96, bias=True, activation_bits=activation_bits).make(), plain=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_activations_have_the_bits_of_the_reference(emulated: Kernels, bits: int) -> None:
    """Weights of one exact code per row read single activations back: y = s_x * q, so q and s_x compare exactly."""
    k = 64
    x = np.random.default_rng(5).standard_normal((9, k)).astype(np.float16)
    x[4] = 0
    one_hot = np.eye(k, dtype=np.uint8)
    affine = np.tile(np.array([1, 0], np.float16), (2, k))
    base = Case(9, k, k, bits, group=32, activation_bits=8).make()
    y = emulated[80].run(replace(base, x=x, codes=layout.pack(one_hot, bits), affine=affine), wide=True)
    q, scale = quantize_rows(x)
    assert np.array_equal(y, q * scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("m", [40, 70])
def test_integer_products_have_the_same_bits_on_every_sm(emulated: Kernels, m: int, group: int, bits: int) -> None:
    """Sums of a group are exact integers and groups are added in their order, whichever instruction multiplies."""
    p = Case(m, 144, 384, bits, group, bias=True, activation_bits=8, zeros="float", data="shifted").make()
    first, *others = (check(kernels, p) for kernels in emulated.values())
    assert all(np.array_equal(first, other) for other in others)
    assert np.array_equal(first, float32_formula(p)), "the whole arithmetic, in the order that turing.cu states"


def float32_formula(p: Problem) -> np.ndarray:
    """s_x * sum_g s * ((P - cX) - (z - c) X) + bias, groups in their order, every step rounded to float32."""
    f32, bits, group, k = np.float32, p.attrs["bits"], p.attrs["group"], p.x.shape[1]
    center = 2 ** (bits - 1)
    q, row_scale = quantize_rows(p.x)
    codes, total = layout.unpack(p.codes, bits, k).astype(np.int64), np.zeros((len(q), len(p.codes) * 16), f32)
    for g in range(k // group):
        x, w = (a[:, g * group : (g + 1) * group].astype(np.int64) for a in (q, codes))
        x_sum, (scale, zero) = x.sum(1, keepdims=True), (p.affine[g, i::2].astype(f32) for i in (0, 1))
        total += scale * ((x @ w.T - center * x_sum).astype(f32) - (zero - f32(center)) * x_sum.astype(f32))
    assert p.bias is not None
    return total * row_scale + p.bias.astype(f32)


@pytest.mark.parametrize("sm", [75, 80])
@pytest.mark.parametrize(("bits", "activation_bits"), WIDTHS)
@pytest.mark.parametrize("m", [2, 40])
def test_tolerance_bites(emulated: Kernels, sm: int, bits: int, activation_bits: int, m: int) -> None:
    p = Case(m, 144, 256, bits, 64, activation_bits=activation_bits).make()
    wrong = p.affine.copy()
    wrong[2, 2 * 131] = np.float16(0.01)
    truth = exact(p.x, p.codes, wrong, None, p.attributes())
    wrong[2, 2 * 131] = np.float16(0.0101)
    with pytest.raises(AssertionError, match=r"elements off|relative error"):
        assert_within(emulated[sm].run(replace(p, affine=wrong)), *truth, OP.tolerance[DType.F16])


@pytest.mark.parametrize("tensor", ["x", "codes", "affine", "bias", "y"])
def test_misaligned_pointers_are_refused(emulated: Kernels, tensor: str) -> None:
    problem = {"m": 1, "n": 16, "k": 32, "group": 32, "bits": 4, "activation_bits": 16, "sm": 80, "sm_count": 1}
    tensors = dict.fromkeys(("x", "codes", "affine", "bias", "y"), 4096)
    with pytest.raises(
        LaunchRefusedError, match=f"WeightOnlyGemm: address of {tensor} is 4098, expected a multiple of 16"
    ):
        emulated[80].library.launch(problem, {**tensors, tensor: 4098})

"""Choosing a configuration: a pure function with a table, the same refusals as the op definition, bounded workspace."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from instantrt.plugins.weight_only_gemm.op import check
from instantrt.tools.gpu.layers import LAYERS
from instantrt.tools.gpu.library import LaunchRefusedError
from tests.plugins.kernels import SOURCE, Emulated, problem

pytestmark = pytest.mark.slow

SMS = (75, 80, 86, 89, 90, 100, 120)
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may use
Kernels = dict[int, Emulated]


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"m": 1}, "ring8_deep"), ({"m": 1, "n": 37888}, "ring8"), ({"m": 8, "n": 37888, "k": 2048}, "ring8"),
        ({"m": 9}, "ring16_deep"), ({"m": 16, "n": 6144}, "ring16"),
        ({"m": 16, "k": 65536}, "ring32"),  # whose x is too large
        ({"m": 1, "sm": 80}, "ring8_ampere"), ({"m": 8, "sm": 120}, "ring8_ampere"),
        ({"m": 9, "sm": 86}, "ring16_ampere"), ({"m": 1, "n": 37888, "sm": 80}, "ring8_ampere_wide"),
        ({"m": 17}, "ring32"), ({"m": 17, "n": 3584}, "ring32_narrow"), ({"m": 17, "n": 3584, "group": 32}, "ring32"),
        ({"m": 33}, "ring64"), ({"m": 65}, "hopper128x64"), ({"m": 128, "n": 37888}, "hopper128x128_sums"),
        ({"m": 128, "n": 37888, "group": 32}, "hopper128x128_sums"), ({"m": 4097}, "hopper128x128"),
        ({"m": 65, "group": 32}, "hopper128x64"), ({"m": 4097, "group": 32}, "hopper128x128"),
        ({"m": 17, "sm": 80}, "ring32_ampere"), ({"m": 33, "sm": 80}, "ring64_ampere_narrow"),
        ({"m": 65, "sm": 80, "n": 4608}, "ring64_ampere"), ({"m": 4097, "sm": 120}, "ring64_ampere_narrow"),
        ({"m": 4097, "sm": 120, "group": 32}, "ring64_ampere"),
        ({"m": 1, "sm": 75}, "stream8_turing"), ({"m": 4097, "sm": 75}, "tile32_turing"),
        ({"activation_bits": 8}, "int8_ring8"), ({"m": 9, "activation_bits": 8}, "int8_ring16"),
        ({"activation_bits": 8, "sm": 86}, "int8_ring8_ampere"),
        ({"m": 9, "activation_bits": 8, "sm": 100}, "int8_ring16_ampere"),
        ({"m": 16, "activation_bits": 8, "k": 65536}, "int8_ring32"),  # whose x is too large
        ({"m": 17, "activation_bits": 8}, "int8_ring32"),
        ({"m": 17, "activation_bits": 8, "sm": 80}, "int8_ring32_ampere"),
        ({"m": 65, "activation_bits": 8, "n": 4608, "sm": 100}, "int8_ring64_ampere"),
        ({"m": 65, "activation_bits": 8, "sm": 89}, "int8_ring64_ampere_narrow"),
        ({"m": 33, "activation_bits": 8}, "int8_hopper192x64"),
        ({"m": 33, "activation_bits": 8, "group": 64}, "int8_hopper128x64"),
        ({"bits": 8, "activation_bits": 8, "sm": 75}, "int8_stream8_turing"),
        ({"m": 9, "bits": 8, "activation_bits": 8, "sm": 75}, "int8_tile32_turing"),
        ({"m": 65, "bits": 8, "activation_bits": 8}, "int8_hopper128x64"),
        ({"m": 192, "group": 32}, "hopper128x128"), ({"m": 192, "n": 1024, "group": 32}, "hopper128x64"),  # to fill it
        ({"m": 32768, "n": 128, "group": 32}, "hopper128x128"),
        ({"m": 32768, "n": 128, "activation_bits": 8, "group": 32}, "int8_hopper128x128"),
        # by channel: tiles of 256 rows, unless those of 128 fill the device in much less time
        ({"m": 2048, "activation_bits": 8}, "int8_hopper128x128"),
        ({"m": 2048, "activation_bits": 8, "group": 4096}, "int8_hopper128x256"),
        ({"m": 512, "activation_bits": 8, "group": 4096}, "int8_hopper128x128"),
        ({"plain": 1}, "plain"), ({"plain": 1, "batch_invariant": 1}, "plain"),
        *(({"m": m, "sm": sm, "batch_invariant": 1}, "ring64_ampere") for m in (1, 513) for sm in (80, 120)),
        *(({"m": m, "batch_invariant": 1}, "ring64") for m in (1, 513)),
        *(({"m": m, "activation_bits": 8, "batch_invariant": 1}, "int8_ring32") for m in (1, 513)),
        *(({"m": m, "sm": 89, "activation_bits": 8, "batch_invariant": 1}, "int8_ring64_ampere") for m in (1, 513)),
        ({"m": 1, "sm": 75, "batch_invariant": 1}, "tile32_turing"),
        ({"m": 1, "sm": 75, "activation_bits": 8, "batch_invariant": 1}, "int8_tile32_turing"),
        ({"m": 513, "sm": 80, "batch_invariant": 1, "rounded_weights": 1, "library": 1}, "ring64_ampere"),
    ],
)  # fmt: skip
def test_table(emulated: Kernels, changes: dict[str, int], kernel: str) -> None:
    assert emulated[80].library.choose(**problem(**changes)).kernel == kernel


def test_every_row_is_chosen_for_some_layer(emulated: Kernels) -> None:
    library, chosen = emulated[80].library, set()
    for sm, count in ((75, 40), (80, 108), (90, 132)):
        for m, n, bits, activation_bits in itertools.product(
            (1, 9, 16, 17, 33, 65, 192, 600, 2048), (512, 3584, 37888), (4, 8), (16, 8)
        ):
            for group in (128, 4096):
                sizes = problem(m=m, n=n, bits=bits, group=group, activation_bits=activation_bits)
                chosen.add(library.choose(**{**sizes, "sm": sm, "sm_count": count}).kernel)
    chosen.add(library.choose(**problem(m=600, sm=80, rounded_weights=1, library=1)).kernel)
    table = (SOURCE / "config.h").read_text().split('{.name = "')[1:]
    candidates = {row.split('"')[0] for row in table if ".candidate = true" in row}  # until a GPU has timed them
    assert set(library.rows()) - chosen == {"plain", *candidates}, "what nothing chooses goes"


def test_a_row_and_splits_can_be_pinned_for_measurements(emulated: Kernels) -> None:
    library = emulated[80].library
    rows = library.rows()
    for name in ("ring64_ampere", "ring8_ampere", "ring8"):
        plan = library.choose(**problem(m=8, row=rows.index(name) + 1, splits=4))
        assert (plan.kernel, plan.splits) == (name, 4)
    early = library.choose(**problem(m=17, activation_bits=8, row=rows.index("int8_hopper128x64") + 1))
    assert early.kernel == "int8_hopper128x64", "tune asks whether it should be chosen from there"
    refused = {"m": 9}, {"activation_bits": 8}, {"sm": 75}
    for changes in refused:
        with pytest.raises(LaunchRefusedError, match=r"row \(pinned\) is \d+, expected one that serves"):
            library.choose(**problem(row=rows.index("ring8_ampere") + 1, **changes))
    with pytest.raises(LaunchRefusedError, match=r"row \(pinned\) is 99"):
        library.choose(**problem(row=99))


def test_one_launch_up_to_128_rows_on_hopper(emulated: Kernels) -> None:
    """What needs no workspace there has no kernel before it, and none after."""
    for layer, m, bits in itertools.product(LAYERS, (1, 16, 17, 32, 33, 64, 65, 96, 128), (4, 8)):
        n, k = LAYERS[layer]
        for group in (32, 96, 128, k):
            asked = problem(m=m, n=n, k=k // group * group, bits=bits, group=group)
            assert emulated[90].library.choose(**asked).workspace == 0, asked


def test_k_is_split_only_to_fill_the_device(emulated: Kernels) -> None:
    choose = emulated[80].library.choose
    assert choose(**problem(n=512, k=18944, sm=80)).splits == 8  # 16 tiles for 132 multiprocessors
    assert choose(**problem(n=480, k=18944)).splits == 8  # 15 tiles: as many clusters of eight as an H200 has
    assert choose(**problem(n=512, k=18944)).splits == 4  # a sixteenth would wait for another
    assert choose(**problem(n=512, k=512)).splits == 1  # too short: 8 warps, one stage each
    assert choose(**problem(n=37888)).splits == 1
    assert choose(**problem(n=512, k=18944)) == choose(**problem(n=512, k=18944)), "a function of the problem alone"


def test_blocks_of_a_cluster_have_a_tile_each_and_no_workspace(emulated: Kernels) -> None:
    choose, row = emulated[80].library.choose, emulated[80].library.rows().index("int8_ring32_ampere") + 1
    apart, cluster = (choose(**problem(n=5632, k=18944, sm=sm, row=row, activation_bits=8)) for sm in (80, 90))
    assert apart.splits == cluster.splits == 4
    assert apart.workspace - cluster.workspace == 4 * 5632 * 4
    pinned = choose(**problem(n=8192, k=18944, splits=8, row=row, activation_bits=8))
    assert (pinned.splits, pinned.grid_n) == (8, -(-8192 // pinned.tile_n)), "more than find a place at once"


@pytest.mark.parametrize("sm", [75, 80, 89, 120])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_few_multiprocessors_are_idle_at_the_end_of_many_rows(emulated: Kernels, sm: int, activation_bits: int) -> None:
    """Blocks walk over tiles of n where all of them have about as many; else each has one."""
    for m, n in itertools.product((65, 300, 600, 1000, 3840, 8192), (1024, 3584, 37888)):
        plan = emulated[80].library.choose(**problem(m=m, n=n, sm=sm, activation_bits=activation_bits))
        tiles, blocks = -(-n // plan.tile_n), plan.grid_m * plan.grid_n * plan.splits
        places = 132 * plan.resident
        rounds = -(-tiles // plan.grid_n) * -(-blocks // places)
        assert rounds <= max(1, -(-tiles * plan.grid_m * plan.splits // places)), (m, n)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_shared_memory_fits_every_device(emulated: Kernels, sm: int, bits: int) -> None:
    for m in (1, 9, 17, 65):
        for activation_bits in (16, 8):
            plan = emulated[80].library.choose(**problem(m=m, bits=bits, sm=sm, activation_bits=activation_bits))
            assert plan.shared <= SHARED[sm] * 1024
            assert plan.threads <= 512


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_k_is_split_alike_for_any_m_where_asked(emulated: Kernels, sm: int) -> None:
    library, base = emulated[80].library, problem(n=1024, k=8192, bits=8, sm=sm, batch_invariant=1)
    plans = [library.choose(**{**base, "m": m}) for m in (1, 65, 300, 4096)]
    (splits,) = {plan.splits for plan in plans}
    assert splits == 8
    for m, plan in zip((1, 65, 300, 4096), plans, strict=True):
        sums = 8 * min(m, 256) * 1024 * 4  # of more rows one turn after the other
        assert plan.workspace == (0 if sm == 90 else sums)
        assert library.workspace(**{**base, "m": m}) == sums, "an engine may run on another GPU"
    pinned = library.rows().index("ring8_ampere") + 1
    with pytest.raises(LaunchRefusedError, match=r"row \(pinned\)"):
        library.choose(**base, row=pinned)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_workspace_covers_every_smaller_m(emulated: Kernels, sm: int, activation_bits: int) -> None:
    library, base = emulated[80].library, problem(n=1024, k=8192, bits=8, activation_bits=activation_bits, sm=sm)
    most = library.workspace(**{**base, "m": 300})
    needed = [library.choose(**{**base, "m": m}).workspace for m in range(1, 301)]
    assert 0 < max(needed) <= most
    assert most <= 300 * (8192 * 5 + 4) + 132 * 64 * 256 * 4 + 4096


@pytest.mark.parametrize("batch_invariant", [0, 1])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_an_engines_workspace_is_enough_for_any_device(
    emulated: Kernels, activation_bits: int, batch_invariant: int
) -> None:
    """One device may divide K into more parts than another that has more multiprocessors."""
    library, devices = emulated[80].library, [(75, 40), (80, 108), (86, 84), (89, 128), (100, 148), (120, 170), (80, 7)]
    shapes = [(256, 512), (1024, 8192), (2048, 1024), (3072, 3072), (4096, 4096), (4096, 14336), (18944, 3584)]
    for (n, k), bits, type_, m in itertools.product(shapes, (4, 8), (0, 1), (1, 40, 256, 1000)):
        asked = problem(n=n, k=k, bits=bits, activation_bits=activation_bits, type=type_, m=m)
        asked["batch_invariant"] = batch_invariant
        most = library.workspace(**asked)
        for sm, count in devices:
            if sm == 75 and type_ == 1:
                continue
            plan = library.choose(**{**asked, "sm": sm, "sm_count": count})
            assert plan.workspace <= most, (plan, asked, sm, count)


REFUSED = [
    ({"m": 0}, "M (rows of x) is 0, expected 1 .. 2^31 - 1"),
    ({"k": 4100}, "K (columns of x) is 4100, expected a positive multiple of 32"),
    ({"n": 4097}, "N (rows of codes) is 4097, expected a positive multiple of 16"),
    ({"n": 1 << 30, "k": 64}, "N * K is 68719476736, expected below 2^35"),
    ({"group": 48}, "group is 48, expected a multiple of 32 that divides K"),
    ({"group": 0}, "group is 0"),
    ({"bits": 5}, "bits is 5, expected 4 or 8"),
    ({"type": 2}, "type of x is 2"),
    ({"activation": 9}, "activation is 9"),
    ({"gated": 2}, "gated is 2"),
    ({"activation_bits": 4}, "activation_bits is 4, expected 16 or 8"),
    ({"batch_invariant": 2}, "batch_invariant is 2, expected 0 or 1"),
    (
        {"sm": 70},
        "sm of the device is 70, expected 75, 80, 86, 89, 90, 100, 103, 120 or 121 (70: libinstantrt_plugins_sm70.so)",
    ),
    ({"sm": 75, "type": 1}, "sm of the device with bf16 is 75, expected 80 or more"),
    ({"sm_count": 0}, "multiprocessor count is 0"),
    ({"bits": 8, "activation_bits": 8, "k": 65536 + 128}, "K with activation_bits 8 is 65664"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals_say_what_was_expected_and_found(emulated: Kernels, changes: dict[str, int], message: str) -> None:
    with pytest.raises(LaunchRefusedError) as refused:
        emulated[80].library.choose(**problem(**changes))
    assert str(refused.value).startswith(f"WeightOnlyGemm: {message}")


def test_the_op_definition_refuses_the_same_sizes(emulated: Kernels) -> None:
    for n in (0, 8, 16, 4096):
        for k, group, activation_bits in itertools.product((0, 16, 32, 96, 65664), (0, 16, 32, 48, 64, 96), (16, 8)):
            sizes = problem(n=n, k=k, group=group, activation_bits=activation_bits)
            says_op = check({**sizes, "N": n, "K": k})
            try:
                emulated[80].library.choose(**sizes)
                says_kernel = None
            except LaunchRefusedError as refused:
                says_kernel = refused
            assert (says_op is None) == (says_kernel is None), (says_op, says_kernel)


def test_a_cluster_finds_room_on_few_multiprocessors(emulated: Kernels) -> None:
    """As MPS leaves them to a process: a cluster of more blocks than those could not be launched."""
    sizes = itertools.product((1, 16, 32, 64, 65, 300), (16, 256, 4096), (4096, 14336), (32, 128), (16, 8))
    for (m, n, k, group, activation_bits), few in itertools.product(sizes, (1, 2, 3, 4, 7, 8, 9)):
        asked = problem(m=m, n=n, k=k, group=group, activation_bits=activation_bits, sm_count=few)
        assert emulated[90].library.choose(**asked).splits <= few, asked


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_pinned_rows_have_a_plan_on_one_multiprocessor(emulated: Kernels, sm: int) -> None:
    """A file of choices may name clusters that find no place: they are asked for a plan before they are left out."""
    library = emulated[80].library
    for m, activation_bits in itertools.product((1, 12, 20, 40, 70, 600), (16, 8)):
        plans = library.plans((1, 2, 3, 4, 8), **problem(m=m, sm=sm, sm_count=1, activation_bits=activation_bits))
        assert plans
        assert all(plan.grid_m * plan.grid_n >= 1 for plan in plans)


@pytest.mark.parametrize(("standard", "refused"), [(201703, True), (201709, False), (202002, False)])
def test_a_compiler_without_the_tables_initializers_is_refused(standard: int, refused: bool) -> None:
    """GCC 10, whose C++20 says 201709, is one that has them."""
    command = ["g++", "-std=c++20", "-fsyntax-only", "-U__cplusplus", f"-D__cplusplus={standard}", "-x", "c++"]
    done = subprocess.run([*command, str(SOURCE / "row.h")], capture_output=True, text=True, check=False)
    assert (done.returncode != 0, "#error" in done.stderr) == (refused, refused)

"""Measured choices: a file beside the library decides, where that can be done; nothing in it breaks anything."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from instantrt.tools.gpu.choices import is_taken
from instantrt.tools.gpu.library import Library
from tests.plugins.cases import Case
from tests.plugins.kernels import Emulated, check, problem

pytestmark = pytest.mark.slow

Beside = Callable[[str | bytes], Library]
BASE = problem(n=1024, k=8192, sm=80, sm_count=108)
EVERY = "sm multiprocessors bits group activation_bits n k max_m row splits"
LINE = "80 108 4 128 16 1024 8192 {} {} {}\n"  # of BASE: max_m, row, splits


@pytest.fixture
def beside(emulated: dict[int, Emulated], tmp_path: Path) -> Beside:
    """A library of its own, which reads its file once, with that file beside it."""

    def make(text: str | bytes) -> Library:
        (tmp_path / "kernels.choices").write_bytes(text.encode() if isinstance(text, str) else text)
        return Library(Path(shutil.copy(emulated[80].library.path, tmp_path / "kernels.so")))

    return make


def chosen(library: Library, **changes: int) -> tuple[str, int]:
    plan = library.choose(**{**BASE, **changes})
    return plan.kernel, plan.splits


def test_each_line_is_for_the_rows_of_x_from_the_line_before(beside: Beside, emulated: dict[int, Emulated]) -> None:
    text = "# an A100\n\n" + LINE.format(16, "ring16_ampere_wide", 4) + LINE.format(4, "ring8_ampere", 1)
    library, model = (
        beside(text + LINE.format(4, "ring64_ampere", 8) + LINE.format(512, "ring64_ampere", 1)),
        emulated[80].library,
    )
    assert [chosen(library, m=m) for m in (1, 4)] == [("ring8_ampere", 1)] * 2, "the first of two for the same"
    assert [chosen(library, m=m) for m in (5, 16)] == [("ring16_ampere_wide", 4)] * 2
    assert [chosen(library, m=m) for m in (17, 512)] == [("ring64_ampere", 1)] * 2
    assert chosen(library, row=library.rows().index("ring32_ampere") + 1)[0] == "ring32_ampere"
    others = ({"m": 513}, {"sm_count": 107}, {"sm": 86}, {"bits": 8}, {"group": 64}, {"n": 2048}, {"k": 4096})
    for changes in ({}, *others, {"activation_bits": 8}):
        asked = {**BASE, **changes}
        assert (library.choose(**asked) == model.choose(**asked)) == bool(changes), changes


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        (LINE.format(64, "ring8_ampere", 1), {"m": 9}),  # too many rows of x for it
        (LINE.format(64, "ring8", 1), {}),  # Hopper's
        (LINE.format(64, "int8_ring64_ampere", 1), {}),
        (LINE.format(64, "plain", 1), {}),
        (LINE.format(64, "ring8_ampere_wide", 8), {}),  # 16 tiles, for which 108 multiprocessors have no room
        (LINE.format(1024, "ring64_ampere", 2), {"m": 1000}),
        (LINE.format(1024, "dense", 1), {"m": 8, "rounded_weights": 1, "library": 1}),  # whose weights have no place
        (LINE.format(1024, "ring64_ampere", 1), {"m": 1000, "rounded_weights": 1, "library": 1}),  # which takes dense
        *((LINE.format(64, "ring64_ampere", 1), {name: 1}) for name in ("plain", "batch_invariant", "splits")),
    ],
)
def test_what_cannot_be_or_is_asked_for_otherwise_stays(
    beside: Beside, emulated: dict[int, Emulated], line: str, changes: dict[str, int]
) -> None:
    asked = {**BASE, **changes}
    assert beside(line).choose(**asked) == emulated[80].library.choose(**asked)


def test_no_choice_takes_more_workspace_than_an_engine_has(beside: Beside, emulated: dict[int, Emulated]) -> None:
    """Every row with every division of K, on each kind of GPU: a layer for each."""
    named = [name for name in emulated[80].library.rows() if name not in ("plain", "dense")]
    asked = list(itertools.product((75, 80, 90), named, (1, 2, 4, 8)))
    layers = [problem(sm=sm, n=1024 + 16 * i, k=8192, activation_bits=8 if "int8" in name else 16)
              for i, (sm, name, _) in enumerate(asked)]  # fmt: skip
    library = beside(
        "".join(
            f"{p['sm']} 132 4 128 {p['activation_bits']} {p['n']} 8192 4096 {name} {splits}\n"
            for p, (_, name, splits) in zip(layers, asked, strict=True)
        )
    )
    took = set()
    for p, (sm, name, splits) in zip(layers, asked, strict=True):
        for m in (1, 8, 16, 64, 300, 1000):
            plan = library.choose(**{**p, "m": m})
            assert plan.workspace <= library.workspace(**{**p, "m": m}), (sm, name, splits, m)
            took |= {(plan.kernel, plan.splits > 1)} if plan.kernel == name else set()
    whole_rows = {"int8_hopper192x128", "int8_hopper128x256"}  # groups that are all of K alone
    assert {name for name, _ in took} == set(named) - whole_rows
    assert len([name for name, divided in took if divided]) > len(named) // 2


def test_tune_says_which_plans_a_line_gets(beside: Beside, emulated: dict[int, Emulated]) -> None:
    """Else the file would hold lines that are ignored, in place of the fastest that are not."""
    model, plans = emulated[80].library, []
    for m, sm_count in itertools.product((4, 64, 300), (20, 108, 400)):
        for i, plan in enumerate(model.plans((1, 2, 4, 8), **{**BASE, "m": m, "sm_count": sm_count})):
            asked = {**BASE, "m": m, "sm_count": sm_count, "n": 1024 + 16 * i + 4096 * (m % 5)}
            plans.append((asked, model.choose(**asked, row=plan.row + 1, splits=plan.splits)))
    lines = [f"80 {p['sm_count']} 4 128 16 {p['n']} 8192 {p['m']} {plan.kernel} {plan.splits}" for p, plan in plans]
    library = beside("\n".join(lines))
    taken = [is_taken(plan, p) for p, plan in plans]
    assert taken == [library.choose(**p) == plan for p, plan in plans]
    assert 0.2 < sum(taken) / len(taken) < 0.8


def test_a_measured_choice_is_what_runs(beside: Beside, emulated: dict[int, Emulated]) -> None:
    p = Case(5, 144, 640, group=64, bias=True).make()
    measured = check(Emulated(beside("80 132 4 64 16 144 640 8 ring64_ampere 4\n"), 80), p)
    assert not np.array_equal(measured, check(emulated[80], p)), "other sums should differ in the last bits"
    assert np.array_equal(measured, check(emulated[80], p, row="ring64_ampere", splits=4))


GOOD = LINE.format(8, "ring64_ampere", 1)


@pytest.mark.parametrize(
    ("line", "expected", "found"),
    [
        ("80 108 4 128 16 1024 8192 4 ring64_ampere", EVERY, "80 108 4 128 16 1024 8192 4 ring64_ampere"),
        ("80 108 4 128 16 1024 8192 4 ring64_ampere 1 1", EVERY, "80 108 4 128 16 1024 8192 4 ring64_ampere 1 1"),
        (LINE.format(4, "tile65", 1), "a row of the table of kernels", "tile65"),
        (LINE.format(4, "ring64_ampere", 9), "splits of 1 .. 8", "9"),
        (LINE.format(0, "ring64_ampere", 1), "max_m of 1 .. 2147483647", "0"),
        (LINE.format("4x", "ring64_ampere", 1), "max_m of 1 .. 2147483647", "4x"),
        (LINE.format("9" * 30, "ring64_ampere", 1), "max_m of 1 .. 2147483647", "9" * 30),
        ("-" + LINE.format(4, "ring64_ampere", 1), "sm of 1 .. 999", "-80"),
        ("\0\x1b[2J" + "z" * 99, EVERY, "??[2J" + "z" * 43),
    ],
)
def test_a_line_that_is_wrong_is_said_once_and_ignored(
    beside: Beside, capfd: pytest.CaptureFixture[str], line: str, expected: str, found: str
) -> None:
    library = beside(f"{GOOD}{line.strip()}\n{LINE.format(64, 'ring64_ampere', 1)}")
    assert chosen(library) == chosen(library, m=4) == ("ring64_ampere", 1)
    assert chosen(library, m=64) == ("ring64_ampere", 1)
    where = library.path.with_name("kernels.choices")
    assert capfd.readouterr().err == f"WeightOnlyGemm: {where}:2: expected {expected}, found '{found}'; ignored\n"


@pytest.mark.parametrize(
    "text", [GOOD.encode()[:-1], GOOD.encode().replace(b"\n", b"\r\n"), b"#" * 999 + b"\n" + GOOD.encode()]
)
def test_ends_of_lines(beside: Beside, text: bytes) -> None:
    assert chosen(beside(text)) == ("ring64_ampere", 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bytes(range(256)) * 4000, "and 3991 lines more"),
        (GOOD.encode() + b"#" * (1 << 20), "expected a file of at most 1 MiB, found 'more'"),
        (b"\n" * (1 << 20), ""),
        (b"", ""),
    ],
)
def test_a_file_of_something_else_changes_nothing(
    beside: Beside, emulated: dict[int, Emulated], capfd: pytest.CaptureFixture[str], text: bytes, says: str
) -> None:
    assert beside(text).choose(**BASE) == emulated[80].library.choose(**BASE)
    said = capfd.readouterr().err
    assert says in said
    assert len(said.splitlines()) <= 11


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_left_alone(
    emulated: dict[int, Emulated], tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "kernels.choices")
    library = Library(Path(shutil.copy(emulated[80].library.path, tmp_path / "kernels.so")))
    assert library.choose(**BASE) == emulated[80].library.choose(**BASE)
    assert "expected a file of at most 1 MiB, found 'what cannot be read'" in capfd.readouterr().err


def test_the_file_is_beside_the_library_wherever_the_process_goes(
    emulated: dict[int, Emulated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "kernels.choices").write_text(GOOD)
    shutil.copy(emulated[80].library.path, tmp_path / "lib" / "kernels.so")
    monkeypatch.chdir(tmp_path)
    library = Library(Path("lib/kernels.so"))
    monkeypatch.chdir("/")
    assert chosen(library) == ("ring64_ampere", 1)


def test_names_of_rows_are_of_one_row_each(emulated: dict[int, Emulated], volta: Emulated) -> None:
    for library in (emulated[80].library, volta.library):
        assert len(set(library.rows())) == len(library.rows())

"""How compilations are timed and what is shown of it, on programs that do little and numbers that are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from instantrt.passes.core.errors import UserError
from instantrt.tools.bench.compile import markdown
from instantrt.tools.bench.compile_time import Side, commands_in_turns, measured, our_side, plot, row, speed
from instantrt.tools.cli.app import COMMANDS, Subcommand

WORK = "import time\nheld = b'x' * (40 << 20)\nwhile time.process_time() < 0.2: pass"
STARTS_WORK = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"
ROUNDS = np.array([[1.0, 2.0, 300.0], [3.0, 4.0, 500.0], [2.0, 3.0, 400.0]])


def test_what_a_program_starts_counts_and_what_starts_it_does_not(tmp_path: Path) -> None:
    held = b"x" * (200 << 20)
    wall, cpu, peak = measured([sys.executable, "-c", STARTS_WORK], tmp_path / "log", {})
    assert wall > 0.2
    assert cpu > 0.2
    assert 40 < peak < len(held) >> 20


def test_a_program_that_fails_is_no_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"failed\n(.|\n)*no such model"):
        measured([sys.executable, "-c", "print('no such model'); exit(3)"], tmp_path / "log", {})


def test_sides_take_turns_and_a_round_begins_without_a_cache(tmp_path: Path) -> None:
    """`cold` fails on a cache that is there, `warm` on one that is not."""
    cold = Side(("sh", "-c", f"mkdir $INSTANTRT_CACHE && echo cold >> {tmp_path}/order"), "SCRATCH/cache")
    warm = Side(("sh", "-c", f"test -d SCRATCH/cache && echo warm >> {tmp_path}/order"))
    used, rows = commands_in_turns({"cold": cold, "warm": warm}, 2, tmp_path)
    assert (tmp_path / "order").read_text().split() == ["cold", "warm"] * 2
    assert {name: each.shape for name, each in used.items()} == {"cold": (2, 3), "warm": (2, 3)}
    assert list(rows) == ["cold", "warm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "order"]


def test_stages_are_those_that_the_command_sums_up(tmp_path: Path) -> None:
    code = f"""
from instantrt.tools.cli.console import Stages
stages = Stages()
stages.begin("reading {tmp_path}")
stages.begin("writing 1.5 MB", 3, 1)
stages.progress("weight", 3)
stages.summary()
"""
    _, rows = commands_in_turns({"it": Side((sys.executable, "-c", code))}, 1, tmp_path)
    assert rows["it"]["stages"] == {"reading": 0.0, "writing": 0.0}


def test_the_command_line_that_is_timed_is_one(tmp_path: Path) -> None:
    """As far as it can be read without compiling; the sides of a round write to different places."""
    sides = [
        our_side(tmp_path, f"{target} --quant {quant}", "c") for target in ("x86", "sm89") for quant in ("none", "a8w8")
    ]
    command = Subcommand("compile", *COMMANDS["compile"])
    read = [command.make_context("compile", list(side.words[4:])).params for side in sides]
    assert [(p["targets"], p["quant"]) for p in read] == [
        (["x86"], "none"), (["x86"], "a8w8"), (["sm89"], "none"), (["sm89"], "a8w8")
    ]  # fmt: skip
    assert len({p["out"] for p in read}) == 4


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="onnxruntime-genai is not there"):
        speed(tmp_path, 1, {"genai": Path(sys.executable)})
    assert not list(tmp_path.iterdir())


def test_what_is_shown(tmp_path: Path) -> None:
    rows = {
        "x86 a16w8, cold": row("x86 a16w8, cold", ROUNDS) | {"stages": {"reading": 0.31, "deciding": 0.01}},
        "theirs : ours": row("", ROUNDS[:, :2] / 2, "x"),
        "once": row("", ROUNDS[:1]) | {"stages": {}},
        "optimum-onnx": {"not_measured": "--optimum was not given"},
    }
    result = {"rows": rows, "versions": ["instantrt 1"]}
    shown = markdown({"speed": result, "memory": {"A8W8": {"a_mb": 3}}})
    assert [line for line in shown.splitlines() if line.startswith(("|", "*", "!", "##"))] == [
        "## speed",
        "| what | goal | wall | CPU | peak memory |",
        "|---|---|---|---|---|",
        "| x86 a16w8, cold | 12 s, CPU 15 s | 2 s (1.5 to 2.5) | 3 s (2.5 to 3.5) | 500 MB |",
        "| theirs : ours |  | 1 x (0.75 to 1.25) | 1.5 x (1.25 to 1.75) |  |",
        "| once |  | 1 s | 2 s | 300 MB |",
        "| optimum-onnx |  | not measured: --optimum was not given |  |  |",
        "* instantrt 1",
        "* x86 a16w8, cold: reading 0.3 s",
        "![wall time of each](compile_time.png)",
        "## memory",
        "| what | measured |",
        "|---|---|",
        "| A8W8 | a mb 3 |",
    ]
    plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

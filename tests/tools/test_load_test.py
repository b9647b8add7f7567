"""The load test itself, on replies that are made up: what it counts as wrong, and what it shows."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.load_test import table, text_table
from instantrt.tools.serving import load, text_load
from instantrt.tools.serving.load import StreamedReply, measure, plot, resident
from instantrt.tools.serving.server import Server
from instantrt.tools.serving.text_load import ROUNDS, TEXTS, Answer, measure_texts, plot_texts
from tests.commands import invoke

SERVER: Any = SimpleNamespace(http="", process=SimpleNamespace(pid=os.getpgrp()), tail=lambda: "the end of the log")


def replies(monkeypatch: pytest.MonkeyPatch, *, wrong: int = -1, lost: int = -1) -> None:
    """Each reply takes 10 ms to its first token and 2 ms to each other; those with these numbers go astray."""
    numbers = itertools.count()

    def ask(address: str, model: str, body: dict[str, object]) -> StreamedReply:
        assert (address, model) == ("", "m")
        number = next(numbers)
        if number == lost:
            raise OSError
        tokens = (7, 7, 7) if number == wrong else (1, 2, len(str(body["text_input"])))
        return StreamedReply(0.0, (0.010, 0.012, 0.014), tokens, "", "length")

    monkeypatch.setattr(load, "ask", ask)


def run() -> load.Result:
    return measure(SERVER, "m", clients=2, requests=10, body={}, prompts=("a", "bb"))


def test_the_end_of_a_log_is_sentences(tmp_path: Path) -> None:
    """Triton's tables of settings take 250 columns, and more lines than are shown."""
    table = ["+----+", *(f"| setting {i} | value |" for i in range(40)), "+----+", ""]
    log = tmp_path / "server.log"
    log.write_text("\n".join(["started", *table, "E1 already in use", *table]))
    server = Server(SERVER.process, "", "", log)
    assert server.tail().splitlines() == ["started", "E1 already in use"]


def test_good_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch)
    result = run()
    assert (result.wrong, result.tokens) == (0, 30)
    assert result.first == pytest.approx((0.010, 0.010))
    assert result.gap == pytest.approx((0.002, 0.002))


@pytest.mark.parametrize("astray", [{"wrong": 9}, {"lost": 9}])
def test_a_wrong_or_lost_reply_counts(monkeypatch: pytest.MonkeyPatch, astray: dict[str, int]) -> None:
    replies(monkeypatch, **astray)
    assert run().wrong == 1


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    replies(monkeypatch)
    monkeypatch.setattr(load, "load", lambda *args, **more: ([("a", None)], 1.0))
    with pytest.raises(UserError, match=r"no request was answered\n(.|\n)*the end of the log"):
        run()


def answers(monkeypatch: pytest.MonkeyPatch, *, wrong: int = -1, lost: int = -1) -> None:
    """Each answer takes 10 ms; those with these numbers go astray."""
    numbers = itertools.count()

    def ask(address: str, model: str, text: str) -> Answer:
        assert (address, model) == ("", "m")
        number = next(numbers)
        if number == lost:
            raise OSError
        return Answer(0.0, 0.010, vector(text) + (number == wrong) * np.float32(0.01))

    monkeypatch.setattr(text_load, "ask", ask)


def vector(text: str) -> Any:
    return np.array([len(text), len(text.split())], np.float32) / len(text)


@pytest.mark.parametrize(("astray", "count"), [({}, 0), ({"wrong": 40}, 1), ({"lost": 40}, 1)])
def test_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, astray: dict[str, int], count: int) -> None:
    answers(monkeypatch, **astray)
    result = measure_texts(SERVER, "m", clients=2, requests=10, here=vector)
    assert (result.requests, result.wrong, result.latency) == (len(TEXTS), count, pytest.approx((0.010, 0.010)))
    assert len(result.rates) == len(result.beside) == ROUNDS
    shown = replace(result, rates=(8.0, 9.0, 9.5), beside=(10.0, 10.0, 10.0))
    console = Console(width=120, record=True)
    console.print(text_table([shown]))
    row = console.export_text().splitlines()[1].split()
    assert row[:6] == ["2", "16", "9.0", "10.0", "10.0", str(count)]
    assert row[7:] == ["10.0", "90%", "(85-92)"]
    plot_texts([shown, shown], tmp_path / "plot.svg")
    assert "in the process" in (tmp_path / "plot.svg").read_text("utf-8")


def test_other_answers_in_this_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    with pytest.raises(UserError, match="other answers than the server"):
        measure_texts(SERVER, "m", clients=1, requests=1, here=lambda text: vector(text) * 2)


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["a_embed"], ["--max-tokens", "3"], "a_embed: --max-tokens says nothing to this model"),
        (["a_generate"], ["--beside", "out"], "a_generate: --beside says nothing to this model"),
        (["a_embed", "b_classify"], [], "which model\\?(.|\n)*a_embed, b_classify(.|\n)*--model"),
        (["a_embed", "b"], ["--model", "b"], "no such model that takes text(.|\n)*a_embed"),
        (["b"], [], "which model\\?(.|\n)*a model that takes text"),
    ],
)
def test_what_is_to_be_loaded(tmp_path: Path, models: list[str], options: list[str], words: str) -> None:
    for model in models:
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.pbtxt").write_text("")
    with pytest.raises(UserError, match=words):
        raise invoke("load-test", tmp_path, *options).exception


def test_table_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replies(monkeypatch, wrong=9)
    results = [run(), run()]
    console = Console(width=120, record=True)
    console.print(table(results))
    row = console.export_text().splitlines()[1].split()
    assert [row[i] for i in (0, 1, 3, 4, 5, 6, 7)] == ["2", "10", "10.0", "10.0", "2.0", "2.0", "1"]
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not say what memory is held")
def test_memory_of_a_group_counts_all_its_processes() -> None:
    """A leader that holds nothing and its child, which holds 64 MB."""
    child = "held = b'x' * (1 << 26); print(flush=True); input()"
    leader = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", leader],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert 1 << 26 < resident(process.pid) < 2 << 26
        process.stdin.close()
    assert resident(process.pid) == 0

"""The table of formats is what `instantrt compile` takes, losses and divergences are right, the page is its JSON's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.accuracy.metrics import compare_row
from instantrt.compiler.decide import asked_config
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import Array
from instantrt.tools.bench import frontier
from instantrt.tools.bench.cpu_contests import ASKED, CALIBRATION, FITTED, FRONTIER, MADE, MODEL
from instantrt.tools.bench.peers.cpu_worker import DecoderMeasures
from tests.commands import invoke
from tests.conftest import TEXT, TINY


def test_every_format_is_one_that_a_compilation_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []

    def taken(request: Request, **_: Any) -> list[Any]:
        requests.append(replace(request, out=tmp_path))
        return []

    monkeypatch.setattr("instantrt.compiler.compile.compile_model", taken)
    given = {MODEL: str(TINY), MADE: str(tmp_path), CALIBRATION: str(TEXT)}
    for name in ASKED | FITTED:
        done = invoke(*(given.get(word, word) for word in FRONTIER.forms[name].words[2:]))
        assert done.exit_code == 0, f"{name}: {done.output}"
        asked_config(requests[-1], "instant_quant")
    assert len({str(request) for request in requests}) == len(ASKED | FITTED)
    assert {*frontier.PICKS.values()} <= {*ASKED, *FITTED}


class Bigram:
    """The next token by the last one alone."""

    def __init__(self, path: Path) -> None:
        self.table = np.load(path)

    def every_position(self) -> Any:
        return lambda ids: self.table[ids]


def test_losses_and_divergences_of_a_worker(tmp_path: Path) -> None:
    """Those of the report on accuracy, of each whole window; others are held against the first that is asked."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 7, 19)
    np.savez(tmp_path / "inputs.npz", ids=ids)
    tables = random.standard_normal((2, 7, 7)).astype(np.float32)
    windows = [ids[start : start + 8] for start in (0, 8)]
    for table in tables:
        np.save(tmp_path / "table.npy", table)
        found = DecoderMeasures(Bigram, tmp_path / "table.npy", tmp_path / "inputs.npz").loss(8, str(tmp_path))
        each = [compare_row(tables[0][part], table[part], part) for part in windows]
        expected: list[Array] = [np.stack([t.nll[:-1] for t in each]), np.stack([t.kl[:-1] for t in each])]
        right, wrong = (of[np.concatenate([part[:-1] for part in windows])] for of in (tables[0], table))
        apart = np.abs(wrong - right).max() / np.abs(right).max()
        assert found == pytest.approx([*(values.mean() for values in expected), apart], abs=1e-6)


def test_the_page_is_what_its_json_gives() -> None:
    """`instantrt bench formats frontier` writes all three."""
    results = json.loads(frontier.OUT.read_text("utf-8"))["results"]
    page = frontier.markdown(results)
    assert frontier.OUT.with_suffix(".md").read_text("utf-8") == page
    assert frontier.OUT.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for result in results.values():
        assert {want for want, name in frontier.PICKS.items() if name in result["sides"]} <= {
            line.split(" | ")[0].removeprefix("| ") for line in page.splitlines()
        }

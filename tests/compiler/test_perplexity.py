"""Perplexity against its definition; what it cannot be had of; and what measuring does without."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.accuracy.perplexity import WINDOW, artifact_logits, longest_of, perplexity_of, text_windows
from instantrt.compiler.artifact.manifest import find_artifact, write_manifest
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from tests.conftest import TEXT, TINY

RANDOM = np.random.default_rng(2)


def test_it_is_that_of_every_token_but_the_first_of_a_window() -> None:
    parts = [RANDOM.integers(0, 50, (1, size)) for size in (7, 3)]
    table = RANDOM.standard_normal((50, 50)).astype(np.float32)

    def logits_of(ids: Array) -> Array:
        return table[ids]

    losses = []
    for (window,) in parts:
        for token, following in itertools.pairwise(window):
            row = [float(value) for value in table[token]]
            losses.append(math.log(math.fsum(math.exp(value) for value in row)) - row[following])
    assert len(losses) == 6 + 2
    expected = pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-12)
    assert perplexity_of(logits_of, parts) == expected
    assert perplexity_of(lambda ids: iter(np.array_split(table[ids][0], 3)), parts) == expected  # in pieces


def test_a_text_in_windows_by_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    parts = text_windows(TINY, TEXT)
    assert {part.shape for part in parts[:-1]} == {(1, WINDOW)}
    assert 2 <= parts[-1].shape[1] <= WINDOW
    assert {part.shape[1] for part in text_windows(TINY, TEXT, 40)[:-1]} == {40}  # what an artifact takes
    with pytest.raises(UserError, match="no tokenizer"):
        text_windows(tmp_path, TEXT)
    with pytest.raises(UserError, match="cannot be read"):
        text_windows(TINY, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="the text is empty"):
        text_windows(TINY, tmp_path / "empty.txt")


def test_a_checkpoint_says_how_much_it_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 64}')
    assert longest_of(tmp_path) == 64


def test_a_long_window_goes_through_the_cache(tiny_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = RANDOM.integers(0, 4000, (1, 40))
    logits_of = artifact_logits(tiny_compiled)
    (whole,) = logits_of(ids)
    monkeypatch.setattr("instantrt.compiler.accuracy.perplexity.PIECE", 16)
    pieces = list(logits_of(ids))
    assert [len(piece) for piece in pieces] == [16, 16, 8]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=2e-3 * np.abs(whole).max())


@pytest.mark.parametrize(("kind", "fix"), [("kit", ""), ("engine", "instantrt diff --forms twin,engine")])
def test_what_does_not_run_on_this_cpu_is_refused(kind: str, fix: str, tiny_compiled: Path, tmp_path: Path) -> None:
    record = {"builder": "tensorrt", "version": "10.13.0", "sm": 89, "options": {}} if kind == "engine" else None
    limits = {"cache": "concat", "logits": "last", "max_batch": 1, "max_length": 1024}
    write_manifest(tmp_path, [replace(find_artifact(tiny_compiled, None), kind=kind, engine=record, limits=limits)])
    with pytest.raises(UserError, match="not a causal LM for ONNX Runtime") as caught:
        artifact_logits(tmp_path)
    assert caught.value.found == kind
    assert fix in caught.value.fix


def test_only_reports_need_polygraphy_and_matplotlib() -> None:
    rooms = ("bisect", "budget", "layer_errors", "perplexity", "report", "run", "verify")
    names = ", ".join(f"instantrt.compiler.accuracy.{room}" for room in rooms)
    lacking = "import sys; sys.modules.update(polygraphy=None, matplotlib=None, transformers=None, torch=None)"
    subprocess.run([sys.executable, "-c", f"{lacking}; import {names}"], check=True)

"""Every odd input of the corpus: the right numbers, or a refusal in the words of its row.

A causal LM reads a pair of prompts, one padded on the left, then decodes on its cache; each step must be what the
reference says of the whole text. Other models get one random input of the types that they declare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from instantrt.compiler.compile import compile_model
from instantrt.compiler.json_file import read_json
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.lazy import Array
from instantrt.tools.cli.ending import exit_on_error
from tests.conftest import ROOT
from tests.corpus.reference import Reference, reference
from tests.corpus.row import Row
from tests.corpus.table import ROWS, markdown

BATCH, SEQUENCE, PADDING, STEPS = 2, 9, 3, 4
TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
REFUSED = [row for row in ROWS if row.refused]
RIGHT = [row for row in ROWS if not row.refused]


def test_a_row_is_there_once() -> None:
    assert [what for what, times in Counter(row.what for row in ROWS).items() if times > 1] == []


def test_the_documentation_shows_the_rows() -> None:
    assert markdown() in (ROOT / "docs/odd-inputs.md").read_text("utf-8"), "python -m tests.corpus.table prints them"


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.what)
def test_refused(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = row.make(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(SystemExit) as stop, exit_on_error():
        compile_model(Request(model, (row.target,), out, **row.fields))
    said = capsys.readouterr().err
    assert row.refused in said
    assert stop.value.code == 1
    assert "internal error" not in said
    assert said.endswith("\nFAILED\n")
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("row", RIGHT, ids=lambda row: row.what)
def test_right(row: Row, tmp_path: Path) -> None:
    model, out = row.make(tmp_path / "model"), tmp_path / "out"
    exact: dict[str, Any] = {"cpu_preset": "exact"} if find_target(row.target).sm is None else {}
    (artifact,) = compile_model(Request(model, (row.target,), out, **exact | row.fields))
    session = ort.InferenceSession(out / artifact.path, providers=["CPUExecutionProvider"])
    expected = reference(row, model)
    if artifact.llm is None:
        feeds = random_feeds(session)
        compare(run(session, feeds), expected(feeds), feeds.get("attention_mask"), row.bound)
    else:
        both_ways = model.is_dir() and read_json(model / "config.json").get("is_causal") is False
        check_llm(session, expected, artifact.llm, row.bound, steps=0 if both_ways else STEPS)


def check_llm(
    session: ort.InferenceSession, expected: Reference, llm: Mapping[str, int], bound: float, steps: int
) -> None:
    """Prefill, then steps of decoding; the reference reads the whole text each time, without a cache."""
    texts = np.random.default_rng(0).integers(3, llm["vocab"], (BATCH, SEQUENCE + STEPS))
    allowed = np.ones_like(texts)
    allowed[1, :PADDING] = 0
    places = np.maximum(allowed.cumsum(1) - 1, 0)
    empty = np.zeros((BATCH, llm["kv_heads"], 0, llm["head_dim"]), np.float32)
    cache = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    nothing, done = dict(cache), 0
    for end in range(SEQUENCE, SEQUENCE + steps + 1):
        whole = {"input_ids": texts[:, :end], "attention_mask": allowed[:, :end], "position_ids": places[:, :end]}
        new = {"input_ids": texts[:, done:end], "position_ids": places[:, done:end], "attention_mask": allowed[:, :end]}
        got, want = run(session, new | cache), expected(whole | nothing)
        compare({"logits": got["logits"]}, want, allowed[:, done:end], bound)
        cache, done = {name: got[name.replace("past_key_values", "present")] for name in cache}, end


def run(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    taken = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, taken), strict=True))


def random_feeds(session: ort.InferenceSession) -> dict[str, Array]:
    """Each named size is another small number; integers are tokens, or 0 and 1. Rows of a text: all but one padded."""
    rng, sizes, feeds = np.random.default_rng(0), count(3), {}
    named = {"batch": BATCH, "batch_size": BATCH}
    for each in session.get_inputs():
        shape = [d if isinstance(d, int) else named.setdefault(d, next(sizes)) for d in each.shape]
        if each.type == "tensor(bool)":
            feeds[each.name] = rng.random(shape) < 0.5
        elif np.issubdtype(TYPES[each.type], np.integer):
            low, high = (3, 100) if each.name == "input_ids" else (0, 2)
            feeds[each.name] = rng.integers(low, high, shape).astype(TYPES[each.type])
        else:
            feeds[each.name] = rng.standard_normal(shape).astype(TYPES[each.type])
    if "attention_mask" in feeds:
        feeds["attention_mask"][:] = 1
        feeds["attention_mask"][1:, -1:] = 0
    return feeds


def compare(got: Mapping[str, Array], want: Mapping[str, Array], mask: Array | None, bound: float) -> None:
    """Every output, at the positions that are not padded; an artifact may give those of the last alone."""
    for name in got:
        found, expected = got[name], want[name].astype(np.float64)
        if mask is not None and found.ndim == 3:
            kept = mask[:, -found.shape[1] :].astype(bool)
            found, expected = found[kept], expected[:, -found.shape[1] :][kept]
        assert found.shape == expected.shape, name
        error, largest = np.abs(found - expected).max(initial=0), np.abs(expected).max(initial=0)
        assert error <= bound * max(largest, 1e-30), f"{name}: {error:.2e} of {largest:.2e}"

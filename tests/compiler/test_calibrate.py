"""Codes fitted to a text: the paper's algorithm, what it brings, and what it cannot be had for."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.accuracy.calibrate import DAMPING, FLOOR, LEAST, factor_of, feed_back, tokens_of
from instantrt.compiler.accuracy.data import llm_feeds, windows
from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens
from instantrt.compiler.accuracy.subjects import request_of
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.fit import check_text
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import FLOAT32, Array, InMemory
from instantrt.passes.core.quant import Codes, InstantQuant, QuantTensor, dequantize, quantize_asymmetric
from instantrt.passes.core.search import search
from tests.conftest import TEXT, TINY, planned_and_written
from tests.graphs import model_file

RANDOM = np.random.default_rng(5)
N, K, GROUP = 16, 96, 32
W = RANDOM.standard_normal((N, K)).astype(np.float32)
MIXED = RANDOM.standard_normal((K, K)).astype(np.float32) / 10 + np.eye(K, dtype=np.float32)
X = RANDOM.standard_normal((400, K)).astype(np.float32) @ MIXED


def weight(bits: int = 4, group: int = GROUP) -> QuantTensor:
    source = InstantQuant("w", InMemory(W), bits, group, False, FLOAT32)
    return QuantTensor("w", source, W.shape, bits, group, False, FLOAT32)


def by_the_paper(x: Array, group: int) -> Codes:
    """One column after another, with the inverse of H over the columns that are left; float64."""
    w, h = W.astype(np.float64), x.T.astype(np.float64) @ x
    energy = h.diagonal().astype(np.float32)
    h += np.diag(DAMPING * energy + FLOOR * energy.mean())
    parts: list[Codes] = []
    codes = np.empty((N, K), np.uint8)
    for k in range(K):
        if k % group == 0:
            parts.append(
                search(w[:, None, k : k + group].astype(np.float32), energy[None, k : k + group], 4, False, FLOAT32)
            )
        scale, zero = parts[-1].scale[:, 0], parts[-1].zero[:, 0].astype(np.float64)
        codes[:, k] = np.clip(np.rint(w[:, k] / scale) + zero, 0, 15)
        left = np.linalg.inv(h[k:, k:])
        w[:, k:] -= np.outer((w[:, k] - (codes[:, k] - zero) * scale) / left[0, 0], left[0])
    return Codes(codes, *(np.concatenate(part, axis=1) for part in list(zip(*parts, strict=True))[1:]))


@pytest.mark.parametrize("group", [32, 48, K])  # whole blocks of columns, and those of a row that is one group
def test_it_is_the_algorithm_of_the_paper(group: int) -> None:
    found, expected = feed_back(weight(group=group), *factor_of(X, "w")), by_the_paper(X, group)
    assert np.mean(found.codes != expected.codes) < 2e-3  # a rounding at a tie moves what follows
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-2)
    loss, plain = (
        np.linalg.norm(X @ (dequantize(codes, group) - W).T)
        for codes in (found, quantize_asymmetric(W.reshape(N, -1, group), 4, FLOAT32))
    )
    assert loss < 0.8 * plain


def test_inputs_that_say_nothing_of_one_another_leave_the_search() -> None:
    energy = RANDOM.uniform(1, 2, K).astype(np.float32)
    found = feed_back(weight(), np.eye(K, dtype=np.float32), energy)
    groups = W.reshape(N, -1, GROUP), energy.reshape(-1, GROUP)
    for part, expected in zip(found, search(*groups, 4, False, FLOAT32), strict=True):
        np.testing.assert_array_equal(part, expected)


def kl(planned: Plan, ids: Array) -> float:
    """To the float model's next token, in nats."""
    assert planned.model.llm is not None
    twin, feeds = planned.twins["x86"], llm_feeds(ids, planned.model.llm)
    logits = [Evaluation(graph, feeds).take("logits") for graph in (twin.floating, twin.canonical)]
    return float(Tokens.join([compare_tokens(logits[0], logits[1], ids)]).kl.mean())


@pytest.mark.slow
def test_the_model_loses_less_and_its_artifact_is_what_was_planned(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:3000])
    (ids,) = windows(tokens_of(TINY, TEXT)[-400:], 400, batch=1)
    asked: dict[str, Any] = {"quant": "a16w4", "group_size": 32, "layers": {"model.layers.1.mlp.down_proj": "a16w8:-1"}}
    plain = plan(Request(TINY, ("x86",), tmp_path, **asked))
    first, second = (
        make(Request(TINY, ("x86",), tmp_path / "out", calibration=text, **asked))
        for make in (planned_and_written, plan)
    )
    assert kl(first, ids) < 0.8 * kl(plain, ids)
    for one, other in zip(first.twins["x86"].quantized.values(), second.twins["x86"].quantized.values(), strict=True):
        for part, again in zip(chain(*one.tiles()), chain(*other.tiles()), strict=True):
            np.testing.assert_equal(part, again)
    kinds = [{path: str(q) for path, q in each.twins["x86"].quantized.items()} for each in (plain, first)]
    assert kinds[0] == kinds[1]
    with pytest.raises(UserError, match="the calibration text is not the one") as caught:
        request_of(tmp_path / "out", TINY, None)
    assert sha256(text) in str(caught.value)
    request, (artifact,) = request_of(tmp_path / "out", TINY, None, text)
    assert (request.calibration, artifact.source["calibration"]) == (text, sha256(text))


def refusals(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    short, binary, long = folder / "short", folder / "binary", folder / "long"
    short.write_text("A few words.")
    binary.write_bytes(b"\xff\xfe" * 4000)
    long.write_text(TEXT.read_text())
    (folder / "own").mkdir()
    onnx, beside = (
        model_file(at / "m.onnx", "y = MatMul(x, w)", {"w": np.ones((64, 64), np.float32)})
        for at in (folder, folder / "own")
    )
    (beside.parent / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    return {
        "short": ({"calibration": short}, f"is too short\n  expected: at least {LEAST} tokens.*\n  found:    4"),
        "binary": ({"calibration": binary}, "the text cannot be read"),
        "missing": ({"calibration": folder / "none"}, "the text cannot be read"),
        "float": ({"calibration": long, "quant": "none"}, "calibration does nothing without quantization"),
        "tokens": ({"calibration": long, "quant": "a8w8", "lm_head": "float"}, "says nothing without weight-only"),
        "search": ({"calibration": long, "search": "none"}, "both say how codes are fitted"),
        "onnx": ({"calibration": long, "model": onnx}, "this model reads none"),
        "beside": ({"calibration": long, "model": beside}, "this model reads none"),
    }


@pytest.mark.parametrize("case", ["short", "binary", "missing", "float", "tokens", "search", "onnx", "beside"])
def test_what_it_cannot_be_had_for(case: str, tmp_path: Path) -> None:
    given, says = refusals(tmp_path)[case]
    with pytest.raises(UserError, match=says):
        plan(Request(**{"model": TINY, "targets": ("x86",), "out": tmp_path / "out", "quant": "a16w4", **given}))
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_has_its_tokenizer_within(tmp_path: Path) -> None:
    check_text(Request(tmp_path / "m.gguf", ("x86",), tmp_path, quant="a16w8", requantize=True, calibration=TEXT))

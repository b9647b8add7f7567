"""Codes fitted to a text: the paper's algorithm, what it brings, and what it cannot be had for."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler.accuracy.calibrate import (
    AIM,
    DAMPING,
    FLOOR,
    LEAST,
    Seen,
    columns_of,
    descend,
    feed_back,
    fitted_codes,
    seen,
    tokens_of,
)
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


def by_the_paper(w: Array, x: Array, group: int) -> Codes:
    """One column after another, with the inverse of H over the columns that are left; float64."""
    w, h = w.astype(np.float64), x.T.astype(np.float64) @ x
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
    inputs = seen(X, X.copy(), "w", group)
    assert [*np.sort(inputs.order)] == [*range(K)]
    energy = (X**2).sum(axis=0)
    assert (np.diff(energy[inputs.order].reshape(-1, group)) <= 0).all()  # the loudest first in each group
    assert (np.diff(energy[inputs.order].reshape(-1, group).sum(axis=1)) <= 0).all()
    assert {frozenset(each // group) for each in inputs.order.reshape(-1, group)} == {
        *map(frozenset, zip(range(K // group)))
    }
    found = feed_back(weight(group=group), columns_of(weight(), inputs), inputs)
    expected = by_the_paper(W[:, inputs.order], X[:, inputs.order], group)
    assert np.mean(expected.codes != found.codes.T) < 2e-3  # a rounding at a tie moves what follows
    np.testing.assert_allclose(found.scale.T, expected.scale, rtol=2e-2)


def loss(codes: Codes, group: int) -> float:
    """Of what the inputs X make of a weight; H is damped, so that this is not the very sum that fitting lowers."""
    return float(np.linalg.norm(X @ (dequantize(codes, group) - W).T))


@pytest.mark.parametrize("group", [32, 48, K])
def test_every_step_loses_less(group: int) -> None:
    inputs, quant = seen(X, X.copy(), "w", group), weight(group=group)
    codes, scale, zero = feed_back(quant, columns_of(quant, inputs), inputs)
    columns, groups = np.argsort(inputs.order), np.argsort(inputs.order[::group] // group)
    fed_back = Codes(codes[columns].T, scale[groups].T, zero[groups].T)
    plain = quantize_asymmetric(W.reshape(N, -1, group), 4, FLOAT32)
    assert loss(fed_back, group) < 0.8 * loss(plain, group)
    fitted = fitted_codes(quant, inputs)
    np.testing.assert_array_equal(fitted.scale, fed_back.scale)
    assert loss(fitted, group) < 0.98 * loss(fed_back, group)


def test_a_descent_ends_where_no_code_alone_would_be_better() -> None:
    inputs = seen(X, X.copy(), "w", GROUP)
    codes, scale, zero = feed_back(weight(), columns_of(weight(), inputs), inputs)
    w = W[:, inputs.order].T
    for _ in range(20):
        descend(codes, w.copy(), scale, zero, inputs.h, 15)

    def cost(codes: Array) -> Array:
        grouped = codes.astype(np.float64).reshape(-1, GROUP, N)
        error = w - ((grouped - zero[:, None]) * scale[:, None]).reshape(K, N)
        return np.asarray((error * (inputs.h.astype(np.float64) @ error)).sum(axis=0))

    best = cost(codes)
    for k in range(K):
        for step in (-1, 1):
            other = codes.astype(int)
            other[k] = np.clip(other[k] + step, 0, 15)
            assert (cost(other) >= best * (1 - 1e-5)).all(), (k, step)


def test_inputs_that_say_nothing_of_one_another_leave_the_search() -> None:
    energy = RANDOM.uniform(1, 2, K).astype(np.float32)
    one = np.eye(K, dtype=np.float32)
    found = fitted_codes(weight(), Seen(np.arange(K), one, one, energy, np.zeros_like(one)))
    groups = W.reshape(N, -1, GROUP), energy.reshape(-1, GROUP)
    for part, expected in zip(found, search(*groups, 4, False, FLOAT32), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_what_the_layers_before_lost_is_made_up_for() -> None:
    """Where their error goes with the inputs: of half of all tokens, for the other half, and not in full."""
    off = X @ (MIXED / 4) + X  # as a layer before might have made it
    here, there = slice(0, None, 2), slice(1, None, 2)

    def missed(aim: Array) -> float:
        fitted = fitted_codes(weight(), seen(off[here], aim.copy(), "w", GROUP))
        return float(np.linalg.norm(off[there] @ dequantize(fitted, GROUP).T - X[there] @ W.T))

    assert missed(X[here]) < 0.85 * missed(off[here])
    inputs = seen(off[here], X[here].copy(), "w", GROUP)
    h = off[here].T @ off[here]
    h += np.diag(DAMPING * h.diagonal() + FLOOR * h.diagonal().mean())
    share = 200 / (200 + AIM * K)
    wanted = W.T + share * np.linalg.solve(h, off[here].T @ (X[here] - off[here]) @ W.T)
    np.testing.assert_allclose(columns_of(weight(), inputs), wanted[inputs.order], rtol=1e-2, atol=1e-3)


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
    minima = {"quant_method": "instant_quant", "weight_format": "uint4", "group_size": 32, "zero_point": "float"}
    return {
        "short": ({"calibration": short}, f"is too short\n  expected: at least {LEAST} tokens.*\n  found:    4"),
        "binary": ({"calibration": binary}, "the text cannot be read"),
        "missing": ({"calibration": folder / "none"}, "the text cannot be read"),
        "float": ({"calibration": long, "quant": "none"}, "calibration does nothing without quantization"),
        "tokens": ({"calibration": long, "quant": "a8w8", "lm_head": "float"}, "says nothing without weight-only"),
        "search": ({"calibration": long, "search": "none"}, "both say how codes are fitted"),
        "minima": ({"calibration": long, "quant": None, "quant_config": minima}, "zero_point float is"),
        "onnx": ({"calibration": long, "model": onnx}, "this model reads none"),
        "beside": ({"calibration": long, "model": beside}, "this model reads none"),
    }


CASES = ("short", "binary", "missing", "float", "tokens", "search", "minima", "onnx", "beside")


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_be_had_for(case: str, tmp_path: Path) -> None:
    given, says = refusals(tmp_path)[case]
    with pytest.raises(UserError, match=says):
        plan(Request(**{"model": TINY, "targets": ("x86",), "out": tmp_path / "out", "quant": "a16w4", **given}))
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_has_its_tokenizer_within(tmp_path: Path) -> None:
    check_text(Request(tmp_path / "m.gguf", ("x86",), tmp_path, quant="a16w8", requantize=True, calibration=TEXT))

"""The search of scales: never worse than the plain formula, and as good as trying what it says that it tries."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.importance import each_input
from instantrt.compiler.quant.config import parse_quant_config
from instantrt.compiler.say import At
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, InMemory
from instantrt.passes.core.quant import Codes, dequantize, quantize_asymmetric, quantize_symmetric
from instantrt.passes.core.search import BLOCK, RATIOS, SearchedQuant, search

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


EVEN = np.ones(1, np.float32)


def errors(w: Array, block: Codes, importance: Array = EVEN) -> Array:
    """Squared error of each group [n, G], weighted, in float64."""
    found = dequantize(block, w.shape[2]).reshape(w.shape)
    return ((found.astype(np.float64) - w) ** 2 * importance).sum(axis=2)


def plain(w: Array, bits: int, symmetric: bool, dtype: np.dtype) -> Codes:
    return (quantize_symmetric if symmetric else quantize_asymmetric)(w.copy(), bits, dtype)


FINITE = st.floats(-100, 100, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)


@given(
    w=arrays(np.float32, (2, 3, 8), elements=FINITE),
    importance=arrays(np.float32, (3, 8), elements=st.floats(0, 100, width=32)),
    symmetric=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_group_of_eight_bits_gets_worse(w: Array, importance: Array, symmetric: bool) -> None:
    before = errors(w, plain(w, 8, symmetric, F32), importance)
    after = errors(w, search(w, importance, 8, symmetric, F32), importance)
    assert (after <= before * (1 + 1e-3) + 1e-7).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_groups_of_four_bits_get_better_but_for_few(group: int, symmetric: bool) -> None:
    """The range itself is not among what is tried: most groups do better with a little more and a little less."""
    random = np.random.default_rng(6)
    w = random.standard_t(5, (64, 1024 // group, group)).astype(np.float32)
    importance = np.square(random.standard_t(3, (1024 // group, group))).astype(np.float32)
    before = errors(w, plain(w, 4, symmetric, F16), importance)
    after = errors(w, search(w, importance, 4, symmetric, F16), importance)
    assert after.sum() < 0.8 * before.sum()
    assert (after > before).mean() < 0.05


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_group_takes_the_best_of_what_is_tried(symmetric: bool) -> None:
    random = np.random.default_rng(4)
    w, importance = random.standard_t(3, (6, 4, 64)).astype(np.float32), random.random((4, 64), np.float32)
    found = errors(w, search(w, importance, 4, symmetric, F16), importance)
    top, first = 15, int(symmetric)
    for n, g in np.ndindex(6, 4):  # the definition, one group at a time
        low, high = min(w[n, g].min(), 0), max(w[n, g].max(), 0)
        if symmetric:
            high = max(high, -low)
            low = -high
        tried = []
        for ratio in RATIOS[4]:
            scale = np.float32(np.float16((high - low) * ratio / (top - first)))
            zero = 8 if symmetric else np.clip(np.rint(-low * ratio / scale), 0, top)
            v = np.clip(np.rint(w[n, g] / scale) + zero, first, top) - zero
            fitted = np.float32(np.float16((importance[g] * v * w[n, g]).sum() / (importance[g] * v * v).sum()))
            tried += [(importance[g] * (v * each - w[n, g]) ** 2).sum() for each in (scale, fitted)]
        assert found[n, g] <= min(tried) * (1 + 1e-4)
        assert found[n, g] > min(tried) * 0.5


def test_what_is_clipped_is_what_meets_little() -> None:
    w = np.random.default_rng(4).standard_normal((1, 1, 64)).astype(np.float32)
    w[0, 0, 7] = 8.0  # an outlier
    for of_outlier, of_others, clipped in ((0.01, 1.0, True), (100.0, 1.0, False)):
        importance = np.full((1, 64), of_others, np.float32)
        importance[0, 7] = of_outlier
        found = dequantize(search(w, importance, 4, False, F16), 64)
        assert (abs(found[0, 7] - 8.0) > 0.5) == clipped


@pytest.mark.parametrize("remember", [False, True])
def test_rows_stream_in_blocks_that_do_not_change_the_result(remember: bool) -> None:
    """Nor does it when they are read again, by the scales that were found before."""
    w = np.random.default_rng(4).standard_normal((3 * BLOCK // 256, 256)).astype(np.float32)
    importance = np.random.default_rng(5).random(256, np.float32)
    quant = SearchedQuant("w", InMemory(w), 4, 64, False, F16, importance.tobytes(), remember=remember)
    whole = search(w.reshape(len(w), 4, 64), importance.reshape(4, 64), 4, False, F16)
    for _ in range(2):
        tiles = list(quant.tiles())
        assert [tile.start for tile in tiles] == [0, BLOCK // 256, 2 * BLOCK // 256]
        for i, part in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([tile.parts[i] for tile in tiles]), part)
        assert list(quant.found) == ([0, BLOCK // 256, 2 * BLOCK // 256] if remember else [])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    w = np.ones((4, 32), np.float32)
    w[2, 5] = value
    with pytest.raises(UserError, match=r"w\[2, 5\]"):
        list(SearchedQuant("w", InMemory(w), 4, 16, False, F16, np.ones(32, np.float32).tobytes()).tiles())


def test_a_search_is_what_a_config_asks_for() -> None:
    asked = {"quant_method": "instant_quant", "weight_format": "uint4", "group_size": 16}
    assert parse_quant_config(asked, "test").search == "none"
    assert parse_quant_config(asked | {"search": "activations"}, "test").search == "activations"
    with pytest.raises(UserError, match="search"):
        parse_quant_config(asked | {"search": "mse"}, "test")
    with pytest.raises(UserError, match="quantized already"):
        parse_quant_config({"quant_method": "gptq", "search": "activations"}, "test")


def test_inputs_are_there_in_any_order_and_say_how_far_they_are() -> None:
    """A module that a model calls twice, on its tokens and on its relative positions, is listed where it came first."""
    names = ["input", "first", "second", "third"]
    tensors = [gs.Variable(name, np.dtype(np.float32), ["b", 2]) for name in names]
    nodes = [gs.Node("Neg", b.name, {}, [a], [b]) for a, b in pairwise(tensors)]
    graph, x = gs.Graph(nodes, tensors[:1], tensors[-1:], opset=23), np.ones((1, 2), np.float32)
    said = list[str]()
    seen = list(each_input(graph, ["third", "second"], None, Data("generated", feeds=({"input": x},)), said.append))
    assert said == [At(f"measuring the inputs of layers, {done} of 2") for done in (0, 1)]
    assert all(isinstance(text, At) for text in said), "no stage begins with each"
    assert [(name, float(rows[0, 0])) for name, rows in seen] == [("third", -1), ("second", 1)]

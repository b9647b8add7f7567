"""The clip search: never worse than the plain formula, and as good as trying every clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instantrt.compiler.quant.config import parse_quant_config
from instantrt.compiler.quant.instant import instant
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, InMemory
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import Codes, InstantQuant, dequantize, quantize_asymmetric, quantize_symmetric
from instantrt.passes.core.search import BLOCK, RATIOS, SearchedQuant, search

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def errors(w: Array, block: Codes) -> Array:
    """Squared error of each group [n, G], in float64."""
    found = dequantize(block, w.shape[2]).reshape(w.shape)
    return ((found.astype(np.float64) - w) ** 2).sum(axis=2)


def plain(w: Array, bits: int, symmetric: bool, dtype: np.dtype) -> Codes:
    return (quantize_symmetric if symmetric else quantize_asymmetric)(w.copy(), bits, dtype)


FINITE = st.floats(-100, 100, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)


@given(w=arrays(np.float32, (2, 3, 8), elements=FINITE), bits=st.sampled_from((4, 8)), symmetric=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_group_gets_worse(w: Array, bits: int, symmetric: bool) -> None:
    before, after = errors(w, plain(w, bits, symmetric, F32)), errors(w, search(w, bits, symmetric, F32))
    assert (after <= before * (1 + 1e-3) + 1e-9).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_group_takes_the_best_ratio(symmetric: bool) -> None:
    w = np.random.default_rng(4).standard_t(3, (6, 4, 64)).astype(np.float32)
    found = errors(w, search(w, 4, symmetric, F16))
    top, first = 15, int(symmetric)
    for n, g in np.ndindex(6, 4):  # the definition, one group at a time
        low, high = min(w[n, g].min(), 0), max(w[n, g].max(), 0)
        if symmetric:
            high = max(high, -low)
            low = -high
        tried = []
        for ratio in RATIOS:
            scale = np.float32(np.float16((high - low) * ratio / (top - first)))
            zero = 8 if symmetric else np.clip(np.rint(-low * ratio / scale), 0, top)
            codes = np.clip(np.rint(w[n, g] / scale) + zero, first, top)
            tried.append((((codes - zero) * scale - w[n, g]) ** 2).sum())
        assert found[n, g] == pytest.approx(min(tried), rel=1e-4)


def test_outliers_are_clipped() -> None:
    w = np.random.default_rng(4).standard_normal((64, 1, 1024)).astype(np.float32)
    assert errors(w, search(w, 4, False, F16)).sum() < 0.85 * errors(w, plain(w, 4, False, F16)).sum()


def test_rows_stream_in_blocks_that_do_not_change_the_result() -> None:
    w = np.random.default_rng(4).standard_normal((3 * BLOCK // 256, 256)).astype(np.float32)
    tiles = list(SearchedQuant("w", InMemory(w), 4, 64, False, F16).tiles())
    assert [tile.start for tile in tiles] == [0, 256, 512]
    whole = search(w.reshape(len(w), 4, 64), 4, False, F16)
    for i, part in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([tile.parts[i] for tile in tiles]), part)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    w = np.ones((4, 32), np.float32)
    w[2, 5] = value
    with pytest.raises(UserError, match=r"w\[2, 5\]"):
        list(SearchedQuant("w", InMemory(w), 4, 16, False, F16).tiles())


def test_search_is_opt_in() -> None:
    layer = Linear(None, None, InMemory(np.ones((4, 32), np.float32)), (4, 32), "layer")
    asked = {"quant_method": "instant_quant", "weight_format": "uint4", "group_size": 16}
    for search_key, kind in (({}, InstantQuant), ({"search": "mse"}, SearchedQuant)):
        config = parse_quant_config(asked | search_key, "test")
        assert isinstance(instant(layer, config, F32).source, kind)
    with pytest.raises(UserError, match="search"):
        parse_quant_config(asked | {"search": "hqq"}, "test")
    with pytest.raises(UserError, match="quantized already"):
        parse_quant_config({"quant_method": "gptq", "search": "mse"}, "test")

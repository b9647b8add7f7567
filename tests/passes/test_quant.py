"""The arithmetic of InstantQuant against a scalar oracle in exact rationals, on groups that break naive formulas."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import InMemory, convert
from instantrt.passes.core.quant import (
    Codes,
    InstantQuant,
    dequantize,
    quantize_asymmetric,
    quantize_symmetric,
    reduce_groups,
)

FLOAT32 = np.dtype(np.float32)
STORED = [FLOAT32, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def round_half_even(x: Fraction) -> int:
    return round(x)  # Python rounds rationals half to even


def oracle_asymmetric(w: list[float], bits: int, scale: np.float32) -> tuple[list[int], int]:
    """Codes and zero point of one group for a given stored scale; float32 quotients as the definition says."""
    top = 2**bits - 1
    quotient = [Fraction(float(np.float32(v) / scale)) for v in w]
    low = Fraction(float(-np.float32(min(0, *w)) / scale))
    zero = min(max(round_half_even(low), 0), top)
    return [min(max(round_half_even(q) + zero, 0), top) for q in quotient], zero


groups = arrays(np.float32, (4, 2, 8), elements=st.floats(-1000, 1000, width=32))


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@given(w=groups)
@settings(max_examples=60, deadline=None)
def test_asymmetric_codes_are_those_of_the_formula(w: np.ndarray, bits: int, dtype: np.dtype) -> None:
    block = quantize_asymmetric(w.copy(), bits, dtype)
    codes = block.codes.reshape(w.shape)
    for n in range(w.shape[0]):
        for g in range(w.shape[1]):
            want, zero = oracle_asymmetric(w[n, g].tolist(), bits, block.scale[n, g])
            assert codes[n, g].tolist() == want
            assert block.zero[n, g] == zero


@pytest.mark.parametrize("dtype", STORED, ids=str)
@given(w=groups)
@settings(max_examples=60, deadline=None)
def test_scales_are_representable_as_stored(w: np.ndarray, dtype: np.dtype) -> None:
    for quantize in (quantize_asymmetric, quantize_symmetric):
        scale = quantize(w.copy(), 8, dtype).scale
        assert (scale > 0).all()
        assert (scale.astype(dtype).astype(np.float32) == scale).all()


@pytest.mark.parametrize(
    "group",
    [
        pytest.param([0.0] * 8, id="zeros"),
        pytest.param([3.25] * 8, id="constant"),
        pytest.param([-7.5] * 8, id="negative-constant"),
        pytest.param([5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7], id="one-sided"),
        pytest.param([-5.0, -5.1, -5.2, -5.3, -5.4, -5.5, -5.6, -5.7], id="one-sided-negative"),
        pytest.param([1e-30] * 8, id="tiny"),
        pytest.param([0.0] * 7 + [1000.0], id="outlier"),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_group_is_exact_to_one_step(group: list[float], bits: int) -> None:
    w = np.array(group, np.float32).reshape(1, 1, -1)
    block = quantize_asymmetric(w.copy(), bits, FLOAT32)
    error = np.abs(dequantize(block, 8) - w.reshape(1, -1))
    assert error.max() <= block.scale.max()
    if len(set(group)) == 1 and abs(group[0]) > 1e-20:
        assert error.max() <= abs(group[0]) * 1e-6  # a constant group is its own largest step


@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("size", [1, 8, 32, 48, 64, 96, 128])
def test_codes_do_not_depend_on_the_type_that_holds_the_weights(size: int, source: type) -> None:
    w = (np.random.default_rng(size).integers(-510, 511, (4, 3, size)) / 4).astype(source)
    w[1] = -0.0
    w[2] = -abs(w[2])
    for quantize in (quantize_asymmetric, quantize_symmetric):
        for got, want in zip(quantize(w, 8, FLOAT32), quantize(w.astype(np.float32), 8, FLOAT32), strict=True):
            assert got.dtype == want.dtype
            assert (got == want).all()


@pytest.mark.parametrize(("bits", "top"), [(4, 15), (8, 255)])
def test_a_code_beyond_the_last_is_clamped(bits: int, top: int) -> None:
    """Both ends lie at a tie and round up: -127.5 to a zero of 128, 127.5 to 128 steps, which would be code 256."""
    block = quantize_asymmetric(np.array([[[-top / 2, top / 2, 0]]], np.float32), bits, FLOAT32)
    assert block.zero == (top + 1) // 2
    assert block.codes.tolist() == [[0, top, (top + 1) // 2]]


@given(w=groups)
@settings(max_examples=60, deadline=None)
def test_symmetric_uses_the_largest_magnitude_of_either_sign(w: np.ndarray) -> None:
    block = quantize_symmetric(w.copy(), 8, FLOAT32)
    assert ((block.codes >= 1) & (block.codes <= 255)).all()
    assert (block.zero == 128).all()
    error = np.abs(dequantize(block, 8).reshape(w.shape) - w)
    assert (error <= block.scale[..., None] * 0.5001).all()


def test_a_wrong_scale_is_seen() -> None:
    """The bound of the tests above bites: one scale off by one percent breaks it."""
    w = np.random.default_rng(0).standard_normal((4, 2, 128)).astype(np.float32)
    block = quantize_symmetric(w.copy(), 8, FLOAT32)
    off = Codes(block.codes, block.scale * np.where(np.arange(2) == 1, 1.01, 1).astype(np.float32), block.zero)
    error = np.abs(dequantize(off, 128).reshape(w.shape) - w)
    assert not (error <= block.scale[..., None] * 0.5001).all()


@given(w=arrays(np.float32, (3, 2, 32), elements=st.floats(-10, 10, width=32)))
@settings(max_examples=40, deadline=None)
def test_short_groups_reduce_as_numpy_does(w: np.ndarray) -> None:
    for op in (np.minimum, np.maximum):
        assert (reduce_groups(op, w) == op.reduce(w, axis=2)).all()


def test_bf16_widens_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    wide = convert(every, FLOAT32)
    assert (wide.view(np.uint32) == every.view(np.uint16).astype(np.uint32) << 16).all()


@pytest.mark.parametrize(("value", "found"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_weights_that_are_not_finite_are_named(value: float, found: str) -> None:
    w = np.ones((4, 32), np.float32)
    w[2, 17] = value
    with pytest.raises(UserError, match=r"layer\.q\[2, 17\]") as caught:
        list(InstantQuant("layer.q", InMemory(w), 8, 32, False, FLOAT32).tiles())
    assert caught.value.found == found


def test_a_scale_that_overflows_float16_is_refused() -> None:
    w = np.full((2, 32), 3e38, np.float32)
    with pytest.raises(UserError, match="too large for its scale"):
        list(InstantQuant("layer.q", InMemory(w), 8, 32, False, np.dtype(np.float16)).tiles())

"""Scales, zero points and sums of weights as the 16-bit type that an engine holds them in, or refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import Codes, QuantTensor, dequantize


def raised(block: Codes, weight: QuantTensor, dtype: np.dtype[Any]) -> Codes:
    """Scales below the smallest normal number of `dtype` become that one, and codes count its steps.

    That moves a weight by half of it at most, in rows whose largest weight `dtype` itself may round by as much. Others
    stay as they are, and `in_range` refuses them.
    """
    info, scale = ml_dtypes.finfo(dtype), block.scale
    step = np.float32(info.tiny)
    rows = np.flatnonzero((scale < step).any(axis=1))
    if len(rows):
        largest = np.abs(dequantize(Codes(*(part[rows] for part in block)), weight.group_size)).max(axis=1)
        rows = rows[largest * np.float32(info.eps) >= step]
    if not len(rows):
        return block
    ratio = np.minimum(scale[rows] / step, 1)[..., None]
    zero = np.float32(0) if weight.has_minima else block.zero[rows].astype(np.float32)[..., None]
    steps = block.codes[rows].reshape(len(rows), weight.groups, -1) - zero
    codes, wide = block.codes.copy(), scale.copy()
    codes[rows] = (np.rint(steps * ratio) + zero).reshape(len(rows), -1)
    wide[rows] = np.maximum(scale[rows], step)
    return Codes(codes, wide, block.zero)


def finite(values: Array, dtype: np.dtype[Any], weight: QuantTensor, start: int, what: str) -> Array:
    """`values` as `dtype`, refused where that would make infinities."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if not np.isfinite(narrow).all():
        raise out_of_range(weight, start, float(np.abs(values).max()), dtype, what)
    return narrow


def in_range(scale: Array, dtype: np.dtype[Any], weight: QuantTensor, start: int) -> Array:
    """`scale` as `dtype`; TensorRT checks neither infinite nor subnormal scales, so this does, behind `raised`.

    docs/facts.md, "Scales out of range"
    """
    info = ml_dtypes.finfo(dtype)
    low, high = float(scale.min()), float(scale.max())
    if low < float(info.tiny) or high > float(info.max):
        raise out_of_range(weight, start, low if low < float(info.tiny) else high, dtype, "scale")
    return scale.astype(dtype)


def out_of_range(weight: QuantTensor, start: int, value: float, dtype: np.dtype[Any], what: str) -> UserError:
    info = ml_dtypes.finfo(dtype)
    return UserError(
        f"a {what} does not fit {dtype.name}",
        where=f"{weight.name}, rows from {start}",
        expected=f"{float(info.tiny):.3g} to {float(info.max):.5g}",
        found=f"{value:.5g}",
        fix="leave this layer float with --ignore",
    )

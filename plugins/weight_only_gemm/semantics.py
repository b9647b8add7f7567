"""What WeightOnlyGemm computes, in NumPy: the truth that every kernel is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from math import erf

import numpy as np

from instantrt.plugins.schema import Array
from instantrt.plugins.weight_only_gemm import layout

NONE, SILU, GELU, GELU_TANH = range(4)
_ERF = np.vectorize(erf, otypes=[np.float64])
ACTIVATIONS = {
    NONE: lambda v: v,
    SILU: lambda v: v / (1 + np.exp(-v)),
    GELU: lambda v: v * 0.5 * (1 + _ERF(v / np.sqrt(2.0))),
    GELU_TANH: lambda v: v * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
}


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """int8 activations: symmetric, one float32 scale per row; a row of zeros has scale 1. Half to even."""
    x, top = x.astype(np.float32), np.float32(127)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    amax = np.where(amax == 0, top, amax)
    return np.clip(np.rint(x * (top / amax)), -127, 127), amax / top


def exact(x: Array, codes: Array, affine: Array, bias: Array | None, attrs: Mapping[str, int]) -> tuple[Array, Array]:
    """The mathematical result in float64, before output rounding, and the magnitude sum|x||w| that bounds its error."""
    wide, k = np.float64, x.shape[-1]
    rows, row_scale = quantize_rows(x) if attrs["activation_bits"] == 8 else (x, np.float32(1))
    rows = rows.astype(wide)
    scale, zero = (np.repeat(affine[:, i::2].astype(wide).T, attrs["group"], axis=1) for i in (0, 1))
    w = (layout.unpack(codes, attrs["bits"], k) - zero) * scale
    b = np.zeros(len(w)) if bias is None else bias.astype(wide)
    v, magnitude = rows @ w.T * row_scale + b, np.abs(rows) @ np.abs(w).T * row_scale + np.abs(b)
    if not attrs["gated"]:
        return ACTIVATIONS[attrs["activation"]](v), magnitude
    # rows come in strips of 16: eight gates, then the eight ups that they multiply
    (gate, up), (gm, um) = (np.moveaxis(a.reshape(*a.shape[:-1], -1, 2, 8), -2, 0) for a in (v, magnitude))
    y = ACTIVATIONS[attrs["activation"]](gate) * up
    m = gm * np.abs(up) + um * np.abs(gate) + gm * um * 2.0**-20
    return y.reshape(*x.shape[:-1], -1), m.reshape(*x.shape[:-1], -1)

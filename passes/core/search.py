"""InstantQuant with a search: each group clips its range where that lowers the squared error. No data, no gradients.

Clipping a few outliers makes every other weight finer; the best of RATIOS is taken per group, the whole range among
them, so no group gets worse than by the plain formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from instantrt.passes.core.lazy import Array, Tile, convert
from instantrt.passes.core.quant import Codes, Quantizer, not_finite, reduce_groups, stored

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
BLOCK = 1 << 16  # weights searched together: three float32 buffers of it stay in the L2 cache


class SearchedQuant(Quantizer):
    """As InstantQuant, with the clip of each group searched."""

    def tiles(self) -> Iterator[Tile]:
        for start, (rows,) in self.weight.tiles():
            step = max(1, BLOCK // rows.shape[1])
            for first in range(0, len(rows), step):
                w = convert(rows[first : first + step], np.dtype(np.float32))
                with np.errstate(invalid="ignore", over="ignore"):
                    groups = w.reshape(len(w), -1, self.group_size)
                    block = search(groups, self.bits, self.symmetric, self.scale_dtype)
                if not np.isfinite(block.scale).all():
                    raise not_finite(self.name, start + first, w)
                yield Tile(start + first, block)


def search(w: Array, bits: int, symmetric: bool, scale_dtype: np.dtype[Any]) -> Codes:
    """The codes of w `[n, G, g]` float32 whose clip has the least squared error in each group.

    scale = ratio * (fmax' - fmin') / steps, zero = clamp(round(-ratio * fmin' / scale)), as without a search.
    """
    low, high = np.minimum(reduce_groups(np.minimum, w), 0), np.maximum(reduce_groups(np.maximum, w), 0)
    top = np.float32(2**bits - 1)
    central, first = np.float32(2 ** (bits - 1)), np.float32(symmetric)  # symmetric codes leave out the lowest
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    best_error = np.full(low.shape, np.inf, np.float32)
    best_scale, best_zero = np.ones_like(low), np.full_like(low, central)
    buffers = np.empty_like(w), np.empty_like(w)
    for ratio in np.array(RATIOS, np.float32):
        scale = stored((high - low) * ratio / (top - first), scale_dtype)
        zero = np.full_like(low, central) if symmetric else np.clip(np.rint(low * -ratio / scale), 0, top)
        error = squared_error(w, scale, first - zero, top - zero, buffers)
        better = ~(error >= best_error)  # NaN is better: it must reach the caller
        best_error = np.where(better, error, best_error)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
    q = np.divide(w, best_scale[..., None], out=buffers[0])
    np.rint(q, out=q)
    q += best_zero[..., None]
    np.clip(q, first, top, out=q)
    return Codes(q.astype(np.uint8).reshape(len(w), -1), best_scale, best_zero.astype(np.uint8))


def squared_error(w: Array, scale: Array, low: Array, high: Array, buffers: tuple[Array, Array]) -> Array:
    """Of each group of w, quantized to `low` .. `high` steps of `scale`: [n, G]."""
    v, q = buffers
    np.multiply(w, (1 / scale)[..., None], out=v)
    np.rint(v, out=q)
    np.maximum(q, low[..., None], out=q)
    np.minimum(q, high[..., None], out=q)
    q -= v
    error: Array = np.einsum("ngk,ngk->ng", q, q) * scale**2
    return error

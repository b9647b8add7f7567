"""InstantQuant with a search: scales that keep a layer's outputs, by how large its inputs are; no gradients.

With inputs that are not correlated, an error of the weight in column k costs E[x_k^2] times its square. Range and scale
of each group are chosen to lower that sum: ratios of the whole range, each with the scale that is best for its codes
(weighted least squares, as llama.cpp's make_qx_quants has it). Clipping pays where what is clipped meets little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from instantrt.passes.core.lazy import FLOAT32, Array, Tile, convert
from instantrt.passes.core.quant import (
    ROUND,
    Codes,
    Quantizer,
    checked_tiles,
    in_steps,
    low_bytes,
    reduce_groups,
    stored,
)

RATIOS = {4: (1.03, 0.95, 0.87), 8: (1.0, 0.9, 0.8)}  # by bits: docs/facts.md, "Ratios of a range"
TINY = np.finfo(np.float32).tiny
BLOCK = 1 << 19  # weights searched together: docs/facts.md, "NumPy in two threads"


@dataclass(frozen=True)
class SearchedQuant(Quantizer):
    """As InstantQuant, with range and scale of each group searched.

    importance   E[x_k^2] of the inputs, [K] float32 as bytes, which hash once
    remember     what was found stays in memory, for whoever reads the codes again: the search is most of the time
    found        row -> scales in their own type and zero points, both [n, G], of a block of rows
    """

    importance: bytes
    remember: bool = field(default=False, kw_only=True)
    found: dict[int, tuple[Array, Array]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def tiles(self) -> Iterator[Tile]:
        return checked_tiles(self, self.blocks(), self.codes_of)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """(the first row, rows float32) that are searched together."""
        for start, (rows,) in self.weight.tiles():
            step = max(1, BLOCK // rows.shape[1])
            for first in range(0, len(rows), step):
                yield start + first, convert(rows[first : first + step], FLOAT32)

    def codes_of(self, start: int, w: Array) -> Codes:
        """Those of the rows from `start` on, w [n, G, g] float32."""
        if start in self.found:
            scale, zero = self.found[start]
            return codes_by(w, scale.astype(FLOAT32), zero, self.bits, self.symmetric)
        importance = np.frombuffer(self.importance, np.float32).reshape(-1, self.group_size)
        codes = search(w, importance, self.bits, self.symmetric, self.scale_dtype)
        if self.remember:
            self.found[start] = codes.scale.astype(self.scale_dtype), codes.zero
        return codes


def search(w: Array, importance: Array, bits: int, symmetric: bool, scale_dtype: np.dtype[Any]) -> Codes:
    """The codes of w `[n, G, g]` float32 whose squared error, times `importance` `[G, g]`, is least in each group.

    Of every ratio: scale = ratio * (fmax' - fmin') / steps, zero = clamp(round(-ratio * fmin' / scale)), as without a
    search; then, v = code - zero, scale = sum(i v w) / sum(i v v), which no other scale is better than for these codes.
    """
    low, high = np.minimum(reduce_groups(np.minimum, w), 0), np.maximum(reduce_groups(np.maximum, w), 0)
    top = np.float32(2**bits - 1)
    central, first = np.float32(2 ** (bits - 1)), np.float32(symmetric)  # symmetric codes leave out the lowest
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    best_gain = np.full(low.shape, -np.inf, np.float32)
    best_scale, best_zero = np.ones_like(low), np.full_like(low, central)
    v, weighted = np.empty_like(w), np.empty_like(w)
    for ratio in np.array(RATIOS[bits], np.float32):
        scale = stored((high - low) * ratio / (top - first), scale_dtype)
        zero = np.full_like(low, central) if symmetric else np.clip(np.rint(low * -ratio / scale), 0, top)
        np.multiply(w, (1 / scale)[..., None], out=v)
        np.rint(v, out=v)
        np.minimum(v, (top - zero)[..., None], out=v)  # np.clip with bounds for each group takes twice as long
        np.maximum(v, (first - zero)[..., None], out=v)
        np.multiply(v, importance, out=weighted)
        along, size = np.einsum("ngk,ngk->ng", weighted, w), np.einsum("ngk,ngk->ng", weighted, v)
        for found in (scale, stored(np.where(along > 0, along / np.maximum(size, TINY), scale), scale_dtype)):
            gain = found * (2 * along - found * size)  # sum(i w w) less the error
            better = ~(gain <= best_gain)  # NaN is better: it must reach the caller
            best_gain = np.where(better, gain, best_gain)
            best_scale, best_zero = np.where(better, found, best_scale), np.where(better, zero, best_zero)
    return codes_by(w, best_scale, best_zero.astype(np.uint8), bits, symmetric)


def codes_by(w: Array, scale: Array, zero: Array, bits: int, symmetric: bool) -> Codes:
    """The codes of w `[n, G, g]` float32 by scales, float32, and zero points, uint8, both `[n, G]`."""
    v = in_steps(w, scale)
    v += ROUND
    v += zero.astype(FLOAT32)[..., None]
    np.clip(v, ROUND + np.float32(symmetric), ROUND + np.float32(2**bits - 1), out=v)
    return Codes(low_bytes(v).reshape(len(w), -1), scale, zero)

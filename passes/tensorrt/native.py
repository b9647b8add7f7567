"""Views of a quantized weight in the forms that TensorRT takes without a plugin.

TensorRT takes signed codes and no zero points. With c the central code 2^(bits-1) the same weight is

    (code - zero) * scale  =  (code - c) * scale  +  (c - zero) * scale
    code * scale + minimum  =  (code - c) * scale  +  minimum + c * scale

a symmetric DequantizeLinear, and a term that is constant within a group: x times it is mean(x over the group) times
`group_size` and the term. The mean, not the sum: it cannot overflow float16.

Where x has a mean, both parts are larger than their sum, and 16 bits round each: so a token's mean is taken off first,
as 16 bits have it, m. With x' = x - m as 16 bits have that, and S the sum of a channel's weights,

    x @ w  =  x' @ w + (m - mean(x')) * S
           =  x' @ ((code - c) * scale)  +  mean(x' by group) @ (group_size * term - S / groups)  +  m * S

where mean(x') is what rounding left: nothing large cancels any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View
from instantrt.passes.core.quant import Codes, QuantTensor, dequantize, offsets
from instantrt.passes.tensorrt.ranges import finite, in_range, raised

INT4_BLOCK = 128  # see `block_size`


@dataclass(frozen=True)
class Native:
    """A weight as an engine whose scales are `dtype` holds it: its `raised` codes, and S where `centred` asks for it.

    beside   the views of it that are loaded, not streamed: one evaluation of the product makes them, too
    """

    weight: QuantTensor
    dtype: np.dtype[Any]
    centred: bool = False
    beside: list[View] = field(default_factory=list, init=False, repr=False, compare=False)

    def tiles(self) -> Iterator[Tile]:
        """Codes, scales and zero points, and S float32 [n]."""
        for start, parts in self.weight.tiles():
            block = raised(Codes(*parts), self.weight, self.dtype)
            sums = (dequantize(block, self.weight.group_size).sum(axis=1),) if self.centred else ()
            yield Tile(start, (*block, *sums))

    def codes(self) -> gs.Constant:
        """code - c as int8 or int4 `[K, N]`."""
        n, k = self.weight.shape
        code_type = np.dtype(np.int8 if self.weight.bits == 8 else ml_dtypes.int4)
        central = np.uint8(self.weight.central)

        def project(tile: Tile) -> Array:
            return np.subtract(tile.parts[0], central).view(code_type).T

        return gs.Constant(f"{self.weight.name}/codes", View(self, (k, n), code_type, axis=1, project=project))

    def block_scales(self, block: int) -> gs.Constant:
        """Scales for blocks of `block` along K: `[K / block, N]`; a scale that covers several blocks is repeated."""
        n, k = self.weight.shape
        repeat = self.weight.group_size // block

        def project(tile: Tile) -> Array:
            return np.repeat(in_range(tile.parts[1], self.dtype, self.weight, tile.start), repeat, axis=1).T

        return gs.Constant(
            f"{self.weight.name}/scale", View(self, (k // block, n), self.dtype, axis=1, project=project)
        )

    def channel_scales(self, factor: float = 1.0) -> gs.Constant:
        """One scale a channel, times `factor`: `[N]`."""
        assert self.weight.per_channel

        def project(tile: Tile) -> Array:
            return in_range(tile.parts[1][:, 0] * np.float32(factor), self.dtype, self.weight, tile.start)

        return gs.Constant(f"{self.weight.name}/scale", View(self, self.weight.shape[:1], self.dtype, project=project))

    def corrections(self) -> gs.Constant:
        """K times what is constant within a channel: `[N]`."""
        assert self.weight.per_channel

        def project(tile: Tile) -> Array:
            values = self.terms(tile)[:, 0] * np.float32(self.weight.shape[1])
            return finite(values, self.dtype, self.weight, tile.start, "zero point correction")

        return self.loaded("corrections", View(self, self.weight.shape[:1], self.dtype, project=project))

    def centring(self) -> tuple[gs.Constant, gs.Constant]:
        """What x' by group meets, `[G, N]` or `[N]` for one group, and what m does, S `[N]`."""
        assert self.centred

        def by_group(tile: Tile) -> Array:
            values = self.terms(tile) * np.float32(self.weight.group_size)
            values -= tile.parts[3][:, None] / np.float32(g)
            narrow = finite(values, self.dtype, self.weight, tile.start, "zero point correction")
            return narrow[:, 0] if g == 1 else narrow.T

        def whole(tile: Tile) -> Array:
            return finite(tile.parts[3], self.dtype, self.weight, tile.start, "sum of weights")

        n, g = self.weight.shape[0], self.weight.groups
        shape, axis = ((n,), 0) if g == 1 else ((g, n), 1)
        return (
            self.loaded("corrections", View(self, shape, self.dtype, axis=axis, project=by_group)),
            self.loaded("sums", View(self, (n,), self.dtype, project=whole)),
        )

    def loaded(self, what: str, view: View) -> gs.Constant:
        self.beside.append(view)
        return gs.Constant(f"{self.weight.name}/{what}", view)

    def terms(self, tile: Tile) -> Array:
        """What is constant within a group: float32 [n, G]."""
        return offsets(Codes(*tile.parts[:3]), self.weight.central)


def block_size(weight: QuantTensor) -> int:
    """The block in the graph: the group, or for int4 a part of it where TensorRT would not fuse the whole.

    It fuses int4 in blocks of 8 to 1024, and neither one block of K nor one scale a channel: docs/facts.md, "Which
    weights TensorRT fuses".
    """
    n = weight.group_size
    if weight.bits == 8 or (n <= 1024 and not weight.per_channel):
        return n
    return next((b for b in (INT4_BLOCK, 64, 32, 16, 8) if n % b == 0 and b < weight.shape[1]), n)

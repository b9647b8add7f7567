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

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View
from instantrt.passes.core.quant import Codes, QuantTensor, dequantize, offsets
from instantrt.passes.tensorrt.ranges import finite, in_range, raised

INT4_BLOCK = 128  # see `block_size`


def signed_codes(weight: QuantTensor, dtype: np.dtype[Any]) -> gs.Constant:
    """code - c as int8 or int4 `[K, N]`, of a weight whose scales are stored as `dtype`."""
    n, k = weight.shape
    code_type = np.dtype(np.int8 if weight.bits == 8 else ml_dtypes.int4)

    def project(tile: Tile) -> Array:
        codes = raised(Codes(*tile.parts), weight, dtype).codes
        return np.subtract(codes, np.uint8(weight.central)).view(code_type).T

    return gs.Constant(f"{weight.name}/codes", View(weight, (k, n), code_type, axis=1, project=project))


def block_scales(weight: QuantTensor, block: int, dtype: np.dtype[Any]) -> gs.Constant:
    """Scales for blocks of `block` along K: `[K / block, N]`; a scale that covers several blocks is repeated."""
    n, k = weight.shape
    repeat = weight.group_size // block

    def project(tile: Tile) -> Array:
        scale = raised(Codes(*tile.parts), weight, dtype).scale
        return np.repeat(in_range(scale, dtype, weight, tile.start), repeat, axis=1).T

    return gs.Constant(f"{weight.name}/scale", View(weight, (k // block, n), dtype, axis=1, project=project))


def channel_scales(weight: QuantTensor, dtype: np.dtype[Any], factor: float = 1.0) -> gs.Constant:
    """One scale a channel, times `factor`: `[N]`."""
    assert weight.per_channel

    def project(tile: Tile) -> Array:
        scale = raised(Codes(*tile.parts), weight, dtype).scale[:, 0]
        return in_range(scale * np.float32(factor), dtype, weight, tile.start)

    return gs.Constant(f"{weight.name}/scale", View(weight, weight.shape[:1], dtype, project=project))


def corrections(weight: QuantTensor, dtype: np.dtype[Any]) -> gs.Constant:
    """K times what is constant within a channel: `[N]`."""
    assert weight.per_channel

    def project(tile: Tile) -> Array:
        values = offsets(raised(Codes(*tile.parts), weight, dtype), weight.central)[:, 0] * np.float32(weight.shape[1])
        return finite(values, dtype, weight, tile.start, "zero point correction")

    return gs.Constant(f"{weight.name}/corrections", View(weight, weight.shape[:1], dtype, project=project))


def centring(weight: QuantTensor, dtype: np.dtype[Any]) -> tuple[gs.Constant, gs.Constant]:
    """What x' by group meets, `[G, N]` or `[N]` for one group, and what m does, S `[N]`."""

    def total(block: Codes) -> Array:
        return np.asarray(dequantize(block, weight.group_size).sum(axis=1))

    def by_group(tile: Tile) -> Array:
        block = raised(Codes(*tile.parts), weight, dtype)
        values = offsets(block, weight.central) * np.float32(weight.group_size)
        values -= total(block)[:, None] / np.float32(g)
        narrow = finite(values, dtype, weight, tile.start, "zero point correction")
        return narrow[:, 0] if g == 1 else narrow.T

    def whole(tile: Tile) -> Array:
        return finite(total(raised(Codes(*tile.parts), weight, dtype)), dtype, weight, tile.start, "sum of weights")

    n, g = weight.shape[0], weight.groups
    shape, axis = ((n,), 0) if g == 1 else ((g, n), 1)
    return (
        gs.Constant(f"{weight.name}/corrections", View(weight, shape, dtype, axis=axis, project=by_group)),
        gs.Constant(f"{weight.name}/sums", View(weight, (n,), dtype, project=whole)),
    )


def block_size(weight: QuantTensor) -> int:
    """The block in the graph: the group, or for int4 a part of it where TensorRT would not fuse the whole.

    It fuses int4 in blocks of 8 to 1024, and neither one block of K nor one scale a channel: docs/facts.md, "Which
    weights TensorRT fuses".
    """
    n = weight.group_size
    if weight.bits == 8 or (n <= 1024 and not weight.per_channel):
        return n
    return next((b for b in (INT4_BLOCK, 64, 32, 16, 8) if n % b == 0 and b < weight.shape[1]), n)

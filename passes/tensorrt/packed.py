"""Quantized weights as the plugin's kernels read them, packed tile by tile as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Tile, View, rows_by
from instantrt.passes.core.quant import Codes, scales_of
from instantrt.passes.gemm.packed import Packed, interleave
from instantrt.passes.tensorrt.ranges import finite, in_range, raised
from instantrt.plugins.weight_only_gemm import layout

ROWS = layout.STRIP * layout.TILE_STRIPS


@dataclass(frozen=True)
class Fragments(Packed):
    """Delivers (codes [strips, K blocks, 512] in frag16, affine [G, 2 n] of alternating scales and zeros)."""

    dtype: np.dtype[Any]

    @property
    def bias_type(self) -> np.dtype[Any]:
        return self.dtype

    def constants(self, path: str) -> list[gs.Tensor]:
        (n, k), first = self.shape, self.weights[0]
        codes = View(self, layout.packed_shape(n, k, first.bits), np.int8)
        affine = View(self, (first.groups, 2 * n), self.dtype, axis=1, project=scales_of)
        return [gs.Constant(f"{path}.packed", codes), gs.Constant(f"{path}.affine", affine)]

    def tiles(self) -> Iterator[Tile]:
        first = self.weights[0]
        chunks = (rows_by(w.tiles(), ROWS // len(self.weights)) for w in self.weights)
        for i, same in enumerate(zip(*chunks, strict=True)):
            blocks = [raised(Codes(*tile.parts), w, self.dtype) for tile, w in zip(same, self.weights, strict=True)]
            codes, scale, zero = (interleave(each) for each in zip(*blocks, strict=True))
            scale = in_range(scale, self.dtype, first, i * ROWS)
            if first.has_minima:
                zero = -zero / scale.astype(np.float32)
            zero = finite(zero, self.dtype, first, i * ROWS, "zero point")  # codes fit every 16-bit type
            affine = np.stack((scale, zero), axis=-1)  # [n, G, 2]
            packed = layout.pack(codes, first.bits)
            yield Tile(i * layout.TILE_STRIPS, (packed, affine.transpose(1, 0, 2).reshape(first.groups, -1)))

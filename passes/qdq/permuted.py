"""The rows of a weight in another order, as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from instantrt.passes.core.lazy import TILE_BYTES, Source, Tile
from instantrt.passes.core.quant import Codes, Order


@dataclass(frozen=True)
class Permuted:
    """The rows of a source in another order; holds one weight in memory while it is written."""

    source: Source
    order: Order

    def tiles(self) -> Iterator[Tile]:
        tiles = [tile.parts for tile in self.source.tiles()]
        coded = isinstance(tiles[0], Codes)
        parts = [np.concatenate(part) for part in zip(*tiles, strict=True)]
        del tiles
        step = max(1, TILE_BYTES // max(1, parts[0][:1].nbytes))
        for start in range(0, len(self.order), step):
            rows = self.order.indices[start : start + step]
            taken = tuple(part[rows] for part in parts)
            yield Tile(start, Codes(*taken) if coded else taken)

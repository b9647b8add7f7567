"""Weights whose rows or columns are multiplied while they are read, and what passes that do so have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, Source, Tile, convert, view_of
from instantrt.passes.core.linear import Linear, weight_constant
from instantrt.passes.core.rewrite import M, Reject, Rewrite
from instantrt.passes.core.subgraphs import tensors

FEW = 8  # one column in so many


@dataclass(frozen=True)
class ScaledColumns:
    """W [N, K] of `rows` times factors [K]: float32, or their own type where few columns change and it holds them."""

    rows: Source
    factors: bytes  # float32; bytes hash once

    def tiles(self) -> Iterator[Tile]:
        factors = np.frombuffer(self.factors, FLOAT32)
        changed = np.flatnonzero(factors != 1)
        for start, (rows,) in self.rows.tiles():
            yield Tile(start, (scaled_columns(rows, factors, changed),))


def scaled_columns(rows: Array, factors: Array, changed: Array) -> Array:
    """`rows` [n, K] times `factors` [K], which are 1 but for those at `changed`."""
    if len(changed) * FEW <= len(factors):
        wide = convert(rows[:, changed], FLOAT32) * factors[changed]
        with np.errstate(over="ignore"):
            narrow = wide.astype(rows.dtype)
        if np.array_equal(convert(narrow, FLOAT32), wide):  # 16 bits are quantized in half the time
            scaled = rows.copy()
            scaled[:, changed] = narrow
            return scaled
    return np.asarray(convert(rows, FLOAT32) * factors)


def scaled(found: Linear, factors: Array) -> gs.Constant:
    """The weight of a linear with its columns times `factors` [K]."""
    return weight_constant(found.path, ScaledColumns(found.rows, factors.tobytes()), found.shape)


@dataclass(frozen=True)
class ScaledRows:
    """W [N, K] of `rows` times factors [N]: in their own type where it holds them, else float32."""

    rows: Source
    factors: bytes  # float32; bytes hash once

    def tiles(self) -> Iterator[Tile]:
        factors = np.frombuffer(self.factors, FLOAT32)[:, None]
        for start, (rows,) in self.rows.tiles():
            wide = convert(rows, FLOAT32) * factors[start : start + len(rows)]
            with np.errstate(over="ignore"):
                narrow = wide.astype(rows.dtype)
            yield Tile(start, (narrow if np.array_equal(convert(narrow, FLOAT32), wide) else wide,))


@dataclass(frozen=True)
class Scaling(Rewrite[M]):
    """A pass that multiplies weights: it knows who else reads them, and what the graph gives."""

    readers: Counter[Source] = field(default_factory=Counter, repr=False, compare=False, kw_only=True)
    outputs: frozenset[str] = field(default=frozenset(), repr=False, compare=False, kw_only=True)

    def for_graph(self, graph: gs.Graph) -> Self:
        return replace(self, readers=readers_of(graph), outputs=frozenset(t.name for t in graph.outputs))

    def read_elsewhere(self, found: Iterable[Linear]) -> Reject | None:
        """Of the first linear whose weight another node reads, too."""
        others = (each.path for each in found if self.readers[each.rows] > 1)
        return next((Reject(f"the weight of {path} is read elsewhere, too") for path in others), None)


def readers_of(graph: gs.Graph) -> Counter[Source]:
    """How many nodes read each weight."""
    readers = Counter[Source]()
    for tensor in tensors(graph).values():
        if (view := view_of(tensor)) is not None:
            readers[view.source] += len(tensor.outputs)
    return readers

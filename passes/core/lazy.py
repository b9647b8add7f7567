"""Constants that are references: their bytes are made once, tile by tile, when an artifact is written.

A `Source` delivers a tensor, or several tensors computed together, as tiles of consecutive rows. A `View` is one
constant of the graph, a projection of a source's tiles; many views may share a source (codes, scales and zero points
of one weight do), and a writer then reads that source once. Passes exchange views and never look at bytes.

    Source [N, K] rows      tile 0 ----project----> View, axis 0: rows land below one another   [N, ...]
                            tile 1                  View, axis 1: rows land beside one another  [K, N]
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from instantrt.passes.core.errors import UserError

G_LOGGER.severity = G_LOGGER.ERROR  # its warnings (no colours, bf16 has no NumPy type) say nothing to a user

Array = npt.NDArray[Any]
TILE_BYTES = 1 << 21  # two threads share the interpreter: docs/facts.md, "NumPy in two threads"
KEPT = 31 << 20  # bytes: nearly the most that raises malloc's bound, as blocks above 32 MiB do not
FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FOUR_BIT = (np.dtype(ml_dtypes.uint4), np.dtype(ml_dtypes.int4))

np.empty(KEPT, np.uint8)  # and freed: so that malloc keeps what tiles free (docs/facts.md, "NumPy in two threads")


class Tile(NamedTuple):
    """Rows `start ... start + len(parts[0])` of every tensor that a source delivers."""

    start: int
    parts: tuple[Array, ...]


class Source(Protocol):
    """Rows of one or several tensors, computed together. Hashable: equal sources are read once."""

    def tiles(self) -> Iterator[Tile]:
        """Consecutive tiles in row order; every call starts again."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor stored contiguously in a file, row-major, little-endian."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    name: str

    def tiles(self) -> Iterator[Tile]:
        rows = self.shape[0] if self.shape else 1
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        step = max(1, TILE_BYTES // max(1, row_bytes))
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = read_exactly(file.fileno(), self.offset + start * row_bytes, count * row_bytes, self)
                yield Tile(start, (data.view(self.dtype).reshape(count, *row_shape),))

    def columns(self, start: int, stop: int) -> Array:
        """Columns `start ... stop` of a matrix: `[rows, stop - start]`."""
        rows, width = self.shape
        size = self.dtype.itemsize
        out = np.empty((rows, (stop - start) * size), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for row in range(rows):
                where = self.offset + (row * width + start) * size
                out[row] = read_exactly(file.fileno(), where, (stop - start) * size, self)
        return out.view(self.dtype)


def read_exactly(fd: int, offset: int, size: int, tensor: FileTensor) -> Array:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise UserError(
            f"the file ends inside tensor {tensor.name}",
            where=str(tensor.path),
            expected=f"{size} bytes at offset {offset}",
            found=f"{len(data)} bytes",
            fix="copy or download the file again",
        )
    return np.frombuffer(data, np.uint8)


@dataclass(frozen=True)
class Transposed:
    """The columns of a stored matrix `[K, N]`, delivered as rows `[n, K]`."""

    matrix: FileTensor

    def tiles(self) -> Iterator[Tile]:
        rows, width = self.matrix.shape
        # Strips of 4 KiB a row keep the reads sequential enough for a disk and the tile small.
        step = max(4096 // self.matrix.dtype.itemsize, TILE_BYTES // max(1, rows * self.matrix.dtype.itemsize))
        for start in range(0, width, step):
            yield Tile(start, (np.ascontiguousarray(self.matrix.columns(start, min(start + step, width)).T),))


@dataclass(frozen=True, eq=False)
class InMemory:
    """A small tensor that is already here. It equals another that looks at the same memory in the same way."""

    array: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def memory(self) -> tuple[object, ...]:
        a = self.array
        return a.__array_interface__["data"], a.strides, a.shape, a.dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemory) and self.memory == other.memory

    def __hash__(self) -> int:
        return hash(self.memory)

    def tiles(self) -> Iterator[Tile]:
        yield Tile(0, (self.array,))


@dataclass(frozen=True)
class Missing:
    """A weight that the checkpoint does not hold as floats under this name: a quantized one replaces it, or it is
    an error. `found` is the type of the tensor that has the name."""

    name: str
    where: str
    found: str = ""

    def tiles(self) -> Iterator[Tile]:
        if self.found:
            raise UserError(
                f"tensor {self.name} is not a float tensor",
                where=self.where,
                found=self.found,
                fix="its scales are missing, or the checkpoint's config does not say how it is quantized",
            )
        raise UserError(
            f"the checkpoint has no tensor {self.name}",
            where=self.where,
            expected="every parameter that the model's config announces",
            fix="check that all shards are there and that config.json belongs to them",
        )


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """A cast; bf16 widens by a shift, which is several times faster than ml_dtypes' own cast."""
    if values.dtype == BFLOAT16 and dtype == np.float32:
        bits = values.view(np.uint16).astype(np.uint32)
        bits <<= 16  # in place: a second array of this size costs more than the arithmetic
        return bits.view(np.float32)
    return values.astype(dtype, copy=False)


def rows_by(tiles: Iterator[Tile], count: int) -> Iterator[Tile]:
    """The same rows in tiles of `count`; the last may be shorter."""
    held: list[tuple[Array, ...]] = []
    start = have = 0
    for tile in tiles:
        held.append(tile.parts)
        have += len(tile.parts[0])
        if have >= count:
            whole = tuple(np.concatenate(same) for same in zip(*held, strict=True))
            full = have // count * count
            for at in range(0, full, count):
                yield Tile(start + at, tuple(part[at : at + count] for part in whole))
            held, start, have = [tuple(part[full:] for part in whole)], start + full, have - full
    if have:
        yield Tile(start, tuple(np.concatenate(same) for same in zip(*held, strict=True)))


def first_part(tile: Tile) -> Array:
    return tile.parts[0]


class View(LazyValues):  # type: ignore[misc]
    """One constant: `project` applied to each tile of `source`, laid out along `axis`.

    `dtype` is the type in the graph (an ml_dtypes type for bf16 and four-bit types). `project` returns
    an array whose `axis` counts the tile's rows; its dtype is cast to `dtype`.
    """

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        *,
        axis: int = 0,
        project: Callable[[Tile], Array] = first_part,
    ) -> None:
        self.source, self.shape, self.axis, self.project = source, tuple(shape), axis, project
        self.dtype = np.dtype(dtype)
        count = math.prod(self.shape)
        self.nbytes = (count + 1) // 2 if self.dtype in FOUR_BIT else count * self.dtype.itemsize
        self.kept: Array | None = None  # what it is, once, for whoever loads it next

    @property
    def tensor(self) -> onnx.TensorProto:
        """The initializer without its data; the writer fills in where the data went."""
        return onnx.TensorProto(
            data_type=onnx.helper.np_dtype_to_tensor_dtype(self.dtype),
            dims=self.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )

    @property
    def content(self) -> Hashable:
        """Equal for views that have the same bytes, whatever their shapes. A lambda is like itself alone."""
        return self.source, self.project, self.axis, self.dtype

    @property
    def as_stored(self) -> bool:
        """Is it what its source delivers, as it is?"""
        return self.axis == 0 and self.project is first_part

    def over(self, source: Source) -> View:
        """The same view of another source."""
        view = copy.copy(self)
        view.source, view.kept = source, None
        return view

    def block(self, tile: Tile) -> Array:
        """What one tile contributes, in the view's own dtype."""
        return convert(self.project(tile), self.dtype)

    def load(self) -> Array:
        """The whole tensor; only for small ones and for tests."""
        kept, self.kept = self.kept, None
        if kept is not None:
            return kept.reshape(self.shape)
        return np.concatenate([self.block(tile) for tile in self.source.tiles()], axis=self.axis).reshape(self.shape)


def whole(tensor: FileTensor) -> Array:
    """A tensor read at once: for small ones, tools and tests."""
    return np.concatenate([tile.parts[0] for tile in tensor.tiles()]).reshape(tensor.shape)


def small(name: str, values: Any, dtype: npt.DTypeLike) -> gs.Constant:
    """A constant whose values are known now (axes, shapes, scalars)."""
    return gs.Constant(name, np.asarray(values, dtype))


def view_of(tensor: gs.Tensor) -> View | None:
    """The lazy view behind a constant, or None for a variable or a constant with its values at hand."""
    values = tensor._values if isinstance(tensor, gs.Constant) else None
    return values if isinstance(values, View) else None

"""A weight of the base with its adapter: W + scale B A, row by row in the order of the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, FileTensor, Tile, convert, read_exactly, whole


@dataclass(frozen=True)
class MergedTensor(FileTensor):
    """A float tensor of a checkpoint and what an adapter adds to it, in float32; path and name are the checkpoint's.

    Sums are made in float64 and rounded once: in which order a library adds does not show.

    base        [N, K], or [K, N] where it is `turned`; [N] of a bias
    left        B [N, r], or A [r, K] of a turned one: its rows, or columns, go with the base's rows
    right       A [r, K], or B [N, r]; None of a bias, to which scale * left is added
    magnitude   [N]: of DoRA, the norms that the columns of inputs of an output have in the end
    """

    base: FileTensor
    left: FileTensor
    right: FileTensor | None
    scale: float
    turned: bool = False
    magnitude: FileTensor | None = None

    @classmethod
    def over(
        cls,
        base: FileTensor,
        left: FileTensor,
        right: FileTensor | None,
        scale: float,
        *,
        turned: bool = False,
        magnitude: FileTensor | None = None,
    ) -> MergedTensor:
        own = base.path, base.offset, base.shape, FLOAT32, base.name
        return cls(*own, base, left, right, scale, turned, magnitude)

    @property
    def rank(self) -> int:
        return self.left.shape[0 if self.turned else 1]

    @property
    def sources(self) -> list[FileTensor]:
        """The tensors in files that it is made of."""
        return [t for t in (self.base, self.left, self.right, self.magnitude) if t is not None]

    def tiles(self) -> Iterator[Tile]:
        factor = self.factor() if self.magnitude is not None and self.turned else None
        for start, rows in self.sums():
            with np.errstate(all="ignore"):  # told below
                if factor is not None:
                    np.multiply(rows, factor, out=rows)
                elif self.magnitude is not None:
                    norms = np.sqrt(np.einsum("nk,nk->n", rows, rows))
                    np.multiply(rows, (rows_of(self.magnitude, start, len(rows)) / norms)[:, None], out=rows)
                merged = rows.astype(np.float32)
            if not np.isfinite(merged).all():
                raise UserError(
                    f"{self.name} with its adapter is not finite",
                    where=str(self.left.path),
                    found=f"scale {self.scale:g}, rows {start} to {start + len(rows) - 1}",
                    fix="the adapter, or its base, is damaged: copy both again",
                )
            yield Tile(start, (merged,))

    def columns(self, start: int, stop: int) -> Array:
        return np.concatenate([tile.parts[0][:, start:stop] for tile in self.tiles()])

    def sums(self) -> Iterator[tuple[int, Array]]:
        """(the first row, rows of W + scale B A in float64)."""
        right = None if self.right is None else whole(self.right).astype(np.float64)
        for start, (rows,) in self.base.tiles():
            if self.turned:
                left: Array = self.left.columns(start, start + len(rows)).astype(np.float64).T
            else:
                left = rows_of(self.left, start, len(rows))
            with np.errstate(all="ignore"):
                added = left if right is None else left @ (right.T if self.turned else right)
                added *= self.scale
                added += convert(rows, FLOAT32)
            yield start, added

    def factor(self) -> Array:
        """Of DoRA, magnitude / norm of every output of a turned matrix: its columns."""
        assert self.magnitude is not None
        squares = np.zeros(self.shape[1])
        with np.errstate(all="ignore"):
            for _, rows in self.sums():
                squares += np.einsum("kn,kn->n", rows, rows)
            return rows_of(self.magnitude, 0, self.shape[1]) / np.sqrt(squares)


def rows_of(tensor: FileTensor, start: int, count: int) -> Array:
    """Some rows of a tensor in float64."""
    size = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    with tensor.path.open("rb", buffering=0) as file:
        data = read_exactly(file.fileno(), tensor.offset + start * size, count * size, tensor)
    rows: Array = data.view(tensor.dtype).astype(np.float64).reshape(count, *tensor.shape[1:])
    return rows

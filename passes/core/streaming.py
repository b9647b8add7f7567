"""Operators whose large constants stream: a product reads its matrix by columns, a table gives rows that are picked."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.columns import column_blocks
from instantrt.passes.core.lazy import FLOAT32, Array, View, convert, view_of
from instantrt.passes.core.node_session import NodeSession, value_of
from instantrt.passes.core.rewrite import producer, scalar

Runs = Sequence[Mapping[str, Array]]
T = TypeVar("T")
BEHIND = 2  # tiles that wait: more hold memory and win nothing


def matmul(node: gs.Node, runs: Runs, _: gs.Graph) -> list[Array] | None:
    """x [..., K] @ W [K, N], W by blocks of columns; float32 sums."""
    blocks = column_blocks(node.inputs[1])
    if blocks is None:
        return None
    given = [convert(values[node.inputs[0].name], FLOAT32) for values in runs]
    rows, places = distinct(np.concatenate([x.reshape(-1, x.shape[-1]) for x in given]))
    columns = np.ascontiguousarray(rows.T)

    def product(tile: Any) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by name
            # As it lies in memory: the other way round BLAS takes up to twice the time of few rows.
            made: Array = convert(blocks.block(tile), FLOAT32).T @ columns
            return made

    return split_rows(np.concatenate(list(behind(product, blocks.tiles))).T[places], [x.shape[:-1] for x in given])


def behind(work: Callable[[T], Array], items: Iterable[T]) -> Iterator[Array]:
    """What `work` makes of each, in a thread that is a few behind the one that gets them: reading and quantizing a tile
    take as long as dequantizing and multiplying it. A lone one is worth no thread."""
    coming = iter(items)
    first = tuple(islice(coming, 2))
    if len(first) < 2:
        yield from map(work, first)
        return
    waiting: deque[Future[Array]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in chain(first, coming):
            waiting.append(pool.submit(work, item))
            if len(waiting) > BEHIND:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def distinct(rows: Array) -> tuple[Array, Array]:
    """Rows [R, K] without those that are another's, bit for bit, and where each of all is among them [R]: runs often
    begin with the same tokens."""
    whole = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    _, first, places = np.unique(rows.view(whole), return_index=True, return_inverse=True)
    return rows[first], places.reshape(-1)


def split_rows(joined: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Rows [R, ...] of several runs, each in the shape of its own."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = np.split(joined, ends)
    return [part.reshape(*shape, *joined.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def streamed_table(node: gs.Node) -> tuple[View, float | None] | None:
    """The table [V, ...] whose rows a Gather picks, and the one scale it is dequantized by, None where it is not."""
    codes, scale = node.inputs[0], None
    dq = producer(codes, "DequantizeLinear")
    if dq is not None and len(dq.inputs) == 2:
        codes, scale = dq.inputs[0], scalar(dq.inputs[1])
    view = view_of(codes)
    if view is None or view.axis != 0 or node.attrs.get("axis", 0) != 0 or (dq is not None and scale is None):
        return None
    return view, scale


def gather(node: gs.Node, runs: Runs, _: gs.Graph) -> list[Array] | None:
    """Rows of a stored table."""
    found = streamed_table(node)
    if found is None:
        return None
    view, scale = found
    ids, shapes = rows_of(node, runs, view.shape[0])
    (rows,) = picked([view], ids)
    return split_rows(rows if scale is None else rows.astype(FLOAT32) * np.float32(scale), shapes)


def gather_in_codes(node: gs.Node, runs: Runs, graph: gs.Graph) -> list[Array] | None:
    """GatherBlockQuantized of a table of those rows alone that are picked: codes, scales and zero points."""
    views = [view_of(t) for index, t in enumerate(node.inputs) if index != 1]
    tables = [view for view in views if view is not None and view.axis == 0]
    if len(tables) < len(views) or node.attrs.get("gather_axis", 0) != 0:
        return None
    ids, shapes = rows_of(node, runs, tables[0].shape[0])
    table, *others = (gs.Constant(f"rows {index}", rows) for index, rows in enumerate(picked(tables, ids)))
    inputs = [table, gs.Variable("ids", np.dtype(np.int64)), *others]
    lone = gs.Node(node.op, node.name, dict(node.attrs), inputs, [gs.Variable("y")], domain=node.domain)
    feeds = {"ids": np.arange(len(ids))}
    return split_rows(NodeSession(lone, feeds, graph)(feeds)[0], shapes)


def rows_of(node: gs.Node, runs: Runs, count: int) -> tuple[Array, list[tuple[int, ...]]]:
    """What a node of several runs picks of a table of `count` rows, [R], and the sizes of the ids in each run.

    IndexError for a row that is not there.
    """
    given = [value_of(node.inputs[1], values) for values in runs]
    ids = np.concatenate([each.reshape(-1) for each in given])
    ids = np.where(ids < 0, ids + count, ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise IndexError(f"{node.name or node.op} picks rows {ids.min()} to {ids.max()} of {count}")
    return ids, [each.shape for each in given]


def picked(views: Sequence[View], ids: Array) -> list[Array]:
    """The rows `ids` of each, as their tiles go by; what is of one source is read together."""
    out = [np.empty((len(ids), *view.shape[1:]), view.dtype) for view in views]
    for source in dict.fromkeys(view.source for view in views):
        for tile in source.tiles():
            here = (ids >= tile.start) & (ids < tile.start + len(tile.parts[0]))
            for view, rows in zip(views, out, strict=True):
                if here.any() and view.source == source:
                    rows[here] = view.block(tile)[ids[here] - tile.start]
    return out

"""A constant matrix [K, N] by blocks of columns, as the tiles of its source go by: stored, or in codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, Source, Tile, View, convert, view_of
from instantrt.passes.core.node_session import HALVES

Columns = Callable[[Tile], Array]  # those of a tensor that a tile of its source makes, [..., n]


class ColumnBlocks(NamedTuple):
    """A matrix by blocks [K, n] of its columns: `block` makes one of each of the `tiles`, in any thread."""

    tiles: Iterable[Any]
    block: Callable[[Any], Array]


def column_blocks(weight: gs.Tensor) -> ColumnBlocks | None:
    """Those of a matrix that is a constant, or made of constants of one source; None for any other.

    Nothing is read before the first tile is asked for.
    """
    made = weight.inputs[0] if weight.inputs else None
    if made is not None and made.op == "Cast":
        wide = column_blocks(made.inputs[0])
        return ColumnBlocks(wide.tiles, lambda tile: cast(made, [wide.block(tile)])) if wide is not None else None
    if made is not None and made.op == "Transpose":
        rows = view_of(made.inputs[0])
        if rows is None or rows.axis != 0 or len(rows.shape) != 2 or made.attrs.get("perm", [1, 0]) != [1, 0]:
            return None
        return ColumnBlocks(rows.source.tiles(), lambda tile: rows.block(tile).T)
    view = view_of(weight)
    if view is not None and view.kept is not None:
        return ColumnBlocks((view,), View.load)
    codes = first_constant(weight)
    columns = columns_of(weight, codes) if codes is not None else None
    if codes is None or columns is None or len(shape_of(weight)) != 2:
        return None
    return ColumnBlocks(keeping(codes.source), columns)


def first_constant(tensor: gs.Tensor) -> View | None:
    """The lazy one that a tensor is made of, what it is scaled by aside."""
    while tensor.inputs and tensor.inputs[0].op in COLUMNWISE:
        tensor = tensor.inputs[0].inputs[0]
    return view_of(tensor)


def columns_of(tensor: gs.Tensor, codes: View) -> Columns | None:
    """How each tile of the source of `codes` makes columns of a tensor; None where that takes more than one tile."""
    view = view_of(tensor)
    if view is not None:
        return view.block if view.source == codes.source and view.axis == len(view.shape) - 1 else None
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values)
        same = values.size > 0 and (values == values.flat[0]).all()
        return (lambda _: values.flat[0]) if same else None
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in COLUMNWISE or not keeps_columns(node, codes.shape[-1]):
        return None
    given = node.inputs[:1] if node.op in SHAPING else node.inputs
    parts = [part for each in given if (part := columns_of(each, codes)) is not None]
    if len(parts) < len(given) or (node.op in ("Add", "Mul") and not as_large(node)):
        return None
    make = COLUMNWISE[node.op]
    return lambda tile: make(node, [part(tile) for part in parts])


def keeps_columns(node: gs.Node, n: int) -> bool:
    """Is each column, of `n`, made of the same column alone?"""
    view = view_of(node.inputs[0])
    if node.op == "DequantizeLinear" and view is not None:
        rank = len(view.shape)
        axis: int = node.attrs.get("axis", 1)
        return axis in ((rank - 2,) if node.attrs.get("block_size", 0) else (rank - 1, -1))
    if node.op not in SHAPING:
        return bool(node.op != "DequantizeLinear")
    sizes = numbers(node) if isinstance(node.inputs[1], gs.Constant) else []
    if node.op == "Unsqueeze":
        return view is not None and all(0 <= axis < len(view.shape) for axis in sizes)
    return bool(sizes and min(sizes) > 0 and sizes[-1] == n)


def as_large(node: gs.Node) -> bool:
    """Has a sum or a product the sizes of its first input? Of a constant that repeats one value there is one left."""
    first, other = map(shape_of, node.inputs)
    return np.broadcast_shapes(first, other) == first


def shape_of(tensor: gs.Tensor) -> tuple[int, ...]:
    """The sizes of what `columns_of` makes columns of; graphs need not say them."""
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    node = tensor.inputs[0]
    first = shape_of(node.inputs[0])
    sizes = numbers(node) if node.op in SHAPING else []
    if node.op == "Unsqueeze":
        return np.expand_dims(np.broadcast_to(0, first), tuple(sizes)).shape
    return tuple(sizes) or first


def numbers(node: gs.Node) -> list[int]:
    """The sizes or axes that a node of SHAPING reads; ONNX Runtime takes a scalar for one axis."""
    return [int(each) for each in np.asarray(node.inputs[1].values).flat]


def cast(node: gs.Node, given: Sequence[Array]) -> Array:
    with np.errstate(over="ignore"):  # an infinity is reported by name
        return convert(given[0], np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"])))


def dequantized(node: gs.Node, given: Sequence[Array]) -> Array:
    """(codes - zero) * scale in float32; of a matrix both are [n], or by blocks of rows.

    A source's rows are columns here, so that the blocks of one lie side by side in memory: scale and zero are spread
    over them as they are multiplied, and nothing is turned.
    """
    codes, *others = given
    if codes.ndim != 2:  # [G, g, n] and [G, 1, n]
        scale, *zeros = (each.astype(FLOAT32) for each in others)
        q = codes.astype(FLOAT32)
        return (q - zeros[0] if zeros else q) * scale
    q = codes.T
    grouped = q.astype(FLOAT32, order="C").reshape(len(q), -1, node.attrs.get("block_size", 0) or q.shape[1])
    scale, *zeros = (
        each.T.astype(FLOAT32).reshape(*grouped.shape[:2], 1) if each.ndim else each.astype(FLOAT32) for each in others
    )
    if zeros:
        grouped -= zeros[0]
    grouped *= scale
    return grouped.reshape(q.shape).T


def combined(node: gs.Node, given: Sequence[Array]) -> Array:
    """A sum or a product, of 16 bits in float32 and rounded to the 16-bit type of what it is made of."""
    a, b = (convert(each, FLOAT32) if each.dtype in HALVES else each for each in given)
    value = a + b if node.op == "Add" else a * b
    half = next((each.dtype for each in given if each.dtype in HALVES), None)
    return value if half is None else value.astype(half)


def reshaped(node: gs.Node, given: Sequence[Array]) -> Array:
    return given[0].reshape(*numbers(node)[:-1], -1)


def unsqueezed(node: gs.Node, given: Sequence[Array]) -> Array:
    return np.expand_dims(given[0], tuple(numbers(node)))


SHAPING = ("Reshape", "Unsqueeze")
COLUMNWISE: dict[str, Callable[[gs.Node, Sequence[Array]], Array]] = {
    "Cast": cast,
    "DequantizeLinear": dequantized,
    "Add": combined,
    "Mul": combined,
    "Reshape": reshaped,
    "Unsqueeze": unsqueezed,
}


def keeping(source: Source) -> Iterator[Tile]:
    """Its tiles; what views beside the one that streams make of them is kept for whoever loads those."""
    views: Sequence[View] = getattr(source, "beside", ())
    parts: list[list[Array]] = [[] for _ in views]
    for tile in source.tiles():
        for view, own in zip(views, parts, strict=True):
            own.append(view.block(tile))
        yield tile
    for view, own in zip(views, parts, strict=True):
        view.kept = np.concatenate(own, axis=view.axis)

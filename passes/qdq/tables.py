"""Embedding tables in codes: which Gather reads one, and how its rows are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Source, View, view_of
from instantrt.passes.core.names import MASK, POSITIONS
from instantrt.passes.core.quant import InstantQuant, QuantTensor, StoredInCodes
from instantrt.passes.core.rewrite import Reject

TABLE_BLOCKS = (128, 64, 32, 16)
# What tokens go through on their way to their table; and the inputs that pick rows of other tables.
MOVING = "Cast Clip Concat Flatten Max Min Reshape Slice Squeeze Transpose Unsqueeze Where"
ROUTE = frozenset(MOVING.split())
OTHERS = (POSITIONS, "token_type_ids", MASK)


@dataclass(frozen=True)
class Table:
    """Gather(table [V, H], ids), and the table in codes: as stored, or in 8 bits, asymmetric, in blocks along H."""

    node: gs.Node
    quant: QuantTensor


def matrix(node: gs.Node) -> View | None:
    """The constant [V, H] whose rows this node picks."""
    view = view_of(node.inputs[0]) if node.op == "Gather" and node.attrs.get("axis", 0) == 0 else None
    return view if view is not None and len(view.shape) == 2 else None


def stored_table(node: gs.Node, linears: Iterable[QuantTensor]) -> Table | None:
    """The embedding table that this node reads, where the checkpoint has it in codes; a linear may share them."""
    view = matrix(node)
    if view is None or not isinstance(view.source, StoredInCodes):
        return None
    own = view.source.quantized(node.inputs[0].name)
    if own is None or own.shape != view.shape:
        return None
    return Table(node, next((q for q in linears if q.source == own.source), own))


def table(
    node: gs.Node, scale_dtype: np.dtype[Any], tied: Mapping[Source, QuantTensor] = MappingProxyType({})
) -> Table | Reject | None:
    """The embedding table that this node reads, to be quantized; its scales will be stored as `scale_dtype`.

    tied   float weights that a linear has in a form that a table may have, too
    """
    view = matrix(node)
    if view is None:
        return None
    if not picks_tokens(node.inputs[1]):
        return Reject("no tokens pick its rows")
    if view.source in tied:
        return Table(node, tied[view.source])
    v, h = view.shape
    block = next((b for b in TABLE_BLOCKS if h % b == 0), None)
    if block is None:
        return Reject(f"width {h} is no multiple of 16")
    name = node.inputs[0].name
    source = InstantQuant(name, view.source, 8, block, False, scale_dtype)
    return Table(node, QuantTensor(name, source, (v, h), 8, block, False, scale_dtype))


def picks_tokens(ids: gs.Tensor) -> bool:
    """Are they an input of the graph, as it is? Positions, and the rows of a rotary table, are counted or computed."""
    if isinstance(ids, gs.Constant):
        return False
    if not ids.inputs:
        return ids.name not in OTHERS
    (maker,) = ids.inputs
    return maker.op in ROUTE and any(picks_tokens(t) for t in maker.inputs)

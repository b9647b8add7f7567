"""Queries, keys and values as the one product that they are."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, ints
from instantrt.passes.float.fuse_rotary import last_slice
from instantrt.passes.ort.rotary import GROUP_QUERY_ATTENTION


class PackQueryKeyValue(Rewrite[gs.Node]):
    """GroupQueryAttention of parts of x, one behind another -> GroupQueryAttention(x [B, S, (H + 2 KV) * D]).

    The parts are those of a Split, or Slices of columns.
    """

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if node.op != GROUP_QUERY_ATTENTION or not node.inputs[1].name:
            return None
        query, key, value = (columns(t) for t in node.inputs[:3])
        if query is None or key is None or value is None or any(t is not query[0] for t, *_ in (key, value)):
            return Reject("queries, keys and values are not parts of one product")
        x, (_, start, first), (_, second, third), (_, fourth, end) = query[0], query, key, value
        if start or first != second or third != fourth or end != x.shape[-1]:
            return Reject(f"queries, keys and values are not the parts of {x.name} in this order")
        return node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        x = match.i().inputs[0]
        for index, tensor in enumerate((x, gs.Variable.empty(), gs.Variable.empty())):
            match.inputs[index] = tensor


def columns(tensor: gs.Tensor) -> tuple[gs.Tensor, int, int] | None:
    """(x, start, stop) where `tensor` is those columns of x [B, S, N]."""
    node = next(iter(tensor.inputs), None)
    x = node.inputs[0] if node is not None and node.op in ("Split", "Slice") else None
    if node is None or x is None or x.shape is None or len(x.shape) != 3 or not isinstance(x.shape[-1], int):
        return None
    if node.op == "Split":
        sizes = ints(node.inputs[1]) if node.attrs.get("axis") in (-1, 2) and len(node.inputs) == 2 else None
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        return (x, sum(sizes[:index]), sum(sizes[: index + 1])) if sizes is not None else None
    part = last_slice(node, 2) if len(node.inputs) == 5 else None
    if part is None or part[0] < 0:
        return None
    start, stop = part
    return x, start, x.shape[-1] if stop is None else min(stop, x.shape[-1])

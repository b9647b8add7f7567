"""Brings decomposed rotary embeddings back to the operator of opset 23.

Not by onnxscript's rules: they leave the angles of YaRN, which have a factor, in pieces, compute cosine and sine anew
for each embedding instead of once for the model, and see no .onnx file that a user brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Reject, Rewrite, add, ints, producer, scalar, take_over


@dataclass(frozen=True)
class HalveMatch:
    node: gs.Node
    half: gs.Tensor
    others: tuple[gs.Tensor, ...]


class HalveRotaryAngles(Rewrite[HalveMatch]):
    """f(Concat(h, h)) -> Concat(f(h), f(h)), for the cosine and sine of rotary angles and their scalar factor."""

    def match(self, node: gs.Node) -> HalveMatch | Reject | None:
        if node.op not in ("Cos", "Sin", "Mul"):
            return None
        half, others = repeated(node.inputs[0]), tuple(node.inputs[1:])
        if half is None:
            return None
        if any(scalar(t) is None for t in others):
            return Reject(f"the angles meet {others[0].name}, which is no constant factor")
        return HalveMatch(node, half, others)

    def rewrite(self, graph: gs.Graph, match: HalveMatch) -> None:
        out = take_over(match.node)
        half = add(graph, match.node.op, [match.half, *match.others], f"{out.name}_half", name=match.node.name)
        half.dtype, half.shape = FLOAT32, match.half.shape
        add(graph, "Concat", [half, half], out, axis=-1)


@dataclass(frozen=True)
class RotationMatch:
    node: gs.Node
    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor


class FuseRotaryEmbedding(Rewrite[RotationMatch]):
    """Add(Mul(x, cos), Mul(Concat(Neg(x2), x1), sin)) -> RotaryEmbedding(x, cos, sin).

    x [B, H, S, D], x1 and x2 its halves along D; cos and sin Unsqueeze(Concat(h, h), 1) with h [B, S, D/2]. Angles that
    all rows share, h [1, S, D/2], are given to each: the operator has no broadcasting.
    """

    def match(self, node: gs.Node) -> RotationMatch | Reject | None:
        if node.op != "Add":
            return None
        straight, rotated = (producer(t, "Mul") for t in node.inputs)
        concat = producer(rotated.inputs[0], "Concat") if rotated is not None else None
        negated = producer(concat.inputs[0], "Neg") if concat is not None else None
        if straight is None or rotated is None or concat is None or negated is None:
            return None
        x, halves = straight.inputs[0], (*concat.inputs[1:], *negated.inputs)
        slices = [s for t in halves if (s := producer(t, "Slice")) is not None and s.inputs[0] is x]
        if len(slices) != 2 or len(halves) != 2 or not is_last(concat, x):
            return Reject(f"what is turned is not made of two slices of {x.name}")
        half, last = x.shape[-1] // 2 if isinstance(x.shape[-1], int) else None, len(x.shape) - 1
        if [last_slice(s, last) for s in slices] != [(0, half), (half, None)]:
            return Reject(f"the slices of {x.name} {list(x.shape)} are not the halves of its last axis")
        cos, sin = by_head(straight.inputs[1]), by_head(rotated.inputs[1])
        if cos is None or sin is None:
            return Reject("cosine and sine are not Unsqueeze(Concat(h, h), 1) of the half angles")
        return RotationMatch(node, x, cos, sin)

    def rewrite(self, graph: gs.Graph, match: RotationMatch) -> None:
        scope = match.node.name
        out = take_over(match.node)
        angles = [for_rows(graph, h, match.x) for h in (match.cos, match.sin)]
        add(graph, "RotaryEmbedding", [match.x, *angles], out, name=scope)


def for_rows(graph: gs.Graph, half: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """h [B, S, D/2], made once of h [1, S, D/2]."""
    if not half.shape or half.shape[0] != 1 or x.shape[0] == 1:
        return half
    name = f"{half.name}/rows"
    made = next((node for node in half.outputs if node.op == "Expand" and node.outputs[0].name == name), None)
    if made is not None:
        return made.outputs[0]
    rows = add(graph, "Shape", [x], f"{name}/count", start=0, end=1)
    one = small(f"{name}/1", [1, 1], np.int64)
    sizes = add(graph, "Concat", [rows, one], f"{name}/sizes", axis=0)
    return add(graph, "Expand", [half, sizes], gs.Variable(name, FLOAT32, [x.shape[0], *half.shape[1:]]))


def is_last(concat: gs.Node, tensor: gs.Tensor) -> bool:
    """Does `concat` join along the last axis of `tensor`, whose rank is known?"""
    return tensor.shape is not None and concat.attrs["axis"] in (-1, len(tensor.shape) - 1)


def repeated(tensor: gs.Tensor) -> gs.Tensor | None:
    """h, if `tensor` is Concat(h, h) along the last axis."""
    concat = producer(tensor, "Concat")
    same = concat is not None and len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]
    return concat.inputs[0] if concat is not None and same and concat.attrs["axis"] == -1 else None


def by_head(tensor: gs.Tensor) -> gs.Tensor | None:
    """h, if `tensor` is Unsqueeze(Concat(h, h), 1)."""
    unsqueeze = producer(tensor, "Unsqueeze")
    return repeated(unsqueeze.inputs[0]) if unsqueeze is not None and ints(unsqueeze.inputs[1]) == [1] else None


def last_slice(node: gs.Node, last: int) -> tuple[int, int | None] | None:
    """(start, stop) of a Slice along the last axis with step 1; None as stop means to the end."""
    starts, stops, axes, steps = (ints(t) for t in node.inputs[1:5])
    if axes not in ([last], [-1]) or steps != [1] or starts is None or stops is None:
        return None
    return starts[0], None if stops[0] > 1 << 31 else stops[0]

"""Brings decomposed rotary embeddings back to the operator of opset 23."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

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
        concat = producer(node.inputs[0], "Concat")
        if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
            return None
        others = tuple(node.inputs[1:])
        return HalveMatch(node, concat.inputs[0], others) if all(scalar(t) is not None for t in others) else None

    def rewrite(self, graph: gs.Graph, match: HalveMatch) -> None:
        out = take_over(match.node)
        half = add(graph, match.node.op, [match.half, *match.others], f"{out.name}_half", name=match.node.name)
        half.dtype = np.dtype(np.float32)
        add(graph, "Concat", [half, half], out, axis=-1)


@dataclass(frozen=True)
class RotaryMatch:
    node: gs.Node
    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor


class FuseRotaryEmbedding(Rewrite[RotaryMatch]):
    """Add(Mul(x, cos), Mul(Concat(Neg(x2), x1), sin)) -> RotaryEmbedding(x, cos, sin).

    x [B, H, S, D], x1 and x2 its halves along D; cos and sin Unsqueeze(Concat(h, h), 1) with h [B, S, D/2].
    """

    def match(self, node: gs.Node) -> RotaryMatch | Reject | None:
        if node.op != "Add":
            return None
        straight, rotated = (producer(t, "Mul") for t in node.inputs)
        if straight is None or rotated is None:
            return None
        x = straight.inputs[0]
        cos, sin = rotary_half(straight.inputs[1]), rotary_half(rotated.inputs[1])
        if cos is None or sin is None or not is_rotated(rotated.inputs[0], x):
            return None
        return RotaryMatch(node, x, cos, sin)

    def rewrite(self, graph: gs.Graph, match: RotaryMatch) -> None:
        scope = match.node.name
        out = take_over(match.node)
        add(graph, "RotaryEmbedding", [match.x, match.cos, match.sin], out, name=scope)


def rotary_half(tensor: gs.Tensor) -> gs.Tensor | None:
    """h, if `tensor` is Unsqueeze(Concat(h, h), 1)."""
    unsqueeze = producer(tensor, "Unsqueeze")
    concat = producer(unsqueeze.inputs[0], "Concat") if unsqueeze and ints(unsqueeze.inputs[1]) == [1] else None
    same = concat is not None and len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]
    return concat.inputs[0] if concat is not None and same else None


def is_rotated(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Is `tensor` Concat(-x[D/2:], x[:D/2]) along the last axis?"""
    concat = producer(tensor, "Concat")
    if concat is None or len(concat.inputs) != 2 or x.shape is None:
        return False
    negated = producer(concat.inputs[0], "Neg")
    high = producer(negated.inputs[0], "Slice") if negated else None
    low = producer(concat.inputs[1], "Slice")
    if high is None or low is None or high.inputs[0] is not x or low.inputs[0] is not x:
        return False
    half, last = int(x.shape[-1]) // 2, len(x.shape) - 1
    return last_slice(high, last) == (half, None) and last_slice(low, last) == (0, half)


def last_slice(node: gs.Node, last: int) -> tuple[int, int | None] | None:
    """(start, stop) of a Slice along the last axis with step 1; None as stop means to the end."""
    starts, stops, axes, steps = (ints(t) for t in node.inputs[1:5])
    if axes not in ([last], [-1]) or steps != [1] or starts is None or stops is None:
        return None
    return starts[0], None if stops[0] > 1 << 31 else stops[0]


# The angles are halved twice: the cosine itself, then the factor behind it.
FUSE_ROTARY: tuple[Rewrite[Any], ...] = (HalveRotaryAngles(), HalveRotaryAngles(), FuseRotaryEmbedding())

"""What an attention without a cache is made of, one operator or several: its queries, keys, values and mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, producer, scalar
from instantrt.passes.ort.heads import KEYS, SPLIT


@dataclass(frozen=True)
class AttentionParts:
    """`node` makes heads [B, H, S, D] of query [B, H, S, D], key, whose axes `order` has as [B, T, KV, D], and value
    [B, KV, T, D].

    mask    None, or what is added to scores; truth values where a query that sees no key gets zeros
    clamp   may the mask have float32's lowest number?
    """

    node: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    order: list[int]
    value: gs.Tensor
    mask: gs.Tensor | None
    clamp: bool
    attrs: dict[str, Any]


def whole(node: gs.Node) -> AttentionParts | Reject | None:
    """An Attention of heads."""
    if len(node.inputs) > 4 or len(node.outputs) > 1 or "q_num_heads" in node.attrs:
        return None
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
    return checked(AttentionParts(node, query, key, SPLIT, value, mask, False, dict(node.attrs)))


def unguarded(weights: gs.Tensor) -> tuple[gs.Node | None, bool]:
    """The Softmax that makes `weights`, and whether zeros stand for its NaN."""
    where = producer(weights, "Where")
    bad = producer(where.inputs[0], "IsNaN") if where is not None else None
    if where is None or bad is None or bad.inputs[0] is not where.inputs[2] or scalar(where.inputs[1]) != 0:
        return producer(weights, "Softmax"), False
    return producer(bad.inputs[0], "Softmax"), True


def apart(node: gs.Node, softmax: gs.Node, *, guarded: bool) -> AttentionParts | Reject | None:
    """MatMul(Softmax(scores), v), where scores are of two activations."""
    if softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    total = producer(softmax.inputs[0], "Add")
    options = [total.inputs, total.inputs[::-1]] if total is not None else [[softmax.inputs[0], None]]
    for (scores, factor), mask in ((scaled(scores), mask) for scores, mask in options):
        product = producer(scores, "MatMul")
        if product is None or any(isinstance(t, gs.Constant) for t in product.inputs):
            continue
        (query, a), (key, b) = (scaled(t) for t in product.inputs)
        found = mask_of(mask, guarded=guarded)
        if found is None:
            return Reject("zeros in place of NaN, behind a mask that does not tell which keys it hides")
        return checked(AttentionParts(node, query, key, KEYS, node.inputs[1], *found, {"scale": factor * a * b}))
    return Reject("the scores are not one product of two activations, and one mask")


def scaled(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """(x, factor) of x times or over a positive constant; any other tensor as it is."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is not None and node.op in ("Mul", "Div"):
        for x, by in [(a, scalar(b)) for a, b in (node.inputs, node.inputs[::-1])][: 1 if node.op == "Div" else 2]:
            if by is not None and 0 < by < math.inf:
                return x, by if node.op == "Mul" else 1 / by
    return tensor, 1.0


def mask_of(mask: gs.Tensor | None, *, guarded: bool) -> tuple[gs.Tensor | None, bool] | None:
    """What the operator is given of a mask, and whether that is to be clamped; None where it has no such mask."""
    where = producer(mask, "Where") if mask is not None else None
    low = scalar(where.inputs[2]) if where is not None and scalar(where.inputs[1]) == 0 else None
    if guarded and where is not None and low == -math.inf:
        return where.inputs[0], False
    return None if guarded and mask is not None and low is None else (mask, mask is not None)


def checked(parts: AttentionParts) -> AttentionParts | Reject:
    """Are these heads of float32, of numbers that are known?"""
    query, key, value = parts.query, parts.key, parts.value
    if any(t.shape is None or len(t.shape) != 4 for t in (query, key, value)):
        return Reject("query, keys and values are not [batch, heads, sequence, head size]")
    if any(t.dtype not in (None, np.float32) for t in (query, key, value)):
        return Reject("it does not compute in float32")
    if not all(isinstance(d, int) for t in (query, value) for d in (t.shape[1], t.shape[3])):
        return Reject("the number or the size of heads is not a constant")
    if query.shape[0] != value.shape[0]:
        return Reject(f"queries of {query.shape[0]} rows, values of {value.shape[0]}")
    if (mask := parts.mask) is not None and mask.shape is not None and [*mask.shape[-1:]] in ([], [1]):
        return Reject(f"the mask {mask.name} {list(mask.shape)} is one number for all keys")
    return parts

"""Attention without a cache for ONNX Runtime's CPU provider: one operator, on rows as the linears give and take them.

docs/facts.md, "Attention without a cache".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, producer, scalar, take_over

# ONNX Runtime's Attention gives 0 where float32's lowest number, or less, hides all keys, and Softmax their mean. This
# is low enough to swallow any score, too, and is no such number.
HIDDEN = -1e30
SPLIT, KEYS = [0, 2, 1, 3], [0, 3, 1, 2]  # [B, H, S, D] <-> [B, S, H, D];  [B, H, D, T] -> [B, T, H, D]


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


class LowerToAttention(Rewrite[AttentionParts]):
    """MatMul(Softmax(MatMul(q * a, k^T * b) * c + mask), v) -> Attention(q, k, v, mask) [B, S, H*D].

    Also Attention on heads [B, H, S, D], which are moved to rows. Zeros in place of NaN behind the Softmax, as exports
    of scaled_dot_product_attention have them, are what the operator gives where a mask of truth values hides all keys.
    """

    def match(self, node: gs.Node) -> AttentionParts | Reject | None:
        if node.op == "Attention" and not node.domain:
            return whole(node)
        if node.op != "MatMul":
            return None
        softmax, guarded = unguarded(node.inputs[0])
        return apart(node, softmax, guarded=guarded) if softmax is not None else None

    def rewrite(self, graph: gs.Graph, match: AttentionParts) -> None:
        node, name = match.node, match.node.name
        query, width = match.query, match.query.shape[1] * match.value.shape[3]
        joined, out = joins(node.outputs[0]), take_over(node)
        parts = (query, SPLIT, "q"), (match.key, match.order, "k"), (match.value, SPLIT, "v")
        q, k, v = (in_rows(graph, heads, order, f"{name}/{part}") for heads, order, part in parts)
        y = gs.Variable(f"{name}/y", np.dtype(np.float32), [query.shape[0], query.shape[2], width])
        mask = [] if match.mask is None else [whole_mask(graph, match, match.mask)]
        heads = {"q_num_heads": query.shape[1], "kv_num_heads": match.value.shape[1]}
        add(graph, "Attention", [q, k, v, *mask], y, name=name, **match.attrs, **heads)
        split = small(f"{name}/heads", [0, 0, query.shape[1], match.value.shape[3]], np.int64)
        add(graph, "Transpose", [add(graph, "Reshape", [y, split], f"{name}/y_heads")], out, perm=SPLIT)
        for reshape in joined:
            if reshape.outputs[0].shape == y.shape:
                add(graph, "Identity", [y], take_over(reshape))


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
    return parts


def in_rows(graph: gs.Graph, heads: gs.Tensor, order: list[int], name: str) -> gs.Tensor:
    """[B, S, H*D] of heads whose axes `order` has as [B, S, H, D]; undoes how they were made of such rows."""
    while turned := producer(heads, "Transpose"):
        heads, order = turned.inputs[0], [turned.attrs["perm"][axis] for axis in order]
    split = producer(heads, "Reshape") if order == sorted(order) else None
    whole, parts = (split.inputs[0].shape, heads.shape) if split is not None else (None, None)
    if split is not None and whole and parts and whole == [*parts[:2], math.prod(parts[2:])]:
        return split.inputs[0]
    if order != sorted(order):
        heads = add(graph, "Transpose", [heads], f"{name}/turned", perm=order)
    return add(graph, "Reshape", [heads, small(f"{name}/shape", [0, 0, -1], np.int64)], f"{name}/rows")


def joins(heads: gs.Tensor) -> list[gs.Node]:
    """The Reshapes of heads [B, S, H, D]."""
    turned = (user for user in heads.outputs if user.op == "Transpose" and user.attrs["perm"] == SPLIT)
    return [user for node in turned for user in node.outputs[0].outputs if user.op == "Reshape"]


def whole_mask(graph: gs.Graph, match: AttentionParts, mask: gs.Tensor) -> gs.Tensor:
    """The mask as the operator reads it: four axes, and as many queries as there are."""
    whole = mask.shape is not None and len(mask.shape) == 4 and mask.shape[2] == match.query.shape[2]
    if match.clamp:
        nodes = Prefixed(graph, f"{mask.name}/clamped")
        mask = nodes("Max", [mask, nodes.const("low", HIDDEN, np.float32)], "y")
    if whole or match.node.op == "Attention":
        return mask
    nodes = Prefixed(graph, f"{match.node.name}/mask")
    count = nodes("Shape", [match.query], "queries", start=2, end=3)
    one = nodes.const("1", [1], np.int64)
    return nodes("Expand", [mask, nodes("Concat", [one, one, count, one], "shape", axis=0)], "all")


class SumIntoNorm(Rewrite[gs.Node]):
    """LayerNormalization(Add(a, b)) of activations -> LayerNormalization(Sum(a, b)).

    ONNX Runtime makes SkipLayerNormalization of the first when it loads a model, and with many rows that takes four
    times as long as the nodes that it replaces (docs/facts.md, "Attention without a cache").
    """

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        total = producer(node.inputs[0], "Add") if node.op == "LayerNormalization" else None
        constant = total is not None and any(isinstance(t, gs.Constant) for t in total.inputs)
        return None if constant else total

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        match.op = "Sum"

"""Attention without a cache for ONNX Runtime's CPU provider: one operator, on rows as the linears give and take them.

docs/facts.md, "Attention without a cache".
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, take_over
from instantrt.passes.ort.attention_parts import AttentionParts, apart, unguarded, whole
from instantrt.passes.ort.heads import SPLIT, in_rows, joins

# ONNX Runtime's Attention gives 0 where float32's lowest number, or less, hides all keys, and Softmax their mean. This
# is low enough to swallow any score, too, and is no such number.
LOWEST = -1e30


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
        y = gs.Variable(f"{name}/y", FLOAT32, [query.shape[0], query.shape[2], width])
        mask = [] if match.mask is None else [whole_mask(graph, match, match.mask)]
        heads = {"q_num_heads": query.shape[1], "kv_num_heads": match.value.shape[1]}
        add(graph, "Attention", [q, k, v, *mask], y, name=name, **match.attrs, **heads)
        split = small(f"{name}/heads", [0, 0, query.shape[1], match.value.shape[3]], np.int64)
        add(graph, "Transpose", [add(graph, "Reshape", [y, split], f"{name}/y_heads")], out, perm=SPLIT)
        for reshape in joined:
            if reshape.outputs[0].shape == y.shape:
                add(graph, "Identity", [y], take_over(reshape))


def whole_mask(graph: gs.Graph, match: AttentionParts, mask: gs.Tensor) -> gs.Tensor:
    """The mask as the operator reads it: four axes, and as many queries as there are."""
    whole = mask.shape is not None and len(mask.shape) == 4 and mask.shape[2] == match.query.shape[2]
    if match.clamp:
        nodes = Prefixed(graph, f"{mask.name}/clamped")
        mask = nodes("Max", [mask, nodes.const("low", LOWEST, np.float32)], "y")
    if whole or match.node.op == "Attention":
        return mask
    nodes = Prefixed(graph, f"{match.node.name}/mask")
    count = nodes("Shape", [match.query], "queries", start=2, end=3)
    one = nodes.const("1", [1], np.int64)
    return nodes("Expand", [mask, nodes("Concat", [one, one, count, one], "shape", axis=0)], "all")

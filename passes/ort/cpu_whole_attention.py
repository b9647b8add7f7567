"""Attention without a cache -> CpuWholeAttention, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, take_over
from instantrt.passes.gemm.packed import add_ours
from instantrt.passes.ort.packed import columns
from instantrt.plugins.cpu.attention import WIDTH
from instantrt.plugins.cpu.whole_attention import OP

HEADS = ("q_num_heads", "kv_num_heads")
PARTS = ("query_at", "key_at", "value_at")
TYPES = (None, np.float32, np.bool_)  # of a mask; None: not known, so float32


@dataclass(frozen=True)
class WholeMatch:
    """`parts` are (x [B, S, N], first column) of queries, keys and values: of a product of all three, or of each."""

    node: gs.Node
    size: int
    parts: tuple[tuple[gs.Tensor, int], ...]


class LowerCpuWholeAttention(Rewrite[WholeMatch]):
    """Attention(q [B, S, H*D], k, v, mask) -> instantrt::CpuWholeAttention, which reads the columns of one product."""

    def match(self, node: gs.Node) -> WholeMatch | Reject | None:
        if node.op != "Attention" or node.domain or HEADS[0] not in node.attrs:
            return None
        if reason := unfit(node):
            return Reject(reason)
        found = ((t, columns(t)) for t in node.inputs[:3])
        parts = tuple((t, 0) if part is None else part[:2] for t, part in found)
        return WholeMatch(node, node.inputs[0].shape[2] // node.attrs[HEADS[0]], parts)

    def rewrite(self, graph: gs.Graph, match: WholeMatch) -> None:
        node = match.node
        attrs = {"heads": node.attrs[HEADS[0]], "kv_heads": node.attrs[HEADS[1]], "size": match.size}
        attrs |= {name: start for name, (_, start) in zip(PARTS, match.parts, strict=True)}
        inputs = [x for x, _ in match.parts] + node.inputs[3:]
        add_ours(graph, OP.name, inputs, [take_over(node)], node.name, OP.attributes(attrs))


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    heads, kv_heads = (node.attrs[name] for name in HEADS)
    mask = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        return "it has a cache of its own, or gives its scores"
    if others := sorted(name for name, value in node.attrs.items() if name not in (*HEADS, "scale") and value):
        return f"it has {', '.join(others)}"
    if any(t.shape is None or len(t.shape) != 3 or not isinstance(t.shape[2], int) for t in node.inputs[:3]):
        return "the width of queries, keys or values is not known"
    (query, key, value), size = (t.shape[2] for t in node.inputs[:3]), node.inputs[0].shape[2] // heads
    if (query, key, value) != (heads * size, kv_heads * size, kv_heads * size):
        return f"queries, keys and values have {query}, {key} and {value} columns, {heads} and {kv_heads} heads"
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    if not np.isclose(scale := node.attrs.get("scale", size**-0.5), size**-0.5, rtol=1e-6):
        return f"its scale is {scale:.6g}, not that of {size} channels"
    if mask is not None and (mask.shape is None or len(mask.shape) != 4 or mask.dtype not in TYPES):
        return f"the mask {mask.name} is not float32 or truth values of four axes"
    return ""

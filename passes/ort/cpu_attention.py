"""Attention over a cache -> CpuAttention, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite
from instantrt.passes.gemm.packed import add_ours
from instantrt.passes.ort.rotary import GROUP_QUERY_ATTENTION
from instantrt.plugins.cpu.attention import OP, WIDTH

PLAIN = {"num_heads", "kv_num_heads", "scale", "do_rotary"}  # attributes of the operator that this one knows
QKV, PAST, LAST, COS, MASK, NEW = 0, slice(3, 5), 5, slice(7, 10), 10, 16  # inputs


class LowerCpuAttention(Rewrite[gs.Node]):
    """GroupQueryAttention(x, past_k, past_v, ..., cos, sin, positions, mask, ...) -> instantrt::CpuAttention of them.

    It reads keys and values once for all heads that share them, and one token's on all threads.
    """

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if node.op != GROUP_QUERY_ATTENTION:
            return None
        reason = unfit(node)
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        node, inputs, outputs = match, match.inputs, list(match.outputs)
        given = [inputs[QKV], *inputs[PAST], inputs[LAST], *inputs[COS], inputs[MASK], inputs[NEW]]
        attrs = {"heads": node.attrs["num_heads"], "kv_heads": node.attrs["kv_num_heads"]}
        node.outputs.clear()
        add_ours(graph, OP.name, given, outputs, node.name, OP.attributes(attrs))


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    size = node.inputs[3].shape[3]
    if node.inputs[1].name:
        return "queries, keys and values are not parts of one product"
    if others := sorted(set(node.attrs) - PLAIN):
        return f"it has {', '.join(others)}"
    if not node.attrs.get("do_rotary"):
        return "it does not rotate queries and keys itself"
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    if not np.isclose(node.attrs["scale"], size**-0.5, rtol=1e-6):
        return f"its scale is {node.attrs['scale']:.6g}, not that of {size} channels"
    if node.inputs[3].dtype != np.float32:
        return f"its cache is {np.dtype(node.inputs[3].dtype)}"
    return ""

"""Norms of rows -> CpuNorm, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, take_over
from instantrt.passes.gemm.packed import add_ours
from instantrt.plugins.cpu.norm import OP
from instantrt.plugins.schema import bits_of

CENTERED = {"RMSNormalization": 0, "LayerNormalization": 1}
EPSILON = 1e-5  # what both have by default


class LowerCpuNorm(Rewrite[gs.Node]):
    """RMSNormalization, or LayerNormalization, of rows -> instantrt::CpuNorm(x, scale, bias)."""

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if node.op not in CENTERED or node.domain:
            return None
        reason = unfit(node)
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        epsilon = bits_of(match.attrs.get("epsilon", EPSILON))
        attrs = {"centered": CENTERED[match.op], "epsilon_bits": epsilon}
        inputs = list(match.inputs)
        add_ours(graph, OP.name, inputs, [take_over(match)], match.name, OP.attributes(attrs))


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    x, scale = node.inputs[:2]
    axis = node.attrs.get("axis", -1)
    if axis != -1 and (x.shape is None or axis != len(x.shape) - 1):
        return f"it is along axis {axis}, not the last"
    if len(node.outputs) != 1 or node.attrs.get("stash_type", 1) != 1:
        return "it gives means, too, or computes in another type"
    if any(t.dtype not in (None, np.float32) for t in (x, scale)):
        return f"it is of {np.dtype(x.dtype)}, with a scale of {np.dtype(scale.dtype)}"
    if any(t.shape is None or len(t.shape) != 1 or t.shape[0] != scale.shape[0] for t in node.inputs[1:]):
        return "scale or bias is no vector"
    if x.shape is not None and isinstance(x.shape[-1], int) and x.shape[-1] != scale.shape[0]:
        return f"x has {x.shape[-1]} columns, its scale {scale.shape[0]}"
    return ""

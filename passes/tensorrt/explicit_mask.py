"""Attention with the explicit mask that TensorRT wants (docs/facts.md, "Attention in TensorRT")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class MaskMatch:
    node: gs.Node
    causal: bool


class ExplicitMask(Rewrite[MaskMatch]):
    """Attention(q, k, v) -> Attention(q, k, v, mask float32 [1, 1, S, T]).

    The mask is 0 everywhere, or with is_causal the lowest float behind each query, counted from the upper left as ONNX
    does. A node that says more than an explicit mask can is a UserError.
    """

    def match(self, node: gs.Node) -> MaskMatch | Reject | None:
        if node.op != "Attention" or node.domain:
            return None
        masked, causal = len(node.inputs) > 3 and bool(node.inputs[3].name), bool(node.attrs.get("is_causal"))
        reason = untold(node, masked=masked)
        if reason:
            raise UserError(
                "TensorRT cannot run this attention as it is",
                where=node.name or node.outputs[0].name,
                expected="Attention of opset 23 on [batch, heads, sequence, head_dim], with a mask or is_causal alone",
                found=reason,
                fix="concatenate the cache before the node, or compute the scores in plain operators",
            )
        return None if masked else MaskMatch(node, causal)

    def rewrite(self, graph: gs.Graph, match: MaskMatch) -> None:
        query, key, *_ = match.node.inputs
        nodes = Prefixed(graph, f"{match.node.name or match.node.outputs[0].name}/mask")
        zero, one = nodes.const("0", 0, np.int64), nodes.const("1", 1, np.int64)

        def size(tensor: gs.Tensor, name: str) -> gs.Tensor:
            return nodes("Shape", [tensor], name, start=2, end=3)

        def places(tensor: gs.Tensor, name: str, axis: int) -> gs.Tensor:
            end = nodes("Squeeze", [size(tensor, name)], f"{name}/scalar")
            index = nodes("Range", [zero, end, one], f"{name}/index")
            return nodes("Unsqueeze", [index, nodes.const(f"{name}/axis", [0, 1, axis], np.int64)], f"{name}/places")

        if match.causal:
            behind = nodes("Greater", [places(key, "keys", 2), places(query, "queries", 3)], "behind")
            values = [nodes.const("lowest", LOWEST, np.float32), nodes.const("none", 0, np.float32)]
            mask = nodes("Where", [behind, *values], "values")
        else:
            ones = nodes.const("ones", [1, 1], np.int64)
            shape = nodes("Concat", [ones, size(query, "queries"), size(key, "keys")], "shape", axis=0)
            mask = nodes("ConstantOfShape", [shape], "values")
        mask.dtype, mask.shape = FLOAT32, [1, 1, query.shape[2], key.shape[2]]
        match.node.attrs.pop("is_causal", None)
        match.node.inputs = [*match.node.inputs[:3], mask]


def untold(node: gs.Node, *, masked: bool) -> str:
    """What the node says besides one mask, or ""."""
    if any(t.name for t in node.inputs[4:]):
        return "a cache, or lengths, inside the node"
    if len(node.outputs) != 1:
        return f"{len(node.outputs)} outputs"
    if node.attrs.get("softcap"):
        return "softcap"
    if masked and node.attrs.get("is_causal"):
        return "is_causal beside a mask"
    if any(t.shape is None or len(t.shape) != 4 for t in node.inputs[:3]):
        return "other than four dimensions"
    return ""

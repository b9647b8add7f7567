"""Attention in the operators that TensorRT had before 10.14 (docs/facts.md, "First releases of operators")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Reject, Rewrite, add, cast, producer, take_over


@dataclass(frozen=True)
class AttentionMatch:
    node: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    value: gs.Tensor
    mask: gs.Tensor | None
    heads: int
    kv_heads: int
    scale: float


@dataclass(frozen=True)
class DecomposeAttention(Rewrite[AttentionMatch]):
    """Attention(q, k, v, mask) -> Softmax(scale * q @ k^T + mask) @ v.

    q [B, H, S, D], k and v [B, Hkv, T, D], mask broadcast to [B, H, S, T], float to add or bool to choose. The H / Hkv
    query heads that share a head of k and v lie side by side in memory: q read as [B, Hkv, H / Hkv * S, D] meets k
    itself, so that no head of k or v is copied, and a decode step is one product of H / Hkv rows a head.

    TensorRT-RTX builds two GEMMs and a softmax kernel of this, no `_gemm_mha_v2` as of the whole operator.

    q is scaled before the product, which float16 would else overflow; the softmax is in float32, where the mask is
    taken from before it was cast, if it was. `dtype` is the type of q, k, v and of the result.
    """

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> AttentionMatch | Reject | None:
        if node.op != "Attention":
            return None
        query, key, value, *rest = node.inputs
        if any(t.name for t in rest[1:]) or len(node.outputs) != 1:
            return Reject("a cache or lengths inside the attention")
        if node.attrs.get("is_causal") or node.attrs.get("softcap"):
            return Reject("attention with is_causal or softcap, where a mask and Tanh are expected")
        if any(t.shape is None or len(t.shape) != 4 for t in (query, key, value)):
            return Reject("attention of other than [batch, heads, sequence, head_dim]")
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        if not all(isinstance(size, int) for size in (heads, kv_heads, width)):
            return Reject("attention whose heads are not known")
        mask = rest[0] if rest and rest[0].name else None
        scale = node.attrs.get("scale", float(width) ** -0.5)
        return AttentionMatch(node, query, key, value, mask, heads, kv_heads, scale)

    def rewrite(self, graph: gs.Graph, match: AttentionMatch) -> None:
        out, name = take_over(match.node), match.node.name
        shared = match.heads != match.kv_heads

        def regroup(x: gs.Tensor, shape: list[int], label: str) -> gs.Tensor:
            """Reads [B, H, S, n] as [B, Hkv, H / Hkv * S, n] or back, where heads are shared."""
            constant = small(f"{name}/{label}/shape", shape, np.int64)
            return add(graph, "Reshape", [x, constant], f"{name}/{label}") if shared else x

        grouped, apart = [0, match.kv_heads, -1, 0], [0, match.heads, -1, 0]
        scale = small(f"{name}/scale", match.scale, self.dtype)
        query = add(graph, "Mul", [match.query, scale], f"{name}/scaled")
        query = regroup(query, grouped, "query")
        key = add(graph, "Transpose", [match.key], f"{name}/key", perm=[0, 1, 3, 2])
        scores = regroup(add(graph, "MatMul", [query, key], f"{name}/product"), apart, "scores")
        if self.dtype != FLOAT32:
            scores = cast(graph, scores, np.float32, f"{name}/wide")
        if match.mask is not None:
            scores = self.masked(graph, scores, match.mask, name)
        weights = add(graph, "Softmax", [scores], f"{name}/softmax", axis=-1)
        if self.dtype != FLOAT32:
            weights = cast(graph, weights, self.dtype, f"{name}/narrow")
        weights = regroup(weights, grouped, "weights")
        if not shared:
            add(graph, "MatMul", [weights, match.value], out, name=name)
            return
        mixed = add(graph, "MatMul", [weights, match.value], f"{name}/mixed")
        add(graph, "Reshape", [mixed, small(f"{name}/shape", apart, np.int64)], out, name=name)

    def masked(self, graph: gs.Graph, scores: gs.Tensor, mask: gs.Tensor, name: str) -> gs.Tensor:
        """`scores` plus a float mask, or half of `dtype`'s lowest value where a bool mask says no; see ClampMask."""
        if mask.dtype == np.bool_:
            hidden = small(f"{name}/hidden", float(ml_dtypes.finfo(self.dtype).min) / 2, FLOAT32)
            return add(graph, "Where", [mask, scores, hidden], f"{name}/masked")
        narrow = producer(mask, "Cast")
        if narrow is not None and narrow.inputs[0].dtype == FLOAT32:
            mask = narrow.inputs[0]
        elif mask.dtype != FLOAT32:
            mask = cast(graph, mask, np.float32, f"{name}/mask")
        return add(graph, "Add", [scores, mask], f"{name}/masked")

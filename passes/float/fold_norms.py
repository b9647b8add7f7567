"""What a norm's weight makes loud goes into the columns of the linears behind it, before those are quantized.

y_i = W_i (norm(x) * w) = (W_i diag(f)) (norm(x) * w / f). The factors f are powers of two, so every product is the
same number; the few loud channels set the step of their token, or of their group, no more.

Not all of w: training makes w small where norm(x) is large, and without it those channels would be the loud ones
(docs/quantization.md, "Loud channels").
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, convert, small
from instantrt.passes.core.linear import NORMS, Linear, linear
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.float.scaled import Scaling, scaled

LOUD, MOST = 4, 1024  # times the median; and what a factor may come to, so that no scale of 16 bits overflows


@dataclass(frozen=True)
class FoldNormMatch:
    """`rest` is what stays of the norm's weight, and of its bias where it has one."""

    norm: gs.Node
    factors: Array
    rest: tuple[Array, ...]
    into: tuple[Linear, ...]


@dataclass(frozen=True)
class FoldNorms(Scaling[FoldNormMatch]):
    """Norm(x, w), MatMul(it, W_i [K, N_i]) -> Norm(x, w / f), MatMul(it, diag(f) W_i), for each linear behind the norm.

    f is 1 but where |w| is at least LOUD times its median: there the power of two that brings it near the median.

    quantized   paths of the linears that will be: any other keeps its bytes, and the norm before it
    """

    quantized: Set[str]

    def match(self, node: gs.Node) -> FoldNormMatch | Reject | None:
        if node.op not in NORMS or node.attrs.get("axis", -1) != -1:
            return None
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return None
        into = [found for user in node.outputs[0].outputs if (found := linear(user)) is not None]
        if self.quantized.isdisjoint(found.path for found in into):
            return None
        weights = [convert(t.values, FLOAT32) for t in node.inputs[1:]]
        factors = loud(weights[0])
        if (factors == 1).all():
            return None
        others = [user.op for t in node.outputs for user in t.outputs if linear(user) is None]
        others += ["the graph's outputs" for t in node.outputs if t.name in self.outputs]
        if others:
            return Reject(f"its channels also go to {', '.join(dict.fromkeys(others))}")
        if left := [found.path for found in into if found.path not in self.quantized]:
            return Reject(f"{left[0]} behind it stays float")
        rest = tuple(w / factors for w in weights)
        return self.read_elsewhere(into) or FoldNormMatch(node, factors, rest, tuple(into))

    def rewrite(self, graph: gs.Graph, match: FoldNormMatch) -> None:  # noqa: ARG002  (nothing is added to it)
        for index, values in enumerate(match.rest, 1):
            match.norm.inputs[index] = small(f"{match.norm.inputs[index].name}/folded", values, np.float32)
        for found in match.into:
            found.node.inputs[1] = scaled(found, match.factors)

    def note(self, match: FoldNormMatch) -> str:
        return f"{(match.factors != 1).sum()} loud channels, into " + ", ".join(found.path for found in match.into)


def loud(weight: Array) -> Array:
    """The factors of a norm's weight [K], float32."""
    size = np.abs(weight)
    usual = np.median(size)
    if not usual > 0:
        return np.ones_like(weight)
    times = np.clip(size / usual, 1, MOST)
    return np.where(times >= LOUD, np.exp2(np.floor(np.log2(times))), 1).astype(np.float32)

"""What is loud in the inputs of linears goes into their columns, before inputs and weights become eight bits.

y_i = W_i x = (W_i diag(f)) (x / f): a token's step is set by its largest channel, a weight's by its largest column, and
f shares the loudness between the two (Xiao et al., 2022, "SmoothQuant"; docs/facts.md, "Loud inputs of an encoder").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, convert, small
from instantrt.passes.core.linear import NORMS, Linear, linear
from instantrt.passes.core.rewrite import Reject, add
from instantrt.passes.float.scaled import Scaling, scaled


@dataclass(frozen=True)
class SmoothMatch:
    """The norm whose output all of `into` read; `rest` is what stays of its weight and bias where nothing else does."""

    norm: gs.Node
    factors: Array
    into: tuple[Linear, ...]
    rest: tuple[Array, ...] | None


@dataclass(frozen=True)
class SmoothInputs(Scaling[SmoothMatch]):
    """x = Norm(y, w), MatMul(x, W_i [K, N_i]) -> MatMul(Mul(x, 1 / f), diag(f) W_i), for linears of int8 inputs.

    Where nothing else reads x, the norm makes the smoothed one: Norm(y, w / f).

    factors     name of x -> f [K] float32, powers of two: every product is the same number
    quantized   paths of the linears whose inputs will be int8: any other reads x as it is
    """

    factors: Mapping[str, Array] = field(repr=False, compare=False)
    quantized: frozenset[str]

    def match(self, node: gs.Node) -> SmoothMatch | Reject | None:
        if node.op not in NORMS or node.outputs[0].name not in self.factors:
            return None
        read = (linear(user) for user in node.outputs[0].outputs)
        into = tuple(found for found in read if found is not None and found.path in self.quantized)
        if not into:
            return None
        if (other := self.read_elsewhere(into)) is not None:
            return other
        factors, used = self.factors[node.outputs[0].name], [t for t in node.outputs if t.outputs]
        alone = len(used) == 1 and len(used[0].outputs) == len(into) and used[0].name not in self.outputs
        weights = [t for t in node.inputs[1:] if isinstance(t, gs.Constant) and tuple(t.shape) == factors.shape]
        if not alone or node.attrs.get("axis", -1) != -1 or len(weights) < len(node.inputs) - 1:
            return SmoothMatch(node, factors, into, None)
        return SmoothMatch(node, factors, into, tuple(convert(t.values, FLOAT32) / factors for t in weights))

    def rewrite(self, graph: gs.Graph, match: SmoothMatch) -> None:
        x = match.norm.outputs[0]
        if match.rest is not None:
            for index, (what, values) in enumerate(zip(("scale", "bias"), match.rest, strict=False), 1):
                match.norm.inputs[index] = small(f"{x.name}/smoothed/{what}", values, np.float32)
            for found in match.into:
                found.node.inputs[1] = scaled(found, match.factors)
            return
        inverse = small(f"{x.name}/smoothing", 1 / match.factors, np.float32)
        smoothed = gs.Variable(f"{x.name}/smoothed", x.dtype, x.shape)
        add(graph, "Mul", [x, inverse], smoothed)
        for found in match.into:
            found.node.inputs = [smoothed, scaled(found, match.factors)]

    def note(self, match: SmoothMatch) -> str:
        low, high = match.factors.min(), match.factors.max()
        return f"factors {low:g} to {high:g}, into " + ", ".join(found.path for found in match.into)

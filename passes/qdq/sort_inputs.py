"""Linears whose inputs were sorted offline (GPTQ's desc_act) get them in that order: one Gather for each order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.linear import Linear, linear
from instantrt.passes.core.quant import Order, QuantTensor
from instantrt.passes.core.rewrite import Rewrite, once
from instantrt.passes.core.verify import activations_are_float
from instantrt.passes.qdq.insert_qdq import Decisions


@dataclass(frozen=True)
class SortMatch:
    linear: Linear
    order: Order

    @property
    def name(self) -> str:
        """The Gather's name: linears that share x and order share the Gather."""
        return f"{self.linear.x.name}/order_{hashlib.sha256(self.order.data).hexdigest()[:8]}"


@dataclass(frozen=True)
class SortInputs(Rewrite[SortMatch]):
    """MatMul(x, W) -> MatMul(Gather(x, order, axis=-1), W) where W's quantization has its inputs in another order."""

    requires = (activations_are_float,)

    decisions: Decisions

    def match(self, node: gs.Node) -> SortMatch | None:
        found = linear(node)
        decision = self.decisions.get(found.path) if found is not None else None
        if found is None or not isinstance(decision, QuantTensor) or decision.order is None:
            return None
        return SortMatch(found, decision.order)

    def rewrite(self, graph: gs.Graph, match: SortMatch) -> None:
        x, name = match.linear.x, match.name
        indices = small(f"{name}/indices", match.order.indices, np.int64)
        match.linear.node.inputs[0] = once(graph, "Gather", [x, indices], gs.Variable(name, x.dtype, x.shape), axis=-1)

    def note(self, match: SortMatch) -> str:
        return match.name

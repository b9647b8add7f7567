"""Brings decomposed RMS norms back to the operator of opset 23.

Not by onnxscript's rules, which find the same norms in every family that is tested: they work where torch's exporter
does, and so miss the .onnx files that a user brings, want onnxscript on every machine, and cannot say why they refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from instantrt.passes.core.lazy import Array
from instantrt.passes.core.rewrite import Reject, Rewrite, add, ints, producer, scalar, take_over, widened


@dataclass(frozen=True)
class ConstantMatch:
    node: gs.Node
    values: Array


class FoldSmallConstants(Rewrite[ConstantMatch]):
    """An elementwise node whose inputs are all small constants -> its value (Gemma's `1 + weight`)."""

    def match(self, node: gs.Node) -> ConstantMatch | Reject | None:
        if node.op not in ("Add", "Sub", "Mul", "Cast") or not all(isinstance(t, gs.Constant) for t in node.inputs):
            return None
        if any(len(t.shape) > 1 for t in node.inputs):  # norm weights fold, matrices never do
            return None
        feeds = {f"i{i}": t.values for i, t in enumerate(node.inputs)}
        proto = onnx.helper.make_node(node.op, list(feeds), ["o"], **node.attrs)
        (values,) = ReferenceEvaluator(proto, opsets={"": 23}).run(None, feeds)
        return ConstantMatch(node, np.asarray(values))

    def rewrite(self, graph: gs.Graph, match: ConstantMatch) -> None:  # noqa: ARG002
        take_over(match.node).to_constant(match.values)


@dataclass(frozen=True)
class NormMatch:
    node: gs.Node
    x: gs.Tensor
    scale: gs.Tensor
    epsilon: float


class FuseRmsNorm(Rewrite[NormMatch]):
    """Mul(scale [D], Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2), -1), eps))))) -> RMSNormalization(x, scale)."""

    def match(self, node: gs.Node) -> NormMatch | Reject | None:
        if node.op != "Mul":
            return None
        for scale, normed in (node.inputs, reversed(node.inputs)):
            inner = producer(normed, "Mul")
            for x, factor in (inner.inputs, reversed(inner.inputs)) if inner is not None else ():
                reciprocal = producer(factor, "Reciprocal")
                root = producer(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
                if root is None:
                    continue
                epsilon = epsilon_of(root.inputs[0], x)
                if isinstance(epsilon, Reject):
                    return epsilon
                if scale.shape is None or len(scale.shape) != 1:
                    return Reject(f"the scale {scale.name} has shape {scale.shape}, expected [D]")
                if widened(x, node.outputs[0]):
                    return Reject(f"constants give {x.name} another rank, or another last axis")
                return NormMatch(node, x, scale, epsilon)
        return None

    def rewrite(self, graph: gs.Graph, match: NormMatch) -> None:
        name = match.node.name
        out = take_over(match.node)
        add(graph, "RMSNormalization", [match.x, match.scale], out, name=name, axis=-1, epsilon=match.epsilon)


def epsilon_of(radicand: gs.Tensor, x: gs.Tensor) -> float | Reject:
    """epsilon, if `radicand` is mean(x^2, last axis) + epsilon."""
    plus = producer(radicand, "Add")
    mean, epsilon = (producer(plus.inputs[0], "ReduceMean"), scalar(plus.inputs[1])) if plus else (None, None)
    if mean is None or epsilon is None:
        return Reject(f"the root is taken of {radicand.name}, which is no mean plus a constant")
    axes = ints(mean.inputs[1]) if len(mean.inputs) > 1 else mean.attrs.get("axes")
    if axes != [-1] or not mean.attrs.get("keepdims", 1):
        kept = "" if mean.attrs.get("keepdims", 1) else ", which are dropped"
        return Reject(f"the mean is taken over axes {axes}{kept}, expected [-1]")
    power = producer(mean.inputs[0], "Pow")
    if power is None or power.inputs[0] is not x or scalar(power.inputs[1]) != 2.0:
        return Reject(f"the mean is not taken of the squares of {x.name}")
    return epsilon

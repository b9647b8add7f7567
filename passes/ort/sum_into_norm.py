"""Sums in front of norms that ONNX Runtime does not fuse with them: what it would make of both is slow."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, producer


class SumIntoNorm(Rewrite[gs.Node]):
    """LayerNormalization(Add(a, b)) of activations -> LayerNormalization(Sum(a, b)).

    ONNX Runtime makes SkipLayerNormalization of the first when it loads a model, and with many rows that takes four
    times as long as the nodes that it replaces (docs/facts.md, "Attention without a cache").
    """

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        total = producer(node.inputs[0], "Add") if node.op == "LayerNormalization" else None
        constant = total is not None and any(isinstance(t, gs.Constant) for t in total.inputs)
        return None if constant else total

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        match.op = "Sum"

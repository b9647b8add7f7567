"""Exporters share a matrix by an Identity, and mark places with others; what looks for patterns need not know."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Rewrite


class DropIdentity(Rewrite[gs.Node]):
    """f(Identity(x)) -> f(x). One that makes an output of the graph stays, as the output keeps its name."""

    def match(self, node: gs.Node) -> gs.Node | None:
        return node if node.op == "Identity" and node.outputs[0].outputs else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        (x,), (y,) = match.inputs, match.outputs
        for user in list(y.outputs):
            user.inputs = [x if tensor is y else tensor for tensor in user.inputs]

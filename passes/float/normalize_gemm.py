"""Gemm with a constant matrix -> the normal form of a linear layer, and an Add."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.rewrite import Reject, add, take_over
from instantrt.passes.float.normalize_linears import LinearMatch, NormalizeLinear, module_path, rows_of, unfit


class NormalizeGemm(NormalizeLinear):
    """Gemm(x, W, bias) with alpha = beta = 1 -> the normal form and an Add."""

    def match(self, node: gs.Node) -> LinearMatch | Reject | None:
        if node.op != "Gemm":
            return None
        weight = node.inputs[1]
        if not isinstance(weight, gs.Constant):
            return None
        attrs = node.attrs
        if attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0 or attrs.get("transA", 0):
            return Reject("Gemm with alpha, beta or transA is not a linear layer")
        if reason := unfit(weight):
            return Reject(reason)
        rows, shape = rows_of(weight, transposed=not attrs.get("transB", 0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return LinearMatch(node, node.inputs[0], rows, shape, module_path(node, weight), weight.name, bias)

    def rewrite(self, graph: gs.Graph, match: LinearMatch) -> None:
        out, path = take_over(match.node), self.path(match)
        weight = weight_constant(path, match.rows, match.shape)
        name = self.unique_name(graph, match.node, path)
        if match.bias is None:
            add(graph, "MatMul", [match.x, weight], out, name=name)
            return
        product = add(graph, "MatMul", [match.x, weight], f"{name}.product", name=name)
        add(graph, "Add", [product, match.bias], out)

"""Int8 activations in canonical Q/DQ: a scale for each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, once
from instantrt.passes.core.verify import activation_q_is_followed_by_dq, weight_dq_feeds_matmul
from instantrt.passes.qdq.insert_qdq import Quantized, quantized


class QuantizeActivations(Rewrite[Quantized]):
    """x -> DequantizeLinear(QuantizeLinear(x, s)) in front of every A8 linear; s = max|x_row| / 127, 1 for a zero row.

    One Q/DQ pair for each distinct x. The scale of a token is a block as wide as the token.
    """

    requires = (weight_dq_feeds_matmul,)
    ensures = (activation_q_is_followed_by_dq,)

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations == "float" or found.x is not node.inputs[0]:
            return None
        return found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        nodes, x = Prefixed(graph, f"{match.x.name}/per_token"), match.x
        peak = nodes("ReduceMax", [nodes("Abs", [x], "abs"), nodes.const("axes", [-1], np.int64)], "max", keepdims=1)
        scale = nodes("Mul", [peak, nodes.const("127th", 1 / 127, np.float32)], "step")
        zero_row = nodes("Equal", [scale, nodes.const("0", 0, np.float32)], "zero_row")
        scale = nodes("Where", [zero_row, nodes.const("1", 1, np.float32), scale], "scale")
        block: dict[str, Any] = {"axis": -1, "block_size": match.quant.shape[1]}
        codes = gs.Variable(f"{nodes.prefix}/codes", np.int8, x.shape)
        codes = once(graph, "QuantizeLinear", [x, scale], codes, name=f"{x.name}/quantize", output_dtype=3, **block)
        match.node.inputs[0] = nodes("DequantizeLinear", [codes, scale], "dequantized", **block)

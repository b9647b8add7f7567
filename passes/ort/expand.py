"""Weights in groups against many rows of float activations: dequantized once, when the model is loaded.

No integer form of theirs is exact and faster than a float product of many rows (docs/facts.md, "Forms by the number of
rows"): the file stays small, and memory and speed are those of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import View, first_part, small
from instantrt.passes.core.quant import scales_of, zeros_of
from instantrt.passes.core.rewrite import Lowering, Reject, add, cast
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.zeros import minima
from instantrt.passes.qdq.insert_qdq import CODE_TYPES, Quantized, by_group, quantized


@dataclass(frozen=True)
class ExpandOnLoad(Lowering[Quantized]):
    """MatMul(x, DequantizeLinear(codes)) -> MatMul(x, (Cast(codes) - Cast(zero)) * scale), whose weight is constant;
    Cast(codes) * scale + minimum where there are minima.

    ONNX Runtime folds what has constants alone, but no DequantizeLinear, which it would make an int8 product of.
    """

    requires = (weight_dq_feeds_matmul,)

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None:
            return None
        return found if found.quant.activations == "float" else Reject("its activations are int8")

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        q, path = match.quant, match.path
        (n, k), kind = q.shape, CODE_TYPES[q.bits]

        def floats(name: str, view: View) -> gs.Tensor:
            constant = gs.Constant(f"{path}.{name}", view)
            return cast(graph, constant, np.float32, f"{path}/{name}")

        steps = floats("codes_by_group", by_group(q, q.group_size, kind, first_part))
        scale = gs.Constant(f"{path}.scale_by_group", by_group(q, 1, np.float32, scales_of))
        if not q.has_minima:
            zero = floats("zero_by_group", by_group(q, 1, kind, zeros_of))
            steps = add(graph, "Sub", [steps, zero], f"{path}/steps")
        weight = add(graph, "Mul", [steps, scale], f"{path}/groups")
        if q.has_minima:
            turned = add(graph, "Transpose", [minima(q, path)], f"{path}/minima", perm=[1, 0])
            axis = small(f"{path}.axis", [1], np.int64)
            minimum = add(graph, "Unsqueeze", [turned, axis], f"{path}/minimum_by_group")
            weight = add(graph, "Add", [weight, minimum], f"{path}/shifted")
        match.node.inputs[1] = add(graph, "Reshape", [weight, small(f"{path}.kn", [k, n], np.int64)], f"{path}/weight")

    def note(self, match: Quantized) -> str:
        return f"a float32 product, {match.quant.bits} bits dequantized when the model is loaded"

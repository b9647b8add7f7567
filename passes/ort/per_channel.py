"""Per-channel canonical Q/DQ linears -> integer products on integer limbs of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import View, small
from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.limbs import Limbs, halves, has_rows, limbs_of
from instantrt.passes.ort.zeros import before_zeros, integer_zeros, missing_form
from instantrt.passes.qdq.insert_qdq import Quantized, quantized


@dataclass(frozen=True)
class LowerPerChannel(Lowering[Quantized]):
    """Per-channel MatMul(x, DequantizeLinear(codes)) -> MatMulIntegerToFloat on per-token limbs of x.

    Before: MatMul(x [..., K], DequantizeLinear(codes [K, N], scale [N], zero [N]))
    After:  q_i, s = limbs(x);  y = s * sum over limbs of r_i * MatMulIntegerToFloat(q_i, codes, scale, center, zero)
    The limbs of one x serve all its consumers (q, k, v; gate, up); x keeps its rank.
    """

    requires = (weight_dq_feeds_matmul,)

    limbs: Limbs
    activations: Literal["float", "int8"]

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != self.activations:
            return None
        # Four-bit codes are widened to bytes where the tokens are int8 anyway; else MatMulNBits reads half the memory.
        if not found.quant.per_channel or (found.quant.bits != 8 and self.activations == "float"):
            return Reject(f"{found.quant} has no per-channel integer form")
        wrong = missing_form(found)
        return Reject(wrong) if wrong else found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        path, x = match.path, limbs_of(graph, match, self.limbs)
        product = self.product(graph, match)
        out = before_zeros(graph, match, take_over(match.node))
        if self.limbs.count == 1:
            y = product(x.codes[0], x.units[0], "product")
        elif not self.limbs.many and has_rows(match.x):
            rows = Prefixed(graph, f"{match.x.name}/{self.limbs.tag}")("Concat", x.codes, "codes", axis=0)
            high, low = halves(graph, product(rows, x.units[0], "products"), path)
            low = add(graph, "Mul", [low, small(f"{path}.finer", self.limbs.finer, np.float32)], f"{path}/fine")
            y = add(graph, "Add", [high, low], f"{path}/sum")
        else:
            parts = [product(x.codes[i], x.units[i], f"product{i + 1}") for i in range(2)]
            y = add(graph, "Add", parts, f"{path}/sum")
        add(graph, "Mul", [y, x.step], out)

    def product(self, graph: gs.Graph, match: Quantized) -> Callable[[gs.Tensor, gs.Tensor, str], gs.Tensor]:
        """What adds `unit * (codes - center) @ weight` under a name; the weight's constants are made once."""
        q, path, limbs, kind = match.quant, match.path, self.limbs, self.limbs.weight_type
        n, k = q.shape
        codes = View(q, (k, n), kind, axis=1, project=lambda t: limbs.weight(t.parts[0]).T)
        zero = View(q, (n,), kind, project=lambda t: limbs.weight(integer_zeros(q, t)[:, 0]))
        scale = View(q, (n,), np.float32, project=lambda t: t.parts[1][:, 0])
        weight, weight_scale = gs.Constant(f"{path}.codes_{kind}", codes), gs.Constant(f"{path}.scale_f32", scale)
        zeros = [small(f"{path}.center", limbs.center, np.uint8), gs.Constant(f"{path}.zero_{kind}", zero)]

        def product(rows: gs.Tensor, unit: gs.Tensor, name: str) -> gs.Tensor:
            inputs = [rows, weight, unit, weight_scale, *zeros]
            node = "" if name == "product2" else match.node.name  # a linear's name is its module's, once
            return add(graph, "MatMulIntegerToFloat", inputs, f"{path}/{name}", domain="com.microsoft", name=node)

        return product

    def note(self, match: Quantized) -> str:  # noqa: ARG002
        kind = "two limbs of 7 bits (exact)" if self.limbs.count == 2 else "one limb of 8 bits"
        return f"MatMulIntegerToFloat, {kind}"

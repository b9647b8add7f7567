"""Float tokens as integers: one or two limbs of 7 or 8 bits each, which integer products take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array
from instantrt.passes.core.rewrite import Prefixed, scalar
from instantrt.passes.qdq.insert_qdq import Quantized


@dataclass(frozen=True)
class Limbs:
    """How a float row x becomes integers q_i, uint8 around `center`.

    One limb is the spec's own: x = s (q - center), s = max|x| / top. Two are x = max|x| (q_1 / top + q_2 / (2 top^2)),
    each less its center: 7 bits each carry about 14 bits of x, finer than bfloat16, and times int8 never saturate the
    16-bit sums of x86 CPUs without VNNI (docs/facts.md, "Two limbs" and "Saturation without VNNI").
    Two limbs are rows of one product, which reads the weights once for a token. For `many` rows two products and their
    sum are faster, and x read twice than |x| written (docs/facts.md, "Forms by the number of rows").
    """

    count: int
    top: int
    center: int
    signed_weights: bool = True
    many: bool = False

    @property
    def tag(self) -> str:
        return f"{self.count}x{self.top}"

    @property
    def finer(self) -> float:
        """The second limb's unit over the first one's."""
        return 1 / (2 * self.top)

    @property
    def weight_type(self) -> np.dtype[Any]:
        return np.dtype(np.int8 if self.signed_weights else np.uint8)

    def weight(self, codes: Array) -> Array:
        """uint8 codes as `weight_type`: with the top bit turned they are the same numbers less 128 as int8."""
        return (codes ^ np.uint8(0x80)).view(np.int8) if self.signed_weights else codes


TWO_LIMBS = Limbs(count=2, top=63, center=64)
# Eight bits against int8 saturate without VNNI; against uint8 they are exact everywhere, and slower.
ONE_LIMB = Limbs(count=1, top=127, center=128)
ONE_LIMB_UNSIGNED = Limbs(count=1, top=127, center=128, signed_weights=False)


def has_rows(x: gs.Tensor) -> bool:
    """Has x an axis 0 along which limbs may be stacked?"""
    return x.shape is not None and len(x.shape) > 1


def halves(graph: gs.Graph, y: gs.Tensor, path: str) -> list[gs.Variable]:
    """y [2 B, ...] -> its halves along axis 0: what the two limbs gave."""
    parts = [gs.Variable(f"{path}/limb{i}") for i in range(2)]
    graph.nodes.append(gs.Node("Split", f"{path}/split", {"axis": 0, "num_outputs": 2}, [y], parts))
    return parts


class LimbTensors(NamedTuple):
    """x [..., K] = step * sum over limbs of unit_i * (codes_i - center); step is [..., 1], units are numbers."""

    codes: list[gs.Tensor]
    units: list[gs.Constant]
    step: gs.Tensor


def limbs_of(graph: gs.Graph, linear: Quantized, limbs: Limbs) -> LimbTensors:
    """The limbs of x, made once for each x; a row of zeros divides by zero, and any code times its step is zero."""
    x, k = linear.x, linear.quant.shape[1]
    nodes = Prefixed(graph, f"{x.name}/{limbs.tag}")
    axes = nodes.const("axes", [-1], np.int64)
    if limbs.many:
        low = nodes("Neg", [nodes("ReduceMin", [x, axes], "least", keepdims=1)], "below")
        peak = nodes("Max", [nodes("ReduceMax", [x, axes], "most", keepdims=1), low], "peak")
    else:
        peak = nodes("ReduceMax", [nodes("Abs", [x], "abs"), axes], "peak", keepdims=1)
    step = peak if limbs.count == 2 else nodes("Mul", [peak, nodes.const("per_top", 1 / limbs.top, np.float32)], "step")
    unit = nodes.const("unit", 1 / limbs.top if limbs.count == 2 else 1, np.float32)
    center = nodes.const("center", limbs.center, np.uint8)
    if limbs.count == 1 and has_rows(x):
        return LimbTensors([by_token(nodes, x, step, k, limbs.center)], [unit], step)
    units = nodes("Div", [x, step], "in_steps")
    code = nodes("QuantizeLinear", [units, unit, center], "codes1")
    if limbs.count == 1:
        return LimbTensors([code], [unit], step)
    rest = nodes("Sub", [units, nodes("DequantizeLinear", [code, unit, center], "high")], "low")
    unit2 = nodes.const("unit2", limbs.finer / limbs.top, np.float32)
    return LimbTensors([code, nodes("QuantizeLinear", [rest, unit2, center], "codes2")], [unit, unit2], step)


def by_token(nodes: Prefixed, x: gs.Tensor, step: gs.Tensor, k: int, center: int) -> gs.Tensor:
    """round(x / step) + center, uint8 [..., K], in one pass over x: each token is a block, whose zero point is center.

    Div and QuantizeLinear take 2.5 times as long (docs/facts.md, "Forms by the number of rows").
    """
    huge, middle = nodes.const("huge", np.finfo(np.float32).max, np.float32), nodes.const("center", center, np.uint8)
    centers = nodes("QuantizeLinear", [step, huge, middle], "centers")  # step / huge rounds to 0
    return nodes("QuantizeLinear", [x, step, centers], "codes1", axis=-1, block_size=k)


def may_saturate(node: gs.Node) -> bool:
    """Are it 8-bit limbs that meet signed weights? Limbs of 7 bits never saturate."""
    if node.op != "MatMulIntegerToFloat" or node.inputs[1].dtype != np.int8:
        return False
    return bool(scalar(node.inputs[4]) == ONE_LIMB.center)

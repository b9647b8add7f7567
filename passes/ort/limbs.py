"""Per-channel canonical Q/DQ linears -> MatMulInteger on integer limbs of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, View, small
from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.qdq.insert_qdq import Quantized, quantized


@dataclass(frozen=True)
class Limbs:
    """How a float row x becomes integers: x = sum_i s_i * (q_i - center), q_i uint8, s_1 = max|x| / top.

    Two 7-bit limbs carry about 14 bits of x, finer than bfloat16; stacked as rows of one product, the second costs
    almost nothing at decode. Seven bits times int8 never saturates the 16-bit sums of x86 CPUs without VNNI
    (docs/facts.md, "Two limbs" and "Saturation without VNNI").
    """

    count: int
    top: int
    center: int
    signed_weights: bool

    @property
    def tag(self) -> str:
        return f"{self.count}x{self.top}"


TWO_LIMBS = Limbs(count=2, top=63, center=64, signed_weights=True)
# One 8-bit limb against int8 weights would saturate without VNNI; uint8 weights are exact on every x86.
ONE_LIMB_X86 = Limbs(count=1, top=127, center=128, signed_weights=False)
ONE_LIMB_ARM = Limbs(count=1, top=127, center=128, signed_weights=True)


@dataclass(frozen=True)
class LowerPerChannel(Lowering[Quantized]):
    """Per-channel MatMul(x, DequantizeLinear(codes)) -> MatMulInteger on per-token limbs of x.

    Before: MatMul(x [..., K], DequantizeLinear(codes [K, N], scale [N], zero [N]))
    After:  q, s = limbs(x);  y = sum over limbs of MatMulInteger(q, codes, center, zero) * scale * s
    The limbs of one x serve all its consumers (q, k, v; gate, up).
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
        return found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        q, path = match.quant, match.path
        n, k = q.shape
        codes, scales, count = rows_as_limbs(graph, match.x, k, self.limbs)
        flip = 0x80 if self.limbs.signed_weights else 0
        code_type = np.dtype(np.int8 if flip else np.uint8)
        weight = View(q, (k, n), code_type, axis=1, project=lambda t: flipped(t.parts[0], flip).view(code_type).T)
        zero = View(q, (n,), code_type, project=lambda t: flipped(t.parts[2][:, 0], flip).view(code_type))
        scale = View(q, (n,), np.float32, project=lambda t: t.parts[1][:, 0])
        center = small(f"{path}.center", self.limbs.center, np.uint8)
        out = take_over(match.node)
        inputs = [codes, gs.Constant(f"{path}.codes_s8", weight), center, gs.Constant(f"{path}.zero_s8", zero)]
        sums = add(graph, "MatMulInteger", inputs, f"{path}/sums", name=match.node.name)
        y = add(graph, "Cast", [sums], f"{path}/float_sums", to=1)
        y = add(graph, "Mul", [y, gs.Constant(f"{path}.scale_f32", scale)], f"{path}/scaled")
        y = add(graph, "Mul", [y, scales], f"{path}/limbs")
        add_limbs(graph, y, self.limbs.count, (count, n), path, out)

    def note(self, match: Quantized) -> str:  # noqa: ARG002
        kind = "two limbs of 7 bits (exact)" if self.limbs.count == 2 else "one limb of 8 bits"
        return f"MatMulInteger, {kind}"


def add_limbs(
    graph: gs.Graph, y: gs.Tensor, limbs: int, shape: tuple[gs.Tensor, int], path: str, out: gs.Tensor
) -> None:
    """y [limbs * M, N] -> out [..., N], the sum of its limbs; `shape` is the leading dimensions and N."""
    if limbs == 2:
        parts = [gs.Variable(f"{path}/limb{i}") for i in range(2)]
        graph.nodes.append(gs.Node("Split", f"{path}/split", {"axis": 0, "num_outputs": 2}, [y], parts))
        y = add(graph, "Add", parts, f"{path}/rows")
    width = small(f"{path}.n", [shape[1]], np.int64)
    add(graph, "Reshape", [y, add(graph, "Concat", [shape[0], width], f"{path}/shape", axis=0)], out)


def flipped(codes: Array, flip: int) -> Array:
    """uint8 codes with their top bit turned, which are the same numbers less 128 as int8."""
    return codes ^ np.uint8(flip) if flip else codes


def rows_as_limbs(graph: gs.Graph, x: gs.Tensor, k: int, limbs: Limbs) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """(codes uint8 [limbs * M, K], scales [limbs * M, 1], leading dimensions of x), made once for each x."""
    nodes = Prefixed(graph, f"{x.name}/{limbs.tag}")
    leading = nodes("Shape", [x], "leading", start=0, end=-1)
    rows = nodes("Reshape", [x, nodes.const("rows_shape", [-1, k], np.int64)], "rows")
    peak = nodes("ReduceMax", [nodes("Abs", [rows], "abs"), nodes.const("axes", [-1], np.int64)], "peak", keepdims=1)
    step = nodes("Mul", [peak, nodes.const("per_top", 1 / limbs.top, np.float32)], "step")
    step = nodes("Max", [step, nodes.const("tiny", 1e-20, np.float32)], "step1")
    flat = nodes.const("flat", [-1], np.int64)
    step_rows = nodes("Reshape", [step, flat], "step1_rows")
    center = nodes("Expand", [nodes.const("center", limbs.center, np.uint8), nodes("Shape", [step_rows], "m")], "zero")
    code = nodes("QuantizeLinear", [rows, step_rows, center], "codes" if limbs.count == 1 else "codes1", axis=0)
    if limbs.count == 1:
        return code, nodes("Identity", [step], "scales"), leading
    high = nodes("DequantizeLinear", [code, step_rows, center], "high", axis=0)
    low = nodes("Sub", [rows, high], "low")
    step2 = nodes("Mul", [step, nodes.const("per_limb", 1 / (2 * limbs.top), np.float32)], "step2")
    code2 = nodes("QuantizeLinear", [low, nodes("Reshape", [step2, flat], "step2_rows"), center], "codes2", axis=0)
    scales = nodes("Concat", [step, step2], "scales", axis=0)
    return nodes("Concat", [code, code2], "codes", axis=0), scales, leading

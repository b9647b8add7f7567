"""A8W8 for TensorRT without a plugin: int8 tensor cores, activations quantized per token as they come.

Before: MatMul(DequantizeLinear(QuantizeLinear(x, s)), DequantizeLinear(codes, scale, zero)), s = max|x| / 127 by token
After:  span = max|x| * 128/127;  xq = QuantizeLinear(x / span, 2^-7)          in float32
        y = MatMul(DequantizeLinear(xq, 2^-7), DequantizeLinear(signed codes, 2^-7)) * (scale * 2^7) * span

Both constants are powers of two, so they round nothing; the builder makes them the factor 2^-14 of the int8 GEMM,
where one product of codes is the smallest normal float16 and the sum of K <= 65504 largest ones is still finite.
A weight scale by channel inside the DequantizeLinear would instead make the GEMM write its unscaled sums as float16
(docs/facts.md, "Overflow of int8 products").

With zero points the product is float32 where the GPU has that: it and its correction, mean(x) * group_size * (c - zero)
* scale, are many times their sum where x has a mean (docs/facts.md, "A mean in 16 bits").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, add, cast, once, take_over
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.tensorrt.native import Native

STEP = 2.0**-7
LARGEST_K = 65504
TINY = 1e-30  # in place of the largest value of an all-zero token


@dataclass(frozen=True)
class LowerNativeInt8(Lowering[Quantized]):
    """`dtype` is the compute type: that of x and of the GEMM's output; `wide`: the GPU also has one that is float32."""

    dtype: np.dtype[Any]
    wide: bool

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != "int8":
            return None
        if not found.quant.per_channel or found.quant.bits != 8:
            return Reject(f"TensorRT multiplies int8 tokens with int8 weights by channel only, not {found.quant}")
        if found.quant.shape[1] > LARGEST_K:
            return Reject(f"sums of more than {LARGEST_K} products may overflow float16, K is {found.quant.shape[1]}")
        return found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        out, name = take_over(match.node), match.node.name
        codes, span = quantized_tokens(graph, match.x)
        wide = self.wide and not match.quant.symmetric
        dtype, unit = (FLOAT32, "token/wide_unit") if wide else (self.dtype, "unit")
        token = once(graph, "DequantizeLinear", [codes, step(match.x, dtype)], f"{match.x.name}/{unit}")
        native = Native(match.quant, FLOAT32)
        inputs = [native.codes(), small(f"{name}/weight/step", STEP, dtype)]
        weight = add(graph, "DequantizeLinear", inputs, f"{name}/weight")
        y = add(graph, "MatMul", [token, weight], f"{name}/int8", name=name)
        y = y if wide else cast(graph, y, np.float32, f"{name}/wide")
        y = add(graph, "Mul", [y, native.channel_scales(1 / STEP)], f"{name}/by_channel")
        if not match.quant.symmetric:
            mean = code_mean(graph, match.x, codes)
            term = add(graph, "Mul", [mean, native.corrections()], f"{name}/correction")
            y = add(graph, "Add", [y, term], f"{name}/corrected")
        y = add(graph, "Mul", [y, span], f"{name}/by_token")
        cast(graph, y, self.dtype, out, name=f"{name}/narrow")

    def note(self, match: Quantized) -> str:  # noqa: ARG002
        return "int8 GEMM, scales by token and channel"


def quantized_tokens(graph: gs.Graph, x: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """int8 codes of x / span, and span `[..., 1]` float32; computed once for all linears that share x."""
    nodes = Prefixed(graph, f"{x.name}/token")
    wide = nodes.cast(x, np.float32, "wide")
    axes = nodes.const("axes", [-1], np.int64)
    peak = nodes("ReduceMax", [nodes("Abs", [wide], "abs"), axes], "peak", keepdims=1)
    peak = nodes("Max", [peak, nodes.const("tiny", TINY, FLOAT32)], "floor")
    span = nodes("Mul", [peak, nodes.const("128_127", 128 / 127, FLOAT32)], "span")
    unit = nodes("Div", [wide, span], "unit")
    return nodes("QuantizeLinear", [unit, step(x, FLOAT32), nodes.const("zero", 0, np.int8)], "codes"), span


def step(x: gs.Tensor, dtype: np.dtype[Any]) -> gs.Constant:
    return small(f"{x.name}/token/step_{dtype.name}", STEP, dtype)


def code_mean(graph: gs.Graph, x: gs.Tensor, codes: gs.Tensor) -> gs.Tensor:
    """The mean of the quantized x / span: `[..., 1]` float32."""
    unit = once(graph, "DequantizeLinear", [codes, step(x, FLOAT32)], f"{x.name}/token/wide_unit")
    axes = small(f"{x.name}/token/mean_axes", [-1], np.int64)
    return once(graph, "ReduceMean", [unit, axes], f"{x.name}/token/mean", keepdims=1)

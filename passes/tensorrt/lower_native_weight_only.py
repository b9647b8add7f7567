"""A16W8 and A16W4 for TensorRT without a plugin: signed symmetric codes, and the exact zero point correction beside.

Before: MatMul(x, DequantizeLinear(unsigned codes, scale, zero))
After:  MatMul(x, DequantizeLinear(signed codes, scale)), and where there are zero points, with m = mean(x), x' = x - m:
        MatMul(x', DequantizeLinear(signed codes, scale)) + mean(x' by group) @ corrections + m * sums

The builder reads int8 with one scale a channel, and int4 in blocks, straight into the GEMM. An int8 *group* weight it
expands to a float matrix on every run; the fusion gate reports that (docs/facts.md, "Which weights TensorRT fuses").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, add, once, take_over
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.tensorrt.native import Native, block_size


@dataclass(frozen=True)
class LowerNativeWeightOnly(Lowering[Quantized]):
    """`dtype` is the compute type: that of x, of the scales and of the corrections."""

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != "float":
            return None
        n, k = found.quant.shape
        if found.quant.bits == 4 and n * k % 2:
            return Reject("TensorRT has no int4 tensor with an odd number of elements")
        if found.x.shape is None and not (found.quant.symmetric or found.quant.per_channel):
            return Reject("the rank of the activation is not known")
        return found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        out, name = take_over(match.node), match.node.name
        native = Native(match.quant, self.dtype, centred=not match.quant.symmetric)
        weight = dequantized(graph, native, name)
        if match.quant.symmetric:
            add(graph, "MatMul", [match.x, weight], out, name=name)
            return
        token = Prefixed(graph, f"{match.x.name}/centring")  # not what int8 makes of a token
        mean = token("ReduceMean", [match.x, token.const("axes", [-1], np.int64)], "mean", keepdims=1)
        rest = token("Sub", [match.x, mean], "rest")
        rest.dtype, rest.shape = match.x.dtype, match.x.shape
        of_group, of_token = native.centring()
        op = "Mul" if match.quant.per_channel else "MatMul"
        y = add(graph, "MatMul", [rest, weight], f"{name}/centred", name=name)
        term = add(graph, op, [group_means(graph, rest, match.quant), of_group], f"{name}/correction")
        y = add(graph, "Add", [y, term], f"{name}/corrected")
        term = add(graph, "Mul", [mean, of_token], f"{name}/of_mean")
        add(graph, "Add", [y, term], out, name=f"{name}/sum")

    def note(self, match: Quantized) -> str:
        if match.quant.symmetric:
            return layout(match.quant)
        term = f"minima in {self.dtype.name}" if match.quant.has_minima else "zero point correction"
        return f"{layout(match.quant)} + {term}"


def dequantized(graph: gs.Graph, native: Native, name: str) -> gs.Tensor:
    """The symmetric DequantizeLinear `[K, N]`; the fusion gate finds it by its name, `<linear>/weight`."""
    quant, codes = native.weight, native.codes()
    codes.name = f"{name}/codes"  # one of its own for each product: docs/facts.md, "Codes that two products read"
    if quant.bits == 8 and quant.per_channel:
        return add(graph, "DequantizeLinear", [codes, native.channel_scales()], f"{name}/weight", axis=1)
    block = block_size(quant)
    inputs = [codes, native.block_scales(block)]
    return add(graph, "DequantizeLinear", inputs, f"{name}/weight", axis=0, block_size=block)


def layout(quant: QuantTensor) -> str:
    if quant.bits == 8 and quant.per_channel:
        return "int8 by channel"
    return f"int{quant.bits} blocks of {block_size(quant)}"


def group_means(graph: gs.Graph, x: gs.Tensor, quant: QuantTensor) -> gs.Tensor:
    """The mean of x over each group, `[..., G]` (one group: `[..., 1]`); computed once for all linears that share x."""
    name = f"{x.name}/mean{quant.group_size}"
    last = small(f"{name}/axes", [-1], np.int64)
    if quant.per_channel:
        return once(graph, "ReduceMean", [x, last], name, keepdims=1)
    shape = small(f"{name}/shape", [0] * (len(x.shape) - 1) + [quant.groups, quant.group_size], np.int64)
    grouped = once(graph, "Reshape", [x, shape], f"{name}/grouped")
    return once(graph, "ReduceMean", [grouped, last], name, keepdims=0)

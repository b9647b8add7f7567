"""Canonical Q/DQ -> WeightOnlyGemm, the TensorRT plugin: packed codes as they are, exact scales and zero points.

Before: MatMul(x, DequantizeLinear(codes [K, N], scale, zero))
After:  instantrt::WeightOnlyGemm(x, codes in frag16, affine [K / group, 2 N])

Two nodes that share a weight share its packed constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Lowering, Reject, take_over
from instantrt.passes.gemm.packed import add_ours, weights
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.tensorrt.packed import Fragments
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.weight_only_gemm.op import OP

# What makes TensorRT's ONNX parser look for the plugin.
LABELS = {"plugin_version": str(OP.version), "plugin_namespace": DOMAIN}


@dataclass(frozen=True)
class LowerWeightOnlyGemm(Lowering[Quantized]):
    """`dtype` is the compute type; `rounded`: many rows may use weights rounded to it; `batch_invariant`: a row of y
    has the same bits however many rows x has.

    A8W8 by channel is left alone: TensorRT's own int8 product is exact there.
    """

    dtype: np.dtype[Any]
    rounded: bool = False
    batch_invariant: bool = False

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or native_int8(found.quant):
            return None
        (n, k), group, bits = found.quant.shape, found.quant.group_size, found.quant.bits
        sizes = {"N": n, "K": k, "group": group, "bits": bits, "activation_bits": activation_bits(found.quant)}
        wrong = OP.check(sizes)
        return Reject(f"{OP.name}: {wrong}") if wrong else found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        quant, name = match.quant, match.node.name
        attrs = {"bits": quant.bits, "group": quant.group_size, "activation_bits": activation_bits(quant)}
        attrs |= {"rounded_weights": int(self.rounded and quant.activations == "float")}
        attrs |= {"batch_invariant": int(self.batch_invariant)}
        inputs = [match.x, *weights(graph, Fragments((quant,), self.dtype), match.path)]
        add_ours(graph, OP.name, inputs, [take_over(match.node)], name, OP.attributes(attrs) | LABELS)

    def note(self, match: Quantized) -> str:
        return f"{OP.name}, minima as zero points in {self.dtype.name}" if match.quant.has_minima else OP.name


def native_int8(quant: QuantTensor) -> bool:
    return quant.activations == "int8" and quant.bits == 8 and quant.per_channel


def activation_bits(quant: QuantTensor) -> int:
    return 8 if quant.activations == "int8" else 16

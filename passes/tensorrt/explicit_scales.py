"""Quantization by group for a TensorRT whose DequantizeLinear takes fewer blocks than ONNX's.

NVIDIA's guide (Quantization Schemes) has int4 in blocks of 64 or 128, and NvInfer.h no blocks of int8 (docs/facts.md,
"Blocks that full TensorRT documents"). Any other group dequantizes by one, which changes no code, and is multiplied
with its scales apart: the same values, rounded once, whatever the builder fuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite, add, take_over
from instantrt.passes.core.verify import scale_is_constant, signed_and_symmetric
from instantrt.passes.tensorrt.native import block_size

INT4_BLOCKS = (128, 64)


def documented(weight: QuantTensor) -> bool:
    """Is the native form of this weight one that NVIDIA documents for full TensorRT?"""
    return weight.per_channel if weight.bits == 8 else block_size(weight) in INT4_BLOCKS


@dataclass(frozen=True)
class BlockMatch:
    """`unit` is the block size of the int4 codes' scales of one; 0 for int8, where one scale will do."""

    node: gs.Node
    codes: gs.Constant
    scale: gs.Constant
    block: int
    unit: int


class ExplicitScales(Rewrite[BlockMatch]):
    """DequantizeLinear(codes [K, N], scale [K / B, N]) -> DequantizeLinear(codes, 1) as [K / B, B, N] * scale."""

    requires = (signed_and_symmetric, scale_is_constant)

    def match(self, node: gs.Node) -> BlockMatch | Reject | None:
        block = node.attrs.get("block_size", 0)
        if node.op != "DequantizeLinear" or not block or not isinstance(node.inputs[0], gs.Constant):
            return None
        codes, scale = node.inputs[:2]
        if codes.dtype != ml_dtypes.int4:
            return BlockMatch(node, codes, scale, block, 0)
        if block in INT4_BLOCKS:
            return None
        unit = next((size for size in INT4_BLOCKS if codes.shape[0] % size == 0), 0)
        if not unit:
            return Reject(f"TensorRT takes int4 in blocks of 64 or 128, which {codes.shape[0]} inputs do not make up")
        return BlockMatch(node, codes, scale, block, unit)

    def rewrite(self, graph: gs.Graph, match: BlockMatch) -> None:
        out, name = take_over(match.node), match.node.name
        k, n = match.codes.shape
        one = np.ones((k // match.unit, n) if match.unit else (), match.scale.dtype)
        attrs: dict[str, Any] = {"axis": 0, "block_size": match.unit} if match.unit else {}
        inputs = [match.codes, gs.Constant(f"{name}/one", one)]
        # Under the old name, by which the fusion gate finds it.
        whole = add(graph, "DequantizeLinear", inputs, f"{name}/whole", name=name, **attrs)
        shape = small(f"{name}/groups", [k // match.block, match.block, n], np.int64)
        groups = add(graph, "Reshape", [whole, shape], f"{name}/grouped")
        axis = small(f"{name}/axis", [1], np.int64)
        scale = add(graph, "Unsqueeze", [match.scale, axis], f"{name}/by_group")
        scaled = add(graph, "Mul", [groups, scale], f"{name}/scaled")
        add(graph, "Reshape", [scaled, small(f"{name}/shape", [k, n], np.int64)], out, name=f"{name}/matrix")

    def note(self, match: BlockMatch) -> str:
        return f"blocks of {match.block} as an explicit product"

"""Group-wise weights against float activations on MatMulNBits, without the rounding that operator brings.

Its fast kernels quantize x to int8 by block. Before: MatMul(x, DequantizeLinear(codes in groups)). After: the product
of x and of what the rounding took away, which is 254 times smaller: x - MatMulNBits(x by block, identity). Both are
rows of one product, so that at decode the weights are still read once. Activations then carry about 15 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array
from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.limbs import halves, has_rows
from instantrt.passes.ort.nbits import BlockwiseMatch, blockwise, matmul_nbits
from instantrt.passes.ort.zeros import before_zeros
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.qdq.last_logits import makes_logits


@dataclass(frozen=True)
class LowerToExactBlocks(Lowering[BlockwiseMatch]):
    """MatMul(x, DequantizeLinear(codes)) -> MatMulNBits of x over what its rounding leaves -> their sum.

    Where a channel's blocks do not divide K, x is padded to whole ones with zeros, which meet the padding that
    MatMulNBits' own codes have.
    """

    requires = (weight_dq_feeds_matmul,)

    heads: bool = False  # these alone

    def match(self, node: gs.Node) -> BlockwiseMatch | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != "float" or (self.heads and not makes_logits(node)):
            return None
        if not has_rows(found.x):
            return Reject("its input has no axis besides the one that is summed over")
        return blockwise(found)

    def rewrite(self, graph: gs.Graph, match: BlockwiseMatch) -> None:
        path, limbs = match.linear.path, block_limbs(graph, match.linear, match.block)
        out = before_zeros(graph, match.linear, take_over(match.linear.node))
        y = matmul_nbits(graph, match, limbs, f"{path}/limbs", whole=True)
        add(graph, "Add", halves(graph, y, path), out)

    def note(self, match: BlockwiseMatch) -> str:
        return f"MatMulNBits, {match.linear.quant.bits} bits, two limbs by {match.block} (exact)"


def block_limbs(graph: gs.Graph, linear: Quantized, block: int) -> gs.Tensor:
    """x [B, ..., K in whole blocks] over what the operator's rounding leaves of it [2 B, ..., K], once for each x."""
    x, k = linear.x, linear.quant.shape[1]
    nodes = Prefixed(graph, f"{x.name}/by{block}")
    leading = [0] * (len(x.shape) - 2)
    if padding := -k % block:
        pads, last = nodes.const("pads", [0, padding], np.int64), nodes.const("last", [-1], np.int64)
        x, k = nodes("Pad", [x, pads, gs.Variable.empty(), last], "padded"), k + padding
    rows = nodes("Reshape", [x, nodes.const("blocks_shape", [*leading, -1, block], np.int64)], "blocks")
    rounded = nodes("MatMulNBits", [rows, *identity(nodes, block)], "rounded", domain="com.microsoft", **unit(block))
    both = nodes("Concat", [rows, nodes("Sub", [rows, rounded], "rest")], "both", axis=0)
    return nodes("Reshape", [both, nodes.const("rows_shape", [*leading, -1, k], np.int64)], "limbs")


def unit(block: int) -> dict[str, Any]:
    return {"K": block, "N": block, "bits": 8, "block_size": block, "accuracy_level": 4}


def identity(nodes: Prefixed, block: int) -> list[gs.Constant]:
    """The matrix one, as MatMulNBits has it; with zero points of 0 its product is x exactly as it rounds it."""
    codes, ones = np.eye(block, dtype=np.uint8)[:, None], np.ones((block, 1), np.float32)
    arrays: dict[str, Array] = {"b": codes, "scales": ones, "zeros": np.zeros((block, 1), np.uint8)}
    return [nodes.const(f"identity.{name}", values, values.dtype) for name, values in arrays.items()]

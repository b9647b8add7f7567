"""Group-wise weights against float activations on MatMulNBits, without the rounding that operator brings.

Its fast kernels quantize x to int8 by block. Before: MatMul(x, DequantizeLinear(codes in groups)). After: x = hi + lo,
hi on the grid that MatMulNBits will choose for the block, lo the rest, 254 times finer; both are rows of one product,
so that at decode the weights are still read once. Activations then carry about 15 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Lowering, Prefixed, Reject, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.limbs import add_limbs
from instantrt.passes.ort.nbits import BLOCKS, BlockwiseMatch, matmul_nbits, nbits_block, no_block
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.qdq.last_logits import makes_logits

TOP = 127


@dataclass(frozen=True)
class LowerToExactBlocks(Lowering[BlockwiseMatch]):
    """MatMul(x, DequantizeLinear(codes)) -> two limbs of x by block -> MatMulNBits -> their sum.

    A channel's blocks are the largest that divide K; where none does, x is padded to whole ones with zeros, which meet
    the padding that MatMulNBits' own codes have.
    """

    requires = (weight_dq_feeds_matmul,)

    heads: bool = False  # these alone

    def match(self, node: gs.Node) -> BlockwiseMatch | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != "float" or (self.heads and not makes_logits(node)):
            return None
        block = nbits_block(found.quant)
        if block is None:
            return Reject(no_block(found.quant))
        return BlockwiseMatch(found, next((b for b in BLOCKS if b <= block and found.quant.shape[1] % b == 0), block))

    def rewrite(self, graph: gs.Graph, match: BlockwiseMatch) -> None:
        found, path, n = match.linear, match.linear.path, match.linear.quant.shape[0]
        rows, leading = block_limbs(graph, found, match.block)
        out = take_over(found.node)
        y = matmul_nbits(graph, match, rows, f"{path}/limbs", whole=True)
        add_limbs(graph, y, 2, (leading, n), path, out)

    def note(self, match: BlockwiseMatch) -> str:
        return f"MatMulNBits, {match.linear.quant.bits} bits, two limbs by {match.block} (exact)"


def block_limbs(graph: gs.Graph, linear: Quantized, block: int) -> tuple[gs.Tensor, gs.Tensor]:
    """(hi over lo [2 M, K in whole blocks], leading dimensions of x), made once for each x and block."""
    x, k = linear.x, linear.quant.shape[1]
    nodes = Prefixed(graph, f"{x.name}/by{block}")
    leading = nodes("Shape", [x], "leading", start=0, end=-1)
    if padding := -k % block:
        pads, last = nodes.const("pads", [0, padding], np.int64), nodes.const("last", [-1], np.int64)
        x, k = nodes("Pad", [x, pads, gs.Variable.empty(), last], "padded"), k + padding
    rows = nodes("Reshape", [x, nodes.const("blocks_shape", [-1, k // block, block], np.int64)], "blocks")
    peak = nodes("ReduceMax", [nodes("Abs", [rows], "abs"), nodes.const("axes", [-1], np.int64)], "peak", keepdims=1)
    step = nodes("Mul", [peak, nodes.const("per_top", 1 / TOP, np.float32)], "step")
    step = nodes("Max", [step, nodes.const("tiny", 1e-20, np.float32)], "step1")
    high = nodes("Mul", [nodes("Round", [nodes("Div", [rows, step], "units")], "codes"), step], "high")
    both = nodes("Concat", [high, nodes("Sub", [rows, high], "low")], "both", axis=0)
    return nodes("Reshape", [both, nodes.const("rows_shape", [-1, k], np.int64)], "limbs"), leading

"""Canonical Q/DQ linears -> com.microsoft.MatMulNBits, ONNX Runtime's operator for weights in blocks along K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, first_part
from instantrt.passes.core.quant import QuantTensor, in_pairs, scales_of, zeros_of
from instantrt.passes.core.rewrite import Lowering, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.zeros import before_zeros, central_zeros, missing_form
from instantrt.passes.qdq.insert_qdq import Quantized, quantized

NBITS_BLOCKS = (256, 128, 64, 32, 16)  # largest first: docs/facts.md, "MatMulNBits block sizes"
CHANNEL_BLOCK = 128  # a channel's one scale is repeated for blocks of at most this size: 4 % more bytes, and fast


def nbits_block(q: QuantTensor) -> int | None:
    """The block size that expresses q's groups: the largest that divides one, each group's scale repeated.

    A channel's blocks divide K where any of 32 does; else K is padded to whole ones.
    """
    if not q.per_channel:
        return next((b for b in NBITS_BLOCKS if q.group_size % b == 0), None)
    return next((b for b in NBITS_BLOCKS if CHANNEL_BLOCK >= b >= 32 and q.group_size % b == 0), CHANNEL_BLOCK)


@dataclass(frozen=True)
class BlockwiseMatch:
    linear: Quantized
    block: int


@dataclass(frozen=True)
class LowerToMatMulNBits(Lowering[BlockwiseMatch]):
    """MatMul(x, DequantizeLinear(codes)) -> com.microsoft.MatMulNBits(x, codes [N, K/b, b*bits/8], scale, zero).

    accuracy_level 4 (int8 activations per block) is the only level with a fast 8-bit kernel. Zero points are explicit
    even where all are central: without them ARM cores differ from one another (docs/facts.md, "MatMulNBits accuracy
    levels" and "MatMulNBits without zero points").
    """

    requires = (weight_dq_feeds_matmul,)

    def match(self, node: gs.Node) -> BlockwiseMatch | Reject | None:
        found = quantized(node)
        return blockwise(found) if found is not None else None

    def rewrite(self, graph: gs.Graph, match: BlockwiseMatch) -> None:
        out = before_zeros(graph, match.linear, take_over(match.linear.node), match.block)
        matmul_nbits(graph, match, match.linear.x, out)

    def note(self, match: BlockwiseMatch) -> str:
        return f"MatMulNBits, {match.linear.quant.bits} bits, blocks of {match.block}"


def blockwise(found: Quantized) -> BlockwiseMatch | Reject:
    """A linear in the operator's blocks, or why it has none."""
    block = nbits_block(found.quant)
    if block is None:
        return Reject(
            f"group_size {found.quant.group_size} is no multiple of {NBITS_BLOCKS[-1]}, which MatMulNBits needs"
        )
    wrong = missing_form(found)
    return Reject(wrong) if wrong else BlockwiseMatch(found, block)


def matmul_nbits(
    graph: gs.Graph, match: BlockwiseMatch, x: gs.Tensor, out: gs.Tensor | str, *, whole: bool = False
) -> gs.Tensor:
    """MatMulNBits of x [..., K] with the weight of `match`, named as its MatMul; `whole`: x is padded to blocks."""
    q, path, block = match.linear.quant, match.linear.path, match.block
    n, k = q.shape
    blocks = -(-k // block)
    layout = Blocks(q.bits, block, blocks, q.groups)
    codes, scales, zeros = layout.codes, layout.scales, layout.zeros
    if q.group_size == block:  # as they are: minima read them too, and a table of embeddings all of these
        scales = scales_of
        codes, zeros = (first_part, zeros_of) if q.bits == 8 else (codes, zeros)
    zero_points = View(q, (n, layout.zero_bytes), np.uint8, project=zeros)
    if q.has_minima:
        zero_points = central_zeros(q, zero_points.shape)
    inputs = [
        x,
        gs.Constant(f"{path}.b", View(q, (n, blocks, block * q.bits // 8), np.uint8, project=codes)),
        gs.Constant(f"{path}.scales", View(q, (n, blocks), np.float32, project=scales)),
        gs.Constant(f"{path}.zeros", zero_points),
    ]
    attrs = {"K": blocks * block if whole else k, "N": n, "bits": q.bits, "block_size": block, "accuracy_level": 4}
    return add(graph, "MatMulNBits", inputs, out, domain="com.microsoft", name=match.linear.node.name, **attrs)


@dataclass(frozen=True)
class Blocks:
    """MatMulNBits' layout: K padded to whole blocks, four-bit values two a byte, low nibble first."""

    bits: int
    block: int
    count: int
    groups: int

    @property
    def zero_bytes(self) -> int:
        return self.count if self.bits == 8 else (self.count + 1) // 2

    def codes(self, tile: Tile) -> Array:
        codes = tile.parts[0]
        n, k = codes.shape
        padding = self.count * self.block - k
        if padding:
            codes = np.pad(codes, ((0, 0), (0, padding)))
        return self.packed(codes).reshape(n, self.count, -1)

    def rows(self, tile: Tile) -> Array:
        """The same bytes for a matrix of whole blocks, row by row."""
        return self.packed(tile.parts[0])

    def scales(self, tile: Tile) -> Array:
        return self.repeated(tile.parts[1])

    def zeros(self, tile: Tile) -> Array:
        return self.packed(self.repeated(tile.parts[2]))

    def repeated(self, per_group: Array) -> Array:
        """[n, G] -> [n, blocks]; a channel's one value for every block, padding included."""
        repeated: Array = np.repeat(per_group, self.count // self.groups, axis=1)
        return repeated

    def packed(self, values: Array) -> Array:
        if self.bits == 8:
            return values
        if values.shape[1] % 2:
            values = np.pad(values, ((0, 0), (0, 1)))
        return in_pairs(np.ascontiguousarray(values))

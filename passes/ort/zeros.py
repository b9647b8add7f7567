"""Minima on operators that take codes as zero points: the central code in their place, and what is missing added apart.

    code * scale + minimum  =  (code - c) * scale  +  (minimum + c * scale)

The second term is constant within a group: x times it is the sum of x over the group times `minimum + c * scale`, which
ONNX Runtime computes once, when it loads. Where the operator makes int8 of x, the sums are of what it makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View
from instantrt.passes.core.quant import UINT8, QuantTensor, scales_of, zeros_of
from instantrt.passes.core.rewrite import Prefixed, add
from instantrt.passes.qdq.insert_qdq import Quantized

NO_INTEGERS = "int8 activations have no form with minima"
NO_RANK = "minima, and the rank of its input is not known"


@dataclass(frozen=True)
class Filled:
    """A matrix of one code: equal for all weights of a shape, so that a file holds it once."""

    shape: tuple[int, ...]
    code: int

    def tiles(self) -> Iterator[Tile]:
        yield Tile(0, (np.full(self.shape, self.code, np.uint8),))


def central_zeros(q: QuantTensor, shape: tuple[int, ...]) -> View:
    """Zero points uint8 as MatMulNBits has them, two of four bits in a byte, for a weight with minima."""
    return View(Filled(shape, q.central if q.bits == 8 else q.central << 4 | q.central), shape, UINT8)


def minima(q: QuantTensor, path: str) -> gs.Constant:
    """Minima float32 [N, G]."""
    return gs.Constant(f"{path}.minima", View(q, (q.shape[0], q.groups), np.float32, project=zeros_of))


def integer_zeros(q: QuantTensor, tile: Tile) -> Array:
    """The zero points uint8 [n, G] that an operator for codes takes."""
    zero = zeros_of(tile)
    return np.full(zero.shape, q.central, np.uint8) if q.has_minima else zero


def missing_form(found: Quantized) -> str:
    """Why the minima of a linear cannot be added apart, or nothing."""
    if not found.quant.has_minima:
        return ""
    if found.quant.activations == "int8":
        return NO_INTEGERS
    return NO_RANK if found.x.shape is None else ""


def before_zeros(graph: gs.Graph, found: Quantized, out: gs.Tensor, block: int | None = None) -> gs.Tensor:
    """Where the product by integer zero points goes: `out`, or with minima what `out` is the sum of.

    block   in which the operator makes int8 of x
    """
    if not found.quant.has_minima:
        return out
    nodes, q = Prefixed(graph, found.path), found.quant
    n, groups = q.shape[0], q.groups
    scale = gs.Constant(f"{found.path}.scales_of_minima", View(q, (n, groups), np.float32, project=scales_of))
    central = nodes("Mul", [nodes.const("central", q.central, np.float32), scale], "central_steps")
    by_row = nodes("Add", [minima(q, found.path), central], "by_row")
    offsets = nodes("Transpose", [by_row], "offsets", perm=[1, 0])
    missing = nodes("MatMul", [group_sums(graph, found.x, q, block), offsets], "missing")
    part = gs.Variable(f"{found.path}/by_codes", np.float32, out.shape)
    add(graph, "Add", [part, missing], out, name=f"{found.path}/with_zeros")
    return part


def group_sums(graph: gs.Graph, x: gs.Tensor, q: QuantTensor, block: int | None) -> gs.Tensor:
    """The sum of x [..., K] over each group, [..., G]; once for all linears that share x.

    Of x in int8, by `block`: the product with ones of the operator that rounds it so.
    """
    size, last = q.group_size, [-1]
    nodes = Prefixed(graph, f"{x.name}/sum{size}" + (f"by{block}" if block else ""))
    shape = nodes.const("shape", [0] * (len(x.shape) - 1) + [q.groups, size], np.int64)
    grouped = nodes("Reshape", [x, shape], "grouped")
    if block is None:
        return nodes("ReduceSum", [grouped, nodes.const("axes", last, np.int64)], "sums", keepdims=0)
    count = -(-size // block)
    ones = np.pad(np.ones(size, np.uint8), (0, count * block - size)).reshape(1, count, block)
    arrays: dict[str, Array] = {
        "ones": ones,
        "scales": np.ones((1, count), np.float32),
        "zeros": np.zeros((1, count), np.uint8),
    }
    weight = [nodes.const(name, values, values.dtype) for name, values in arrays.items()]
    attrs = {"K": size, "N": 1, "bits": 8, "block_size": block, "accuracy_level": 4}
    product = nodes("MatMulNBits", [grouped, *weight], "product", domain="com.microsoft", **attrs)
    return nodes("Squeeze", [product, nodes.const("axes", last, np.int64)], "sums")

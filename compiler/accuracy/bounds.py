"""How far a lowered layer may be from the twin: rounding only, and what rounding means for each arithmetic.

An operator that quantizes its input by definition (ONNX Runtime's MatMulNBits at accuracy_level 4 makes int8 of every
block of x) is held against the twin on the same quantized input: its known coarseness is not an error of ours, and
must not hide one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike

from instantrt.passes.core.lazy import Array
from instantrt.plugins.cpu.op import BLOCK, FORM, GEMM, INT8_BLOCKS, INT16_BLOCKS


@dataclass(frozen=True)
class Bound:
    """What one arithmetic may lose.

    layer  relative L2 of the worst output channel, on real activations
    probe  error of any element for an input with a single 1: weights as the layer really has them, relative to the
           element itself and `floor` of its channel's largest
    model  relative L2 of the logits; activations quantized at run time turn a last-bit difference into a whole step now
           and then, so these are wider than any layer's
    """

    name: str
    layer: float
    probe: float
    floor: float
    model: float


INT8_LEVEL = 4  # MatMulNBits' accuracy_level that quantizes activations; the others name float types
# Native TensorRT rounds signed codes and their zero point correction to 16 bits each before they cancel: no element can
# be better there than the largest of its channel, L. For an input with a single 1, with u what a type rounds by, w the
# weight, S the mean of the channel, c what a signed code stands for, |c| <= 1.07 L, these round: c, to u |c|; the
# product and its sum with the correction, both w - S, to u (|w| + |S|) each; what the mean leaves of the 1, to u |w|
# / 2; the sum with the mean's part, to u |w|; that part and its factor, to u |S| each. Over |w| + L that is at most
# u (2.3 + 3 |S| / L), at |w| = L: less than the probe's 3 u where |S| < L / 4.
#               layer, probe, floor, model
FLOAT32 = Bound("float32", 2e-5, 1e-5, 1e-3, 1e-4)
FLOAT16_CACHE = Bound("float32, float16 cache", 2e-3, 1e-5, 1e-3, 1e-2)  # that of float16 where it reads the cache
TWO_LIMBS = Bound("two limbs", 2e-3, 1e-3, 1e-3, 5e-3)
INT8_TOKEN = Bound("int8 per token", 1e-3, 1e-3, 1e-3, 3e-2)
INT8_BLOCK = Bound("int8 per block", 2e-3, 1e-3, 1e-3, 3e-2)
FLOAT16 = Bound("float16", 2e-3, 1.5e-3, 1, 1e-2)
BFLOAT16 = Bound("bfloat16", 2e-2, 1.2e-2, 1, 5e-2)
LIMBS_CACHE = Bound("two limbs, integer cache", 2e-3, 1e-3, 1e-3, 3e-2)
INT8_FLOAT16 = Bound("int8 per token, float16", 2e-3, 1.5e-3, 1, 3e-2)
INT8_BFLOAT16 = Bound("int8 per token, bfloat16", 2e-2, 1.2e-2, 1, 5e-2)
# Of what a layer reads, made of what the layers before it read: attention in between amplifies what two limbs lose of a
# query and a key, to 4.4e-3 in a real model; what int8 loses is lost in the twin, too.
BETWEEN = {TWO_LIMBS: 1e-2, LIMBS_CACHE: 1e-2, INT8_TOKEN: INT8_TOKEN.layer, INT8_BLOCK: INT8_BLOCK.layer}


def bound_of(nodes: Sequence[gs.Node], dtype: np.dtype[np.generic]) -> Bound:
    """The bound of what `nodes` compute, in the compute type `dtype`: the coarsest arithmetic found among them."""
    ops = {node.op for node in nodes}
    if dtype == np.float16:
        return INT8_FLOAT16 if quantizes(nodes) else FLOAT16
    if dtype == np.dtype(ml_dtypes.bfloat16):
        return INT8_BFLOAT16 if quantizes(nodes) else BFLOAT16
    if int8_block(nodes) is not None:
        return INT8_BLOCK
    if {"MatMulIntegerToFloat", "MatMulNBits", GEMM.name} & ops:
        # a DequantizeLinear makes the first limb, to be taken off from x
        two = any(n.attrs.get(FORM) == INT16_BLOCKS or parts_limbs(n) or n.op == "DequantizeLinear" for n in nodes)
        return (LIMBS_CACHE if any(map(keeps_integers, nodes)) else TWO_LIMBS) if two else INT8_TOKEN
    if quantizes(nodes):
        return INT8_TOKEN
    return FLOAT16_CACHE if any(keeps(node, np.float16) for node in nodes) else FLOAT32


def quantizes(nodes: Sequence[gs.Node]) -> bool:
    """Do they make integers of activations, or of a cache?"""
    integers = any(n.op == "QuantizeLinear" or n.attrs.get("activation_bits") == 8 for n in nodes)
    return integers or any(map(keeps_integers, nodes))


def keeps_integers(node: gs.Node) -> bool:
    """Does it write a cache of integers?"""
    return keeps(node, np.int8, np.uint8)


def keeps(node: gs.Node, *types: DTypeLike) -> bool:
    """Does it write a cache of one of these?"""
    return any(t.name.startswith("present.") and t.dtype in types for t in node.outputs)


def int8_blocks(x: Array, block: int) -> Array:
    """x [..., K] as int8 sees it in blocks of `block` along K: round(x * 127 / m) * m / 127, m = max|x_block|."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    padded = (np.pad(rows, ((0, 0), (0, -k % block))) if k % block else rows).reshape(len(rows), -1, block)
    largest = np.abs(padded).max(axis=-1, keepdims=True)
    largest[largest == 0] = 1
    steps = np.rint(padded * (np.float32(127) / largest))  # as the operator has it: a tie goes the same way
    seen = steps * (largest / np.float32(127))
    return np.asarray(seen.reshape(len(rows), -1)[:, :k].reshape(x.shape), np.float32)


def seen_by(nodes: Sequence[gs.Node], x: Array) -> Array:
    """The input that a layer's operators really multiply with."""
    block = int8_block(nodes)
    return x if block is None else int8_blocks(x, block)


def int8_block(nodes: Iterable[gs.Node]) -> int | None:
    """The block in which a product makes int8 of x itself; None where x reaches it whole, or as two limbs.

    A MatMulNBits whose product is taken off from x is no layer, but tells what the rounding leaves, the second limb;
    nor is one with an axis for a Squeeze, of sums for minima.
    """
    nodes = list(nodes)
    if any(n.attrs.get(FORM) == INT8_BLOCKS for n in nodes):
        return BLOCK
    coarse = (
        n
        for n in nodes
        if n.op == "MatMulNBits"
        and n.attrs.get("accuracy_level") == INT8_LEVEL
        and not any(parts_limbs(user) or user.op in ("Sub", "Squeeze") for t in n.outputs for user in t.outputs)
    )
    return next((int(n.attrs["block_size"]) for n in coarse), None)


def parts_limbs(node: gs.Node) -> bool:
    """Does it take limbs apart, which are rows of one product? Columns are those of linears that were joined."""
    return bool(node.op == "Split" and node.attrs.get("axis", 0) == 0)

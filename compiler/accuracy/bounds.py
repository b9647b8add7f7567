"""How far a lowered layer may be from the twin: rounding only, and what rounding means for each arithmetic.

An operator that quantizes its input by definition (ONNX Runtime's MatMulNBits at accuracy_level 4 makes int8 of every
block of x) is held against the twin on the same quantized input: its known coarseness is not an error of ours, and
must not hide one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from passes.lazy import Array


@dataclass(frozen=True)
class Bound:
    """What one arithmetic may lose.

    layer  relative L2 of the worst output channel, on real activations
    probe  relative error of any element for an input with a single 1: weights as the layer really has them
    model  relative L2 of the logits; activations quantized at run time turn a last-bit difference into a whole step now
           and then, so these are wider than any layer's
    """

    name: str
    layer: float
    probe: float
    model: float


#                   layer  probe   model
FLOAT32 = Bound("float32", 2e-5, 1e-5, 1e-4)
TWO_LIMBS = Bound("two 7-bit limbs", 2e-3, 1e-3, 5e-3)
INT8_TOKEN = Bound("int8 per token", 1e-3, 1e-3, 3e-2)
INT8_BLOCK = Bound("int8 per block", 2e-3, 1e-3, 3e-2)
FLOAT16 = Bound("float16", 4e-3, 3e-3, 1e-2)
BFLOAT16 = Bound("bfloat16", 3e-2, 2.4e-2, 1e-1)
INT8_FLOAT16 = Bound("int8 per token, float16", 4e-3, 3e-3, 3e-2)
INT8_BFLOAT16 = Bound("int8 per token, bfloat16", 3e-2, 2.4e-2, 1e-1)


def bound_of(nodes: Iterable[gs.Node], dtype: np.dtype[np.generic]) -> Bound:
    """The bound of what `nodes` compute, in the compute type `dtype`: the coarsest arithmetic found among them."""
    ops = {node.op for node in nodes}
    quantizes = "QuantizeLinear" in ops
    if dtype == np.float16:
        return INT8_FLOAT16 if quantizes else FLOAT16
    if dtype == np.dtype(ml_dtypes.bfloat16):
        return INT8_BFLOAT16 if quantizes else BFLOAT16
    if "MatMulNBits" in ops:
        return INT8_BLOCK
    if "MatMulInteger" in ops:
        return TWO_LIMBS if any(n.op == "Split" for n in nodes) else INT8_TOKEN
    return INT8_TOKEN if quantizes else FLOAT32


def int8_blocks(x: Array, block: int) -> Array:
    """x [..., K] as int8 sees it in blocks of `block` along K: round(x / s) * s, s = max|x_block| / 127."""
    k = x.shape[-1]
    padded = np.pad(x.reshape(-1, k), ((0, 0), (0, -k % block))).reshape(-1, -(-k // block), block)
    step = np.abs(padded).max(axis=-1, keepdims=True) / np.float32(127)
    step[step == 0] = 1
    return np.asarray((np.rint(padded / step) * step).reshape(len(padded), -1)[:, :k].reshape(x.shape), np.float32)


def seen_by(nodes: Iterable[gs.Node], x: Array) -> Array:
    """The input that a layer's operators really multiply with."""
    block = next((int(n.attrs["block_size"]) for n in nodes if n.op == "MatMulNBits"), None)
    return x if block is None else int8_blocks(x, block)

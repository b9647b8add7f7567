"""Attention over a cache of four bits, as `QuantizeCacheByToken` leaves it: what it was before, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.names import PAST
from instantrt.passes.core.quant import UINT8
from instantrt.passes.core.rewrite import producer
from instantrt.plugins.hadamard import hadamard

# Operators back from what attention reads, each through its first input or that of a number
CODES = "Reshape Mul Sub Reshape Cast Reshape Concat Unsqueeze BitwiseAnd"
SCALE = "Reshape Mul.1 Unsqueeze Cast"
ZERO = "Reshape Mul Sub.1 Unsqueeze Cast"
NEW = "Cast ReduceSum Mul Reshape Clip Add Round Div Reshape"  # from codes of new tokens to these, turned


@dataclass(frozen=True)
class PartByToken:
    """Keys, or values: `concat` makes their codes longer by those of `new` [B, H, S, D], as `scale` and `zero` do what
    lies beside them; `center` [1, H, 1, D] came off."""

    concat: gs.Node
    scale: gs.Node
    zero: gs.Node
    new: gs.Tensor
    center: gs.Tensor | None


def part_by_token(values: gs.Tensor) -> PartByToken | None:
    """The cache of four bits that attention reads as `values`; None where it is another."""
    kept = [behind(values, path) for path in (CODES, SCALE, ZERO)]
    concats = [producer(t, "Concat") if t is not None else None for t in kept]
    codes, scale, zero = concats
    if codes is None or scale is None or zero is None or codes.outputs[0].dtype != UINT8:
        return None
    past, made = codes.inputs[0].name, f"cache/{codes.inputs[0].name.removeprefix(PAST)}"
    if [scale.inputs[0].name, zero.inputs[0].name] != [f"{past}_scale", f"{past}_zero"]:
        return None
    x = behind(codes.inputs[1], NEW)
    new = unturned(x) if x is not None and x.name == f"{made}/rotated" else None
    if new is None:
        return None
    if new.name == f"{made}/centered_keys":
        return PartByToken(codes, scale, zero, *new.inputs[0].inputs)
    return PartByToken(codes, scale, zero, new, None)


def unturned(tensor: gs.Tensor) -> gs.Tensor | None:
    """x where `tensor` is x times Hadamard's matrix."""
    product = producer(tensor, "MatMul")
    return product.inputs[0] if product is not None and is_hadamard(product.inputs[1]) else None


def turned_back(tensor: gs.Tensor) -> gs.Node | None:
    """The only reader of `tensor`, which multiplies it by Hadamard's matrix."""
    readers = [node for node in tensor.outputs if node.op == "MatMul" and is_hadamard(node.inputs[1])]
    return readers[0] if len(readers) == len(tensor.outputs) == 1 else None


def is_hadamard(tensor: gs.Tensor) -> bool:
    """Symmetric, it is its own inverse."""
    constant = isinstance(tensor, gs.Constant) and len(tensor.shape) == 2
    return constant and np.array_equal(tensor.values, hadamard(tensor.shape[0]))


def behind(tensor: gs.Tensor, path: str) -> gs.Tensor | None:
    """Follows `tensor` up; None where another operator makes it."""
    for step in path.split():
        op, _, index = step.partition(".")
        node = producer(tensor, op)
        if node is None:
            return None
        tensor = node.inputs[int(index or 0)]
    return tensor


def head_size(past: gs.Tensor) -> int:
    """Channels of a head in a cache [B, H, T, ...]; of four bits two share a byte."""
    return int(past.shape[3]) * (2 if past.dtype == UINT8 else 1)

"""Logits of the last position only: a prompt of 1000 tokens then costs one row of the vocabulary's matrix, not 1000.

Before: MatMul(x [B, S, K], W) -> (Add, Mul, Div, Tanh, Cast)* -> logits [B, S, V]
After:  MatMul(x[:, -1:], W)   -> the same                    -> logits [B, 1, V]

An x that was quantized per token is sliced before that, and left float for `QuantizeActivations`: TensorRT-RTX crashes
over a Slice of what was dequantized with scales computed at run time, and the other tokens' codes would be wasted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.rewrite import Reject, Rewrite, add
from instantrt.passes.qdq.insert_qdq import float_input

LOGITS = "logits"
POINTWISE = frozenset({"Add", "Mul", "Div", "Tanh", "Cast", "Clip"})
TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class HeadMatch:
    """The head, and every tensor from its product to the logits."""

    node: gs.Node
    chain: tuple[gs.Tensor, ...]


@dataclass(frozen=True)
class LastLogits(Rewrite[HeadMatch]):
    """Put before the lowerings, and before `QuantizeActivations`: the head is then a linear with a shorter x."""

    def match(self, node: gs.Node) -> HeadMatch | Reject | None:
        if node.op != "MatMul":
            return None
        chain = tuple(pointwise_chain(node.outputs[0]))
        if chain[-1].name != LOGITS or not chain[-1].shape:
            return None
        if len(chain[-1].shape) != 3:
            return Reject(f"the logits have {len(chain[-1].shape)} dimensions, not [batch, sequence, vocabulary]")
        return HeadMatch(node, chain)

    def rewrite(self, graph: gs.Graph, match: HeadMatch) -> None:
        node = match.node
        x = float_input(node.inputs[0])
        bounds = [small(f"{LOGITS}/{n}", [v], np.int64) for n, v in (("start", -1), ("stop", TO_THE_END), ("axis", 1))]
        shape = [x.shape[0], 1, *x.shape[2:]] if x.shape else None
        node.inputs[0] = add(graph, "Slice", [x, *bounds], gs.Variable(f"{x.name}/last", x.dtype, shape))
        for tensor in match.chain:
            tensor.shape = [tensor.shape[0], 1, *tensor.shape[2:]] if tensor.shape else None


def pointwise_chain(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """`tensor` and what follows from it while one pointwise node consumes the one before."""
    yield tensor
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in POINTWISE:
        tensor = tensor.outputs[0].outputs[0]
        yield tensor

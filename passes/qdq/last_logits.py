"""Logits of the last position only: a prompt of 1000 tokens then costs one row of the vocabulary's matrix, not 1000.

Before: MatMul(x [B, S, K], W)    -> (Add, Mul, Div, Tanh, Cast)* -> logits [B, S, V]
After:  MatMul(last(x) [B, 1, K], W) -> the same                 -> logits [B, 1, V]

last(x) is x[:, -1:], which is right for rows padded on the left; by the mask it is each row's own last token, on
whichever side it is padded.

An x that was quantized per token is sliced before that, and left float for `QuantizeActivations`: TensorRT-RTX crashes
over a Slice of what was dequantized with scales computed at run time (docs/facts.md, "Scales computed at run time"),
and the other tokens' codes would be wasted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.linear import Linear, linear
from instantrt.passes.core.names import LOGITS, MASK, PRESENT
from instantrt.passes.core.rewrite import Reject, Rewrite, add, cast, producer
from instantrt.passes.qdq.insert_qdq import float_input

LAST = f"{LOGITS}/last"  # the node that picks the token: without it the graph has the logits of all again
POINTWISE = frozenset({"Add", "Mul", "Div", "Tanh", "Cast", "Clip"})
# What may also lie between a head, or its parts, and the logits.
SHAPING = "Concat Gather Identity LogSoftmax Pad Reshape Slice Softmax Squeeze Sub Transpose Unsqueeze Where"
BETWEEN = POINTWISE | frozenset(SHAPING.split())
TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class HeadMatch:
    """The head, and every tensor from its product to the logits."""

    node: gs.Node
    chain: tuple[gs.Tensor, ...]


@dataclass(frozen=True)
class LastLogits(Rewrite[HeadMatch]):
    """Put before the linears are lowered, and before `QuantizeActivations`: the head is then a linear with a shorter x.

    by_mask   after the caches were lowered: where a row ends depends on whether its cache grows or is one buffer
    """

    by_mask: bool = False

    def match(self, node: gs.Node) -> HeadMatch | Reject | None:
        if node.op != "MatMul":
            return None
        chain = tuple(pointwise_chain(node.outputs[0]))
        if chain[-1].name != LOGITS or not chain[-1].shape:
            return None
        if len(chain[-1].shape) != 3:
            return Reject(f"the logits have {len(chain[-1].shape)} dimensions, not [batch, sequence, vocabulary]")
        if chain[-1].shape[1] == 1:
            return Reject("the logits are those of one token already")
        return HeadMatch(node, chain)

    def rewrite(self, graph: gs.Graph, match: HeadMatch) -> None:
        node = match.node
        x = float_input(node.inputs[0])
        shape = [x.shape[0], 1, *x.shape[2:]] if x.shape else None
        last = gs.Variable(f"{x.name}/last", x.dtype, shape)
        if self.by_mask:
            add(graph, "GatherND", [x, last_tokens(graph, x)], last, name=LAST, batch_dims=1)
        else:
            ends = (("start", -1), ("stop", TO_THE_END), ("axis", 1))
            add(graph, "Slice", [x, *(small(f"{LOGITS}/{n}", [v], np.int64) for n, v in ends)], last)
        node.inputs[0] = last
        for tensor in match.chain:
            tensor.shape = [tensor.shape[0], 1, *tensor.shape[2:]] if tensor.shape else None


def last_tokens(graph: gs.Graph, x: gs.Tensor) -> gs.Tensor:
    """Where in x [B, S, K] the last token of each row lies, int64 [B, 1, 1].

    A row ends at the last 1 of its mask. A cache that grows holds what came before x in the mask's first T - S columns.
    One buffer holds each row from its own start: its mask may be as long as the buffer, and x are its last tokens.
    """
    (mask,) = (t for t in graph.inputs if t.name == MASK)

    def number(value: int | list[int], name: str) -> gs.Constant:
        return small(f"{LAST}/{name}", value, np.int64)

    def count(tensor: gs.Tensor, name: str) -> gs.Tensor:
        """S or T, [1]; its type is said, or it would become that of the hidden states it is read from."""
        return add(graph, "Shape", [tensor], gs.Variable(f"{LAST}/{name}", np.dtype(np.int64), [1]), start=1, end=2)

    one, sequence, total = number(1, "one"), count(x, "sequence"), count(mask, "total")
    allowed = cast(graph, mask, np.bool_, f"{LAST}/allowed")
    limit = add(graph, "Squeeze", [add(graph, "Add", [total, one], f"{LAST}/limit")], f"{LAST}/scalar")
    ends = add(graph, "Range", [one, limit, one], f"{LAST}/ends")
    seen = add(graph, "Where", [allowed, ends, number(0, "zero")], f"{LAST}/seen")
    end = add(graph, "ReduceMax", [seen, number([1], "axis")], f"{LAST}/end", keepdims=0)
    if any(t.name.startswith(PRESENT) and producer(t, "Concat") for t in graph.outputs):
        end = add(graph, "Sub", [end, add(graph, "Sub", [total, sequence], f"{LAST}/past")], f"{LAST}/new")
    inside = add(graph, "Max", [add(graph, "Min", [end, sequence], f"{LAST}/most"), one], f"{LAST}/inside")
    place = add(graph, "Sub", [inside, one], f"{LAST}/place")
    return add(graph, "Unsqueeze", [place, number([1, 2], "axes")], f"{LAST}/index")


def pointwise_chain(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """`tensor` and what follows from it while one node consumes the one before, with the same for each position."""
    yield tensor
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in POINTWISE:
        (user,) = tensor.outputs
        if not all(other is tensor or for_any_position(other) for other in user.inputs):
            return
        (tensor,) = user.outputs
        yield tensor


def makes_logits(node: gs.Node) -> bool:
    """Is nothing but pointwise operators between its output and the graph's logits?"""
    *_, last = pointwise_chain(node.outputs[0])
    return bool(last.name == LOGITS)


def for_any_position(tensor: gs.Tensor) -> bool:
    """A constant that is the same for each position of [batch, sequence, channels]."""
    return isinstance(tensor, gs.Constant) and (len(tensor.shape) < 2 or tensor.shape[-2] == 1)


def head_linears(graph: gs.Graph) -> list[Linear]:
    """The linears that the logits are made by: the nearest ones behind the graph's `logits`."""
    found, pending, seen = list[Linear](), [t for t in graph.outputs if t.name == LOGITS], set[int]()
    while pending:
        maker = next(iter(pending.pop().inputs), None)
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if (head := linear(maker)) is not None:
            found.append(head)
        elif maker.op in BETWEEN:
            pending += maker.inputs
    return found

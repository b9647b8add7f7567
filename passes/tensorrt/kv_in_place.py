"""A cache of fixed length that is written in place, instead of one that grows by a copy at each step.

Before: present [B, H, P + S, D] = Concat(past [B, H, P, D], new);       Attention(q, K, V, mask [B, 1, S, P + S])
After:  present [B, H, M, D] = TensorScatter(past [B, H, M, D], new, P); Attention(q, K, V, mask padded to M)

The engine's past and present share one buffer. A row ends at the last key that its row of attention_mask allows, and
its S new tokens are the last of it: P[r] = max(end[r] - S, 0). Rows padded on the left all end where the mask does.
Rows padded on the right end where they end, so sequences of different lengths decode in one batch, each in its own
place; and the mask may always have the full length M, zeros behind the end, so that no shape changes from step to step
(docs/facts.md, "TensorScatter").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.names import IDS, MASK, PAST
from instantrt.passes.core.rewrite import Pass, Prefixed, Reject, Rewrite, add, once, producer, set_opset, take_over
from instantrt.passes.core.verify import attention_is_explicit
from instantrt.passes.qdq.quantize_cache import unlike_cache

SCATTER_OPSET = 24  # the first with TensorScatter
HIDDEN = -32752.0  # what float16 can add twice; see ClampMask


def kv_in_place(max_length: int) -> tuple[Pass, ...]:
    """The passes that put every cache in place, or raise a UserError that names the first one that cannot be."""
    return ScatterCache(max_length), PadMask(max_length), RequireInPlace()


@dataclass(frozen=True)
class ScatterCache(Rewrite[gs.Node]):
    """present = Concat(past, new) -> TensorScatter(past, new, position) in a buffer of `max_length`."""

    max_length: int

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if (reason := unlike_cache(node)) is None:
            return None
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        (past, new), present = match.inputs, take_over(match)
        for tensor in (past, present):
            tensor.shape = [*tensor.shape[:2], self.max_length, tensor.shape[3]]
        inputs = [past, new, write_position(graph)]
        add(graph, "TensorScatter", inputs, present, name=match.name, axis=-2, mode="linear")


@dataclass(frozen=True)
class PadMask(Rewrite[gs.Node]):
    """Attention(.., mask) over a cache in place -> Attention(.., Pad(mask)): what is not yet written is hidden."""

    requires = (attention_is_explicit,)
    max_length: int

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        return node if node.op == "Attention" and producer(node.inputs[1], "TensorScatter") is not None else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        mask, nodes = match.inputs[3], Prefixed(graph, "cache")
        used = nodes("Neg", [length(graph, MASK)], "used")
        room = nodes("Add", [used, nodes.const("max_length", [self.max_length], np.int64)], "room")
        pads = nodes("Pad", [room, nodes.const("seven", [7, 0], np.int64)], "pads")
        padded = once(graph, "Pad", [mask, pads, nodes.const("hidden", HIDDEN, mask.dtype)], f"{mask.name}/padded")
        padded.dtype, padded.shape = mask.dtype, [*mask.shape[:3], self.max_length]
        match.inputs[3] = padded


class RequireInPlace(Pass):
    """A graph whose caches are all in place -> the same, of the first opset that has TensorScatter."""

    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str | Reject]]:
        for tensor in graph.inputs:
            if tensor.name.startswith(PAST) and any(n.op not in ("TensorScatter", "Shape") for n in tensor.outputs):
                raise UserError(
                    "this cache cannot be updated in place",
                    where=tensor.name,
                    expected="Concat(past, new) that only an Attention node reads",
                    found=", ".join(node.op for node in tensor.outputs),
                    fix="use --kv-cache concat",
                )
        set_opset(graph, max(graph.opset, SCATTER_OPSET))
        yield graph.name, f"opset {graph.opset}"


def write_position(graph: gs.Graph) -> gs.Tensor:
    """Where each row's new entries go, int64 `[B]`; made once."""
    nodes = Prefixed(graph, "cache/position")
    axis, zero, one = (nodes.const(n, v, np.int64) for n, v in (("axis", [1]), ("zero", 0), ("one", 1)))
    allowed = nodes.cast(graph_input(graph, MASK), np.bool_, "allowed")
    total = nodes("Squeeze", [length(graph, MASK)], "total")
    ends = nodes("Range", [one, nodes("Add", [total, one], "limit"), one], "ends")
    end = nodes("ReduceMax", [nodes("Where", [allowed, ends, zero], "seen"), axis], "end", keepdims=0)
    start = nodes("Sub", [end, length(graph, IDS)], "start")
    return once(graph, "Max", [start, zero], nodes.prefix)


def length(graph: gs.Graph, name: str) -> gs.Tensor:
    """The second dimension of a graph input, int64 `[1]`."""
    return once(graph, "Shape", [graph_input(graph, name)], f"{name}/dim1", start=1, end=2)


def graph_input(graph: gs.Graph, name: str) -> gs.Tensor:
    (tensor,) = (t for t in graph.inputs if t.name == name)
    return tensor

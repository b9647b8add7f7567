"""A cache of fixed length that is written in place, instead of one that grows by a copy at each step.

Before: present [B, H, P + S, D] = Concat(past [B, H, P, D], new);       Attention(q, K, V, mask [B, 1, S, P + S])
After:  present [B, H, M, D] = TensorScatter(past [B, H, M, D], new, P); Attention(q, K, V, mask padded to M)

The engine's past and present share one buffer. P is measured as length(attention_mask) - length(input_ids).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes.errors import UserError
from passes.lazy import small
from passes.native import once
from passes.rewrite import Ledger, Reject, Rewrite, add, producer, run, take_over

OPSET = 24  # the first with TensorScatter
PAST = "past_key_values."
HIDDEN = -32752.0  # what float16 can add twice; see ClampMask


def kv_in_place(graph: gs.Graph, max_length: int, ledger: Ledger) -> gs.Graph:
    """Every cache of `graph` in place, or a UserError that names the first one that cannot be."""
    run(graph, [ScatterCache(max_length), PadMask(max_length)], ledger)
    for tensor in graph.inputs:
        if tensor.name.startswith(PAST) and any(n.op not in ("TensorScatter", "Shape") for n in tensor.outputs):
            raise UserError(
                "this cache cannot be updated in place",
                where=tensor.name,
                expected="Concat(past, new) that only an Attention node reads",
                found=", ".join(node.op for node in tensor.outputs),
                fix="use --kv-cache concat",
            )
    graph.opset = max(graph.opset, OPSET)
    graph.import_domains = None  # else the exporter would write the old opset
    return graph


@dataclass(frozen=True)
class CacheMatch:
    node: gs.Node
    past: gs.Tensor
    new: gs.Tensor


@dataclass(frozen=True)
class ScatterCache(Rewrite[CacheMatch]):
    max_length: int

    def match(self, node: gs.Node) -> CacheMatch | Reject | None:
        if node.op != "Concat" or len(node.inputs) != 2 or not node.inputs[0].name.startswith(PAST):
            return None
        if node.attrs["axis"] not in (2, -2):
            return Reject("the cache does not grow along its second last axis")
        if any(reader.op != "Attention" for reader in node.outputs[0].outputs):
            return Reject("something other than Attention reads the cache")
        return CacheMatch(node, *node.inputs)

    def rewrite(self, graph: gs.Graph, match: CacheMatch) -> None:
        present = take_over(match.node)
        for tensor in (match.past, present):
            tensor.shape = [*tensor.shape[:2], self.max_length, tensor.shape[3]]
        add(
            graph,
            "TensorScatter",
            [match.past, match.new, write_position(graph)],
            present,
            name=match.node.name,
            axis=-2,
            mode="linear",
        )


@dataclass(frozen=True)
class MaskMatch:
    node: gs.Node
    mask: gs.Tensor


@dataclass(frozen=True)
class PadMask(Rewrite[MaskMatch]):
    """What lies behind the written part of a cache is hidden."""

    max_length: int

    def match(self, node: gs.Node) -> MaskMatch | Reject | None:
        if node.op != "Attention" or producer(node.inputs[1], "TensorScatter") is None:
            return None
        return MaskMatch(node, node.inputs[3])

    def rewrite(self, graph: gs.Graph, match: MaskMatch) -> None:
        mask = match.mask
        total = length(graph, "attention_mask", 1)
        used = once(graph, "Neg", [total], "cache/used")
        room = once(graph, "Add", [used, small("cache/max_length", [self.max_length], np.int64)], "cache/room")
        pads = once(graph, "Pad", [room, small("cache/seven", [7, 0], np.int64)], "cache/pads")
        padded = once(graph, "Pad", [mask, pads, small("cache/hidden", HIDDEN, mask.dtype)], f"{mask.name}/padded")
        padded.dtype, padded.shape = mask.dtype, [*mask.shape[:3], self.max_length]
        match.node.inputs[3] = padded


def write_position(graph: gs.Graph) -> gs.Tensor:
    """Where the new entries go: P for every sequence, int64 `[B]`."""
    start = once(graph, "Sub", [length(graph, "attention_mask", 1), length(graph, "input_ids", 1)], "cache/start")
    return once(graph, "Expand", [start, length(graph, "input_ids", 0)], "cache/position")


def length(graph: gs.Graph, name: str, axis: int) -> gs.Tensor:
    """One dimension of a graph input, int64 `[1]`."""
    (tensor,) = (t for t in graph.inputs if t.name == name)
    return once(graph, "Shape", [tensor], f"{name}/dim{axis}", start=axis, end=axis + 1)

"""The KV cache as integers: a token's keys and values are quantized once, when they are written, and read as codes.

Eight bits have one scale for each channel of each head, known before: what attention reads is `code * scale` whoever
computes it, so one graph says it for ONNX Runtime's GroupQueryAttention, standard operators and engines alike. Four
bits lose too much that way (docs/facts.md, "Caches of integers"): `quantize_cache_by_token`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array
from instantrt.passes.core.names import PAST
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, producer

INT8 = np.dtype(np.int8)


@dataclass(frozen=True)
class QuantizeCache(Rewrite[gs.Node]):
    """present = Concat(past, new) -> int8 codes that grow, and what attention reads of them.

    codes [B, H, S, D] = QuantizeLinear(new / scale, 1, 0); present [B, H, T, D] = Concat(past, codes); attention reads
    DequantizeLinear(present, 1, 0) * scale. Steps of 1 because the operators know a scale by tensor, by one axis or by
    blocks, and this is one by two axes.

    scales   `i.key` and `i.value` -> float32 [H, D]
    """

    scales: Mapping[str, Array] = field(repr=False)

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if (reason := unlike_cache(node)) is None:
            return None
        past = node.inputs[0]
        scale = self.scales.get(past.name.removeprefix(PAST))
        if not reason and (scale is None or [*scale.shape] != [past.shape[1], past.shape[3]]):
            reason = "no scale is known for it"
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        past, new = match.inputs
        name = past.name.removeprefix(PAST)
        nodes = Prefixed(graph, f"cache/{name}")
        scale = nodes.const("scale", self.scales[name][None, :, None], FLOAT32)
        one, zero = nodes.const("one", 1, FLOAT32), nodes.const("zero", 0, INT8)
        codes = nodes("QuantizeLinear", [nodes("Div", [new, scale], "steps"), one, zero], "codes")
        codes.dtype, codes.shape = INT8, new.shape
        present = grow(match, codes)
        values = nodes("Mul", [nodes("DequantizeLinear", [present, one, zero], "whole"), scale], "values")
        attend(present, values, new.shape[3])


def unlike_cache(node: gs.Node) -> str | None:
    """Why `present = Concat(past, new)` is no cache that attention alone reads, or ""; None for any other node."""
    if node.op != "Concat" or not node.inputs[0].name.startswith(PAST):
        return None
    if len(node.inputs) != 2 or node.attrs["axis"] not in (2, -2):
        return "the cache does not grow along its second last axis"
    if any(reader.op != "Attention" for reader in node.outputs[0].outputs):
        return "something other than Attention reads the cache"
    return ""


def grow(concat: gs.Node, codes: gs.Tensor) -> gs.Tensor:
    """present = Concat(past, new) -> Concat(past, codes): both are what the codes are."""
    past, present = concat.inputs[0], concat.outputs[0]
    for tensor in (past, present):
        tensor.dtype, tensor.shape = codes.dtype, [*tensor.shape[:3], codes.shape[3]]
    concat.inputs[1] = codes
    return present


def attend(present: gs.Tensor, values: gs.Tensor, size: int) -> None:
    """Attention reads `values` [B, H, T, size] where it read `present`."""
    values.dtype, values.shape = FLOAT32, [*present.shape[:3], size]
    for reader in [node for node in present.outputs if node.op == "Attention"]:
        reader.inputs = [values if t is present else t for t in reader.inputs]


@dataclass(frozen=True)
class QuantizedPart:
    """A cache as `QuantizeCache` leaves it: `concat` makes it longer by codes of `new` [B, H, S, D]; `scale` is
    [1, H, 1, D]."""

    concat: gs.Node
    new: gs.Tensor
    scale: gs.Tensor


def quantized_part(values: gs.Tensor) -> QuantizedPart | None:
    """The cache of int8 that attention reads as `values`; None where it is another."""
    concat = producer(kept(values), "Concat")
    if kept(values) is values or concat is None or not concat.inputs[0].name.startswith(PAST):
        return None
    return QuantizedPart(concat, concat.i(1).i().inputs[0], values.inputs[0].inputs[1])


def kept(values: gs.Tensor) -> gs.Tensor:
    """The codes of what attention reads as `values`, which are themselves where they are no integers."""
    product = producer(values, "Mul")
    whole = producer(product.inputs[0], "DequantizeLinear") if product is not None else None
    return whole.inputs[0] if whole is not None else values

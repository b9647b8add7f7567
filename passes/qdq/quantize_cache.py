"""The KV cache as integers: a token's keys and values are quantized once, when they are written, and read as codes.

Eight bits have one scale for each channel of each head, known before: what attention reads is `code * scale` whoever
computes it, so one graph says it for ONNX Runtime's GroupQueryAttention, standard operators and engines alike. Four
bits lose too much that way (docs/facts.md, "Caches of integers"): each token of each head has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, producer

PAST, PRESENT = "past_key_values.", "present."
INT8, UINT8, FLOAT32 = (np.dtype(each) for each in (np.int8, np.uint8, np.float32))


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


@dataclass(frozen=True)
class QuantizeCacheByToken(Rewrite[gs.Node]):
    """present = Concat(past, new) -> codes of four bits, a scale and a zero point for each token and head.

    What is quantized is x = new / reach: the channels of a key differ by more than four bits can tell apart, and by the
    same in every token. By InstantQuant's formula: low = min(min(x), 0), high = max(max(x), 0) over D,
    scale = (high - low) / 15, 1 where that is 0, zero = round(-low / scale), code = clamp(round(x / scale) + zero).
    Two neighbours share a byte, the first one's bits lowest: codes uint8 [B, H, T, D / 2]; `i.key_scale` float32 and
    `i.key_zero` uint8 [B, H, T, 1] are caches beside them. Attention reads (code - zero) * scale * reach.

    reach   `i.key` and `i.value` -> float32 [H, D], about the largest of each channel
    """

    reach: Mapping[str, Array] = field(repr=False)

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if (reason := unlike_cache(node)) is None:
            return None
        size = node.inputs[0].shape[3]
        if not reason and (not isinstance(size, int) or size % 2):
            reason = f"head size {size} is odd, and two codes share a byte"
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        past, new = match.inputs
        name = past.name.removeprefix(PAST)
        size, nodes = past.shape[3], Prefixed(graph, f"cache/{name}")
        reach = nodes.const("reach", self.reach[name][None, :, None], FLOAT32)
        x = nodes("Div", [new, reach], "evened")
        axis, none = nodes.const("axis", [3], np.int64), nodes.const("none", 0, FLOAT32)
        top, one = nodes.const("top", 15, FLOAT32), nodes.const("one", 1, FLOAT32)
        low = nodes("Min", [nodes("ReduceMin", [x, axis], "lowest"), none], "low")
        high = nodes("Max", [nodes("ReduceMax", [x, axis], "highest"), none], "high")
        step = nodes("Div", [nodes("Sub", [high, low], "range"), top], "step")
        scale = nodes("Where", [nodes("Equal", [step, none], "zeros"), one, step], "scale")
        zero = nodes("Round", [nodes("Div", [nodes("Neg", [low], "below"), scale], "unrounded")], "zero")
        steps = nodes("Round", [nodes("Div", [x, scale], "steps")], "rounded")
        codes = nodes("Clip", [nodes("Add", [steps, zero], "shifted"), none, top], "codes")
        small = nodes("Cast", [zero], "zero/byte", to=onnx.TensorProto.UINT8)
        zeros = nodes("Cast", [aside(graph, match, small, "zero", UINT8)], "zero/float", to=onnx.TensorProto.FLOAT)
        scales = aside(graph, match, scale, "scale", FLOAT32)
        packed = pack(nodes, codes, size)
        packed.dtype, packed.shape = UINT8, [*new.shape[:3], size // 2]
        present = grow(match, packed)
        centered = nodes("Sub", [unpack(nodes, present, size), zeros], "centered")
        evened = nodes("Mul", [centered, scales], "evened_values")
        attend(present, nodes("Mul", [evened, reach], "values"), size)


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


def aside(graph: gs.Graph, concat: gs.Node, value: gs.Tensor, what: str, dtype: np.dtype[Any]) -> gs.Tensor:
    """A cache of what each token has beside its codes: [B, H, P, 1] grows by `value` [B, H, S, 1]."""
    past, present = concat.inputs[0], concat.outputs[0]
    before = gs.Variable(f"{past.name}_{what}", dtype, [*past.shape[:3], 1])
    after = gs.Variable(f"{present.name}_{what}", dtype, [*present.shape[:3], 1])
    graph.inputs.append(before)
    graph.outputs.append(after)
    return add(graph, "Concat", [before, value], after, axis=2)


def attend(present: gs.Tensor, values: gs.Tensor, size: int) -> None:
    """Attention reads `values` [B, H, T, size] where it read `present`."""
    values.dtype, values.shape = FLOAT32, [*present.shape[:3], size]
    for reader in [node for node in present.outputs if node.op == "Attention"]:
        reader.inputs = [values if t is present else t for t in reader.inputs]


def pack(nodes: Prefixed, codes: gs.Tensor, size: int) -> gs.Tensor:
    """Codes [B, H, S, D] in float32, 0 to 15 -> uint8 [B, H, S, D / 2]."""
    pairs = nodes("Reshape", [codes, nodes.const("in_pairs", [0, 0, 0, size // 2, 2], np.int64)], "pairs")
    places = nodes("Mul", [pairs, nodes.const("places", [1, 16], FLOAT32)], "placed")
    sums = nodes("ReduceSum", [places, nodes.const("last", [4], np.int64)], "sums", keepdims=0)
    return nodes("Cast", [sums], "bytes", to=onnx.TensorProto.UINT8)


def unpack(nodes: Prefixed, present: gs.Tensor, size: int) -> gs.Tensor:
    """The inverse, of all tokens."""
    last = nodes.const("last", [4], np.int64)
    low = nodes("BitwiseAnd", [present, nodes.const("15", 15, np.uint8)], "even")
    high = nodes("BitShift", [present, nodes.const("4", 4, np.uint8)], "odd", direction="RIGHT")
    pairs = [nodes("Unsqueeze", [part, last], f"{which}/apart") for part, which in ((low, "even"), (high, "odd"))]
    joined = nodes("Concat", pairs, "beside", axis=4)
    every = nodes("Reshape", [joined, nodes.const("in_heads", [0, 0, -1, size], np.int64)], "unpacked")
    return nodes("Cast", [every], "float", to=onnx.TensorProto.FLOAT)


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

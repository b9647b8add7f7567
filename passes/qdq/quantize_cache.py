"""The KV cache as integers: a token's keys and values are quantized once, when they are written, and read as codes.

Eight bits have one scale for each channel of each head, known before: what attention reads is `code * scale` whoever
computes it, so one graph says it for ONNX Runtime's GroupQueryAttention, standard operators and engines alike. Four
bits lose too much that way (docs/facts.md, "Caches of integers"): they are rotated, and each token has its own scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.evaluate import PAST
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, producer

PRESENT = "present."
GROUP = 32  # channels of a token that share four-bit codes' scale
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


class QuantizeCacheByToken(Rewrite[gs.Node]):
    """present = Concat(past, new) -> codes of four bits, scales and zero points of each token and head.

    What is quantized is x = new @ R, R a Hadamard matrix, or several beside one another: it spreads what a few channels
    hold over all (QuaRot, Ashkboos et al., 2024). R is orthogonal, so queries that are multiplied by it, too, give the
    same scores, and outputs of attention are multiplied by its transpose.

    By InstantQuant's formula, over groups of GROUP channels: low = min(min(x), 0), high = max(max(x), 0),
    scale = (high - low) / 15 as float16, 1 where that is 0, zero = clamp(round(-low / scale)),
    code = clamp(round(x / scale) + zero). Two neighbours share a byte, the first one's bits lowest: codes uint8
    [B, H, T, D / 2]; `i.key_scale` float16 and `i.key_zero` uint8 [B, H, T, D / GROUP] are caches beside them.
    """

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if (reason := unlike_cache(node)) is None:
            return None
        size = node.inputs[0].shape[3]
        if not reason and (not isinstance(size, int) or size % 2):
            reason = f"head size {size} is odd, and two codes share a byte"
        if not reason and any(
            reader.inputs[0].shape is None or len(reader.inputs[0].shape) != 4 for reader in node.outputs[0].outputs
        ):
            reason = "queries are not [B, H, S, D]"
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        past, new = match.inputs
        size, nodes = past.shape[3], Prefixed(graph, f"cache/{past.name.removeprefix(PAST)}")
        group = GROUP if size % GROUP == 0 else size
        axis, none = nodes.const("axis", [4], np.int64), nodes.const("none", 0, FLOAT32)
        top, one = nodes.const("top", 15, FLOAT32), nodes.const("one", 1, FLOAT32)
        turn = nodes.const("rotation", rotation(size), FLOAT32)
        in_groups = nodes.const("in_groups", [0, 0, 0, size // group, group], np.int64)
        x = nodes("Reshape", [nodes("MatMul", [new, turn], "rotated"), in_groups], "groups")
        low = nodes("Min", [nodes("ReduceMin", [x, axis], "lowest"), none], "low")
        high = nodes("Max", [nodes("ReduceMax", [x, axis], "highest"), none], "high")
        step = nodes("Div", [nodes("Sub", [high, low], "range"), top], "step")
        half = nodes("Cast", [step], "step/half", to=onnx.TensorProto.FLOAT16)
        wide = nodes("Cast", [half], "step/wide", to=onnx.TensorProto.FLOAT)
        scale = nodes("Where", [nodes("Equal", [wide, none], "zeros"), one, wide], "scale")
        below = nodes("Round", [nodes("Div", [nodes("Neg", [low], "below"), scale], "unrounded")], "rounded_zero")
        zero = nodes("Clip", [below, none, top], "zero")
        steps = nodes("Round", [nodes("Div", [x, scale], "steps")], "rounded")
        codes = nodes("Clip", [nodes("Add", [steps, zero], "shifted"), none, top], "codes")
        packed = pack(nodes, codes, size)
        packed.dtype, packed.shape = UINT8, [*new.shape[:3], size // 2]
        beside = {}
        for what, value, kind in (("scale", scale, np.float16), ("zero", zero, np.uint8)):
            flat = nodes("Squeeze", [value, axis], f"{what}/flat")
            cast = nodes("Cast", [flat], f"{what}/small", to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
            kept = aside(graph, match, cast, what, np.dtype(kind), size // group)
            beside[what] = nodes(
                "Unsqueeze", [nodes("Cast", [kept], f"{what}/float", to=onnx.TensorProto.FLOAT), axis], f"{what}/each"
            )
        present = grow(match, packed)
        for reader in [node for node in present.outputs if node.op == "Attention"]:
            turned(graph, reader, is_key=reader.inputs[1] is present, by=turn)
        every = nodes.const("every_group", [0, 0, -1, size // group, group], np.int64)
        grouped = nodes("Reshape", [unpack(nodes, present, size), every], "codes/groups")
        centered = nodes("Sub", [grouped, beside["zero"]], "centered")
        values = nodes("Mul", [centered, beside["scale"]], "values/groups")
        attend(
            present, nodes("Reshape", [values, nodes.const("whole_heads", [0, 0, -1, size], np.int64)], "values"), size
        )


def rotation(size: int) -> Array:
    """An orthogonal matrix [size, size]: Hadamard's of the largest power of two that divides it, along the diagonal."""
    hadamard: Array = np.ones((1, 1))
    while size % (2 * len(hadamard)) == 0:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    return np.kron(np.eye(size // len(hadamard)), hadamard / np.sqrt(len(hadamard))).astype(FLOAT32)


def turned(graph: gs.Graph, attention: gs.Node, *, is_key: bool, by: gs.Constant) -> None:
    """Attention whose keys, or values, are multiplied by the orthogonal `by`: it gives what it gave."""
    nodes = Prefixed(graph, f"{attention.name}/rotated")
    if is_key:
        query = attention.inputs[0]
        attention.inputs[0] = nodes("MatMul", [query, by], "queries")
        attention.inputs[0].dtype, attention.inputs[0].shape = query.dtype, query.shape
        return
    back = nodes.const("back", by.values.T, FLOAT32)
    out = attention.outputs[0]
    inside = gs.Variable(f"{nodes.prefix}/outputs", out.dtype, out.shape)
    attention.outputs[0] = inside
    add(graph, "MatMul", [inside, back], out)


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


def aside(graph: gs.Graph, concat: gs.Node, value: gs.Tensor, what: str, dtype: np.dtype[Any], count: int) -> gs.Tensor:
    """A cache of what each token has beside its codes: [B, H, P, count] grows by `value` [B, H, S, count]."""
    past, present = concat.inputs[0], concat.outputs[0]
    before = gs.Variable(f"{past.name}_{what}", dtype, [*past.shape[:3], count])
    after = gs.Variable(f"{present.name}_{what}", dtype, [*present.shape[:3], count])
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

"""The KV cache in four bits: centered and rotated, as few channels hold most, and with scales of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array
from instantrt.passes.core.names import PAST
from instantrt.passes.core.quant import UINT8
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add
from instantrt.passes.qdq.quantize_cache import attend, grow, unlike_cache
from instantrt.passes.qdq.turned_attention import sees_differences, turned
from instantrt.plugins.hadamard import hadamard

GROUPS = {"key": 16, "value": 64}  # channels of a token that share a scale (docs/facts.md, "Caches of integers")


@dataclass(frozen=True)
class ByToken:
    """A cache that `concat` makes longer; `center` [H, D] comes off all that is written, None for nothing."""

    concat: gs.Node
    center: Array | None


@dataclass(frozen=True)
class QuantizeCacheByToken(Rewrite[ByToken]):
    """present = Concat(past, new) -> codes of four bits, scales and zero points of each token and head.

    What is quantized is x = (new - center) @ R. R is a Hadamard matrix, or several beside one another: it spreads what
    a few channels hold over all (QuaRot, Ashkboos et al., 2024). It is orthogonal, so queries that are multiplied by
    it, too, give the same scores, and outputs of attention are multiplied by its transpose. The center is of keys
    alone: what all have in common moves all scores of a query alike, which softmax does not see, and takes no codes.

    By InstantQuant's formula, over groups of GROUPS' channels: low = min(min(x), 0), high = max(max(x), 0),
    scale = (high - low) / 15 as float16, 1 where that is 0, zero = clamp(round(-low / scale)),
    code = clamp(round(x / scale) + zero). Two neighbours share a byte, the first one's bits lowest: codes uint8
    [B, H, T, D / 2]; `i.key_scale` float16 and `i.key_zero` uint8 [B, H, T, D / group] are caches beside them.

    centers   `i.key` -> float32 [H, D]
    """

    centers: Mapping[str, Array] = field(repr=False)

    def match(self, node: gs.Node) -> ByToken | Reject | None:
        if (reason := unlike_cache(node)) is None:
            return None
        size = node.inputs[0].shape[3]
        if not reason and (not isinstance(size, int) or size % 2):
            reason = f"head size {size} is odd, and two codes share a byte"
        if not reason and any(
            reader.inputs[0].shape is None or len(reader.inputs[0].shape) != 4 for reader in node.outputs[0].outputs
        ):
            reason = "queries are not [B, H, S, D]"
        if reason:
            return Reject(reason)
        keys = node.outputs[0]
        center = self.centers.get(node.inputs[0].name.removeprefix(PAST))
        return ByToken(node, center if all(sees_differences(reader, keys) for reader in keys.outputs) else None)

    def rewrite(self, graph: gs.Graph, match: ByToken) -> None:
        concat, (past, new) = match.concat, match.concat.inputs
        size, nodes = past.shape[3], Prefixed(graph, f"cache/{past.name.removeprefix(PAST)}")
        if match.center is not None:
            new = nodes("Sub", [new, nodes.const("center", match.center[None, :, None], FLOAT32)], "centered_keys")
        group = GROUPS[past.name.rpartition(".")[2]]
        group = group if size % group == 0 else size
        axis, none = nodes.const("axis", [4], np.int64), nodes.const("none", 0, FLOAT32)
        top, one = nodes.const("top", 15, FLOAT32), nodes.const("one", 1, FLOAT32)
        turn = nodes.const("rotation", hadamard(size), FLOAT32)
        in_groups = nodes.const("in_groups", [0, 0, 0, size // group, group], np.int64)
        x = nodes("Reshape", [nodes("MatMul", [new, turn], "rotated"), in_groups], "groups")
        low = nodes("Min", [nodes("ReduceMin", [x, axis], "lowest"), none], "low")
        high = nodes("Max", [nodes("ReduceMax", [x, axis], "highest"), none], "high")
        step = nodes("Div", [nodes("Sub", [high, low], "range"), top], "step")
        half = nodes.cast(step, np.float16, "step/half")
        wide = nodes.cast(half, np.float32, "step/wide")
        scale = nodes("Where", [nodes("Equal", [wide, none], "zeros"), one, wide], "scale")
        below = nodes("Round", [nodes("Div", [nodes("Neg", [low], "below"), scale], "unrounded")], "rounded_zero")
        zero = nodes("Clip", [below, none, top], "zero")
        steps = nodes("Round", [nodes("Div", [x, scale], "steps")], "rounded")
        codes = nodes("Clip", [nodes("Add", [steps, zero], "shifted"), none, top], "codes")
        packed = pack(nodes, codes, size)
        packed.dtype, packed.shape = UINT8, [*concat.inputs[1].shape[:3], size // 2]
        beside = {}
        for what, value, kind in (("scale", scale, np.float16), ("zero", zero, np.uint8)):
            flat = nodes("Squeeze", [value, axis], f"{what}/flat")
            small = nodes.cast(flat, kind, f"{what}/small")
            kept = aside(graph, concat, small, what, np.dtype(kind), size // group)
            beside[what] = nodes("Unsqueeze", [nodes.cast(kept, np.float32, f"{what}/float"), axis], f"{what}/each")
        present = grow(concat, packed)
        for reader in [node for node in present.outputs if node.op == "Attention"]:
            turned(graph, reader, is_key=reader.inputs[1] is present, by=turn)
        every = nodes.const("every_group", [0, 0, -1, size // group, group], np.int64)
        grouped = nodes("Reshape", [unpack(nodes, present, size), every], "codes/groups")
        centered = nodes("Sub", [grouped, beside["zero"]], "centered")
        values = nodes("Mul", [centered, beside["scale"]], "values/groups")
        attend(
            present, nodes("Reshape", [values, nodes.const("whole_heads", [0, 0, -1, size], np.int64)], "values"), size
        )


def aside(graph: gs.Graph, concat: gs.Node, value: gs.Tensor, what: str, dtype: np.dtype[Any], count: int) -> gs.Tensor:
    """A cache of what each token has beside its codes: [B, H, P, count] grows by `value` [B, H, S, count]."""
    past, present = concat.inputs[0], concat.outputs[0]
    before = gs.Variable(f"{past.name}_{what}", dtype, [*past.shape[:3], count])
    after = gs.Variable(f"{present.name}_{what}", dtype, [*present.shape[:3], count])
    graph.inputs.append(before)
    graph.outputs.append(after)
    return add(graph, "Concat", [before, value], after, axis=2)


def pack(nodes: Prefixed, codes: gs.Tensor, size: int) -> gs.Tensor:
    """Codes [B, H, S, D] in float32, 0 to 15 -> uint8 [B, H, S, D / 2]."""
    pairs = nodes("Reshape", [codes, nodes.const("in_pairs", [0, 0, 0, size // 2, 2], np.int64)], "pairs")
    places = nodes("Mul", [pairs, nodes.const("places", [1, 16], FLOAT32)], "placed")
    sums = nodes("ReduceSum", [places, nodes.const("last", [4], np.int64)], "sums", keepdims=0)
    return nodes.cast(sums, np.uint8, "bytes")


def unpack(nodes: Prefixed, present: gs.Tensor, size: int) -> gs.Tensor:
    """The inverse, of all tokens."""
    last = nodes.const("last", [4], np.int64)
    low = nodes("BitwiseAnd", [present, nodes.const("15", 15, np.uint8)], "even")
    high = nodes("BitShift", [present, nodes.const("4", 4, np.uint8)], "odd", direction="RIGHT")
    pairs = [nodes("Unsqueeze", [part, last], f"{which}/apart") for part, which in ((low, "even"), (high, "odd"))]
    joined = nodes("Concat", pairs, "beside", axis=4)
    every = nodes("Reshape", [joined, nodes.const("in_heads", [0, 0, -1, size], np.int64)], "unpacked")
    return nodes.cast(every, np.float32, "float")

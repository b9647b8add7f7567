"""Attention without a cache -> CpuWholeAttention, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, producer, take_over
from instantrt.passes.gemm.packed import add_ours
from instantrt.passes.ort.cpu_attention import PARTS, scale_bits
from instantrt.passes.ort.packed import columns
from instantrt.plugins.cpu.attention import WIDTH
from instantrt.plugins.cpu.whole_attention import OP

HEADS = ("q_num_heads", "kv_num_heads")
TYPES = (None, np.float32, np.bool_)  # of a mask; None: not known, so float32


@dataclass(frozen=True)
class WholeMatch:
    """`parts` are (x [B, S, N], first column) of queries, keys and values: of a product of all three, or of each."""

    node: gs.Node
    size: int
    parts: tuple[tuple[gs.Tensor, int], ...]


class LowerCpuWholeAttention(Rewrite[WholeMatch]):
    """Attention(q [B, S, H*D], k, v, mask) -> instantrt::CpuWholeAttention, which reads the columns of one product."""

    def match(self, node: gs.Node) -> WholeMatch | Reject | None:
        if node.op != "Attention" or node.domain or HEADS[0] not in node.attrs:
            return None
        if reason := unfit(node):
            return Reject(reason)
        found = ((t, columns(t)) for t in node.inputs[:3])
        parts = tuple((t, 0) if part is None else part[:2] for t, part in found)
        return WholeMatch(node, (width(node.inputs[0]) or 0) // node.attrs[HEADS[0]], parts)

    def rewrite(self, graph: gs.Graph, match: WholeMatch) -> None:
        node = match.node
        attrs = {"heads": node.attrs[HEADS[0]], "kv_heads": node.attrs[HEADS[1]], "size": match.size}
        attrs["scale_bits"] = scale_bits(node.attrs.get("scale", match.size**-0.5), match.size)
        attrs |= {name: start for name, (_, start) in zip(PARTS, match.parts, strict=True)}
        inputs = [x for x, _ in match.parts] + node.inputs[3:]
        add_ours(graph, OP.name, inputs, [take_over(node)], node.name, OP.attributes(attrs))


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    heads, kv_heads = (node.attrs[name] for name in HEADS)
    mask = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
    if len(node.inputs) > 4 or len(node.outputs) > 1:
        return "it has a cache of its own, or gives its scores"
    if others := sorted(name for name, value in node.attrs.items() if name not in (*HEADS, "scale") and value):
        return f"it has {', '.join(others)}"
    query, key, value = (width(t) for t in node.inputs[:3])
    if query is None or key is None or value is None:
        return "the width of queries, keys or values is not known"
    size = query // heads
    if (query, key, value) != (heads * size, kv_heads * size, kv_heads * size):
        return f"queries, keys and values have {query}, {key} and {value} columns, {heads} and {kv_heads} heads"
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    if mask is not None and (axes(mask) != 4 or mask.dtype not in TYPES):
        return f"the mask {mask.name} is not float32 or truth values of four axes"
    return ""


def width(rows: gs.Tensor) -> int | None:
    """N of rows [B, S, N], which may be made of heads; None where it is not known."""
    split = producer(rows, "Reshape") if rows.shape is None else None
    if split is None:
        return known(rows.shape[2]) if rows.shape is not None and len(rows.shape) == 3 else None
    turned = producer(split.inputs[0], "Transpose")
    heads, order = (split.inputs[0], range(4)) if turned is None else (turned.inputs[0], turned.attrs["perm"])
    if heads.shape is None or len(heads.shape) != 4:
        return None
    count, size = (known(heads.shape[axis]) for axis in list(order)[2:])
    return None if count is None or size is None else count * size


def axes(mask: gs.Tensor) -> int | None:
    """How many it has, one of LowerToAttention's too; None where that is not known."""
    if mask.shape is None and (clamped := producer(mask, "Max")) is not None:
        return axes(clamped.inputs[0])
    if mask.shape is None and (expanded := producer(mask, "Expand")) is not None:
        sizes = producer(expanded.inputs[1], "Concat")
        return len(sizes.inputs) if sizes is not None else None
    return len(mask.shape) if mask.shape is not None else None


def known(size: int | str | None) -> int | None:
    return size if isinstance(size, int) else None

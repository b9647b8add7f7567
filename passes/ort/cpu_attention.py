"""Attention over a cache -> CpuAttention, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Reject, Rewrite
from instantrt.passes.gemm.packed import add_ours
from instantrt.passes.ort import Preset
from instantrt.passes.ort.rotary import GROUP_QUERY_ATTENTION
from instantrt.plugins.cpu.attention import OP, WIDTH
from instantrt.plugins.cpu.op import FORM, GEMM, INT16_BLOCKS
from instantrt.plugins.schema import bits_of

# attributes of the operator that this one knows
PLAIN = {"num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved"}
INTEGERS = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
QKV, PAST, LAST, COS, MASK, SCALES, NEW = slice(0, 3), slice(3, 5), 5, slice(7, 10), 10, slice(12, 14), 16  # inputs
PRESENT = slice(1, 3)  # outputs
PARTS = ("query_at", "key_at", "value_at")
FLOAT16, INT8 = np.dtype(np.float16), np.dtype(np.int8)
FLOATS = ("float32", "float16")


@dataclass(frozen=True)
class LowerCpuAttention(Rewrite[gs.Node]):
    """GroupQueryAttention(x, past_k, past_v, ..., cos, sin, positions, mask, ...) -> instantrt::CpuAttention of them.

    It reads keys and values once for all heads that share them, and one token's on all threads.

    cache    what it is to hold, where the graph has it in float32; unless that is a type of floats it becomes float16,
             half the bytes of a step, in a model whose products round far more than that: of activations in int8
    preset   `exact` rounds nothing more
    """

    cache: str | None = None
    preset: Preset = "auto"

    def for_graph(self, graph: gs.Graph) -> LowerCpuAttention:
        if self.cache in FLOATS:
            return self
        coarse = any(node.op == GEMM.name and node.attrs[FORM] != INT16_BLOCKS for node in graph.nodes)
        return replace(self, cache="float16" if coarse and self.preset != "exact" else "float32")

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if node.op != GROUP_QUERY_ATTENTION:
            return None
        reason = unfit(node)
        return Reject(reason) if reason else node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        node, inputs, outputs = match, match.inputs, list(match.outputs)
        heads, kv_heads, size = node.attrs["num_heads"], node.attrs["kv_num_heads"], inputs[PAST][0].shape[3]
        parts, starts = list(inputs[QKV]), (0, 0, 0)
        if not parts[1].name:  # one product of all
            parts, starts = parts[:1] * 3, (0, heads * size, (heads + kv_heads) * size)
        given = [*parts, *inputs[PAST], inputs[LAST], *inputs[COS], inputs[MASK], inputs[NEW]]
        if inputs[PAST][0].dtype == INT8:
            given += [small(f"{t.name}/rows", t.values[0, :, 0], FLOAT32) for t in inputs[SCALES]]
        elif self.cache == "float16":
            for tensor in (*inputs[PAST], *outputs[PRESENT]):
                tensor.dtype = FLOAT16
        attrs = {"heads": heads, "kv_heads": kv_heads, "scale_bits": scale_bits(node.attrs["scale"], size)}
        attrs |= dict(zip(PARTS, starts, strict=True)) | {"interleaved": node.attrs.get("rotary_interleaved", 0)}
        node.outputs.clear()
        add_ours(graph, OP.name, given, outputs, node.name, OP.attributes(attrs))


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    past = node.inputs[PAST]
    size, dtype = past[0].shape[3], np.dtype(past[0].dtype)
    known = INTEGERS if dtype == INT8 else {}
    if others := [n for n, v in node.attrs.items() if n not in PLAIN and (n not in known or known[n] != v)]:
        return f"it has {', '.join(sorted(others))}"
    if not node.attrs.get("do_rotary"):
        return "it does not rotate queries and keys itself"
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    if dtype not in (FLOAT32, INT8):
        return f"its cache is {dtype}"
    if any(user is not node and user.op != "Shape" for tensor in past for user in tensor.outputs):
        return "something else reads the cache"
    return ""


def scale_bits(scale: float, size: int) -> int:
    """The attribute: 0 where scores are multiplied with one over the root of a head's `size`."""
    return 0 if np.isclose(scale, size**-0.5, rtol=1e-6) else bits_of(scale)

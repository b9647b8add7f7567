"""Attention over a cache -> CpuAttention, our own kernel behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.quant import UINT8
from instantrt.passes.core.rewrite import Reject, Rewrite
from instantrt.passes.gemm.packed import add_ours
from instantrt.passes.ort import Preset
from instantrt.passes.ort.attention import BY_TOKEN
from instantrt.passes.ort.cache_by_token import head_size
from instantrt.passes.ort.rotary import GROUP_QUERY_ATTENTION
from instantrt.plugins.cpu.attention import OP, WIDTH
from instantrt.plugins.cpu.attention_by_token import OP as BY_TOKEN_OP
from instantrt.plugins.cpu.op import FORM, GEMM, INT16_BLOCKS
from instantrt.plugins.schema import bits_of

# attributes of the operator that this one knows
PLAIN = {"num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved"}
FLOAT16, INT8 = np.dtype(np.float16), np.dtype(np.int8)
KINDS: dict[Any, dict[str, Any]] = {  # and those of a cache of integers
    INT8: {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"},
    UINT8: {"kv_cache_bit_width": 4, "k_quant_type": BY_TOKEN, "v_quant_type": BY_TOKEN},
}
QKV, PAST, LAST, COS, MASK, SCALES, NEW = slice(0, 3), slice(3, 5), 5, slice(7, 10), 10, slice(12, 14), 16  # inputs
BESIDE = slice(17, 21)
PRESENT = slice(1, 3)  # outputs
PARTS = ("query_at", "key_at", "value_at")
FLOATS = ("float32", "float16")


@dataclass(frozen=True)
class LowerCpuAttention(Rewrite[gs.Node]):
    """GroupQueryAttention(x, past_k, past_v, ..., cos, sin, positions, mask, ...) -> instantrt::CpuAttention of them.

    It reads keys and values once for all heads that share them, and one token's on all threads. Over a cache of four
    bits it is instantrt::CpuAttentionByToken.

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
        heads, kv_heads, size = node.attrs["num_heads"], node.attrs["kv_num_heads"], head_size(inputs[PAST][0])
        parts, starts = list(inputs[QKV]), (0, 0, 0)
        if not parts[1].name:  # one product of all
            parts, starts = parts[:1] * 3, (0, heads * size, (heads + kv_heads) * size)
        past, op, more = list(inputs[PAST]), OP, []
        if past[0].dtype == UINT8:
            past, op, more = beside(past, inputs[BESIDE]), BY_TOKEN_OP, list(inputs[SCALES][:1])
            outputs = [outputs[0], *beside(outputs[PRESENT], outputs[PRESENT.stop :])]
        elif past[0].dtype == INT8:
            more = list(inputs[SCALES])
        elif self.cache == "float16":
            for tensor in (*past, *outputs[PRESENT]):
                tensor.dtype = FLOAT16
        more = [small(f"{t.name}/rows", t.values[0, :, 0], FLOAT32) if t.name else t for t in more]
        rotation = inputs[COS] if node.attrs.get("do_rotary") else [gs.Variable.empty()] * 3
        given = [*parts, *past, inputs[LAST], inputs[MASK], inputs[NEW], *rotation, *more]
        while not given[-1].name:
            given.pop()
        attrs = {"heads": heads, "kv_heads": kv_heads, "scale_bits": scale_bits(node.attrs["scale"], size)}
        attrs |= dict(zip(PARTS, starts, strict=True)) | {"interleaved": node.attrs.get("rotary_interleaved", 0)}
        node.outputs.clear()
        add_ours(graph, op.name, given, outputs, node.name, op.attributes(attrs))


def beside(codes: Sequence[gs.Tensor], others: Sequence[gs.Tensor]) -> list[gs.Tensor]:
    """Keys with their scales and zero points, then values with theirs."""
    return [codes[0], *others[:2], codes[1], *others[2:]]


def unfit(node: gs.Node) -> str:
    """What of it the kernel does not have, or ""."""
    past = node.inputs[PAST]
    size, dtype = head_size(past[0]), np.dtype(past[0].dtype)
    known = KINDS.get(dtype, {})
    if others := [n for n, v in node.attrs.items() if n not in PLAIN and (n not in known or known[n] != v)]:
        return f"it has {', '.join(sorted(others))}"
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    if dtype != FLOAT32 and dtype not in KINDS:
        return f"its cache is {dtype}"
    if any(user is not node and user.op != "Shape" for tensor in past for user in tensor.outputs):
        return "something else reads the cache"
    return ""


def scale_bits(scale: float, size: int) -> int:
    """The attribute: 0 where scores are multiplied with one over the root of a head's `size`."""
    return 0 if np.isclose(scale, size**-0.5, rtol=1e-6) else bits_of(scale)

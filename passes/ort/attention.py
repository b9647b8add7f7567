"""Attention for ONNX Runtime's CPU provider: one operator that may keep the cache of a sequence in one buffer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.causal import unlike_causal
from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, producer, take_over
from instantrt.passes.ort.cached_attention import CachedAttentionMatch, cached, costs, unfit
from instantrt.passes.ort.heads import SPLIT, rows
from instantrt.plugins.cpu.attention_by_token import unlike

BY_TOKEN = "BY_TOKEN"


@dataclass(frozen=True)
class LowerToGroupQueryAttention(Rewrite[CachedAttentionMatch]):
    """Attention(q, Concat(past, k), Concat(past, v), mask) -> com.microsoft.GroupQueryAttention.

    Before: present_k = Concat(past_k, k); y [B, H, S, D] = Attention(q, present_k, present_v, mask [B, 1, S, T])
    After:  y [B, S, H*D], present_k, present_v = GroupQueryAttention(q, k, v, past_k, past_v, last, T, mask)

    Lengths come from the mask alone, row by row, so past and present may be one buffer of the maximum length (no copy
    of the cache at decode), or grow by each call as the interface says. A cache that `QuantizeCache` made of integers
    is the operator's own, which then takes the scales. The operator is causal whatever the mask says,
    and wants one head size, a multiple of 8, for keys and values (docs/facts.md, "GroupQueryAttention").

    by_token  a cache of `QuantizeCacheByToken`, too, whose parts come behind the operator's own inputs and outputs. It
              has no such cache: `LowerCpuAttention` has to follow
    """

    by_token: bool = False
    graph: gs.Graph = field(default_factory=gs.Graph, repr=False, compare=False)  # of a run, as what follows
    masks: dict[int, str] = field(
        default_factory=dict, repr=False, compare=False
    )  # id of one -> why it is unfit, or ""

    def for_graph(self, graph: gs.Graph) -> LowerToGroupQueryAttention:
        return LowerToGroupQueryAttention(self.by_token, graph)

    def match(self, node: gs.Node) -> CachedAttentionMatch | Reject | None:
        if node.op != "Attention" or node.domain:
            return None
        found = cached(node)
        if isinstance(found, str):
            return Reject(found)
        reason = self.unlike_kept(found) or unfit(found) or self.unlike_causal(found.mask)
        return Reject(reason, costs(found)) if reason else found

    def unlike_kept(self, match: CachedAttentionMatch) -> str:
        """Why a cache of four bits stays as it is, or ""."""
        if not match.by_token:
            return ""
        groups = (part.scale.outputs[0].shape[3] for part in match.by_token)
        return unlike(match.head_dim, *groups) or "" if self.by_token else "the operator has no scales of tokens"

    def unlike_causal(self, mask: gs.Tensor) -> str:
        if id(mask) not in self.masks:
            self.masks[id(mask)] = unlike_causal(self.graph, mask)
        return self.masks[id(mask)]

    def rewrite(self, graph: gs.Graph, match: CachedAttentionMatch) -> None:
        node = match.node
        out = take_over(match.last)
        grow = [concat for part in match.by_token or () for concat in (part.scale, part.zero)]
        past, present = [concat.inputs[0] for concat in grow], [concat.outputs[0] for concat in grow]
        for tensor in (match.present_key, match.present_value, *present):
            tensor.inputs.clear()
        total, last, new = lengths(graph, match.mask)
        q, k, v = (
            rows(graph, t, f"{node.name}/{part}")
            for t, part in zip((match.query, match.key, match.value), "qkv", strict=True)
        )
        y = gs.Variable(f"{node.name}/y", FLOAT32, ["batch", "sequence", match.heads * match.head_dim])
        nothing = gs.Variable.empty()
        cache = [match.past_key, match.past_value, last, total]
        attrs: dict[str, Any] = {"num_heads": match.heads, "kv_num_heads": match.kv_heads, "scale": match.scale}
        scales = [nothing, nothing]
        if match.by_token:
            scales[0] = match.by_token[0].center or nothing
            attrs |= {"kv_cache_bit_width": 4, "k_quant_type": BY_TOKEN, "v_quant_type": BY_TOKEN}
        elif match.quantized:
            scales = [part.scale for part in match.quantized]
            attrs |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        inputs = [q, k, v, *cache, nothing, nothing, nothing, match.mask, nothing, *scales, nothing, nothing, new]
        inputs += past
        outputs = [y, match.present_key, match.present_value, *present]
        graph.nodes.append(gs.Node("GroupQueryAttention", node.name, attrs, inputs, outputs, domain="com.microsoft"))
        shape = small(f"{node.name}/heads", [0, 0, match.heads, match.head_dim], np.int64)
        split = add(graph, "Reshape", [y, shape], f"{node.name}/y_heads")
        add(graph, "Transpose", [split], out, perm=SPLIT)


def lengths(graph: gs.Graph, mask: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """(total length [1], each row's length less one [B], its new tokens [B]) of a mask [B, 1, S, T], made once for it.

    A row ends at the last key that its last query sees. Rows padded on the left all end at T. Rows padded on the right
    end where they end, so sequences of different lengths decode in one batch, each in its own place in the cache.
    """
    nodes = Prefixed(graph, f"{mask.name}/lengths")
    total, sequence = (nodes("Shape", [mask], name, start=axis, end=axis + 1) for name, axis in (("t", 3), ("s", 2)))
    query = nodes("Gather", [mask, nodes.const("query", -1, np.int64)], "seen", axis=2)
    key = nodes("ArgMax", [query], "key", axis=2, keepdims=0, select_last_index=1)
    last = nodes("Reshape", [key, nodes.const("row", [-1], np.int64)], "rows")
    length = nodes("Add", [last, nodes.const("one", 1, np.int64)], "length")
    found = {"total": total, "last": last, "new": nodes("Min", [length, sequence], "inside")}
    total, last, new = (nodes.cast(t, np.int32, name) for name, t in found.items())
    return total, last, new


class MergeHeads(Rewrite[gs.Node]):
    """Reshape(Transpose(Transpose(Reshape(y [B, S, H*D])))) -> y, left by the attention lowering."""

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        turned = producer(node.inputs[0], "Transpose") if node.op == "Reshape" else None
        back = producer(turned.inputs[0], "Transpose") if turned else None
        split = producer(back.inputs[0], "Reshape") if back else None
        same = split is not None and split.inputs[0].shape is not None and node.outputs[0].shape is not None
        if turned is None or back is None or split is None or not same:
            return None
        undone = turned.attrs.get("perm") == back.attrs.get("perm") == SPLIT
        last = (split.inputs[0].shape[-1], node.outputs[0].shape[-1])
        return node if undone and len(node.outputs[0].shape) == 3 and last[0] == last[1] else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        y = match.i().i().i().inputs[0]
        add(graph, "Identity", [y], take_over(match))


def attention(*, by_token: bool = False) -> tuple[Rewrite[Any], ...]:
    """One operator for attention over a cache; `by_token`: see `LowerToGroupQueryAttention`."""
    return LowerToGroupQueryAttention(by_token), MergeHeads()

"""Attention over a cache, and what GroupQueryAttention wants of it (docs/facts.md, "GroupQueryAttention")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import producer
from instantrt.passes.ort.cache_by_token import PartByToken, part_by_token, turned_back, unturned
from instantrt.passes.qdq.quantize_cache import QuantizedPart, quantized_part

Part = TypeVar("Part")
HEAD_SIZES = 8  # what head sizes are multiples of


@dataclass(frozen=True)
class CachedAttentionMatch:
    """`keys` and `values` are what attention reads; `quantized` or `by_token` says how a cache of integers makes them.

    `last` makes what the attention gives: itself, or what turns it back.
    """

    node: gs.Node
    last: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    value: gs.Tensor
    past_key: gs.Tensor
    past_value: gs.Tensor
    present_key: gs.Tensor
    present_value: gs.Tensor
    keys: gs.Tensor
    values: gs.Tensor
    mask: gs.Tensor
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    quantized: tuple[QuantizedPart, QuantizedPart] | None = None
    by_token: tuple[PartByToken, PartByToken] | None = None


def cached(node: gs.Node) -> CachedAttentionMatch | str:
    """The parts of an attention over a cache that grows, or why it is none."""
    if len(node.inputs) != 4 or not node.inputs[3].name or len(node.outputs) != 1:
        return "attention without an explicit mask, or with its own cache"
    query, keys, values, mask = node.inputs
    quantized = both(quantized_part(keys), quantized_part(values))
    by_token = both(part_by_token(keys), part_by_token(values))
    last: gs.Node | None = node
    if by_token:
        query, last = unturned(query), turned_back(node.outputs[0])
        if query is None or last is None:
            return "its cache is turned, and its queries and outputs are not"
    known = quantized or by_token
    concat_k, concat_v = (q.concat for q in known) if known else (grown(keys), grown(values))
    if concat_k is None or concat_v is None:
        return "keys and values are not the concatenation of a cache and new ones"
    if any(t.shape is None or len(t.shape) != 4 for t in (query, keys, values)):
        return "query, keys and values are not [batch, heads, sequence, head_dim]"
    heads, head_dim, kv_heads = query.shape[1], query.shape[3], keys.shape[1]
    if not all(isinstance(d, int) for d in (heads, head_dim, kv_heads, values.shape[3])):
        return "the number of heads is not a constant"
    past_k, k = concat_k.inputs[0], known[0].new if known else concat_k.inputs[1]
    past_v, v = concat_v.inputs[0], known[1].new if known else concat_v.inputs[1]
    present_k, present_v = concat_k.outputs[0], concat_v.outputs[0]
    scale = float(node.attrs.get("scale", head_dim**-0.5))
    cache = past_k, past_v, present_k, present_v, keys, values
    return CachedAttentionMatch(
        node, last, query, k, v, *cache, mask, heads, kv_heads, head_dim, scale, quantized, by_token
    )


def both(key: Part | None, value: Part | None) -> tuple[Part, Part] | None:
    return (key, value) if key is not None and value is not None else None


def grown(present: gs.Tensor) -> gs.Node | None:
    """The node that appends new keys or values to a cache."""
    concat = producer(present, "Concat")
    return concat if concat is not None and len(concat.inputs) == 2 and concat.attrs["axis"] in (2, -2) else None


def unfit(match: CachedAttentionMatch) -> str:
    """What GroupQueryAttention does not take of it, its mask apart, or "": measured with single nodes."""
    attrs, others = match.node.attrs, (match.keys, match.values)
    if changed := [name for name in ("is_causal", "softcap") if attrs.get(name)]:
        return f"{changed[0]} and a mask: the operator has another order of them"
    if match.head_dim % HEAD_SIZES:
        return f"head size {match.head_dim} is no multiple of {HEAD_SIZES}"
    if match.values.shape[3] != match.head_dim:
        return f"values have head size {match.values.shape[3]}, keys {match.head_dim}"
    if match.heads % match.kv_heads:
        return f"{match.heads} heads cannot share {match.kv_heads} of keys and values"
    if match.query.dtype not in (None, np.float32):
        return f"it computes in {np.dtype(match.query.dtype)}"
    if any(reader is not match.node for t in others for reader in t.outputs):
        return "something else reads the cache, too"
    return ""


def costs(match: CachedAttentionMatch) -> str:
    """What it costs to leave it."""
    size = match.kv_heads * (match.head_dim + match.values.shape[3]) * (1 if match.quantized else 4)
    return f"plain attention: every step copies the cache, {size / 1e3:,.1f} kB for each token in it"

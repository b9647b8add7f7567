"""CpuWholeAttention: attention without a cache, every query over every key that its mask leaves, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from instantrt.plugins.cpu.attention import columns, scale_of, shares, unlike_heads
from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance

HIDDEN = -1e38  # of a score: float32's lowest number is what many masks hide keys with


def reference(query: Array, key: Array, value: Array, mask: Array | None = None, **attrs: Any) -> tuple[Array, ...]:
    """In float64. A query that sees no key gets zeros, as of ONNX Runtime's Attention."""
    v = OP.attributes(attrs)
    size, shared = v["size"], v["heads"] // v["kv_heads"]
    q = columns(query, v["query_at"], v["heads"], size).swapaxes(1, 2)
    k, values = (
        np.repeat(columns(x, v[at], v["kv_heads"], size).swapaxes(1, 2), shared, axis=1)
        for x, at in ((key, "key_at"), (value, "value_at"))
    )
    scores = q @ k.swapaxes(2, 3) * scale_of(v["scale_bits"], size)
    if mask is not None:
        scores += np.where(mask, 0, -np.inf) if mask.dtype == np.bool_ else mask
    y = shares(scores, HIDDEN) @ values
    return (y.swapaxes(1, 2).reshape(*query.shape[:2], -1).astype(np.float32),)


OP = Op(
    name="CpuWholeAttention",
    version=1,
    inputs=(
        Port("query", ("B", "S", "X")),  # heads * size of its columns, from `query_at` on
        Port("key", ("B", "T", "Y")),
        Port("value", ("B", "T", "Z")),
        # [B, heads, S, T], the first three of them or 1: added to the scores, or whether a key is seen
        Port("mask", ("M", "H", "Q", "T"), optional=True),
    ),
    outputs=(Port("y", ("B", "S", "heads*size")),),
    attrs=(
        *(Attr(name, 1) for name in ("heads", "kv_heads", "size")),
        *(Attr(name, 0) for name in ("query_at", "key_at", "value_at")),
        Attr("scale_bits", 0),  # of what scores are multiplied with; 0: one over the root of `size`
    ),
    types=tuple((DType.F32, DType.F32, DType.F32, mask, DType.F32) for mask in (DType.F32, DType.BOOL)),
    reference=reference,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=lambda v: unlike_heads(v["heads"], v["kv_heads"], v["size"]),
)

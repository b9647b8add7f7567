"""CpuAttention: attention of new tokens over a cache that is one buffer, rotary embeddings and all, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance

WIDTH = 16  # what the size of a head is a multiple of


def reference(
    qkv: Array,
    past_key: Array,
    past_value: Array,
    last: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    mask: Array,
    new: Array,
    **attrs: Any,
) -> tuple[Array, ...]:
    """In float64, row by row. Of a row whose new tokens end with padding, y is zero there."""
    values = OP.attributes(attrs)
    heads, kv_heads, size = values["heads"], values["kv_heads"], past_key.shape[3]
    batch, tokens, _ = qkv.shape
    room = max(past_key.shape[2], mask.shape[3])
    wide = qkv.astype(np.float64).reshape(batch, tokens, -1, size)
    y = np.zeros((batch, tokens, heads, size))
    present = np.zeros((2, batch, kv_heads, room, size), np.float32)
    for row in range(batch):
        count, end = int(new[row]), int(last[row]) + 1
        past = end - count
        angles = cos[positions[row, :count]].astype(np.float64), sin[positions[row, :count]].astype(np.float64)
        q, k, v = np.split(wide[row, :count], (heads, heads + kv_heads), axis=1)
        q, k = rotated(q, *angles), rotated(k, *angles)
        for part, before, fresh in zip(present, (past_key, past_value), (k, v), strict=True):
            part[row, :, :past] = before[row, :, :past]
            part[row, :, past:end] = fresh.swapaxes(0, 1)
        keys, sums = (np.repeat(p[row, :, :end].astype(np.float64), heads // kv_heads, axis=0) for p in present)
        scores = np.einsum("thd,hkd->htk", q, keys) * size**-0.5 + mask[row, :, :count, :end]
        scores += np.triu(np.full((count, end), -np.inf), past + 1)
        most = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(most), 0, most))
        total = weights.sum(axis=-1, keepdims=True)
        y[row, :count] = np.einsum("htk,hkd->thd", weights / np.where(total == 0, 1, total), sums)
    return (y.reshape(batch, tokens, -1).astype(np.float32), *present)


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """x [tokens, heads, size], of which the first channels are rotated, the first half of them with the second."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate((a * c - b * s, b * c + a * s, rest), axis=-1)


OP = Op(
    name="CpuAttention",
    version=1,
    inputs=(
        Port("qkv", ("B", "S", "(heads+2*kv_heads)*D")),  # queries, keys and values of each token
        Port("past_key", ("B", "H", "P", "D")),
        Port("past_value", ("B", "H", "P", "D")),
        Port("last", ("B",)),  # the last token of each row, counted from the beginning of the cache
        Port("cos", ("L", "R")),  # of half the rotated channels, by position
        Port("sin", ("L", "R")),
        Port("positions", ("B", "S")),
        Port("mask", ("B", "1", "S", "T")),  # added to the scores; a token sees none behind itself whatever it says
        Port("new", ("B",)),  # how many of the S tokens are no padding behind them
    ),
    outputs=(
        Port("y", ("B", "S", "heads*D")),
        Port("present_key", ("B", "H", "max(P,T)", "D")),  # may be the buffer of past_key
        Port("present_value", ("B", "H", "max(P,T)", "D")),
    ),
    attrs=(Attr("heads", 1), Attr("kv_heads", 1)),
    types=(
        (
            *(DType.F32, DType.F32, DType.F32, DType.I32, DType.F32, DType.F32, DType.I64, DType.F32, DType.I32),
            *(DType.F32, DType.F32, DType.F32),
        ),
    ),
    reference=reference,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=lambda v: (
        f"a head has {v['D']} channels, expected a multiple of {WIDTH}"
        if v["D"] % WIDTH
        else f"{v['heads']} heads cannot share {v['kv_heads']}"
        if v["heads"] % v["kv_heads"]
        else None
    ),
)

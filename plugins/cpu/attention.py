"""CpuAttention: attention of new tokens over a cache that is one buffer, rotary embeddings and all, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance

WIDTH = 16  # what the size of a head is a multiple of
LARGEST = {"float32": np.inf, "float16": 65504}  # of what a cache has


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
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    """In float64, row by row. Of a row whose new tokens end with padding, y is zero there."""
    values = OP.attributes(attrs)
    heads, kv_heads, size = values["heads"], values["kv_heads"], past_key.shape[3]
    batch, tokens, _ = qkv.shape
    room = max(past_key.shape[2], mask.shape[3])
    wide = qkv.astype(np.float64).reshape(batch, tokens, -1, size)
    queries, present = (
        np.zeros((batch, tokens, heads, size)),
        np.zeros((2, batch, kv_heads, room, size), past_key.dtype),
    )
    for row in range(batch):
        count, end = int(new[row]), int(last[row]) + 1
        past = end - count
        angles = cos[positions[row, :count]].astype(np.float64), sin[positions[row, :count]].astype(np.float64)
        q, k, v = np.split(wide[row, :count], (heads, heads + kv_heads), axis=1)
        queries[row, :count], k = rotated(q, *angles), rotated(k, *angles)
        each = zip(present, (past_key, past_value), (k, v), (key_scale, value_scale), strict=True)
        for part, before, fresh, scale in each:
            part[row, :, :past] = before[row, :, :past]
            part[row, :, past:end] = kept(fresh.swapaxes(0, 1), past_key.dtype, scale)
    keys, sums = (read(part, scale) for part, scale in zip(present, (key_scale, value_scale), strict=True))
    return (attended(queries, keys, sums, last, mask, new), *present)


def kept(x: Array, dtype: np.dtype[Any], scale: Array | None) -> Array:
    """x [kv_heads, tokens, size] as a cache of `dtype` has it: what is finite stays so."""
    if scale is not None:
        return np.asarray(np.clip(np.rint(x / scale[:, None]), -128, 127).astype(dtype))
    return np.asarray(np.clip(x, -LARGEST[dtype.name], LARGEST[dtype.name]).astype(dtype))


def read(cache: Array, scale: Array | None) -> Array:
    """What a cache [B, kv_heads, room, size] stands for, in float64."""
    wide: Array = cache.astype(np.float64)
    return wide if scale is None else wide * scale[:, None]


def attended(queries: Array, keys: Array, sums: Array, last: Array, mask: Array, new: Array) -> Array:
    """y [B, tokens, heads size] of rotated queries [B, tokens, heads, size] over keys and values [B, kv_heads, room,
    size], all float64."""
    y = np.zeros(queries.shape)
    shared, scale = queries.shape[2] // keys.shape[1], queries.shape[3] ** -0.5
    for row, q in enumerate(queries):
        count, end = int(new[row]), int(last[row]) + 1
        k, v = (np.repeat(part[row, :, :end], shared, axis=0) for part in (keys, sums))
        scores = np.einsum("thd,hkd->htk", q[:count], k) * scale + mask[row, :, :count, :end]
        scores += np.triu(np.full((count, end), -np.inf), end - count + 1)
        most = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(most), 0, most))
        total = weights.sum(axis=-1, keepdims=True)
        y[row, :count] = np.einsum("htk,hkd->thd", weights / np.where(total == 0, 1, total), v)
    return y.reshape(*y.shape[:2], -1).astype(np.float32)


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
        Port("key_scale", ("H", "D"), optional=True),  # of a step of int8: what it stands for is code * scale
        Port("value_scale", ("H", "D"), optional=True),
    ),
    outputs=(
        Port("y", ("B", "S", "heads*D")),
        Port("present_key", ("B", "H", "max(P,T)", "D")),  # may be the buffer of past_key
        Port("present_value", ("B", "H", "max(P,T)", "D")),
    ),
    attrs=(Attr("heads", 1), Attr("kv_heads", 1)),
    types=tuple(
        (
            *(DType.F32, cache, cache, DType.I32, DType.F32, DType.F32, DType.I64, DType.F32, DType.I32),
            *(DType.F32, DType.F32),
            *(DType.F32, cache, cache),
        )
        for cache in (DType.F32, DType.F16, DType.I8)
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

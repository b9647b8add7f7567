"""CpuAttention: attention of new tokens over a cache that is one buffer, rotary embeddings and all, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance

WIDTH = 16  # what the size of a head is a multiple of
LARGEST = {"float32": np.inf, "float16": 65504}  # of what a cache has


def reference(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_value: Array,
    last: Array,
    mask: Array,
    new: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    positions: Array | None = None,
    key_scale: Array | None = None,
    value_scale: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    """In float64, row by row. Of a row whose new tokens end with padding, y is zero there."""
    values = OP.attributes(attrs)
    queries, keys, sums = fresh(query, key, value, past_key.shape[3], values, cos, sin, positions)
    each = ((past_key, keys, key_scale), (past_value, sums, value_scale))
    present = [grown(past, kept(x, past.dtype, step), last, mask, new) for past, x, step in each]
    keys, sums = (read(part, step) for part, step in zip(present, (key_scale, value_scale), strict=True))
    return (attended(queries, keys, sums, last, mask, new), *present)


def fresh(
    query: Array,
    key: Array,
    value: Array,
    size: int,
    values: Mapping[str, int],
    cos: Array | None,
    sin: Array | None,
    positions: Array | None,
) -> tuple[Array, Array, Array]:
    """New queries, keys and values [B, S, heads, size] in float64: queries are scaled, and keys as they are rotated."""
    q, k, v = (
        columns(x, values[at], values[count], size)
        for x, at, count in (
            (query, "query_at", "heads"),
            (key, "key_at", "kv_heads"),
            (value, "value_at", "kv_heads"),
        )
    )
    if cos is not None and sin is not None and positions is not None:
        angles = cos[positions].astype(np.float64), sin[positions].astype(np.float64)
        turn = interleaved if values["interleaved"] else rotated
        q, k = turn(q, *angles), turn(k, *angles)
    return q * scale_of(values["scale_bits"], size), k, v


def grown(past: Array, codes: Array, last: Array, mask: Array, new: Array) -> Array:
    """A cache [B, heads, P, N] with each row's new tokens of codes [B, S, heads, N] behind those that it has."""
    batch, heads, length, width = past.shape
    present = np.zeros((batch, heads, max(length, mask.shape[3]), width), past.dtype)
    for row in range(batch):
        count, end = int(new[row]), int(last[row]) + 1
        present[row, :, : end - count] = past[row, :, : end - count]
        present[row, :, end - count : end] = codes[row, :count].swapaxes(0, 1)
    return present


def columns(x: Array, at: int, heads: int, size: int) -> Array:
    """Heads [B, S, H, D] of x [B, S, N], from column `at` on, in float64."""
    return x[..., at : at + heads * size].astype(np.float64).reshape(*x.shape[:2], heads, size)


def scale_of(bits: int, size: int) -> float:
    """What scores of heads of `size` channels are multiplied with."""
    return float(np.int32(bits).view(np.float32)) if bits else float(size**-0.5)


def unlike_heads(heads: int, kv_heads: int, size: int) -> str | None:
    """What the kernels do not have; nodes.h says the same."""
    if size % WIDTH:
        return f"a head has {size} channels, expected a multiple of {WIDTH}"
    return f"{heads} heads cannot share {kv_heads}" if heads % kv_heads else None


def kept(x: Array, dtype: np.dtype[Any], scale: Array | None) -> Array:
    """x [B, S, kv_heads, size] as a cache of `dtype` has it: what is finite stays so."""
    if scale is not None:
        return np.asarray(np.clip(np.rint(x / scale), -128, 127).astype(dtype))
    return np.asarray(np.clip(x, -LARGEST[dtype.name], LARGEST[dtype.name]).astype(dtype))


def read(cache: Array, scale: Array | None) -> Array:
    """What a cache [B, kv_heads, room, size] stands for, in float64."""
    wide: Array = cache.astype(np.float64)
    return wide if scale is None else wide * scale[:, None]


def attended(queries: Array, keys: Array, sums: Array, last: Array, mask: Array, new: Array) -> Array:
    """y [B, tokens, heads size] of rotated and scaled queries [B, tokens, heads, size] over keys and values [B,
    kv_heads, room, size], all float64."""
    y, shared = np.zeros(queries.shape), queries.shape[2] // keys.shape[1]
    for row, q in enumerate(queries):
        count, end = int(new[row]), int(last[row]) + 1
        k, v = (np.repeat(part[row, :, :end], shared, axis=0) for part in (keys, sums))
        scores = np.einsum("thd,hkd->htk", q[:count], k) + mask[row, :, :count, :end]
        scores += np.triu(np.full((count, end), -np.inf), end - count + 1)
        y[row, :count] = np.einsum("htk,hkd->thd", shares(scores), v)
    return y.reshape(*y.shape[:2], -1).astype(np.float32)


def shares(scores: Array, hidden: float = -np.inf) -> Array:
    """softmax along the last axis; zeros where all scores are `hidden` or less."""
    most = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(most <= hidden, 0, most))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0, 1, total))


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, S, heads, size], of which the first channels are rotated, the first half of them with the second."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[..., None, :], sin[..., None, :]
    return np.concatenate((a * c - b * s, b * c + a * s, rest), axis=-1)


def interleaved(x: Array, cos: Array, sin: Array) -> Array:
    """The same, of neighbours."""
    half = cos.shape[-1]
    order = np.r_[0 : 2 * half : 2, 1 : 2 * half : 2, 2 * half : x.shape[-1]]
    return np.asarray(rotated(x[..., order], cos, sin)[..., np.argsort(order)])


NEW = (
    Port("query", ("B", "S", "X")),  # heads * D of its columns, from `query_at` on
    Port("key", ("B", "S", "Y")),
    Port("value", ("B", "S", "Z")),
)
ROWS = (
    Port("last", ("B",)),  # the last token of each row, counted from the beginning of the cache
    Port("mask", ("B", "1", "S", "T")),  # added to the scores; a token sees none behind itself whatever it says
    Port("new", ("B",)),  # how many of the S tokens are no padding behind them
)
ROW_TYPES = (DType.I32, DType.F32, DType.I32)
ROTATION = (  # all three, or none where queries and keys come as they are to be
    Port("cos", ("L", "R"), optional=True),  # of half the rotated channels, by position
    Port("sin", ("L", "R"), optional=True),
    Port("positions", ("B", "S"), optional=True),
)
ROTATION_TYPES = (DType.F32, DType.F32, DType.I64)
ATTRS = (
    Attr("heads", 1),
    Attr("kv_heads", 1),
    *(Attr(name, 0) for name in ("query_at", "key_at", "value_at")),
    Attr("scale_bits", 0),  # of what scores are multiplied with; 0: one over the root of D
    Attr("interleaved", 0, (0, 1)),  # neighbours are rotated, not the first half of channels with the second
)
OP = Op(
    name="CpuAttention",
    version=1,
    inputs=(
        *NEW,
        Port("past_key", ("B", "H", "P", "D")),
        Port("past_value", ("B", "H", "P", "D")),
        *ROWS,
        *ROTATION,
        Port("key_scale", ("H", "D"), optional=True),  # of a step of int8: what it stands for is code * scale
        Port("value_scale", ("H", "D"), optional=True),
    ),
    outputs=(
        Port("y", ("B", "S", "heads*D")),
        Port("present_key", ("B", "H", "max(P,T)", "D")),  # may be the buffer of past_key
        Port("present_value", ("B", "H", "max(P,T)", "D")),
    ),
    attrs=ATTRS,
    types=tuple(
        (
            *(DType.F32, DType.F32, DType.F32, cache, cache),
            *(*ROW_TYPES, *ROTATION_TYPES, DType.F32, DType.F32, DType.F32, cache, cache),
        )
        for cache in (DType.F32, DType.F16, DType.I8)
    ),
    reference=reference,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=lambda v: unlike_heads(v["heads"], v["kv_heads"], v["D"]),
)

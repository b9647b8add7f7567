"""CpuAttentionByToken: CpuAttention over a cache of four bits, with scales and zero points of each token's groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from instantrt.plugins.cpu.attention import (
    ATTRS,
    NEW,
    ROTATION,
    ROTATION_TYPES,
    ROW_TYPES,
    ROWS,
    WIDTH,
    attended,
    fresh,
    grown,
    unlike_heads,
)
from instantrt.plugins.hadamard import hadamard
from instantrt.plugins.schema import Array, DType, Op, Port, Tolerance

MOST_GROUPS = 32  # of a head's channels
CACHE = tuple(f"{part}{what}" for part in ("key", "value") for what in ("", "_scale", "_zero"))
CACHE_TYPES = (DType.U8, DType.F16, DType.U8) * 2


def reference(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_key_scale: Array,
    past_key_zero: Array,
    past_value: Array,
    past_value_scale: Array,
    past_value_zero: Array,
    last: Array,
    mask: Array,
    new: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    positions: Array | None = None,
    center: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    """In float64, row by row. What is quantized is (key - center) @ H and value @ H, H = `hadamard`; keys that have
    all lost the same give the same shares, and queries @ H the same scores."""
    values, size = OP.attributes(attrs), 2 * past_key.shape[3]
    turn = hadamard(size).astype(np.float64)
    queries, keys, sums = fresh(query, key, value, size, values, cos, sin, positions)
    pasts = ((past_key, past_key_scale, past_key_zero), (past_value, past_value_scale, past_value_zero))
    present = [
        tuple(
            grown(before, now, last, mask, new)
            for before, now in zip(past, kept(x @ turn, past[1].shape[-1]), strict=True)
        )
        for past, x in zip(pasts, (keys if center is None else keys - center, sums), strict=True)
    ]
    codes, others = (read(*part) for part in present)
    y = attended(queries @ turn, codes, others, last, mask, new)
    turned = y.reshape(*y.shape[:2], y.shape[2] // size, size) @ turn
    return (turned.reshape(y.shape).astype(np.float32), *present[0], *present[1])


def kept(x: Array, count: int) -> tuple[Array, Array, Array]:
    """x [..., size] as codes [..., size / 2], and scales and zero points [..., count] of so many groups."""
    groups = np.float32(x).reshape(*x.shape[:-1], count, x.shape[-1] // count)
    low, high = groups.min(axis=-1, initial=0), groups.max(axis=-1, initial=0)
    scale = np.minimum((high - low) / np.float32(15), 65504).astype(np.float16)
    scale[scale == 0] = 1
    zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 15)
    steps = np.rint(groups / scale.astype(np.float32)[..., None])
    codes = np.clip(steps + zero[..., None], 0, 15).astype(np.uint8).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, scale, zero.astype(np.uint8)


def read(codes: Array, scale: Array, zero: Array) -> Array:
    """What a cache [B, heads, room, size / 2] stands for, [B, heads, room, size] in float64."""
    size = 2 * codes.shape[-1]
    each = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scale.shape, size // scale.shape[-1])
    wide = (each.astype(np.float64) - zero[..., None]) * scale[..., None].astype(np.float64)
    return np.asarray(wide.reshape(*codes.shape[:-1], size))


def unlike(size: int, key_groups: int, value_groups: int) -> str | None:
    """What of heads in so many groups the kernels do not have; the node says the same."""
    for groups in (key_groups, value_groups):
        if not 0 < groups <= MOST_GROUPS or size % (WIDTH * groups):
            return f"{size} channels in {groups} groups, expected at most {MOST_GROUPS} of a multiple of {WIDTH}"
    return None


def check(v: Mapping[str, int]) -> str | None:
    return unlike_heads(v["heads"], v["kv_heads"], 2 * v["C"]) or unlike(2 * v["C"], v["K"], v["V"])


def ports(prefix: str, length: str) -> tuple[Port, ...]:
    """Codes [B, H, T, D / 2], scales and zero points [B, H, T, groups], of keys and of values."""
    widths = ("C", "K", "K", "C", "V", "V")
    return tuple(Port(f"{prefix}_{name}", ("B", "H", length, width)) for name, width in zip(CACHE, widths, strict=True))


OP = Op(
    name="CpuAttentionByToken",
    version=1,
    inputs=(*NEW, *ports("past", "P"), *ROWS, *ROTATION, Port("center", ("H", "2*C"), optional=True)),
    outputs=(Port("y", ("B", "S", "heads*2*C")), *ports("present", "max(P,T)")),  # may be the buffers of the past
    attrs=ATTRS,
    types=(
        (
            *(DType.F32, DType.F32, DType.F32, *CACHE_TYPES, *ROW_TYPES, *ROTATION_TYPES, DType.F32),
            *(DType.F32, *CACHE_TYPES),
        ),
    ),
    reference=reference,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=check,
)

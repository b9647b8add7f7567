"""CpuGemm: y = x @ dequant(W)^T + bias on a CPU, with x in integers; CpuRows: rows of dequant(W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from instantrt.plugins.cpu_gemm import layout
from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance

BLOCK = 32  # consecutive k of x that share a scale
INT8_BLOCKS, INT16_BLOCKS, INT8_ROWS = range(3)
"""x as int8 with a scale for each 32 of a row; in 16 bits so; as int8 with one scale for a row (A8W8)."""
FORM = "activations"  # the attribute that says which
TOP = {INT8_BLOCKS: 127, INT16_BLOCKS: 127 * 256, INT8_ROWS: 127}
SMALLEST = np.finfo(np.float32).tiny
LONGEST = 65536  # k whose products fit in 32 bits


def rounded(x: Array, activations: int) -> Array:
    """x as the kernel has it, in float64: symmetric, half to even; a block of zeros is zero."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, x.shape[-1] if activations == INT8_ROWS else BLOCK)
    top = np.float32(TOP[activations])
    most = np.abs(blocks).max(axis=-1, keepdims=True)
    small = most < SMALLEST  # zeros, and what is too small to divide by
    steps = np.clip(np.rint(blocks * (top / np.where(small, np.float32(np.inf), most))), -top, top)
    return (steps.astype(np.float64) * np.where(small, 1, most / top)).reshape(x.shape)


def weights(codes: Array, scales: Array, zeros: Array | None, values: Mapping[str, int]) -> Array:
    """dequant(W) [N, K] in float64. `zeros` are codes, or minima where they are float; none: the central code."""
    bits, group = values["bits"], values["group"]
    least = zeros
    if zeros is None or zeros.dtype == np.uint8:
        least = -scales.astype(np.float64) * (2.0 ** (bits - 1) if zeros is None else zeros)
    scale, offset = (np.repeat(layout.by_row(v.astype(np.float64)), group, axis=1) for v in (scales, least))
    return layout.unpack(codes, bits, scales.shape[1] * group) * scale + offset


def gemm(
    x: Array, codes: Array, scales: Array, zeros: Array | None = None, bias: Array | None = None, **attrs: Any
) -> tuple[Array, ...]:
    """Wide sums of x as it is rounded."""
    values = GEMM.attributes(attrs)
    y = rounded(x, values["activations"]) @ weights(codes, scales, zeros, values).T
    return ((y if bias is None else y + bias).astype(np.float32),)


def rows(
    ids: Array, codes: Array, scales: Array, zeros: Array | None = None, bias: Array | None = None, **attrs: Any
) -> tuple[Array, ...]:
    """The matrix's rows at `ids`; one below zero counts from the end."""
    return (weights(codes, scales, zeros, ROWS.attributes(attrs))[ids].astype(np.float32),)


def check(v: Mapping[str, int]) -> str | None:
    """What no shape term can say; kernels.cpp says the same, and a test holds the two together."""
    group, k = v["group"], v["K"]
    if group <= 0 or group % BLOCK or k % group or k <= 0:
        return f"group is {group}, expected a multiple of {BLOCK} that divides K = {k}"
    if v["activations"] == INT8_ROWS and group > LONGEST:
        return f"group is {group}, expected at most {LONGEST} with a scale for each row of x"
    return None


WEIGHT = (
    Port("codes", ("S", "-(-K//(256//bits))", "512")),  # S strips of 16 rows; strip16, see layout.py
    Port("scales", ("S", "K//group", "16")),
    Port("zeros", ("S", "K//group", "16"), optional=True),  # codes, or float minima; none: every zero point is central
)
ATTRS = (
    Attr("bits", 8, (4, 8)),
    Attr("group", 32),
    Attr("layout_version", layout.VERSION, (layout.VERSION,)),
)
FLOATS = (DType.F32, DType.F16, DType.BF16)
GEMM = Op(
    name="CpuGemm",
    version=1,
    inputs=(Port("x", ("...", "K")), *WEIGHT, Port("bias", ("16*S",), optional=True)),
    outputs=(Port("y", ("...", "16*S")),),
    attrs=(*ATTRS, Attr(FORM, INT16_BLOCKS, (INT8_BLOCKS, INT16_BLOCKS, INT8_ROWS))),
    types=tuple((DType.F32, DType.U8, t, z, DType.F32, DType.F32) for t in FLOATS for z in (DType.U8, t)),
    reference=gemm,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=check,
)

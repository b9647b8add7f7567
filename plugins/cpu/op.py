"""CpuGemm: y = act(x @ dequant(W)^T + bias) + residual on a CPU, with x in integers; CpuRows: rows of dequant(W)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from instantrt.plugins.cpu import layout
from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance
from instantrt.plugins.weight_only_gemm.semantics import ACTIVATIONS

TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint8))
SIZES = (4, 2, 2, 1, 0)  # bytes of a number of each, and of none
CODES, NONE = 3, 4  # zeros as codes; none: every zero point is the central code. Float ones are minima
BLOCK = 32  # consecutive k of x that share a scale
INT8_BLOCKS, INT16_BLOCKS, INT8_ROWS = range(3)
"""x as int8 with a scale for each 32 of a row; in 16 bits so; as int8 with one scale for a row (A8W8)."""
FORM = "activations"  # the attribute that says which
TOP = {INT8_BLOCKS: 127, INT16_BLOCKS: 127 * 256, INT8_ROWS: 127}
SMALLEST = np.float32(2.0**-110)  # from here on, 1 / step is below infinity
LONGEST = 65536  # k whose products fit in 32 bits


def rounded(x: Array, activations: int) -> Array:
    """x as the kernel has it, in float64: symmetric, half to even; a block of zeros is zero."""
    size = x.shape[-1] if activations == INT8_ROWS else BLOCK
    blocks: Array = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    top = np.float32(TOP[activations])
    most = np.abs(blocks).max(axis=-1, keepdims=True)
    small = most < SMALLEST  # zeros, and what is too small to divide by
    steps = np.clip(np.rint(blocks * (top / np.where(small, np.float32(np.inf), most))), -top, top)
    seen: Array = steps.astype(np.float64) * np.where(small, 1, most / top)
    return np.asarray(seen.reshape(x.shape))


def dequantized(codes: Array, affine: Array, values: Mapping[str, int]) -> Array:
    """W [N, K] in float64."""
    middle = layout.STRIP * SIZES[values["scale_type"]]
    scales = numbers(affine[..., :middle], values["scale_type"])
    if values["zero_type"] == NONE:
        least = -scales * 2.0 ** (values["bits"] - 1)
    else:
        zeros = numbers(affine[..., middle:], values["zero_type"])
        least = -scales * zeros if values["zero_type"] == CODES else zeros
    scale, offset = (np.repeat(layout.by_row(v), values["group"], axis=1) for v in (scales, least))
    return np.asarray(layout.unpack(codes, values["bits"], scale.shape[1]) * scale + offset)


def numbers(raw: Array, kind: int) -> Array:
    return np.ascontiguousarray(raw).view(TYPES[kind]).astype(np.float64)


def gemm(
    x: Array, codes: Array, affine: Array, bias: Array | None = None, residual: Array | None = None, **attrs: Any
) -> tuple[Array, ...]:
    """Wide sums of x as it is rounded."""
    values = GEMM.attributes(attrs)
    y = rounded(x, values[FORM]) @ dequantized(codes, affine, values).T
    y = finished(y if bias is None else y + bias, values)
    return ((y if residual is None else y + residual).astype(np.float32),)


def rows(ids: Array, codes: Array, affine: Array, **attrs: Any) -> tuple[Array, ...]:
    """The rows of W at `ids`; one below zero counts from the end."""
    return (dequantized(codes, affine, ROWS.attributes(attrs))[ids].astype(np.float32),)


def finished(y: Array, values: Mapping[str, int]) -> Array:
    """Activation, and the gates' products: rows of W come in strips of 16, eight gates and the eight ups behind."""
    act: Callable[[Array], Array] = ACTIVATIONS[values["activation"]]
    if not values["gated"]:
        return act(y)
    *leading, n = y.shape
    gate, up = np.moveaxis(y.reshape(*leading, n // layout.STRIP, 2, 8), -2, 0)
    return np.asarray(act(gate) * up).reshape(*leading, n // 2)


def check(v: Mapping[str, int]) -> str | None:
    """What no shape term can say; `refuse` in kernels.cpp says the same, and a test holds the two together."""
    group, k = v["group"], v["K"]
    if k <= 0 or group <= 0 or group % BLOCK or k % group:
        return f"group is {group}, expected a multiple of {BLOCK} that divides K = {k}"
    if v.get(FORM) == INT8_ROWS and group > LONGEST:
        return f"group is {group}, expected at most {LONGEST} with a scale for each row of x"
    return None


CODES_PORT = Port("codes", ("S", "-(-K//(256//bits))", "512"))  # S strips of 16 rows; strip16, see layout.py
AFFINE_TERM = f"16*({SIZES}[scale_type]+{SIZES}[zero_type])"
FORMAT = (
    Attr("bits", 8, (4, 8)),
    Attr("group", 32),
    Attr("scale_type", 0, (0, 1, 2)),
    Attr("zero_type", CODES, (0, 1, 2, CODES, NONE)),
    Attr("layout_version", layout.VERSION, (layout.VERSION,)),
)
GEMM = Op(
    name="CpuGemm",
    version=1,
    inputs=(
        Port("x", ("...", "K")),
        CODES_PORT,
        Port("affine", ("S", "K//group", AFFINE_TERM)),
        Port("bias", ("16*S",), optional=True),
        Port("residual", ("...", "16*S//(1+gated)"), optional=True),  # added behind the activation
    ),
    outputs=(Port("y", ("...", "16*S//(1+gated)")),),
    attrs=(
        *FORMAT,
        Attr(FORM, INT16_BLOCKS, (INT8_BLOCKS, INT16_BLOCKS, INT8_ROWS)),
        Attr("activation", 0, tuple(ACTIVATIONS)),
        Attr("gated", 0, (0, 1)),
    ),
    types=((DType.F32, DType.U8, DType.U8, DType.F32, DType.F32, DType.F32),),
    reference=gemm,
    tolerance={DType.F32: Tolerance(2e-6, 2.0**-18)},
    check=check,
)
ROWS = Op(
    name="CpuRows",
    version=1,
    inputs=(Port("ids", ("...",)), Port("codes", ("S", "B", "512")), Port("affine", ("S", "G", AFFINE_TERM))),
    outputs=(Port("rows", ("...", "G*group")),),
    attrs=FORMAT,
    types=((DType.I64, DType.U8, DType.U8, DType.F32),),
    reference=rows,
    tolerance={DType.F32: Tolerance(2e-7, 2.0**-22)},
    check=lambda v: check({**v, "K": v["G"] * v["group"]}),
)

"""CpuNorm: each row over the root of the mean of its squares, with or without its mean, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance, bits_of


def reference(x: Array, scale: Array, bias: Array | None = None, **attrs: Any) -> tuple[Array, ...]:
    """In float64: RMSNormalization's and LayerNormalization's formulas (ONNX), along the last axis."""
    values = OP.attributes(attrs)
    wide = x.astype(np.float64)
    if values["centered"]:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    epsilon = np.int32(values["epsilon_bits"]).view(np.float32)
    y = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + epsilon) * scale
    return ((y if bias is None else y + bias).astype(np.float32),)


OP = Op(
    name="CpuNorm",
    version=1,
    inputs=(Port("x", ("...", "K")), Port("scale", ("K",)), Port("bias", ("K",), optional=True)),
    outputs=(Port("y", ("...", "K")),),
    attrs=(Attr("centered", 0, (0, 1)), Attr("epsilon_bits", bits_of(1e-5))),
    types=((DType.F32, DType.F32, DType.F32, DType.F32),),
    reference=reference,
    tolerance={DType.F32: Tolerance(1e-6, 2.0**-19)},
    check=lambda v: None,
)

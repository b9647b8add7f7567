"""Plain int8 exports: `weight` int8 [N, K] and one float `weight_scale` for each output channel, [N] or [N, 1].

Written by many small tools, with `quant_method: w8a8_int8` or with no config at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instantrt.compiler.quant.compressed import INT8, CompressedRows
from instantrt.compiler.quant.stored import FLOATS, LEFT_FLOAT, Reader, StoredLayer
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor
from instantrt.passes.core.quant import Activations, QuantTensor
from instantrt.passes.core.rewrite import Reject

SCALES = ("weight_scale", "scale", "scales")


@dataclass(frozen=True)
class PlainConfig(Reader):
    """`activations`: int8 where the config says w8a8, float where nothing is said."""

    activations: Activations = "float"

    method = "int8"
    mark = "weight"
    bits = 8
    group_size = -1

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        weight = layer.find("weight")
        if weight is None or weight.dtype in FLOATS:
            return LEFT_FLOAT
        n, k = layer.shape
        weight = layer.part("weight", (n, k), INT8)
        found = [name for name in SCALES if layer.find(name) is not None]
        if len(found) != 1:
            raise UserError(
                "an int8 weight needs one scale for each output channel",
                where=layer.path,
                expected=" or ".join(SCALES),
                found=", ".join(found) or "none",
            )
        for other in ("weight_zero_point", "zero_point", "zeros"):
            if layer.find(other) is not None:
                raise UserError("zero points in a plain int8 checkpoint", where=f"{layer.path}.{other}")
        flat = len(layer.tensors[f"{layer.path}.{found[0]}"].shape) == 1
        scales = layer.part(found[0], (n,) if flat else (n, 1), *FLOATS)
        rows = CompressedRows((n, k), 8, weight, scales)
        return QuantTensor(layer.path, rows, (n, k), 8, k, True, scales.dtype, self.activations)


def parse_plain(raw: Mapping[str, Any], where: str) -> PlainConfig:  # noqa: ARG001  (as every reader is called)
    """`w8a8_int8` says nothing more."""
    return PlainConfig("int8")


def detect(tensors: Mapping[str, FileTensor]) -> PlainConfig | None:
    """The reader for a checkpoint without a config: some matrix is int8 and has a scale."""
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and tensor.dtype == INT8 and any(f"{path}.{scale}" in tensors for scale in SCALES):
            return PlainConfig()
    return None

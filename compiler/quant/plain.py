"""Plain int8 exports: `weight` int8 [N, K] and one float `weight_scale` for each output channel, [N] or [N, 1].

Written by many small tools, with `quant_method: w8a8_int8` or with no config at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from instantrt.compiler.quant.compressed import INT8, shifted
from instantrt.compiler.quant.stored import FLOATS, Layer, checked_scales
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, Tile
from instantrt.passes.core.quant import Activations, Codes, QuantTensor
from instantrt.passes.core.rewrite import Reject

SCALES = ("weight_scale", "scale", "scales")


@dataclass(frozen=True)
class PlainConfig:
    """`activations`: int8 where the config says w8a8, float where nothing is said."""

    activations: Activations = "float"

    method = "int8"
    mark = "weight"
    notes: ClassVar[tuple[str, ...]] = ()
    bits = 8
    group_size = -1

    def read(self, layer: Layer) -> QuantTensor | Reject:
        weight = layer.find("weight")
        if weight is None or weight.dtype in FLOATS:
            return Reject("the checkpoint leaves this layer float")
        n, _ = layer.shape
        weight = layer.part("weight", layer.shape, INT8)
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
        rank = len(layer.tensors[f"{layer.path}.{found[0]}"].shape)
        scales = layer.part(found[0], (n,) if rank == 1 else (n, 1), *FLOATS)
        rows, (_, k) = PlainRows(weight, scales), layer.shape
        return QuantTensor(layer.path, rows, layer.shape, 8, k, True, scales.dtype, self.activations)


def parse(raw: Mapping[str, Any], where: str) -> PlainConfig:  # noqa: ARG001  (as every reader is called)
    """`w8a8_int8` says nothing more."""
    return PlainConfig("int8")


def detect(tensors: Mapping[str, FileTensor]) -> PlainConfig | None:
    """The reader for a checkpoint without a config: some matrix is int8 and has a scale."""
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and tensor.dtype == INT8 and any(f"{path}.{scale}" in tensors for scale in SCALES):
            return PlainConfig()
    return None


@dataclass(frozen=True)
class PlainRows:
    """Rows of int8 as codes about 128."""

    weight: FileTensor
    scales: FileTensor

    def parameters(self) -> tuple[Array, Array]:
        scale = checked_scales(self.scales).reshape(-1, 1)
        return scale, np.full(scale.shape, 128, np.uint8)

    def tiles(self) -> Iterator[Tile]:
        scale, zero = self.parameters()
        for start, (stored,) in self.weight.tiles():
            rows = slice(start, start + len(stored))
            yield Tile(start, Codes(shifted(stored, 8), scale[rows], zero[rows]))

"""AWQ checkpoints in the gemm layout, bit for bit. AWQ folds scales into norms and biases: these too are the file's.

qweight  int32 [K, N / 8]   codes of eight consecutive n in a word, in the order of NIBBLE_OF
qzeros   int32 [G, N / 8]   zero points, packed alike; true values
scales   fp16 or bf16 [G, N]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from instantrt.compiler.quant.stored import FLOATS, INT32, Layer, checked_scales, strips
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array, FileTensor, Tile, whole
from instantrt.passes.core.quant import Activations, Codes, QuantTensor
from instantrt.passes.core.rewrite import Reject

NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # channel n of a word lies in this nibble, counted from the lowest
CENTRAL = 8


@dataclass(frozen=True)
class AwqConfig:
    """What an AWQ checkpoint says of itself."""

    group_size: int
    zero_point: bool

    method = "awq"
    mark = "qweight"
    notes: ClassVar[tuple[str, ...]] = ()
    bits = 4
    activations: Activations = "float"

    def read(self, layer: Layer) -> QuantTensor | Reject:
        if layer.find("qweight") is None:
            return Reject("the checkpoint leaves this layer float")
        n, k = layer.shape
        if n % 8:
            raise UserError(
                "AWQ packs eight outputs a word", where=layer.path, expected="a multiple of 8", found=str(n)
            )
        group = layer.group(self.group_size)
        groups = k // group
        qweight = layer.part("qweight", (k, n // 8), INT32)
        scales = layer.part("scales", (groups, n), *FLOATS)
        stored = self.zero_point or layer.find("qzeros") is not None
        qzeros = layer.part("qzeros", (groups, n // 8), INT32) if stored else None
        rows = AwqRows(layer.path, qweight, qzeros, scales, symmetric=not self.zero_point)
        return QuantTensor(layer.path, rows, (n, k), self.bits, group, not self.zero_point, scales.dtype)


def parse(raw: Mapping[str, Any], where: str) -> AwqConfig:
    version = raw.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UserError("AWQ version", where=where, expected="gemm", found=repr(version), fix="save it again as gemm")
    bits, group_size = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    if type(bits) is not int or bits != 4:
        raise UserError("AWQ bits", where=where, expected="4", found=repr(bits))
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise UserError("AWQ group_size", where=where, expected="-1 or a positive integer", found=repr(group_size))
    zero_point = raw.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise UserError("AWQ zero_point", where=where, expected="true or false", found=repr(zero_point))
    return AwqConfig(group_size, zero_point)


@dataclass(frozen=True)
class AwqRows:
    """Unpacks an AWQ layer into `Codes`, a strip of output channels at a time."""

    path: str
    qweight: FileTensor
    qzeros: FileTensor | None
    scales: FileTensor
    symmetric: bool

    def parameters(self) -> tuple[Array, Array]:
        scale = np.ascontiguousarray(checked_scales(self.scales).T)
        return scale, self.zeros(scale.shape)

    def tiles(self) -> Iterator[Tile]:
        k, words = self.qweight.shape
        scale, zero = self.parameters()
        for start, stop in strips(words * 8, k, multiple=8):
            codes = unpack(self.qweight.columns(start // 8, stop // 8))
            yield Tile(start, Codes(codes, scale[start:stop], zero[start:stop]))

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """uint8 [N, G]; central where the format stores none."""
        if self.qzeros is None:
            return np.full(shape, CENTRAL, np.uint8)
        zero = unpack(whole(self.qzeros))
        if self.symmetric and (zero != CENTRAL).any():
            raise UserError(
                "the config says zero_point=false, but zero points differ from the centre",
                where=f"{self.path}.qzeros",
                expected=str(CENTRAL),
                found=str(sorted(set(zero[zero != CENTRAL].tolist()))[:5]),
            )
        return zero


def unpack(words: Array) -> Array:
    """int32 [R, C] -> uint8 [C * 8, R]."""
    w = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((w.shape[0], 8, w.shape[1]), np.uint8)
    for channel, nibble in enumerate(NIBBLE_OF):
        out[:, channel] = (w >> np.uint32(4 * nibble)) & np.uint32(0xF)
    return out.reshape(-1, w.shape[1])

"""AWQ checkpoints in the gemm layout, bit for bit. AWQ folds scales into norms and biases: these too are the file's.

qweight  int32 [K, N / 8]   codes of eight consecutive n in a word, in the order of NIBBLE_OF
qzeros   int32 [G, N / 8]   zero points, packed alike; true values
scales   fp16 or bf16 [G, N]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import expect, expect_group_size, flag, one_of
from instantrt.compiler.quant.stored import (
    FLOATS,
    INT32,
    LEFT_FLOAT,
    Reader,
    StoredLayer,
    StoredRows,
    check_central,
    checked_scales,
    ranges,
)
from instantrt.passes.core.lazy import Array, FileTensor, whole
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject

NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # channel n of a word lies in this nibble, counted from the lowest
CENTRAL = 8


@dataclass(frozen=True)
class AwqConfig(Reader):
    """What an AWQ checkpoint says of itself."""

    group_size: int
    zero_point: bool

    method = "awq"
    mark = "qweight"
    bits = 4
    activations = "float"

    def read(self, layer: StoredLayer) -> QuantTensor | Reject:
        if layer.find("qweight") is None:
            return LEFT_FLOAT
        n, k = layer.shape
        expect(n % 8 == 0, n, "AWQ packs eight outputs a word", "a multiple of 8", layer.path)
        group = layer.group(self.group_size)
        groups = k // group
        qweight = layer.part("qweight", (k, n // 8), INT32)
        scales = layer.part("scales", (groups, n), *FLOATS)
        stored = self.zero_point or layer.find("qzeros") is not None
        qzeros = layer.part("qzeros", (groups, n // 8), INT32) if stored else None
        rows = AwqRows(qweight, qzeros, scales, symmetric=not self.zero_point)
        return QuantTensor(layer.path, rows, (n, k), self.bits, group, not self.zero_point, scales.dtype)


def parse_awq(raw: Mapping[str, Any], where: str) -> AwqConfig:
    version = one_of(raw, "version", "checkpoint_format", "format", default="gemm", where=where)
    gemm = isinstance(version, str) and version.lower() == "gemm"
    expect(gemm, version, "AWQ version", "gemm", where, "save it again as gemm")
    bits, group_size = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    expect(type(bits) is int and bits == 4, bits, "AWQ bits", "4", where)
    expect_group_size(group_size, where)
    return AwqConfig(int(group_size), flag(raw, "zero_point", True, where))


@dataclass(frozen=True)
class AwqRows(StoredRows):
    """Unpacks an AWQ layer."""

    order = None
    qweight: FileTensor
    qzeros: FileTensor | None
    scales: FileTensor
    symmetric: bool

    def parameters(self) -> tuple[Array, Array]:
        scale = np.ascontiguousarray(checked_scales(self.scales).T)
        if self.qzeros is None:
            return scale, np.full(scale.shape, CENTRAL, np.uint8)
        zero = unpack_nibbles(whole(self.qzeros))
        return scale, check_central(zero, 4, "zero_point=false", self.qzeros) if self.symmetric else zero

    def strips(self) -> Iterator[tuple[int, Array]]:
        k, words = self.qweight.shape
        for start, stop in ranges(words * 8, k, multiple=8):
            yield start, unpack_nibbles(self.qweight.columns(start // 8, stop // 8))


def unpack_nibbles(words: Array) -> Array:
    """int32 [R, C] -> uint8 [C * 8, R]."""
    w = np.ascontiguousarray(words.T).view(np.uint32)
    out = np.empty((w.shape[0], 8, w.shape[1]), np.uint8)
    for channel, nibble in enumerate(NIBBLE_OF):
        out[:, channel] = (w >> np.uint32(4 * nibble)) & np.uint32(0xF)
    return out.reshape(-1, w.shape[1])

"""Problems for the GEMM tests: sizes, formats and the awkward data of real checkpoints, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP

Array = NDArray[Any]
F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)

SIZES = [  # m, n, k, group: every row of the table, ragged m, n and k, groups that straddle stages and warps
    (1, 48, 64, 32), (7, 144, 96, 96), (8, 16, 640, 128), (9, 32, 1120, 160), (16, 128, 512, 512),
    (17, 48, 192, 64), (33, 272, 160, 32), (65, 48, 128, 128),
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    x: Array
    codes: Array
    affine: Array
    bias: Array | None
    attrs: dict[str, int]

    def attributes(self) -> dict[str, int]:
        return OP.attributes(self.attrs)


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    bits: int = 4
    group: int = 32
    dtype: np.dtype[Any] = F16
    bias: bool = False
    activation: int = 0
    gated: int = 0
    activation_bits: int = 16
    rounded_weights: int = 0
    batch_invariant: int = 0
    zeros: str = "float"  # float | integer | low | high
    data: str = "normal"  # normal | outliers | shifted | zero_rows

    @property
    def attrs(self) -> dict[str, int]:
        names = ("bits", "group", "activation", "gated", "activation_bits", "rounded_weights", "batch_invariant")
        return {name: getattr(self, name) for name in names}

    def make(self) -> Problem:
        rng = np.random.default_rng([self.m, self.n, self.k, self.bits])
        top = 2**self.bits - 1
        x = rng.standard_normal((self.m, self.k))
        x = {
            "normal": x,
            "outliers": x * np.where(np.arange(self.k) % 61 == 7, 30, 1),
            "shifted": x + 0.5,
            "zero_rows": x * (np.arange(self.m)[:, None] % 2),
        }[self.data]
        groups = self.k // self.group
        scale = rng.uniform(0.2, 1.5, (groups, self.n)) / (top * np.sqrt(self.k))
        scale[rng.random(scale.shape) < 0.02] = 0  # a dead group
        zero = {
            "float": rng.uniform(0.3 * top, 0.7 * top, scale.shape),
            "integer": rng.integers(0, top + 1, scale.shape),
            "low": np.zeros(scale.shape),
            "high": np.full(scale.shape, top),
        }[self.zeros]
        codes = rng.integers(0, top + 1, (self.n, self.k), np.uint8)
        return Problem(
            x=x.astype(self.dtype),
            codes=layout.pack(codes, self.bits),
            affine=np.stack((scale, zero), axis=-1).astype(self.dtype).reshape(groups, -1),
            bias=rng.standard_normal(self.n).astype(self.dtype) if self.bias else None,
            attrs=self.attrs,
        )

"""WeightOnlyGemm on a GPU: torch owns the memory, the C function does the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from instantrt.plugins.weight_only_gemm import layout
from instantrt.tools.gpu.library import HUNG_ROWS, LaunchPlan, Library

GUARD = 4096  # bytes on either side of every output that must stay as they were
POISON = 0xA5
HUNG = frozenset(filter(None, os.environ.get(HUNG_ROWS, "").split(",")))
TYPES = {torch.float16: 0, torch.bfloat16: 1}
DEVICE = "cuda"  # tests of this module put the emulator's memory here


class HungRowError(Exception):
    """The table chose a row that takes the GPU with it."""


def is_hung(plan: LaunchPlan, sm: int) -> bool:
    return f"{plan.kernel} sm={sm}" in HUNG


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream) if DEVICE == "cuda" else 0


def device_numbers() -> dict[str, int]:
    properties = torch.cuda.get_device_properties(0)
    return {"sm": properties.major * 10 + properties.minor, "sm_count": properties.multi_processor_count}


@dataclass(frozen=True)
class Weight:
    """One layer on the GPU. `natural` is its codes [N, K], for the oracle and for peers."""

    codes: torch.Tensor
    natural: torch.Tensor
    affine: torch.Tensor  # [G, N, 2]
    bias: torch.Tensor | None
    bits: int
    group: int

    @property
    def n(self) -> int:
        return self.natural.shape[0]

    @property
    def k(self) -> int:
        return self.natural.shape[1]

    def copy(self) -> Weight:
        return replace(self, codes=self.codes.clone(), affine=self.affine.clone())

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K] = (code - zero) * scale, exact in float64."""
        scale, zero = (self.affine[:, :, i].to(torch.float64).T.repeat_interleave(self.group, 1) for i in (0, 1))
        return ((self.natural.to(torch.float64) - zero) * scale).to(dtype)


def random_weight(
    n: int, k: int, bits: int, group: int, dtype: torch.dtype, zeros: str = "float", bias: bool = False
) -> Weight:
    """Random codes, a scale and a zero per group, made and packed where the kernels run."""
    generator = torch.Generator(DEVICE).manual_seed(hash((n, k, bits, group)))
    top, shape = 2**bits - 1, (k // group, n)
    natural = torch.randint(0, top + 1, (n, k), dtype=torch.uint8, device=DEVICE, generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, device=DEVICE, generator=generator) * (high - low) + low

    scale = uniform(0.2, 1.5) / (top * k**0.5)
    scale[uniform(0, 1) < 0.01] = 0
    zero = {
        "float": lambda: uniform(0.3 * top, 0.7 * top),
        "integer": lambda: uniform(0, top + 1).floor(),
        "central": lambda: torch.full_like(scale, (top + 1) // 2),
        "low": lambda: torch.zeros_like(scale),
        "high": lambda: torch.full_like(scale, top),
    }[zeros]()
    return Weight(
        codes=pack(natural, bits),
        natural=natural,
        affine=torch.stack((scale, zero), dim=-1).to(dtype).contiguous(),
        bias=torch.randn(n, device=DEVICE, generator=generator).to(dtype) if bias else None,
        bits=bits,
        group=group,
    )


def pack(natural: torch.Tensor, bits: int) -> torch.Tensor:
    """layout.pack, in torch: the product's own takes a second for each 140 million codes. A test holds them equal."""
    n, k = natural.shape
    rows = layout.STRIP * layout.TILE_STRIPS
    padded = torch.nn.functional.pad(natural, (0, -k % layout.block_k(bits)))
    whole = n - n % rows
    tiles = (_pack_tiles(part, bits) for part in (padded[:whole], padded[whole:]) if len(part))
    return torch.cat(list(tiles)).view(torch.int8).view(layout.packed_shape(n, k, bits))


def _pack_tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of whole tiles, or of the one that is not whole, as bytes: [tile][block][strip][512]."""
    block = layout.block_k(bits)
    strips = min(codes.shape[0] // layout.STRIP, layout.TILE_STRIPS)
    #                  tile strip  h  g  block                     j            h8 t  e
    w = codes.reshape(-1, strips, 2, 8, codes.shape[1] // block, block // 16, 2, 4, 2)
    if bits == 8:
        return w.permute(0, 4, 1, 3, 7, 5, 2, 8, 6).reshape(-1)
    nibbles = w.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).reshape(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4


@dataclass
class Gemm:
    """A prepared launch: all pointers fixed, so that calling it can be captured in a graph."""

    library: Library
    x: torch.Tensor
    weight: Weight
    options: dict[str, int]

    def __post_init__(self) -> None:
        w, gated = self.weight, self.options.get("gated", 0)
        self.problem = self.problem_of(self.x, w, self.options)
        self.plan: LaunchPlan = self.library.choose(**self.problem)
        if is_hung(self.plan, self.problem["sm"]):
            raise HungRowError(f"the table's row {self.plan.kernel} did not come back when it was tried")
        self.dtype = torch.float32 if self.options.get("wide") else self.x.dtype
        self.shape = (self.x.shape[0], w.n // (1 + gated))
        self.y_memory = self.poisoned(self.shape[0] * self.shape[1] * self.dtype.itemsize)
        self.workspace = self.poisoned(max(self.plan.workspace, 16))
        bias = 0 if w.bias is None else w.bias.data_ptr()
        self.tensors = {
            "x": self.x.data_ptr(), "codes": w.codes.data_ptr(), "affine": w.affine.data_ptr(), "bias": bias,
            "y": self.y_memory.data_ptr() + GUARD, "workspace": self.workspace.data_ptr() + GUARD,
        }  # fmt: skip

    @staticmethod
    def problem_of(x: torch.Tensor, w: Weight, options: dict[str, int]) -> dict[str, int]:
        return {
            "m": x.shape[0], "n": w.n, "k": w.k, "group": w.group, "bits": w.bits, "type": TYPES[x.dtype],
            "activation_bits": 16, **device_numbers(), **options,
        }  # fmt: skip

    @staticmethod
    def poisoned(size: int) -> torch.Tensor:
        return torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=DEVICE)

    def __call__(self) -> None:
        self.library.launch(self.problem, self.tensors, current_stream())

    def on(self, weight: Weight) -> Callable[[], None]:
        """The same launch on a copy of the weights."""
        tensors = {**self.tensors, "codes": weight.codes.data_ptr(), "affine": weight.affine.data_ptr()}
        return lambda: self.library.launch(self.problem, tensors, current_stream())

    def output(self) -> torch.Tensor:
        """The result; checks that nothing outside the output and the workspace was written."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for name, memory in (("y", self.y_memory), ("workspace", self.workspace)):
            edges = torch.cat((memory[:GUARD], memory[-GUARD:]))
            if not bool((edges == POISON).all()):
                raise AssertionError(f"bytes around {name} were written")
        return self.y_memory[GUARD:-GUARD].view(self.dtype).view(self.shape)

"""Canonical Q/DQ linears -> CpuGemm, our own kernels behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, Tile, View, rows_by
from instantrt.passes.core.quant import scales_of
from instantrt.passes.core.rewrite import Lowering, Reject, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.gemm.epilogues import Fusion
from instantrt.passes.gemm.packed import Packed, add_ours, interleave, weights
from instantrt.passes.ort import Preset
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.qdq.last_logits import makes_logits
from instantrt.plugins.cpu import layout
from instantrt.plugins.cpu.op import CODES, GEMM, INT8_BLOCKS, INT8_ROWS, INT16_BLOCKS, NONE, SIZES, TYPES

ROWS = 16 * layout.STRIP  # that are packed at once
FORMS = {INT8_BLOCKS: "int8 by 32", INT16_BLOCKS: "16 bits by 32 (exact)", INT8_ROWS: "int8 by token"}
RESIDUAL = 4  # the input


@dataclass(frozen=True)
class Strips(Packed):
    """Delivers (codes [strips, K blocks, 512] in strip16, affine [strips, G, bytes])."""

    @property
    def bias_type(self) -> np.dtype[Any]:
        return FLOAT32

    @property
    def types(self) -> dict[str, int]:
        """The attributes that say how scales and zero points are stored: as the checkpoint has them, where it can."""
        first = self.weights[0]
        zeros = NONE if first.symmetric else stored(first.zero_dtype) if first.has_minima else CODES
        return {"scale_type": stored(first.scale_dtype), "zero_type": zeros}

    def constants(self, path: str) -> list[gs.Tensor]:
        (n, k), first = self.shape, self.weights[0]
        codes = View(self, layout.packed_shape(n, k, first.bits), np.uint8)
        size = layout.STRIP * sum(SIZES[kind] for kind in self.types.values())
        affine = View(self, (n // layout.STRIP, first.groups, size), np.uint8, project=scales_of)
        return [gs.Constant(f"{path}.strips", codes), gs.Constant(f"{path}.affine", affine)]

    def tiles(self) -> Iterator[Tile]:
        types = [kind for kind in self.types.values() if kind != NONE]
        each = (rows_by(w.tiles(), ROWS // len(self.weights)) for w in self.weights)
        for i, same in enumerate(zip(*each, strict=True)):
            codes, *affine = map(interleave, zip(*(tile.parts for tile in same), strict=True))
            parts = [in_bytes(layout.by_strip(part), TYPES[kind]) for part, kind in zip(affine, types, strict=False)]
            packed = layout.pack(codes, self.weights[0].bits)
            yield Tile(i * ROWS // layout.STRIP, (packed, np.concatenate(parts, axis=-1)))


def stored(dtype: np.dtype[Any]) -> int:
    """The place in TYPES of what holds numbers of `dtype`."""
    return TYPES.index(dtype) if dtype in TYPES else TYPES.index(FLOAT32)


def in_bytes(values: Array, dtype: np.dtype[Any]) -> Array:
    """Values that are numbers of `dtype`, as its bytes."""
    narrow = values.astype(dtype)
    assert (narrow == values).all(), f"rounded before it was {dtype}"
    return np.ascontiguousarray(narrow).view(np.uint8)


@dataclass(frozen=True)
class CpuMatch:
    linear: Quantized
    activations: int


@dataclass(frozen=True)
class LowerCpuGemm(Lowering[CpuMatch]):
    """MatMul(x, DequantizeLinear(codes)) -> instantrt::CpuGemm(x, codes in strips, scales and zero points).

    preset   how x is brought into integers, where it is not int8 by token: in 16 bits, or in 8 where that is fast; of
             the head, where 8 cost most, in 16 unless `fast`
    steps    most calls have one row for each sequence: of many rows, 8 bits are for `fast` alone
    """

    requires = (weight_dq_feeds_matmul,)

    preset: Preset
    steps: bool = True

    def match(self, node: gs.Node) -> CpuMatch | Reject | None:
        found = quantized(node)
        if found is None:
            return None
        (n, k), bits, activations = found.quant.shape, found.quant.bits, self.activations(found)
        if n % layout.STRIP:
            return Reject(f"{GEMM.name}: N is {n}, expected a multiple of {layout.STRIP}")
        sizes = {"K": k, "group": found.quant.group_size, "bits": bits, "activations": activations}
        wrong = GEMM.check(sizes)
        return Reject(f"{GEMM.name}: {wrong}") if wrong else CpuMatch(found, activations)

    def rewrite(self, graph: gs.Graph, match: CpuMatch) -> None:
        quant, node, strips = match.linear.quant, match.linear.node, Strips((match.linear.quant,))
        attrs = {"bits": quant.bits, "group": quant.group_size, "activations": match.activations, **strips.types}
        inputs = [match.linear.x, *weights(graph, strips, match.linear.path)]
        add_ours(graph, GEMM.name, inputs, [take_over(node)], node.name, GEMM.attributes(attrs))

    def activations(self, found: Quantized) -> int:
        if found.quant.activations == "int8":
            return INT8_ROWS
        fast = self.preset == "fast" or (self.preset == "auto" and self.steps and not makes_logits(found.node))
        return INT8_BLOCKS if fast else INT16_BLOCKS

    def note(self, match: CpuMatch) -> str:
        return f"{GEMM.name}, {match.linear.quant.bits} bits, x in {FORMS[match.activations]}"


@dataclass(frozen=True)
class ResidualMatch:
    made: gs.Node
    last: gs.Node
    residual: gs.Tensor


@dataclass(frozen=True)
class FuseResidual(Fusion[ResidualMatch]):
    """CpuGemm + Add(r), of its own shape -> its residual input. One of unknown sizes might broadcast."""

    def match(self, node: gs.Node) -> ResidualMatch | Reject | None:
        if node.op != "Add":
            return None
        reason = None
        for y, other in (node.inputs, node.inputs[::-1]):
            made = self.sole_gemm(y, node)
            if made is None or made.op != GEMM.name or len(made.inputs) > RESIDUAL or isinstance(other, gs.Constant):
                continue
            if y is other or y.shape is None or None in y.shape or other.shape is None or [*y.shape] != [*other.shape]:
                reason = Reject(f"{other.name} is {other.shape}, not surely of the product's shape {y.shape}")
            else:
                return ResidualMatch(made, node, other)
        return reason

    def rewrite(self, graph: gs.Graph, match: ResidualMatch) -> None:
        made = match.made
        missing = [gs.Variable.empty()] * (RESIDUAL - len(made.inputs))
        inputs = [*made.inputs, *missing, match.residual]
        add_ours(graph, GEMM.name, inputs, [take_over(match.last)], made.name, made.attrs)

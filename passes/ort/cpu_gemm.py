"""Canonical Q/DQ linears -> CpuGemm, our own kernels behind ONNX Runtime: `--plugin`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Tile, View, rows_by
from instantrt.passes.core.quant import QuantTensor, scales_of, zeros_of
from instantrt.passes.core.rewrite import Lowering, Reject, Rewrite, producer, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort import Preset
from instantrt.passes.ort.in_half import HALF_TYPES
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.qdq.last_logits import makes_logits
from instantrt.plugins.cpu_gemm import layout
from instantrt.plugins.cpu_gemm.op import GEMM, INT8_BLOCKS, INT8_ROWS, INT16_BLOCKS
from instantrt.plugins.ops import DOMAIN

ROWS = 16 * layout.STRIP  # that are packed at once
FORMS = {INT8_BLOCKS: "int8 by 32", INT16_BLOCKS: "16 bits by 32 (exact)", INT8_ROWS: "int8 by token"}
BIAS = 4


@dataclass(frozen=True)
class Strips:
    """A quantized weight as the kernels read it: codes in strip16, scales and zero points [strips, G, 16]."""

    weight: QuantTensor

    def tiles(self) -> Iterator[Tile]:
        for start, (codes, *affine) in rows_by(self.weight.tiles(), ROWS):
            packed = layout.pack(codes, self.weight.bits)
            yield Tile(start // layout.STRIP, (packed, *map(layout.by_strip, affine)))


@dataclass(frozen=True)
class CpuMatch:
    linear: Quantized
    activations: int


@dataclass(frozen=True)
class LowerCpuGemm(Lowering[CpuMatch]):
    """MatMul(x, DequantizeLinear(codes)) -> instantrt::CpuGemm(x, codes in strips, scales, zero points).

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
        quant, node = match.linear.quant, match.linear.node
        attrs = {"bits": quant.bits, "group": quant.group_size, "activations": match.activations}
        gemm(graph, [match.linear.x, *weights(quant, match.linear.path)], take_over(node), node.name, attrs)

    def activations(self, found: Quantized) -> int:
        if found.quant.activations == "int8":
            return INT8_ROWS
        fast = self.preset == "fast" or (self.preset == "auto" and self.steps and not makes_logits(found.node))
        return INT8_BLOCKS if fast else INT16_BLOCKS

    def note(self, match: CpuMatch) -> str:
        return f"{GEMM.name}, {match.linear.quant.bits} bits, x in {FORMS[match.activations]}"


def weights(quant: QuantTensor, path: str) -> list[gs.Tensor]:
    """The constants of a weight: codes, scales as they are stored, zero points unless all are central."""
    source, (n, k) = Strips(quant), quant.shape
    strips = (n // layout.STRIP, quant.groups, layout.STRIP)
    codes = View(source, layout.packed_shape(n, k, quant.bits), np.uint8)
    scales = View(source, strips, stored(quant.scale_dtype), project=scales_of)
    tensors: list[gs.Tensor] = [gs.Constant(f"{path}.strips", codes), gs.Constant(f"{path}.scales", scales)]
    if quant.symmetric:
        return tensors
    dtype = stored(quant.zero_dtype) if quant.has_minima else np.uint8
    return [*tensors, gs.Constant(f"{path}.zeros", View(source, strips, dtype, project=zeros_of))]


def stored(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type that a file holds numbers of `dtype` in, all of which it has."""
    return dtype if dtype in HALF_TYPES else FLOAT32


def gemm(graph: gs.Graph, inputs: list[gs.Tensor], out: gs.Tensor, name: str, attrs: dict[str, int]) -> None:
    """Adds the node."""
    graph.nodes.append(gs.Node(GEMM.name, name, GEMM.attributes(attrs), inputs, [out], domain=DOMAIN))
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(known.domain != DOMAIN for known in domains):
        graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, GEMM.version)]


@dataclass(frozen=True)
class BiasMatch:
    gemm: gs.Node
    add: gs.Node
    bias: gs.Constant


@dataclass(frozen=True)
class FuseCpuBias(Rewrite[BiasMatch]):
    """CpuGemm + Add(constant [N]) -> its bias input."""

    def match(self, node: gs.Node) -> BiasMatch | Reject | None:
        if node.op != "Add":
            return None
        for y, bias in (node.inputs, node.inputs[::-1]):
            made = producer(y, GEMM.name)
            if made is None or not isinstance(bias, gs.Constant) or len(made.inputs) > BIAS:
                continue
            if len(y.outputs) != 1:
                return Reject("another node reads the product without its bias")
            if tuple(bias.shape) != (layout.STRIP * made.inputs[1].shape[0],) or bias.dtype != np.float32:
                return Reject(f"the bias is {np.dtype(bias.dtype)} {tuple(bias.shape)}")
            return BiasMatch(made, node, bias)
        return None

    def rewrite(self, graph: gs.Graph, match: BiasMatch) -> None:
        made = match.gemm
        missing = [gs.Variable.empty()] * (BIAS - len(made.inputs))
        attrs = {attr.name: made.attrs[attr.name] for attr in GEMM.attrs}
        gemm(graph, [*made.inputs, *missing, match.bias], take_over(match.add), made.name, attrs)

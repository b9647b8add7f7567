"""Canonical Q/DQ -> WeightOnlyGemm, the TensorRT plugin: packed codes as they are, exact scales and zero points.

Before: MatMul(x, DequantizeLinear(codes [K, N], scale, zero))
After:  instantrt::WeightOnlyGemm(x, codes in frag16, affine [K / group, 2 N])

Codes are packed tile by tile as they are written; two nodes that share a weight share its packed constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, view_of
from instantrt.passes.core.quant import Codes, QuantTensor
from instantrt.passes.core.rewrite import Lowering, Reject, take_over
from instantrt.passes.qdq.insert_qdq import Quantized, quantized
from instantrt.passes.tensorrt.native import finite, in_range, raised
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP

ROWS = layout.STRIP * layout.TILE_STRIPS


@dataclass(frozen=True)
class Packed:
    """The tiles of one quantized weight, or of a gate and its up projection in strips of eight rows of each.

    Delivers (codes [strips, K blocks, 512] in frag16, affine [G, 2 n] of alternating scales and zeros).
    """

    weights: tuple[QuantTensor, ...]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(w.shape[0] for w in self.weights), self.weights[0].shape[1]

    def tiles(self) -> Iterator[Tile]:
        first = self.weights[0]
        chunks = (rows_by(w, ROWS // len(self.weights)) for w in self.weights)
        for i, parts in enumerate(zip(*chunks, strict=True)):
            blocks = [raised(Codes(*part), w, self.dtype) for part, w in zip(parts, self.weights, strict=True)]
            codes, scale, zero = (interleave(same) for same in zip(*blocks, strict=True))
            scale = in_range(scale, self.dtype, first, i * ROWS)
            if first.has_minima:
                zero = -zero / scale.astype(np.float32)
            zero = finite(zero, self.dtype, first, i * ROWS, "zero point")  # codes fit every 16-bit type
            affine = np.stack((scale, zero), axis=-1)  # [n, G, 2]
            packed = layout.pack(codes, first.bits)
            yield Tile(i * layout.TILE_STRIPS, (packed, affine.transpose(1, 0, 2).reshape(first.groups, -1)))


def rows_by(weight: QuantTensor, count: int) -> Iterator[tuple[Array, ...]]:
    """The weight's parts in chunks of `count` rows; the last may be shorter."""
    held: list[tuple[Array, ...]] = []
    have = 0
    for tile in weight.tiles():
        held.append(tile.parts)
        have += len(tile.parts[0])
        if have >= count:
            whole = tuple(np.concatenate(same) for same in zip(*held, strict=True))
            full = have // count * count
            for at in range(0, full, count):
                yield tuple(part[at : at + count] for part in whole)
            held, have = [tuple(part[full:] for part in whole)], have - full
    if have:
        yield tuple(np.concatenate(same) for same in zip(*held, strict=True))


def interleave(parts: tuple[Array, ...]) -> Array:
    """Eight rows of each in turn, so that one thread of the kernel owns a gate and its up."""
    if len(parts) == 1:
        return parts[0]
    return np.stack([p.reshape(-1, 8, p.shape[1]) for p in parts], axis=1).reshape(-1, parts[0].shape[1])


def weights(graph: gs.Graph, packed: Packed, path: str) -> list[gs.Tensor]:
    """The constants of a packed weight; those of an earlier node that has the same one."""
    for node in graph.nodes:
        if node.op == OP.name and packed_of(node) == packed:
            return list(node.inputs[1:3])
    (n, k), first = packed.shape, packed.weights[0]
    codes = View(packed, layout.packed_shape(n, k, first.bits), np.int8)
    affine = View(packed, (first.groups, 2 * n), packed.dtype, axis=1, project=lambda tile: tile.parts[1])
    return [gs.Constant(f"{path}.packed", codes), gs.Constant(f"{path}.affine", affine)]


def packed_of(node: gs.Node) -> Packed:
    view = view_of(node.inputs[1])
    assert view is not None
    assert isinstance(view.source, Packed)
    return view.source


def gemm(graph: gs.Graph, inputs: list[gs.Tensor], out: gs.Tensor, name: str, attrs: dict[str, int]) -> None:
    """Adds the node. Version and namespace as attributes make TensorRT's ONNX parser look for the plugin."""
    labels = {"plugin_version": str(OP.version), "plugin_namespace": DOMAIN}
    graph.nodes.append(gs.Node(OP.name, name, OP.attributes(attrs) | labels, inputs, [out], domain=DOMAIN))
    domains = list(graph.import_domains or [])
    if all(known.domain != DOMAIN for known in domains):
        graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, OP.version)]


def attributes(node: gs.Node) -> dict[str, int]:
    return {attr.name: node.attrs[attr.name] for attr in OP.attrs}


@dataclass(frozen=True)
class LowerWeightOnlyGemm(Lowering[Quantized]):
    """`dtype` is the compute type; `rounded`: many rows may use weights rounded to it; `batch_invariant`: a row of y
    has the same bits however many rows x has.

    A8W8 by channel is left alone: TensorRT's own int8 product is exact there.
    """

    dtype: np.dtype[Any]
    rounded: bool = False
    batch_invariant: bool = False

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or native_int8(found.quant):
            return None
        (n, k), group, bits = found.quant.shape, found.quant.group_size, found.quant.bits
        sizes = {"N": n, "K": k, "group": group, "bits": bits, "activation_bits": activation_bits(found.quant)}
        wrong = OP.check(sizes)
        return Reject(f"{OP.name}: {wrong}") if wrong else found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        quant, name = match.quant, match.node.name
        attrs = {"bits": quant.bits, "group": quant.group_size, "activation_bits": activation_bits(quant)}
        attrs |= {"rounded_weights": int(self.rounded and quant.activations == "float")}
        attrs |= {"batch_invariant": int(self.batch_invariant)}
        inputs = [match.x, *weights(graph, Packed((quant,), self.dtype), match.path)]
        gemm(graph, inputs, take_over(match.node), name, attrs)

    def note(self, match: Quantized) -> str:
        return f"{OP.name}, minima as zero points in {self.dtype.name}" if match.quant.has_minima else OP.name


def native_int8(quant: QuantTensor) -> bool:
    return quant.activations == "int8" and quant.bits == 8 and quant.per_channel


def activation_bits(quant: QuantTensor) -> int:
    return 8 if quant.activations == "int8" else 16

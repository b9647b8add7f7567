"""The node of a linear on kernels of ours: x, codes as the kernels read them, scales with zero points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, view_of
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import producer
from instantrt.plugins.cpu.op import GEMM
from instantrt.plugins.ops import DOMAIN, OPS
from instantrt.plugins.weight_only_gemm.op import OP as WEIGHT_ONLY_GEMM

GEMMS = {op.name: op for op in (WEIGHT_ONLY_GEMM, GEMM)}
VERSIONS = {op.name: op.version for op in OPS}


@dataclass(frozen=True)
class Packed(ABC):
    """The tiles of one quantized weight, or of a gate and its up projection in strips of eight rows of each."""

    weights: tuple[QuantTensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(w.shape[0] for w in self.weights), self.weights[0].shape[1]

    @property
    @abstractmethod
    def bias_type(self) -> np.dtype[Any]:
        """What a bias has to be to become the node's."""

    @abstractmethod
    def constants(self, path: str) -> list[gs.Tensor]:
        """Codes and affine."""

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """The same, some strips at a time."""

    def beside(self, up: Packed) -> Packed:
        """This gate with its up projection."""
        return replace(self, weights=(*self.weights, *up.weights))


def weights(graph: gs.Graph, packed: Packed, path: str) -> list[gs.Tensor]:
    """The constants of a packed weight; those of an earlier node that has the same one."""
    for node in graph.nodes:
        if node.op in GEMMS and packed_of(node) == packed:
            return list(node.inputs[1:3])
    return packed.constants(path)


def add_ours(
    graph: gs.Graph, op: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], name: str, attrs: Mapping[str, Any]
) -> None:
    """Adds a node of ours."""
    graph.nodes.append(gs.Node(op, name, dict(attrs), inputs, outputs, domain=DOMAIN))
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(known.domain != DOMAIN for known in domains):
        graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, VERSIONS[op])]


def made_by(tensor: gs.Tensor) -> gs.Node | None:
    """The node of ours that makes `tensor`."""
    return next((node for op in GEMMS if (node := producer(tensor, op)) is not None), None)


def attributes(node: gs.Node) -> dict[str, int]:
    return {attr.name: node.attrs[attr.name] for attr in GEMMS[node.op].attrs}


def packed_of(node: gs.Node) -> Packed:
    view = view_of(node.inputs[1])
    assert view is not None
    assert isinstance(view.source, Packed)
    return view.source


def interleave(parts: tuple[Array, ...]) -> Array:
    """Eight rows of each in turn, so that one strip of 16 has gates and their ups."""
    if len(parts) == 1:
        return parts[0]
    return np.stack([p.reshape(-1, 8, p.shape[1]) for p in parts], axis=1).reshape(-1, parts[0].shape[1])

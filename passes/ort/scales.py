"""Scales of quantized weights, and minima, stay in the file in the 16 bits that they are rounded to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, view_of
from instantrt.passes.core.quant import QuantTensor, zeros_of
from instantrt.passes.core.rewrite import Pass, add
from instantrt.passes.ort.tables import HALF_TYPES


@dataclass(frozen=True)
class KeepScalesInHalf(Pass):
    """Op(..., scale float32) -> Op(..., Cast(scale as it is stored)).

    What is float32 of a quantized weight is its scales here, or its `zeros_of`. ONNX Runtime folds the Cast once when
    it loads; equal scales, those of a tied head and its table, are widened once. An operator that reads an unfolded one
    is wrong: docs/facts.md, "MatMulNBits and scales that are no constants".
    """

    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str]]:
        wide: dict[Hashable, gs.Tensor] = {}
        for node in list(graph.nodes):
            for index, tensor in enumerate(node.inputs):
                view = view_of(tensor)
                if view is None or view.dtype != np.float32 or not isinstance(view.source, QuantTensor):
                    continue
                stored = view.source.zero_dtype if view.project is zeros_of else view.source.scale_dtype
                if stored not in HALF_TYPES:
                    continue
                key = view.content, view.shape
                if key not in wide:
                    half = View(view.source, view.shape, stored, axis=view.axis, project=Exactly(view.project, stored))
                    constant = gs.Constant(tensor.name, half)
                    wide[key] = add(graph, "Cast", [constant], f"{tensor.name}/wide", to=onnx.TensorProto.FLOAT)
                    yield tensor.name, stored.name
                node.inputs[index] = wide[key]


@dataclass(frozen=True)
class Exactly:
    """A projection in a type that has all of its values."""

    project: Callable[[Tile], Array]
    dtype: np.dtype[Any]

    def __call__(self, tile: Tile) -> Array:
        wide = self.project(tile)
        narrow = wide.astype(self.dtype)
        assert (narrow == wide).all(), f"rounded before it was {self.dtype}"
        return narrow

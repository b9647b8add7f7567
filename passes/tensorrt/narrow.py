"""Tensors in a type of 16 bits, each cast once; weights that have no place in it are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, Tile, View, convert, small, view_of
from instantrt.passes.core.rewrite import once


def cast_once(graph: gs.Graph, tensor: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
    """`tensor` as `dtype`: a constant of that type, or one Cast for all who ask."""
    if tensor.dtype == dtype:
        return tensor
    name = f"{tensor.name}/{dtype.name}"
    view = view_of(tensor)
    if view is not None:
        project = Narrow(view.project, dtype, tensor.name)
        return gs.Constant(name, View(view.source, view.shape, dtype, axis=view.axis, project=project))
    if isinstance(tensor, gs.Constant):
        return small(name, narrowed(tensor.values, dtype, tensor.name), dtype)
    output = gs.Variable(name, dtype, tensor.shape)
    return once(graph, "Cast", [tensor], output, to=onnx.helper.np_dtype_to_tensor_dtype(dtype))


@dataclass(frozen=True)
class Narrow:
    """A projection whose result is cast to `dtype`, and refused where that would make infinities."""

    project: Callable[[Tile], Array]
    dtype: np.dtype[Any]
    name: str

    def __call__(self, tile: Tile) -> Array:
        return narrowed(self.project(tile), self.dtype, self.name)


def narrowed(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    if values.dtype == dtype:
        return values
    wide = convert(values, FLOAT32)
    limit = float(ml_dtypes.finfo(dtype).max)
    largest = float(np.abs(wide).max(initial=0.0))
    if largest > limit:
        raise UserError(
            f"a weight does not fit {dtype.name}",
            where=name,
            expected=f"at most {limit:.5g}",
            found=f"{largest:.5g}",
            fix="build for a target with bfloat16 (sm80 and newer) from a bfloat16 checkpoint",
        )
    return convert(wide, dtype)

"""RMSNormalization in the operators that TensorRT had before 10.15 (docs/facts.md, "First releases of operators")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, small
from instantrt.passes.core.rewrite import Reject, Rewrite, add, cast, take_over


@dataclass(frozen=True)
class DecomposeRmsNorm(Rewrite[gs.Node]):
    """RMSNormalization(x, scale) -> x / Sqrt(ReduceMean(x * x) + epsilon) * scale, along the last axis.

    Squares of float16 overflow above 255: all but the last product is in float32, as the operator itself has it.
    `dtype` is the type of x and of the result.
    """

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        if node.op != "RMSNormalization":
            return None
        x, axis = node.inputs[0], node.attrs.get("axis", -1)
        if axis != -1 and (x.shape is None or axis != len(x.shape) - 1):
            return Reject("a norm over more than the last axis")
        if node.attrs.get("stash_type", onnx.TensorProto.FLOAT) != onnx.TensorProto.FLOAT:
            return Reject("a norm that does not compute in float32")
        return node

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        out, name = take_over(match), match.name
        x, scale = match.inputs
        narrow = self.dtype != FLOAT32
        if narrow:
            x = cast(graph, x, np.float32, f"{name}/wide")
        square = add(graph, "Mul", [x, x], f"{name}/square")
        axes = small(f"{name}/axes", [-1], np.int64)
        epsilon = small(f"{name}/epsilon", match.attrs.get("epsilon", 1e-5), FLOAT32)
        mean = add(graph, "ReduceMean", [square, axes], f"{name}/mean", keepdims=1)
        raised = add(graph, "Add", [mean, epsilon], f"{name}/raised")
        rms = add(graph, "Sqrt", [raised], f"{name}/rms")
        unit = add(graph, "Div", [x, rms], f"{name}/unit")
        if narrow:
            unit = cast(graph, unit, self.dtype, f"{name}/narrow")
        add(graph, "Mul", [unit, scale], out, name=name)

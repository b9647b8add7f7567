"""Masks of the lowest float32, as exporters write them, in a range that 16-bit types hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32
from instantrt.passes.core.rewrite import Reject, Rewrite


@dataclass(frozen=True)
class ClampMatch:
    node: gs.Node
    index: int
    value: float


@dataclass(frozen=True)
class ClampMask(Rewrite[ClampMatch]):
    """The lowest float32, or minus infinity, as what a mask adds -> half the lowest of `dtype`.

    Half, so that two masks may be added. A row that sees nothing then averages, where infinities would make it NaN,
    and NaN spreads: a later row multiplies it by zero.
    """

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> ClampMatch | Reject | None:
        limit = float(ml_dtypes.finfo(self.dtype).max)
        for index, tensor in enumerate(node.inputs):
            # Shape before values: asking a lazy constant for its values would load it.
            if not isinstance(tensor, gs.Constant) or tensor.dtype != FLOAT32 or np.prod(tensor.shape) != 1:
                continue
            value = float(tensor.values.reshape(()))
            if abs(value) > limit:
                return ClampMatch(node, index, float(np.copysign(limit / 2, value)))
        return None

    def rewrite(self, graph: gs.Graph, match: ClampMatch) -> None:  # noqa: ARG002
        old = match.node.inputs[match.index]
        values = np.full(old.shape, match.value, FLOAT32)
        match.node.inputs[match.index] = gs.Constant(f"{old.name}/clamped", values)

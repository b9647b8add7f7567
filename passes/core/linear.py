"""The normal form of a linear layer: MatMul(x, W [K, N]) whose constant is a `LinearWeight`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Source, View, view_of
from instantrt.passes.core.rewrite import producer

NORMS = frozenset(("LayerNormalization", "RMSNormalization"))
SUFFIX = ".weight_kn"  # the checkpoint's own name belongs to its own [N, K]


class LinearWeight(View):
    """W [N, K], delivered as rows, as a float32 constant [K, N]: what marks a linear in normal form."""

    def __init__(self, rows: Source, shape: tuple[int, int]) -> None:
        super().__init__(rows, shape[::-1], np.float32, axis=1, project=lambda tile: tile.parts[0].T)


@dataclass(frozen=True)
class Linear:
    """y [..., N] = x [..., K] @ W[N, K]^T, found in normal form.

    `rows` delivers W's rows `[n, K]` in the type they are stored in; `path` is the module's path.
    """

    node: gs.Node
    x: gs.Tensor
    rows: Source
    shape: tuple[int, int]
    path: str


def weight_constant(path: str, rows: Source, shape: tuple[int, int]) -> gs.Constant:
    """The constant [K, N] of the linear at `path`."""
    return gs.Constant(path + SUFFIX, LinearWeight(rows, shape))


def linear(node: gs.Node) -> Linear | None:
    """The linear that this node is, if it is one in normal form."""
    weight = view_of(node.inputs[1]) if node.op == "MatMul" else None
    if not isinstance(weight, LinearWeight):
        return None
    k, n = weight.shape
    return Linear(node, node.inputs[0], weight.source, (n, k), node.inputs[1].name.removesuffix(SUFFIX))


def bias_behind(product: gs.Node, outputs: int) -> tuple[gs.Node, int] | None:
    """(the Add of a constant [N], which of its inputs that is) where nothing else reads a linear's product."""
    users = product.outputs[0].outputs
    if len(users) != 1 or users[0].op != "Add":
        return None
    found = (i for i, t in enumerate(users[0].inputs) if isinstance(t, gs.Constant) and tuple(t.shape) == (outputs,))
    return next(((users[0], index) for index in found), None)


def weight_dequantize(weight: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that makes a linear's weight; minima are an Add behind it, and a Reshape."""
    shaped = producer(weight, "Reshape")
    shifted = producer(shaped.inputs[0], "Add") if shaped is not None else None
    return producer(weight if shifted is None else shifted.inputs[0], "DequantizeLinear")

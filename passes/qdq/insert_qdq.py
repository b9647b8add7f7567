"""FLOAT -> canonical Q/DQ: plain ONNX that states the quantization, and that ONNX Runtime runs as it is (the twin)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, first_part, small, view_of
from instantrt.passes.core.linear import Linear, linear, weight_dequantize
from instantrt.passes.core.quant import QuantTensor, scales_of, zeros_of
from instantrt.passes.core.rewrite import Reject, Rewrite, add, producer
from instantrt.passes.core.verify import activations_are_float, weight_dq_feeds_matmul

CODE_TYPES = {8: np.dtype(np.uint8), 4: np.dtype(ml_dtypes.uint4)}
Decisions = Mapping[str, QuantTensor | Reject]  # module path -> how to quantize it, or why not


@dataclass(frozen=True)
class QuantizeMatch:
    linear: Linear
    quant: QuantTensor


@dataclass(frozen=True)
class InsertDequantize(Rewrite[QuantizeMatch]):
    """MatMul(x, W [K, N]) -> MatMul(x, DequantizeLinear(codes [K, N], scale, zero)).

    Per channel: axis = 1, scale and zero [N]. In groups: axis = 0, block_size = group_size, scale and zero [K / g, N].
    Minima, which the operator has not, are added: Reshape(DequantizeLinear(codes [G, g, N], scale) + minimum).
    """

    requires = (activations_are_float,)
    ensures = (weight_dq_feeds_matmul,)

    decisions: Decisions
    made: dict[str, gs.Tensor] = field(default_factory=dict, repr=False, compare=False)  # in a run, by path

    def for_graph(self, graph: gs.Graph) -> InsertDequantize:  # noqa: ARG002
        return InsertDequantize(self.decisions)

    def match(self, node: gs.Node) -> QuantizeMatch | Reject | None:
        found = linear(node)
        if found is None:
            if node.op == "MatMul" and any(isinstance(t, gs.Constant) for t in node.inputs):
                return Reject("not a linear layer in normal form")
            return None
        decision = self.decisions.get(found.path, Reject("no quantization parameters for this layer"))
        if isinstance(decision, Reject):
            return decision
        assert decision.shape == found.shape, f"{found.path}: {decision.shape} is not {found.shape}"
        return QuantizeMatch(found, decision)

    def rewrite(self, graph: gs.Graph, match: QuantizeMatch) -> None:
        q, node, path = match.quant, match.linear.node, match.linear.path
        if path not in self.made:  # a module may be used several times
            self.made[path] = dequantized(graph, q, path)
        node.inputs[1] = self.made[path]

    def note(self, match: QuantizeMatch) -> str:
        return str(match.quant)


def dequantized(graph: gs.Graph, q: QuantTensor, path: str) -> gs.Tensor:
    """Adds the DequantizeLinear of a weight, in canonical form; its output is `[K, N]`."""
    (n, k), code_type = q.shape, CODE_TYPES[q.bits]
    if q.has_minima:
        return dequantized_with_minima(graph, q, path)
    per_group = (q.groups, n)
    codes = gs.Constant(f"{path}.codes", View(q, (k, n), code_type, axis=1, project=lambda tile: tile.parts[0].T))
    scale = View(q, per_group, np.float32, axis=1, project=lambda tile: tile.parts[1].T)
    zero = View(q, per_group, code_type, axis=1, project=lambda tile: tile.parts[2].T)
    attrs: dict[str, Any] = {"axis": 0, "block_size": q.group_size}
    if q.per_channel:
        scale = View(q, (n,), np.float32, project=lambda tile: tile.parts[1][:, 0])
        zero = View(q, (n,), code_type, project=lambda tile: tile.parts[2][:, 0])
        attrs = {"axis": 1}
    inputs = [codes, gs.Constant(f"{path}.scale", scale), gs.Constant(f"{path}.zero", zero)]
    return add(graph, "DequantizeLinear", inputs, f"{path}.dequantized", **attrs)


def dequantized_with_minima(graph: gs.Graph, q: QuantTensor, path: str) -> gs.Tensor:
    """The same with minima: code * scale + minimum."""
    n, k = q.shape
    codes = gs.Constant(f"{path}.codes", by_group(q, q.group_size, CODE_TYPES[q.bits], first_part))
    scale = gs.Constant(f"{path}.scale", by_group(q, 1, np.float32, scales_of))
    minimum = gs.Constant(f"{path}.minimum", by_group(q, 1, np.float32, zeros_of))
    blocks: dict[str, Any] = {"axis": 1, "block_size": q.group_size}
    steps = add(graph, "DequantizeLinear", [codes, scale], f"{path}.steps", **blocks)
    weight = add(graph, "Add", [steps, minimum], f"{path}.shifted")
    return add(graph, "Reshape", [weight, small(f"{path}.kn", [k, n], np.int64)], f"{path}.dequantized")


def by_group(q: QuantTensor, rows: int, dtype: npt.DTypeLike, values: Callable[[Tile], Array]) -> View:
    """`values` [n, G * rows] of each tile as a constant [G, rows, N]."""

    def project(tile: Tile) -> Array:
        return values(tile).T.reshape(q.groups, rows, -1)

    return View(q, (q.groups, rows, q.shape[0]), dtype, axis=2, project=project)


@dataclass(frozen=True)
class Quantized:
    """A linear layer in canonical Q/DQ form.

    `x` is the float input, before activation Q/DQ where there is one; `path` names what a lowering makes of this layer.
    """

    node: gs.Node
    x: gs.Tensor
    quant: QuantTensor
    path: str


def quantized(node: gs.Node) -> Quantized | None:
    """The quantized linear that this MatMul is, if it is one."""
    dq = weight_dequantize(node.inputs[1]) if node.op == "MatMul" else None
    codes = view_of(dq.inputs[0]) if dq is not None else None
    if dq is None or codes is None or not isinstance(codes.source, QuantTensor):
        return None
    if codes.dtype != CODE_TYPES[codes.source.bits]:  # a lowering has made them signed
        return None
    return Quantized(node, float_input(node.inputs[0]), codes.source, node.name)


def float_input(x: gs.Tensor) -> gs.Tensor:
    """x, or what was quantized per token into it."""
    dq = producer(x, "DequantizeLinear")
    q = producer(dq.inputs[0], "QuantizeLinear") if dq is not None else None
    return q.inputs[0] if q is not None else x

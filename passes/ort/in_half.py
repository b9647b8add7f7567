"""What stays float in an artifact for ONNX Runtime keeps its 16 bits in the file: tables, linears, scales, minima."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import BFLOAT16, Array, FileTensor, Source, Tile, View, view_of
from instantrt.passes.core.linear import Linear, linear
from instantrt.passes.core.quant import QuantTensor, zeros_of
from instantrt.passes.core.rewrite import Pass, Reject, Rewrite, add, cast, take_over

HALF_TYPES = {np.dtype(np.float16): onnx.TensorProto.FLOAT16, BFLOAT16: onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class TableMatch:
    node: gs.Node
    table: gs.Constant
    stored: FileTensor


@dataclass(frozen=True)
class KeepTablesInHalf(Rewrite[TableMatch]):
    """Gather(table float32) -> Cast(Gather(table as stored)): a 16-bit embedding keeps its bytes.

    What else reads the table reads it as it was.
    """

    halves: dict[Source, gs.Constant] = field(default_factory=dict, repr=False, compare=False)  # of a run's graph

    def for_graph(self, graph: gs.Graph) -> KeepTablesInHalf:  # noqa: ARG002
        return KeepTablesInHalf()

    def match(self, node: gs.Node) -> TableMatch | Reject | None:
        view = view_of(node.inputs[0]) if node.op == "Gather" else None
        if view is None or view.dtype != np.float32 or not isinstance(view.source, FileTensor):
            return None
        if view.source.dtype not in HALF_TYPES or view.source.shape != view.shape:
            return Reject("the table is not stored in 16 bits")
        return TableMatch(node, node.inputs[0], view.source)

    def rewrite(self, graph: gs.Graph, match: TableMatch) -> None:
        half = gs.Constant(f"{match.table.name}_half", View(match.stored, match.stored.shape, match.stored.dtype))
        match.node.inputs[0] = self.halves.setdefault(match.stored, half)
        out = take_over(match.node)
        taken = gs.Variable(f"{out.name}/half", HALF_TYPES[match.stored.dtype], out.shape)
        match.node.outputs.append(taken)
        cast(graph, taken, np.float32, out)


@dataclass(frozen=True)
class FloatLinearMatch:
    linear: Linear
    stored: FileTensor


@dataclass(frozen=True)
class KeepFloatLinearsInHalf(Rewrite[FloatLinearMatch]):
    """MatMul(x, W float32) -> MatMul(x, Cast(W as stored)) for linears left float; a tied head shares the embedding.

    ONNX Runtime folds the Cast once when it loads; the file stays half as large. What two products read has one Cast.
    """

    tables: Mapping[Source, gs.Tensor] = field(default_factory=dict, repr=False, compare=False)  # of a run's graph
    wide: dict[Source, gs.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def for_graph(self, graph: gs.Graph) -> KeepFloatLinearsInHalf:
        tables: dict[Source, gs.Tensor] = {}
        for tensor in graph.tensors().values():
            view = view_of(tensor)
            if view is not None and view.as_stored:  # as an embedding is, and no linear's [K, N] view
                tables.setdefault(view.source, tensor)
        return KeepFloatLinearsInHalf(tables)

    def match(self, node: gs.Node) -> FloatLinearMatch | Reject | None:
        found = linear(node)
        if found is None:
            return None
        if not isinstance(found.rows, FileTensor) or found.rows.dtype not in HALF_TYPES:
            return Reject("the matrix is not stored in 16 bits, row by row")
        return FloatLinearMatch(found, found.rows)

    def rewrite(self, graph: gs.Graph, match: FloatLinearMatch) -> None:
        stored = match.stored
        if stored not in self.wide:
            self.wide[stored] = self.widened(graph, stored, match.linear.path)
        match.linear.node.inputs[1] = self.wide[stored]

    def widened(self, graph: gs.Graph, stored: FileTensor, path: str) -> gs.Tensor:
        tied = self.tables.get(stored)
        if tied is not None:
            half = add(graph, "Transpose", [tied], f"{path}/tied", perm=[1, 0])
        else:
            k_n = View(stored, stored.shape[::-1], stored.dtype, axis=1, project=lambda t: t.parts[0].T)
            half = gs.Constant(f"{path}.weight_half", k_n)
        return cast(graph, half, np.float32, f"{path}/weight")


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
                    wide[key] = cast(graph, constant, np.float32, f"{tensor.name}/wide")
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

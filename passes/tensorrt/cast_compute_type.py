"""A float32 graph -> one that computes in float16 or bfloat16, as strongly typed TensorRT wants it.

What derives from integers alone (rotary angles, masks) stays float32 and is cast where it meets hidden states; squares,
means and roots, of which norms are made, stay float32 too. Caches become the compute type; every other input and
output keeps float32, so that the interface is the same on all targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32
from instantrt.passes.core.names import PAST, PRESENT
from instantrt.passes.core.rewrite import Pass, Reject, Rewrite, cast
from instantrt.passes.tensorrt.clamp_mask import ClampMask
from instantrt.passes.tensorrt.narrow import cast_once

WIDE = {"Pow", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal"}
CACHES = (PAST, PRESENT)


def cast_compute_type(dtype: np.dtype[Any]) -> tuple[Pass, ...]:
    """The passes that bring a graph to `dtype`; float32 is what it has."""
    if dtype == FLOAT32:
        return ()
    return NarrowInputs(dtype), ClampMask(dtype), CastComputeType(dtype), WidenForBranches(dtype), WidenOutputs()


@dataclass(frozen=True)
class NarrowInputs(Pass):
    """A float32 input x -> Cast(x) for all who read it; a cache has the compute type itself."""

    dtype: np.dtype[Any]

    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str | Reject]]:
        for tensor in graph.inputs:
            if tensor.dtype != FLOAT32:
                continue
            if tensor.name.startswith(CACHES):
                tensor.dtype = self.dtype
            else:
                consumers = list(tensor.outputs)
                narrow = cast_once(graph, tensor, self.dtype)
                for node in consumers:
                    node.inputs = [narrow if t is tensor else t for t in node.inputs]
            yield tensor.name, self.dtype.name


class WidenOutputs(Pass):
    """An output y of 16 bits -> Cast(y) to float32 under its name; caches stay."""

    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str | Reject]]:
        for index, tensor in enumerate(graph.outputs):
            if tensor.name.startswith(CACHES) or tensor.dtype.kind in "iub" or tensor.dtype == FLOAT32:
                continue
            name, tensor.name = tensor.name, f"{tensor.name}/{tensor.dtype.name}"
            graph.outputs[index] = gs.Variable(name, FLOAT32, tensor.shape)
            # Named neither after its output, as the node that made the output may be, nor as `cast_once` names its own.
            cast(graph, tensor, np.float32, graph.outputs[index], name=f"{name}/interface")
            yield name, FLOAT32.name


@dataclass(frozen=True)
class CastMatch:
    """`node` computes in `dtype`: its float inputs `indices` are to have it, its float outputs will."""

    node: gs.Node
    dtype: np.dtype[Any]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class CastComputeType(Rewrite[CastMatch]):
    """A node that reads hidden states in `dtype`, or makes them of a weight -> the same with all its floats in `dtype`.

    Each node sees the types that the nodes before it were given.
    """

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> CastMatch | Reject | None:
        if next(node.subgraphs(), None) is not None:
            return Reject("a node with subgraphs keeps float32")
        floats = tuple(i for i, t in enumerate(node.inputs) if t.dtype in (FLOAT32, self.dtype))
        hidden = any(t.dtype == self.dtype and not isinstance(t, gs.Constant) for t in node.inputs)
        if not hidden and not is_weight_reader(node):
            return None
        wide = node.op in WIDE or not (node.domain or takes(node.op, self.dtype))
        return CastMatch(node, FLOAT32 if wide else self.dtype, floats)

    def rewrite(self, graph: gs.Graph, match: CastMatch) -> None:
        node, dtype = match.node, match.dtype
        for index in match.indices:
            node.inputs[index] = cast_once(graph, node.inputs[index], dtype)
        if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT:
            node.attrs["to"] = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        for index, output in enumerate(node.outputs):
            if output.dtype == FLOAT32 or (output.dtype is None and gives_floats(node.op, index)):
                output.dtype = dtype

    def note(self, match: CastMatch) -> str:
        return match.dtype.name


@dataclass(frozen=True)
class WidenForBranches(Rewrite[list[gs.Node]]):
    """What a node with subgraphs takes from the graph around it becomes float32 again, in which these compute."""

    dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> list[gs.Node] | Reject | None:
        inner = [n for graph in node.subgraphs(recursive=True) for n in graph.nodes]
        readers = [node, *inner] if inner else []
        return [n for n in readers if any(t.dtype == self.dtype for t in n.inputs)] or None

    def rewrite(self, graph: gs.Graph, match: list[gs.Node]) -> None:
        for node in match:
            node.inputs = [cast_once(graph, t, FLOAT32) if t.dtype == self.dtype else t for t in node.inputs]


@cache
def takes(op: str, dtype: np.dtype[Any]) -> bool:
    """Does ONNX allow `dtype` wherever the operator may read float32? NonMaxSuppression, say, has float32 alone."""
    if not onnx.defs.has(op):
        return True
    kinds = [formal.types for formal in onnx.defs.get_schema(op).inputs]
    return all(f"tensor({dtype.name})" in kind for kind in kinds if "tensor(float)" in kind)


@cache
def gives_floats(op: str, index: int) -> bool:
    """May an output of the operator be of floats? Sizes and comparisons are not, whatever type a pass left open."""
    if not onnx.defs.has(op):
        return True
    outputs = onnx.defs.get_schema(op).outputs
    return "tensor(float)" in outputs[min(index, len(outputs) - 1)].types


def is_weight_reader(node: gs.Node) -> bool:
    """Hidden states begin here: an embedding table, or a dequantized weight or cache."""
    table = node.op == "Gather" and isinstance(node.inputs[0], gs.Constant) and len(node.inputs[0].shape) > 1
    return table or node.op == "DequantizeLinear"

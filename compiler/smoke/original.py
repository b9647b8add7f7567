"""What must be known of the .onnx file that was given: its arithmetic, and whether it draws random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from instantrt.compiler.accuracy.bounds import BFLOAT16, FLOAT16, FLOAT32, Bound
from instantrt.passes.core.subgraphs import graphs

NARROW = {TensorProto.FLOAT16: FLOAT16, TensorProto.BFLOAT16: BFLOAT16}
DRAWS = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def arithmetic(model: Path) -> Bound:
    """What the file's own arithmetic explains."""
    proto = onnx.load_model(model, load_external_data=False)
    kinds = {kind for graph in graphs(proto.graph) for kind in types_in(graph)}
    return next((bound for kind, bound in reversed(NARROW.items()) if kind in kinds), FLOAT32)


def types_in(graph: onnx.GraphProto) -> Iterator[int]:
    yield from (tensor.data_type for tensor in graph.initializer)
    yield from (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info))
    yield from (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")


def draws(graph: gs.Graph) -> str:
    """The operator that makes every run another one; "" where none does."""
    every: Iterable[gs.Graph] = (graph, *graph.subgraphs(recursive=True))
    nodes = (node for each in every for node in each.nodes)
    return next((n.op for n in nodes if n.op in DRAWS or (n.op == "Dropout" and len(n.inputs) > 2)), "")

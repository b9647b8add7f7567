"""The .onnx file that was given, as it is: at its own opset, in its own types, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from instantrt.compiler.accuracy.bounds import BFLOAT16, FLOAT16, FLOAT32, Bound
from instantrt.compiler.smoke.process import Answers, ModelOrder
from instantrt.compiler.smoke.steps import Call
from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.subgraphs import graphs

PREFIX = "original "
NARROW = {TensorProto.FLOAT16: FLOAT16, TensorProto.BFLOAT16: BFLOAT16}
DRAWS = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def order(model: Path, steps: Sequence[Call], *, attempts: bool) -> ModelOrder:
    calls = tuple((PREFIX + step.name, PREFIX + step.after if step.after else "") for step in steps)
    return ModelOrder(str(model), calls, attempts=attempts)


def in_its_types(model: Path, steps: Sequence[Call]) -> list[Call]:
    """The steps with the inputs that the file declares; what was compiled takes float32 for every narrow float."""
    declared = onnx.load_model(model, load_external_data=False).graph.input
    types = {i.name: numpy_type(i.type.tensor_type.elem_type) for i in declared if i.type.tensor_type.elem_type}
    return [
        replace(
            step,
            name=PREFIX + step.name,
            feeds={n: v.astype(types[n], copy=False) if v.dtype.kind == "f" else v for n, v in step.feeds.items()},
        )
        for step in steps
    ]


def by_step(answers: Answers) -> Answers:
    return {step.removeprefix(PREFIX): outputs for step, outputs in answers.items()}


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

"""The .onnx file that was given, as ONNX Runtime runs it: is what was compiled the same?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from instantrt.compiler.accuracy.bisect import AS_ROUGH
from instantrt.compiler.accuracy.bounds import BFLOAT16, FLOAT16, FLOAT32, Bound
from instantrt.compiler.smoke.ask import Heard
from instantrt.compiler.smoke.compare import distances
from instantrt.compiler.smoke.explain import roughness
from instantrt.compiler.smoke.ran import SmokeError, ort_version
from instantrt.compiler.smoke.subject import Staged
from instantrt.passes.core.errors import first_line
from instantrt.passes.core.subgraphs import every_node, graphs

NARROW = {TensorProto.FLOAT16: FLOAT16, TensorProto.BFLOAT16: BFLOAT16}
DRAWS = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def check_original(subject: Staged, heard: Heard) -> tuple[str, ...]:
    """Is what was compiled the graph of the .onnx file? A note where ONNX Runtime cannot say so."""
    if heard.original is None or subject.original is None:
        return ()
    if heard.original.failed:
        why = first_line(heard.original.failed)
        return (f"the .onnx file itself was not run: ONNX Runtime {ort_version()}: {why}",)
    read, bound = subject.references[-1], arithmetic(subject.original)
    expected = heard.references[read]
    wrong = [d for d in distances(heard.original.answers, expected, heard.steps) if not d.within(bound.model)]
    rough = roughness(read.graph, expected, heard.steps) if wrong else {}
    for each in wrong:
        if not each.relative <= AS_ROUGH * rough.get((each.step, each.output), 0.0):
            raise SmokeError(
                "what was compiled does not compute what the .onnx file does",
                where=str(subject.original),
                expected=f"its outputs by ONNX Runtime {ort_version()}, within {bound.model:.0e} ({bound.name})",
                found=each.found(),
                fix="export it at a newer opset; please report this with the file",
            )
    return ()


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
    return next((n.op for n in every_node(graph) if n.op in DRAWS or (n.op == "Dropout" and len(n.inputs) > 2)), "")

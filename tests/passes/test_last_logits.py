"""The logits of each row's own last token, padded on either side, in caches that grow and caches in one buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.artifact.positions import every_position
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.lazy import InMemory
from instantrt.passes.core.linear import SUFFIX, LinearWeight
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.attention import attention
from instantrt.passes.qdq.last_logits import LAST, LastLogits, head_linears
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from tests.graphs import evaluate

Array = npt.NDArray[Any]
B, S, P, M = 3, 6, 4, 16
LENGTHS = np.array([6, 2, 4])  # of S new tokens
GRAPHS = ("grows", "group query attention", "scatter")


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request: pytest.FixtureRequest, tiny_float: FloatModel) -> gs.Graph:
    graph = tiny_float.graph.copy()
    if request.param == "scatter":
        return run(graph, kv_in_place(M), PassLog())
    return run(graph, attention(), PassLog()) if request.param == "group query attention" else graph


def feeds(graph: gs.Graph, mask: Array, past: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    buffer = past if is_growing(graph) else M
    return {
        "input_ids": random.integers(1, 4000, (len(mask), S)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + S), (len(mask), 1)),
        **{
            t.name: random.standard_normal((len(mask), t.shape[1], buffer, t.shape[3])).astype(np.float32)
            for t in graph.inputs[3:]
        },
    }


def is_growing(graph: gs.Graph) -> bool:
    return graph.outputs[1].inputs[0].op == "Concat"


def columns(graph: gs.Graph, fed: dict[str, Array], folder: Path) -> list[int]:
    """Which of all logits each row's last ones are."""
    every = evaluate(graph.copy(), fed, folder)[0]
    last = evaluate(run(graph.copy(), [LastLogits(by_mask=True)], PassLog()), fed, folder)[0]
    assert last.shape == (len(every), 1, every.shape[2])
    error = np.abs(every - last).max(axis=2)
    assert (error.min(axis=1) < 1e-4).all()
    return [int(row.argmin()) for row in error]


def right(width: int, past: int = 0) -> Array:
    return (np.arange(width) < past + LENGTHS[:, None]).astype(np.int64)


def test_rows_padded_on_either_side(graph: gs.Graph, tmp_path: Path) -> None:
    assert columns(graph, feeds(graph, right(S), 0), tmp_path) == [5, 1, 3]
    assert columns(graph, feeds(graph, right(S)[:, ::-1], 0), tmp_path) == [5, 5, 5]


def test_what_comes_before(graph: gs.Graph, tmp_path: Path) -> None:
    """A past of four tokens: where it grows rows may be padded behind it, in one buffer the mask may be as long."""
    if is_growing(graph):
        assert columns(graph, feeds(graph, right(P + S, P), P), tmp_path) == [5, 1, 3]
    rows = 1 if graph.outputs[1].inputs[0].op == "GroupQueryAttention" else B  # more it takes without a past
    whole = np.ones((rows, P + S), np.int64)
    assert columns(graph, feeds(graph, whole, P), tmp_path) == [5] * rows
    if not is_growing(graph):
        longer = np.pad(whole, ((0, 0), (0, M - P - S)))
        assert columns(graph, feeds(graph, longer, P), tmp_path) == [5] * rows


@pytest.mark.parametrize("target", ["x86", "sm89"])
def test_a_classifier_of_tokens_keeps_the_logits_of_all(target: str, tmp_path: Path) -> None:
    """An output of that name is a causal LM's only where there is a cache."""
    x, y = (gs.Variable(name, np.dtype(np.float32), ["batch", "sequence", 8]) for name in ("x", "logits"))
    weight = gs.Constant("w", np.eye(8, dtype=np.float32))
    graph = gs.Graph([gs.Node("MatMul", "head", {}, [x, weight], [y])], [x], [y], opset=23)
    request = Request(model=tmp_path, targets=(target,), out=tmp_path)
    row = find_target(target)
    if target == "x86":
        lowered = pipeline.lower_onnxruntime(graph, row, request, PassLog())
    else:
        lowered = pipeline.lower_tensorrt(graph, row, np.dtype(np.float16), request, request.engine_limits(), PassLog())
    assert list(lowered.outputs[0].shape) == ["batch", "sequence", 8]


def ends_in(nodes: str) -> gs.Graph:
    """A graph in ONNX's text syntax from x [b, s, 64] to the logits [b, s, 16], its linears in normal form."""
    head = '<ir_version: 10, opset_import: ["": 23]> g (float[b,s,64] x) => (float[b,s,16] logits)'
    weights = (
        'float[64,16] "head.weight_kn", float[64,16] "side.weight_kn", float[64,64] "up.weight_kn", float[16] bias'
    )
    graph = gs.import_onnx(onnx.parser.parse_model(f"{head} <{weights}> {{ {nodes} }}"))
    for name, tensor in graph.tensors().items():
        if name.endswith(SUFFIX):
            rows = np.random.default_rng(0).standard_normal(tensor.shape[::-1]).astype(np.float32)
            tensor.to_constant(LinearWeight(InMemory(rows), rows.shape))
        elif name == "bias":
            tensor.to_constant(np.arange(16, dtype=np.float32))
    return graph


HEAD = '[up] u = MatMul(x, "up.weight_kn") [head] y = MatMul(u, "head.weight_kn")'


@pytest.mark.parametrize(
    ("nodes", "heads"),
    [
        (f"{HEAD} logits = Identity(y)", ["head"]),
        (f"{HEAD} z = Add(y, bias) t = Tanh(z) logits = Mul(t, bias)", ["head"]),
        (f"{HEAD} t = Transpose<perm=[1,0,2]>(y) logits = Transpose<perm=[1,0,2]>(t)", ["head"]),
        (f'{HEAD} [side] z = MatMul(x, "side.weight_kn") logits = Add(y, z)', ["head", "side"]),
        (f'{HEAD} [side] z = MatMul(x, "side.weight_kn") logits = Concat<axis=2>(y, z)', ["head", "side"]),
        (f"{HEAD} logits = LogSoftmax(y)", ["head"]),
        (f"{HEAD} logits = Relu(y)", []),
    ],
)
def test_the_head_is_what_the_logits_come_from(nodes: str, heads: list[str]) -> None:
    """Not what is as wide as they are: `side` is, and `up` is nearer to the end of the list of nodes."""
    unread = '[side2] unread = MatMul(x, "side.weight_kn")'
    assert sorted(found.path for found in head_linears(ends_in(f"{nodes} {unread}"))) == heads


def test_a_sum_of_two_products_is_left_whole() -> None:
    """One of the two for the last position alone would be added to each of the other's."""
    graph = ends_in(f'{HEAD} [side] z = MatMul(x, "side.weight_kn") logits = Add(y, z)')
    run(graph, [LastLogits()], PassLog())
    assert "Slice" not in {node.op for node in graph.nodes}
    run(cut := ends_in(f"{HEAD} logits = Add(y, bias)"), [LastLogits()], PassLog())
    assert "Slice" in {node.op for node in cut.nodes}


def test_an_artifact_of_the_last_has_all_again(tiny_float: FloatModel, tmp_path: Path) -> None:
    request = Request(model=tmp_path, targets=("x86",), out=tmp_path)
    fed = feeds(tiny_float.graph, right(S), 0)
    every = evaluate(tiny_float.graph.copy(), fed, tmp_path)[0]
    lowered = pipeline.lower_onnxruntime(tiny_float.graph.copy(), find_target("x86"), request, PassLog())
    write_model(lowered, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert LAST in {node.name for node in model.graph.node}
    onnx.save(every_position(model), tmp_path / "every.onnx")
    back = onnx.load(tmp_path / "every.onnx")
    onnx.checker.check_model(back.graph.output[0].name and back)
    again = gs.import_onnx(back)
    assert list(again.outputs[0].shape) == ["batch", "sequence", 4096]
    got = evaluate(again, fed, tmp_path)[0]
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :n], every[row, :n], rtol=1e-3, atol=1e-3)

"""Linears that read one input become one product, with every code, scale and output what it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.qdq.insert_qdq import quantized
from instantrt.passes.qdq.join_linears import JoinLinears, join_paths, parts_of
from tests.graphs import FLOAT32, evaluate, linear_graph, quantize, relative

K = 64
ROWS = {"a.q": 48, "a.k": 16, "a.v": 24}


def weights(rows: Mapping[str, int] = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal((n, K)).astype(np.float32) + 0.1 for path, n in rows.items()}


def with_biases(graph: gs.Graph, paths: list[str]) -> gs.Graph:
    for i, path in enumerate(paths):
        (node,) = (n for n in graph.nodes if n.name == path)
        y, n = node.outputs[0], node.outputs[0].shape[-1]
        node.outputs[0] = gs.Variable(f"{path}.product", FLOAT32, y.shape)
        bias = gs.Constant(f"{path}.bias", np.linspace(i, i + 1, n, dtype=np.float32))
        graph.nodes.append(gs.Node("Add", f"{path}/add", {}, [node.outputs[0], bias], [y]))
    return graph.toposort()


def joined(graph: gs.Graph, *, gated: bool = True) -> list[str]:
    log = PassLog()
    run(graph, [JoinLinears(gated)], log)
    verify(graph, Stage.QDQ)
    return [entry.done for entry in log.applied(JoinLinears)]


@pytest.mark.parametrize("biased", [(), ("a.q", "a.k", "a.v"), ("a.q", "a.v")])
@pytest.mark.parametrize(
    ("bits", "group", "activations"), [(4, 32, "float"), (4, -1, "float"), (8, -1, "float"), (8, -1, "int8")]
)
def test_one_product_gives_what_three_gave(
    bits: int, group: int, activations: str, biased: tuple[str, ...], tmp_path: Path
) -> None:
    w = weights()
    graph = quantize(
        with_biases(linear_graph(w), list(biased)), w, bits=bits, group_size=group, activations=activations
    )  # type: ignore[arg-type]
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, K)).astype(np.float32)}
    want = evaluate(graph.copy(), feeds, tmp_path)
    parts = [found.quant for node in graph.nodes if (found := quantized(node)) is not None]
    assert joined(graph) == ["a.(q+k+v)"]
    (whole,) = (found for node in graph.nodes if (found := quantized(node)) is not None)
    for j in range(3):  # codes, scales, zero points
        rows = [np.concatenate([tile.parts[j] for tile in q.tiles()]) for q in (whole.quant, *parts)]
        np.testing.assert_array_equal(rows[0], np.concatenate(rows[1:]))
    starts = [tile.start for tile in whole.quant.tiles()]
    assert starts == sorted(set(starts))
    got = evaluate(graph, feeds, tmp_path)
    assert [t.name for t in graph.outputs] == ["y.a.q", "y.a.k", "y.a.v"]
    for y, expected in zip(got, want, strict=True):
        assert relative(y, expected) <= 1e-6
    adds = 1 if len(biased) == 3 else len(biased)
    assert sum(node.op == "Add" for node in graph.nodes) == adds


def test_formats_that_differ_stay_apart() -> None:
    w = weights()
    four = {path: w[path] for path in ("a.q", "a.k")}
    graph = linear_graph(w)
    quantize(graph, four, bits=4, group_size=32)
    quantize(graph, {"a.v": w["a.v"]}, bits=8)
    assert joined(graph) == ["a.(q+k)"]
    assert {node.name for node in graph.nodes if quantized(node)} == {"a.(q+k)", "a.v"}


def test_inputs_that_differ_stay_apart() -> None:
    w = weights()
    assert joined(quantize(linear_graph(w, share_input=False), w, bits=4, group_size=32)) == []


def test_a_weight_that_another_product_reads_is_not_copied() -> None:
    w = weights()
    graph = quantize(linear_graph(w), w, bits=4, group_size=32)
    (q,) = (n for n in graph.nodes if n.name == "a.q")
    other, y = gs.Variable("x2", FLOAT32, ["b", "s", K]), gs.Variable("y2", FLOAT32)
    graph.nodes.append(gs.Node("MatMul", "a.q#2", {}, [other, q.inputs[1]], [y]))
    graph.inputs.append(other)
    graph.outputs.append(y)
    assert joined(graph) == ["a.(k+v)"]


@pytest.mark.parametrize(("gated", "expected"), [(True, ["m.(gate+up)"]), (False, [])])
def test_gate_and_up_are_left_where_they_have_a_better_form(gated: bool, expected: list[str]) -> None:
    w = weights({"m.gate": 32, "m.up": 32})
    graph = quantize(linear_graph(w), w, bits=4, group_size=32)
    gate, up = graph.outputs
    silu, y = gs.Variable("silu", FLOAT32), gs.Variable("y", FLOAT32)
    sigmoid = gs.Variable("sigmoid", FLOAT32)
    graph.nodes += [
        gs.Node("Sigmoid", "sigmoid", {}, [gate], [sigmoid]),
        gs.Node("Mul", "silu", {}, [gate, sigmoid], [silu]),
        gs.Node("Mul", "y", {}, [silu, up], [y]),
    ]
    graph.outputs = [y]
    assert joined(graph, gated=gated) == expected


@pytest.mark.parametrize("paths", [["a.b.q", "a.b.k"], ["a.attn.q", "a.mlp.up"], ["q", "k"], ["a.qa", "a.qb"]])
def test_a_joined_name_holds_the_paths(paths: list[str]) -> None:
    assert parts_of(join_paths(paths)) == paths


def test_any_other_name_is_its_own_part() -> None:
    assert parts_of("model.layers.0.mlp.up_proj") == ["model.layers.0.mlp.up_proj"]
    assert parts_of("odd(name)") == ["odd(name)"]

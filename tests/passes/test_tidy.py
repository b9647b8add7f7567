"""`tidy` leaves what graphsurgeon's own `cleanup` and `toposort` leave, in the same order."""

from __future__ import annotations

import random

import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.rewrite import add
from instantrt.passes.core.tidy import tidy


def branch(read: list[gs.Tensor], name: str) -> gs.Graph:
    """What reads tensors of the graph around it, and has a node that nobody reads."""
    y, inner = gs.Variable(f"{name}/y"), gs.Graph(name=name)
    add(inner, "Sum", [add(inner, "Abs", [t], f"{name}/{t.name}") for t in read], y)
    add(inner, "Neg", read[:1], f"{name}/dead")
    inner.outputs, inner.nodes = [y], inner.nodes[::-1]
    return inner


def tangle(seed: int) -> gs.Graph:
    """Nodes in any order, some of them dead, some with branches and some that make two tensors."""
    chance = random.Random(seed)
    graph = gs.Graph(inputs=[gs.Variable(f"x{i}") for i in range(3)])
    made: list[gs.Tensor] = list(graph.inputs)
    for i in range(30):
        read = chance.choices(made[-8:], k=chance.randrange(1, 4))
        outputs = [gs.Variable(f"t{i}.{j}") for j in range(chance.randrange(1, 3))]
        attrs = {"then_branch": branch(read[1:], f"then{i}")} if len(read) == 3 else {}
        graph.nodes.append(gs.Node("If" if attrs else "Max", f"n{i}", attrs, read[:1] if attrs else read, outputs))
        made += outputs
    graph.outputs = chance.sample(made[3:], 3)
    chance.shuffle(graph.nodes)
    return graph


def described(graph: gs.Graph) -> list[object]:
    return [(n.name, [t.name for t in n.inputs], [described(g) for g in n.subgraphs()]) for n in graph.nodes]


@pytest.mark.parametrize("seed", range(20))
def test_it_sweeps_and_sorts_as_graphsurgeon_does(seed: int) -> None:
    graph = tangle(seed)
    want = graph.copy().cleanup().toposort()
    tidy(graph)
    assert described(graph) == described(want)
    assert len(graph.nodes) < 30
    dead = {f"n{i}" for i in range(30)} - {node.name for node in graph.nodes}
    assert not any(node.name in dead for t in graph.tensors().values() for node in (*t.inputs, *t.outputs))


def test_a_node_that_reads_itself_is_named() -> None:
    graph = gs.Graph(inputs=[gs.Variable("x")])
    y = add(graph, "Abs", list(graph.inputs), "y")
    graph.outputs = [add(graph, "Neg", [y], "z")]
    graph.nodes[0].inputs[0] = graph.outputs[0]
    with pytest.raises(AssertionError, match=r"(y \(Abs\)|z \(Neg\)) reads what is made of its own output"):
        tidy(graph)

"""The graphs within a graph: the branches and bodies of If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all within it."""
    yield graph
    for node in graph.node:
        for inner in within(node):
            yield from graphs(inner)


def within(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches of a node, or its body."""
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def every_node(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of a graph and of all within it."""
    for each in (graph, *graph.subgraphs(recursive=True)):
        yield from each.nodes


def tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """The tensors of a graph and all within it. A name of the graph itself says what it says there."""
    found: dict[str, gs.Tensor] = {}
    for each in reversed([graph, *graph.subgraphs(recursive=True)]):
        found |= each.tensors()
    return found

"""Every tensor of an .onnx file has one name and one maker: graphs are joined, sorted and looked up by names.

Some exporters break this, and neither onnx nor graphsurgeon says so when it reads the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import onnx

from instantrt.compiler.frontend.opset import names_within
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.subgraphs import graphs, within

FIX = "export the model again; from torch, with output_names that no tensor inside the model has"


def own_names(graph: onnx.GraphProto) -> None:
    """Weights of branches and bodies that have the name of something else get another: ONNX Runtime takes the model."""
    taken = Counter(name for each in graphs(graph) for name in made_by(each))
    for inner in chain.from_iterable(map(within, graph.node)):
        for each in graphs(inner):
            for tensor in each.initializer:
                if taken[tensor.name] > 1:
                    new = f"{tensor.name}#{taken[tensor.name]}"
                    taken[tensor.name] -= 1
                    rename(each, tensor.name, new)
                    tensor.name = new


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """What reads `old`, or gives it, in a graph and in those within it that have no `old` of their own."""
    for output in graph.output:
        output.name = new if output.name == old else output.name
    for value in graph.value_info:
        value.name = new if value.name == old else value.name
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for inner in within(node):
            if old not in set(made_by(inner)):
                rename(inner, old, new)


def made_by(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name that a graph gives a meaning; an input whose default is a weight is there once."""
    given = [value.name for value in graph.input]
    yield from given
    yield from (tensor.name for tensor in graph.initializer if tensor.name not in given)
    yield from (name for node in graph.node for name in node.output if name)


def check_made_once(graph: onnx.GraphProto, path: Path, around: Set[str] = frozenset()) -> None:
    """`around` are the names of the graphs around `graph`: it may read them, and may not make them again."""
    made = Counter(made_by(graph))
    if twice := [name for name, times in made.items() if times > 1 or name in around]:
        raise UserError("two tensors have one name", where=f"{path}, {twice[0]}", fix=FIX)
    known = made.keys() | around
    read = ((name, node.op_type) for node in graph.node for name in node.input if name)
    for name, reader in (*read, *((output.name, "an output") for output in graph.output)):
        if name not in known:
            raise UserError("a tensor that nothing makes", where=f"{path}, {name}", found=f"{reader} reads it", fix=FIX)
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waits = {
        index: {makers[name] for name in (*node.input, *names_within(node)) if name in makers}
        for index, node in enumerate(graph.node)
    }
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        nodes = [graph.node[index] for index in reversed(error.args[1])]
        found = " -> ".join(f"{node.op_type} {node.name or node.output[0]}" for node in nodes[:8])
        raise UserError("tensors are made of themselves", where=str(path), found=found, fix=FIX) from None
    for inner in chain.from_iterable(map(within, graph.node)):
        check_made_once(inner, path, known)

"""Brings products with a constant matrix to the normal form of a linear layer, named after its module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FileTensor, InMemory, Missing, Source, Transposed, small, view_of
from instantrt.passes.core.linear import linear, weight_constant
from instantrt.passes.core.rewrite import Reject, Rewrite, add, producer, take_over

FLOAT = onnx.TensorProto.FLOAT
BETWEEN = ("Transpose", "Cast")  # a matrix and its product


def module_path(node: gs.Node, weight: gs.Constant) -> str:
    """The path of the module a node belongs to: from its name (`a.b/MatMul_3`, `/a/b/MatMul`), else its weight's."""
    scope: str = node.name.rpartition("/")[0].strip("/").replace("/", ".")
    return scope or re.sub(r"\.weight(_\w+)?$", "", weight.name)


@dataclass(frozen=True)
class LinearMatch:
    """A linear to be: `module` is the path of its module, `weight` the name of its stored constant."""

    node: gs.Node
    x: gs.Tensor
    rows: Source
    shape: tuple[int, int]
    module: str
    weight: str
    bias: gs.Tensor | None = None


class NormalizeLinear(Rewrite[LinearMatch]):
    """What names are taken is gathered once for a run, and kept: each linear would else look at every node.

    rows      path of a linear in normal form -> its weight
    names     how many nodes have a name, of the first `counted`: those that were added since are counted when asked
    """

    def __init__(self, nodes: Iterable[gs.Node] = ()) -> None:
        self.rows = {found.path: found.rows for node in nodes if (found := linear(node)) is not None}
        self.names, self.counted = Counter[str](), 0

    def for_graph(self, graph: gs.Graph) -> NormalizeLinear:
        return type(self)(graph.nodes)

    def path(self, match: LinearMatch) -> str:
        """The module's path; where a module has several weights, the later ones have their own names behind it."""
        own = f"{match.module}.{match.weight}"
        names = chain((match.module, own), (f"{own}.{i}" for i in count(2)))
        path = next(name for name in names if self.rows.get(name, match.rows) == match.rows)
        self.rows[path] = match.rows
        return path

    def unique_name(self, graph: gs.Graph, node: gs.Node, path: str) -> str:
        """`path`, or `path#2` and so on where one module is used several times."""
        self.names.update(added.name for added in graph.nodes[self.counted :])
        self.counted = len(graph.nodes)
        names = chain((path,), (f"{path}#{i}" for i in count(2)))
        return next(name for name in names if self.names[name] == (name == node.name))


class NormalizeMatMul(NormalizeLinear):
    """MatMul with a constant float32 matrix, given as [K, N] or as Transpose([N, K]) -> the normal form.

    Before: MatMul(x, Transpose(W [N, K]))  or  MatMul(x, W [K, N]), a Cast to float32 maybe between
    After:  MatMul(x, W [K, N]) whose constant is a view of W's rows; x has rows, if only one
    """

    def match(self, node: gs.Node) -> LinearMatch | Reject | None:
        if node.op != "MatMul" or linear(node) is not None:
            return None
        x, w = node.inputs
        stored, turned = w, True
        while (step := next(filter(None, (producer(stored, op) for op in BETWEEN)), None)) is not None:
            if step.attrs.get("to", FLOAT) != FLOAT:
                return None
            turned ^= step.op == "Transpose" and step.attrs.get("perm", [1, 0]) == [1, 0]
            stored = step.inputs[0]
        if not isinstance(stored, gs.Constant) or len(stored.shape) != 2 or isinstance(x, gs.Constant):
            return None
        if reason := unfit(stored):
            return Reject(reason)
        rows, shape = rows_of(stored, transposed=turned)
        return LinearMatch(node, x, rows, shape, module_path(node, stored), stored.name)

    def rewrite(self, graph: gs.Graph, match: LinearMatch) -> None:
        node, path = match.node, self.path(match)
        node.inputs[1] = weight_constant(path, match.rows, match.shape)
        name = self.unique_name(graph, node, path)
        self.names[node.name] -= 1
        self.names[name] += 1
        node.name = name
        # A vector gets a row: int8 scales, one for each token, count on it.
        if match.x.shape is not None and len(match.x.shape) == 1:
            out, first = take_over(node), small(f"{name}/first", [0], np.int64)
            node.inputs[0] = add(graph, "Unsqueeze", [match.x, first], f"{name}.row")
            node.outputs.append(gs.Variable(f"{name}.product"))
            add(graph, "Squeeze", [node.outputs[0], first], out)


def unfit(matrix: gs.Constant) -> str:
    """Why a constant is no linear layer's weight; nothing where it is one."""
    if matrix.dtype != np.float32:
        return f"a matrix of {matrix.dtype}"
    return "" if all(matrix.shape) else f"a matrix without elements, {list(matrix.shape)}"


def rows_of(stored: gs.Constant, *, transposed: bool) -> tuple[Source, tuple[int, int]]:
    """The rows of W [N, K] from a constant that holds W, or its transpose."""
    view = view_of(stored)
    a, b = (int(d) for d in stored.shape)
    if view is None:
        values = stored.values.T if transposed else stored.values
        return InMemory(values), (b, a) if transposed else (a, b)
    if not transposed:
        return view.source, (a, b)
    if isinstance(view.source, Missing):  # its codes have the rows already
        return view.source, (b, a)
    if isinstance(view.source, FileTensor):
        return Transposed(view.source), (b, a)
    if isinstance(view.source, InMemory):
        return InMemory(view.source.array.T), (b, a)
    return InMemory(view.load().T), (b, a)

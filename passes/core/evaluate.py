"""Runs any graph of ours on a CPU, node by node: a value is made when it is asked for and dropped after its last use.

Weights stream: a product with a constant matrix reads that matrix tile by tile, whether it is float, quantized, or
stored in 16 bits. Memory is therefore that of the live activations and one tile, whatever the model's size. Operators
of ours run through their reference functions, everything else through ONNX Runtime, one node at a time and unfused.
Where a graph computes in float16 or bfloat16, a node computes in float32 and rounds once, to its output's type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.evaluate_node import dependencies, evaluate_node, numpy_type
from instantrt.passes.core.lazy import Array, view_of
from instantrt.passes.core.names import PAST
from instantrt.passes.core.node_session import HALVES


class Wiring:
    """What every run of `graph` has to know of it, which does not change meanwhile.

    order     of the nodes in the graph, by id
    made_by   tensor -> its node
    readers   tensor -> how many read it
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.order = {id(node): i for i, node in enumerate(graph.nodes)}
        self.made_by = {t.name: node for node in graph.nodes for t in node.outputs}
        self.readers = {t.name: len(t.outputs) for t in graph.tensors().values()}
        self.known: dict[int, tuple[str, ...]] = {}

    def reads(self, node: gs.Node) -> tuple[str, ...]:
        """The tensors that `node` waits for."""
        if id(node) not in self.known:
            self.known[id(node)] = tuple(dict.fromkeys(t.name for t in dependencies(node)))
        return self.known[id(node)]


class Evaluation:
    """One run of `graph` on `feeds`, which may also name inner tensors: what lies before those is not computed.

    `keep` names tensors that will be asked for later than their last consumer runs. `first_bad` is the first tensor
    that is not finite although everything it was made of is. Several runs may share the graph's `wiring`.
    """

    def __init__(
        self, graph: gs.Graph, feeds: Mapping[str, Array], keep: Iterable[str] = (), wiring: Wiring | None = None
    ) -> None:
        self.graph, self.wiring = graph, wiring or Wiring(graph)
        self.waiting = dict(self.wiring.readers)
        self.values = own_caches(graph, feeds)
        self.keep = set(keep) | set(feeds)
        self.bad: set[str] = set()
        self.first_bad: str | None = None

    def take(self, name: str) -> Array:
        """The value of one tensor; what only it needed is dropped."""
        value = self.peek(name)
        self.keep.discard(name)
        if not self.waiting.get(name):
            del self.values[name]
        return value

    def peek(self, name: str) -> Array:
        """The value of one tensor, which stays."""
        self.keep.add(name)
        for node in self.needed(name):
            self.run(node)
        return self.values[name]

    def needed(self, *names: str) -> list[gs.Node]:
        """The nodes that have to run before all are there; KeyError for a tensor nobody makes or feeds.

        Each runs shortly before it is read, what makes its first input first: so little is alive at a time, and a
        product runs before what corrects it.
        """
        found: dict[int, gs.Node] = {}
        stack = [(name, False) for name in reversed(names)]
        while stack:
            name, ready = stack.pop()
            if name in self.values or id(node := self.wiring.made_by[name]) in found:
                continue
            if ready:
                found[id(node)] = node
            else:
                stack += [(name, True), *((read, False) for read in reversed(self.wiring.reads(node)))]
        return list(found.values())

    def run(self, node: gs.Node) -> None:
        self.store(node, evaluate_node(node, self.values, self.graph))

    def store(self, node: gs.Node, outputs: Sequence[Array]) -> None:
        """Takes what `node` made, and drops what nobody else reads."""
        for tensor, value in zip(node.outputs, outputs, strict=True):
            self.values[tensor.name] = value
        self.look(node)
        inputs = self.wiring.reads(node)
        for name in inputs:
            self.waiting[name] -= 1
        for name in (*inputs, *(t.name for t in node.outputs)):
            if self.waiting[name] <= 0 and name not in self.keep:
                self.values.pop(name, None)

    def look(self, node: gs.Node) -> None:
        """Is what `node` made finite, or at least no worse than what it was made of?"""
        bad = [t.name for t in node.outputs if not_finite(self.values[t.name])]
        if bad and not self.first_bad and self.bad.isdisjoint(self.wiring.reads(node)):
            constants = (t for t in node.inputs if isinstance(t, gs.Constant) and view_of(t) is None)
            self.first_bad = None if any(not_finite(t.values) for t in constants) else bad[0]
        self.bad.update(bad)


def own_caches(graph: gs.Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """`feeds` with an empty cache as `graph` has it: one of integers has other types, widths and parts."""
    rows = next((len(v) for name, v in feeds.items() if name.startswith(PAST) and v.ndim == 4 and not v.shape[2]), 0)
    own = [t for t in graph.inputs if t.name.startswith(PAST)] if rows else []
    return {**feeds, **{t.name: np.zeros((rows, t.shape[1], 0, t.shape[3]), numpy_type(t.dtype)) for t in own}}


def not_finite(value: Array) -> bool:
    floating = value.dtype.kind == "f" or value.dtype in HALVES
    return floating and not np.isfinite(value).all()

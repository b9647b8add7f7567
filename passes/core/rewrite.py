"""A pass: `match` finds, returning a value; `rewrite` builds, deciding nothing.

`match` answers None ("not mine"), a `Reject` ("mine, but ...": a reason a user can read) or a match value with all that
`rewrite` needs. `rewrite` replaces what it must; dead nodes are swept once after each pass, so no pass asks whether a
node is used elsewhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import onnx_graphsurgeon as gs

M = TypeVar("M")


@dataclass(frozen=True)
class Reject:
    """Why a node that a pass is about was left as it was."""

    reason: str


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: pass, node (its module path where it has one), and a reason or what was done.

    `target` is the first that a lowering was made for; before the lowerings there is none.
    """

    rewrite: str
    node: str
    done: str = ""
    reason: str = ""
    target: str = ""


@dataclass
class Ledger:
    """What every pass did and why it did not do more; `instantrt compile --explain` prints it."""

    entries: list[Entry] = field(default_factory=list)

    def applied(self, rewrite: str) -> list[Entry]:
        return [e for e in self.entries if e.rewrite == rewrite and not e.reason]

    def rejected(self) -> list[Entry]:
        return [e for e in self.entries if e.reason]

    def passed(self, rewrite: str, graph: gs.Graph) -> None:
        """Called after each pass that changed the graph, for those who want to look at it then."""


class Rewrite(ABC, Generic[M]):
    """A graph-to-graph pass. Subclasses are frozen dataclasses: the repr of a pass is its configuration."""

    @abstractmethod
    def match(self, node: gs.Node) -> M | Reject | None:
        """Is this node mine? Reads only."""

    @abstractmethod
    def rewrite(self, graph: gs.Graph, match: M) -> None:
        """Builds the replacement."""

    def note(self, match: M) -> str:  # noqa: ARG002  (an override reads it)
        """What the ledger says of an applied match."""
        return ""


def run(graph: gs.Graph, passes: Sequence[Rewrite[Any]], ledger: Ledger) -> gs.Graph:
    """Applies each pass once to every node, then removes what died and sorts."""
    for each in passes:
        name = type(each).__name__
        applied = False
        for node in list(graph.nodes):
            found = each.match(node) if node.outputs else None  # an earlier rewrite may have taken them
            if found is None:
                continue
            if isinstance(found, Reject):
                ledger.entries.append(Entry(name, node.name, reason=found.reason))
                continue
            each.rewrite(graph, found)
            ledger.entries.append(Entry(name, node.name, done=each.note(found)))
            applied = True
        if applied:
            graph.cleanup(remove_unused_graph_inputs=False).toposort()
            ledger.passed(name, graph)
    return graph


def add(
    graph: gs.Graph,
    op: str,
    inputs: Iterable[gs.Tensor],
    out: gs.Tensor | str,
    *,
    domain: str = "",
    name: str = "",
    **attrs: Any,
) -> gs.Tensor:
    """Adds a node with one output and returns that output; the node is named after it unless named here."""
    output = gs.Variable(out) if isinstance(out, str) else out
    node = gs.Node(op, name or output.name, attrs, list(inputs), [output], domain=domain or None)
    graph.nodes.append(node)
    return output


def take_over(old: gs.Node) -> gs.Tensor:
    """Detaches a node's only output, so that a replacement can produce it under the same name."""
    (output,) = old.outputs
    old.outputs.clear()
    return output


def producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that makes `tensor` if it is an `op`."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant with one element."""
    if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) == 1:
        return float(tensor.values.reshape(()))
    return None


def ints(tensor: gs.Tensor) -> list[int] | None:
    """The values of a small integer constant."""
    return [int(v) for v in tensor.values.reshape(-1)] if isinstance(tensor, gs.Constant) else None

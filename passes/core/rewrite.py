"""A pass: `match` finds, returning a value; `rewrite` builds, deciding nothing.

`match` answers None ("something else"), a `Reject` ("mine, but ...": a reason a user can read) or a match value with
all that `rewrite` needs. A node that begins to look like what the pass is about, and then is not, is a `Reject`.
`rewrite` replaces what it must; dead nodes are swept once after each pass, so no pass asks whether a node is used
elsewhere. What a pass relies on it declares as rules: `requires` of the graph it is given, `ensures` of what it leaves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.collector import uncollected
from instantrt.passes.core.lazy import small
from instantrt.passes.core.tidy import tidy

M = TypeVar("M")
Rule = Callable[[gs.Node], str | None]  # what is wrong with a node; its name says what holds where nothing is


@dataclass(frozen=True)
class Reject:
    """Why a node that a pass is about was left as it was, and what the form that is left costs."""

    reason: str
    costs: str = ""


class Pass(ABC):
    """What `run` runs. One with settings is a frozen dataclass: its repr is its configuration."""

    requires: ClassVar[tuple[Rule, ...]] = ()
    ensures: ClassVar[tuple[Rule, ...]] = ()

    @abstractmethod
    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str | Reject]]:
        """Changes the graph; tells of each node or tensor, by name, what was done with it or why nothing was."""


class Rewrite(Pass, Generic[M]):
    """A pass that looks at every node once."""

    @abstractmethod
    def match(self, node: gs.Node) -> M | Reject | None:
        """Is this node mine? Reads only."""

    @abstractmethod
    def rewrite(self, graph: gs.Graph, match: M) -> None:
        """Builds the replacement."""

    def note(self, match: M) -> str:  # noqa: ARG002  (an override reads it)
        """What the log says of an applied match."""
        return ""

    def for_graph(self, graph: gs.Graph) -> Rewrite[M]:  # noqa: ARG002  (an override reads it)
        """The pass for one run over `graph`, where it must know more than a node: a copy that has gathered that."""
        return self

    def apply(self, graph: gs.Graph) -> Iterator[tuple[str, str | Reject]]:
        own = self.for_graph(graph)
        for node in list(graph.nodes):
            found = own.match(node) if node.outputs else None  # an earlier rewrite may have taken them
            if isinstance(found, Reject):
                yield node.name, found
            elif found is not None:
                own.rewrite(graph, found)
                yield node.name, own.note(found)


class Lowering(Rewrite[M]):
    """A pass that brings quantized linears to the operators of a backend."""

    @abstractmethod
    def note(self, match: M) -> str:
        """The form that the linear runs in, as `--explain` names it."""


@dataclass(frozen=True)
class Entry:
    """One line of the log: the pass, the node (its module path where it has one), and a reason or what was done.

    `target` is the first that a lowering was made for; before the lowerings there is none. `costs` is of a `Reject`.
    """

    by: Pass
    node: str
    done: str = ""
    reason: str = ""
    target: str = ""
    costs: str = ""


@dataclass
class PassLog:
    """What every pass did and why it did not do more; `--explain` prints it. `target` is what is lowered for now."""

    entries: list[Entry] = field(default_factory=list)
    target: str = ""

    def applied(self, by: type[Pass]) -> list[Entry]:
        return [e for e in self.entries if isinstance(e.by, by) and not e.reason]

    def rejected(self) -> list[Entry]:
        return [e for e in self.entries if e.reason]

    def passed(self, by: Pass, graph: gs.Graph, *, changed: bool) -> None:
        """Called after each pass, for those who want to look at the graph then."""


@uncollected()
def run(graph: gs.Graph, passes: Sequence[Pass], log: PassLog) -> gs.Graph:
    """Applies the passes in turn; after each that changed the graph, removes what died and sorts."""
    for each in passes:
        name = type(each).__name__
        check(graph, each.requires, f"{name} requires")
        changed = False
        for node, said in each.apply(graph):
            left, done = (said, "") if isinstance(said, Reject) else (Reject(""), said)
            log.entries.append(Entry(each, node, done, left.reason, log.target, left.costs))
            changed |= not left.reason
        if changed:
            tidy(graph)
        log.passed(each, graph, changed=changed)
        if changed:
            check(graph, (*each.ensures, made_once(graph)), f"{name} ensures")
    return graph


def check(graph: gs.Graph, rules: Iterable[Rule], who: str) -> None:
    """Raises on the first rule that a node breaks: a bug of ours, told to the author of a pass."""
    for rule in rules:
        for node in graph.nodes:
            problem = rule(node)
            assert problem is None, f"{who} {rule.__name__}: node {node.name} ({node.op}): {problem}"


def made_once(graph: gs.Graph) -> Rule:
    """Every input of a node is made by one node, or is an input of the graph or a constant."""
    given = {id(t) for t in graph.inputs}

    def every_input_is_made_once(node: gs.Node) -> str | None:
        for t in node.inputs:
            if isinstance(t, gs.Variable) and t.name and len(t.inputs) != 1 and id(t) not in given:
                return f"{len(t.inputs)} nodes make its input {t.name}"
        return None

    return every_input_is_made_once


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


def once(
    graph: gs.Graph, op: str, inputs: Sequence[gs.Tensor], out: gs.Tensor | str, *, name: str = "", **attrs: Any
) -> gs.Tensor:
    """`add`, or what it added before under this name: for values that several linears share."""
    named = name or (out if isinstance(out, str) else out.name)
    known = next((node for t in inputs for node in t.outputs if node.name == named), None)
    return known.outputs[0] if known is not None else add(graph, op, inputs, out, name=name, **attrs)


def cast(graph: gs.Graph, x: gs.Tensor, dtype: npt.DTypeLike, out: gs.Tensor | str, *, name: str = "") -> gs.Tensor:
    """Adds a Cast of `x`."""
    return add(graph, "Cast", [x], out, name=name, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@dataclass(frozen=True)
class Prefixed:
    """Adds nodes and constants whose names share a prefix, each once."""

    graph: gs.Graph
    prefix: str

    def __call__(self, op: str, inputs: Sequence[gs.Tensor], name: str, **attrs: Any) -> gs.Tensor:
        return once(self.graph, op, inputs, f"{self.prefix}/{name}", **attrs)

    def cast(self, x: gs.Tensor, dtype: npt.DTypeLike, name: str) -> gs.Tensor:
        return self("Cast", [x], name, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def const(self, name: str, values: Any, dtype: npt.DTypeLike) -> gs.Constant:
        return small(f"{self.prefix}/{name}", values, dtype)


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


def widened(x: gs.Tensor, y: gs.Tensor) -> bool:
    """Do the constants between x and y, made of it element by element, give it more axes, or a longer last one?"""
    if x.shape is None or y.shape is None:
        return False
    return len(x.shape) != len(y.shape) or [*x.shape[-1:]] == [1] != [*y.shape[-1:]]


def ints(tensor: gs.Tensor) -> list[int] | None:
    """The values of a small integer constant."""
    return [int(v) for v in tensor.values.reshape(-1)] if isinstance(tensor, gs.Constant) else None


def set_opset(graph: gs.Graph, opset: int) -> None:
    """Says that the standard operators of a graph are those of `opset`; other domains keep their versions."""
    others = [domain for domain in graph.import_domains or () if domain.domain not in ("", "ai.onnx")]
    graph.opset, graph.import_domains = opset, [onnx.helper.make_opsetid("", opset), *others]

"""Where a lowering goes wrong: the first pass and the first node after which the graph is no longer the twin.

After every pass, each tensor that the graph shares with the twin is computed from the twin's own values of the tensors
before it. An error therefore shows where it is made, not where it ends up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bounds import BETWEEN, Bound, bound_of, int8_block, quantizes, seen_by
from instantrt.compiler.accuracy.data import Data, llm_feeds
from instantrt.compiler.accuracy.metrics import difference
from instantrt.compiler.accuracy.subjects import all_positions, subjects
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.compiler.target import find_target
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.node_session import HALVES
from instantrt.passes.core.rewrite import Pass, PassLog

TOKENS = 32  # every tensor of the twin is kept
AS_ROUGH = 2.0  # times what rounding alone does: an error of that size is rounding, amplified
MASKED = np.float32(-3e4)  # anything this low is a mask's minus infinity, which every type spells differently


@dataclass(frozen=True)
class Culprit:
    """The first thing that is wrong: `after` is a pass, `node` makes `tensor`, whose `error` exceeds `bound`."""

    after: str
    node: str
    tensor: str
    error: float
    bound: Bound

    def __str__(self) -> str:
        return (
            f"after pass {self.after}, node {self.node}: tensor {self.tensor} is off by {self.error:.2e}, "
            f"{self.bound.name} explains {self.bound.layer:.0e}"
        )


@dataclass(frozen=True)
class Made:
    """What makes a tensor: nodes and their tensors in words, and what they and their constants are, by identity."""

    words: tuple[str, ...]
    objects: tuple[object, ...]

    @classmethod
    def by(cls, nodes: Sequence[gs.Node]) -> Made:
        held = (t._values if isinstance(t, gs.Constant) else t for node in nodes for t in node.inputs)
        typed = ([(t.name, t.dtype) for t in (*node.inputs, *node.outputs)] for node in nodes)
        words = (f"{n.domain} {n.op} {n.attrs} {of}" for n, of in zip(nodes, typed, strict=True))
        return cls(tuple(words), (*nodes, *held))

    def is_same(self, other: Made | None) -> bool:
        """Has no pass touched it?"""
        if other is None or self.words != other.words or len(self.objects) != len(other.objects):
            return False
        return all(a is b for a, b in zip(self.objects, other.objects, strict=True))


class Found(Exception):  # noqa: N818  (an answer, not an error)
    """Ends the lowering: what follows the first culprit proves nothing."""

    def __init__(self, culprit: Culprit) -> None:
        self.culprit = culprit
        super().__init__(str(culprit))


@dataclass
class BisectingLog(PassLog):
    """A log that looks at the graph after every pass. It keeps all of the twin's tensors: use few tokens."""

    canonical: gs.Graph = field(default_factory=gs.Graph)
    feeds: Mapping[str, Array] = field(default_factory=dict)
    dtype: np.dtype[np.generic] = np.dtype(np.float32)  # noqa: RUF009  (immutable)
    say: Say = lambda text: None
    worst: bool = True  # the worst channel of a tensor decides; with few tokens, which prove little of one, all of them
    truth: dict[str, Array] = field(default_factory=dict)
    excused: list[str] = field(default_factory=list)  # tensors that rounding alone moves as far
    looked: dict[str, Made] = field(default_factory=dict)  # as it was when it was last looked at
    wiring: Wiring = field(init=False)  # of the twin

    def __post_init__(self) -> None:
        names = [t.name for node in self.canonical.nodes for t in node.outputs]
        self.wiring = Wiring(self.canonical)
        run = Evaluation(self.canonical, self.feeds, keep=names, wiring=self.wiring)
        for output in self.canonical.outputs:
            run.peek(output.name)
        self.truth = run.values

    def passed(self, by: Pass, graph: gs.Graph, *, changed: bool) -> None:
        if changed:
            self.look(type(by).__name__, graph)

    def look(self, rewrite: str, graph: gs.Graph) -> None:
        self.say(f"after {rewrite}: {len(graph.nodes)} nodes")
        for culprit in self.wrong(rewrite, graph):
            raise Found(culprit)

    def wrong(self, rewrite: str, graph: gs.Graph) -> Iterator[Culprit]:
        """Shared tensors that are not what the twin says, in the graph's order; those alone that a pass has touched:
        a look at all of a large model takes as long as a run of it."""
        fed = {
            t.name: numpy_type(t.dtype)
            for t in graph.tensors().values()
            if t.name in self.truth and t.dtype is not None
        }
        given = {name: as_type(value, fed.get(name)) for name, value in self.truth.items()}
        wiring = Wiring(graph)
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.name in self.truth:
                    before = {key: value for key, value in given.items() if key != tensor.name}
                    run = Evaluation(graph, before, wiring=wiring)
                    nodes = run.needed(tensor.name)
                    made = Made.by(nodes)
                    if made.is_same(self.looked.get(tensor.name)):
                        continue
                    self.looked[tensor.name] = made
                    error, bound = self.error(run, tensor.name, nodes)
                    if not error <= bound.layer and not self.amplified(tensor.name, error):
                        yield Culprit(rewrite, node.name, tensor.name, error, bound)

    def error(self, run: Evaluation, name: str, nodes: Sequence[gs.Node]) -> tuple[float, Bound]:
        """How far `name`, which `nodes` make, is from the twin: from the twin's values of what comes before."""
        bound = bound_of(nodes, self.dtype)
        if any("Attention" in node.op for node in nodes):
            bound = replace(bound, layer=BETWEEN.get(bound, bound.layer))
        coarse = int8_block(nodes) is not None or quantizes(nodes)
        expected = self.as_seen(run.wiring, name, nodes) if coarse else self.truth[name]
        return distance(run.take(name), expected, worst=self.worst), bound

    def as_seen(self, wiring: Wiring, name: str, nodes: Sequence[gs.Node]) -> Array:
        """The twin's `name` of what `nodes` see of their inputs, where they make integers of activations.

        That are blocks of int8, or 16 bits: a last bit that turns a code moves the result by a whole step.
        """
        made = {t.name for node in nodes for t in node.outputs}
        kept = {*wiring.made_by, *(t.name for t in wiring.graph.inputs)} - made  # the others are made with this one
        run = Evaluation(self.canonical, {k: v for k, v in self.truth.items() if k in kept}, wiring=self.wiring)
        for x in {t.name for node in run.needed(name) for t in node.inputs} & run.values.keys():
            run.values[x] = rounded(run.values[x], self.dtype)
        coarse = next((n for n in nodes if int8_block([n]) is not None), None)
        if coarse is not None:
            x = coarse.inputs[0].name
            run.values[x] = seen_by([coarse], self.truth[x])
        return run.take(name)

    def amplified(self, name: str, error: float) -> bool:
        """Is the twin's own tensor as far off when all that it reads is rounded to the 16 bits of the target?

        Then no operator is wrong: the largest of two nearly equal values is another one, or their difference nothing.
        """
        if self.dtype not in HALVES:
            return False
        before = {key: rounded(value, self.dtype) for key, value in self.truth.items() if key != name}
        value = Evaluation(self.canonical, before, wiring=self.wiring).take(name)
        moved = distance(value, self.truth[name], worst=self.worst)
        if not (np.isnan(moved) or error <= AS_ROUGH * moved):
            return False
        self.excused.append(name)
        return True


def distance(value: Array, expected: Array, *, worst: bool = True) -> float:
    """The worst channel of a float tensor, or all of it. What is infinite or no number in both is no difference.

    Integers are equal or not; codes of activations may round to either side.
    """
    if value.shape != expected.shape:  # as many as the values say
        return np.inf
    if expected.dtype.kind == "f" and not np.isfinite(expected).all():
        same = ~np.isfinite(expected) & ((value == expected) | (np.isnan(value) & np.isnan(expected)))
        value, expected = np.where(same, 0, value), np.where(same, 0, expected)
    if value.dtype.kind in "iub" or expected.ndim == 0:
        slack = 1 if value.dtype.kind in "iu" and value.dtype.itemsize == 1 else 0
        close = np.abs(value.astype(np.float64) - expected.astype(np.float64)) <= slack
        return 0.0 if close.all() else np.inf
    found = difference(np.maximum(value, MASKED), np.maximum(expected, MASKED))
    return found.channel if worst else found.relative_l2


def as_type(value: Array, dtype: np.dtype[np.generic] | None) -> Array:
    """The twin's float32 as the 16 bits that a lowered graph keeps there."""
    with np.errstate(over="ignore"):  # a mask's lowest number becomes infinity
        return value.astype(dtype) if dtype in HALVES and value.dtype == np.float32 else value


def rounded(value: Array, dtype: np.dtype[np.generic]) -> Array:
    """float32 with the 16 bits of `dtype`; what that has no number for stays: it is no rounding."""
    if value.dtype != np.float32:
        return value
    narrow = as_type(value, dtype).astype(np.float32)
    return np.where(np.isfinite(narrow), narrow, value)


def bisect(lower: Callable[[PassLog], gs.Graph], log: BisectingLog, written: gs.Graph | None = None) -> Culprit | None:
    """Lowers again, looking; then looks at the graph that was read back from the artifact."""
    try:
        lower(log)
        if written is not None:
            for name in one_position(written):  # of the last token alone, where the twin has every token's
                log.truth.pop(name, None)
            log.look("writing the artifact", written)
    except Found as found:
        return found.culprit
    return None


def one_position(graph: gs.Graph) -> list[str]:
    """The outputs [batch, 1, ...] of a graph."""
    return [t.name for t in graph.outputs if t.shape is not None and len(t.shape) == 3 and t.shape[1] == 1]


def find_culprits(
    planned: Plan, request: Request, artifacts: Sequence[Artifact], data: Data, say: Say
) -> dict[str, Culprit]:
    """Target -> where its lowering first goes wrong; targets that are right are left out.

    The last step, what was written, is not looked at where its codes were fitted elsewhere.
    """
    llm = planned.model.llm
    feeds = llm_feeds(data.batches[0][:1, :TOKENS], llm) if llm is not None else data.feeds[0]
    found = {}
    for subject in subjects(planned, request, artifacts, again=True):
        log = BisectingLog(canonical=subject.canonical, feeds=feeds, dtype=subject.dtype, say=say)
        lower = partial(all_positions, planned, request, find_target(subject.target))
        culprit = bisect(lower, log, subject.lowered if subject.reads_back and not subject.refitted else None)
        if culprit is not None:
            found[subject.target] = culprit
    return found

"""A graph of ours on several steps at once, node by node: every weight streams once, whatever the number of steps.

A step that goes on with the cache of another one reads what that one makes, as soon as it is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bounds import int8_blocks, keeps_integers
from instantrt.compiler.smoke.names import PAST, PRESENT
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import Call, caches
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.evaluate_node import evaluate_each, evaluate_node
from instantrt.passes.core.lazy import Array


class Values(dict[str, Array]):
    """The tensors of a step; its cache is what the step before makes of it when it is first read."""

    before: StepRun | None = None

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (self.before is not None and str(name).startswith(PAST))

    def __missing__(self, name: str) -> Array:
        if self.before is None or not name.startswith(PAST):
            raise KeyError(name)
        self[name] = self.before.made(PRESENT + name.removeprefix(PAST))
        return self[name]


class StepRun(Evaluation):
    """One step among others.

    blocks   MatMul -> the block in which the operator that stands for it makes int8 of its input, by definition
    given    tensor -> what those that read it go on with, whatever this run makes of it, which is in `own`
    caches   past -> zeros of the sizes that it has in this step, where a step before makes it
    """

    def __init__(
        self,
        wiring: Wiring,
        step: Call,
        before: StepRun | None,
        blocks: Mapping[str, int],
        given: Mapping[str, Array],
    ) -> None:
        super().__init__(wiring.graph, step.feeds, [t.name for t in wiring.graph.outputs], wiring)
        self.given, self.own = given, dict[str, Array]()
        self.values = Values(step.feeds)
        self.values.before, self.blocks, self.step = before, blocks, step
        self.done: set[int] = set()
        self.rounded: tuple[tuple[str, int], Array] | None = None  # the last, which the next product may share
        self.caches: dict[str, Array] = {}
        if before is not None and before.step.keys is not None:
            self.caches = caches(wiring.graph, *before.step.keys.shape)

    def made(self, name: str) -> Array:
        """A tensor of this step, wherever the others are."""
        for node in self.needed(name):
            run_node(node, [self])
        return self.values[name]

    def store(self, node: gs.Node, outputs: Sequence[Array]) -> None:
        super().store(node, [self.taken(t.name, value) for t, value in zip(node.outputs, outputs, strict=True)])

    def taken(self, name: str, value: Array) -> Array:
        """What those that read a tensor go on with. Where padding is that is its own: another operator may leave there
        what was in memory, and what no key of its reads, a product by zero does here (docs/facts.md,
        "GroupQueryAttention").
        """
        if name not in self.given:
            return value
        self.own[name] = value
        other = self.given[name]
        if other.shape != value.shape:
            return value
        counted = self.step.counted(name, value.shape)
        if counted is None:
            return other
        return np.where(counted.reshape(counted.shape + (1,) * (value.ndim - counted.ndim)), other, value)

    def look(self, node: gs.Node) -> None:
        """The outputs are looked at, and nothing before them: that takes a tenth of the time."""

    def seen(self, node: gs.Node) -> Mapping[str, Array]:
        """What `node` reads; of a cache that is asked for its sizes, nothing more: whoever makes it has yet to run."""
        if node.op == "Shape" and node.inputs[0].name in self.caches:
            return self.caches
        block = self.blocks.get(node.name) if node.op == "MatMul" else None
        if block is None:
            return self.values
        x = node.inputs[0].name
        if self.rounded is None or self.rounded[0] != (x, block):
            self.rounded = (x, block), int8_blocks(self.values[x], block)
        return {x: self.rounded[1]} | {t.name: self.values[t.name] for t in node.inputs[1:] if t.name in self.values}


class WatchedRun(StepRun):
    """One that knows the first tensor that is not finite."""

    look = Evaluation.look


def run_node(node: gs.Node, runs: Sequence[StepRun]) -> None:
    """`node` for the steps that have not run it yet."""
    waiting = [run for run in runs if id(node) not in run.done]
    for run in waiting:
        run.done.add(id(node))
    if not runs[0].wiring.reads(node):  # made of constants: the same for all
        outputs = evaluate_node(node, {}, runs[0].graph)
        for run in waiting:
            run.store(node, outputs)
        return
    seen = [run.seen(node) for run in waiting]
    for run, outputs in zip(waiting, evaluate_each(node, seen, runs[0].graph), strict=True):
        run.store(node, outputs)


def lockstep(
    graph: gs.Graph, steps: Sequence[Call], blocks: Mapping[str, int] | None = None, given: Answers | None = None
) -> Answers:
    """The outputs of every step.

    given   step -> inner tensors of another form of the model. What reads one goes on with that; what `graph` itself
            makes of it is among the outputs. So each layer is seen by itself: no error reaches the next one. Codes of a
            cache are such tensors, too: a last bit that turns one is a whole step for whoever reads it
    """
    names = [t.name for t in graph.outputs]
    runs = run_all(StepRun, graph, steps, blocks or {}, given or {})
    return {step: {name: run.values[name] for name in names} | run.own for step, run in runs.items()}


def first_not_finite(graph: gs.Graph, steps: Sequence[Call]) -> str:
    """The first tensor that is not finite in any step, or ""."""
    runs = run_all(WatchedRun, graph, steps, {}, {})
    return next((run.first_bad for run in runs.values() if run.first_bad), "")


def run_all(
    kind: type[StepRun], graph: gs.Graph, steps: Sequence[Call], blocks: Mapping[str, int], given: Answers
) -> dict[str, StepRun]:
    runs: dict[str, StepRun] = {}
    wiring, names = Wiring(graph), [t.name for t in graph.outputs]
    caches_of_integers = any(map(keeps_integers, graph.nodes))
    ends = {name for name in names if not (caches_of_integers and name.startswith(PRESENT))}
    for step in steps:
        inner = {name: value for name, value in given.get(step.name, {}).items() if name not in ends}
        runs[step.name] = kind(wiring, step, runs.get(step.after), blocks, inner)
    with one_thread():
        for node in runs[steps[0].name].needed(*names):
            run_node(node, list(runs.values()))
    return runs


@contextmanager
def one_thread() -> Iterator[None]:
    """NumPy's products on one thread: with few rows they wait for memory, and threads that wait by spinning for the
    others keep the process that runs the artifact from its cores."""
    libraries = (Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas*")
    blas = next((ctypes.CDLL(str(path)) for path in libraries), None)
    get, put = (getattr(blas, f"scipy_openblas_{verb}_num_threads64_", None) for verb in ("get", "set"))
    threads = get() if get is not None else 0
    try:
        if put is not None:
            put(1)
        yield
    finally:
        if put is not None and threads:
            put(threads)

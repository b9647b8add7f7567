"""Spends bytes where they buy accuracy: the worst layers get a finer format until a bound on the model's error holds,
or as long as a bound on its size does.

Every layer has a ladder of formats (uint4, smaller groups, int8, float). A step up costs bytes and takes away output
error, measured on activations and weighed by what it costs the model (`weigh`). Losses of layers add up, so steps are
taken in the order of loss taken away for each byte; how many a bound on the error needs is found by bisection, each
trial a measurement of the whole quantized model. The same input gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.ladder import (
    FLOAT,
    Raise,
    float_bytes,
    form_of,
    ladder,
    ladder_steps,
    output_errors,
    override,
    rungs,
)
from instantrt.compiler.accuracy.layer_errors import layers_of, quantized_bytes
from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens, summary
from instantrt.compiler.accuracy.weigh import share, stream_of, weigh
from instantrt.compiler.defaults import EVERY_GROUP, Formats, Groups
from instantrt.compiler.frontend.model import FloatModel, LlmShape
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog, Reject
from instantrt.passes.qdq.insert_qdq import Decisions

LOGIT_BYTES = 1 << 29  # of the float model, kept while trials are compared with them


@dataclass(frozen=True)
class Raised:
    """What a budget came to; figures are those of `metrics.summary`.

    layers   every layer whose format is not the one that was asked for, and its format
    steps    what was taken, from the coarsest formats where the size is bounded, else from those asked for
    filled   how much of the room, in its own unit, where the size is bounded
    """

    decisions: Decisions
    layers: Mapping[str, str]
    steps: tuple[Raise, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    bytes_before: int
    trials: int
    data: str
    filled: str = ""

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def raised(self) -> int:
        """Layers that took a step."""
        return len(forms_after(self.steps))

    @property
    def formats(self) -> dict[str, str]:
        """Of every layer that a format could be chosen for."""
        quantized = {path: str(form_of(q)) for path, q in self.decisions.items() if isinstance(q, QuantTensor)}
        return quantized | {path: form for path, form in self.layers.items() if form == FLOAT}


@dataclass(frozen=True)
class Room:
    """A bound on size.

    size_of   decisions -> bytes, of what `limit` bounds
    groups    the sizes that the target's operators have
    heads     paths that start from their own format: a table of embeddings may share it
    where     the option and its value, and
    unit      what that counts, in bytes, and its name: for errors
    """

    limit: int
    size_of: Callable[[Decisions], int]
    groups: Groups
    heads: Set[str]
    where: str
    unit: tuple[float, str]

    def left(self, decisions: Decisions) -> int:
        """Bytes that `decisions` leave free; UserError where there is no room for them."""
        free = self.limit - self.size_of(decisions)
        if free < 0:
            size, unit = self.unit
            enough = math.ceil((self.limit - free) / size * 1000) / 1000  # what is said here must do
            least = f"at least {enough} {unit}: every layer in its coarsest format"
            fours = any(q.bits == 4 for q in decisions.values() if isinstance(q, QuantTensor))
            fix = "" if fours else "--quant a16w4"
            raise UserError("no choice of formats is that small", where=self.where, expected=least, fix=fix)
        return free

    def filled(self, decisions: Decisions) -> str:
        """`4.49 of 4.5 MiB`."""
        size, unit = self.unit
        return f"{self.size_of(decisions) / size:.4g} of {self.limit / size:.4g} {unit}"

    def fill(self, decisions: Decisions, steps: list[Raise], free: int) -> list[Raise]:
        """The best of `steps` for which there is room. A layer that one does not fit for stays where it is."""
        while True:
            taken = affordable(steps, free)
            over = self.size_of(override(decisions, forms_after(taken))) - self.limit
            if over <= 0:
                return taken
            free -= over


def affordable(steps: list[Raise], free: int) -> list[Raise]:
    taken, full = list[Raise](), set[str]()
    for step in steps:
        if step.bytes > free:
            full.add(step.layer)
        if step.layer not in full:
            taken.append(step)
            free -= step.bytes
    return taken


def search(
    graph: gs.Graph,
    model: FloatModel,
    decisions: Decisions,
    data: Data,
    budget: Budget,
    say: Say,
    room: Room | None = None,
) -> Raised:
    """The steps up the ladders after which the twin holds `budget` against the float `graph`, and fits into `room`.

    As few as the bounds on the error need; without such a bound, as many as there is room for.
    """
    assert model.llm is not None
    groups = room.groups if room is not None else EVERY_GROUP
    start = coarsest(decisions, room) if room is not None else {}
    decisions = override(decisions, start)
    free = room.left(decisions) if room is not None else 0
    measure = Trial(graph, list(first_batches(data, model.llm).each(model.llm)))
    before = after = measure(decisions)
    steps: list[Raise] = []
    if room is not None or budget.violations(before):
        say("weighing the layers")
        steps = plan_steps(graph, decisions, measure, groups)
        steps = room.fill(decisions, steps, free) if room is not None else steps
        after = measure(override(decisions, forms_after(steps))) if room is not None else measure.unquantized()
    if violations := budget.violations(after):
        what = "no choice of formats is as small and as accurate"
        raise UserError(what, where=room.where if room is not None else "", found="nearest: " + "; ".join(violations))
    if budget.bounded and not budget.violations(before):
        steps, after = [], before
    elif budget.bounded:
        low, high, figures = 0, len(steps), {len(steps): after}
        while high - low > 1:
            middle = (low + high) // 2
            say(f"trying {middle} of {len(steps)} steps")
            figures[middle] = measure(override(decisions, forms_after(steps[:middle])))
            low, high = (middle, high) if budget.violations(figures[middle]) else (low, middle)
        steps, after = steps[:high], figures[high]
    layers = start | forms_after(steps)
    size = sum(quantized_bytes(q) for q in decisions.values() if isinstance(q, QuantTensor))
    chosen = override(decisions, forms_after(steps))
    filled = room.filled(chosen) if room is not None else ""
    return Raised(chosen, layers, tuple(steps), before, after, size, measure.trials, data.kind, filled)


def forms_after(steps: Sequence[Raise]) -> dict[str, str]:
    """Layer -> its format after `steps`."""
    return {step.layer: step.after for step in steps}


def room_for(
    request: Request, decisions: Decisions, formats: Formats, size_of: Callable[[Decisions], int]
) -> Room | None:
    """What the request leaves to the artifact, whose weights are `size_of`, or to what is quantized; None: all."""
    if request.max_size is not None:
        where = f"{formats.target}, max_size {request.max_size:g}"
        return Room(int(request.max_size * 2**20), size_of, formats.groups, formats.heads, where, (2**20, "MiB"))
    if request.bits_per_weight is None:
        return None
    quants = {path: q for path, q in decisions.items() if isinstance(q, QuantTensor)}
    bit = sum(math.prod(q.shape) for q in quants.values()) / 8

    def stored(chosen: Decisions) -> int:
        return sum(
            quantized_bytes(now) if isinstance(now := chosen[p], QuantTensor) else float_bytes(quants[p])
            for p in quants
        )

    where = f"{formats.target}, bits_per_weight {request.bits_per_weight:g}"
    return Room(
        int(request.bits_per_weight * bit), stored, formats.groups, formats.heads, where, (bit, "bits a weight")
    )


def coarsest(decisions: Decisions, room: Room) -> dict[str, str]:
    """Layer -> the first rung of its ladder."""
    quants = [q for path, q in decisions.items() if isinstance(q, QuantTensor) and path not in room.heads]
    return {q.name: str(ladder(q, room.groups, coarser=True)[0][0]) for q in quants}


def first_batches(data: Data, llm: LlmShape) -> Data:
    """As much of the data as the float logits kept for it allow; one batch at least."""
    kept: list[Array] = []
    size = 0
    for batch in data.batches:
        size += batch.size * llm.vocab * 4
        if kept and size > LOGIT_BYTES:
            break
        kept.append(batch)
    return replace(data, batches=tuple(kept))


class Trial:
    """Measures a choice of formats: the twin's tokens against the float model's, whose logits are computed once."""

    def __init__(self, graph: gs.Graph, batches: list[tuple[Mapping[str, Array], Array | None]]) -> None:
        self.graph, self.batches, self.trials = graph, batches, 0
        self.logits = [Evaluation(graph, feeds).take("logits") for feeds, _ in self.batches]

    def __call__(self, decisions: Decisions) -> dict[str, float]:
        self.trials += 1
        twin = pipeline.quantize(self.graph.copy(), decisions, PassLog())
        return self.figures([Evaluation(twin, feeds).take("logits") for feeds, _ in self.batches])

    def window(self) -> Trial:
        """The same on the first of its sequences alone."""
        feeds, ids = self.batches[0]
        return Trial(
            self.graph, [({name: value[:1] for name, value in feeds.items()}, None if ids is None else ids[:1])]
        )

    def unquantized(self) -> dict[str, float]:
        """What all steps together come to."""
        return self.figures(self.logits)

    def figures(self, outputs: list[Array]) -> dict[str, float]:
        parts = [
            compare_tokens(reference, output, ids)
            for reference, output, (_, ids) in zip(self.logits, outputs, self.batches, strict=True)
            if ids is not None
        ]
        return summary(Tokens.join(parts))


def plan_steps(graph: gs.Graph, decisions: Decisions, measure: Trial, groups: Groups) -> list[Raise]:
    """All steps of all layers, the best first; a layer's own steps stay in order because each ladder is convex."""
    linears = [layer for layer in layers_of(graph, graph) if isinstance(decisions.get(layer.path), QuantTensor)]
    window, wiring = measure.window(), Wiring(graph)
    feeds, _ = window.batches[0]
    streams = {layer.path: found for layer in linears if (found := stream_of(layer.y, wiring)) is not None}
    kept = [name for layer in linears for name in (layer.x, layer.y)] + [found.name for found in streams.values()]
    run = Evaluation(graph, feeds, keep=kept, wiring=wiring)
    values = {name: run.peek(name) for name in kept} | dict(feeds)
    ladders = {layer.path: rungs(layer, decisions, values[layer.x], groups) for layer in linears}
    shares = {path: ladder[0].error for path, ladder in ladders.items()}
    for layer in linears:
        if layer.path in streams:
            error = output_errors(decisions[layer.path], values[layer.x])
            shares[layer.path] = share(layer, streams[layer.path], error, values, wiring)
    apart = Reject("weighed apart")

    def alone(paths: set[str]) -> float:
        return window({path: q if path in paths else apart for path, q in decisions.items()})["kl_mean"]

    nats = weigh(shares, alone)
    steps = [step for path, ladder in ladders.items() for step in ladder_steps(path, ladder, nats[path])]
    measure.trials += window.trials
    return sorted(steps, key=lambda s: (-s.gain / s.bytes, s.layer))

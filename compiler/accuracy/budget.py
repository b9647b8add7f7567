"""Spends bytes where they buy accuracy: the worst layers get a finer format until a bound on the model's error holds,
or as long as a bound on its size does.

Every layer has a ladder of formats (uint4, smaller groups, int8, float). A step up costs bytes and takes away output
error, measured on activations and weighed by what it costs the model (`weigh`). Losses of layers add up, so steps are
taken in the order of loss taken away for each byte; how many a bound on the error needs is found by bisection, each
trial a measurement of the whole quantized model. The same input gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data, load_data
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.layer_errors import TwinLinear, aligned, layers_of, quantized_bytes
from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens, summary
from instantrt.compiler.accuracy.weigh import share, stream_of, weigh
from instantrt.compiler.defaults import EVERY_GROUP, Formats, Groups
from instantrt.compiler.frontend.model import FloatModel, LlmShape
from instantrt.compiler.quant.config import expect
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import UINT8, Quantizer, QuantTensor, dequantize
from instantrt.passes.core.rewrite import PassLog, Reject
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.plugins.weight_only_gemm.semantics import quantize_rows

FLOAT = "float"
ROWS = 64  # of a layer's inputs, on which its formats are compared
LOGIT_BYTES = 1 << 29  # of the float model, kept while trials are compared with them
Say = Callable[[str], None]


@dataclass(frozen=True)
class Format:
    """What a layer's weights may become. `group` -1 is per channel."""

    bits: int
    group: int
    activations: str = "float"

    def __str__(self) -> str:
        return f"a{8 if self.activations == 'int8' else 16}w{self.bits}:{self.group}"


@dataclass(frozen=True)
class Raise:
    """One layer, one format up: `bytes` more on disk, `gain` less loss, in nats as far as losses add up."""

    layer: str
    before: str
    after: str
    bytes: int
    gain: float


@dataclass(frozen=True)
class Raised:
    """What a budget came to; figures are those of `metrics.summary`.

    layers   every layer whose format is not the one that was asked for, and its format
    steps    what was taken, from the coarsest formats where the size is bounded, else from those asked for
    """

    decisions: Decisions
    layers: Mapping[str, str]
    steps: tuple[Raise, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    bytes_before: int
    trials: int
    data: str

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def raised(self) -> int:
        """Layers that took a step."""
        return len(formats(list(self.steps)))

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

    def fill(self, decisions: Decisions, steps: list[Raise], free: int) -> list[Raise]:
        """The best of `steps` for which there is room. A layer that one does not fit for stays where it is."""
        while True:
            taken = affordable(steps, free)
            over = self.size_of(override(decisions, formats(taken))) - self.limit
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
    check(model, decisions, data, budget)
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
        after = measure(override(decisions, formats(steps))) if room is not None else measure.unquantized()
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
            figures[middle] = measure(override(decisions, formats(steps[:middle])))
            low, high = (middle, high) if budget.violations(figures[middle]) else (low, middle)
        steps, after = steps[:high], figures[high]
    layers = start | formats(steps)
    size = sum(quantized_bytes(q) for q in decisions.values() if isinstance(q, QuantTensor))
    chosen = override(decisions, formats(steps))
    return Raised(chosen, layers, tuple(steps), before, after, size, measure.trials, data.kind)


def formats(steps: list[Raise]) -> dict[str, str]:
    """Layer -> its format after `steps`."""
    return {step.layer: step.after for step in steps}


def within_budget(
    graph: gs.Graph, model: FloatModel, decisions: Decisions, request: Request, say: Say, room: Room | None
) -> tuple[Decisions, Raised]:
    """Finer formats for the worst layers: as many as the request's bounds need, or allow."""
    budget = Budget(request.max_kl, request.max_ppl_increase)
    data = load_data(model, request.text, longest=request.max_length)
    result = search(graph, model, decisions, data, budget, say, room)
    return result.decisions, result


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


def float_bytes(quant: QuantTensor) -> int:
    """Of the weight as the checkpoint has it."""
    stored = getattr(getattr(quant.source, "weight", None), "dtype", np.dtype(np.float16))
    return math.prod(quant.shape) * int(stored.itemsize)


def coarsest(decisions: Decisions, room: Room) -> dict[str, str]:
    """Layer -> the first rung of its ladder."""
    quants = [q for path, q in decisions.items() if isinstance(q, QuantTensor) and path not in room.heads]
    return {q.name: str(ladder(q, room.groups, coarser=True)[0][0]) for q in quants}


def check(model: FloatModel, decisions: Decisions, data: Data, budget: Budget) -> None:
    if model.llm is None:
        what, fix = "a budget is of causal LMs: it weighs next tokens", "--min-cosine with --verify bounds an encoder"
        raise UserError(what, where=str(model.folder), fix=fix)
    if budget.max_ppl_increase is not None and data.kind == "generated":
        raise UserError("perplexity needs a text", fix="--text FILE")
    for path, q in decisions.items():
        if isinstance(q, QuantTensor) and not isinstance(q.source, Quantizer):
            what = "a budget chooses how to quantize, but the checkpoint is quantized already"
            raise UserError(what, where=path, fix="start from the float checkpoint")


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


@dataclass(frozen=True)
class Rung:
    """A format of a layer: its bytes, and its squared relative output error."""

    form: str
    bytes: int
    error: float


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


def rungs(layer: TwinLinear, decisions: Decisions, x: Array, groups: Groups) -> list[Rung]:
    """What may become of one layer, the coarsest first, float last."""
    quant = decisions[layer.path]
    assert isinstance(quant, QuantTensor)
    found = [Rung(str(form), quantized_bytes(q), output_error(q, x)) for form, q in ladder(quant, groups)]
    return [*found, Rung(FLOAT, float_bytes(quant), 0.0)]


def ladder_steps(path: str, ladder: list[Rung], nats: float) -> Iterator[Raise]:
    """The steps of one layer that are worth taking: the corners of the convex hull of error over bytes.

    nats   what the error of the first rung costs
    """
    at, each = ladder[0], nats / max(ladder[0].error, np.finfo(np.float64).tiny)
    while better := [rung for rung in ladder if rung.bytes > at.bytes and rung.error < at.error]:
        start = at
        at = max(better, key=lambda rung: (start.error - rung.error) / (rung.bytes - start.bytes))
        yield Raise(path, start.form, at.form, at.bytes - start.bytes, each * (start.error - at.error))


def ladder(quant: QuantTensor, groups: Groups, *, coarser: bool = False) -> list[tuple[Format, QuantTensor]]:
    """The layer's own format and every finer one, coarsest first; `coarser`: those of larger groups before it."""
    k, own = quant.shape[1], form_of(quant)

    def fitting(bits: int) -> list[Format]:
        sizes = [g for g in (groups.int8 if bits == 8 else groups.uint4) if g == -1 or (k % g == 0 and g < k)]
        return [Format(bits, g) for g in sorted(sizes, key=lambda g: -(k if g == -1 else g))]

    same = [f for f in fitting(quant.bits) if f != Format(own.bits, own.group)]
    larger = [f for f in same if f.group == -1 or f.group > quant.group_size]
    finer = [f for f in same if f not in larger]
    if quant.activations == "int8":
        finer = [Format(8, -1), *finer]
    if quant.bits == 4:
        finer += fitting(8)
    return [(f, reformat(quant, f)) for f in (*(larger if coarser else ()), own, *finer)]


def form_of(quant: QuantTensor) -> Format:
    return Format(quant.bits, -1 if quant.per_channel else quant.group_size, quant.activations)


def reformat(quant: QuantTensor, form: Format) -> QuantTensor:
    """The same float weight in another format."""
    assert isinstance(quant.source, Quantizer)
    group = quant.shape[1] if form.group == -1 else form.group
    what = "the group does not divide the layer's input width"
    expect(quant.shape[1] % group == 0, str(form), what, f"a divisor of {quant.shape[1]}", quant.name)
    symmetric = form.activations == "int8"
    sizes: dict[str, Any] = {"bits": form.bits, "group_size": group, "symmetric": symmetric}
    sizes["zero_dtype"] = UINT8 if symmetric else quant.zero_dtype
    source = replace(quant.source, **sizes)
    return replace(quant, source=source, activations="int8" if symmetric else "float", **sizes)


def parse_format(text: str) -> Format:
    """`a16w4:32`, as `str(Format)` writes it."""
    mode, _, group = text.partition(":")
    return Format(int(mode[-1]), int(group), "int8" if mode.startswith("a8") else "float")


def output_error(quant: QuantTensor, x: Array) -> float:
    """(|x_hat W_hat^T - x W^T| / |x W^T|)^2 on some rows of x [..., K]; x_hat is x, or x in int8 per token."""
    rows = x.reshape(-1, x.shape[-1])
    off = size = 0.0
    for delta, exact in output_blocks(quant, rows[:: -(-len(rows) // ROWS)]):
        off += float(np.square(delta, dtype=np.float64).sum())
        size += float(np.square(exact, dtype=np.float64).sum())
    return off / max(size, np.finfo(np.float64).tiny)


def output_errors(quant: QuantTensor | Reject, x: Array) -> Array:
    """x_hat W_hat^T - x W^T: [rows of x, N]."""
    assert isinstance(quant, QuantTensor)
    return np.concatenate([delta for delta, _ in output_blocks(quant, x.reshape(-1, x.shape[-1]))], axis=1)


def output_blocks(quant: QuantTensor, rows: Array) -> Iterator[tuple[Array, Array]]:
    """(what quantization adds to x W^T, x W^T) for x [rows, K], some columns at a time."""
    assert isinstance(quant.source, Quantizer)
    seen = rows
    if quant.activations == "int8":
        steps, scale = quantize_rows(rows)
        seen = steps * scale
    for w, codes in aligned(quant.source.weight, quant):
        exact = rows @ w.T
        yield seen @ dequantize(codes, quant.group_size).T - exact, exact


def override(decisions: Decisions, layers: Mapping[str, str]) -> Decisions:
    """`decisions` with the formats that `layers` names: those a budget raised, as the manifest records them."""
    changed = dict(decisions)
    for path, name in layers.items():
        quant = changed.get(path)
        if not isinstance(quant, QuantTensor):
            raise UserError("no quantized layer of that name", where=path, found=f"format {name}")
        changed[path] = (
            Reject("the accuracy budget keeps it float") if name == FLOAT else reformat(quant, parse_format(name))
        )
    return changed

"""Spends bytes where they buy accuracy: the worst layers get a finer format until a bound on the model's error holds.

Every layer has a ladder of formats (uint4, smaller groups, int8, float). A step up costs bytes and takes away output
error, measured on real activations. Steps are taken in the order of error taken away for each byte; how many are needed
is found by bisection, each trial a measurement of the whole quantized model. The same input gives the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data, load_data
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.layer_errors import aligned, layers_of, quantized_bytes
from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens, summary
from instantrt.compiler.frontend.model import FloatModel, LlmShape
from instantrt.compiler.quant.config import expect
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import Quantizer, QuantTensor, dequantize
from instantrt.passes.core.rewrite import PassLog, Reject
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.plugins.weight_only_gemm.semantics import quantize_rows

GROUPS = (128, 64, 32)
FLOAT = "float"
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
    """One layer, one format up: `bytes` more on disk, `gain` less squared relative output error."""

    layer: str
    before: str
    after: str
    bytes: int
    gain: float


@dataclass(frozen=True)
class Raised:
    """What a budget came to. `layers` maps a layer raised to its new format; figures are those of `metrics.summary`."""

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


def search(graph: gs.Graph, model: FloatModel, decisions: Decisions, data: Data, budget: Budget, say: Say) -> Raised:
    """The fewest steps up the ladders after which `budget` holds for the twin against the float `graph`."""
    check(model, decisions, data, budget)
    assert model.llm is not None
    measure = Trial(graph, model.llm, first_batches(data, model.llm))
    before = after = measure(decisions)
    steps: list[Raise] = []
    trials = 1
    if budget.violations(before):
        say("weighing the layers")
        steps = plan_steps(graph, decisions, measure.batches[0][0])
        low, high = 0, len(steps)
        figures = {high: measure.unquantized()}
        while high - low > 1:
            middle = (low + high) // 2
            say(f"trying {middle} of {len(steps)} steps")
            figures[middle] = measure(override(decisions, formats(steps[:middle])))
            low, high = (middle, high) if budget.violations(figures[middle]) else (low, middle)
        steps, after, trials = steps[:high], figures[high], len(figures)
    layers = formats(steps)
    size = sum(quantized_bytes(q) for q in decisions.values() if isinstance(q, QuantTensor))
    return Raised(override(decisions, layers), layers, tuple(steps), before, after, size, trials, data.kind)


def formats(steps: list[Raise]) -> dict[str, str]:
    """Layer -> its format after `steps`."""
    return {step.layer: step.after for step in steps}


def within_budget(
    graph: gs.Graph, model: FloatModel, decisions: Decisions, request: Request, say: Say
) -> tuple[Decisions, Raised | None]:
    """Finer formats for the worst layers: those named in the request, then as many as its accuracy budget needs."""
    decisions = override(decisions, request.layers)
    if not request.has_budget:
        return decisions, None
    budget = Budget(request.max_kl, request.max_ppl_increase)
    result = search(graph, model, decisions, load_data(model, request.text, longest=request.max_length), budget, say)
    return result.decisions, result


def check(model: FloatModel, decisions: Decisions, data: Data, budget: Budget) -> None:
    if model.llm is None:
        raise UserError("a budget counts tokens; this model is no causal LM", where=str(model.folder))
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

    def __init__(self, graph: gs.Graph, llm: LlmShape, data: Data) -> None:
        self.graph, self.batches = graph, list(data.each(llm))
        self.logits = [Evaluation(graph, feeds).take("logits") for feeds, _ in self.batches]

    def __call__(self, decisions: Decisions) -> dict[str, float]:
        twin = pipeline.quantize(self.graph.copy(), decisions, PassLog())
        return self.figures([Evaluation(twin, feeds).take("logits") for feeds, _ in self.batches])

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


def plan_steps(graph: gs.Graph, decisions: Decisions, feeds: Mapping[str, Array]) -> list[Raise]:
    """All steps of all layers, the best first; a layer's own steps stay in order because each ladder is convex."""
    linears = [layer for layer in layers_of(graph, graph) if isinstance(decisions.get(layer.path), QuantTensor)]
    run = Evaluation(graph, feeds, keep=[name for layer in linears for name in (layer.x, layer.y)])
    steps: list[Raise] = []
    for layer in linears:
        quant = decisions[layer.path]
        assert isinstance(quant, QuantTensor)
        steps += ladder_steps(quant, run.peek(layer.x))
    return sorted(steps, key=lambda s: (-s.gain / s.bytes, s.layer))


def ladder_steps(quant: QuantTensor, x: Array) -> Iterator[Raise]:
    """The steps of one layer that are worth taking: the corners of the convex hull of error over bytes."""
    assert isinstance(quant.source, Quantizer)
    n, k = quant.shape
    stored = getattr(quant.source.weight, "dtype", np.dtype(np.float16))
    rungs = [(quantized_bytes(q), output_error(q, x), str(f)) for f, q in ladder(quant)]
    rungs.append((n * k * stored.itemsize, 0.0, FLOAT))
    at = 0
    while at < len(rungs) - 1:
        size, error, name = rungs[at]
        better = [i for i in range(at + 1, len(rungs)) if rungs[i][0] > size and rungs[i][1] < error]
        if not better:
            return
        best = max(better, key=lambda i: (error - rungs[i][1]) / (rungs[i][0] - size))
        yield Raise(quant.name, name, rungs[best][2], rungs[best][0] - size, error - rungs[best][1])
        at = best


def ladder(quant: QuantTensor) -> list[tuple[Format, QuantTensor]]:
    """The layer's own format and every finer one, coarsest first."""
    k = quant.shape[1]
    own = Format(quant.bits, -1 if quant.per_channel else quant.group_size, quant.activations)
    finer = [Format(quant.bits, g) for g in GROUPS if g < quant.group_size and k % g == 0]
    if quant.activations == "int8":
        finer = [Format(8, -1), *finer]
    if quant.bits == 4:
        finer += [Format(8, -1), *(Format(8, g) for g in GROUPS if k % g == 0 and g < k)]
    return [(f, reformat(quant, f)) for f in (own, *finer)]


def reformat(quant: QuantTensor, form: Format) -> QuantTensor:
    """The same float weight in another format."""
    assert isinstance(quant.source, Quantizer)
    group = quant.shape[1] if form.group == -1 else form.group
    what = "the group does not divide the layer's input width"
    expect(quant.shape[1] % group == 0, str(form), what, f"a divisor of {quant.shape[1]}", quant.name)
    symmetric = form.activations == "int8"
    sizes: dict[str, Any] = {"bits": form.bits, "group_size": group, "symmetric": symmetric}
    source = replace(quant.source, **sizes)
    return replace(quant, source=source, activations="int8" if symmetric else "float", **sizes)


def parse_format(text: str) -> Format:
    """`a16w4:32`, as `str(Format)` writes it."""
    mode, _, group = text.partition(":")
    return Format(int(mode[-1]), int(group), "int8" if mode.startswith("a8") else "float")


def output_error(quant: QuantTensor, x: Array) -> float:
    """(|x_hat W_hat^T - x W^T| / |x W^T|)^2 on x [..., K]; x_hat is x, or x in int8 per token."""
    assert isinstance(quant.source, Quantizer)
    rows = x.reshape(-1, x.shape[-1])
    seen = rows
    if quant.activations == "int8":
        steps, scale = quantize_rows(rows)
        seen = steps * scale
    off = size = 0.0
    for w, codes in aligned(quant.source.weight, quant):
        exact = rows @ w.T
        delta = seen @ dequantize(codes, quant.group_size).T - exact
        off += float(np.square(delta, dtype=np.float64).sum())
        size += float(np.square(exact, dtype=np.float64).sum())
    return off / max(size, np.finfo(np.float64).tiny)


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

"""What the bytes of a model cannot say: formats, scales and codes that are fitted to what it does with its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy import budget
from instantrt.compiler.accuracy.calibrate import calibrate, feeds_of_text, feeds_of_words, tokens_of
from instantrt.compiler.accuracy.data import generated, load_data, read_text
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.importance import input_energy, search_scales, smoothing
from instantrt.compiler.accuracy.ladder import override
from instantrt.compiler.defaults import Formats
from instantrt.compiler.frontend.adapter.folder import is_adapter
from instantrt.compiler.frontend.gguf import gguf_at
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.qdq.insert_qdq import Decisions

TOKENS = 128  # at random, for a search: 512 give no other loss (docs/facts.md, "Scales by inputs of random tokens")


def check_text(request: Request) -> None:
    """Refuses a text that is none, or too short to calibrate by, before the model is exported.

    How long one is, is known where the tokenizer is a file: that of an adapter may be its base's, some are made of
    other files, and a GGUF file's of its metadata.
    """
    if request.text is not None:
        read_text(request.text)
    if request.calibration is None:
        return
    folder = request.model if request.model.is_dir() else request.model.parent
    there = (folder / "tokenizer.json").is_file() and not is_adapter(request.model) and gguf_at(request.model) is None
    if there:
        tokens_of(folder, request.calibration)
    else:
        read_text(request.calibration)


def choose_formats(
    graph: gs.Graph,
    model: FloatModel,
    decisions: Decisions,
    formats: Formats,
    request: Request,
    say: Say,
    size_of: Callable[[Decisions], int],
) -> tuple[Decisions, budget.Raised | None]:
    """A format for each layer of the float `graph`: as it was recorded, or as the request's bounds have it.

    size_of   decisions -> bytes of the artifact's weights
    """
    if not request.has_budget:
        return override(decisions, request.layers), None
    folded, decisions = pipeline.fold_norms(graph, decisions, PassLog())
    room = budget.room_for(request, decisions, formats, size_of)
    decisions = search(folded, model, override(decisions, request.layers), formats, say)
    bounds = Budget(request.max_kl, request.max_ppl_increase)
    data = load_data(model, request.text, longest=request.max_length)
    raised = budget.search(folded, model, decisions, data, bounds, say, room)
    return raised.decisions, raised


def fit_codes(
    graph: gs.Graph,
    model: FloatModel,
    decisions: Decisions,
    formats: Formats,
    request: Request,
    say: Say,
) -> Decisions:
    """The same formats with codes by the calibration text, or with scales by a search, for the inputs in `graph`."""
    config, feeds = formats.config, list[Mapping[str, Array]]()
    if request.calibration is not None:
        feeds = feeds_of_text(model, request.calibration)
    elif config is not None and config.search != "none" and not config.activate_quant:
        feeds = feeds_of_words(model)
    if feeds:
        fitted = calibrate(graph, model, decisions, formats.heads, feeds, say)
        if fitted is decisions and request.calibration is not None:
            raise UserError("calibration says nothing without weight-only layers", fix="leave --calibration out")
        return fitted
    return search(graph, model, decisions, formats, say)


def smooth(
    graph: gs.Graph, model: FloatModel, decisions: Decisions, formats: Formats, say: Say, log: PassLog
) -> tuple[gs.Graph, Decisions]:
    """The float graph with the loud inputs of its int8 linears smoothed, where a search is asked for."""
    config = formats.config
    if config is None or config.search == "none" or not config.activate_quant:
        return graph, decisions
    say("looking for loud inputs")
    paths = {path for path, q in decisions.items() if isinstance(q, QuantTensor) and q.activations != "float"}
    factors = smoothing(graph, paths, model.llm, generated(model, tokens=TOKENS), say)
    return pipeline.smooth_inputs(graph, decisions, factors, paths, log)


def search(graph: gs.Graph, model: FloatModel, decisions: Decisions, formats: Formats, say: Say) -> Decisions:
    """Scales by the inputs that `graph` gives each layer for tokens at random, where a search is asked for.

    A causal LM whose inputs become int8 has them smoothed, and keeps the formula's scales: a search would win it 0.0003
    of 0.0122 nats for half of the time that it takes to compile (docs/facts.md, "Loud inputs of a causal LM").
    """
    config = formats.config
    if config is None or config.search == "none" or (config.activate_quant and model.llm is not None):
        return decisions
    say("measuring the inputs of each layer")
    return search_scales(decisions, input_energy(graph, model.llm, generated(model, tokens=TOKENS), say))

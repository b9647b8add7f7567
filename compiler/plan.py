"""plan(request): what a compilation will write, decided before a byte is: formats, graphs, who builds each engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.backend.onnx_writer import layout
from instantrt.compiler.backend.tensorrt.choose import Choice, choose_builder, compute_type, native_int4
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits
from instantrt.compiler.cache_type import INTEGERS, check_cache_type, with_cache
from instantrt.compiler.decide import check_head, check_tables, decide, heads_of, resolve, step_of
from instantrt.compiler.defaults import Formats, settle
from instantrt.compiler.early import check_early
from instantrt.compiler.fit import choose_formats, fit_codes, smooth
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.frontend.own_names import own_names
from instantrt.compiler.options import A8W8, INEXACT, LLM, TableFormat
from instantrt.compiler.request import Request, check_lengths, idle_notes, refuse_cosine, refuse_of_llm
from instantrt.compiler.say import Say
from instantrt.compiler.support import check_supported
from instantrt.compiler.target import Backend, Target, find_target
from instantrt.passes.core.causal import sees_ahead
from instantrt.passes.core.collector import settled, uncollected
from instantrt.passes.core.dump import Dump
from instantrt.passes.core.errors import reworded
from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.quant import Quantizer, QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.core.subgraphs import tensors
from instantrt.passes.ort.tables import SCALE_TYPE, QuantizeTables
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.passes.tensorrt.explicit_scales import documented

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.budget import Raised


@dataclass(frozen=True)
class Twin:
    """How each linear is quantized, and the canonical graph that says so, which every lowering is held against.

    `floating` is the same before quantization: the normalized float graph, norms folded where they are in the twin.
    `fitted`: the inputs of layers decide codes, and another processor, or other threads, may round those otherwise.
    """

    decisions: Decisions
    floating: gs.Graph
    canonical: gs.Graph
    raised: Raised | None = None
    fitted: bool = False

    @property
    def quantized(self) -> Mapping[str, QuantTensor]:
        return {path: q for path, q in self.decisions.items() if isinstance(q, QuantTensor)}


@dataclass(frozen=True)
class Plan:
    """What will be written, decided before a byte is: for each target a twin and a lowered graph, and the log.

    `model.graph` stays the normalized float graph. Targets may share a twin, and a lowered graph. `builders` and
    `types` say who builds each engine and in which type it computes, `limits` what all accept; `notes` are what the
    user should know. `whole_prompts`: a token sees those after it, so no prompt is run in pieces.
    """

    model: FloatModel
    twins: Mapping[str, Twin]
    lowered: Mapping[str, gs.Graph]
    log: PassLog
    builders: Mapping[str, Choice] = field(default_factory=dict)
    types: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    limits: EngineLimits = field(default_factory=EngineLimits)
    notes: tuple[str, ...] = ()
    whole_prompts: bool = False

    @property
    def each_twin(self) -> list[Twin]:
        """Every twin once."""
        return list({id(twin): twin for twin in self.twins.values()}.values())

    def size(self, target: str) -> int:
        """Bytes of the artifact's weights, laid out as they will be; the graph stays as it is."""
        return layout(self.lowered[target])[1]


def plan(
    request: Request, say: Say = lambda text: None, reads: Callable[[Iterable[Path]], None] = lambda files: None
) -> Plan:
    """Everything but the writing: exports, decides, inserts Q/DQ, lowers.

    reads   is told early where the weights lie
    """
    check_early(request)
    log = PassLog() if request.dump_passes is None else Dump(folder=request.dump_passes)
    say(f"reading {request.model}")
    with ExitStack() as stack:
        with uncollected():
            model = load(
                request.model,
                trust_remote_code=request.trust_remote_code,
                max_length=request.longest_sequence(),
                truncate_dim=request.truncate_dim,
                cache=request.cache,
                requantize=request.requantize,
                adapter=request.adapter,
                base=request.base,
                say=say,
                reads=reads,
            )
            stack.enter_context(settled())  # before the collector is back, which would look through torch at once
        stack.enter_context(reworded(own_names(model.held, request.model)))
        return decided(request, model, log, say)


def decided(request: Request, model: FloatModel, log: PassLog, say: Say) -> Plan:
    """The plan for a model that was read, whose graph is used up."""
    if model.llm is None:
        refuse_of_llm(request)
    if model.encoder is None:
        refuse_cosine(request.min_cosine, str(request.model))
    if model.llm is None and model.encoder is None:
        check_lengths(request)
    config = resolve(request, model)
    check_supported(request.resolved_targets(), config, plugin=request.plugin is not None)
    say("normalizing the graph")
    graph = pipeline.normalize(model.graph, log)
    gpu_targets = [t for t in request.resolved_targets() if t.backend is Backend.TENSORRT]
    types = {target.name: compute_type(target, model.types) for target in gpu_targets}
    check_cache_type(request, types)
    say("deciding how to quantize")
    # A scale is rounded to the type that its own target stores: no artifact depends on what is compiled beside it.
    # What a checkpoint stores, it stores for all.
    made: dict[tuple[object, ...], Twin] = {}
    twins: dict[str, Twin] = {}
    heads, notes = heads_of(graph, model), list(model.notes)
    limits = request.engine_limits(model.longest)
    check_head(request, config, heads)
    for target in request.resolved_targets():
        dtype = types.get(target.name, SCALE_TYPE)
        of_texts = model.encoder is not None
        formats = settle(
            request, target, config, pipeline.linears(graph), heads, of_floats=model.reader is None, of_texts=of_texts
        )
        tables = formats.embeddings if target.backend is Backend.ONNXRUNTIME else None
        if tables is not None:
            check_tables(request, graph)
        own = (dtype, formats.config, formats.head) if model.reader is None and config is not None else None
        key = (own, tables, target.name if request.max_size is not None else "")  # a size is of one artifact
        if key not in made:
            decisions = decide(graph, model, formats, dtype, step_of([target]))
            lower_one = partial(lower, target, types.get(target.name), request, limits, longest(request, model))
            made[key] = make_twin(graph, model, decisions, formats, request, log, say, lower_one, tables=tables)
            notes += formats.notes
        twins[target.name] = made[key]
    say("lowering the graph")
    lowered = lower_all(twins, types, request, limits, longest(request, model), log)
    options = request.engine_options()
    builders = {
        t.name: choose_builder(t, request.builder, int4=native_int4(lowered[t.name]), options=options)
        for t in gpu_targets
    }
    whole = model.llm is not None and sees_ahead(graph)
    notes += [note for name in lowered if name not in types for note in tied_notes(name, lowered[name])]
    notes += [*engine_notes(model, builders, types), *(model.reader.notes if model.reader else ())]
    notes += idle_notes(request, lacking(request, model, twins.values()))
    return Plan(model, twins, lowered, log, builders, types, limits, tuple(notes), whole)


def lacking(request: Request, model: FloatModel, twins: Iterable[Twin]) -> list[str]:
    """What this model has not, and options may want."""
    quantized = (q for twin in twins for q in twin.quantized.values())
    if model.llm is not None:
        inexact = any(q.activations == "float" or not q.per_channel for q in quantized)
    else:  # auto is exact, and channels of 8 bits have one form: passes/ort/linear.py
        inexact = request.cpu_preset == "fast" and any(not q.per_channel or q.bits != 8 for q in quantized)
    # A config that names the activations may say it, too: the spec has a key for each.
    a8w8 = request.quant_config is not None or (model.reader is not None and model.reader.activations == "int8")
    has = {INEXACT: inexact, LLM: model.llm is not None, A8W8: a8w8}
    return [what for what, there in has.items() if not there]


def make_twin(
    graph: gs.Graph,
    model: FloatModel,
    decisions: Decisions,
    formats: Formats,
    request: Request,
    log: PassLog,
    say: Say,
    lower_one: Callable[[gs.Graph, PassLog], gs.Graph],
    *,
    tables: TableFormat | None,
) -> Twin:
    """`lower_one` is what becomes of it; `tables`: what those of embeddings are in it, as they will be there."""

    def size_of(chosen: Decisions) -> int:
        folded, chosen = pipeline.fold_norms(graph, chosen, PassLog())
        return layout(lower_one(pipeline.quantize(folded.copy(), chosen, PassLog(), tables=tables), PassLog()))[1]

    decisions, raised = choose_formats(graph, model, decisions, formats, request, say, size_of)
    folded, plain = pipeline.fold_norms(graph, decisions, log)
    floating, decisions = smooth(folded, model, plain, formats, say, log)
    decisions = fit_codes(floating, model, decisions, formats, request, say)
    with uncollected():
        canonical = pipeline.quantize(floating.copy(), decisions, log, tables=tables)
        if request.kv_cache_type in INTEGERS:
            canonical = with_cache(canonical, request.kv_cache_type, model, longest(request, model), log, say)
        twin = Twin(decisions, floating, canonical, raised, fitted=floating is not folded or decisions is not plain)
    if tables == request.embeddings == "int8":
        pipeline.refuse_no_table(log, QuantizeTables)
    return twin


def longest(request: Request, model: FloatModel) -> int:
    """Tokens of a sequence that an artifact for a CPU takes; 0 where nothing says it."""
    return request.max_length or model.longest


def lower(
    target: Target,
    dtype: np.dtype[Any] | None,
    request: Request,
    limits: EngineLimits,
    longest: int,
    graph: gs.Graph,
    log: PassLog,
) -> gs.Graph:
    """The canonical `graph`, which is used up, for a target that computes in `dtype`; None: for a CPU."""
    if dtype is None:
        return pipeline.lower_onnxruntime(graph, target, request, log, longest)
    return pipeline.lower_tensorrt(graph, target, dtype, request, limits, log)


@uncollected()
def lower_all(
    twins: Mapping[str, Twin],
    types: Mapping[str, np.dtype[Any]],
    request: Request,
    limits: EngineLimits,
    longest: int,
    log: PassLog,
) -> dict[str, gs.Graph]:
    """A lowered graph for each target; targets of one twin that compute in one type, with the same operators, share."""
    lowered: dict[str, gs.Graph] = {}
    shared: dict[Hashable, gs.Graph] = {}
    for target in request.resolved_targets():
        dtype, twin, log.target = types.get(target.name), twins[target.name], target.name
        any_builder = request.plugin is not None or all(documented(q) for q in twin.quantized.values())
        form = (dtype, target.whole_operators, target.rtx or any_builder)
        key = (id(twin), *form) if dtype is not None else target.name
        if key not in shared:
            shared[key] = lower(target, dtype, request, limits, longest, twin.canonical.copy(), log)
        lowered[target.name] = shared[key]
    return lowered


def tied_notes(target: str, graph: gs.Graph) -> list[str]:
    """What an artifact for a CPU holds both as stored and as int8."""
    sources = [view.source for tensor in tensors(graph).values() if (view := view_of(tensor)) is not None]
    quantized = (source.source for source in sources if isinstance(source, QuantTensor))
    weights = {each.weight for each in quantized if isinstance(each, Quantizer)}
    what = "the tied table is twice in the file, as stored and as int8: --lm-head and --embeddings of one kind share it"
    return [f"{target}: {what}"] if weights.intersection(sources) else []


def engine_notes(
    model: FloatModel, builders: Mapping[str, Choice], types: Mapping[str, np.dtype[Any]]
) -> tuple[str, ...]:
    bfloat16 = compute_type(find_target("sm80"), model.types) != np.float16
    kits = [
        f"{name}: a build kit for TensorRT {find_target(name).tensorrt}, because {c.reason}"
        for name, c in builders.items()
        if c.flavour is None
    ]
    narrow = [
        f"{name}: computes in float16, the checkpoint is bfloat16: this GPU has none"
        for name, dtype in types.items()
        if bfloat16 and dtype == np.float16
    ]
    return (*kits, *narrow)

"""compile_model(request): the road from a checkpoint to artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.artifact.manifest import Artifact, TensorSpec, write_manifest
from instantrt.compiler.artifact.staging import LoweredFiles, Staging, artifacts_kept, check_out
from instantrt.compiler.backend.onnx_writer import Progress, place, write_model
from instantrt.compiler.backend.tensorrt.choose import (
    ENGINE,
    TIMINGS,
    Builder,
    Choice,
    Settings,
    build_engine,
    choose_builder,
    compute_type,
    native_int4,
    quantized_linears,
)
from instantrt.compiler.backend.tensorrt.kit import KIT, MODEL, Kit, finished, write_kit
from instantrt.compiler.backend.tensorrt.profiles import profiles
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.quant import instant, stored
from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.quant.resolve import resolve
from instantrt.compiler.request import PATHS, Request, check_options
from instantrt.compiler.serving.runtime.integrity import sha256
from instantrt.compiler.support import check_supported
from instantrt.compiler.target import Backend, Target, find_target
from instantrt.passes.core.dump import Dump
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog, Reject
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.passes.tensorrt.explicit_scales import documented

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.budget import Bought

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
FLOAT32 = np.dtype(np.float32)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Twin:
    """How each linear is quantized, and the canonical graph that says so, which every lowering is held against."""

    decisions: Decisions
    canonical: gs.Graph
    bought: Bought | None = None

    @property
    def quantized(self) -> Mapping[str, QuantTensor]:
        return {path: q for path, q in self.decisions.items() if isinstance(q, QuantTensor)}


@dataclass(frozen=True)
class Plan:
    """What will be written, decided before a byte is: for each target a twin and a lowered graph, and the ledger.

    `model.graph` stays the normalized float graph. Targets may share a twin, and a lowered graph. `builders` and
    `types` say who builds each engine and in which type it computes; `notes` are what the user should know.
    """

    model: FloatModel
    twins: Mapping[str, Twin]
    lowered: Mapping[str, gs.Graph]
    ledger: PassLog
    builders: Mapping[str, Choice] = field(default_factory=dict)
    types: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def each_twin(self) -> list[Twin]:
        """Every twin once."""
        return list({id(twin): twin for twin in self.twins.values()}.values())

    def size(self, target: str) -> int:
        """Bytes of the artifact's weights."""
        return place(self.lowered[target])[1]


def plan(request: Request, say: Say = lambda text: None) -> Plan:
    """Everything but the writing: exports, decides, inserts Q/DQ, lowers."""
    say(f"reading {request.model}")
    model = load(request.model, trust_remote_code=request.trust_remote_code)
    config, reader = resolve(request, model)
    check_supported(request.resolved_targets(), config, plugin=request.plugin is not None)
    ledger = PassLog() if request.dump_passes is None else Dump(folder=request.dump_passes)
    graph = pipeline.normalize(model.graph, ledger)
    gpu_targets = [t for t in request.resolved_targets() if t.backend is Backend.TENSORRT]
    types = {target.name: compute_type(target, model.types) for target in gpu_targets}
    say("deciding how to quantize")
    # A scale is rounded to the type that its own target stores: no artifact depends on what is compiled beside it.
    # What a checkpoint stores, it stores for all.
    made: dict[np.dtype[Any] | None, Twin] = {}
    twins: dict[str, Twin] = {}
    for target in request.resolved_targets():
        dtype = types.get(target.name, FLOAT32)
        key = dtype if reader is None and config is not None else None
        if key not in made:
            decisions = decide(graph, model, config, reader, request, dtype)
            made[key] = make_twin(graph, model, decisions, request, ledger, say)
        twins[target.name] = made[key]
    lowered = lower(twins, model, types, request, ledger)
    options = request.engine_options()
    builders = {
        t.name: choose_builder(t, request.builder, int4=native_int4(lowered[t.name]), options=options)
        for t in gpu_targets
    }
    notes = (*model.notes, *engine_notes(model, builders, types), *(reader.notes if reader else ()))
    return Plan(model, twins, lowered, ledger, builders, types, notes)


def make_twin(
    graph: gs.Graph, model: FloatModel, decisions: Decisions, request: Request, ledger: PassLog, say: Say
) -> Twin:
    bought = None
    if request.layers or request.has_budget:
        from instantrt.compiler.accuracy.budget import within_budget

        decisions, bought = within_budget(graph, model, decisions, request, say)
    return Twin(decisions, pipeline.quantize(graph.copy(), decisions, ledger), bought)


def lower(
    twins: Mapping[str, Twin],
    model: FloatModel,
    types: Mapping[str, np.dtype[Any]],
    request: Request,
    ledger: PassLog,
) -> dict[str, gs.Graph]:
    """A lowered graph for each target; targets that compute in one type, with the same operators, share one."""
    lowered: dict[str, gs.Graph] = {}
    shared: dict[tuple[np.dtype[Any], bool, bool], gs.Graph] = {}
    limits = request.engine_limits(model.llm.max_length if model.llm else 0)
    for target in request.resolved_targets():
        dtype, twin, ledger.target = types.get(target.name), twins[target.name], target.name
        if dtype is None:
            lowered[target.name] = pipeline.lower_onnxruntime(twin.canonical.copy(), target, request, ledger)
        else:
            any_builder = request.plugin is not None or all(documented(q) for q in twin.quantized.values())
            key = (dtype, target.whole_operators, target.rtx or any_builder)
            if key not in shared:
                shared[key] = pipeline.lower_tensorrt(twin.canonical.copy(), target, dtype, request, limits, ledger)
            lowered[target.name] = shared[key]
    return lowered


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


def decide(
    graph: gs.Graph,
    model: FloatModel,
    config: QuantConfig | None,
    reader: stored.Reader | None,
    request: Request,
    scale_dtype: np.dtype[Any],
) -> Decisions:
    """How each linear is quantized, or why it is not."""
    found = pipeline.linears(graph)
    if config is None:
        return {}
    if not found:
        raise UserError(
            "the model has no linear layer to quantize",
            expected="MatMul or Gemm by a constant float matrix",
            fix="compile it without --quant",
        )
    for pattern in config.ignore:
        if not any(QuantConfig(ignore=(pattern,)).ignored(each.path) for each in found):
            raise UserError("an ignore pattern matches no layer", found=repr(pattern), expected=found[0].path + ", say")
    if reader is not None:
        constants = [name for name, tensor in graph.tensors().items() if isinstance(tensor, gs.Constant)]
        decisions = stored.decide(found, model.tensors, constants, reader, config)
    else:
        head = next((f.path for f in found if model.llm is not None and f.shape[0] == model.llm.vocab), None)
        decisions = instant.decide(found, config, scale_dtype, head, request.lm_head)
    if not any(isinstance(d, QuantTensor) for d in decisions.values()):
        reasons = dict.fromkeys(d.reason for d in decisions.values() if isinstance(d, Reject))
        raise UserError("no linear layer is left to quantize", found="; ".join(reasons))
    return decisions


def compile_model(
    request: Request, say: Say = lambda text: None, progress: Progress = lambda name, size: None
) -> list[Artifact]:
    """Compiles and writes `request.out`: `<target>/model.onnx` with its data and tokenizer files, and manifest.json."""
    check_options(request)
    check_out(request.out, request.resolved_targets(), [request.model])
    return compile_planned(request, plan(request, say), progress)


def compile_planned(request: Request, planned: Plan, progress: Progress = lambda name, size: None) -> list[Artifact]:
    """Writes what was planned; all of it appears at once."""
    with Staging() as staging:
        return write_artifacts(request, planned, staging, progress)


def write_artifacts(request: Request, planned: Plan, staging: Staging, progress: Progress) -> list[Artifact]:
    """Writes, aside, what `request.out` will be: a folder for each target, links to what stays, the manifest of all."""
    targets = request.resolved_targets()
    check_out(request.out, targets, [request.model])
    out = staging.aside(request.out)
    inputs = hashed_aside(planned.model.files)
    with LoweredFiles(out, progress) as files:
        artifacts = [write_target(request, planned, target, files, inputs) for target in targets]
    kept = artifacts_kept(request.out, targets)
    for artifact in kept:
        (out / artifact.target).symlink_to(request.out.absolute() / artifact.target)
    write_manifest(out, [*kept, *artifacts])
    return artifacts


def write_target(
    request: Request, planned: Plan, target: Target, files: LoweredFiles, inputs: Callable[[], Mapping[str, str]]
) -> Artifact:
    """Writes <target>/, which holds model.onnx, model.engine or a build kit."""
    graph, choice = planned.lowered[target.name], planned.builders.get(target.name)
    folder = files.out / target.name
    folder.mkdir()
    copy_side_files(planned.model.folder, folder)
    artifact = outline(request, planned, target)

    def complete(artifact: Artifact) -> Artifact:
        return replace(artifact, digests=digests(folder), source={**artifact.source, "files": inputs()})

    if choice is not None:
        return write_engine(request, planned, target, choice, artifact, files, folder, complete)
    write_model(graph, folder / MODEL, files.progress)
    return complete(artifact)


def outline(request: Request, planned: Plan, target: Target) -> Artifact:
    """The artifact as far as the plan knows it."""
    graph, twin, choice = planned.lowered[target.name], planned.twins[target.name], planned.builders.get(target.name)
    kind, file = ("onnx", MODEL) if choice is None else ("engine", ENGINE) if choice.flavour else ("kit", KIT)
    return Artifact(
        target=target.name,
        kind=kind,
        path=f"{target.name}/{file}",
        inputs=specs(graph.inputs),
        outputs=specs(graph.outputs),
        quant={path: str(q) for path, q in twin.quantized.items()},
        llm=asdict(planned.model.llm) if planned.model.llm else None,
        limits={"cache": cache_kind(graph)} if planned.model.llm else {},
        digests={},
        source=source(request, twin),
        engine={"builder": choice.flavour} if choice is not None and choice.flavour else None,
    )


def write_engine(
    request: Request,
    planned: Plan,
    target: Target,
    choice: Choice,
    artifact: Artifact,
    files: LoweredFiles,
    folder: Path,
    complete: Callable[[Artifact], Artifact],
) -> Artifact:
    """An engine in `folder`, or the kit to build it elsewhere; `complete` adds what is known once it is there."""
    graph, llm = planned.lowered[target.name], planned.model.llm
    limits = request.engine_limits(llm.max_length if llm else 0)
    ranges = profiles(graph.inputs, limits, llm=llm is not None)
    library = request.library(target)
    libraries = () if library is None else (Path(shutil.copy(library, folder)),)
    settings = Settings(planned.types[target.name].name, ranges, request.engine_options(), libraries)
    linears = quantized_linears(graph)
    artifact = replace(
        artifact,
        limits={**artifact.limits, **asdict(limits), "logits": request.logits},
        plugins=tuple(f"{target.name}/{library.name}" for library in libraries),
    )
    if choice.flavour is None:
        files.link(graph, folder)
        artifact = complete(artifact)
        write_kit(folder, settings, linears, artifact)
        known = {**artifact.digests, artifact.path: sha256(folder / KIT)}
        return replace(artifact, digests=dict(sorted(known.items())))
    onnx, timings = files.path(graph), request.timing_cache or timing_cache(request.out, target)
    engine = build_engine(choice, target, onnx, folder, settings, linears, timings, lambda t: files.progress(t, 0))
    return complete(replace(artifact, engine=engine))


def timing_cache(out: Path, target: Target) -> Path:
    """Beside the artifact's folder, which each build replaces."""
    return out / f"{target.name}.{TIMINGS}"


def build_kit(kit: Kit, out: Path, builder: Builder, say: Say) -> Artifact:
    """Finishes a build kit on the machine it was made for: OUT/<target>/model.engine, and its entry in the manifest.

    OUT may be the folder that the kit lies in; what else is there stays.
    """
    check_out(out, [kit.target])
    choice = choose_builder(kit.target, builder, options=kit.settings.options)
    if choice.flavour is None:
        raise UserError(f"this machine cannot build for {kit.target.name} either", found=choice.reason)
    with Staging() as staging:
        folder, timings = staging.aside(out) / kit.target.name, timing_cache(out, kit.target)
        folder.mkdir()
        copy_side_files(kit.folder, folder)
        for library in kit.settings.plugins:
            shutil.copy(library, folder)
        engine = build_engine(choice, kit.target, kit.onnx, folder, kit.settings, kit.linears, timings, say)
        artifact = finished(kit, engine, digests(folder), f"{kit.target.name}/{ENGINE}")
        write_manifest(folder.parent, [*artifacts_kept(out, [kit.target]), artifact])
    return artifact


def copy_side_files(source: Path, folder: Path) -> None:
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def hashed_aside(files: Iterable[Path]) -> Callable[[], dict[str, str]]:
    """Hashes `files` in a thread that no exit waits for; what is returned waits for their names and digests."""
    found: Future[dict[str, str]] = Future()

    def work() -> None:
        try:
            found.set_result({path.name: sha256(path) for path in files})
        except OSError as error:
            found.set_exception(UserError("the model's files changed meanwhile", found=str(error)))
        except BaseException as error:  # whoever waits must hear of it
            found.set_exception(error)

    Thread(target=work, name="digests of the inputs", daemon=True).start()
    return found.result


def digests(folder: Path) -> dict[str, str]:
    return {f"{folder.name}/{path.name}": sha256(path) for path in sorted(folder.iterdir())}


def cache_kind(graph: gs.Graph) -> str:
    """`shared`: past and present may be one buffer of the maximum length; `concat`: present is a longer copy."""
    present = [t for t in graph.outputs if t.name.startswith("present.")]
    in_place = all(t.inputs and t.inputs[0].op in ("GroupQueryAttention", "TensorScatter") for t in present)
    return "shared" if in_place else "concat"


def specs(tensors: list[gs.Variable]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, np.dtype(t.dtype).name, tuple(t.shape)) for t in tensors)


def source(request: Request, twin: Twin) -> dict[str, Any]:
    """What an artifact is made of: the model's name and the request.

    No path of this machine is in it: the same input gives the same bytes anywhere. A budget is what it bought.
    """
    layers = {**request.layers, **(twin.bought.layers if twin.bought is not None else {})}
    asked = {**asdict(request), "layers": layers, "max_kl": None, "max_ppl_increase": None}
    said = {key: value for key, value in asked.items() if key not in ("targets", *PATHS)}
    return {"model": request.model_name, "request": said}

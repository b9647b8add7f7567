"""compile_model(request): the road from a checkpoint to artifacts."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from compiler import pipeline
from compiler.artifact import MANIFEST, Artifact, TensorSpec, read_manifest, write_manifest
from compiler.backend.writer import Progress, place, write_model
from compiler.checkpoint import read_json
from compiler.engine import (
    ENGINE,
    Builder,
    Choice,
    Settings,
    build_engine,
    choose_builder,
    compute_type,
    native_int4,
    quantized_linears,
)
from compiler.frontend import load
from compiler.frontend.model import FloatModel
from compiler.kit import KIT, MODEL, Kit, finished, write_kit
from compiler.profiles import profiles
from compiler.quant import instant, stored
from compiler.quant.config import QuantConfig
from compiler.quant.resolve import resolve
from compiler.request import Request
from compiler.support import check_supported
from compiler.target import Backend, Target, find_target
from compiler.triton.integrity import sha256
from passes.errors import UserError
from passes.explicit_scales import documented
from passes.insert_qdq import Decisions
from passes.quant import QuantTensor
from passes.rewrite import Ledger

if TYPE_CHECKING:
    from compiler.accuracy.budget import Bought

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
    ledger: Ledger
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
    ledger = Ledger()
    graph = pipeline.normalize(model.graph, ledger)
    gpu_targets = [t for t in request.resolved_targets() if t.backend is Backend.TENSORRT]
    types = {target.name: compute_type(target, stored_types(model)) for target in gpu_targets}
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
    builders = {t.name: choose_builder(t, request.builder, int4=native_int4(lowered[t.name])) for t in gpu_targets}
    notes = (*engine_notes(model, builders, types), *(reader.notes if reader else ()))
    return Plan(model, twins, lowered, ledger, builders, types, notes)


def make_twin(
    graph: gs.Graph, model: FloatModel, decisions: Decisions, request: Request, ledger: Ledger, say: Say
) -> Twin:
    bought = None
    if request.layers or request.has_budget:
        from compiler.accuracy.budget import within_budget

        decisions, bought = within_budget(graph, model, decisions, request, say)
    return Twin(decisions, pipeline.quantize(graph.copy(), decisions, ledger), bought)


def lower(
    twins: Mapping[str, Twin],
    model: FloatModel,
    types: Mapping[str, np.dtype[Any]],
    request: Request,
    ledger: Ledger,
) -> dict[str, gs.Graph]:
    """A lowered graph for each target; targets that compute in one type, with the same operators, share one."""
    lowered: dict[str, gs.Graph] = {}
    shared: dict[tuple[np.dtype[Any], bool, bool], gs.Graph] = {}
    limits = request.engine_limits(model.llm.max_length if model.llm else 0)
    for target in request.resolved_targets():
        dtype, twin = types.get(target.name), twins[target.name]
        if dtype is None:
            lowered[target.name] = pipeline.lower_onnxruntime(twin.canonical.copy(), target, request, ledger)
            continue
        any_builder = request.plugin is not None or all(documented(q) for q in twin.quantized.values())
        key = (dtype, target.whole_operators, target.rtx or any_builder)
        if key not in shared:
            shared[key] = pipeline.lower_tensorrt(twin.canonical.copy(), target, dtype, request, limits, ledger)
        lowered[target.name] = shared[key]
    return lowered


def stored_types(model: FloatModel) -> Mapping[np.dtype[Any], int]:
    """Bytes of the checkpoint in each of its types."""
    sizes: Counter[np.dtype[Any]] = Counter()
    for tensor in model.tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape) * tensor.dtype.itemsize
    return sizes


def engine_notes(
    model: FloatModel, builders: Mapping[str, Choice], types: Mapping[str, np.dtype[Any]]
) -> tuple[str, ...]:
    bfloat16 = compute_type(find_target("sm80"), stored_types(model)) != np.float16
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
    for pattern in config.ignore:
        if not any(QuantConfig(ignore=(pattern,)).ignored(each.path) for each in found):
            raise UserError("an ignore pattern matches no layer", found=repr(pattern), expected=found[0].path + ", say")
    if reader is not None:
        constants = [name for name, tensor in graph.tensors().items() if isinstance(tensor, gs.Constant)]
        return stored.decide(found, model.tensors, constants, reader, config)
    head = next((f.path for f in found if model.llm is not None and f.shape[0] == model.llm.vocab), None)
    return instant.decide(found, config, scale_dtype, head, request.lm_head)


def compile_model(request: Request, say: Say = lambda text: None, progress: Progress = lambda name, size: None) -> Plan:
    """Compiles and writes `request.out`: `<target>/model.onnx` with its data and tokenizer files, and manifest.json."""
    planned = plan(request, say)
    compile_planned(request, planned, progress)
    return planned


def compile_planned(request: Request, planned: Plan, progress: Progress) -> list[Artifact]:
    """Writes what was planned; a target's folder appears when it is complete, the manifest last."""
    request.out.mkdir(parents=True, exist_ok=True)
    inputs = hashed_aside(planned.model.files)
    with LoweredFiles(request.out, progress) as files:
        artifacts = [write_target(request, planned, target, files) for target in request.resolved_targets()]
    bought = next(iter(planned.twins.values())).bought
    chosen = {**request.layers, **bought.layers} if bought is not None else request.layers
    asked = summary(replace(request, layers=chosen, max_kl=None, max_ppl_increase=None))
    write_manifest(request.out, artifacts, {"model": request.model.name, "files": inputs(), "request": asked})
    return artifacts


def write_target(request: Request, planned: Plan, target: Target, files: LoweredFiles) -> Artifact:
    """Writes OUT/<target>/, which holds model.onnx, model.engine or a build kit."""
    graph, choice = planned.lowered[target.name], planned.builders.get(target.name)
    artifact = Artifact(
        target=target.name,
        kind="onnx",
        path=f"{target.name}/{MODEL}",
        inputs=specs(graph.inputs),
        outputs=specs(graph.outputs),
        quant={path: str(q) for path, q in planned.twins[target.name].quantized.items()},
        llm=asdict(planned.model.llm) if planned.model.llm else None,
        limits={"cache": cache_kind(graph)} if planned.model.llm else {},
        digests={},
    )
    with replaced_folder(request.out / target.name) as folder:
        copy_side_files(planned.model.folder, folder)
        if choice is None:
            write_model(graph, folder / MODEL, files.progress)
        else:
            artifact = write_engine(request, planned, target, choice, artifact, files, folder)
        return replace(artifact, digests=artifact.digests or digests(folder, target.name))


def write_engine(
    request: Request,
    planned: Plan,
    target: Target,
    choice: Choice,
    artifact: Artifact,
    files: LoweredFiles,
    folder: Path,
) -> Artifact:
    """An engine in `folder`, or the kit to build it elsewhere."""
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
        artifact = replace(artifact, digests=digests(folder, target.name))
        write_kit(folder, settings, linears, artifact)
        known = {**artifact.digests, f"{target.name}/{KIT}": sha256(folder / KIT)}
        return replace(artifact, kind="kit", path=f"{target.name}/{KIT}", digests=dict(sorted(known.items())))
    onnx = files.path(graph)
    engine = build_engine(choice, target, onnx, folder, settings, linears, lambda text: files.progress(text, 0))
    return replace(artifact, kind="engine", path=f"{target.name}/{ENGINE}", engine=engine)


class LoweredFiles:
    """Lowered graphs on disk beside the output, each written once however many targets share it; gone at the end."""

    def __init__(self, out: Path, progress: Progress) -> None:
        self.out, self.progress = out, progress
        self.folders: dict[int, Path] = {}

    def __enter__(self) -> LoweredFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)

    def path(self, graph: gs.Graph) -> Path:
        """The model file of `graph`."""
        if id(graph) not in self.folders:
            self.folders[id(graph)] = Path(tempfile.mkdtemp(prefix=".lowered.", dir=self.out))
            write_model(graph, self.folders[id(graph)] / MODEL, self.progress)
        return self.folders[id(graph)] / MODEL

    def link(self, graph: gs.Graph, folder: Path) -> None:
        """Puts the files of `graph` into `folder`, without a second copy of their bytes."""
        for file in self.path(graph).parent.iterdir():
            os.link(file, folder / file.name)


def build_kit(kit: Kit, out: Path, builder: Builder, say: Say) -> Artifact:
    """Finishes a build kit on the machine it was made for: OUT/<target>/model.engine, and its entry in the manifest.

    OUT may be the folder that the kit lies in; what else is there stays.
    """
    there = (out / MANIFEST).is_file()
    others = [a for a in read_manifest(out) if a.target != kit.target.name] if there else []
    source = read_json(out / MANIFEST)["source"] if there else {"kit": kit.folder.name}
    choice = choose_builder(kit.target, builder)
    if choice.flavour is None:
        raise UserError(f"this machine cannot build for {kit.target.name} either", found=choice.reason)
    out.mkdir(parents=True, exist_ok=True)
    with replaced_folder(out / kit.target.name) as folder:
        copy_side_files(kit.folder, folder)
        for library in kit.settings.plugins:
            shutil.copy(library, folder)
        engine = build_engine(choice, kit.target, kit.onnx, folder, kit.settings, kit.linears, say)
        artifact = finished(kit, engine, digests(folder, kit.target.name), f"{kit.target.name}/{ENGINE}")
    write_manifest(out, [*others, artifact], source)
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


def digests(folder: Path, target: str) -> dict[str, str]:
    return {f"{target}/{path.name}": sha256(path) for path in sorted(folder.iterdir())}


@contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """A folder written beside `final` that takes its place when complete, and vanishes when anything fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if final.exists():
            old = partial.with_name(partial.name + ".old")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_kind(graph: gs.Graph) -> str:
    """`shared`: past and present may be one buffer of the maximum length; `concat`: present is a longer copy."""
    present = [t for t in graph.outputs if t.name.startswith("present.")]
    in_place = all(t.inputs and t.inputs[0].op in ("GroupQueryAttention", "TensorScatter") for t in present)
    return "shared" if in_place else "concat"


def specs(tensors: list[gs.Variable]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, np.dtype(t.dtype).name, tuple(t.shape)) for t in tensors)


def summary(request: Request) -> dict[str, Any]:
    """The request without paths of this machine: the same input gives the same bytes anywhere."""
    local = ("model", "out", "targets", "timing_cache", "text", "plugin")
    return {key: value for key, value in asdict(request).items() if key not in local}

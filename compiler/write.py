"""What was planned, written: OUT/<target>/ with an ONNX model, an engine or a kit, and the manifest."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.artifact.digest import digests_of, sha256
from instantrt.compiler.artifact.hashing import Hashing
from instantrt.compiler.artifact.manifest import ENGINE, KIT, MODEL, Artifact, TensorSpec, write_manifest
from instantrt.compiler.artifact.staging import Staging, artifacts_kept, check_out, new_folder, with_choices
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.choose import EngineSettings, build_engine, quantized_linears, timing_cache
from instantrt.compiler.backend.tensorrt.kit import write_kit
from instantrt.compiler.backend.tensorrt.profiles import profiles
from instantrt.compiler.plan import Plan, Twin, longest
from instantrt.compiler.request import BOUNDS, UNRECORDED, Request
from instantrt.compiler.target import Target
from instantrt.compiler.watch import SILENT, Watch
from instantrt.passes.core.names import LOGITS, PRESENT


def write_planned(request: Request, planned: Plan) -> list[Artifact]:
    """Writes `request.out`; all of it appears at once."""
    with Staging() as staging, Hashing() as hashing:
        return stage_artifacts(request, planned, staging, hashing, SILENT)


def stage_artifacts(
    request: Request, planned: Plan, staging: Staging, hashing: Hashing, watch: Watch
) -> list[Artifact]:
    """Writes what `request.out` will be: a folder for each target, links to what stays, the manifest of all."""
    targets = request.resolved_targets()
    check_out(request.out, targets, [request.model])
    out = staging.staged(request.out)
    hashing.begin(planned.model.files)
    with Writer(request, planned, out, hashing, watch) as writer:
        artifacts = [writer.write(target) for target in targets]
    kept = artifacts_kept(request.out, targets)
    for artifact in kept:
        (out / artifact.target).symlink_to(request.out.absolute() / artifact.target)
    write_manifest(out, [*kept, *artifacts])
    return artifacts


class Writer:
    """Writes the targets of one plan into `out`.

    What targets share is made once: the digests of the model's files, and a lowered graph on disk that engines are
    built from and kits hold; the latter is gone at the end.
    """

    def __init__(self, request: Request, planned: Plan, out: Path, hashing: Hashing, watch: Watch) -> None:
        self.request, self.planned, self.out, self.hashing, self.watch = request, planned, out, hashing, watch
        self.lowered: dict[int, tuple[Path, Mapping[str, str]]] = {}  # id of a graph -> its files' folder and digests

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for folder, _ in self.lowered.values():
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, target: Target) -> Artifact:
        """Writes <target>/, which holds model.onnx, model.engine or a build kit."""
        artifact, graph = outline(self.request, self.planned, target), self.planned.lowered[target.name]
        folder = new_folder(self.out, target, self.planned.model.folder)
        library = self.request.library(target)
        for file in with_choices(library) if library is not None else ():
            shutil.copy(file, folder)
        if artifact.kind == "onnx":
            return self.complete(artifact, folder, self.write_graph(target, folder))
        settings = EngineSettings(
            target=target,
            precision=self.planned.types[target.name].name,
            profiles=profiles(graph.inputs, self.planned.limits, llm=self.planned.model.llm is not None),
            options=self.request.engine_options(),
            plugins=(folder / library.name,) if library is not None else (),
            linears=quantized_linears(graph),
        )
        files, known = self.lowered_files(target)
        flavour = self.planned.builders[target.name].flavour
        if flavour is not None:
            timings = self.request.timing_cache or timing_cache(self.request.out, target)
            self.watch.say(f"building the engine for {target.name}")
            engine = build_engine(flavour, settings, files / MODEL, folder, timings, self.watch.say)
            return self.complete(replace(artifact, engine=engine), folder)
        for file in files.iterdir():
            os.link(file, folder / file.name)  # no second copy of their bytes
        artifact = self.complete(artifact, folder, known)
        write_kit(folder, settings, artifact)
        return replace(
            artifact, digests=dict(sorted({**artifact.digests, artifact.path: sha256(folder / KIT)}.items()))
        )

    def complete(self, artifact: Artifact, folder: Path, known: Mapping[str, str] | None = None) -> Artifact:
        """The artifact with what is known once its files are there; `known` are digests taken as they were written."""
        digests, inputs = digests_of(folder, known), self.hashing.by_name(self.planned.model.files)
        return replace(artifact, digests=digests, source={**artifact.source, "files": inputs})

    def write_graph(self, target: Target, folder: Path) -> Mapping[str, str]:
        """The target's lowered graph as a model file and its data; their digests."""
        self.watch.writing(self.planned.size(target.name))
        return write_model(self.planned.lowered[target.name], folder / MODEL, self.watch.progress)

    def lowered_files(self, target: Target) -> tuple[Path, Mapping[str, str]]:
        """The folder with the model file of the target's graph, written once for all that share it; their digests."""
        graph = self.planned.lowered[target.name]
        if id(graph) not in self.lowered:
            folder = Path(tempfile.mkdtemp(prefix=".lowered.", dir=self.out))
            self.lowered[id(graph)] = folder, {}  # first: whatever happens, it goes
            self.lowered[id(graph)] = folder, self.write_graph(target, folder)
        return self.lowered[id(graph)]


def outline(request: Request, planned: Plan, target: Target) -> Artifact:
    """The artifact as far as the plan knows it."""
    graph, twin, choice = planned.lowered[target.name], planned.twins[target.name], planned.builders.get(target.name)
    kind, file = ("onnx", MODEL) if choice is None else ("engine", ENGINE) if choice.flavour else ("kit", KIT)
    llm, encoder, library = planned.model.llm, planned.model.encoder, request.library(target)
    limits: dict[str, Any] = {"cache": cache_kind(graph), "logits": logits_kind(graph)} if llm else {}
    if planned.whole_prompts:
        limits["prompts"] = "whole"
    if choice is not None:
        limits |= asdict(planned.limits)
    elif request.max_length is not None:
        limits["max_length"] = request.max_length
    return Artifact(
        target=target.name,
        kind=kind,
        path=f"{target.name}/{file}",
        inputs=specs(graph.inputs),
        outputs=specs(graph.outputs),
        quant={path: str(q) for path, q in twin.quantized.items()},
        llm=asdict(llm) if llm else None,
        encoder={**asdict(encoder), "max_length": longest(request, planned.model), **planned.model.text}
        if encoder
        else None,
        digests={},
        source={**source(request, twin), "account": planned.model.account},
        limits=limits,
        plugins=(f"{target.name}/{library.name}",) if library is not None else (),
        engine={"builder": choice.flavour} if choice is not None and choice.flavour else None,
    )


IN_PLACE = (
    "GroupQueryAttention",
    "CpuAttention",
    "CpuAttentionByToken",
    "TensorScatter",
)  # whose past and present may be one buffer


def cache_kind(graph: gs.Graph) -> str:
    """`shared`: past and present may be one buffer of the maximum length; `concat`: present is a longer copy."""
    present = [t for t in graph.outputs if t.name.startswith(PRESENT)]
    in_place = all(t.inputs and t.inputs[0].op in IN_PLACE for t in present)
    return "shared" if in_place else "concat"


def logits_kind(graph: gs.Graph) -> str:
    """`last`: of each sequence's last new token; `all`: of every new token."""
    (logits,) = (t for t in graph.outputs if t.name == LOGITS)
    return "last" if logits.shape[1] == 1 else "all"


def specs(tensors: list[gs.Variable]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, np.dtype(t.dtype).name, tuple(t.shape)) for t in tensors)


def source(request: Request, twin: Twin) -> dict[str, Any]:
    """What an artifact is made of: the model's name and the request.

    No path of this machine is in it: the same input gives the same bytes anywhere. A budget is the formats it chose.
    """
    layers = {**request.layers, **(twin.raised.layers if twin.raised is not None else {})}
    asked = {**asdict(request), "layers": layers} | dict.fromkeys(BOUNDS)
    said = {key: value for key, value in asked.items() if key not in UNRECORDED}
    text = request.calibration
    return {"model": request.model_name, "request": said} | ({"calibration": sha256(text)} if text is not None else {})

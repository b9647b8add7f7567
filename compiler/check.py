"""`instantrt check DIR`: are the artifacts what was written, and can this machine load them? In words for people."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.artifact.check import check_digests, inside
from instantrt.compiler.artifact.manifest import MODEL, Artifact, read_manifest
from instantrt.compiler.backend.tensorrt.build import PRODUCT, load, read_header
from instantrt.compiler.backend.tensorrt.gpu import describe, gpus, no_rtx_here
from instantrt.compiler.backend.tensorrt.header import Header
from instantrt.compiler.frontend.model import EncoderShape, LlmShape
from instantrt.compiler.smoke.process import LOADING, ModelOrder, started
from instantrt.compiler.smoke.steps import fed, steps_of
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError


def check(folder: Path) -> Iterator[str]:
    """One line an artifact; the first thing that is wrong is a UserError.

    Nothing is loaded before its digest and header were compared: an engine is code.
    """
    for artifact in read_manifest(folder):
        check_digests(folder, artifact)
        verdict = check_engine(folder, artifact) if artifact.kind == "engine" else check_model(folder, artifact)
        yield f"{artifact.target}: {len(artifact.digests)} files unchanged; {verdict}"


def check_model(folder: Path, artifact: Artifact) -> str:
    """Runs a model once, in a process of its own; of a kit, reads the graph and not its weights."""
    path = inside(folder, artifact.path).with_name(MODEL)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise UserError("not an ONNX model", where=str(path), found=str(error)) from None
    nodes = f"{len(model.graph.node)} nodes"
    if artifact.kind != "kit":
        return f"a model for ONNX Runtime ({nodes}); {run_once(folder, path, artifact)}"
    releases = find_target(artifact.target).tensorrt
    return (
        f"a build kit ({nodes}); on a machine with an {artifact.target} GPU and TensorRT {releases}, "
        f"finish it with: instantrt build {path.parent} -o {folder}"
    )


def run_once(folder: Path, path: Path, artifact: Artifact) -> str:
    """Opens the model as its manifest says and runs a step on random inputs."""
    try:
        graph = gs.Graph(inputs=[gs.Variable(t.name, np.dtype(t.dtype), list(t.shape)) for t in artifact.inputs])
        llm = LlmShape(**artifact.llm) if artifact.llm is not None else None
        encoder = EncoderShape.of(artifact.encoder) if artifact.encoder is not None else None
        steps = steps_of(graph, llm or encoder, right=True)[: None if llm is None else 1]
    except (TypeError, ValueError) as error:
        raise UserError("the manifest's inputs are none of a model", where=str(path), found=str(error)) from None
    libraries = tuple(str(inside(folder, name)) for name in artifact.plugins)
    calls = tuple((step.name, "") for step in steps)
    order = ModelOrder(str(path), calls, attempts=llm is None, libraries=libraries)
    with started([order], fed(steps)) as process:
        (outcome,) = process.outcomes()
    runtime = f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"
    if outcome.failed and (llm is not None or outcome.during in LOADING):
        raise UserError(
            f"{runtime} cannot {'load' if outcome.during in LOADING else 'run'} the model",
            where=str(path),
            found=outcome.failed,
            fix="install a newer onnxruntime, or compile again with the one that is here",
        )
    return f"{runtime} loaded it, and it takes no random inputs" if outcome.failed else f"{runtime} ran it"


def check_engine(folder: Path, artifact: Artifact) -> str:
    """Compares the engine's header with the manifest and this machine; loads it where that can work."""
    path, engine = inside(folder, artifact.path), artifact.engine or {}
    header = check_header(path, engine)
    built = f"built by {PRODUCT[header.flavour]} {header.version} for sm{engine['sm']}"
    if all(gpu.sm != engine["sm"] for gpu in gpus()):
        lost = no_rtx_here() if header.flavour == "tensorrt_rtx" else ""
        return "; ".join(filter(None, [built, f"this machine has {describe()}, so it was not loaded", lost]))
    check_runtime(header, path, compatible=bool(engine["options"].get("version_compatible")))
    load(header.flavour, path, [inside(folder, name) for name in artifact.plugins])
    return f"{built}; loaded on {describe()}"


def check_header(path: Path, engine: Mapping[str, Any]) -> Header:
    """The engine's header, which must be what the manifest says."""
    header = read_header(path)
    if header.flavour != engine["builder"] or header.version != engine["version"]:
        raise UserError(
            "the engine is not the one that the manifest describes",
            where=str(path),
            expected=f"{PRODUCT[engine['builder']]} {engine['version']}",
            found=f"{PRODUCT[header.flavour]} {header.version}",
        )
    return header


def check_runtime(header: Header, path: Path, *, compatible: bool) -> None:
    """An engine runs on the release that built it, unless it was built to be compatible."""
    try:
        installed = importlib.metadata.version(header.flavour)
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != header.version and not compatible:
        raise UserError(
            "the engine and the installed runtime differ",
            where=str(path),
            expected=f"{PRODUCT[header.flavour]} {header.version}",
            found=installed,
            fix=f"pip install {header.flavour.replace('_', '-')}=={header.version}, or build the engine again",
        )

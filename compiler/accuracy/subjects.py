"""From artifacts to the request that made them; from a plan and what was written from it to what is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.forms import Subject
from instantrt.compiler.artifact.check import check_digests, inside, libraries_of
from instantrt.compiler.artifact.digest import digests_by_name, sha256
from instantrt.compiler.artifact.manifest import MANIFEST, Artifact, read_manifest
from instantrt.compiler.frontend import onnx_file
from instantrt.compiler.frontend.adapter.folder import WEIGHTS, is_adapter
from instantrt.compiler.plan import Plan, longest, lower
from instantrt.compiler.request import DEFAULTS, UNRECORDED, Request
from instantrt.compiler.target import Backend, Target, find_target
from instantrt.passes.core.errors import FOUND, UserError
from instantrt.passes.core.lazy import FLOAT32, Missing
from instantrt.passes.core.linear import linear
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.core.subgraphs import tensors


def request_of(
    out: Path,
    model: Path,
    target: str | None,
    calibration: Path | None = None,
    *,
    adapter: Sequence[Path] = (),
    base: Path | None = None,
) -> tuple[Request, list[Artifact]]:
    """The request that made `out`, as its manifest records it, and the artifacts asked about.

    calibration   the text that their codes were fitted to, which a manifest has the digest of
    """
    artifacts = [a for a in read_manifest(out) if target in (None, a.target)]
    if not artifacts:
        known = ", ".join(a.target for a in read_manifest(out))
        raise UserError(f"no artifact for target {target}", where=str(out), expected=known)
    fields: dict[str, Any] = dict(artifacts[0].source["request"])
    if any(a.source["request"] != fields for a in artifacts):
        raise UserError("the artifacts are of several requests", where=str(out), fix="name one with --target")
    wanted = {a.source.get("calibration") for a in artifacts}
    found = sha256(calibration) if calibration is not None else None
    if wanted != {found}:
        raise UserError(
            "the calibration text is not the one that the artifact was made with",
            where=str(calibration or out / MANIFEST),
            expected=" and ".join(f"sha256 {each}" if each else "none" for each in wanted),
            found=f"sha256 {found}" if found else "none",
            fix="--calibration FILE, as in the compile",
        )
    has, given = {WEIGHTS in a.source.get("files", {}) for a in artifacts}, bool(adapter) or is_adapter(model)
    if has != {given}:
        raise UserError(
            f"the artifact was made {'without' if given else 'with'} an adapter",
            where=str(out / MANIFEST),
            fix="--model, --adapter and --base as in the compile",
        )
    targets, adapters = tuple(a.target for a in artifacts), tuple(adapter)
    try:
        return Request(
            model=model,
            targets=targets,
            out=out,
            calibration=calibration,
            adapter=adapters,
            base=base,
            plugin=library_of(out, artifacts),
            **fields,
        ), artifacts
    except TypeError as error:
        raise UserError("a manifest of another version", where=str(out / MANIFEST), found=str(error)) from None


def library_of(out: Path, artifacts: Sequence[Artifact]) -> Path | None:
    """The kernels of ours that CPU artifacts have: what is planned again is lowered to them, too."""
    found = [a.plugins for a in artifacts if find_target(a.target).plugin]
    ours = bool(found) and all(found) and all(a.kind == "onnx" for a in artifacts)
    return inside(out, found[0][0]) if ours else None


def changed_files(artifacts: Iterable[Artifact], files: Iterable[Path]) -> list[str]:
    """Names of the model's `files` that are not those that artifacts record as what they were made of."""
    now = digests_by_name(files)
    then = [artifact.source.get("files", {}) for artifact in artifacts]
    return sorted({name for each in then for name in each.keys() | now.keys() if each.get(name) != now.get(name)})


def subjects(
    planned: Plan, request: Request, artifacts: Iterable[Artifact] = (), *, again: bool = False
) -> list[Subject]:
    """One subject a target. A CPU artifact is read back from its file, so that what was written is what is checked.

    again   the plan is not the one that the artifacts were written from: its codes may have been fitted otherwise
    """
    written = {a.target: a for a in artifacts}
    targets = request.resolved_targets()
    return [subject(planned, request, target, written.get(target.name), again=again) for target in targets]


def check_inputs(artifact: Artifact, lowered: gs.Graph, model: Path) -> None:
    """Refuses an artifact that takes other inputs than what the model named is compiled to: it is of another model."""
    has, due = [spec.name for spec in artifact.inputs], [tensor.name for tensor in lowered.inputs]
    if {*has} != {*due}:
        raise UserError(
            "the artifact is of another model",
            where=str(model),
            expected=f"inputs {shorten(', '.join(has), FOUND)}",
            found=shorten(", ".join(due), FOUND),
            fix="--model names what it was compiled from",
        )


def subject(planned: Plan, request: Request, target: Target, artifact: Artifact | None, *, again: bool) -> Subject:
    if artifact is not None:
        check_inputs(artifact, planned.lowered[target.name], request.model)
    file = request.out / artifact.path if artifact is not None and artifact.kind != "kit" else None
    if artifact is not None and artifact.kind == "engine":
        check_digests(request.out, artifact)  # an engine is code, and one of its forms runs it
    refitted = False
    if target.backend is Backend.ONNXRUNTIME and file is not None and artifact is not None:
        lowered = onnx_file.artifact_graph(file)
        fitted = again and planned.twins[target.name].fitted
        refitted = fitted and not same_constants(planned.lowered[target.name], lowered)
        if refitted:
            check_digests(request.out, artifact)  # they are others because they were fitted, not because they changed
    else:
        lowered = all_positions(planned, request, target, PassLog())
    return Subject(
        model=planned.model,
        target=target.name,
        about=about(planned, request, target),
        floating=None if is_quantized(planned.model.graph) else planned.twins[target.name].floating,
        canonical=planned.twins[target.name].canonical,
        lowered=lowered,
        dtype=planned.types.get(target.name, FLOAT32),
        file=file,
        logits=artifact.limits.get("logits", "all") if artifact is not None else "all",
        plugins=tuple(libraries_of(request.out, artifact)) if artifact is not None and file is not None else (),
        refitted=refitted,
    )


def same_constants(a: gs.Graph, b: gs.Graph) -> bool:
    """Do constants that are called alike have the same values in both? They are loaded one after the other."""
    theirs = tensors(b)
    pairs = ((t, theirs.get(name)) for name, t in tensors(a).items() if isinstance(t, gs.Constant))
    return all(
        np.array_equal(np.asarray(t.values), np.asarray(other.values))
        for t, other in pairs
        if isinstance(other, gs.Constant) and t.shape == other.shape
    )


def about(planned: Plan, request: Request, target: Target) -> dict[str, str]:
    """What a report begins with."""
    said = {name: getattr(request, name) for name in DEFAULTS if name not in UNRECORDED}
    asked = [f"{name} {value}" for name, value in said.items() if value and value != DEFAULTS[name]]
    decisions = planned.twins[target.name].decisions.values()
    became = Counter(str(q) if isinstance(q, QuantTensor) else "float" for q in decisions)
    return {
        "model": request.model_name,
        "target": f"{target.name}, {target.family}",
        "asked for": ", ".join(asked) or "nothing: the model as it is",
        "linear layers": ", ".join(f"{count} x {kind}" for kind, count in became.items()) or "float",
    }


def all_positions(planned: Plan, request: Request, target: Target, log: PassLog) -> gs.Graph:
    """Lowers once more, with the logits of every position and no buffer of a fixed length for the cache."""
    plain = replace(request, targets=(target.name,), logits="all", kv_cache="concat")
    twin, dtype = planned.twins[target.name].canonical.copy(), planned.types.get(target.name)
    return lower(target, dtype, plain, planned.limits, longest(plain, planned.model), twin, log)


def is_quantized(graph: gs.Graph) -> bool:
    """Does the checkpoint lack float weights?"""
    found = (linear(node) for node in graph.nodes)
    return any(f is not None and isinstance(f.rows, Missing) for f in found)

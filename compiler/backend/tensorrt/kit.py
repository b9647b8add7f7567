"""A build kit: a folder with all that a GPU machine needs to finish an engine, and the command that does it.

KIT/model.onnx, model.onnx.data   the lowered graph         KIT/kit.json   target, profiles, options, digests
KIT/tokenizer.json, ...           as beside every artifact
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instantrt.compiler.artifact.manifest import Artifact, artifact_from_json
from instantrt.compiler.backend.tensorrt.build import Profile
from instantrt.compiler.backend.tensorrt.choose import Settings
from instantrt.compiler.backend.tensorrt.profiles import trtexec_shapes
from instantrt.compiler.checkpoint import read_json
from instantrt.compiler.options import EngineOptions
from instantrt.compiler.serving.runtime.integrity import sha256
from instantrt.compiler.target import Target, find_target
from instantrt.passes.core.errors import UserError

KIT, MODEL = "kit.json", "model.onnx"
FORMAT = 2


@dataclass(frozen=True)
class Kit:
    """What kit.json says. `artifact` is the finished engine's manifest entry but for what only the build knows."""

    folder: Path
    target: Target
    settings: Settings
    linears: tuple[str, ...]
    artifact: Artifact

    @property
    def onnx(self) -> Path:
        return self.folder / MODEL


def write_kit(folder: Path, settings: Settings, linears: tuple[str, ...], artifact: Artifact) -> None:
    """Completes `folder`, which holds the lowered model and side files, with kit.json.

    `artifact.digests` are those of the files so far, relative to the folder's own.
    """
    body = {
        "format": FORMAT,
        "target": artifact.target,
        "tensorrt": find_target(artifact.target).tensorrt,  # for a person: the table of targets decides
        "precision": settings.precision,
        "profiles": settings.profiles,
        "options": asdict(settings.options),
        "plugins": [path.name for path in settings.plugins],
        "linears": linears,
        "artifact": asdict(replace(artifact, digests={})),
        "digests": {Path(name).name: digest for name, digest in artifact.digests.items()},
        "trtexec": trtexec(settings),
    }
    (folder / KIT).write_text(json.dumps(body, indent=2, default=str) + "\n", "utf-8")


def read_kit(folder: Path) -> Kit:
    """Reads and checks a kit: its format, that no name leaves the folder, every digest."""
    if not (folder / KIT).is_file():
        raise UserError("no build kit here", where=str(folder), expected=f"a folder with {KIT}")
    body = read_json(folder / KIT)
    if body.get("format") != FORMAT:
        raise UserError(
            "a kit of another version", where=str(folder), expected=str(FORMAT), found=str(body.get("format"))
        )
    try:
        check_digests(folder, body["digests"])
        settings = Settings(
            body["precision"],
            tuple(profile_from_json(p) for p in body["profiles"]),
            EngineOptions(**{**body["options"], "timing_cache": None}),
            tuple(folder / plain_name(name, folder) for name in body["plugins"]),
        )
        artifact = artifact_from_json(body["artifact"])
        return Kit(folder, find_target(body["target"]), settings, tuple(body["linears"]), artifact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "not a kit of ours", where=str(folder / KIT), found=f"{type(error).__name__}: {error}"
        ) from None


def listed_files(folder: Path) -> set[str]:
    """The names of a kit's files, as its kit.json has them; none where `folder` is no kit."""
    return {KIT, *read_json(folder / KIT).get("digests", ())} if (folder / KIT).is_file() else set()


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    if MODEL not in digests:
        raise UserError(f"the kit does not list {MODEL}", where=str(folder / KIT))
    for name, digest in digests.items():
        path = folder / plain_name(name, folder)
        found = sha256(path) if path.is_file() else "no such file"
        if found != digest:
            raise UserError(
                "a file of the kit is not what was written",
                where=str(path),
                expected=digest,
                found=found,
                fix="copy the kit again",
            )


def plain_name(name: Any, folder: Path) -> str:
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise UserError("a file name that leaves the kit", where=str(folder / KIT), found=repr(name))
    return name


def profile_from_json(raw: Mapping[str, Any]) -> Profile:
    def shape(sizes: Any) -> tuple[int, ...]:
        return tuple(int(size) for size in sizes)

    return {name: (shape(low), shape(opt), shape(high)) for name, (low, opt, high) in raw.items()}


def trtexec(settings: Settings) -> str:
    """The command that builds the kit with TensorRT's own tool, to be run inside the kit."""
    words = ["trtexec", f"--onnx={MODEL}", "--saveEngine=model.engine", "--stronglyTyped"]
    for number, profile in enumerate(settings.profiles):
        words += [f"--profile={number}", *trtexec_shapes(profile)]
    words += [f"--dynamicPlugins={path.name}" for path in settings.plugins]
    words += [option.trtexec.format(spelled(value)) for option, value in settings.options.asked if option.trtexec]
    return shlex.join(words)


def spelled(value: Any) -> str:
    """As trtexec spells it: ampere_plus is ampere+, other names are in camel case."""
    first, *rest = str(value).lower().split("_")
    return f"{first}+" if rest == ["plus"] else first + "".join(word.title() for word in rest)


def finished(kit: Kit, engine: Mapping[str, Any], digests: Mapping[str, str], path: str) -> Artifact:
    """The manifest entry of the engine that was built from `kit`."""
    return replace(kit.artifact, kind="engine", path=path, engine=dict(engine), digests=dict(digests))

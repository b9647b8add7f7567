"""A build kit: a folder with all that a GPU machine needs to finish an engine, and the command that does it.

KIT/model.onnx, model.onnx.data   the lowered graph         KIT/kit.json   target, profiles, options, digests
KIT/tokenizer.json, ...           as beside every artifact
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instantrt.compiler.artifact.check import check_record, inside
from instantrt.compiler.artifact.digest import digests_of
from instantrt.compiler.artifact.manifest import ENGINE, KIT, MODEL, Artifact, artifact_from_json, write_manifest
from instantrt.compiler.artifact.staging import Staging, artifacts_kept, check_out, new_folder, with_choices
from instantrt.compiler.backend.tensorrt.build import Profile
from instantrt.compiler.backend.tensorrt.choose import (
    EngineSettings,
    build_engine,
    by_tensorrt,
    choose_builder,
    timing_cache,
)
from instantrt.compiler.backend.tensorrt.profiles import trtexec_shapes
from instantrt.compiler.json_file import read_json
from instantrt.compiler.options import Builder, EngineOptions
from instantrt.compiler.say import Say
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError

FORMAT = 3  # 2 had memory_limit in bytes


@dataclass(frozen=True)
class Kit:
    """What kit.json says. `artifact` is the finished engine's manifest entry but for what only the build knows."""

    folder: Path
    settings: EngineSettings
    artifact: Artifact

    @property
    def onnx(self) -> Path:
        return self.folder / MODEL


def write_kit(folder: Path, settings: EngineSettings, artifact: Artifact) -> None:
    """Completes `folder`, which holds the lowered model and side files, with kit.json.

    `artifact.digests` are those of the files so far, relative to the folder's own.
    """
    body = {
        "format": FORMAT,
        "target": settings.target.name,
        "tensorrt": settings.target.tensorrt,  # for a person: the table of targets decides
        "precision": settings.precision,
        "profiles": settings.profiles,
        "options": asdict(settings.options),
        "plugins": [path.name for path in settings.plugins],
        "linears": settings.linears,
        "artifact": asdict(replace(artifact, digests={})),
        "digests": {Path(name).name: digest for name, digest in artifact.digests.items()},
        "trtexec": trtexec(settings),
    }
    (folder / KIT).write_text(json.dumps(body, indent=2, default=str) + "\n", "utf-8")


def read_kit(folder: Path) -> Kit:
    """Reads and checks a kit: its format, that no name leaves the folder, every digest."""
    if not (folder / KIT).is_file():
        below = sorted(str(path.parent) for path in folder.glob(f"*/{KIT}"))
        fix = f"name {' or '.join(below)}" if below else ""
        raise UserError("no build kit here", where=str(folder), expected=f"a folder with {KIT}", fix=fix)
    body = read_json(folder / KIT)
    if body.get("format") != FORMAT:
        raise UserError(
            "a kit of another version",
            where=str(folder),
            expected=f"format {FORMAT}",
            found=str(body.get("format")),
            fix="compile it again",
        )
    try:
        check_record(folder, body["digests"], (MODEL, *body["plugins"]))
        settings = EngineSettings(
            find_target(body["target"]),
            body["precision"],
            tuple(profile_from_json(p) for p in body["profiles"]),
            EngineOptions(**{**body["options"], "timing_cache": None}),
            tuple(folder / name for name in body["plugins"]),
            tuple(body["linears"]),
        )
        return Kit(folder, settings, artifact_from_json(body["artifact"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "not a kit of ours", where=str(folder / KIT), found=f"{type(error).__name__}: {error}"
        ) from None


def profile_from_json(raw: Mapping[str, Any]) -> Profile:
    def shape(sizes: Any) -> tuple[int, ...]:
        return tuple(int(size) for size in sizes)

    return {name: (shape(low), shape(opt), shape(high)) for name, (low, opt, high) in raw.items()}


def trtexec(settings: EngineSettings) -> str:
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


def build_kit(kit: Kit, out: Path, builder: Builder, say: Say = lambda text: None) -> Artifact:
    """Finishes a build kit on the machine it was made for: OUT/<target>/model.engine, and its entry in the manifest.

    OUT may be the folder that the kit lies in; what else is there stays.
    """
    settings, target = kit.settings, kit.settings.target
    plugins = [file for library in settings.plugins for file in with_choices(library)]
    for file in plugins:
        inside(kit.folder, file.name)
    check_out(out, [target], carried=plugins)
    choice = choose_builder(target, builder, options=settings.options, from_kit=True)
    if choice.flavour is None:
        what = f"this machine cannot build for {target.name} either"
        raise UserError(what, found=choice.reason, fix=by_tensorrt(target))
    with Staging() as staging:
        folder = new_folder(staging.staged(out), target, kit.folder)
        for file in plugins:
            shutil.copy(file, folder)
        engine = build_engine(choice.flavour, settings, kit.onnx, folder, timing_cache(out, target), say)
        path, digests = f"{target.name}/{ENGINE}", digests_of(folder)
        artifact = replace(kit.artifact, kind="engine", path=path, engine=engine, digests=digests)
        write_manifest(folder.parent, [*artifacts_kept(out, [target]), artifact])
    return artifact

"""Artifacts -> a Triton model repository.

DIR/README.md, requirements.txt       how to start the server, what the models take and give
DIR/<name>/1/model.onnx|model.plan    the bare model: tensors in, tensors out
DIR/<name>_generate/1/model.py, ...   text in, text out: a copy of compiler/serving/runtime, the artifact beside it
DIR/<name>_embed, <name>_classify     likewise: text in, a vector or labels out
DIR/plugins/*.so                      what a bare engine needs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from instantrt.compiler.artifact.manifest import Artifact, read_manifest
from instantrt.compiler.artifact.staging import Staging, check_writable, copy_file, with_choices
from instantrt.compiler.serving.config import (
    Served,
    bare_config,
    encoder_config,
    generate_config,
    why_no_bare,
    why_no_text,
)
from instantrt.compiler.serving.readme import readme, requirements
from instantrt.compiler.serving.runtime.integrity import RECORD
from instantrt.passes.core.errors import UserError

RUNTIME = Path(__file__).parent / "runtime"
RUNTIME_FILES = tuple(sorted(path.name for path in RUNTIME.glob("[!_]*.py")))
ENTRIES = ("model.py", "encoder_model.py")
OWN_FILES = ("plugins", "README.md", "requirements.txt")
BARE_FILES = {"onnx": "model.onnx", "engine": "model.plan"}


def stage_repository(out: Path, folder: Path, staging: Staging) -> tuple[Served, ...]:
    """Stages the artifacts that `out` holds as models below `folder`; all of them appear at once."""
    served = plan_repository(read_manifest(out))
    check_folder(folder)
    try:
        write_models(out, staging.staged(folder), served)
    except OSError as error:
        raise UserError(
            "the repository could not be written", where=str(folder), found=error.strerror or str(error)
        ) from None
    return served


def write_models(out: Path, folder: Path, served: tuple[Served, ...]) -> None:
    for each in served:
        source = out / each.artifact.path
        if not each.no_bare:
            write_bare(source, folder / each.name, each.artifact)
        if not each.no_text:
            write_text_model(source, folder / each.of_text, each.artifact)
            place(libraries(out, each.artifact.plugins), folder / each.of_text / "1")
    plugins = sorted({plugin for each in served if each.artifact.kind != "onnx" for plugin in each.artifact.plugins})
    if plugins:
        (folder / "plugins").mkdir()
        place(libraries(out, plugins), folder / "plugins")
    (folder / "requirements.txt").write_text("\n".join(requirements(served)) + "\n", "utf-8")
    (folder / "README.md").write_text(readme(served), "utf-8")


def libraries(out: Path, plugins: Iterable[str]) -> list[Path]:
    """The files of plugin libraries in the compile output `out`."""
    return [file for plugin in plugins for file in with_choices(out / plugin)]


def plan_repository(artifacts: Sequence[Artifact]) -> tuple[Served, ...]:
    """Which models the artifacts become. An error where none of them becomes one."""

    def name(artifact: Artifact) -> str:
        stem = str(artifact.source["model"]).removesuffix(".onnx")
        return stem if len(artifacts) == 1 else f"{stem}_{artifact.target}"

    served = tuple(Served(name(a), a, why_no_bare(a), why_no_text(a)) for a in artifacts)
    if not any(each.models for each in served):
        raise UserError(
            "nothing here can be served by Triton",
            found="; ".join(f"{each.artifact.target}: {each.reasons}" for each in served),
        )
    return served


def check_folder(folder: Path) -> None:
    """Refuses to mix models into a folder that is something else."""
    check_writable(folder, "name another for --triton")
    others = [p for p in folder.glob("[!.]*") if p.name not in OWN_FILES]
    unknown = sorted(p.name for p in others if not (p / "config.pbtxt").is_file())
    if unknown:
        raise UserError(
            "not a model repository",
            where=str(folder),
            expected="a new or empty folder, or models with config.pbtxt",
            found=", ".join(unknown[:5]),
            fix="name another for --triton",
        )


def write_bare(source: Path, model: Path, artifact: Artifact) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    place([p for p in source.parent.iterdir() if p.name.startswith(source.name)], version)
    (version / source.name).rename(version / BARE_FILES[artifact.kind])
    (model / "config.pbtxt").write_text(bare_config(model.name, artifact), "utf-8")


def write_text_model(source: Path, model: Path, artifact: Artifact) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    place([p for p in source.parent.iterdir() if p.is_file()], version)
    entry, config = ("model.py", generate_config) if artifact.encoder is None else ("encoder_model.py", encoder_config)
    for file in RUNTIME_FILES:
        if file not in ENTRIES:
            shutil.copyfile(RUNTIME / file, version / file)
    shutil.copyfile(RUNTIME / entry, version / "model.py")
    (version / RECORD).write_text(json.dumps(record(artifact), indent=2) + "\n", "utf-8")
    (model / "config.pbtxt").write_text(config(model.name, artifact), "utf-8")


def record(artifact: Artifact) -> dict[str, Any]:
    """What a model that takes text holds its own files against before it loads them, and how an encoder's are read."""
    code = [name for name in artifact.digests if name.startswith(artifact.path) or name in artifact.plugins]
    missing = {artifact.path, *artifact.plugins} - set(code)
    if missing:
        raise UserError("the manifest has no digest of this file", where=min(missing), fix="compile again")
    engine = {key: artifact.engine[key] for key in ("builder", "version")} if artifact.engine else None
    of_texts = {"encoder": artifact.encoder} if artifact.encoder is not None else {}
    return {"files": {Path(name).name: artifact.digests[name] for name in code}, "engine": engine, **of_texts}


def place(files: Iterable[Path], folder: Path) -> None:
    """Links weights, which nobody edits, so that two models cost the disk of one; copies all else."""
    for file in files:
        target = folder / file.name
        try:
            if not file.name.startswith("model."):
                raise OSError
            os.link(file, target)
        except OSError:
            copy_file(file, target)

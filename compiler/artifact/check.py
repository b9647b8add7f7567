"""Are the files of an artifact or a kit what compile wrote? Engines and plugins are code: this comes before loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from instantrt.compiler.artifact.digest import ChangedError, check_files
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.passes.core.errors import UserError


def check_digests(folder: Path, artifact: Artifact) -> None:
    """UserError unless all files of an artifact, which `folder`'s manifest lists, are there and unchanged."""
    check_record(folder, artifact.digests, (artifact.path, *artifact.plugins))


def libraries_of(folder: Path, artifact: Artifact) -> list[Path]:
    """The artifact's plugins, which are code: where it has some, all of its files are compared first."""
    if artifact.plugins:
        check_digests(folder, artifact)
    return [inside(folder, name) for name in artifact.plugins]


def check_record(folder: Path, digests: Mapping[str, str], needed: Iterable[str]) -> None:
    """UserError unless `folder` holds what `digests` say, and they say it of each `needed` file."""
    for name in digests:
        inside(folder, name)
    try:
        check_files(folder, digests, needed)
    except ChangedError as error:
        raise UserError(
            "this is not what compile wrote",
            where=str(folder / error.name),
            expected=error.expected,
            found=error.found,
            fix="copy the folder again, or compile again",
        ) from None


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; a manifest is input, so a name that leads out of the folder is refused."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError("a path leads out of the folder", where=str(folder), found=name)
    return path

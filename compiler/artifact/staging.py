"""The output folder: what may be replaced in it, and how all that a run writes takes its place at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import onnx_graphsurgeon as gs

from instantrt.compiler.artifact.manifest import MANIFEST, Artifact, read_manifest
from instantrt.compiler.backend.onnx_writer import Progress, write_model
from instantrt.compiler.backend.tensorrt.kit import MODEL, listed_files
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError

OLD = ".old"


class Staging:
    """New contents of folders, written aside and moved to their places together once all are complete.

    What lies in `aside(folder)` when the `with` block ends replaces what has its name in `folder`, the manifest last;
    hidden files and links are left out. When anything fails, every folder is as it was.
    """

    def __init__(self) -> None:
        self.asides: dict[Path, Path] = {}
        self.made: list[Path] = []  # folders that were not there, the innermost first

    def aside(self, folder: Path) -> Path:
        """The hidden folder in `folder` that its new contents are written to."""
        if folder not in self.asides:
            missing = [f for f in (folder, *folder.parents) if not f.exists()]
            self.made = [*missing, *self.made]  # first: an interruption may come at any time
            folder.mkdir(parents=True, exist_ok=True)
            self.asides[folder] = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
        return self.asides[folder]

    def final(self, path: Path) -> Path:
        """Where `path` will be."""
        found = (f / path.relative_to(aside) for f, aside in self.asides.items() if path.is_relative_to(aside))
        return next(found, path)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            for aside in self.asides.values():
                shutil.rmtree(aside, ignore_errors=True)
            for folder in self.made:
                with suppress(OSError):  # it holds something now
                    folder.rmdir()

    def publish(self) -> None:
        moves = sorted(self.moves(), key=lambda move: move[1].name == MANIFEST)
        try:
            for new, final, old in moves:
                if os.path.lexists(final):
                    final.rename(old)
                new.rename(final)
        except BaseException:
            for new, final, old in reversed(moves):
                if not os.path.lexists(new) and os.path.lexists(final):
                    final.rename(new)
                if os.path.lexists(old):
                    old.rename(final)
            raise

    def moves(self) -> Iterator[tuple[Path, Path, Path]]:
        """(what is new, its place, where what is there now goes)."""
        for folder, aside in self.asides.items():
            names = [p.name for p in aside.iterdir() if not p.name.startswith(".") and not p.is_symlink()]
            (aside / OLD).mkdir()
            yield from ((aside / name, folder / name, aside / OLD / name) for name in sorted(names))


class LoweredFiles:
    """Lowered graphs on disk beside what `out` will hold, each written once for all that share it; gone at the end."""

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


def artifacts_in(out: Path) -> list[Artifact]:
    return read_manifest(out) if (out / MANIFEST).is_file() else []


def artifacts_kept(out: Path, written: Iterable[Target]) -> list[Artifact]:
    """The artifacts that stay where those of `written` are replaced; those whose folder someone deleted are gone."""
    names = {target.name for target in written}
    return [a for a in artifacts_in(out) if a.target not in names and (out / a.target).is_dir()]


def check_out(out: Path, targets: Iterable[Target], keep: Iterable[Path] = ()) -> None:
    """Can `out` be written, and is nothing lost that compile did not write? `keep` are paths that must survive."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            "not a folder that can be written",
            where=str(out),
            found=f"{there} is {'read-only' if there.is_dir() else 'a file'}",
            fix="name another with -o",
        )
    ours = {name for artifact in artifacts_in(out) for name in artifact.digests}
    for target in targets:
        folder = out / target.name
        for path in keep:
            if path.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"this lies in the folder that the artifact for {target.name} replaces",
                    where=str(path),
                    found=str(folder),
                    fix="name another output folder with -o",
                )
        ours |= {f"{target.name}/{name}" for name in listed_files(folder)}
        strangers = sorted({f"{target.name}{name}" for name in files_of(folder)} - ours)
        if strangers:
            raise UserError(
                "this is not what compile wrote, and would be lost",
                where=str(folder),
                found=", ".join(strangers[:5]) + (f" and {len(strangers) - 5} more" if strangers[5:] else ""),
                fix="move it away, or name another output folder with -o",
            )


def files_of(folder: Path) -> Iterator[str]:
    """What a folder holds, as `/name`; a file or link in its place is one nameless entry."""
    if folder.is_symlink() or folder.is_file():
        yield ""
    elif folder.is_dir():
        yield from (f"/{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())

"""The output folder: what may be replaced in it, and how all that a run writes takes its place at once."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from instantrt.compiler.artifact.manifest import KIT, MANIFEST, Artifact, read_manifest
from instantrt.compiler.json_file import read_json
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError, reword, reworded

OLD = ".old"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


class Staging:
    """New contents of folders, written into hidden folders there, and moved to their places once all are complete.

    What lies in `staged(folder)` when the `with` block ends replaces what has its name in `folder`, the manifest last;
    hidden files and links are left out. When anything fails, every folder is as it was.
    """

    def __init__(self) -> None:
        self.folders: dict[Path, Path] = {}
        self.made: list[Path] = []  # folders that were not there, the innermost first

    def staged(self, folder: Path) -> Path:
        """The hidden folder in `folder` that its new contents are written to."""
        if folder not in self.folders:
            missing = [f for f in (folder, *folder.parents) if not f.exists()]
            self.made = [*missing, *self.made]  # first: an interruption may come at any time
            folder.mkdir(parents=True, exist_ok=True)
            self.folders[folder] = Path(tempfile.mkdtemp(prefix=".new.", dir=folder))
        return self.folders[folder]

    def final(self, path: Path) -> Path:
        """Where `path` will be."""
        found = (f / path.relative_to(staged) for f, staged in self.folders.items() if path.is_relative_to(staged))
        return next(found, path)

    def __enter__(self) -> Staging:
        return self

    def final_names(self, text: str) -> str:
        """What is said of files here, of their places: an error outlives the hidden folders."""
        for folder, staged in self.folders.items():
            text = str(folder).join(re.split(rf"{re.escape(str(staged))}(?:/\.\w+\.\w+)?", text))
        return text

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            reword(error, self.final_names)
            if kind is None:
                with reworded(self.final_names):
                    self.publish()
        finally:
            try:
                self.clear()
            except KeyboardInterrupt:
                self.clear()
                raise

    def clear(self) -> None:
        for staged in self.folders.values():
            shutil.rmtree(staged, ignore_errors=True)
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
        for folder, staged in self.folders.items():
            names = [p.name for p in staged.iterdir() if not p.name.startswith(".") and not p.is_symlink()]
            (staged / OLD).mkdir()
            yield from ((staged / name, folder / name, staged / OLD / name) for name in sorted(names))


def new_folder(parent: Path, target: Target, source: Path) -> Path:
    """`parent`/<target>, made, with the side files of the checkpoint or kit `source`."""
    folder = parent / target.name
    folder.mkdir()
    for name in SIDE_FILES:
        if (source / name).is_file():
            copy_file(source / name, folder / name)
    return folder


def with_choices(library: Path) -> tuple[Path, ...]:
    """A plugin library and, where it lies beside it, the file of choices measured for it: plugins read it there."""
    choices = library.with_name(library.name.removesuffix(".so") + ".choices")
    return (library, choices) if choices.is_file() else (library,)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file; where the file system can, both share their blocks until one is edited, as links would not."""
    with source.open("rb") as old, target.open("wb") as new:
        left = os.fstat(old.fileno()).st_size
        with suppress(OSError):  # not between these file systems
            while left and (copied := os.copy_file_range(old.fileno(), new.fileno(), left)):
                left -= copied
    if left:
        shutil.copyfile(source, target)


def artifacts_in(out: Path) -> list[Artifact]:
    return read_manifest(out) if (out / MANIFEST).is_file() else []


def artifacts_kept(out: Path, written: Iterable[Target]) -> list[Artifact]:
    """The artifacts that stay where those of `written` are replaced; those whose folder someone deleted are gone."""
    names = {target.name for target in written}
    return [a for a in artifacts_in(out) if a.target not in names and (out / a.target).is_dir()]


def check_writable(folder: Path, fix: str) -> None:
    """Refuses a folder that cannot be made, or written: it is tried, as permissions do not tell (/proc)."""
    try:
        with Staging() as trial:
            trial.staged(folder)
    except OSError as error:
        raise UserError(
            "not a folder that can be written",
            where=str(folder),
            expected="one that is there, or can be made",
            found=f"{error.filename}: {error.strerror}",
            fix=fix,
        ) from None


def check_out(out: Path, targets: Iterable[Target], keep: Iterable[Path] = (), carried: Iterable[Path] = ()) -> None:
    """Can `out` be written, and is nothing lost that compile did not write?

    `keep` are paths that must survive; `carried` files have their copies among what is written.
    """
    check_writable(out, "name another with -o")
    ours = {name for artifact in artifacts_in(out) for name in artifact.digests}
    here, copied = out.resolve(), [file.resolve() for file in carried]
    ours |= {str(file.relative_to(here)) for file in copied if file.is_relative_to(here)}
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
        ours |= {f"{target.name}/{name}" for name in kit_files(folder)}
        unknown = sorted({f"{target.name}{name}" for name in files_of(folder)} - ours)
        if unknown:
            raise UserError(
                "this is not what compile wrote, and would be lost",
                where=str(folder),
                found=", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if unknown[5:] else ""),
                fix="move it away, or name another output folder with -o",
            )


def kit_files(folder: Path) -> set[str]:
    """The names of a kit's files, as its kit.json has them; none where `folder` is no kit."""
    return {KIT, *read_json(folder / KIT).get("digests", ())} if (folder / KIT).is_file() else set()


def files_of(folder: Path) -> Iterator[str]:
    """What a folder holds, as `/name`; a file or link in its place is one nameless entry."""
    if folder.is_symlink() or folder.is_file():
        yield ""
    elif folder.is_dir():
        yield from (f"/{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())

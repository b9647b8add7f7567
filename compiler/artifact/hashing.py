"""Digests of the files that a model is read of, taken beside the work on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from instantrt.compiler.artifact import digest
from instantrt.passes.core.errors import UserError

LARGE = 1 << 25  # bytes; a smaller file is hashed sooner than a process begins


class Hashing:
    """Large files are hashed by processes of their own: a thread waits for the interpreter that imports and writes.

    With none of them begun, or one that ended early, files are hashed here when they are asked for. One that was
    begun before the model is read from it must stay what it was: else its digest is of what nobody compiled.
    """

    def __init__(self) -> None:
        self.children: list[tuple[list[Path], subprocess.Popen[str]]] = []
        self.known: dict[Path, str] = {}
        self.begun: dict[Path, tuple[int, int]] = {}  # of what time and size

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *error: object) -> None:
        for _, child in self.children:
            with child:
                child.kill()

    def begin(self, files: Iterable[Path]) -> None:
        """Those of `files` that are large and not begun yet; what is no file is left to whoever reads it."""
        new = [path for path in dict.fromkeys(files) if path not in self.begun and path.is_file()]
        large = [path for path in new if path.stat().st_size >= LARGE]
        if large:
            self.begun |= {path: state(path) for path in large}
            command = [sys.executable, "-IS", digest.__file__, *(str(path.absolute()) for path in large)]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
            with suppress(OSError):  # no process is to be had
                child = subprocess.Popen(command, stdout=pipe, stderr=nothing, text=True, start_new_session=True)
                self.children.append((large, child))

    def by_name(self, files: Collection[Path]) -> Mapping[str, str]:
        """Name -> sha256, once all are known; UserError for a file that is another since, or gone."""
        for paths, child in self.children:
            self.known |= zip(paths, child.communicate()[0].split(), strict=False)
        self.children.clear()
        try:
            for path in files:
                if path in self.begun and state(path) != self.begun[path]:
                    raise UserError("the model's files changed meanwhile", where=str(path))
            return digest.digests_by_name(files, self.known)
        except OSError as error:
            raise UserError("the model's files changed meanwhile", found=str(error)) from None


def state(path: Path) -> tuple[int, int]:
    """What another file in its place would hardly have."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size

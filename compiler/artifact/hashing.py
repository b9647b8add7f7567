"""Digests of the files that a model is read of, taken beside the work on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from instantrt.compiler.artifact import digest
from instantrt.passes.core.errors import UserError

LARGE = 1 << 25  # bytes; a smaller file is hashed sooner than a process begins


class Hashing:
    """Large files are hashed by processes of their own: a thread waits for the interpreter that imports and writes.

    With none of them begun, or one that ended early, files are hashed here when they are asked for.
    """

    def __init__(self) -> None:
        self.children: list[tuple[list[Path], subprocess.Popen[str]]] = []
        self.known: dict[Path, str] = {}

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *error: object) -> None:
        for _, child in self.children:
            with child:
                child.kill()

    def begin(self, files: Iterable[Path]) -> None:
        """Those of `files` that are large and not begun yet; what is no file is left to whoever reads it."""
        begun = {*self.known, *(path for paths, _ in self.children for path in paths)}
        large = [p for p in dict.fromkeys(files) if p not in begun and p.is_file() and p.stat().st_size >= LARGE]
        if large:
            command = [sys.executable, "-IS", digest.__file__, *(str(path.absolute()) for path in large)]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
            child = subprocess.Popen(command, stdout=pipe, stderr=nothing, text=True, start_new_session=True)
            self.children.append((large, child))

    def by_name(self, files: Iterable[Path]) -> Mapping[str, str]:
        """Name -> sha256, once all are known; UserError for a file that cannot be read any more."""
        for paths, child in self.children:
            self.known |= zip(paths, child.communicate()[0].split(), strict=False)
        self.children.clear()
        try:
            return digest.digests_by_name(files, self.known)
        except OSError as error:
            raise UserError("the model's files changed meanwhile", found=str(error)) from None

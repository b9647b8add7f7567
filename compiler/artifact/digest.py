"""The one door to digests: the sha256 of a file, and whether the files of a folder are what a record says.

It needs the standard library alone, and lies beside the runtime in every Triton repository, too. `digest.py FILE...`
prints the sha256 of each.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

CHUNK = 1 << 20


class ChangedError(Exception):
    """The file `name` is not what its record says; `expected` and `found` are in words."""

    def __init__(self, name: str, expected: str, found: str) -> None:
        self.name, self.expected, self.found = name, expected, found
        super().__init__(f"{name} is not what the compiler wrote: expected {expected}, found {found}")


def sha256(path: Path) -> str:
    """The digest of a file of any size, in little memory."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb") as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def digests_of(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """`<folder>/<file>` -> sha256, of every file there; `known` are those that were taken as they were written."""
    known = known or {}
    return {f"{folder.name}/{path.name}": known.get(path.name) or sha256(path) for path in sorted(folder.iterdir())}


def digests_by_name(files: Iterable[Path], known: Mapping[Path, str] | None = None) -> dict[str, str]:
    """Name -> sha256; of a second file of one name with its folder's. `known` are those that were taken before."""
    known, found = known or {}, dict[str, str]()
    for path in files:
        name = path.name if path.name not in found else f"{path.parent.name}/{path.name}"
        found[name] = known.get(path) or sha256(path)
    return found


def check_files(folder: Path, digests: Mapping[str, str], needed: Iterable[str]) -> None:
    """ChangedError unless every file of `digests` lies in `folder` with its digest, and each `needed` one has a digest.

    digests   name, relative to `folder` -> sha256; it may come from anyone
    """
    for name in needed:
        if name not in digests:
            raise ChangedError(name, "a digest in its record", "none")
    for name, digest in digests.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ChangedError(name, "a name inside the folder", "one that leads out of the folder")
        path = folder / name
        found = sha256(path) if path.is_file() else "no such file"
        if found != digest:
            raise ChangedError(name, f"sha256 {digest}", found)


if __name__ == "__main__":
    import ctypes
    import signal
    from contextlib import suppress

    with suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: to end with who asks
    for name in sys.argv[1:]:
        print(sha256(Path(name)), flush=True)

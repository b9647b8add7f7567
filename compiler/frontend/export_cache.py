"""What torch and transformers made of a config is kept in a folder: the next compile of the model imports neither.

An entry's name is the digest of all that it depends on: the config, what else its maker says, the code that makes it
and the versions of the libraries. Nothing in the folder is believed: what is no entry of this name, whole, and of this
user is as if it were not there, and so is a folder that cannot be read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

from instantrt.passes.core import errors

T = TypeVar("T")
NONE = Path("none")
VARIABLE = "INSTANTRT_CACHE"
MOST, MOST_OF_ONE = 256 << 20, 64 << 20  # bytes: of all entries, and of one
ENTRY = re.compile(r"[0-9a-f]{64}(\..+)?")  # with an ending, while it is written
DIGEST = hashlib.sha256().digest_size
SOURCES = (Path(__file__).parent, Path(errors.__file__).parent)  # whose code an export runs through
LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnx-ir", "onnxscript", "torch", "transformers")


def cache_folder(asked: Path | None = None) -> Path | None:
    """The folder that is asked for, that the environment names, or the user's own; None for `none`."""
    if asked is None and (said := os.environ.get(VARIABLE)):
        asked = Path(said)
    if asked is not None:
        return None if asked == NONE else asked
    with suppress(RuntimeError):  # a user without a home
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (home if home.is_absolute() else Path.home() / ".cache") / "instantrt"
    return None


def recall(
    folder: Path | None, about: Mapping[str, Any], make: Callable[[], bytes], parse: Callable[[bytes], T]
) -> tuple[T, bool]:
    """(what `make` gave to who asked the same before, or gives now; was it there?), out of the same bytes."""
    key = hashlib.sha256(json.dumps([about, code()]).encode()).hexdigest()
    kept = read(folder / key) if folder is not None else None
    if kept is not None:
        with suppress(Exception):  # no entry of ours, although it says so
            return parse(kept), True
    made = make()
    if folder is not None and len(made) <= MOST_OF_ONE:
        with suppress(OSError):
            keep(folder / key, made)
            prune(folder)
    return parse(made), False


@cache
def code() -> Mapping[str, str]:
    """What makes entries, besides what they are about. Nothing is imported to tell."""
    digest = hashlib.sha256()
    for path in (path for folder in SOURCES for path in sorted(folder.rglob("*.py"))):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    python, machine = ".".join(platform.python_version_tuple()[:2]), platform.machine()
    versions = {name: installed(name) for name in ("instantrt", *LIBRARIES)}
    return {"sources": digest.hexdigest(), "python": python, "machine": machine, **versions}


def installed(name: str) -> str:
    """The version of a library, and the digest of what its installer wrote: commits of a `.dev0` have one version."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return ""
    return f"{found.version} {hashlib.sha256((found.read_text('RECORD') or '').encode()).hexdigest()}"


def read(path: Path) -> bytes | None:
    """An entry's bytes: of a whole file that has this name, of this user or of the system."""
    with suppress(OSError), open(path, "rb", opener=no_link_nor_pipe) as file:
        about = os.fstat(file.fileno())
        if stat.S_ISREG(about.st_mode) and about.st_uid in (0, os.geteuid()) and about.st_size <= DIGEST + MOST_OF_ONE:
            digest, data = file.read(DIGEST), file.read()
            if digest == digest_of(path.name, data):
                with suppress(OSError):
                    os.utime(path)  # `prune` goes by it
                return data
    return None


def no_link_nor_pipe(path: str, flags: int) -> int:
    """Opens: what a link leads to is not followed, and what somebody would have to write first is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def keep(path: Path, data: bytes) -> None:
    """Writes an entry beside its name and renames it: nobody ever sees a part."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, new = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(digest_of(path.name, data) + data)
        Path(new).replace(path)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise


def digest_of(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def prune(folder: Path) -> None:
    """The entries that were used last stay, MOST bytes of them. Other files in the folder are not touched."""
    found = []
    for path in folder.iterdir():
        if ENTRY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another compile was here
                about = path.lstat()
                found.append((about.st_mtime_ns, about.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MOST:
            with suppress(OSError):
                path.unlink(missing_ok=True)

"""What is dear to make is made once: in a run by whichever of its processes asks first, or until its sources change."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled; the others wait for it. Nobody may change what is in it."""
    base = factory.getbasetemp()
    return made_in(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, name, make)


def kept(config: pytest.Config, name: str, sources: Iterable[Path], tools: str, make: Callable[[Path], object]) -> Path:
    """`made_once` for all runs, until one of `sources`, files and folders, or the version of `tools` is another.

    It lies in pytest's own cache; `--cache-clear` forgets it.
    """
    digest = hashlib.sha256(tools.encode())
    files = (path for source in sources for path in (source, *source.rglob("*")) if path.is_file())
    for path in sorted(path for path in files if "__pycache__" not in path.parts):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    cache = config.cache
    assert cache is not None
    root, current = cache.mkdir(name), digest.hexdigest()[:16]
    folder = made_in(root, current, make)
    for old in root.iterdir():
        if old.is_dir() and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def made_in(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """`root`/`name`, filled by `make` unless it is there, whole or not at all."""
    folder, making = root / name, root / f"{name}.making"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(making, ignore_errors=True)  # of one that failed
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder

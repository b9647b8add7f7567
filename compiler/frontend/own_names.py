"""Folders are made for some models (of a GGUF file, say): errors name the user's own files instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def own_names(held: Any, model: Path) -> Callable[[str], str]:
    """text -> the same without the folders that `held` keeps: what their links point to, or else `model`.

    held    what `FloatModel.held` is: folders, in nested pairs, the first made first
    """
    folders = [folder.name for folder in kept(held)]

    def own(found: re.Match[str]) -> str:
        path = Path(found[0])
        if path.is_symlink():
            return str(path.readlink())
        return str(model) if model.is_file() else f"{model}{found[1]}"

    def change(text: str) -> str:
        for folder in reversed(folders):  # a later one's links point into those before
            text = re.sub(rf"{re.escape(folder)}((?:/[\w.-]+)*)", own, text)
        return text

    return change


def kept(held: Any) -> Iterator[TemporaryDirectory[str]]:
    if isinstance(held, TemporaryDirectory):
        yield held
    for each in held if isinstance(held, tuple) else ():
        yield from kept(each)

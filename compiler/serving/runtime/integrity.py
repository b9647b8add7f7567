"""Is what lies in a folder what the compiler wrote? An engine and its plugins are code: this comes before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .digest import ChangedError, check_files
from .header import parse_header

RECORD = "artifact.json"
MODELS = {"onnx": "model.onnx", "engine": "model.engine"}


def check_folder(folder: Path, kind: str) -> tuple[Path, ...]:
    """The plugin libraries of the artifact in `folder`; RuntimeError where a file is not what its record says.

    kind   onnx or engine
    """
    record = json.loads((folder / RECORD).read_text("utf-8"))
    try:
        check_files(folder, record["files"], [MODELS[kind]])
    except ChangedError as error:
        raise RuntimeError(f"{error}: copy it again, or write the repository again") from None
    if kind == "engine":
        check_header(folder / MODELS[kind], record["engine"])
    return tuple(folder / name for name in record["files"] if name.endswith(".so"))


def check_header(path: Path, engine: dict[str, Any]) -> None:
    """RuntimeError where an engine is not by the builder and version that its record names."""
    header = parse_header(path)
    found = f"{header.flavour} {header.version}" if header else "no engine"
    if found != (expected := f"{engine['builder']} {engine['version']}"):
        raise RuntimeError(f"{path.name} is not the engine of its record: expected {expected}, found {found}")

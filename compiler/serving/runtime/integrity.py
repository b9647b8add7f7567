"""Is what lies in a folder what the compiler wrote? An engine and its plugins are code: this comes before loading."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

RECORD = "artifact.json"
MODELS = {"onnx": "model.onnx", "engine": "model.engine"}
Flavour = Literal["tensorrt", "tensorrt_rtx"]  # the module that built an engine, and runs it
MAGIC: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
HEADER = struct.Struct("<16sQ4B")  # magic and format, size of the file (TensorRT-RTX), version
CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """The digest of a file of any size, in little memory."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb") as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def parse_header(head: bytes) -> tuple[Flavour, int, str] | None:
    """(module, size, version) from the first bytes of an engine: what built it. None where they are no engine's."""
    flavour = MAGIC.get(head[:4])
    if flavour is None or len(head) < HEADER.size:
        return None
    _, size, *version = HEADER.unpack(head[: HEADER.size])
    return flavour, size, ".".join(map(str, version))


def check_folder(folder: Path, kind: str) -> tuple[Path, ...]:
    """The plugin libraries of the artifact in `folder`; RuntimeError where a file is not what its record says.

    kind   onnx or engine
    """
    record = json.loads((folder / RECORD).read_text("utf-8"))
    if MODELS[kind] not in record["files"]:
        raise RuntimeError(f"{RECORD} has no digest of {MODELS[kind]}: write the repository again")
    for name, expected in record["files"].items():
        path = folder / name
        found = sha256(path) if path.is_file() else "no such file"
        if found != expected:
            raise RuntimeError(
                f"{name} is not what the compiler wrote: expected sha256 {expected}, found {found}: "
                "copy it again, or write the repository again"
            )
    if kind == "engine":
        check_header(folder / MODELS[kind], record["engine"])
    return tuple(folder / name for name in record["files"] if name.endswith(".so"))


def check_header(path: Path, engine: dict[str, Any]) -> None:
    """RuntimeError where an engine is not by the builder and version that its record names."""
    with path.open("rb") as file:
        header = parse_header(file.read(HEADER.size))
    found = f"{header[0]} {header[2]}" if header else "no engine"
    if found != (expected := f"{engine['builder']} {engine['version']}"):
        raise RuntimeError(f"{path.name} is not the engine of its record: expected {expected}, found {found}")

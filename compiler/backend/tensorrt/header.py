"""The first bytes of an engine: which product built it, and its version. Also lies beside the runtime in Triton."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal, NamedTuple

Flavour = Literal["tensorrt", "tensorrt_rtx"]  # the module that built an engine, and runs it
MAGIC: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
HEADER = struct.Struct("<16sQ4B")  # magic and format, size of the file (TensorRT-RTX), version


class Header(NamedTuple):
    """What built an engine, its version, and the size of the file, which TensorRT-RTX alone says."""

    flavour: Flavour
    version: str
    size: int


def parse_header(engine: Path) -> Header | None:
    """Reads the start of an engine, deserializing nothing. None where it is the start of something else."""
    with engine.open("rb") as file:
        head = file.read(HEADER.size)
    flavour = MAGIC.get(head[:4])
    if flavour is None or len(head) < HEADER.size:
        return None
    _, size, *version = HEADER.unpack(head)
    return Header(flavour, ".".join(map(str, version)), size)

"""The first bytes of an engine: which product built it, and its version. Also lies beside the runtime in Triton."""

from __future__ import annotations

import struct
from typing import Literal

Flavour = Literal["tensorrt", "tensorrt_rtx"]  # the module that built an engine, and runs it
MAGIC: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
HEADER = struct.Struct("<16sQ4B")  # magic and format, size of the file (TensorRT-RTX), version


def parse_header(head: bytes) -> tuple[Flavour, int, str] | None:
    """(module, size, version) from the first bytes of an engine: what built it. None where they are no engine's."""
    flavour = MAGIC.get(head[:4])
    if flavour is None or len(head) < HEADER.size:
        return None
    _, size, *version = HEADER.unpack(head[: HEADER.size])
    return flavour, size, ".".join(map(str, version))

"""One odd input and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "files and tensors",
    "operator contracts",
    "converters",
    "state across calls",
    "identity",
    "refusals",
]


@dataclass(frozen=True)
class Row:
    """`make(folder)` writes the input and returns what to compile: a folder or an .onnx file.

    Where the point is which numbers are right (a scheme, a head), it also writes them: `reference_of(folder)`.

    what      the input, in the words of the docs' table; unique
    refused   words that the error must have; empty where the artifact must be right
    fields    of the Request, besides model, targets and out
    bound     largest error allowed against the reference, relative to its largest value
    """

    what: str
    kind: Kind
    make: Callable[[Path], Path]
    refused: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    target: str = "x86"
    bound: float = 1e-4


def reference_of(folder: Path) -> Path:
    """Where a row may write what its artifact must equal: a float checkpoint, or a float .onnx file of the same name.

    `int8_inputs` in the checkpoint's config.json names modules that meet tokens rounded to int8.
    """
    return folder.with_name("reference")

"""A file's tensors by the names that the model has for them, what it has in one and the model in parts as these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from instantrt.compiler.checkpoint import DTYPES
from instantrt.compiler.frontend.facts import ModelFacts
from instantrt.passes.core.lazy import FileTensor

FLOATS = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True)
class Piece:
    """A tensor, or one of equal parts of its rows: the file calls the tensor `own`, the model has this as `name`."""

    own: str
    name: str
    tensor: FileTensor


def pieces_of(stored: Mapping[str, FileTensor], facts: ModelFacts) -> list[Piece]:
    """Every tensor of a file; what the model has in parts and cannot be cut stays whole, under its own name."""
    return [piece for name, tensor in stored.items() for piece in pieces(name, tensor, facts)]


def pieces(name: str, tensor: FileTensor, facts: ModelFacts) -> Iterator[Piece]:
    names = facts.chunked.get(name, ())
    if not names or tensor.shape != facts.joined(names) or tensor.dtype not in FLOATS:
        yield Piece(name, facts.renamed.get(name, name), tensor)
        return
    shape = (tensor.shape[0] // len(names), *tensor.shape[1:])
    size = math.prod(shape) * tensor.dtype.itemsize
    for index, part in enumerate(names):
        yield Piece(name, part, replace(tensor, name=part, offset=tensor.offset + index * size, shape=shape))
